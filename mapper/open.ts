/**
 * Opening resources as devices.
 *
 * Rules:
 * - One open per resource. For writing it takes the lease first (lease.ts), so that a crash from then on leaves the volume
 *   dirty; a failed open of a volume that was clean releases it again, one of a dirty volume leaves it dirty.
 * - If the replay found frames in the next layer, a swap happened whose transaction was lost. It is committed (active = next,
 *   another next) before the volume serves.
 * - A next layer without frames may still hold bytes that nobody acknowledged. It is replaced by a clean one, so that
 *   nothing stays allocated that no map refers to.
 * - Where the holder that died may have been on another machine, its active layer is left: it is sealed, and the volume goes on in the
 *   next one (I1). The backend has shut that holder out before, so this only makes sure that no two holders ever wrote one layer.
 * - A resource that cannot be opened is an error that names it and the layer, page or journal; nothing else is harmed, and
 *   the reason is kept (`OpenTable.failure`).
 *
 * Everything here is called by who holds the resource's lock.
 */
import { AtollError, isAtollError, type ResourceRow } from '@atoll/core'
import { mapBytesMax, type Device, type DeviceLimits, type FrozenMap, type OpenReport, type ThrottleLimits } from '@atoll/native'
import { checkpointLocked } from './checkpoint.ts'
import { closeLocked } from './close.ts'
import type { MapperContext } from './context.ts'
import { giveLogBack, isDirty, releaseLease, takeLease, type TakenLease } from './lease.ts'
import { isWaiting } from './import-waiting.ts'
import { loadMap } from './maps.ts'
import { type OpenEntry, type OpenEvent, type OpenReader, type OpenVolume, type PlacedLayer, poolsOf } from './open-table.ts'
import { namePools, readLinks, sourcesOf } from './pool-links.ts'
import { rootOf } from './root.ts'
import { aboutResource, leaseLostError, requireResource, requireVolumeRow } from './rows.ts'
import { roundUpToSlot } from './size.ts'

export interface OpenOptions {
  /** Who opens: stands in the lease. */
  readonly holder: string
  /** True: the durable content, which nobody may change meanwhile. Snapshots and images are only opened like this. */
  readonly readOnly: boolean
  /** Default: the volume's own, or none. */
  readonly throttle?: ThrottleLimits
  /** Bounds of the device; the engine's defaults otherwise. */
  readonly limits?: Partial<DeviceLimits>
  /** Told what the device cannot answer to a request; must not throw. */
  readonly onEvent?: (event: OpenEvent) => void
}

/** Layer files that one native call looks for. */
const existenceBatch = 512
/** Nobody uses the device yet, so that nothing has to end. */
const leaveDeadlineMs = 5000
/** Who opens a dirty volume to make it clean. */
const recoveryHolder = 'recovery'

/**
 * Opens a resource. Volumes (and images on their way in) for writing unless `readOnly`.
 * @throws AtollError ALREADY_OPEN, POOL_UNAVAILABLE, LAYER_MISSING, PAGE_CORRUPT, PAGE_MISSING, CATALOG_BEHIND, JOURNAL_CORRUPT, FORMAT_VERSION, NO_SPACE
 */
export async function openLocked(context: MapperContext, resource: ResourceRow, options: OpenOptions): Promise<OpenEntry> {
  context.open.requireClosed(resource.id)
  try {
    context.olderCatalog.requireNewest(resource)
    const { open } = context
    if (!options.readOnly) return await open.opening(resource.id, async () => await openWritable(context, resource, options))
    if (resource.kind === 'volume') await settleLocked(context, resource.id)
    return await open.opening(resource.id, async () => await openReader(context, resource.id, options))
  } catch (error) {
    const why = await whyElsewhere(context, resource, error)
    const failure = aboutResource(error, resource.id, `the ${resource.kind} "${resource.name}" cannot be opened${why}`)
    context.open.setFailure(resource.id, failure)
    throw failure
  }
}

/** What a failure has to do with another pool that the resource reads from; empty: nothing. */
async function whyElsewhere(context: MapperContext, resource: ResourceRow, error: unknown): Promise<string> {
  if (!isAtollError(error)) return ''
  if (error.code === 'POOL_UNAVAILABLE' && error.values['poolId'] !== resource.home_pool_id)
    return ' without another pool, which it reads from'
  if (error.code !== 'LAYER_MISSING') return ''
  const absent = sourcesOf(await readLinks(context.catalog.db), resource.home_pool_id).filter((pool) => pool.isAbsent)
  return absent.length === 0 ? '' : ` while a pool of the lost catalog is not here: import ${namePools(absent)}`
}

/**
 * A dirty volume is opened, replayed, brought into the catalog and closed; so is one that could not be opened last, and one
 * that this process has neither made nor opened yet (a catalog restored from a backup calls it clean, and its journal goes
 * on: CATALOG_BEHIND). Any other is left alone. After this the catalog's root of a closed volume is its content.
 * @throws AtollError as `openLocked`
 */
