import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { adminProject, openCatalog, type Catalog } from '@atoll/core'
import { Engine, type Store } from '@atoll/native'
import { fileDriver, makeMemoryDriver } from '@atoll/southbound'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { type Mapper, openMapper } from './mapper.ts'
import type { PoolImportReport } from './pool-import.ts'
import { Bench, bytes, failingCatalog, lockless, LogLines, slot } from './test-bench.ts'

/** A fresh home: another catalog, another engine, the same store. */
interface Fresh {
  readonly catalog: Catalog
  readonly mapper: Mapper
  readonly log: LogLines
  close(): Promise<void>
}

async function freshHome(store: Store, wrap: (catalog: Catalog) => Catalog = (catalog) => catalog): Promise<Fresh> {
  const engine = new Engine()
  const catalog = await openCatalog(':memory:')
  const log = new LogLines()
  const drivers = [makeMemoryDriver(() => lockless(store))]
  const mapper = await openMapper({ catalog: wrap(catalog), engine, drivers, log, setTimer: () => () => undefined })
  return {
    catalog,
    mapper,
    log,
    async close() {
      await mapper.close()
      await engine.close()
      await catalog.close()
    },
  }
}

async function read(mapper: Mapper, id: string, offsetBytes: number, lengthBytes: number): Promise<Buffer> {
  const { device } = await mapper.open(id, { holder: 'test', readOnly: true })
  try {
    return Buffer.from(await device.read(offsetBytes, lengthBytes))
  } finally {
    await mapper.close(id)
  }
}

const wanted = { name: 'pool', driver: 'memory', options: {}, takeOver: true, dryRun: false }

