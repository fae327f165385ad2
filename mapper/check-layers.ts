/**
 * Layers: what the catalog says of them against the files of the pools.
 *
 * The files were listed before the rows were read, and what a row misses is looked for again, so that nothing which is made
 * or removed meanwhile is told. How long a file is says little: a layer is as long as what was written (I4). Only where a map
 * got every slot of a layer by a write, its file must reach to the last of them; and not where it is a copy, which holds no zeros.
 */
import { isAtollError, toAtollError, type LayerRow, type ReplicaRow } from '@atoll/core'
import type { PoolHandle } from '@atoll/southbound'
import { nameResources, type CheckContext, type Found } from './check-finding.ts'
import type { WalkedMaps } from './check-maps.ts'
import { epochMax, lsnMax, sealFile } from './recover.ts'
import { slotBytes } from './size.ts'
import { eachInTurns, filterInTurns, mapInTurns } from './turns.ts'

/** Layers looked at at the same time. */
const concurrency = 16

const bytesOf = (slots: number): number => slots * slotBytes

export async function checkLayers(check: CheckContext, maps: WalkedMaps): Promise<void> {
  const { mapper, state } = check
  await checkFiles(check, maps)
  await eachInTurns(state.replicas, (replica) => checkReplica(check, maps, replica))
  await checkStray(check, maps)
  for (const pool of state.pools) {
    const handle = mapper.pools.find(pool.id)
    if (handle === undefined) continue
    await checkUnknown(check, pool.id)
    const layers = await filterInTurns(state.layers, (layer) => state.homes.get(layer.alias)?.includes(pool.id) === true)
    const copies = await filterInTurns(state.replicas, (replica) => replica.pool_id === pool.id && replica.is_copy)
    const isCopy = await mapInTurns(copies, (replica) => replica.layer_alias)
    const originals = await filterInTurns(layers, (layer) => !isCopy.has(layer.alias))
    await checkLengths(check, maps, handle, originals)
    await checkSpares(check, maps, handle, layers)
    await checkSeals(check, handle, originals)
    if (check.deep && maps.isComplete) await checkAllocation(check, maps, handle, layers)
  }
}

/** Every layer that is needed has its file. */
async function checkFiles(check: CheckContext, maps: WalkedMaps): Promise<void> {
  const { mapper, state, add } = check
  const missing: LayerRow[] = []
  const places = new Map<LayerRow, string>()
  const isUnlisted = (layer: LayerRow, poolId: string): boolean => state.listings.get(poolId)?.has(layer.id) === false
  const unlisted = await filterInTurns(state.layers, (layer) => {
    const isNeeded =
      ['active', 'closing', 'sealed'].includes(layer.state) || (layer.state === 'spare' && layer.volume_id !== null)
    return isNeeded && state.homes.get(layer.alias)?.some((poolId) => isUnlisted(layer, poolId)) === true
  })
  for (const layer of unlisted) {
    const homes = state.homes.get(layer.alias) ?? []
    const lost: string[] = []
    for (const poolId of homes) if (isUnlisted(layer, poolId) && (await isStillMissing(mapper, poolId, layer))) lost.push(poolId)
    if (lost.length > 0) missing.push(layer)
    if (homes.length > 1) places.set(layer, ` in pool ${lost.join(' and ')} (it has ${homes.length} replicas)`)
  }
  if (missing.length === 0) return
  const rows = await maps.referring(missing.map((layer) => layer.alias))
  for (const layer of missing) {
    const names = nameResources(rows.get(layer.alias) ?? [])
    const part = names === '' ? '' : `, which is part of ${names},`
    const message = `the file of the ${layer.state} layer ${layer.id}${part} is missing${places.get(layer) ?? ''}: bring it back from a backup of the pool`
    add({ severity: 'error', kind: 'layer-missing', object: layer.id, message })
  }
}

/** The file was made, or the row went, after the files were listed? */
async function isStillMissing(mapper: CheckContext['mapper'], poolId: string, layer: LayerRow): Promise<boolean> {
  const pool = mapper.pools.find(poolId)
  if (pool === undefined || (await pool.layerExists(layer.id))) return false
  const row = await mapper.catalog.db
    .selectFrom('layers')
    .innerJoin('replicas', 'replicas.layer_alias', 'layers.alias')
    .select('layers.state')
    .where('layers.alias', '=', layer.alias)
    .where('replicas.pool_id', '=', poolId)
    .where('replicas.state', '=', 'complete')
    .executeTakeFirst()
  return row !== undefined && row.state !== 'condemned'
}

