/**
 * Layers: their aliases, making them, the spares that are kept ready, how their states follow each other, and in which pools their
 * bytes are.
 *
 *   making -> spare -> active -> closing -> sealed -> condemned -> (no row)
 *
 * Rules:
 * - I11: the row of a layer is committed before its file is made, and the file is durable before a volume is given the layer.
 *   A row in `making` has a file or not; nothing ever refers to it.
 * - An alias is never used twice (AUTOINCREMENT). What is remembered of one, the pools of its complete replicas, stays true until
 *   `invalidate` says that these changed: after every commit that changes the replicas of a layer which has several, or will have.
 * - Only a sealed layer has several replicas. Who reads what: a resource reads the complete replica in its own home pool if there
 *   is one, else the *primary*. So a secondary one covers what the resources of its own pool refer to and nothing else, and the
 *   primary what anybody refers to who has no closer one.
 * - A spare without a volume was never written: it may become the active layer of a volume whose whole map refers to it.
 *   A spare with a volume is that volume's *next* layer; it may have been written by a swap that a crash took back, so it
 *   never becomes a spare without a volume again.
 * - A spare that was taken stays out of the list until it is given back; the transaction that assigns it checks the row.
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import { adminProject, assert, AtollError, type CatalogTransaction, type LayerState, type ReplicaRow } from '@atoll/core'
import type { LayerRef } from '@atoll/native'
import type { MapperContext } from './context.ts'
import type { LayerName, PlacedLayer } from './open-table.ts'
import { parsePoolSettings } from './pool-settings.ts'

/** Spares that are kept ready in every pool, so that create, clone and snapshot make no file on their path. */
export const sparesPerPool = 8
/** Rows that one query names by their alias. */
const aliasBatch = 500

/** Made, durable and nobody's. */
export type Spare = PlacedLayer

interface Home {
  readonly id: string
  /** Of the complete replicas, that of the primary first. */
  readonly poolIds: readonly string[]
  /** Null: it is in a pool of a lost catalog that is not here, and only those read the layer who have a replica in their own pool. */
  readonly primary: string | null
}

type Dependencies = Pick<MapperContext, 'catalog' | 'pools' | 'clock' | 'newId' | 'background'>

