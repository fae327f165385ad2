/**
 * What a resource takes: bytes that only it refers to, and bytes that others refer to as well; slot by slot, as of the durable
 * roots. A slot counts if its layer has it allocated, because a fresh volume's map gives all of its slots to one layer
 * whether they were written or not (allocation is a hint for status, never for meaning, I4). The active layer of a volume
 * is that volume's alone, and counts with all that it has allocated. A slot that lies in several pools counts once: what a resource
 * reads, wherever that is.
 *
 * Cost: a native table knows all roots at once (native/map, usage). The first call after a start reads every page of every
 * root once; a later one the pages that are new since. Reading pages is cut into pieces; all else is off the event loop. Memory:
 * as much as the maps differ in, up to a bound (512 MiB); a catalog whose maps differ in more has no usage (null).
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import { isAtollError, Mutex } from '@atoll/core'
import type { UsageRoots, UsageTable } from '@atoll/native'
import type { MapperContext } from './context.ts'
import { inPieces } from './turns.ts'
import { requireResource } from './rows.ts'

export interface ResourceUsage {
  /** Only this resource refers to them. null: the maps differ in more than is kept in memory, or layers have too many holes; so it stays until a restart. */
  readonly usedBytes: number | null
  /** Others refer to them, too. */
  readonly sharedBytes: number | null
}

/** A page of a map is missing, damaged or of a newer version. */
export function isMapUnreadable(error: unknown): boolean {
  return isAtollError(error, 'PAGE_MISSING') || isAtollError(error, 'PAGE_CORRUPT') || isAtollError(error, 'FORMAT_VERSION')
}

/** Memory of the table: about 24 bytes for each run of slots in which one map differs from the next or a layer is allocated. */
const tableBytesMaxDefault = 512 * 1024 * 1024
/** Pages of up to 48 KiB that are fetched in one turn of the event loop. */
const pagesAtOnce = 32
/** Resources that get their numbers in one turn of the event loop. */
const namedAtOnce = 10_000
/** Layers that one native call looks at. */
const layersAtOnce = 256

interface RootRow {
  readonly id: string
  readonly volume_id: string | null
  readonly root_word: bigint
  readonly root_crc: number
  readonly home_pool_id: string
}

export class Usage {
  readonly #context: MapperContext
  readonly #tableBytesMax: number
  readonly #oneAtATime = new Mutex()
  #table: UsageTable | null = null
  /** Numbers that the table knows resources by. */
  #keys = new Map<string, number>()
  #nextKey = 1
  /** Pools that were open when the table was begun: what lies in others counts as empty. */
  #openPools = ''
  #isOutgrown = false
  #keysByPool = new Map<string, number[]>()
  #commitCount = 0
  /** The state of the catalog that the table is as of. */
  #commitsSeen = -1

  constructor(context: MapperContext, tableBytesMax = tableBytesMaxDefault) {
    this.#context = context
    this.#tableBytesMax = tableBytesMax
    context.catalog.onCommit(() => {
      this.#commitCount += 1
    })
  }

  /**
   * Usage of one resource.
   * @throws AtollError RESOURCE_NOT_FOUND; PAGE_MISSING, PAGE_CORRUPT, FORMAT_VERSION if its own map cannot be read
   */
  async of(resourceId: string): Promise<ResourceUsage> {
    return await this.#asked(async (table) => {
      if (table === null) {
        await requireResource(this.#context.catalog.db, resourceId)
        return { usedBytes: null, sharedBytes: null }
      }
      const key = this.#keys.get(resourceId)
      if (key === undefined) {
        await requireResource(this.#context.catalog.db, resourceId)
        return { usedBytes: 0, sharedBytes: 0 }
      }
      const { usedBytes, sharedBytes } = await table.taken(key)
      return { usedBytes: usedBytes + (await this.#activeBytes({ volumeId: resourceId })), sharedBytes }
    })
  }

  /** Bytes that the resources of a pool refer to, each counted for itself: what they would take without sharing. */
  async logicalBytes(poolId: string): Promise<number | null> {
    return await this.#asked(async (table) => {
      if (table === null) return null
      const totals = await table.totals(Float64Array.from(this.#keysByPool.get(poolId) ?? []))
      // Those whose map cannot be read must not hide what the others take.
      const sealedBytes = totals.reduce((sum, bytes) => sum + Math.max(0, bytes), 0)
      return sealedBytes + (await this.#activeBytes({ poolId }))
    })
  }

  async #asked<T>(fn: (table: UsageTable | null) => Promise<T>): Promise<T> {
    return await this.#oneAtATime.run(async () => {
      if (this.#isOutgrown) return await fn(null)
      return await this.#context.pins.run(async () => {
        try {
          return await fn(await this.#refresh())
        } catch (error) {
          // Whatever went wrong half-way: the next call begins anew.
          if (!isMapUnreadable(error)) this.#drop()
          throw error
        }
      })
    })
  }

