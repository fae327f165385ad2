/**
 * What a pool has to get before resources come home to it: the layers that they read and that have no replica there, or one that
 * may lack something of them.
 *
 * Who reads what: a resource reads a layer from the replica in its home, or from the primary one where there is none. So
 * - the *movers* need in the target everything that their maps name;
 * - a layer that gets its first replica in the target is read there by the target's own resources from then on: what these name is
 *   needed, too;
 * - of a layer whose replica is there, what the target's own resources name is there; only the rest is missing;
 * - of a pool that is drained, whatever resources of other pools read there is needed as well: they will read it in the target.
 *
 * What is needed of a sealed layer only gets less: whoever is made meanwhile names what others name that read the same replica, and
 * who comes from another pool fills in what is missing (cover.ts). So a set that was found earlier is never too small.
 */
import { AtollError, type LayerState, type ResourceRow } from '@atoll/core'
import { mapBytesMax, type Reach } from '@atoll/native'
import type { MapperContext } from './context.ts'
import { feedReach } from './maps.ts'
import { rootOf } from './root.ts'
import { noRuns, subtractRuns, unionOfRuns } from './runs.ts'
import { eachInTurns, inPieces } from './turns.ts'

export interface MoveRequest {
  readonly jobId: string
  readonly volumeId: string
  readonly targetPoolId: string
  /** Its snapshots in the same home go with it. */
  readonly withSnapshots: boolean
}

export interface DrainRequest {
  readonly jobId: string
  readonly poolId: string
  readonly targetPoolId: string
}

export type Mover = Pick<
  ResourceRow,
  'id' | 'kind' | 'name' | 'size_bytes' | 'root_word' | 'root_crc' | 'home_pool_id' | 'volume_id' | 'status'
>

/** A layer and where its bytes are. */
export interface LayerPlaces {
  readonly alias: number
  readonly id: string
  readonly state: LayerState
  readonly volumeId: string | null
  readonly projectId: string
  readonly replicas: readonly {
    readonly poolId: string
    readonly state: 'complete' | 'filling' | 'condemned'
    readonly isPrimary: boolean
    readonly fillingJob: string | null
  }[]
}

/** Slots that come from one pool. */
export interface NeededPart {
  readonly sourcePoolId: string
  readonly runs: Float64Array
}

export interface NeededLayer {
  readonly layer: LayerPlaces
  /** There is none in the target yet; else the one that is there lacks something. */
  readonly isNew: boolean
}

/** Roots whose pages are fetched together. */
const rootsAtOnce = 256
/** Layers looked up by one query. */
const layersAtOnce = 500

/** See the head of this file. Ends with `clear`. */
export class MoveNeeds {
  readonly fromPoolId: string
  readonly movers: readonly Mover[]
  /** By alias: what the target has to get. */
  readonly layers: readonly NeededLayer[]
  /** What movers read in the target already. */
  readonly present: readonly LayerPlaces[]
  /** What movers name that is not sealed, and not in the target: it cannot be copied yet. */
  readonly unsealed: readonly LayerPlaces[]
  /** Every layer that movers name. */
  readonly named: ReadonlySet<number>
  readonly #targetPoolId: string
  readonly #isDrain: boolean
  readonly #groups: Groups

  private constructor(
    found: Pick<MoveNeeds, 'fromPoolId' | 'movers' | 'layers' | 'present' | 'unsealed' | 'named'>,
    targetPoolId: string,
    isDrain: boolean,
    groups: Groups,
  ) {
    this.fromPoolId = found.fromPoolId
    this.movers = found.movers
    this.layers = found.layers
    this.present = found.present
    this.unsealed = found.unsealed
    this.named = found.named
    this.#targetPoolId = targetPoolId
    this.#isDrain = isDrain
    this.#groups = groups
  }

