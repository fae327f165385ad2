import { execFileSync, spawnSync } from 'node:child_process'
import { once } from 'node:events'
import { readFileSync } from 'node:fs'
import { mkdir, mkdtemp, open, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { connect, type Socket } from 'node:net'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { connect as connectTls } from 'node:tls'
import { AtollError } from '@atoll/core'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import {
  checkNative,
  type Connection,
  type Device,
  type DeviceSpec,
  Engine,
  type FrozenMap,
  latencyBucketEndsSeconds,
  type LayerRef,
  type ServeNbdOptions,
  slotBytes,
  type Store,
} from './index.ts'

const volumeId = '0a0b0c0d-0000-4000-8000-000000000001'
const layerId = (alias: number): string => `00000000-0000-4000-8000-${alias.toString(16).padStart(12, '0')}`
const mebibyte = 1 << 20

const filled = (length: number, byte: number): Uint8Array => new Uint8Array(length).fill(byte)

let engine: Engine
let directory: string

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'atoll-native-'))
  engine = new Engine({ pageFile: join(directory, 'pages') })
})

afterEach(async () => {
  await engine.close()
  await rm(directory, { recursive: true })
})

async function makeLayers(store: Store, count: number): Promise<LayerRef[]> {
  const layers: LayerRef[] = []
  for (let alias = 1; alias <= count; alias++) {
    await store.createLayer(layerId(alias))
    layers.push({ alias, id: layerId(alias), store })
  }
  return layers
}

async function openVolume(layers: LayerRef[], change: Partial<DeviceSpec> = {}): Promise<Device> {
  const spec = { volumeId, sizeBytes: 64 * mebibyte, epoch: 1, map: engine.uniformMap(0), mapLsn: 0, layers, active: 1, next: 2 }
  return (await engine.openDevice({ ...spec, ...change })).device
}

const codeOf = (promise: Promise<unknown>): Promise<string> =>
  promise.then(
    () => 'no error',
    (error: unknown) => (error instanceof AtollError ? error.code : String(error)),
  )

describe('the engine', () => {
  it('was built for the formats of these sources', () => {
    expect(checkNative).not.toThrow()
  })

  it('refuses everything after it was closed, and closing twice is harmless', async () => {
    const store = engine.memoryStore({ capacityBytes: mebibyte })
    const device = await openVolume(await makeLayers(store, 2))
    expect(engine.stats()).toMatchObject({ openDevices: 1, connections: 0 })
    await engine.close()
    await engine.close()
    expect(await codeOf(device.read(0, 1))).toBe('ENGINE_CLOSED')
    expect(await codeOf(store.usage())).toBe('ENGINE_CLOSED')
  })

  it('refuses a page file that cannot be made, naming it', () => {
    const pageFile = join(directory, 'missing', 'pages')
    expect(() => new Engine({ pageFile })).toThrowError(expect.objectContaining({ code: 'PAGE_FILE_ERROR' }))
  })

  it('raises the bound of its map memory with the size of what is open', async () => {
    const layers = await makeLayers(engine.memoryStore({ capacityBytes: mebibyte }), 2)
    const device = await openVolume(layers, { sizeBytes: 4 * 2 ** 40 })
    expect(engine.stats().mapBoundBytes).toBe(512 * mebibyte)
    await device.close()
    expect(engine.stats()).toMatchObject({ mapBoundBytes: 128 * mebibyte, openDevices: 0 })
  })

  it('says why reads wait on threads', async () => {
    const without = new Engine({ ioUring: false })
    expect(without.stats().ringRefused).toBe('it is switched off')
    await without.close()
    expect(engine.stats().ringRefused ?? 'the kernel refuses io_uring: ').toMatch(/^the kernel refuses io_uring: /)
  })
})

