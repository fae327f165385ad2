import { expect, test } from 'vitest'
import { MetricsText } from './metrics-text.ts'

/** As the engine has them: one below 1024 ns, then four for each power of two. */
const ends = Array.from({ length: 109 }, (_, index) =>
  index === 0 ? 1024e-9 : ((4 + ((index - 1) % 4) + 1) * 2 ** (8 + Math.floor((index - 1) / 4))) / 1e9,
)

test('labels are escaped, and a family without samples is left out', () => {
  const text = new MetricsText(ends)
  text.gauge('atoll_free_bytes', 'Free\nnow.', [[{ pool: 'a"b\\c\nd' }, 12]])
  text.counter('atoll_nothing_total', 'Nothing.', [])
  text.gauge('atoll_up', 'Up.', [[{}, 1]])
  expect(text.toString()).toBe(
    '# HELP atoll_free_bytes Free\\nnow.\n# TYPE atoll_free_bytes gauge\natoll_free_bytes{pool="a\\"b\\\\c\\nd"} 12\n' +
      '# HELP atoll_up Up.\n# TYPE atoll_up gauge\natoll_up 1\n',
  )
})

test('a histogram is cumulative, each bucket up to its end, and holds all in the last', () => {
  const text = new MetricsText(ends)
  const counts = Array.from({ length: 109 }, () => 1)
  text.histogram('atoll_read_seconds', 'Reads.', [[{ pool: 'p' }, { counts, sumSeconds: 2.5 }]])
  const buckets = [...text.toString().matchAll(/_bucket\{pool="p",le="([^"]+)"\} (\d+)/g)].map(([, le, count]) => [
    Number(le ?? ''),
    count,
  ])
  for (const [le, count] of buckets.slice(0, -1)) {
    expect(ends.filter((end) => end <= (le as number))).toHaveLength(Number(count))
    expect(le).toBeLessThan(140)
  }
  expect(text.toString()).toContain('atoll_read_seconds_bucket{pool="p",le="+Inf"} 109\n')
  expect(text.toString()).toContain('atoll_read_seconds_sum{pool="p"} 2.5\natoll_read_seconds_count{pool="p"} 109\n')
  expect(buckets.length).toBeGreaterThan(8)
  expect(buckets.length).toBeLessThan(20)
})
