import type { FastifyInstance } from 'fastify'
import { z } from 'zod'
import type { AdminContext } from './admin-context.ts'
import { checkRequest } from './check-request.ts'
import { toDocument } from './document.ts'

const start = z.strictObject({ repair: z.boolean(), deep: z.boolean() })

export function addCheckRoutes(server: FastifyInstance, { composer }: AdminContext): void {
  server.post('/v1/check', async (request, reply) => {
    const started = await composer.checks.start(checkRequest(start, request.body))
    return reply.code(202).send(toDocument(started))
  })
}
