/**
 * Images that are being written: a device to write into, and then an image.
 *
 * Rules:
 * - Until it is finished, the target is a row with status `creating` that is written like a fresh volume: lease, journal and
 *   replay are the same, so an import goes on after a crash with everything that was flushed.
 * - Finishing flushes, closes and then makes it `available` in one transaction, which also ends its life as something
 *   writable: the volume row and the lease go, the active layer is sealed.
 */
import { assert, AtollError, type CatalogTransaction, type ResourceRow, type VolumeRow } from '@atoll/core'
import type { Device } from '@atoll/native'
import { closeLocked } from './close.ts'
import type { MapperContext } from './context.ts'
import { insertResource, insertWritable } from './create.ts'
import { deleteLocked } from './delete.ts'
import { openLocked, settleLocked, type OpenOptions } from './open.ts'
import { shrinkOpen } from './resize.ts'
import { uniformRoot } from './root.ts'
import { findVolumeRow, leaseLostError, requireResource, requireVolumeRow } from './rows.ts'
import { checkImageSize } from './size.ts'

export interface ImportTarget {
  readonly resourceId: string
  /** Write the content into it, flush as often as a restart should not go back, then finish. */
  readonly device: Device
}

export interface NewImport {
  readonly projectId: string
  readonly name: string
  readonly kind: 'image'
  /** Any number of bytes. */
  readonly sizeBytes: number
  readonly poolId: string
}

const importHolder = 'import'

/** More that runs in the background than this, and a seal is waited for (I8). */
const backgroundSealsMax = 64

/**
 * Makes the target of an import and opens it.
 * @throws AtollError SIZE_INVALID, POOL_UNAVAILABLE, POOL_CLOSED, NO_SPACE
 */
export async function beginImport(
  context: MapperContext,
  wanted: NewImport,
  options: Pick<OpenOptions, 'onEvent'> = {},
): Promise<ImportTarget> {
  checkImageSize(wanted.sizeBytes)
  const [spare] = await context.layers.take([wanted.poolId])
  assert(spare !== undefined, 'no spare was given')
  const id = context.newId()
  try {
    await context.catalog.write(async (tx) => {
      const row = await insertResource(context, tx, {
        ...wanted,
        id,
        root: uniformRoot(spare.alias),
        parentId: null,
        status: 'creating',
      })
      await insertWritable(context, tx, row, spare, 0)
    })
  } catch (error) {
    context.layers.giveBack(spare)
    throw error
  }
  return await resumeImport(context, id, options)
}

/**
 * Opens the target of an unfinished import; what was flushed is there.
 * @throws AtollError RESOURCE_NOT_FOUND, RESOURCE_STATUS if it is no unfinished import, ALREADY_OPEN, and what an open throws
 */
export async function resumeImport(
  context: MapperContext,
  resourceId: string,
  options: Pick<OpenOptions, 'onEvent'> = {},
): Promise<ImportTarget> {
  return await context.locks.run([resourceId], async () => {
    const row = await requireUnfinished(context, resourceId)
    const entry = await openLocked(context, row, { ...options, holder: importHolder, readOnly: false })
    return { resourceId, device: entry.device }
  })
}

export interface FinishOptions {
  /** The size of the content, where it was not known at the beginning: not above the target's. What lies beyond is cut off. */
  readonly sizeBytes?: number
}

/**
 * Everything is written: the target becomes an available image. Returns when that is durable.
 * @throws AtollError RESOURCE_NOT_FOUND, RESOURCE_STATUS, SIZE_INVALID, LEASE_LOST, DEVICE_POISONED, NO_SPACE, IO_ERROR; it is then
 * still unfinished
 */
export async function finishImport(
  context: MapperContext,
  resourceId: string,
  options: FinishOptions = {},
): Promise<ResourceRow> {
  return await context.locks.run([resourceId], async () => {
    const unfinished = await requireUnfinished(context, resourceId)
    await finishWriting(context, unfinished, options.sizeBytes ?? unfinished.size_bytes)
    const volume = await requireVolumeRow(context.catalog.db, resourceId)
    const row = await context.catalog.write(async (tx) => await becomeAvailable(context, tx, volume))
    await sealFinished(context, row, volume)
    return row
  })
}

/** Ends the life of something writable: what the catalog has of it is an available resource. Inside a write. */
export async function becomeAvailable(
  context: MapperContext,
  tx: CatalogTransaction,
  volume: VolumeRow,
  sizeBytes?: number,
): Promise<ResourceRow> {
  const { id, epoch } = volume
  const result = await tx.deleteFrom('volumes').where('id', '=', id).where('epoch', '=', epoch).executeTakeFirst()
  if (result.numDeletedRows !== 1n) throw leaseLostError(id, epoch)
  await tx.deleteFrom('leases').where('volume_id', '=', id).execute()
  await context.layers.move(tx, volume.active_alias, ['active'], 'closing')
  if (volume.next_alias !== null) await context.layers.move(tx, volume.next_alias, ['spare'], 'condemned')
  return await tx
    .updateTable('resources')
    .set({
      status: 'available',
      updated_at: context.clock.nowMs(),
      ...(sizeBytes === undefined ? {} : { size_bytes: sizeBytes }),
    })
    .where('id', '=', id)
    .returningAll()
    .executeTakeFirstOrThrow()
}

