import type { FastifyInstance } from 'fastify'
import { z } from 'zod'
import type { AdminContext } from './admin-context.ts'
import { checkRequest, projectField, typedText } from './check-request.ts'
import { toDocument } from './document.ts'

const named = z.strictObject({ pool: typedText })
const settings = z.record(typedText, typedText)
const creation = z.strictObject({
  name: typedText,
  driver: typedText,
  options: z.record(typedText, z.string().max(65_536)),
  settings: settings.optional(),
  ...projectField,
})

const setting = z.strictObject({ settings })
const acceptance = z.strictObject({ confirmed: z.boolean() })
const importation = z.strictObject({
  name: typedText,
  driver: typedText.optional(),
  options: z.record(typedText, z.string().max(65_536)).optional(),
  takeOver: z.boolean(),
  dryRun: z.boolean(),
})

export function addPoolRoutes(server: FastifyInstance, { composer }: AdminContext): void {
  const { pools } = composer

  server.post('/v1/pools', async (request, reply) => {
    const created = await pools.create(checkRequest(creation, request.body))
    return reply.code(201).send(toDocument(created))
  })
  server.post('/v1/pool-imports', async (request) => {
    const { driver, options, ...wanted } = checkRequest(importation, request.body)
    const place = driver === undefined ? {} : { driver, options: options ?? {} }
    return await pools.import({ ...wanted, ...place })
  })
  server.get('/v1/pools', async () => {
    const found = await pools.list()
    return found.map((view) => toDocument(view))
  })
  server.get('/v1/pools/:pool', async (request) => toDocument(await pools.show(checkRequest(named, request.params).pool)))
  server.delete('/v1/pools/:pool', async (request) => {
    const { pool } = checkRequest(named, request.params)
    await pools.delete(pool)
    return { deleted: pool }
  })
  server.post('/v1/pools/:pool/settings', async (request) => {
    const { pool } = checkRequest(named, request.params)
    return toDocument(await pools.set(pool, checkRequest(setting, request.body).settings))
  })
  server.post('/v1/pools/:pool/accept', async (request) => {
    const { pool } = checkRequest(named, request.params)
    return await pools.accept(pool, checkRequest(acceptance, request.body))
  })
  server.post('/v1/pools/:pool/check', async (request) => ({
    findings: await pools.check(checkRequest(named, request.params).pool),
  }))
  server.post('/v1/pools/:pool/reclaim', async (request, reply) => {
    const started = await pools.reclaim(checkRequest(named, request.params).pool)
    return reply.code(202).send(toDocument(started))
  })
}
