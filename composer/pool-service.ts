/** Pools: places on a backend. Seen by every project. */
import { AtollError, checkName, toAtollError, type ErrorData, type PoolRow } from '@atoll/core'
import type { Finding, PoolCapabilities, PoolCondition, PoolHealth } from '@atoll/southbound'
import {
  cannotOpen,
  noTotals,
  shownSettings,
  type DeviceTotals,
  type ExportStatus,
  type PoolAcceptReport,
  type PoolImport,
  type PoolImportReport,
  type PoolSpace,
} from '@atoll/mapper'
import type { JobView } from './job-kind.ts'
import { moveKey } from './move-service.ts'
import type { ProjectScope } from './resolve.ts'
import { viewSources, type ServiceContext } from './service-context.ts'
import type { MoveView } from './views.ts'

export interface PoolView {
  id: string
  name: string
  driver: string
  options: Record<string, string>
  /** What the operator decided since, and the defaults (mapper/pool-settings.ts); `reserve` only if it was set. */
  settings: Record<string, string>
  /** null: the backend cannot be reached. */
  capabilities: PoolCapabilities | null
  /** Size of the backend. */
  totalBytes: number
  /** Free for new data. */
  freeBytes: number
  /** Allocated by this pool. */
  storedBytes: number
  /** Kept back at present for deletes on a full backend; 0: given up, or the pool keeps none. */
  reserveBytes: number
  /** Whether less than `lowSpaceBytes` is free. It stays true until a tenth more than that is. */
  lowSpace: boolean
  /** Whether the backend was slow when it was looked at last (activity.ts). */
  slow: boolean
  /** How the backend is; null: the pool is not open, and `error` says why. */
  health: PoolHealthView | null
  /** 0: there is no alarm. */
  lowSpaceBytes: number
  /** What the volumes of the pool have together. */
  provisionedBytes: number
  /** What they may have together; null: as much as they like. */
  provisionedMaxBytes: number | null
  /** Sum of what the resources of the pool refer to. */
  logicalBytes: number
  /** logicalBytes / storedBytes. */
  dedupRatio: number
  layers: number
  /** Names of the other pools whose resources may read from this one. */
  readBy: string[]
  /** Of those, the ones of a lost catalog that are not here: nothing of this pool is freed until they are imported or given up. */
  missingReaders: string[]
  /** The job that moves everything out of it; null: nothing is moved out. */
  draining: MoveView | null
  /** What the pool says of itself for the case that the catalog is lost; null: the backend cannot be reached. */
  export: PoolExportView | null
  /** Why the backend cannot be reached; null if it can. */
  error: Pick<ErrorData, 'code' | 'message'> | null
  createdAt: number
}

export interface PoolHealthView {
  /** The worst of the conditions. */
  state: 'ok' | 'warning' | 'error'
  conditions: PoolCondition[]
  /** How long a small read took when it was tried last; null: it was not answered, or nobody tries. */
  answerMs: number | null
  observedAt: string
}

/** What a pool is made of. */
export interface PoolPlan {
  name: string
  driver: string
  options: Record<string, string>
  /** As `PoolService.set` takes them. */
  settings?: Record<string, string>
}

/** How a pool is now, as cheap to know as that can be. */
export interface PoolState {
  id: string
  name: string
  /** null: the backend cannot be reached. */
  space: PoolSpace | null
  lowSpace: boolean
  slow: boolean
  /** null: the pool is not open. */
  health: PoolHealthView | null
  /** What its devices have done since the daemon was started. */
  totals: DeviceTotals
}

export type PoolImportView = Omit<PoolImportReport, 'exportedAt'> & { readonly exportedAt: string | null }

export type PoolAcceptView = Omit<PoolAcceptReport, 'exportedAt'> & { readonly exportedAt: string | null }

export interface PoolExportView {
  /** behind: it cannot be written, see `error`; ahead: it is of a newer catalog than this one and is left as it is. */
  state: 'current' | 'behind' | 'ahead'
  behindSince: string | null
  error: Pick<ErrorData, 'code' | 'message'> | null
}

export class PoolService {
  private readonly context: ServiceContext

  constructor(context: ServiceContext) {
    this.context = context
  }

