import { createLog } from '@atoll/core'
import { noTotals } from '@atoll/mapper'
import { setFaults } from '@atoll/southbound'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { isSlowBackend, slowReadMs, slowSyncMs } from './activity.ts'
import { ManualTimers, makeFolder, mebibyte, TestClient, TestDaemon, until } from './testing.ts'

/** What rates are over: no interval counts as less than a millisecond, however quick the machine is. */
const secondsOf = (intervalMs: number): number => Math.max(intervalMs, 1) / 1000

describe('what is going on', () => {
  let folder: string
  let removeFolder: () => Promise<void>
  let daemon: TestDaemon
  let timers: ManualTimers
  let lines: { msg: string; pool?: string }[]

  beforeEach(async () => {
    const made = await makeFolder()
    folder = made.folder
    removeFolder = made.remove
    timers = new ManualTimers()
    lines = []
    const log = createLog({ write: (line) => void lines.push(JSON.parse(line) as (typeof lines)[number]) })
    daemon = await TestDaemon.open(folder, { setTimer: timers.setTimer, log })
    await daemon.composer.pools.create({ name: 'faulty', driver: 'fault-memory', options: {} })
  })
  afterEach(async () => {
    await daemon.stop()
    await removeFolder()
  })

  async function attach(name: string, pool: string): Promise<TestClient> {
    const { id } = await daemon.composer.volumes.create({ name, sizeBytes: 16 * mebibyte, pool })
    await daemon.composer.volumes.attach(name)
    return new TestClient(daemon.composer, id)
  }

  test('is how quickly jobs move bytes, too', async () => {
    const { composer } = daemon
    const [more, end] = [Promise.withResolvers<void>(), Promise.withResolvers<void>()]
    async function* stream(): AsyncGenerator<Uint8Array> {
      yield Buffer.alloc(mebibyte, 1)
      await more.promise
      yield Buffer.alloc(3 * mebibyte, 2)
      await end.promise
    }
    const { id, subject } = await composer.images.importStream({ name: 'moving', stream: stream(), sizeBytes: 8 * mebibyte })
    const moved = async (bytes: number): Promise<void> =>
      await until(async () => (await composer.jobs.show(id)).progressBytes === bytes)
    await moved(mebibyte)
    const asked = composer.activity.over(1000)
    more.resolve()
    await moved(4 * mebibyte)
    timers.expireAll()
    const { intervalMs, jobs } = await asked
    const seconds = secondsOf(intervalMs)
    const job = {
      id,
      kind: 'image-import-stream',
      subject,
      name: 'moving',
      progressBytes: 4 * mebibyte,
      totalBytes: 8 * mebibyte,
    }
    expect(jobs).toMatchObject([job])
    expect((jobs[0]?.bytesPerSecond ?? 0) * seconds).toBeCloseTo(3 * mebibyte)
    expect(Math.abs((jobs[0]?.secondsLeft ?? 0) - seconds * (4 / 3))).toBeLessThan(1.01)
    end.resolve()
    await composer.jobs.wait(id)
    const later = composer.activity.over(1000)
    timers.expireAll()
    expect((await later).jobs).toEqual([])
  })

  test('is what happened in the interval, of every attached volume and of every pool', async () => {
    const { composer } = daemon
    const [first] = [await attach('first', 'default'), await attach('second', 'faulty')]
    await first.device.write(0, Buffer.alloc(mebibyte, 1))
    await first.device.flush()
    const asked = composer.activity.over(1000)
    await first.device.write(0, Buffer.alloc(mebibyte, 2))
    await first.device.read(0, 4096)
    await first.device.flush()
    timers.expireAll()
    const { intervalMs, volumes, pools } = await asked
    expect(volumes.map(({ name, pool }) => [name, pool])).toEqual([
      ['first', 'default'],
      ['second', 'faulty'],
    ])
    const seconds = secondsOf(intervalMs)
    expect((volumes[0]?.writeBytesPerSecond ?? 0) * seconds).toBeCloseTo(mebibyte)
    expect((volumes[0]?.readBytesPerSecond ?? 0) * seconds).toBeCloseTo(4096)
    expect(volumes[0]?.connections).toBe(1)
    expect(volumes[1]).toMatchObject({
      writeBytesPerSecond: 0,
      queueDepth: 0,
      reads: { perSecond: 0, meanMs: null, p99Ms: null },
    })
    // Whether `default` is slow is the business of this machine's disk.
    expect(pools.map(({ name }) => name)).toEqual(['default', 'faulty'])
    expect(pools[1]?.slow).toBe(false)
    const [used] = pools
    expect((used?.syncs.perSecond ?? 0) * seconds).toBeCloseTo(1)
    expect((used?.reads.perSecond ?? 0) * seconds).toBeCloseTo(1)
    expect(used?.syncs.p99Ms).toBeGreaterThan(0)
    expect(pools[1]?.syncs.perSecond).toBe(0)
  })

  test('totals of a pool keep what closed devices did', async () => {
    const client = await attach('first', 'default')
    await client.device.write(0, Buffer.alloc(mebibyte, 1))
    await client.device.flush()
    const { id } = await daemon.composer.pools.show('default')
    const open = daemon.mapper.pools.totals().get(id)
    expect(open).toMatchObject({ writeOperations: 1, writeBytes: mebibyte, flushOperations: 1 })
    expect(open?.backendSync.counts.length).toBeGreaterThan(0)
    await daemon.composer.volumes.detach('first')
    expect(daemon.mapper.pools.totals().get(id)).toMatchObject({
      writeOperations: 1,
      writeBytes: mebibyte,
      backendSyncsRunning: 0,
    })
  })

  test('a backend that is slow is shown so and logged once, and again when it is not', async () => {
    const { composer, mapper } = daemon
    const client = await attach('disk', 'faulty')
    const pool = await composer.pools.show('faulty')
    expect(pool.slow).toBe(false)
    const handle = await mapper.pools.handle(pool.id)
    // The one slow sync is the client's.
    await mapper.idle()
    setFaults(handle, { rules: [{ operation: 'sync', errno: 0, delayMs: slowSyncMs + 100, applyCount: 1 }] })
    await client.device.write(0, Buffer.alloc(4096, 1))
    await client.device.flush()
    const logged = (text: string): number => lines.filter((line) => line.pool === 'faulty' && line.msg.includes(text)).length
    timers.expireAll()
    await until(async () => (await composer.pools.show('faulty')).slow)
    expect(logged('is slow')).toBe(1)
    timers.expireAll()
    await until(async () => !(await composer.pools.show('faulty')).slow)
    expect([logged('is slow'), logged('not slow any more')]).toEqual([1, 1])
  })
})