/** Seals the layer of what became available; one that cannot be sealed now stays `closing` until the next reclaim or start. */
export async function sealFinished(context: MapperContext, row: ResourceRow, volume: VolumeRow): Promise<void> {
  // I9; and the frames go with the seal, while an export from before the commit needs them.
  if (await context.exporter.flushed([row.home_pool_id])) await sealLayerOf(context, row, volume)
}

/**
 * As `sealFinished`, by who holds the lock of the resource; but the seal comes after the answer, which promises content and no
 * seal. Until then everything is as after a crash at that point: the layer is `closing`, and nobody can write it any more.
 */
export async function sealFinishedLater(context: MapperContext, row: ResourceRow, volume: VolumeRow): Promise<void> {
  if (!(await context.exporter.flushed([row.home_pool_id]))) return
  if (context.background.runningCount >= backgroundSealsMax) {
    await sealLayerOf(context, row, volume)
    return
  }
  context.background.start(
    'sealing a layer',
    async () => await context.locks.run([row.id], async () => await sealLayerOf(context, row, volume)),
  )
}

async function sealLayerOf(context: MapperContext, row: ResourceRow, volume: VolumeRow): Promise<void> {
  try {
    const layer = await context.catalog.db
      .selectFrom('layers')
      .select('id')
      .where('alias', '=', volume.active_alias)
      .where('state', '=', 'closing')
      .executeTakeFirst()
    // A reclaim was quicker.
    if (layer === undefined) return
    const seal = { volumeId: row.id, epoch: volume.epoch, finalLsn: volume.map_lsn, successor: null }
    await context.pools.handle(row.home_pool_id).sealLayer(layer.id, seal)
    await context.catalog.write(async (tx) => await context.layers.move(tx, volume.active_alias, ['closing'], 'sealed'), {
      durable: false,
    })
  } catch (error) {
    context.log.warn(
      { err: error, resourceId: row.id, layerAlias: volume.active_alias },
      'the layer of what was written is not sealed yet',
    )
  }
}

/** Flushes, cuts to the size and closes: afterwards the catalog's root is the content. */
async function finishWriting(context: MapperContext, row: ResourceRow, sizeBytes: number): Promise<void> {
  checkImageSize(sizeBytes)
  if (sizeBytes > row.size_bytes) {
    throw new AtollError(
      'SIZE_INVALID',
      `size ${sizeBytes} is larger than the ${row.size_bytes} bytes that the import was begun with`,
      {
        values: { sizeBytes, maxBytes: row.size_bytes },
      },
    )
  }
  let entry = context.open.get(row.id)
  if (entry === undefined && sizeBytes < row.size_bytes) {
    entry = await openLocked(context, row, { holder: importHolder, readOnly: false })
  }
  if (entry?.kind === 'writable') {
    // An error of the flush is the caller's: it decides whether to write again.
    await entry.device.flush()
    if (sizeBytes < row.size_bytes) await shrinkOpen(context, entry, sizeBytes)
    await closeLocked(context, entry)
  }
  await settleLocked(context, row.id)
}

/**
 * Gives an unfinished import up: its rows are gone, its space comes back with the next reclaim.
 * @throws AtollError RESOURCE_NOT_FOUND, RESOURCE_STATUS
 */
export async function abortImport(context: MapperContext, resourceId: string): Promise<void> {
  await context.locks.run([resourceId], async () => {
    const row = await requireUnfinished(context, resourceId)
    const entry = context.open.get(resourceId)
    if (entry !== undefined) {
      context.open.remove(resourceId)
      try {
        await entry.device.close()
      } catch (error) {
        context.log.debug({ err: error, resourceId }, 'what an aborted import wrote last was not stored')
      }
    }
    await deleteLocked(context, row, { withSnapshots: false })
  })
}

async function requireUnfinished(context: MapperContext, resourceId: string): Promise<ResourceRow> {
  const row = await requireResource(context.catalog.db, resourceId)
  // Both: a finished one whose status is damaged has nothing that it writes, and must not be given up.
  const isWritten = (await findVolumeRow(context.catalog.db, resourceId)) !== undefined
  if (row.kind !== 'volume' && row.status === 'creating' && isWritten) return row
  const why = row.status === 'creating' ? 'creating, but nothing is written' : row.status
  throw new AtollError('RESOURCE_STATUS', `${row.kind} ${row.id} (${row.name}) is ${why}: it is no unfinished import`, {
    values: { id: row.id, status: row.status },
  })
}
