/**
 * Bringing the content of a pool back whose catalog is lost: rows and map pages from the pool's export, and then the journals of
 * its volumes.
 *
 * Rules:
 * - Nothing of the pool is changed before its rows are committed, all of them in one transaction; with it the catalog that the
 *   pool is taken from is recorded, so that a start after a crash opens the pool as ours. Every step may be done again.
 * - The export may be older than the journals, never newer (exporter.ts): volumes get an epoch far above the exported one and a
 *   lease that nobody released, so that the ordinary open replays them from the exported lsn on. It is far above that of any
 *   earlier import, too, which the pool's own epoch tells apart: a catalog may be lost again before it has exported anything.
 * - Aliases and page ids stay as they are, since maps name them. New ones are given far above, so that another pool of the same
 *   lost catalog still fits in afterwards.
 * - Its volumes may read from other pools of the lost catalog, and theirs from it (pool-links.ts). What is missing of those is named,
 *   and until the last of them that reads from this one is here, or given up, nothing of this one is freed: so the order does not matter.
 * - A layer may have replicas in several pools: each pool brings its own, and it is the same layer by its number and its id. A copy that
 *   was made for the readers of its own pool is read by nobody else before the primary is here.
 * - A resource may stand in the exports of two pools: the one with the higher `home_epoch` is the truth, in whatever order they come.
 * - A volume may write into another pool than its home (it is being moved). Without that one it is here and cannot be opened; with it, it
 *   is there (import-waiting.ts).
 * - What cannot be brought back is named with the reason; a snapshot whose volume cannot be becomes an image. While anything is missing or damaged, layers that nothing here refers
 *   to get no row: their files are kept (I11), because what is missing may be what refers to them.
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import {
  adminProject,
  AtollError,
  type CatalogTransaction,
  columnsOf,
  type ErrorCode,
  type ExportedRow,
  type ExportedTable,
  insertExportedRow,
  layerStates,
  type LayerState,
  lastLayerAlias,
  presentTables,
  type PoolRow,
  raiseLayerAliases,
  type ResourceKind,
  type ResourceRow,
  type ResourceUpdate,
  toAtollError,
} from '@atoll/core'
import { mapBytesMax, type Reach, type RootRef } from '@atoll/native'
import type { PoolInspection, PoolOwner } from '@atoll/southbound'
import type { MapperContext } from './context.ts'
import { type ExportDamage, loadExport, type LoadedExport } from './export-load.ts'
import { type ImportWaiting, readWaiting, writeWaiting } from './import-waiting.ts'
import { loadMap } from './maps.ts'
import { settleLocked } from './open.ts'
import { addLinks, type LinkedPool, namePools, readersOf, readLinks, sourcesOf } from './pool-links.ts'
import type { PoolService } from './pool-service.ts'
import { pageIdsFromKey, removeCondemned, unknownLayers } from './recover.ts'
import { rootOf } from './root.ts'

export interface PoolImport {
  /** A pool of this catalog that is not open because it belongs to another one; or, with `driver`, the name it gets. */
  readonly name: string
  readonly driver?: string
  readonly options?: Readonly<Record<string, string>>
  /** The pool may be another catalog's, which is lost. */
  readonly takeOver: boolean
  /** Says what would be brought back and changes nothing. */
  readonly dryRun: boolean
}

export interface ImportFailure {
  readonly kind: ResourceKind
  readonly id: string
  readonly name: string
  readonly code: ErrorCode
  readonly reason: string
}

/** A snapshot that is an image now, because what it is a snapshot of is not there. */
export interface SnapshotAsImage {
  readonly id: string
  /** Of the image. */
  readonly name: string
  readonly snapshotName: string
  readonly volumeId: string
}

export interface PoolImportReport {
  readonly poolId: string
  readonly name: string
  /** The catalog that the pool belonged to; null: nobody's. */
  readonly catalogId: string | null
  readonly dryRun: boolean
  /** When the last record of the export was written, milliseconds since 1970. Journals may go on after it. */
  readonly exportedAt: number | null
  /** What is here now and can be opened, by kind. */
  readonly broughtBack: Record<ResourceKind, number>
  readonly failed: readonly ImportFailure[]
  /** Snapshots of volumes that could not be brought back. */
  readonly asImages: readonly SnapshotAsImage[]
  /** Resources that a damaged or missing record may have changed or deleted. */
  readonly uncertain: readonly { readonly kind: ResourceKind; readonly id: string; readonly name: string }[]
  readonly damages: readonly ExportDamage[]
  /** Pools of the lost catalog that are not here, and that what lies in this one may read from. */
  readonly missingSources: readonly LinkedPool[]
  /** Pools of the lost catalog that are not here, and may read from this one: nothing of it is freed meanwhile. */
  readonly missingReaders: readonly LinkedPool[]
  /** Layers in the pool that nothing refers to; they are left alone. */
  readonly unknownLayers: readonly string[]
  readonly notes: readonly string[]
}

/** Far above whatever the lost catalog gave out after its last export. */
const epochsAhead = 2 ** 32
const aliasesAhead = 2 ** 16
const pageIdsAhead = 2 ** 32
const importHolder = 'import'
/** Pages inserted, and looked up, at a time. */
const pageBatch = 512
/** Rows inserted in one turn of the event loop. */
const rowsAtOnce = 200
const nameLengthMax = 255
const notBroughtBack = 'attachments, jobs and leases are not in an export: attach the volumes again'

