/**
 * What a resource takes: bytes that only it refers to, and bytes that others refer to as well; slot by slot, as of the durable
 * roots. A slot counts if its layer has it allocated, because a fresh volume's map gives all of its slots to one layer
 * whether they were written or not (allocation is a hint for status, never for meaning, I4). The active layer of a volume
 * is that volume's alone, and counts with all that it has allocated.
 *
 * Cost: a native table knows all roots at once (native/map, usage). The first call after a start reads every page of every
 * root once; a later one the pages that are new since. Reading pages is cut into pieces; all else is off the event loop. Memory:
 * as much as the maps differ in, up to `tableBytesMax`; a catalog whose maps differ in more has no usage (null).
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import { isAtollError, Mutex } from '@atoll/core'
import type { UsageTable } from '@atoll/native'
import type { MapperContext } from './context.ts'
import { requireResource } from './rows.ts'

export interface ResourceUsage {
  /** Only this resource refers to them. null: the maps differ in more than is kept in memory. */
  readonly usedBytes: number | null
  /** Others refer to them, too. */
  readonly sharedBytes: number | null
}

/** A page of a map is missing, damaged or of a newer version. */
export function isMapUnreadable(error: unknown): boolean {
  return isAtollError(error, 'PAGE_MISSING') || isAtollError(error, 'PAGE_CORRUPT') || isAtollError(error, 'FORMAT_VERSION')
}

/** Memory of the table: about 24 bytes for each run of slots in which one map differs from the next. */
const tableBytesMax = 512 * 1024 * 1024
/** Pages of up to 48 KiB that are fetched in one turn of the event loop. */
const pagesAtOnce = 32
/** Rows read in one turn of the event loop. */
const rowsAtOnce = 4000
/** How often all rows are read in pieces before they are read in one. */
const attemptsMax = 3
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

  constructor(context: MapperContext) {
    this.#context = context
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
          if (!isMapUnreadable(error)) this.#table = null
          throw error
        }
      })
    })
  }

  /** Brings the table up to the roots of now; null if it has become too large. */
  async #refresh(): Promise<UsageTable | null> {
    const { catalog, engine, log, pools } = this.#context
    const openPools = pools.openIds().toSorted().join()
    if (this.#table === null || openPools !== this.#openPools) {
      this.#table = engine.usage()
      this.#openPools = openPools
      this.#commitsSeen = -1
    }
    const table = this.#table
    if (this.#commitsSeen === this.#commitCount) return table
    const { rows, commitCount } = await this.#roots()
    const active = await catalog.db.selectFrom('layers').select('alias').where('state', '=', 'active').execute()
    await nextTurn()
    await table.setRoots(
      this.#name(rows),
      Uint32Array.from(active, (layer) => layer.alias),
    )
    for (;;) {
      const ids = await table.pending(pagesAtOnce)
      const bodies = ids.length === 0 ? [] : await catalog.pages.get(ids)
      await table.settle(
        ids,
        bodies.map((body) => body ?? null),
      )
      if (ids.length === 0) break
      const memoryBytes = await table.memoryBytes()
      if (memoryBytes <= tableBytesMax) continue
      log.warn({ memoryBytes, tableBytesMax }, 'the maps differ in too much to say what each resource takes')
      this.#isOutgrown = true
      this.#table = null
      return null
    }
    await this.#scanLayers(table)
    this.#commitsSeen = commitCount
    return table
  }

  /** All roots, of one state of the catalog. */
  async #roots(): Promise<{ rows: RootRow[]; commitCount: number }> {
    const { db } = this.#context.catalog
    const query = db.selectFrom('resources').select(['id', 'volume_id', 'root_word', 'root_crc', 'home_pool_id']).orderBy('id')
    for (let attempt = 0; attempt < attemptsMax; attempt += 1) {
      const commitCount = this.#commitCount
      const rows: RootRow[] = []
      for (let after = ''; ;) {
        const part = await query.where('id', '>', after).limit(rowsAtOnce).execute()
        rows.push(...part)
        if (part.length < rowsAtOnce) break
        after = part.at(-1)?.id ?? ''
        await nextTurn()
      }
      if (commitCount === this.#commitCount) return { rows, commitCount }
    }
    // Somebody always commits in between: in one piece, however long that takes.
    return { rows: await query.execute(), commitCount: this.#commitCount }
  }

  /** Gives every resource its number, and sets down which pool is its home. */
  #name(rows: readonly RootRow[]) {
    const keys = new Map<string, number>()
    const keyOf = (id: string): number => {
      const key = keys.get(id) ?? this.#keys.get(id) ?? this.#nextKey++
      keys.set(id, key)
      return key
    }
    const roots = {
      keys: Float64Array.from(rows, (row) => keyOf(row.id)),
      // A deleted volume has no row; its images are alike all the same.
      lineages: Float64Array.from(rows, (row) => keyOf(row.volume_id ?? row.id)),
      words: BigUint64Array.from(rows, (row) => row.root_word),
      crcs: Uint32Array.from(rows, (row) => row.root_crc),
    }
    this.#keys = keys
    this.#keysByPool = new Map()
    for (const row of rows) {
      const list = this.#keysByPool.get(row.home_pool_id) ?? []
      list.push(keyOf(row.id))
      this.#keysByPool.set(row.home_pool_id, list)
    }
    return roots
  }

  async #scanLayers(table: UsageTable): Promise<void> {
    const { layers, log, pools } = this.#context
    const aliases = await table.unknownLayers()
    const byPool = new Map<string, { aliases: number[]; ids: string[] }>()
    for (const { alias, id, poolId } of await layers.homesIfKnown(aliases)) {
      const list = byPool.get(poolId) ?? { aliases: [], ids: [] }
      list.aliases.push(alias)
      list.ids.push(id)
      byPool.set(poolId, list)
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
      }
    }
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
    for (const { id, poolId } of await layers.homesIfKnown(rows.map((row) => row.active_alias))) {
      byPool.set(poolId, [...(byPool.get(poolId) ?? []), id])
    }
    let sumBytes = 0
    for (const [poolId, ids] of byPool) {
      const allocatedBytes = (await pools.find(poolId)?.store.allocatedBytes(ids)) ?? new Float64Array()
      sumBytes += allocatedBytes.reduce((sum, bytes) => sum + Math.max(0, bytes), 0)
    }
    return sumBytes
  }
}
