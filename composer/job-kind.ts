/** What a kind of job is, and what it is given to run with. */
import type { ErrorData, JobState, JsonObject } from '@atoll/core'

/** Thrown by `JobContext.checkInterrupted`; the runner knows what was asked for. */
export class JobInterrupted extends Error {
  constructor() {
    super('the job was interrupted')
    this.name = 'JobInterrupted'
  }
}

/**
 * Thrown by `run` of a job that cannot go on now and holds nothing meanwhile: it gives up its place among the running ones, is
 * queued again, and is run when what it waits for has come.
 */
export class JobPostponed extends Error {
  /** The job after whose end it goes on; null: it tries again by itself. */
  readonly untilJobId: string | null
  /** When it tries again, if it waits for no job, or that one is gone already. */
  readonly retryMs: number

  /** @param reason what is shown to who looks at the job: what it waits for, and what to do about that */
  constructor(reason: string, until: { jobId?: string; retryMs: number }) {
    super(reason)
    this.name = 'JobPostponed'
    this.untilJobId = until.jobId ?? null
    this.retryMs = until.retryMs
  }
}

export interface JobContext {
  readonly jobId: string
  readonly projectId: string
  /** Id of what the job works on. */
  readonly subject: string
  /** As they are now: `Jobs.setLimit` changes the limit of a job that runs. */
  readonly params: JsonObject
  /** What `save` got last, maybe before a restart; null: start from the beginning. */
  readonly cursor: JsonObject | null
  /** Aborted when the job is to stop: paused, cancelled, or the daemon stops. */
  readonly signal: AbortSignal
  /** Throws JobInterrupted if the job is to stop. Call between steps; a step takes a second or so. */
  checkInterrupted(): void
  /** Tells how far the job is; kept in memory only. `totalBytes` null: not known. */
  report(progressBytes: number, totalBytes?: number | null): void
  /** Records where to go on after a restart. Everything before the cursor must be durable already (I9). */
  save(cursor: JsonObject): Promise<void>
}

export interface JobKind {
  readonly kind: string
  /** False: `pause` is refused (a stream cannot wait). */
  readonly pausable: boolean
  /** Default false. True: the job gives space back, so it is recorded on a full disk, too. */
  readonly freesSpace?: boolean
  /** Default true. False: what it reports is a count of something else. */
  readonly movesBytes?: boolean
  /** Default false. True: `params.limitBytesPerSecond` (null: none) may be changed while the job runs, which heeds it within a second or so. */
  readonly limitable?: boolean
  /** At most this many jobs of the kind run at a time. */
  readonly parallelMax: number
  /**
   * Does the work and returns the job's result. Called again, with the last cursor, after a pause or a restart of the
   * daemon, so that every step can be done twice. Interrupted, it throws what `checkInterrupted` throws.
   */
  run(context: JobContext): Promise<JsonObject>
  /** What else there is to say of how far it is, from its last cursor. */
  details?(cursor: JsonObject | null): JsonObject
  /**
   * Removes what the job has made, after it failed or was cancelled. May be called twice, and before the job ever ran.
   * The job gets its final state when this has returned.
   */
  discard?(context: Pick<JobContext, 'jobId' | 'subject' | 'params' | 'cursor'>): Promise<void>
}

/** A job as it is shown. */
export interface JobView {
  id: string
  projectId: string
  kind: string
  subject: string
  state: JobState
  progressBytes: number
  /** null: not known. */
  totalBytes: number | null
  /** Over the last seconds; 0 when the job does not run. */
  rateBytesPerSecond: number
  /** null: not known. */
  secondsLeft: number | null
  /** Why a queued job does not run, and what to do; null: it only waits for its turn, or runs. */
  waiting: string | null
  /** What its kind has to say of how far it is; null: nothing. */
  details: JsonObject | null
  params: JsonObject
  result: JsonObject | null
  error: Pick<ErrorData, 'code' | 'message'> | null
  createdAt: number
  updatedAt: number
}

/** Whether a job of this state will never run again. */
export function isFinished(state: JobState): boolean {
  return state === 'done' || state === 'failed' || state === 'cancelled'
}
