import { cp, readFile, rm } from 'node:fs/promises'
import { existsSync } from 'node:fs'
import { join } from 'node:path'
import { connect } from '@atoll/nbd-client'
import { describe, expect, test } from 'vitest'
import { TestHome } from '../test-home.ts'
import {
  attach,
  check,
  expectOnlyBroken,
  expectServed,
  inCatalog,
  layerPath,
  layersOf,
  makeOther,
  mebibyte,
  pattern,
  show,
  slotBytes,
} from './broken-home.ts'

describe('a catalog that is older than the pool', () => {
  test('opens no volume that has newer bytes, keeps every file, and the newer catalog finds everything again', async () => {
    await using home = await TestHome.create()
    const catalog = join(home.path, 'catalog.db')
    const [older, newer] = [join(home.path, 'older.db'), join(home.path, 'newer.db')]
    await home.start()
    await makeOther(home)
    // One that a snapshot makes newer, and one that only its journal does; `idle` is detached whenever a catalog is copied.
    const disks = ['snapped', 'written', 'idle']
    for (const disk of disks) {
      home.cli('volume', 'create', disk, '--size', '16M')
      home.cli('snapshot', 'create', `${disk}@base`)
      await using client = await attach(home, disk)
      await client.write(0, pattern(1, mebibyte))
      await client.flush()
    }
    home.cli('volume', 'detach', 'idle')
    expect(await home.end()).toBe(0)
    await cp(catalog, older)

    await home.start()
    for (const disk of disks) {
      await using client = await attach(home, disk)
      await client.write(mebibyte, pattern(2, mebibyte))
      await client.flush()
    }
    home.cli('volume', 'detach', 'idle')
    home.cli('snapshot', 'create', 'snapped@later')
    home.cli('volume', 'create', 'made', '--size', '16M')
    const made = await attach(home, 'made')
    await made.write(0, pattern(3, mebibyte))
    await made.disconnect()
    expect(await home.end()).toBe(0)
    const newLayers = [layersOf(home, 'made').active, layersOf(home, 'snapped').active]
    const newBytes = await Promise.all(newLayers.map((id) => readFile(layerPath(home, id))))
    await cp(catalog, newer)

    await cp(older, catalog)
    await home.start()
    await expectOnlyBroken(home, 'snapped', 'CATALOG_BEHIND')
    await expectOnlyBroken(home, 'written', 'CATALOG_BEHIND')
    // That `idle` is behind is seen before anything of it is shared.
    expect(home.fail('snapshot', 'diff', 'idle@base', 'idle')).toBe('CATALOG_BEHIND')
    for (const disk of disks) {
      expect(home.fail('snapshot', 'create', `${disk}@now`)).toBe('CATALOG_BEHIND')
      expect(home.fail('volume', 'create', 'copy', '--from', `volume:${disk}`)).toBe('CATALOG_BEHIND')
      expect(home.fail('volume', 'resize', disk, '32M')).toBe('CATALOG_BEHIND')
    }
    home.cli('volume', 'detach', 'snapped')
    home.cli('volume', 'detach', 'written')
    expect(home.fail('volume', 'show', 'made')).toBe('VOLUME_NOT_FOUND')

    // The layer of `made` was a spare as this catalog knows it. It is no spare any more: nobody gets its bytes.
    const unknown = check(home).filter(({ kind }) => kind === 'layer-unknown')
    expect(unknown.map(({ object }) => object)).toContain(newLayers[0])
    for (let index = 0; index < 12; index += 1) {
      home.cli('volume', 'create', `fresh-${index}`, '--size', '16M')
      await using fresh = await attach(home, `fresh-${index}`)
      expect(await fresh.read(0, mebibyte)).toEqual(Buffer.alloc(mebibyte))
      await fresh.write(0, pattern(9, slotBytes))
      await fresh.flush()
    }
    home.cli('pool', 'reclaim', 'default')
    expect(check(home).filter(({ kind }) => kind === 'layer-unknown')).toEqual(unknown)
    expect(await Promise.all(newLayers.map((id) => readFile(layerPath(home, id))))).toEqual(newBytes)
    expect(await home.end()).toBe(0)

    // The newer catalog is found after all.
    await cp(newer, catalog)
    await home.start()
    for (const disk of disks) {
      await using client = await attach(home, disk)
      expect(await client.read(0, 2 * mebibyte)).toEqual(Buffer.concat([pattern(1, mebibyte), pattern(2, mebibyte)]))
    }
    await using back = await attach(home, 'made')
    expect(await back.read(0, mebibyte)).toEqual(pattern(3, mebibyte))
    await using later = await attach(home, 'snapped@later')
    expect(await later.read(mebibyte, mebibyte)).toEqual(pattern(2, mebibyte))
    // And what was made meanwhile is unknown to this one, and kept.
    expect(check(home).filter(({ kind }) => kind === 'layer-unknown').length).toBeGreaterThan(0)
    home.cli('volume', 'create', 'last', '--size', '16M')
    await using last = await attach(home, 'last')
    expect(await last.read(0, mebibyte)).toEqual(Buffer.alloc(mebibyte))
    await expectServed(home)
  })
})

