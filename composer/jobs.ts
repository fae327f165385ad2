/**
 * Runs long work: imports, exports, reclaim. A job is a row of the catalog first and a running function second.
 *
 * Rules:
 * - A state is committed before anybody is told of it. `queued` and `running` jobs go on after a restart of the daemon, from
 *   the last saved cursor; `paused` ones stay paused; the others are finished and never run again.
 * - What a failed or cancelled job has made is discarded before its final state is committed.
 * - At most `parallelMax` jobs run at a time, of each kind at most its own `parallelMax`; the others wait in the order they
 *   came, at most `unfinishedJobsMax` of them. The newest `finishedJobsMax` finished jobs are kept.
 * - A job that is postponed is queued and takes no place: it is run again when the job it waits for has ended, or its time has come.
 */
import {
  AtollError,
  isId,
  toAtollError,
  type Catalog,
  type Clock,
  type JobRow,
  type JobState,
  type JobUpdate,
  type JsonObject,
  type Logger,
} from '@atoll/core'
import { isFinished, JobInterrupted, JobPostponed, type JobContext, type JobKind, type JobView } from './job-kind.ts'
import { fromFileError } from './from-file-error.ts'
import { JobRate } from './job-rate.ts'
import { KeyedLock } from './keyed-lock.ts'
import { systemTimer, type SetTimer } from './timers.ts'

export const jobsParallelMax = 4
export const unfinishedJobsMax = 256
export const finishedJobsMax = 1000
/** At most this many callers wait for one job. */
export const jobWatchersMax = 1000

type Intent = 'pause' | 'cancel' | 'stop'

/** A job that is not finished. */
interface LiveJob {
  row: JobRow
  kind: JobKind
  progressBytes: number
  totalBytes: number | null
  rate: JobRate
  /** Set while `run` runs. */
  running: { controller: AbortController; settled: Promise<void>; intent: Intent | null } | null
  /** A change (pause, resume, cancel) is under way: it must not be started meanwhile. */
  held: boolean
  /** Set while it waits for something that is not its turn. */
  postponed: { reason: string; untilJobId: string | null; cancelTimer: () => void } | null
}

export interface JobsOptions {
  catalog: Catalog
  log: Logger
  clock: Clock
  newId: () => string
  setTimer?: SetTimer
  kinds: readonly JobKind[]
  parallelMax?: number
}

export interface NewJobOptions {
  projectId: string
  kind: string
  subject: string
  params: JsonObject
  totalBytes?: number | null
  /** Default: a new one. */
  id?: string
}

export class Jobs {
  private readonly catalog: Catalog
  private readonly log: Logger
  private readonly clock: Clock
  private readonly newId: () => string
  private readonly setTimer: SetTimer
  private readonly kinds = new Map<string, JobKind>()
  private readonly parallelMax: number
  private readonly live = new Map<string, LiveJob>()
  private readonly watchers = new Map<string, Set<(view: JobView) => void>>()
  private readonly lock = new KeyedLock()
  private stopping = false

  constructor(options: JobsOptions) {
    this.catalog = options.catalog
    this.log = options.log
    this.clock = options.clock
    this.newId = options.newId
    this.setTimer = options.setTimer ?? systemTimer
    this.parallelMax = options.parallelMax ?? jobsParallelMax
    for (const kind of options.kinds) {
      if (this.kinds.has(kind.kind)) throw new AtollError('INTERNAL', `two kinds of job are named ${kind.kind}`)
      this.kinds.set(kind.kind, kind)
    }
  }

  /** Takes up what an earlier daemon left: call once, before the first `start`. */
  async resumeAll(): Promise<void> {
    const rows = await this.catalog.db
      .selectFrom('jobs')
      .selectAll()
      .where('state', 'in', ['queued', 'running', 'paused'])
      .orderBy('created_at')
      .orderBy('id')
      .execute()
    for (const row of rows) {
      const kind = this.kinds.get(row.kind)
      if (kind === undefined) {
        this.log.warn({ jobId: row.id, kind: row.kind }, 'a job of a kind that this version does not know stays as it is')
        continue
      }
      if (row.state === 'running') {
        row.state = 'queued'
        await this.update(row, { state: 'queued' })
      }
      this.live.set(row.id, newLiveJob(row, kind))
    }
    this.startWaiting()
  }

