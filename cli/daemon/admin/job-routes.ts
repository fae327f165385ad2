import type { FastifyInstance } from 'fastify'
import { z } from 'zod'
import { JobInterrupted } from '@atoll/composer'
import type { AdminContext } from './admin-context.ts'
import { checkRequest, typedText } from './check-request.ts'
import { toDocument } from './document.ts'
import { parseLimit } from './move-routes.ts'

/** A request waits at most this long for a job: longer waits are made of several. */
const waitMsMax = 10_000

const named = z.strictObject({ job: typedText })
const watching = z.strictObject({ waitMs: z.coerce.number().int().min(0).max(waitMsMax).optional() })

const limiting = z.strictObject({ limit: typedText })

export function addJobRoutes(server: FastifyInstance, { composer, stopping }: AdminContext): void {
  const { jobs, moves } = composer

  server.get('/v1/jobs', async () => {
    const found = await jobs.list()
    return found.map((view) => toDocument(view))
  })
  server.get('/v1/jobs/:job', async (request) => {
    const { job } = checkRequest(named, request.params)
    const { waitMs } = checkRequest(watching, request.query)
    if (waitMs !== undefined && waitMs > 0) {
      const signal = AbortSignal.any([AbortSignal.timeout(waitMs), stopping])
      try {
        return toDocument(await jobs.wait(job, { signal }))
      } catch (error) {
        // The time is over: how far it is now is the answer.
        if (!(error instanceof JobInterrupted)) throw error
      }
    }
    return toDocument(await jobs.show(job))
  })
  server.post('/v1/jobs/:job/pause', async (request) => toDocument(await jobs.pause(checkRequest(named, request.params).job)))
  server.post('/v1/jobs/:job/resume', async (request) => toDocument(await jobs.resume(checkRequest(named, request.params).job)))
  server.post('/v1/jobs/:job/cancel', async (request) => toDocument(await jobs.cancel(checkRequest(named, request.params).job)))
  server.post('/v1/jobs/:job/limit', async (request) => {
    const { limit } = checkRequest(limiting, request.body)
    return toDocument(await moves.setLimit(checkRequest(named, request.params).job, parseLimit(limit)))
  })
}