/** A row that a map may need to find its data is left alone: what names it is wrong then, or what it says. */
function mendUnlessNamed(
  { named, isComplete }: WalkedMaps,
  alias: number,
  mend: () => Promise<string | null>,
): Pick<Found, 'mend'> {
  return isComplete && !named.has(alias) ? { mend } : {}
}

function checkReplica({ mapper, state, add }: CheckContext, maps: WalkedMaps, replica: ReplicaRow): void {
  if (state.layersByAlias.has(replica.layer_alias)) return
  const object = `layer ${replica.layer_alias}`
  add({
    severity: 'warning',
    kind: 'replica-of-nothing',
    object,
    message: `pool ${replica.pool_id} is said to hold ${object}, which the catalog does not have`,
    ...mendUnlessNamed(maps, replica.layer_alias, async () => {
      await mapper.catalog.write(
        async (tx) => await tx.deleteFrom('replicas').where('layer_alias', '=', replica.layer_alias).execute(),
      )
      return 'the row was deleted'
    }),
  })
}

/** What a volume was to write next and does not name may have been written: it can be no spare of anybody. */
async function checkStray({ mapper, state, add }: CheckContext, maps: WalkedMaps): Promise<void> {
  const next = await mapInTurns(state.volumes, (volume) => volume.next_alias)
  const spares = await filterInTurns(state.layers, (layer) => layer.state === 'spare' && layer.volume_id !== null)
  for (const layer of spares) {
    if (next.has(layer.alias)) continue
    add({
      severity: 'warning',
      kind: 'layer-stray',
      object: layer.id,
      message: `layer ${layer.id} was to be the next one of ${layer.volume_id}, which does not name it: it is removed by a repair, and by the next start`,
      ...mendUnlessNamed(
        maps,
        layer.alias,
        async () =>
          await mapper.catalog.write(async (tx) => {
            const named = await tx.selectFrom('volumes').select('id').where('next_alias', '=', layer.alias).executeTakeFirst()
            if (named !== undefined) return null
            await mapper.layers.move(tx, layer.alias, ['spare'], 'condemned')
            return 'condemned; the next reclaim removes it'
          }),
      ),
    })
  }
}

/** Files that no row knows: reported, never removed (I11). */
async function checkUnknown({ state, add }: CheckContext, poolId: string): Promise<void> {
  const known = await mapInTurns(state.layers, (layer) => layer.id)
  const here = new Set<number>()
  await eachInTurns(state.replicas, (replica) => {
    if (replica.pool_id === poolId) here.add(replica.layer_alias)
  })
  const isUnknown = (id: string): boolean => !here.has(known.get(id)?.alias ?? 0)
  for (const id of await filterInTurns(state.listings.get(poolId)?.keys() ?? [], isUnknown)) {
    const elsewhere = known.has(id) ? ', which it has in other pools only' : ''
    const message = `the catalog does not know layer ${id} of pool ${poolId}${elsewhere}; it is left alone: after a restore of an older catalog it may hold the newest data`
    add({ severity: 'warning', kind: 'layer-unknown', object: id, message })
  }
}

async function checkLengths(
  check: CheckContext,
  { walk, referring }: WalkedMaps,
  pool: PoolHandle,
  layers: readonly LayerRow[],
): Promise<void> {
  // The first layer of a fresh volume is the whole map, written or not; it is the only one that is given under epoch 0.
  const written = await filterInTurns(layers, (layer) => layer.epoch > 0 && ['active', 'closing', 'sealed'].includes(layer.state))
  // Listed after the roots were read: files only grow.
  const listed = await mapInTurns(await pool.listLayers(), (layer) => layer.id)
  const lengthOf = (layer: LayerRow): number => listed.get(layer.id)?.lengthBytes ?? Infinity
  const slotEnds = await walk.slotEnds(Uint32Array.from(written, (layer) => layer.alias))
  const ends = new Map<LayerRow, number>()
  await eachInTurns(written.entries(), ([index, layer]) => {
    const endBytes = bytesOf(slotEnds[index] ?? 0)
    if (lengthOf(layer) < endBytes) ends.set(layer, endBytes)
  })
  const short = [...ends.keys()]
  if (short.length === 0) return
  const rows = await referring(short.map((layer) => layer.alias))
  for (const layer of short) {
    const names = nameResources(rows.get(layer.alias) ?? [])
    const message = `the file of layer ${layer.id} ends at ${lengthOf(layer)} bytes, but ${names} have data in it up to ${ends.get(layer)}: bring it back from a backup of the pool`
    check.add({ severity: 'error', kind: 'layer-short', object: layer.id, message })
  }
}