/** The rows that go into the catalog, and what does not. */
interface Plan {
  readonly loaded: LoadedExport
  readonly resources: readonly ExportedRow[]
  readonly rows: ReadonlyMap<ExportedTable, readonly ExportedRow[]>
  readonly pageIds: readonly number[]
  readonly failed: readonly ImportFailure[]
  /** What goes in and cannot be opened before another pool is here, too. */
  readonly waiting: readonly ImportFailure[]
  readonly missingSources: readonly LinkedPool[]
  readonly missingReaders: readonly LinkedPool[]
  readonly asImages: readonly SnapshotAsImage[]
  /** Resources that are here already, of which this export has the newer state. */
  readonly replaced: ReadonlySet<string>
  /** Layers that are here already, from another pool. */
  readonly joined: ReadonlySet<number>
  /** What waits for other pools after this import. */
  readonly nextWaiting: ImportWaiting
}

/**
 * Imports a pool. Runs again after a crash or a failure at any point; of a pool that was imported before it says what is there.
 * @throws AtollError POOL_NOT_FOUND, NAME_TAKEN, POOL_OWNED_BY_OTHER without `takeOver`, POOL_LOCKED, POOL_UNAVAILABLE,
 * POOL_EXPORT_MISSING, POOL_IMPORT_CONFLICT, EXPORT_CORRUPT, FORMAT_VERSION
 */
export async function importPool(context: MapperContext, service: PoolService, wanted: PoolImport): Promise<PoolImportReport> {
  const { catalog, pools } = context
  const present = await catalog.db.selectFrom('pools').selectAll().where('name', '=', wanted.name).executeTakeFirst()
  const known = present === undefined ? undefined : await takenFrom(context, present.id)
  if (present !== undefined && (known !== undefined || pools.find(present.id) !== undefined)) {
    if (known === undefined) {
      throw new AtollError(
        'POOL_IMPORT_CONFLICT',
        `pool "${wanted.name}" is this home's own and open: there is nothing to import`,
        {
          values: { poolId: present.id },
        },
      )
    }
    return await finish(context, service, present, wanted, null, known)
  }
  if (present === undefined && wanted.driver === undefined) {
    throw new AtollError('POOL_NOT_FOUND', `there is no pool "${wanted.name}": say where it lies with --driver and --option`, {
      values: { name: wanted.name },
    })
  }
  if (present !== undefined && wanted.driver !== undefined) {
    throw new AtollError(
      'NAME_TAKEN',
      `there is a pool "${wanted.name}" already (${present.id}): leave --driver out, or take another name`,
      {
        values: { name: wanted.name, id: present.id },
      },
    )
  }
  const place = present ?? {
    id: context.newId(),
    driver: wanted.driver ?? '',
    options: pools.driver(wanted.driver ?? '').parseOptions(wanted.options ?? {}),
  }
  const inspection = await pools.inspect(place)
  let plan: Plan
  let owner: string | null
  try {
    plan = await planImport(context, await loadChecked(context, inspection, wanted))
    owner = inspection.owner?.catalogId ?? null
    requireTakeOver(context, inspection, plan, wanted)
    if (wanted.dryRun) return reportPlan(plan, wanted, owner)
    await insertAll(
      context,
      plan,
      { name: wanted.name, driver: place.driver, options: place.options },
      present?.id ?? null,
      inspection.owner,
    )
  } finally {
    await inspection.close()
  }
  const row = await service.get(plan.loaded.header.poolId)
  return await finish(context, service, row, wanted, plan, owner)
}

async function takenFrom(context: MapperContext, poolId: string): Promise<string | undefined> {
  const { db } = context.catalog
  const known = await db.selectFrom('export_pools').select('taken_from').where('pool_id', '=', poolId).executeTakeFirst()
  return known?.taken_from ?? undefined
}

async function loadChecked(context: MapperContext, inspection: PoolInspection, wanted: PoolImport): Promise<LoadedExport> {
  const loaded = await loadExport(inspection.store)
  if (loaded === null) {
    throw new AtollError('POOL_EXPORT_MISSING', `the pool "${wanted.name}" holds no export that can be read`, {
      values: { name: wanted.name },
    })
  }
  const { formatVersion } = loaded.header
  if (formatVersion > context.catalog.formatVersion) {
    throw new AtollError(
      'FORMAT_VERSION',
      `the export is of a catalog of format version ${formatVersion}, this build knows up to ${context.catalog.formatVersion}: use the version of Atoll that wrote it`,
      { values: { foundVersion: formatVersion, knownVersion: context.catalog.formatVersion } },
    )
  }
  return loaded
}

function requireTakeOver(context: MapperContext, inspection: PoolInspection, plan: Plan, wanted: PoolImport): void {
  const { owner } = inspection
  if (owner === null || owner.catalogId === null || owner.catalogId === context.catalog.id) return
  if (wanted.takeOver || wanted.dryRun) return
  const kinds = count(plan.resources)
  throw new AtollError(
    'POOL_OWNED_BY_OTHER',
    `the pool "${wanted.name}" belongs to the catalog ${owner.catalogId} (since ${owner.since}); its export of ${new Date(plan.loaded.header.writtenAt).toISOString()} has ${kinds.volume} volumes, ${kinds.snapshot} snapshots, ${kinds.image} images and ${kinds.file} files. If that catalog is lost, import it with --take-over; after that the other catalog cannot open it any more`,
    { values: { ownerCatalogId: owner.catalogId, since: owner.since, poolId: plan.loaded.header.poolId } },
  )
}

