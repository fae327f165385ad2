import type { FastifyInstance } from 'fastify'
import { z } from 'zod'
import { activityIntervalMsMax, activityIntervalMsMin } from '@atoll/composer'
import { metricsContentType } from '../metrics/metrics-text.ts'
import type { AdminContext } from './admin-context.ts'
import { checkRequest } from './check-request.ts'

const watching = z.strictObject({
  intervalMs: z.coerce.number().int().min(activityIntervalMsMin).max(activityIntervalMsMax).optional(),
})
const intervalMsDefault = 1000

export function addActivityRoute(server: FastifyInstance, { composer, metrics, stopping }: AdminContext): void {
  server.get('/v1/metrics', async (_request, reply) => reply.type(metricsContentType).send(await metrics()))
  // The answer comes when the interval is over.
  server.get('/v1/activity', async (request) => {
    const { intervalMs } = checkRequest(watching, request.query)
    return await composer.activity.over(intervalMs ?? intervalMsDefault, stopping)
  })
}
