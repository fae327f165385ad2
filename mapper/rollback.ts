/**
 * Rolling a volume back to one of its snapshots: the volume gets the snapshot's root and size.
 *
 * Rules:
 * - Only a closed volume: nobody may hold bytes of the content that goes.
 * - The volume gets a new active layer, where the old one is; that is named by no root any more and is condemned in the same
 *   transaction.
 *   That of a dirty volume is not replayed first, since its content goes anyway, and a volume whose journal is damaged can
 *   be brought back this way; its next layer, which a crash may have written, goes too.
 * - The epoch is raised: a lost owner of the volume changes nothing after this (I1).
 */
import { assert, AtollError, type ResourceRow } from '@atoll/core'
import type { MapperContext } from './context.ts'
import { isDirty } from './lease.ts'
import { noteForeignTree } from './exporter.ts'
import { inUseError, requireAvailable, requireKind, requireVolumeRow } from './rows.ts'
import { requireNotMoving } from './running-moves.ts'

/**
 * Makes the content and the size of a volume those of a snapshot of it; durable on return. Later snapshots stay.
 * @throws AtollError VOLUME_NOT_FOUND, SNAPSHOT_NOT_FOUND, SNAPSHOT_MISMATCH, VOLUME_IN_USE if it is open, MOVE_RUNNING, RESOURCE_STATUS, POOL_UNAVAILABLE, NO_SPACE
 */
export async function rollback(context: MapperContext, volumeId: string, snapshotId: string): Promise<ResourceRow> {
  return await context.locks.run([volumeId, snapshotId], async () => {
    const { catalog, layers, pageIds, clock } = context
    const volume = await requireKind(catalog.db, volumeId, 'volume')
    requireAvailable(volume)
    if (context.open.get(volumeId) !== undefined) throw inUseError(volume, 'detach it before it is rolled back')
    const dirty = await isDirty(context, volumeId)
    const { active_alias: oldAlias } = await requireVolumeRow(catalog.db, volumeId)
    // One whose row is lost is gone anyway.
    const [old] = await layers.homesIfKnown([oldAlias], volume.home_pool_id)
    const [spare] = await layers.take([old?.poolId ?? volume.home_pool_id])
    assert(spare !== undefined, 'no spare was given')
    let snapshotHome = volume.home_pool_id
    try {
      const row = await catalog.write(async (tx) => {
        const snapshot = await requireKind(tx, snapshotId, 'snapshot')
        snapshotHome = snapshot.home_pool_id
        requireAvailable(snapshot)
        context.olderCatalog.requireNewest(snapshot)
        if (snapshot.volume_id !== volumeId) {
          throw new AtollError(
            'SNAPSHOT_MISMATCH',
            `snapshot ${snapshotId} (${snapshot.name}) is not one of volume ${volumeId} (${volume.name})`,
            {
              values: { snapshotId, volumeId },
            },
          )
        }
        await requireNotMoving(tx, volume, { what: 'it is not rolled back' })
        const { home_pool_id: homePoolId } = volume
        if (snapshot.home_pool_id !== homePoolId) await noteForeignTree(tx, homePoolId, volumeId, snapshot.home_pool_id)
        const present = await requireVolumeRow(tx, volumeId)
        const epoch = present.epoch + 1
        // What a newer state of the catalog has written is none of this content either.
        const isUnsure = dirty || context.olderCatalog.isRefused(volume)
        const dropNext = isUnsure && present.next_alias !== null
        await tx
          .updateTable('volumes')
          .set({ active_alias: spare.alias, epoch, shared_below_page: pageIds.next, ...(dropNext ? { next_alias: null } : {}) })
          .where('id', '=', volumeId)
          .execute()
        await tx
          .updateTable('leases')
          .set({ released_at: clock.nowMs() })
          .where('volume_id', '=', volumeId)
          .where('released_at', 'is', null)
          .execute()
        await context.olderCatalog.forgetIn(tx, volume)
        await layers.assign(tx, spare, { volumeId, projectId: volume.project_id, epoch }, 'active')
        await layers.move(tx, present.active_alias, ['active'], 'condemned')
        if (dropNext && present.next_alias !== null) await layers.move(tx, present.next_alias, ['spare'], 'condemned')
        return await tx
          .updateTable('resources')
          .set({
            root_word: snapshot.root_word,
            root_crc: snapshot.root_crc,
            size_bytes: snapshot.size_bytes,
            updated_at: clock.nowMs(),
          })
          .where('id', '=', volumeId)
          .returningAll()
          .executeTakeFirstOrThrow()
      })
      context.open.forget(volumeId)
      context.olderCatalog.forget(volume)
      // Before the lock is let go: nobody writes into an active layer that the export does not name.
      await context.exporter.flushed([row.home_pool_id, spare.poolId, snapshotHome])
      return row
    } catch (error) {
      layers.giveBack(spare)
      throw error
    }
  })
}