function count(resources: Iterable<ExportedRow>): Record<ResourceKind, number> {
  const kinds: Record<ResourceKind, number> = { volume: 0, snapshot: 0, image: 0, file: 0 }
  for (const row of resources) kinds[row['kind'] as ResourceKind] += 1
  return kinds
}

function failure(row: ExportedRow, code: ErrorCode, reason: string): ImportFailure {
  return { kind: row['kind'] as ResourceKind, id: String(row['id']), name: String(row['name']), code, reason }
}

/** Decides which rows and pages go in. Changes nothing. */
async function planImport(context: MapperContext, loaded: LoadedExport): Promise<Plan> {
  const { poolId } = loaded.header
  const failed: ImportFailure[] = []
  const rowsOf = (table: ExportedTable): ExportedRow[] => [...(loaded.rows.get(table)?.values() ?? [])].map(({ row }) => row)
  const replicas = rowsOf('replicas').filter((row) => row['pool_id'] === poolId)
  const here = new Set(replicas.map((row) => row['layer_alias']))
  const layers = rowsOf('layers').filter((row) => here.has(row['alias'] ?? null))
  const aliases = new Set(layers.map((row) => row['alias']))
  const volumes = new Map(rowsOf('volumes').map((row) => [row['id'], row]))
  const files = new Map(rowsOf('files').map((row) => [row['id'], row]))
  const containers = new Set(rowsOf('containers').map((row) => row['id']))
  const exported = rowsOf('resources').filter((row) => row['home_pool_id'] === poolId)
  const before = await readPresent(context, loaded.header.catalogId)
  const epochBefore = (row: ExportedRow): number | undefined => before.homeEpochs.get(String(row['id']))
  // Of what stands in two exports the newer one is the truth.
  const all = exported.filter((row) => (epochBefore(row) ?? -1) < Number(row['home_epoch'] ?? 0))
  const replaced = new Set(all.filter((row) => epochBefore(row) !== undefined).map((row) => String(row['id'])))
  const isLinked = (loaded.header.sources ?? []).length > 0
  const waitingVolumes: ExportedRow[] = []

  const kept = new Map<unknown, ExportedRow>()
  for (const row of all.filter((each) => each['kind'] !== 'snapshot')) {
    const volume = volumes.get(row['id'] ?? null)
    const isWritten = row['kind'] === 'volume'
    if (!isWritten && row['status'] === 'creating') {
      failed.push(failure(row, 'RESOURCE_STATUS', 'it was being imported and was not finished: import it again'))
    } else if (isWritten && volume === undefined) {
      failed.push(failure(row, 'EXPORT_CORRUPT', 'the record that says which layers it writes is damaged or missing'))
    } else if (isWritten && isLinked && !aliases.has(volume?.['active_alias'] ?? null)) {
      kept.set(row['id'], row)
      if (volume !== undefined && !before.layers.has(Number(volume['active_alias']))) waitingVolumes.push(volume)
    } else if (isWritten && !aliases.has(volume?.['active_alias'] ?? null)) {
      failed.push(failure(row, 'LAYER_MISSING', `the layer that it writes (${volume?.['active_alias']}) is not in the export`))
    } else if (
      row['kind'] === 'file' &&
      files.has(row['id'] ?? null) &&
      !containers.has(files.get(row['id'] ?? null)?.['container_id'])
    ) {
      failed.push(failure(row, 'EXPORT_CORRUPT', 'the record with its container is damaged or missing'))
    } else {
      kept.set(row['id'], row)
    }
  }
  const asImages: SnapshotAsImage[] = []
  const names = new Map(all.map((row) => [row['id'], String(row['name'])]))
  for (const row of all.filter((each) => each['kind'] === 'snapshot')) {
    const volumeId = String(row['volume_id'])
    if (kept.has(volumeId) || before.volumes.has(volumeId)) {
      kept.set(row['id'], row)
      continue
    }
    // What it holds needs no volume.
    const snapshotName = String(row['name'])
    const name = [...(names.has(volumeId) ? [names.get(volumeId)] : []), snapshotName].join('-').slice(0, nameLengthMax)
    kept.set(row['id'], changed(row, { kind: 'image', name, volume_id: null }))
    asImages.push({ id: String(row['id']), name, snapshotName, volumeId })
  }
  const resources = [...kept.values()]
  const reached = await reachOf(context, loaded, resources)
  const isWhole = failed.length === 0 && loaded.damages.length === 0 && reached.isWhole
  const keptVolumes = [...volumes.values()].filter(
    (row) => kept.get(row['id'])?.['kind'] === 'volume' && !waitingVolumes.includes(row),
  )
  const written = new Set(keptVolumes.flatMap((row) => [row['active_alias'], row['next_alias']]))
  const waitingBefore = before.waiting.volumes.flatMap((volume) => [volume.row['active_alias'], volume.row['next_alias']])
  const isKnown = (volumeId: unknown): boolean => kept.has(volumeId) || before.homeEpochs.has(String(volumeId))
  const present = new Set((await context.catalog.db.selectFrom('pools').select('id').execute()).map((row) => row.id))
  // A volume of theirs may write it.
  const readersMissing = (loaded.header.readers ?? []).some((pool) => !present.has(pool.id))
  const keptLayers = layers.flatMap((row) => {
    const volumeId = row['volume_id'] ?? null
    const isOurs = isWhole || written.has(row['alias']) || reached.aliases.has(Number(row['alias']))
    // It may hold what nobody here knows of; only one that is written no more means the same without its volume.
    if (volumeId === null || kept.has(volumeId) || row['state'] === 'sealed' || row['state'] === 'closing')
      return isOurs ? [row] : []
    // Of a volume that has gone to another pool.
    if (row['state'] === 'condemned' && isLinked) return isOurs ? [row] : []
    const mayBeWritten =
      (row['state'] === 'active' || row['state'] === 'spare') && (readersMissing || waitingBefore.includes(row['alias'] ?? null))
    return mayBeWritten ? [changed(row, { state: 'active' })] : []
  })
  const keptAliases = new Set(keptLayers.map((row) => row['alias']))
  const rows = new Map<ExportedTable, readonly ExportedRow[]>([
    ['projects', rowsOf('projects')],
    [
      'layers',
      keptLayers.map((row) => changed(row, { volume_id: isKnown(row['volume_id']) ? (row['volume_id'] ?? null) : null })),
    ],
    ['replicas', replicas.filter((row) => keptAliases.has(row['layer_alias']))],
    ['containers', rowsOf('containers')],
    ['resources', resources],
    [
      'volumes',
      keptVolumes.map((row) =>
        keptAliases.has(row['next_alias']) || before.layers.has(Number(row['next_alias']))
          ? row
          : changed(row, { next_alias: null }),
      ),
    ],
    ['files', [...files.values()].filter((row) => kept.has(row['id']))],
  ])
  const notHere = (pools: readonly Pick<LinkedPool, 'id' | 'name' | 'driver'>[] = []): LinkedPool[] =>
    pools.filter((pool) => !present.has(pool.id)).map(({ id, name, driver }) => ({ id, name, driver, isAbsent: true }))
  const missingSources = notHere(loaded.header.sources)
  const known = new Set([...keptLayers.map((row) => Number(row['alias'])), ...before.layers])
  const waitingToBeRead = [...reached.aliases].every((alias) => known.has(alias))
    ? []
    : await waitingFor(context, loaded, resources, known, missingSources)
  const waitingToBeWritten = waitingVolumes.flatMap((volume) => {
    const row = kept.get(volume['id'])
    return row === undefined ? [] : [failure(row, 'LAYER_MISSING', writtenElsewhere(missingSources))]
  })
  const isNamed = new Set(waitingToBeWritten.map((each) => each.id))
  const waiting = [...waitingToBeWritten, ...waitingToBeRead.filter((each) => !isNamed.has(each.id))]
  const missingReaders = notHere(loaded.header.readers)
  const nextWaiting = {
    // What stands here anew is what it is here.
    volumes: [
      ...before.waiting.volumes.filter((volume) => !replaced.has(String(volume.row['id']))),
      ...waitingVolumes.map((row) => ({ poolId, row })),
    ],
    snapshots: [
      ...before.waiting.snapshots.filter((snapshot) => !replaced.has(snapshot.id)),
      ...asImages.map(({ id, volumeId, snapshotName }) => ({ id, volumeId, name: snapshotName })),
    ],
  }
  const joined = new Set([...keptAliases].map(Number).filter((alias) => before.layers.has(alias)))
  const found = { loaded, resources, rows, pageIds: reached.pageIds, failed, waiting, missingSources, missingReaders, asImages }
  return { ...found, replaced, joined, nextWaiting }
}

