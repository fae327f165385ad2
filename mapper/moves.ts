/**
 * Moving volumes between pools, and emptying pools: what the jobs `migrate` and `drain` call, phase after phase.
 *
 *   plan -> freeze -> claim -> fillNext … -> home -> drop          (release: given up, in any phase)
 *
 * Rules:
 * - Each phase may be interrupted anywhere and is done again; what a phase has done already is found and left.
 * - Until `home` everything is read where it was, but for what is written since `freeze`; after it, in the target. `drop` frees what
 *   nobody reads any more.
 * - What needs a whole look at the maps is kept in memory while the job fills, and found anew after a restart.
 * - Lock order: reclaim, then the lock of who comes into a pool (cover.ts), then resources.
 */
import { AtollError, type JsonObject } from '@atoll/core'
import type { MapperContext } from './context.ts'
import type { Cover } from './cover.ts'
import { removeCondemned } from './recover.ts'
import { freezeOnto } from './move-freeze.ts'
import {
  claimLayers,
  fillAll,
  fillPieces,
  type FillOptions,
  type FillProgress,
  isMarked,
  makeFiles,
  releaseLayers,
  requireSealed,
  settledNeeds,
} from './move-fill.ts'
import { changeHome } from './move-home.ts'
import { type DrainRequest, MoveNeeds, type MoveRequest, type NeededLayer } from './move-needs.ts'
import { describe, type MovePlan, planMove, requireNothingUnfinished } from './move-plan.ts'
import type { PoolService } from './pool-service.ts'
import type { Reclaimer, ReclaimOptions } from './reclaim.ts'
import { findVolumeRow } from './rows.ts'

export interface FreezeOptions {
  /** How long requests in flight are waited for while all others are held up. */
  readonly deadlineMs: number
  readonly signal?: AbortSignal
}

/** What `claim` found. */
export type Claim =
  | { readonly claimed: true; readonly plan: MovePlan }
  | { readonly claimed: false; readonly waitsForJobId: string }

interface Filling {
  readonly needs: MoveNeeds
  readonly layers: readonly NeededLayer[]
}

/** Something may come to what moves while its home is changed: then it is tried again, so often. */
const homeAttemptsMax = 100

export class Moves {
  readonly #context: MapperContext
  readonly #pools: PoolService
  readonly #reclaimer: Reclaimer
  readonly #cover: Cover
  /** By job. */
  readonly #fillings = new Map<string, Filling>()

  constructor(context: MapperContext, parts: { pools: PoolService; reclaimer: Reclaimer; cover: Cover }) {
    this.#context = context
    this.#pools = parts.pools
    this.#reclaimer = parts.reclaimer
    this.#cover = parts.cover
  }

