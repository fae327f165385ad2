/**
 * What an earlier process left unfinished, put right before anything is served.
 *
 * Rules (each step may be interrupted and is done again at the next start):
 * - A row that says that nobody needs something is not believed where that would destroy what a map or a volume names
 *   (references.ts): what contradicts is kept as it is, logged, never given to anybody, and left to `atoll check`. The maps are
 *   walked only where there is something to destroy, or where a row cannot be true.
 * - Pages of a range that is still recorded belong to a checkpoint that was not committed: deleted.
 * - Layers are removed and sealed only when the pool's export has what let them go (`flushed`): until then an import needs them.
 *   Where the export cannot be written they wait for a later reclaim.
 * - A layer in `making` whose file is empty and that has no journal: nothing refers to it; its file is removed, then its row.
 * - A layer in `making`, or a spare of nobody, that was used (its file is not empty, or it has a journal): this catalog is an
 *   older one, and in a newer one the layer is a volume's. The row goes and the file stays, as one without a row.
 * - A layer in `condemned`: nothing refers to it, and at start nobody reads; its file is removed, then its row, in every pool.
 * - A replica in `condemned`, of a layer that is none: nobody reads it there any more, or it was never complete. Its file is removed,
 *   then its row; but only while the layer lies complete in another pool, and no map of the pool's own resources names it.
 * - A replica that is being filled by a job that is there no more is condemned; one that was complete before stays as it is.
 * - A layer in `closing`: the transaction that put another one in its place is committed; it is sealed.
 * - A spare whose file is missing is no spare: its row goes.
 * - A file without a row, also one of a layer that is known in other pools only, is reported and left alone (I11): after a restore of
 *   an older catalog it may be the newest data.
 */
import { isAtollError, type LayerState } from '@atoll/core'
import type { PoolHandle } from '@atoll/southbound'
import type { MapperContext } from './context.ts'
import { readReferences, type References, writtenLayers } from './references.ts'
import { deletePageRange } from './staged-pages.ts'

/** Files removed with one commit of their rows. */
const removeBatch = 64
/** Pages looked at together. */
const pagesAtOnce = 2048
/** Unknown files named in the log; `unknownLayers` lists all of them. */
const namedUnknownMax = 20

/** No journal goes further, and no lease. */
export const lsnMax = Number.MAX_SAFE_INTEGER - 1
export const epochMax = Number.MAX_SAFE_INTEGER

/** In the table `meta`: no page id below this is given out. */
export const pageIdsFromKey = 'page_ids_from'

const keptBecause = 'maps or volumes name them (or a map that cannot be read may): they are kept; see atoll check'

const keptReplica =
  'replicas are to be removed, and their layers cannot be seen in other pools, or maps of this one name them: they are kept for now'

type CatalogOnly = Pick<MapperContext, 'catalog'>

/** The first page number that was never used, after the pages of unfinished checkpoints were deleted. */
export async function recoverPages(context: Pick<MapperContext, 'catalog' | 'engine' | 'log'>): Promise<number> {
  const { db, pages } = context.catalog
  await deleteUnfinished(context)
  const shared = await db
    .selectFrom('volumes')
    .select((query) => query.fn.max('shared_below_page').as('highest'))
    .executeTakeFirst()
  // Ids that an import left free for other pools of the same lost catalog.
  const kept = await db.selectFrom('meta').select('value').where('key', '=', pageIdsFromKey).executeTakeFirst()
  // Not below any shared_below_page either: a new page of a volume is then known to be its own.
  return Math.max((await pages.maxId()) + 1, Number(shared?.highest ?? 0), Number(kept?.value ?? 0), 1)
}

async function deleteUnfinished(context: Pick<MapperContext, 'catalog' | 'engine' | 'log'>): Promise<void> {
  const { db, pages } = context.catalog
  let references: References | undefined
  for (const { first_page_id: first, end_page_id: end } of await db.selectFrom('page_ranges').selectAll().execute()) {
    for (let from = first; from < end;) {
      const ids = await pages.listIds(from, end, pagesAtOnce)
      if (ids.length > 0) references ??= await readReferences(context)
      const named = ids.find((id) => references?.hasPage(id) === true)
      if (named !== undefined) {
        context.log.error(
          { firstPageId: first, endPageId: end, pageId: named },
          'pages are recorded of an unfinished checkpoint, and are part of a map: they are kept; see atoll check',
        )
        break
      }
      if (ids.length === pagesAtOnce) from = (ids.at(-1) ?? end) + 1
      else {
        await deletePageRange(context, first, end)
        break
      }
    }
  }
}

