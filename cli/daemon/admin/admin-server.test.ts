import { expect, test } from 'vitest'
import { AtollError, silentLog, systemClock } from '@atoll/core'
import type { AdminContext } from './admin-context.ts'
import { createAdminServer } from './admin-server.ts'

/** A server over a composer of which only volumes are asked; every call is recorded. */
function serverOver(volumes: Record<string, (...args: unknown[]) => Promise<unknown>>): ReturnType<typeof createAdminServer> {
  const context = {
    composer: { volumes, snapshots: {}, images: {}, pools: {}, jobs: {} },
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

test('an error of the composer goes out with its code, values and status', async () => {
  const server = serverOver({
    show: async () => {
      throw new AtollError('VOLUME_NOT_FOUND', 'there is no volume "x"', { values: { volume: 'x' } })
    },
  })
  const response = await server.inject({ url: '/v1/volumes/x' })
  expect(response.statusCode).toBe(404)
  expect(response.json()).toMatchObject({ code: 'VOLUME_NOT_FOUND', message: 'there is no volume "x"', values: { volume: 'x' } })
})

test('a defect goes out as INTERNAL', async () => {
  const server = serverOver({
    list: async () => {
      throw new TypeError('undefined is not a function')
    },
  })
  const response = await server.inject({ url: '/v1/volumes' })
  expect([response.statusCode, response.json<{ code: string }>().code]).toEqual([500, 'INTERNAL'])
})

test('what a request must not say is refused before the composer sees it', async () => {
  const server = serverOver({
    create: async () => {
      throw new Error('not to be called')
    },
  })
  for (const payload of [{}, { name: 7 }, { name: 'x', size: '1G', colour: 'red' }, { name: 'x'.repeat(5000), size: '1G' }]) {
    const response = await server.inject({ method: 'POST', url: '/v1/volumes', payload })
    expect([response.statusCode, response.json<{ code: string }>().code]).toEqual([400, 'ARGUMENT_INVALID'])
  }
  const broken = await server.inject({
    method: 'POST',
    url: '/v1/volumes',
    headers: { 'content-type': 'application/json' },
    payload: '{"name"',
  })
  expect([broken.statusCode, broken.json<{ code: string }>().code]).toEqual([400, 'ARGUMENT_INVALID'])
  const large = await server.inject({ method: 'POST', url: '/v1/volumes', payload: { name: 'x'.repeat(2 ** 21) } })
  expect(large.statusCode).toBe(400)
  const size = await server.inject({ method: 'POST', url: '/v1/volumes', payload: { name: 'x', size: 'big' } })
  expect(size.json()).toMatchObject({ code: 'SIZE_INVALID' })
})

test('a route that is not there is named', async () => {
  const response = await serverOver({}).inject({ url: '/v1/frobnicate' })
  expect([response.statusCode, response.json<{ code: string }>().code]).toEqual([404, 'NOT_FOUND'])
})

test('times go out as text, and names come in as they were typed', async () => {
  const asked: unknown[] = []
  const server = serverOver({
    show: async (...args) => {
      asked.push(args)
      return { id: '1', createdAt: 0, updatedAt: 1000, attachments: [{ id: '2', createdAt: 2000 }] }
    },
  })
  const response = await server.inject({ url: `/v1/volumes/${encodeURIComponent('ü ?%/x')}?project=p` })
  expect(asked).toEqual([['ü ?%/x', { project: 'p' }]])
  expect(response.json()).toEqual({
    id: '1',
    createdAt: '1970-01-01T00:00:00.000Z',
    updatedAt: '1970-01-01T00:00:01.000Z',
    attachments: [{ id: '2', createdAt: '1970-01-01T00:00:02.000Z', server: null }],
  })
})
