/**
 * Making volumes and images: fresh ones, and ones that share the content of something else.
 *
 * Rules:
 * - A fresh volume's whole map is its active layer: UNIFORM(active), no pages, no journal until its first snapshot. Its
 *   active layer was therefore never written by anybody (layers.ts).
 * - A clone shares its source's root and writes to an active layer of its own. The source's row is read in the transaction
 *   that makes the clone, so the root cannot have been deleted in between (see reclaim.ts).
 * - A clone may lie in another pool than its source: it then reads from layers of both (pool-links.ts).
 * - A clone may be larger than its source. What lies beyond reads as zeros: no device ever wrote past its size, and a shrink
 *   leaves holes there (see reclaim.ts for why the layers that a map names beyond its end are still there).
 */
import { AtollError, checkVolumeSize, type CatalogTransaction, type ResourceKind, type ResourceRow } from '@atoll/core'
import type { RootRef } from '@atoll/native'
import type { MapperContext } from './context.ts'
import { noteForeignTree } from './exporter.ts'
import type { Spare } from './layers.ts'
import { overcommitLimit, requireProvisionable, type OvercommitLimit } from './overcommit.ts'
import { requireNotDraining } from './pool-settings.ts'
import { rootOf, uniformRoot } from './root.ts'
import { requireAvailable, requireResource } from './rows.ts'
import { type SharedRoot, shareVolumes, swapDeadlineMs } from './share.ts'

export interface NewVolume {
  readonly projectId: string
  readonly name: string
  /** A multiple of 4096, and not below the source's size. */
  readonly sizeBytes: number
  readonly poolId: string
  /** A snapshot, an image, or a volume (open or closed) whose present content is taken. */
  readonly fromId?: string
}

export interface NewImage {
  readonly projectId: string
  readonly name: string
  /** A snapshot or another image, or a volume whose present content is taken. */
  readonly fromId: string
}

/** The durable content of a resource. */
export interface Source {
  readonly row: ResourceRow
  readonly root: RootRef
  readonly sizeBytes: number
}

/**
 * Makes a volume; returns when it is durable.
 * @throws AtollError SIZE_INVALID, POOL_OVERCOMMITTED, RESOURCE_NOT_FOUND, RESOURCE_STATUS, POOL_UNAVAILABLE, POOL_CLOSED, NO_SPACE, and for a volume
 * as the source what `shareVolumes` throws
 */
export async function createVolume(context: MapperContext, wanted: NewVolume): Promise<ResourceRow> {
  checkVolumeSize(wanted.sizeBytes)
  const limit = await overcommitLimit(context, wanted.poolId)
  // Asked here as well, so that what will be refused does not make a volume that is copied change its layers.
  await requireProvisionable(context.catalog.db, limit, wanted.sizeBytes)
  const [spare] = await context.layers.take([wanted.poolId])
  if (spare === undefined) throw new AtollError('INTERNAL', 'no spare was given')
  const id = context.newId()
  let row: ResourceRow | undefined
  const poolIds = new Set([wanted.poolId])
  let isExported = false
  try {
    const { fromId } = wanted
    if (fromId === undefined) {
      row = await context.catalog.write(async (tx) => await insertVolume(context, tx, { id, wanted, spare, source: null, limit }))
    } else {
      const shared = await shareFrom(context, fromId, async (tx, source) => {
        if (wanted.sizeBytes < source.sizeBytes) throw sizeBelowSource(wanted.sizeBytes, source)
        row = await insertVolume(context, tx, { id, wanted, spare, source, limit })
        poolIds.add(source.row.home_pool_id)
      })
      isExported = shared.isExported
    }
  } catch (error) {
    context.layers.giveBack(spare)
    throw error
  }
  context.open.setNew(id)
  // I9: what is promised is in the export, too, and nobody writes into an active layer that it does not name. The pool that is read
  // from knows by whom. A share has waited for the pools that it is about, and not for the first whole export of another one.
  if (!isExported || poolIds.size > 1) await context.exporter.flushed([...poolIds])
  return row as ResourceRow
}

/**
 * Makes an image that shares the content of a snapshot, a volume or another image; no byte is copied.
 * @throws AtollError RESOURCE_NOT_FOUND, RESOURCE_STATUS, and for a volume as the source what `shareVolumes` throws
 */
export async function createImage(context: MapperContext, wanted: NewImage): Promise<ResourceRow> {
  let row: ResourceRow | undefined
  const { isExported } = await shareFrom(context, wanted.fromId, async (tx, source) => {
    row = await insertResource(context, tx, {
      id: context.newId(),
      projectId: wanted.projectId,
      kind: 'image',
      name: wanted.name,
      sizeBytes: source.sizeBytes,
      root: source.root,
      poolId: source.row.home_pool_id,
      parentId: source.row.id,
      status: 'available',
    })
  })
  if (row !== undefined && !isExported) await context.exporter.flushed([row.home_pool_id])
  return row as ResourceRow
}

