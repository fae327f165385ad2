import { Readable } from 'node:stream'
import { expect, test } from 'vitest'
import { AtollError, silentLog, systemClock } from '@atoll/core'
import type { AdminContext } from './admin-context.ts'
import { createAdminServer } from './admin-server.ts'

/** A server over files only. */
function serverOver(files: Record<string, (...args: never[]) => unknown>): ReturnType<typeof createAdminServer> {
  const context = {
    composer: { volumes: {}, snapshots: {}, images: {}, pools: {}, jobs: {}, files },
    ownership: { parts: {}, holder: null },
    engine: {},
    clock: systemClock,
    endpoints: { home: '/home', http: null, nbd: null, nbdSocket: null, iscsi: null },
    nbdTcp: null,
    startedAtMs: 0,
    stopping: new AbortController().signal,
  }
  return createAdminServer(context as unknown as AdminContext, silentLog())
}

const octets = { 'content-type': 'application/octet-stream' }

async function received(stream: AsyncIterable<Uint8Array>): Promise<string> {
  const parts: Uint8Array[] = []
  for await (const part of stream) parts.push(part)
  return String(Buffer.concat(parts))
}

test('the content of a put is its body, also an empty one, and what it is called and said about it is its query', async () => {
  const puts: unknown[] = []
  const server = serverOver({
    put: async ({ stream, ...options }: { stream: AsyncIterable<Uint8Array> }) => {
      puts.push({ ...options, content: await received(stream) })
      return { id: '1' }
    },
  })
  const query = new URLSearchParams({ path: 'ü ?/a/b', sizeBytes: '3', metadata: '{"k":"v"}', onlyIfNew: 'true' })
  const url = `/v1/file/content?${query.toString()}`
  await server.inject({ method: 'POST', url, headers: octets, payload: Buffer.from('abc') })
  await server.inject({ method: 'POST', url: '/v1/file/content?path=c/n', headers: octets, payload: Readable.from([]) })
  await server.inject({ method: 'POST', url: '/v1/file/content?path=c/n', headers: { ...octets, 'content-length': '0' } })
  expect(puts).toEqual([
    { container: 'ü ?', name: 'a/b', sizeBytes: 3, metadata: { k: 'v' }, onlyIfNew: true, content: 'abc' },
    { container: 'c', name: 'n', content: '' },
    { container: 'c', name: 'n', content: '' },
  ])
  for (const wrong of ['path=c/n&metadata=x', 'path=c/n&metadata=[1]', 'path=c/n&sizeBytes=-1', 'path=c/n&colour=red', '']) {
    const response = await server.inject({ method: 'POST', url: `/v1/file/content?${wrong}`, headers: octets, payload: 'x' })
    expect([response.statusCode, response.json<{ code: string }>().code], wrong).toEqual([400, 'ARGUMENT_INVALID'])
  }
  const nameless = await server.inject({ method: 'POST', url: '/v1/file/content?path=c', headers: octets, payload: 'x' })
  expect(nameless.json()).toMatchObject({ code: 'NAME_INVALID' })
})

test('a read is answered with its length, and a refusal with its code', async () => {
  const server = serverOver({
    read: async ({ path }: { path: string }, range: object) => {
      if (path !== 'c/n') throw new AtollError('FILE_NOT_FOUND', 'there is no such file')
      expect(range).toEqual({ offsetBytes: 1024, lengthBytes: 3 })
      return { content: Readable.from([Buffer.from('abc')]), lengthBytes: 3, sizeBytes: 5000 }
    },
  })
  const response = await server.inject({ url: '/v1/file/content?path=c/n&offset=1K&length=3' })
  expect(response.headers).toMatchObject({ 'content-length': '3', 'atoll-size': '5000' })
  expect(response.body).toBe('abc')
  expect((await server.inject({ url: '/v1/file/content?path=c/m' })).statusCode).toBe(404)
  expect((await server.inject({ url: '/v1/file/content?path=c/n&offset=x' })).json()).toMatchObject({ code: 'SIZE_INVALID' })
  expect((await server.inject({ url: '/v1/file/content' })).json()).toMatchObject({ code: 'ARGUMENT_INVALID' })
})
