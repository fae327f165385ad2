/** Jobs that move volumes, over a mapper of the test's that does what the test says and writes down what it was asked. */
import {
  adminProject,
  AtollError,
  ManualClock,
  newId,
  openCatalog,
  silentLog,
  type Catalog,
  type ErrorCode,
  type JsonObject,
} from '@atoll/core'
import type { DrainRequest, MovePlan, MoveRequest } from '@atoll/mapper'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { drainKind } from './drain-job.ts'
import type { JobView } from './job-kind.ts'
import { Jobs } from './jobs.ts'
import { migrateKind } from './migrate-job.ts'
import { freezeDeadlinesMs, type MovePhase, type Moves } from './move-job.ts'
import { ManualTimers, until } from './testing.ts'

type Call = 'freeze' | 'claim' | 'fill' | 'home' | 'drop' | 'release'

const piecesPerMove = 4
const pieceBytes = 10
const plan: MovePlan = {
  resources: [],
  layerCount: 2,
  bytesToCopy: piecesPerMove * pieceBytes,
  bytesToOffload: 0,
  bytesThere: 5,
  targetFreeBytes: 1000,
}

/** Stops before a call that the test holds, until that lets it go or the job is interrupted. */
class ScriptedMoves implements Moves {
  readonly calls: string[] = []
  readonly limits: (number | null)[] = []
  readonly deadlinesMs: number[] = []
  readonly released: string[] = []
  /** What each claim answers in turn; then: claimed. */
  readonly waitsFor: string[] = []
  /** What a call throws in turn. */
  readonly failures = new Map<Call, ErrorCode[]>()
  #held: { call: Call; after: number; gate: PromiseWithResolvers<void>; isReached: boolean } | null = null

  /** The call (and every later one of it) waits, from its `after`th on. */
  hold(call: Call, after = 0): { reached: () => boolean; letGo: () => void } {
    const held = { call, after, gate: Promise.withResolvers<void>(), isReached: false }
    this.#held = held
    return { reached: () => held.isReached, letGo: () => held.gate.resolve() }
  }

  plan(): Promise<MovePlan> {
    return Promise.resolve(plan)
  }
  async freeze(
    _request: MoveRequest | DrainRequest,
    options: { deadlineMs: number; signal: AbortSignal },
  ): Promise<{ pauseMs: number }> {
    this.deadlinesMs.push(options.deadlineMs)
    await this.#enter('freeze', options.signal)
    return { pauseMs: 7 }
  }
  async claim(): ReturnType<Moves['claim']> {
    await this.#enter('claim')
    const waitsForJobId = this.waitsFor.shift()
    return waitsForJobId === undefined ? { claimed: true, plan } : { claimed: false, waitsForJobId }
  }
  async fillNext(
    _request: MoveRequest | DrainRequest,
    cursor: JsonObject | null,
    options: { limitBytesPerSecond: number | null; signal: AbortSignal },
  ): ReturnType<Moves['fillNext']> {
    const piece = Number(cursor?.['piece'] ?? 0)
    await this.#enter('fill', options.signal, `fill ${piece}`)
    this.limits.push(options.limitBytesPerSecond)
    const isDone = piece + 1 === piecesPerMove
    return { cursor: { piece: piece + 1 }, isDone, copiedBytes: pieceBytes - 1, offloadedBytes: 0, skippedBytes: 1 }
  }
  async home(): Promise<void> {
    await this.#enter('home')
  }
  async drop(_request: MoveRequest | DrainRequest, options: { signal: AbortSignal }): Promise<{ freedBytes: number }> {
    await this.#enter('drop', options.signal)
    return { freedBytes: 40 }
  }
  release(request: MoveRequest | DrainRequest): Promise<void> {
    this.released.push(request.jobId)
    return Promise.resolve()
  }

  async #enter(call: Call, signal?: AbortSignal, text: string = call): Promise<void> {
    const held = this.#held
    if (held?.call === call && held.after-- <= 0) {
      held.isReached = true
      const aborted = Promise.withResolvers<void>()
      signal?.addEventListener('abort', () => aborted.resolve(), { once: true })
      await Promise.race([held.gate.promise, aborted.promise])
      if (signal?.aborted === true) throw new AtollError('JOB_CANCELLED', 'the signal was aborted')
    }
    this.calls.push(text)
    const code = this.failures.get(call)?.shift()
    if (code !== undefined) throw new AtollError(code, 'the backend said so')
  }
}

