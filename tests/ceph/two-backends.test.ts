/** One daemon with a pool of files and one on a real Ceph cluster: volumes in one that read from the other. */
import { mkdtemp, rename, rm, writeFile } from 'node:fs/promises'
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
const killCount = full ? 50 : 2

interface Shown {
  readonly id: string
  readonly pool: string
  readonly readsFrom: readonly string[]
  readonly usedBytes: number
  readonly sharedBytes: number
}
interface ShownPool {
  readonly storedBytes: number
  readonly readBy: readonly string[]
  readonly missingReaders: readonly string[]
}

describe.skipIf(!hasCeph())('pools on files and on Ceph in one daemon', () => {
  let cluster: CephCluster

  beforeAll(async () => {
    cluster = await CephCluster.start()
  })

  afterAll(async () => {
    await cluster?.remove()
  })

  const optionsIn = (namespace: string): string[] =>
    Object.entries(cluster.optionsIn(namespace)).flatMap(([key, value]) => ['--option', `${key}=${value}`])

  async function homeWithBoth(namespace: string): Promise<TestHome> {
    const home = await TestHome.create()
    await home.start()
    home.cli('pool', 'create', 'fast', '--driver', 'ceph', ...optionsIn(namespace))
    await writeFile(join(home.path, 'base.raw'), pattern(1, 8 * mebibyte))
    home.cli('image', 'import', 'base', join(home.path, 'base.raw'), '--format', 'raw')
    return home
  }

  test('a clone in the other pool is there at once, says what it reads from, and outlives kill -9 and its source', async () => {
    await using home = await homeWithBoth('clones')
    const clone = home.json<Shown>('volume', 'create', 'disk', '--from', 'image:base', '--pool', 'fast', '--size', '1G')
    expect(clone).toMatchObject({ pool: 'fast', readsFrom: ['default'] })
    expect(home.json<ShownPool>('pool', 'show', 'fast').storedBytes).toBe(0)
    const said = home.run('volume', 'create', 'another', '--from', 'image:base', '--pool', 'fast')
    expect(said.stdout).toMatch(/^[0-9a-f-]{36}\n$/)
    expect(said.stderr).toContain('it reads from default')
    {
      await using client = await attach(home, 'disk')
      expect(await client.read(0, 8 * mebibyte)).toEqual(pattern(1, 8 * mebibyte))
      // In slots of its own, and in a part of one that is in the other pool.
      await client.write(mebibyte, pattern(2, mebibyte))
      await client.write(4 * mebibyte - 700, pattern(3, slotBytes))
      await client.flush()
      home.cli('snapshot', 'create', 'disk@first')
      await client.write(0, pattern(4, slotBytes))
      await client.flush()
    }
    expect(home.json<Shown>('volume', 'show', 'disk')).toMatchObject({ readsFrom: ['default'] })
    expect(home.cli('volume', 'show', 'disk')).toMatch(/^reads from: +default$/m)
    // And back again: from the snapshot on Ceph to files, which still has what was on files.
    const back = home.json<Shown>('volume', 'create', 'back', '--from', 'snapshot:disk@first', '--pool', 'default')
    expect(back.readsFrom).toEqual(['fast'])
    await home.end('SIGKILL')

    await home.start()
    const expected = pattern(1, 8 * mebibyte)
    pattern(2, mebibyte).copy(expected, mebibyte)
    pattern(3, slotBytes).copy(expected, 4 * mebibyte - 700)
    {
      await using client = await attach(home, 'back')
      expect(await client.read(0, 8 * mebibyte)).toEqual(expected)
      await client.write(2 * mebibyte - slotBytes, pattern(5, 2 * slotBytes))
      await client.flush()
      await home.end('SIGKILL')
    }
    await home.start()
    const written = Buffer.from(expected)
    pattern(5, 2 * slotBytes).copy(written, 2 * mebibyte - slotBytes)
    {
      await using client = await attach(home, 'back')
      expect(await client.read(0, 8 * mebibyte)).toEqual(written)
    }

    // What they were made from goes; what they read stays.
    for (const volume of ['disk', 'back']) home.cli('volume', 'detach', volume)
    home.cli('image', 'delete', 'base')
    home.cli('volume', 'delete', 'another')
    home.cli('volume', 'delete', 'disk', '--with-snapshots')
    for (const pool of ['default', 'fast']) home.cli('pool', 'reclaim', pool)
    {
      await using client = await attach(home, 'back')
      expect(await client.read(0, 8 * mebibyte)).toEqual(written)
    }
    home.cli('volume', 'detach', 'back')
    const refused = home.failure('pool', 'delete', 'fast')
    expect(refused.code).toBe('POOL_NOT_EMPTY')
    expect(refused.message).toContain('volume "back"')
    expect(home.json<ShownPool>('pool', 'show', 'fast')).toMatchObject({ readBy: ['default'], missingReaders: [] })
    expect(home.json<{ findings: unknown[] }>('check').findings).toEqual([])
    home.cli('volume', 'delete', 'back')
    for (const pool of ['default', 'fast']) {
      home.cli('pool', 'reclaim', pool)
      expect(home.json<ShownPool>('pool', 'show', pool).storedBytes).toBe(0)
    }
    home.cli('pool', 'delete', 'fast')
  })

  test('a volume whose other pool cannot be opened is refused by its name, and the rest is served', async () => {
    await using home = await homeWithBoth('away')
    home.cli('volume', 'create', 'own', '--from', 'image:base')
    home.cli('volume', 'create', 'on-ceph', '--size', '8M', '--pool', 'fast')
    {
      await using client = await attach(home, 'on-ceph')
      await client.write(0, pattern(2, mebibyte))
    }
    home.cli('volume', 'detach', 'on-ceph')
    home.cli('volume', 'create', 'disk', '--from', 'volume:on-ceph', '--pool', 'default')
    await home.end()
    await rename(cluster.conf, `${cluster.conf}.away`)
    try {
      await home.start()
      const refused = home.failure('volume', 'attach', 'disk')
      expect(refused.code).toBe('POOL_UNAVAILABLE')
      expect(refused.message).toContain('volume "disk" cannot be opened without another pool')
      expect(refused.message).toContain('pool "fast"')
      await using client = await attach(home, 'own')
      expect(await client.read(0, mebibyte)).toEqual(pattern(1, 8 * mebibyte).subarray(0, mebibyte))
    } finally {
      await rename(`${cluster.conf}.away`, cluster.conf)
    }
    home.cli('pool', 'show', 'fast')
    await using client = await attach(home, 'disk')
    expect(await client.read(0, mebibyte)).toEqual(pattern(2, mebibyte))
  })

  test('a volume on Ceph that reads from files of a daemon that has not ended is refused, before anything is taken over', async () => {
    await using owner = await TestHome.create()
    await using other = await TestHome.create()
    const catalog = join(owner.path, 'shared.db')
    const { pid } = await owner.start('--catalog', catalog)
    owner.cli('pool', 'create', 'fast', '--driver', 'ceph', ...optionsIn('taken'))
    owner.cli('volume', 'create', 'local', '--size', '1M')
    owner.cli('volume', 'create', 'disk', '--from', 'volume:local', '--pool', 'fast')
    owner.cli('volume', 'create', 'own', '--size', '1M', '--pool', 'fast')
    await other.start('--catalog', catalog)
    const refused = other.failure('volume', 'attach', 'disk', '--take-over')
    expect(refused.code).toBe('TAKE_OVER_REFUSED')
    expect(refused.message).toContain('volume disk cannot be taken over: it uses pool "default"')
    expect(refused.message).toContain(`pid ${pid}`)
    // The owner goes on: nothing was taken from it.
    {
      await using client = await attach(owner, 'disk')
      await client.write(0, pattern(1, slotBytes))
      await client.flush()
    }
    // A volume that needs nothing but what can be taken over is. What reads from files can be had when the owner has ended.
    await using taken = await connect(other.cli('volume', 'attach', 'own', '--take-over', '--format', 'uri'))
    await taken.write(0, pattern(2, slotBytes))
    await owner.ended()
    await using client = await attach(other, 'disk')
    expect(await client.read(0, slotBytes)).toEqual(pattern(1, slotBytes))
  })

  test('of a lost catalog they are brought back one after the other, and nothing is missed in between', async () => {
    await using home = await homeWithBoth('lost')
    home.cli('volume', 'create', 'disk', '--from', 'image:base', '--pool', 'fast')
    {
      await using client = await attach(home, 'disk')
      await client.write(mebibyte, pattern(2, slotBytes))
      await client.flush()
    }
    home.cli('image', 'delete', 'base')
    await home.end('SIGKILL')

    await using fresh = await TestHome.create()
    await fresh.start()
    const path = `path=${join(home.path, 'pools', 'default')}`
    const place = ['--driver', 'file', '--option', path, '--take-over']
    const first = fresh.json<{ missingReaders: { name: string }[] }>('pool', 'import', 'files', ...place)
    expect(first.missingReaders).toMatchObject([{ name: 'fast' }])
    fresh.cli('pool', 'reclaim', 'files')
    expect(fresh.json<ShownPool>('pool', 'show', 'files')).toMatchObject({ readBy: ['fast'], missingReaders: ['fast'] })
    fresh.cli('pool', 'import', 'fast', '--driver', 'ceph', ...optionsIn('lost'), '--take-over')
    expect(fresh.json<ShownPool>('pool', 'show', 'files')).toMatchObject({ readBy: ['fast'], missingReaders: [] })
    fresh.cli('pool', 'reclaim', 'files')
    const expected = pattern(1, 8 * mebibyte)
    pattern(2, slotBytes).copy(expected, mebibyte)
    await using client = await attach(fresh, 'disk')
    expect(await client.read(0, 8 * mebibyte)).toEqual(expected)
  })

  for (const [name, across] of [
    ['a volume on Ceph that reads from files', { image: 'default', volume: 'other' }],
    ['a volume on files that reads from Ceph', { image: 'other', volume: 'default' }],
  ] as const) {
    test(`${killCount} kills of the daemon lose no answered write of ${name} and change no snapshot`, async () => {
      const path = await mkdtemp(join(tmpdir(), 'atoll-two-kills-'))
      try {
        const pool = { driver: 'ceph', options: cluster.optionsIn(`kills-${across.image}`) }
        const report = await runKills({ home: path, seed, killCount, pool, across })
        console.log(`seed ${seed}:`, report)
        expect(report.kills).toBe(killCount)
      } finally {
        await rm(path, { recursive: true, force: true })
      }
    }, 3_600_000)
  }
})