describe('a store', () => {
  it.each(['memory', 'file'])('of the %s kind keeps layers and records', async (kind) => {
    const path = join(directory, 'pool')
    const store =
      kind === 'memory'
        ? engine.memoryStore({ capacityBytes: 64 * mebibyte })
        : await engine.openFileStore({ path, create: true, reserveBytes: 0 })
    expect(store.kind).toBe(kind)
    expect(store.capabilities()).toMatchObject({ copyUnitBytes: 4096, persistent: kind === 'file' })
    expect(await store.layerExists(layerId(1))).toBe(false)
    await store.createLayer(layerId(1))
    expect(await codeOf(store.createLayer(layerId(1)))).toBe('LAYER_EXISTS')
    expect(await store.layerExists(layerId(1))).toBe(true)
    expect((await store.listLayers()).map((entry) => entry.id)).toEqual([layerId(1)])
    await store.syncLayer(layerId(1))
    expect(await store.allocatedBytes([layerId(1), layerId(9)])).toEqual(Float64Array.of(0, -1))
    expect(await store.extents(layerId(1), 0, 8192)).toEqual([{ offsetBytes: 0, lengthBytes: 8192, data: false }])
    await store.removeLayer(layerId(1))
    expect(await store.listLayers()).toEqual([])

    expect(await store.readRecord('owner')).toBe(null)
    await store.writeRecord('owner', new TextEncoder().encode('me'))
    expect(new TextDecoder().decode((await store.readRecord('owner'))!)).toBe('me')
    await store.writeRecord('export.2', new Uint8Array(3))
    await store.writeRecord('export.1', new Uint8Array())
    expect(await store.listRecords('export.')).toEqual(['export.1', 'export.2'])
    await store.removeRecord('export.1')
    await store.removeRecord('export.1')
    expect(await store.listRecords('')).toEqual(['export.2', 'owner'])

    const lock = await store.lock('pid 1')
    expect(await codeOf(store.lock('pid 2'))).toBe('STORE_LOCKED')
    await Promise.all([lock.release(), lock.release()])
    await (await store.lock('pid 2')).release()

    await store.releaseReserve()
    expect(await store.restoreReserve()).toBe(0)
    expect(await store.setReserve(8192)).toBe(kind === 'file' ? 8192 : 0)
    expect((await store.usage()).reserveBytes).toBe(kind === 'file' ? 8192 : 0)
    expect((await store.usage()).totalBytes).toBeGreaterThan(0)
  })

  it('of a directory that is not there is an error unless it may be made', async () => {
    const path = join(directory, 'nothing')
    expect(await codeOf(engine.openFileStore({ path, create: false, reserveBytes: 0 }))).not.toBe('no error')
  })

  it('says no to what only another kind can do, and to ids that are none', async () => {
    const store = engine.memoryStore({ capacityBytes: mebibyte })
    expect(() => store.setFaults({ seed: 1, rules: [] })).toThrowError(expect.objectContaining({ code: 'ARGUMENT_INVALID' }))
    expect(() => engine.faultStore(store).sequence()).toThrowError(expect.objectContaining({ code: 'ARGUMENT_INVALID' }))
    expect(await codeOf(store.createLayer('../etc/passwd'))).toBe('ARGUMENT_INVALID')
  })

  it('around a store fails as it is told, and counts it', async () => {
    const store = engine.faultStore(engine.memoryStore({ capacityBytes: 64 * mebibyte }))
    const device = await openVolume(await makeLayers(store, 2))
    store.setFaults({ seed: 7, rules: [{ operation: 'write', errno: 28, applyCount: 1 }] })
    expect(await codeOf(device.write(0, filled(4096, 1)))).toBe('NO_SPACE')
    expect(store.injectedCount()).toBe(1)
    await device.write(0, filled(4096, 1))
    expect(device.isPoisoned()).toBe(false)
  })

  it('frees everything of a sealed layer but the runs that are kept', async () => {
    const store = engine.memoryStore({ capacityBytes: 64 * mebibyte })
    const device = await openVolume(await makeLayers(store, 2))
    await device.write(0, filled(64 * slotBytes, 9))
    await device.close()
    expect(await store.allocatedExcept(layerId(1), Float64Array.of(2, 3, 1, 10, 1, 1))).toBe(60 * slotBytes)
    const freed = await store.punchExcept(layerId(1), Float64Array.of(2, 3, 1, 10, 1, 1))
    expect(freed).toBe(60 * slotBytes)
    expect(await store.allocatedExcept(layerId(1), Float64Array.of(2, 3, 1, 10, 1, 1))).toBe(0)
    expect(await store.extents(layerId(1), 0, 16 * slotBytes)).toEqual([
      { offsetBytes: 0, lengthBytes: 2 * slotBytes, data: false },
      { offsetBytes: 2 * slotBytes, lengthBytes: 3 * slotBytes, data: true },
      { offsetBytes: 5 * slotBytes, lengthBytes: 5 * slotBytes, data: false },
      { offsetBytes: 10 * slotBytes, lengthBytes: slotBytes, data: true },
      { offsetBytes: 11 * slotBytes, lengthBytes: 5 * slotBytes, data: false },
    ])
    const wrong = await codeOf(store.punchExcept(layerId(1), Float64Array.of(5, 1, 1, 2, 1, 1)))
    expect(wrong).toBe('ARGUMENT_INVALID')
  })

  it('seals a layer of a closed volume once, and never below what its journal holds', async () => {
    const store = engine.memoryStore({ capacityBytes: 64 * mebibyte })
    const device = await openVolume(await makeLayers(store, 2))
    await device.write(0, filled(4096, 1))
    await device.flush()
    const lsn = device.stats().lsn
    expect(lsn).toBe(1)
    await device.close()
    expect(await codeOf(store.sealLayer(layerId(1), volumeId, 1, lsn - 1, null))).toBe('CATALOG_BEHIND')
    await store.sealLayer(layerId(1), volumeId, 1, lsn, layerId(2))
    await store.sealLayer(layerId(1), volumeId, 1, lsn, layerId(2))
  })
})

