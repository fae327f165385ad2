// The content that a request brings as its body, for as long as it is answered only when all of it was taken or refused.
import { Readable } from 'node:stream'
import type { FastifyRequest } from 'fastify'
import { AtollError } from '@atoll/core'

/**
 * Hands the body of a request to `take`. Who takes it may end it early: the connection stays, so that the answer gets through,
 * and what else is sent is thrown away.
 * @throws AtollError ARGUMENT_INVALID for a body of another kind, and what `take` throws
 */
export async function withContent<T>(
  request: FastifyRequest,
  take: (content: AsyncIterable<Uint8Array>) => Promise<T>,
): Promise<T> {
  // Without a byte there is no body.
  const body = request.body ?? Readable.from([], { objectMode: false })
  if (!(body instanceof Readable)) {
    throw new AtollError('ARGUMENT_INVALID', 'the content is wanted as application/octet-stream')
  }
  try {
    return await take(body.iterator({ destroyOnReturn: false }) as AsyncIterable<Uint8Array>)
  } finally {
    // A sender that is refused must not wait for somebody to read the rest.
    request.raw.resume()
  }
}
