// The HTTP listener: what is open to every local user. Until the APIs are served it answers whether the daemon is well, and what
// is measured of it and of its pools.
import { fastify } from 'fastify'
import { AtollError } from '@atoll/core'
import type { ListenAddress } from '@atoll/core'
import { metricsContentType } from './metrics/metrics-text.ts'

export interface HttpListener {
  /** `http://HOST:PORT` with the port that was taken. */
  readonly url: string
  close(): Promise<void>
}

export interface HttpSources {
  /** What `/healthz` answers. */
  readonly status: () => 'ok' | 'standby' | 'stopping'
  /** The text of `/metrics`: for everybody who reaches the port. */
  readonly metrics: () => Promise<string>
}

/**
 * Listens. `/healthz` answers 200, and 503 when the daemon is stopping.
 * @throws AtollError LISTEN_FAILED naming the address
 */
export async function startHttpListener(address: ListenAddress, { status, metrics }: HttpSources): Promise<HttpListener> {
  const server = fastify({ forceCloseConnections: true, routerOptions: { ignoreTrailingSlash: true } })
  server.get('/healthz', async (_request, reply) => {
    const present = status()
    return reply.code(present === 'stopping' ? 503 : 200).send({ status: present })
  })
  server.get('/metrics', async (_request, reply) => reply.type(metricsContentType).send(await metrics()))
  server.setNotFoundHandler((_request, reply) => reply.code(404).send({ code: 'NOT_FOUND', message: 'there is nothing here' }))
  try {
    await server.listen({ host: address.host, port: address.port })
  } catch (error) {
    const where = hostPort(address.host, address.port)
    const reason = (error as NodeJS.ErrnoException).code === 'EADDRINUSE' ? 'something else listens there' : String(error)
    throw new AtollError(
      'LISTEN_FAILED',
      `HTTP cannot listen on ${where}: ${reason}. Choose another address with --http (port 0 picks a free one)`,
      {
        values: { address: where },
        cause: error,
      },
    )
  }
  const bound = server.server.address()
  const port = typeof bound === 'object' && bound !== null ? bound.port : address.port
  return { url: `http://${hostPort(address.host, port)}`, close: () => server.close() }
}

/** As it stands in a URL: an IPv6 address in brackets. */
function hostPort(host: string, port: number): string {
  return host.includes(':') ? `[${host}]:${port}` : `${host}:${port}`
}
