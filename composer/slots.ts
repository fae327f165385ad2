import { AtollError } from '@atoll/core'

/** At most `slotCount` callers at a time; others wait in the order they came, at most `waitersMax` of them (I8). */
export class Slots {
  private free: number
  private readonly waitersMax: number
  private readonly waiters: (() => void)[] = []

  constructor(slotCount: number, waitersMax: number) {
    this.free = slotCount
    this.waitersMax = waitersMax
  }

  /** @throws AtollError LIMIT_REACHED when too many wait already */
  async run<T>(fn: () => Promise<T>): Promise<T> {
    await this.take()
    try {
      return await fn()
    } finally {
      const next = this.waiters.shift()
      // Handed on, so that nobody slips in between.
      if (next === undefined) this.free += 1
      else next()
    }
  }

  private async take(): Promise<void> {
    if (this.free > 0) {
      this.free -= 1
      return
    }
    if (this.waiters.length >= this.waitersMax) {
      throw new AtollError('LIMIT_REACHED', `${this.waitersMax} requests of this kind wait already`, {
        values: { limit: this.waitersMax },
      })
    }
    const { promise, resolve } = Promise.withResolvers<void>()
    this.waiters.push(resolve)
    await promise
  }
}
