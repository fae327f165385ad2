import type { FastifyInstance } from 'fastify'
import { z } from 'zod'
import type { AdminContext } from './admin-context.ts'
import { checkRequest, pageFields, projectField, typedText } from './check-request.ts'
import { resourceDocument, resourcePageDocument } from './document.ts'

const named = z.strictObject({ snapshot: typedText })
const scope = z.strictObject(projectField)
const creation = z.strictObject({ snapshots: z.array(typedText).max(1000), ...projectField })
const listing = z.strictObject({ volume: typedText, ...pageFields, ...projectField })
const comparison = z.strictObject({ from: typedText, to: typedText.optional(), ...projectField })

export function addSnapshotRoutes(server: FastifyInstance, context: AdminContext): void {
  const { composer } = context
  const { snapshots } = composer

  server.post('/v1/snapshots', async (request, reply) => {
    const { snapshots: names, ...options } = checkRequest(creation, request.body)
    const created = await snapshots.create(names, options)
    return reply
      .code(201)
      .send({ snapshots: created.snapshots.map((view) => resourceDocument(view, context)), pauseMs: created.pauseMs })
  })
  server.get('/v1/snapshots', async (request) => {
    const { volume, ...options } = checkRequest(listing, request.query)
    return resourcePageDocument(await snapshots.list(volume, options), context)
  })
  server.get('/v1/snapshots/:snapshot', async (request) => {
    const { snapshot } = checkRequest(named, request.params)
    return resourceDocument(await snapshots.show(snapshot, checkRequest(scope, request.query)), context)
  })
  server.delete('/v1/snapshots/:snapshot', async (request) => {
    const { snapshot } = checkRequest(named, request.params)
    await snapshots.delete(snapshot, checkRequest(scope, request.query))
    return { deleted: snapshot }
  })
  server.post('/v1/snapshots/:snapshot/rollback', async (request) => {
    const { snapshot } = checkRequest(named, request.params)
    const options = checkRequest(scope, request.body)
    const { volumeId } = await snapshots.show(snapshot, options)
    await snapshots.rollback(snapshot, options)
    return resourceDocument(await composer.volumes.show(volumeId, options), context)
  })
  server.get('/v1/diff', async (request) => {
    const { from, to, ...options } = checkRequest(comparison, request.query)
    return await snapshots.diff(from, to, options)
  })
}
