/**
 * What the durable roots of all resources name: asked before anything is destroyed because a row says that nobody needs it.
 *
 * Rows may be damaged, and what they say is never worth more than the maps. The walk visits every page of every map once, so it
 * is made only where there is something to destroy. While one map cannot be read, everything counts as named.
 */
import { type CatalogTransaction, isAtollError } from '@atoll/core'
import { mapBytesMax } from '@atoll/native'
import type { MapperContext } from './context.ts'
import { feedReach } from './maps.ts'
import { rootOf } from './root.ts'
import { eachInTurns, inPieces } from './turns.ts'

export interface References {
  readonly hasLayer: (alias: number) => boolean
  readonly hasPage: (pageId: number) => boolean
}

const everything: References = { hasLayer: () => true, hasPage: () => true }

/** Roots whose pages are fetched together. */
const rootsAtOnce = 256

/**
 * Whoever calls this while the mapper serves holds a pin. `homePoolId`: of the resources of one pool only.
 * @throws AtollError CATALOG_ERROR
 */
export async function readReferences(
  { catalog, engine, log }: Pick<MapperContext, 'catalog' | 'engine' | 'log'>,
  homePoolId?: string,
): Promise<References> {
  const all = await catalog.read(selectRoots)
  const rows = homePoolId === undefined ? all : all.filter((row) => row.home_pool_id === homePoolId)
  const reach = engine.reach()
  try {
    for (let start = 0; start < rows.length; start += rootsAtOnce) {
      const part = rows.slice(start, start + rootsAtOnce)
      for (const row of part) reach.addRoot(rootOf(row), mapBytesMax)
      await feedReach({ catalog }, reach, part[0]?.id ?? '')
    }
  } catch (error) {
    if (!isAtollError(error, 'PAGE_MISSING') && !isAtollError(error, 'PAGE_CORRUPT') && !isAtollError(error, 'FORMAT_VERSION')) {
      throw error
    }
    reach.clear()
    log.warn({ err: error }, 'a map cannot be read, so nobody knows what it names: nothing is removed')
    return everything
  }
  const layers = new Set<number>()
  await eachInTurns(reach.layers(), (alias) => layers.add(alias))
  return { hasLayer: (alias) => layers.has(alias), hasPage: (pageId) => reach.hasPages(Float64Array.of(pageId))[0] === 1 }
}

export interface RootRow {
  readonly id: string
  readonly home_pool_id: string
  readonly volume_id: string | null
  readonly root_word: bigint
  readonly root_crc: number
}

/**
 * The durable roots of all resources. Inside a `read`, so that they are of one state of the catalog: one that is shared and goes
 * meanwhile is seen here or there.
 */
export async function selectRoots(tx: CatalogTransaction): Promise<RootRow[]> {
  const columns = ['id', 'home_pool_id', 'volume_id', 'root_word', 'root_crc'] as const
  const resources = tx.selectFrom('resources').select(columns).orderBy('id')
  return await inPieces(
    async (after, limit) => await resources.where('id', '>', after).limit(limit).execute(),
    (row) => row.id,
    '',
  )
}

/** Layers among these that a volume writes, or is to write next. */
export async function writtenLayers(
  { catalog }: Pick<MapperContext, 'catalog'>,
  aliases: readonly number[],
): Promise<Set<number>> {
  const named = new Set<number>()
  for (let start = 0; start < aliases.length; start += rootsAtOnce) {
    const part = aliases.slice(start, start + rootsAtOnce)
    const rows = await catalog.db
      .selectFrom('volumes')
      .select(['active_alias', 'next_alias'])
      .where((query) => query.or([query('active_alias', 'in', part), query('next_alias', 'in', part)]))
      .execute()
    for (const row of rows) {
      named.add(row.active_alias)
      if (row.next_alias !== null) named.add(row.next_alias)
    }
  }
  return named
}
