import type { FastifyInstance } from 'fastify'
import { z } from 'zod'
import { parseSize } from '@atoll/core'
import type { AdminContext } from './admin-context.ts'
import { checkRequest, pageFields, projectField, queryFlag, typedText } from './check-request.ts'
import { attachmentDocument, resourceDocument, resourcePageDocument } from './document.ts'

const named = z.strictObject({ volume: typedText })
const scope = z.strictObject(projectField)
const listing = z.strictObject({ ...pageFields, ...projectField })
const creation = z.strictObject({
  name: typedText,
  size: typedText.optional(),
  pool: typedText.optional(),
  from: typedText.optional(),
  ...projectField,
})
const deletion = z.strictObject({ withSnapshots: queryFlag.optional(), ...projectField })
const renaming = z.strictObject({ name: typedText, ...projectField })
const resizing = z.strictObject({ size: typedText, force: z.boolean().optional(), ...projectField })
const attaching = z.strictObject({
  protocol: z.enum(['nbd', 'iscsi']).optional(),
  readOnly: z.boolean().optional(),
  shared: z.boolean().optional(),
  takeOver: z.boolean().optional(),
  ...projectField,
})

export function addVolumeRoutes(server: FastifyInstance, context: AdminContext): void {
  const { composer, ownership } = context
  const { volumes } = composer

  server.post('/v1/volumes', async (request, reply) => {
    const { size, ...options } = checkRequest(creation, request.body)
    const created = await volumes.create({ ...options, ...(size === undefined ? {} : { sizeBytes: parseSize(size) }) })
    return reply.code(201).send(resourceDocument(created, context))
  })
  server.get('/v1/volumes', async (request) => {
    return resourcePageDocument(await volumes.list(checkRequest(listing, request.query)), context)
  })
  server.get('/v1/volumes/:volume', async (request) => {
    const { volume } = checkRequest(named, request.params)
    return resourceDocument(await volumes.show(volume, checkRequest(scope, request.query)), context)
  })
  server.delete('/v1/volumes/:volume', async (request) => {
    const { volume } = checkRequest(named, request.params)
    await volumes.delete(volume, checkRequest(deletion, request.query))
    return { deleted: volume }
  })
  server.post('/v1/volumes/:volume/rename', async (request) => {
    const { volume } = checkRequest(named, request.params)
    const { name, ...options } = checkRequest(renaming, request.body)
    return resourceDocument(await volumes.rename(volume, name, options), context)
  })
  server.post('/v1/volumes/:volume/resize', async (request) => {
    const { volume } = checkRequest(named, request.params)
    const { size, ...options } = checkRequest(resizing, request.body)
    return resourceDocument(await volumes.resize(volume, parseSize(size), options), context)
  })
  server.post('/v1/volumes/:volume/attach', async (request) => {
    const { volume } = checkRequest(named, request.params)
    const options = checkRequest(attaching, request.body)
    if (options.takeOver === true) await ownership.takeOver(volume, options)
    return attachmentDocument(await volumes.attach(volume, options), context)
  })
  server.post('/v1/volumes/:volume/detach', async (request) => {
    const { volume } = checkRequest(named, request.params)
    await volumes.detach(volume, checkRequest(scope, request.body))
    return { detached: volume }
  })
}
