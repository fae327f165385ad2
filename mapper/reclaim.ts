/**
 * Reclaim: space that no durable root refers to goes back to the pools, and map pages that none reaches leave the catalog.
 *
 * What is never touched: live maps are not looked at; layers that are making, spare, next, active or closing are not looked
 * at either. Of an active layer the device itself frees what its map does not own, under the slots' locks.
 *
 * The order, and why each step is where it is:
 *  1. Dirty volumes are replayed into the catalog first: their journals are the truth. One that cannot be opened keeps its
 *     active and next layer (they are not sealed), and its durable root counts like every other: replaying a journal only
 *     ever takes sealed layers out of a map.
 *     Then open volumes are brought into the catalog, so that what they have overwritten or discarded is freed as well. One that
 *     cannot be now (its disk is full to the last byte, its device is poisoned, its pool answers nobody) counts with its last
 *     checkpoint.
 *  2. A pin (page-pins.ts), then the page boundary, then the list of sealed layers, then the roots, in this order, each
 *     after the one before. Pages below the boundary belong to no checkpoint in flight, so what made them is visible in the roots
 *     that are read afterwards; a layer that was sealed before the roots were read has all of its references in them.
 *  3. The mark: the union of all durable roots, each page visited once.
 *  4. Sealed layers that nothing reaches are condemned, durably. With that commit every earlier one is durable, too: the
 *     delete or checkpoint that freed something cannot be taken back by a power cut any more (I5).
 *     The pools' exports follow: an import must find what they name, so a pool whose export cannot be written keeps everything.
 *  5. The barrier: reads that looked a slot up before the roots were read have finished (I5).
 *  6. Punch what is not reached in sealed layers; remove condemned ones, the files first, then the rows; sweep pages.
 *
 * Why resources that are made after step 2 need no second look: for a layer that was sealed at step 2, every root committed
 * later refers only to slots that some root of step 2 refers to. A root is made by sharing a durable one (snapshot, clone, image,
 * rollback; its row is read in the transaction that makes the new one), or by a checkpoint, whose map is its volume's
 * durable one with slots given to the volume's own active layer (not sealed at step 2) or to HOLE. The same holds for pages: a
 * new root reaches old pages through an old root, or new ones with an id at or above the boundary.
 *
 * Roots are marked over the whole address space, not up to the size of their resource: a map that was uniform once still names
 * its first layer beyond the end, where nothing was ever written, and a resource that grows, or a larger clone, reads zeros from
 * there. The layer must exist for that; so it stays, empty, as long as any map of that line does.
 *
 * A crash at any point leaves something for the next run and nothing wrong; running it again changes nothing.
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import { AtollError, isAtollError, Mutex } from '@atoll/core'
import { mapBytesMax, type Reach } from '@atoll/native'
import { isStalled, type PoolHandle } from '@atoll/southbound'
import { checkpointLocked } from './checkpoint.ts'
import { punchOrphansLocked } from './close.ts'
import type { MapperContext } from './context.ts'
import { eachInTurns, inPieces } from './turns.ts'
import { dirtyVolumes, isOurLog } from './lease.ts'
import { pruneLinks } from './link-pruning.ts'
import { feedReach, pageBatch } from './maps.ts'
import { settleLocked } from './open.ts'
import type { PagePin } from './page-pins.ts'
import { readersOf, readLinks } from './pool-links.ts'
import { removeCondemned, sealClosing } from './recover.ts'
import { readRoots, type RootRow, writtenLayers } from './references.ts'
import { rootOf } from './root.ts'
import { findLease } from './rows.ts'
import { deleteBatch } from './staged-pages.ts'

export interface ReclaimProgress {
  readonly doneLayers: number
  readonly totalLayers: number
  readonly freedBytes: number
}

export interface ReclaimOptions {
  /** Stops between two steps; what was freed until then stays freed. */
  readonly signal?: AbortSignal
  readonly onProgress?: (progress: ReclaimProgress) => void
}

export interface ReclaimResult {
  /** Bytes given back to the pools. */
  readonly freedBytes: number
  readonly removedLayers: number
  readonly sweptPages: number
}

interface SealedLayer {
  readonly alias: number
  readonly id: string
  readonly poolId: string
}

/** Roots whose pages are fetched together. */
const rootsAtOnce = 256
/** Layers that are punched at the same time. */
const layersAtOnce = 8
/** Page ids looked at in one turn of the event loop. */
const sweepBatch = 2048