const wholeMove = ['freeze', 'claim', 'fill 0', 'fill 1', 'fill 2', 'fill 3', 'home', 'drop']

let catalog: Catalog
let timers: ManualTimers
let moves: ScriptedMoves
let reclaims: number
const opened: Jobs[] = []

beforeEach(async () => {
  catalog = await openCatalog(':memory:')
  timers = new ManualTimers()
  moves = new ScriptedMoves()
  reclaims = 0
})
afterEach(async () => {
  for (const jobs of opened.splice(0)) await jobs.close()
  await catalog.close()
})

async function runner(): Promise<Jobs> {
  const { setTimer } = timers
  const requestReclaim = (): void => void (reclaims += 1)
  const kinds = [migrateKind(moves, requestReclaim), drainKind(moves, requestReclaim)]
  const jobs = new Jobs({ catalog, log: silentLog(), clock: new ManualClock(), newId, setTimer, kinds })
  opened.push(jobs)
  await jobs.resumeAll()
  return jobs
}

async function start(
  jobs: Jobs,
  kind: 'migrate' | 'drain' = 'migrate',
  limitBytesPerSecond: number | null = null,
): Promise<JobView> {
  const params = { targetPoolId: newId(), withSnapshots: true, limitBytesPerSecond }
  return await jobs.start({ projectId: adminProject.id, kind, subject: newId(), params, totalBytes: 40 })
}

async function startAndHold(jobs: Jobs, call: Call, after = 0): Promise<{ id: string; letGo: () => void }> {
  const held = moves.hold(call, after)
  const { id } = await start(jobs)
  await until(held.reached)
  return { id, letGo: held.letGo }
}

const stateOf = async (jobs: Jobs, id: string): Promise<string> => (await jobs.show(id)).state
const postponed = (jobs: Jobs, id: string): Promise<void> => until(async () => (await jobs.show(id)).waiting !== null)

describe.each(['migrate', 'drain'] as const)('a job of the kind %s', (kind) => {
  test('goes through the phases of a move and says what it did', async () => {
    const jobs = await runner()
    const { id } = await start(jobs, kind)
    await expect(jobs.wait(id)).resolves.toMatchObject({
      state: 'done',
      progressBytes: 40,
      totalBytes: 40,
      details: { phase: 'drop', copiedBytes: 36, offloadedBytes: 0, skippedBytes: 4, pauseMs: 7 },
      result: { copiedBytes: 36, offloadedBytes: 0, skippedBytes: 4, freedBytes: 40, pauseMs: 7 },
    })
    expect(moves.calls).toEqual(wholeMove)
    expect(moves.released).toEqual([])
  })
})

/** Where a move can be stopped, and what it has done by then that is not done again. */
const places: readonly { call: Call; after: number; phase: MovePhase; again: string[] }[] = [
  { call: 'freeze', after: 0, phase: 'freeze', again: wholeMove },
  { call: 'fill', after: 0, phase: 'fill', again: wholeMove.slice(1) },
  { call: 'fill', after: 2, phase: 'fill', again: ['claim', 'fill 2', 'fill 3', 'home', 'drop'] },
  { call: 'drop', after: 0, phase: 'drop', again: ['drop'] },
]

