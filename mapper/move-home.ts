/**
 * The change of home: the one transaction after which resources read in the target what was copied there.
 *
 * Rules:
 * - Nothing is read in the target before this transaction, and nothing is dropped before it: a crash leaves everything as it was,
 *   or all of it changed. It is made only if everything that the resources name has a complete replica in the target, or one of ours that is filled;
 *   asked in the transaction itself.
 * - It runs while no reclaim does and nobody comes into the target, with the locks of everything that moves; what these name of sealed
 *   layers has only become less since their maps were read.
 * - Then the devices that read those layers get their new places, and every read that may have looked up an old one has ended
 *   (`passBarrier`), before a reclaim may run again: only a reclaim drops replicas. One that does not end in time keeps a reclaim from
 *   freeing anything where it may read.
 */
import { AtollError, type CatalogTransaction } from '@atoll/core'
import type { MapperContext } from './context.ts'
import { noteTree } from './exporter.ts'
import type { DrainRequest, MoveNeeds, MoveRequest } from './move-needs.ts'
import { addLink, readLinks } from './pool-links.ts'
import { passBarrier } from './read-barrier.ts'

/** Layers named by one statement. */
const aliasesAtOnce = 500
/** Open devices are told of their layers by so many at a time. */
const refsAtOnce = 512
/** Requests that a healthy backend has under way end within this time. */
const barrierMs = 10_000

/**
 * Changes the home of what moves. False: something came to what moves since its maps were read; nothing was changed.
 * @throws AtollError RESOURCE_STATUS naming a volume that writes elsewhere still; POOL_UNAVAILABLE
 */
export async function changeHome(
  context: MapperContext,
  request: MoveRequest | DrainRequest,
  needs: MoveNeeds,
  markers: readonly string[],
): Promise<boolean> {
  const { catalog, exporter, layers, locks, pools } = context
  const { targetPoolId } = request
  pools.handle(targetPoolId)
  const ids = needs.movers.map((mover) => mover.id)
  const changed = new Set<number>()
  /** Open since before an earlier change of home that did not get as far as to them. */
  const untold = new Set<string>()
  const isChanged = await locks.run(ids, async () => {
    const isDone = await catalog.write(async (tx) => {
      changed.clear()
      if (await hasOthers(tx, request, needs)) return false
      await requireWritingIn(tx, needs, targetPoolId)
      for (const alias of await completeFilled(tx, markers)) changed.add(alias)
      await requireComplete(tx, needs, targetPoolId)
      if (!('volumeId' in request)) for (const alias of await takePrimaries(tx, request)) changed.add(alias)
      for (const id of ids) {
        await tx
          .updateTable('resources')
          .set((query) => ({ home_pool_id: targetPoolId, home_epoch: query('home_epoch', '+', 1) }))
          .where('id', '=', id)
          .where('home_pool_id', '!=', targetPoolId)
          .execute()
        // Its pages are in the export of the home that it had.
        await noteTree(tx, targetPoolId, id)
      }
      return true
    })
    if (!isDone) return false
    layers.invalidate(changed)
    // All of it before anything can fail: who is not told keeps a reclaim from freeing what he reads.
    for (const id of context.open.idsAlsoOpening()) {
      const entry = context.open.get(id)
      if (entry === undefined) continue
      entry.formerPools.add(needs.fromPoolId)
      if (entry.readsFormerPools) untold.add(id)
      entry.readsFormerPools = true
      if (!ids.includes(id)) continue
      entry.poolId = targetPoolId
      if (entry.kind === 'writable') entry.nextExported = false
    }
    for (const id of ids) await swapHandles(context, id, untold.has(id) ? null : [...changed, ...needs.named])
    return true
  })
  if (!isChanged) return false
  // Whoever reads a layer in the target from now on, or no longer in a pool that is drained.
  for (const id of context.open.idsAlsoOpening()) {
    if (!ids.includes(id)) await locks.run([id], async () => await swapHandles(context, id, untold.has(id) ? null : [...changed]))
  }
  await passBarrier(context, barrierMs)
  await exporter.flushed([needs.fromPoolId, targetPoolId])
  return true
}

/** Resources that came to what moves: of them nothing is known yet. */
async function hasOthers(tx: CatalogTransaction, request: MoveRequest | DrainRequest, needs: MoveNeeds): Promise<boolean> {
  const known = new Set(needs.movers.map((mover) => mover.id))
  const query = tx.selectFrom('resources').select('id').where('home_pool_id', '=', needs.fromPoolId)
  if (!('volumeId' in request)) return (await query.execute()).some((row) => !known.has(row.id))
  if (needs.fromPoolId === request.targetPoolId || !request.withSnapshots) return false
  return (await query.where('volume_id', '=', request.volumeId).execute()).some((row) => !known.has(row.id))
}

