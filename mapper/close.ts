/**
 * Closing devices.
 *
 * Rules:
 * - A closed volume is clean: the catalog has its whole map, and only then is the lease released. Where that cannot be (a
 *   poisoned device, a full catalog) the lease stays unreleased and the next open replays the journal; nothing that was
 *   acknowledged is lost either way.
 * - The device is closed in any case: after `close` nobody is served. One whose pool does not answer is left as a kill would leave it:
 *   what was answered is in its journal and in the batch log, so that the end of the daemon waits for no cluster volume by volume.
 * - Nothing is sealed: the active layer stays the volume's.
 *
 * Called by who holds the resource's lock.
 */
import { checkpointLocked } from './checkpoint.ts'
import type { MapperContext } from './context.ts'
import { releaseLease } from './lease.ts'
import type { OpenEntry, OpenVolume } from './open-table.ts'

/**
 * Closes what is open.
 * @throws AtollError NO_SPACE, IO_ERROR if what was written since the last flush could not be stored; it is closed all the same
 */
export async function closeLocked(context: MapperContext, entry: OpenEntry): Promise<void> {
  if (entry.kind === 'read-only') {
    context.open.remove(entry.id)
    await entry.device.close()
    return
  }
  // Most of the work while requests may still come; what they change meanwhile is small.
  await tryCheckpoint(context, entry)
  if (entry.orphansPossible && !entry.leaseLost && !entry.device.isPoisoned()) await punchOrphansLocked(context, entry)
  try {
    await entry.device.close()
    // The device takes no requests any more, so this is the last of them.
    if (!isClean(entry)) await tryCheckpoint(context, entry)
  } finally {
    context.open.remove(entry.id)
  }
  if (isClean(entry)) await releaseLease(context, entry.id, entry.epoch)
  else context.log.warn({ volumeId: entry.id }, 'the volume is closed without a checkpoint: its next open replays the journal')
}

/** The catalog has everything that the device has. */
function isClean(volume: OpenVolume): boolean {
  if (volume.leaseLost || volume.device.isPoisoned()) return false
  return !volume.swapUncommitted && volume.pendingSizeBytes === null && volume.device.stats().lsn === volume.mapLsn
}

async function tryCheckpoint(context: MapperContext, volume: OpenVolume): Promise<void> {
  if (volume.leaseLost || volume.device.isPoisoned()) return
  const health = context.pools.find(volume.poolId)?.health()
  if (health?.conditions.some(({ kind }) => kind === 'silent') === true) {
    context.log.warn({ volumeId: volume.id }, 'a volume is closed without a flush and a checkpoint: its pool does not answer')
    return
  }
  try {
    await checkpointLocked(context, volume)
  } catch (error) {
    context.log.warn({ err: error, volumeId: volume.id }, 'the checkpoint of a volume that is closing failed')
  }
}

/**
 * Frees what the active layer holds for nobody; returns the bytes. A shrink that is not committed must not be punched behind,
 * so it is committed first.
 */
export async function punchOrphansLocked(context: MapperContext, volume: OpenVolume): Promise<number> {
  try {
    if (volume.pendingSizeBytes !== null) await checkpointLocked(context, volume)
    // They may be what a shrink left, which an export from before it still names.
    if (!(await context.exporter.flushedForPunch(volume.writePoolId, [volume.poolId]))) return 0
    const freedBytes = await volume.device.punchOrphans()
    volume.orphansPossible = false
    return freedBytes
  } catch (error) {
    volume.orphansPossible = true
    context.log.warn({ err: error, volumeId: volume.id }, 'space that nobody refers to is freed later')
    return 0
  }
}