export class Reclaimer {
  readonly #context: MapperContext
  readonly #oneAtATime = new Mutex()
  /** Slots that were reached when a layer was punched last: they only ever get fewer, so the same number is the same set. */
  readonly #punched = new Map<number, number>()

  constructor(context: MapperContext) {
    this.#context = context
  }

  /**
   * Reclaims one pool, or all that are open (null). Runs one after the other; everything else goes on meanwhile.
   * @throws AtollError POOL_UNAVAILABLE, PAGE_CORRUPT or PAGE_MISSING naming the resource whose map cannot be read (nothing of
   * the sealed layers is touched then), JOB_CANCELLED
   */
  async run(poolId: string | null, options: ReclaimOptions = {}): Promise<ReclaimResult> {
    return await this.#oneAtATime.run(async () => await this.#run(poolId, options))
  }

  /** Runs `fn` while no reclaim does. */
  async alone<T>(fn: () => Promise<T>): Promise<T> {
    return await this.#oneAtATime.run(fn)
  }

  async #run(poolId: string | null, options: ReclaimOptions): Promise<ReclaimResult> {
    const context = this.#context
    const poolIds = poolId === null ? context.pools.openIds() : [context.pools.handle(poolId).poolId]
    const checkCancelled = () => throwIfCancelled(options.signal)
    await this.#settleDirty(checkCancelled)
    await this.#checkpointOpen(checkCancelled)
    for (const id of poolIds) await sealClosing(context, id)

    let freedBytes = 0
    let sweptPages = 0
    let failure: unknown
    /** What the roots name; while one cannot be read, it may be anything. */
    let mayName = (_alias: number): boolean => true
    const reach = context.engine.reach()
    const pin = context.pins.pin()
    try {
      const boundary = context.pageIds.boundary()
      const sealed = await this.#sealedLayers(poolIds)
      await this.#mark(reach, checkCancelled)
      const named = new Set<number>()
      await eachInTurns(reach.layers(), (alias) => named.add(alias))
      mayName = (alias) => named.has(alias)
      const slotCounts = await reach.slotCounts(Uint32Array.from(sealed, (layer) => layer.alias))
      await this.#condemn(sealed.filter((_, index) => slotCounts[index] === 0))
      const exported = new Set<string>()
      for (const id of poolIds) if (await context.exporter.flushedForPunch(id)) exported.add(id)
      await context.engine.readBarrier()
      for (let doneLayers = 0; doneLayers < sealed.length;) {
        checkCancelled()
        const part = sealed.slice(doneLayers, doneLayers + layersAtOnce)
        const freed = await Promise.all(
          part.map(async (layer, index) =>
            exported.has(layer.poolId) ? await this.#punch(layer, reach, slotCounts[doneLayers + index] ?? 0) : 0,
          ),
        )
        freedBytes += freed.reduce((sum, bytes) => sum + bytes, 0)
        doneLayers += part.length
        options.onProgress?.({ doneLayers, totalLayers: sealed.length, freedBytes })
      }
      sweptPages = await this.#sweep(pin, reach, boundary, checkCancelled)
    } catch (error) {
      if (isAtollError(error, 'JOB_CANCELLED')) throw error
      // A map that cannot be read protects everything that is sealed or condemned.
      failure = error
      await context.engine.readBarrier()
    } finally {
      pin.release()
      reach.clear()
    }