describe('a replica of a layer', () => {
  const openFiles = (name: string): Promise<Store> =>
    engine.openFileStore({ path: join(directory, name), create: true, reserveBytes: 0 })

  it('is filled in another store piece by piece, with what is referred to', async () => {
    const source = await openFiles('from')
    const layers = await makeLayers(source, 2)
    const device = await openVolume(layers)
    await device.write(0, filled(3 * mebibyte, 7))
    await device.write(20 * mebibyte, filled(mebibyte, 8))
    await device.flush()
    await device.close()
    const target = engine.memoryStore({ capacityBytes: 64 * mebibyte })
    await target.createLayer(layerId(1))
    const runs = Float64Array.of(1, 511, 1, 600, 100, 1, 4864, 1024, 1)
    const sum = { copiedBytes: 0, offloadedBytes: 0, zeroBytes: 0, verifiedBytes: 0 }
    let fromSlot: number | null = 0
    let callCount = 0
    while (fromSlot !== null) {
      const { nextSlot, ...report } = await engine.fillPiece({
        source: { id: layerId(1), store: source },
        target: { id: layerId(1), store: target },
        runs,
        fromSlot,
        maxBytes: mebibyte,
        maxMilliseconds: 60_000,
        offload: true,
      })
      for (const key of Object.keys(sum) as (keyof typeof sum)[]) sum[key] += report[key]
      fromSlot = nextSlot
      callCount++
    }
    const copiedBytes = (511 + 100 + 256) * slotBytes
    expect(sum).toEqual({ copiedBytes, offloadedBytes: 0, zeroBytes: 768 * slotBytes, verifiedBytes: copiedBytes })
    expect(callCount).toBeGreaterThan(2)
    expect(await target.allocatedBytes([layerId(1)])).toEqual(Float64Array.of(copiedBytes))
    const replica = await openVolume([{ alias: 1, id: layerId(1), store: target }], {
      active: null,
      next: null,
      map: engine.uniformMap(1),
    })
    expect(await replica.read(slotBytes, 511 * slotBytes)).toEqual(filled(511 * slotBytes, 7))
    expect(await replica.read(20 * mebibyte, mebibyte)).toEqual(filled(mebibyte, 8))
    expect(await replica.read(0, slotBytes)).toEqual(filled(slotBytes, 0))
  })

  it('that does not hold what was written to it is refused, naming the place', async () => {
    const source = await openFiles('from')
    const [layer] = await makeLayers(source, 1)
    const device = await openVolume([layer!], { next: null })
    await device.write(0, filled(mebibyte, 7))
    await device.close()
    const inner = await openFiles('to')
    await inner.createLayer(layerId(1))
    const target = engine.faultStore(inner)
    target.setFaults({ seed: 1, rules: [{ operation: 'lose-write' }] })
    const runs = Float64Array.of(16, 16, 1)
    const piece = { runs, fromSlot: 0, maxBytes: mebibyte, maxMilliseconds: 60_000, offload: false }
    const filling = engine.fillPiece({ ...piece, source: layer!, target: { id: layerId(1), store: target } })
    const values = { layerId: layerId(1), offsetBytes: 16 * slotBytes, side: 'target' }
    await expect(filling).rejects.toMatchObject({ code: 'VERIFY_FAILED', values })
    target.setFaults({ seed: 1, rules: [{ operation: 'write', errno: 28 }] })
    expect(await codeOf(engine.fillPiece({ ...piece, source: layer!, target: { id: layerId(1), store: target } }))).toBe(
      'NO_SPACE',
    )
    const missing = { id: layerId(2), store: inner }
    expect(await codeOf(engine.fillPiece({ ...piece, source: layer!, target: missing }))).toBe('LAYER_MISSING')
  })
})