describe.each(places)('a move that is in $call, after $after of it,', ({ call, after, phase, again }) => {
  test('stops when it is paused, says where it is, and goes on from there', async () => {
    const jobs = await runner()
    const { id, letGo } = await startAndHold(jobs, call, after)
    await expect(jobs.pause(id)).resolves.toMatchObject({ state: 'paused', details: { phase } })
    expect(moves.released).toEqual([])
    moves.calls.length = 0
    letGo()
    await jobs.resume(id)
    await expect(jobs.wait(id)).resolves.toMatchObject({ state: 'done', progressBytes: 40, totalBytes: 40 })
    expect(moves.calls).toEqual(again)
  })

  test('goes on from there after the daemon was killed', async () => {
    const jobs = await runner()
    const { id, letGo } = await startAndHold(jobs, call, after)
    // What a kill leaves: the row as it was saved last.
    await jobs.close()
    await expect(catalog.db.selectFrom('jobs').select('state').where('id', '=', id).executeTakeFirst()).resolves.toEqual({
      state: 'running',
    })
    letGo()
    moves.calls.length = 0
    const next = await runner()
    await expect(next.wait(id)).resolves.toMatchObject({ state: 'done', progressBytes: 40 })
    expect(moves.calls).toEqual(again)
    expect(moves.released).toEqual([])
  })

  test('is released when it is cancelled, and does nothing more', async () => {
    const jobs = await runner()
    const { id } = await startAndHold(jobs, call, after)
    moves.calls.length = 0
    await expect(jobs.cancel(id)).resolves.toMatchObject({ state: 'cancelled' })
    expect(moves.released).toEqual([id])
    expect(moves.calls).toEqual([])
    // What the old pool still has of a volume that has moved comes back by itself.
    expect(reclaims).toBe(phase === 'drop' ? 1 : 0)
  })

  test('that is paused there is released when it is cancelled', async () => {
    const jobs = await runner()
    const { id } = await startAndHold(jobs, call, after)
    await jobs.pause(id)
    await expect(jobs.cancel(id)).resolves.toMatchObject({ state: 'cancelled' })
    expect(moves.released).toEqual([id])
  })
})

describe('a move whose home changes while it is cancelled', () => {
  test('ends as cancelled, moved, and leaves the rest to the next reclaim', async () => {
    const jobs = await runner()
    const { id, letGo } = await startAndHold(jobs, 'home')
    const cancelled = jobs.cancel(id)
    letGo()
    await expect(cancelled).resolves.toMatchObject({ state: 'cancelled', details: { phase: 'drop' } })
    expect(moves.calls.at(-1)).toBe('home')
    expect(reclaims).toBe(1)
  })
})

describe('the limit of a move', () => {
  test('is given with it, changed while it runs, and kept over a restart', async () => {
    const jobs = await runner()
    const held = moves.hold('fill', 1)
    const { id } = await start(jobs, 'migrate', 5000)
    await until(held.reached)
    await expect(jobs.setLimit(id, 9000)).resolves.toMatchObject({ params: { limitBytesPerSecond: 9000, withSnapshots: true } })
    await jobs.close()
    held.letGo()
    const next = await runner()
    await next.wait(id)
    expect(moves.limits).toEqual([5000, 9000, 9000, 9000])
    await expect(next.setLimit(id, null)).rejects.toMatchObject({ code: 'JOB_STATE' })
  })

  test('holds from the next piece on', async () => {
    const jobs = await runner()
    const { id, letGo } = await startAndHold(jobs, 'fill', 2)
    await jobs.setLimit(id, 9000)
    letGo()
    await jobs.wait(id)
    // The third piece was under way.
    expect(moves.limits).toEqual([null, null, null, 9000])
  })

  test('is refused for jobs that have none', async () => {
    const jobs = new Jobs({
      catalog,
      log: silentLog(),
      clock: new ManualClock(),
      newId,
      kinds: [{ kind: 'other', pausable: true, parallelMax: 0, run: () => Promise.resolve({}) }],
    })
    opened.push(jobs)
    const { id } = await jobs.start({ projectId: adminProject.id, kind: 'other', subject: newId(), params: {} })
    await expect(jobs.setLimit(id, 1)).rejects.toMatchObject({ code: 'JOB_STATE' })
    await expect(jobs.setLimit(newId(), 1)).rejects.toMatchObject({ code: 'JOB_NOT_FOUND' })
  })
})

