/**
 * Growing and shrinking volumes.
 *
 * Rules:
 * - Grow: the catalog first, then the device, so that nothing written into the new space can be flushed while a crash would
 *   take the space away. What is new reads as zeros: no device wrote there, and a shrink leaves holes.
 * - Shrink: the device refuses requests beyond the new size and drops what lies there from its map; that map and the size
 *   are one transaction; only then is the space freed (I5). Until the commit a crash changes nothing.
 * - A closed volume is opened to be shrunk, because its active layer has to be punched under the slots' locks.
 */
import { checkVolumeSize, type ResourceRow } from '@atoll/core'
import { checkpointLocked } from './checkpoint.ts'
import { closeLocked } from './close.ts'
import type { MapperContext } from './context.ts'
import type { OpenVolume } from './open-table.ts'
import { openLocked, settleLocked } from './open.ts'
import { overcommitLimit, requireProvisionable } from './overcommit.ts'
import { inUseError, leaseLostError, requireAvailable, requireKind, requireResource, requireVolumeRow } from './rows.ts'

const resizeHolder = 'resize'

/**
 * Changes the size of a volume, open or closed; durable on return. What lies beyond a smaller size is lost.
 * @throws AtollError SIZE_INVALID, POOL_OVERCOMMITTED, VOLUME_NOT_FOUND, RESOURCE_STATUS, VOLUME_IN_USE if it is open for reading, LEASE_LOST, NO_SPACE,
 * IO_ERROR; then the size is as before
 */
export async function resize(context: MapperContext, volumeId: string, sizeBytes: number): Promise<void> {
  checkVolumeSize(sizeBytes)
  await context.locks.run([volumeId], async () => {
    requireAvailable(await requireKind(context.catalog.db, volumeId, 'volume'))
    await settleLocked(context, volumeId)
    const row = await requireKind(context.catalog.db, volumeId, 'volume')
    const entry = context.open.get(volumeId)
    if (entry?.kind === 'read-only') throw inUseError(row, 'it is open for reading, detach it first')
    if (entry !== undefined && entry.pendingSizeBytes !== null) await checkpointLocked(context, entry)
    const presentBytes = entry?.sizeBytes ?? row.size_bytes
    if (sizeBytes === presentBytes) return
    if (sizeBytes > presentBytes) await grow(context, row, entry, sizeBytes)
    else if (entry !== undefined) await shrinkOpen(context, entry, sizeBytes)
    else await shrinkClosed(context, row, sizeBytes)
  })
}

async function grow(context: MapperContext, row: ResourceRow, entry: OpenVolume | undefined, sizeBytes: number): Promise<void> {
  const epoch = entry?.epoch ?? (await requireVolumeRow(context.catalog.db, row.id)).epoch
  if (entry?.leaseLost === true) throw leaseLostError(row.id, epoch)
  const limit = await overcommitLimit(context, row.home_pool_id)
  await context.catalog.write(async (tx) => {
    const volume = await requireVolumeRow(tx, row.id)
    if (volume.epoch !== epoch) throw leaseLostError(row.id, epoch)
    await requireProvisionable(tx, limit, sizeBytes - (await requireResource(tx, row.id)).size_bytes)
    await tx
      .updateTable('resources')
      .set({ size_bytes: sizeBytes, updated_at: context.clock.nowMs() })
      .where('id', '=', row.id)
      .execute()
  })
  // Nothing is written into the new space before the export has it.
  await context.exporter.flushed([row.home_pool_id])
  if (entry === undefined) return
  entry.sizeBytes = sizeBytes
  await entry.device.grow(sizeBytes)
}

/** Shrinks what is open for writing. Called by who holds its lock. @throws AtollError as `resize` */
export async function shrinkOpen(context: MapperContext, volume: OpenVolume, sizeBytes: number): Promise<void> {
  if (volume.leaseLost) throw leaseLostError(volume.id, volume.epoch)
  // The engine takes no shrink while a swap is uncommitted.
  if (volume.swapUncommitted) await checkpointLocked(context, volume)
  try {
    await volume.device.shrinkPrepare(sizeBytes)
  } catch (error) {
    // Half-way refused: requests are limited to the new size, but the map is whole.
    if (volume.device.sizeBytes() < volume.sizeBytes && !volume.device.isPoisoned()) await volume.device.grow(volume.sizeBytes)
    throw error
  }
  volume.pendingSizeBytes = sizeBytes
  await checkpointLocked(context, volume)
}

async function shrinkClosed(context: MapperContext, row: ResourceRow, sizeBytes: number): Promise<void> {
  const entry = await openLocked(context, row, { holder: resizeHolder, readOnly: false })
  try {
    if (entry.kind === 'writable') await shrinkOpen(context, entry, sizeBytes)
  } finally {
    await closeLocked(context, entry)
  }
}
