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
 *  3. The mark: the union of all durable roots, each page visited once; by the homes of the resources where a layer has several
 *     replicas, because each of these is needed only by those who read it (layers.ts).
 *  4. Sealed layers that nothing reaches are condemned, durably, and so are replicas that nobody reads; if that was the primary,
 *     another one is it with the same commit. With that commit every earlier one is durable, too: the
 *     delete or checkpoint that freed something cannot be taken back by a power cut any more (I5).
 *     The pools' exports follow: an import must find what they name, so a pool whose export cannot be written keeps everything.
 *  5. The barrier: reads that looked a slot up before the roots were read have finished (I5). Where some do not end (their backend
 *     does not answer), nothing is freed in the pools that they may read from; the others are not held up.
 *  6. Punch what is not reached in sealed layers, each replica by its own need; remove condemned ones, the files first, then the
 *     rows; sweep pages.
 *
 * A layer into which a job writes (`replicas.filling_job`, or a replica in `filling`) is left alone in every pool. Such a job begins and
 * takes its layers while no reclaim runs (`alone`), so that none goes by what was there before; and what it brings into a pool counts
 * there from then on (reclaim-marks.ts).
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
import { assert, AtollError, isAtollError, Mutex, type ReplicaRow } from '@atoll/core'
import { isStalled, type PoolHandle } from '@atoll/southbound'
import { checkpointLocked } from './checkpoint.ts'
import { punchOrphansLocked } from './close.ts'
import type { MapperContext } from './context.ts'
import { inPieces } from './turns.ts'
import { dirtyVolumes, isOurLog } from './lease.ts'
import { pruneLinks } from './link-pruning.ts'
import { pageBatch } from './maps.ts'
import { settleLocked } from './open.ts'
import type { PagePin } from './page-pins.ts'
import { type PoolLinks, readersOf, readLinks, sourcesOf } from './pool-links.ts'
import { passBarrier } from './read-barrier.ts'
import { Marks, type Need, type Readers, runsOf, slotCountOfNeed } from './reclaim-marks.ts'
import { removeCondemned, sealClosing } from './recover.ts'
import { writtenLayers } from './references.ts'
import { findLease } from './rows.ts'
import { deleteBatch } from './staged-pages.ts'

export interface ReclaimProgress {
  readonly doneLayers: number
  readonly totalLayers: number
  readonly freedBytes: number
}

