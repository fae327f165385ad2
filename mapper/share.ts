/**
 * Making the present content of volumes shareable: what a snapshot, a clone of a volume and an image of a volume have in
 * common. Afterwards the content is a durable root over sealed layers, and each volume writes to a new active layer.
 *
 * Rules:
 * - The order for an open volume: its next layer is in the catalog already; the spare that follows it is in hand; swap;
 *   closing layer and journal durable and the map's pages staged (`prepareCheckpoint`); then one transaction with the new
 *   rows, the volumes' rows, the layers' states. A crash before that transaction leaves no snapshot and loses nothing: an
 *   open finds the frames of the next layer and commits the swap without it.
 * - Several volumes are one point in time: the engine closes all gates before it opens one, and closed volumes have no
 *   writer while their lock is held. All of them are in the one transaction, or none is.
 * - No swap before the exports of its pools name the volume's active and next layer: an import finds frames in no layer but these.
 * - A closed volume needs no engine: its durable root is its content. Its active layer is sealed if the root may refer to it.
 * - What was promised is there when the transaction is durable and the exports have it, so that is when the answer goes out.
 *   Journals are sealed and layers change their state behind it, while the locks are still held: whatever comes next for
 *   one of these volumes finds all of it done.
 */
import { assert, AtollError, isAtollError, type CatalogTransaction, type ResourceRow, type VolumeRow } from '@atoll/core'
import type { RootRef } from '@atoll/native'
import {
  abortCheckpoints,
  applyCheckpoints,
  checkpointLocked,
  exportsOf,
  prepareCheckpoint,
  type PreparedCheckpoint,
  writeCheckpoints,
} from './checkpoint.ts'
import type { MapperContext } from './context.ts'
import type { Spare } from './layers.ts'
import { type OpenVolume, type PlacedLayer, poolsOf } from './open-table.ts'
import { settleLocked } from './open.ts'
import { rootMayReferTo, rootOf } from './root.ts'
import { leaseLostError, requireAvailable, requireKind, requireVolumeRow } from './rows.ts'

/** How long a swap waits for requests in flight, unless the caller says otherwise. */
export const swapDeadlineMs = 5000

/** The content of a volume at the point in time. */
export interface SharedRoot {
  readonly volume: ResourceRow
  readonly root: RootRef
  readonly sizeBytes: number
}

export interface ClosedVolume {
  readonly row: ResourceRow
  readonly volume: VolumeRow
  readonly active: PlacedLayer
  /** The layer that becomes the active one; null if the present one has nothing in the map. */
  readonly spare: Spare | null
}

type MakeRows = (tx: CatalogTransaction, shared: readonly SharedRoot[]) => Promise<void>

/** What was shared, and what is left to do with the locks held; that never fails. */
interface Shared {
  readonly pauseMs: number
  finish(): Promise<void>
}

/**
 * Shares the content of volumes, with their locks and those of the resources `alsoLocked`. `makeRows` writes the rows that refer to the
 * roots, in the transaction that makes them durable; they are in the exports on return. Returns the longest time that a gate was closed.
 * @throws AtollError VOLUME_NOT_FOUND, RESOURCE_STATUS, SNAPSHOT_BUSY, LEASE_LOST, DEVICE_POISONED, NO_SPACE, IO_ERROR, POOL_UNAVAILABLE; then nothing was shared
 */
export async function shareVolumes(
  context: MapperContext,
  volumeIds: readonly string[],
  deadlineMs: number,
  makeRows: MakeRows,
  alsoLocked: readonly string[] = [],
): Promise<{ pauseMs: number }> {
  const answer = Promise.withResolvers<{ pauseMs: number }>()
  context.background.start('sealing what was shared', async () => {
    let finish: (() => Promise<void>) | null = null
    try {
      await context.locks.run([...volumeIds, ...alsoLocked], async () => {
        const shared = await shareLocked(context, volumeIds, deadlineMs, makeRows)
        finish = shared.finish
        answer.resolve({ pauseMs: shared.pauseMs })
        await finish()
      })
    } catch (error) {
      if (finish !== null) throw error
      answer.reject(error)
    }
  })
  return await answer.promise
}

