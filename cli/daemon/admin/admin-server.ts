// The admin API: what the CLI speaks, over a unix socket that only the daemon's user can open. A route checks what came in
// and forwards it to the composer; it decides nothing. Errors go out as {code, message, values} with the catalogue's status.
import { chmod } from 'node:fs/promises'
import { fastify } from 'fastify'
import type { FastifyInstance } from 'fastify'
import { AtollError, toAtollError } from '@atoll/core'
import type { Logger } from '@atoll/core'
import { addActivityRoute } from './activity-route.ts'
import { addFileRoutes } from './file-routes.ts'
import { addImageRoutes } from './image-routes.ts'
import { addJobRoutes } from './job-routes.ts'
import { addMoveRoutes } from './move-routes.ts'
import { addCatalogRoutes } from './catalog-routes.ts'
import { addCheckRoutes } from './check-routes.ts'
import { addPoolRoutes } from './pool-routes.ts'
import { addSnapshotRoutes } from './snapshot-routes.ts'
import { addStatusRoute } from './status-route.ts'
import { addVolumeRoutes } from './volume-routes.ts'
import type { AdminContext } from './admin-context.ts'

/** Bodies of JSON; images come as streams and have no limit here. */
const jsonBytesMax = 1024 * 1024
/** A name has 255 characters of up to 4 bytes, each written as %XX; VOL@SNAP has two of them. */
const pathSegmentBytesMax = 2 * 255 * 4 * 3 + 16

/** A query may carry the name of a file (1280 bytes) and its metadata (4096 bytes as JSON), each byte written as %XX. */
const headerBytesMax = 65_536

export interface AdminServer {
  /** Takes no new requests and waits for those that run. */
  close(): Promise<void>
}

/** Makes the server with all its routes; `listen` is the caller's, so that tests can inject requests. */
export function createAdminServer(context: AdminContext, log: Logger): FastifyInstance {
  const server = fastify({
    bodyLimit: jsonBytesMax,
    http: { maxHeaderSize: headerBytesMax },
    forceCloseConnections: 'idle',
    return503OnClosing: true,
    routerOptions: { maxParamLength: pathSegmentBytesMax },
  })
  // A stream stays one: the route hands it on.
  server.addContentTypeParser('application/octet-stream', (_request, payload, done) => done(null, payload))
  server.setErrorHandler((error: unknown, request, reply) => {
    const failure = asAtollError(error)
    if (failure.code === 'INTERNAL')
      log.error({ err: failure, method: request.method, url: request.url }, 'a request of the admin socket failed')
    return reply.code(failure.httpStatus).send(failure.toData())
  })
  server.setNotFoundHandler((request, reply) => {
    const failure = new AtollError(
      'NOT_FOUND',
      `there is no ${request.method} ${request.url}: the CLI and the daemon may be of different versions`,
    )
    return reply.code(failure.httpStatus).send(failure.toData())
  })
  // The active daemon may be gone by now: then this one is it from here on.
  server.addHook('onRequest', async () => {
    if (context.ownership.parts === null) await context.ownership.becomeActive()
  })
  addStatusRoute(server, context)
  addActivityRoute(server, context)
  addPoolRoutes(server, context)
  addCatalogRoutes(server, context)
  addCheckRoutes(server, context)
  addVolumeRoutes(server, context)
  addSnapshotRoutes(server, context)
  addImageRoutes(server, context)
  addFileRoutes(server, context)
  addJobRoutes(server, context)
  addMoveRoutes(server, context)
  return server
}

/** Errors of fastify itself (a body that is no JSON, one that is too large) have a status below 500. */
function asAtollError(error: unknown): AtollError {
  const { statusCode, message } = error as { statusCode?: number; message?: string }
  if (!(error instanceof AtollError) && statusCode !== undefined && statusCode < 500) {
    return new AtollError('ARGUMENT_INVALID', message ?? 'the request cannot be read', { cause: error })
  }
  return toAtollError(error)
}

/** Listens on the socket, mode 0600. The home around it is 0700, so nobody gets in between the two steps. */
export async function listenAdmin(server: FastifyInstance, path: string): Promise<AdminServer> {
  try {
    await server.listen({ path })
    await chmod(path, 0o600)
  } catch (error) {
    throw new AtollError(
      'LISTEN_FAILED',
      `the admin socket ${path} cannot be made: ${error instanceof Error ? error.message : String(error)}`,
      {
        values: { path },
        cause: error,
      },
    )
  }
  return { close: () => server.close() }
}