/**
 * Puts the layers of a pool right that was just opened. What cannot be done now is logged and stays for the next start.
 * @throws AtollError CATALOG_ERROR and the like; errors of the pool are logged
 */
export async function recoverPool(context: MapperContext, poolId: string): Promise<void> {
  const { log, pools } = context
  const pool = pools.handle(poolId)
  let walk: Promise<References> | undefined
  const references = async (): Promise<References> => await (walk ??= context.pins.run(async () => await readReferences(context)))
  await dropStaleFills(context, poolId)
  const kept = await sortOutUnused(context, pool, references)
  context.layers.withhold(kept)
  await removeMaking(context, pool, kept)
  await removeCondemned(context, poolId, { references })
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
  const listing = await context.pools.handle(poolId).listLayerIds()
  // The rows after the listing: a layer that is being made has its row before its file.
  const rows = await context.catalog.db
    .selectFrom('replicas')
    .innerJoin('layers', 'layers.alias', 'replicas.layer_alias')
    .select('layers.id')
    .where('replicas.pool_id', '=', poolId)
    .execute()
  const known = new Set(rows.map((row) => row.id))
  return listing.filter((id) => !known.has(id))
}

/** Jobs that are not finished go on after a start; what any other was filling is of no use. */
async function dropStaleFills({ catalog, layers }: MapperContext, poolId: string): Promise<void> {
  const stale = await catalog.db
    .selectFrom('replicas')
    .select(['layer_alias', 'state'])
    .where('pool_id', '=', poolId)
    .where('filling_job', 'is not', null)
    .where('state', 'in', ['filling', 'complete'])
    .where('filling_job', 'not in', (query) =>
      query.selectFrom('jobs').select('id').where('state', 'in', ['queued', 'running', 'paused']),
    )
    .execute()
  if (stale.length === 0) return
  await catalog.write(async (tx) => {
    for (const { layer_alias: alias, state } of stale) {
      await tx
        .updateTable('replicas')
        // What was never complete goes on to say so.
        .set(state === 'filling' ? { state: 'condemned' } : { filling_job: null })
        .where('layer_alias', '=', alias)
        .where('pool_id', '=', poolId)
        .execute()
    }
  })
  layers.invalidate(stale.map((row) => row.layer_alias))
}

interface UnusedLayer extends LayerIds {
  readonly state: LayerState
  readonly volume_id: string | null
}

/**
 * Layers that are called unused, and are not as such a layer is: what nobody names is dealt with by what it is. Returns those
 * that somebody names.
 */
async function sortOutUnused(
  context: MapperContext,
  pool: PoolHandle,
  references: () => Promise<References>,
): Promise<Set<number>> {
  const { layers } = context
  const unused = await unusedLayers(context, pool.poolId)
  const ids = unused.map((row) => row.id)
  const [lengths, allocated] = [await pool.store.lengthBytes(ids), await pool.store.allocatedBytes(ids)]
  const written = await writtenLayers(
    context,
    unused.map((row) => row.alias),
  )
  const odd: { row: UnusedLayer; isUsed: boolean }[] = []
  for (const [index, row] of unused.entries()) {
    // -1: it is not there.
    const [lengthBytes = -1, allocatedBytes = -1] = [lengths[index], allocated[index]]
    const isUsed = lengthBytes > 0 || allocatedBytes > 0 || (await hasJournal(pool, row.id))
    const isPlain = row.volume_id === null && !isUsed && (row.state === 'making' || lengthBytes >= 0)
    if (!isPlain || written.has(row.alias)) odd.push({ row, isUsed })
  }
  if (odd.length === 0) return new Set()
  const { hasLayer } = await references()
  const kinds = Map.groupBy(odd, ({ row, isUsed }) => {
    if (written.has(row.alias) || hasLayer(row.alias)) return 'named'
    if (row.state === 'spare' && row.volume_id !== null) return 'stray'
    return isUsed || row.state === 'making' ? 'used' : 'missing'
  })
  const rowsOf = (kind: 'named' | 'stray' | 'used' | 'missing') => (kinds.get(kind) ?? []).map(({ row }) => row)
  tell(context, pool.poolId, rowsOf('named'), `layers are recorded as unused, and ${keptBecause}`)
  // A spare that was a volume's may have been written: it is nobody's any more.
  for (const { alias } of rowsOf('stray'))
    await context.catalog.write(async (tx) => await layers.move(tx, alias, ['spare'], 'condemned'))
  // I11: a new volume would read what is in them, and a removal would take it from whoever has the newer catalog.
  tell(
    context,
    pool.poolId,
    rowsOf('used'),
    'layers that this catalog never used have been written: it is older than the pool; their files are kept, without a row',
  )
  // Whoever made them a spare lost the file since.
  tell(context, pool.poolId, rowsOf('missing'), 'files of spare layers are missing: other spares are made', 'warn')
  await layers.forget([...rowsOf('used'), ...rowsOf('missing')].map((row) => row.alias))
  return new Set(rowsOf('named').map((row) => row.alias))
}

