import type { FastifyInstance } from 'fastify'
import { z } from 'zod'
import type { AdminContext } from './admin-context.ts'
import { checkRequest, typedText } from './check-request.ts'

const backup = z.strictObject({ path: typedText })

export function addCatalogRoutes(server: FastifyInstance, { composer }: AdminContext): void {
  server.post('/v1/catalog/backup', async (request, reply) => {
    const { path } = checkRequest(backup, request.body)
    return reply.code(201).send({ path, ...(await composer.catalog.backup(path)) })
  })
}