export async function settleLocked(context: MapperContext, volumeId: string): Promise<void> {
  const failure = context.open.failure(volumeId)
  const dirty = await isDirty(context, volumeId)
  if (!dirty && failure === undefined && context.open.isCompared(volumeId)) return
  const resource = await requireResource(context.catalog.db, volumeId)
  if (failure !== undefined)
    context.log.info({ volumeId }, `the volume could not be opened (${failure.code}): its journal is replayed`)
  else if (dirty) context.log.info({ volumeId }, 'the last holder of the volume died: its journal is replayed')
  const entry = await openLocked(context, resource, { holder: recoveryHolder, readOnly: false })
  await closeLocked(context, entry)
}

async function openWritable(context: MapperContext, resource: ResourceRow, options: OpenOptions): Promise<OpenVolume> {
  const volume = { id: resource.id, projectId: resource.project_id, poolId: resource.home_pool_id }
  if (await isWaiting(context.catalog.db, resource.id)) {
    throw new AtollError('LAYER_MISSING', 'it is being moved, and the pool that it writes into is not here', {
      values: { id: resource.id },
    })
  }
  // Before the lease says anything: where a pool that it writes is not open, nothing is.
  context.pools.handle(resource.home_pool_id)
  for (const { poolId } of await writtenBy(context, resource)) context.pools.handle(poolId)
  const lease = await takeLease(context, volume, options.holder)
  let opened: { device: Device; report: OpenReport } | undefined
  try {
    // Read again after the lease: nobody changes it from here on.
    const row = await requireResource(context.catalog.db, resource.id)
    const map = await loadMap(context, resource.id, rootOf(row))
    const throttle = options.throttle ?? (await ownThrottle(context, resource.id))
    const { layers, places } = await layersOf(context, map, [lease.activeAlias, lease.nextAlias], volume.poolId)
    const active = placeOf(places, lease.activeAlias)
    const next = placeOf(places, lease.nextAlias)
    opened = await context.engine.openDevice({
      volumeId: resource.id,
      sizeBytes: row.size_bytes,
      epoch: lease.epoch,
      batchLogSinceEpoch: lease.logSinceEpoch,
      map,
      mapLsn: lease.mapLsn,
      layers,
      active: active.alias,
      next: next.alias,
      ...(throttle === undefined ? {} : { throttle }),
      ...(options.limits === undefined ? {} : { limits: options.limits }),
      onEvent: (event) => {
        if (event.kind === 'checkpoint-wanted') context.requestCheckpoint(resource.id)
        else options.onEvent?.({ kind: event.kind, resourceId: resource.id, message: event.message })
      },
    })
    const serve: OpenVolume = {
      kind: 'writable',
      ...volume,
      formerPools: new Set(),
      readsFormerPools: false,
      get writePoolId() {
        return this.active.poolId
      },
      device: opened.device,
      report: opened.report,
      layers: new Set(layers.map((layer) => layer.alias)),
      epoch: lease.epoch,
      onEvent: options.onEvent ?? (() => undefined),
      sizeBytes: row.size_bytes,
      pendingSizeBytes: null,
      mapLsn: lease.mapLsn,
      sharedBelowPage: lease.sharedBelowPage,
      active,
      next,
      nextExported: false,
      swapUncommitted: opened.report.promotedNext,
      orphansPossible: lease.wasDirty,
      leaseLost: false,
    }
    if (serve.swapUncommitted) {
      context.log.info({ volumeId: resource.id, layerId: next.id }, 'a swap that a crash interrupted is completed')
      await checkpointLocked(context, serve)
    } else if (lease.wasDirty) await replaceUsedNext(context, serve)
    if (lease.wasDirty) await leaveActive(context, serve)
    context.open.add(serve)
    return serve
  } catch (error) {
    await takeBack(context, resource.id, lease, opened?.device)
    throw error
  }
}

/** The open failed. What the device did not write is durable as before; a lease that was clean is clean again. */
async function takeBack(context: MapperContext, volumeId: string, lease: TakenLease, device: Device | undefined): Promise<void> {
  try {
    await device?.close()
    // A device that was open has cut and continued the journal: let the next open look at it again.
    if (device !== undefined) return
    await giveLogBack(context, volumeId, lease)
    if (!lease.wasDirty) await releaseLease(context, volumeId, lease.epoch)
  } catch (error) {
    context.log.warn({ err: error, volumeId }, 'a failed open was not taken back completely: the next open replays the journal')
  }
}

