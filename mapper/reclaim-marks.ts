/**
 * What all durable roots refer to, told apart by the pools whose resources refer to it where that matters: where a layer has several
 * replicas, each of them is needed by those resources only that read it (layers.ts).
 *
 * A move under way (running-moves.ts) brings resources into its target: they count there as well, so that what they will read is
 * there when they come. Of a pool that is drained, whoever reads there counts in the target, and that may be anybody.
 */
import { isAtollError, type CatalogTransaction } from '@atoll/core'
import { mapBytesMax, type Reach } from '@atoll/native'
import type { MapperContext } from './context.ts'
import { feedReach } from './maps.ts'
import { selectRoots, type RootRow } from './references.ts'
import { rootOf } from './root.ts'
import { runningMoves } from './running-moves.ts'
import { noRuns, slotCountOf, unionOfRuns } from './runs.ts'
import { eachInTurns } from './turns.ts'

/** Roots whose pages are fetched together. */
const rootsAtOnce = 256

/** Who reads a replica: the pools whose resources do (`only`), or all pools but some (`butNot`). */
export type Readers = { readonly only: string } | { readonly butNot: ReadonlySet<string> }

/** What refers to a layer. */
export interface Need {
  readonly reaches: readonly Reach[]
}

export class Marks {
  /** By the home of the resources; one for all of them where nobody asks for a pool. */
  readonly #groups: ReadonlyMap<string | null, Reach>

  private constructor(groups: ReadonlyMap<string | null, Reach>) {
    this.#groups = groups
  }

  /**
   * Marks over all durable roots. `byPool`: each pool by itself.
   * @throws AtollError PAGE_MISSING, PAGE_CORRUPT, FORMAT_VERSION naming a resource whose map cannot be read; what `step` throws
   */
  static async read(context: MapperContext, byPool: boolean, step: () => void): Promise<Marks> {
    const groups = new Map<string | null, Reach>()
    try {
      // Roots and moves of one state of the catalog: a resource that came home meanwhile is in one place or the other, never in none.
      const roots = await context.catalog.read(async (tx) => await readGroups(tx, byPool))
      for (const [poolId, rows] of roots) {
        const reach = context.engine.reach()
        groups.set(poolId, reach)
        await mark(context, reach, rows, step)
      }
      return new Marks(groups)
    } catch (error) {
      for (const reach of groups.values()) reach.clear()
      throw error
    }
  }

  clear(): void {
    for (const reach of this.#groups.values()) reach.clear()
  }

  /** Every layer that any of the resources of the pool (null: of all pools) names. */
  async named(poolId: string | null): Promise<ReadonlySet<number>> {
    const named = new Set<number>()
    for (const [group, reach] of this.#groups)
      if (poolId === null || group === poolId) await eachInTurns(reach.layers(), (alias) => named.add(alias))
    return named
  }

  /** 1 for each page that is reached. */
  hasPages(ids: Float64Array): Uint8Array {
    const reached = new Uint8Array(ids.length)
    for (const reach of this.#groups.values()) reach.hasPages(ids).forEach((isReached, index) => (reached[index] ||= isReached))
    return reached
  }

  /** What refers to each of these layers, of those who read it. */
  async needs(layers: readonly { readonly alias: number; readonly readers: Readers }[]): Promise<Need[]> {
    const aliases = Uint32Array.from(layers, (layer) => layer.alias)
    const needs = layers.map((): { reaches: Reach[] } => ({ reaches: [] }))
    for (const [poolId, reach] of this.#groups) {
      const slotCounts = await reach.slotCounts(aliases)
      layers.forEach(({ readers }, index) => {
        if (slotCounts[index] !== 0 && isReader(readers, poolId)) needs[index]?.reaches.push(reach)
      })
    }
    return needs
  }
}

/** The slots of a layer that are needed (triples, ascending), and how many these are. */
export async function runsOf(need: Need, alias: number): Promise<Float64Array> {
  let runs: Float64Array = noRuns
  for (const reach of need.reaches) runs = unionOfRuns(runs, await reach.runs(alias), alias)
  return runs
}

/** How many slots of a layer are needed. */
export async function slotCountOfNeed(need: Need, alias: number): Promise<number> {
  const [first, ...others] = need.reaches
  if (first === undefined) return 0
  if (others.length > 0) return slotCountOf(await runsOf(need, alias))
  return (await first.slotCounts(Uint32Array.of(alias)))[0] ?? 0
}

function isReader(readers: Readers, poolId: string | null): boolean {
  if (poolId === null) return true
  return 'only' in readers ? readers.only === poolId : !readers.butNot.has(poolId)
}

async function readGroups(tx: CatalogTransaction, byPool: boolean): Promise<Map<string | null, RootRow[]>> {
  const rows = await selectRoots(tx)
  if (!byPool) return new Map([[null, rows]])
  const groups = new Map<string | null, RootRow[]>(Map.groupBy(rows, (row) => row.home_pool_id))
  for (const { kind, subject, targetPoolId } of await runningMoves(tx)) {
    const isComing = (row: RootRow): boolean => kind === 'drain' || row.id === subject || row.volume_id === subject
    const coming = rows.filter((row) => row.home_pool_id !== targetPoolId && isComing(row))
    groups.set(targetPoolId, [...(groups.get(targetPoolId) ?? []), ...coming])
  }
  return groups
}

async function mark(context: MapperContext, reach: Reach, rows: readonly RootRow[], step: () => void): Promise<void> {
  for (let start = 0; start < rows.length; start += rootsAtOnce) {
    const part = rows.slice(start, start + rootsAtOnce)
    try {
      for (const row of part) reach.addRoot(rootOf(row), mapBytesMax)
      await feedReach(context, reach, part[0]?.id ?? '', step)
    } catch (error) {
      if (isAtollError(error, 'JOB_CANCELLED')) throw error
      throw await nameOfUnreadable(context, part, error)
    }
  }
}

/** The error again, with the resource whose map it is: found by reading one after the other. */
async function nameOfUnreadable(context: MapperContext, rows: readonly RootRow[], error: unknown): Promise<unknown> {
  for (const row of rows) {
    try {
      const reach = context.engine.reach()
      reach.addRoot(rootOf(row), mapBytesMax)
      await feedReach(context, reach, row.id)
    } catch (own) {
      return own
    }
  }
  return error
}
