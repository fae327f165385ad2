/**
 * Turning the writes of a volume to another pool: from then on what it has written before lies in sealed layers, which can be
 * copied while it is in use.
 *
 * Rules:
 * - An open volume: a spare of the target becomes its next layer, durably and in the place of the one that it had; the exports of
 *   all pools concerned name it; then the ordinary swap (share.ts), without rows of a snapshot. A crash between these leaves a volume whose
 *   next layer lies in the target: an open finds the frames there, as after any swap.
 * - A closed volume has no writer while its lock is held: it gets its new active layer in one transaction.
 * - The home stays what it is. The link from it to the target is made with the first layer there, so that nothing of the target
 *   is freed, and no pool imported, as if nobody of the home wrote in it.
 * - Where everything is as wanted already, nothing is done.
 */
import { assert, AtollError, type ResourceRow } from '@atoll/core'
import { checkpointLocked, commitCheckpoints, prepareCheckpoint } from './checkpoint.ts'
import type { MapperContext } from './context.ts'
import type { Spare } from './layers.ts'
import { type OpenVolume, poolsOf } from './open-table.ts'
import { settleLocked } from './open.ts'
import { addLink } from './pool-links.ts'
import { rootMayReferTo, rootOf } from './root.ts'
import { leaseLostError, requireAvailable, requireKind, requireVolumeRow } from './rows.ts'
import { sealReplaced, swap } from './share.ts'

/**
 * From the return on the volume writes in the pool, durably so. `pauseMs`: how long its requests were held up.
 * @throws AtollError VOLUME_NOT_FOUND, RESOURCE_STATUS, SNAPSHOT_BUSY past the deadline, LEASE_LOST, DEVICE_POISONED, NO_SPACE, IO_ERROR,
 * POOL_UNAVAILABLE also where the export of a pool cannot be written
 */
export async function freezeOnto(
  context: MapperContext,
  volumeId: string,
  poolId: string,
  deadlineMs: number,
): Promise<{ pauseMs: number }> {
  return await context.locks.run([volumeId], async () => {
    const row = await requireKind(context.catalog.db, volumeId, 'volume')
    requireAvailable(row)
    context.olderCatalog.requireNewest(row)
    await settleLocked(context, volumeId)
    const volume = context.open.volume(volumeId)
    if (volume !== undefined) return { pauseMs: await freezeOpen(context, volume, poolId, deadlineMs) }
    await freezeClosed(context, await requireKind(context.catalog.db, volumeId, 'volume'), poolId)
    return { pauseMs: 0 }
  })
}

async function freezeOpen(context: MapperContext, volume: OpenVolume, poolId: string, deadlineMs: number): Promise<number> {
  if (volume.leaseLost) throw leaseLostError(volume.id, volume.epoch)
  if (volume.swapUncommitted || volume.pendingSizeBytes !== null) await checkpointLocked(context, volume)
  if (volume.next.poolId !== poolId) await replaceNext(context, volume, poolId)
  if (volume.active.poolId === poolId) return 0
  // Everything that can fail for want of space is in hand before the gate closes.
  const [following] = await context.layers.take([poolId])
  assert(following !== undefined, 'no spare was given')
  try {
    await requireExported(context, poolsOf(volume))
    volume.nextExported = true
  } catch (error) {
    context.layers.giveBack(following)
    throw error
  }
  const pauseMs = await swap(context, [{ volume, spare: following }], deadlineMs)
  const prepared = await prepareCheckpoint(context, volume, following)
  assert(prepared !== null, 'the engine gave no checkpoint for a swap')
  await commitCheckpoints(context, [prepared], { share: false })
  return pauseMs
}

/** Only these are looked into by an open after a crash, and by an import. */
async function requireExported(context: MapperContext, poolIds: readonly string[]): Promise<void> {
  if (await context.exporter.flushed(poolIds)) return
  const behind = poolIds.find((id) => context.exporter.status(id)?.state !== 'current') ?? poolIds[0]
  throw new AtollError(
    'POOL_UNAVAILABLE',
    `the export of pool ${behind} cannot be written, so nothing is moved: see 'atoll pool show'`,
    { values: { poolId: behind ?? '' } },
  )
}

async function replaceNext(context: MapperContext, volume: OpenVolume, poolId: string): Promise<void> {
  const { catalog, layers } = context
  const [spare] = await layers.take([poolId])
  assert(spare !== undefined, 'no spare was given')
  try {
    await catalog.write(async (tx) => {
      const result = await tx
        .updateTable('volumes')
        .set({ next_alias: spare.alias })
        .where('id', '=', volume.id)
        .where('epoch', '=', volume.epoch)
        .executeTakeFirst()
      if (result.numUpdatedRows !== 1n) throw leaseLostError(volume.id, volume.epoch)
      await layers.assign(tx, spare, { volumeId: volume.id, projectId: volume.projectId, epoch: volume.epoch }, 'spare')
      await layers.move(tx, volume.next.alias, ['spare'], 'condemned')
      await addLink(tx, volume.poolId, poolId)
    })
  } catch (error) {
    layers.giveBack(spare)
    throw error
  }
  volume.next = spare
  volume.nextExported = false
}

async function freezeClosed(context: MapperContext, row: ResourceRow, poolId: string): Promise<void> {
  const { catalog, layers } = context
  const volume = await requireVolumeRow(catalog.db, row.id)
  const aliases = [volume.active_alias, ...(volume.next_alias === null ? [] : [volume.next_alias])]
  const [active, next] = await layers.homes(aliases, row.home_pool_id)
  assert(active !== undefined, `no home of layer ${volume.active_alias}`)
  // The next open gives it one where it writes.
  const dropNext = next !== undefined && next.poolId !== poolId
  if (active.poolId === poolId && !dropNext) return
  const spare: Spare | undefined = active.poolId === poolId ? undefined : (await layers.take([poolId]))[0]
  // What no root names is nobody's any more.
  const isNamed = rootMayReferTo(rootOf(row), active.alias)
  try {
    await catalog.write(async (tx) => {
      const result = await tx
        .updateTable('volumes')
        .set({ ...(spare === undefined ? {} : { active_alias: spare.alias }), ...(dropNext ? { next_alias: null } : {}) })
        .where('id', '=', row.id)
        .where('epoch', '=', volume.epoch)
        .executeTakeFirst()
      if (result.numUpdatedRows !== 1n) throw leaseLostError(row.id, volume.epoch)
      if (dropNext) await layers.move(tx, next.alias, ['spare'], 'condemned')
      if (spare === undefined) return
      await layers.move(tx, active.alias, ['active'], isNamed ? 'closing' : 'condemned')
      await layers.assign(tx, spare, { volumeId: row.id, projectId: row.project_id, epoch: volume.epoch }, 'active')
      await addLink(tx, row.home_pool_id, poolId)
    })
  } catch (error) {
    if (spare !== undefined) layers.giveBack(spare)
    throw error
  }
  const exported = await context.exporter.flushed(new Set([row.home_pool_id, active.poolId, poolId]))
  if (spare !== undefined && isNamed && exported) await sealReplaced(context, { row, volume, active, spare })
}