  /** Brings the table up to the roots of now; null if it has become too large. */
  async #refresh(): Promise<UsageTable | null> {
    const { catalog, engine, pools } = this.#context
    const openPools = pools.openIds().toSorted().join()
    if (openPools !== this.#openPools) this.#drop()
    if (this.#table === null) {
      this.#table = engine.usage()
      this.#openPools = openPools
      this.#commitsSeen = -1
    }
    const table = this.#table
    if (this.#commitsSeen === this.#commitCount) return table
    const { rows, active, commitCount } = await this.#roots()
    const roots = await this.#name(rows)
    await table.setRoots(roots, Uint32Array.from(active))
    for (;;) {
      const ids = await table.pending(pagesAtOnce)
      const bodies = ids.length === 0 ? [] : await catalog.pages.get(ids)
      await table.settle(
        ids,
        bodies.map((body) => body ?? null),
      )
      if (ids.length === 0) break
      if (await this.#isTooLarge(table)) return null
    }
    if (!(await this.#scanLayers(table))) return null
    this.#commitsSeen = commitCount
    return table
  }

  /** True: it is given up. */
  async #isTooLarge(table: UsageTable): Promise<boolean> {
    const memoryBytes = await table.memoryBytes()
    const tableBytesMax = this.#tableBytesMax
    if (memoryBytes <= tableBytesMax) return false
    const message = 'the maps differ in too much, or are too scattered, to say what each resource takes'
    this.#context.log.warn({ memoryBytes, tableBytesMax }, message)
    this.#isOutgrown = true
    this.#drop()
    return true
  }

  #drop(): void {
    this.#table?.clear()
    this.#table = null
  }

  /** All roots and active layers, of one state of the catalog. */
  async #roots(): Promise<{ rows: RootRow[]; active: number[]; commitCount: number }> {
    return await this.#context.catalog.read(async (tx) => {
      const commitCount = this.#commitCount
      const roots = tx.selectFrom('resources').select(['id', 'volume_id', 'root_word', 'root_crc', 'home_pool_id']).orderBy('id')
      const rows = await inPieces(
        async (after, limit) => await roots.where('id', '>', after).limit(limit).execute(),
        (row) => row.id,
        '',
      )
      const layers = tx.selectFrom('layers').select('alias').where('state', '=', 'active').orderBy('alias')
      const active = await inPieces(
        async (after, limit) => await layers.where('alias', '>', after).limit(limit).execute(),
        (row) => row.alias,
        0,
      )
      return { rows, active: active.map((row) => row.alias), commitCount }
    })
  }

  /** Gives every resource its number, and sets down which pool is its home. */
  async #name(rows: readonly RootRow[]): Promise<UsageRoots> {
    const keys = new Map<string, number>()
    const keyOf = (id: string): number => {
      const key = keys.get(id) ?? this.#keys.get(id) ?? this.#nextKey++
      keys.set(id, key)
      return key
    }
    const roots = {
      keys: new Float64Array(rows.length),
      lineages: new Float64Array(rows.length),
      words: new BigUint64Array(rows.length),
      crcs: new Uint32Array(rows.length),
    }
    const keysByPool = new Map<string, number[]>()
    for (const [index, row] of rows.entries()) {
      const key = keyOf(row.id)
      roots.keys[index] = key
      // A deleted volume has no row; its images are alike all the same.
      roots.lineages[index] = keyOf(row.volume_id ?? row.id)
      roots.words[index] = row.root_word
      roots.crcs[index] = row.root_crc
      const ofPool = keysByPool.get(row.home_pool_id) ?? []
      ofPool.push(key)
      keysByPool.set(row.home_pool_id, ofPool)
      if (index % namedAtOnce === namedAtOnce - 1) await nextTurn()
    }
    this.#keys = keys
    this.#keysByPool = keysByPool
    return roots
  }

  /** False: it became too large. */
  async #scanLayers(table: UsageTable): Promise<boolean> {
    const { layers, log, pools } = this.#context
    const aliases = await table.unknownLayers()
    const byPool = new Map<string, { aliases: number[]; ids: string[] }>()
    for (const { alias, id, poolIds } of await layers.placesOf(aliases)) {
      for (const poolId of poolIds) {
        const list = byPool.get(poolId) ?? { aliases: [], ids: [] }
        list.aliases.push(alias)
        list.ids.push(id)
        byPool.set(poolId, list)
      }
    }
    // What has no row, or lies in a pool that is not open, is empty as far as anybody can tell.
    table.setEmpty(aliases)
    for (const [poolId, list] of byPool) {
      const store = pools.find(poolId)?.store
      if (store === undefined) continue
      for (let start = 0; start < list.aliases.length; start += layersAtOnce) {
        const part = Uint32Array.from(list.aliases.slice(start, start + layersAtOnce))
        const failed = await table.scan(store, part, list.ids.slice(start, start + layersAtOnce))
        if (failed.length > 0) log.warn({ poolId, aliases: [...failed] }, 'what layers have allocated cannot be seen')
        if (await this.#isTooLarge(table)) return false
      }
    }
    return true
  }

  /** What active layers have allocated: of one volume, or of all whose home is a pool. */
  async #activeBytes(of: { volumeId: string } | { poolId: string }): Promise<number> {
    const { catalog, layers, pools } = this.#context
    const query = catalog.db
      .selectFrom('volumes')
      .innerJoin('resources', 'resources.id', 'volumes.id')
      .select('volumes.active_alias')
    const rows = await (
      'volumeId' in of ? query.where('volumes.id', '=', of.volumeId) : query.where('resources.home_pool_id', '=', of.poolId)
    ).execute()
    const byPool = new Map<string, string[]>()
    for (const { id, poolIds } of await layers.placesOf(rows.map((row) => row.active_alias))) {
      for (const poolId of poolIds) byPool.set(poolId, [...(byPool.get(poolId) ?? []), id])
    }
    let sumBytes = 0
    for (const [poolId, ids] of byPool) {
      const allocatedBytes = (await pools.find(poolId)?.store.allocatedBytes(ids)) ?? new Float64Array()
      sumBytes += allocatedBytes.reduce((sum, bytes) => sum + Math.max(0, bytes), 0)
    }
    return sumBytes
  }
}
