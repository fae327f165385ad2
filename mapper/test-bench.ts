/**
 * What the tests of this folder stand on: a mapper over an engine, a catalog in memory and a pool whose store the test holds,
 * so that it can fail on purpose, be killed, and be opened again over what is left.
 */
import { randomUUID } from 'node:crypto'
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { adminProject, openCatalog, volumeSizeMaxBytes, type Catalog, type ResourceRow } from '@atoll/core'
import { Engine, mapBytesMax, type Device, type FaultRule, type Reach, type Store } from '@atoll/native'
import { type Driver, makeMemoryDriver } from '@atoll/southbound'
import type { MapperLog } from './context.ts'
import { type Mapper, type MapperOptions, openMapper } from './mapper.ts'
import type { SetTimer } from './timer.ts'

export const slot = 4096
export const leaf = 8192 * slot
/** For tests that pass an id which nothing has. */
export const nobody = '00000000-0000-4000-8000-00000000ffff'

/** A catalog whose writes a test can make fail. */
export interface FailingCatalog {
  readonly catalog: Catalog
  /** Called before every write of what is wrapped; a throw is what the write fails with. */
  beforeWrite: (options: { durable: boolean }) => void
}

export function failingCatalog(inner: Catalog): FailingCatalog {
  const failing: { catalog: Catalog; beforeWrite: FailingCatalog['beforeWrite'] } = {
    catalog: inner,
    beforeWrite: () => undefined,
  }
  failing.catalog = {
    id: inner.id,
    path: inner.path,
    formatVersion: inner.formatVersion,
    db: inner.db,
    pages: inner.pages,
    read: async (fn) => await inner.read(fn),
    write: async (fn, options) => {
      failing.beforeWrite({ durable: options?.durable ?? true })
      return await inner.write(fn, options)
    },
    onCommit: (listener) => inner.onCommit(listener),
    verify: async () => await inner.verify(),
    backup: async (path) => await inner.backup(path),
    serialize: async () => await inner.serialize(),
    releaseReserve: async () => await inner.releaseReserve(),
    restoreReserve: async () => await inner.restoreReserve(),
    close: async () => await inner.close(),
  }
  return failing
}

/** What was logged, for tests that look for it. */
export class LogLines implements MapperLog {
  readonly lines: { level: string; message: string; values: object }[] = []

  debug(values: object, message: string): void {
    this.lines.push({ level: 'debug', message, values })
  }
  info(values: object, message: string): void {
    this.lines.push({ level: 'info', message, values })
  }
  warn(values: object, message: string): void {
    this.lines.push({ level: 'warn', message, values })
  }
  error(values: object, message: string): void {
    this.lines.push({ level: 'error', message, values })
  }
}

/** Timers that fire when the test says so. */
export class ManualTimers {
  #timers: { callback: () => void }[] = []

  readonly set: SetTimer = (callback) => {
    const timer = { callback }
    this.#timers.push(timer)
    return () => {
      this.#timers = this.#timers.filter((other) => other !== timer)
    }
  }

  /** Fires every timer that is set now. */
  fire(): void {
    const due = this.#timers
    this.#timers = []
    for (const { callback } of due) callback()
  }
}

/**
 * Where the conf of a Ceph cluster is: the first pool of every bench that asks for nothing special lies there then, in a namespace of
 * its own, instead of in memory (tests/ceph/suites-over-ceph.test.ts).
 */
const cephConf = process.env['ATOLL_TEST_CEPH_CONF']
const cephWaitMs = 600_000

async function openFirstStore(base: Engine, { capacityBytes }: BenchOptions, folder: string | null): Promise<Store> {
  if (folder !== null) return await base.openFileStore({ path: folder, create: true, reserveBytes: 0 })
  if (cephConf === undefined || capacityBytes !== undefined) return openMemoryStore(base, capacityBytes)
  const place = { conf: cephConf, pool: 'atoll', user: 'admin', keyring: null, namespace: `bench-${randomUUID()}` }
  const timeouts = { requestTimeoutMs: cephWaitMs, connectTimeoutMs: cephWaitMs }
  return await base.openRadosStore({ ...place, ...timeouts, create: true })
}

