import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { afterEach, expect, test } from 'vitest'
import { openCatalog } from './open-catalog.ts'
import { makeTemporaryFolder } from './testing.ts'
import { logFileBytesMax } from './wal-checkpointer.ts'

const cleanups: (() => Promise<void>)[] = []

afterEach(async () => {
  for (const cleanup of cleanups.splice(0).toReversed()) await cleanup()
})

test('100,000 pages in batches keep the log short and the event loop free', async () => {
  const { folder, remove } = await makeTemporaryFolder()
  cleanups.push(remove)
  const path = join(folder, 'catalog.db')
  const warnings: string[] = []
  /** How long this thread was held by an insert or a commit: on the clock, and by its own work alone. */
  const stretches: { wallMs: number; cpuMs: number }[] = []
  const measure = <T>(fn: () => T): T => {
    const [wallMs, cpu] = [performance.now(), process.threadCpuUsage()]
    const result = fn()
    const { user, system } = process.threadCpuUsage(cpu)
    stretches.push({ wallMs: performance.now() - wallMs, cpuMs: (user + system) / 1000 })
    return result
  }
  const catalog = await openCatalog(path, {
    reserveBytes: 0,
    onWarning: (message) => warnings.push(message),
    commitWith: measure,
  })
  cleanups.push(() => catalog.close())

  const pageCount = 100_000
  const batchCount = 100
  const bodies = Array.from({ length: batchCount }, (_, index) => new Uint8Array(1200).fill(index))
  const delay = monitorEventLoopDelay({ resolution: 1 })
  delay.enable()
  let logBytesMax = 0
  let waitMsMax = 0
  for (let first = 1; first <= pageCount; first += batchCount) {
    const ids = Array.from({ length: batchCount }, (_, index) => first + index)
    const startMs = performance.now()
    await catalog.write(() => measure(() => catalog.pages.insert(ids, bodies)), { durable: false })
    waitMsMax = Math.max(waitMsMax, performance.now() - startMs)
    if (first % 5000 === 1) logBytesMax = Math.max(logBytesMax, (await stat(`${path}-wal`)).size)
  }
  const commitMs = performance.now()
  await catalog.write((tx) => tx.insertInto('meta').values({ key: 'k', value: 'v' }).execute())
  const durableMs = performance.now() - commitMs
  delay.disable()

  const ranked = (values: number[]): { median: number; p99: number; max: number } => {
    const sorted = values.toSorted((a, b) => a - b)
    const at = (part: number): number => sorted[Math.min(sorted.length - 1, Math.floor(sorted.length * part))] ?? 0
    return { median: at(0.5), p99: at(0.99), max: at(1) }
  }
  const wall = ranked(stretches.map(({ wallMs }) => wallMs))
  const cpu = ranked(stretches.map(({ cpuMs }) => cpuMs))
  const rounded = (value: number): string => value.toFixed(1)
  // oxlint-disable-next-line no-console -- the figures are what the test is for, besides the bounds below
  console.log(
    `catalog: ${pageCount} pages in batches of ${batchCount}: longest synchronous stretch ${rounded(wall.max)} ms ` +
      `(p99 ${rounded(wall.p99)} ms; its own work ${rounded(cpu.max)} ms), event loop held up to ${rounded(delay.max / 1e6)} ms, ` +
      `a write waited up to ${rounded(waitMsMax)} ms, durable commit at the end ${rounded(durableMs)} ms, ` +
      `log up to ${rounded(logBytesMax / 2 ** 20)} MiB`,
  )
  expect(warnings).toEqual([])
  // All pages together are 140 MB: without folding the log would have grown to that.
  expect(logBytesMax).toBeLessThanOrEqual(logFileBytesMax)
  // Its own work: no stretch folds, which would take a hundred times what the others do. On the clock whatever else the machine does
  // is in it, too: that is only printed.
  expect(cpu.p99).toBeLessThan(Math.max(20, 20 * cpu.median))
  expect(await catalog.pages.usage()).toEqual({ pageCount, bodyBytes: pageCount * 1200 })
  await catalog.close()
  // The last connection folds everything and removes the log.
  await expect(stat(`${path}-wal`)).rejects.toThrow('ENOENT')
})
