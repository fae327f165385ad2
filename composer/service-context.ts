/** What the services share, and the rules that more than one of them needs. */
import {
  AtollError,
  toAtollError,
  type Catalog,
  type ErrorCode,
  type Logger,
  type ResourceKind,
  type ResourceRow,
} from '@atoll/core'
import { drainKindName, isMapUnreadable, migrateKindName, type Mapper } from '@atoll/mapper'
import type { ActivityMonitor } from './activity.ts'
import type { Attachments } from './attachments.ts'
import type { HealthMonitor } from './health-monitor.ts'
import type { Jobs } from './jobs.ts'
import type { KeyedLock } from './keyed-lock.ts'
import type { MoveParams, MovePhase } from './move-job.ts'
import type { OpenDevices } from './open-devices.ts'
import type { ReclaimScheduler } from './reclaim-job.ts'
import type { Resolver } from './resolve.ts'
import type { SpaceMonitor } from './space-monitor.ts'
import { resourceView, type MoveView, type PoolsRead, type ResourceUsage, type ResourceView, type ViewSources } from './views.ts'

export interface ServiceContext {
  readonly catalog: Catalog
  readonly mapper: Mapper
  readonly resolver: Resolver
  readonly attachments: Attachments
  readonly devices: OpenDevices
  readonly jobs: Jobs
  readonly reclaim: ReclaimScheduler
  readonly space: SpaceMonitor
  readonly health: HealthMonitor
  readonly activity: ActivityMonitor
  /** One change of a resource at a time, by its id; one making of a name at a time, by `nameKey`. */
  readonly locks: KeyedLock
  readonly log: Logger
}

/** Names need not be unique; who types them wants them to be, an API does not. */
export interface NamePolicy {
  /** Default false: a name that is there already is refused. */
  allowDuplicateName?: boolean
}

const inUseCodes = {
  volume: 'VOLUME_IN_USE',
  snapshot: 'SNAPSHOT_IN_USE',
  image: 'IMAGE_IN_USE',
  file: 'FILE_IN_USE',
} as const satisfies Record<ResourceKind, ErrorCode>

/** The key under which a name is made; snapshots have names of their own in each volume. */
export function nameKey(kind: ResourceKind, scopeId: string, name: string): string {
  return `name:${kind}:${scopeId}:${name}`
}

/** @throws AtollError NAME_TAKEN naming the id. `scopeId`: of the project, or of the volume for a snapshot. */
export async function requireFreeName(catalog: Catalog, kind: ResourceKind, scopeId: string, name: string): Promise<void> {
  const taken = await catalog.db
    .selectFrom('resources')
    .select('id')
    .where('kind', '=', kind)
    .where(kind === 'snapshot' ? 'volume_id' : 'project_id', '=', scopeId)
    .where('name', '=', name)
    .executeTakeFirst()
  if (taken === undefined) return
  throw new AtollError(
    'NAME_TAKEN',
    `there is already ${kind === 'image' ? 'an' : 'a'} ${kind} named ${JSON.stringify(name)} (${taken.id}): choose another name, or delete that one`,
    {
      values: { name, id: taken.id },
    },
  )
}

/** Refuses what is attached, or what a job works on. @throws AtollError VOLUME_IN_USE, SNAPSHOT_IN_USE, IMAGE_IN_USE */
export function requireUnused(context: ServiceContext, row: ResourceRow, what: string): void {
  const refuse = (why: string, values: Record<string, string>): never => {
    throw new AtollError(inUseCodes[row.kind], `${row.kind} ${row.name} (${row.id}) cannot be ${what}: ${why}`, {
      values: { id: row.id, ...values },
    })
  }
  if (context.attachments.isAttached(row.id)) refuse('it is attached; detach it first', {})
  const jobId = context.jobs.subjects().get(row.id)
  if (jobId !== undefined) refuse(`job ${jobId} works on it; wait for the job or cancel it`, { job: jobId })
  if (context.devices.isOpen(row.id)) refuse('it is open', {})
}

/** The snapshots of a volume, oldest first. */
export async function snapshotsOf(catalog: Catalog, volumeId: string): Promise<ResourceRow[]> {
  return await catalog.db
    .selectFrom('resources')
    .selectAll()
    .where('kind', '=', 'snapshot')
    .where('volume_id', '=', volumeId)
    .orderBy('created_at')
    .orderBy('id')
    .execute()
}

/** The row as it is now: an operation looks again after it has the lock. @throws AtollError RESOURCE_NOT_FOUND */
export async function reread(catalog: Catalog, id: string): Promise<ResourceRow> {
  const row = await catalog.db.selectFrom('resources').selectAll().where('id', '=', id).executeTakeFirst()
  if (row === undefined)
    throw new AtollError('RESOURCE_NOT_FOUND', `there is no resource ${id}: it was deleted meanwhile`, { values: { id } })
  return row
}

export async function viewSources(context: ServiceContext): Promise<ViewSources> {
  const pools = await context.catalog.db.selectFrom('pools').select(['id', 'name']).execute()
  const poolNames = new Map(pools.map(({ id, name }) => [id, name]))
  return {
    poolNames,
    moves: movesUnderWay(context.jobs, poolNames),
    attachments: (id) => context.attachments.viewsOf(id),
    errorOf: (id) => context.attachments.errorOf(id) ?? lastingFailure(context.mapper, id),
  }
}

/** The jobs that move something, by the id of what they move. */
export function movesUnderWay(jobs: Jobs, poolNames: ReadonlyMap<string, string>): Map<string, MoveView> {
  return new Map(
    jobs.unfinishedOf(migrateKindName, drainKindName).map(({ id: jobId, subject, state, params, details }) => {
      const { targetPoolId } = params as MoveParams
      const { phase } = details as { phase: MovePhase }
      return [subject, { jobId, state: state as MoveView['state'], phase, to: poolNames.get(targetPoolId) ?? targetPoolId }]
    }),
  )
}

/** One resource as it is shown, whatever its kind. */
export async function viewOfOne(context: ServiceContext, row: ResourceRow): Promise<ResourceView> {
  return resourceView(row, await viewSources(context))
}

/** Why the resource could not be opened last, attached or not; null if it could, or may open when it is tried again. */
function lastingFailure(mapper: Mapper, id: string): AtollError | null {
  const failure = mapper.failure(id)
  return failure === undefined || failure.retryable ? null : failure
}

/** A view with the pools other than its own that the resource reads from. */
export async function withPoolsRead<View extends { id: string }>(context: ServiceContext, view: View): Promise<View & PoolsRead> {
  const pools = await context.mapper.readsFrom(view.id)
  return { ...view, readsFrom: pools.map((pool) => pool.name) }
}

/** A view with what the resource takes; one whose map cannot be read is shown in error, and what it takes is not known. */
export async function withUsage<View extends ResourceView & { status: string }>(
  context: ServiceContext,
  view: View,
): Promise<(View | (View & { status: 'error' })) & ResourceUsage> {
  try {
    return { ...view, ...(await context.mapper.usage(view.id)) }
  } catch (error) {
    if (!isMapUnreadable(error)) throw error
    const { code, message } = toAtollError(error)
    return { ...view, status: 'error', error: view.error ?? { code, message }, usedBytes: null, sharedBytes: null }
  }
}