describe('importing a pool whose catalog is lost', () => {
  let bench: Bench
  let fresh: Fresh | undefined

  beforeEach(async () => {
    bench = await Bench.open()
  })

  afterEach(async () => {
    await fresh?.close()
    fresh = undefined
    await bench.close()
  })

  test('brings back volumes, snapshots, clones and images as they were flushed last', async () => {
    const volume = await bench.volume('disk', 64 * slot)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 8 * slot))
    const snap = await bench.snapshot(volume.id)
    await device.write(slot, bytes(2, slot))
    await device.flush()
    const second = await bench.snapshot(volume.id, 'second')
    await device.write(2 * slot, bytes(3, slot))
    await device.flush()
    const clone = await bench.volume('clone', 64 * slot, snap.id)
    const cloned = await bench.attach(clone.id)
    await cloned.write(5 * slot, bytes(4, slot))
    await cloned.flush()
    const image = await bench.mapper.createImage({ projectId: adminProject.id, name: 'image', fromId: second.id })
    // The dead make no more spares.
    await bench.mapper.idle()
    fresh = await freshHome(bench.store)
    const report = await fresh.mapper.importPool(wanted)
    expect(report).toMatchObject({
      poolId: bench.poolId,
      catalogId: bench.inner.id,
      broughtBack: { volume: 2, snapshot: 2, image: 1, file: 0 },
      failed: [],
      damages: [],
      uncertain: [],
      unknownLayers: [],
    })
    const { mapper } = fresh
    expect(await read(mapper, volume.id, 0, 4 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2), bytes(3), bytes(1)]))
    expect(await read(mapper, snap.id, 0, 4 * slot)).toEqual(bytes(1, 4 * slot))
    expect(await read(mapper, second.id, 0, 4 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2), bytes(1, 2 * slot)]))
    expect(await read(mapper, image.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2)]))
    expect(await read(mapper, clone.id, 4 * slot, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(4)]))
    // It goes on as any pool does.
    const again = await mapper.open(volume.id, { holder: 'test', readOnly: false })
    await again.device.write(3 * slot, bytes(9))
    await again.device.flush()
    await mapper.snapshot([{ volumeId: volume.id, name: 'third' }])
    await mapper.close(volume.id)
    expect(await read(mapper, volume.id, 3 * slot, slot)).toEqual(bytes(9))
    await mapper.reclaim(null)
    expect(await read(mapper, snap.id, 0, 4 * slot)).toEqual(bytes(1, 4 * slot))
  })

  /** A record of the export is overwritten with rubbish, or (null) gone. */
  const damage = async (name: string, bytesOf: string | null): Promise<void> => {
    if (bytesOf === null) await bench.store.removeRecord(name)
    else await bench.store.writeRecord(name, new TextEncoder().encode(bytesOf))
  }

  const deltas = async (): Promise<string[]> => await bench.store.listRecords('export.delta.')

  test.each(['rubbish', null])('names a record that is damaged (%s) and what may be out of date for that', async (bytesOf) => {
    const early = await bench.volume('early', 16 * slot)
    const doomed = await bench.volume('doomed', 16 * slot)
    const before = await deltas()
    await bench.mapper.deleteResource(doomed.id)
    const [lost = ''] = (await deltas()).slice(before.length)
    const late = await bench.volume('late', 16 * slot)
    await damage(lost, bytesOf)
    fresh = await freshHome(bench.store)
    const report = await fresh.mapper.importPool(wanted)
    // One that is gone is noticed by the one that follows on it.
    const [named = ''] = report.damages.map(({ record }) => record)
    expect(bytesOf === null ? named > lost : named === lost).toBe(true)
    expect(report.uncertain.map(({ name }) => name).toSorted()).toEqual(['doomed', 'early'])
    const { db } = fresh.catalog
    const names = (await db.selectFrom('resources').select('id').execute()).map(({ id }) => id)
    expect(names).toEqual(expect.arrayContaining([early.id, late.id]))
  })

  test('brings snapshots back as images where their volume cannot be', async () => {
    const volume = await bench.volume('disk', 64 * slot)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    const first = await bench.snapshot(volume.id, 'first')
    await device.write(slot, bytes(2))
    // The layer of the second one is not sealed when the catalog is lost.
    await device.flush()
    await bench.mapper.checkpoint(volume.id)
    bench.fail({ operation: 'append', errno: 5 })
    const second = await bench.snapshot(volume.id, 'second')
    expect(await bench.layers('closing')).toHaveLength(1)
    bench.fail()
    await bench.inner.write(async (tx) => await tx.deleteFrom('volumes').where('id', '=', volume.id).execute())
    await bench.mapper.flushExports([bench.poolId])
    fresh = await freshHome(bench.store)
    const report = await fresh.mapper.importPool(wanted)
    expect(report).toMatchObject({
      broughtBack: { volume: 0, snapshot: 0, image: 2, file: 0 },
      failed: [{ kind: 'volume', id: volume.id, code: 'EXPORT_CORRUPT' }],
      asImages: [
        { id: first.id, name: 'disk-first', snapshotName: 'first', volumeId: volume.id },
        { id: second.id, name: 'disk-second', snapshotName: 'second', volumeId: volume.id },
      ],
    })
    const { mapper } = fresh
    expect(await read(mapper, first.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(0)]))
    await mapper.reclaim(null)
    expect(await read(mapper, second.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2)]))
    const projectId = adminProject.id
    const copy = await mapper.createVolume({
      projectId,
      name: 'copy',
      sizeBytes: 64 * slot,
      poolId: bench.poolId,
      fromId: second.id,
    })
    expect(await read(mapper, copy.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2)]))
    expect((await mapper.check()).findings.filter(({ severity }) => severity === 'error')).toEqual([])
  })

  test('lets the event loop turn while the rows of a large pool are written', async () => {
    const count = 3000
    const { id: poolId } = await bench.mapper.pools.get(bench.poolId)
    await bench.inner.write(async (tx) => {
      const row = { project_id: adminProject.id, kind: 'image' as const, size_bytes: slot, root_word: 0n, root_crc: 0 }
      const rest = {
        home_pool_id: poolId,
        parent_id: null,
        volume_id: null,
        status: 'available' as const,
        created_at: 1,
        updated_at: 1,
      }
      for (let index = 0; index < count; index += 1) {
        const id = `00000000-0000-4000-8000-${String(index).padStart(12, '0')}`
        await tx
          .insertInto('resources')
          .values({ id, name: `image-${index}`, ...row, ...rest })
          .execute()
      }
    })
    await bench.mapper.flushExports([bench.poolId])
    let turns = 0
    let most = 0
    fresh = await freshHome(bench.store, (catalog) => {
      const failing = failingCatalog(catalog)
      return {
        ...failing.catalog,
        write: async (fn, options) =>
          await catalog.write(async (tx) => {
            const before = turns
            const value = await fn(tx)
            most = Math.max(most, turns - before)
            return value
          }, options),
      }
    })
    let isOver = false
    const countTurns = (): void => {
      turns += 1
      if (!isOver) setImmediate(countTurns)
    }
    countTurns()
    expect((await fresh.mapper.importPool(wanted)).broughtBack.image).toBe(count)
    isOver = true
    expect(most).toBeGreaterThanOrEqual(10)
  })

  test('without a base brings back what changed since, and keeps the files of everything else', async () => {
    const volume = await bench.volume('disk', 16 * slot)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(7))
    await device.flush()
    const files = (await bench.store.listLayers()).length
    for (const name of await bench.store.listRecords('export.base.')) await damage(name, null)
    fresh = await freshHome(bench.store)
    const report = await fresh.mapper.importPool(wanted)
    expect(report.damages[0]).toMatchObject({ record: 'export.base' })
    await fresh.mapper.reclaim(null)
    expect((await bench.store.listLayers()).length).toBeGreaterThanOrEqual(files)
  })

  test('says what it would bring back and changes nothing, and refuses a pool that another catalog owns', async () => {
    await bench.volume('disk', 16 * slot)
    const owner = await bench.store.readRecord('owner')
    const before = await bench.store.listRecords('')
    fresh = await freshHome(bench.store)
    const dry = await fresh.mapper.importPool({ ...wanted, takeOver: false, dryRun: true })
    expect(dry).toMatchObject({ broughtBack: { volume: 1 }, failed: [], catalogId: bench.inner.id })
    await expect(fresh.mapper.importPool({ ...wanted, takeOver: false })).rejects.toMatchObject({
      code: 'POOL_OWNED_BY_OTHER',
      values: { ownerCatalogId: bench.inner.id },
    })
    expect(await bench.store.listRecords('')).toEqual(before)
    expect(await bench.store.readRecord('owner')).toEqual(owner)
    expect(await fresh.mapper.pools.list()).toEqual([])
  })

  test('is done again where the catalog that took the pool over is lost before it has written an export of its own', async () => {
    const volume = await bench.volume('disk', 64 * slot)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 8 * slot))
    const snap = await bench.snapshot(volume.id)
    await device.write(0, bytes(2))
    await device.flush()
    const withoutExport = new Proxy(bench.store, {
      get(target, key) {
        if (key === 'writeRecord') {
          return async (name: string, body: Uint8Array) => {
            if (name.startsWith('export.')) throw new Error('the backend is slow')
            await target.writeRecord(name, body)
          }
        }
        const value: unknown = Reflect.get(target, key, target)
        return typeof value === 'function' ? (value.bind(target) as unknown) : value
      },
    })
    for (let round = 0; round < 3; round += 1) {
      const home = await freshHome(withoutExport)
      expect(await home.mapper.importPool(wanted)).toMatchObject({ broughtBack: { volume: 1, snapshot: 1 }, failed: [] })
      expect(await read(home.mapper, volume.id, round * slot, slot)).toEqual(bytes(2))
      const { device: again } = await home.mapper.open(volume.id, { holder: 'test', readOnly: false })
      await again.write((round + 1) * slot, bytes(2))
      await again.flush()
      if (round === 1) await home.mapper.snapshot([{ volumeId: volume.id, name: 'another' }])
      await home.close()
    }
    fresh = await freshHome(bench.store)
    expect(await fresh.mapper.importPool(wanted)).toMatchObject({ broughtBack: { volume: 1, snapshot: 1 }, failed: [] })
    expect(await read(fresh.mapper, volume.id, 0, 5 * slot)).toEqual(Buffer.concat([bytes(2, 4 * slot), bytes(1)]))
    expect(await read(fresh.mapper, snap.id, 0, 2 * slot)).toEqual(bytes(1, 2 * slot))
  })

  test('beside a reclaim waits for its end: that would sweep the pages that come in', async () => {
    const volume = await bench.volume('disk', 64 * slot)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 8 * slot))
    await bench.snapshot(volume.id)
    await device.write(0, bytes(2))
    await device.flush()
    // The next read of several tables, which is that of the roots, begins and does not end.
    const begun = Promise.withResolvers<void>()
    const held = Promise.withResolvers<void>()
    let isHeld = false
    fresh = await freshHome(
      bench.store,
      (catalog) =>
        new Proxy(catalog, {
          get(target, key) {
            const value: unknown = Reflect.get(target, key, target)
            if (key === 'read') {
              return async (fn: Parameters<Catalog['read']>[0]) => {
                const found = await target.read(fn)
                if (!isHeld) return found
                isHeld = false
                begun.resolve()
                await held.promise
                return found
              }
            }
            return typeof value === 'function' ? (value.bind(target) as unknown) : value
          },
        }),
    )
    isHeld = true
    const reclaim = fresh.mapper.reclaim(null)
    await begun.promise
    const imported = fresh.mapper.importPool(wanted)
    for (let turn = 0; turn < 500; turn += 1) await nextTurn()
    expect(await fresh.mapper.pools.list()).toEqual([])
    held.resolve()
    await reclaim
    expect(await imported).toMatchObject({ broughtBack: { volume: 1, snapshot: 1 }, failed: [] })
    expect(await read(fresh.mapper, volume.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(2), bytes(1)]))
  })

  test('that a crash interrupts at any write of the catalog is done again', async () => {
    const volume = await bench.volume('disk', 64 * slot)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 8 * slot))
    await bench.snapshot(volume.id)
    await device.write(0, bytes(2))
    await device.flush()
    const engine = new Engine()
    const catalog = await openCatalog(':memory:')
    try {
      let found: { report: PoolImportReport; content: Buffer } | undefined
      for (let allowed = 0; found === undefined && allowed < 60; allowed += 1) {
        let left = allowed
        const dying = new Proxy(catalog, {
          get(target, key) {
            const value: unknown = Reflect.get(target, key, target)
            if (key === 'write') {
              return async (...args: Parameters<Catalog['write']>) => {
                left -= 1
                if (left < 0) throw new Error('this process is dead')
                return await target.write(...args)
              }
            }
            return typeof value === 'function' ? (value.bind(target) as unknown) : value
          },
        })
        const mapper = await openMapper({
          catalog: dying,
          engine,
          drivers: [makeMemoryDriver(() => lockless(bench.store))],
          log: new LogLines(),
          setTimer: () => () => undefined,
        }).catch(() => null)
        if (mapper === null) continue
        const { driver: _, options: __, ...again } = wanted
        const isKnown = (await mapper.pools.list()).length > 0
        const report = await mapper.importPool(isKnown ? again : wanted).catch(() => null)
        if (report !== null && report.failed.length === 0) {
          // Whether the import took the last write that it may: what comes after it is not what dies here.
          left = Infinity
          found = { report, content: await read(mapper, volume.id, 0, 2 * slot) }
        }
        await mapper.close()
      }
      expect(found?.report.broughtBack).toMatchObject({ volume: 1, snapshot: 1 })
      expect(found?.content).toEqual(Buffer.concat([bytes(2), bytes(1)]))
    } finally {
      await engine.close()
      await catalog.close()
    }
  })
})

