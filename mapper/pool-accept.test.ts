import { adminProject, type Catalog, openCatalog } from '@atoll/core'
import { Engine, type Store } from '@atoll/native'
import { makeMemoryDriver } from '@atoll/southbound'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { recordPrefix } from './export-format.ts'
import { type Mapper, openMapper } from './mapper.ts'
import { Bench, bytes, failingCatalog, LogLines, slot } from './test-bench.ts'

/** The store as a process finds it whose predecessor died; `beforeRecord` may throw. */
function afterDeath(store: Store, beforeRecord: (name: string) => void = () => undefined): Store {
  return new Proxy(store, {
    get(target, key) {
      if (key === 'lock') return async () => ({ release: () => undefined })
      if (key === 'writeRecord') {
        return async (name: string, body: Uint8Array) => {
          beforeRecord(name)
          await target.writeRecord(name, body)
        }
      }
      const value: unknown = Reflect.get(target, key, target)
      return typeof value === 'function' ? (value.bind(target) as unknown) : value
    },
  })
}

interface Life {
  readonly mapper: Mapper
  readonly catalog: Catalog
  readonly log: LogLines
  /** What a process that comes next finds. */
  end(): Promise<Uint8Array>
}

interface Faults {
  readonly beforeWrite?: () => void
  readonly beforeRecord?: (name: string) => void
}

