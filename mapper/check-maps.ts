/**
 * The maps: every page of every root is there and is what its parent says, and every layer that a map names is one that it may
 * name.
 *
 * Pages are walked under a pin that is older than the rows (see reclaim.ts), so none of them goes meanwhile. Each is read once
 * however many roots share it. Which resources a damage is about is found by walking again, and only if there is one.
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import { toAtollError, type LayerRow, type ResourceRow } from '@atoll/core'
import type { MapCheck } from '@atoll/native'
import { nameResources, type CheckContext, type CheckKind, type Found } from './check-finding.ts'
import { reachBatch } from './maps.ts'
import { findExportedPages, findUsable, replacePage } from './page-restore.ts'
import { pageOfRoot, rootOf, uniformOwner } from './root.ts'
import { eachInTurns, filterInTurns } from './turns.ts'

/** Page ids looked at in one turn of the event loop. */
const sweepBatch = 2048
/** Damaged pages and layers for which the resources are named. */
const attributedMax = 500
/** Levels of a tree: nothing is further than this from its root. */
const levelCount = 4

const pageKinds: Readonly<Record<string, CheckKind>> = {
  PAGE_MISSING: 'page-missing',
  PAGE_CORRUPT: 'page-corrupt',
  FORMAT_VERSION: 'page-version',
}

/** What the walk over all maps has found, for the parts that come after it. */
export interface WalkedMaps {
  readonly walk: MapCheck
  /** Layers that a map names. */
  readonly named: ReadonlySet<number>
  /** False: pages are damaged, so that what is not reached may be needed all the same. */
  readonly isComplete: boolean
  /** Of these layers, the resources that refer to them. */
  readonly referring: (aliases: readonly number[]) => Promise<ReadonlyMap<number, readonly ResourceRow[]>>
}

/** @param boundary pages from here on may be of checkpoints under way (`PageIds.boundary`, asked before the rows were read) */
export async function checkMaps(check: CheckContext, boundary: number): Promise<WalkedMaps> {
  const { state } = check
  const walk = check.mapper.engine.mapCheck()
  const rootless = new Set<ResourceRow>()
  const onRootless = (row: ResourceRow, error: unknown): void => {
    rootless.add(row)
    const message = `the root of ${row.kind} "${row.name}" is none (${toAtollError(error).message}): bring the catalog back from a backup`
    check.add({ severity: 'error', kind: 'root-invalid', object: row.id, message })
  }
  const fixed = await filterInTurns(state.resources, (row) => !state.volumesById.has(row.id))
  await walkRoots(check, walk, fixed, onRootless)
  // Before the volumes' own: a snapshot or an image that names a layer which is still written would change.
  const shared = await filterInTurns(walk.layers(), (alias) => state.layersByAlias.get(alias)?.state === 'active')
  const written = await filterInTurns(state.resources, (row) => state.volumesById.has(row.id))
  await walkRoots(check, walk, written, onRootless)
  const rooted = rootless.size === 0 ? state.resources : state.resources.filter((row) => !rootless.has(row))
  const faults = walk.faults()
  const named = faults.slice(0, attributedMax)
  const leading = await findReferring(check, rooted, { pages: named.map((fault) => fault.pageId), layers: [] })
  const exported =
    faults.length === 0
      ? null
      : await findExportedPages(
          check.mapper,
          named.map((fault) => fault.pageId),
        )
  for (const fault of faults) {
    const rows = leading.pages.get(fault.pageId)
    const bodies = exported?.get(fault.pageId) ?? []
    const [row] = rows ?? []
    const body = row === undefined ? undefined : await findUsable(check.mapper, fault.pageId, bodies, rootOf(row))
    check.add({
      severity: 'error',
      kind: pageKinds[fault.code] ?? 'page-corrupt',
      object: `page ${fault.pageId}`,
      message: `${fault.message}; it is part of ${rows === undefined ? 'a map' : nameResources(rows)}: ${body !== undefined ? 'a repair takes it from what the pool says of itself' : 'bring the catalog back from a backup'}`,
      ...(body === undefined
        ? {}
        : {
            mend: async () => {
              await replacePage(check.mapper, fault.pageId, body)
              return 'the page was taken from the export of the pool'
            },
          }),
    })
  }
  const rest = walk.faultCount() - faults.length
  if (rest > 0)
    check.add({ severity: 'error', kind: 'page-corrupt', object: 'pages', message: `${rest} more pages cannot be used` })
  const referring = async (aliases: readonly number[]) =>
    (await findReferring(check, rooted, { pages: [], layers: aliases.slice(0, attributedMax) })).layers
  await checkNamedLayers(check, walk, referring, { shared, fixed })
  const isComplete = walk.faultCount() === 0 && rootless.size === 0
  if (isComplete) await checkGarbage(check, walk, boundary)
  const namedLayers = new Set<number>()
  await eachInTurns(walk.layers(), (alias) => namedLayers.add(alias))
  return { walk, named: namedLayers, isComplete, referring }
}

