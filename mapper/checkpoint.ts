/**
 * Checkpoints: the map of an open volume becomes durable in the catalog.
 *
 * Rules:
 * - Pages, root and lsn change in one durable transaction, guarded by the epoch of the lease (I1): no row changed means that
 *   somebody else owns the volume, and nothing of it is written any more.
 * - A swap that the catalog does not have yet is committed with the checkpoint that the engine keeps for it (the map at the
 *   swap): active = next, and another spare as next, in the same transaction. Before that there is no second swap, so an
 *   open after a crash never has to look further than the next layer.
 * - A size that the device was shrunk to is committed with the map that has no slots beyond it.
 * - Pages that were replaced and were never shared (id >= shared_below_page) are deleted in the same transaction; while
 *   somebody walks over trees they wait for the last pin. So a checkpoint leaves no garbage.
 * - Journal segments behind a checkpoint, and the frames of a layer that was closed, go only when the pool's export has the
 *   checkpoint: until then an import (pool-import.ts) begins with an older one and needs them. Where the export cannot be
 *   written they stay, for a later checkpoint or reclaim to remove. What a shrink left is freed under the same condition.
 * - A failed checkpoint takes its pages back and leaves the volume as it was; the next one tries again.
 *
 * Everything here is called by who holds the volume's lock.
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import { assert, isAtollError, type CatalogTransaction } from '@atoll/core'
import type { Checkpoint } from '@atoll/native'
import type { MapperContext } from './context.ts'
import type { Spare } from './layers.ts'
import { type LayerName, type OpenVolume, poolsOf } from './open-table.ts'
import { notePages } from './exporter.ts'
import { reservedPagesMax } from './page-ids.ts'
import { leaseLostError } from './rows.ts'
import { deleteBatch, finishStaged, stagePages, unstagePages, type StagedPages } from './staged-pages.ts'

/** A checkpoint whose pages are staged; ends with `writeCheckpoints` and `applyCheckpoints`, or with `abortCheckpoints`. */
export interface PreparedCheckpoint {
  readonly volume: OpenVolume
  readonly checkpoint: Checkpoint
  readonly staged: StagedPages
  /** The layer that becomes the next one, if the checkpoint commits a swap. */
  readonly spare: Spare | null
}

export interface CommitOptions {
  /** The roots get a second owner in this transaction: their pages are no longer the volume's alone. */
  readonly share: boolean
  /** Space is short, and this is on the way to more: the catalog's reserve may be used. */
  readonly emergency?: boolean
  /** More rows of the same transaction. */
  readonly also?: (tx: CatalogTransaction) => Promise<void>
}

/**
 * Brings an open volume's map into the catalog; returns whether anything changed.
 * @throws AtollError LEASE_LOST, DEVICE_POISONED, NO_SPACE, IO_ERROR; the volume stays usable but after the first two
 */
export async function checkpointLocked(
  context: MapperContext,
  volume: OpenVolume,
  options: { emergency?: boolean } = {},
): Promise<boolean> {
  const emergency = options.emergency ?? false
  let changed = false
  if (volume.swapUncommitted) {
    // Where the layer lies that is the active one afterwards.
    const [spare] = await context.layers.take([volume.next.poolId])
    assert(spare !== undefined, 'no spare')
    changed = await checkpointOnce(context, volume, spare, emergency)
  }
  const shrunk = volume.pendingSizeBytes !== null
  changed = (await checkpointOnce(context, volume, null, emergency)) || changed
  if (shrunk) await punchBeyond(context, volume)
  return changed
}

async function checkpointOnce(
  context: MapperContext,
  volume: OpenVolume,
  spare: Spare | null,
  emergency: boolean,
): Promise<boolean> {
  const prepared = await prepareCheckpoint(context, volume, spare, emergency)
  if (prepared === null) return false
  await commitCheckpoints(context, [prepared], { share: false, emergency })
  return true
}

/**
 * Flushes the device, freezes its map and stages the pages; null if nothing changed. `spare` is given exactly if a swap is
 * uncommitted, and given back if this fails.
 * @throws AtollError LEASE_LOST, DEVICE_POISONED, NO_SPACE, IO_ERROR
 */
export async function prepareCheckpoint(
  context: MapperContext,
  volume: OpenVolume,
  spare: Spare | null,
  emergency = false,
): Promise<PreparedCheckpoint | null> {
  assert(volume.swapUncommitted === (spare !== null), 'a checkpoint has a spare exactly if it commits a swap')
  assert(!volume.swapUncommitted || volume.pendingSizeBytes === null, 'a shrink is committed before the next swap')
  try {
    if (volume.leaseLost) throw leaseLostError(volume.id, volume.epoch)
    return await prepareWithPages(context, volume, spare, reservedPagesMax, emergency)
  } catch (error) {
    if (spare !== null) context.layers.giveBack(spare)
    throw error
  }
}

