import { expect, test } from 'vitest'
import { Mutex } from './mutex.ts'

test('callers run one at a time, in the order they came', async () => {
  const mutex = new Mutex()
  const order: number[] = []
  let inside = 0
  await Promise.all(
    Array.from({ length: 50 }, (_, index) =>
      mutex.run(async () => {
        inside += 1
        expect(inside).toBe(1)
        for (let turn = 0; turn < index % 3; turn += 1) await Promise.resolve()
        order.push(index)
        inside -= 1
      }),
    ),
  )
  expect(order).toEqual(Array.from({ length: 50 }, (_, index) => index))
})

test('whoever comes while it is handed over waits behind those who were there', async () => {
  const mutex = new Mutex()
  const order: string[] = []
  const first = await mutex.acquire()
  const second = mutex.run(() => order.push('second'))
  first()
  const third = mutex.run(() => order.push('third'))
  await Promise.all([second, third])
  expect(order).toEqual(['second', 'third'])
})

test('a throw lets go, and letting go twice is harmless', async () => {
  const mutex = new Mutex()
  await expect(mutex.run(() => Promise.reject(new Error('no')))).rejects.toThrow('no')
  const release = await mutex.acquire()
  release()
  release()
  const held = await mutex.acquire()
  let got = false
  const waiting = mutex.run(() => {
    got = true
  })
  await Promise.resolve()
  expect([got, mutex.waitingCount]).toEqual([false, 1])
  held()
  await waiting
  expect(got).toBe(true)
})