async function walkRoots(
  check: CheckContext,
  walk: MapCheck,
  rows: readonly ResourceRow[],
  onRootless: (row: ResourceRow, error: unknown) => void = () => undefined,
): Promise<void> {
  for (const [index, row] of rows.entries()) {
    try {
      walk.addRoot(rootOf(row))
    } catch (error) {
      onRootless(row, error)
    }
    if (index % sweepBatch === sweepBatch - 1) await nextTurn()
  }
  for (;;) {
    const ids = walk.pending(reachBatch)
    if (ids.length === 0) return
    await walk.supply(ids, await check.mapper.catalog.pages.get(ids))
    check.step(ids.length)
    await nextTurn()
  }
}

/** Which of the resources lead to pages, and to layers: parents first, then theirs, up to the roots. */
async function findReferring(
  check: CheckContext,
  rows: readonly ResourceRow[],
  wanted: { pages: readonly number[]; layers: readonly number[] },
): Promise<{ pages: Map<number, ResourceRow[]>; layers: Map<number, ResourceRow[]> }> {
  if (wanted.pages.length === 0 && wanted.layers.length === 0) return { pages: new Map(), layers: new Map() }
  const pagesOfLayers = new Map<number, number[]>()
  const parents = new Map<number, Set<number>>()
  const watched = new Set(wanted.pages)
  for (let level = 0; level < levelCount && (watched.size > 0 || (level === 0 && wanted.layers.length > 0)); level += 1) {
    const layers = Uint32Array.from(level === 0 ? wanted.layers : [])
    const walk = check.mapper.engine.mapCheck({ pages: Float64Array.from(watched), layers })
    await walkRoots(check, walk, rows)
    forPairs(walk.layerReferrers(), (page, alias) => {
      pagesOfLayers.set(alias, [...(pagesOfLayers.get(alias) ?? []), page])
      watched.add(page)
    })
    const before = watched.size
    forPairs(walk.pageReferrers(), (parent, page) => {
      parents.set(page, (parents.get(page) ?? new Set()).add(parent))
      watched.add(parent)
    })
    walk.clear()
    if (level > 0 && watched.size === before) break
  }
  // The first in a message are the ones that were there first.
  const byAge = rows.toSorted((a, b) => a.created_at - b.created_at)
  const byRootPage = Map.groupBy(byAge, (row) => pageOfRoot(rootOf(row)))
  const above = (starts: readonly number[]): ResourceRow[] => {
    const seen = new Set(starts)
    for (const page of seen) for (const parent of parents.get(page) ?? []) seen.add(parent)
    return [...seen].flatMap((page) => byRootPage.get(page) ?? [])
  }
  const ofLayer = (alias: number): ResourceRow[] => [
    ...byAge.filter((row) => uniformOwner(rootOf(row)) === alias),
    ...above(pagesOfLayers.get(alias) ?? []),
  ]
  return {
    pages: new Map(wanted.pages.map((page) => [page, above([page])])),
    layers: new Map(wanted.layers.map((alias) => [alias, ofLayer(alias)])),
  }
}