interface Present {
  /** Of every resource that is here. */
  readonly homeEpochs: ReadonlyMap<string, number>
  readonly volumes: ReadonlySet<string>
  /** Aliases. */
  readonly layers: ReadonlySet<number>
  readonly waiting: ImportWaiting
}

async function readPresent({ catalog }: MapperContext, catalogId: string): Promise<Present> {
  return await catalog.read(async (tx) => {
    const resources = await tx.selectFrom('resources').select(['id', 'kind', 'home_epoch']).execute()
    // The same number of any other catalog is another layer, which is in the way.
    const layers = await tx
      .selectFrom('layers')
      .innerJoin('replicas', 'replicas.layer_alias', 'layers.alias')
      .innerJoin('export_pools', 'export_pools.pool_id', 'replicas.pool_id')
      .select('layers.alias')
      .distinct()
      .where('export_pools.taken_from', '=', catalogId)
      .execute()
    return {
      homeEpochs: new Map(resources.map((row) => [row.id, row.home_epoch])),
      volumes: new Set(resources.filter((row) => row.kind === 'volume').map((row) => row.id)),
      layers: new Set(layers.map((row) => row.alias)),
      waiting: await readWaiting(tx),
    }
  })
}

function writtenElsewhere(missing: readonly Pick<LinkedPool, 'id' | 'name' | 'driver'>[]): string {
  const where = missing.length === 0 ? 'the other pools of the lost catalog' : `pool ${namePools(missing)}`
  return `it is being moved, and writes into a pool that is not here: import ${where}, too`
}

/** Resources whose maps name layers that neither the pool nor this catalog has. */
async function waitingFor(
  context: MapperContext,
  loaded: LoadedExport,
  resources: readonly ExportedRow[],
  known: ReadonlySet<number>,
  missing: readonly LinkedPool[],
): Promise<ImportFailure[]> {
  const waiting: ImportFailure[] = []
  for (const row of resources) {
    const { aliases } = await reachOf(context, loaded, [row])
    const alias = [...aliases].find((each) => !known.has(each))
    if (alias !== undefined) waiting.push(failure(row, 'LAYER_MISSING', layerElsewhere(alias, missing)))
    await nextTurn()
  }
  return waiting
}

function layerElsewhere(alias: number, missing: readonly LinkedPool[]): string {
  const where = missing.length === 0 ? 'the other pools of the lost catalog' : `pool ${namePools(missing)}`
  return `its map refers to layer ${alias}, which no pool that is here knows: import ${where}, too`
}