    let removedLayers = 0
    for (const id of poolIds) {
      checkCancelled()
      const removed = await removeCondemned(context, id, { mayName })
      freedBytes += removed.freedBytes
      removedLayers += removed.layerCount
      for (const alias of removed.aliases) this.#punched.delete(alias)
    }
    for (const volume of context.open.volumes()) {
      checkCancelled()
      if (!(await this.#isStalled(volume.id))) freedBytes += await this.#punchOrphans(volume.id)
    }
    await this.#restoreReserves(poolIds)
    if (failure !== undefined) throw failure
    // After the sweep, so that what waits for the pin is little; the next reclaim has the use of it.
    await pruneLinks(context, checkCancelled)
    return { freedBytes, removedLayers, sweptPages }
  }

  async #settleDirty(checkCancelled: () => void): Promise<void> {
    const context = this.#context
    for (const volumeId of await dirtyVolumes(context)) {
      checkCancelled()
      if (await this.#isStalled(volumeId)) continue
      // Opened here, it would go on without the batch log of the home that had it, whose clients may come back.
      const lease = await findLease(context.catalog.db, volumeId)
      if (lease !== undefined && !isOurLog(context, lease)) continue
      try {
        await context.locks.run([volumeId], async () => await settleLocked(context, volumeId))
      } catch (error) {
        context.log.warn({ err: error, volumeId }, 'a volume could not be replayed, so reclaim leaves its layers alone')
      }
    }
  }

  async #checkpointOpen(checkCancelled: () => void): Promise<void> {
    const { locks, log, open, pools } = this.#context
    for (const { id } of open.volumes()) {
      checkCancelled()
      if (await this.#isStalled(id)) continue
      try {
        await locks.run([id], async () => {
          const volume = open.volume(id)
          if (volume === undefined || volume.leaseLost || volume.device.isPoisoned()) return
          const checkpoint = async () => await checkpointLocked(this.#context, volume, { emergency: true })
          const pool = pools.find(volume.writePoolId)
          await (pool === undefined ? checkpoint() : withReserve(pool, checkpoint))
        })
      } catch (error) {
        log.warn(
          { err: error, volumeId: id },
          'a volume had no checkpoint before a reclaim: what it overwrote since its last stays',
        )
      }
    }
  }

  /** Whether a pool that a volume writes answers nobody at present: the volume is left as it is, as if its disk were full. */
  async #isStalled(volumeId: string): Promise<boolean> {
    const { catalog, layers, log, pools } = this.#context
    const row = await catalog.db
      .selectFrom('resources')
      .innerJoin('volumes', 'volumes.id', 'resources.id')
      .select(['resources.home_pool_id', 'volumes.active_alias', 'volumes.next_alias'])
      .where('resources.id', '=', volumeId)
      .executeTakeFirst()
    if (row === undefined) return false
    const aliases = [row.active_alias, row.next_alias].filter((alias) => alias !== null)
    const written = (await layers.homesIfKnown(aliases, row.home_pool_id)).map((home) => home.poolId)
    for (const poolId of new Set([row.home_pool_id, ...written])) {
      const health = pools.find(poolId)?.health()
      if (health === undefined || !isStalled(health)) continue
      log.warn({ volumeId, poolId }, 'a reclaim leaves out a volume whose pool does not answer, or is full')
      return true
    }
    return false
  }

  async #sealedLayers(poolIds: readonly string[]): Promise<SealedLayer[]> {
    const layers: SealedLayer[] = []
    const links = await readLinks(this.#context.catalog.db)
    for (const poolId of poolIds) {
      // What volumes of a pool that was not imported yet read is reached by no root that is here.
      if (readersOf(links, poolId).some((pool) => pool.isAbsent)) continue
      const sealed = this.#context.catalog.db
        .selectFrom('replicas')
        .innerJoin('layers', 'layers.alias', 'replicas.layer_alias')
        .select(['layers.alias', 'layers.id', 'replicas.pool_id as poolId'])
        .where('replicas.pool_id', '=', poolId)
        .where('layers.state', '=', 'sealed')
        .orderBy('replicas.layer_alias')
      const ofPool = await inPieces(
        async (after, limit) => await sealed.where('replicas.layer_alias', '>', after).limit(limit).execute(),
        (layer) => layer.alias,
        0,
      )
      // Whatever a row says: what only a journal names lies in a layer that is written.
      const written = await writtenLayers(
        this.#context,
        ofPool.map((layer) => layer.alias),
      )
      for (const layer of ofPool) if (!written.has(layer.alias)) layers.push(layer)
    }
    return layers
  }

  async #mark(reach: Reach, checkCancelled: () => void): Promise<void> {
    const context = this.#context
    const rows = await readRoots(context)
    for (let start = 0; start < rows.length; start += rootsAtOnce) {
      const part = rows.slice(start, start + rootsAtOnce)
      try {
        for (const row of part) reach.addRoot(rootOf(row), mapBytesMax)
        await feedReach(context, reach, part[0]?.id ?? '', checkCancelled)
      } catch (error) {
        if (isAtollError(error, 'JOB_CANCELLED')) throw error
        throw await this.#nameOfUnreadable(part, error)
      }
    }
  }

  /** The error again, with the resource whose map it is: found by reading one after the other. */
  async #nameOfUnreadable(rows: readonly RootRow[], error: unknown): Promise<unknown> {
    for (const row of rows) {
      try {
        const reach = this.#context.engine.reach()
        reach.addRoot(rootOf(row), mapBytesMax)
        await feedReach(this.#context, reach, row.id)
      } catch (own) {
        return own
      }
    }
    return error
  }

