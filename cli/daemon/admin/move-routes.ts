import type { FastifyInstance } from 'fastify'
import { z } from 'zod'
import type { StartedMove } from '@atoll/composer'
import { parseSize } from '@atoll/core'
import type { MoveDocument } from '../../admin-types.ts'
import type { AdminContext } from './admin-context.ts'
import { checkRequest, projectField, typedText } from './check-request.ts'
import { toDocument } from './document.ts'

const volumeNamed = z.strictObject({ volume: typedText })
const poolNamed = z.strictObject({ pool: typedText })
const moveFields = { to: typedText, limit: typedText.optional(), dryRun: z.boolean().optional() }
const migration = z.strictObject({ ...moveFields, withSnapshots: z.boolean().optional(), ...projectField })
const draining = z.strictObject(moveFields)

export function addMoveRoutes(server: FastifyInstance, { composer }: AdminContext): void {
  const { moves } = composer

  server.post('/v1/volumes/:volume/migrate', async (request, reply) => {
    const { volume } = checkRequest(volumeNamed, request.params)
    const { limit, ...options } = checkRequest(migration, request.body)
    const started = await moves.migrate(volume, { ...options, limitBytesPerSecond: parseLimit(limit) })
    return reply.code(started.job === null ? 200 : 202).send(moveDocument(started))
  })
  server.post('/v1/pools/:pool/drain', async (request, reply) => {
    const { pool } = checkRequest(poolNamed, request.params)
    const { limit, ...options } = checkRequest(draining, request.body)
    const started = await moves.drain(pool, { ...options, limitBytesPerSecond: parseLimit(limit) })
    return reply.code(started.job === null ? 200 : 202).send(moveDocument(started))
  })
}

/** Bytes per second as typed; `none` and what is left out: null, no limit. @throws AtollError SIZE_INVALID */
export function parseLimit(limit: string | undefined): number | null {
  return limit === undefined || limit === 'none' ? null : parseSize(limit)
}

function moveDocument({ plan, job }: StartedMove): MoveDocument {
  return { plan, job: job === null ? null : toDocument(job) }
}