describe('several moves', () => {
  test('run two at a time, the others in the order they came', async () => {
    const jobs = await runner()
    const { id, letGo } = await startAndHold(jobs, 'freeze')
    const others = [await start(jobs), await start(jobs)]
    expect(jobs.unfinished()).toEqual({ queued: 1, running: 2, paused: 0 })
    letGo()
    for (const job of [id, ...others.map((other) => other.id)])
      await expect(jobs.wait(job)).resolves.toMatchObject({ state: 'done' })
  })

  test('of which one needs what another copies: it takes no place, and goes on when that one has ended', async () => {
    const jobs = await runner()
    const { id: first, letGo } = await startAndHold(jobs, 'fill')
    moves.waitsFor.push(first)
    const { id: second } = await start(jobs)
    await postponed(jobs, second)
    await expect(jobs.show(second)).resolves.toMatchObject({
      state: 'queued',
      waiting: expect.stringContaining(first) as string,
      details: { phase: 'fill' },
    })
    expect(jobs.runningCount()).toBe(1)
    const asked = moves.calls.length
    // Time does not wake it: nobody polls.
    timers.expireAll()
    expect(moves.calls).toHaveLength(asked)
    letGo()
    await expect(jobs.wait(first)).resolves.toMatchObject({ state: 'done' })
    await expect(jobs.wait(second)).resolves.toMatchObject({ state: 'done', waiting: null })
    expect(moves.calls.filter((call) => call === 'freeze')).toHaveLength(2)
  })

  test('of which one waits for another: it can be paused, resumed and cancelled meanwhile', async () => {
    const jobs = await runner()
    const { id: first } = await startAndHold(jobs, 'fill')
    moves.waitsFor.push(first, first)
    const { id: second } = await start(jobs)
    await postponed(jobs, second)
    await expect(jobs.pause(second)).resolves.toMatchObject({ state: 'paused', waiting: null })
    await jobs.resume(second)
    await postponed(jobs, second)
    await expect(jobs.cancel(second)).resolves.toMatchObject({ state: 'cancelled' })
    expect(moves.released).toEqual([second])
    expect(await stateOf(jobs, first)).toBe('running')
  })

  test('of which one waits for a job that is gone: it tries again by itself', async () => {
    const jobs = await runner()
    moves.waitsFor.push(newId())
    const { id } = await start(jobs)
    await postponed(jobs, id)
    timers.expireAll()
    await expect(jobs.wait(id)).resolves.toMatchObject({ state: 'done' })
  })
})

describe('a move whose backend', () => {
  test.each(['freeze', 'claim', 'fill', 'home', 'drop'] as const)(
    'is away in %s waits with the reason, and goes on by itself',
    async (call) => {
      const jobs = await runner()
      // More often than any other failure is tried again.
      moves.failures.set(
        call,
        Array.from({ length: 12 }, () => 'POOL_UNAVAILABLE'),
      )
      const { id } = await start(jobs)
      for (let count = 0; count < 12; count += 1) {
        await until(async () => (await jobs.show(id)).waiting !== null)
        await expect(jobs.show(id)).resolves.toMatchObject({
          state: 'queued',
          waiting: expect.stringMatching(/: POOL_UNAVAILABLE: the backend said so; it tries again/) as string,
        })
        timers.expireAll()
      }
      await expect(jobs.wait(id)).resolves.toMatchObject({ state: 'done', progressBytes: 40 })
      expect(moves.released).toEqual([])
      // What failed was done again until it succeeded.
      expect(moves.calls.filter((each) => each === call || each === `${call} 0`)).toHaveLength(13)
    },
  )

  test('is full fails, says where it was and what to do, and is released', async () => {
    const jobs = await runner()
    moves.failures.set('fill', ['NO_SPACE'])
    const { id } = await start(jobs)
    await expect(jobs.wait(id)).resolves.toMatchObject({
      state: 'failed',
      error: { code: 'NO_SPACE', message: expect.stringMatching(/^copying: the backend said so; .*start again/) as string },
    })
    expect(moves.released).toEqual([id])
  })

  test('fails again and again is tried a few times, and not for ever', async () => {
    const jobs = await runner()
    moves.failures.set(
      'fill',
      Array.from({ length: 9 }, () => 'IO_ERROR'),
    )
    const { id } = await start(jobs)
    for (let count = 0; count < 4; count += 1) {
      await postponed(jobs, id)
      timers.expireAll()
    }
    await expect(jobs.wait(id)).resolves.toMatchObject({ state: 'failed', error: { code: 'IO_ERROR' } })
    expect(moves.calls.filter((call) => call === 'fill 0')).toHaveLength(5)
  })

  test('has requests in flight is frozen with ever longer deadlines', async () => {
    const jobs = await runner()
    moves.failures.set('freeze', ['SNAPSHOT_BUSY', 'SNAPSHOT_BUSY', 'SNAPSHOT_BUSY'])
    const { id } = await start(jobs)
    for (let count = 0; count < 3; count += 1) {
      await postponed(jobs, id)
      timers.expireAll()
    }
    await expect(jobs.wait(id)).resolves.toMatchObject({ state: 'done' })
    expect(moves.deadlinesMs).toEqual(freezeDeadlinesMs.slice(0, 4))
  })
})