describe('a backend is slow', () => {
  const took = (ms: number, count: number) => ({ counts: [count], sumSeconds: (ms * count) / 1000 })

  test.each([
    ['when its reads take long on average', noTotals, { ...noTotals, backendRead: took(slowReadMs + 1, 3) }, true],
    ['when its syncs take long on average', noTotals, { ...noTotals, backendSync: took(slowSyncMs + 1, 3) }, true],
    [
      'but not for what it did before',
      { ...noTotals, backendSync: took(slowSyncMs + 1, 3) },
      { ...noTotals, backendSync: took(slowSyncMs + 1, 3) },
      false,
    ],
    ['but not when they are quick', noTotals, { ...noTotals, backendRead: took(1, 9), backendSync: took(10, 9) }, false],
    ['when a sync hangs', { ...noTotals, backendSyncsRunning: 1 }, { ...noTotals, backendSyncsRunning: 1 }, true],
    ['when reads hang', { ...noTotals, backendReadsRunning: 2 }, { ...noTotals, backendReadsRunning: 3 }, true],
    ['but not when a read has just begun', noTotals, { ...noTotals, backendReadsRunning: 1 }, false],
  ])('%s', (_when, before, after, expected) => {
    expect(isSlowBackend(before, after)).toBe(expected)
  })
})