function openMemoryStore(base: Engine, capacityBytes = 1 << 30): Store {
  return base.memoryStore({ capacityBytes })
}

export interface BenchOptions {
  /** Of a store in memory. */
  readonly capacityBytes?: number
  /** A store of files in a folder of its own, removed at the end. */
  readonly files?: boolean
  /** Default 1. More than one: `poolIds` has the others, each with a store of its own. */
  readonly pools?: number
}

type LifeOptions = Pick<MapperOptions, 'usageTableBytesMax'>

/** A store, and the same one failing as told. */
interface Place {
  readonly store: Store
  readonly faulty: Store
}

/** The stores of the pools; they belong to an engine that outlives the mappers over them. */
interface Backend extends Place {
  readonly folder: string | null
  /** By pool; the first one has `store`. */
  readonly places: Map<string, Place>
  readonly makePlace: () => Place
}

/**
 * What a start does in the background (spares, the base of the export) is over when a test gets its bench: otherwise the writes
 * and layers that a test counts or lets fail would be that work's as well.
 */
export class Bench {
  inner: Catalog
  readonly backend: Backend
  /** The first of `poolIds`. */
  readonly poolId: string
  readonly poolIds: readonly string[]
  readonly engines: Engine[]
  failing: FailingCatalog
  engine: Engine
  mapper: Mapper
  log: LogLines
  timers: ManualTimers
  readonly #ended: Mapper[] = []

  private constructor(inner: Catalog, backend: Backend, poolIds: readonly string[], life: Life, engines: Engine[]) {
    this.inner = inner
    this.backend = backend
    this.poolId = poolIds[0] ?? ''
    this.poolIds = poolIds
    this.engines = engines
    this.failing = life.failing
    this.engine = life.engine
    this.mapper = life.mapper
    this.log = life.log
    this.timers = life.timers
  }

  static async open(options: BenchOptions = {}): Promise<Bench> {
    const base = new Engine()
    const folder = options.files === true ? await mkdtemp(join(tmpdir(), 'atoll-mapper-')) : null
    const place = (store: Store): Place => ({ store, faulty: base.faultStore(store) })
    const first = place(await openFirstStore(base, options, folder))
    const makePlace = () => place(openMemoryStore(base, options.capacityBytes))
    const backend = { ...first, folder, places: new Map<string, Place>(), makePlace }
    const inner = await openCatalog(':memory:')
    const life = await live(inner, backend)
    const poolIds: string[] = []
    for (let number = 1; number <= (options.pools ?? 1); number += 1) {
      const name = number === 1 ? 'pool' : `pool-${number}`
      const pool = await life.mapper.pools.create({ projectId: adminProject.id, name, driver: 'memory', options: {} })
      poolIds.push(pool.id)
    }
    await life.mapper.idle()
    return new Bench(inner, backend, poolIds, life, [base, life.engine])
  }

  /** Of a pool: what lies in it, and the same failing as told. */
  place(poolId: string): Place {
    const place = this.backend.places.get(poolId)
    if (place === undefined) throw new Error(`pool ${poolId} was never opened`)
    return place
  }

