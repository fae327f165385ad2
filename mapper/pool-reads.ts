/**
 * Which other pools the map of a resource names: what it does not have in layers of its own pool.
 *
 * A layer that a map names must be there, also where the map names it beyond the end of the resource only (reclaim.ts); so a clone
 * that has written everything itself still needs the pool of its source.
 *
 * Asked for what is shown and for what is refused, never for what is freed. Pages are read only where a link (pool-links.ts) says
 * that there may be something to find; what was found of a root is remembered, since neither its pages nor the pools of layers
 * ever change. A map with more pages than `pagesMax` is not walked: then it is every pool that it may read from.
 */
import { type ResourceRow } from '@atoll/core'
import { mapBytesMax } from '@atoll/native'
import type { MapperContext } from './context.ts'
import { pageBatch } from './maps.ts'
import { readLinks, sourcesOf, type LinkedPool } from './pool-links.ts'
import { rootOf } from './root.ts'
import { isMapUnreadable } from './usage.ts'

/** Pages of one map that are read for an answer: of 128 GiB that were written at random. */
const pagesMax = 4096
/** Roots that are remembered. */
const rememberedMax = 4096

type Row = Pick<ResourceRow, 'home_pool_id' | 'root_word' | 'root_crc'>

type Context = Pick<MapperContext, 'catalog' | 'engine'> & {
  readonly layers: Pick<MapperContext['layers'], 'homesIfKnown'>
}

export class PoolReads {
  readonly #context: Context
  /** By root; null: it has too many pages. */
  readonly #found = new Map<bigint, ReadonlySet<string> | null>()

  constructor(context: Context) {
    this.#context = context
  }

  /** By name. Whoever calls this sees to it that the pages stay: it holds the resource's lock or a pin. */
  async of(row: Row): Promise<LinkedPool[]> {
    const sources = sourcesOf(await readLinks(this.#context.catalog.db), row.home_pool_id)
    if (sources.length === 0) return []
    const named = await this.#namedBy(row)
    return named === null ? sources : sources.filter((pool) => named.has(pool.id))
  }

  /** Null: not known. */
  async #namedBy(row: Row): Promise<ReadonlySet<string> | null> {
    const { layers } = this.#context
    const known = this.#found.get(row.root_word)
    if (known !== undefined) return known
    const aliases = await this.#aliases(row)
    if (aliases === 'unreadable') return null
    const homes = aliases === 'too many' ? [] : await layers.homesIfKnown(aliases)
    // One whose pool is not here may lie in any that is not.
    if (aliases !== 'too many' && homes.length < aliases.length) return null
    const found = aliases === 'too many' ? null : new Set(homes.map((home) => home.poolId))
    if (this.#found.size >= rememberedMax) this.#found.clear()
    this.#found.set(row.root_word, found)
    return found
  }

  async #aliases(row: Row): Promise<number[] | 'too many' | 'unreadable'> {
    const { catalog, engine } = this.#context
    const reach = engine.reach()
    try {
      reach.addRoot(rootOf(row), mapBytesMax)
      let pageCount = 0
      for (let ids = reach.pending(pageBatch); ids.length > 0; ids = reach.pending(pageBatch)) {
        pageCount += ids.length
        if (pageCount > pagesMax) return 'too many'
        const bodies = await catalog.pages.get(ids)
        if (bodies.includes(undefined)) return 'unreadable'
        await reach.supply(ids, bodies as Uint8Array[])
      }
      return [...reach.layers()]
    } catch (error) {
      if (!isMapUnreadable(error)) throw error
      return 'unreadable'
    } finally {
      reach.clear()
    }
  }
}
