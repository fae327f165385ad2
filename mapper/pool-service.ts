/**
 * Pools as the user sees them: made, listed, looked at, checked and deleted.
 *
 * Rules:
 * - The row of a pool is committed before its backend is touched, so a pool that was made half is opened at the next start.
 * - A pool is deleted only when nothing lies in it: no resource calls it home, and it has no layer but spares, also none that
 *   resources of other pools read from. From the moment that is checked it gives out no spare, so nothing new can start in it.
 */
import { AtollError, isAtollError, toAtollError, type PoolRow, type ResourceRow } from '@atoll/core'
import type { Finding, PoolHandle, PoolHealth } from '@atoll/southbound'
import type { MapperContext } from './context.ts'
import type { DeviceTotals } from './device-totals.ts'
import { nameResources } from './check-finding.ts'
import type { ExportStatus } from './exporter.ts'
import { provisionedBytes } from './overcommit.ts'
import { dropFromLinks, namePools, readersOf, readLinks, sourcesOf, type LinkedPool } from './pool-links.ts'
import { changeSettings, lowSpaceBytes, lowSpaceFindings, parsePoolSettings } from './pool-settings.ts'
import type { PoolReads } from './pool-reads.ts'
import { recoverPool, removeCondemned } from './recover.ts'
import { requireNoMoveOf } from './running-moves.ts'
import { takeOverRefused } from './take-over.ts'
import type { Usage } from './usage.ts'

export interface NewPool {
  readonly projectId: string
  readonly name: string
  readonly driver: string
  readonly options: Readonly<Record<string, string>>
  /** As `set` takes them. Default: the defaults. */
  readonly settings?: Readonly<Record<string, string>>
  /**
   * Default false: if the pool cannot be opened, it is not made. True: one that belongs to another catalog is kept, not open, with
   * that as its reason, so that it can be imported.
   */
  readonly keepForeign?: boolean
}

export interface PoolStatus {
  readonly totalBytes: number
  readonly freeBytes: number
  /** Allocated by the pool. */
  readonly storedBytes: number
  /** What its resources refer to, each counted for itself. */
  readonly logicalBytes: number
  /** logicalBytes / storedBytes; 1 where nothing is stored. */
  readonly dedupRatio: number
  /** Layers that lie in the pool, spares included, and those that lie in others as well. */
  readonly layers: number
  readonly export: ExportStatus
}

/** How much room a pool has, and what its settings make of that. */
export interface PoolSpace {
  readonly totalBytes: number
  readonly freeBytes: number
  readonly storedBytes: number
  /** Kept back at present for deletes on a full backend; 0: given up, or the pool keeps none. */
  readonly reserveBytes: number
  /** The alarm is on when less is free; 0: never. */
  readonly lowSpaceBytes: number
  /** What the volumes of the pool have together. */
  readonly provisionedBytes: number
  /** What they may have together; null: as much as they like. */
  readonly provisionedMaxBytes: number | null
}

/** Resources that are looked at, and found, to say who reads from a pool that cannot be deleted. */
const lookedAtMax = 1000
const readingMax = 20

export class PoolService {
  readonly #context: MapperContext
  readonly #usage: Usage
  readonly #reads: PoolReads

  constructor(context: MapperContext, usage: Usage, reads: PoolReads) {
    this.#context = context
    this.#usage = usage
    this.#reads = reads
  }

