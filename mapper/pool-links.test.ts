import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { adminProject, AtollError, type Catalog, openCatalog } from '@atoll/core'
import { Engine } from '@atoll/native'
import { type Driver, fileDriver } from '@atoll/southbound'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { decodeRecord } from './export-format.ts'
import { loadExport } from './export-load.ts'
import { type Mapper, openMapper } from './mapper.ts'
import { pageOfRoot, rootOf } from './root.ts'
import { addLinks, dropFromLinks, poolLinksKey, readersOf, readLinks, replaceLinks, sourcesOf } from './pool-links.ts'
import { Bench, bytes, leaf, LogLines, slot } from './test-bench.ts'

const projectId = adminProject.id

describe('a clone in another pool than its source', () => {
  let bench: Bench
  let first: string
  let second: string
  beforeEach(async () => {
    bench = await Bench.open({ pools: 2 })
    first = bench.poolIds[0] ?? ''
    second = bench.poolIds[1] ?? ''
  })
  afterEach(async () => await bench.close())

  /** A volume of the first pool with two slots, a snapshot of it, and a clone of that in the second pool. */
  async function across() {
    const volume = await bench.volume('disk', leaf)
    await (await bench.attach(volume.id)).write(0, bytes(1, 2 * slot))
    const snapshot = await bench.snapshot(volume.id)
    const clone = await bench.volume('clone', leaf, snapshot.id, second)
    return { volume, snapshot, clone }
  }

  const stored = async (poolId: string): Promise<number> => (await bench.mapper.pools.status(poolId)).storedBytes
  const readsFrom = async (id: string): Promise<string[]> => (await bench.mapper.readsFrom(id)).map((pool) => pool.name)

  test('shares every byte with it, and writes into its own pool', async () => {
    const { volume, snapshot, clone } = await across()
    expect(await stored(second)).toBe(0)
    expect(await readsFrom(clone.id)).toEqual(['pool'])
    expect(await readsFrom(volume.id)).toEqual([])
    expect(await readsFrom(snapshot.id)).toEqual([])
    const before = await stored(first)
    await (await bench.attach(clone.id)).write(slot, bytes(2, 2 * slot))
    expect(await bench.read(clone.id, 0, 4 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2, 2 * slot), bytes(0)]))
    expect(await bench.read(volume.id, 0, 3 * slot)).toEqual(Buffer.concat([bytes(1, 2 * slot), bytes(0)]))
    expect(await stored(second)).toBe(2 * slot)
    expect(await stored(first)).toBe(before)
  })

  test('needs its pool also when it has written everything itself, and so does what is made of it', async () => {
    const { clone } = await across()
    const image = await bench.mapper.createImage({ projectId, name: 'image', fromId: clone.id })
    const device = await bench.attach(clone.id)
    await device.write(0, bytes(2, 2 * slot))
    await device.discard(2 * slot, leaf - 2 * slot)
    await bench.mapper.checkpoint(clone.id)
    // Beyond its end its map names what the source's did: it may grow, and the layer must be there.
    expect(await readsFrom(clone.id)).toEqual(['pool'])
    expect(await readsFrom(image.id)).toEqual(['pool'])
    const back = await bench.volume('back', leaf, clone.id, first)
    expect(await readsFrom(back.id)).toEqual(['pool-2'])
  })

  test('keeps what it reads, and nothing else, when the source is deleted', async () => {
    const { volume, clone } = await across()
    const device = await bench.attach(clone.id)
    await device.write(slot, bytes(2))
    await bench.mapper.close(volume.id)
    await bench.mapper.deleteResource(volume.id, { withSnapshots: true })
    // Of one pool or the other: the maps of both are asked.
    await bench.mapper.reclaim(first)
    expect(await bench.read(clone.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2)]))
    expect(await stored(first)).toBe(slot)
    await bench.restart()
    expect(await bench.read(clone.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2)]))
    await bench.mapper.reclaim(second)
    expect(await bench.findLeak()).toBe(null)
  })

  test('keeps the pool of its source from being deleted, by its name', async () => {
    const { volume, clone } = await across()
    await bench.mapper.close(volume.id)
    await bench.mapper.deleteResource(volume.id, { withSnapshots: true })
    await bench.mapper.reclaim(null)
    const refused = (await bench.mapper.pools.delete(first).catch((error: unknown) => error)) as AtollError
    expect(refused).toMatchObject({ code: 'POOL_NOT_EMPTY', values: { resourceCount: 0, readerIds: [clone.id] } })
    expect(refused.message).toContain('volume "clone"')
    await bench.mapper.deleteResource(clone.id)
    await bench.mapper.reclaim(null)
    await bench.mapper.pools.delete(first)
    expect(await bench.inner.db.selectFrom('pools').select('id').execute()).toEqual([{ id: second }])
    expect(await bench.mapper.pools.links(second)).toEqual({ readers: [], sources: [] })
  })

  test('has its map in the export of its pool once, however many are made, and again when a new base had no use for it', async () => {
    const { volume, snapshot, clone } = await across()
    // Pages of several leaves.
    const device = bench.mapper.opened(volume.id)?.device
    expect(device).not.toBe(undefined)
    await device?.write(4 * slot, bytes(3))
    const later = await bench.snapshot(volume.id, 'later')
    const { store } = bench.place(second)
    const pagesIn = async (): Promise<number[]> => {
      const ids: number[] = []
      for (const name of await store.listRecords('export.delta.'))
        for (const page of decodeRecord(name, (await store.readRecord(name)) ?? new Uint8Array()).pages) ids.push(page.id)
      return ids
    }
    const first = await pagesIn()
    const others = [await bench.volume('a', leaf, later.id, second), await bench.volume('b', leaf, later.id, second)]
    const all = await pagesIn()
    expect(all.length).toBeGreaterThan(first.length)
    expect(new Set(all).size).toBe(all.length)
    const isExported = async (id: string): Promise<boolean> => {
      const page = pageOfRoot(rootOf(await bench.row(id)))
      return page === undefined || (await loadExport(store))?.pages.has(page) === true
    }
    for (const { id } of [clone, ...others]) expect(await isExported(id)).toBe(true)
    for (const { id } of others) await bench.mapper.deleteResource(id)
    // Damaged, it is written anew; then nothing in this pool needs the later map.
    const [name = ''] = await store.listRecords('export.base.')
    await store.writeRecord(name, bytes(0, 100))
    const { repaired } = await bench.mapper.check({ subjects: ['exports'], repair: true })
    expect(repaired).toBeGreaterThan(0)
    const again = await bench.volume('c', leaf, later.id, second)
    for (const { id } of [clone, again]) expect(await isExported(id)).toBe(true)
    expect(await bench.read(again.id, 4 * slot, slot)).toEqual(bytes(3))
    expect(await bench.read(snapshot.id, 4 * slot, slot)).toEqual(bytes(0))
  })

  test('is no reason to wait for its pool any more when it is deleted', async () => {
    const { volume, clone } = await across()
    await (await bench.attach(clone.id)).write(0, bytes(2))
    await bench.mapper.close(clone.id)
    await bench.mapper.reclaim(null)
    expect((await bench.mapper.pools.links(first)).readers.map((pool) => pool.name)).toEqual(['pool-2'])
    await bench.mapper.deleteResource(clone.id)
    bench.place(second).faulty.setFaults({ seed: 1, rules: [{ operation: 'record-write', errno: 5 }] })
    await bench.mapper.reclaim(null)
    // What its pool says of itself still names it.
    expect((await bench.mapper.pools.links(first)).readers.map((pool) => pool.name)).toEqual(['pool-2'])
    bench.place(second).faulty.setFaults({ seed: 1, rules: [] })
    bench.timers.fire()
    await bench.mapper.idle()
    await bench.mapper.reclaim(null)
    expect(await bench.mapper.pools.links(first)).toEqual({ readers: [], sources: [] })
    bench.place(second).faulty.setFaults({ seed: 1, rules: [{ operation: 'record-write', errno: 5 }] })
    await bench.mapper.close(volume.id)
    await bench.mapper.deleteResource(volume.id, { withSnapshots: true })
    await bench.mapper.reclaim(first)
    expect(await stored(first)).toBe(0)
  })

  test('is waited for when it is made of one that is deleted, through a pool between', async () => {
    const { volume, clone } = await across()
    const third = (await bench.mapper.pools.create({ projectId, name: 'pool-3', driver: 'memory', options: {} })).id
    const far = await bench.volume('far', leaf, clone.id, third)
    await bench.mapper.deleteResource(clone.id)
    await bench.mapper.close(volume.id)
    await bench.mapper.deleteResource(volume.id, { withSnapshots: true })
    for (let round = 0; round < 2; round += 1) await bench.mapper.reclaim(null)
    expect((await bench.mapper.pools.links(first)).readers.map((pool) => pool.name)).toEqual(['pool-3'])
    expect(await bench.read(far.id, 0, 2 * slot)).toEqual(bytes(1, 2 * slot))
    expect(await bench.findLeak()).toBe(null)
  })

  test('is whole or not there, whatever write of the catalog a kill comes before', async () => {
    const volume = await bench.volume('disk', leaf)
    await (await bench.attach(volume.id)).write(0, bytes(1, 2 * slot))
    let made = false
    for (let allowed = 0; !made && allowed < 30; allowed += 1) {
      let left = allowed
      bench.failing.beforeWrite = () => {
        left -= 1
        if (left < 0) throw new Error('this process is dead')
      }
      made = await bench.volume(`clone-${allowed}`, leaf, volume.id, second).then(
        () => true,
        () => false,
      )
      await bench.kill()
      const rows = await bench.inner.db.selectFrom('resources').select(['id', 'home_pool_id']).execute()
      for (const { id, home_pool_id: home } of rows) {
        expect(await bench.read(id, 0, 3 * slot)).toEqual(Buffer.concat([bytes(1, 2 * slot), bytes(0)]))
        expect(await readsFrom(id)).toEqual(await namesOf(await bench.poolsNamedBy(id, home)))
      }
      await bench.mapper.reclaim(null)
      expect(await bench.findLeak()).toBe(null)
      await (await bench.attach(volume.id)).write(0, bytes(1))
    }
    expect(made).toBe(true)
  })

  async function namesOf(poolIds: readonly string[]): Promise<string[]> {
    const rows = await bench.inner.db.selectFrom('pools').select(['id', 'name']).execute()
    return poolIds.map((poolId) => rows.find((row) => row.id === poolId)?.name ?? '')
  }

  test('frees nothing of its source while the export of its own pool cannot be written', async () => {
    const { volume, clone } = await across()
    await bench.mapper.close(volume.id)
    await bench.mapper.deleteResource(volume.id, { withSnapshots: true })
    await (await bench.attach(clone.id)).write(0, bytes(2, 2 * slot))
    bench.place(second).faulty.setFaults({ seed: 1, rules: [{ operation: 'record-write', errno: 5 }] })
    const before = await stored(first)
    await bench.mapper.reclaim(null)
    expect(await stored(first)).toBe(before)
    bench.place(second).faulty.setFaults({ seed: 1, rules: [] })
    bench.timers.fire()
    await bench.mapper.idle()
    await bench.mapper.reclaim(null)
    expect(await stored(first)).toBe(0)
  })
})