describe('a device', () => {
  let store: Store
  let layers: LayerRef[]
  let device: Device

  beforeEach(async () => {
    store = engine.memoryStore({ capacityBytes: 256 * mebibyte, record: true })
    layers = await makeLayers(store, 3)
    device = await openVolume(layers)
  })

  it('reads back what was written, at any alignment, and zeros elsewhere', async () => {
    const data = filled(10_000, 7)
    const written = device.write(3333, data)
    data.fill(0)
    await written
    const read = await device.read(3332, 10_002)
    expect(read[0]).toBe(0)
    expect(read.subarray(1, 10_001)).toEqual(filled(10_000, 7))
    expect(read[10_001]).toBe(0)
    await device.discard(4096, 4096)
    await device.writeZeroes(10_000, 5, true)
    const after = await device.read(0, 20_480)
    expect([after[4095], after[4096], after[8191], after[8192], after[10_000], after[10_005]]).toEqual([7, 0, 0, 7, 0, 7])
    expect(device.stats()).toMatchObject({ writeOperations: expect.any(Number), poisoned: false, backendReadsRunning: 0 })
    const { backendRead, backendSync, flush } = device.latencies()
    expect(backendRead.counts.reduce((sum, count) => sum + count, 0)).toBe(device.stats().readOperations)
    expect(backendRead.sumSeconds).toBeGreaterThan(0)
    expect(backendRead.counts.length).toBeLessThanOrEqual(latencyBucketEndsSeconds().length)
    // No client asked for anything, and nothing was flushed.
    expect([backendSync.counts, flush.counts]).toEqual([[], []])
  })

  it('says what is allocated', async () => {
    await device.write(mebibyte, filled(mebibyte, 1))
    expect(await device.blockStatus(0, 3 * mebibyte, 10)).toEqual([
      { lengthBytes: mebibyte, hole: true, zero: true },
      { lengthBytes: mebibyte, hole: false, zero: false },
      { lengthBytes: mebibyte, hole: true, zero: true },
    ])
    expect(await device.blockStatus(0, 3 * mebibyte, 1)).toHaveLength(1)
  })

  it('refuses what lies outside and arguments that are none, with values', async () => {
    const error = await device.read(64 * mebibyte - 1, 2).catch((thrown: unknown) => thrown)
    expect(error).toBeInstanceOf(AtollError)
    expect(error).toMatchObject({
      code: 'OUT_OF_RANGE',
      values: { offsetBytes: 64 * mebibyte - 1, lengthBytes: 2, sizeBytes: 64 * mebibyte },
    })
    expect(await codeOf(device.read(-1, 2))).toBe('ARGUMENT_INVALID')
    expect(await codeOf(device.read(0.5, 2))).toBe('ARGUMENT_INVALID')
    expect(await codeOf(device.read(0, 65 * mebibyte))).toBe('ARGUMENT_INVALID')
    expect(await codeOf(device.read('0' as unknown as number, 2))).toBe('ARGUMENT_INVALID')
    expect(await codeOf(device.write(0, null as unknown as Uint8Array))).toBe('ARGUMENT_INVALID')
  })

  it('hands a checkpoint over in batches and loads its pages again', async () => {
    for (let leaf = 0; leaf < 2; leaf++) await device.write(leaf * 32 * mebibyte + 4096, filled(4096, leaf + 1))
    const checkpoint = (await device.checkpoint(100))!
    expect(checkpoint.lsn).toBe(1)
    expect(await codeOf(device.checkpoint(200))).toBe('CHECKPOINT_BUSY')
    const bodies = new Map<number, Uint8Array>()
    for (let index = 0; index < checkpoint.pageCount;) {
      const batch = checkpoint.pages(index, 1)
      expect(batch.bodies).toHaveLength(1)
      batch.ids.forEach((id, at) => bodies.set(id, batch.bodies[at]!))
      index += batch.ids.length
    }
    expect([...bodies.keys()]).toEqual(Array.from({ length: checkpoint.pageCount }, (_, index) => 100 + index))
    expect(checkpoint.pages(checkpoint.pageCount, 1).ids).toHaveLength(0)
    expect(checkpoint.replaced()).toHaveLength(0)
    expect(checkpoint.displaced()).toHaveLength(0)
    const root = checkpoint.root()
    const frozen = checkpoint.frozen()
    expect(frozen.root()).toBe(null)
    await device.checkpointCommitted(checkpoint, true)
    expect(() => checkpoint.root()).toThrowError(expect.objectContaining({ code: 'CHECKPOINT_ENDED' }))
    expect(frozen.root()).toEqual(root)
    expect(await device.checkpoint(200)).toBe(null)

    // Another engine has none of the pages in memory.
    const other = new Engine()
    try {
      const loader = other.mapLoader(root)
      for (let missing = loader.missing(1); missing.length > 0; missing = loader.missing(1)) {
        loader.supply(missing, [bodies.get(missing[0]!)!])
      }
      const loaded = loader.finish()
      expect(loaded.root()).toEqual(root)
      expect([...loaded.layers(64 * mebibyte)]).toEqual([1])
      expect(await loaded.ownerCounts(64 * mebibyte)).toEqual([{ owner: 1, slotCount: 2 }])
      expect([...(await loaded.diff(other.uniformMap(0), 64 * mebibyte))]).toEqual([1, 1, 1, 0, 8193, 1, 1, 0])
      expect(() => loader.finish()).toThrowError(expect.objectContaining({ code: 'ARGUMENT_INVALID' }))
    } finally {
      await other.close()
    }

    const third = new Engine()
    try {
      const bad = third.mapLoader(root)
      const ids = bad.missing(1)
      const torn = bodies.get(ids[0]!)!.slice(0, -1)
      expect(() => bad.supply(ids, [torn])).toThrowError(expect.objectContaining({ code: 'PAGE_CORRUPT' }))
      expect(() => bad.supply(ids, [])).toThrowError(expect.objectContaining({ code: 'ARGUMENT_INVALID' }))
      expect(() => bad.finish()).toThrowError(expect.objectContaining({ code: 'PAGE_MISSING' }))
    } finally {
      await third.close()
    }

    const check = engine.mapCheck({ pages: Float64Array.of(...bodies.keys()), layers: Uint32Array.of(1) })
    check.addRoot(root)
    for (let pending = check.pending(10); pending.length > 0; pending = check.pending(10)) {
      await check.supply(
        pending,
        [...pending].map((id) => (id === Math.min(...bodies.keys()) ? undefined : bodies.get(id))),
      )
    }
    expect(check.faults()).toEqual([
      {
        pageId: Math.min(...bodies.keys()),
        code: 'PAGE_MISSING',
        message: expect.stringContaining('not in the catalog') as string,
      },
    ])
    expect(check.faultCount()).toBe(1)
    expect(check.pageReferrers().length).toBeGreaterThan(0)
    expect(check.layerReferrers().length).toBeGreaterThan(0)
    expect([...check.layers()]).toEqual([1])
    expect([...(await check.slotEnds(Uint32Array.of(1, 2)))]).toEqual([8194, 0])
    expect((await check.runs(1)).length).toBeGreaterThan(0)
    expect([...check.hasPages(Float64Array.of(100, 99))]).toEqual([1, 0])
    expect(await layers[0]!.store.inspectJournal(layers[0]!.id, null, 9, 1)).toMatchObject({ segmentCount: 1, tornTailBytes: 0 })

    const reach = engine.reach()
    reach.addRoot(root, 64 * mebibyte)
    for (let pending = reach.pending(10); pending.length > 0; pending = reach.pending(10)) {
      await reach.supply(
        pending,
        [...pending].map((id) => bodies.get(id)!),
      )
    }
    expect([...reach.layers()]).toEqual([1])
    expect([...(await reach.runs(1))]).toEqual([1, 1, 1, 8193, 1, 1])
    expect([...(await reach.slotCounts(Uint32Array.of(1, 2)))]).toEqual([2, 0])
    expect([...reach.hasPages(Float64Array.of(100, 99))]).toEqual([1, 0])
  })

  it('keeps a change for the next checkpoint when one is aborted', async () => {
    await device.write(0, filled(4096, 1))
    const aborted = (await device.checkpoint(1))!
    device.checkpointAborted(aborted)
    expect(await codeOf(device.checkpointCommitted(aborted, true))).toBe('CHECKPOINT_ENDED')
    const checkpoint = (await device.checkpoint(50))!
    expect(checkpoint.pageCount).toBe(aborted.pageCount)
    await device.checkpointCommitted(checkpoint, true)
  })

  it('swaps to the next layer, keeps the frozen map as it was, and is replayed after a crash', async () => {
    await device.write(0, filled(8192, 1))
    const [swapped] = await engine.swap([{ device, next: layers[1]! }], 300_000)
    expect(swapped!.pauseMs).toBeGreaterThanOrEqual(0)
    await device.write(0, filled(4096, 2))
    await device.syncClosing()
    const set = await swapped!.frozen.prepare(engine.uniformMap(0), 1)
    expect(set.pageCount).toBeGreaterThan(0)
    expect(set.root().word >> 60n).toBe(2n)
    const checkpoint = (await device.checkpoint(1))!
    await device.checkpointCommitted(checkpoint, true)
    await device.swapCommitted(true)
    await device.addLayers([layers[2]!])
    await device.flush()

    const snapshot = (
      await engine.openDevice({
        volumeId: layerId(77),
        sizeBytes: 64 * mebibyte,
        epoch: 1,
        map: swapped!.frozen,
        mapLsn: 0,
        layers: [layers[0]!],
        active: null,
        next: null,
      })
    ).device
    expect(snapshot.readOnly()).toBe(true)
    expect(await snapshot.read(0, 8192)).toEqual(filled(8192, 1))
    expect(await codeOf(snapshot.write(0, filled(1, 1)))).toBe('READ_ONLY')

    const image = store.crashImage(store.sequence(), 5, { keepOf256: 0, tear: true, reorder: true })
    const reopened = await engine.openDevice({
      volumeId,
      sizeBytes: 64 * mebibyte,
      epoch: 2,
      map: checkpointMap(swapped!.frozen),
      mapLsn: checkpoint.lsn,
      layers: layers.map(({ alias, id }) => ({ alias, id, store: image })),
      active: 2,
      next: 3,
    })
    expect(reopened.report.framesReplayed).toBeGreaterThan(0)
    const content = await reopened.device.read(0, 8192)
    expect([content[0], content[4096]]).toEqual([2, 1])
  })

  it('refuses a second swap before the first is committed', async () => {
    await engine.swap([{ device, next: layers[1]! }], 300_000)
    expect(await codeOf(engine.swap([{ device, next: layers[2]! }], 300_000))).toBe('SWAP_UNCOMMITTED')
    expect(await codeOf(engine.swap([{ device, next: layers[2]! }], -1))).toBe('ARGUMENT_INVALID')
  })

  it('loses nothing that was flushed', async () => {
    await device.write(0, filled(4096, 1))
    await device.flush()
    await device.write(4096, filled(4096, 2))
    expect(store.boundaries(0).length).toBeGreaterThan(0)
    const image = store.crashImage(store.sequence(), 1, { keepOf256: 0, tear: false, reorder: false })
    expect(image.kind).toBe('memory')
    const specs = layers.map(({ alias, id }) => ({ alias, id, store: image }))
    const recovered = await openVolume(specs, { epoch: 2 })
    const content = await recovered.read(0, 8192)
    expect([content[0], content[4096]]).toEqual([1, 0])
    store.forgetBefore(store.sequence())
  })

  it('grows with zeros, and shrinks in two phases', async () => {
    await device.grow(128 * mebibyte)
    expect(device.sizeBytes()).toBe(128 * mebibyte)
    await device.write(100 * mebibyte, filled(4096, 3))
    await device.shrinkPrepare(64 * mebibyte)
    const checkpoint = await device.checkpoint(1)
    if (checkpoint !== null) await device.checkpointCommitted(checkpoint, true)
    await device.shrinkPunch()
    await device.grow(128 * mebibyte)
    expect(await device.read(100 * mebibyte, 4096)).toEqual(filled(4096, 0))
    expect(await device.punchOrphans()).toBeGreaterThanOrEqual(0)
    expect(await device.readBarrier(600_000)).toBe(true)
    expect(await engine.readBarrier(600_000)).toEqual([])
  })

  it('is limited while it runs, and closed it refuses', async () => {
    device.setThrottle({ operationsPerSecond: 1000, bytesPerSecond: 2 ** 30, burstBytes: 2 ** 20, burstOperations: 10 })
    expect(() => device.setThrottle({ bytesPerSecond: -1 })).toThrowError(expect.objectContaining({ code: 'ARGUMENT_INVALID' }))
    await device.close()
    await device.close()
    expect(await codeOf(device.read(0, 1))).toBe('DEVICE_CLOSED')
    expect(await codeOf(device.flush())).toBe('DEVICE_CLOSED')
  })

  it('tells of what it wants and of what happened to it', async () => {
    const faults = engine.faultStore(engine.memoryStore({ capacityBytes: 64 * mebibyte }))
    const events: string[] = []
    const { promise, resolve } = Promise.withResolvers<void>()
    const watched = await openVolume(await makeLayers(faults, 2), {
      limits: { journalBytesSoft: 1 },
      onEvent: ({ kind, message }) => {
        events.push(kind)
        if (kind !== 'poisoned') return
        expect(message).not.toBe('')
        resolve()
      },
    })
    await watched.write(0, filled(4096, 1))
    await watched.flush()
    faults.setFaults({ seed: 1, rules: [{ operation: 'sync' }] })
    await watched.write(8192, filled(4096, 1))
    expect(await codeOf(watched.flush())).toBe('DEVICE_POISONED')
    await promise
    expect(events).toEqual(['checkpoint-wanted', 'poisoned'])
    expect(watched.isPoisoned()).toBe(true)
  })

  it('may be a regular file, to be read only', async () => {
    const path = join(directory, 'foreign.qcow2')
    await writeFile(path, filled(10_001, 4))
    const file = await engine.openFileDevice({ path })
    expect([file.sizeBytes(), file.readOnly()]).toEqual([10_001, true])
    expect(await file.read(5000, 5001)).toEqual(filled(5001, 4))
    expect(await codeOf(file.write(0, filled(1, 1)))).toBe('READ_ONLY')
    await file.close()
    expect(await codeOf(engine.openFileDevice({ path: join(directory, 'none') }))).toBe('LAYER_MISSING')
    expect(await codeOf(engine.openFileDevice({ path: directory }))).toBe('IO_ERROR')
  })

  it('takes a sparse file in and gives it out sparse', async () => {
    const source = join(directory, 'source.raw')
    const handle = await open(source, 'w')
    await handle.write(filled(10_000, 5), 0, 10_000, 3 * mebibyte)
    await handle.truncate(16 * mebibyte)
    await handle.close()
    const report = await device.copyIn({ path: source, sourceOffsetBytes: 0, offsetBytes: 0, lengthBytes: 16 * mebibyte })
    expect(report.dataBytes).toBe(12_288)
    expect(report.dataBytes + report.zeroBytes).toBe(16 * mebibyte)
    const target = join(directory, 'target.raw')
    await writeFile(target, '')
    await device.copyOut({ path: target, offsetBytes: 0, lengthBytes: 16 * mebibyte })
    expect(Buffer.compare(await readFile(target), await readFile(source))).toBe(0)
    expect((await stat(target)).blocks * 512).toBeLessThan(mebibyte)
    const tooLong = { path: source, sourceOffsetBytes: 1, offsetBytes: 0, lengthBytes: 16 * mebibyte }
    expect(await codeOf(device.copyIn(tooLong))).toBe('SOURCE_CHANGED')
    expect(await codeOf(device.copyOut({ path: join(directory, 'none'), offsetBytes: 0, lengthBytes: 1 }))).toBe('FILE_ERROR')
  })
})