  /** See `planMove` in move-plan.ts. */
  async plan(request: MoveRequest | DrainRequest): Promise<MovePlan> {
    return await planMove(this.#context, request)
  }

  /**
   * From the return on what moves is written in the target; a pool that is drained takes nothing new. `pauseMs`: the longest time
   * that requests were held up.
   * @throws AtollError as `freezeOnto` (move-freeze.ts); RESOURCE_STATUS where something is being made in a pool that is drained
   */
  async freeze(request: MoveRequest | DrainRequest, { deadlineMs, signal }: FreezeOptions): Promise<{ pauseMs: number }> {
    const { targetPoolId } = request
    if ('volumeId' in request) return await freezeOnto(this.#context, request.volumeId, targetPoolId, deadlineMs)
    await this.#pools.set(request.poolId, { draining: 'yes' })
    await requireNothingUnfinished(this.#context, await this.#pools.get(request.poolId))
    let longestMs = 0
    for (const volumeId of await this.#writingIn(request.poolId)) {
      throwIfAborted(signal)
      // One that was deleted meanwhile is written by nobody.
      if ((await findVolumeRow(this.#context.catalog.db, volumeId)) === undefined) continue
      const { pauseMs } = await freezeOnto(this.#context, volumeId, targetPoolId, deadlineMs)
      longestMs = Math.max(longestMs, pauseMs)
    }
    return { pauseMs: longestMs }
  }

  /** Volumes whose active or next layer lies in the pool. */
  async #writingIn(poolId: string): Promise<string[]> {
    const rows = await this.#context.catalog.db
      .selectFrom('volumes')
      .innerJoin('replicas', (join) =>
        join.on((query) =>
          query.or([
            query('replicas.layer_alias', '=', query.ref('volumes.active_alias')),
            query('replicas.layer_alias', '=', query.ref('volumes.next_alias')),
          ]),
        ),
      )
      .select('volumes.id')
      .distinct()
      .where('replicas.pool_id', '=', poolId)
      .orderBy('volumes.id')
      .execute()
    return rows.map((row) => row.id)
  }

  /**
   * Claims all layers that the target lacks, or none: `waitsForJobId` then has one of them. After a restart it finds what it had.
   * @throws AtollError as `claimLayers` (move-fill.ts); PAGE_MISSING, PAGE_CORRUPT for a map that cannot be read
   */
  async claim(request: MoveRequest | DrainRequest): Promise<Claim> {
    const context = this.#context
    this.#forget(request.jobId)
    return await this.#alone(async () => {
      const needs = await settledNeeds(context, request, () => undefined)
      let isKept = false
      try {
        const isClaimed = (await this.#claimedBy(request.jobId)).size > 0
        const conflict = isClaimed ? null : await claimLayers(context, request, needs, request.jobId)
        if (conflict !== null) return { claimed: false, ...conflict }
        // The process may have ended between the rows and the files.
        if (isClaimed) await makeFiles(context, request.targetPoolId, request.jobId)
        const plan = await describe(context, needs, context.pools.handle(request.targetPoolId))
        await this.#keep(request, needs)
        isKept = true
        return { claimed: true, plan }
      } finally {
        if (!isKept) needs.clear()
      }
    })
  }

  async #claimedBy(jobId: string): Promise<Set<number>> {
    const rows = await this.#context.catalog.db
      .selectFrom('replicas')
      .select('layer_alias')
      .where('filling_job', '=', jobId)
      .where('state', '!=', 'condemned')
      .execute()
    return new Set(rows.map((row) => row.layer_alias))
  }

  /** Only what the job has claimed is the cursor's: see move-fill.ts. */
  async #keep(request: MoveRequest | DrainRequest, needs: MoveNeeds): Promise<Filling> {
    const claimed = await this.#claimedBy(request.jobId)
    const filling = { needs, layers: needs.layers.filter(({ layer }) => claimed.has(layer.alias)) }
    this.#fillings.set(request.jobId, filling)
    return filling
  }

  #forget(jobId: string): void {
    this.#fillings.get(jobId)?.needs.clear()
    this.#fillings.delete(jobId)
  }

  /**
   * Copies the next piece of what was claimed; everything before the cursor that it returns is durable in the target and was read back.
   * @throws AtollError NO_SPACE, IO_ERROR, POOL_UNAVAILABLE, VERIFY_FAILED; the cursor before it still holds
   */
  async fillNext(request: MoveRequest | DrainRequest, cursor: JsonObject | null, options: FillOptions): Promise<FillProgress> {
    const filling = this.#fillings.get(request.jobId) ?? (await this.#keep(request, await MoveNeeds.read(this.#context, request)))
    return await fillPieces(this.#context, request, filling.needs, filling.layers, cursor, options)
  }

  /**
   * Makes the target the home of what moves, and lets all that is open read there. Everything claimed is filled.
   * @throws AtollError as `changeHome` (move-home.ts) and, where something has come since that is not in the target, as `fillNext`
   */
  async home(request: MoveRequest | DrainRequest): Promise<void> {
    const context = this.#context
    this.#forget(request.jobId)
    const late = lateMarker(request.jobId)
    await this.#alone(async () => {
      for (let attempt = 1; attempt <= homeAttemptsMax; attempt += 1) {
        const needs = await settledNeeds(context, request, () => undefined)
        try {
          requireSealed(needs)
          await this.#fillLate(request, needs, late)
          if (await changeHome(context, request, needs, [request.jobId, late])) return
        } finally {
          needs.clear()
        }
      }
      throw new AtollError('RESOURCE_STATUS', `what is being moved was changed ${homeAttemptsMax} times meanwhile; try again`, {
        retryable: true,
      })
    })
  }

  /** What is needed and was not when the job claimed: usually nothing. */
  async #fillLate(request: MoveRequest | DrainRequest, needs: MoveNeeds, late: string): Promise<void> {
    const { targetPoolId, jobId } = request
    const isOurs = ({ layer }: NeededLayer) => isMarked(layer, targetPoolId, jobId)
    const rest = needs.layers.filter((needed) => !isOurs(needed))
    if (rest.length === 0) return
    const conflict = await claimLayers(this.#context, request, { layers: rest, unsealed: [] }, late)
    if (conflict !== null) {
      const { waitsForJobId } = conflict
      throw new AtollError('MOVE_RUNNING', `job ${waitsForJobId} is moving layers that came to this move; wait for it`, {
        values: { jobId: waitsForJobId },
        retryable: true,
      })
    }
    for (const { layer } of rest) {
      for (const { sourcePoolId, runs } of await needs.partsOf(layer))
        await fillAll(this.#context, { layer, sourcePoolId, targetPoolId, runs })
    }
  }

  /**
   * Frees what nobody reads any more where it was before.
   * @throws AtollError as `Reclaimer.run` (reclaim.ts)
   */
  async drop({ targetPoolId }: MoveRequest | DrainRequest, options: ReclaimOptions): Promise<{ freedBytes: number }> {
    const { catalog, pools } = this.#context
    const there = catalog.db.selectFrom('replicas').select('layer_alias').where('pool_id', '=', targetPoolId)
    const rows = await catalog.db
      .selectFrom('replicas')
      .innerJoin('layers', 'layers.alias', 'replicas.layer_alias')
      .select('replicas.pool_id')
      .distinct()
      .where('replicas.pool_id', '!=', targetPoolId)
      // A layer that the volume gave up when it began to write in the target has a replica in one pool only.
      .where((query) => query.or([query('layers.state', '=', 'condemned'), query('replicas.layer_alias', 'in', there)]))
      .execute()
    let freedBytes = 0
    for (const { pool_id: poolId } of rows) {
      if (pools.find(poolId) !== undefined) freedBytes += (await this.#reclaimer.run(poolId, options)).freedBytes
    }
    return { freedBytes }
  }

  /**
   * The move is given up: what it has copied goes, as far as it was not done. What is written since it began stays in the target,
   * where the volumes find it. A pool that was to be drained takes new things again.
   */
  async release(request: MoveRequest | DrainRequest): Promise<void> {
    const context = this.#context
    this.#forget(request.jobId)
    await this.#reclaimer.alone(async () => {
      await releaseLayers(context, [request.jobId, lateMarker(request.jobId)])
      if (context.pools.find(request.targetPoolId) !== undefined) await removeCondemned(context, request.targetPoolId)
    })
    if (!('volumeId' in request)) await this.#pools.set(request.poolId, { draining: 'default' })
  }

  /** Neither a reclaim runs nor does anybody come into a pool from another one. */
  async #alone<T>(fn: () => Promise<T>): Promise<T> {
    return await this.#reclaimer.alone(async () => await this.#cover.alone(fn))
  }
}

/** What is claimed when the home changes is filled at once: after a crash it is nobody's, and goes. */
function lateMarker(jobId: string): string {
  return `${jobId}+`
}

function throwIfAborted(signal: AbortSignal | undefined): void {
  if (signal?.aborted === true) throw new AtollError('JOB_CANCELLED', 'the move was interrupted', { cause: signal.reason })
}
