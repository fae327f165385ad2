/**
 * Files: resources that are written once, from the start to the end, and never again.
 *
 * Rules:
 * - While it is written, a file is a row with status `creating` over a layer of its own that nobody wrote before, so its whole
 *   map is that layer: no pages, no journal, no lease and no next layer are needed, and the layer's bytes are the content.
 * - Finishing makes the bytes durable, and then the row `available` in one transaction, which also ends the layer's time as an
 *   active one; its seal is nobody's to wait for. Nothing is written behind the content, so the size need not be known before.
 * - A file that is not finished is of no use after a restart: whoever finds one gives it up.
 * - What a finished file replaces goes in the same transaction. A file that is being read is not deleted there: it is
 *   `deleting` from then on, opened by nobody any more, and goes after its last reader.
 *
 * What files are called, and which of them a name means, is the caller's: it writes these rows inside our transactions.
 */
import { assert, volumeSizeMaxBytes, type CatalogTransaction, type ResourceRow } from '@atoll/core'
import type { Device } from '@atoll/native'
import type { MapperContext } from './context.ts'
import { insertResource, insertWritable, shareFrom } from './create.ts'
import { deleteLocked } from './delete.ts'
import { becomeAvailable, sealFinishedLater } from './import-target.ts'
import { holeRoot, uniformRoot } from './root.ts'
import { requireResource, requireVolumeRow } from './rows.ts'

export interface FileTarget {
  readonly resourceId: string
  /** Reads as zeros; the content begins at 0. Nothing but writes, then `finishFile` or `abortFile`, which close it. */
  readonly device: Device
}

export interface NewFile {
  readonly projectId: string
  /** For messages; 1 to 255 characters. */
  readonly name: string
  readonly poolId: string
}

/** Takes a file away inside a transaction; its lock is held. */
export type DropFile = (id: string) => Promise<void>

/** The rows around a file, in the transaction that makes it available. */
export interface FileRows {
  /** Files that `write` may drop. */
  readonly mayDrop: readonly string[]
  readonly write: (tx: CatalogTransaction, file: ResourceRow, drop: DropFile) => Promise<void>
}

/**
 * Makes a file to write into.
 * @throws AtollError POOL_UNAVAILABLE, POOL_CLOSED, NO_SPACE
 */
