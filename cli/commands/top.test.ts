import { expect, test } from 'vitest'
import { activityText } from './top.ts'

const none = { perSecond: 0, meanMs: null, p99Ms: null }
const volume = {
  id: '1',
  pool: 'default',
  connections: 1,
  reads: none,
  writes: none,
  discards: none,
  flushes: none,
  readBytesPerSecond: 0,
  writeBytesPerSecond: 0,
  queueDepth: 0,
  throttledPerSecond: 0,
}

test('the busiest volume stands first, and a slow backend says so', () => {
  const reads = { perSecond: 1234.5, meanMs: 0.01234, p99Ms: 2.5 }
  const text = activityText({
    intervalMs: 1000,
    volumes: [
      { ...volume, name: 'idle' },
      { ...volume, name: 'busy', reads, readBytesPerSecond: 3 * 2 ** 20, queueDepth: 1.5 },
    ],
    pools: [{ id: 'p', name: 'default', reads: { ...none, running: 0 }, syncs: { ...none, running: 2 }, slow: true }],
    jobs: [
      {
        id: '7',
        kind: 'image-import-raw',
        subject: '8',
        name: 'debian',
        progressBytes: 2 ** 30,
        totalBytes: 4 * 2 ** 30,
        bytesPerSecond: 2 ** 28,
        secondsLeft: 12,
      },
      {
        id: '9',
        kind: 'reclaim',
        subject: 'all',
        name: null,
        progressBytes: 5,
        totalBytes: null,
        bytesPerSecond: 0,
        secondsLeft: null,
      },
    ],
  })
  const [, first, second] = text.split('\n')
  expect(first).toMatch(/^busy +default +1235 +0 +0 +3 MiB\/s +0 B\/s +0\.0123 \/ 2\.5 +- +- +1\.5 +1$/)
  expect(second).toMatch(/^idle /)
  expect(text).toMatch(/^default +0 +0 +- +- +2 +slow$/m)
  expect(text).toMatch(/^image-import-raw +debian +1 GiB of 4 GiB +256 MiB\/s +12 s +7$/m)
  expect(text).toMatch(/^reclaim +all +5 B +0 B\/s +- +9$/m)
})

test('without any volume that is said, and without jobs nothing', () => {
  const text = activityText({ intervalMs: 1000, volumes: [], pools: [], jobs: [] })
  expect(text).toContain('no volume is attached')
  expect(text).not.toContain('JOB')
})
