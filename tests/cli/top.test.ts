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

test('top shows what clients of an attached volume do, as they see it', async () => {
  await using home = await TestHome.create()
  await home.start()
  home.cli('volume', 'create', 'disk', '--size', '64M')
  home.cli('volume', 'create', 'idle', '--size', '64M')
  home.cli('volume', 'attach', 'idle')
  const client = await connect(home.cli('volume', 'attach', 'disk', '--format', 'uri'))
  let isOver = false
  const asked = home.jsonMeanwhile<Shown>('top', '--interval', '2').finally(() => (isOver = true))
  let rounds = 0
  let longestMs = 0
  for (; !isOver; rounds += 1) {
    const startedMs = performance.now()
    await client.write((rounds % 1024) * 65_536, Buffer.alloc(65_536, rounds))
    await client.read(0, 4096)
    await client.flush()
    longestMs = Math.max(longestMs, performance.now() - startedMs)
  }
  const { intervalMs, volumes, pools } = await asked
  await client.disconnect()
  expect(intervalMs).toBeGreaterThanOrEqual(2000)
  expect(volumes.map(({ name }) => name)).toEqual(['disk', 'idle'])
  const [disk, idle] = volumes
  for (const operations of [disk?.reads, disk?.writes, disk?.flushes]) {
    // The client also ran before and after the interval.
    const count = ((operations?.perSecond ?? 0) * intervalMs) / 1000
    expect(count).toBeGreaterThan(0)
    expect(count).toBeLessThan(rounds + 0.5)
    expect(operations?.meanMs).toBeGreaterThan(0)
    expect(operations?.p99Ms).toBeGreaterThanOrEqual((operations?.meanMs ?? 0) / 8)
  }
  // Bytes count when a request begins, the request when it is answered: one can be on its way at either end.
  const seconds = intervalMs / 1000
  const bytesBeside = (operations: Operations | undefined, bytesPerSecond: number | undefined, bytesEach: number): number =>
    Math.abs((bytesPerSecond ?? 0) - (operations?.perSecond ?? 0) * bytesEach) * seconds
  expect(bytesBeside(disk?.writes, disk?.writeBytesPerSecond, 65_536)).toBeLessThan(1.5 * 65_536)
  expect(bytesBeside(disk?.reads, disk?.readBytesPerSecond, 4096)).toBeLessThan(1.5 * 4096)
  // One request at a time; the one that was under way at the beginning counts as a whole.
  expect(disk?.queueDepth).toBeGreaterThan(0)
  expect(disk?.queueDepth).toBeLessThan(1.01 + longestMs / intervalMs)
  expect(disk?.connections).toBe(1)
  expect(idle).toMatchObject({ connections: 0, readBytesPerSecond: 0, queueDepth: 0, reads: { perSecond: 0, meanMs: null } })
  expect(pools).toMatchObject([{ name: 'default' }])
  expect(pools[0]?.syncs.perSecond).toBeGreaterThan(0)

  expect(home.cli('top', '--once', '--interval', '0.1')).toMatch(/^VOLUME .*\n(?:disk|idle) /)
  expect(home.run('top', '--interval', 'soon').exitCode).toBe(2)
})