/** What the catalog would hold after the checkpoint in the test of swaps: the frozen map plus the write after it comes from the journal. */
function checkpointMap(frozen: FrozenMap): FrozenMap {
  return frozen.withRun(0, 1, 2)
}

describe('a table of what resources take', () => {
  it('counts what one root alone refers to, and says which page and which layer it needs', async () => {
    const engine = new Engine()
    try {
      const store = engine.memoryStore({ capacityBytes: mebibyte })
      await store.createLayer(layerId(1))
      const table = engine.usage()
      const uniform = (1n << 60n) | 1n
      const roots = (count: number, word: bigint) => ({
        keys: Float64Array.from({ length: count }, (_, index) => index + 1),
        lineages: new Float64Array(count).fill(1),
        words: new BigUint64Array(count).fill(word),
        crcs: new Uint32Array(count),
      })
      await table.setRoots(roots(2, uniform), new Uint32Array())
      expect((await table.pending(10)).length).toBe(0)
      await table.settle(new Float64Array(), [])
      expect([...(await table.unknownLayers())]).toEqual([1])
      expect((await table.scan(store, Uint32Array.of(1), [layerId(1)])).length).toBe(0)
      table.setEmpty(Uint32Array.of(2))
      expect((await table.unknownLayers()).length).toBe(0)
      expect(await table.taken(1)).toEqual({ usedBytes: 0, sharedBytes: 0 })
      expect(await table.memoryBytes()).toBeGreaterThan(0)
      // A page that is not there is an error of who needs it.
      await table.setRoots(roots(1, (2n << 60n) | 77n), new Uint32Array())
      expect([...(await table.pending(10))]).toEqual([77])
      await table.settle(Float64Array.of(77), [null])
      expect(await codeOf(table.taken(1))).toBe('PAGE_MISSING')
      expect([...(await table.totals(Float64Array.of(1, 9)))]).toEqual([-1, 0])
      expect(await codeOf(table.setRoots(roots(1, 5n << 60n), new Uint32Array()))).toBe('PAGE_CORRUPT')
    } finally {
      await engine.close()
    }
  })
})

