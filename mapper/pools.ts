/**
 * The pools that are open: a handle for each row, or the reason why there is none.
 *
 * Rules:
 * - A pool that cannot be opened (POOL_LOCKED, POOL_UNAVAILABLE, …) keeps its reason; what lies in it fails with that
 *   reason, and nothing else is harmed.
 * - A pool that is being deleted gives out no handle any more.
 */
import { hostname } from 'node:os'
import { AtollError, toAtollError, type Catalog, type Clock, type PoolRow } from '@atoll/core'
import type { Engine } from '@atoll/native'
import type { Driver, PoolContext, PoolHandle, PoolInspection } from '@atoll/southbound'
import { parsePoolSettings } from './pool-settings.ts'

export interface PoolsOptions {
  readonly catalog: Catalog
  readonly engine: Engine
  readonly drivers: readonly Driver[]
  readonly clock: Clock
}

export class Pools {
  readonly #options: PoolsOptions
  readonly #drivers: ReadonlyMap<string, Driver>
  readonly #handles = new Map<string, PoolHandle>()
  readonly #failures = new Map<string, AtollError>()
  readonly #leaving = new Set<string>()
  /** Of pools that were opened, or tried. */
  readonly #names = new Map<string, string>()
  readonly #ownerText: string

  constructor(options: PoolsOptions) {
    this.#options = options
    this.#drivers = new Map(options.drivers.map((driver) => [driver.name, driver]))
    this.#ownerText = `pid ${process.pid} on ${hostname()} since ${new Date(options.clock.nowMs()).toISOString()}`
  }

  /** @throws AtollError DRIVER_UNKNOWN naming the drivers there are */
  driver(name: string): Driver {
    const driver = this.#drivers.get(name)
    if (driver !== undefined) return driver
    const names = [...this.#drivers.keys()]
    throw new AtollError('DRIVER_UNKNOWN', `there is no driver "${name}": use one of ${names.join(', ')}`, {
      values: { driver: name, drivers: names },
    })
  }

  /**
   * Opens the pool of a row; one that is open already is returned as it is. `create`: what is missing on the backend is made.
   * `takeOver`: whoever has it is shut out, if the driver can do that.
   * @throws AtollError DRIVER_UNKNOWN, POOL_LOCKED, POOL_OWNED_BY_OTHER, POOL_UNAVAILABLE, POOL_OPTION_INVALID
   */
  async open(
    row: PoolRow,
    { create, takeOverFrom, takeOver = false }: { create: boolean; takeOverFrom?: string | undefined; takeOver?: boolean },
  ): Promise<PoolHandle> {
    const present = this.#handles.get(row.id)
    if (present !== undefined) return present
    this.#names.set(row.id, row.name)
    try {
      const { reserveBytes } = parsePoolSettings(row.settings)
      const handle = await this.driver(row.driver).open({
        ...this.#contextOf(row),
        create,
        shutOutHolder: takeOver,
        ...(reserveBytes === null ? {} : { reserveBytes }),
        ...(takeOverFrom === undefined ? {} : { takeOverFrom }),
      })
      this.#handles.set(row.id, handle)
      this.#failures.delete(row.id)
      return handle
    } catch (error) {
      const failure = toAtollError(error)
      this.#failures.set(row.id, failure)
      throw failure
    }
  }

  /** Looks at a pool that is not open; ends with its `close`. @throws AtollError as `Driver.inspect` */
  async inspect(row: Pick<PoolRow, 'driver' | 'id' | 'options'>): Promise<PoolInspection> {
    return await this.driver(row.driver).inspect({ ...this.#contextOf(row), create: false })
  }

  #contextOf(row: Pick<PoolRow, 'id' | 'options'>): Omit<PoolContext, 'create' | 'shutOutHolder' | 'takeOverFrom'> {
    return {
      engine: this.#options.engine,
      poolId: row.id,
      options: row.options,
      catalogId: this.#options.catalog.id,
      ownerText: this.#ownerText,
      now: () => this.#options.clock.nowMs(),
    }
  }

  /**
   * The handle of an open pool.
   * @throws AtollError POOL_CLOSED while it is being deleted; POOL_UNAVAILABLE with the reason if it could not be opened
   */
  handle(poolId: string): PoolHandle {
    const handle = this.#handles.get(poolId)
    if (handle !== undefined && !this.#leaving.has(poolId)) return handle
    if (handle !== undefined)
      throw new AtollError('POOL_CLOSED', `pool ${poolId} is being deleted`, { values: { poolId }, retryable: false })
    const reason = this.#failures.get(poolId)
    const name = this.#names.get(poolId)
    throw new AtollError(
      'POOL_UNAVAILABLE',
      `pool ${name === undefined ? poolId : `"${name}" (${poolId})`} is not open${reason === undefined ? '' : `: ${reason.code}: ${reason.message}`}`,
      {
        values: { poolId, ...(reason === undefined ? {} : { reason: reason.code }) },
        cause: reason,
      },
    )
  }

  /** The handle if the pool is open. */
  find(poolId: string): PoolHandle | undefined {
    return this.#leaving.has(poolId) ? undefined : this.#handles.get(poolId)
  }

  /** Why the pool is not open. */
  failure(poolId: string): AtollError | undefined {
    return this.#failures.get(poolId)
  }

  openIds(): string[] {
    return [...this.#handles.keys()].filter((id) => !this.#leaving.has(id))
  }

  /** From now on `handle` refuses it; returns the handle for what is left to do. */
  leave(poolId: string): PoolHandle {
    const handle = this.handle(poolId)
    this.#leaving.add(poolId)
    return handle
  }

  /** The deletion was refused: the pool serves again. */
  stay(poolId: string): void {
    this.#leaving.delete(poolId)
  }

  /** The pool was opened but cannot be used: closes it and keeps the reason. */
  async drop(poolId: string, reason: AtollError): Promise<void> {
    const handle = this.#handles.get(poolId)
    this.#handles.delete(poolId)
    this.#failures.set(poolId, reason)
    await handle?.close()
  }

  /** The pool is gone or closed. */
  forget(poolId: string): void {
    this.#handles.delete(poolId)
    this.#failures.delete(poolId)
    this.#names.delete(poolId)
    this.#leaving.delete(poolId)
  }

  /** Closes every pool. Idempotent. */
  async close(): Promise<void> {
    const handles = [...this.#handles.values()]
    this.#handles.clear()
    await Promise.all(handles.map(async (handle) => await handle.close()))
  }
}