async function prepareWithPages(
  context: MapperContext,
  volume: OpenVolume,
  spare: Spare | null,
  pageCountMax: number,
  emergency: boolean,
): Promise<PreparedCheckpoint | null> {
  const { pageIds } = context
  // Reserved before the pages are numbered, so that a sweep that starts meanwhile stays below them.
  const reservation = pageIds.reserve(pageCountMax)
  let checkpoint: Checkpoint | null = null
  try {
    checkpoint = await volume.device.checkpoint(reservation.firstPageId)
    pageIds.trim(reservation, Math.min(checkpoint?.pageCount ?? 0, pageCountMax))
    if (checkpoint === null) {
      pageIds.release(reservation)
      return null
    }
    if (checkpoint.pageCount <= pageCountMax) {
      const staged = await stagePages(context, volume.id, reservation, checkpoint, emergency)
      return { volume, checkpoint, staged, spare }
    }
  } catch (error) {
    if (checkpoint !== null) abortOnDevice(volume, checkpoint)
    pageIds.release(reservation)
    throw error
  }
  const wanted = checkpoint.pageCount * 2
  abortOnDevice(volume, checkpoint)
  pageIds.release(reservation)
  return await prepareWithPages(context, volume, spare, wanted, emergency)
}

function abortOnDevice(volume: OpenVolume, checkpoint: Checkpoint): void {
  volume.device.checkpointAborted(checkpoint)
  // The device has taken a shrink back, too.
  volume.pendingSizeBytes = null
}

/** Takes prepared checkpoints back: their pages, and the spares. */
export async function abortCheckpoints(context: MapperContext, parts: readonly PreparedCheckpoint[]): Promise<void> {
  for (const { volume, checkpoint, staged, spare } of parts) {
    abortOnDevice(volume, checkpoint)
    await unstagePages(context, staged)
    context.pageIds.release(staged.reservation)
    if (spare !== null) context.layers.giveBack(spare)
  }
}

/**
 * Commits prepared checkpoints, exports them and tells the devices.
 * @throws what `writeCheckpoints` throws
 */
export async function commitCheckpoints(
  context: MapperContext,
  parts: readonly PreparedCheckpoint[],
  options: CommitOptions,
): Promise<void> {
  await writeCheckpoints(context, parts, options)
  const exported = await context.exporter.flushed(parts.flatMap((part) => exportsOf(part)))
  await applyCheckpoints(context, parts, exported)
}

/**
 * Commits prepared checkpoints, all of them in one durable transaction; `applyCheckpoints` comes next, before anything else is done
 * with the volumes. If it fails, everything is taken back; a volume whose lease is lost is stopped, the others go on.
 * @throws AtollError LEASE_LOST, NO_SPACE and the other errors of `Catalog.write`
 */
export async function writeCheckpoints(
  context: MapperContext,
  parts: readonly PreparedCheckpoint[],
  options: CommitOptions,
): Promise<void> {
  // Every page of these roots has a smaller number: the reservations are trimmed to what was used, or lie below.
  const sharedBelowPage = context.pageIds.next
  const deleted = new Map<PreparedCheckpoint, number>()
  const writeOptions = { emergency: options.emergency ?? false }
  try {
    await context.catalog.write(async (tx) => {
      for (const part of parts) {
        await commitOne(context, tx, part, options.share ? sharedBelowPage : null)
        // Asked inside the write: who pins from here on reads the roots after this commit.
        if (context.pins.active) continue
        const now = ownReplaced(part).slice(0, deleteBatch)
        await context.catalog.pages.delete(now)
        deleted.set(part, now.length)
      }
      await options.also?.(tx)
    }, writeOptions)
  } catch (error) {
    await abortCheckpoints(context, parts)
    if (isAtollError(error, 'LEASE_LOST')) {
      for (const { volume } of parts) if (volume.id === error.values['id']) stopLost(context, volume, error.message)
    }
    throw error
  }
  for (const part of parts) {
    const rest = ownReplaced(part).slice(deleted.get(part) ?? 0)
    context.pageIds.release(part.staged.reservation)
    deletePagesLater(context, rest)
    if (options.share) part.volume.sharedBelowPage = sharedBelowPage
  }
}

/** Tells the devices what is committed, and `exported` if the exports have it, and frees what was needed until then. */
export async function applyCheckpoints(
  context: MapperContext,
  parts: readonly PreparedCheckpoint[],
  exported: boolean,
): Promise<void> {
  for (const part of parts) await applyOne(context, part, exported)
}

/** The pools whose exports must have the checkpoint: also that of the layer which follows. */
export function exportsOf({ volume, spare }: PreparedCheckpoint): string[] {
  return [...poolsOf(volume), ...(spare === null ? [] : [spare.poolId])]
}

function ownReplaced({ volume, staged }: PreparedCheckpoint): number[] {
  return Array.from(staged.replaced).filter((id) => id >= volume.sharedBelowPage)
}