export class Layers {
  readonly #context: Dependencies
  readonly #spares = new Map<string, Spare[]>()
  /** By pool: spares that are being made. */
  readonly #refilling = new Map<string, Promise<void>>()
  readonly #homes = new Map<number, Home>()
  /** Rises with every `invalidate`: what was read before it is not remembered. */
  #homesVersion = 0
  #changed = new Set<number>()
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
   * What a device needs to reach layers, in the order asked for. `readerPoolId`: the home of the resource that reads them.
   * @throws AtollError LAYER_MISSING for an alias without a row, POOL_UNAVAILABLE if the pool of one is not open
   */
  async refs(aliases: Iterable<number>, readerPoolId: string): Promise<LayerRef[]> {
    const homes = await this.homes(aliases, readerPoolId)
    return homes.map(({ alias, id, poolId }) => ({ alias, id, store: this.#context.pools.handle(poolId).store }))
  }

  /**
   * The names of layers and the pools from which a resource of `readerPoolId` reads them, in the order asked for.
   * @throws AtollError LAYER_MISSING for an alias without a row
   */
  async homes(aliases: Iterable<number>, readerPoolId: string): Promise<PlacedLayer[]> {
    const wanted = [...aliases]
    const found = await this.#findHomes(wanted)
    return wanted.map((alias) => {
      const home = found.get(alias)
      const poolId = home === undefined ? null : readFrom(home, readerPoolId)
      if (home !== undefined && poolId !== null) return { alias, id: home.id, poolId }
      const what = home === undefined ? 'which the catalog does not have' : 'of which only a copy for another pool is here'
      throw new AtollError('LAYER_MISSING', `the map refers to layer ${alias}, ${what}`, { values: { alias } })
    })
  }

  /** As `homes`, without those that have no row, or that a resource of that pool cannot read. */
  async homesIfKnown(aliases: Iterable<number>, readerPoolId: string): Promise<PlacedLayer[]> {
    const wanted = [...aliases]
    const found = await this.#findHomes(wanted)
    return wanted.flatMap((alias) => {
      const home = found.get(alias)
      const poolId = home === undefined ? null : readFrom(home, readerPoolId)
      return home === undefined || poolId === null ? [] : [{ alias, id: home.id, poolId }]
    })
  }

  /** The names of layers and every pool that has a complete replica, the primary's first; without layers that have no row. */
  async placesOf(aliases: Iterable<number>): Promise<(LayerName & { readonly poolIds: readonly string[] })[]> {
    const wanted = [...aliases]
    const found = await this.#findHomes(wanted)
    return wanted.flatMap((alias) => {
      const home = found.get(alias)
      return home === undefined ? [] : [{ alias, id: home.id, poolIds: home.poolIds }]
    })
  }

  async #findHomes(aliases: readonly number[]): Promise<Map<number, Home>> {
    const found = new Map<number, Home>()
    const unknown: number[] = []
    for (const alias of aliases) {
      const home = this.#homes.get(alias)
      if (home === undefined) unknown.push(alias)
      else found.set(alias, home)
    }
    for (let start = 0; start < unknown.length; start += aliasBatch) {
      const version = this.#homesVersion
      const rows = await this.#context.catalog.db
        .selectFrom('layers')
        .innerJoin('replicas', 'replicas.layer_alias', 'layers.alias')
        .select(['layers.alias', 'layers.id', 'replicas.pool_id', 'replicas.is_primary'])
        .where('layers.alias', 'in', unknown.slice(start, start + aliasBatch))
        .where('replicas.state', '=', 'complete')
        .orderBy('replicas.is_primary', 'desc')
        .orderBy('replicas.pool_id')
        .execute()
      for (const [alias, replicas] of Map.groupBy(rows, (row) => row.alias)) {
        const primary = replicas.find((row) => row.is_primary)?.pool_id ?? null
        const home = { id: replicas[0]?.id ?? '', poolIds: replicas.map((row) => row.pool_id), primary }
        found.set(alias, home)
        if (version === this.#homesVersion) this.#homes.set(alias, home)
      }
      if (unknown.length > aliasBatch) await nextTurn()
    }
    return found
  }

  /** One layer, as `refs`. */
  async ref(layer: LayerName, readerPoolId: string): Promise<LayerRef> {
    const [ref] = await this.refs([layer.alias], readerPoolId)
    assert(ref !== undefined, `no ref of layer ${layer.alias}`)
    return ref
  }

  /** Every replica of these layers, in any state, as the catalog has it now; the primary first. */
  async replicasOf(aliases: Iterable<number>): Promise<Map<number, ReplicaRow[]>> {
    const wanted = [...aliases]
    const found = new Map<number, ReplicaRow[]>()
    for (let start = 0; start < wanted.length; start += aliasBatch) {
      const rows = await this.#context.catalog.db
        .selectFrom('replicas')
        .selectAll()
        .where('layer_alias', 'in', wanted.slice(start, start + aliasBatch))
        .orderBy('is_primary', 'desc')
        .orderBy('pool_id')
        .execute()
      for (const [alias, replicas] of Map.groupBy(rows, (row) => row.layer_alias)) found.set(alias, replicas)
      if (wanted.length > aliasBatch) await nextTurn()
    }
    return found
  }

  /** A commit has changed replicas of these layers. Called right after it, before anything is awaited. */
  invalidate(aliases: Iterable<number>): void {
    this.#homesVersion += 1
    for (const alias of aliases) {
      this.#homes.delete(alias)
      this.#changed.add(alias)
    }
  }

  /** Layers that were invalidated since this was called last. */
  takeChanged(): Set<number> {
    const changed = this.#changed
    this.#changed = new Set()
    return changed
  }

  /** Rises with every change of replicas: what was concluded from them earlier may be wrong. */
  get replicasVersion(): number {
    return this.#homesVersion
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

  /** As `forget`, of replicas whose files in one pool are gone: a layer goes with its last one. */
  async forgetReplicas(poolId: string, aliases: readonly number[]): Promise<void> {
    if (aliases.length === 0) return
    await this.#context.catalog.write(
      async (tx) => {
        await tx.deleteFrom('replicas').where('layer_alias', 'in', aliases).where('pool_id', '=', poolId).execute()
        await tx
          .deleteFrom('layers')
          .where('alias', 'in', aliases)
          .where('alias', 'not in', tx.selectFrom('replicas').select('layer_alias').where('layer_alias', 'in', aliases))
          .execute()
      },
      { durable: false, emergency: true },
    )
    this.invalidate(aliases)
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
    for (const spare of spares) this.#homes.set(spare.alias, { id: spare.id, poolIds: [poolId], primary: poolId })
    return spares
  }

  /** Takes back layers in `making`: the file first, then the row; what fails here is done at the next start. */
  async #unmake(poolId: string, spares: readonly Spare[]): Promise<void> {
    const pool = this.#context.pools.handle(poolId)
    const removals = await Promise.allSettled(spares.map(async (spare) => await pool.removeLayer(spare.id)))
    await this.forget(spares.filter((_, index) => removals[index]?.status === 'fulfilled').map((spare) => spare.alias))
  }
}

/** Which replica a resource of a pool reads. */
function readFrom({ poolIds, primary }: Home, readerPoolId: string): string | null {
  return poolIds.includes(readerPoolId) ? readerPoolId : primary
}
