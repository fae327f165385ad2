/**
 * Leases: who writes a volume (I1).
 *
 * Rules:
 * - A lease is taken, with a raised epoch, in a durable transaction before the engine opens the volume; it is released only
 *   when the catalog has everything that the device had. A lease that is not released and not held by this process belongs
 *   to a dead one: the volume is *dirty*, its journal is the truth, and it is opened (replayed) before anything else.
 * - The pool's own lock keeps a living second process out; a pool that knows no lock is not opened by two processes because
 *   the catalog has one owner, and that holds for all of its pools.
 * - A lease says under whose batch logs the volume is open: what a home's logs still hold is worth something only if no other home
 *   had the volume since.
 */
import { AtollError, type LeaseRow } from '@atoll/core'
import type { MapperContext } from './context.ts'
import type { Spare } from './layers.ts'
import { findLease, requireVolumeRow } from './rows.ts'

export interface TakenLease {
  readonly epoch: number
  /** The last holder died without releasing it. */
  readonly wasDirty: boolean
  /** Batch logs of an older epoch mean nothing: the volume was open under those of another home since. */
  readonly logSinceEpoch: number
  /** Whose batch logs the volume had before this lease, and since when; null: it was never open. */
  readonly logBefore: { readonly id: string | null; readonly sinceEpoch: number } | null
  readonly activeAlias: number
  readonly nextAlias: number
  readonly mapLsn: number
  readonly sharedBelowPage: number
}

/**
 * Raises the epoch and takes the lease; a volume without a next layer gets one in the same transaction, where its active one is.
 * @throws AtollError VOLUME_NOT_FOUND, LAYER_MISSING, POOL_UNAVAILABLE, NO_SPACE
 */
export async function takeLease(
  context: MapperContext,
  volume: { id: string; projectId: string; poolId: string },
  holder: string,
): Promise<TakenLease> {
  const { catalog, clock, layers } = context
  const recorded = await requireVolumeRow(catalog.db, volume.id)
  const [active] = recorded.next_alias === null ? await layers.homes([recorded.active_alias], volume.poolId) : []
  const [spare]: (Spare | undefined)[] = active === undefined ? [] : await layers.take([active.poolId])
  try {
    // On a full disk, too: what was flushed can be read, and the volume detached and deleted.
    const emergency = { emergency: true }
    return await catalog.write(async (tx) => {
      const row = await requireVolumeRow(tx, volume.id)
      const lease = await findLease(tx, volume.id)
      const epoch = row.epoch + 1
      const nextAlias = spare?.alias ?? row.next_alias
      if (nextAlias === null) throw new AtollError('INTERNAL', `volume ${volume.id} lost its next layer while it was opened`)
      if (spare !== undefined)
        await layers.assign(tx, spare, { volumeId: volume.id, projectId: volume.projectId, epoch }, 'spare')
      await tx.updateTable('volumes').set({ epoch, next_alias: nextAlias }).where('id', '=', volume.id).execute()
      const logSinceEpoch = lease === undefined || isOurLog(context, lease) ? (lease?.log_since_epoch ?? 0) : epoch
      const held = {
        holder,
        epoch,
        acquired_at: clock.nowMs(),
        released_at: null,
        log_id: context.batchLogId,
        log_since_epoch: logSinceEpoch,
      }
      if (lease === undefined)
        await tx
          .insertInto('leases')
          .values({ volume_id: volume.id, project_id: volume.projectId, ...held })
          .execute()
      else await tx.updateTable('leases').set(held).where('volume_id', '=', volume.id).execute()
      return {
        epoch,
        wasDirty: lease !== undefined && lease.released_at === null,
        logSinceEpoch,
        logBefore: lease === undefined ? null : { id: lease.log_id, sinceEpoch: lease.log_since_epoch },
        activeAlias: row.active_alias,
        nextAlias,
        mapLsn: row.map_lsn,
        sharedBelowPage: row.shared_below_page,
      }
    }, emergency)
  } catch (error) {
    if (spare !== undefined) layers.giveBack(spare)
    throw error
  }
}

/** Whether the batch logs under which the volume was opened last are those of this home. */
export function isOurLog(context: Pick<MapperContext, 'batchLogId'>, lease: Pick<LeaseRow, 'log_id'>): boolean {
  return lease.log_id === null || lease.log_id === context.batchLogId
}

/** Nothing was opened under the lease: the batch logs that the volume had are its own as before. */
export async function giveLogBack(
  context: Pick<MapperContext, 'catalog'>,
  volumeId: string,
  { epoch, logBefore }: TakenLease,
): Promise<void> {
  if (logBefore === null) return
  await context.catalog.write(
    async (tx) => {
      await tx
        .updateTable('leases')
        .set({ log_id: logBefore.id, log_since_epoch: logBefore.sinceEpoch })
        .where('volume_id', '=', volumeId)
        .where('epoch', '=', epoch)
        .execute()
    },
    { durable: false, emergency: true },
  )
}

/**
 * The catalog has all of the volume. Need not be durable by itself: if it is lost, the next open replays nothing. A lease
 * that somebody else has taken meanwhile is left alone.
 */
export async function releaseLease(
  context: Pick<MapperContext, 'catalog' | 'clock'>,
  volumeId: string,
  epoch: number,
): Promise<void> {
  await context.catalog.write(
    async (tx) => {
      await tx
        .updateTable('leases')
        .set({ released_at: context.clock.nowMs() })
        .where('volume_id', '=', volumeId)
        .where('epoch', '=', epoch)
        .where('released_at', 'is', null)
        .execute()
    },
    { durable: false, emergency: true },
  )
}

/** Whether the volume's lease is held by nobody alive: it is not open here, and was not released. */
export async function isDirty(context: Pick<MapperContext, 'catalog' | 'open'>, volumeId: string): Promise<boolean> {
  if (context.open.get(volumeId)?.kind === 'writable') return false
  const lease = await findLease(context.catalog.db, volumeId)
  return lease !== undefined && lease.released_at === null
}

/** Every dirty volume. */
export async function dirtyVolumes(context: Pick<MapperContext, 'catalog' | 'open'>): Promise<string[]> {
  const rows = await context.catalog.db.selectFrom('leases').select('volume_id').where('released_at', 'is', null).execute()
  return rows.map((row) => row.volume_id).filter((id) => context.open.get(id)?.kind !== 'writable')
}
