/**
 * The alarm of pools that are running out of space: looks at every open pool now and then, and whenever one is shown.
 *
 * Rule: it goes on below the threshold and off when a tenth more than that is free, so that a pool which hovers there is
 * logged once.
 */
import type { Logger } from '@atoll/core'
import type { Mapper, PoolSpace } from '@atoll/mapper'
import type { SetTimer } from './timers.ts'

/** How often pools are looked at. */
export const spaceIntervalMs = 10_000

const recoveredRatio = 1.1

interface PoolName {
  readonly id: string
  readonly name: string
}

export class SpaceMonitor {
  readonly #mapper: Mapper
  readonly #log: Logger
  readonly #setTimer: SetTimer
  /** Names of the pools whose alarm is on, by id. */
  readonly #low = new Map<string, string>()
  #cancelTimer: (() => void) | null = null
  /** Looks that are under way: a backend that does not answer is asked once, and keeps nobody from asking the others. */
  readonly #looks = new Map<string, Promise<void>>()
  #closed = false

  constructor(options: { mapper: Mapper; log: Logger; setTimer: SetTimer }) {
    this.#mapper = options.mapper
    this.#log = options.log
    this.#setTimer = options.setTimer
  }

  /** Looks now, and from time to time until it is closed. */
  start(): void {
    if (this.#closed) return
    this.#cancelTimer = this.#setTimer(() => this.start(), spaceIntervalMs)
    this.#once('all', () => this.#lookAtAll())
  }

  /** Takes what a pool says now; returns whether its alarm is on. */
  observe({ id, name }: PoolName, { totalBytes, freeBytes, lowSpaceBytes }: PoolSpace): boolean {
    const wasLow = this.#low.has(id)
    // A backend that is smaller than the threshold can have no more free than all of it.
    const limitBytes = wasLow ? Math.min(lowSpaceBytes * recoveredRatio, totalBytes) : lowSpaceBytes
    const isLow = lowSpaceBytes > 0 && freeBytes < limitBytes
    if (isLow) this.#low.set(id, name)
    else this.#low.delete(id)
    const values = { pool: name, poolId: id, freeBytes, totalBytes, lowSpaceBytes }
    if (isLow && !wasLow)
      this.#log.warn(values, 'the pool is running out of space: delete something and reclaim, or make its backend larger')
    if (wasLow && !isLow) this.#log.info(values, 'the pool has space again')
    return isLow
  }

  /** Names of the pools whose alarm is on, sorted. */
  lowPools(): string[] {
    return [...this.#low.values()].toSorted()
  }

  /** Waits for the looks that are under way. */
  async close(): Promise<void> {
    this.#closed = true
    this.#cancelTimer?.()
    while (this.#looks.size > 0) await Promise.all(this.#looks.values())
  }

  #once(key: string, look: () => Promise<void>): void {
    if (!this.#looks.has(key))
      this.#looks.set(
        key,
        look().finally(() => this.#looks.delete(key)),
      )
  }

  async #lookAtAll(): Promise<void> {
    try {
      const rows = await this.#mapper.pools.list()
      const ids = new Set(rows.map(({ id }) => id))
      for (const id of this.#low.keys()) if (!ids.has(id)) this.#low.delete(id)
      for (const row of rows) this.#once(row.id, () => this.#lookAt(row))
    } catch (error) {
      this.#log.debug({ err: error }, 'the pools could not be looked at')
    }
  }

  async #lookAt(pool: PoolName): Promise<void> {
    try {
      this.observe(pool, await this.#mapper.pools.space(pool.id))
    } catch (error) {
      // Why a pool does not answer is logged where it is opened and used.
      this.#log.debug({ err: error, pool: pool.name }, 'the space of a pool is not known')
    }
  }
}
