import { expect, test } from 'vitest'
import { addLatencies, latenciesSince, latencyCount, meanSeconds, noLatencies, quantileSeconds } from './latency.ts'

const ends = [0.001, 0.002, 0.004]

test('sums and differences go bucket by bucket, also where one is shorter', () => {
  const before = { counts: [1, 2], sumSeconds: 0.004 }
  const after = { counts: [1, 4, 1], sumSeconds: 0.01 }
  expect(latenciesSince(before, after)).toEqual({ counts: [0, 2, 1], sumSeconds: 0.006 })
  expect(addLatencies(before, after)).toEqual({ counts: [2, 6, 1], sumSeconds: 0.014 })
  expect(latencyCount(after)).toBe(6)
  expect(meanSeconds(after)).toBeCloseTo(0.01 / 6)
})

test('a histogram that started anew is taken as a whole', () => {
  const after = { counts: [3], sumSeconds: 0.001 }
  expect(latenciesSince({ counts: [2, 5], sumSeconds: 1 }, after)).toEqual(after)
})

test('a quantile is the end of its bucket, and nothing of nothing', () => {
  const latencies = { counts: [98, 1, 1], sumSeconds: 0.1 }
  expect(quantileSeconds(latencies, 0.5, ends)).toBe(0.001)
  expect(quantileSeconds(latencies, 0.99, ends)).toBe(0.002)
  expect(quantileSeconds(latencies, 1, ends)).toBe(0.004)
  expect(quantileSeconds(noLatencies, 0.5, ends)).toBe(null)
  expect(meanSeconds(noLatencies)).toBe(null)
})