  /**
   * Records a job and runs it as soon as there is room.
   * @throws AtollError JOB_QUEUE_FULL
   */
  async start(options: NewJobOptions): Promise<JobView> {
    const kind = this.kinds.get(options.kind)
    if (kind === undefined) throw new AtollError('INTERNAL', `no kind of job is named ${options.kind}`)
    this.checkOpen()
    if (this.live.size >= unfinishedJobsMax) {
      throw new AtollError('JOB_QUEUE_FULL', `${this.live.size} jobs are unfinished already; the limit is ${unfinishedJobsMax}`, {
        values: { limit: unfinishedJobsMax },
      })
    }
    const now = this.clock.nowMs()
    const row: JobRow = {
      id: options.id ?? this.newId(),
      project_id: options.projectId,
      kind: options.kind,
      subject: options.subject,
      state: 'queued',
      progress_bytes: 0,
      total_bytes: options.totalBytes ?? null,
      params: options.params,
      cursor: null,
      result: null,
      error_code: null,
      error_message: null,
      created_at: now,
      updated_at: now,
    }
    // Entered before the commit, so that the bound above counts it.
    const job = newLiveJob(row, kind)
    this.live.set(row.id, job)
    try {
      await this.catalog.write(async (tx) => void (await tx.insertInto('jobs').values(row).execute()), {
        emergency: kind.freesSpace === true,
      })
    } catch (error) {
      this.live.delete(row.id)
      throw error
    }
    this.startWaiting()
    return this.viewOf(job)
  }

  /** Newest first; `states` narrows, `projectId` too. */
  async list(filter: { projectId?: string; states?: readonly JobState[]; limit?: number } = {}): Promise<JobView[]> {
    let query = this.catalog.db
      .selectFrom('jobs')
      .selectAll()
      .orderBy('created_at', 'desc')
      .orderBy('id')
      .limit(filter.limit ?? unfinishedJobsMax + finishedJobsMax)
    if (filter.projectId !== undefined) query = query.where('project_id', '=', filter.projectId)
    if (filter.states !== undefined) query = query.where('state', 'in', filter.states)
    return (await query.execute()).map((row) => this.viewOfRow(row))
  }

  /** @throws AtollError JOB_NOT_FOUND */
  async show(id: string): Promise<JobView> {
    const live = this.live.get(id.toLowerCase())
    if (live !== undefined) return this.viewOf(live)
    const row = isId(id.toLowerCase())
      ? await this.catalog.db.selectFrom('jobs').selectAll().where('id', '=', id.toLowerCase()).executeTakeFirst()
      : undefined
    if (row === undefined) throw new AtollError('JOB_NOT_FOUND', `there is no job ${JSON.stringify(id)}`, { values: { job: id } })
    return this.viewOfRow(row)
  }

  runningCount(): number {
    return [...this.live.values()].filter(({ running }) => running !== null).length
  }

  /** How many jobs are in each state that they leave again. */
  unfinished(): { queued: number; running: number; paused: number } {
    const counts = { queued: 0, running: 0, paused: 0 }
    for (const { row, running } of this.live.values()) {
      if (running !== null) counts.running += 1
      else if (row.state === 'queued' || row.state === 'paused') counts[row.state] += 1
    }
    return counts
  }

  /** The jobs that run now and move bytes, in the order they came. */
  moving(): JobView[] {
    const moving = [...this.live.values()].filter(({ running, kind }) => running !== null && kind.movesBytes !== false)
    return moving.map((job) => this.viewOf(job))
  }

  /** Ids of what unfinished jobs work on, with the job's id. */
  subjects(): ReadonlyMap<string, string> {
    return new Map([...this.live.values()].map(({ row }) => [row.subject, row.id]))
  }

  /** The unfinished jobs of some kinds, in the order they came. */
  unfinishedOf(...kinds: string[]): JobView[] {
    return [...this.live.values()].filter(({ row }) => kinds.includes(row.kind)).map((job) => this.viewOf(job))
  }

  /**
   * Changes how fast a job may go; null: as fast as it can. One that runs heeds it within a second or so.
   * @throws AtollError JOB_STATE if it is finished or has no limit, JOB_NOT_FOUND
   */
  async setLimit(id: string, limitBytesPerSecond: number | null): Promise<JobView> {
    return await this.change(id, async (job) => {
      if (job.kind.limitable !== true)
        throw new AtollError('JOB_STATE', `a job of the kind ${job.row.kind} has no limit`, { values: { job: id } })
      const params = { ...job.row.params, limitBytesPerSecond }
      await this.update(job.row, { params })
      job.row.params = params
      this.notify(job)
    })
  }

