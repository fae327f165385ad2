/**
 * One holder per key; others wait in the order they came.
 *
 * Rules:
 * - Several keys are taken in ascending order, whatever order they were named in, so that two groups that overlap cannot
 *   wait for each other.
 * - A holder takes no second set of keys: everything an operation needs is named in one call. The one exception is who holds
 *   the key of a pool, which nobody asks for who holds a resource's.
 * - The list of waiters of a key is bounded (I8).
 */
import { AtollError } from '@atoll/core'

/** Operations that may wait for one key. */
export const waitersMax = 4096

interface Key {
  held: boolean
  waiters: (() => void)[]
}

export class KeyedMutex {
  readonly #keys = new Map<string, Key>()

  /** Whether somebody holds the key. */
  isHeld(key: string): boolean {
    return this.#keys.get(key)?.held ?? false
  }

  /**
   * Runs `fn` while holding every key.
   * @throws AtollError VOLUME_IN_USE if `waitersMax` operations wait for one of them already
   */
  async run<T>(keys: readonly string[], fn: () => Promise<T>): Promise<T> {
    const sorted = [...new Set(keys)].toSorted()
    const taken: string[] = []
    try {
      for (const key of sorted) {
        await this.#take(key)
        taken.push(key)
      }
      return await fn()
    } finally {
      for (const key of taken.toReversed()) this.#release(key)
    }
  }

  async #take(name: string): Promise<void> {
    let key = this.#keys.get(name)
    if (key === undefined) {
      key = { held: false, waiters: [] }
      this.#keys.set(name, key)
    }
    if (!key.held) {
      key.held = true
      return
    }
    if (key.waiters.length >= waitersMax) {
      throw new AtollError('VOLUME_IN_USE', `${waitersMax} operations wait for ${name} already; try again when they are done`, {
        values: { id: name, waitersMax },
        retryable: true,
      })
    }
    const { promise, resolve } = Promise.withResolvers<void>()
    key.waiters.push(resolve)
    await promise
  }

  #release(name: string): void {
    const key = this.#keys.get(name)
    if (key === undefined) return
    const next = key.waiters.shift()
    // The key stays held when it is handed on, so that nobody slips in between.
    if (next !== undefined) next()
    else this.#keys.delete(name)
  }
}
