/**
 * What an earlier process left unfinished, put right before anything is served.
 *
 * Rules (each step may be interrupted and is done again at the next start):
 * - Pages of a range that is still recorded belong to a checkpoint that was not committed: deleted.
 * - Layers are removed and sealed only when the pool's export has what let them go (`flushed`): until then an import needs them.
 *   Where the export cannot be written they wait for a later reclaim.
 * - A layer in `making` whose file is empty: nothing refers to it; its file is removed, then its row.
 * - A layer in `making`, or a spare of nobody, whose file is not empty: this catalog is an older one, and in a newer one the
 *   layer is a volume's. The row goes and the file stays, as one without a row.
 * - A layer in `condemned`: nothing refers to it, and at start nobody reads; its file is removed, then its row.
 * - A layer in `closing`: the transaction that put another one in its place is committed; it is sealed.
 * - A spare whose file is missing is no spare: its row goes.
 * - A file without a row is reported and left alone (I11): after a restore of an older catalog it may be the newest data.
 */
import { isAtollError } from '@atoll/core'
import type { LayerListing, PoolHandle } from '@atoll/southbound'
import type { MapperContext } from './context.ts'
import { deletePageRange } from './staged-pages.ts'

/** Files removed with one commit of their rows. */
const removeBatch = 64
/** Unknown files named in the log; `unknownLayers` lists all of them. */
const namedUnknownMax = 20

/** No journal goes further, and no lease. */
export const lsnMax = Number.MAX_SAFE_INTEGER - 1
export const epochMax = Number.MAX_SAFE_INTEGER

/** In the table `meta`: no page id below this is given out. */
export const pageIdsFromKey = 'page_ids_from'

type CatalogOnly = Pick<MapperContext, 'catalog'>

/** The first page number that was never used, after the pages of unfinished checkpoints were deleted. */
export async function recoverPages(context: CatalogOnly): Promise<number> {
  const { db, pages } = context.catalog
  const ranges = await db.selectFrom('page_ranges').selectAll().execute()
  for (const range of ranges) await deletePageRange(context, range.first_page_id, range.end_page_id)
  const shared = await db
    .selectFrom('volumes')
    .select((query) => query.fn.max('shared_below_page').as('highest'))
    .executeTakeFirst()
  // Ids that an import left free for other pools of the same lost catalog.
  const kept = await db.selectFrom('meta').select('value').where('key', '=', pageIdsFromKey).executeTakeFirst()
  // Not below any shared_below_page either: a new page of a volume is then known to be its own.
  return Math.max((await pages.maxId()) + 1, Number(shared?.highest ?? 0), Number(kept?.value ?? 0), 1)
}

/**
 * Puts the layers of a pool right that was just opened. What cannot be done now is logged and stays for the next start.
 * @throws AtollError CATALOG_ERROR and the like; errors of the pool are logged
 */
export async function recoverPool(context: MapperContext, poolId: string): Promise<void> {
  const { log, pools } = context
  const pool = pools.handle(poolId)
  const listing = new Map((await pool.listLayers()).map((layer) => [layer.id, layer]))
  await disownWritten(context, poolId, listing)
  await removeMaking(context, pool, poolId)
  await dropMissingSpares(context, poolId, listing)
  await dropStraySpares(context, poolId)
  await removeCondemned(context, poolId)
  await sealClosing(context, poolId)
  const unknown = await unknownLayers(context, poolId)
  if (unknown.length > 0) {
    log.warn(
      { poolId, layerIds: unknown.slice(0, namedUnknownMax), count: unknown.length },
      'the pool has layers that the catalog does not know: they are left alone',
    )
  }
}

/** Layers of a pool that have no row: reported, never deleted (I11). */
export async function unknownLayers(context: MapperContext, poolId: string): Promise<string[]> {
  const listing = await context.pools.handle(poolId).listLayers()
  // The rows after the listing: a layer that is being made has its row before its file.
  const rows = await context.catalog.db.selectFrom('layers').select('id').execute()
  const known = new Set(rows.map((row) => row.id))
  return listing.map((layer) => layer.id).filter((id) => !known.has(id))
}

/**
 * I11: layers that nobody was given, and that were written all the same. A new volume would read what is in them, and a removal
 * would take it from whoever has the newer catalog.
 */
async function disownWritten(context: MapperContext, poolId: string, listing: ReadonlyMap<string, LayerListing>): Promise<void> {
  const unused = [...(await layersIn(context, poolId, 'making')), ...(await layersIn(context, poolId, 'spare'))]
  const written = unused.filter((row) => {
    const file = listing.get(row.id)
    return row.volume_id === null && file !== undefined && (file.lengthBytes > 0 || file.allocatedBytes > 0)
  })
  if (written.length === 0) return
  context.log.error(
    { poolId, layerIds: written.map((row) => row.id) },
    'layers that this catalog never used have been written: it is older than the pool; their files are kept, without a row',
  )
  await context.layers.forget(written.map((row) => row.alias))
}

async function removeMaking(context: MapperContext, pool: PoolHandle, poolId: string): Promise<void> {
  const rows = await layersIn(context, poolId, 'making')
  await removeAll(context, pool, rows)
}

/** Spares that are nobody's and have no file: whoever made them a spare lost the file since. */
async function dropMissingSpares(
  context: MapperContext,
  poolId: string,
  listing: ReadonlyMap<string, LayerListing>,
): Promise<void> {
  const spares = (await layersIn(context, poolId, 'spare')).filter((row) => row.volume_id === null && !listing.has(row.id))
  if (spares.length > 0)
    context.log.warn(
      { poolId, layerIds: spares.map((row) => row.id) },
      'files of spare layers are missing: other spares are made',
    )
  await context.layers.forget(spares.map((row) => row.alias))
}