describe('links between pools', () => {
  let catalog: Catalog
  beforeEach(async () => {
    catalog = await openCatalog(':memory:')
    await catalog.write(async (tx) => {
      for (const id of ['a', 'b', 'c']) {
        const row = { id, project_id: projectId, name: id, driver: 'memory', options: {}, created_at: 0 }
        await tx.insertInto('pools').values(row).execute()
      }
    })
  })
  afterEach(async () => await catalog.close())

  const names = async (poolId: string): Promise<[string[], string[]]> => {
    const links = await readLinks(catalog.db)
    return [readersOf(links, poolId).map((pool) => pool.name), sourcesOf(links, poolId).map((pool) => pool.name)]
  }

  test('are followed, and outlive the pool between', async () => {
    await catalog.write(async (tx) => {
      await addLinks(tx, [{ reader: 'a', source: 'b' }], [])
      await addLinks(tx, [{ reader: 'b', source: 'c' }], [])
    })
    expect(await names('a')).toEqual([[], ['b', 'c']])
    expect(await names('c')).toEqual([['a', 'b'], []])
    await catalog.write(async (tx) => {
      await dropFromLinks(tx, 'b')
      await tx.deleteFrom('pools').where('id', '=', 'b').execute()
    })
    expect(await names('a')).toEqual([[], ['c']])
    expect(await names('c')).toEqual([['a'], []])
  })

  test('may go round, and each is told of a pool once', async () => {
    await catalog.write(
      async (tx) =>
        await addLinks(
          tx,
          [
            { reader: 'a', source: 'b' },
            { reader: 'b', source: 'a' },
            { reader: 'b', source: 'c' },
          ],
          [],
        ),
    )
    expect(await names('a')).toEqual([['b'], ['b', 'c']])
    const notes = async () =>
      await catalog.db.selectFrom('export_changes').select('pool_id').where('table_name', '=', 'link').execute()
    const before = (await notes()).length
    expect(before).toBe(3)
    await catalog.write(async (tx) => await addLinks(tx, [{ reader: 'a', source: 'c' }], []))
    expect((await notes()).length).toBe(before)
  })

  test('of a catalog that only knew that there are some are taken to be between all pools', async () => {
    await catalog.write(async (tx) => await tx.insertInto('meta').values({ key: poolLinksKey, value: '1' }).execute())
    expect(await names('b')).toEqual([
      ['a', 'c'],
      ['a', 'c'],
    ])
    await catalog.write(async (tx) => await dropFromLinks(tx, 'c'))
    await catalog.write(async (tx) => await tx.deleteFrom('pools').where('id', '=', 'c').execute())
    expect(await names('b')).toEqual([['a'], ['a']])
  })

  test('are left as they are where something was made across pools since they were read', async () => {
    await catalog.write(async (tx) => await addLinks(tx, [{ reader: 'a', source: 'b' }], []))
    const before = await readLinks(catalog.db)
    await catalog.write(async (tx) => await addLinks(tx, [{ reader: 'a', source: 'b' }], []))
    expect(await catalog.write(async (tx) => await replaceLinks(tx, before, []))).toBe(false)
    expect(await names('b')).toEqual([['a'], []])
    const now = await readLinks(catalog.db)
    expect(await catalog.write(async (tx) => await replaceLinks(tx, now, []))).toBe(true)
    expect(await names('b')).toEqual([[], []])
  })

  test('name pools that are not here, until they are', async () => {
    const named = [{ id: 'd', name: 'lost', driver: 'ceph' }]
    await catalog.write(async (tx) => await addLinks(tx, [{ reader: 'd', source: 'a' }], named))
    expect(readersOf(await readLinks(catalog.db), 'a')).toEqual([{ ...named[0], isAbsent: true }])
    const row = { id: 'd', project_id: projectId, name: 'back', driver: 'ceph', options: {}, created_at: 0 }
    await catalog.write(async (tx) => await tx.insertInto('pools').values(row).execute())
    expect(readersOf(await readLinks(catalog.db), 'a')).toEqual([{ id: 'd', name: 'back', driver: 'ceph', isAbsent: false }])
  })
})