  /**
   * Reads the maps as they are in the catalog now.
   * @throws AtollError VOLUME_NOT_FOUND, LAYER_MISSING; PAGE_MISSING, PAGE_CORRUPT, FORMAT_VERSION for a map that cannot be read
   */
  static async read(
    context: MapperContext,
    request: MoveRequest | DrainRequest,
    step: () => void = () => undefined,
  ): Promise<MoveNeeds> {
    return await context.pins.run(async () => {
      const { targetPoolId } = request
      const isDrain = !('volumeId' in request)
      const rows = await readRows(context)
      const fromPoolId = isDrain ? request.poolId : homeOf(rows, request.volumeId)
      const isMover = isDrain
        ? (row: Mover) => row.home_pool_id === fromPoolId
        : (row: Mover) =>
            row.id === request.volumeId ||
            (request.withSnapshots && row.volume_id === request.volumeId && row.home_pool_id === fromPoolId)
      const movers = rows.filter(isMover)
      const groups: Groups = { movers: context.engine.reach(), byPool: new Map() }
      try {
        await mark(context, groups.movers, movers, step)
        for (const [poolId, ofPool] of Map.groupBy(rows, (row) => row.home_pool_id)) {
          // The resources of other pools are nobody's business, unless what they read is going away.
          if (poolId !== targetPoolId && (!isDrain || poolId === fromPoolId)) continue
          const reach = context.engine.reach()
          groups.byPool.set(poolId, reach)
          await mark(
            context,
            reach,
            ofPool.filter((row) => !isMover(row)),
            step,
          )
        }
        const named = new Set<number>()
        await eachInTurns(groups.movers.layers(), (alias) => named.add(alias))
        const asked = new Set(named)
        for (const [poolId, reach] of groups.byPool)
          if (poolId !== targetPoolId) await eachInTurns(reach.layers(), (alias) => asked.add(alias))
        const found = { layers: [] as NeededLayer[], present: [] as LayerPlaces[], unsealed: [] as LayerPlaces[] }
        const needs = new MoveNeeds({ ...found, fromPoolId, movers, named }, targetPoolId, isDrain, groups)
        for (const layer of await placedLayers(
          context,
          [...asked].toSorted((a, b) => a - b),
        )) {
          if (layer.state !== 'sealed') {
            if (named.has(layer.alias) && completeIn(layer, targetPoolId) === undefined) found.unsealed.push(layer)
            continue
          }
          const isNew = completeIn(layer, targetPoolId) === undefined
          const parts = await needs.partsOf(layer)
          if (parts.length > 0) found.layers.push({ layer, isNew })
          else if (named.has(layer.alias)) found.present.push(layer)
        }
        return needs
      } catch (error) {
        clear(groups)
        throw error
      }
    })
  }

  /** What a sealed layer lacks in the target, by the pool it is read from, in the order of their ids. */
  async partsOf(layer: LayerPlaces): Promise<NeededPart[]> {
    const parts = new Map<string, Float64Array>()
    const add = (sourcePoolId: string, runs: Float64Array): void => {
      if (runs.length > 0) parts.set(sourcePoolId, unionOfRuns(parts.get(sourcePoolId) ?? noRuns, runs, layer.alias))
    }
    const target = this.#targetPoolId
    const residents = await this.#groups.byPool.get(target)?.runs(layer.alias)
    const present = completeIn(layer, target) === undefined ? noRuns : (residents ?? noRuns)
    const moving = await this.#groups.movers.runs(layer.alias)
    if (moving.length > 0) {
      const source = readIn(layer, this.fromPoolId)
      if (source !== target) add(source, subtractRuns(moving, present))
    }
    if (this.#isDrain && completeIn(layer, this.fromPoolId) !== undefined) {
      for (const [poolId, reach] of this.#groups.byPool) {
        if (poolId === target) continue
        const runs = await reach.runs(layer.alias)
        if (runs.length > 0 && readIn(layer, poolId) === this.fromPoolId) add(this.fromPoolId, subtractRuns(runs, present))
      }
    }
    // They read it elsewhere until there is one in the target.
    const isWanted = parts.size > 0 && completeIn(layer, target) === undefined
    if (isWanted && residents !== undefined && residents.length > 0) add(readIn(layer, target), residents)
    return [...parts].map(([sourcePoolId, runs]) => ({ sourcePoolId, runs })).toSorted(bySource)
  }

