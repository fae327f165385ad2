import type { FastifyInstance } from 'fastify'
import type { StatusDocument } from '../../admin-types.ts'
import { version } from '../../version.ts'
import type { AdminContext } from './admin-context.ts'

export function addStatusRoute(server: FastifyInstance, context: AdminContext): void {
  server.get('/v1/status', async (): Promise<StatusDocument> => {
    const { composer, engine, clock, endpoints, startedAtMs } = context
    const { mapBytes, ringRefused } = engine.stats()
    return {
      ready: true,
      version,
      pid: process.pid,
      ...endpoints,
      uptimeSeconds: Math.floor((clock.monotonicMs() - startedAtMs) / 1000),
      ...(await composer.status()),
      mapBytes,
      residentBytes: process.memoryUsage.rss(),
      waitingReads: { path: ringRefused === undefined ? 'io_uring' : 'threads', reason: ringRefused ?? null },
    }
  })
}
