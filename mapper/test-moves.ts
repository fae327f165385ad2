/** Moves as the jobs run them, for tests: a row of the job, then phase after phase. */
import { randomUUID } from 'node:crypto'
import { adminProject, type JsonObject } from '@atoll/core'
import type { DrainRequest, MoveRequest } from './move-needs.ts'
import { type Bench, bytes, slot } from './test-bench.ts'

export type Phase = 'freeze' | 'claim' | 'fill' | 'home' | 'drop'

export interface MoveTotals {
  copiedBytes: number
  offloadedBytes: number
  skippedBytes: number
  freedBytes: number
}

export async function beginMove(
  bench: Bench,
  volumeId: string,
  targetPoolId: string,
  withSnapshots = true,
): Promise<MoveRequest> {
  const jobId = await addJob(bench, 'migrate', volumeId, { targetPoolId, withSnapshots })
  return { jobId, volumeId, targetPoolId, withSnapshots }
}

export async function beginDrain(bench: Bench, poolId: string, targetPoolId: string): Promise<DrainRequest> {
  return { jobId: await addJob(bench, 'drain', poolId, { targetPoolId }), poolId, targetPoolId }
}

async function addJob(bench: Bench, kind: string, subject: string, params: JsonObject): Promise<string> {
  const id = randomUUID()
  await bench.inner.write(async (tx) => {
    await tx
      .insertInto('jobs')
      .values({
        id,
        project_id: adminProject.id,
        kind,
        subject,
        state: 'running',
        progress_bytes: 0,
        total_bytes: null,
        params,
        cursor: null,
        result: null,
        error_code: null,
        error_message: null,
        created_at: 1,
        updated_at: 1,
      })
      .execute()
  })
  return id
}

export async function endMove(bench: Bench, { jobId }: { jobId: string }, state: 'done' | 'cancelled' = 'done'): Promise<void> {
  await bench.inner.write(async (tx) => {
    await tx.updateTable('jobs').set({ state }).where('id', '=', jobId).execute()
  })
}

/** All phases, with the cursor kept as a job keeps it. `before` is called before every phase, and before every piece. */
export async function runMove(
  bench: Bench,
  request: MoveRequest | DrainRequest,
  before: (phase: Phase) => Promise<void> = async () => undefined,
): Promise<MoveTotals> {
  const totals = { copiedBytes: 0, offloadedBytes: 0, skippedBytes: 0, freedBytes: 0 }
  await before('freeze')
  await bench.mapper.moves.freeze(request, { deadlineMs: 5000 })
  await before('claim')
  const claim = await bench.mapper.moves.claim(request)
  if (!claim.claimed) throw new Error(`job ${claim.waitsForJobId} has layers of it`)
  for (let cursor: JsonObject | null = null, isDone = false; !isDone;) {
    await before('fill')
    const piece = await bench.mapper.moves.fillNext(request, cursor, { limitBytesPerSecond: null })
    totals.copiedBytes += piece.copiedBytes
    totals.offloadedBytes += piece.offloadedBytes
    totals.skippedBytes += piece.skippedBytes
    cursor = piece.cursor
    isDone = piece.isDone
  }
  await before('home')
  await bench.mapper.moves.home(request)
  await before('drop')
  totals.freedBytes = (await bench.mapper.moves.drop(request, {})).freedBytes
  await endMove(bench, request)
  return totals
}

/** What resources hold, slot by slot, as they should. */
export class Contents {
  readonly #bench: Bench
  readonly #slots = new Map<string, Map<number, number>>()

  constructor(bench: Bench) {
    this.#bench = bench
  }

  /** Writes one value into a slot of an open volume. */
  async write(id: string, at: number, value: number): Promise<void> {
    await this.#bench.mapper.opened(id)?.device.write(at * slot, bytes(value))
    this.#of(id).set(at, value)
  }

  /** `copy` is made from `id` just now. */
  copy(id: string, copy: string): void {
    this.#slots.set(copy, new Map(this.#of(id)))
  }

  drop(id: string): void {
    this.#slots.delete(id)
  }

  #of(id: string): Map<number, number> {
    const present = this.#slots.get(id) ?? new Map<number, number>()
    this.#slots.set(id, present)
    return present
  }

  /** What differs, in a sentence; null: nothing does. */
  async difference(slotCount: number): Promise<string | null> {
    for (const [id, slots] of this.#slots) {
      const found = await this.#bench.read(id, 0, slotCount * slot)
      for (let at = 0; at < slotCount; at += 1) {
        const wanted = slots.get(at) ?? 0
        const part = found.subarray(at * slot, (at + 1) * slot)
        if (!part.equals(bytes(wanted))) return `slot ${at} of ${id} is ${part[0]}, and ${wanted} was written`
      }
    }
    return null
  }
}

/** Pools with a complete replica of a layer that the resource's map names, or that it writes. */
export async function poolsOf(bench: Bench, id: string): Promise<string[]> {
  const home = (await bench.row(id)).home_pool_id
  return [home, ...(await bench.mapper.readsFrom(id)).map((pool) => pool.id)].toSorted()
}

/** Bytes of layers in a pool that hold data. */
export async function storedBytes(bench: Bench, poolId: string): Promise<number> {
  const listing = await bench.place(poolId).store.listLayers()
  return listing.reduce((sum, layer) => sum + layer.allocatedBytes, 0)
}
