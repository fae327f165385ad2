/**
 * The composer: turns resources into open devices and keeps them so, runs long work as jobs, and is what the CLI, the daemon
 * and the APIs call. It opens no socket and speaks no protocol: northbound reads its table of exports.
 */
import { hostname } from 'node:os'
import { join } from 'node:path'
import { newId as randomId, systemClock, type Catalog, type Clock, type Logger, type NewId, type ResourceRow } from '@atoll/core'
import type { Mapper } from '@atoll/mapper'
import type { Engine } from '@atoll/native'
import { ActivityMonitor } from './activity.ts'
import { Attachments } from './attachments.ts'
import { CatalogService } from './catalog-service.ts'
import { CheckService, checkKind } from './check-job.ts'
import { drainKind } from './drain-job.ts'
import { Exports } from './exports.ts'
import { HealthMonitor, type TroubledPool } from './health-monitor.ts'
import { imageExportKind } from './image-export.ts'
import { qcow2ExportKind } from './image-export-qcow2.ts'
import { FileService } from './file-service.ts'
import { ImageService, inspectLimitMsDefault } from './image-service.ts'
import { lookupAll } from './import-address.ts'
import { convertImportKind } from './import-convert.ts'
import { defaultHeaderTimeoutMs, defaultIdleTimeoutMs, type FetchPolicy } from './import-http-fetch.ts'
import { httpImportKind, SecretUrls, type HttpImportOptions } from './import-http.ts'
import { nbdImportKind } from './import-nbd.ts'
import { rawImportKind } from './import-raw.ts'
import { Spool } from './import-spool.ts'
import { ImportStreams, streamImportKind } from './import-stream.ts'
import { ImportTargets } from './import-targets.ts'
import { inspectedImportKind } from './import-unplanned.ts'
import { Jobs } from './jobs.ts'
import { KeyedLock } from './keyed-lock.ts'
import { migrateKind } from './migrate-job.ts'
import { MoveService } from './move-service.ts'
import type { Moves } from './move-job.ts'
import { OpenDevices } from './open-devices.ts'
import { PoolService } from './pool-service.ts'
import { ReclaimScheduler, reclaimKind } from './reclaim-job.ts'
import { Resolver } from './resolve.ts'
import { reread, type ServiceContext } from './service-context.ts'
import { SnapshotService } from './snapshot-service.ts'
import type { ServeTemporaryNbd } from './temporary-nbd.ts'
import { SpaceMonitor } from './space-monitor.ts'
import { systemTimer, type SetTimer } from './timers.ts'
import { VolumeService } from './volume-service.ts'

export interface ComposerOptions {
  mapper: Mapper
  catalog: Catalog
  engine: Engine
  log: Logger
  /** Absolute. */
  home: string
  /** What this home's attachments carry among those of all homes that share the catalog. Default: the empty text, the home of the catalog. */
  homeKey?: string
  serveTemporaryNbd: ServeTemporaryNbd
  /** Default: `nbd.sock` in the home; stands in the URIs of attachments. */
  nbdSocketPath?: string
  /** Who holds the leases; default: host and process id. */
  holder?: string
  clock?: Clock
  setTimer?: SetTimer
  newId?: NewId
  jobsParallelMax?: number
  /** How long a file is inspected within the request for its import; then its job goes on with it. Default 5 s. */
  inspectLimitMs?: number
  /** What imports and exports copy between two looks at whether to go on; default 64 MiB. */
  copyStepBytes?: number
  /** What moves volumes between pools; default: the mapper's. */
  moves?: Moves
  /** How images are fetched over HTTP; default: from public addresses only, with the system's resolver. */
  imageFetch?: Partial<Omit<FetchPolicy, 'setTimer'>> & Pick<HttpImportOptions, 'saveEveryBytes' | 'retryDelayMs'>
}

export interface ComposerStatus {
  pools: number
  volumes: number
  attachedVolumes: number
  connections: number
  runningJobs: number
  /** Names of the pools that had less free than their alarm says when they were looked at last. */
  lowSpacePools: string[]
  /** Pools whose backend is away, full, slow, …, or was when it was looked at last, by name. */
  troubledPools: TroubledPool[]
}

export interface Composer {
  readonly volumes: VolumeService
  readonly snapshots: SnapshotService
  readonly images: ImageService
  readonly files: FileService
  readonly pools: PoolService
  readonly moves: MoveService
  readonly checks: CheckService
  readonly catalog: CatalogService
  readonly jobs: Jobs
  readonly exports: Exports
  readonly activity: ActivityMonitor
  readonly resolver: Resolver
  status(): Promise<ComposerStatus>
  /**
   * Stops: jobs are interrupted where they are, clients disconnected, devices closed. Attachments and jobs go on with the
   * next start. Stop listening before; close mapper, engine and catalog afterwards. Idempotent.
   */
  close(): Promise<void>
}

/**
 * Opens and exports everything that is attached and takes up unfinished jobs. What cannot be opened is shown in error and
 * harms nothing else.
 */
