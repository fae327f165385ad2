import type { FastifyInstance } from 'fastify'
import type { StandbyDocument, StatusDocument } from '../../admin-types.ts'
import { version } from '../../version.ts'
import type { AdminContext } from './admin-context.ts'

export function addStatusRoute(server: FastifyInstance, context: AdminContext): void {
  server.get('/v1/status', async (): Promise<StatusDocument | StandbyDocument> => {
    const { composer, engine, clock, endpoints, ownership, catalogPath, startedAtMs } = context
    const { mapBytes, ringRefused } = engine.stats()
    const daemon = {
      ready: true,
      version,
      pid: process.pid,
      ...endpoints,
      uptimeSeconds: Math.floor((clock.monotonicMs() - startedAtMs) / 1000),
    } as const
    const { holder } = ownership
    if (holder !== null) return { ...daemon, standby: { catalog: catalogPath, active: holder } }
    return {
      ...daemon,
      standby: null,
      ...(await composer.status()),
      mapBytes,
      residentBytes: process.memoryUsage.rss(),
      waitingReads: { path: ringRefused === undefined ? 'io_uring' : 'threads', reason: ringRefused ?? null },
    }
  })
}
