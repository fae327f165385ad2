/** Debian 13's libnbd and QEMU, which speak extended headers, against the real daemon. Fetched once into a cache of the checkout. */
import { execFileSync } from 'node:child_process'
import { createConnection, createServer, type Server, type Socket } from 'node:net'
import { join } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { connect } from '@atoll/nbd-client'
import { repositoryRoot } from '../test-home.ts'
import { ClientStand, diskBytes, fileDifference, makeContent, MiB, writeSparse } from './client-stand.ts'
import { runClient } from './run-client.ts'

const folder = join(repositoryRoot, 'node_modules', '.cache', 'atoll-newer-nbd-tools')
const extendedRequestMagic = Buffer.from('21e41c71', 'hex')
const compactRequestMagic = Buffer.from('25609513', 'hex')

/** The tools of Debian 13, or why they are not to be had here. */
function fetchTools(): string | null {
  try {
    execFileSync('sh', [join(repositoryRoot, 'scripts', 'newer-nbd-tools.sh'), folder], { timeout: 300_000, stdio: 'pipe' })
    return null
  } catch (error) {
    if (process.env['ATOLL_TEST_REQUIRE'] === 'all') throw error
    return String(error)
  }
}

const missing = fetchTools()
if (missing !== null) process.stderr.write(`no tools of Debian 13: ${missing}\n`)

const run = (program: string, ...args: string[]): Promise<string> => runClient(join(folder, 'run'), program, ...args)

/** Hands bytes through and counts the requests of either form, so that a test knows which one a client really used. */
class CountingProxy {
  extendedCount = 0
  compactCount = 0
  readonly path: string
  readonly #server: Server
  readonly #sockets = new Set<Socket>()