describe('a map page', () => {
  interface Page {
    id: number
    body: Buffer
  }

  /** A home that is down, in which `disk` has pages that nothing else has; `tree` has some of its own. */
  async function makePages(home: TestHome): Promise<Page> {
    await home.start()
    await makeOther(home)
    const pageIds = (): number[] =>
      inCatalog(home, (database) => database.prepare('select id from pages order by id').pluck().all() as number[])
    let before: number[] = []
    for (const name of ['tree', 'disk']) {
      if (name === 'disk') {
        await home.end()
        before = pageIds()
        await home.start()
      }
      home.cli('volume', 'create', name, '--size', '64M')
      home.cli('snapshot', 'create', `${name}@base`)
      await using client = await attach(home, name)
      for (const at of [0, 40 * mebibyte]) await client.write(at, pattern(1, slotBytes))
      await client.flush()
    }
    await home.end()
    const own = pageIds().filter((id) => !before.includes(id))
    expect(own.length).toBeGreaterThan(0)
    const [id] = own
    return inCatalog(home, (database) => database.prepare('select id, body from pages where id = ?').get(id)) as Page
  }

  async function expectTreeServed(home: TestHome, snapshot: string): Promise<void> {
    expect(show(home, 'tree')).toMatchObject({ status: 'in-use', error: null, usedBytes: expect.any(Number) as number })
    await using tree = await attach(home, 'tree')
    expect(await tree.read(40 * mebibyte, slotBytes)).toEqual(pattern(1, slotBytes))
    await tree.write(50 * mebibyte, pattern(2, slotBytes))
    await tree.flush()
    await home.jsonMeanwhile('snapshot', 'create', `tree@${snapshot}`)
  }

  test('that is damaged or missing keeps its volume closed, naming page and volume, and no other', async () => {
    await using home = await TestHome.create()
    const page = await makePages(home)
    const edit = (sql: string, ...values: unknown[]): void =>
      inCatalog(home, (database) => void database.prepare(sql).run(...values))

    const damaged = Buffer.from(page.body)
    damaged[damaged.length - 1] = (damaged.at(-1) ?? 0) ^ 1
    edit('update pages set body = ? where id = ?', damaged, page.id)
    await home.start()
    await expectOnlyBroken(home, 'disk', 'PAGE_CORRUPT', `page ${page.id}:`)
    expect(show(home, 'disk').usedBytes).toBe(null)
    await expectTreeServed(home, 'first')
    // A map that cannot be read may refer to anything: nothing sealed is touched.
    home.cli('snapshot', 'delete', 'tree@base')
    const refused = home.failure('pool', 'reclaim', 'default')
    expect(refused.code).toBe('PAGE_CORRUPT')
    expect(refused.message).toContain(show(home, 'disk').id)
    await using base = await attach(home, 'disk@base')
    expect(await base.read(0, slotBytes)).toEqual(Buffer.alloc(slotBytes))
    await home.end()

    edit('delete from pages where id = ?', page.id)
    await home.start()
    await expectOnlyBroken(home, 'disk', 'PAGE_MISSING', `page ${page.id} `)
    await expectTreeServed(home, 'second')
    await home.end()

    edit('insert into pages (id, body) values (?, ?)', page.id, page.body)
    await home.start()
    expect(show(home, 'disk')).toMatchObject({ status: 'in-use', error: null })
    await using disk = await attach(home, 'disk')
    expect(await disk.read(40 * mebibyte, slotBytes)).toEqual(pattern(1, slotBytes))
    home.cli('pool', 'reclaim', 'default')
    await expectTreeServed(home, 'third')
  })

  test('of a volume that is not attached is noticed when somebody looks at it, and the volume can be deleted', async () => {
    await using home = await TestHome.create()
    await home.start()
    await home.end()
    const page = await makePages(home)
    inCatalog(home, (database) => void database.prepare('delete from attachments').run())
    inCatalog(home, (database) => void database.prepare('delete from pages where id = ?').run(page.id))
    await home.start()
    expect(show(home, 'disk')).toMatchObject({ status: 'error', error: { code: 'PAGE_MISSING' }, usedBytes: null })
    expect(show(home, 'other')).toMatchObject({ status: 'available', error: null })
    home.cli('volume', 'delete', 'disk', '--with-snapshots')
    home.cli('pool', 'reclaim', 'default')
    home.cli('volume', 'attach', 'other')
    await expectServed(home)
  })
})