async function checkSpares(check: CheckContext, maps: WalkedMaps, pool: PoolHandle, layers: readonly LayerRow[]): Promise<void> {
  const { mapper, state, add } = check
  const listing = state.listings.get(pool.poolId)
  const spares = await filterInTurns(layers, (row) => row.state === 'spare' && row.volume_id === null)
  for (const layer of spares) {
    const listed = listing?.get(layer.id)
    if (listed === undefined && (await isStillMissing(mapper, pool.poolId, layer))) {
      add({
        severity: 'warning',
        kind: 'spare-missing',
        object: layer.id,
        message: `the file of the spare layer ${layer.id} is missing: a repair, or the next start, makes another one`,
        ...mendUnlessNamed(maps, layer.alias, async () => {
          if (!mapper.layers.withdraw(pool.poolId, layer.alias)) return null
          await mapper.layers.forget([layer.alias])
          return 'it is no spare any more; another one is made'
        }),
      })
    }
    if (listed === undefined || (listed.lengthBytes === 0 && listed.allocatedBytes === 0)) continue
    add({
      severity: 'error',
      kind: 'spare-written',
      object: layer.id,
      message: `layer ${layer.id} was never given to anybody and has been written all the same: the catalog is older than the pool; a repair, or the next start, leaves the file to whoever has the newer catalog`,
      ...mendUnlessNamed(maps, layer.alias, async () => {
        if (!mapper.layers.withdraw(pool.poolId, layer.alias)) return null
        await mapper.layers.forget([layer.alias])
        return 'its row was deleted; the file is kept'
      }),
    })
  }
}

/** The mark that ends the journal of a sealed layer tells an older catalog, which calls the layer active, that it is older. */
async function checkSeals(check: CheckContext, pool: PoolHandle, layers: readonly LayerRow[]): Promise<void> {
  const { mapper, add } = check
  // Of a layer whose volume is gone nobody can say it is active.
  const sealed = await filterInTurns(layers, (layer) => layer.state === 'sealed' && layer.volume_id !== null)
  for (let start = 0; start < sealed.length; start += concurrency) {
    check.step()
    await Promise.all(
      sealed.slice(start, start + concurrency).map(async (layer) => {
        const volumeId = layer.volume_id
        if (volumeId === null || check.state.listings.get(pool.poolId)?.has(layer.id) !== true) return
        try {
          const journal = await pool.store.inspectJournal(layer.id, volumeId, epochMax, lsnMax)
          if (journal.seal !== undefined) return
          add({
            severity: 'warning',
            kind: 'seal-missing',
            object: layer.id,
            message: `the journal of the sealed layer ${layer.id} does not say that it is sealed: an older catalog would write to it; repair it`,
            mend: async () =>
              await mapper.locks.run([volumeId], async () => {
                await sealFile(mapper, pool, volumeId, layer.id)
                return 'it was sealed again'
              }),
          })
        } catch (error) {
          const { code, message } = toAtollError(error)
          if (code === 'LAYER_MISSING') return
          const text = `the journal of the sealed layer ${layer.id} cannot be read (${message}): its data is not touched by that; an older catalog would write to it`
          add({ severity: 'warning', kind: 'seal-damaged', object: layer.id, message: text })
        }
      }),
    )
  }
}

/** What sealed layers hold for nobody. */
async function checkAllocation(
  check: CheckContext,
  { walk }: WalkedMaps,
  pool: PoolHandle,
  layers: readonly LayerRow[],
): Promise<void> {
  let bytes = 0
  let count = 0
  const sealed = await filterInTurns(layers, (row) => row.state === 'sealed')
  for (const layer of sealed) {
    check.step()
    const length = check.state.listings.get(pool.poolId)?.get(layer.id)?.lengthBytes ?? 0
    if (length === 0) continue
    const unreferenced = await unreferencedBytes(pool, layer.id, await walk.runs(layer.alias))
    bytes += unreferenced
    if (unreferenced > 0) count += 1
  }
  if (count === 0) return
  const message = `${bytes} bytes in ${count} sealed layers of pool ${pool.poolId} are part of nothing any more: the next reclaim frees them`
  check.add({
    severity: 'note',
    kind: 'layer-unreferenced-data',
    object: pool.poolId,
    message,
    mend: async () => `a reclaim freed ${(await check.reclaimer.run(null)).freedBytes} bytes`,
  })
}

/** None in a layer that was removed since the files were listed; one that is missing is told elsewhere. */
async function unreferencedBytes(pool: PoolHandle, layerId: string, runs: Float64Array): Promise<number> {
  try {
    return await pool.store.allocatedExcept(layerId, runs)
  } catch (error) {
    if (isAtollError(error, 'LAYER_MISSING')) return 0
    throw error
  }
}
