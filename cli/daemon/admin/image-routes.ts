import type { FastifyInstance } from 'fastify'
import { z } from 'zod'
import { AtollError } from '@atoll/core'
import { imageFormats, JobInterrupted } from '@atoll/composer'
import type { JobView } from '@atoll/composer'
import type { AdminContext } from './admin-context.ts'
import { checkRequest, pageFields, projectField, typedText } from './check-request.ts'
import { resourceDocument, resourcePageDocument, toDocument } from './document.ts'
import { withContent } from './request-content.ts'

const named = z.strictObject({ image: typedText })
const scope = z.strictObject(projectField)
const listing = z.strictObject({ ...pageFields, ...projectField })
const target = { name: typedText, pool: typedText.optional(), format: z.enum(imageFormats).optional(), ...projectField }
const importing = z.strictObject({ source: typedText, ...target })
const uploading = z.strictObject({ sizeBytes: z.coerce.number().int().min(0).optional(), ...target })
const exporting = z.strictObject({
  path: typedText,
  format: typedText.optional(),
  compress: z.boolean().optional(),
  overwrite: z.boolean().optional(),
  ...projectField,
})
const creation = z.strictObject({ name: typedText, from: typedText, ...projectField })

export function addImageRoutes(server: FastifyInstance, context: AdminContext): void {
  const { composer, stopping } = context
  const { images, jobs } = composer

  server.post('/v1/images', async (request, reply) => {
    const created = await images.create(checkRequest(creation, request.body))
    return reply.code(201).send(resourceDocument(created, context))
  })
  server.get('/v1/images', async (request) => {
    return resourcePageDocument(await images.list(checkRequest(listing, request.query)), context)
  })
  server.get('/v1/images/:image', async (request) => {
    const { image } = checkRequest(named, request.params)
    return resourceDocument(await images.show(image, checkRequest(scope, request.query)), context)
  })
  server.delete('/v1/images/:image', async (request) => {
    const { image } = checkRequest(named, request.params)
    await images.delete(image, checkRequest(scope, request.query))
    return { deleted: image }
  })
  server.post('/v1/images/import', async (request, reply) => {
    const { source, ...options } = checkRequest(importing, request.body)
    if (source.startsWith('/')) {
      const started = await images.import({ ...options, path: source })
      return reply.code(202).send(toDocument(started))
    }
    if (!/^(?:https?|nbd(?:\+unix)?):\/\//.test(source)) {
      // Not shown: a URL may hold a password.
      throw new AtollError(
        'IMAGE_SOURCE_INVALID',
        'this source cannot be imported: a path, an http://, https://, nbd:// or nbd+unix:// URL, or - (standard input) is wanted',
      )
    }
    const started = await images.importUrl({ ...options, url: source })
    return reply.code(202).send(toDocument(started))
  })
  // The stream is the body of this request, so the answer comes when the job has ended.
  server.post('/v1/images/upload', async (request) =>
    withContent(request, async (stream) => {
      try {
        const started = await images.importStream({ ...checkRequest(uploading, request.query), stream, signal: stopping })
        return toDocument(requireDone(await jobs.wait(started.id, { signal: stopping })))
      } catch (error) {
        if (!(error instanceof JobInterrupted)) throw error
        throw new AtollError('DAEMON_STOPPING', 'the daemon is being stopped: start the import again when it is back', {
          cause: error,
        })
      }
    }),
  )
  server.post('/v1/images/:image/export', async (request, reply) => {
    const { image } = checkRequest(named, request.params)
    const started = await images.export(image, checkRequest(exporting, request.body))
    return reply.code(202).send(toDocument(started))
  })
}

function requireDone(job: JobView): JobView {
  if (job.error !== null) throw AtollError.fromData(job.error)
  if (job.state !== 'done') throw new AtollError('JOB_CANCELLED', `job ${job.id} was ${job.state}`, { values: { job: job.id } })
  return job
}