describe('pools that read from each other', () => {
  let folder: string
  const unmounted = new Set<string>()
  const closing: (() => Promise<void>)[] = []

  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'atoll-links-'))
  })
  afterEach(async () => {
    for (const close of closing.splice(0).toReversed()) await close()
    unmounted.clear()
    await rm(folder, { recursive: true })
  })

  const driver: Driver = {
    ...fileDriver,
    open: async (context) => {
      if (unmounted.has(context.options['path'] ?? '')) throw new AtollError('POOL_UNAVAILABLE', 'the backend does not answer')
      return await fileDriver.open(context)
    },
  }
  const pathOf = (name: string): string => join(folder, name)
  const place = (name: string) => ({ driver: 'file', options: { path: pathOf(name), reserve: '0' } })
  const importOf = (name: string) => ({ name, ...place(name), takeOver: true, dryRun: false })

  interface Home {
    readonly mapper: Mapper
    readonly catalog: Catalog
    /** Ends it; its catalog, for another one. */
    end(): Promise<Uint8Array>
  }

  async function home(source: Uint8Array | ':memory:' = ':memory:'): Promise<Home> {
    const engine = new Engine()
    const catalog = await openCatalog(source)
    const timers = { log: new LogLines(), setTimer: () => () => undefined }
    const mapper = await openMapper({ catalog, engine, drivers: [driver], ...timers })
    let isClosed = false
    const end = async (): Promise<Uint8Array> => {
      if (isClosed) return new Uint8Array()
      isClosed = true
      await mapper.close()
      await engine.close()
      const copy = await catalog.serialize()
      await catalog.close()
      return copy
    }
    closing.push(async () => void (await end()))
    return { mapper, catalog, end }
  }

  async function read(mapper: Mapper, id: string, offsetBytes: number, lengthBytes: number): Promise<Buffer> {
    const { device } = await mapper.open(id, { holder: 'test', readOnly: true })
    try {
      return Buffer.from(await device.read(offsetBytes, lengthBytes))
    } finally {
      await mapper.close(id)
    }
  }

  /** `base` in the pool `files`, deleted since; its clone `disk` in the pool `fast`, which has written its second slot. */
  async function lost() {
    const { mapper, catalog, end } = await home()
    const files = await mapper.pools.create({ projectId, name: 'files', ...place('files') })
    const fast = await mapper.pools.create({ projectId, name: 'fast', ...place('fast') })
    const base = await mapper.createVolume({ projectId, name: 'base', sizeBytes: 64 * slot, poolId: files.id })
    const { device } = await mapper.open(base.id, { holder: 'test', readOnly: false })
    await device.write(0, bytes(1, 4 * slot))
    const disk = await mapper.createVolume({ projectId, name: 'disk', sizeBytes: 64 * slot, poolId: fast.id, fromId: base.id })
    const opened = await mapper.open(disk.id, { holder: 'test', readOnly: false })
    await opened.device.write(slot, bytes(2))
    await mapper.close(base.id)
    await mapper.deleteResource(base.id)
    return { mapper, catalog, end, files, fast, disk }
  }
  const expected = Buffer.concat([bytes(1), bytes(2), bytes(1)])

  test('say so in their exports when the clone is there', async () => {
    const { mapper, end, files, fast } = await lost()
    const stores = await Promise.all([files, fast].map(async (pool) => (await mapper.pools.handle(pool.id)).store))
    const headers = await Promise.all(stores.map(async (store) => (await loadExport(store))?.header))
    expect(headers[0]?.readers).toEqual([{ id: fast.id, name: 'fast', driver: 'file' }])
    expect(headers[0]?.sources).toBe(undefined)
    expect(headers[1]?.sources).toEqual([{ id: files.id, name: 'files', driver: 'file' }])
    await end()
  })

  for (const order of [
    ['files', 'fast'],
    ['fast', 'files'],
  ]) {
    test(`are imported in the order ${order.join(', ')}, and nothing is missed for a reclaim in between`, async () => {
      const { end, disk } = await lost()
      await end()
      const { mapper, catalog } = await home()
      for (const name of order) {
        await mapper.importPool(importOf(name))
        await mapper.reclaim(null)
      }
      expect(await read(mapper, disk.id, 0, 3 * slot)).toEqual(expected)
      expect((await mapper.check()).findings).toEqual([])
      // Now that all who read are here, what nobody reads is freed.
      const { storedBytes } = await mapper.pools.status((await poolOf(catalog, 'files')).id)
      expect(storedBytes).toBe(3 * slot)
    })
  }

  async function poolOf(catalog: Catalog, name: string) {
    return await catalog.db.selectFrom('pools').selectAll().where('name', '=', name).executeTakeFirstOrThrow()
  }

  test('are missed by name where only the one that reads is imported', async () => {
    const { end, disk, files } = await lost()
    await end()
    const { mapper } = await home()
    const said = await mapper.importPool({ ...importOf('fast'), dryRun: true })
    expect(said).toMatchObject({
      broughtBack: { volume: 0 },
      failed: [{ id: disk.id, code: 'LAYER_MISSING' }],
      missingSources: [{ id: files.id, name: 'files' }],
    })
    expect(said.failed[0]?.reason).toContain('import pool "files"')
    const report = await mapper.importPool(importOf('fast'))
    expect(report.failed).toEqual(said.failed)
    await expect(mapper.open(disk.id, { holder: 'test', readOnly: false })).rejects.toMatchObject({
      code: 'LAYER_MISSING',
      message: expect.stringContaining('import "files" (driver file') as string,
    })
    expect((await mapper.check({ subjects: ['pools'] })).findings.map((finding) => finding.kind)).toEqual(['pool-source-missing'])
  })

  test('that are lost for good are given up, and what only they read is freed', async () => {
    const { end, fast } = await lost()
    await end()
    const { mapper } = await home()
    const report = await mapper.importPool(importOf('files'))
    expect(report).toMatchObject({ failed: [], missingReaders: [{ id: fast.id, name: 'fast' }] })
    const { poolId } = report
    await mapper.reclaim(null)
    expect((await mapper.pools.status(poolId)).storedBytes).toBe(4 * slot)
    const { findings } = await mapper.check()
    expect(findings.map((finding) => finding.kind)).toEqual(['pool-reader-missing'])
    expect(findings[0]?.message).toContain('"fast"')
    await expect(mapper.pools.delete(poolId)).rejects.toMatchObject({
      code: 'POOL_NOT_EMPTY',
      values: { readerIds: [fast.id] },
    })
    expect(await mapper.acceptPool(poolId, { confirmed: false })).toMatchObject({
      accepted: false,
      missingReaders: [{ id: fast.id }],
    })
    await mapper.reclaim(null)
    expect((await mapper.pools.status(poolId)).storedBytes).toBe(4 * slot)
    await mapper.acceptPool(poolId, { confirmed: true })
    await mapper.reclaim(null)
    expect((await mapper.pools.status(poolId)).storedBytes).toBe(0)
    await expect(mapper.acceptPool(poolId, { confirmed: true })).rejects.toMatchObject({ code: 'POOL_NOT_AHEAD' })
    await mapper.pools.delete(poolId)
  })

  test('are needed to open what reads from them, which says so, and harm nothing else', async () => {
    const before = await lost()
    const { fast, disk } = before
    await before.mapper.createVolume({ projectId, name: 'own', sizeBytes: slot, poolId: fast.id })
    const copy = await before.end()
    unmounted.add(pathOf('files'))
    const { mapper, catalog, end } = await home(copy)
    const refused = await mapper.open(disk.id, { holder: 'test', readOnly: false }).catch((error: unknown) => error as AtollError)
    expect(refused).toMatchObject({ code: 'POOL_UNAVAILABLE', values: { resourceId: disk.id, reason: 'POOL_UNAVAILABLE' } })
    expect((refused as AtollError).message).toContain('volume "disk" cannot be opened without another pool')
    expect((refused as AtollError).message).toContain('pool "files"')
    const own = await catalog.db.selectFrom('resources').selectAll().where('name', '=', 'own').executeTakeFirstOrThrow()
    expect(await read(mapper, own.id, 0, slot)).toEqual(bytes(0))
    expect((await mapper.readsFrom(disk.id)).map((pool) => pool.name)).toEqual(['files'])
    expect((await mapper.check({ subjects: ['pools'] })).findings[0]?.message).toContain('what reads from it cannot be opened')
    // The volume is not damaged by what could not be read: it opens when the pool is back.
    unmounted.clear()
    await mapper.pools.open(await poolOf(catalog, 'files'))
    expect(await read(mapper, disk.id, 0, 3 * slot)).toEqual(expected)
    await end()
  })

  test('free nothing while the one that reads is not there to write its export', async () => {
    const before = await lost()
    const copy = await before.end()
    unmounted.add(pathOf('fast'))
    const { mapper, catalog, end } = await home(copy)
    const files = await poolOf(catalog, 'files')
    await mapper.reclaim(null)
    expect((await mapper.pools.status(files.id)).storedBytes).toBe(4 * slot)
    unmounted.clear()
    await mapper.pools.open(await poolOf(catalog, 'fast'))
    await mapper.reclaim(null)
    expect((await mapper.pools.status(files.id)).storedBytes).toBe(3 * slot)
    expect(await read(mapper, before.disk.id, 0, 3 * slot)).toEqual(expected)
    await end()
  })
})