async function commitOne(
  context: MapperContext,
  tx: CatalogTransaction,
  part: PreparedCheckpoint,
  sharedBelowPage: number | null,
): Promise<void> {
  const { volume, checkpoint, staged, spare } = part
  const result = await tx
    .updateTable('volumes')
    .set({
      map_lsn: checkpoint.lsn,
      ...(sharedBelowPage === null ? {} : { shared_below_page: sharedBelowPage }),
      ...(spare === null ? {} : { active_alias: volume.next.alias, next_alias: spare.alias }),
    })
    .where('id', '=', volume.id)
    .where('epoch', '=', volume.epoch)
    .executeTakeFirst()
  if (result.numUpdatedRows !== 1n) throw leaseLostError(volume.id, volume.epoch)
  const { root } = staged
  const sizeBytes = volume.pendingSizeBytes
  await tx
    .updateTable('resources')
    .set({ root_word: root.word, root_crc: root.crc, ...(sizeBytes === null ? {} : { size_bytes: sizeBytes }) })
    .where('id', '=', volume.id)
    .execute()
  await finishStaged(context, tx, staged)
  const { firstPageId } = staged.reservation
  if (checkpoint.pageCount > 0) await notePages(tx, volume.poolId, firstPageId, firstPageId + checkpoint.pageCount)
  if (spare === null) return
  await context.layers.move(tx, volume.active.alias, ['active'], 'closing')
  await context.layers.move(tx, volume.next.alias, ['spare'], 'active')
  await context.layers.assign(tx, spare, { volumeId: volume.id, projectId: volume.projectId, epoch: volume.epoch }, 'spare')
}

/** After the commit nothing may fail any more: what goes wrong here is logged, and done again later. */
async function applyOne(context: MapperContext, part: PreparedCheckpoint, exported: boolean): Promise<void> {
  const { volume, checkpoint, spare } = part
  volume.mapLsn = checkpoint.lsn
  if (volume.pendingSizeBytes !== null) {
    volume.sizeBytes = volume.pendingSizeBytes
    volume.pendingSizeBytes = null
  }
  try {
    await volume.device.checkpointCommitted(checkpoint, exported)
  } catch (error) {
    context.log.warn({ err: error, volumeId: volume.id }, 'journal segments behind a checkpoint stay for now')
  }
  if (spare === null) return
  const closed = volume.active
  volume.layers.add(closed.alias)
  volume.active = volume.next
  volume.next = spare
  volume.swapUncommitted = false
  volume.nextExported = exported
  await sealClosed(context, volume, closed, exported)
}

async function sealClosed(context: MapperContext, volume: OpenVolume, closed: LayerName, exported: boolean): Promise<void> {
  try {
    await volume.device.swapCommitted(exported)
    if (!exported) return
    await context.catalog.write(async (tx) => await context.layers.move(tx, closed.alias, ['closing'], 'sealed'), {
      durable: false,
    })
  } catch (error) {
    // The swap stands; the layer stays `closing`, which reclaim does not touch, until it is sealed at the next start.
    context.log.warn({ err: error, volumeId: volume.id, layerId: closed.id }, 'a closed layer is not sealed yet')
  }
}

/** Frees what a committed shrink left beyond the end; what fails is found again as orphans. */
async function punchBeyond(context: MapperContext, volume: OpenVolume): Promise<void> {
  try {
    // The shrink is in no journal: an export from before it names what lies beyond.
    if (!(await context.exporter.flushedForPunch(volume.writePoolId, [volume.poolId]))) {
      volume.orphansPossible = true
      return
    }
    await volume.device.shrinkPunch()
  } catch (error) {
    volume.orphansPossible = true
    context.log.warn({ err: error, volumeId: volume.id }, 'space behind a shrink is freed later')
  }
}

/** I1: somebody else owns the volume. Its device serves no more; every other volume goes on. */
export function stopLost(context: MapperContext, volume: OpenVolume, message: string): void {
  if (volume.leaseLost) return
  volume.leaseLost = true
  context.log.error({ volumeId: volume.id, epoch: volume.epoch }, 'the lease was lost: the volume is stopped')
  volume.onEvent({ kind: 'lease-lost', resourceId: volume.id, message })
  context.background.start(`stopping volume ${volume.id}`, async () => await volume.device.close())
}

/** Deletes pages that no root reaches any more, in bounded transactions; while trees are walked over, they wait. */
export function deletePagesLater(context: Pick<MapperContext, 'background' | 'catalog' | 'pins'>, pageIds: number[]): void {
  if (pageIds.length === 0) return
  if (context.pins.active) {
    context.pins.defer(pageIds)
    return
  }
  context.background.start('deleting replaced map pages', async () => {
    for (let start = 0; start < pageIds.length; start += deleteBatch) {
      if (context.pins.active) {
        context.pins.defer(pageIds.slice(start))
        return
      }
      const batch = pageIds.slice(start, start + deleteBatch)
      await context.catalog.write(async () => await context.catalog.pages.delete(batch), { durable: false, emergency: true })
      await nextTurn()
    }
  })
}
