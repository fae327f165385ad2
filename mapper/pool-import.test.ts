import { adminProject, openCatalog, type Catalog } from '@atoll/core'
import { Engine, type Store } from '@atoll/native'
import { makeMemoryDriver } from '@atoll/southbound'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { type Mapper, openMapper } from './mapper.ts'
import { Bench, bytes, LogLines, slot } from './test-bench.ts'

/** A fresh home: another catalog, another engine, the same store. */
interface Fresh {
  readonly catalog: Catalog
  readonly mapper: Mapper
  readonly log: LogLines
  close(): Promise<void>
}

async function freshHome(store: Store): Promise<Fresh> {
  const engine = new Engine()
  const catalog = await openCatalog(':memory:')
  const log = new LogLines()
  const lockless = new Proxy(store, {
    get(target, key) {
      if (key === 'lock') return async () => ({ release: () => undefined })
      const value: unknown = Reflect.get(target, key, target)
      return typeof value === 'function' ? (value.bind(target) as unknown) : value
    },
  })
  const drivers = [makeMemoryDriver(() => lockless)]
  const mapper = await openMapper({ catalog, engine, drivers, log, setTimer: () => () => undefined })
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
})
