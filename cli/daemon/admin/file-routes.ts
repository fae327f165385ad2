import { Readable } from 'node:stream'
import type { FastifyInstance } from 'fastify'
import { z } from 'zod'
import { AtollError, parseFilePath, parseSize } from '@atoll/core'
import { listingLimitMax, type FileService, type Reading, type ReadOptions } from '@atoll/composer'
import type { AdminContext } from './admin-context.ts'
import { checkRequest, projectField, queryFlag, typedText } from './check-request.ts'
import { sparseContentType } from '../../sparse-frames.ts'
import { toDocument } from './document.ts'
import { withContent } from './request-content.ts'
import { SparseContent } from './sparse-content.ts'

/** Metadata travels as JSON text in a query. */
const metadataText = z
  .string()
  .max(65_536)
  .transform((text, check) => {
    try {
      return JSON.parse(text) as unknown
    } catch {
      check.addIssue('metadata is no JSON')
      return z.NEVER
    }
  })
const metadata = z.record(z.string(), z.string())
const count = z.coerce.number().int().min(0)

const scope = z.strictObject(projectField)
const container = { container: typedText, ...projectField }
const oneContainer = z.strictObject(container)
const containerChange = z.strictObject({ versioned: z.boolean().optional(), metadata: metadata.optional(), ...container })
const fileChange = z.strictObject({
  path: typedText,
  contentType: typedText.optional(),
  metadata: metadata.optional(),
  ...projectField,
})
const listing = z.strictObject({
  prefix: typedText.optional(),
  delimiter: typedText.optional(),
  marker: typedText.optional(),
  endMarker: typedText.optional(),
  versionMarker: typedText.optional(),
  versions: queryFlag.optional(),
  limit: z.coerce.number().int().min(1).max(listingLimitMax).optional(),
  ...container,
})
const oneFile = z.strictObject({ path: typedText, version: typedText.optional(), ...projectField })
const range = { offset: typedText.optional(), length: typedText.optional() }
const reading = oneFile.extend(range)
const readingSource = z.strictObject({ source: typedText, ...range, ...projectField })
const placing = { path: typedText, contentType: typedText.optional(), onlyIfNew: queryFlag.optional(), ...projectField }
const putting = z.strictObject({
  sizeBytes: count.optional(),
  pool: typedText.optional(),
  metadata: metadataText.pipe(metadata).optional(),
  ...placing,
})
const sharing = z.strictObject({
  from: typedText,
  metadata: metadata.optional(),
  ...placing,
  onlyIfNew: z.boolean().optional(),
})

export function addFileRoutes(server: FastifyInstance, { composer, ownership, stopping }: AdminContext): void {
  const { files } = composer
  // The server waits for its requests: puts and reads may last for ever. One that stands by has none.
  const endRequests = (): void => {
    if (ownership.parts !== null) void files.close()
  }
  stopping.addEventListener('abort', endRequests, { once: true })

  server.get('/v1/containers', async (request) => {
    const found = await files.listContainers(checkRequest(scope, request.query))
    return found.map((view) => toDocument(view))
  })
  server.get('/v1/container', async (request) => {
    const { container: name, ...options } = checkRequest(oneContainer, request.query)
    return toDocument(await files.showContainer(name, options))
  })
  server.post('/v1/containers', async (request, reply) => {
    const { container: name, ...options } = checkRequest(containerChange, request.body)
    const { container: view, created } = await files.createContainer(name, options)
    if (!created) {
      throw new AtollError('NAME_TAKEN', `there is already a container named ${JSON.stringify(name)}`, {
        values: { id: view.id },
      })
    }
    return reply.code(201).send(toDocument(view))
  })
  server.post('/v1/container', async (request) => {
    const { container: name, ...options } = checkRequest(containerChange, request.body)
    return toDocument(await files.setContainer(name, options))
  })
  server.delete('/v1/container', async (request) => {
    const { container: name, ...options } = checkRequest(oneContainer, request.query)
    await files.deleteContainer(name, options)
    return { deleted: name }
  })
  server.get('/v1/files', async (request) => {
    const { container: name, ...options } = checkRequest(listing, request.query)
    const { entries, next } = await files.list(name, options)
    return { entries: entries.map((entry) => ('commonPrefix' in entry ? entry : toDocument(entry))), next }
  })
  server.get('/v1/file', async (request) => toDocument(await files.show(checkRequest(oneFile, request.query))))
  server.post('/v1/file', async (request) => {
    const { contentType, metadata: said, ...ref } = checkRequest(fileChange, request.body)
    const changes = { ...(said === undefined ? {} : { metadata: said }), ...(contentType === undefined ? {} : { contentType }) }
    return toDocument(await files.set(ref, changes))
  })
  server.delete('/v1/file', async (request) => {
    const ref = checkRequest(oneFile, request.query)
    await files.delete(ref)
    return { deleted: ref.path }
  })
  server.get('/v1/file/content', async (request, reply) => {
    const query = request.query as Record<string, unknown>
    const { content, lengthBytes, sizeBytes } = 'source' in query ? await openSource(files, query) : await openFile(files, query)
    reply.header('atoll-length', lengthBytes).header('atoll-size', sizeBytes)
    if (request.headers.accept === sparseContentType) {
      const frames = new SparseContent(content)
      return reply.header('content-type', sparseContentType).send(Readable.from(frames, { objectMode: false }))
    }
    // The length lets the client see that something broke off.
    reply.header('content-type', 'application/octet-stream').header('content-length', lengthBytes)
    return reply.send(Readable.from(content, { objectMode: false }))
  })
  // The content is the body of this request, so the answer comes when all of it is stored.
  server.post('/v1/file/content', async (request) =>
    withContent(request, async (stream) => {
      const { path, ...options } = checkRequest(putting, request.query)
      const { container: name, name: file } = parseFilePath(path)
      return toDocument(await files.put({ ...options, container: name, name: file, stream }))
    }),
  )
  server.post('/v1/file/share', async (request, reply) => {
    const { path, ...options } = checkRequest(sharing, request.body)
    const { container: name, name: file } = parseFilePath(path)
    return reply.code(201).send(toDocument(await files.putFrom({ ...options, container: name, name: file })))
  })
}

async function openFile(files: FileService, query: unknown): Promise<Reading> {
  const { offset, length, ...ref } = checkRequest(reading, query)
  return await files.read(ref, rangeOf(offset, length))
}

async function openSource(files: FileService, query: unknown): Promise<Reading> {
  const { source, offset, length, ...options } = checkRequest(readingSource, query)
  return await files.readSource(source, options, rangeOf(offset, length))
}

function rangeOf(offset: string | undefined, length: string | undefined): ReadOptions {
  return {
    ...(offset === undefined ? {} : { offsetBytes: parseSize(offset) }),
    ...(length === undefined ? {} : { lengthBytes: parseSize(length) }),
  }
}
