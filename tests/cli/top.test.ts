import { connect } from '@atoll/nbd-client'
import { expect, test } from 'vitest'
import { TestHome } from '../test-home.ts'

interface Operations {
  perSecond: number
  meanMs: number | null
  p99Ms: number | null
}
interface Shown {
  intervalMs: number
  volumes: {
    name: string
    connections: number
    reads: Operations
    writes: Operations
    flushes: Operations
    readBytesPerSecond: number
    writeBytesPerSecond: number
    queueDepth: number
  }[]
  pools: { name: string; syncs: Operations; slow: boolean }[]
}

const [writeBytes, readBytes] = [65_536, 4096]
/** Tries to get a look that nothing came into. */
const looksMax = 20

/**
 * Why the counters of a look do not fit together, though each is right: a machine that is busy with something else holds up the client
 * for a whole interval, or the daemon between the clock and one counter and the next, while the client goes on.
 */
function disturbance({ intervalMs, volumes, pools }: Shown, longestMs: number): string | null {
  const disk = volumes.find(({ name }) => name === 'disk')
  if (disk === undefined) return null
  const { reads, writes, flushes } = disk
  if ([reads, writes, flushes].some(({ perSecond }) => perSecond === 0)) return 'a kind of operation is not there'
  if (pools[0]?.syncs.perSecond === 0) return 'no sync is there'
  // One that is in the sum of the times may not be counted yet.
  if ([reads, writes, flushes].some(({ meanMs }) => (meanMs ?? 0) > longestMs)) return 'a mean is longer than everything'
  // Bytes count when a request begins, the request when it is answered: one can be on its way at either end.
  const bytesBeside = (operations: Operations, bytesPerSecond: number, bytesEach: number): number =>
    (Math.abs(bytesPerSecond - operations.perSecond * bytesEach) * intervalMs) / 1000
  if (bytesBeside(writes, disk.writeBytesPerSecond, writeBytes) >= 1.5 * writeBytes) return 'the bytes of writes are others'
  if (bytesBeside(reads, disk.readBytesPerSecond, readBytes) >= 1.5 * readBytes) return 'the bytes of reads are others'
  // One request at a time; the one that was under way at the beginning counts as a whole.
  return disk.queueDepth < 1.01 + longestMs / intervalMs ? null : `${disk.queueDepth} requests at a time`
}

test('top shows what clients of an attached volume do, as they see it', async () => {
  await using home = await TestHome.create()
  await home.start()
  home.cli('volume', 'create', 'disk', '--size', '64M')
  home.cli('volume', 'create', 'idle', '--size', '64M')
  home.cli('volume', 'attach', 'idle')
  const client = await connect(home.cli('volume', 'attach', 'disk', '--format', 'uri'))
  let isOver = false
  let rounds = 0
  let longestMs = 0
  const look = async (): Promise<Shown> => {
    for (let looksLeft = looksMax; ; looksLeft -= 1) {
      const shown = await home.jsonMeanwhile<Shown>('top', '--interval', '2')
      if (looksLeft === 1 || disturbance(shown, longestMs) === null) return shown
    }
  }
  const asked = look().finally(() => (isOver = true))
  for (; !isOver; rounds += 1) {
    const startedMs = performance.now()
    await client.write((rounds % 1024) * writeBytes, Buffer.alloc(writeBytes, rounds))
    await client.read(0, readBytes)
    await client.flush()
    longestMs = Math.max(longestMs, performance.now() - startedMs)
  }
  const shown = await asked
  const { intervalMs, volumes, pools } = shown
  await client.disconnect()
  // A timer may come a part of a millisecond early.
  expect(intervalMs).toBeGreaterThanOrEqual(1999)
  expect(volumes.map(({ name }) => name)).toEqual(['disk', 'idle'])
  const [disk, idle] = volumes
  expect(disturbance(shown, longestMs)).toBeNull()
  for (const operations of [disk?.reads, disk?.writes, disk?.flushes]) {
    // The client also ran before and after the interval.
    const count = ((operations?.perSecond ?? 0) * intervalMs) / 1000
    expect(count).toBeGreaterThan(0)
    expect(count).toBeLessThan(rounds + 0.5)
    // Nothing took longer than the client saw; a quantile is known to a fifth. One request may make the mean larger than that.
    expect(operations?.meanMs).toBeGreaterThan(0)
    expect(operations?.p99Ms).toBeGreaterThan(0)
    expect(operations?.p99Ms).toBeLessThanOrEqual(1.25 * longestMs)
  }
  expect(disk?.queueDepth).toBeGreaterThan(0)
  expect(disk?.connections).toBe(1)
  expect(idle).toMatchObject({ connections: 0, readBytesPerSecond: 0, queueDepth: 0, reads: { perSecond: 0, meanMs: null } })
  expect(pools).toMatchObject([{ name: 'default' }])

  expect(home.cli('top', '--once', '--interval', '0.1')).toMatch(/^VOLUME .*\n(?:disk|idle) /)
  expect(home.run('top', '--interval', 'soon').exitCode).toBe(2)
})