  /**
   * Stops the job where it is; returns when it has stopped. A paused job stays as it is.
   * @throws AtollError JOB_STATE if it is finished or cannot be paused
   */
  async pause(id: string): Promise<JobView> {
    return await this.change(id, async (job) => {
      if (!job.kind.pausable)
        throw new AtollError('JOB_STATE', `a job of the kind ${job.row.kind} cannot be paused`, { values: { job: id } })
      if (job.running !== null) await this.interrupt(job, 'pause')
      if (job.row.state !== 'queued') return
      this.unpostpone(job)
      await this.setState(job, { state: 'paused' })
    })
  }

  /**
   * Lets a paused job go on, and one that was postponed try again at once; one that is queued or runs does so anyway.
   * @throws AtollError JOB_STATE if it is finished
   */
  async resume(id: string): Promise<JobView> {
    return await this.change(id, async (job) => {
      this.unpostpone(job)
      if (job.row.state === 'paused') await this.setState(job, { state: 'queued' })
    })
  }

  /**
   * Ends the job for good and discards what it has made; returns when that is done.
   * @throws AtollError JOB_STATE if it is finished
   */
  async cancel(id: string): Promise<JobView> {
    return await this.change(id, async (job) => {
      if (job.running === null) await this.finish(job, 'cancelled', null, null)
      else await this.interrupt(job, 'cancel')
    })
  }

  /** Resolves when the job is finished; `onProgress` is called with every change. Ends early when `signal` is aborted. */
  async wait(id: string, options: { onProgress?: (view: JobView) => void; signal?: AbortSignal } = {}): Promise<JobView> {
    const { promise, resolve, reject } = Promise.withResolvers<JobView>()
    const watcher = (view: JobView): void => {
      options.onProgress?.(view)
      if (isFinished(view.state)) resolve(view)
    }
    const watchers = this.watchers.get(id) ?? new Set()
    if (watchers.size >= jobWatchersMax) {
      throw new AtollError('LIMIT_REACHED', `${jobWatchersMax} callers wait for job ${id} already`, {
        values: { limit: jobWatchersMax },
      })
    }
    this.watchers.set(id, watchers.add(watcher))
    const aborted = (): void => reject(new JobInterrupted())
    options.signal?.addEventListener('abort', aborted, { once: true })
    try {
      if (options.signal?.aborted) throw new JobInterrupted()
      const view = await this.show(id)
      if (isFinished(view.state)) return view
      return await promise
    } finally {
      options.signal?.removeEventListener('abort', aborted)
      watchers.delete(watcher)
      if (watchers.size === 0) this.watchers.delete(id)
    }
  }

  /** Stops what runs, without changing its state in the catalog: it goes on with the next daemon. */
  async close(): Promise<void> {
    this.stopping = true
    for (const job of this.live.values()) this.unpostpone(job)
    await Promise.all([...this.live.values()].map((job) => (job.running === null ? undefined : this.interrupt(job, 'stop'))))
  }

  private checkOpen(): void {
    if (this.stopping) throw new AtollError('COMPOSER_CLOSED', 'the daemon is stopping')
  }

  /** Runs `fn` on an unfinished job, one change of a job at a time. */
  private async change(id: string, fn: (job: LiveJob) => Promise<void>): Promise<JobView> {
    return await this.lock.run(id.toLowerCase(), async () => {
      this.checkOpen()
      const job = this.live.get(id.toLowerCase())
      if (job === undefined) {
        const view = await this.show(id)
        throw new AtollError('JOB_STATE', `job ${id} is ${view.state}`, { values: { job: id, state: view.state } })
      }
      job.held = true
      try {
        await fn(job)
      } finally {
        job.held = false
        this.startWaiting()
      }
      return this.viewOf(job)
    })
  }