/** Layers in `making`, and spares but those that are the next layer of their volume. */
async function unusedLayers(context: CatalogOnly, poolId: string): Promise<UnusedLayer[]> {
  return await context.catalog.db
    .selectFrom('layers')
    .innerJoin('replicas', 'replicas.layer_alias', 'layers.alias')
    .leftJoin('volumes', (join) =>
      join.onRef('volumes.next_alias', '=', 'layers.alias').onRef('volumes.id', '=', 'layers.volume_id'),
    )
    .select(['layers.alias', 'layers.id', 'layers.state', 'layers.volume_id'])
    .where('replicas.pool_id', '=', poolId)
    .where((query) =>
      query.or([
        query('layers.state', '=', 'making'),
        query.and([query('layers.state', '=', 'spare'), query('volumes.id', 'is', null)]),
      ]),
    )
    .execute()
}

/** One that was written, or sealed: the mark of that stays as long as the layer. */
async function hasJournal(pool: PoolHandle, layerId: string): Promise<boolean> {
  try {
    return (await pool.store.inspectJournal(layerId, null, epochMax, lsnMax)).segmentCount > 0
  } catch (error) {
    if (isAtollError(error, 'IO_ERROR')) throw error
    // There is one, damaged as it is.
    return true
  }
}

function tell(
  context: MapperContext,
  poolId: string,
  rows: readonly LayerIds[],
  message: string,
  level: 'warn' | 'error' = 'error',
): void {
  if (rows.length > 0) context.log[level]({ poolId, layerIds: rows.map((row) => row.id) }, message)
}

async function removeMaking(context: MapperContext, pool: PoolHandle, kept: ReadonlySet<number>): Promise<void> {
  const rows = await layersIn(context, pool.poolId, 'making')
  await removeAll(
    context,
    pool,
    rows.filter((row) => !kept.has(row.alias)),
  )
}

/**
 * Removes condemned layers, and condemned replicas of others, of a pool: the files, then the rows. The caller has made sure that
 * nothing reads them any more: at start nobody does, later `readBarrier` after they were condemned. What a map or a volume names
 * stays: `mayName` says which layers maps did name not long ago (default: any), and these are looked for in the maps as they are now.
 */
export async function removeCondemned(
  context: MapperContext,
  poolId: string,
  {
    mayName = () => true,
    references = async () => await context.pins.run(async () => await readReferences(context)),
  }: { mayName?: (alias: number) => boolean; references?: () => Promise<References> } = {},
): Promise<{ freedBytes: number; layerCount: number; aliases: number[] }> {
  const nothing = { freedBytes: 0, layerCount: 0, aliases: [] }
  const replicas = await removableReplicas(context, poolId)
  const whole = await layersIn(context, poolId, 'condemned')
  const condemned = [...whole, ...replicas.rows]
  if (condemned.length === 0) return nothing
  const pool = context.pools.handle(poolId)
  const sizes = await pool.store.allocatedBytes(condemned.map((row) => row.id))
  const allocatedBytes = new Map(condemned.map((row, index) => [row.alias, Math.max(0, sizes[index] ?? 0)]))
  const isNamed = await namedAmong(context, pool, whole, { allocatedBytes, mayName, references })
  const unneeded = whole.filter((row) => !isNamed(row))
  // What lies elsewhere as well must be known there.
  const rows = (await context.exporter.flushed(replicas.elsewhere)) ? [...unneeded, ...replicas.rows] : unneeded
  // After the rows were read: the export then has every commit that condemned one of them.
  if (rows.length === 0 || !(await context.exporter.flushedForPunch(poolId))) return nothing
  const aliases = (await removeAll(context, pool, rows)).map((row) => row.alias)
  const freedBytes = aliases.reduce((sum, alias) => sum + (allocatedBytes.get(alias) ?? 0), 0)
  return { freedBytes, layerCount: aliases.length, aliases }
}

/**
 * Condemned replicas of a pool whose layers lie complete in another one, from which everybody reads; and these other pools. What does
 * not is logged, and stays.
 */