/** A crash may have left bytes in the next layer whose frames never became durable. */
async function replaceUsedNext(context: MapperContext, volume: OpenVolume): Promise<void> {
  const { layers, catalog } = context
  const used = volume.next
  const { store } = await layers.ref(used, volume.poolId)
  const extents = await store.extents(used.id, 0, roundUpToSlot(volume.sizeBytes))
  if (!extents.some((extent) => extent.data)) return
  const [spare] = await layers.take([volume.writePoolId])
  if (spare === undefined) return
  try {
    await catalog.write(async (tx) => {
      const result = await tx
        .updateTable('volumes')
        .set({ next_alias: spare.alias })
        .where('id', '=', volume.id)
        .where('epoch', '=', volume.epoch)
        .executeTakeFirst()
      if (result.numUpdatedRows !== 1n) throw leaseLostError(volume.id, volume.epoch)
      await layers.assign(tx, spare, { volumeId: volume.id, projectId: volume.projectId, epoch: volume.epoch }, 'spare')
      await layers.move(tx, used.alias, ['spare'], 'condemned')
    })
  } catch (error) {
    layers.giveBack(spare)
    throw error
  }
  volume.next = spare
  volume.nextExported = false
}

/** I1: what another machine may have written is not written on. Where that cannot be now, the volume serves all the same. */
async function leaveActive(context: MapperContext, volume: OpenVolume): Promise<void> {
  const { fence } = context.pools.handle(volume.writePoolId).capabilities
  if (fence === 'lock' || fence === 'none') return
  // As before any swap (share.ts).
  if (!(await context.exporter.flushed(poolsOf(volume)))) return
  volume.nextExported = true
  try {
    const next = await context.layers.ref(volume.next, volume.poolId)
    await context.engine.swap([{ device: volume.device, next }], leaveDeadlineMs)
    volume.swapUncommitted = true
    await checkpointLocked(context, volume)
  } catch (error) {
    context.log.warn({ err: error, volumeId: volume.id }, 'the layer of the last holder is left later')
  }
}

async function openReader(context: MapperContext, resourceId: string, options: OpenOptions): Promise<OpenReader> {
  const row = await requireResource(context.catalog.db, resourceId)
  const map = await loadMap(context, resourceId, rootOf(row))
  const { layers } = await layersOf(context, map, [], row.home_pool_id)
  const { device, report } = await context.engine.openDevice({
    volumeId: resourceId,
    sizeBytes: row.size_bytes,
    epoch: 0,
    map,
    mapLsn: 0,
    layers,
    active: null,
    next: null,
    ...(options.throttle === undefined ? {} : { throttle: options.throttle }),
    ...(options.limits === undefined ? {} : { limits: options.limits }),
    onEvent: (event) => {
      if (event.kind !== 'checkpoint-wanted') options.onEvent?.({ kind: event.kind, resourceId, message: event.message })
    },
  })
  const reader: OpenReader = {
    kind: 'read-only',
    id: resourceId,
    poolId: row.home_pool_id,
    formerPools: new Set(),
    readsFormerPools: false,
    device,
    report,
    layers: new Set(layers.map((layer) => layer.alias)),
    sizeBytes: row.size_bytes,
  }
  context.open.add(reader)
  return reader
}

/** Where the layers lie that a volume writes and is to write next, as far as that is known. */
async function writtenBy(context: MapperContext, resource: ResourceRow): Promise<PlacedLayer[]> {
  const { active_alias: active, next_alias: next } = await requireVolumeRow(context.catalog.db, resource.id)
  return await context.layers.homesIfKnown(next === null ? [active] : [active, next], resource.home_pool_id)
}

/**
 * Every layer that a map refers to, also beyond the present size (it may grow while it is open), and the ones named, as a resource
 * of `readerPoolId` reads them; each of them is there. @throws AtollError LAYER_MISSING naming the layer
 */
async function layersOf(context: MapperContext, map: FrozenMap, more: readonly number[], readerPoolId: string) {
  const aliases = [...new Set([...map.layers(mapBytesMax), ...more])]
  const homes = await context.layers.homes(aliases, readerPoolId)
  const layers = homes.map(({ alias, id, poolId }) => ({ alias, id, store: context.pools.handle(poolId).store }))
  for (const [store, refs] of Map.groupBy(layers, (layer) => layer.store)) {
    for (let start = 0; start < refs.length; start += existenceBatch) {
      const part = refs.slice(start, start + existenceBatch)
      const allocatedBytes = await store.allocatedBytes(part.map((layer) => layer.id))
      const missing = part.find((_, index) => (allocatedBytes[index] ?? -1) < 0)
      if (missing === undefined) continue
      throw new AtollError('LAYER_MISSING', `the file of layer ${missing.id} (alias ${missing.alias}) is missing`, {
        values: { layerId: missing.id, alias: missing.alias },
      })
    }
  }
  return { layers, places: new Map(homes.map((home): [number, PlacedLayer] => [home.alias, home])) }
}

function placeOf(places: ReadonlyMap<number, PlacedLayer>, alias: number): PlacedLayer {
  const place = places.get(alias)
  if (place === undefined) throw new AtollError('LAYER_MISSING', `layer ${alias} is not in the catalog`, { values: { alias } })
  return place
}

async function ownThrottle(context: MapperContext, volumeId: string): Promise<ThrottleLimits | undefined> {
  const { throttle } = await requireVolumeRow(context.catalog.db, volumeId)
  return throttle === null ? undefined : throttle
}
