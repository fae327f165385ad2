/**
 * Layers: their aliases, making them, the spares that are kept ready, and how their states follow each other.
 *
 *   making -> spare -> active -> closing -> sealed -> condemned -> (no row)
 *
 * Rules:
 * - I11: the row of a layer is committed before its file is made, and the file is durable before a volume is given the layer.
 *   A row in `making` has a file or not; nothing ever refers to it.
 * - An alias is never used twice (AUTOINCREMENT), so what is remembered about one stays true for ever.
 * - A spare without a volume was never written: it may become the active layer of a volume whose whole map refers to it.
 *   A spare with a volume is that volume's *next* layer; it may have been written by a swap that a crash took back, so it
 *   never becomes a spare without a volume again.
 * - A spare that was taken stays out of the list until it is given back; the transaction that assigns it checks the row.
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import { adminProject, assert, AtollError, type CatalogTransaction, type LayerState } from '@atoll/core'
import type { LayerRef } from '@atoll/native'
import type { MapperContext } from './context.ts'
import type { LayerName } from './open-table.ts'
import { parsePoolSettings } from './pool-settings.ts'

/** Spares that are kept ready in every pool, so that create, clone and snapshot make no file on their path. */
export const sparesPerPool = 8
/** Rows that one query names by their alias. */
const aliasBatch = 500

/** A layer and the pool that its bytes are in; as a spare: made, durable and nobody's. */
export interface Spare extends LayerName {
  readonly poolId: string
}

interface Home {
  readonly id: string
  readonly poolId: string
}

type Dependencies = Pick<MapperContext, 'catalog' | 'pools' | 'clock' | 'newId' | 'background'>

export class Layers {
  readonly #context: Dependencies
  readonly #spares = new Map<string, Spare[]>()
  /** By pool: spares that are being made. */
  readonly #refilling = new Map<string, Promise<void>>()
  readonly #homes = new Map<number, Home>()
  /** Called spares by their rows, and named by somebody: nobody is given one. */
  readonly #withheld = new Set<number>()
  #closed = false

  constructor(context: Dependencies) {
    this.#context = context
  }

  /** Reads the spares of a pool that was just opened and makes the missing ones in the background. */
  async load(poolId: string): Promise<void> {
    const rows = await this.#context.catalog.db
      .selectFrom('layers')
      .innerJoin('replicas', 'replicas.layer_alias', 'layers.alias')
      .select(['layers.alias', 'layers.id'])
      .where('replicas.pool_id', '=', poolId)
      .where('layers.state', '=', 'spare')
      .where('layers.volume_id', 'is', null)
      .execute()
    const spares = rows.filter((row) => !this.#withheld.has(row.alias))
    this.#spares.set(
      poolId,
      spares.map((row) => ({ alias: row.alias, id: row.id, poolId })),
    )
    this.#refill(poolId)
  }

  /** These are spares to nobody, whatever their rows say. Before `load`. */
  withhold(aliases: Iterable<number>): void {
    for (const alias of aliases) this.#withheld.add(alias)
  }

  /** Forgets the spares of a pool that is being deleted, so that nobody is given one. None is being made on return. */
  async unload(poolId: string): Promise<void> {
    this.#spares.delete(poolId)
    await this.#refilling.get(poolId)
  }

  /** No more refills. */
  close(): void {
    this.#closed = true
  }

