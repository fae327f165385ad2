/**
 * The mapper: owner of maps and layers. It decides which layers exist, which root is durable and who may write; the engine
 * moves the bytes, and whoever is above (the composer) decides what is attached and when jobs run.
 *
 * Every operation takes the locks of the resources it names, all at once (keyed-mutex.ts); the order inside is in the file of
 * the operation. What an operation promises when it returns is durable (I9).
 */
import {
  checkName,
  isAtollError,
  Mutex,
  newId as randomId,
  systemClock,
  type AtollError,
  type Catalog,
  type CatalogTransaction,
  type Clock,
  type NewId,
  type PoolRow,
  type ResourceRow,
} from '@atoll/core'
import type { Device, Engine, FrozenMap, OpenReport } from '@atoll/native'
import type { Driver } from '@atoll/southbound'
import { Checker, type CheckOptions, type CheckReport } from './check.ts'
import { CheckpointScheduler } from './checkpoint-scheduler.ts'
import { checkpointLocked, deletePagesLater } from './checkpoint.ts'
import { closeLocked } from './close.ts'
import { Background, type MapperContext, type MapperLog } from './context.ts'
import { Cover } from './cover.ts'
import { createImage, createVolume, type NewImage, type NewVolume } from './create.ts'
import { deleteResource, type DeleteOptions } from './delete.ts'
import { diff, type DiffRange } from './diff.ts'
import { Exporter, noteUnopened } from './exporter.ts'
import {
  abortImport,
  beginImport,
  finishImport,
  resumeImport,
  type FinishOptions,
  type ImportTarget,
  type NewImport,
} from './import-target.ts'
import {
  abortFile,
  beginFile,
  createFile,
  dropFiles,
  finishFile,
  type DropFile,
  type FileRows,
  type FileTarget,
  type NewFile,
} from './file-target.ts'
import { KeyedMutex } from './keyed-mutex.ts'
import { Layers } from './layers.ts'
import { Moves } from './moves.ts'
import { OlderCatalog } from './older-catalog.ts'
import { openLocked, type OpenOptions } from './open.ts'
import { OpenTable, type OpenEntry } from './open-table.ts'
import { PageIds } from './page-ids.ts'
import { PagePins } from './page-pins.ts'
import { acceptPool, type PoolAcceptReport } from './pool-accept.ts'
import { importPool, type PoolImport, type PoolImportReport } from './pool-import.ts'
import type { LinkedPool } from './pool-links.ts'
import { PoolReads } from './pool-reads.ts'
import { PoolService } from './pool-service.ts'
import { Pools } from './pools.ts'
import { Reclaimer, type ReclaimOptions, type ReclaimResult } from './reclaim.ts'
import { recoverPages, unknownLayers } from './recover.ts'
import { resize } from './resize.ts'
import { rollback } from './rollback.ts'
import { requireAvailable, requireKind, requireResource } from './rows.ts'
import { snapshotMap } from './snapshot-map.ts'
import { snapshot, type SnapshotItem } from './snapshot.ts'
import { systemTimer, type SetTimer } from './timer.ts'
import { Usage, type ResourceUsage } from './usage.ts'

export interface MapperOptions {
  readonly catalog: Catalog
  readonly engine: Engine
  readonly drivers: readonly Driver[]
  readonly log: MapperLog
  /** Default: the machine's. */
  readonly clock?: Clock
  readonly setTimer?: SetTimer
  readonly newId?: NewId
  /** Names the batch logs of the engine, which lie in one home, among those of all homes that share the catalog. Default: there are none. */
  readonly batchLogId?: string
  /** Default false. True: pools that somebody else has are opened all the same, where their drivers can shut him out. */
  readonly takeOver?: boolean
  /** Memory that telling what resources take may use (usage.ts); default: 512 MiB. */
  readonly usageTableBytesMax?: number
}

/** A resource that is open. */
export interface OpenResource {
  readonly device: Device
  readonly sizeBytes: number
  /** Its home. */
  readonly poolId: string
  /** Epoch of the lease; 0 for a read-only open, which has none. */
  readonly epoch: number
  readonly report: OpenReport
}

/** Resources closed at the same time when the mapper closes. */
const closeConcurrency = 16

/**
 * Opens the mapper over a catalog: takes back what unfinished checkpoints left, opens every pool and puts right what an
 * earlier process left in it. A pool that cannot be opened is logged and remembered (`pools.failure`); the others serve.
 * @throws AtollError the errors of the catalog
 */
