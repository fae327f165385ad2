import { openCatalog } from '@atoll/core'
import { Engine } from '@atoll/native'
import { makeMemoryDriver } from '@atoll/southbound'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { recordPrefix } from './export-format.ts'
import { loadExport } from './export-load.ts'
import { openMapper } from './mapper.ts'
import { Bench, bytes, LogLines, slot } from './test-bench.ts'

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
