/**
 * What every southbound driver must do, as a test suite: `describeDriver(name, makeSubject)`. A new driver's test calls it
 * over its real backend.
 */
import { AtollError } from '@atoll/core'
import { type Device, Engine, type LayerRef, slotBytes, type Store } from '@atoll/native'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { Driver, PoolContext, PoolHandle } from './driver.ts'

/** A driver with a backend of its own for one test. */
export interface DriverSubject {
  driver: Driver
  /** Options of a pool that nobody uses yet. */
  options: Record<string, string>
  /** Options that the driver must refuse, each for another reason. */
  invalidOptions: Record<string, string>[]
  /** Removes what the test left on the backend, after every pool was closed. */
  cleanUp(): Promise<void>
}

const catalogId = 'ca000000-0000-4000-8000-000000000001'
const otherCatalogId = 'ca000000-0000-4000-8000-000000000002'
const poolId = 'b0000000-0000-4000-8000-000000000001'
const volumeId = 'd0000000-0000-4000-8000-000000000001'
const layerId = (index: number): string => `a0000000-0000-4000-8000-${String(index).padStart(12, '0')}`
const mebibyte = 2 ** 20

/** Runs the suite; `makeSubject` is called for each test. */
export function describeDriver(name: string, makeSubject: () => Promise<DriverSubject>): void {
  describe(`driver ${name}`, () => {
    let subject: DriverSubject
    let engine: Engine
    const pools: PoolHandle[] = []
    const devices: Device[] = []

    beforeEach(async () => {
      subject = await makeSubject()
      engine = new Engine()
    })

    afterEach(async () => {
      for (const device of devices.splice(0)) await device.close()
      for (const pool of pools.splice(0)) await pool.close()
      await engine.close()
      await subject.cleanUp()
    })

    async function open(changes: Partial<PoolContext> = {}): Promise<PoolHandle> {
      const pool = await subject.driver.open({
        engine,
        poolId,
        options: subject.driver.parseOptions(subject.options),
        catalogId,
        ownerText: `pid ${process.pid}`,
        now: () => 1_700_000_000_000,
        ...changes,
      })
      pools.push(pool)
      return pool
    }

    /** A volume of its own over the layer: how bytes get into it and out of it. */
    async function openDevice(pool: PoolHandle, id: string, { writable }: { writable: boolean }): Promise<Device> {
      const layer: LayerRef = { alias: 1, id, store: pool.store }
      const map = engine.uniformMap(layer.alias)
      const active = writable ? layer.alias : null
      const spec = { volumeId, sizeBytes: 64 * mebibyte, epoch: 1, map, mapLsn: 0, layers: [layer], active, next: null }
      const { device } = await engine.openDevice(spec)
      devices.push(device)
      return device
    }

    async function writeLayer(pool: PoolHandle, id: string, offsetBytes: number, data: Uint8Array): Promise<void> {
      const device = await openDevice(pool, id, { writable: true })
      await device.write(offsetBytes, data)
      await device.flush()
      await device.close()
    }

    async function readLayer(pool: PoolHandle, id: string, offsetBytes: number, lengthBytes: number): Promise<Uint8Array> {
      const device = await openDevice(pool, id, { writable: false })
      const bytes = await device.read(offsetBytes, lengthBytes)
      await device.close()
      return bytes
    }

    const seal = { volumeId, epoch: 1, finalLsn: 0, successor: null }
    const idsOf = async (pool: PoolHandle): Promise<string[]> => (await pool.listLayers()).map((layer) => layer.id).toSorted()

    test('options that are wrong are refused and named, before anything is opened', () => {
      expect(subject.invalidOptions.length).toBeGreaterThan(0)
      for (const options of [...subject.invalidOptions, { ...subject.options, 'no-such-option': 'x' }]) {
        expect(() => subject.driver.parseOptions(options)).toThrow(expect.objectContaining({ code: 'POOL_OPTION_INVALID' }))
      }
      const parsed = subject.driver.parseOptions(subject.options)
      expect(subject.driver.parseOptions(parsed)).toEqual(parsed)
    })

    test('a pool says whose it is and what it can do', async () => {
      const pool = await open()
      expect(pool).toMatchObject({ driver: subject.driver.name, poolId })
      const { copyUnitBytes, punchUnitBytes, ...rest } = pool.capabilities
      expect(copyUnitBytes).toBeGreaterThanOrEqual(slotBytes)
      expect(copyUnitBytes % slotBytes).toBe(0)
      expect(punchUnitBytes).toBeGreaterThanOrEqual(0)
      expect(['lock', 'blocklist', 'lease', 'none']).toContain(rest.fence)
      expect(rest.offloadDomain === null || rest.offloadDomain.length > 0).toBe(true)
      for (const flag of [rest.ackIsDurable, rest.sharedByNodes, rest.persistent]) expect(typeof flag).toBe('boolean')
    })

    test('a layer exists from its creation to its removal, and not twice', async () => {
      const pool = await open()
      expect(await idsOf(pool)).toEqual([])
      expect(await pool.layerExists(layerId(1))).toBe(false)
      await pool.createLayer(layerId(1))
      await pool.createLayer(layerId(2))
      expect(await idsOf(pool)).toEqual([layerId(1), layerId(2)])
      expect(await pool.layerExists(layerId(1))).toBe(true)
      await expect(pool.createLayer(layerId(1))).rejects.toMatchObject({ code: 'LAYER_EXISTS' })
      await pool.removeLayer(layerId(1))
      expect(await pool.layerExists(layerId(1))).toBe(false)
      expect(await idsOf(pool)).toEqual([layerId(2)])
    })

    test('removing a layer that is not there is no error', async () => {
      const pool = await open()
      await pool.removeLayer(layerId(9))
      expect(await idsOf(pool)).toEqual([])
    })

    test('layers can be made, looked at and removed at the same time', async () => {
      const pool = await open()
      const ids = Array.from({ length: 16 }, (_, index) => layerId(index))
      await Promise.all(ids.map((id) => pool.createLayer(id)))
      await Promise.all([pool.listLayers(), pool.usage(), ...ids.slice(8).map((id) => pool.removeLayer(id))])
      expect(await idsOf(pool)).toEqual(ids.slice(0, 8))
    })

    test('an id that is not a lower-case UUID is refused before the backend sees it', async () => {
      const pool = await open()
      for (const id of ['', '../../etc/passwd', layerId(1).toUpperCase(), `${layerId(1)}0`]) {
        const refused = { code: 'ID_INVALID' }
        await expect(pool.createLayer(id)).rejects.toMatchObject(refused)
        await expect(pool.removeLayer(id)).rejects.toMatchObject(refused)
        await expect(pool.layerExists(id)).rejects.toMatchObject(refused)
        await expect(pool.punchExcept(id, new Float64Array())).rejects.toMatchObject(refused)
        await expect(pool.sealLayer(id, seal)).rejects.toMatchObject(refused)
      }
    })

    test('layers and their bytes are there after the pool was closed and opened again', async () => {
      const first = await open()
      await first.createLayer(layerId(1))
      const data = new Uint8Array(slotBytes).fill(7)
      await writeLayer(first, layerId(1), 3 * slotBytes, data)
      await first.close()
      const second = await open({ create: false })
      expect(await idsOf(second)).toEqual([layerId(1)])
      const bytes = await readLayer(second, layerId(1), 2 * slotBytes, 3 * slotBytes)
      expect(Buffer.from(bytes)).toEqual(Buffer.concat([Buffer.alloc(slotBytes), data, Buffer.alloc(slotBytes)]))
    })

    test('a second opener is refused with the pid of the first, and gets the pool when that one has closed it', async () => {
      const first = await open({ ownerText: 'pid 4711 on somewhere' })
      await expect(open()).rejects.toMatchObject({ code: 'POOL_LOCKED', values: { owner: 'pid 4711 on somewhere' } })
      await first.createLayer(layerId(1))
      await first.close()
      expect(await idsOf(await open())).toEqual([layerId(1)])
    })

    test('a second opener of the same process shuts nobody out, and no other one does where that cannot be done', async () => {
      const first = await open({ ownerText: 'pid 4711 on somewhere' })
      await expect(open({ shutOutHolder: true })).rejects.toMatchObject({ code: 'POOL_LOCKED' })
      await first.createLayer(layerId(1))
    })

    test('who has the pool of another catalog is not shut out of it', async () => {
      const first = await open()
      await expect(open({ catalogId: otherCatalogId, shutOutHolder: true })).rejects.toMatchObject({
        code: 'POOL_OWNED_BY_OTHER',
      })
      await first.createLayer(layerId(1))
    })

    test('the pool of another catalog is refused and left as it is', async () => {
      const first = await open()
      await first.createLayer(layerId(1))
      await first.close()
      await expect(open({ catalogId: otherCatalogId })).rejects.toMatchObject({
        code: 'POOL_OWNED_BY_OTHER',
        values: { ownerCatalogId: catalogId, catalogId: otherCatalogId },
      })
      const again = await open()
      expect(await idsOf(again)).toEqual([layerId(1)])
      expect(await again.check()).toEqual([])
    })

    test('a pool is inspected by anybody without being changed, under its lock', async () => {
      const context = {
        engine,
        poolId,
        options: subject.driver.parseOptions(subject.options),
        catalogId: otherCatalogId,
        ownerText: 'pid 4712',
        now: () => 1_800_000_000_000,
      }
      const first = await open()
      await expect(subject.driver.inspect(context)).rejects.toMatchObject({ code: 'POOL_LOCKED' })
      await first.store.writeRecord('export.1', Uint8Array.of(7))
      await first.close()
      const inspection = await subject.driver.inspect(context)
      expect(inspection.owner).toMatchObject({ catalogId, epoch: 1 })
      expect(await inspection.store.listRecords('export.')).toEqual(['export.1'])
      await expect(open()).rejects.toMatchObject({ code: 'POOL_LOCKED' })
      await inspection.close()
      await inspection.close()
      const again = await subject.driver.inspect(context)
      expect(again.owner).toMatchObject({ catalogId, epoch: 1 })
      await again.close()
      await open()
    })

    test('a pool is taken over from the catalog that is named, and from no other', async () => {
      const first = await open()
      await first.createLayer(layerId(1))
      await first.close()
      await expect(open({ catalogId: otherCatalogId, takeOverFrom: otherCatalogId })).rejects.toMatchObject({
        code: 'POOL_OWNED_BY_OTHER',
      })
      const taken = await open({ catalogId: otherCatalogId, takeOverFrom: catalogId })
      expect(await idsOf(taken)).toEqual([layerId(1)])
      await taken.close()
      await expect(open()).rejects.toMatchObject({ code: 'POOL_OWNED_BY_OTHER', values: { ownerCatalogId: otherCatalogId } })
    })

    test('records are listed by the beginning of their names and removed', async () => {
      const { store } = await open()
      for (const name of ['export.b', 'export.a', 'other']) await store.writeRecord(name, Uint8Array.of(1))
      expect(await store.listRecords('export.')).toEqual(['export.a', 'export.b'])
      await store.removeRecord('export.a')
      await store.removeRecord('export.a')
      expect(await store.listRecords('')).toEqual(['export.b', 'other', 'owner'])
    })

    test('the epoch of the owner rises with each opening', async () => {
      const epochs: unknown[] = []
      for (let count = 0; count < 3; count += 1) {
        const pool = await open()
        const bytes = await pool.store.readRecord('owner')
        const record = JSON.parse(Buffer.from(bytes ?? []).toString('utf8')) as Record<string, unknown>
        expect(record).toMatchObject({ catalogId, since: '2023-11-14T22:13:20.000Z' })
        epochs.push(record.epoch)
        await pool.close()
      }
      expect(epochs).toEqual([1, 2, 3])
    })

    test('an owner record that cannot be read is an error, never an invitation', async () => {
      const pool = await open()
      await pool.store.writeRecord('owner', new TextEncoder().encode('{"catalogId":'))
      expect(await pool.check()).toMatchObject([{ severity: 'error', kind: 'owner-record-unreadable' }])
      await pool.close()
      await expect(open()).rejects.toMatchObject({ code: 'POOL_CORRUPT' })
    })

    test('usage counts what was written', async () => {
      const pool = await open()
      await pool.createLayer(layerId(1))
      const before = await pool.usage()
      await writeLayer(pool, layerId(1), 0, new Uint8Array(4 * mebibyte).fill(1))
      const after = await pool.usage()
      expect(after.totalBytes).toBeGreaterThanOrEqual(after.freeBytes)
      expect(after.storedBytes - before.storedBytes).toBeGreaterThanOrEqual(4 * mebibyte)
      expect(after.storedBytes - before.storedBytes).toBeLessThan(5 * mebibyte)
      const [layer] = await pool.listLayers()
      expect(layer?.lengthBytes).toBe(4 * mebibyte)
      expect(layer?.allocatedBytes).toBeGreaterThanOrEqual(4 * mebibyte)
    })

    test('sealing a layer again with the same values changes nothing', async () => {
      const pool = await open()
      await pool.createLayer(layerId(1))
      await writeLayer(pool, layerId(1), 0, new Uint8Array(slotBytes).fill(5))
      const values = { ...seal, successor: layerId(2) }
      await pool.sealLayer(layerId(1), values)
      await pool.sealLayer(layerId(1), values)
      expect(await readLayer(pool, layerId(1), 0, slotBytes)).toEqual(new Uint8Array(slotBytes).fill(5))
    })

    test('punching keeps the runs that are named and frees the rest', async () => {
      const pool = await open()
      if (pool.capabilities.punchUnitBytes === 0) return // What it says is tested on its own.
      await pool.createLayer(layerId(1))
      const slotCount = 1024
      await writeLayer(pool, layerId(1), 0, new Uint8Array(slotCount * slotBytes).fill(9))
      await pool.sealLayer(layerId(1), seal)
      const before = await pool.usage()
      const kept = [0, ...Array.from({ length: 50 }, (_, index) => 100 + index), slotCount - 1]
      const keepRuns = Float64Array.of(0, 1, 1, 100, 50, 1, slotCount - 1, 1, 1)
      const freedBytes = await pool.punchExcept(layerId(1), keepRuns)
      const after = await pool.usage()
      const bytes = await readLayer(pool, layerId(1), 0, slotCount * slotBytes)
      const slots = Array.from({ length: slotCount }, (_, slot) => bytes.subarray(slot * slotBytes, (slot + 1) * slotBytes))
      const filled = slots.flatMap((slot, index) => (slot.every((byte) => byte === 9) ? [index] : []))
      const empty = slots.flatMap((slot, index) => (slot.every((byte) => byte === 0) ? [index] : []))
      // Beside what is kept, a backend with a larger unit may leave the neighbours, each whole.
      expect(filled).toEqual(expect.arrayContaining(kept))
      expect(filled.length + empty.length).toBe(slotCount)
      expect(freedBytes).toBe(empty.length * slotBytes)
      expect(before.storedBytes - after.storedBytes).toBe(freedBytes)
      const unitSlots = Math.ceil(pool.capabilities.punchUnitBytes / slotBytes)
      expect(filled.length - kept.length).toBeLessThanOrEqual(4 * (unitSlots - 1))
      // Nothing is left to free.
      expect(await pool.punchExcept(layerId(1), keepRuns)).toBe(0)
    })

    test('a sealed layer gets into another store and back with every byte that is referred to, and no other', async () => {
      const pool = await open()
      const elsewhere = engine.memoryStore({ capacityBytes: 256 * mebibyte })
      const content = new Uint8Array(9 * mebibyte)
      for (const [index] of content.entries()) content[index] = (index % 251) + (index >> 12)
      content.fill(0, 2 * mebibyte, 3 * mebibyte)
      await pool.createLayer(layerId(1))
      await writeLayer(pool, layerId(1), mebibyte, content)
      // Parts of what was written, with a hole in front and behind, and all of the end.
      const runs = Float64Array.of(0, 300, 1, 300, 500, 1, 1000, 1, 1, 1500, 4000, 1)
      const move = async (source: Store, target: Store): Promise<void> => {
        const piece = { source: { id: layerId(1), store: source }, target: { id: layerId(1), store: target }, runs }
        const limits = { maxBytes: 3 * mebibyte, maxMilliseconds: 60_000, offload: true, throttle: 2 ** 30 }
        let slot: number | null = 0
        while (slot !== null) slot = (await engine.fillPiece({ ...piece, ...limits, fromSlot: slot })).nextSlot
      }
      const wanted = new Uint8Array(24 * mebibyte)
      for (let index = 0; index < runs.length; index += 3) {
        const [start, count] = [runs[index]!, runs[index + 1]!]
        const bytes = content.subarray(
          Math.max(start * slotBytes - mebibyte, 0),
          Math.max((start + count) * slotBytes - mebibyte, 0),
        )
        wanted.set(bytes, Math.max(start * slotBytes, mebibyte))
      }
      await elsewhere.createLayer(layerId(1))
      await move(pool.store, elsewhere)
      await pool.removeLayer(layerId(1))
      await pool.createLayer(layerId(1))
      await move(elsewhere, pool.store)
      expect(Buffer.compare(await readLayer(pool, layerId(1), 0, wanted.length), wanted)).toBe(0)
      await expect(
        engine.fillPiece({
          source: { id: layerId(2), store: elsewhere },
          target: { id: layerId(1), store: pool.store },
          runs,
          fromSlot: 0,
          maxBytes: mebibyte,
          maxMilliseconds: 1000,
          offload: true,
        }),
      ).rejects.toMatchObject({ code: 'LAYER_MISSING', values: { side: 'source' } })
    })

    test.each(['into', 'out of'])(
      'a volume goes %s the pool with a swap, and is found there when nobody noted that',
      async (way) => {
        const pool = await open()
        const elsewhere = engine.memoryStore({ capacityBytes: 64 * mebibyte })
        const [from, to] = way === 'into' ? [elsewhere, pool.store] : [pool.store, elsewhere]
        await from.createLayer(layerId(1))
        await to.createLayer(layerId(2))
        const layers = [
          { alias: 1, id: layerId(1), store: from },
          { alias: 2, id: layerId(2), store: to },
        ]
        const map = engine.uniformMap(0)
        const spec = { volumeId, sizeBytes: 64 * mebibyte, epoch: 1, map, mapLsn: 0, layers, active: 1, next: 2 }
        const { device } = await engine.openDevice(spec)
        devices.push(device)
        await device.write(0, new Uint8Array(slotBytes).fill(1))
        await device.write(8 * mebibyte, new Uint8Array(slotBytes).fill(2))
        await engine.swap([{ device, next: layers[1]! }], 60_000)
        // Into a slot of the layer that is left, whose other half has to come along.
        await device.write(100, new Uint8Array(100).fill(3))
        await device.flush()
        await device.close()

        const opened = await engine.openDevice(spec)
        devices.push(opened.device)
        expect(opened.report).toMatchObject({ promotedNext: true, framesReplayed: 2 })
        const expected = new Uint8Array(slotBytes).fill(1).fill(3, 100, 200)
        expect(await opened.device.read(0, slotBytes)).toEqual(expected)
        expect(await opened.device.read(8 * mebibyte, slotBytes)).toEqual(new Uint8Array(slotBytes).fill(2))
        const checkpoint = (await opened.device.checkpoint(1))!
        await opened.device.checkpointCommitted(checkpoint, true)
        await opened.device.swapCommitted(true)
        await opened.device.write(4 * slotBytes, new Uint8Array(slotBytes).fill(4))
        await opened.device.flush()
        expect(await opened.device.read(4 * slotBytes, slotBytes)).toEqual(new Uint8Array(slotBytes).fill(4))
      },
    )

    test('a pool that cannot punch says so', async () => {
      const pool = await open()
      if (pool.capabilities.punchUnitBytes > 0) return // What it does is tested below.
      await pool.createLayer(layerId(1))
      await expect(pool.punchExcept(layerId(1), new Float64Array())).rejects.toMatchObject({ code: 'POOL_UNSUPPORTED' })
    })

    test('punching with no run to keep empties the layer, which stays', async () => {
      const pool = await open()
      if (pool.capabilities.punchUnitBytes === 0) return // What it says is tested on its own.
      await pool.createLayer(layerId(1))
      await writeLayer(pool, layerId(1), mebibyte, new Uint8Array(mebibyte).fill(9))
      await pool.sealLayer(layerId(1), seal)
      expect(await pool.punchExcept(layerId(1), new Float64Array())).toBe(mebibyte)
      expect(await readLayer(pool, layerId(1), mebibyte, mebibyte)).toEqual(new Uint8Array(mebibyte))
      expect(await pool.layerExists(layerId(1))).toBe(true)
    })

    test('runs out of order, of range or cut short are refused and nothing is punched', async () => {
      const pool = await open()
      if (pool.capabilities.punchUnitBytes === 0) return // What it says is tested on its own.
      await pool.createLayer(layerId(1))
      const data = new Uint8Array(8 * slotBytes).fill(3)
      await writeLayer(pool, layerId(1), 0, data)
      await pool.sealLayer(layerId(1), seal)
      for (const runs of [
        [0, 1],
        [4, 2, 1, 0, 2, 1],
        [0, 2, 1, 1, 2, 1],
        [0, 0, 1],
        [-1, 2, 1],
        [0.5, 1, 1],
        [2 ** 37, 1, 1],
      ]) {
        const punched = pool.punchExcept(layerId(1), Float64Array.from(runs))
        await expect(punched).rejects.toMatchObject({ code: 'ARGUMENT_INVALID' })
      }
      expect(await readLayer(pool, layerId(1), 0, data.length)).toEqual(data)
    })

    test('a layer that is missing is named', async () => {
      const pool = await open()
      const calls: (() => Promise<unknown>)[] = [
        () => openDevice(pool, layerId(5), { writable: false }).then((device) => device.read(0, slotBytes)),
        () => pool.sealLayer(layerId(5), seal),
      ]
      if (pool.capabilities.punchUnitBytes > 0) calls.push(() => pool.punchExcept(layerId(5), new Float64Array()))
      for (const call of calls) {
        const error = await call().then(
          () => undefined,
          (reason: unknown) => reason,
        )
        expect(error).toBeInstanceOf(AtollError)
        expect(error).toMatchObject({ code: 'LAYER_MISSING' })
        expect((error as AtollError).message).toContain(layerId(5))
      }
    })

    test('the reserve can be given up and made whole again, also twice', async () => {
      const pool = await open()
      const reserveBytes = await pool.restoreReserve()
      expect(await pool.restoreReserve()).toBe(reserveBytes)
      await pool.releaseReserve()
      await pool.releaseReserve()
      expect(await pool.restoreReserve()).toBe(reserveBytes)
    })

    test('the reserve can be made larger and smaller, or the pool says that it keeps none', async () => {
      const pool = await open()
      expect((await pool.usage()).reserveBytes).toBe(await pool.restoreReserve())
      const keepsOne = (await pool.usage()).reserveBytes > 0
      for (const bytes of [3 * mebibyte, mebibyte, 2 * mebibyte]) {
        const code = await pool.setReserve(bytes).then(
          () => null,
          (error: AtollError) => error.code,
        )
        expect(code).toBe(keepsOne ? null : 'POOL_UNSUPPORTED')
        expect((await pool.usage()).reserveBytes).toBe(keepsOne ? bytes : 0)
      }
      const { freeBytes, reserveBytes } = await pool.usage()
      const wanted = expect.stringMatching(keepsOne ? /^NO_SPACE$/ : /^POOL_UNSUPPORTED$/) as string
      await expect(pool.setReserve(4 * freeBytes)).rejects.toMatchObject({ code: wanted })
      expect((await pool.usage()).reserveBytes).toBe(reserveBytes)
      await pool.setReserve(0)
      expect((await pool.usage()).reserveBytes).toBe(0)
      await pool.setReserve(null)
    })

    test('a sound pool has no findings', async () => {
      const pool = await open()
      await pool.createLayer(layerId(1))
      expect((await pool.check()).filter((finding) => finding.severity === 'error')).toEqual([])
    })

    test('a pool with layers cannot be destroyed, and goes on', async () => {
      const pool = await open()
      await pool.createLayer(layerId(1))
      await expect(pool.destroy()).rejects.toMatchObject({ code: 'POOL_NOT_EMPTY', values: { layerCount: 1 } })
      expect(await idsOf(pool)).toEqual([layerId(1)])
    })

    test('an empty pool can be destroyed, and then any catalog may take its place', async () => {
      const pool = await open()
      await pool.createLayer(layerId(1))
      await pool.removeLayer(layerId(1))
      await pool.destroy()
      await expect(pool.usage()).rejects.toMatchObject({ code: 'POOL_CLOSED' })
      const next = await open({ catalogId: otherCatalogId })
      expect(await idsOf(next)).toEqual([])
    })

    test('after close every call is refused, and closing again is harmless', async () => {
      const pool = await open()
      await Promise.all([pool.close(), pool.close()])
      const refused = { code: 'POOL_CLOSED', values: { poolId } }
      for (const call of [
        () => pool.createLayer(layerId(1)),
        () => pool.removeLayer(layerId(1)),
        () => pool.layerExists(layerId(1)),
        () => pool.listLayers(),
        () => pool.usage(),
        () => pool.sealLayer(layerId(1), seal),
        () => pool.releaseReserve(),
        () => pool.restoreReserve(),
        () => pool.setReserve(0),
        () => pool.check(),
        () => pool.destroy(),
      ]) {
        await expect(call()).rejects.toMatchObject(refused)
      }
    })

    test('close waits for the calls that are running', async () => {
      const pool = await open()
      const calls = Promise.all([1, 2, 3].map((index) => pool.createLayer(layerId(index))))
      await Promise.all([calls, pool.close()])
      expect(await idsOf(await open())).toEqual([layerId(1), layerId(2), layerId(3)])
    })
  })
}