interface Reached {
  readonly aliases: ReadonlySet<number>
  readonly pageIds: readonly number[]
  /** Every map can be read. */
  readonly isWhole: boolean
}

/** What the maps refer to, by the pages of the export alone. A page that is damaged or missing ends the walk of its map. */
async function reachOf(context: MapperContext, loaded: LoadedExport, resources: readonly ExportedRow[]): Promise<Reached> {
  const roots = new Map(resources.map((row) => [String(row['root_word']), rootOfRow(row)]))
  const aliases = new Set<number>()
  const pageIds = new Set<number>()
  let isWhole = true
  const walk = async (reach: Reach, root: RootRef): Promise<void> => {
    reach.addRoot(root, mapBytesMax)
    for (let ids = reach.pending(pageBatch); ids.length > 0; ids = reach.pending(pageBatch)) {
      const bodies: Uint8Array[] = []
      for (const id of ids) {
        const body = loaded.pages.get(id)
        if (body === undefined) break
        bodies.push(body)
        pageIds.add(id)
      }
      await reach.supply(ids.subarray(0, bodies.length), bodies)
      const missing = ids[bodies.length]
      if (missing !== undefined)
        throw new AtollError('PAGE_MISSING', `map page ${missing} is not in the export`, { values: { pageId: missing } })
    }
  }
  let reach = context.engine.reach()
  for (const root of roots.values()) {
    try {
      await walk(reach, root)
    } catch {
      // What it has reached so far counts. Each resource says for itself what is wrong, once it is here.
      isWhole = false
      for (const alias of reach.layers()) aliases.add(alias)
      reach = context.engine.reach()
    }
  }
  for (const alias of reach.layers()) aliases.add(alias)
  return { aliases, pageIds: [...pageIds], isWhole }
}

function changed(row: ExportedRow, columns: ExportedRow): ExportedRow {
  return Object.assign({}, row, columns)
}

function rootOfRow(row: ExportedRow): RootRef {
  return rootOf({ root_word: BigInt(String(row['root_word'])), root_crc: Number(row['root_crc']) })
}

interface PlaceOfPool {
  readonly name: string
  readonly driver: string
  readonly options: Readonly<Record<string, string>>
}

/** One transaction; what stands in its way and is nobody's is removed before. */
async function insertAll(
  context: MapperContext,
  plan: Plan,
  place: PlaceOfPool,
  placeholderId: string | null,
  owner: PoolOwner | null,
): Promise<void> {
  const { catalog, clock, pageIds } = context
  const { header, aliasMax, pageIdMax, pages } = plan.loaded
  const firstAlias = aliasMax + aliasesAhead
  const firstPageId = pageIdMax + pageIdsAhead
  // From here on nothing is given out that a pool of the lost catalog may name.
  pageIds.raise(firstPageId)
  await catalog.write(async (tx) => {
    await raiseLayerAliases(tx, firstAlias)
    const value = String(firstPageId)
    await tx
      .insertInto('meta')
      .values({ key: pageIdsFromKey, value })
      .onConflict((conflict) => conflict.column('key').doUpdateSet({ value }))
      .execute()
  })
  await dropSpares(context, aliasMax, header.catalogId)
  await catalog.write(async (tx) => {
    await requireNoConflict(context, tx, plan)
    if (placeholderId !== null && placeholderId !== header.poolId) {
      await tx.deleteFrom('pools').where('id', '=', placeholderId).execute()
    }
    const exported = plan.loaded.rows.get('pools')?.get(header.poolId)?.row ?? {}
    const project = { project_id: adminProject.id, created_at: clock.nowMs() }
    const present = new Set(await presentTables(tx))
    const projects = new Set<unknown>([adminProject.id])
    const put = async (
      table: ExportedTable,
      rows: readonly ExportedRow[],
      options: { orIgnore?: boolean } = {},
    ): Promise<void> => {
      if (!present.has(table)) return
      const columns = await columnsOf(tx, table)
      for (const [index, row] of rows.entries()) {
        // Of a large pool this takes long: whatever needs no catalog goes on meanwhile.
        if (index % rowsAtOnce === rowsAtOnce - 1) await nextTurn()
        const known = Object.fromEntries(Object.entries(row).filter(([name]) => columns.has(name)))
        if (columns.has('project_id') && !projects.has(row['project_id'])) known['project_id'] = adminProject.id
        try {
          await insertExportedRow(tx, table, known, options)
        } catch (error) {
          const reason = toAtollError(error).message
          throw new AtollError('EXPORT_CORRUPT', `the export has a row of ${table} that cannot be: ${reason}`, { cause: error })
        }
      }
    }
    await put('projects', plan.rows.get('projects') ?? [], { orIgnore: true })
    for (const row of await tx.selectFrom('projects').select('id').execute()) projects.add(row.id)
    await put('pools', [{ ...project, ...exported, id: header.poolId, ...place, options: { ...place.options } }])
    const { readers = [], sources = [] } = header
    const links = [
      ...readers.map(({ id }) => ({ reader: id, source: header.poolId })),
      ...sources.map(({ id }) => ({ reader: header.poolId, source: id })),
    ]
    await addLinks(tx, links, [...readers, ...sources])
    await put('containers', plan.rows.get('containers') ?? [], { orIgnore: true })
    const ids = new Set(plan.resources.map((row) => row['id']))
    const others = new Set((await tx.selectFrom('resources').select('id').execute()).map((row) => row.id))
    const parentOf = (row: ExportedRow) =>
      ids.has(row['parent_id'] ?? null) || others.has(String(row['parent_id'])) ? row['parent_id'] : null
    const isReplaced = (row: ExportedRow): boolean => plan.replaced.has(String(row['id']))
    const resources = plan.resources.map((row) => changed(row, { parent_id: parentOf(row) ?? null }))
    await replaceResources(tx, resources.filter(isReplaced))
    await put(
      'resources',
      resources.filter((row) => !isReplaced(row)),
    )
    const newLayers = (plan.rows.get('layers') ?? []).filter((row) => !plan.joined.has(Number(row['alias'])))
    await put('layers', newLayers)
    await joinLayers(tx, plan)
    // One that was the primary is it again; what was filled is nobody's now, and the next open gives it up.
    for (const row of plan.rows.get('replicas') ?? []) {
      if (row['is_primary'] === false || !plan.joined.has(Number(row['layer_alias']))) continue
      await tx.updateTable('replicas').set({ is_primary: false }).where('layer_alias', '=', Number(row['layer_alias'])).execute()
    }
    await put('replicas', plan.rows.get('replicas') ?? [])
    const { ready, nextWaiting } = await takeWaiting(tx, plan)
    const volumes = [...(plan.rows.get('volumes') ?? []), ...ready].map((row) =>
      changed(row, {
        epoch: Math.max(Number(row['epoch']) + epochsAhead, ((owner?.epoch ?? 0) + 1) * epochsAhead),
        // Which pages are the volume's alone is not asked again: old ones are left to reclaim.
        shared_below_page: firstPageId,
      }),
    )
    await put('volumes', volumes)
    for (const row of volumes) await giveLayers(tx, row)
    await writeWaiting(tx, nextWaiting)
    await put('files', plan.rows.get('files') ?? [])
    for (const row of volumes) {
      const { project_id: projectId } = await tx
        .selectFrom('volumes')
        .select('project_id')
        .where('id', '=', String(row['id']))
        .executeTakeFirstOrThrow()
      await tx
        .insertInto('leases')
        .values({
          volume_id: String(row['id']),
          project_id: projectId,
          holder: importHolder,
          epoch: Number(row['epoch']),
          acquired_at: clock.nowMs(),
          released_at: null,
        })
        .execute()
    }
    for (let start = 0; start < plan.pageIds.length; start += pageBatch) {
      const batch = plan.pageIds.slice(start, start + pageBatch)
      const there = await catalog.pages.get(batch)
      const missing = batch.filter((_, index) => there[index] === undefined)
      await catalog.pages.insert(
        missing,
        missing.map((id) => pages.get(id) as Uint8Array),
      )
      await nextTurn()
    }
    await tx
      .insertInto('export_pools')
      .values({
        pool_id: header.poolId,
        record_number: 0,
        outbox_seq: 0,
        is_ahead: 0,
        taken_from: owner?.catalogId ?? header.catalogId,
      })
      .execute()
  })
  context.layers.invalidate(plan.joined)
}

