/** Daemons that share a catalog with volumes on a real Ceph cluster: one takes over from another that does not let go. */
import { cp, mkdtemp, readdir, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { connect } from '@atoll/nbd-client'
import { CephCluster, hasCeph } from '@atoll/southbound/ceph-cluster'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { attach, mebibyte, pattern, slotBytes } from '../faults/broken-home.ts'
import { TestHome } from '../test-home.ts'
import { runFencing, stopOutsideOfChange } from './fencing.ts'

const seed = Number(process.env['ATOLL_SEED'] ?? '20261121')
const full = process.env['ATOLL_TEST_CRASH'] === 'full'
const roundCount = Number(process.env['ATOLL_FENCING_ROUNDS'] ?? (full ? '50' : '2'))

describe.skipIf(!hasCeph())('volumes on Ceph and two daemons', () => {
  let cluster: CephCluster
  let folder: string

  beforeAll(async () => {
    cluster = await CephCluster.start()
    folder = await mkdtemp(join(tmpdir(), 'atoll-shared-'))
  })

  afterAll(async () => {
    await cluster?.remove()
    await rm(folder, { recursive: true, force: true })
  })

  const optionsIn = (namespace: string): string[] =>
    Object.entries(cluster.optionsIn(namespace)).flatMap(([key, value]) => ['--option', `${key}=${value}`])

  test(`in ${roundCount} rounds an owner that was stopped and taken over changes nothing and answers nothing any more`, async () => {
    await using first = await TestHome.create()
    await using second = await TestHome.create()
    const report = await runFencing({
      homes: [first, second],
      catalog: join(folder, 'rounds.db'),
      seed,
      roundCount,
      poolOptions: cluster.optionsIn('rounds'),
    })
    console.log(`seed ${seed}:`, report)
    expect(report.rounds).toBe(roundCount)
    expect(report.zombieAcknowledgements).toBe(0)
    expect(report.zombieRequests).toBeGreaterThan(0)
  }, 3_600_000)

  test('a volume in a pool that cannot fence is refused by name, and then nothing was taken over', async () => {
    await using owner = await TestHome.create()
    await using other = await TestHome.create()
    const catalog = join(folder, 'refused.db')
    const { pid } = await owner.start('--catalog', catalog)
    owner.cli('volume', 'create', 'local', '--size', '1M')
    owner.cli('pool', 'create', 'fast', '--driver', 'ceph', ...optionsIn('refused'))
    owner.cli('volume', 'create', 'disk', '--size', '1M', '--pool', 'fast')
    await other.start('--catalog', catalog)
    const held = other.failure('volume', 'attach', 'disk')
    expect(held.code).toBe('CATALOG_HELD')
    expect(held.message).toContain(`pid ${pid}`)
    expect(held.message).toContain('--take-over')
    const refused = other.failure('volume', 'attach', 'local', '--take-over')
    expect(refused.code).toBe('TAKE_OVER_REFUSED')
    expect(refused.message).toMatch(new RegExp(`volume local .*pool "default".*pid ${pid}.*driver file`))
    expect(other.fail('volume', 'attach', 'nowhere', '--take-over')).toBe('VOLUME_NOT_FOUND')
    expect(owner.json<{ standby: null }>('status').standby).toBeNull()
    await using client = await attach(owner, 'disk')
    await client.write(0, pattern(1, slotBytes))
    await client.flush()
  })

  test('an owner that lives is taken over, too: it ends by itself, and its local volumes can be had when it has ended', async () => {
    await using owner = await TestHome.create()
    await using other = await TestHome.create()
    const catalog = join(folder, 'living.db')
    await owner.start('--catalog', catalog)
    owner.cli('pool', 'create', 'fast', '--driver', 'ceph', ...optionsIn('living'))
    owner.cli('volume', 'create', 'disk', '--size', '1M', '--pool', 'fast')
    owner.cli('volume', 'create', 'local', '--size', '1M')
    for (const [index, name] of ['disk', 'local'].entries()) {
      await using client = await attach(owner, name)
      await client.write(0, pattern(index, slotBytes))
      await client.flush()
    }
    await other.start('--catalog', catalog)
    const uri = other.cli('volume', 'attach', 'disk', '--take-over', '--format', 'uri')
    expect(await owner.ended()).toBe(1)
    expect(await owner.log()).toContain('CATALOG_TAKEN_OVER')
    await using client = await connect(uri)
    expect(await client.read(0, slotBytes)).toEqual(pattern(0, slotBytes))
    // Asked for again, the pool is free.
    await using local = await attach(other, 'local')
    expect(await local.read(0, slotBytes)).toEqual(pattern(1, slotBytes))
  })

  test('a pool of a machine that is gone, whose catalog was brought here, is taken over with a volume', async () => {
    await using owner = await TestHome.create()
    await using here = await TestHome.create()
    const { pid } = await owner.start()
    owner.cli('pool', 'create', 'fast', '--driver', 'ceph', ...optionsIn('moved'))
    owner.cli('volume', 'create', 'disk', '--size', '8M', '--pool', 'fast')
    const client = await connect(owner.cli('volume', 'attach', 'disk', '--format', 'uri'))
    await client.write(0, pattern(1, mebibyte))
    await client.flush()
    await stopOutsideOfChange(pid, join(owner.path, 'catalog.db'))
    try {
      for (const name of await readdir(owner.path))
        if (name.startsWith('catalog.db')) await cp(join(owner.path, name), join(here.path, name))
      await here.start()
      const refused = here.failure('volume', 'attach', 'disk')
      expect(refused.code).toBe('POOL_LOCKED')
      expect(refused.message).toContain(`pid ${pid}`)
      expect(refused.message).toContain('--take-over')
      await using taken = await connect(here.cli('volume', 'attach', 'disk', '--take-over', '--format', 'uri'))
      expect(await taken.read(0, mebibyte)).toEqual(pattern(1, mebibyte))
      await taken.write(0, pattern(2, slotBytes))
      await taken.flush()
      process.kill(pid, 'SIGCONT')
      // It has a catalog of its own, so it goes on; but nothing of it lands.
      await expect(client.write(0, pattern(3, slotBytes)).then(() => client.flush())).rejects.toThrow()
      expect(await taken.read(0, slotBytes)).toEqual(pattern(2, slotBytes))
    } finally {
      process.kill(pid, 'SIGCONT')
      await client.disconnect().catch(() => undefined)
    }
  })
})