export async function beginFile(context: MapperContext, wanted: NewFile): Promise<FileTarget> {
  const [spare] = await context.layers.take([wanted.poolId])
  assert(spare !== undefined, 'no spare was given')
  const id = context.newId()
  try {
    await context.catalog.write(async (tx) => {
      const row = await insertResource(context, tx, {
        ...wanted,
        id,
        kind: 'file',
        // The bytes are counted at the end.
        sizeBytes: 0,
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
  try {
    const { device } = await context.engine.openDevice({
      volumeId: id,
      sizeBytes: volumeSizeMaxBytes,
      epoch: 0,
      map: context.engine.uniformMap(spare.alias),
      mapLsn: 0,
      layers: await context.layers.refs([spare.alias], wanted.poolId),
      active: spare.alias,
      next: null,
    })
    return { resourceId: id, device }
  } catch (error) {
    await abandon(context, id)
    throw error
  }
}

/**
 * The first `sizeBytes` bytes of the device are the content: the file becomes available. Returns when that is durable.
 * @throws AtollError NO_SPACE, IO_ERROR, DEVICE_POISONED, and what `rows.write` throws; it is then still unfinished
 */
export async function finishFile(
  context: MapperContext,
  target: FileTarget,
  sizeBytes: number,
  rows: FileRows,
): Promise<ResourceRow> {
  const { resourceId, device } = target
  await device.flush()
  assert(device.stats().lsn === 0, 'a slot of a file changed its owner')
  await device.close()
  return await context.locks.run([resourceId, ...rows.mayDrop], async () => {
    const volume = await requireVolumeRow(context.catalog.db, resourceId)
    const dropped: string[] = []
    const row = await context.catalog.write(async (tx) => {
      dropped.length = 0
      const file = await becomeAvailable(context, tx, volume, sizeBytes)
      await rows.write(tx, file, async (id) => await dropInside(context, tx, id, dropped))
      return file
    })
    for (const id of dropped) context.open.forget(id)
    await sealFinishedLater(context, row, volume)
    return row
  })
}

/** Gives an unfinished file up: its row is gone, its space comes back with the next reclaim. */
export async function abortFile(context: MapperContext, target: FileTarget): Promise<void> {
  try {
    await target.device.close()
  } catch (error) {
    context.log.debug({ err: error, resourceId: target.resourceId }, 'what an aborted file wrote last was not stored')
  }
  await abandon(context, target.resourceId)
}

async function abandon(context: MapperContext, id: string): Promise<void> {
  await context.locks.run([id], async () => {
    const row = await requireResource(context.catalog.db, id)
    // What failed may have failed after the commit that finished it: then it stays.
    if (row.status === 'creating') await deleteLocked(context, row, { withSnapshots: false })
  })
}

/**
 * Makes a file that shares the content of any resource, or (null) an empty one; no byte is copied.
 * @throws AtollError RESOURCE_NOT_FOUND, RESOURCE_STATUS, what `rows.write` throws, and for a volume as the source what
 * `shareVolumes` throws
 */
export async function createFile(
  context: MapperContext,
  wanted: NewFile,
  fromId: string | null,
  rows: FileRows,
): Promise<ResourceRow> {
  const dropped: string[] = []
  let row: ResourceRow | undefined
  const insert = async (
    tx: CatalogTransaction,
    content: Pick<Parameters<typeof insertResource>[2], 'sizeBytes' | 'root' | 'poolId' | 'parentId'>,
  ): Promise<void> => {
    dropped.length = 0
    const { projectId, name } = wanted
    row = await insertResource(context, tx, {
      id: context.newId(),
      projectId,
      kind: 'file',
      name,
      ...content,
      status: 'available',
    })
    await rows.write(tx, row, async (id) => await dropInside(context, tx, id, dropped))
  }
  if (fromId === null) {
    await context.locks.run(rows.mayDrop, async () => {
      const empty = { sizeBytes: 0, root: holeRoot, poolId: wanted.poolId, parentId: null }
      await context.catalog.write(async (tx) => await insert(tx, empty))
    })
  } else {
    await shareFrom(
      context,
      fromId,
      async (tx, { row: source, root, sizeBytes }) => {
        await insert(tx, { sizeBytes, root, poolId: source.home_pool_id, parentId: source.id })
      },
      rows.mayDrop,
    )
  }
  for (const id of dropped) context.open.forget(id)
  if (row !== undefined) await context.exporter.flushed([row.home_pool_id])
  return row as ResourceRow
}

/**
 * Runs a transaction that takes files away; durable on return, also on a full disk.
 * @throws what `write` throws
 */
export async function dropFiles(
  context: MapperContext,
  ids: readonly string[],
  write: (tx: CatalogTransaction, drop: DropFile) => Promise<void>,
): Promise<void> {
  await context.locks.run(ids, async () => {
    const dropped: string[] = []
    await context.catalog.write(
      async (tx) => {
        dropped.length = 0
        await write(tx, async (id) => await dropInside(context, tx, id, dropped))
      },
      { emergency: true },
    )
    for (const id of dropped) context.open.forget(id)
  })
  await context.exporter.flush()
}

async function dropInside(context: MapperContext, tx: CatalogTransaction, id: string, dropped: string[]): Promise<void> {
  if (context.open.get(id) === undefined) {
    await tx.deleteFrom('resources').where('id', '=', id).where('kind', '=', 'file').execute()
    dropped.push(id)
    return
  }
  await tx.deleteFrom('files').where('id', '=', id).execute()
  await tx.updateTable('resources').set({ status: 'deleting' }).where('id', '=', id).where('kind', '=', 'file').execute()
}
