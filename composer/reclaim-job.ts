/** The job that frees what no resource refers to any more, and when it is started by itself. */
import { adminProject, isAtollError, type JsonObject, type Logger } from '@atoll/core'
import type { Mapper } from '@atoll/mapper'
import type { JobContext, JobKind, JobView } from './job-kind.ts'
import type { Jobs } from './jobs.ts'
import type { SetTimer } from './timers.ts'

/** Deletes that follow each other within this time are reclaimed together. */
export const reclaimDelayMs = 2000

/** What is reclaimed when no pool is named. */
export const everyPool = 'all'

interface ReclaimParams extends JsonObject {
  /** null: every pool. */
  poolId: string | null
}

export function reclaimKind(mapper: Mapper): JobKind {
  return {
    kind: 'reclaim',
    pausable: true,
    freesSpace: true,
    // One is enough: it goes over all roots anyway.
    parallelMax: 1,
    run: (context) => reclaim(context, mapper),
  }
}

async function reclaim(context: JobContext, mapper: Mapper): Promise<JsonObject> {
  const { poolId } = context.params as ReclaimParams
  try {
    const { freedBytes, removedLayers, sweptPages } = await mapper.reclaim(poolId, {
      signal: context.signal,
      onProgress: (progress) => context.report(progress.freedBytes, null),
    })
    return { freedBytes, removedLayers, sweptPages }
  } catch (error) {
    // The mapper's word for a signal that was aborted; the runner knows what was asked for.
    if (isAtollError(error, 'JOB_CANCELLED')) context.checkInterrupted()
    throw error
  }
}

/** Starts reclaim jobs: at once when asked for, a little after the last delete otherwise. */
export class ReclaimScheduler {
  private readonly jobs: Jobs
  private readonly log: Logger
  private readonly setTimer: SetTimer
  private cancelTimer: (() => void) | null = null

  constructor(options: { jobs: Jobs; log: Logger; setTimer: SetTimer }) {
    this.jobs = options.jobs
    this.log = options.log
    this.setTimer = options.setTimer
  }

  /** Something was deleted. A crash before the job is recorded loses nothing but time: the next reclaim finds it. */
  request(): void {
    this.cancelTimer?.()
    this.cancelTimer = this.setTimer(() => {
      this.cancelTimer = null
      this.startNow(null).catch((error: unknown) =>
        this.log.warn({ err: error }, 'reclaim could not be started; the next delete tries again'),
      )
    }, reclaimDelayMs)
  }

  /** Starts a job for one pool, or for all (null); one that waits for the same already is enough. */
  async startNow(poolId: string | null): Promise<JobView> {
    const subject = poolId ?? everyPool
    const waiting = (await this.jobs.list({ states: ['queued'] })).find(
      (job) => job.kind === 'reclaim' && job.subject === subject,
    )
    return waiting ?? (await this.jobs.start({ projectId: adminProject.id, kind: 'reclaim', subject, params: { poolId } }))
  }

  close(): void {
    this.cancelTimer?.()
  }
}