  async #condemn(layers: readonly SealedLayer[]): Promise<void> {
    for (let start = 0; start < layers.length; start += pageBatch) {
      const aliases = layers.slice(start, start + pageBatch).map((layer) => layer.alias)
      await this.#context.catalog.write(
        async (tx) => {
          await tx
            .updateTable('layers')
            .set({ state: 'condemned' })
            .where('alias', 'in', aliases)
            .where('state', '=', 'sealed')
            .execute()
        },
        { emergency: true },
      )
    }
    // Without a layer to condemn nothing was committed yet that syncs what freed the ranges about to be punched.
    if (layers.length === 0) await this.#syncCatalog()
  }

  /** A durable commit: everything committed before is durable with it. */
  async #syncCatalog(): Promise<void> {
    const now = String(this.#context.clock.nowMs())
    await this.#context.catalog.write(
      async (tx) => {
        await tx
          .insertInto('meta')
          .values({ key: 'reclaimed_at', value: now })
          .onConflict((conflict) => conflict.column('key').doUpdateSet({ value: now }))
          .execute()
      },
      { emergency: true },
    )
  }

  /** @param slotCount slots of the layer that are reached */
  async #punch(layer: SealedLayer, reach: Reach, slotCount: number): Promise<number> {
    const { pools, log } = this.#context
    if (slotCount === 0 || this.#punched.get(layer.alias) === slotCount) return 0
    const pool = pools.find(layer.poolId)
    if (pool === undefined || pool.capabilities.punchUnitBytes === 0) return 0
    try {
      const runs = await reach.runs(layer.alias)
      const freedBytes = await withReserve(pool, async () => await pool.punchExcept(layer.id, runs))
      this.#punched.set(layer.alias, slotCount)
      return freedBytes
    } catch (error) {
      log.warn({ err: error, layerId: layer.id }, 'a layer could not be punched; the next reclaim tries again')
      return 0
    }
  }

  async #sweep(pin: PagePin, reach: Reach, boundary: number, checkCancelled: () => void): Promise<number> {
    const { catalog, pins } = this.#context
    // Somebody who read roots before ours may still fetch pages that ours do not reach.
    await pins.olderReleased(pin)
    let sweptPages = 0
    for (let from = 1; from < boundary;) {
      checkCancelled()
      const ids = await catalog.pages.listIds(from, boundary, sweepBatch)
      const last = ids.at(-1)
      if (last === undefined) break
      const reached = reach.hasPages(ids)
      const garbage = ids.filter((_, index) => reached[index] === 0)
      for (let start = 0; start < garbage.length; start += deleteBatch) {
        const batch = garbage.subarray(start, start + deleteBatch)
        sweptPages += await catalog.write(async () => await catalog.pages.delete(batch), { durable: false, emergency: true })
        await nextTurn()
      }
      from = last + 1
      await nextTurn()
    }
    return sweptPages
  }

  async #punchOrphans(volumeId: string): Promise<number> {
    const context = this.#context
    return await context.locks.run([volumeId], async () => {
      const volume = context.open.volume(volumeId)
      if (volume === undefined || volume.leaseLost || volume.device.isPoisoned()) return 0
      return await punchOrphansLocked(context, volume)
    })
  }

  async #restoreReserves(poolIds: readonly string[]): Promise<void> {
    const { catalog, pools, log } = this.#context
    const restores = [catalog.restoreReserve(), ...poolIds.map(async (id) => (await pools.find(id)?.restoreReserve()) ?? 0)]
    for (const result of await Promise.allSettled(restores)) {
      if (result.status === 'rejected') log.warn({ err: result.reason as unknown }, 'a reserve could not be made whole again')
    }
  }
}

/** On a full backend even freeing may need a little space: the pool's reserve is there for it. */
async function withReserve<T>(pool: PoolHandle, fn: () => Promise<T>): Promise<T> {
  try {
    return await fn()
  } catch (error) {
    if (!isAtollError(error, 'NO_SPACE')) throw error
    await pool.releaseReserve()
    return await fn()
  }
}

function throwIfCancelled(signal: AbortSignal | undefined): void {
  if (signal?.aborted === true) {
    throw new AtollError('JOB_CANCELLED', 'the reclaim was cancelled; what it freed stays freed', { cause: signal.reason })
  }
}
