/**
 * What the jobs `migrate` and `drain` have in common: the phases of a move (mapper.moves), one after the other, each of which can be
 * done twice.
 *
 * Rules:
 * - `freeze`: from its end on what is written lies in the target. `fill`: what was written before is copied there, in pieces of
 *   about a second, with the cursor saved after each. `home`: the target becomes the home. `drop`: what nobody reads in the old pool goes.
 * - A phase is over when the cursor that names the next one is saved. Whatever it had begun before that is done again.
 * - A backend that is away and a layer that another job has are waited for, with nothing held and no place taken; everything else
 *   fails the job. A failed or cancelled job leaves nothing half filled; what was written in the target meanwhile stays there,
 *   where the map finds it.
 */
import { AtollError, toAtollError, type JsonObject } from '@atoll/core'
import type { DrainRequest, Mapper, MoveRequest } from '@atoll/mapper'
import { JobInterrupted, JobPostponed, type JobContext, type JobKind } from './job-kind.ts'

/** What a move asks of the mapper. */
export type Moves = Pick<Mapper['moves'], 'plan' | 'freeze' | 'claim' | 'fillNext' | 'home' | 'drop' | 'release'>

export type MovePhase = 'freeze' | 'fill' | 'home' | 'drop'

/** What a job of a move does at present, for people. */
export const phaseNames = {
  freeze: 'turning writes to the target',
  fill: 'copying',
  home: 'making the target its home',
  drop: 'freeing the old place',
} as const satisfies Record<MovePhase, string>

export interface MoveParams extends JsonObject {
  targetPoolId: string
  /** null: as fast as it goes. */
  limitBytesPerSecond: number | null
}

/** How far a move is; the job's cursor. */
export interface MoveProgress extends JsonObject {
  phase: MovePhase
  /** Of `fillNext`. */
  fill: JsonObject | null
  /** What has to come into the target in all; null: not claimed yet. */
  totalBytes: number | null
  copiedBytes: number
  offloadedBytes: number
  /** Zeros and holes among what has to come. */
  skippedBytes: number
  /** Longest that requests of clients were held up. */
  pauseMs: number
  /** Failures in a row that were tried again. */
  failures: number
}

/**
 * How long requests in flight are waited for while everything else is held up, one attempt after the other: the first ones are not
 * felt by clients.
 */
export const freezeDeadlinesMs: readonly number[] = [50, 100, 200, 500, 1000, 2000, 5000]
/** When a freeze that found requests in flight is tried again. */
export const busyRetryMs = 500
/** When a move is tried again whose backend is away, or whose layers another job has that is not known here. */
export const awayRetryMs = 5000
/** So often in a row a failure of the backend is tried again. */
export const failuresMax = 5

function progressOf(cursor: JsonObject | null): MoveProgress {
  const start: MoveProgress = {
    phase: 'freeze',
    fill: null,
    totalBytes: null,
    copiedBytes: 0,
    offloadedBytes: 0,
    skippedBytes: 0,
    pauseMs: 0,
    failures: 0,
  }
  return cursor === null ? start : { ...start, ...(cursor as MoveProgress) }
}

/** What is shown of a job beside its bytes. */
function detailsOf(cursor: JsonObject | null): JsonObject {
  const { phase, copiedBytes, offloadedBytes, skippedBytes, pauseMs } = progressOf(cursor)
  return { phase, copiedBytes, offloadedBytes, skippedBytes, pauseMs }
}

/** What says what a job moves. */
export type MoveJob = Pick<JobContext, 'jobId' | 'subject' | 'params'>

/** A kind of job that moves what `requestOf` reads from it. `requestReclaim`: what it gave up is freed by a reclaim. */
export function moveKind(
  kind: string,
  moves: Moves,
  requestReclaim: () => void,
  requestOf: (job: MoveJob) => MoveRequest | DrainRequest,
): JobKind {
  return {
    kind,
    pausable: true,
    limitable: true,
    parallelMax: 2,
    details: detailsOf,
    run: (context) => runMove(context, moves, requestOf(context)),
    discard: async (context) => {
      await moves.release(requestOf(context))
      if (progressOf(context.cursor).phase === 'drop') requestReclaim()
    },
  }
}

