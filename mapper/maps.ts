/**
 * Maps from their pages in the catalog.
 *
 * Rules: the bytes of pages are hostile (I7) and checked by the engine against the crc in their parent; a page that is missing
 * or wrong is an error that names the page and the resource, and nothing else is harmed.
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import { AtollError } from '@atoll/core'
import type { FrozenMap, Reach, RootRef } from '@atoll/native'
import type { MapperContext } from './context.ts'
import { aboutResource } from './rows.ts'

/** Pages fetched in one turn of the event loop. */
export const pageBatch = 256
/** As many, of maps with a long history: a page of one has up to 48 KiB. */
export const reachBatch = 64

interface PageSink {
  supply(ids: Float64Array, bodies: Uint8Array[]): Promise<void> | void
}

async function feed(context: Pick<MapperContext, 'catalog'>, sink: PageSink, ids: Float64Array): Promise<void> {
  const found = await context.catalog.pages.get(ids)
  const bodies = found.map((body, index) => {
    if (body !== undefined) return body
    throw new AtollError('PAGE_MISSING', `map page ${ids[index]} is not in the catalog`, { values: { pageId: ids[index] ?? 0 } })
  })
  await sink.supply(ids, bodies)
}

/**
 * Builds the map of a resource; pages that an open map has in memory are not read again. Whoever calls this sees to it that
 * the pages stay: it holds the resource's lock or a pin.
 * @throws AtollError PAGE_MISSING, PAGE_CORRUPT, FORMAT_VERSION naming the page and the resource
 */
export async function loadMap(
  context: Pick<MapperContext, 'catalog' | 'engine'>,
  resourceId: string,
  root: RootRef,
): Promise<FrozenMap> {
  try {
    const loader = context.engine.mapLoader(root)
    for (;;) {
      const ids = loader.missing(pageBatch)
      if (ids.length === 0) return loader.finish()
      await feed(context, loader, ids)
      if (ids.length === pageBatch) await nextTurn()
    }
  } catch (error) {
    throw aboutResource(error, resourceId, 'its map cannot be read')
  }
}

/**
 * Fetches what a `Reach` still asks for. `between` is called after every batch and may throw to stop.
 * @throws AtollError PAGE_MISSING, PAGE_CORRUPT, FORMAT_VERSION naming the page
 */
export async function feedReach(
  context: Pick<MapperContext, 'catalog'>,
  reach: Reach,
  resourceId: string,
  between: (pageCount: number) => void = () => undefined,
): Promise<void> {
  try {
    for (;;) {
      const ids = reach.pending(reachBatch)
      if (ids.length === 0) return
      await feed(context, reach, ids)
      between(ids.length)
      await nextTurn()
    }
  } catch (error) {
    throw aboutResource(error, resourceId, 'its map cannot be read')
  }
}
