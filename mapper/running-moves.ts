/**
 * The jobs that move volumes between pools, as the catalog has them: what they work on is refused to whoever would take it from
 * under them.
 *
 * A job is known by its kind, by its subject (of `migrate` the volume, of `drain` the pool) and by its parameter `targetPoolId`; it
 * counts from the commit that makes it until it is finished, also while it is paused.
 */
import { AtollError, type CatalogTransaction, type ResourceRow } from '@atoll/core'

export const migrateKindName = 'migrate'
export const drainKindName = 'drain'

const unfinished = ['queued', 'running', 'paused'] as const

export interface RunningMove {
  readonly jobId: string
  readonly kind: typeof migrateKindName | typeof drainKindName
  /** A volume, or the pool that is drained. */
  readonly subject: string
  readonly targetPoolId: string
  /** Of a volume: its snapshots go with it. */
  readonly withSnapshots: boolean
}

export async function runningMoves(tx: CatalogTransaction): Promise<RunningMove[]> {
  const rows = await tx
    .selectFrom('jobs')
    .select(['id', 'kind', 'subject', 'params'])
    .where('kind', 'in', [migrateKindName, drainKindName])
    .where('state', 'in', unfinished)
    .orderBy('created_at')
    .execute()
  return rows.map(({ id, kind, subject, params }) => ({
    jobId: id,
    kind: kind === drainKindName ? drainKindName : migrateKindName,
    subject,
    targetPoolId: String(params['targetPoolId']),
    withSnapshots: params['withSnapshots'] !== false,
  }))
}

/**
 * Refuses what must not happen to a volume while it is being moved (`orDrained`: or while its home is).
 * @throws AtollError MOVE_RUNNING naming the job
 */
export async function requireNotMoving(
  tx: CatalogTransaction,
  volume: Pick<ResourceRow, 'id' | 'name' | 'home_pool_id'>,
  { what, exceptJobId, orDrained = false }: { what: string; exceptJobId?: string; orDrained?: boolean },
): Promise<void> {
  const move = (await runningMoves(tx)).find(
    ({ jobId, kind, subject }) =>
      jobId !== exceptJobId && (kind === drainKindName ? orDrained && subject === volume.home_pool_id : subject === volume.id),
  )
  if (move === undefined) return
  throw moveRunningError(move, `volume "${volume.name}" is being moved`, what)
}

/**
 * Refuses what must not happen to a pool that something is moved out of or into.
 * @throws AtollError MOVE_RUNNING naming the job
 */
export async function requireNoMoveOf(
  tx: CatalogTransaction,
  pool: { readonly id: string; readonly name: string },
  { what, exceptJobId }: { what: string; exceptJobId?: string },
): Promise<void> {
  for (const move of await runningMoves(tx)) {
    if (move.jobId === exceptJobId) continue
    if (move.targetPoolId === pool.id) throw moveRunningError(move, `pool "${pool.name}" is the target of a move`, what)
    if (move.kind === drainKindName && move.subject === pool.id)
      throw moveRunningError(move, `pool "${pool.name}" is being drained`, what)
  }
}

/** The error of what must not be while a job moves something. */
export function moveRunningError({ jobId, kind }: RunningMove, why: string, what: string): AtollError {
  return new AtollError(
    'MOVE_RUNNING',
    `${why} by job ${jobId} (${kind}), so ${what}: wait for the job, or cancel it with 'atoll job cancel ${jobId}'`,
    { values: { jobId, kind } },
  )
}