export interface ReclaimOptions {
  /** Requests that were under way are waited for this long. */
  readonly barrierMs?: number
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

/** A complete replica of a sealed layer. */
interface SealedLayer {
  readonly alias: number
  readonly id: string
  readonly poolId: string
  /** Whose resources read this replica. */
  readonly readers: Readers
  /** Null: it is the only one. */
  readonly replicas: SeveralReplicas | null
}

/** Requests that a healthy backend has under way end within this time. */
const barrierMsDefault = 10_000
/** What there is of a layer that does not lie in one pool alone. */
interface SeveralReplicas {
  /** Pools of the complete ones. */
  readonly complete: readonly string[]
  /** Null: in a pool of a lost catalog that is not here. */
  readonly primary: string | null
  /** A job writes into one of them: all are left alone. */
  readonly isBeingFilled: boolean
}

interface CondemnedReplica extends Pick<SealedLayer, 'alias' | 'poolId'> {
  /** The pool of the replica that is the primary instead; null: this was none. */
  readonly heir: string | null
}

const nobody: Need = { reaches: [] }
const everybody: Readers = { butNot: new Set() }

/** Replicas condemned with one commit. */
const replicasAtOnce = 64
/** Layers that are punched at the same time. */
const layersAtOnce = 8
/** Page ids looked at in one turn of the event loop. */
const sweepBatch = 2048

export class Reclaimer {
  readonly #context: MapperContext
  readonly #oneAtATime = new Mutex()
  /**
   * By layer and pool: slots that were needed when a replica was punched last. They only ever get fewer, so the same number is the
   * same set; where a job has filled something in, the layer is forgotten here (`Layers.takeChanged`).
   */
  readonly #punched = new Map<number, Map<string, number>>()

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
    let marks: Marks | null = null
    /** What the roots name; while one cannot be read, it may be anything. */
    let mayName = (_alias: number): boolean => true
    let hungPools = new Set<string>()
    const barrier = async (): Promise<void> => {
      hungPools = await this.#waitForReads(poolIds, options.barrierMs ?? barrierMsDefault)
    }
    const pin = context.pins.pin()
    try {
      const boundary = context.pageIds.boundary()
      for (const alias of context.layers.takeChanged()) this.#punched.delete(alias)
      const several = await this.#severalReplicas()
      const sealed = await this.#sealedLayers(poolIds, several)
      marks = await Marks.read(context, several.size > 0, checkCancelled)
      const named = await marks.named(null)
      mayName = (alias) => named.has(alias)
      const needs = await marks.needs(sealed)
      await this.#condemn(sealed, needs, marks)
      const exported = new Set<string>()
      for (const id of poolIds) if (await context.exporter.flushedForPunch(id)) exported.add(id)
      await barrier()
      for (const id of hungPools) exported.delete(id)
      // What one replica lacks the others have: their exports say so before it goes.
      const current = new Set<string>()
      for (const id of new Set([...several.values()].flatMap(({ complete }) => complete)))
        if (await context.exporter.flushed([id])) current.add(id)
      const mayPunch = ({ poolId, replicas }: SealedLayer): boolean =>
        exported.has(poolId) && (replicas?.complete.every((id) => current.has(id)) ?? true)
      for (let doneLayers = 0; doneLayers < sealed.length;) {
        checkCancelled()
        const part = sealed.slice(doneLayers, doneLayers + layersAtOnce)
        const freed = await Promise.all(
          part.map(async (layer, index) => (mayPunch(layer) ? await this.#punch(layer, needs[doneLayers + index] ?? nobody) : 0)),
        )
        freedBytes += freed.reduce((sum, bytes) => sum + bytes, 0)
        doneLayers += part.length
        options.onProgress?.({ doneLayers, totalLayers: sealed.length, freedBytes })
      }
      sweptPages = await this.#sweep(pin, marks, boundary, checkCancelled)
    } catch (error) {
      if (isAtollError(error, 'JOB_CANCELLED')) throw error
      // A map that cannot be read protects everything that is sealed or condemned.
      failure = error
      await barrier()
    } finally {
      pin.release()
      marks?.clear()
    }

    let removedLayers = 0
    for (const id of poolIds) {
      checkCancelled()
      if (hungPools.has(id)) continue
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
    if (hungPools.size === 0) await pruneLinks(context, checkCancelled)
    return { freedBytes, removedLayers, sweptPages }
  }

  /** The barrier. Returns which of these pools requests may still read from. */
  async #waitForReads(poolIds: readonly string[], waitMs: number): Promise<Set<string>> {
    const { catalog, log, open } = this.#context
    const hung = await passBarrier(this.#context, waitMs)
    if (hung.size === 0) return new Set()
    const links = await readLinks(catalog.db)
    const readPools = new Set<string>()
    for (const id of hung) {
      const entry = open.get(id)
      // What is read while it is not in the table may be anywhere.
      const pools =
        entry === undefined
          ? poolIds
          : [entry.poolId, ...sourcesOf(links, entry.poolId).map((pool) => pool.id), ...entry.formerPools]
      for (const poolId of pools) readPools.add(poolId)
    }
    const held = readPools.intersection(new Set(poolIds))
    log.warn(
      { resourceIds: [...hung], poolIds: [...held] },
      'requests that do not end may read from these pools: a reclaim frees nothing in them; it does when their backend answers',
    )
    return held
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

  /** Replicas that may be punched, and may be condemned, in these pools. */
  async #sealedLayers(poolIds: readonly string[], several: ReadonlyMap<number, SeveralReplicas>): Promise<SealedLayer[]> {
    const layers: SealedLayer[] = []
    const links = await readLinks(this.#context.catalog.db)
    for (const poolId of poolIds) {
      if (!isWhollyRead(links, poolId)) continue
      const sealed = this.#context.catalog.db
        .selectFrom('replicas')
        .innerJoin('layers', 'layers.alias', 'replicas.layer_alias')
        .select(['layers.alias', 'layers.id', 'replicas.pool_id as poolId'])
        .where('replicas.pool_id', '=', poolId)
        .where('replicas.state', '=', 'complete')
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
      for (const layer of ofPool) {
        const replicas = several.get(layer.alias)
        if (written.has(layer.alias) || replicas?.isBeingFilled === true) continue
        const readers = replicas === undefined ? everybody : readersOfReplica(replicas, poolId)
        layers.push({ ...layer, readers, replicas: replicas ?? null })
      }
    }
    return layers
  }

  /** Layers that do not lie in one pool alone, or will not, with what there is of each. */
  async #severalReplicas(): Promise<Map<number, SeveralReplicas>> {
    const { catalog, layers } = this.#context
    const counted = await catalog.db
      .selectFrom('replicas')
      .select('layer_alias')
      .groupBy('layer_alias')
      .having((query) => query.or([query(query.fn.countAll(), '>', 1), query(query.fn.count('filling_job'), '>', 0)]))
      .execute()
    const found = await layers.replicasOf(counted.map((row) => row.layer_alias))
    return new Map([...found].map(([alias, rows]) => [alias, severalOf(rows)]))
  }

  /**
   * Condemns, durably, what nobody needs: layers, and single replicas of layers that lie in other pools as well. Where that was the
   * primary, one that is needed takes its place in the same commit.
   */
  async #condemn(layers: readonly SealedLayer[], needs: readonly Need[], marks: Marks): Promise<void> {
    const { catalog, pools } = this.#context
    const unneeded = layers.filter((_, index) => needs[index]?.reaches.length === 0)
    const whole = unneeded.filter((layer) => layer.replicas === null).map((layer) => layer.alias)
    const condemned: CondemnedReplica[] = []
    const links = await readLinks(catalog.db)
    const needed = await neededPools(unneeded, marks)
    for (const { alias, poolId, replicas } of unneeded) {
      if (replicas === null) continue
      const { complete, primary } = replicas
      const heirs = needed.get(alias) ?? []
      if (heirs.length === 0) {
        // Neither by anybody who is not here; then the layer is what that one reads.
        if (primary !== null && complete.every((other) => isWhollyRead(links, other))) whole.push(alias)
        continue
      }
      const heir = poolId === primary ? heirs.find((other) => pools.find(other) !== undefined) : null
      if (heir !== undefined) condemned.push({ alias, poolId, heir })
    }
    for (let start = 0; start < whole.length; start += pageBatch) {
      const aliases = whole.slice(start, start + pageBatch)
      await catalog.write(
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
    for (let start = 0; start < condemned.length; start += replicasAtOnce)
      await this.#condemnReplicas(condemned.slice(start, start + replicasAtOnce))
    // Without a layer to condemn nothing was committed yet that syncs what freed the ranges about to be punched.
    if (whole.length + condemned.length === 0) await this.#syncCatalog()
  }

  async #condemnReplicas(replicas: readonly CondemnedReplica[]): Promise<void> {
    const { catalog, layers } = this.#context
    await catalog.write(
      async (tx) => {
        for (const { alias, poolId, heir } of replicas) {
          const complete = tx
            .updateTable('replicas')
            .where('layer_alias', '=', alias)
            .where('state', '=', 'complete')
            .where('filling_job', 'is', null)
          await complete.set({ state: 'condemned', is_primary: false }).where('pool_id', '=', poolId).execute()
          if (heir === null) continue
          const { numUpdatedRows } = await complete.set({ is_primary: true }).where('pool_id', '=', heir).executeTakeFirst()
          assert(numUpdatedRows === 1n, `layer ${alias} has no complete replica in ${heir}`)
        }
      },
      { emergency: true },
    )
    layers.invalidate(replicas.map((replica) => replica.alias))
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

  /** @param need what reads this replica, and so has to stay in it */
  async #punch(layer: SealedLayer, need: Need): Promise<number> {
    const { pools, log } = this.#context
    const slotCount = await slotCountOfNeed(need, layer.alias)
    const punched = this.#punched.get(layer.alias)
    if (slotCount === 0 || punched?.get(layer.poolId) === slotCount) return 0
    const pool = pools.find(layer.poolId)
    if (pool === undefined || pool.capabilities.punchUnitBytes === 0) return 0
    try {
      const runs = await runsOf(need, layer.alias)
      const freedBytes = await withReserve(pool, async () => await pool.punchExcept(layer.id, runs))
      if (punched === undefined) this.#punched.set(layer.alias, new Map([[layer.poolId, slotCount]]))
      else punched.set(layer.poolId, slotCount)
      return freedBytes
    } catch (error) {
      log.warn({ err: error, layerId: layer.id }, 'a layer could not be punched; the next reclaim tries again')
      return 0
    }
  }

  async #sweep(pin: PagePin, marks: Marks, boundary: number, checkCancelled: () => void): Promise<number> {
    const { catalog, pins } = this.#context
    // Somebody who read roots before ours may still fetch pages that ours do not reach.
    await pins.olderReleased(pin)
    let sweptPages = 0
    for (let from = 1; from < boundary;) {
      checkCancelled()
      const ids = await catalog.pages.listIds(from, boundary, sweepBatch)
      const last = ids.at(-1)
      if (last === undefined) break
      const reached = marks.hasPages(ids)
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

function severalOf(rows: readonly ReplicaRow[]): SeveralReplicas {
  const complete = rows.filter((row) => row.state === 'complete')
  const primary = complete.find((row) => row.is_primary)?.pool_id
  const isBeingFilled = rows.some((row) => row.state === 'filling' || (row.state === 'complete' && row.filling_job !== null))
  return { complete: complete.map((row) => row.pool_id), primary: primary ?? null, isBeingFilled }
}

/** Who reads the replica in a pool (layers.ts). */
function readersOfReplica({ complete, primary }: SeveralReplicas, poolId: string): Readers {
  return poolId === primary ? { butNot: new Set(complete.filter((other) => other !== primary)) } : { only: poolId }
}

/** Of layers with several replicas: the pools of those that somebody reads. */
async function neededPools(layers: readonly SealedLayer[], marks: Marks): Promise<Map<number, string[]>> {
  const several = new Map(layers.flatMap(({ alias, replicas }) => (replicas === null ? [] : [[alias, replicas] as const])))
  const asked = [...several].flatMap(([alias, replicas]) =>
    replicas.complete.map((poolId) => ({ alias, poolId, readers: readersOfReplica(replicas, poolId) })),
  )
  const needs = await marks.needs(asked)
  const found = new Map<number, string[]>()
  for (const [index, { alias, poolId }] of asked.entries())
    if ((needs[index]?.reaches.length ?? 0) > 0) found.set(alias, [...(found.get(alias) ?? []), poolId])
  return found
}

/** Whether everybody who may read from the pool is here: what volumes of a pool that was not imported yet read is reached by no root. */
function isWhollyRead(links: PoolLinks, poolId: string): boolean {
  return !readersOf(links, poolId).some((pool) => pool.isAbsent)
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
