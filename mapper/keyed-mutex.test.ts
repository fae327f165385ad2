import { describe, expect, it } from 'vitest'
import { KeyedMutex } from './keyed-mutex.ts'

describe('keyed mutex', () => {
  it('lets one holder of a key in at a time, in the order they came', async () => {
    const mutex = new KeyedMutex()
    const order: string[] = []
    const gate = Promise.withResolvers<void>()
    const first = mutex.run(['a'], async () => {
      order.push('first begins')
      await gate.promise
      order.push('first ends')
    })
    const others = ['second', 'third'].map(
      async (name) =>
        await mutex.run(['a'], async () => {
          order.push(name)
        }),
    )
    await mutex.run(['b'], async () => {
      order.push('another key')
    })
    gate.resolve()
    await Promise.all([first, ...others])
    expect(order).toEqual(['first begins', 'another key', 'first ends', 'second', 'third'])
  })

  it('lets two groups that name their keys in opposite orders both finish', async () => {
    const mutex = new KeyedMutex()
    const done: string[] = []
    await Promise.all([
      mutex.run(['a', 'b'], async () => {
        done.push('ab')
      }),
      mutex.run(['b', 'a'], async () => {
        done.push('ba')
      }),
    ])
    expect(done).toHaveLength(2)
    expect(mutex.isHeld('a')).toBe(false)
  })

  it('lets go when the holder throws', async () => {
    const mutex = new KeyedMutex()
    const failing = mutex.run(['a'], async () => {
      throw new Error('broken')
    })
    await expect(failing).rejects.toThrow('broken')
    await expect(mutex.run(['a'], async () => 'in')).resolves.toBe('in')
  })

  it('takes a key that is named twice once', async () => {
    await expect(new KeyedMutex().run(['a', 'a'], async () => 'in')).resolves.toBe('in')
  })
})
