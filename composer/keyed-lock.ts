import { AtollError } from '@atoll/core'

/** At most this many callers wait for one key (I8). */
export const lockWaitersMax = 1000

/**
 * One caller at a time per key, in the order they came; callers with different keys do not wait for each other.
 * A caller that needs several keys takes them in one `runAll`, which sorts them, so that no two callers wait in a circle.
 */
export class KeyedLock {
  private readonly tails = new Map<string, { tail: Promise<void>; waiting: number }>()

  /** @throws AtollError LIMIT_REACHED when `lockWaitersMax` callers wait already */
  async run<T>(key: string, fn: () => Promise<T>): Promise<T> {
    const release = await this.acquire(key)
    try {
      return await fn()
    } finally {
      release()
    }
  }

  /** Runs `fn` holding every key. */
  async runAll<T>(keys: readonly string[], fn: () => Promise<T>): Promise<T> {
    const releases: (() => void)[] = []
    try {
      for (const key of [...new Set(keys)].toSorted()) releases.push(await this.acquire(key))
      return await fn()
    } finally {
      for (const release of releases.toReversed()) release()
    }
  }

  private async acquire(key: string): Promise<() => void> {
    const entry = this.tails.get(key) ?? { tail: Promise.resolve(), waiting: 0 }
    this.tails.set(key, entry)
    if (entry.waiting >= lockWaitersMax) {
      throw new AtollError('LIMIT_REACHED', `${lockWaitersMax} requests wait for ${key} already`, {
        values: { limit: lockWaitersMax },
      })
    }
    entry.waiting += 1
    const before = entry.tail
    const { promise, resolve } = Promise.withResolvers<void>()
    entry.tail = promise
    await before
    return () => {
      entry.waiting -= 1
      if (entry.waiting === 0) this.tails.delete(key)
      resolve()
    }
  }
}
