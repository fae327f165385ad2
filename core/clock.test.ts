import { expect, test } from 'vitest'
import { ManualClock, systemClock } from './clock.ts'

test('the manual clock moves when it is told to', () => {
  const clock = new ManualClock(1000)
  clock.advance(500)
  expect([clock.nowMs(), clock.monotonicMs()]).toEqual([1500, 500])
})

test('the monotonic time of the system does not go back', () => {
  const first = systemClock.monotonicMs()
  expect(systemClock.monotonicMs()).toBeGreaterThanOrEqual(first)
  expect(Math.abs(systemClock.nowMs() - Date.now())).toBeLessThan(60_000)
})