  /**
   * @throws AtollError NAME_INVALID, NAME_TAKEN, DRIVER_UNKNOWN, POOL_OPTION_INVALID, POOL_OWNED_BY_OTHER, POOL_LOCKED,
   * POOL_UNAVAILABLE; NO_SPACE, POOL_UNSUPPORTED for a reserve that cannot be kept. Nothing was made then
   */
  async create(options: ProjectScope & PoolPlan): Promise<PoolView> {
    const { catalog, mapper, resolver, locks } = this.context
    checkName('pool', options.name)
    const project = await resolver.project(options)
    const row = await locks.run(poolNameKey(options.name), async () => {
      const taken = await catalog.db.selectFrom('pools').select('id').where('name', '=', options.name).executeTakeFirst()
      if (taken !== undefined) {
        throw new AtollError('NAME_TAKEN', `there is already a pool named ${JSON.stringify(options.name)} (${taken.id})`, {
          values: { name: options.name, id: taken.id },
        })
      }
      return await mapper.pools.create({
        projectId: project.id,
        name: options.name,
        driver: options.driver,
        options: options.options,
        ...(options.settings === undefined ? {} : { settings: options.settings }),
      })
    })
    return await this.view(row)
  }

  /** Makes the pool if there is none of any name: what a first start does. */
  async createFirst(options: PoolPlan): Promise<void> {
    const { catalog, log, mapper, resolver } = this.context
    const any = await catalog.db.selectFrom('pools').select('id').limit(1).executeTakeFirst()
    if (any !== undefined) return
    const project = await resolver.project({})
    // The catalog was lost: the daemon starts all the same, so that the pool can be imported.
    const row = await mapper.pools.create({ projectId: project.id, ...options, keepForeign: true })
    const failure = mapper.pools.failure(row.id)
    if (failure !== undefined) log.error({ err: failure, poolId: row.id, pool: row.name }, cannotOpen(row.name, failure))
  }

  /**
   * Brings back what a pool of a lost catalog holds; see pool-import.ts of the mapper. Durable when it returns.
   * @throws AtollError NAME_INVALID, POOL_NOT_FOUND, NAME_TAKEN, POOL_OWNED_BY_OTHER, POOL_LOCKED, POOL_UNAVAILABLE,
   * POOL_EXPORT_MISSING, POOL_IMPORT_CONFLICT, EXPORT_CORRUPT, FORMAT_VERSION
   */
  async import(options: PoolImport): Promise<PoolImportView> {
    checkName('pool', options.name)
    const { exportedAt, ...report } = await this.context.mapper.importPool(options)
    return { ...report, exportedAt: exportedAt === null ? null : new Date(exportedAt).toISOString() }
  }

  /**
   * Says what is given up if this catalog, which is older than the pool, is to count; `confirmed`: it counts from now on. See
   * pool-accept.ts of the mapper.
   * @throws AtollError POOL_NOT_FOUND, POOL_UNAVAILABLE, POOL_NOT_AHEAD, IO_ERROR, FORMAT_VERSION
   */
  async accept(pool: string, options: { confirmed: boolean }): Promise<PoolAcceptView> {
    const { mapper, resolver } = this.context
    const { exportedAt, ...report } = await mapper.acceptPool((await resolver.pool(pool)).id, options)
    return { ...report, exportedAt: exportedAt === null ? null : new Date(exportedAt).toISOString() }
  }

  /** Every pool by name; one whose backend cannot be reached is shown with its error. */
  async list(): Promise<PoolView[]> {
    const rows = await this.context.catalog.db.selectFrom('pools').selectAll().orderBy('name').execute()
    return await Promise.all(rows.map((row) => this.view(row)))
  }

  /** Every pool by name. */
  async states(): Promise<PoolState[]> {
    const { activity, health, mapper, space } = this.context
    const totals = mapper.pools.totals()
    return await Promise.all(
      (await mapper.pools.list()).map(async (row) => {
        const room = await mapper.pools.space(row.id).catch(() => null)
        return {
          id: row.id,
          name: row.name,
          space: room,
          lowSpace: room !== null && space.observe(row, room),
          slow: activity.isSlow(row.id),
          health: healthView(health.observe(row)),
          totals: totals.get(row.id) ?? noTotals,
        }
      }),
    )
  }