  private startWaiting(): void {
    if (this.stopping) return
    let runningCount = 0
    const runningOfKind = new Map<JobKind, number>()
    for (const { running, kind } of this.live.values()) {
      if (running === null) continue
      runningCount += 1
      runningOfKind.set(kind, (runningOfKind.get(kind) ?? 0) + 1)
    }
    // The map keeps the order of insertion, which is the order the jobs came in.
    for (const job of this.live.values()) {
      if (runningCount >= this.parallelMax) return
      const ofKind = runningOfKind.get(job.kind) ?? 0
      if (job.running !== null || job.held || job.postponed !== null || job.row.state !== 'queued') continue
      if (ofKind >= job.kind.parallelMax) continue
      runningCount += 1
      runningOfKind.set(job.kind, ofKind + 1)
      this.runJob(job)
    }
  }

  private runJob(job: LiveJob): void {
    const controller = new AbortController()
    const running: NonNullable<LiveJob['running']> = { controller, settled: Promise.resolve(), intent: null }
    job.running = running
    running.settled = this.runToEnd(job, running).catch((error: unknown) => {
      // The catalog could not record the outcome: the job stays unfinished there and goes on after a restart.
      job.running = null
      this.log.error({ err: error, jobId: job.row.id }, 'the outcome of a job could not be recorded')
    })
  }

  private async runToEnd(job: LiveJob, running: NonNullable<LiveJob['running']>): Promise<void> {
    await this.setState(job, { state: 'running' })
    // Only the work itself stands in the `try`: a job whose end cannot be recorded must not be discarded as a failed one.
    const outcome = await job.kind.run(this.contextOf(job, running.controller.signal)).then(
      (result) => ({ result }),
      (error: unknown) => ({ error }),
    )
    if ('result' in outcome) await this.finish(job, 'done', outcome.result, null)
    else if (running.intent === 'cancel') await this.finish(job, 'cancelled', null, null)
    else if (running.intent === 'stop') {
      job.running = null
      await this.update(job.row, { progress_bytes: job.progressBytes, total_bytes: job.totalBytes })
    } else if (running.intent === 'pause' && (isInterruption(outcome.error) || outcome.error instanceof JobPostponed)) {
      job.running = null
      await this.setState(job, { state: 'paused' })
    } else if (outcome.error instanceof JobPostponed) {
      job.running = null
      this.postpone(job, outcome.error)
      await this.setState(job, { state: 'queued' })
    } else {
      this.log.error({ err: outcome.error, jobId: job.row.id, kind: job.row.kind, subject: job.row.subject }, 'a job failed')
      await this.finish(job, 'failed', null, outcome.error)
    }
    this.startWaiting()
  }

  private postpone(job: LiveJob, { message: reason, untilJobId, retryMs }: JobPostponed): void {
    this.log.info({ jobId: job.row.id, kind: job.row.kind, subject: job.row.subject, reason }, 'a job is postponed')
    const again = (): void => {
      this.unpostpone(job)
      this.startWaiting()
    }
    // The other one may have ended meanwhile.
    const waitsForJob = untilJobId !== null && this.live.has(untilJobId)
    const cancelTimer = waitsForJob ? (): void => undefined : this.setTimer(again, retryMs)
    job.postponed = { reason, untilJobId, cancelTimer }
  }

  private unpostpone(job: LiveJob): void {
    job.postponed?.cancelTimer()
    job.postponed = null
  }

  private contextOf(job: LiveJob, signal: AbortSignal): JobContext {
    return {
      jobId: job.row.id,
      projectId: job.row.project_id,
      subject: job.row.subject,
      get params() {
        return job.row.params
      },
      cursor: job.row.cursor,
      signal,
      checkInterrupted: () => {
        if (signal.aborted) throw new JobInterrupted()
      },
      report: (progressBytes, totalBytes) => {
        job.progressBytes = progressBytes
        if (totalBytes !== undefined) job.totalBytes = totalBytes
        job.rate.add(this.clock.monotonicMs(), progressBytes)
        this.notify(job)
      },
      save: async (cursor) => {
        const changes = { cursor, progress_bytes: job.progressBytes, total_bytes: job.totalBytes }
        await this.update(job.row, changes)
        Object.assign(job.row, changes)
      },
    }
  }

  private async interrupt(job: LiveJob, intent: Intent): Promise<void> {
    const { running } = job
    if (running === null) return
    running.intent = intent
    running.controller.abort()
    await running.settled
  }

