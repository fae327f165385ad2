/**
 * What the parts of the mapper share. Each part is a file of functions or a class over this; state lives here and nowhere
 * else, so that it can be listed.
 *
 * Lock order: a pool's lock or the one of reclaim -> resource locks (ascending ids, all of an operation at once) -> the
 * catalog's write lock.
 * Nothing but SQL is awaited inside a catalog write, so nothing is ever awaited the other way round.
 */
import type { Catalog, Clock, NewId } from '@atoll/core'
import type { Engine } from '@atoll/native'
import type { Exporter } from './exporter.ts'
import type { KeyedMutex } from './keyed-mutex.ts'
import type { Layers } from './layers.ts'
import type { OlderCatalog } from './older-catalog.ts'
import type { OpenTable } from './open-table.ts'
import type { PageIds } from './page-ids.ts'
import type { PagePins } from './page-pins.ts'
import type { Pools } from './pools.ts'
import type { SetTimer } from './timer.ts'

/** The part of a pino logger that is used. */
export interface MapperLog {
  debug(values: object, message: string): void
  info(values: object, message: string): void
  warn(values: object, message: string): void
  error(values: object, message: string): void
}

export interface MapperContext {
  readonly catalog: Catalog
  readonly engine: Engine
  readonly log: MapperLog
  readonly clock: Clock
  readonly setTimer: SetTimer
  readonly newId: NewId
  /** Names the batch logs of the engine; stands in the leases, because the logs of another home mean nothing here. */
  readonly batchLogId: string
  readonly pools: Pools
  readonly layers: Layers
  readonly open: OpenTable
  readonly pageIds: PageIds
  readonly pins: PagePins
  readonly exporter: Exporter
  /** What must not be used because this catalog is older than a pool. */
  readonly olderCatalog: OlderCatalog
  readonly locks: KeyedMutex
  /** By layer: who writes into one of its replicas that is being filled (move-fill.ts). Held for no other lock. */
  readonly fillTurns: KeyedMutex
  /** Work that nobody waits for (spare layers, deferred deletes, automatic checkpoints); `close` waits for it. */
  readonly background: Background
  /** Asks for a checkpoint of an open volume soon. */
  readonly requestCheckpoint: (volumeId: string) => void
}

/** Promises that run by themselves; a failure is logged, never thrown away and never unhandled. */
export class Background {
  readonly #running = new Set<Promise<void>>()
  readonly #log: MapperLog

  constructor(log: MapperLog) {
    this.#log = log
  }

  /** Starts `fn`; what it throws is logged as `what`. */
  start(what: string, fn: () => Promise<void>): void {
    const run = (async () => {
      try {
        await fn()
      } catch (error) {
        this.#log.warn({ err: error }, `${what} failed`)
      }
    })()
    this.#running.add(run)
    void run.finally(() => this.#running.delete(run))
  }

  get runningCount(): number {
    return this.#running.size
  }

  /** Waits until nothing runs any more, also what was started meanwhile. */
  async idle(): Promise<void> {
    while (this.#running.size > 0) await Promise.all(this.#running)
  }
}