/** Resources that are here as an older export had them become what this one says. */
async function replaceResources(tx: CatalogTransaction, rows: readonly ExportedRow[]): Promise<void> {
  const columns = await columnsOf(tx, 'resources')
  for (const row of rows) {
    const id = String(row['id'])
    await tx.deleteFrom('leases').where('volume_id', '=', id).execute()
    await tx.deleteFrom('volumes').where('id', '=', id).execute()
    await tx.deleteFrom('files').where('id', '=', id).execute()
    const known = Object.fromEntries(Object.entries(row).filter(([name]) => columns.has(name) && name !== 'project_id'))
    const values: ResourceUpdate = { ...known, root_word: BigInt(String(row['root_word'])) }
    await tx.updateTable('resources').set(values).where('id', '=', id).execute()
  }
}

/** A layer that another pool has brought: of its two states the later one holds. */
async function joinLayers(tx: CatalogTransaction, plan: Plan): Promise<void> {
  for (const row of plan.rows.get('layers') ?? []) {
    const alias = Number(row['alias'])
    if (!plan.joined.has(alias)) continue
    const present = await tx.selectFrom('layers').selectAll().where('alias', '=', alias).executeTakeFirstOrThrow()
    const state = row['state'] as LayerState
    const isLater = layerStates.indexOf(state) > layerStates.indexOf(present.state)
    const volumeId = row['volume_id'] === null ? null : String(row['volume_id'])
    await tx
      .updateTable('layers')
      .set({ state: isLater ? state : present.state, volume_id: present.volume_id ?? volumeId })
      .where('alias', '=', alias)
      .execute()
  }
}

/** What waited for what is here now. Inside the write, after the layers are in. */
async function takeWaiting(
  tx: CatalogTransaction,
  { nextWaiting }: Plan,
): Promise<{ ready: ExportedRow[]; nextWaiting: ImportWaiting }> {
  const layers = new Set((await tx.selectFrom('layers').select('alias').execute()).map((row) => row.alias))
  const kinds = new Map((await tx.selectFrom('resources').select(['id', 'kind']).execute()).map((row) => [row.id, row.kind]))
  const ready: ExportedRow[] = []
  const volumes = nextWaiting.volumes.filter(({ row }) => {
    // Deleted, or rolled back, meanwhile.
    if (kinds.get(String(row['id'])) !== 'volume') return false
    if (!layers.has(Number(row['active_alias']))) return true
    ready.push(layers.has(Number(row['next_alias'])) ? row : changed(row, { next_alias: null }))
    return false
  })
  const snapshots: ImportWaiting['snapshots'][number][] = []
  for (const snapshot of nextWaiting.snapshots) {
    const { id, volumeId, name } = snapshot
    if (kinds.get(id) !== 'image') continue
    if (kinds.get(volumeId) !== 'volume') {
      snapshots.push(snapshot)
      continue
    }
    await tx.updateTable('resources').set({ kind: 'snapshot', volume_id: volumeId, name }).where('id', '=', id).execute()
  }
  return { ready, nextWaiting: { volumes, snapshots } }
}