async function removableReplicas(
  context: MapperContext,
  poolId: string,
): Promise<{ rows: readonly LayerIds[]; elsewhere: ReadonlySet<string> }> {
  const elsewhere = new Set<string>()
  const condemned = await context.catalog.db
    .selectFrom('replicas')
    .innerJoin('layers', 'layers.alias', 'replicas.layer_alias')
    .select(['layers.alias', 'layers.id', 'layers.volume_id', 'replicas.filling_job'])
    .where('replicas.pool_id', '=', poolId)
    .where('replicas.state', '=', 'condemned')
    .where('layers.state', '!=', 'condemned')
    .execute()
  if (condemned.length === 0) return { rows: [], elsewhere }
  const replicas = await context.layers.replicasOf(condemned.map((row) => row.alias))
  // What was never complete was read by nobody.
  const wasComplete = condemned.some((row) => row.filling_job === null)
  const own = wasComplete ? await context.pins.run(async () => await readReferences(context, poolId)) : undefined
  const rows: LayerIds[] = []
  for (const row of condemned) {
    const others = (replicas.get(row.alias) ?? []).filter((other) => other.pool_id !== poolId && other.state === 'complete')
    const primary = others.find((other) => other.is_primary)
    const isNamed = row.filling_job === null && own?.hasLayer(row.alias) === true
    if (primary === undefined || isNamed || !(await isThere(context, primary.pool_id, row.id))) {
      tell(context, poolId, [row], keptReplica, 'warn')
      continue
    }
    rows.push(row)
    for (const other of others) elsewhere.add(other.pool_id)
  }
  return { rows, elsewhere }
}

/** False also while that cannot be seen. */
async function isThere({ pools }: MapperContext, poolId: string, layerId: string): Promise<boolean> {
  try {
    return (await pools.find(poolId)?.layerExists(layerId)) === true
  } catch {
    return false
  }
}

/** Which condemned layers stay. One that holds nothing and was never sealed is part of nothing but what wrote it. */
async function namedAmong(
  context: MapperContext,
  pool: PoolHandle,
  condemned: readonly LayerIds[],
  options: {
    allocatedBytes: ReadonlyMap<number, number>
    mayName: (alias: number) => boolean
    references: () => Promise<References>
  },
): Promise<(row: LayerIds) => boolean> {
  const written = await writtenLayers(
    context,
    condemned.map((row) => row.alias),
  )
  const asked: LayerIds[] = []
  for (const row of condemned) {
    if (!options.mayName(row.alias)) continue
    if ((options.allocatedBytes.get(row.alias) ?? 0) > 0 || (await hasJournal(pool, row.id))) asked.push(row)
  }
  const references = asked.length === 0 ? undefined : await options.references()
  const named = new Set([...written, ...asked.map((row) => row.alias).filter((alias) => references?.hasLayer(alias))])
  const isNamed = (row: LayerIds): boolean => named.has(row.alias)
  tell(context, pool.poolId, condemned.filter(isNamed), `layers are to be removed, and ${keptBecause}`)
  return isNamed
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
    await context.layers.forgetReplicas(
      pool.poolId,
      gone.map((row) => row.alias),
    )
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
  for (const { volume_id: volumeId } of await closingIn(context, poolId)) {
    if (volumeId === null) await sealClosingOf(context, poolId, null)
    // Under the volume's lock, because a swap that is being committed right now seals its layer itself.
    else await context.locks.run([volumeId], async () => await sealClosingOf(context, poolId, volumeId))
  }
}

/** Without those that a volume still writes, whatever their rows say: a seal would cut their journals. */
async function closingIn(context: MapperContext, poolId: string) {
  const rows = await layersIn(context, poolId, 'closing')
  const written = await writtenLayers(
    context,
    rows.map((row) => row.alias),
  )
  tell(
    context,
    poolId,
    rows.filter((row) => written.has(row.alias)),
    'layers are to be sealed, and volumes write them: they are kept as they are; see atoll check',
  )
  return rows.filter((row) => !written.has(row.alias))
}

async function sealClosingOf(context: MapperContext, poolId: string, volumeId: string | null): Promise<void> {
  const pool = context.pools.handle(poolId)
  const closing = (await closingIn(context, poolId)).filter((row) => row.volume_id === volumeId)
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

async function layersIn(context: CatalogOnly, poolId: string, state: 'making' | 'closing' | 'condemned') {
  return await context.catalog.db
    .selectFrom('layers')
    .innerJoin('replicas', 'replicas.layer_alias', 'layers.alias')
    .select(['layers.alias', 'layers.id', 'layers.volume_id'])
    .where('replicas.pool_id', '=', poolId)
    .where('layers.state', '=', state)
    .execute()
}