  constructor(path: string, targetPath: string) {
    this.path = path
    this.#server = createServer((client) => {
      const target = createConnection(targetPath)
      for (const socket of [client, target]) {
        this.#sockets.add(socket)
        socket.on('error', () => socket.destroy())
      }
      client.on('data', (bytes) => this.#count(bytes as Buffer))
      client.pipe(target).pipe(client)
    }).listen(path)
  }

  #count(bytes: Buffer): void {
    const countOf = (magic: Buffer): number => {
      let count = 0
      for (let at = bytes.indexOf(magic); at >= 0; at = bytes.indexOf(magic, at + 1)) count += 1
      return count
    }
    this.extendedCount += countOf(extendedRequestMagic)
    this.compactCount += countOf(compactRequestMagic)
  }

  async [Symbol.asyncDispose](): Promise<void> {
    for (const socket of this.#sockets) socket.destroy()
    await new Promise((resolve) => this.#server.close(resolve))
  }
}

describe.skipIf(missing !== null)('clients of Debian 13', () => {
  let stand: ClientStand
  beforeAll(async () => {
    stand = await ClientStand.create()
  })
  afterAll(async () => {
    await stand?.[Symbol.asyncDispose]()
  })

  /** The same export through a proxy that counts. */
  function counted(uri: string, name: string): { uri: string; proxy: CountingProxy } {
    const url = new URL(uri)
    const proxy = new CountingProxy(stand.file(`${name}.sock`), url.searchParams.get('socket')!)
    url.search = `?socket=${proxy.path}`
    return { uri: url.href, proxy }
  }

  function expectExtended(proxy: CountingProxy): void {
    expect(proxy.extendedCount).toBeGreaterThan(0)
    expect(proxy.compactCount).toBe(0)
  }

  test('nbdinfo maps 16 TiB, by every context, in extended headers', async () => {
    const sizeBytes = 16 * 1024 * 1024 * MiB
    const direct = stand.empty('huge', sizeBytes)
    const { uri, proxy } = counted(direct, 'nbdinfo')
    await using counting = proxy
    {
      await using disk = await connect(direct)
      await disk.write(9 * 1024 * 1024 * MiB, Buffer.alloc(4096, 1))
      await disk.flush()
    }
    stand.home.cli('snapshot', 'create', 'huge@now')
    for (const [context, expected] of [
      ['base:allocation', [3, 0, 3]],
      ['qemu:allocation-depth', [0, 2, 0]],
      ['qemu:dirty-bitmap:now', [0]],
    ] as const) {
      const map = JSON.parse(await run('nbdinfo', '--json', `--map=${context}`, uri)) as Record<string, number>[]
      expect(map.map((entry) => entry['type'])).toEqual(expected)
      expect(map.reduce((sum, entry) => sum + entry['length']!, 0)).toBe(sizeBytes)
    }
    expectExtended(counting)
  })

  test('qemu-io zeroes 16 TiB with one request, and the space of what was there comes back', async () => {
    const sizeBytes = 16 * 1024 * 1024 * MiB
    const direct = stand.empty('zeroed', sizeBytes)
    const { uri, proxy } = counted(direct, 'zeroed')
    await using counting = proxy
    {
      await using disk = await connect(direct)
      for (const offsetBytes of [0, 7 * 1024 * 1024 * MiB, 15 * 1024 * 1024 * MiB]) {
        await disk.write(offsetBytes, Buffer.alloc(MiB, 1), { fua: true })
      }
    }
    await expect.poll(() => stand.usedBytes('zeroed')).toBe(3 * MiB)
    const commands = ['write -z -u -n 0 16T', 'flush', 'read -P 0 0 1M', 'read -P 0 7T 1M', 'read -P 0 15T 1M']
    const output = await run('qemu-io', '-t', 'writeback', '-f', 'raw', ...commands.flatMap((command) => ['-c', command]), uri)
    expect(output).toContain(`wrote ${sizeBytes}/${sizeBytes} bytes at offset 0`)
    expect(output).not.toMatch(/fail|error|differ/i)
    await expect.poll(() => stand.usedBytes('zeroed')).toBe(0)
    // The zeroes, three reads, and a few flushes and the farewell.
    expect(counting.extendedCount).toBeLessThan(12)
    expectExtended(counting)
  })

  test('nbdinfo sees what is offered: fast zeroes, prefetching', async () => {
    const [shown] = (JSON.parse(await run('nbdinfo', '--json', stand.clone('offered'))) as { exports: Record<string, unknown>[] })
      .exports
    expect(shown).toMatchObject({ can_fast_zero: true, can_cache: true, is_rotational: false })
  })

  test('nbdcopy copies in and out over four connections', async () => {
    const { uri, proxy } = counted(stand.empty('copied'), 'nbdcopy')
    await using counting = proxy
    // Random bytes may look like the beginning of a request, one time in 500.
    let content = makeContent()
    while ([extendedRequestMagic, compactRequestMagic].some((magic) => content.includes(magic))) content = makeContent()
    await writeSparse(stand.file('newer.raw'), content)
    await run('nbdcopy', '--connections=4', '--flush', stand.file('newer.raw'), uri)
    await run('nbdcopy', '--connections=4', uri, stand.file('newer-out.raw'))
    expect(await fileDifference(stand.file('newer-out.raw'), content)).toBeNull()
    expectExtended(counting)
  })

  test('qemu-img converts, compares and maps; qemu-io writes, zeroes, discards and reads back', async () => {
    const { uri, proxy } = counted(stand.clone('qemu'), 'qemu')
    await using counting = proxy
    await run('qemu-img', 'convert', '-f', 'raw', '-O', 'raw', uri, stand.file('qemu-out.raw'))
    expect(await fileDifference(stand.file('qemu-out.raw'), stand.content)).toBeNull()
    await run('qemu-img', 'compare', '-f', 'raw', '-F', 'raw', uri, stand.contentPath)
    const commands = ['write -P 0x11 1M 2M', 'write -z -u 1536k 64k', 'discard 20M 64k', 'flush', 'read -P 0 1536k 64k']
    const more = ['read -P 0x11 1M 512k', 'read -P 0 20M 64k']
    const args = [...commands, ...more].flatMap((command) => ['-c', command])
    const output = await run('qemu-io', '-f', 'raw', '--discard=unmap', ...args, uri)
    expect(output).not.toMatch(/fail|error|differ/i)
    const map = JSON.parse(await run('qemu-img', 'map', '--output=json', '-f', 'raw', uri)) as Record<string, number>[]
    expect(map.reduce((sum, entry) => sum + entry['length']!, 0)).toBe(diskBytes)
    expectExtended(counting)
  })
})