async function shareLocked(
  context: MapperContext,
  volumeIds: readonly string[],
  deadlineMs: number,
  makeRows: MakeRows,
): Promise<Shared> {
  const rows = new Map<string, ResourceRow>()
  for (const id of volumeIds) {
    requireAvailable(await requireKind(context.catalog.db, id, 'volume'))
    await settleLocked(context, id)
    rows.set(id, await requireKind(context.catalog.db, id, 'volume'))
  }
  const open = volumeIds.map((id) => context.open.volume(id)).filter((volume) => volume !== undefined)
  for (const volume of open) {
    if (volume.leaseLost) throw leaseLostError(volume.id, volume.epoch)
    // An earlier share or shrink that failed half-way: its commit comes first.
    if (volume.swapUncommitted || volume.pendingSizeBytes !== null) await checkpointLocked(context, volume)
  }
  const unnamed = open.filter((volume) => !volume.nextExported)
  if (unnamed.length > 0) {
    const exported = await context.exporter.flushed(unnamed.flatMap(poolsOf))
    for (const volume of unnamed) volume.nextExported = exported
  }
  const closed = await findClosed(context, volumeIds, rows)

  // Everything that can fail for want of space is in hand before the first gate closes.
  const spares = await context.layers.take([
    // Where the layer lies that is the active one afterwards.
    ...open.map((volume) => volume.next.poolId),
    ...closed.map((volume) => volume.active.poolId),
  ])
  const following = open.map((volume, index) => ({ volume, spare: spares[index] as Spare }))
  const replacing = closed.map((part, index) => withSpare(context, part, spares[open.length + index] as Spare))

  let pauseMs = 0
  let prepared: PreparedCheckpoint[]
  try {
    pauseMs = await swap(context, following, deadlineMs)
    prepared = await prepareAll(context, following)
  } catch (error) {
    for (const { spare } of replacing) if (spare !== null) context.layers.giveBack(spare)
    throw error
  }
  const sizes = new Map(open.map((volume) => [volume.id, volume.sizeBytes]))
  const shared = volumeIds.map((id): SharedRoot => {
    const volume = rows.get(id) as ResourceRow
    const staged = prepared.find((part) => part.volume.id === id)?.staged
    return { volume, root: staged?.root ?? rootOf(volume), sizeBytes: sizes.get(id) ?? volume.size_bytes }
  })
  try {
    await writeCheckpoints(context, prepared, {
      share: true,
      also: async (tx) => {
        for (const part of replacing) await shareClosed(context, tx, part)
        await makeRows(tx, shared)
      },
    })
  } catch (error) {
    for (const { spare } of replacing) if (spare !== null) context.layers.giveBack(spare)
    throw error
  }
  // Also what `makeRows` has made. Journals lose what an export from before needs only if it is there.
  const pools = [
    ...shared.map(({ volume }) => volume.home_pool_id),
    ...prepared.flatMap(exportsOf),
    ...spares.map((spare) => spare.poolId),
  ]
  const exported = await context.exporter.flushed(pools)
  const finish = async (): Promise<void> => {
    await applyCheckpoints(context, prepared, exported)
    if (exported) for (const part of replacing) await sealReplaced(context, part)
  }
  return { pauseMs, finish }
}

async function findClosed(
  context: MapperContext,
  volumeIds: readonly string[],
  rows: ReadonlyMap<string, ResourceRow>,
): Promise<ClosedVolume[]> {
  const closed: ClosedVolume[] = []
  for (const id of volumeIds) {
    if (context.open.volume(id) !== undefined) continue
    const volume = await requireVolumeRow(context.catalog.db, id)
    const row = rows.get(id) as ResourceRow
    const [active] = await context.layers.homes([volume.active_alias], row.home_pool_id)
    assert(active !== undefined, `no place of layer ${volume.active_alias}`)
    closed.push({ row, volume, active, spare: null })
  }
  return closed
}

