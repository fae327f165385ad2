/**
 * Replicas: each layer has one that everybody can fall back on, no job is needed for them that is not there, and a copy has what those
 * read who read it there.
 *
 * A copy has no more allocated than what was copied and not zero. So only where another replica of the layer has something that a copy
 * has not, what that is is read: zeros are none of a check's business. That is looked for in a deep check only.
 */
import { isAtollError, type LayerRow, type ReplicaRow } from '@atoll/core'
import type { Device, Store } from '@atoll/native'
import { nameResources, type CheckContext } from './check-finding.ts'
import type { WalkedMaps } from './check-maps.ts'
import { Marks, runsOf } from './reclaim-marks.ts'
import { intersectRuns, subtractRuns } from './runs.ts'
import { slotBytes } from './size.ts'
import { eachInTurns } from './turns.ts'

/** Slots of one copy that are read for an answer. */
const slotsReadMax = 4096

export async function checkReplicas(check: CheckContext, maps: WalkedMaps): Promise<void> {
  const { state } = check
  const byLayer = new Map<number, ReplicaRow[]>()
  await eachInTurns(state.replicas, (replica) => {
    const known = byLayer.get(replica.layer_alias)
    if (known === undefined) byLayer.set(replica.layer_alias, [replica])
    else known.push(replica)
  })
  await eachInTurns(state.layers, (layer) => checkPrimary(check, layer, byLayer.get(layer.alias) ?? []))
  await checkFills(check)
  if (check.deep && maps.isComplete) await checkCopies(check, maps, byLayer)
}

/** One of the complete replicas is the primary: without it, only those in its pools can read the layer. */
function checkPrimary({ mapper, add }: CheckContext, layer: LayerRow, replicas: readonly ReplicaRow[]): void {
  // Of one that is being removed the replicas go pool by pool.
  if (layer.state === 'condemned') return
  const complete = replicas.filter((replica) => replica.state === 'complete')
  const primaries = replicas.filter((replica) => replica.is_primary)
  // A layer without a complete one is told where rows are looked at.
  if (complete.length === 0 || (primaries.length === 1 && primaries[0]?.state === 'complete')) return
  const pools = complete.map((replica) => replica.pool_id).join(', ')
  const what = primaries.length > 1 ? `${primaries.length} of them are called the primary` : 'none of them is the primary'
  const [only] = complete
  if (primaries.length === 0 && complete.every((replica) => replica.is_copy)) {
    const message = `of layer ${layer.id} only copies are here (${pools}), for what reads it there: nothing else can read it before the pool with its primary replica is imported`
    add({ severity: 'warning', kind: 'replica-primary-missing', object: layer.id, message })
    return
  }
  const isCertain = complete.length === 1 && only !== undefined
  add({
    severity: 'error',
    kind: 'replica-primary-wrong',
    object: layer.id,
    message: `layer ${layer.id} lies complete in ${pools}, and ${what}: ${isCertain ? 'a repair makes that one it' : 'bring the catalog back from a backup'}`,
    ...(isCertain && {
      mend: async () => {
        await mapper.catalog.write(async (tx) => {
          const ofLayer = tx.updateTable('replicas').where('layer_alias', '=', layer.alias)
          await ofLayer.set({ is_primary: false }).where('pool_id', '!=', only.pool_id).execute()
          await ofLayer.set({ is_primary: true }).where('pool_id', '=', only.pool_id).execute()
        })
        mapper.layers.invalidate([layer.alias])
        return 'it is the primary'
      },
    }),
  })
}

/** What a job fills that is not there any more; the next start gives it up. */
async function checkFills({ mapper, state, add }: CheckContext): Promise<void> {
  const filled = state.replicas.filter((replica) => replica.filling_job !== null && replica.state !== 'condemned')
  if (filled.length === 0) return
  const jobs = await mapper.catalog.db
    .selectFrom('jobs')
    .select('id')
    .where('state', 'in', ['queued', 'running', 'paused'])
    .execute()
  const running = jobs.map((job) => job.id)
  for (const { layer_alias: alias, pool_id: poolId, filling_job: job } of filled) {
    if (running.some((id) => job?.startsWith(id) === true)) continue
    // The job may have ended since the rows were read.
    const now = (await mapper.layers.replicasOf([alias])).get(alias)?.find((replica) => replica.pool_id === poolId)
    if (now?.filling_job !== job) continue
    const object = state.layersByAlias.get(alias)?.id ?? `layer ${alias}`
    const message = `layer ${object} is being filled in pool ${poolId} by job ${job}, which does not run: the next start gives that up`
    add({ severity: 'warning', kind: 'replica-fill-stale', object, message })
  }
}

