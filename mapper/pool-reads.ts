/**
 * Which other pools a resource needs: those of the layers that its map names and that have no replica in its own pool, and, of a
 * volume, that of the layers which it writes.
 *
 * A layer that a map names must be there, also where the map names it beyond the end of the resource only (reclaim.ts); so a clone
 * that has written everything itself still needs the pool of its source.
 *
 * Asked for what is shown and for what is refused, never for what is freed. Pages are read only where a link (pool-links.ts) says
 * that there may be something to find; what was found of a root is remembered until replicas of layers come or go. A map with more
 * pages than `pagesMax` is not walked: then it is every pool that it may read from.
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

type Row = Pick<ResourceRow, 'id' | 'home_pool_id' | 'root_word' | 'root_crc'>

type Context = Pick<MapperContext, 'catalog' | 'engine'> & {
  readonly layers: Pick<MapperContext['layers'], 'homesIfKnown' | 'replicasVersion'>
}

export class PoolReads {
  readonly #context: Context
  /** By home and root; null: it has too many pages. */
  readonly #found = new Map<string, ReadonlySet<string> | null>()
  #replicasVersion = 0

  constructor(context: Context) {
    this.#context = context
  }

  /** By name. Whoever calls this sees to it that the pages stay: it holds the resource's lock or a pin. */
  async of(row: Row): Promise<LinkedPool[]> {
    const sources = sourcesOf(await readLinks(this.#context.catalog.db), row.home_pool_id)
    if (sources.length === 0) return []
    const named = await this.#namedBy(row)
    if (named === null) return sources
    const written = await this.#writtenBy(row)
    return sources.filter((pool) => named.has(pool.id) || written.has(pool.id))
  }

  /** The pools of the layers that a volume writes: its map may name none of them yet. */
  async #writtenBy({ id, home_pool_id: homePoolId }: Row): Promise<ReadonlySet<string>> {
    const { catalog, layers } = this.#context
    const volume = await catalog.db
      .selectFrom('volumes')
      .select(['active_alias', 'next_alias'])
      .where('id', '=', id)
      .executeTakeFirst()
    const aliases = volume === undefined ? [] : [volume.active_alias, volume.next_alias].filter((alias) => alias !== null)
    return new Set((await layers.homesIfKnown(aliases, homePoolId)).map((home) => home.poolId))
  }

  /** Null: not known. */
  async #namedBy(row: Row): Promise<ReadonlySet<string> | null> {
    const { layers } = this.#context
    if (this.#replicasVersion !== layers.replicasVersion) this.#found.clear()
    this.#replicasVersion = layers.replicasVersion
    const key = `${row.home_pool_id} ${row.root_word}`
    const known = this.#found.get(key)
    if (known !== undefined) return known
    const aliases = await this.#aliases(row)
    if (aliases === 'unreadable') return null
    const homes = aliases === 'too many' ? [] : await layers.homesIfKnown(aliases, row.home_pool_id)
    // One whose pool is not here may lie in any that is not.
    if (aliases !== 'too many' && homes.length < aliases.length) return null
    const found = aliases === 'too many' ? null : new Set(homes.map((home) => home.poolId))
    if (this.#found.size >= rememberedMax) this.#found.clear()
    // Unless they have changed meanwhile.
    if (this.#replicasVersion === layers.replicasVersion) this.#found.set(key, found)
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
