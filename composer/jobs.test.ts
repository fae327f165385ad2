import { adminProject, ManualClock, newId, openCatalog, silentLog, type Catalog, type JsonObject } from '@atoll/core'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { JobContext, JobKind, JobView } from './job-kind.ts'
import { finishedJobsMax, Jobs, unfinishedJobsMax } from './jobs.ts'

let catalog: Catalog
let clock: ManualClock
const opened: Jobs[] = []

beforeEach(async () => {
  catalog = await openCatalog(':memory:')
  clock = new ManualClock()
})
afterEach(async () => {
  for (const jobs of opened.splice(0)) await jobs.close()
  await catalog.close()
})

/** A job that goes one step each time the test lets it. */
class Steps {
  readonly entered: JobContext[] = []
  readonly discarded: string[] = []
  readonly stepsMade: number[] = []
  #steps: PromiseWithResolvers<void> = Promise.withResolvers()
  #waiters: (() => void)[] = []

  kind(parallelMax = 4): JobKind {
    return {
      kind: 'steps',
      pausable: true,
      parallelMax,
      run: async (context) => {
        this.entered.push(context)
        for (const wake of this.#waiters.splice(0)) wake()
        for (let step = Number(context.cursor?.['step'] ?? 0); step < 3; step++) {
          const interrupted = Promise.withResolvers<void>()
          const aborted = (): void => interrupted.resolve()
          context.signal.addEventListener('abort', aborted)
          if (!context.signal.aborted) await Promise.race([this.#steps.promise, interrupted.promise])
          context.checkInterrupted()
          this.stepsMade.push(step)
          context.report((step + 1) * 10, 30)
          await context.save({ step: step + 1 })
        }
        if (context.params['fails'] === true) throw new Error('it broke')
        return { answer: 42 }
      },
      discard: async ({ jobId }) => void this.discarded.push(jobId),
    }
  }

  letGo(): void {
    this.#steps.resolve()
  }
  hold(): void {
    this.#steps = Promise.withResolvers()
  }
  async untilEntered(count: number): Promise<void> {
    while (this.entered.length < count) await new Promise<void>((resolve) => this.#waiters.push(resolve))
  }
}

async function runner(kinds: readonly JobKind[], parallelMax?: number): Promise<Jobs> {
  const jobs = new Jobs({ catalog, log: silentLog(), clock, newId, kinds, ...(parallelMax === undefined ? {} : { parallelMax }) })
  opened.push(jobs)
  await jobs.resumeAll()
  return jobs
}

const start = (jobs: Jobs, params: JsonObject = {}): Promise<JobView> =>
  jobs.start({ projectId: adminProject.id, kind: 'steps', subject: newId(), params, totalBytes: 30 })

describe('a job', () => {
  test('runs to its end, tells how far it is and keeps its result', async () => {
    const steps = new Steps()
    const jobs = await runner([steps.kind()])
    const { id } = await start(jobs)
    const seen: number[] = []
    const waiting = jobs.wait(id, { onProgress: (view) => seen.push(view.progressBytes) })
    steps.letGo()
    await expect(waiting).resolves.toMatchObject({
      state: 'done',
      result: { answer: 42 },
      progressBytes: 30,
      totalBytes: 30,
      error: null,
    })
    expect(seen).toEqual([0, 10, 20, 30, 30])
    await expect(jobs.wait(id)).resolves.toMatchObject({ state: 'done' })
  })

  test('that fails is discarded and says why', async () => {
    const steps = new Steps()
    const jobs = await runner([steps.kind()])
    steps.letGo()
    const { id } = await start(jobs, { fails: true })
    await expect(jobs.wait(id)).resolves.toMatchObject({ state: 'failed', error: { code: 'INTERNAL', message: 'it broke' } })
    expect(steps.discarded).toEqual([id])
  })

  test('stops when it is paused and goes on from its cursor when it is resumed', async () => {
    const steps = new Steps()
    const jobs = await runner([steps.kind()])
    const { id } = await start(jobs)
    await steps.untilEntered(1)
    await expect(jobs.pause(id)).resolves.toMatchObject({ state: 'paused' })
    await expect(jobs.pause(id)).resolves.toMatchObject({ state: 'paused' })
    steps.letGo()
    await jobs.resume(id)
    await expect(jobs.wait(id)).resolves.toMatchObject({ state: 'done' })
    expect(steps.stepsMade).toEqual([0, 1, 2])
    await expect(jobs.pause(id)).rejects.toMatchObject({ code: 'JOB_STATE' })
  })

  test('that is cancelled is discarded, whether it runs, waits or is paused', async () => {
    const steps = new Steps()
    const jobs = await runner([steps.kind()], 1)
    const [running, queued, paused] = [await start(jobs), await start(jobs), await start(jobs)]
    await jobs.pause(paused.id)
    await steps.untilEntered(1)
    for (const job of [queued, running, paused]) await expect(jobs.cancel(job.id)).resolves.toMatchObject({ state: 'cancelled' })
    expect(steps.discarded.toSorted()).toEqual([running.id, queued.id, paused.id].toSorted())
    await expect(jobs.cancel(running.id)).rejects.toMatchObject({ code: 'JOB_STATE' })
    await expect(jobs.cancel(newId())).rejects.toMatchObject({ code: 'JOB_NOT_FOUND' })
  })

  test('goes on after a restart from where it was saved; a paused one stays paused', async () => {
    const before = new Steps()
    const first = await runner([before.kind()])
    const going = await start(first)
    await before.untilEntered(1)
    before.letGo()
    const paused = await start(first)
    await first.wait(going.id)
    before.hold()
    const interrupted = await start(first)
    await before.untilEntered(3)
    await first.pause(paused.id).catch(() => undefined)
    await first.close()
    // As a kill leaves it: the state says that it runs.
    await catalog.write(
      async (tx) =>
        void (await tx
          .updateTable('jobs')
          .set({ state: 'running', cursor: { step: 2 } })
          .where('id', '=', interrupted.id)
          .execute()),
    )

    const after = new Steps()
    after.letGo()
    const second = await runner([after.kind()])
    await expect(second.wait(interrupted.id)).resolves.toMatchObject({ state: 'done' })
    expect(after.stepsMade).toEqual([2])
  })

  test('of an unknown kind stays as it is', async () => {
    const jobs = await runner([new Steps().kind()])
    const { id } = await start(jobs)
    await jobs.close()
    const other = await runner([])
    await expect(other.show(id)).resolves.toMatchObject({ kind: 'steps' })
  })
})

describe('the runner', () => {
  test('runs so many jobs at a time as it may, and the others in the order they came', async () => {
    const steps = new Steps()
    const jobs = await runner([steps.kind()], 2)
    const ids = [(await start(jobs)).id, (await start(jobs)).id, (await start(jobs)).id]
    await steps.untilEntered(2)
    expect(jobs.runningCount()).toBe(2)
    await expect(jobs.show(ids[2] ?? '')).resolves.toMatchObject({ state: 'queued' })
    steps.letGo()
    for (const id of ids) await jobs.wait(id)
    expect(steps.entered.map(({ jobId }) => jobId)).toEqual(ids)
  })

  test('runs so many jobs of a kind as the kind allows', async () => {
    const steps = new Steps()
    const jobs = await runner([steps.kind(1)], 4)
    await start(jobs)
    await start(jobs)
    await steps.untilEntered(1)
    expect(jobs.runningCount()).toBe(1)
  })

  test('takes no more unfinished jobs than it can keep', async () => {
    const jobs = await runner([new Steps().kind()], 0)
    for (let count = 0; count < unfinishedJobsMax; count++) await start(jobs)
    await expect(start(jobs)).rejects.toMatchObject({ code: 'JOB_QUEUE_FULL' })
  })

  test('forgets the oldest finished jobs', async () => {
    const steps = new Steps()
    steps.letGo()
    const jobs = await runner([steps.kind()])
    const oldest = await start(jobs)
    await jobs.wait(oldest.id)
    await catalog.write(async (tx) => {
      const row = await tx.selectFrom('jobs').selectAll().where('id', '=', oldest.id).executeTakeFirstOrThrow()
      const more = Array.from({ length: finishedJobsMax }, () => ({ ...row, id: newId(), updated_at: row.updated_at + 1 }))
      for (const one of more) await tx.insertInto('jobs').values(one).execute()
    })
    clock.advance(1000)
    const newest = await start(jobs)
    await jobs.wait(newest.id)
    await expect(jobs.show(oldest.id)).rejects.toMatchObject({ code: 'JOB_NOT_FOUND' })
    await expect(jobs.list()).resolves.toHaveLength(finishedJobsMax)
  })

  test('does not mark a job as failed when only its end could not be recorded', async () => {
    const write = catalog.write.bind(catalog)
    const disk = { failing: false }
    const discarded: string[] = []
    Object.assign(catalog, {
      write: (...parameters: Parameters<typeof write>) =>
        disk.failing ? Promise.reject(new Error('no disk')) : write(...parameters),
    })
    const run = async (): Promise<JsonObject> => {
      disk.failing = true
      return {}
    }
    const jobs = await runner([
      { kind: 'steps', pausable: true, parallelMax: 1, run, discard: async ({ jobId }) => void discarded.push(jobId) },
    ])
    const { id } = await start(jobs)
    while (!disk.failing || jobs.runningCount() > 0) await new Promise((resolve) => setImmediate(resolve))
    disk.failing = false
    expect(discarded).toEqual([])
    const row = await catalog.db.selectFrom('jobs').select('state').where('id', '=', id).executeTakeFirstOrThrow()
    expect(row.state).toBe('running')
  })

  test('refuses two kinds of one name', () => {
    const options = { catalog, log: silentLog(), clock, newId, kinds: [new Steps().kind(), new Steps().kind()] }
    expect(() => new Jobs(options)).toThrow(/two kinds of job/)
  })
})

describe('the rate of a job', () => {
  test('is what was done in the last seconds', async () => {
    const kind: JobKind = {
      kind: 'steps',
      pausable: true,
      parallelMax: 1,
      run: async (context) => {
        context.report(0, 1000)
        clock.advance(1000)
        context.report(100)
        clock.advance(1000)
        context.report(300)
        return {}
      },
    }
    const jobs = await runner([kind])
    const views: JobView[] = []
    const { id } = await start(jobs)
    await jobs.wait(id, { onProgress: (view) => views.push(view) })
    expect(views.find(({ progressBytes }) => progressBytes === 300)).toMatchObject({ rateBytesPerSecond: 150, secondsLeft: 5 })
    expect(views.at(-1)).toMatchObject({ state: 'done' })
  })
})