/** Runs a move from where its cursor says to its end; the job's result. */
async function runMove(context: JobContext, moves: Moves, request: MoveRequest | DrainRequest): Promise<JsonObject> {
  const progress = progressOf(context.cursor)
  try {
    const { freedBytes } = await goOn(context, moves, request, progress)
    const { copiedBytes, offloadedBytes, skippedBytes, pauseMs } = progress
    return { copiedBytes, offloadedBytes, skippedBytes, freedBytes, pauseMs }
  } catch (error) {
    if (error instanceof JobInterrupted || error instanceof JobPostponed) throw error
    // The mapper's word for a signal that was aborted; the runner knows what was asked for.
    if (context.signal.aborted) throw new JobInterrupted()
    return await postponeOrFail(context, progress, error)
  }
}

async function goOn(
  context: JobContext,
  moves: Moves,
  request: MoveRequest | DrainRequest,
  progress: MoveProgress,
): Promise<{ freedBytes: number }> {
  const { signal } = context
  const enter = async (phase: MovePhase): Promise<void> => {
    Object.assign(progress, { phase, failures: 0 })
    await context.save({ ...progress })
    context.checkInterrupted()
  }
  context.checkInterrupted()
  if (progress.phase === 'freeze') {
    const deadlineMs = freezeDeadlinesMs[Math.min(progress.failures, freezeDeadlinesMs.length - 1)] as number
    const { pauseMs } = await moves.freeze(request, { deadlineMs, signal })
    progress.pauseMs = Math.max(progress.pauseMs, pauseMs)
    await enter('fill')
  }
  if (progress.phase === 'fill') {
    await fill(context, moves, request, progress)
    await enter('home')
  }
  if (progress.phase === 'home') {
    await moves.home(request)
    await enter('drop')
  }
  return await moves.drop(request, { signal })
}

async function fill(
  context: JobContext,
  moves: Moves,
  request: MoveRequest | DrainRequest,
  progress: MoveProgress,
): Promise<void> {
  const claim = await moves.claim(request)
  if (!claim.claimed) {
    const jobId = claim.waitsForJobId
    throw new JobPostponed(`it needs layers that job ${jobId} is copying, and goes on when that one has ended`, {
      jobId,
      retryMs: awayRetryMs,
    })
  }
  progress.totalBytes ??= claim.plan.bytesToCopy + claim.plan.bytesToOffload
  const report = (): void => {
    const doneBytes = progress.copiedBytes + progress.offloadedBytes + progress.skippedBytes
    // A piece that a kill cut off is counted again.
    context.report(doneBytes, Math.max(progress.totalBytes ?? 0, doneBytes))
  }
  report()
  for (;;) {
    context.checkInterrupted()
    const limit = (context.params as MoveParams).limitBytesPerSecond
    const piece = await moves.fillNext(request, progress.fill, { limitBytesPerSecond: limit, signal: context.signal })
    progress.fill = piece.cursor
    progress.copiedBytes += piece.copiedBytes
    progress.offloadedBytes += piece.offloadedBytes
    progress.skippedBytes += piece.skippedBytes
    progress.failures = 0
    report()
    await context.save({ ...progress })
    if (piece.isDone) return
  }
}

/** What is worth another try is postponed; anything else fails the job, and says in which phase and what to do. */
async function postponeOrFail(context: JobContext, progress: MoveProgress, error: unknown): Promise<never> {
  const failure = toAtollError(error)
  const { phase } = progress
  const isBusy = phase === 'freeze' && (failure.code === 'SNAPSHOT_BUSY' || failure.code === 'DEVICE_BUSY')
  const isAway = failure.code === 'POOL_UNAVAILABLE'
  const triesMax = isBusy ? freezeDeadlinesMs.length : failuresMax
  if (isAway || ((isBusy || failure.code === 'IO_ERROR') && progress.failures + 1 < triesMax)) {
    progress.failures += 1
    await context.save({ ...progress })
    const retryMs = isBusy ? busyRetryMs : awayRetryMs
    throw new JobPostponed(`${phaseNames[phase]}: ${failure.code}: ${failure.message}; it tries again by itself`, { retryMs })
  }
  throw new AtollError(failure.code, `${phaseNames[phase]}: ${failure.message}; ${wayOn(phase)}`, {
    cause: error,
    values: { ...failure.values, phase },
  })
}

function wayOn(phase: MovePhase): string {
  switch (phase) {
    case 'freeze':
      return 'nothing was moved: put that right and start again'
    case 'fill':
    case 'home':
      return 'what was copied is removed from the target, everything is readable where it was, and what is written lies in the target: put that right and start again, or move it back'
    case 'drop':
      return 'the move itself is done: what is left at the old place goes with the next reclaim'
    default:
      return phase satisfies never
  }
}