describe('a connection', () => {
  async function accepted(): Promise<{ connection: Connection; socket: Socket; next: (length: number) => Promise<Buffer> }> {
    const path = join(directory, 'nbd.sock')
    const listener = await engine.listenUnix({ path, mode: 0o600 })
    expect(listener.address).toEqual({ path })
    const socket = connect(path)
    const connection = await listener.accept()
    const waiting = listener.accept()
    await listener.close()
    expect(await waiting).toBe(null)
    expect(await listener.accept()).toBe(null)
    return { connection: connection!, socket, next: (length) => readExactly(socket, length) }
  }

  it.skipIf(spawnSync('openssl', ['version']).status !== 0)('goes through TLS from the handshake on', async () => {
    const credentials = join(directory, 'tls')
    await mkdir(credentials)
    const [key, certificate] = [join(credentials, 'server-key.pem'), join(credentials, 'server-cert.pem')]
    const kind = ['-newkey', 'ec', '-pkeyopt', 'ec_paramgen_curve:prime256v1', '-nodes', '-subj', '/CN=localhost']
    execFileSync('openssl', ['req', '-x509', ...kind, '-keyout', key, '-out', certificate], { stdio: 'ignore' })
    const config = await engine.loadTls({ directory: credentials, verifyClients: false })
    expect(await codeOf(engine.loadTls({ directory: credentials, verifyClients: true }))).toBe('TLS_CREDENTIALS_INVALID')

    const { connection, socket } = await accepted()
    const started = connection.startTls(config, 300_000)
    const secure = connectTls({ socket, ca: readFileSync(certificate), servername: 'localhost' })
    const ended = once(secure.resume(), 'close')
    expect(await started).toEqual({
      protocol: 'TLSv1_3',
      cipherSuite: expect.stringMatching(/^TLS13_AES_/),
      certificate: undefined,
    })
    expect(await codeOf(connection.startTls(config, 300_000))).toBe('ARGUMENT_INVALID')
    await connection.close()
    await ended

    const second = await accepted()
    const failed = codeOf(second.connection.startTls(config, 50))
    expect(await failed).toBe('READ_TIMEOUT')
    expect(await second.connection.read(1)).toBeNull()
  })

  it('is driven byte by byte until it serves, and then answers by itself', async () => {
    const store = engine.memoryStore({ capacityBytes: 64 * mebibyte })
    const device = await openVolume(await makeLayers(store, 2))
    await device.write(0, filled(4096, 6))
    const { connection, socket, next } = await accepted()
    expect(connection.peer).toMatch(/^unix:pid=\d+,uid=\d+$/)
    socket.write('hello')
    expect(Buffer.from((await connection.read(5))!).toString()).toBe('hello')
    expect(await codeOf(connection.read(1, 10))).toBe('READ_TIMEOUT')
    expect(await codeOf(connection.read(65_537))).toBe('ARGUMENT_INVALID')
    await connection.write(new TextEncoder().encode('welcome'))
    expect((await next(7)).toString()).toBe('welcome')

    const served = connection.serveNbd(device, { replies: 'simple', contexts: [], readOnly: false })
    expect(engine.stats().connections).toBe(1)
    socket.write(nbdRequest(0, 42n, 0n, 16))
    const reply = await next(32)
    expect(reply.readUInt32BE(0)).toBe(0x67446698)
    expect(reply.readBigUInt64BE(8)).toBe(42n)
    expect(reply.subarray(16)).toEqual(Buffer.alloc(16, 6))
    socket.write(nbdRequest(2, 43n, 0n, 0))
    expect(await served).toEqual({ reason: 'disconnect', message: expect.any(String) })
    expect(await codeOf(connection.read(1))).toBe('CONNECTION_CLOSED')
    await connection.close()
    await connection.close()
    expect(engine.stats().connections).toBe(0)
    socket.destroy()
  })

  it('is drained, or closed under its client', async () => {
    const store = engine.memoryStore({ capacityBytes: 64 * mebibyte })
    const device = await openVolume(await makeLayers(store, 2))
    const options: ServeNbdOptions = {
      replies: 'structured',
      contexts: [{ id: 1, kind: 'allocation' }],
      readOnly: true,
    }
    const first = await accepted()
    const drained = first.connection.serveNbd(device, options)
    await first.connection.drain()
    expect((await drained).reason).toBe('closed')
    first.socket.destroy()
    const second = await accepted()
    const closed = second.connection.serveNbd(device, options)
    await second.connection.close()
    expect((await closed).reason).toBe('closed')
    second.socket.destroy()
  })

  it('sees the end of its peer, over TCP as well', async () => {
    const listener = await engine.listenTcp({ host: '127.0.0.1', port: 0 })
    expect(listener.address).toMatchObject({ host: '127.0.0.1', port: expect.any(Number) })
    const socket = connect(listener.address.port!, '127.0.0.1')
    const connection = (await listener.accept())!
    socket.end('ab')
    expect(await connection.read(3)).toBe(null)
    await connection.close()
    await listener.close()
    socket.destroy()
  })

  it('cannot be listened for where somebody listens already', async () => {
    const path = join(directory, 'taken.sock')
    const listener = await engine.listenUnix({ path, mode: 0o600 })
    expect(await codeOf(engine.listenUnix({ path, mode: 0o600 }))).toBe('ADDRESS_IN_USE')
    expect((await stat(path)).mode & 0o777).toBe(0o600)
    await listener.close()
    expect(await codeOf(stat(path).catch(() => Promise.reject(new AtollError('INTERNAL', 'gone'))))).toBe('INTERNAL')
  })
})

function nbdRequest(command: number, cookie: bigint, offset: bigint, length: number): Buffer {
  const request = Buffer.alloc(28)
  request.writeUInt32BE(0x25609513, 0)
  request.writeUInt16BE(command, 6)
  request.writeBigUInt64BE(cookie, 8)
  request.writeBigUInt64BE(offset, 16)
  request.writeUInt32BE(length, 24)
  return request
}

async function readExactly(socket: Socket, length: number): Promise<Buffer> {
  for (;;) {
    const bytes = socket.read(length) as Buffer | null
    if (bytes !== null) return bytes
    await new Promise((resolve, reject) => {
      socket.once('readable', resolve)
      socket.once('error', reject)
    })
  }
}
