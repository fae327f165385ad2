import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { makeTemporaryFolder } from './catalog/testing.ts'
import { loadConfig, parseListenAddress, resolveConfig, resolveHome } from './config.ts'

describe('resolveConfig', () => {
  test('without a file and flags the defaults hold', () => {
    expect(resolveConfig('/home', null)).toEqual({
      home: '/home',
      http: { host: '127.0.0.1', port: 8776 },
      nbdSocket: true,
      nbd: null,
      nbdTls: null,
      nbdTlsVerify: true,
      nbdInsecure: false,
      nbdList: false,
      socketGroup: null,
      sharesCatalog: false,
      publicUrl: null,
      allowPrivateImageSources: false,
      ioUring: true,
      logLevel: 'info',
      paths: {
        catalog: '/home/catalog.db',
        config: '/home/atoll.yaml',
        nbdSocket: '/home/nbd.sock',
        adminSocket: '/home/admin.sock',
        pageFile: '/home/pages.cache',
        batchLogs: '/home/batch-logs',
        defaultPool: '/home/pools/default',
      },
    })
  })

  test('the file comes before the defaults, a flag before the file, and an undefined flag does not count', () => {
    const file = 'http: 0.0.0.0:80\nnbdSocket: off\nsocketGroup: 100\nlogLevel: debug\ncatalog: other.db\n'
    const config = resolveConfig('/home', file, { http: 'off', logLevel: undefined })
    expect(config).toMatchObject({ http: null, nbdSocket: false, socketGroup: '100', logLevel: 'debug' })
    expect(config.paths.catalog).toBe('/home/other.db')
    expect(config.sharesCatalog).toBe(true)
  })

  test('an empty file is no settings', () => {
    expect(resolveConfig('/home', '# nothing yet\n')).toEqual(resolveConfig('/home', null))
  })

  test.each([
    ['http: nonsense', '"http" in /home/atoll.yaml'],
    ['htpp: off', '"htpp" in /home/atoll.yaml: there is no such setting'],
    ['logLevel: loud', '"logLevel" in /home/atoll.yaml'],
    ['publicUrl: ftp://x', '"publicUrl" in /home/atoll.yaml'],
    ['- a list', '/home/atoll.yaml must hold settings'],
    ['a: [', '/home/atoll.yaml is not YAML'],
    ['a: &x [1]\nb: *x', '/home/atoll.yaml is not YAML'],
  ])('the file %j is refused and the setting named', (file, message) => {
    expect(() => resolveConfig('/home', file)).toThrow(
      expect.objectContaining({ code: 'CONFIG_INVALID', message: expect.stringContaining(message) }),
    )
  })

  test('a wrong flag is named as it was typed', () => {
    expect(() => resolveConfig('/home', 'socketGroup: disk', { nbdSocket: 'perhaps' as 'on' })).toThrow('--nbd-socket')
  })
})

describe('NBD over TCP', () => {
  test('is served with TLS, whose folder is relative to the home', () => {
    expect(resolveConfig('/home', 'nbd: 0.0.0.0:10809\nnbdTls: tls\n')).toMatchObject({
      nbd: { host: '0.0.0.0', port: 10_809 },
      nbdTls: '/home/tls',
      nbdTlsVerify: true,
      nbdList: false,
    })
    const config = resolveConfig('/home', 'nbdTlsVerify: off\nnbdList: on\n', { nbd: ':0', nbdTls: '/etc/tls' })
    expect(config).toMatchObject({ nbd: { host: '127.0.0.1', port: 0 }, nbdTls: '/etc/tls', nbdTlsVerify: false, nbdList: true })
  })

  test('without TLS has to be asked for by name', () => {
    const refusal = expect.objectContaining({ code: 'CONFIG_INVALID', message: expect.stringContaining('--nbd-insecure') })
    expect(() => resolveConfig('/home', null, { nbd: '127.0.0.1:10809' })).toThrow(refusal)
    expect(() => resolveConfig('/home', 'nbd: :10809\n')).toThrow(refusal)
    expect(resolveConfig('/home', null, { nbd: ':10809', nbdInsecure: true })).toMatchObject({ nbdTls: null, nbdInsecure: true })
  })

  test('is either with TLS or without, and neither is needed where it is off', () => {
    expect(() => resolveConfig('/home', 'nbdTls: tls\n', { nbd: ':0', nbdInsecure: true })).toThrow('contradict')
    expect(resolveConfig('/home', 'nbdTls: tls\nnbdInsecure: on\n').nbd).toBeNull()
    expect(resolveConfig('/home', 'nbd: :10809\n', { nbd: 'off' }).nbd).toBeNull()
  })
})

describe('loadConfig', () => {
  let home: string
  let remove: () => Promise<void>

  beforeEach(async () => {
    const made = await makeTemporaryFolder()
    home = made.folder
    remove = made.remove
  })

  afterEach(() => remove())

  test('reads atoll.yaml of the home if there is one', async () => {
    expect((await loadConfig(home)).http).toEqual({ host: '127.0.0.1', port: 8776 })
    await writeFile(join(home, 'atoll.yaml'), 'http: 127.0.0.1:0\n')
    expect((await loadConfig(home)).http).toEqual({ host: '127.0.0.1', port: 0 })
  })
})

test('addresses', () => {
  expect(parseListenAddress('off')).toBeNull()
  expect(parseListenAddress(':0')).toEqual({ host: '127.0.0.1', port: 0 })
  expect(parseListenAddress('0.0.0.0:80')).toEqual({ host: '0.0.0.0', port: 80 })
  expect(parseListenAddress('[::1]:8776')).toEqual({ host: '::1', port: 8776 })
  for (const text of ['', '80', 'host', 'host:', 'host:65536', '::1:80', 'a b:1']) {
    expect(() => parseListenAddress(text)).toThrow(expect.objectContaining({ code: 'CONFIG_INVALID', values: { value: text } }))
  }
})

test('the home is the flag, then ATOLL_HOME, then .atoll here', () => {
  expect(resolveHome('x', { ATOLL_HOME: '/env' }, '/cwd')).toBe('/cwd/x')
  expect(resolveHome(undefined, { ATOLL_HOME: '/env' }, '/cwd')).toBe('/env')
  expect(resolveHome(undefined, {}, '/cwd')).toBe('/cwd/.atoll')
})
