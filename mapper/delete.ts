/**
 * Deleting resources.
 *
 * Rules:
 * - A delete is one durable transaction that removes rows; the space comes back with the next reclaim. It goes through on a
 *   full disk (the catalog's reserve).
 * - Nothing depends on a resource but the names of its snapshots: roots are shared, so clones of a deleted snapshot live on.
 * - A volume's active and next layer are named by no root but its own, so they are condemned at once, also those of a dirty
 *   volume, which is not replayed first. Its sealed layers stay for whoever else refers to them.
 * - What is open, and what has an open snapshot that would go with it, is refused.
 */
import { AtollError, type CatalogTransaction, type ResourceRow } from '@atoll/core'
import type { MapperContext } from './context.ts'
import { inUseError, requireResource } from './rows.ts'
import { requireNotMoving } from './running-moves.ts'

export interface DeleteOptions {
  /** Default false: a volume that has snapshots is refused. True: they go with it. */
  readonly withSnapshots?: boolean
}

/** Snapshots named in a refusal; their number is in the message. */
const namedSnapshotsMax = 10

/**
 * Deletes a volume, a snapshot or an image; durable on return.
 * @throws AtollError RESOURCE_NOT_FOUND, VOLUME_IN_USE, SNAPSHOT_IN_USE, IMAGE_IN_USE, VOLUME_HAS_SNAPSHOTS naming them,
 * MOVE_RUNNING
 */
export async function deleteResource(context: MapperContext, id: string, options: DeleteOptions = {}): Promise<void> {
  for (;;) {
    const locked = new Set([id, ...(options.withSnapshots === true ? await snapshotIds(context, id) : [])])
    const done = await context.locks.run([...locked], async () => {
      const row = await requireResource(context.catalog.db, id)
      // One that was taken while the locks were waited for: its lock is needed, too.
      if (options.withSnapshots === true && (await snapshotIds(context, id)).some((snapshotId) => !locked.has(snapshotId)))
        return false
      await deleteLocked(context, row, options)
      return true
    })
    if (done) return
  }
}

async function snapshotIds(context: MapperContext, volumeId: string): Promise<string[]> {
  return (await snapshotsOf(context.catalog.db, volumeId)).map((row) => row.id)
}

/** As `deleteResource`, by who holds the locks of the resource and of its snapshots. */
export async function deleteLocked(context: MapperContext, row: ResourceRow, options: DeleteOptions): Promise<void> {
  if (context.open.get(row.id) !== undefined) throw inUseError(row, 'detach it first')
  const pools = new Set([row.home_pool_id])
  const gone = await context.catalog.write(
    async (tx) => {
      if (row.kind === 'volume') await requireNotMoving(tx, row, { what: 'it is not deleted' })
      // Read here, where no snapshot can be added any more.
      const snapshots = await snapshotsOf(tx, row.id)
      if (snapshots.length > 0 && options.withSnapshots !== true) throw hasSnapshots(row, snapshots)
      for (const snapshot of snapshots) {
        pools.add(snapshot.home_pool_id)
        if (context.open.get(snapshot.id) !== undefined)
          throw inUseError(snapshot, `detach it before the volume "${row.name}" is deleted with it`)
      }
      await condemnOwnLayers(tx, row.id)
      const ids = [row.id, ...snapshots.map((snapshot) => snapshot.id)]
      await tx.deleteFrom('resources').where('volume_id', '=', row.id).execute()
      await tx.deleteFrom('resources').where('id', '=', row.id).execute()
      return ids
    },
    { emergency: true },
  )
  for (const id of gone) context.open.forget(id)
  await context.exporter.flushed(pools)
}

async function snapshotsOf(tx: CatalogTransaction, volumeId: string): Promise<ResourceRow[]> {
  return await tx.selectFrom('resources').selectAll().where('volume_id', '=', volumeId).orderBy('created_at').execute()
}

async function condemnOwnLayers(tx: CatalogTransaction, volumeId: string): Promise<void> {
  const volume = await tx
    .selectFrom('volumes')
    .select(['active_alias', 'next_alias'])
    .where('id', '=', volumeId)
    .executeTakeFirst()
  if (volume === undefined) return
  const aliases = [volume.active_alias, ...(volume.next_alias === null ? [] : [volume.next_alias])]
  await tx.updateTable('layers').set({ state: 'condemned' }).where('alias', 'in', aliases).execute()
}

function hasSnapshots(row: ResourceRow, snapshots: readonly ResourceRow[]): AtollError {
  const names = snapshots.slice(0, namedSnapshotsMax).map((snapshot) => snapshot.name)
  const list = `${names.join(', ')}${snapshots.length > names.length ? ', …' : ''}`
  return new AtollError(
    'VOLUME_HAS_SNAPSHOTS',
    `volume "${row.name}" has ${snapshots.length} snapshot${snapshots.length === 1 ? '' : 's'} (${list}): delete them first, or delete it with its snapshots`,
    { values: { id: row.id, snapshotCount: snapshots.length, snapshots: names } },
  )
}
