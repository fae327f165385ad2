/** What is allocated against what is referred to, from the catalog and the store alone: nothing of the mapper is trusted. */
import type { Catalog } from '@atoll/core'
import type { Engine, Store } from '@atoll/native'

const slotBytes = 4096
const pageBatch = 1000

/** A sentence about something that is kept although nothing refers to it, or null. All volumes must be closed. */
export async function findLeak(catalog: Catalog, engine: Engine, store: Store): Promise<string | null> {
  const resources = await catalog.db.selectFrom('resources').selectAll().execute()
  const reach = engine.reach()
  for (const row of resources) reach.addRoot({ word: row.root_word, crc: row.root_crc }, row.size_bytes)
  for (let ids = reach.pending(pageBatch); ids.length > 0; ids = reach.pending(pageBatch)) {
    const bodies = await catalog.pages.get(ids)
    await reach.supply(
      ids,
      bodies.map((body, index) => body ?? fail(`page ${ids[index]} is missing`)),
    )
  }
  const layers = await catalog.db.selectFrom('layers').selectAll().execute()
  const known = new Map(layers.map((layer) => [layer.id, layer]))
  for (const entry of await store.listLayers()) {
    const layer = known.get(entry.id)
    if (layer === undefined) return `layer file ${entry.id} has no row`
    const reachableBytes = await allocatedWithin(store, entry.id, await reach.runs(layer.alias))
    if (entry.allocatedBytes > reachableBytes) {
      return `layer ${entry.id} (${layer.state}) holds ${entry.allocatedBytes} bytes, of which ${reachableBytes} are referred to`
    }
    known.delete(entry.id)
  }
  for (const layer of known.values()) {
    if (layer.state !== 'making') return `layer ${layer.id} (${layer.state}) has no file`
  }
  const pageIds = await catalog.pages.listIds(0, Number.MAX_SAFE_INTEGER, 1_000_000)
  const unreachable = reach.hasPages(pageIds).reduce((count, has) => count + (has ? 0 : 1), 0)
  return unreachable > 0 ? `${unreachable} of ${pageIds.length} map pages are referred to by nothing` : null
}

/** Bytes that are allocated inside the runs (triples: start slot, count, owner). */
async function allocatedWithin(store: Store, layerId: string, runs: Float64Array): Promise<number> {
  let bytes = 0
  for (let index = 0; index < runs.length; index += 3) {
    const start = runs[index] ?? 0
    const count = runs[index + 1] ?? 0
    for (const extent of await store.extents(layerId, start * slotBytes, count * slotBytes)) {
      if (extent.data) bytes += extent.lengthBytes
    }
  }
  return bytes
}

function fail(message: string): never {
  throw new Error(message)
}