/** Layers that were kept for whoever writes them. */
async function giveLayers(tx: CatalogTransaction, volume: ExportedRow): Promise<void> {
  const roles = [
    ['active_alias', 'active'],
    ['next_alias', 'spare'],
  ] as const
  for (const [column, state] of roles) {
    await tx
      .updateTable('layers')
      .set({ volume_id: String(volume['id']), state })
      .where('alias', '=', Number(volume[column] ?? 0))
      .where('state', '=', 'active')
      .where((query) => query.or([query('volume_id', 'is', null), query('volume_id', '=', String(volume['id']))]))
      .execute()
  }
}

/**
 * Layers with an alias that the lost catalog gave out, too, also one of a pool that is not imported yet: a map of that catalog which
 * names it would read theirs. Those that came from the same catalog are the ones that are meant.
 */
async function layersInTheWay(
  tx: CatalogTransaction,
  aliasMax: number,
  catalogId: string,
): Promise<{ alias: number; pool_id: string; isUnused: boolean }[]> {
  const rows = await tx
    .selectFrom('layers')
    .innerJoin('replicas', 'replicas.layer_alias', 'layers.alias')
    .leftJoin('export_pools', 'export_pools.pool_id', 'replicas.pool_id')
    .select(['layers.alias', 'layers.state', 'layers.volume_id', 'replicas.pool_id', 'export_pools.taken_from'])
    .where('layers.alias', '<=', aliasMax)
    .execute()
  return rows
    .filter((row) => row.taken_from !== catalogId)
    .map((row) => ({ alias: row.alias, pool_id: row.pool_id, isUnused: row.state === 'spare' && row.volume_id === null }))
}

/** Spares of nobody make room: others are made, with aliases above. */
async function dropSpares(context: MapperContext, aliasMax: number, catalogId: string): Promise<void> {
  const { catalog, layers, pools } = context
  const spares = (await layersInTheWay(catalog.db, aliasMax, catalogId)).filter((layer) => layer.isUnused)
  for (const poolId of new Set(spares.map((layer) => layer.pool_id))) {
    if (pools.find(poolId) === undefined) continue
    await context.locks.run([poolId], async () => {
      await layers.unload(poolId)
      const aliases = spares.filter((row) => row.pool_id === poolId).map((row) => row.alias)
      await catalog.write(async (tx) => {
        await tx
          .updateTable('layers')
          .set({ state: 'condemned' })
          .where('alias', 'in', aliases)
          .where('state', '=', 'spare')
          .where('volume_id', 'is', null)
          .execute()
      })
      await removeCondemned(context, poolId)
      await layers.load(poolId)
    })
  }
}

async function requireNoConflict(context: MapperContext, tx: CatalogTransaction, plan: Plan): Promise<void> {
  const conflict = (what: string): AtollError =>
    new AtollError('POOL_IMPORT_CONFLICT', `${what}: import the pool into a fresh home`, {
      values: { poolId: plan.loaded.header.poolId },
    })
  const { aliasMax, header } = plan.loaded
  const [other] = await layersInTheWay(tx, aliasMax, header.catalogId)
  if (other !== undefined) throw conflict(`this home uses layer number ${other.alias}, which the lost catalog has used, too`)
  const layers = plan.rows.get('layers') ?? []
  const taken = new Map((await tx.selectFrom('layers').select(['alias', 'id']).execute()).map((row) => [row.alias, row.id]))
  // The same layer lies in another pool of the same catalog as well.
  const layer = layers.find((row) => taken.has(Number(row['alias'])) && taken.get(Number(row['alias'])) !== row['id'])
  if (layer !== undefined) throw conflict(`this home uses layer number ${layer['alias']} already`)
  const open = [...plan.replaced].find((id) => context.open.get(id) !== undefined)
  if (open !== undefined) throw conflict(`${open} is open, and the pool has a newer state of it: detach it first, or`)
  for (let start = 0; start < plan.pageIds.length; start += pageBatch) {
    const batch = plan.pageIds.slice(start, start + pageBatch)
    const there = await context.catalog.pages.get(batch)
    for (const [index, body] of there.entries()) {
      const id = batch[index] as number
      // The same page of another pool of the same catalog is the same page.
      if (body !== undefined && Buffer.compare(body, plan.loaded.pages.get(id) as Uint8Array) !== 0)
        throw conflict(`this home uses map page ${id} already`)
    }
  }
  if ((await lastLayerAlias(tx)) >= 2 ** 32 - 1 - aliasesAhead) throw conflict('the numbers of layers are used up')
}