export async function openMapper(options: MapperOptions): Promise<Mapper> {
  const { catalog, log } = options
  await noteUnopened({ catalog, log })
  const nextPageId = await recoverPages({ catalog, engine: options.engine, log })
  const mapper = new Mapper(options, nextPageId)
  const open = async (row: PoolRow): Promise<void> => {
    try {
      await mapper.pools.open(row, { takeOver: options.takeOver ?? false })
    } catch (error) {
      log.error({ err: error, poolId: row.id, pool: row.name }, cannotOpen(row.name, error))
    }
  }
  // Side by side: one whose backend is away is waited for.
  await Promise.all((await mapper.pools.list()).map(open))
  return mapper
}

/** What the log says of a pool that cannot be opened, with the way back if its catalog was lost. */
export function cannotOpen(name: string, error: unknown): string {
  if (!isAtollError(error, 'POOL_OWNED_BY_OTHER')) return 'the pool cannot be opened'
  return `the pool belongs to another catalog; if that one is lost, bring its content back with: atoll pool import ${name} --take-over`
}

export class Mapper {
  readonly pools: PoolService
  readonly #context: MapperContext
  readonly #scheduler: CheckpointScheduler
  readonly #reclaimer: Reclaimer
  readonly #usage: Usage
  readonly #reads: PoolReads
  readonly #checker: Checker
  readonly #cover: Cover
  /** Moving volumes between pools: see moves.ts. */
  readonly moves: Moves
  readonly #importing = new Mutex()