  /**
   * Takes one spare of each pool named (a pool may be named several times); missing ones are made now. All or none.
   * @throws AtollError POOL_UNAVAILABLE, POOL_NOT_FOUND, NO_SPACE
   */
  async take(poolIds: readonly string[]): Promise<Spare[]> {
    const wanted = new Map<string, number>()
    for (const poolId of poolIds) wanted.set(poolId, (wanted.get(poolId) ?? 0) + 1)
    const taken = new Map<string, Spare[]>()
    try {
      for (const [poolId, count] of wanted) {
        this.#context.pools.handle(poolId)
        const spares = this.#spares.get(poolId) ?? []
        const list = spares.splice(Math.max(0, spares.length - count))
        taken.set(poolId, list)
        if (list.length < count) list.push(...(await this.#make(poolId, count - list.length)))
        this.#refill(poolId)
      }
    } catch (error) {
      for (const spare of [...taken.values()].flat()) this.giveBack(spare)
      throw error
    }
    return poolIds.map((poolId) => {
      const spare = taken.get(poolId)?.pop()
      assert(spare !== undefined, `no spare of ${poolId} is left`)
      return spare
    })
  }

  /** The spare was not assigned after all. */
  giveBack(spare: Spare): void {
    this.#spares.get(spare.poolId)?.push(spare)
  }

  /** Takes one spare out of the list for good; false if nobody may (it was given away). Another one is made. */
  withdraw(poolId: string, alias: number): boolean {
    const spares = this.#spares.get(poolId)
    const index = spares?.findIndex((spare) => spare.alias === alias) ?? -1
    if (spares === undefined || index < 0) return false
    spares.splice(index, 1)
    this.#refill(poolId)
    return true
  }

  /** Makes a taken spare the layer of a volume: its active one, or (state `spare`) its next one. Inside a write. */
  async assign(
    tx: CatalogTransaction,
    spare: Spare,
    owner: { volumeId: string; projectId: string; epoch: number },
    state: 'active' | 'spare',
  ): Promise<void> {
    const result = await tx
      .updateTable('layers')
      .set({ volume_id: owner.volumeId, project_id: owner.projectId, epoch: owner.epoch, state })
      .where('alias', '=', spare.alias)
      .where('state', '=', 'spare')
      .where('volume_id', 'is', null)
      .executeTakeFirst()
    if (result.numUpdatedRows !== 1n) {
      throw new AtollError('POOL_CLOSED', `layer ${spare.id} is not a spare any more: its pool is being deleted`, {
        values: { layerId: spare.id },
      })
    }
    await tx.updateTable('replicas').set({ project_id: owner.projectId }).where('layer_alias', '=', spare.alias).execute()
  }

  /** Moves one layer from one of the states `from` to `to`. Inside a write. */
  async move(tx: CatalogTransaction, alias: number, from: readonly LayerState[], to: LayerState): Promise<void> {
    const result = await tx
      .updateTable('layers')
      .set({ state: to })
      .where('alias', '=', alias)
      .where('state', 'in', from)
      .executeTakeFirst()
    assert(result.numUpdatedRows === 1n, `layer ${alias} is in none of the states ${from.join(', ')}`)
  }

  /**
   * What a device needs to reach layers, in the order asked for.
   * @throws AtollError LAYER_MISSING for an alias without a row, POOL_UNAVAILABLE if the pool of one is not open
   */
  async refs(aliases: Iterable<number>): Promise<LayerRef[]> {
    const homes = await this.homes(aliases)
    return homes.map(({ alias, id, poolId }) => ({ alias, id, store: this.#context.pools.handle(poolId).store }))
  }

  /**
   * The names and the pool of layers, in the order asked for.
   * @throws AtollError LAYER_MISSING for an alias without a row
   */
  async homes(aliases: Iterable<number>): Promise<Spare[]> {
    const wanted = [...aliases]
    await this.#findHomes(wanted)
    return wanted.map((alias) => {
      const home = this.#homes.get(alias)
      if (home !== undefined) return { alias, id: home.id, poolId: home.poolId }
      throw new AtollError('LAYER_MISSING', `the map refers to layer ${alias}, which the catalog does not have`, {
        values: { alias },
      })
    })
  }

  /** As `homes`, without those that have no row. */
  async homesIfKnown(aliases: Iterable<number>): Promise<Spare[]> {
    const wanted = [...aliases]
    await this.#findHomes(wanted)
    return wanted.flatMap((alias) => {
      const home = this.#homes.get(alias)
      return home === undefined ? [] : [{ alias, id: home.id, poolId: home.poolId }]
    })
  }

  async #findHomes(aliases: readonly number[]): Promise<void> {
    const unknown = aliases.filter((alias) => !this.#homes.has(alias))
    for (let start = 0; start < unknown.length; start += aliasBatch) {
      const rows = await this.#context.catalog.db
        .selectFrom('layers')
        .innerJoin('replicas', 'replicas.layer_alias', 'layers.alias')
        .select(['layers.alias', 'layers.id', 'replicas.pool_id'])
        .where('layers.alias', 'in', unknown.slice(start, start + aliasBatch))
        .where('replicas.state', '=', 'complete')
        .execute()
      for (const row of rows) this.#homes.set(row.alias, { id: row.id, poolId: row.pool_id })
      if (unknown.length > aliasBatch) await nextTurn()
    }
  }

  /** One layer, as `refs`. */
  async ref(layer: LayerName): Promise<LayerRef> {
    const [ref] = await this.refs([layer.alias])
    assert(ref !== undefined, `no ref of layer ${layer.alias}`)
    return ref
  }

  /** Deletes the rows of layers whose files are gone. A loss of this commit only makes the removal happen again. */
  async forget(aliases: readonly number[]): Promise<void> {
    if (aliases.length === 0) return
    await this.#context.catalog.write(
      async (tx) => {
        await tx.deleteFrom('replicas').where('layer_alias', 'in', aliases).execute()
        await tx.deleteFrom('layers').where('alias', 'in', aliases).execute()
      },
      { durable: false, emergency: true },
    )
    for (const alias of aliases) this.#homes.delete(alias)
  }

  #refill(poolId: string): void {
    const missing = sparesPerPool - (this.#spares.get(poolId)?.length ?? 0)
    // Half empty before anything is made: files are then made several at a time, with one commit.
    if (this.#closed || missing * 2 < sparesPerPool || this.#refilling.has(poolId) || !this.#spares.has(poolId)) return
    const { promise, resolve } = Promise.withResolvers<void>()
    this.#refilling.set(poolId, promise)
    this.#context.background.start(`making spare layers in pool ${poolId}`, async () => {
      try {
        if (await this.#isDraining(poolId)) return
        for (const spare of await this.#make(poolId, missing)) this.giveBack(spare)
      } finally {
        this.#refilling.delete(poolId)
        resolve()
      }
    })
  }

  /** Nothing is kept ready where nothing new is made; what volumes there still need is made when they need it. */
  async #isDraining(poolId: string): Promise<boolean> {
    const { db } = this.#context.catalog
    const row = await db.selectFrom('pools').select('settings').where('id', '=', poolId).executeTakeFirst()
    return row !== undefined && parsePoolSettings(row.settings).isDraining
  }

  async #make(poolId: string, count: number): Promise<Spare[]> {
    const { catalog, clock, newId, pools } = this.#context
    const pool = pools.handle(poolId)
    const now = clock.nowMs()
    // I11: the rows first. They are durable before the first file is made.
    const spares = await catalog.write(async (tx) => {
      const rows: Spare[] = []
      for (let index = 0; index < count; index += 1) {
        const id = newId()
        const { alias } = await tx
          .insertInto('layers')
          .values({ id, project_id: adminProject.id, volume_id: null, state: 'making', epoch: 0, created_at: now })
          .returning('alias')
          .executeTakeFirstOrThrow()
        await tx
          .insertInto('replicas')
          .values({ layer_alias: alias, pool_id: poolId, project_id: adminProject.id, state: 'complete' })
          .execute()
        rows.push({ alias, id, poolId })
      }
      return rows
    })
    const results = await Promise.allSettled(spares.map(async (spare) => await pool.createLayer(spare.id)))
    const failure = results.find((result) => result.status === 'rejected')
    if (failure !== undefined) {
      await this.#unmake(poolId, spares)
      throw failure.reason
    }
    // Need not be durable by itself: the commit that assigns a spare comes later and takes this one with it.
    await catalog.write(
      async (tx) => {
        const aliases = spares.map((spare) => spare.alias)
        await tx
          .updateTable('layers')
          .set({ state: 'spare' })
          .where('alias', 'in', aliases)
          .where('state', '=', 'making')
          .execute()
      },
      { durable: false },
    )
    for (const spare of spares) this.#homes.set(spare.alias, { id: spare.id, poolId })
    return spares
  }

  /** Takes back layers in `making`: the file first, then the row; what fails here is done at the next start. */
  async #unmake(poolId: string, spares: readonly Spare[]): Promise<void> {
    const pool = this.#context.pools.handle(poolId)
    const removals = await Promise.allSettled(spares.map(async (spare) => await pool.removeLayer(spare.id)))
    await this.forget(spares.filter((_, index) => removals[index]?.status === 'fulfilled').map((spare) => spare.alias))
  }
}