  /** Everything that the target has of a layer for its readers when the move has filled it. */
  async coveredRuns(layer: LayerPlaces): Promise<Float64Array> {
    const residents = await this.#groups.byPool.get(this.#targetPoolId)?.runs(layer.alias)
    let runs = completeIn(layer, this.#targetPoolId) === undefined ? noRuns : (residents ?? noRuns)
    for (const part of await this.partsOf(layer)) runs = unionOfRuns(runs, part.runs, layer.alias)
    return runs
  }

  clear(): void {
    clear(this.#groups)
  }
}

interface Groups {
  readonly movers: Reach
  /** Of the target, and of every pool that may read from one that is drained; without the movers. */
  readonly byPool: Map<string, Reach>
}

function clear(groups: Groups): void {
  groups.movers.clear()
  for (const reach of groups.byPool.values()) reach.clear()
}

function bySource(a: NeededPart, b: NeededPart): number {
  return a.sourcePoolId < b.sourcePoolId ? -1 : 1
}

function homeOf(rows: readonly Mover[], volumeId: string): string {
  const row = rows.find((other) => other.id === volumeId && other.kind === 'volume')
  if (row !== undefined) return row.home_pool_id
  throw new AtollError('VOLUME_NOT_FOUND', `there is no volume ${volumeId}`, { values: { id: volumeId } })
}

/** The pool in which there is a complete replica, if it is this one. */
export function completeIn(layer: LayerPlaces, poolId: string): string | undefined {
  return layer.replicas.find((replica) => replica.poolId === poolId && replica.state === 'complete')?.poolId
}

/** The pool where a resource of this home reads the layer. @throws AtollError LAYER_MISSING */
export function readIn(layer: LayerPlaces, homePoolId: string): string {
  const found =
    completeIn(layer, homePoolId) ?? layer.replicas.find((replica) => replica.isPrimary && replica.state === 'complete')?.poolId
  if (found !== undefined) return found
  throw new AtollError('LAYER_MISSING', `layer ${layer.id} (alias ${layer.alias}) has no complete replica that could be read`, {
    values: { layerId: layer.id, alias: layer.alias },
  })
}

async function readRows({ catalog }: Pick<MapperContext, 'catalog'>): Promise<Mover[]> {
  return await catalog.read(async (tx) => {
    const rows = tx
      .selectFrom('resources')
      .select(['id', 'kind', 'name', 'size_bytes', 'root_word', 'root_crc', 'home_pool_id', 'volume_id', 'status'])
      .orderBy('id')
    return await inPieces(
      async (after, limit) => await rows.where('id', '>', after).limit(limit).execute(),
      (row) => row.id,
      '',
    )
  })
}

async function mark(context: MapperContext, reach: Reach, rows: readonly Mover[], step: () => void): Promise<void> {
  for (let start = 0; start < rows.length; start += rootsAtOnce) {
    const part = rows.slice(start, start + rootsAtOnce)
    for (const row of part) reach.addRoot(rootOf(row), mapBytesMax)
    await feedReach(context, reach, part[0]?.id ?? '', step)
  }
}

/** Layers with all of their replicas, in the order asked for; those without a row are left out. */
export async function placedLayers(
  { catalog }: Pick<MapperContext, 'catalog'>,
  aliases: readonly number[],
): Promise<LayerPlaces[]> {
  const found: LayerPlaces[] = []
  for (let start = 0; start < aliases.length; start += layersAtOnce) {
    const rows = await catalog.db
      .selectFrom('layers')
      .innerJoin('replicas', 'replicas.layer_alias', 'layers.alias')
      .select(['layers.alias', 'layers.id', 'layers.state', 'layers.volume_id', 'layers.project_id', 'replicas.pool_id'])
      .select(['replicas.state as replicaState', 'replicas.is_primary', 'replicas.filling_job'])
      .where('layers.alias', 'in', aliases.slice(start, start + layersAtOnce))
      .orderBy('layers.alias')
      .execute()
    for (const [alias, ofLayer] of Map.groupBy(rows, (row) => row.alias)) {
      const [first] = ofLayer
      if (first === undefined) continue
      const replicas = ofLayer.map((row) => ({
        poolId: row.pool_id,
        state: row.replicaState,
        isPrimary: row.is_primary,
        fillingJob: row.filling_job,
      }))
      found.push({ alias, id: first.id, state: first.state, volumeId: first.volume_id, projectId: first.project_id, replicas })
    }
  }
  return found
}
