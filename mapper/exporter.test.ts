import { adminProject, type Catalog, openCatalog } from '@atoll/core'
import { Engine, type Store } from '@atoll/native'
import { makeMemoryDriver } from '@atoll/southbound'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { recordPrefix } from './export-format.ts'
import { loadExport } from './export-load.ts'
import { isLong } from './exporter.ts'
import { type Mapper, openMapper } from './mapper.ts'
import { Bench, bytes, failingCatalog, LogLines, ManualTimers, slot } from './test-bench.ts'

describe('the export of a pool', () => {
  let bench: Bench

  beforeEach(async () => {
    bench = await Bench.open()
    await bench.mapper.flushExports([bench.poolId])
  })

  afterEach(async () => await bench.close())

  const records = async (): Promise<string[]> => await bench.store.listRecords(recordPrefix)
  const status = async () => (await bench.mapper.pools.status(bench.poolId)).export
  const exported = async (table: 'resources' | 'volumes' | 'layers') => {
    const found = await loadExport(bench.store)
    expect(found?.damages).toEqual([])
    return [...(found?.rows.get(table)?.values() ?? [])].map(({ row }) => row)
  }

  test('has what an operation made when the operation returns, and no longer what one deleted', async () => {
    expect(await status()).toEqual({ state: 'current', behindSince: null, error: null })
    const volume = await bench.volume('disk', 16 * slot)
    expect((await exported('resources')).map((row) => row['id'])).toEqual([volume.id])
    await bench.mapper.rename(volume.id, 'renamed')
    expect((await exported('resources')).map((row) => row['name'])).toEqual(['renamed'])
    await bench.mapper.deleteResource(volume.id)
    expect(await exported('resources')).toEqual([])
    expect(await exported('volumes')).toEqual([])
  })

  test('is not written when nothing changed, and once for many who wait at the same time', async () => {
    const before = await records()
    await bench.mapper.flushExports([bench.poolId])
    expect(await records()).toEqual(before)
    await Promise.all(Array.from({ length: 20 }, async (_, index) => await bench.volume(`disk-${index}`, 16 * slot)))
    expect(await exported('resources')).toHaveLength(20)
    expect((await records()).length - before.length).toBeLessThan(20)
  })

  test('gets a new base when its deltas have become many, and the old records go', async () => {
    const volume = await bench.volume('disk', 16 * slot)
    for (let index = 0; index < 1100; index += 1) await bench.mapper.rename(volume.id, `disk-${index}`)
    await bench.mapper.idle()
    expect((await records()).length).toBeLessThan(200)
    expect((await exported('resources')).map((row) => row['name'])).toEqual(['disk-1099'])
  })

  test('is written anew less often the more is in it, and before an open has too many records to read', () => {
    const deltas = (count: number, each = 1000) => ({ deltaCount: count, deltaBytes: count * each })
    const mebibyte = 2 ** 20
    expect(isLong({ baseBytes: 1000, ...deltas(1024) })).toBe(false)
    expect(isLong({ baseBytes: 1000, ...deltas(1025) })).toBe(true)
    expect(isLong({ baseBytes: 1000, ...deltas(5, mebibyte) })).toBe(true)
    expect(isLong({ baseBytes: 70 * mebibyte, ...deltas(4000) })).toBe(false)
    expect(isLong({ baseBytes: 70 * mebibyte, ...deltas(5000) })).toBe(true)
    expect(isLong({ baseBytes: 70 * mebibyte, ...deltas(80, mebibyte) })).toBe(true)
    expect(isLong({ baseBytes: 2 ** 40, ...deltas(16 * 1024 + 1) })).toBe(true)
  })

  test('that cannot be written lets operations succeed, is shown, and nothing that it names is freed until it can', async () => {
    const volume = await bench.volume('disk', 64 * slot)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 32 * slot))
    const snap = await bench.snapshot(volume.id)
    await bench.mapper.close(volume.id)
    bench.fail({ operation: 'record-write', errno: 5 })
    await bench.mapper.deleteResource(snap.id)
    await bench.mapper.deleteResource(volume.id)
    expect(await status()).toMatchObject({
      state: 'behind',
      error: { code: 'IO_ERROR' },
      behindSince: expect.any(Number) as number,
    })
    expect(bench.log.lines.filter(({ message }) => message.startsWith('the export of the pool cannot be written'))).toHaveLength(
      1,
    )
    const { storedBytes } = await bench.store.usage()
    expect(await bench.mapper.reclaim(null)).toMatchObject({ freedBytes: 0, removedLayers: 0 })
    expect((await bench.store.usage()).storedBytes).toBe(storedBytes)
    expect((await exported('resources')).map((row) => row['id']).toSorted()).toEqual([snap.id, volume.id].toSorted())

    bench.fail()
    expect((await bench.mapper.reclaim(null)).freedBytes).toBeGreaterThanOrEqual(32 * slot)
    expect(await status()).toEqual({ state: 'current', behindSince: null, error: null })
    expect(await exported('resources')).toEqual([])
    expect(await bench.findLeak()).toBe(null)
  })

  test('that cannot be written keeps the journal that an import would need, and several snapshots are taken all the same', async () => {
    const volume = await bench.volume('disk', 64 * slot)
    const device = await bench.attach(volume.id)
    await bench.snapshot(volume.id, 'first')
    bench.fail({ operation: 'record-write', errno: 5 })
    for (let index = 0; index < 4; index += 1) {
      await device.write(index * slot, bytes(index + 1))
      await bench.snapshot(volume.id, `snap-${index}`)
    }
    expect((await bench.layers('closing')).length).toBe(4)
    bench.fail()
    await bench.mapper.reclaim(null)
    expect(await bench.layers('closing')).toEqual([])
    await bench.kill()
    expect(await bench.read(volume.id, 0, 4 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2), bytes(3), bytes(4)]))
    expect(await bench.findLeak()).toBe(null)
  })

  test('goes on after a restart where it was, and is written anew if a record is damaged', async () => {
    const volume = await bench.volume('disk', 16 * slot)
    await bench.restart()
    await bench.mapper.flushExports([bench.poolId])
    const before = await records()
    await bench.restart()
    await bench.mapper.flushExports([bench.poolId])
    expect((await records()).filter((name) => name.includes('base'))).toEqual(before.filter((name) => name.includes('base')))

    const delta = before.find((name) => name.includes('delta')) ?? ''
    await bench.store.writeRecord(delta, new TextEncoder().encode('damaged'))
    await bench.restart()
    expect(await bench.mapper.flushExports([bench.poolId])).toBe(true)
    expect((await exported('resources')).map((row) => row['id'])).toEqual([volume.id])
  })

  test('that is newer than the catalog is left as it is, and nothing of the pool is freed', async () => {
    const old = await bench.volume('old', 16 * slot)
    const copy = await bench.inner.serialize()
    const younger = await bench.volume('younger', 16 * slot)
    const device = await bench.attach(younger.id)
    await device.write(0, bytes(1, 4 * slot))
    await bench.mapper.close(younger.id)
    await bench.mapper.close()

    const engine = new Engine()
    const catalog = await openCatalog(copy)
    const log = new LogLines()
    const drivers = [makeMemoryDriver(() => bench.store)]
    const mapper = await openMapper({ catalog, engine, drivers, log, setTimer: () => () => undefined })
    try {
      expect((await mapper.pools.status(bench.poolId)).export.state).toBe('ahead')
      await mapper.deleteResource(old.id)
      expect((await mapper.reclaim(null)).removedLayers).toBe(0)
      expect((await exported('resources')).map((row) => row['id']).toSorted()).toEqual([old.id, younger.id].toSorted())
    } finally {
      await mapper.close()
      await engine.close()
      await catalog.close()
    }
  })

  test('goes with a pool that is deleted', async () => {
    await bench.mapper.pools.delete(bench.poolId)
    expect(await records()).toEqual([])
  })
})