function forPairs(pairs: Float64Array, fn: (first: number, second: number) => void): void {
  for (let index = 0; index < pairs.length; index += 2) fn(pairs[index] ?? 0, pairs[index + 1] ?? 0)
}

async function checkNamedLayers(
  check: CheckContext,
  walk: MapCheck,
  referring: WalkedMaps['referring'],
  { shared, fixed }: { shared: readonly number[]; fixed: readonly ResourceRow[] },
): Promise<void> {
  const { state, add } = check
  const wrong = await filterInTurns(walk.layers(), (alias) => {
    const layer = state.layersByAlias.get(alias)
    return layer === undefined || ['making', 'spare', 'condemned'].includes(layer.state)
  })
  if (wrong.length === 0 && shared.length === 0) return
  const rows = await referring([...wrong, ...shared])
  for (const alias of wrong) add(namedLayerFound(check, alias, nameResources(rows.get(alias) ?? [])))
  for (const alias of shared) {
    const layer = state.layersByAlias.get(alias)
    const names = nameResources((rows.get(alias) ?? []).filter((row) => fixed.includes(row)))
    const message = `layer ${layer?.id} is still written by ${layer?.volume_id}, but is part of ${names}, which should never change: detach the volume, and bring the catalog back from a backup`
    add({ severity: 'error', kind: 'map-shares-active', object: layer?.id ?? String(alias), message })
  }
}

function namedLayerFound({ mapper, state, reclaimer }: CheckContext, alias: number, names: string): Found {
  const layer = state.layersByAlias.get(alias)
  if (layer === undefined) {
    const message = `the catalog has no layer ${alias}, which is part of ${names}: bring the catalog back from a backup`
    return { severity: 'error', kind: 'map-layer-unknown', object: `layer ${alias}`, message }
  }
  const object = layer.id
  if (layer.state === 'condemned') {
    return {
      severity: 'error',
      kind: 'map-layer-condemned',
      object,
      message: `layer ${layer.id} is to be removed, but is part of ${names}: repair it before the next reclaim or restart`,
      mend: async () => await reclaimer.alone(async () => await keepCondemned(mapper, layer)),
    }
  }
  const message = `layer ${layer.id} is recorded as ${layer.state}, but is part of ${names}: bring the catalog back from a backup`
  return { severity: 'error', kind: 'map-layer-unused', object, message }
}

/** Nothing removes condemned layers meanwhile. */
async function keepCondemned(mapper: CheckContext['mapper'], layer: LayerRow): Promise<string | null> {
  const replicas = (await mapper.layers.replicasOf([layer.alias])).get(layer.alias) ?? []
  const primary = replicas.find((replica) => replica.state === 'complete')
  if (primary === undefined || !(await mapper.pools.handle(primary.pool_id).layerExists(layer.id))) return null
  return await mapper.catalog.write(async (tx) => {
    await mapper.layers.move(tx, layer.alias, ['condemned'], 'sealed')
    return 'the layer is kept'
  })
}

async function checkGarbage(check: CheckContext, walk: MapCheck, boundary: number): Promise<void> {
  const { mapper, add } = check
  let count = 0
  let first = 0
  for (let from = 1; from < boundary;) {
    check.step()
    const ids = await mapper.catalog.pages.listIds(from, boundary, sweepBatch)
    const last = ids.at(-1)
    if (last === undefined) break
    const reached = walk.hasPages(ids)
    for (const [index, id] of ids.entries()) {
      if (reached[index] !== 0) continue
      if (count === 0) first = id
      count += 1
    }
    from = last + 1
    await nextTurn()
  }
  if (count === 0) return
  add({
    severity: 'note',
    kind: 'page-garbage',
    object: `page ${first}`,
    message: `${count} pages of maps (the first is ${first}) are part of nothing any more: the next reclaim deletes them`,
    mend: async () => `a reclaim deleted ${(await check.reclaimer.run(null)).sweptPages} pages`,
  })
}
