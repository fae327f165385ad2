import { describe, expect, it } from 'vitest'
import { NbdError } from './nbd-error.ts'
import { formatNbdUri, parseNbdUri } from './nbd-target.ts'

describe('an NBD URI', () => {
  it('names host, port and export', () => {
    expect(parseNbdUri('nbd://storage.example:10900/disk')).toEqual({
      address: { host: 'storage.example', port: 10900 },
      exportName: 'disk',
    })
  })
  it('has port 10809 and the default export when it says nothing', () => {
    expect(parseNbdUri('nbd://localhost')).toEqual({ address: { host: 'localhost', port: 10809 }, exportName: '' })
  })
  it('takes IPv6 addresses in brackets', () => {
    expect(parseNbdUri('nbd://[::1]:1/x').address).toEqual({ host: '::1', port: 1 })
  })
  it('names a socket and an export, both percent-decoded', () => {
    expect(parseNbdUri('nbd+unix:///a%20b/c?socket=/run/my%20nbd.sock')).toEqual({
      address: { path: '/run/my nbd.sock' },
      exportName: 'a b/c',
    })
  })
  it('is what formatNbdUri makes', () => {
    for (const exportName of ['', 'plain', 'with space', 'ä/b?c#d', '/leading']) {
      for (const address of [{ path: '/tmp/a b&c.sock' }, { host: '::1', port: 5 }, { host: 'h', port: 10809 }]) {
        expect(parseNbdUri(formatNbdUri(address, exportName))).toEqual({ address, exportName })
      }
    }
  })
  it.each([
    ['not a uri', 'NBD_URI_INVALID'],
    ['http://host/export', 'NBD_URI_INVALID'],
    ['nbd+unix:///export', 'NBD_URI_INVALID'],
    ['nbd+unix://host/export?socket=/s', 'NBD_URI_INVALID'],
    ['nbd://host/%ff', 'NBD_URI_INVALID'],
    ['nbd://host/e?socket=/s', 'NBD_URI_INVALID'],
    ['nbds://host/export', 'NBD_TLS_UNSUPPORTED'],
  ])('%s is refused with %s', (uri, code) => {
    expect(() => parseNbdUri(uri)).toThrowError(expect.objectContaining({ code }))
    expect(() => parseNbdUri(uri)).toThrowError(NbdError)
  })
})