describe('accepting an older catalog', () => {
  let bench: Bench
  /** Of the resources by their names. */
  const ids = new Map<string, string>()
  let older: Uint8Array
  let newer: Uint8Array

  async function live(source: Uint8Array | ':memory:', { beforeWrite, beforeRecord }: Faults = {}): Promise<Life> {
    const engine = new Engine()
    const catalog = await openCatalog(source)
    const failing = failingCatalog(catalog)
    const log = new LogLines()
    const drivers = [makeMemoryDriver(() => afterDeath(bench.store, beforeRecord))]
    if (beforeWrite !== undefined) failing.beforeWrite = beforeWrite
    const mapper = await openMapper({ catalog: failing.catalog, engine, drivers, log, setTimer: () => () => undefined })
    const end = async (): Promise<Uint8Array> => {
      await mapper.close()
      await engine.close()
      const copy = await catalog.serialize()
      await catalog.close()
      return copy
    }
    return { mapper, catalog, log, end }
  }

  const idOf = (name: string): string => ids.get(name) ?? ''
  const stateOf = async ({ mapper }: Life) => (await mapper.pools.status(bench.poolId)).export.state
  const read = async ({ mapper }: Life, name: string): Promise<Buffer> => {
    const { device } = await mapper.open(idOf(name), { holder: 'test', readOnly: true })
    try {
      return Buffer.from(await device.read(0, slot))
    } finally {
      await mapper.close(idOf(name))
    }
  }
  const write = async ({ mapper }: Pick<Life, 'mapper'>, name: string, value: number): Promise<void> => {
    const { device } = await mapper.open(idOf(name), { holder: 'test', readOnly: false })
    await device.write(0, bytes(value))
    await mapper.close(idOf(name))
  }

  beforeEach(async () => {
    bench = await Bench.open()
    const snapshot = async (volume: string, name: string): Promise<void> => {
      ids.set(name, (await bench.snapshot(idOf(volume), name)).id)
    }
    for (const name of ['same', 'written']) ids.set(name, (await bench.volume(name, 16 * slot)).id)
    for (const name of ['same', 'written']) {
      await write(bench, name, 1)
      await snapshot(name, `${name}@base`)
      await write(bench, name, 2)
      await snapshot(name, `${name}@doomed`)
    }
    older = await bench.inner.serialize()
    await bench.mapper.deleteResource(idOf('written@doomed'))
    await write(bench, 'written', 3)
    await snapshot('written', 'written@later')
    ids.set('made', (await bench.volume('made', 16 * slot)).id)
    await write(bench, 'made', 4)
    await bench.mapper.reclaim(null)
    await bench.mapper.close()
    newer = await bench.inner.serialize()
  })

  afterEach(async () => {
    ids.clear()
    await bench.close()
  })

  test('is refused without a confirmation, and says by name what would be given up', async () => {
    const life = await live(older)
    const records = await bench.store.listRecords(recordPrefix)
    const report = await life.mapper.acceptPool(bench.poolId, { confirmed: false })
    expect(report).toMatchObject({
      poolId: bench.poolId,
      name: 'pool',
      accepted: false,
      changed: [{ kind: 'volume', id: idOf('written'), name: 'written' }],
      deleted: [{ kind: 'snapshot', id: idOf('written@doomed'), name: 'written@doomed' }],
      damages: [],
    })
    expect(report.onlyInExport.map(({ name }) => name).toSorted()).toEqual(['made', 'written@later'])
    expect(await stateOf(life)).toBe('ahead')
    expect(await bench.store.listRecords(recordPrefix)).toEqual(records)
    await life.end()
  })

  test('serves the pool, frees again, keeps what cannot be used refused, and is an import that loses nothing', async () => {
    let life = await live(older)
    const files = new Set((await bench.store.listLayers()).map((layer) => layer.id))
    const report = await life.mapper.acceptPool(bench.poolId, { confirmed: true })
    expect(report).toMatchObject({ accepted: true })
    expect(report.unknownLayers.length).toBeGreaterThan(0)
    expect(await stateOf(life)).toBe('current')
    const told = life.log.lines.find(({ message }) => message.includes('accepts this catalog'))
    expect(JSON.stringify(told?.values)).toContain(idOf('made'))
    for (let round = 0; round < 2; round += 1) {
      for (const name of ['written', 'written@doomed']) {
        await expect(read(life, name)).rejects.toMatchObject({ code: 'CATALOG_BEHIND' })
        expect((await life.mapper.check()).findings).toContainEqual(
          expect.objectContaining({ kind: 'catalog-older', object: idOf(name), severity: 'error' }),
        )
      }
      expect(await read(life, 'same')).toEqual(bytes(2))
      expect(await read(life, 'written@base')).toEqual(bytes(1))
      life = await live(await life.end())
      expect(await stateOf(life)).toBe('current')
    }
    await life.mapper.rollback(idOf('written'), idOf('written@base'))
    await life.mapper.deleteResource(idOf('written@doomed'))
    await life.mapper.deleteResource(idOf('same@doomed'))
    expect(await read(life, 'written')).toEqual(bytes(1))
    await write(life, 'same', 9)
    expect((await life.mapper.reclaim(null)).removedLayers).toBeGreaterThan(0)
    expect((await life.mapper.check()).findings.filter(({ kind }) => kind === 'catalog-older')).toEqual([])
    const there = new Set((await bench.store.listLayers()).map((layer) => layer.id))
    expect(report.unknownLayers.filter((id) => files.has(id) && !there.has(id))).toEqual([])
    await life.end()

    const fresh = await live(':memory:')
    const imported = await fresh.mapper.importPool({ name: 'pool', driver: 'memory', options: {}, takeOver: true, dryRun: false })
    expect(imported).toMatchObject({ broughtBack: { volume: 2, snapshot: 2 }, failed: [], damages: [] })
    expect(await read(fresh, 'same')).toEqual(bytes(9))
    expect(await read(fresh, 'written')).toEqual(bytes(1))
    await fresh.end()
  })

  test('makes the newer catalog the older one, should it come back', async () => {
    const life = await live(older)
    await life.mapper.acceptPool(bench.poolId, { confirmed: true })
    await life.mapper.deleteResource(idOf('same@doomed'))
    await life.mapper.reclaim(null)
    await life.end()
    const back = await live(newer)
    expect(await stateOf(back)).toBe('ahead')
    await expect(read(back, 'same@doomed')).rejects.toMatchObject({ code: 'CATALOG_BEHIND' })
    await expect(read(back, 'made')).rejects.toMatchObject({ code: 'CATALOG_BEHIND' })
    expect(await read(back, 'same')).toEqual(bytes(2))
    await back.end()
  })

  test('is nothing for a pool that is not ahead', async () => {
    const life = await live(newer)
    for (const confirmed of [false, true]) {
      await expect(life.mapper.acceptPool(bench.poolId, { confirmed })).rejects.toMatchObject({ code: 'POOL_NOT_AHEAD' })
    }
    await life.mapper.createVolume({ projectId: adminProject.id, name: 'more', sizeBytes: slot, poolId: bench.poolId })
    await life.end()
  })

  test.each(['catalog', 'pool'])(
    'that dies at any write of the %s is done or not, and goes on at the next start',
    async (where) => {
      const outcomes = new Set<string>()
      const records = new Map<string, Uint8Array>()
      for (const name of await bench.store.listRecords(recordPrefix)) {
        records.set(name, (await bench.store.readRecord(name)) as Uint8Array)
      }
      let isDone = false
      for (let allowed = 0; !isDone && allowed < 20; allowed += 1) {
        for (const name of await bench.store.listRecords(recordPrefix)) await bench.store.removeRecord(name)
        for (const [name, body] of records) await bench.store.writeRecord(name, body)
        let left = Infinity
        const die = (): void => {
          left -= 1
          if (left < 0) throw new Error('this process is dead')
        }
        const dying = await live(older, where === 'catalog' ? { beforeWrite: die } : { beforeRecord: die })
        await dying.mapper.idle()
        left = allowed
        await dying.mapper.acceptPool(bench.poolId, { confirmed: true }).catch(() => null)
        await dying.mapper.idle()
        isDone = left > 0
        left = 0
        const left_behind = await dying.catalog.serialize()
        await dying.mapper.close()
        const life = await live(left_behind)
        const state = await stateOf(life)
        outcomes.add(state)
        const again = state === 'ahead' ? await life.mapper.acceptPool(bench.poolId, { confirmed: true }) : null
        expect(again?.accepted ?? true).toBe(true)
        expect(await life.mapper.flushExports([bench.poolId])).toBe(true)
        expect(await stateOf(life)).toBe('current')
        expect(await read(life, 'same')).toEqual(bytes(2))
        await expect(read(life, 'written')).rejects.toMatchObject({ code: 'CATALOG_BEHIND' })
        await life.end()
        const fresh = await live(':memory:')
        const imported = await fresh.mapper.importPool({
          name: 'pool',
          driver: 'memory',
          options: {},
          takeOver: true,
          dryRun: true,
        })
        expect(imported).toMatchObject({ broughtBack: { volume: 2, snapshot: 4 }, damages: [] })
        await fresh.end()
      }
      expect(isDone).toBe(true)
      expect([...outcomes].toSorted()).toEqual(where === 'catalog' ? ['ahead', 'current'] : ['current'])
    },
  )
})
