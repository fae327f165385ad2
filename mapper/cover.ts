/**
 * Who comes into a pool from another one: a clone across pools, a volume that is rolled back to a snapshot with another home.
 *
 * A resource reads a layer in its home if there is a replica. One that is not the primary has only what the resources of its own pool
 * name, and the primary only what those name that have no closer one. So who comes from a pool where another replica is
 * read may name slots that the replica it will read does not have: they are filled in before it is made.
 *
 * Rules:
 * - That is looked at with the maps as they are while nobody else claims or changes a home, and no reclaim runs from then until the
 *   commit: it would free again what nobody names yet. Where no layer has several replicas there is nothing to look at.
 * - A replica that a job is filling for whoever reads in that pool gets what is missing of it as well: the job's cursor says that
 *   everything before it is there.
 */
import type { ResourceRow } from '@atoll/core'
import { mapBytesMax, type Reach } from '@atoll/native'
import type { MapperContext } from './context.ts'
import { feedReach } from './maps.ts'
import { fillAll } from './move-fill.ts'
import { type DrainRequest, type LayerPlaces, MoveNeeds, type MoveRequest, placedLayers, readIn } from './move-needs.ts'
import type { Reclaimer } from './reclaim.ts'
import { rootOf } from './root.ts'
import { requireResource } from './rows.ts'
import { runningMoves, type RunningMove } from './running-moves.ts'
import { subtractRuns } from './runs.ts'
import { SharedLock } from './shared-lock.ts'

export class Cover {
  readonly #context: MapperContext
  readonly #reclaimer: Reclaimer
  readonly #lock = new SharedLock()

  constructor(context: MapperContext, reclaimer: Reclaimer) {
    this.#context = context
    this.#reclaimer = reclaimer
  }

  /** Runs `fn` while nobody comes into a pool. */
  async alone<T>(fn: () => Promise<T>): Promise<T> {
    return await this.#lock.alone(fn)
  }

  /**
   * Runs `fn`, which commits a resource of `poolId` with what the resource `fromId` names.
   * @throws what `fn` throws; RESOURCE_NOT_FOUND, and where something has to be copied NO_SPACE, IO_ERROR, POOL_UNAVAILABLE
   */
  async into<T>(poolId: string, fromId: string, fn: () => Promise<T>): Promise<T> {
    const source = await requireResource(this.#context.catalog.db, fromId)
    if (source.home_pool_id === poolId) return await fn()
    const plain = await this.#lock.shared(async () => ((await this.#hasSeveral()) ? null : { value: await fn() }))
    if (plain !== null) return plain.value
    return await this.#reclaimer.alone(
      async () =>
        await this.#lock.shared(async () => {
          await ensureCovered(this.#context, fromId, poolId)
          return await fn()
        }),
    )
  }

  async #hasSeveral(): Promise<boolean> {
    const { db } = this.#context.catalog
    return (
      (await db.selectFrom('replicas').select('layer_alias').where('is_primary', '=', false).limit(1).executeTakeFirst()) !==
      undefined
    )
  }
}

/** Roots whose pages are fetched together. */
const rootsAtOnce = 256

/** See the head of this file. Called while no reclaim runs and nobody claims or changes a home. */
async function ensureCovered(context: MapperContext, fromId: string, poolId: string): Promise<void> {
  await context.pins.run(async () => {
    const source = await requireResource(context.catalog.db, fromId)
    const reaches = new Reaches(context)
    const needsOfMoves = new Map<string, MoveNeeds>()
    try {
      const named = await reaches.ofRows([source])
      const layers = (await placedLayers(context, [...named.layers()])).filter(
        (layer) => layer.state === 'sealed' && layer.replicas.length > 1,
      )
      for (const layer of layers) {
        const runs = await named.runs(layer.alias)
        if (runs.length === 0) continue
        const sourcePoolId = readIn(layer, source.home_pool_id)
        const readPoolId = readIn(layer, poolId)
        const fill = async (targetPoolId: string, present: Float64Array): Promise<void> => {
          const missing = subtractRuns(runs, present)
          if (missing.length > 0) await fillAll(context, { layer, sourcePoolId, targetPoolId, runs: missing })
        }
        if (readPoolId !== sourcePoolId) await fill(readPoolId, await (await reaches.ofPool(readPoolId)).runs(layer.alias))
        for (const move of await movesFilling(context, layer, { poolId, readPoolId })) {
          let needs = needsOfMoves.get(move.jobId)
          if (needs === undefined) {
            needs = await MoveNeeds.read(context, requestOf(move))
            needsOfMoves.set(move.jobId, needs)
          }
          await fill(move.targetPoolId, await needs.coveredRuns(layer))
        }
      }
    } finally {
      reaches.clear()
      for (const needs of needsOfMoves.values()) needs.clear()
    }
  })
}

/** The moves after which a resource of the pool reads the layer in another replica, which they are filling. */
async function movesFilling(
  context: MapperContext,
  layer: LayerPlaces,
  { poolId, readPoolId }: { poolId: string; readPoolId: string },
): Promise<RunningMove[]> {
  const marks = layer.replicas.filter(
    (replica) => replica.fillingJob !== null && replica.state !== 'condemned' && replica.poolId !== readPoolId,
  )
  if (marks.length === 0) return []
  return (await runningMoves(context.catalog.db)).filter((move) => {
    const mark = marks.find((replica) => replica.fillingJob === move.jobId)
    if (mark === undefined) return false
    return mark.poolId === poolId || (move.kind === 'drain' && move.subject === readPoolId)
  })
}

function requestOf({ jobId, kind, subject, targetPoolId, withSnapshots }: RunningMove): MoveRequest | DrainRequest {
  return kind === 'drain' ? { jobId, poolId: subject, targetPoolId } : { jobId, volumeId: subject, targetPoolId, withSnapshots }
}

/** What resources name, found once. */
class Reaches {
  readonly #context: MapperContext
  readonly #byPool = new Map<string, Reach>()
  readonly #all: Reach[] = []

  constructor(context: MapperContext) {
    this.#context = context
  }

  async ofRows(rows: readonly Pick<ResourceRow, 'id' | 'root_word' | 'root_crc'>[]): Promise<Reach> {
    const reach = this.#context.engine.reach()
    this.#all.push(reach)
    for (let start = 0; start < rows.length; start += rootsAtOnce) {
      const part = rows.slice(start, start + rootsAtOnce)
      for (const row of part) reach.addRoot(rootOf(row), mapBytesMax)
      await feedReach(this.#context, reach, part[0]?.id ?? '')
    }
    return reach
  }

  /** Of all resources of a pool: what they name of a layer is in its replica there. */
  async ofPool(poolId: string): Promise<Reach> {
    const known = this.#byPool.get(poolId)
    if (known !== undefined) return known
    const { db } = this.#context.catalog
    const rows = await db
      .selectFrom('resources')
      .select(['id', 'root_word', 'root_crc'])
      .where('home_pool_id', '=', poolId)
      .orderBy('id')
      .execute()
    const reach = await this.ofRows(rows)
    this.#byPool.set(poolId, reach)
    return reach
  }

  clear(): void {
    for (const reach of this.#all) reach.clear()
  }
}