/** Nobody reads zeros from a copy where another replica has data. */
async function checkCopies(
  check: CheckContext,
  maps: WalkedMaps,
  byLayer: ReadonlyMap<number, readonly ReplicaRow[]>,
): Promise<void> {
  const several = [...byLayer].filter(([alias, rows]) => {
    const isIdle = rows.every((row) => row.state !== 'filling' && (row.filling_job === null || row.state === 'condemned'))
    return isIdle && check.state.layersByAlias.get(alias)?.state === 'sealed' && completeOf(rows).length > 1
  })
  if (several.length === 0) return
  const marks = await Marks.read(check.mapper, true, () => check.step())
  try {
    for (const [alias, rows] of several) {
      check.step()
      const layer = check.state.layersByAlias.get(alias)
      if (layer !== undefined) await checkCopiesOf(check, maps, marks, { layer, complete: completeOf(rows) })
    }
  } finally {
    marks.clear()
  }
}

const completeOf = (rows: readonly ReplicaRow[]): ReplicaRow[] => rows.filter((row) => row.state === 'complete')

async function checkCopiesOf(
  check: CheckContext,
  maps: WalkedMaps,
  marks: Marks,
  { layer, complete }: { layer: LayerRow; complete: readonly ReplicaRow[] },
): Promise<void> {
  const { mapper, add } = check
  const { alias, id } = layer
  const stores = new Map(complete.map((row) => [row.pool_id, mapper.pools.find(row.pool_id)?.store]))
  for (const copy of complete) {
    const store = stores.get(copy.pool_id)
    if (!copy.is_copy || store === undefined) continue
    const others = new Set(complete.filter((row) => row !== copy).map((row) => row.pool_id))
    const readers = copy.is_primary ? { butNot: others } : { only: copy.pool_id }
    const [need = { reaches: [] }] = await marks.needs([{ alias, readers }])
    const wanted = await runsOf(need, alias)
    for (const [poolId, other] of stores) {
      if (other === undefined || poolId === copy.pool_id || wanted.length === 0) continue
      const lost = await firstLost(check, layer, { wanted, copy: store, other })
      if (lost === null) continue
      const rows = (await maps.referring([alias])).get(alias) ?? []
      const readers = copy.is_primary ? rows : rows.filter((row) => row.home_pool_id === copy.pool_id)
      const message = `the replica of layer ${id} in pool ${copy.pool_id} has nothing at offset ${lost}, where the one in pool ${poolId} has data, and ${nameResources(readers)} read it there: bring it back from a backup of the pool`
      add({ severity: 'error', kind: 'replica-short', object: id, message })
      break
    }
  }
}

/** Offset of the first slot that is wanted of a copy, is not there, and is not zero in another replica; null: there is none. */
async function firstLost(
  { mapper }: CheckContext,
  { alias, id }: LayerRow,
  { wanted, copy, other }: { wanted: Float64Array; copy: Store; other: Store },
): Promise<number | null> {
  let device: Device | undefined
  try {
    // A file that is missing is told as such.
    if ((await copy.lengthBytes([id]))[0] === -1) return null
    const [has, mayLack] = [await allocatedRuns(copy, id), await allocatedRuns(other, id)]
    const missing = subtractRuns(intersectRuns(wanted, mayLack), has)
    if (missing.length === 0) return null
    const [sizeBytes = 0] = await other.lengthBytes([id])
    const layers = [{ alias, id, store: other }]
    const spec = { volumeId: mapper.newId(), epoch: 0, mapLsn: 0, layers, active: null, next: null }
    const opened = await mapper.engine.openDevice({
      ...spec,
      sizeBytes: roundUp(sizeBytes),
      map: mapper.engine.uniformMap(alias),
    })
    device = opened.device
    let left = slotsReadMax
    for (let index = 0; index < missing.length; index += 3) {
      const start = missing[index] ?? 0
      const end = Math.min(start + (missing[index + 1] ?? 0), roundUp(sizeBytes) / slotBytes)
      for (let slot = start; slot < end && left > 0; slot += 1, left -= 1) {
        const bytes = await device.read(slot * slotBytes, slotBytes)
        if (bytes.some((byte) => byte !== 0)) return slot * slotBytes
      }
    }
    return null
  } catch (error) {
    // It went since the rows were read, or is told elsewhere.
    if (isAtollError(error, 'LAYER_MISSING')) return null
    throw error
  } finally {
    await device?.close()
  }
}

const roundUp = (bytes: number): number => Math.ceil(bytes / slotBytes) * slotBytes

/** What a layer has allocated, in whole slots; triples as those of a map. */
async function allocatedRuns(store: Store, id: string): Promise<Float64Array> {
  const [lengthBytes = 0] = await store.lengthBytes([id])
  if (lengthBytes <= 0) return new Float64Array()
  const runs: number[] = []
  for (const { data, offsetBytes, lengthBytes: bytes } of await store.extents(id, 0, lengthBytes)) {
    if (!data) continue
    const start = Math.floor(offsetBytes / slotBytes)
    const end = Math.ceil((offsetBytes + bytes) / slotBytes)
    const last = runs.length - 3
    if (last >= 0 && (runs[last] ?? 0) + (runs[last + 1] ?? 0) >= start) runs[last + 1] = end - (runs[last] ?? 0)
    else runs.push(start, end - start, 0)
  }
  return Float64Array.from(runs)
}
