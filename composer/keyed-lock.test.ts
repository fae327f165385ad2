import { expect, test } from 'vitest'
import { KeyedLock } from './keyed-lock.ts'

test('one caller at a time per key, in the order they came, and other keys do not wait', async () => {
  const lock = new KeyedLock()
  const order: string[] = []
  const gate = Promise.withResolvers<void>()
  const first = lock.run('a', async () => {
    await gate.promise
    order.push('first')
  })
  const second = lock.run('a', async () => void order.push('second'))
  await lock.run('b', async () => void order.push('other'))
  gate.resolve()
  await Promise.all([first, second])
  expect(order).toEqual(['other', 'first', 'second'])
})

test('a failure lets the next caller in', async () => {
  const lock = new KeyedLock()
  await expect(lock.run('a', () => Promise.reject(new Error('no')))).rejects.toThrow('no')
  await expect(lock.run('a', async () => 'in')).resolves.toBe('in')
})

test('callers that need several keys in different orders do not wait for each other in a circle', async () => {
  const lock = new KeyedLock()
  const done: string[] = []
  await Promise.all([
    lock.runAll(['a', 'b', 'a'], async () => void done.push('one')),
    lock.runAll(['b', 'a'], async () => void done.push('two')),
  ])
  expect(done).toEqual(['one', 'two'])
})