  /**
   * Opens the pool of a row, puts right what an earlier process left in it, and makes spares. Also tries again what failed.
   * `requireReserve`: a reserve that was set and cannot be kept is an error (NO_SPACE, POOL_UNSUPPORTED); a pool that is in use is
   * opened without one. `takeOver`: whoever has it is shut out for good, if the driver can do that.
   * @throws AtollError DRIVER_UNKNOWN, POOL_LOCKED, POOL_OWNED_BY_OTHER, POOL_UNAVAILABLE, POOL_OPTION_INVALID
   */
  async open(row: PoolRow, { requireReserve = false, takeOver = false } = {}): Promise<PoolHandle> {
    const { catalog, pools, layers } = this.#context
    return await this.#context.locks.run([row.id], async () => {
      const present = pools.find(row.id)
      if (present !== undefined) return present
      // A pool in which layers lie must be there: made anew on a disk that is not mounted, it would hide them.
      const replica = await catalog.db
        .selectFrom('replicas')
        .select('layer_alias')
        .where('pool_id', '=', row.id)
        .executeTakeFirst()
      const known = await catalog.db
        .selectFrom('export_pools')
        .select('taken_from')
        .where('pool_id', '=', row.id)
        .executeTakeFirst()
      const handle = await pools.open(row, {
        create: replica === undefined,
        takeOverFrom: known?.taken_from ?? undefined,
        takeOver,
      })
      try {
        const { reserveBytes } = parsePoolSettings(row.settings)
        if (requireReserve && reserveBytes !== null) await handle.setReserve(reserveBytes)
        await this.#context.exporter.attach(handle)
        await recoverPool(this.#context, row.id)
        await layers.load(row.id)
      } catch (error) {
        // Half-known is not open: the reason is kept, and the next open tries again.
        await this.#context.exporter.detach(row.id)
        await pools.drop(row.id, toAtollError(error))
        throw error
      }
      return handle
    })
  }

  /**
   * Makes a pool and opens it.
   * @throws AtollError NAME_TAKEN, DRIVER_UNKNOWN, POOL_OPTION_INVALID, POOL_LOCKED, POOL_OWNED_BY_OTHER, POOL_UNAVAILABLE; and for
   * its settings what `set` throws
   */
  async create(wanted: NewPool): Promise<PoolRow> {
    const { catalog, clock, newId, pools } = this.#context
    const options = pools.driver(wanted.driver).parseOptions(wanted.options)
    const settings = changeSettings({}, wanted.settings ?? {})
    const row = await catalog.write(async (tx) => {
      const taken = await tx.selectFrom('pools').select('id').where('name', '=', wanted.name).executeTakeFirst()
      if (taken !== undefined) {
        throw new AtollError('NAME_TAKEN', `there is a pool "${wanted.name}" already (${taken.id})`, {
          values: { name: wanted.name, id: taken.id },
        })
      }
      return await tx
        .insertInto('pools')
        .values({
          id: newId(),
          project_id: wanted.projectId,
          name: wanted.name,
          driver: wanted.driver,
          options,
          settings,
          created_at: clock.nowMs(),
        })
        .returningAll()
        .executeTakeFirstOrThrow()
    })
    try {
      await this.open(row, { requireReserve: true })
    } catch (error) {
      if (wanted.keepForeign === true && isAtollError(error, 'POOL_OWNED_BY_OTHER')) return row
      await catalog.write(async (tx) => await tx.deleteFrom('pools').where('id', '=', row.id).execute(), { emergency: true })
      pools.forget(row.id)
      throw error
    }
    return row
  }

  /** @throws AtollError POOL_NOT_FOUND */
  async get(id: string): Promise<PoolRow> {
    const row = await this.#context.catalog.db.selectFrom('pools').selectAll().where('id', '=', id).executeTakeFirst()
    if (row === undefined) throw new AtollError('POOL_NOT_FOUND', `there is no pool ${id}`, { values: { id } })
    return row
  }

  /** Every pool, open or not, by name. */
  async list(): Promise<PoolRow[]> {
    return await this.#context.catalog.db.selectFrom('pools').selectAll().orderBy('name').execute()
  }

  /** The open pool of a row. @throws AtollError POOL_NOT_FOUND, POOL_UNAVAILABLE with the reason */
  async handle(id: string): Promise<PoolHandle> {
    await this.get(id)
    return this.#context.pools.handle(id)
  }

  /**
   * Opens the pools that a resource lies in and reads from, as far as they are not open: one that somebody else had may be free by
   * now. `takeOver`: if it is not, its holder is shut out.
   * @throws AtollError TAKE_OVER_REFUSED if the driver of one cannot do that, and then nobody was shut out of another; POOL_LOCKED
   * naming the holder, and what `open` throws
   */
  async openFor(resource: ResourceRow, { takeOver }: { takeOver: boolean }): Promise<void> {
    const { pins, pools } = this.#context
    const sources = await pins.run(async () => await this.#reads.of(resource))
    const rows: PoolRow[] = []
    for (const id of [resource.home_pool_id, ...sources.filter((pool) => !pool.isAbsent).map((pool) => pool.id)]) {
      if (pools.find(id) === undefined && pools.failure(id)?.code === 'POOL_LOCKED') rows.push(await this.get(id))
    }
    rows.sort((a, b) => Number(pools.driver(a.driver).canShutOut) - Number(pools.driver(b.driver).canShutOut))
    for (const row of rows) await this.#openLocked(row, resource, takeOver)
  }

  /**
   * Whether a pool that is not open may open without anybody's help: its backend was away, or somebody had it who may be gone by now.
   * Where a holder can be shut out that is left to people.
   */
  mayOpenLater({ id, driver }: Pick<PoolRow, 'id' | 'driver'>): boolean {
    const { pools } = this.#context
    const code = pools.failure(id)?.code
    return code === 'POOL_UNAVAILABLE' || (code === 'POOL_LOCKED' && !pools.driver(driver).canShutOut)
  }

  async #openLocked(row: PoolRow, resource: ResourceRow, takeOver: boolean): Promise<void> {
    const { pools } = this.#context
    try {
      await this.open(row, { takeOver: takeOver && pools.driver(row.driver).canShutOut })
    } catch (error) {
      if (!isAtollError(error, 'POOL_LOCKED')) throw error
      if (takeOver) throw takeOverRefused(resource, row, error)
      const hint = pools.driver(row.driver).canShutOut ? '; if that one hangs or lost its machine, attach with --take-over' : ''
      throw new AtollError('POOL_LOCKED', `${resource.kind} ${resource.name} cannot be opened: ${error.message}${hint}`, {
        values: { ...error.values, poolId: row.id },
        cause: error,
      })
    }
  }

  /** Why a pool is not open; undefined if it is. */
  failure(id: string): AtollError | undefined {
    return this.#context.pools.failure(id)
  }

  /**
   * Deletes an empty pool for good.
   * @throws AtollError POOL_NOT_FOUND, MOVE_RUNNING, POOL_NOT_EMPTY naming how much lies in it and who reads from it, POOL_UNAVAILABLE
   */
  async delete(id: string): Promise<void> {
    const { catalog, exporter, layers, locks, pools } = this.#context
    await locks.run([id], async () => {
      const row = await this.get(id)
      await requireNoMoveOf(catalog.db, row, { what: 'it is not deleted' })
      const handle = pools.leave(id)
      try {
        await this.#requireEmpty(row)
      } catch (error) {
        pools.stay(id)
        throw error
      }
      try {
        await layers.unload(id)
        // Spares are nobody's; those just taken by somebody are noticed by whoever assigns them.
        await catalog.write(async (tx) => {
          const spares = tx.selectFrom('replicas').select('layer_alias').where('pool_id', '=', id)
          await tx
            .updateTable('layers')
            .set({ state: 'condemned' })
            .where('state', '=', 'spare')
            .where('volume_id', 'is', null)
            .where('alias', 'in', spares)
            .execute()
        })
      } catch (error) {
        pools.stay(id)
        await layers.load(id)
        throw error
      }
      try {
        // Asked again: a create that had its spare before may have committed meanwhile.
        await this.#requireEmpty(row)
        pools.stay(id)
        await removeCondemned(this.#context, id)
        pools.leave(id)
        await exporter.detach(id, { remove: true })
        await handle.destroy()
        await catalog.write(
          async (tx) => {
            await dropFromLinks(tx, id)
            await tx.deleteFrom('pools').where('id', '=', id).execute()
          },
          { emergency: true },
        )
        pools.forget(id)
        this.#context.open.forgetPool(id)
      } catch (error) {
        pools.stay(id)
        if (exporter.status(id) === null) await exporter.attach(handle)
        await layers.load(id)
        throw error
      }
    })
  }

  /** The pools that may read from this one, and those that it may read from, by name (pool-links.ts). */
  async links(id: string): Promise<{ readers: LinkedPool[]; sources: LinkedPool[] }> {
    const links = await readLinks(this.#context.catalog.db)
    return { readers: readersOf(links, id), sources: sourcesOf(links, id) }
  }

  /** Totals of an open pool. @throws AtollError POOL_NOT_FOUND, POOL_UNAVAILABLE, IO_ERROR */
  async status(id: string): Promise<PoolStatus> {
    const handle = await this.handle(id)
    const usage = await handle.usage()
    // Not known where the maps differ in too much: then no sharing is claimed.
    const logicalBytes = (await this.#usage.logicalBytes(id)) ?? usage.storedBytes
    const { count } = await this.#context.catalog.db
      .selectFrom('replicas')
      .select((query) => query.fn.countAll<number>().as('count'))
      .where('pool_id', '=', id)
      .executeTakeFirstOrThrow()
    const dedupRatio = usage.storedBytes > 0 ? logicalBytes / usage.storedBytes : 1
    // Closed meanwhile, it has none; the next question says so.
    const exported = this.#context.exporter.status(id) ?? { state: 'behind', behindSince: null, error: null }
    return { ...usage, logicalBytes, dedupRatio, layers: Number(count), export: exported }
  }

  /** @throws AtollError POOL_NOT_FOUND, POOL_UNAVAILABLE, IO_ERROR */
  async space(id: string): Promise<PoolSpace> {
    const settings = parsePoolSettings((await this.get(id)).settings)
    const usage = await this.#context.pools.handle(id).usage()
    return {
      ...usage,
      lowSpaceBytes: lowSpaceBytes(settings.lowSpace, usage.totalBytes),
      provisionedBytes: (await provisionedBytes(this.#context.catalog.db)).get(id) ?? 0,
      provisionedMaxBytes: settings.overcommit === null ? null : Math.floor(usage.totalBytes * settings.overcommit),
    }
  }

  /** How the backend of a pool is; waits for nothing. null: the pool is not open. */
  health(id: string): PoolHealth | null {
    try {
      return this.#context.pools.find(id)?.health() ?? null
    } catch (error) {
      // It is being closed just now.
      if (isAtollError(error, 'POOL_CLOSED')) return null
      throw error
    }
  }

  /** What has been done in each pool since this process started, by its id. */
  totals(): Map<string, DeviceTotals> {
    return this.#context.open.poolTotals()
  }

  /**
   * Changes settings (pool-settings.ts); those that are not named stay. They hold at once, the reserve of a pool that is not
   * open from its next open on.
   * @throws AtollError POOL_NOT_FOUND, POOL_OPTION_INVALID; NO_SPACE if the reserve does not fit, POOL_UNSUPPORTED if the pool
   * keeps none; nothing was changed then
   */
  async set(id: string, changes: Readonly<Record<string, string>>): Promise<PoolRow> {
    const { catalog, locks, pools } = this.#context
    return await locks.run([id], async () => {
      const before = await this.get(id)
      const settings = changeSettings(before.settings, changes)
      if (settings['reserve'] !== before.settings['reserve'])
        await pools.find(id)?.setReserve(parsePoolSettings(settings).reserveBytes)
      return await catalog.write(
        async (tx) =>
          await tx.updateTable('pools').set({ settings }).where('id', '=', id).returningAll().executeTakeFirstOrThrow(),
      )
    })
  }

  /**
   * What the driver finds, whether space is low, layers whose files are missing, files that no row knows.
   * @throws AtollError POOL_NOT_FOUND, POOL_UNAVAILABLE
   */
  async check(id: string): Promise<Finding[]> {
    const row = await this.get(id)
    const handle = this.#context.pools.handle(id)
    const findings = [...(await handle.check()), ...lowSpaceFindings(row, await handle.usage())]
    const listed = async (): Promise<Set<string>> => new Set(await handle.listLayerIds())
    const missing = async (present: ReadonlySet<string>) => (await this.#layersOf(id)).filter((row) => !present.has(row.id))
    const unknown = async (present: ReadonlySet<string>): Promise<string[]> => {
      const all = new Set((await this.#replicasIn(id).select('layers.id').execute()).map((row) => row.id))
      return [...present].filter((layerId) => !all.has(layerId))
    }
    const present = await listed()
    // What came or went between the two looks is looked at again: a layer has its row before its file, and loses it after.
    let lost = await missing(present)
    if (lost.length > 0) {
      const again = await listed()
      const stillLost = new Set((await missing(again)).map((row) => row.id))
      lost = lost.filter((row) => stillLost.has(row.id))
    }
    for (const row of lost) {
      findings.push({
        severity: 'error',
        kind: 'layer-missing',
        object: row.id,
        message: `the file of the ${row.state} layer ${row.id}${row.volume_id === null ? '' : ` of ${row.volume_id}`} is missing: bring it back from a backup`,
      })
    }
    let strays = await unknown(present)
    if (strays.length > 0) {
      const again = await listed()
      strays = strays.filter((layerId) => again.has(layerId))
    }
    for (const layerId of strays) {
      findings.push({
        severity: 'warning',
        kind: 'layer-unknown',
        object: layerId,
        message: `the catalog does not know layer ${layerId}; it is left alone: after a restore of an older catalog it may hold the newest data`,
      })
    }
    return findings
  }

  /** The layers that the pool must hold. */
  async #layersOf(id: string) {
    return await this.#replicasIn(id)
      .select(['layers.id', 'layers.state', 'layers.volume_id'])
      .where('replicas.state', '=', 'complete')
      .where('layers.state', 'not in', ['making', 'condemned'])
      .execute()
  }

  #replicasIn(id: string) {
    return this.#context.catalog.db
      .selectFrom('layers')
      .innerJoin('replicas', 'replicas.layer_alias', 'layers.alias')
      .where('replicas.pool_id', '=', id)
  }

  async #requireEmpty(row: PoolRow): Promise<void> {
    const { db } = this.#context.catalog
    const resources = await db.selectFrom('resources').select('id').where('home_pool_id', '=', row.id).execute()
    const layers = await this.#replicasIn(row.id)
      .select('layers.id')
      .where('replicas.state', '!=', 'condemned')
      .where((query) =>
        query.or([query('layers.state', 'not in', ['spare', 'making', 'condemned']), query('layers.volume_id', 'is not', null)]),
      )
      .where('layers.state', '!=', 'condemned')
      .execute()
    const { readers } = await this.links(row.id)
    const absent = readers.filter((pool) => pool.isAbsent)
    if (resources.length === 0 && layers.length === 0 && absent.length === 0) return
    const reading = layers.length === 0 ? [] : await this.#readingFrom(row.id, readers)
    const values = { poolId: row.id, resourceCount: resources.length, layerCount: layers.length }
    const what = `pool "${row.name}" holds ${resources.length} resources and ${layers.length} layers`
    if (absent.length > 0) {
      throw new AtollError(
        'POOL_NOT_EMPTY',
        `${what}, and pools of the lost catalog that are not here read from it (${namePools(absent)}): import them, or give them up (atoll pool accept)`,
        { values: { ...values, readerIds: absent.map((pool) => pool.id) } },
      )
    }
    if (reading.length > 0) {
      throw new AtollError(
        'POOL_NOT_EMPTY',
        `${what}, and resources of other pools read from it: ${nameResources(reading)}; delete them, then reclaim the pool`,
        { values: { ...values, readerIds: reading.map((resource) => resource.id) } },
      )
    }
    throw new AtollError('POOL_NOT_EMPTY', `${what}: delete them, then reclaim the pool`, { values })
  }

  /** Resources of other pools whose maps name layers of this one: as many as a message has room for, and some more. */
  async #readingFrom(poolId: string, readers: readonly LinkedPool[]): Promise<ResourceRow[]> {
    if (readers.length === 0) return []
    return await this.#context.pins.run(async () => {
      const { db } = this.#context.catalog
      const readerIds = readers.map((pool) => pool.id)
      const rows = await db
        .selectFrom('resources')
        .selectAll()
        .where('home_pool_id', 'in', readerIds)
        .orderBy('created_at')
        .limit(lookedAtMax)
        .execute()
      const reading: ResourceRow[] = []
      for (const row of rows) {
        if (reading.length >= readingMax) break
        if ((await this.#reads.of(row)).some((pool) => pool.id === poolId)) reading.push(row)
      }
      return reading
    })
  }
}
