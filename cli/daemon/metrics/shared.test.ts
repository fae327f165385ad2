import type { Clock } from '@atoll/core'
import { expect, test } from 'vitest'
import { shared } from './shared.ts'

test('what is made is shared while it is made and for a while afterwards, and a failure with nobody later', async () => {
  let nowMs = 0
  const clock = { monotonicMs: () => nowMs, nowMs: () => nowMs } as Clock
  const waiting: PromiseWithResolvers<number>[] = []
  const get = shared({ clock, keepMs: 1000 }, () => {
    const next = Promise.withResolvers<number>()
    waiting.push(next)
    return next.promise
  })
  const [first, second] = [get(), get()]
  nowMs = 5000
  expect(waiting).toHaveLength(1)
  waiting[0]?.resolve(1)
  await expect(Promise.all([first, second])).resolves.toEqual([1, 1])
  nowMs = 5999
  await expect(get()).resolves.toBe(1)
  nowMs = 6000
  const failing = get()
  waiting[1]?.reject(new Error('no'))
  await expect(failing).rejects.toThrow('no')
  const again = get()
  waiting[2]?.resolve(3)
  await expect(again).resolves.toBe(3)
})
