/**
 * What is the matter with the backends of pools: looks at every pool now and then, logs what begins and what ends, and opens again
 * the pools whose backend could not be reached.
 *
 * Rules:
 * - A look waits for nothing: backends are looked at by their stores.
 * - A pool is tried to be opened by one attempt at a time, and only if its backend was away, or if somebody had it whom nobody can
 *   shut out: he may be gone. One that somebody has is tried less and less often. What else is wrong (it is another catalog's, or its holder could be shut out) is for people to decide.
 */
import { isAtollError, toAtollError, type Logger } from '@atoll/core'
import type { Mapper } from '@atoll/mapper'
import type { PoolHealth } from '@atoll/southbound'
import type { SetTimer } from './timers.ts'

/** How often pools are looked at. */
export const healthIntervalMs = 5_000

/** A pool that somebody has is tried at every look at first, later at one in so many: every minute. */
export const heldLooksMax = 12

/** A pool of whose backend there is something to say. */
export interface TroubledPool {
  readonly name: string
  /** Kinds of conditions (southbound/driver.ts), or the code of the error that keeps it from being opened. */
  readonly conditions: readonly string[]
}

interface PoolName {
  readonly id: string
  readonly name: string
}

export class HealthMonitor {
  readonly #mapper: Mapper
  readonly #log: Logger
  readonly #setTimer: SetTimer
  readonly #onOpened: (poolId: string) => void
  /** By id: what was said last. */
  readonly #troubles = new Map<string, TroubledPool>()
  /** Attempts to open a pool that are under way, by its id. */
  readonly #opening = new Map<string, Promise<void>>()
  /** Pools that somebody has, by id: after how many looks each is tried again, and how many of them are to come. */
  readonly #held = new Map<string, { pause: number; looksLeft: number }>()
  #looking: Promise<void> = Promise.resolve()
  #cancelTimer: (() => void) | null = null
  #closed = false

  /** `onOpened`: a pool was opened that could not be before. */
  constructor(options: { mapper: Mapper; log: Logger; setTimer: SetTimer; onOpened: (poolId: string) => void }) {
    this.#mapper = options.mapper
    this.#log = options.log
    this.#setTimer = options.setTimer
    this.#onOpened = options.onOpened
  }

  /** Looks now, and from time to time until it is closed. */
  start(): void {
    if (this.#closed) return
    this.#cancelTimer = this.#setTimer(() => this.start(), healthIntervalMs)
    this.#looking = this.#looking.then(() => this.#lookAtAll())
  }

  /** Takes what a pool says now and returns it; null: it is not open. */
  observe(pool: PoolName): PoolHealth | null {
    const health = this.#mapper.pools.health(pool.id)
    if (health !== null) {
      const told = health.conditions.filter(({ severity }) => severity !== 'note')
      this.#tell(
        pool,
        told.map(({ kind }) => kind),
        told.map(({ message }) => message),
      )
      return health
    }
    const failure = this.#mapper.pools.failure(pool.id)
    if (failure !== undefined) this.#tell(pool, [failure.code], [failure.message])
    return null
  }

  /** Pools of which there was something to say when they were looked at last, by name. */
  troubledPools(): TroubledPool[] {
    return [...this.#troubles.values()].toSorted((a, b) => (a.name < b.name ? -1 : 1))
  }

  /** Waits for what is under way. */
  async close(): Promise<void> {
    this.#closed = true
    this.#cancelTimer?.()
    await this.#looking
    await Promise.all(this.#opening.values())
  }

  #tell({ id, name }: PoolName, conditions: readonly string[], messages: readonly string[]): void {
    const before = this.#troubles.get(id)?.conditions ?? []
    const [now, earlier] = [new Set(conditions), new Set(before)]
    if (now.size === 0) this.#troubles.delete(id)
    else this.#troubles.set(id, { name, conditions: [...now] })
    const values = { pool: name, poolId: id }
    if (now.difference(earlier).size > 0)
      this.#log.warn({ ...values, conditions: [...now], messages }, 'something is the matter with the backend of the pool')
    else if (now.size === 0 && earlier.size > 0)
      this.#log.info({ ...values, conditions: [...earlier] }, 'nothing is the matter with the backend of the pool any more')
  }

  #noteHeld(poolId: string, isHeld: boolean): void {
    if (!isHeld) {
      this.#held.delete(poolId)
      return
    }
    const pause = Math.min((this.#held.get(poolId)?.pause ?? 0.5) * 2, heldLooksMax)
    this.#held.set(poolId, { pause, looksLeft: pause })
  }

  async #lookAtAll(): Promise<void> {
    try {
      const rows = await this.#mapper.pools.list()
      for (const id of this.#held.keys()) if (!rows.some((row) => row.id === id)) this.#held.delete(id)
      for (const id of this.#troubles.keys()) if (!rows.some((row) => row.id === id)) this.#troubles.delete(id)
      for (const row of rows) {
        this.observe(row)
        if (this.#closed || this.#opening.has(row.id)) continue
        if (!this.#mapper.pools.mayOpenLater(row)) {
          this.#held.delete(row.id)
          continue
        }
        const held = this.#held.get(row.id)
        if (held !== undefined && --held.looksLeft > 0) continue
        const opening = this.#mapper.pools
          .open(row)
          .then(() => {
            this.#held.delete(row.id)
            this.#log.info({ pool: row.name, poolId: row.id }, 'the pool is open again')
            this.#onOpened(row.id)
          })
          .catch((error: unknown) => {
            this.#log.debug({ err: toAtollError(error), pool: row.name }, 'the pool cannot be opened')
            this.#noteHeld(row.id, isAtollError(error, 'POOL_LOCKED'))
          })
          .finally(() => this.#opening.delete(row.id))
        this.#opening.set(row.id, opening)
      }
    } catch (error) {
      this.#log.debug({ err: error }, 'the pools could not be looked at')
    }
  }
}