  private async finish(
    job: LiveJob,
    state: 'done' | 'failed' | 'cancelled',
    result: JsonObject | null,
    error: unknown,
  ): Promise<void> {
    const { row } = job
    if (state !== 'done' && job.kind.discard !== undefined) {
      try {
        await job.kind.discard({ jobId: row.id, subject: row.subject, params: row.params, cursor: row.cursor })
      } catch (discardError) {
        this.log.error(
          { err: discardError, jobId: row.id },
          'what a job left behind could not be removed; the next start tries again',
        )
      }
    }
    const failure = state === 'failed' ? toAtollError(fromFileError(error)) : null
    await this.setState(job, { state, result, error_code: failure?.code ?? null, error_message: failure?.message ?? null })
    job.running = null
    this.unpostpone(job)
    this.live.delete(row.id)
    for (const other of this.live.values()) if (other.postponed?.untilJobId === row.id) this.unpostpone(other)
    this.startWaiting()
  }

  /** Commits the state, then tells those who watch. */
  private async setState(job: LiveJob, changes: JobUpdate & { state: JobState }): Promise<void> {
    const all = { ...changes, progress_bytes: job.progressBytes, total_bytes: job.totalBytes }
    await this.update(job.row, all)
    Object.assign(job.row, all)
    this.notify(job)
  }

  private async update(row: JobRow, changes: JobUpdate): Promise<void> {
    const updatedAt = this.clock.nowMs()
    // On a full disk, too: a job that fails for want of space ends as a failed one.
    const emergency = { emergency: true }
    await this.catalog.write(async (tx) => {
      await tx
        .updateTable('jobs')
        .set({ ...changes, updated_at: updatedAt })
        .where('id', '=', row.id)
        .execute()
      if (changes.state === undefined || !isFinished(changes.state)) return
      const keep = tx
        .selectFrom('jobs')
        .select('id')
        .where('state', 'in', ['done', 'failed', 'cancelled'])
        .orderBy('updated_at', 'desc')
        .orderBy('id')
        .limit(finishedJobsMax)
      await tx.deleteFrom('jobs').where('state', 'in', ['done', 'failed', 'cancelled']).where('id', 'not in', keep).execute()
    }, emergency)
    row.updated_at = updatedAt
  }

  private notify(job: LiveJob): void {
    const watchers = this.watchers.get(job.row.id)
    if (watchers === undefined) return
    const view = this.viewOf(job)
    for (const watcher of watchers) watcher(view)
  }

  private viewOfRow(row: JobRow): JobView {
    const live = this.live.get(row.id)
    return live === undefined ? this.viewOf(newLiveJob(row, this.kinds.get(row.kind) ?? unknownKind)) : this.viewOf(live)
  }

  private viewOf(job: LiveJob): JobView {
    const { row } = job
    const rateBytesPerSecond = job.running === null ? 0 : job.rate.bytesPerSecond(this.clock.monotonicMs())
    const leftBytes = job.totalBytes === null ? null : Math.max(0, job.totalBytes - job.progressBytes)
    return {
      id: row.id,
      projectId: row.project_id,
      kind: row.kind,
      subject: row.subject,
      state: row.state,
      progressBytes: job.progressBytes,
      totalBytes: job.totalBytes,
      rateBytesPerSecond,
      secondsLeft: leftBytes === null || rateBytesPerSecond <= 0 ? null : Math.ceil(leftBytes / rateBytesPerSecond),
      waiting: job.postponed?.reason ?? null,
      details: job.kind.details?.(row.cursor) ?? null,
      params: row.params,
      result: row.result,
      error: row.error_code === null ? null : { code: row.error_code, message: row.error_message ?? '' },
      createdAt: row.created_at,
      updatedAt: row.updated_at,
    }
  }
}

function newLiveJob(row: JobRow, kind: JobKind): LiveJob {
  return {
    row,
    kind,
    progressBytes: row.progress_bytes,
    totalBytes: row.total_bytes,
    rate: new JobRate(),
    running: null,
    held: false,
    postponed: null,
  }
}

/** Stands for the kind of a row that is only shown. */
const unknownKind: JobKind = { kind: '', pausable: false, parallelMax: 0, run: () => Promise.reject(new JobInterrupted()) }

/** What `run` throws when it saw the signal: ours, or that of a Node function that was given the signal. */
function isInterruption(error: unknown): boolean {
  return error instanceof JobInterrupted || (error instanceof Error && error.name === 'AbortError')
}