export async function openComposer(options: ComposerOptions): Promise<Composer> {
  const { mapper, catalog, engine, log } = options
  const clock = options.clock ?? systemClock
  const setTimer = options.setTimer ?? systemTimer
  const newId = options.newId ?? randomId
  const locks = new KeyedLock()
  const resolver = new Resolver(catalog)
  const exports = new Exports({ log, setTimer })
  const devices = new OpenDevices({ mapper, holder: options.holder ?? `${hostname()} pid ${process.pid}` })
  const nbdSocketPath = options.nbdSocketPath ?? join(options.home, 'nbd.sock')
  const homeKey = options.homeKey ?? ''
  const attachments = new Attachments({
    catalog,
    mapper,
    devices,
    exports,
    locks,
    log,
    clock,
    setTimer,
    newId,
    nbdSocketPath,
    homeKey,
  })
  const targets = new ImportTargets({ mapper, catalog })
  const streams = new ImportStreams()
  const urls = new SecretUrls()
  const spool = new Spool(options.home)
  const { serveTemporaryNbd } = options
  const convert = { targets, engine, serveTemporaryNbd, newId, setTimer }
  const policy = {
    allowPrivate: false,
    lookup: lookupAll,
    headerTimeoutMs: defaultHeaderTimeoutMs,
    idleTimeoutMs: defaultIdleTimeoutMs,
    ...options.imageFetch,
  }
  const moves = options.moves ?? mapper.moves
  const requestReclaim = (): void => reclaim.request()
  const findResource = (id: string): Promise<ResourceRow> => reread(catalog, id)
  const jobs = new Jobs({
    catalog,
    log,
    clock,
    newId,
    setTimer,
    ...(options.jobsParallelMax === undefined ? {} : { parallelMax: options.jobsParallelMax }),
    kinds: [
      rawImportKind(targets, options.copyStepBytes),
      convertImportKind(convert),
      inspectedImportKind(convert),
      streamImportKind({ ...convert, streams, spool }),
      httpImportKind({ ...convert, ...options.imageFetch, spool, urls, policy }),
      nbdImportKind(targets, options.copyStepBytes),
      imageExportKind({
        devices,
        findResource,
        ...(options.copyStepBytes === undefined ? {} : { copyStepBytes: options.copyStepBytes }),
      }),
      qcow2ExportKind({ devices, findResource, serveTemporaryNbd, newId, setTimer }),
      reclaimKind(mapper),
      checkKind(mapper),
      migrateKind(moves, requestReclaim),
      drainKind(moves, requestReclaim),
    ],
  })
  const reclaim = new ReclaimScheduler({ jobs, log, setTimer })
  const space = new SpaceMonitor({ mapper, log, setTimer })
  const health = new HealthMonitor({ mapper, log, setTimer, onOpened: (poolId) => attachments.poolOpened(poolId) })
  const activity = new ActivityMonitor({ catalog, mapper, exports, jobs, log, clock, setTimer })
  const context: ServiceContext = {
    catalog,
    mapper,
    resolver,
    attachments,
    devices,
    jobs,
    reclaim,
    space,
    health,
    activity,
    locks,
    log,
  }

  await attachments.start()
  await jobs.resumeAll()
  await targets.removeOrphans(jobs.subjects(), log)
  await spool.removeOrphans(jobs.subjects(), log)
  const files = new FileService(context, { clock, newId })
  await files.removeUnfinished()
  space.start()
  health.start()
  activity.start()

  let closed: Promise<void> | null = null
  const close = async (): Promise<void> => {
    await files.close()
    reclaim.close()
    activity.close()
    await space.close()
    await health.close()
    await jobs.close()
    await attachments.close()
  }
  return {
    volumes: new VolumeService(context),
    snapshots: new SnapshotService(context),
    images: new ImageService(context, {
      targets,
      streams,
      urls,
      setTimer,
      inspectLimitMs: options.inspectLimitMs ?? inspectLimitMsDefault,
    }),
    files,
    pools: new PoolService(context),
    moves: new MoveService(context, moves, newId),
    checks: new CheckService(jobs),
    catalog: new CatalogService(catalog),
    jobs,
    exports,
    activity,
    resolver,
    status: () => statusOf(context, exports),
    close: () => (closed ??= close()),
  }
}

async function statusOf(context: ServiceContext, exports: Exports): Promise<ComposerStatus> {
  const { catalog, attachments, health, jobs, space } = context
  const { pools } = await catalog.db
    .selectFrom('pools')
    .select(({ fn }) => fn.countAll<number>().as('pools'))
    .executeTakeFirstOrThrow()
  const { volumes } = await catalog.db
    .selectFrom('resources')
    .select(({ fn }) => fn.countAll<number>().as('volumes'))
    .where('kind', '=', 'volume')
    .executeTakeFirstOrThrow()
  return {
    pools: Number(pools),
    volumes: Number(volumes),
    attachedVolumes: attachments.resourceIds().length,
    connections: exports.list().reduce((count, entry) => count + entry.connections.size, 0),
    runningJobs: jobs.runningCount(),
    lowSpacePools: space.lowPools(),
    troubledPools: health.troubledPools(),
  }
}
