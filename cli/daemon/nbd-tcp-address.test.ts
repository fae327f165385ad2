import { hostname } from 'node:os'
import { expect, test } from 'vitest'
import { nbdTcpUrl, reachableServer } from './nbd-tcp-address.ts'

test('a URL says whether there is TLS, and has an IPv6 address in brackets', () => {
  expect(nbdTcpUrl({ host: 'storage.example', port: 10_809, tls: false })).toBe('nbd://storage.example:10809')
  expect(nbdTcpUrl({ host: '::1', port: 1, tls: true })).toBe('nbds://[::1]:1')
})

test('clients use the host as it was written, because a certificate is for a name', () => {
  expect(reachableServer({ host: 'localhost', port: 0 }, 5000, true)).toEqual({ host: 'localhost', port: 5000, tls: true })
})

test.each(['0.0.0.0', '::'])('a daemon on every address (%s) is reached by the name of its machine', (host) => {
  expect(reachableServer({ host, port: 10_809 }, 10_809, false).host).toBe(hostname())
})
