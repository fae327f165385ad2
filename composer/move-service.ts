/** Moves of volumes between pools: what is looked at before there is a job, and the jobs. */
import { AtollError, type NewId } from '@atoll/core'
import { drainKindName, migrateKindName, type DrainRequest, type MovePlan, type MoveRequest } from '@atoll/mapper'
import type { DrainParams } from './drain-job.ts'
import type { JobView } from './job-kind.ts'
import type { MigrateParams } from './migrate-job.ts'
import type { MoveParams, Moves } from './move-job.ts'
import type { ProjectScope } from './resolve.ts'
import { reread, type ServiceContext } from './service-context.ts'

/** A slot in a second: a job with a lower limit would hardly ever end. */
export const limitBytesPerSecondMin = 4096

export interface MoveOptions {
  /** Name or id of the pool that it is moved to. */
  to: string
  /** At most so much is copied; null (default): as fast as it goes. */
  limitBytesPerSecond?: number | null
  /** Default false. True: only says what would be moved. */
  dryRun?: boolean
}

export interface StartedMove {
  plan: MovePlan
  /** null: nothing was started. */
  job: JobView | null
}

export class MoveService {
  private readonly context: ServiceContext
  private readonly moves: Moves
  private readonly newId: NewId

  constructor(context: ServiceContext, moves: Moves, newId: NewId) {
    this.context = context
    this.moves = moves
    this.newId = newId
  }

  /**
   * Starts to move a volume into another pool, with its snapshots unless these are to stay; it may be attached and is used on.
   * @throws AtollError VOLUME_NOT_FOUND, NAME_AMBIGUOUS, POOL_NOT_FOUND, SIZE_INVALID, MOVE_NEEDLESS, MOVE_RUNNING, POOL_DRAINING,
   * NO_SPACE, POOL_UNAVAILABLE and what else the mapper's plan throws; then nothing was changed
   */
  async migrate(volume: string, options: ProjectScope & MoveOptions & { withSnapshots?: boolean }): Promise<StartedMove> {
    const { catalog, locks, resolver } = this.context
    const limitBytesPerSecond = checkLimit(options.limitBytesPerSecond ?? null)
    const { id } = await resolver.resource('volume', volume, options)
    const target = await resolver.pool(options.to)
    return await locks.runAll([id, moveKey(target.id)], async () => {
      const row = await reread(catalog, id)
      const params: MigrateParams = {
        targetPoolId: target.id,
        limitBytesPerSecond,
        withSnapshots: options.withSnapshots !== false,
      }
      const { withSnapshots } = params
      const request: MoveRequest = { jobId: this.newId(), volumeId: id, targetPoolId: target.id, withSnapshots }
      return await this.start(request, { ...options, projectId: row.project_id, kind: migrateKindName, subject: id, params })
    })
  }

  /**
   * Starts to move everything that lies in a pool into another one; from then on nothing new is made in it, unless the job is cancelled.
   * @throws AtollError POOL_NOT_FOUND, NAME_AMBIGUOUS, ARGUMENT_INVALID, SIZE_INVALID, MOVE_RUNNING, POOL_DRAINING, RESOURCE_STATUS,
   * NO_SPACE, POOL_UNAVAILABLE and what else the mapper's plan throws; then nothing was changed
   */
  async drain(pool: string, options: MoveOptions): Promise<StartedMove> {
    const { locks, resolver } = this.context
    const limitBytesPerSecond = checkLimit(options.limitBytesPerSecond ?? null)
    const source = await resolver.pool(pool)
    const target = await resolver.pool(options.to)
    return await locks.runAll([moveKey(source.id), moveKey(target.id)], async () => {
      const params: DrainParams = { targetPoolId: target.id, limitBytesPerSecond }
      const request: DrainRequest = { jobId: this.newId(), poolId: source.id, targetPoolId: target.id }
      return await this.start(request, {
        ...options,
        projectId: source.project_id,
        kind: drainKindName,
        subject: source.id,
        params,
      })
    })
  }

  /** Changes how fast a job copies; null: as fast as it goes. @throws AtollError JOB_NOT_FOUND, JOB_STATE, SIZE_INVALID */
  async setLimit(jobId: string, limitBytesPerSecond: number | null): Promise<JobView> {
    return await this.context.jobs.setLimit(jobId, checkLimit(limitBytesPerSecond))
  }

  private async start(
    request: MoveRequest | DrainRequest,
    job: { projectId: string; kind: string; subject: string; params: MoveParams; dryRun?: boolean },
  ): Promise<StartedMove> {
    const plan = await this.moves.plan(request)
    if (job.dryRun === true) return { plan, job: null }
    const { projectId, kind, subject, params } = job
    const totalBytes = plan.bytesToCopy + plan.bytesToOffload
    return { plan, job: await this.context.jobs.start({ id: request.jobId, projectId, kind, subject, params, totalBytes }) }
  }
}

/** The key under which a job that names the pool is started: what is looked at before stays true until the job is recorded. */
export function moveKey(poolId: string): string {
  return `move:${poolId}`
}

function checkLimit(limitBytesPerSecond: number | null): number | null {
  if (limitBytesPerSecond === null || limitBytesPerSecond >= limitBytesPerSecondMin) return limitBytesPerSecond
  throw new AtollError(
    'SIZE_INVALID',
    `a limit of ${limitBytesPerSecond} bytes per second is too low: at least ${limitBytesPerSecondMin} are wanted`,
    { values: { limitBytesPerSecond, minBytesPerSecond: limitBytesPerSecondMin } },
  )
}