  /** Every layer in any pool, with the store that it lies in. */
  async #listAll(): Promise<{ store: Store; entry: Awaited<ReturnType<Store['listLayers']>>[number] }[]> {
    const found = []
    for (const { store } of this.backend.places.values())
      for (const entry of await store.listLayers()) found.push({ store, entry })
    return found
  }

  get catalog(): Catalog {
    return this.failing.catalog
  }

  get store(): Store {
    return this.backend.store
  }

  /** kill -9: nothing is closed, everything that reached the store and the catalog is there; a new process opens it. */
  async kill(): Promise<void> {
    // The threads of a process die with it; here a file that is being made would appear in the next life.
    await this.mapper.idle()
    this.#ended.push(this.mapper)
    this.failing.beforeWrite = () => {
      throw new Error('this process is dead')
    }
    await this.#start()
  }

  /** A proper end and a new process. */
  async restart(options: LifeOptions = {}): Promise<void> {
    await this.mapper.close()
    await this.engine.close()
    await this.#start(options)
  }

  /** What `restart` does, or with `kill` what that does, with a catalog as it was when `earlier` was taken (`inner.serialize`). */
  async restoreCatalog(earlier: Uint8Array, { kill = false }: { kill?: boolean } = {}): Promise<void> {
    const lost = this.inner
    this.inner = await openCatalog(earlier)
    if (kill) await this.kill()
    else await this.restart()
    await lost.close()
  }

  async #start(options: LifeOptions = {}): Promise<void> {
    const life = await live(this.inner, this.backend, options)
    this.engines.push(life.engine)
    Object.assign(this, life)
    await this.mapper.idle()
  }

  async close(): Promise<void> {
    for (const { faulty } of this.backend.places.values()) faulty.setFaults({ seed: 1, rules: [] })
    await this.mapper.close()
    // A dead process does not flush: what its engine would write now is not looked at any more.
    await Promise.allSettled(this.engines.map(async (engine) => await engine.close()))
    await this.inner.close()
    if (this.backend.folder !== null) await rm(this.backend.folder, { recursive: true })
  }

  /** From now on the store fails like this. */
  fail(...rules: FaultRule[]): void {
    this.backend.faulty.setFaults({ seed: 1, rules })
  }

  async volume(name: string, sizeBytes: number, fromId?: string, poolId = this.poolId): Promise<ResourceRow> {
    const wanted = { projectId: adminProject.id, name, sizeBytes, poolId }
    return await this.mapper.createVolume(fromId === undefined ? wanted : { ...wanted, fromId })
  }

  /** Opens a volume for writing. */
  async attach(id: string): Promise<Device> {
    return (await this.mapper.open(id, { holder: 'test', readOnly: false })).device
  }

  async snapshot(volumeId: string, name = 'snap'): Promise<ResourceRow> {
    const { rows } = await this.mapper.snapshot([{ volumeId, name }])
    return rows[0] as ResourceRow
  }

  /** Reads a resource, opening it read-only if it is not open. */
  async read(id: string, offsetBytes: number, lengthBytes: number): Promise<Buffer> {
    const present = this.mapper.opened(id)
    if (present !== undefined) return Buffer.from(await present.device.read(offsetBytes, lengthBytes))
    const { device } = await this.mapper.open(id, { holder: 'test', readOnly: true })
    try {
      return Buffer.from(await device.read(offsetBytes, lengthBytes))
    } finally {
      await this.mapper.close(id)
    }
  }

  async layers(state: string): Promise<{ alias: number; id: string; volume_id: string | null }[]> {
    const rows = await this.inner.db.selectFrom('layers').selectAll().execute()
    return rows.filter((row) => row.state === state)
  }

  /**
   * Makes a secondary replica of a sealed layer, as a job does it: with what the resources of the pool refer to, and those named. A new
   * process then opens all of it.
   */
  async addReplica(alias: number, poolId: string, alsoFor: readonly string[] = []): Promise<void> {
    const rows = await this.inner.db.selectFrom('resources').selectAll().execute()
    const readers = rows.filter((row) => row.home_pool_id === poolId || alsoFor.includes(row.id))
    const layer = await this.inner.db.selectFrom('layers').selectAll().where('alias', '=', alias).executeTakeFirstOrThrow()
    const reach = await this.#reachOf(readers, () => mapBytesMax)
    const primary = (await this.inner.db.selectFrom('replicas').selectAll().where('layer_alias', '=', alias).execute()).find(
      (replica) => replica.is_primary,
    )
    // Those of the pool read the primary until now, and so do the others that are named, or a replica in their own home.
    for (const from of new Set([primary?.pool_id ?? '', ...readers.map((row) => row.home_pool_id)])) {
      const has = await this.inner.db
        .selectFrom('replicas')
        .select('state')
        .where('layer_alias', '=', alias)
        .where('pool_id', '=', from)
        .executeTakeFirst()
      if (has !== undefined) await this.#copyInto(alias, layer.id, poolId, await reach.runs(alias), from)
    }
    await this.inner.write(async (tx) => {
      await tx
        .insertInto('replicas')
        .values({
          layer_alias: alias,
          pool_id: poolId,
          project_id: adminProject.id,
          state: 'complete',
          is_primary: false,
          is_copy: true,
        })
        .execute()
    })
    await this.restart()
  }

  /** Copies what one pool has of the runs of a layer into another one, where its file is made if it is not there. */
  async #copyInto(alias: number, id: string, poolId: string, runs: Float64Array, fromPoolId: string): Promise<void> {
    const { store } = this.place(poolId)
    if (!(await store.layerExists(id))) await store.createLayer(id)
    const map = this.engine.uniformMap(alias)
    const spec = { sizeBytes: volumeSizeMaxBytes, epoch: 0, map, mapLsn: 0, next: null }
    const open = async (from: Store, active: number | null) =>
      (await this.engine.openDevice({ ...spec, volumeId: randomUUID(), layers: [{ alias, id, store: from }], active })).device
    const [source, target] = [await open(this.place(fromPoolId).store, null), await open(store, alias)]
    const isWanted = slotsOf(runs)
    // Of a fresh volume's first layer everything is referred to, whatever was written.
    for (const { data, offsetBytes, lengthBytes } of await this.place(fromPoolId).store.extents(id, 0, 8 * leaf)) {
      for (let at = offsetBytes; data && at < offsetBytes + lengthBytes; at += slot)
        if (isWanted(at / slot)) await target.write(at, await source.read(at, slot))
    }
    await target.flush()
    await source.close()
    await target.close()
  }

  /**
   * Fills into the replicas that a resource would read, if it came into a pool, what it refers to and they may lack; a new process then
   * opens all of it.
   */
  async cover(resourceId: string, poolId: string): Promise<void> {
    const row = await this.row(resourceId)
    const reach = await this.#reachOf([row], () => mapBytesMax)
    for (const alias of reach.layers()) {
      const replicas = await this.inner.db.selectFrom('replicas').selectAll().where('layer_alias', '=', alias).execute()
      if (replicas.length < 2) continue
      const own = replicas.find((replica) => replica.pool_id === poolId) ?? replicas.find((replica) => replica.is_primary)
      const from =
        replicas.find((replica) => replica.pool_id === row.home_pool_id) ?? replicas.find((replica) => replica.is_primary)
      const layer = await this.inner.db.selectFrom('layers').select('id').where('alias', '=', alias).executeTakeFirstOrThrow()
      if (own === undefined || from === undefined || own === from) continue
      await this.#copyInto(alias, layer.id, own.pool_id, await reach.runs(alias), from.pool_id)
    }
    await this.restart()
  }

  /** Makes the replica in a pool the primary of its layer, with what everybody refers to who reads the present one. */
  async promote(alias: number, poolId: string): Promise<void> {
    const replicas = await this.inner.db.selectFrom('replicas').selectAll().where('layer_alias', '=', alias).execute()
    const present = replicas.find((replica) => replica.is_primary)
    if (present === undefined || present.pool_id === poolId) return
    const others = replicas.map((replica) => replica.pool_id).filter((other) => other !== present.pool_id)
    const rows = await this.inner.db.selectFrom('resources').selectAll().execute()
    const readers = rows.filter((row) => !others.includes(row.home_pool_id))
    const reach = await this.#reachOf(readers, () => mapBytesMax)
    const layer = await this.inner.db.selectFrom('layers').select('id').where('alias', '=', alias).executeTakeFirstOrThrow()
    await this.#copyInto(alias, layer.id, poolId, await reach.runs(alias), present.pool_id)
    await this.inner.write(async (tx) => {
      const ofLayer = tx.updateTable('replicas').where('layer_alias', '=', alias)
      await ofLayer.set({ is_primary: false }).execute()
      await ofLayer.set({ is_primary: true }).where('pool_id', '=', poolId).execute()
    })
    await this.restart()
  }

  /** The pools in which a layer lies, by the state of the replica there; the primary is marked. */
  async replicas(alias: number): Promise<Record<string, string>> {
    const rows = await this.inner.db.selectFrom('replicas').selectAll().where('layer_alias', '=', alias).execute()
    return Object.fromEntries(rows.map((row) => [row.pool_id, row.is_primary ? `${row.state}, primary` : row.state]))
  }

  /** Bytes that a layer has allocated in a pool; -1: its file is not there. */
  async allocatedIn(alias: number, poolId: string): Promise<number> {
    const { id } = await this.inner.db.selectFrom('layers').select('id').where('alias', '=', alias).executeTakeFirstOrThrow()
    return (await this.place(poolId).store.allocatedBytes([id]))[0] ?? -1
  }

  /**
   * A replica that nobody reads, or that holds what none of those who read it refers to: a sentence, or null. What it lacks shows when
   * its readers read.
   */
  async findSurplus(): Promise<string | null> {
    const rows = await this.inner.db.selectFrom('resources').selectAll().execute()
    const layers = await this.inner.db.selectFrom('layers').selectAll().where('state', '=', 'sealed').execute()
    const replicas = await this.inner.db.selectFrom('replicas').selectAll().where('state', '=', 'complete').execute()
    const reaches = new Map<string, Reach>()
    for (const [poolId, ofPool] of Map.groupBy(rows, (row) => row.home_pool_id))
      reaches.set(poolId, await this.#reachOf(ofPool, () => mapBytesMax))
    for (const { alias, id } of layers) {
      const ofLayer = replicas.filter((replica) => replica.layer_alias === alias)
      const pools = ofLayer.map((replica) => replica.pool_id)
      for (const { pool_id: poolId, is_primary: isPrimary } of ofLayer) {
        const readers = [...reaches].filter(([home]) => home === poolId || (isPrimary && !pools.includes(home)))
        const runs = await Promise.all(readers.map(async ([, reach]) => await reach.runs(alias)))
        if (runs.every((each) => each.length === 0)) return `layer ${alias} has a replica in ${poolId} that nobody reads`
        const has = runs.map(slotsOf)
        const { store } = this.place(poolId)
        for (const extent of await store.extents(id, 0, 4 * leaf)) {
          if (!extent.data) continue
          for (let at = extent.offsetBytes / slot; at * slot < extent.offsetBytes + extent.lengthBytes; at += 1)
            if (!has.some((isRead) => isRead(at))) return `layer ${alias} holds slot ${at} in ${poolId} for nobody`
        }
      }
    }
    return null
  }

  async row(id: string): Promise<ResourceRow> {
    return await this.inner.db.selectFrom('resources').selectAll().where('id', '=', id).executeTakeFirstOrThrow()
  }

  async pageCount(): Promise<number> {
    return (await this.inner.pages.usage()).pageCount
  }

  /**
   * What is kept although no durable root refers to it: a sentence, or null. Open volumes are asked to be closed first. Every
   * allocated byte of every layer must lie in a slot that is reached, every page must be reached.
   */
  async findLeak(): Promise<string | null> {
    // What is read lies below the sizes; what is named, and so must exist, may lie beyond them.
    const reach = await this.#reach(({ size_bytes: sizeBytes }) => Math.ceil(sizeBytes / slot) * slot)
    const named = await this.#reach(() => mapBytesMax)
    // The rows after the files: spares may be made in the background, and have their rows first.
    const listing = await this.#listAll()
    const rows = new Map((await this.inner.db.selectFrom('layers').selectAll().execute()).map((row) => [row.id, row]))
    for (const { store, entry } of listing) {
      const row = rows.get(entry.id)
      if (row === undefined) return `layer file ${entry.id} has no row`
      if (row.state === 'condemned' || row.state === 'closing') return `layer ${row.alias} is left in ${row.state}`
      const [namedSlots] = await named.slotCounts(Uint32Array.of(row.alias))
      if (row.state === 'sealed' && namedSlots === 0) return `layer ${row.alias} is sealed and referred to by nothing`
      const runs = await reach.runs(row.alias)
      const extents = await store.extents(entry.id, 0, Math.max(slot, entry.lengthBytes))
      for (const extent of extents) {
        if (extent.data && !covered(runs, extent.offsetBytes, extent.lengthBytes)) {
          return `layer ${row.alias} (${row.state}) holds ${extent.lengthBytes} bytes at ${extent.offsetBytes} that are not referred to`
        }
      }
    }
    const ids = await this.inner.pages.listIds(0, Number.MAX_SAFE_INTEGER, 1_000_000)
    const reached = named.hasPages(ids)
    const garbage = ids.filter((_, index) => reached[index] === 0)
    return garbage.length === 0
      ? null
      : `${garbage.length} pages are referred to by nothing (${garbage.subarray(0, 5).join(', ')})`
  }

  /**
   * What each resource takes, counted slot by slot: of the allocated slots of sealed layers those that only it refers to, and
   * those that others do as well; and all of its active layer.
   */
  async countUsage(): Promise<Map<string, { usedBytes: number; sharedBytes: number }>> {
    const rows = await this.inner.db.selectFrom('resources').selectAll().execute()
    const volumes = await this.inner.db.selectFrom('volumes').selectAll().execute()
    const layers = await this.inner.db.selectFrom('layers').selectAll().execute()
    const reaches = new Map<string, Reach>()
    for (const row of rows) reaches.set(row.id, await this.#reachOf([row], () => mapBytesMax))
    const found = new Map(rows.map((row) => [row.id, { usedBytes: 0, sharedBytes: 0 }]))
    const listing = new Map((await this.#listAll()).map((found) => [found.entry.id, found]))
    for (const layer of layers) {
      const listed = listing.get(layer.id)
      if (listed === undefined) continue
      const { store, entry } = listed
      const volume = volumes.find((other) => other.active_alias === layer.alias)
      const ofVolume = found.get(volume?.id ?? '')
      if (ofVolume !== undefined) ofVolume.usedBytes += entry.allocatedBytes
      if (layer.state === 'active') continue
      const slots = new Map<string, (slot: number) => boolean>()
      for (const [id, reach] of reaches) slots.set(id, slotsOf(await reach.runs(layer.alias)))
      for (const extent of await store.extents(layer.id, 0, Math.max(slot, entry.lengthBytes))) {
        if (!extent.data) continue
        for (let at = extent.offsetBytes / slot; at * slot < extent.offsetBytes + extent.lengthBytes; at += 1) {
          const referring = rows.filter((row) => slots.get(row.id)?.(at) === true)
          for (const { id } of referring) {
            const usage = found.get(id)
            if (usage !== undefined) usage[referring.length === 1 ? 'usedBytes' : 'sharedBytes'] += slot
          }
        }
      }
    }
    return found
  }

  /** The pools, but `home`, of the layers that the map of a resource names. */
  async poolsNamedBy(id: string, home: string): Promise<string[]> {
    const reach = await this.#reachOf([await this.row(id)], () => mapBytesMax)
    const named = new Set(reach.layers())
    const replicas = await this.inner.db.selectFrom('replicas').selectAll().execute()
    const found = new Set(replicas.filter((row) => named.has(row.layer_alias)).map((row) => row.pool_id))
    return this.poolIds.filter((poolId) => poolId !== home && found.has(poolId))
  }

  async #reach(sizeOf: (row: ResourceRow) => number): Promise<Reach> {
    return await this.#reachOf(await this.inner.db.selectFrom('resources').selectAll().execute(), sizeOf)
  }

  async #reachOf(rows: readonly ResourceRow[], sizeOf: (row: ResourceRow) => number): Promise<Reach> {
    const reach = this.engine.reach()
    for (const row of rows) reach.addRoot({ word: row.root_word, crc: row.root_crc }, sizeOf(row))
    for (let ids = reach.pending(1000); ids.length > 0; ids = reach.pending(1000)) {
      const bodies = await this.inner.pages.get(ids)
      await reach.supply(ids, bodies as Uint8Array[])
    }
    return reach
  }
}

/** Whether a slot is in the runs (triples). */
function slotsOf(runs: Float64Array): (at: number) => boolean {
  return (at) => {
    for (let index = 0; index < runs.length; index += 3) {
      const start = runs[index] ?? 0
      if (start <= at && at < start + (runs[index + 1] ?? 0)) return true
    }
    return false
  }
}

interface Life {
  engine: Engine
  mapper: Mapper
  failing: FailingCatalog
  log: LogLines
  timers: ManualTimers
}

/** A process: an engine and a mapper of their own. The lock of the store is the test's business, so it is not taken. */
async function live(inner: Catalog, backend: Backend, options: LifeOptions = {}): Promise<Life> {
  const engine = new Engine()
  const failing = failingCatalog(inner)
  const log = new LogLines()
  const timers = new ManualTimers()
  const mapper = await openMapper({
    catalog: failing.catalog,
    engine,
    drivers: [unlocked(backend)],
    log,
    setTimer: timers.set,
    ...options,
  })
  return { engine, mapper, failing, log, timers }
}

/** The memory driver over these stores, opened again although a "dead" process never let go of their locks. */
function unlocked(backend: Backend): Driver {
  return makeMemoryDriver(({ poolId }) => {
    const { places } = backend
    const place = places.get(poolId) ?? (places.size === 0 ? backend : backend.makePlace())
    places.set(poolId, place)
    return lockless(place.faulty)
  })
}

/** The store as a process finds it whose predecessor died without letting go of its lock. */
export function lockless(store: Store): Store {
  return new Proxy(store, {
    get(target, key) {
      if (key === 'lock') return async () => ({ release: () => undefined })
      const value: unknown = Reflect.get(target, key, target)
      return typeof value === 'function' ? (value.bind(target) as unknown) : value
    },
  })
}

/** Whether the bytes lie in slots of the runs (triples, ascending). */
function covered(runs: Float64Array, offsetBytes: number, lengthBytes: number): boolean {
  let at = offsetBytes
  for (let index = 0; index < runs.length && at < offsetBytes + lengthBytes; index += 3) {
    const start = (runs[index] ?? 0) * slot
    const end = start + (runs[index + 1] ?? 0) * slot
    if (end <= at) continue
    if (start > at) return false
    at = end
  }
  return at >= offsetBytes + lengthBytes
}

/** A block of bytes that are all `value`. */
export function bytes(value: number, lengthBytes = slot): Buffer {
  return Buffer.alloc(lengthBytes, value)
}

/** Random numbers from a seed (mulberry32). */
export class Random {
  #state: number

  constructor(seed: number) {
    this.#state = seed >>> 0
  }

  /** 0 <= n < limit. */
  below(limit: number): number {
    this.#state = (this.#state + 0x6d2b79f5) >>> 0
    let mixed = this.#state
    mixed = Math.imul(mixed ^ (mixed >>> 15), mixed | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return Math.floor((((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32) * limit)
  }

  pick<T>(items: readonly T[]): T {
    const item = items[this.below(items.length)]
    if (item === undefined) throw new Error('nothing to pick from')
    return item
  }
}