/** A spare with a volume that does not name it as its next layer may have been written: it goes. */
async function dropStraySpares(context: MapperContext, poolId: string): Promise<void> {
  const { db } = context.catalog
  const spares = (await layersIn(context, poolId, 'spare')).filter((row) => row.volume_id !== null)
  if (spares.length === 0) return
  const named = new Set((await db.selectFrom('volumes').select('next_alias').execute()).map((row) => row.next_alias))
  for (const stray of spares.filter((row) => !named.has(row.alias))) {
    await context.catalog.write(async (tx) => await context.layers.move(tx, stray.alias, ['spare'], 'condemned'))
  }
}

/**
 * Removes condemned layers of a pool: the files, then the rows. The caller has made sure that nothing reads them any more:
 * at start nobody does, later `readBarrier` after they were condemned.
 */
export async function removeCondemned(
  context: MapperContext,
  poolId: string,
): Promise<{ freedBytes: number; layerCount: number; aliases: number[] }> {
  const rows = await layersIn(context, poolId, 'condemned')
  const nothing = { freedBytes: 0, layerCount: 0, aliases: [] }
  // After the rows were read: the export then has every commit that condemned one of them.
  if (rows.length === 0 || !(await context.exporter.flushedForPunch(poolId))) return nothing
  const pool = context.pools.handle(poolId)
  const sizes = new Map((await pool.listLayers()).map((layer) => [layer.id, layer.allocatedBytes]))
  const removed = await removeAll(context, pool, rows)
  const freedBytes = removed.reduce((sum, row) => sum + (sizes.get(row.id) ?? 0), 0)
  return { freedBytes, layerCount: removed.length, aliases: removed.map((row) => row.alias) }
}

interface LayerIds {
  readonly alias: number
  readonly id: string
}

async function removeAll(context: MapperContext, pool: PoolHandle, rows: readonly LayerIds[]): Promise<LayerIds[]> {
  const removed: LayerIds[] = []
  for (let start = 0; start < rows.length; start += removeBatch) {
    const batch = rows.slice(start, start + removeBatch)
    const results = await Promise.allSettled(batch.map(async (row) => await removeOne(pool, row.id)))
    const gone = batch.filter((_, index) => results[index]?.status === 'fulfilled')
    for (const result of results) {
      if (result.status === 'rejected')
        context.log.warn(
          { err: result.reason as unknown, poolId: pool.poolId },
          'a layer could not be removed; it is tried again later',
        )
    }
    await context.layers.forget(gone.map((row) => row.alias))
    removed.push(...gone)
  }
  return removed
}

async function removeOne(pool: PoolHandle, id: string): Promise<void> {
  try {
    await pool.removeLayer(id)
  } catch (error) {
    if (!isAtollError(error, 'NO_SPACE')) throw error
    await pool.releaseReserve()
    await pool.removeLayer(id)
  }
}

/** Seals layers whose place another one has taken, where the process died or the backend failed before that was done. */
export async function sealClosing(context: MapperContext, poolId: string): Promise<void> {
  for (const { volume_id: volumeId } of await layersIn(context, poolId, 'closing')) {
    if (volumeId === null) await sealClosingOf(context, poolId, null)
    // Under the volume's lock, because a swap that is being committed right now seals its layer itself.
    else await context.locks.run([volumeId], async () => await sealClosingOf(context, poolId, volumeId))
  }
}

async function sealClosingOf(context: MapperContext, poolId: string, volumeId: string | null): Promise<void> {
  const pool = context.pools.handle(poolId)
  const closing = (await layersIn(context, poolId, 'closing')).filter((row) => row.volume_id === volumeId)
  if (closing.length === 0 || !(await context.exporter.flushed([poolId]))) return
  for (const layer of closing) {
    try {
      if (volumeId !== null) await sealFile(context, pool, volumeId, layer.id)
      await context.catalog.write(async (tx) => await context.layers.move(tx, layer.alias, ['closing'], 'sealed'), {
        durable: false,
      })
    } catch (error) {
      context.log.warn({ err: error, poolId, layerId: layer.id }, 'a closed layer could not be sealed; it is tried again later')
    }
  }
}

/** Ends the journal of a layer that is not written any more; one that is sealed already stays as it is. */
export async function sealFile(context: MapperContext, pool: PoolHandle, volumeId: string, layerId: string): Promise<void> {
  const volume = await context.catalog.db
    .selectFrom('volumes')
    .select(['map_lsn', 'epoch'])
    .where('id', '=', volumeId)
    .executeTakeFirst()
  // The journal ends at or before the catalog's lsn, since the transaction that closed the layer took its map up to there, and
  // no epoch in it is above the volume's. An image has no volume row any more; nothing was written after its last frame.
  const seal = { volumeId, epoch: volume?.epoch ?? epochMax, finalLsn: volume?.map_lsn ?? lsnMax, successor: null }
  try {
    await pool.sealLayer(layerId, seal)
  } catch (error) {
    // Sealed already, with the values of the swap itself: only the state in the catalog was lost.
    if (!isAtollError(error, 'LAYER_READ_ONLY') && !isAtollError(error, 'LAYER_EXISTS')) throw error
  }
}

async function layersIn(context: CatalogOnly, poolId: string, state: 'making' | 'spare' | 'closing' | 'condemned') {
  return await context.catalog.db
    .selectFrom('layers')
    .innerJoin('replicas', 'replicas.layer_alias', 'layers.alias')
    .select(['layers.alias', 'layers.id', 'layers.volume_id'])
    .where('replicas.pool_id', '=', poolId)
    .where('layers.state', '=', state)
    .execute()
}