/** Opens the pool, replays every volume, and looks whether everything that the maps name is there. */
async function finish(
  context: MapperContext,
  service: PoolService,
  row: PoolRow,
  wanted: PoolImport,
  plan: Plan | null,
  owner: string | null,
): Promise<PoolImportReport> {
  const { catalog, locks } = context
  await service.open(row)
  const failed: ImportFailure[] = [...(plan?.failed ?? [])]
  const broughtBack: Record<ResourceKind, number> = { volume: 0, snapshot: 0, image: 0, file: 0 }
  const resources = await catalog.db.selectFrom('resources').selectAll().where('home_pool_id', '=', row.id).execute()
  // A journal that is replayed here may concern what others share, so all of them come before anything is looked at.
  const broken = new Map<string, AtollError>()
  const waiting = new Set((await readWaiting(catalog.db)).volumes.map((volume) => volume.row['id']))
  const links = await readLinks(catalog.db)
  const missingSources = sourcesOf(links, row.id).filter((pool) => pool.isAbsent)
  // Also those that waited for what they write here.
  const late = await writtenHere(context, row.id)
  for (const { id } of [...resources.filter((each) => each.kind === 'volume'), ...late]) {
    if (waiting.has(id)) {
      broken.set(id, new AtollError('LAYER_MISSING', writtenElsewhere(missingSources), { values: { id } }))
      continue
    }
    try {
      await locks.run([id], async () => await settleLocked(context, id))
    } catch (error) {
      broken.set(id, toAtollError(error))
    }
  }
  for (const { id, kind, name } of late) {
    const why = broken.get(id)
    if (why !== undefined) failed.push({ kind, id, name, code: why.code, reason: why.message })
  }
  const files = await layerFiles(context)
  for (const resource of await catalog.db.selectFrom('resources').selectAll().where('home_pool_id', '=', row.id).execute()) {
    try {
      // First: what it says of a missing layer says what to do.
      const known = broken.get(resource.id)
      if (known !== undefined && waiting.has(resource.id)) throw known
      await requireLayers(context, files, resource, missingSources)
      if (known !== undefined) throw known
      broughtBack[resource.kind] += 1
    } catch (error) {
      const { code, message } = toAtollError(error)
      failed.push({ kind: resource.kind, id: resource.id, name: resource.name, code, reason: message })
    }
  }
  const report = {
    ...reportPlan(plan, wanted, owner),
    poolId: row.id,
    broughtBack,
    failed,
    missingSources,
    missingReaders: readersOf(links, row.id).filter((pool) => pool.isAbsent),
    unknownLayers: await unknownLayers(context, row.id),
  }
  context.log.info(
    { poolId: row.id, pool: row.name, takenFrom: owner, broughtBack, failed: failed.length, damages: report.damages.length },
    'the pool was imported',
  )
  return report
}

/** Volumes of other pools that write into this one. */
async function writtenHere(
  { catalog }: MapperContext,
  poolId: string,
): Promise<{ id: string; kind: ResourceKind; name: string }[]> {
  return await catalog.db
    .selectFrom('volumes')
    .innerJoin('resources', 'resources.id', 'volumes.id')
    .innerJoin('replicas', 'replicas.layer_alias', 'volumes.active_alias')
    .select(['resources.id', 'resources.kind', 'resources.name'])
    .where('replicas.pool_id', '=', poolId)
    .where('resources.home_pool_id', '!=', poolId)
    .execute()
}

/** The layers whose files are there, by pool. */
async function layerFiles({ pools }: MapperContext): Promise<Map<string, Set<string>>> {
  const files = new Map<string, Set<string>>()
  for (const poolId of pools.openIds()) files.set(poolId, new Set(await pools.handle(poolId).listLayerIds()))
  return files
}

async function requireLayers(
  context: MapperContext,
  files: ReadonlyMap<string, ReadonlySet<string>>,
  resource: ResourceRow,
  missing: readonly LinkedPool[],
): Promise<void> {
  const map = await loadMap(context, resource.id, rootOf(resource))
  const aliases = [...map.layers(mapBytesMax)]
  const homes = new Map((await context.layers.homesIfKnown(aliases, resource.home_pool_id)).map((home) => [home.alias, home]))
  for (const alias of aliases) {
    const layer = homes.get(alias)
    if (layer === undefined) {
      throw new AtollError('LAYER_MISSING', layerElsewhere(alias, missing), { values: { alias } })
    }
    if (files.get(layer.poolId)?.has(layer.id) !== true) {
      throw new AtollError(
        'LAYER_MISSING',
        `the file of layer ${layer.id} (alias ${alias}) is missing: bring it back from a backup`,
        {
          values: { alias, layerId: layer.id },
        },
      )
    }
  }
}

function reportPlan(plan: Plan | null, wanted: PoolImport, owner: string | null): PoolImportReport {
  const uncertain: { kind: ResourceKind; id: string; name: string }[] = []
  for (const { row, step } of plan?.loaded.rows.get('resources')?.values() ?? []) {
    if (step < (plan?.loaded.uncertainBefore ?? 0)) {
      uncertain.push({ kind: row['kind'] as ResourceKind, id: String(row['id']), name: String(row['name']) })
    }
  }
  const waiting = new Set<unknown>(plan?.waiting.map((each) => each.id))
  return {
    poolId: plan?.loaded.header.poolId ?? '',
    name: wanted.name,
    catalogId: owner,
    dryRun: wanted.dryRun,
    exportedAt: plan?.loaded.header.writtenAt ?? null,
    broughtBack: count((plan?.resources ?? []).filter((row) => !waiting.has(row['id']))),
    failed: [...(plan?.failed ?? []), ...(plan?.waiting ?? [])],
    missingSources: plan?.missingSources ?? [],
    missingReaders: plan?.missingReaders ?? [],
    asImages: plan?.asImages ?? [],
    uncertain,
    damages: plan?.loaded.damages ?? [],
    unknownLayers: [],
    notes: [notBroughtBack],
  }
}
