import { request } from 'node:http'
import type { AddressInfo } from 'node:net'
import { expect, test } from 'vitest'
import { AtollError, silentLog, systemClock } from '@atoll/core'
import { JobInterrupted } from '@atoll/composer'
import type { AdminContext } from './admin-context.ts'
import { createAdminServer } from './admin-server.ts'

interface Taken {
  readonly stream: AsyncIterable<Uint8Array>
  readonly signal?: AbortSignal
}

/** A server whose files and images take content with `take`; `stop` is what the daemon's end is. */
async function listen(take: (taken: Taken) => Promise<unknown>) {
  const stopping = new AbortController()
  const context = {
    composer: {
      volumes: {},
      snapshots: {},
      images: { importStream: take },
      pools: {},
      jobs: {},
      files: { put: take, close: async () => {} },
    },
    ownership: { parts: {}, holder: null },
    engine: {},
    clock: systemClock,
    endpoints: { home: '/home', http: null, nbd: null, nbdSocket: null, iscsi: null },
    nbdTcp: null,
    startedAtMs: 0,
    stopping: stopping.signal,
  }
  const server = createAdminServer(context as unknown as AdminContext, silentLog())
  await server.listen({ host: '127.0.0.1', port: 0 })
  const { port } = server.server.address() as AddressInfo
  return { port, stop: () => stopping.abort(), [Symbol.asyncDispose]: async () => server.close() }
}

/** Sends `content`, then nothing more, and waits for the answer. */
async function send(port: number, path: string, content: Buffer): Promise<{ status: number | undefined; text: string }> {
  const { promise, resolve, reject } = Promise.withResolvers<{ status: number | undefined; text: string }>()
  const sent = request({ port, method: 'POST', path, headers: { 'content-type': 'application/octet-stream' } }, (response) => {
    let text = ''
    response.setEncoding('utf8').on('data', (part: string) => (text += part))
    response.on('end', () => resolve({ status: response.statusCode, text }))
  })
  sent.on('error', reject)
  sent.write(content)
  try {
    return await promise
  } finally {
    sent.destroy()
  }
}

const uploads = ['/v1/file/content?path=c/n', '/v1/images/upload?name=i']

test.each(uploads)('who ends the content early is heard, and the rest is thrown away (%s)', async (path) => {
  await using server = await listen(async ({ stream }) => {
    const iterator = stream[Symbol.asyncIterator]()
    await iterator.next()
    await iterator.return?.()
    throw new AtollError('POOL_NOT_FOUND', 'there is no such pool')
  })
  // More than the socket and every buffer between hold.
  const { status, text } = await send(server.port, path, Buffer.alloc(16 * 2 ** 20))
  expect([status, JSON.parse(text)]).toEqual([404, expect.objectContaining({ code: 'POOL_NOT_FOUND' })])
})

test('a sender of an image that is silent when the daemon stops is told so', async () => {
  const begun = Promise.withResolvers<void>()
  await using server = await listen(async ({ signal }) => {
    begun.resolve()
    await new Promise((resolve) => signal?.addEventListener('abort', resolve))
    throw new JobInterrupted()
  })
  const answer = send(server.port, '/v1/images/upload?name=i', Buffer.from('abc'))
  await begun.promise
  server.stop()
  expect(JSON.parse((await answer).text)).toMatchObject({ code: 'DAEMON_STOPPING' })
})

test.each(uploads)('a body that is no content is refused (%s)', async (path) => {
  await using server = await listen(async () => expect.unreachable())
  const url = `http://127.0.0.1:${server.port}${path}`
  const answer = await fetch(url, { method: 'POST', headers: { 'content-type': 'application/json' }, body: '{}' })
  expect([answer.status, await answer.json()]).toEqual([400, expect.objectContaining({ code: 'ARGUMENT_INVALID' })])
})