/** A root that cannot refer to the active layer leaves it as it is: nothing of it is shared. */
function withSpare(context: MapperContext, part: ClosedVolume, spare: Spare): ClosedVolume {
  if (rootMayReferTo(rootOf(part.row), part.active.alias)) return { ...part, spare }
  context.layers.giveBack(spare)
  return part
}

/** Swaps the volumes onto their next layers, all at one point in time; if that fails, the spares are given back. Returns the pause in ms. */
export async function swap(
  context: MapperContext,
  parts: readonly { volume: OpenVolume; spare: Spare }[],
  deadlineMs: number,
): Promise<number> {
  if (parts.length === 0) return 0
  try {
    const devices = await Promise.all(
      parts.map(async ({ volume }) => ({ device: volume.device, next: await context.layers.ref(volume.next, volume.poolId) })),
    )
    const reports = await context.engine.swap(devices, deadlineMs)
    for (const { volume } of parts) volume.swapUncommitted = true
    return Math.max(...reports.map((report) => report.pauseMs))
  } catch (error) {
    for (const { spare } of parts) context.layers.giveBack(spare)
    if (!isAtollError(error, 'DEVICE_BUSY')) throw error
    throw new AtollError(
      'SNAPSHOT_BUSY',
      `requests in flight did not end within ${deadlineMs} ms, so nothing was changed; try again`,
      {
        values: { deadlineMs, volumeIds: parts.map(({ volume }) => volume.id) },
        cause: error,
      },
    )
  }
}

/** All or none: if one fails, what the others have staged is taken back. The swaps stay, and are committed later. */
async function prepareAll(
  context: MapperContext,
  parts: readonly { volume: OpenVolume; spare: Spare }[],
): Promise<PreparedCheckpoint[]> {
  const results = await Promise.allSettled(
    parts.map(async ({ volume, spare }) => await prepareCheckpoint(context, volume, spare)),
  )
  const prepared = results.flatMap((result) => (result.status === 'fulfilled' && result.value !== null ? [result.value] : []))
  const failure = results.find((result) => result.status === 'rejected')
  if (failure === undefined && prepared.length === parts.length) return prepared
  await abortCheckpoints(context, prepared)
  throw failure?.reason ?? new AtollError('INTERNAL', 'the engine gave no checkpoint for a swap')
}

async function shareClosed(context: MapperContext, tx: CatalogTransaction, part: ClosedVolume): Promise<void> {
  const { row, volume, active, spare } = part
  const result = await tx
    .updateTable('volumes')
    .set({ shared_below_page: context.pageIds.next, ...(spare === null ? {} : { active_alias: spare.alias }) })
    .where('id', '=', row.id)
    .where('epoch', '=', volume.epoch)
    .executeTakeFirst()
  if (result.numUpdatedRows !== 1n) throw leaseLostError(row.id, volume.epoch)
  if (spare === null) return
  await context.layers.move(tx, active.alias, ['active'], 'closing')
  await context.layers.assign(tx, spare, { volumeId: row.id, projectId: row.project_id, epoch: volume.epoch }, 'active')
}

/** As after a swap: a layer that cannot be sealed now stays `closing` until the next start. */
export async function sealReplaced(context: MapperContext, { row, volume, active, spare }: ClosedVolume): Promise<void> {
  if (spare === null) return
  try {
    const seal = { volumeId: row.id, epoch: volume.epoch, finalLsn: volume.map_lsn, successor: spare.id }
    await context.pools.handle(active.poolId).sealLayer(active.id, seal)
    await context.catalog.write(async (tx) => await context.layers.move(tx, active.alias, ['closing'], 'sealed'), {
      durable: false,
    })
  } catch (error) {
    context.log.warn({ err: error, volumeId: row.id, layerId: active.id }, 'a closed layer is not sealed yet')
  }
}