/**
 * Calls `makeRows` with the durable content of any resource, in the transaction that makes the new rows durable, and with the
 * locks of the resources `alsoLocked`. `isExported`: the export of the source's home has them.
 */
export async function shareFrom(
  context: MapperContext,
  fromId: string,
  makeRows: (tx: CatalogTransaction, source: Source) => Promise<void>,
  alsoLocked: readonly string[] = [],
): Promise<{ isExported: boolean }> {
  const { kind } = await requireResource(context.catalog.db, fromId)
  if (kind === 'volume') {
    const makeRowsOf = async (tx: CatalogTransaction, shared: readonly SharedRoot[]): Promise<void> => {
      for (const { volume, root, sizeBytes } of shared) await makeRows(tx, { row: volume, root, sizeBytes })
    }
    await shareVolumes(context, [fromId], swapDeadlineMs, makeRowsOf, alsoLocked)
    return { isExported: true }
  }
  await context.locks.run(alsoLocked, async () => {
    await context.catalog.write(async (tx) => {
      const row = await requireResource(tx, fromId)
      requireAvailable(row)
      context.olderCatalog.requireNewest(row)
      await makeRows(tx, { row, root: rootOf(row), sizeBytes: row.size_bytes })
    })
  })
  return { isExported: false }
}

async function insertVolume(
  context: MapperContext,
  tx: CatalogTransaction,
  part: { id: string; wanted: NewVolume; spare: Spare; source: Source | null; limit: OvercommitLimit | null },
): Promise<ResourceRow> {
  const { id, wanted, spare, source, limit } = part
  await requireProvisionable(tx, limit, wanted.sizeBytes)
  const row = await insertResource(context, tx, {
    id,
    projectId: wanted.projectId,
    kind: 'volume',
    name: wanted.name,
    sizeBytes: wanted.sizeBytes,
    root: source?.root ?? uniformRoot(spare.alias),
    poolId: wanted.poolId,
    parentId: source?.row.id ?? null,
    status: 'available',
  })
  if (source !== null && source.row.home_pool_id !== wanted.poolId)
    await noteForeignTree(tx, wanted.poolId, id, source.row.home_pool_id)
  // Every page of a shared root has a smaller number than the next one; a fresh volume has no pages.
  await insertWritable(context, tx, row, spare, source === null ? 0 : context.pageIds.next)
  return row
}

/** The rows of what is written like a volume: a fresh journal (lsn 0) beside its own active layer. Inside a write. */
export async function insertWritable(
  context: MapperContext,
  tx: CatalogTransaction,
  row: ResourceRow,
  active: Spare,
  sharedBelowPage: number,
): Promise<void> {
  await context.layers.assign(tx, active, { volumeId: row.id, projectId: row.project_id, epoch: 0 }, 'active')
  await tx
    .insertInto('volumes')
    .values({
      id: row.id,
      project_id: row.project_id,
      active_alias: active.alias,
      next_alias: null,
      map_lsn: 0,
      epoch: 0,
      shared_below_page: sharedBelowPage,
      throttle: null,
    })
    .execute()
}

export interface NewResource {
  readonly id: string
  readonly projectId: string
  readonly kind: ResourceKind
  readonly name: string
  readonly sizeBytes: number
  readonly root: RootRef
  readonly poolId: string
  readonly parentId: string | null
  readonly status: 'creating' | 'available'
}

/** The row of anything but a snapshot. Inside a write. @throws AtollError POOL_DRAINING */
export async function insertResource(context: MapperContext, tx: CatalogTransaction, wanted: NewResource): Promise<ResourceRow> {
  const now = context.clock.nowMs()
  await requireNotDraining(tx, wanted.poolId)
  return await tx
    .insertInto('resources')
    .values({
      id: wanted.id,
      project_id: wanted.projectId,
      kind: wanted.kind,
      name: wanted.name,
      size_bytes: wanted.sizeBytes,
      root_word: wanted.root.word,
      root_crc: wanted.root.crc,
      home_pool_id: wanted.poolId,
      parent_id: wanted.parentId,
      volume_id: null,
      status: wanted.status,
      created_at: now,
      updated_at: now,
    })
    .returningAll()
    .executeTakeFirstOrThrow()
}

function sizeBelowSource(sizeBytes: number, source: Source): AtollError {
  const { row, sizeBytes: minBytes } = source
  return new AtollError(
    'SIZE_INVALID',
    `size ${sizeBytes} is smaller than the ${row.kind} "${row.name}" it is made from, which has ${minBytes} bytes`,
    {
      values: { sizeBytes, minBytes, sourceId: row.id },
    },
  )
}
