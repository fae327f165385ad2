/** The map of a snapshot, whole and in memory: what was compared with it goes on when the snapshot is deleted. */
import type { FrozenMap } from '@atoll/native'
import type { MapperContext } from './context.ts'
import { loadMap } from './maps.ts'
import { rootOf } from './root.ts'
import { requireAvailable, requireKind } from './rows.ts'

/**
 * Loads the map of a snapshot. The lock keeps its pages in the catalog until all are here; nothing is fetched later.
 * @throws AtollError SNAPSHOT_NOT_FOUND, RESOURCE_STATUS, PAGE_MISSING, PAGE_CORRUPT
 */
export async function snapshotMap(context: MapperContext, snapshotId: string): Promise<FrozenMap> {
  return await context.locks.run([snapshotId], async () => {
    const row = await requireKind(context.catalog.db, snapshotId, 'snapshot')
    requireAvailable(row)
    return await loadMap(context, snapshotId, rootOf(row))
  })
}