describe('a layer', () => {
  test('whose file is missing keeps its volume closed, naming layer and volume, and no other', async () => {
    await using home = await TestHome.create()
    await home.start()
    await makeOther(home)
    home.cli('volume', 'create', 'disk', '--size', '16M')
    const client = await attach(home, 'disk')
    await client.write(0, pattern(1, mebibyte))
    await client.disconnect()
    home.cli('snapshot', 'create', 'disk@base')
    await home.end()

    const sealed = inCatalog(home, (database) =>
      database.prepare("select id from layers where state = 'sealed'").pluck().all(),
    ) as string[]
    const { active } = layersOf(home, 'disk')
    for (const layerId of [...sealed, active]) {
      const path = layerPath(home, layerId)
      const aside = join(home.path, 'aside')
      await cp(path, aside)
      await rm(path)
      await home.start()
      await expectOnlyBroken(home, 'disk', 'LAYER_MISSING', layerId)
      expect(check(home)).toEqual([expect.objectContaining({ severity: 'error', kind: 'layer-missing', object: layerId })])
      // Nothing makes it anew: an empty file would read as zeros.
      home.cli('pool', 'reclaim', 'default')
      expect(existsSync(path)).toBe(false)
      await home.end()

      await cp(aside, path)
      await home.start()
      expect(check(home)).toEqual([])
      await using back = await connect(show(home, 'disk').attachments[0]?.uri ?? '')
      expect(await back.read(0, mebibyte)).toEqual(pattern(1, mebibyte))
      await expectServed(home)
      await home.end()
    }
  })

  test('that the catalog does not know is reported and survives delete, reclaim and restart', async () => {
    await using home = await TestHome.create()
    await home.start()
    await makeOther(home)
    const layerId = 'a0000000-0000-4000-8000-00000000feed'
    const path = layerPath(home, layerId)
    await cp(layerPath(home, layersOf(home, 'other').active), path)
    const bytes = await readFile(path)
    for (const round of ['first', 'second']) {
      expect(check(home)).toEqual([
        {
          severity: 'warning',
          kind: 'layer-unknown',
          object: layerId,
          message: expect.stringContaining(layerId) as string,
        },
      ])
      home.cli('volume', 'create', round, '--size', '16M')
      home.cli('snapshot', 'create', `${round}@s`)
      home.cli('volume', 'delete', round, '--with-snapshots')
      home.cli('pool', 'reclaim', 'default')
      expect(await readFile(path)).toEqual(bytes)
      await home.end()
      await home.start()
    }
    expect(home.fail('pool', 'delete', 'default')).toBe('POOL_NOT_EMPTY')
    expect(await readFile(path)).toEqual(bytes)
    await expectServed(home)
  })
})