  /** @throws AtollError POOL_NOT_FOUND */
  async show(pool: string): Promise<PoolView> {
    return await this.view(await this.context.resolver.pool(pool))
  }

  /** @throws AtollError POOL_NOT_FOUND, POOL_NOT_EMPTY, MOVE_RUNNING */
  async delete(pool: string): Promise<void> {
    const { locks, resolver, mapper } = this.context
    const { id } = await resolver.pool(pool)
    await locks.run(moveKey(id), async () => mapper.pools.delete(id))
  }

  /**
   * Changes settings: `overcommit`, `low-space`, `reserve`; the value `default` takes one back, what is not named stays.
   * @throws AtollError POOL_NOT_FOUND, POOL_OPTION_INVALID, NO_SPACE, POOL_UNSUPPORTED
   */
  async set(pool: string, changes: Readonly<Record<string, string>>): Promise<PoolView> {
    const { resolver, mapper } = this.context
    return await this.view(await mapper.pools.set((await resolver.pool(pool)).id, changes))
  }

  /** Compares the backend with the catalog; changes nothing. @throws AtollError POOL_NOT_FOUND, POOL_UNAVAILABLE */
  async check(pool: string): Promise<Finding[]> {
    const { resolver, mapper } = this.context
    return await mapper.pools.check((await resolver.pool(pool)).id)
  }

  /** Starts a job that frees what nothing refers to. @throws AtollError POOL_NOT_FOUND, JOB_QUEUE_FULL */
  async reclaim(pool: string): Promise<JobView> {
    const { resolver, reclaim } = this.context
    return await reclaim.startNow((await resolver.pool(pool)).id)
  }

  private async view(row: PoolRow): Promise<PoolView> {
    const { activity, health, mapper, space } = this.context
    const settings = shownSettings(row.settings)
    const { readers } = await mapper.pools.links(row.id)
    const readBy = readers.map((pool) => pool.name)
    const missingReaders = readers.filter((pool) => pool.isAbsent).map((pool) => pool.name)
    const { id, name, driver, options, created_at: createdAt } = row
    const draining = (await viewSources(this.context)).moves.get(id) ?? null
    const common = { id, name, driver, options, settings, readBy, missingReaders, draining, createdAt }
    try {
      const { capabilities } = await mapper.pools.open(row)
      const room = await mapper.pools.space(row.id)
      const lowSpace = space.observe(row, room)
      const { export: exported, ...numbers } = await mapper.pools.status(row.id)
      const slow = activity.isSlow(row.id)
      const state = { lowSpace, slow, health: healthView(health.observe(row)) }
      return { ...common, ...room, ...state, capabilities, ...numbers, export: exportView(exported), error: null }
    } catch (error) {
      const { code, message } = toAtollError(error)
      const room = { totalBytes: 0, freeBytes: 0, storedBytes: 0, reserveBytes: 0, lowSpaceBytes: 0, provisionedMaxBytes: null }
      const nothing = { ...room, provisionedBytes: 0, lowSpace: false, slow: false, logicalBytes: 0, dedupRatio: 1, layers: 0 }
      const state = { health: healthView(health.observe(row)) }
      return { ...common, ...nothing, ...state, capabilities: null, export: null, error: { code, message } }
    }
  }
}

function healthView(health: PoolHealth | null): PoolHealthView | null {
  if (health === null) return null
  const { answerMs, conditions, observedAt } = health
  const has = (severity: PoolCondition['severity']): boolean => conditions.some((condition) => condition.severity === severity)
  const state = has('error') ? 'error' : has('warning') ? 'warning' : 'ok'
  return { state, conditions: [...conditions], answerMs, observedAt: new Date(observedAt).toISOString() }
}

function exportView({ state, behindSince, error }: ExportStatus): PoolExportView {
  return {
    state,
    behindSince: behindSince === null ? null : new Date(behindSince).toISOString(),
    error: error === null ? null : { code: error.code, message: error.message },
  }
}

function poolNameKey(name: string): string {
  return `name:pool:${name}`
}