/** Notes in the outbox, of nothing that is there. */
async function noteMany(catalog: Catalog, poolId: string, count: number): Promise<void> {
  await catalog.write(async (tx) => {
    for (let start = 0; start < count; start += 1000) {
      const notes = Array.from({ length: 1000 }, (_, index) => ({
        table_name: 'resources',
        row_key: `none-${start + index}`,
        pool_id: poolId,
      }))
      await tx.insertInto('export_changes').values(notes).execute()
    }
  })
}

describe('the exports of several pools', () => {
  let base: Engine
  /** By the id of the pool; one that is not here cannot be opened. */
  const stores = new Map<string, Store>()
  const unmounted = new Set<string>()
  const timers = new ManualTimers()

  beforeEach(() => {
    base = new Engine()
  })

  afterEach(async () => {
    await base.close()
    stores.clear()
    unmounted.clear()
  })

  interface Life {
    readonly mapper: Mapper
    readonly catalog: Catalog
    end(): Promise<Uint8Array>
  }

  async function live(
    source: Uint8Array | ':memory:',
    wrap: (catalog: Catalog) => Catalog = (catalog) => catalog,
  ): Promise<Life> {
    const engine = new Engine()
    const catalog = await openCatalog(source)
    const driver = makeMemoryDriver(({ poolId }) => {
      if (unmounted.has(poolId)) throw new Error('not mounted')
      const store = stores.get(poolId) ?? base.faultStore(base.memoryStore({ capacityBytes: 1 << 30 }))
      stores.set(poolId, store)
      return store
    })
    const mapper = await openMapper({
      catalog: wrap(catalog),
      engine,
      drivers: [driver],
      log: new LogLines(),
      setTimer: timers.set,
    })
    const end = async (): Promise<Uint8Array> => {
      await mapper.close()
      await engine.close()
      const copy = await catalog.serialize()
      await catalog.close()
      return copy
    }
    return { mapper, catalog, end }
  }

  const makePool = async (mapper: Mapper, name: string): Promise<string> => {
    const { id } = await mapper.pools.create({ projectId: adminProject.id, name, driver: 'memory', options: {} })
    await mapper.flushExports([id])
    return id
  }
  const makeVolume = async (mapper: Mapper, poolId: string, name: string) =>
    await mapper.createVolume({ projectId: adminProject.id, name, sizeBytes: 16 * slot, poolId })
  const namesIn = async (poolId: string): Promise<unknown[]> => {
    const found = await loadExport(stores.get(poolId) as Store)
    return [...(found?.rows.get('resources')?.values() ?? [])].map(({ row }) => row['name'])
  }

  test('one that missed too much holds up no other: what that is said to have it has', async () => {
    const { mapper, catalog, end } = await live(':memory:')
    const [first, second] = [await makePool(mapper, 'first'), await makePool(mapper, 'second')]
    stores.get(second)?.setFaults({ seed: 1, rules: [{ operation: 'record-write', errno: 5 }] })
    await makeVolume(mapper, second, 'unwritten')
    await makeVolume(mapper, first, 'early')
    // More than one delta takes: of these the first pool has the first half.
    const many = async () => await noteMany(catalog, second, 30_000)
    await many()
    expect(await mapper.flushExports([first])).toBe(true)
    await many()
    const { id } = await makeVolume(mapper, first, 'late')
    expect(await namesIn(first)).toEqual(['early', 'late'])
    await mapper.deleteResource(id)
    expect(await namesIn(first)).toEqual(['early'])

    // A base that met the fault and says so only later would be tried again by no timer.
    await mapper.idle()
    stores.get(second)?.setFaults({ seed: 1, rules: [] })
    timers.fire()
    await mapper.idle()
    expect(await mapper.flushExports([first, second])).toBe(true)
    expect(await namesIn(second)).toEqual(['unwritten'])
    await end()
  })

  test('one that was not there when an older catalog began is found newer when it is back, whatever happened in others', async () => {
    const life = await live(':memory:')
    const [first, second] = [await makePool(life.mapper, 'first'), await makePool(life.mapper, 'second')]
    const volume = await makeVolume(life.mapper, second, 'disk')
    const { device } = await life.mapper.open(volume.id, { holder: 'test', readOnly: false })
    await device.write(0, bytes(1))
    const { rows } = await life.mapper.snapshot([{ volumeId: volume.id, name: 'snap' }])
    await life.mapper.close(volume.id)
    await life.mapper.idle()
    await life.mapper.flushExports([first, second])
    const older = await life.catalog.serialize()
    await life.mapper.deleteResource(rows[0]?.id ?? '')
    await life.mapper.rename(volume.id, 'renamed')
    await life.end()

    unmounted.add(second)
    let again = await live(older)
    for (let index = 0; index < 40; index += 1) await makeVolume(again.mapper, first, `busy-${index}`)
    const newer = await again.end()
    again = await live(newer)
    unmounted.delete(second)
    await again.mapper.pools.open(await again.mapper.pools.get(second))
    expect((await again.mapper.pools.status(second)).export.state).toBe('ahead')
    await expect(again.mapper.open(rows[0]?.id ?? '', { holder: 'test', readOnly: true })).rejects.toMatchObject({
      code: 'CATALOG_BEHIND',
    })
    expect((await again.mapper.pools.status(first)).export.state).toBe('current')
    const last = await live(await again.end())
    expect((await last.mapper.pools.status(second)).export.state).toBe('ahead')
    await last.end()
    expect(await namesIn(second)).toEqual(['renamed'])
  })

  test('one that cannot be read when it is opened is not written until it can, because it may be newer', async () => {
    const life = await live(':memory:')
    const pool = await makePool(life.mapper, 'pool')
    await makeVolume(life.mapper, pool, 'older')
    const older = await life.catalog.serialize()
    await makeVolume(life.mapper, pool, 'newer')
    await life.end()
    const records = await stores.get(pool)?.listRecords(recordPrefix)

    stores.get(pool)?.setFaults({ seed: 1, rules: [{ operation: 'record-list', errno: 5 }] })
    const again = await live(older)
    expect((await again.mapper.pools.status(pool)).export).toMatchObject({ state: 'behind', error: { code: 'IO_ERROR' } })
    stores.get(pool)?.setFaults({ seed: 1, rules: [] })
    expect(await again.mapper.flushExports([pool])).toBe(false)
    timers.fire()
    await again.mapper.idle()
    expect((await again.mapper.pools.status(pool)).export.state).toBe('ahead')
    await again.end()
    expect(await stores.get(pool)?.listRecords(recordPrefix)).toEqual(records)
  })

  test('that nobody writes let every operation succeed on a full home', async () => {
    let isFull = false
    const failing = (catalog: Catalog): Catalog => {
      const wrapped = failingCatalog(catalog)
      wrapped.beforeWrite = ({ durable }) => {
        if (isFull && !durable) throw new Error('the home is full')
      }
      return wrapped.catalog
    }
    const { mapper, catalog, end } = await live(':memory:', failing)
    const pool = await makePool(mapper, 'pool')
    const volume = await makeVolume(mapper, pool, 'disk')
    const { id } = await makeVolume(mapper, pool, 'spent')
    const older = await catalog.serialize()
    await mapper.deleteResource(id)
    await end()
    const again = await live(older, failing)
    expect((await again.mapper.pools.status(pool)).export.state).toBe('ahead')
    await noteMany(again.catalog, pool, 60_000)
    isFull = true
    expect(await again.mapper.rename(volume.id, 'renamed')).toMatchObject({ name: 'renamed' })
    isFull = false
    await again.end()
  })
})
