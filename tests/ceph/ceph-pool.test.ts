/** The real daemon over a real Ceph cluster: the life of a pool, kill -9 of the daemon, an OSD that goes and comes back. */
import { mkdtemp, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { connect } from '@atoll/nbd-client'
import { CephCluster, hasCeph } from '@atoll/southbound/ceph-cluster'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { attach, mebibyte, pattern, slotBytes } from '../faults/broken-home.ts'
import { runKills } from '../kill/kills.ts'
import { TestHome } from '../test-home.ts'

const seed = Number(process.env['ATOLL_SEED'] ?? '20261121')
const full = process.env['ATOLL_TEST_CRASH'] === 'full'
const killCount = full ? 50 : 5

interface ShownPool {
  readonly storedBytes: number
  readonly totalBytes: number
  readonly error: { readonly code: string } | null
}

describe.skipIf(!hasCeph())('a pool on Ceph', () => {
  let cluster: CephCluster

  beforeAll(async () => {
    cluster = await CephCluster.start()
  })

  afterAll(async () => {
    await cluster?.remove()
  })

  const optionsIn = (namespace: string): string[] =>
    Object.entries(cluster.optionsIn(namespace)).flatMap(([key, value]) => ['--option', `${key}=${value}`])

  async function objectsIn(namespace: string): Promise<string[]> {
    return (await cluster.rados('-p', 'atoll', '-N', namespace, 'ls')).split('\n').filter((name) => name !== '')
  }

  test('volumes, snapshots and clones outlive kill -9, and deleting them leaves no object behind', async () => {
    await using home = await TestHome.create()
    await home.start()
    const refused = home.failure('pool', 'create', 'fast', '--driver', 'ceph', ...optionsIn('life'), '--option', 'pool=nowhere')
    expect(refused.code).toBe('POOL_UNAVAILABLE')
    expect(refused.message).toContain('ceph osd pool create nowhere')
    home.cli('pool', 'create', 'fast', '--driver', 'ceph', ...optionsIn('life'))
    home.cli('volume', 'create', 'disk', '--size', '1G', '--pool', 'fast')
    {
      await using client = await attach(home, 'disk')
      await client.write(0, pattern(1, mebibyte))
      // Across the border of two objects, and not in whole slots.
      await client.write(4 * mebibyte - 700, pattern(2, slotBytes))
      await client.flush()
      home.cli('snapshot', 'create', 'disk@before')
      await client.write(0, pattern(3, slotBytes))
      await client.flush()
      await client.write(slotBytes, pattern(4, slotBytes))
    }
    home.cli('volume', 'create', 'copy', '--from', 'snapshot:disk@before')
    await home.end('SIGKILL')

    await home.start()
    const expected = pattern(1, mebibyte)
    {
      await using client = await attach(home, 'disk')
      expect(await client.read(0, slotBytes)).toEqual(pattern(3, slotBytes))
      // Answered, though not flushed: the end of the daemon alone loses nothing.
      expect(await client.read(slotBytes, slotBytes)).toEqual(pattern(4, slotBytes))
      expect(await client.read(4 * mebibyte - 700, slotBytes)).toEqual(pattern(2, slotBytes))
      expect(await client.read(8 * mebibyte, slotBytes)).toEqual(Buffer.alloc(slotBytes))
      await client.trim(0, slotBytes)
      await client.writeZeroes(slotBytes, 2 * slotBytes)
      expect(await client.read(0, 4 * slotBytes)).toEqual(
        Buffer.concat([Buffer.alloc(3 * slotBytes), expected.subarray(3 * slotBytes, 4 * slotBytes)]),
      )
    }
    {
      await using copy = await attach(home, 'copy')
      expect(await copy.read(0, mebibyte)).toEqual(expected)
      await copy.write(mebibyte - slotBytes, pattern(5, 2 * slotBytes))
      await copy.flush()
      expect(await copy.read(mebibyte - slotBytes, 2 * slotBytes)).toEqual(pattern(5, 2 * slotBytes))
    }
    const shown = home.json<ShownPool>('pool', 'show', 'fast')
    expect(shown.storedBytes).toBeGreaterThan(mebibyte)
    expect(shown.storedBytes).toBeLessThan(3 * mebibyte)
    expect(JSON.parse(home.run('pool', 'check', 'fast', '--json').stdout)).toMatchObject({ findings: [] })

    home.cli('volume', 'detach', 'disk')
    home.cli('volume', 'detach', 'copy')
    home.cli('snapshot', 'delete', 'disk@before')
    home.cli('volume', 'delete', 'disk')
    home.cli('pool', 'reclaim', 'fast')
    {
      await using copy = await attach(home, 'copy')
      expect(await copy.read(0, mebibyte - slotBytes)).toEqual(expected.subarray(0, mebibyte - slotBytes))
    }
    home.cli('volume', 'detach', 'copy')
    home.cli('volume', 'delete', 'copy')
    home.cli('pool', 'reclaim', 'fast')
    expect(home.json<ShownPool>('pool', 'show', 'fast').storedBytes).toBe(0)
    home.cli('pool', 'delete', 'fast')
    const left = (await objectsIn('life')).filter((name) => /^(layer|journal)\.|^[0-9a-f]{8}-/.test(name))
    expect(left).toEqual([])
  })

  test('a pool that another daemon has is refused by its name, and comes back from its export when the catalog is lost', async () => {
    await using owner = await TestHome.create()
    const { pid } = await owner.start()
    owner.cli('pool', 'create', 'fast', '--driver', 'ceph', ...optionsIn('lost'))
    owner.cli('volume', 'create', 'disk', '--size', '32M', '--pool', 'fast')
    {
      await using client = await attach(owner, 'disk')
      await client.write(0, pattern(1, mebibyte))
      await client.flush()
      owner.cli('snapshot', 'create', 'disk@before')
      await client.write(0, pattern(2, slotBytes))
      await client.flush()
    }
    await using home = await TestHome.create()
    await home.start()
    const refused = home.failure('pool', 'import', 'taken', '--driver', 'ceph', ...optionsIn('lost'), '--take-over')
    expect(refused.code).toBe('POOL_LOCKED')
    expect(refused.message).toContain(`pid ${pid}`)

    await owner.end('SIGKILL')
    for (const name of await readdir(owner.path)) if (name.startsWith('catalog.')) await rm(join(owner.path, name))
    const report = home.json<{ broughtBack: Record<string, number>; failed: unknown[] }>(
      'pool',
      'import',
      'taken',
      '--driver',
      'ceph',
      ...optionsIn('lost'),
      '--take-over',
    )
    expect(report).toMatchObject({ broughtBack: { volume: 1, snapshot: 1 }, failed: [] })
    await using client = await attach(home, 'disk')
    expect(await client.read(0, slotBytes)).toEqual(pattern(2, slotBytes))
    expect(await client.read(slotBytes, slotBytes)).toEqual(pattern(1, mebibyte).subarray(slotBytes, 2 * slotBytes))
  })

  test(`${killCount} kills of the daemon under four connections at depth 16 lose no answered write and change no snapshot`, async () => {
    const home = await mkdtemp(join(tmpdir(), 'atoll-ceph-kills-'))
    try {
      const pool = { driver: 'ceph', options: cluster.optionsIn('kills') }
      const report = await runKills({ home, seed, killCount, pool })
      console.log(`seed ${seed}:`, report)
      expect(report.kills).toBe(killCount)
    } finally {
      await rm(home, { recursive: true, force: true })
    }
  }, 3_600_000)

  test('a client waits for an OSD that was killed, and goes on when it is back', async () => {
    await using home = await TestHome.create()
    await home.start()
    home.cli('pool', 'create', 'fast', '--driver', 'ceph', ...optionsIn('osd'))
    home.cli('volume', 'create', 'disk', '--size', '64M', '--pool', 'fast')
    await using client = await connect(home.cli('volume', 'attach', 'disk', '--format', 'uri'))
    await client.write(0, pattern(1, mebibyte))
    const pid = await cluster.pidOf('osd.0')
    process.kill(pid, 'SIGKILL')
    let isDone = false
    const waiting = Promise.all(
      Array.from({ length: 8 }, (_, index) => client.write(index * mebibyte, pattern(index + 10, mebibyte))),
    ).then(() => {
      isDone = true
    })
    // The daemon answers whoever asks it something else meanwhile.
    expect((await home.jsonMeanwhile<{ status: string }>('volume', 'show', 'disk')).status).toBe('in-use')
    expect(isDone).toBe(false)
    await cluster.resume()
    await waiting
    await client.flush()
    for (let index = 0; index < 8; index++) {
      expect(await client.read(index * mebibyte, mebibyte)).toEqual(pattern(index + 10, mebibyte))
    }
  })
})