/** @throws AtollError RESOURCE_STATUS */
async function requireWritingIn(tx: CatalogTransaction, needs: MoveNeeds, targetPoolId: string): Promise<void> {
  for (const mover of needs.movers) {
    const row = await tx
      .selectFrom('volumes')
      .innerJoin('replicas', 'replicas.layer_alias', 'volumes.active_alias')
      .select('replicas.pool_id')
      .where('volumes.id', '=', mover.id)
      .where('replicas.pool_id', '!=', targetPoolId)
      .executeTakeFirst()
    if (row === undefined) continue
    throw new AtollError('RESOURCE_STATUS', `${mover.kind} ${mover.id} (${mover.name}) is still written in pool ${row.pool_id}`, {
      values: { id: mover.id, poolId: row.pool_id },
    })
  }
}

/**
 * What the job has marked is complete: what is needed of it was filled and read back (move-fill.ts), of what is needed no more nobody
 * reads anything. Returns the layers.
 */
async function completeFilled(tx: CatalogTransaction, markers: readonly string[]): Promise<number[]> {
  const rows = await tx
    .updateTable('replicas')
    .set({ state: 'complete', filling_job: null })
    .where('filling_job', 'in', markers)
    .where('state', '!=', 'condemned')
    .returning('layer_alias')
    .execute()
  return rows.map((row) => row.layer_alias)
}

/** @throws AtollError INTERNAL: it was all claimed and filled */
async function requireComplete(tx: CatalogTransaction, needs: MoveNeeds, targetPoolId: string): Promise<void> {
  const aliases = [...new Set([...needs.named, ...needs.layers.map(({ layer }) => layer.alias)])]
  for (let start = 0; start < aliases.length; start += aliasesAtOnce) {
    const part = aliases.slice(start, start + aliasesAtOnce)
    const rows = await tx
      .selectFrom('replicas')
      .select('layer_alias')
      .where('pool_id', '=', targetPoolId)
      .where('state', '=', 'complete')
      .where('layer_alias', 'in', part)
      .execute()
    const complete = new Set(rows.map((row) => row.layer_alias))
    const missing = part.find((alias) => !complete.has(alias))
    if (missing === undefined) continue
    throw new AtollError('INTERNAL', `layer ${missing} has no complete replica in the target, so no home is changed`, {
      values: { alias: missing, poolId: targetPoolId },
    })
  }
}

/** What was read in a pool that is drained is read in the target from now on, also by the resources of other pools. Returns the layers. */
async function takePrimaries(tx: CatalogTransaction, { poolId, targetPoolId }: DrainRequest): Promise<number[]> {
  const there = tx
    .selectFrom('replicas')
    .select('layer_alias')
    .where('pool_id', '=', targetPoolId)
    .where('state', '=', 'complete')
  const rows = await tx
    .updateTable('replicas')
    .set({ is_primary: false })
    .where('pool_id', '=', poolId)
    .where('is_primary', '=', true)
    .where('layer_alias', 'in', there)
    .returning('layer_alias')
    .execute()
  const aliases = rows.map((row) => row.layer_alias)
  for (let start = 0; start < aliases.length; start += aliasesAtOnce) {
    await tx
      .updateTable('replicas')
      .set({ is_primary: true })
      .where('pool_id', '=', targetPoolId)
      .where('layer_alias', 'in', aliases.slice(start, start + aliasesAtOnce))
      .execute()
  }
  const { links } = await readLinks(tx)
  for (const link of links) if (link.source === poolId) await addLink(tx, link.reader, targetPoolId)
  return aliases
}

/** Gives the device of a resource, if it is open, the places where it reads these layers (null: all) now. Its lock is held. */
async function swapHandles(context: MapperContext, id: string, aliases: readonly number[] | null): Promise<void> {
  const entry = context.open.get(id)
  if (entry === undefined) return
  const known = aliases === null ? [...entry.layers] : aliases.filter((alias) => entry.layers.has(alias))
  for (let start = 0; start < known.length; start += refsAtOnce)
    await entry.device.addLayers(await context.layers.refs(known.slice(start, start + refsAtOnce), entry.poolId))
  entry.readsFormerPools = false
}