  /** Use `openMapper`. */
  constructor(options: MapperOptions, nextPageId: number) {
    const { catalog, engine, log } = options
    const clock = options.clock ?? systemClock
    const newId = options.newId ?? randomId
    const background = new Background(log)
    const pools = new Pools({ catalog, engine, drivers: options.drivers, clock })
    const layers = new Layers({ catalog, pools, clock, newId, background })
    const setTimer = options.setTimer ?? systemTimer
    const pageIds = new PageIds(nextPageId)
    const pins = new PagePins((ids) => deletePagesLater(context, ids))
    const olderCatalog = new OlderCatalog()
    const context: MapperContext = {
      catalog,
      engine,
      log,
      clock,
      setTimer,
      newId,
      batchLogId: options.batchLogId ?? 'none',
      pools,
      layers,
      open: new OpenTable(),
      pageIds,
      pins,
      olderCatalog,
      exporter: new Exporter({ background, catalog, clock, engine, log, olderCatalog, pageIds, pins, setTimer }),
      locks: new KeyedMutex(),
      fillTurns: new KeyedMutex(),
      background,
      requestCheckpoint: (volumeId) => this.#scheduler.request(volumeId),
    }
    this.#context = context
    this.#scheduler = new CheckpointScheduler(context)
    this.#reclaimer = new Reclaimer(context)
    this.#usage = new Usage(context, options.usageTableBytesMax)
    this.#checker = new Checker(context, this.#reclaimer)
    this.#reads = new PoolReads(context)
    this.pools = new PoolService(context, this.#usage, this.#reads)
    this.#cover = new Cover(context, this.#reclaimer)
    this.moves = new Moves(context, { pools: this.pools, reclaimer: this.#reclaimer, cover: this.#cover })
    this.#scheduler.start()
  }

  /** See `importPool` in pool-import.ts. One at a time, and beside no reclaim: that would sweep pages whose roots it has not seen. */
  async importPool(wanted: PoolImport): Promise<PoolImportReport> {
    const run = async () => await importPool(this.#context, this.pools, wanted)
    return await this.#importing.run(async () => await this.#reclaimer.alone(run))
  }

  /** See `acceptPool` in pool-accept.ts. */
  async acceptPool(poolId: string, options: { confirmed: boolean }): Promise<PoolAcceptReport> {
    return await acceptPool(this.#context, this.pools, poolId, options)
  }

  /** Brings what is durable in the catalog into the exports of the pools; false: one of these could not be written. */
  async flushExports(poolIds: readonly string[]): Promise<boolean> {
    return await this.#context.exporter.flushed(poolIds)
  }

  /** See `createVolume` in create.ts. */
  async createVolume(wanted: NewVolume): Promise<ResourceRow> {
    const make = async () => await createVolume(this.#context, wanted)
    return wanted.fromId === undefined ? await make() : await this.#cover.into(wanted.poolId, wanted.fromId, make)
  }

  /** See `createImage` in create.ts. */
  async createImage(wanted: NewImage): Promise<ResourceRow> {
    return await createImage(this.#context, wanted)
  }

  /** See import-target.ts. */
  async beginImport(wanted: NewImport, options: Pick<OpenOptions, 'onEvent'> = {}): Promise<ImportTarget> {
    return await beginImport(this.#context, wanted, options)
  }

  async resumeImport(resourceId: string, options: Pick<OpenOptions, 'onEvent'> = {}): Promise<ImportTarget> {
    return await resumeImport(this.#context, resourceId, options)
  }

  async finishImport(resourceId: string, options: FinishOptions = {}): Promise<ResourceRow> {
    return await finishImport(this.#context, resourceId, options)
  }

  async abortImport(resourceId: string): Promise<void> {
    await abortImport(this.#context, resourceId)
  }

  /** See file-target.ts. */
  async beginFile(wanted: NewFile): Promise<FileTarget> {
    return await beginFile(this.#context, wanted)
  }

  async finishFile(target: FileTarget, sizeBytes: number, rows: FileRows): Promise<ResourceRow> {
    return await finishFile(this.#context, target, sizeBytes, rows)
  }

  async abortFile(target: FileTarget): Promise<void> {
    await abortFile(this.#context, target)
  }

  async createFile(wanted: NewFile, fromId: string | null, rows: FileRows): Promise<ResourceRow> {
    return await createFile(this.#context, wanted, fromId, rows)
  }

  async dropFiles(ids: readonly string[], write: (tx: CatalogTransaction, drop: DropFile) => Promise<void>): Promise<void> {
    await dropFiles(this.#context, ids, write)
  }

  /** See `snapshot` in snapshot.ts. */
  async snapshot(
    items: readonly SnapshotItem[],
    options: { deadlineMs?: number } = {},
  ): Promise<{ rows: ResourceRow[]; pauseMs: number }> {
    return await snapshot(this.#context, items, options)
  }

  /** See `deleteResource` in delete.ts. */
  async deleteResource(id: string, options: DeleteOptions = {}): Promise<void> {
    await deleteResource(this.#context, id, options)
  }

  /** Gives a resource another name. @throws AtollError RESOURCE_NOT_FOUND, NAME_INVALID */
  async rename(id: string, name: string): Promise<ResourceRow> {
    const row = await this.#context.catalog.write(async (tx) => {
      const { kind } = await requireResource(tx, id)
      if (kind !== 'file') checkName(kind, name)
      return await tx
        .updateTable('resources')
        .set({ name, updated_at: this.#context.clock.nowMs() })
        .where('id', '=', id)
        .returningAll()
        .executeTakeFirstOrThrow()
    })
    await this.#context.exporter.flushed([row.home_pool_id])
    return row
  }

  /** See `resize` in resize.ts. */
  async resize(volumeId: string, sizeBytes: number): Promise<void> {
    await resize(this.#context, volumeId, sizeBytes)
  }

  /** See `rollback` in rollback.ts. */
  async rollback(volumeId: string, snapshotId: string): Promise<ResourceRow> {
    const { home_pool_id: poolId } = await requireKind(this.#context.catalog.db, volumeId, 'volume')
    const roll = async () => await rollback(this.#context, volumeId, snapshotId)
    return await this.#cover.into(poolId, snapshotId, roll)
  }

  /** See `diff` in diff.ts. */
  async diff(fromId: string, toId: string): Promise<DiffRange[]> {
    return await diff(this.#context, fromId, toId)
  }

  /** See `snapshotMap` in snapshot-map.ts. */
  async snapshotMap(snapshotId: string): Promise<FrozenMap> {
    return await snapshotMap(this.#context, snapshotId)
  }

  /**
   * Opens a volume, or any resource for reading. One open per resource.
   * @throws AtollError RESOURCE_NOT_FOUND, RESOURCE_STATUS, ARGUMENT_INVALID for a snapshot or an image that is to be written, and
   * what `openLocked` (open.ts) throws
   */
  async open(resourceId: string, options: OpenOptions): Promise<OpenResource> {
    return await this.#context.locks.run([resourceId], async () => {
      const row = await requireResource(this.#context.catalog.db, resourceId)
      requireAvailable(row)
      const readOnly = options.readOnly || row.kind !== 'volume'
      return asOpenResource(await openLocked(this.#context, row, { ...options, readOnly }))
    })
  }

  /**
   * Closes a resource (see close.ts for what holds afterwards); without an id, everything: resources and pools. The catalog
   * and the engine stay open. Closing everything again is harmless.
   * @throws AtollError NOT_OPEN; NO_SPACE, IO_ERROR if what was not flushed could not be stored (it is closed all the same)
   */
  async close(resourceId?: string): Promise<void> {
    if (resourceId === undefined) {
      await this.#closeAll()
      return
    }
    await this.#context.locks.run([resourceId], async () => {
      await closeLocked(this.#context, this.#context.open.require(resourceId))
    })
  }

  isOpen(resourceId: string): boolean {
    return this.#context.open.get(resourceId) !== undefined
  }

  /** What is open of a resource; undefined if it is not. */
  opened(resourceId: string): OpenResource | undefined {
    const entry = this.#context.open.get(resourceId)
    return entry === undefined ? undefined : asOpenResource(entry)
  }

  /** Why the resource could not be opened when that was tried last; undefined if it could be. */
  failure(resourceId: string): AtollError | undefined {
    return this.#context.open.failure(resourceId)
  }

  /**
   * Brings the map of an open volume into the catalog now.
   * @throws AtollError NOT_OPEN, LEASE_LOST, DEVICE_POISONED, NO_SPACE, IO_ERROR
   */
  async checkpoint(volumeId: string): Promise<void> {
    await this.#context.locks.run([volumeId], async () => {
      const entry = this.#context.open.require(volumeId)
      if (entry.kind === 'writable') await checkpointLocked(this.#context, entry)
    })
  }

  /** See `Reclaimer.run` in reclaim.ts. */
  async reclaim(poolId: string | null, options: ReclaimOptions = {}): Promise<ReclaimResult> {
    return await this.#reclaimer.run(poolId, options)
  }

  /** See `Checker.run` in check.ts. */
  async check(options: CheckOptions = {}): Promise<CheckReport> {
    return await this.#checker.run(options)
  }

  /** See `Usage.of` in usage.ts, also for what it costs. */
  async usage(resourceId: string): Promise<ResourceUsage> {
    return await this.#usage.of(resourceId)
  }

  /**
   * The pools other than its own that a resource reads from, by name: those of the layers that its durable map names. Of a map of
   * very many pages, and of one that cannot be read: all that it may read from.
   * @throws AtollError RESOURCE_NOT_FOUND
   */
  async readsFrom(resourceId: string): Promise<LinkedPool[]> {
    return await this.#context.pins.run(
      async () => await this.#reads.of(await requireResource(this.#context.catalog.db, resourceId)),
    )
  }

  /** Layers of a pool that no row knows: reported, never deleted (I11). @throws AtollError POOL_UNAVAILABLE */
  async unknownLayers(poolId: string): Promise<string[]> {
    return await unknownLayers(this.#context, poolId)
  }

  /** Resolves when nothing runs in the background: spare layers, deletes of replaced pages, automatic checkpoints. */
  async idle(): Promise<void> {
    await this.#context.background.idle()
  }

  async #closeAll(): Promise<void> {
    const { background, exporter, layers, log, open, pools } = this.#context
    this.#scheduler.stop()
    layers.close()
    const ids = open.ids()
    for (let start = 0; start < ids.length; start += closeConcurrency) {
      const batch = ids.slice(start, start + closeConcurrency)
      const results = await Promise.allSettled(batch.map(async (id) => await this.#closeIfOpen(id)))
      for (const result of results) {
        if (result.status === 'rejected') log.error({ err: result.reason as unknown }, 'a resource could not be closed cleanly')
      }
    }
    await background.idle()
    await exporter.close()
    await background.idle()
    await pools.close()
  }

  async #closeIfOpen(id: string): Promise<void> {
    await this.#context.locks.run([id], async () => {
      const entry = this.#context.open.get(id)
      if (entry !== undefined) await closeLocked(this.#context, entry)
    })
  }
}

function asOpenResource(entry: OpenEntry): OpenResource {
  return {
    device: entry.device,
    sizeBytes: entry.sizeBytes,
    poolId: entry.poolId,
    epoch: entry.kind === 'writable' ? entry.epoch : 0,
    report: entry.report,
  }
}