describe('importing the pools of one lost catalog one after the other', () => {
  let folder: string
  const closing: (() => Promise<void>)[] = []

  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'atoll-import-'))
  })

  afterEach(async () => {
    for (const close of closing.splice(0).toReversed()) await close()
    await rm(folder, { recursive: true })
  })

  async function home(): Promise<{ mapper: Mapper; catalog: Catalog; close: () => Promise<void> }> {
    const engine = new Engine()
    const catalog = await openCatalog(':memory:')
    const mapper = await openMapper({
      catalog,
      engine,
      drivers: [fileDriver],
      log: new LogLines(),
      setTimer: () => () => undefined,
    })
    let isClosed = false
    const close = async (): Promise<void> => {
      if (isClosed) return
      isClosed = true
      await mapper.close()
      await engine.close()
      await catalog.close()
    }
    closing.push(close)
    return { mapper, catalog, close }
  }

  const place = (name: string) => ({ driver: 'file', options: { path: join(folder, name), reserve: '0' } })
  const importOf = (name: string) => ({ name, ...place(name), takeOver: true, dryRun: false })

  test('says what lies in a pool that is not here yet, and has it when that one was imported, too', async () => {
    const lost = await home()
    const projectId = adminProject.id
    const first = await lost.mapper.pools.create({ projectId, name: 'first', ...place('first') })
    const second = await lost.mapper.pools.create({ projectId, name: 'second', ...place('second') })
    const volume = await lost.mapper.createVolume({ projectId, name: 'disk', sizeBytes: 64 * slot, poolId: first.id })
    const { device } = await lost.mapper.open(volume.id, { holder: 'test', readOnly: false })
    for (let index = 0; index < 8; index += 1) await device.write(8 * index * slot, bytes(index + 1))
    const { rows } = await lost.mapper.snapshot([{ volumeId: volume.id, name: 'snap' }])
    await device.write(0, bytes(99))
    const clone = await lost.mapper.createVolume({
      projectId,
      name: 'clone',
      sizeBytes: 64 * slot,
      poolId: second.id,
      fromId: rows[0]?.id ?? '',
    })
    const cloned = await lost.mapper.open(clone.id, { holder: 'test', readOnly: false })
    await cloned.device.write(slot, bytes(42))
    await lost.close()

    const fresh = await home()
    await fresh.mapper.pools.create({ projectId, name: 'own', ...place('own') })
    await fresh.mapper.idle()
    const partly = await fresh.mapper.importPool(importOf('second'))
    expect(partly.failed).toMatchObject([{ id: clone.id, name: 'clone', code: 'LAYER_MISSING' }])
    expect(partly.failed[0]?.reason).toContain('import pool "first"')
    // What is missing is missed by nobody who reclaims meanwhile.
    await fresh.mapper.reclaim(null)

    const whole = await fresh.mapper.importPool(importOf('first'))
    expect(whole).toMatchObject({ failed: [], broughtBack: { volume: 1, snapshot: 1 } })
    expect(await read(fresh.mapper, clone.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(42)]))
    expect(await read(fresh.mapper, clone.id, 56 * slot, slot)).toEqual(bytes(8))
    expect(await read(fresh.mapper, volume.id, 0, slot)).toEqual(bytes(99))
    // Asked again, it says the same of what is here.
    expect(
      await fresh.mapper.importPool({ ...importOf('second'), driver: 'file' }).catch((error: unknown) => error),
    ).toMatchObject({
      broughtBack: { volume: 1 },
      failed: [],
    })
  })

  test('a pool of the home itself, one without an export, and one whose numbers are taken are refused', async () => {
    const { mapper } = await home()
    const projectId = adminProject.id
    await mapper.pools.create({ projectId, name: 'own', ...place('own') })
    await expect(mapper.importPool({ name: 'own', takeOver: true, dryRun: false })).rejects.toMatchObject({
      code: 'POOL_IMPORT_CONFLICT',
    })
    await expect(mapper.importPool({ name: 'none', takeOver: true, dryRun: false })).rejects.toMatchObject({
      code: 'POOL_NOT_FOUND',
    })
    await expect(mapper.importPool(importOf('nothing'))).rejects.toMatchObject({ code: 'POOL_UNAVAILABLE' })
    const engine = new Engine()
    await engine.openFileStore({ path: join(folder, 'empty'), create: true, reserveBytes: 0 })
    await engine.close()
    await expect(mapper.importPool(importOf('empty'))).rejects.toMatchObject({ code: 'POOL_EXPORT_MISSING' })

    const other = await home()
    const pool = await other.mapper.pools.create({ projectId, name: 'other', ...place('other') })
    await other.mapper.createVolume({ projectId, name: 'a', sizeBytes: slot, poolId: pool.id })
    await other.close()
    const own = await mapper.pools.list()
    await mapper.createVolume({ projectId, name: 'b', sizeBytes: slot, poolId: own[0]?.id ?? '' })
    await expect(mapper.importPool(importOf('other'))).rejects.toMatchObject({ code: 'POOL_IMPORT_CONFLICT' })
  })
})
