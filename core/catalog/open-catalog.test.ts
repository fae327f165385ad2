import { spawn } from 'node:child_process'
import { readFile, stat, truncate, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { createInterface } from 'node:readline'
import Database from 'better-sqlite3'
import { sql } from 'kysely'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { newId } from '../ids.ts'
import type { Catalog } from './catalog.ts'
import { catalogFormatVersion } from './migrate.ts'
import { openCatalog, type OpenCatalogOptions } from './open-catalog.ts'
import { adminProject } from './schema.ts'
import { insertPool, makeTemporaryFolder, testPoolId, volumeResource } from './testing.ts'

let folder: string
let path: string
const cleanups: (() => Promise<void>)[] = []

beforeEach(async () => {
  const made = await makeTemporaryFolder()
  folder = made.folder
  path = join(folder, 'catalog.db')
  cleanups.push(made.remove)
})

afterEach(async () => {
  for (const cleanup of cleanups.splice(0).toReversed()) await cleanup()
})

async function open(source: string | Uint8Array = path, options: OpenCatalogOptions = {}): Promise<Catalog> {
  const catalog = await openCatalog(source, { reserveBytes: 0, ...options })
  cleanups.push(() => catalog.close())
  return catalog
}

const setMeta = (catalog: Catalog, key: string, value: string, options = {}): Promise<void> =>
  catalog.write(async (tx) => {
    await tx.replaceInto('meta').values({ key, value }).execute()
  }, options)

const readMeta = async (catalog: Catalog, key: string): Promise<string | undefined> =>
  (await catalog.db.selectFrom('meta').select('value').where('key', '=', key).executeTakeFirst())?.value

describe('opening', () => {
  test('a new catalog has an id, the format version of this build and the project admin', async () => {
    const catalog = await open()
    expect(catalog.id).toMatch(/^[0-9a-f-]{36}$/)
    expect(catalog.formatVersion).toBe(catalogFormatVersion)
    expect(await readMeta(catalog, 'format_version')).toBe(String(catalogFormatVersion))
    expect(await catalog.db.selectFrom('projects').select(['id', 'name']).execute()).toEqual([adminProject])
  })

  test('a catalog keeps its id and its rows when it is opened again', async () => {
    const first = await open()
    await setMeta(first, 'k', 'v')
    await first.close()
    const second = await open()
    expect(second.id).toBe(first.id)
    expect(await readMeta(second, 'k')).toBe('v')
  })

  test('the log mode, the sync level and foreign keys are as durability needs them', async () => {
    const catalog = await open()
    const pragma = async (name: string): Promise<unknown> => {
      const { rows } = await sql.raw<Record<string, unknown>>(`pragma ${name}`).execute(catalog.db)
      return Object.values(rows[0] ?? {})[0]
    }
    expect(await pragma('journal_mode')).toBe('wal')
    expect(await pragma('synchronous')).toBe(2)
    expect(await pragma('foreign_keys')).toBe(1)
    await setMeta(catalog, 'k', 'v', { durable: false })
    expect(await pragma('synchronous')).toBe(2)
  })

  test('a catalog of a newer version is refused with both versions and is left as it is', async () => {
    const catalog = await open()
    await setMeta(catalog, 'format_version', '999')
    await catalog.close()
    const before = await readFile(path)
    await expect(open()).rejects.toMatchObject({
      code: 'FORMAT_VERSION',
      values: { foundVersion: 999, knownVersion: catalogFormatVersion, path },
    })
    expect((await readFile(path)).equals(before)).toBe(true)
  })

  test('a folder that is missing is named', async () => {
    const missing = join(folder, 'nowhere', 'catalog.db')
    await expect(open(missing)).rejects.toMatchObject({ code: 'CATALOG_ERROR', message: expect.stringContaining('nowhere') })
  })

  test('a second process is refused with the owner of the catalog', async () => {
    await open(path, { ownerText: 'pid 4711' })
    await expect(open()).rejects.toMatchObject({ code: 'CATALOG_LOCKED', values: { owner: 'pid 4711' } })
  })

  test('a file that is no database is refused with its name and not changed', async () => {
    const text = 'this is not a database, whatever its name says. '.repeat(100)
    await writeFile(path, text)
    await expect(open()).rejects.toMatchObject({ code: 'CATALOG_CORRUPT', values: { path } })
    expect(await readFile(path, 'utf8')).toBe(text)
  })

  test('a database of something else is refused and not changed', async () => {
    const other = new Database(path)
    other.exec('create table recipes (id integer primary key)')
    other.close()
    const before = await readFile(path)
    await expect(open()).rejects.toMatchObject({ code: 'CATALOG_CORRUPT', values: { path } })
    expect((await readFile(path)).equals(before)).toBe(true)
  })

  test('a damaged catalog is named by the query that meets the damage', async () => {
    const catalog = await open()
    await catalog.write(async () => {
      await catalog.pages.insert(
        Array.from({ length: 200 }, (_, index) => index + 1),
        Array.from({ length: 200 }, () => new Uint8Array(4000)),
      )
    })
    await catalog.close()
    await truncate(path, 4096 * 60)
    const damaged = open().then((reopened) => reopened.pages.get(Array.from({ length: 200 }, (_, index) => index + 1)))
    await expect(damaged).rejects.toMatchObject({ code: 'CATALOG_CORRUPT', values: { path } })
  })

  test('a read-only catalog can be opened beside the daemon and refuses writes', async () => {
    const catalog = await open()
    await setMeta(catalog, 'k', 'v')
    const reader = await open(path, { readonly: true })
    expect(await readMeta(reader, 'k')).toBe('v')
    await expect(setMeta(reader, 'k', 'w')).rejects.toMatchObject({ code: 'CATALOG_ERROR' })
  })

  test('bytes of a catalog open as an independent copy in memory', async () => {
    const catalog = await open()
    await setMeta(catalog, 'k', 'v')
    const copy = await open(await catalog.serialize())
    expect(copy.id).toBe(catalog.id)
    await setMeta(copy, 'k', 'w')
    expect(await readMeta(catalog, 'k')).toBe('v')
    expect(await readMeta(await open(await copy.serialize()), 'k')).toBe('w')
  })
})

describe('transactions', () => {
  test('a throw rolls everything back and passes through', async () => {
    const catalog = await open()
    const failure = new Error('changed my mind')
    const attempt = catalog.write(async (tx) => {
      await tx.insertInto('meta').values({ key: 'k', value: 'v' }).execute()
      throw failure
    })
    await expect(attempt).rejects.toBe(failure)
    expect(await readMeta(catalog, 'k')).toBeUndefined()
    await setMeta(catalog, 'k', 'next')
    expect(await readMeta(catalog, 'k')).toBe('next')
  })

  test('a read outside never sees half of a write', async () => {
    const catalog = await open()
    const seen: (string | undefined)[] = []
    const reads: Promise<void>[] = []
    await catalog.write(async (tx) => {
      await tx.insertInto('meta').values({ key: 'a', value: '1' }).execute()
      await tx.insertInto('meta').values({ key: 'b', value: '1' }).execute()
    })
    const write = catalog.write(async (tx) => {
      await tx.updateTable('meta').set({ value: '2' }).where('key', '=', 'a').execute()
      for (let turn = 0; turn < 10; turn += 1) await tx.selectFrom('meta').selectAll().execute()
      await tx.updateTable('meta').set({ value: '2' }).where('key', '=', 'b').execute()
    })
    for (let index = 0; index < 5; index += 1) {
      reads.push(
        catalog.read(async (tx) => {
          const rows = await tx.selectFrom('meta').select('value').where('key', 'in', ['a', 'b']).execute()
          seen.push(rows.map((row) => row.value).join(''))
        }),
      )
    }
    await Promise.all([write, ...reads])
    expect(new Set(seen)).toEqual(new Set(['22']))
  })

  test('writes run one after the other, in the order they came', async () => {
    const catalog = await open()
    const order: number[] = []
    await Promise.all(
      Array.from({ length: 20 }, (_, index) =>
        catalog.write(async (tx) => {
          order.push(index)
          await tx.selectFrom('meta').selectAll().execute()
          order.push(index)
        }),
      ),
    )
    expect(order).toEqual(Array.from({ length: 20 }, (_, index) => [index, index]).flat())
  })

  test('a query on catalog.db and a second write inside of a write are refused instead of waiting for ever', async () => {
    const catalog = await open()
    const query = catalog.write(() => readMeta(catalog, 'k'))
    await expect(query).rejects.toMatchObject({ code: 'INTERNAL' })
    const nested = catalog.write(() => setMeta(catalog, 'k', 'v'))
    await expect(nested).rejects.toMatchObject({ code: 'INTERNAL' })
    expect(await readMeta(catalog, 'k')).toBeUndefined()
  })

  test('commits are announced with their durability, failed ones are not', async () => {
    const catalog = await open()
    const events: boolean[] = []
    const stop = catalog.onCommit(({ durable }) => events.push(durable))
    await setMeta(catalog, 'k', '1')
    await setMeta(catalog, 'k', '2', { durable: false })
    await expect(catalog.write(() => Promise.reject(new Error('no')))).rejects.toThrow('no')
    stop()
    await setMeta(catalog, 'k', '3')
    expect(events).toEqual([true, false])
  })

  test('a closed catalog refuses reads and writes, and closing again is harmless', async () => {
    const catalog = await open()
    await Promise.all([catalog.close(), catalog.close()])
    await expect(setMeta(catalog, 'k', 'v')).rejects.toMatchObject({ code: 'CATALOG_CLOSED' })
    await expect(readMeta(catalog, 'k')).rejects.toMatchObject({ code: 'CATALOG_CLOSED' })
    await expect(catalog.pages.maxId()).rejects.toMatchObject({ code: 'CATALOG_CLOSED' })
    await expect(catalog.serialize()).rejects.toMatchObject({ code: 'CATALOG_CLOSED' })
  })

  test('close waits for the write that is running', async () => {
    const catalog = await open()
    const write = setMeta(catalog, 'k', 'v')
    await Promise.all([write, catalog.close()])
    expect(await readMeta(await open(), 'k')).toBe('v')
  })

  test('after a disk error in a commit every write is refused until the catalog is opened again', async () => {
    let fail = false
    const catalog = await open(path, {
      commitWith: (commit) => {
        if (fail) throw new Database.SqliteError('disk I/O error', 'SQLITE_IOERR_FSYNC')
        commit()
      },
    })
    await setMeta(catalog, 'k', '1')
    fail = true
    await expect(setMeta(catalog, 'k', '2')).rejects.toMatchObject({ code: 'CATALOG_ERROR' })
    fail = false
    await expect(setMeta(catalog, 'k', '3')).rejects.toMatchObject({ code: 'CATALOG_BROKEN' })
    expect(await readMeta(catalog, 'k')).toBe('1')
    await catalog.close()
    await setMeta(await open(), 'k', '4')
  })
})

describe('a commit that a kill follows', () => {
  test('is there, and the lock of the killed process is gone', async () => {
    const module = JSON.stringify(join(import.meta.dirname, 'open-catalog.ts'))
    const script = `
      const { openCatalog } = await import(${module})
      const { writeSync } = await import('node:fs')
      const catalog = await openCatalog(${JSON.stringify(path)}, { reserveBytes: 0 })
      for (let count = 1; ; count += 1) {
        await catalog.write(async (tx) => {
          await tx.replaceInto('meta').values([{ key: 'a', value: String(count) }, { key: 'b', value: String(count) }]).execute()
          await catalog.pages.insert([count], [new Uint8Array(8)])
        })
        // Waits where console.log would keep lines that nobody reads yet: they would be lost with the process.
        writeSync(1, count + '\\n')
      }`
    const child = spawn(process.execPath, ['--input-type=module', '-e', script], { stdio: ['ignore', 'pipe', 'inherit'] })
    let acknowledged = 0
    for await (const line of createInterface({ input: child.stdout })) {
      acknowledged = Number(line)
      if (acknowledged === 50) child.kill('SIGKILL')
    }
    const catalog = await open()
    const found = await catalog.pages.maxId()
    // At most the one that was under way when the kill came is there beside.
    expect(found - acknowledged).toBeOneOf([0, 1])
    expect([await readMeta(catalog, 'a'), await readMeta(catalog, 'b')]).toEqual([String(found), String(found)])
  })
})

describe('rows', () => {
  test('a root word keeps all its bits, also through an alias and RETURNING, and other integers are numbers', async () => {
    const catalog = await open()
    const id = newId()
    const word = (2n << 60n) | 123_456_789n
    const returned = await catalog.write(async (tx) => {
      await insertPool(tx)
      return tx
        .insertInto('resources')
        .values(volumeResource(id, { root_word: word, size_bytes: 512 * 2 ** 40 }))
        .returning(['root_word', 'size_bytes'])
        .executeTakeFirstOrThrow()
    })
    expect(returned).toEqual({ root_word: word, size_bytes: 2 ** 49 })
    const read = await catalog.db
      .selectFrom('resources')
      .select(['root_word as word', 'size_bytes as size', 'parent_id'])
      .execute()
    expect(read).toEqual([{ word, size: 2 ** 49, parent_id: null }])
    const found = await catalog.db.selectFrom('resources').select('id').where('root_word', '=', word).execute()
    expect(found).toEqual([{ id }])
  })

  test('booleans and objects come back as they were', async () => {
    const catalog = await open()
    const [volume, attachment] = [newId(), newId()]
    await catalog.write(async (tx) => {
      await insertPool(tx)
      await tx.insertInto('resources').values(volumeResource(volume)).execute()
      await tx
        .insertInto('attachments')
        .values({
          id: attachment,
          project_id: adminProject.id,
          volume_id: volume,
          protocol: 'nbd',
          read_only: true,
          shared: false,
          options: { list: [1, 'two', null] },
          created_at: 5,
        })
        .execute()
    })
    const row = await catalog.db.selectFrom('attachments').selectAll().executeTakeFirstOrThrow()
    expect(row).toMatchObject({ read_only: true, shared: false, options: { list: [1, 'two', null] } })
    expect((await catalog.db.selectFrom('pools').select('options').executeTakeFirstOrThrow()).options).toEqual({ capacity: '1G' })
  })

  test('an alias of a layer is never given out twice', async () => {
    const catalog = await open()
    const insert = (): Promise<number> =>
      catalog.write(async (tx) => {
        const row = {
          id: newId(),
          project_id: adminProject.id,
          volume_id: null,
          state: 'making' as const,
          epoch: 0,
          created_at: 1,
        }
        return (await tx.insertInto('layers').values(row).returning('alias').executeTakeFirstOrThrow()).alias
      })
    const first = await insert()
    await catalog.write((tx) => tx.deleteFrom('layers').where('alias', '=', first).execute())
    expect(await insert()).toBe(first + 1)
  })

  test('rows that refer to each other may be written in any order, and a dangling one fails the commit', async () => {
    const catalog = await open()
    const id = newId()
    const layer = { id: newId(), project_id: adminProject.id, volume_id: id, state: 'active' as const, epoch: 1, created_at: 1 }
    const dangling = catalog.write((tx) => tx.insertInto('layers').values(layer).execute())
    await expect(dangling).rejects.toMatchObject({ code: 'CATALOG_CONSTRAINT' })
    await catalog.write(async (tx) => {
      await tx.insertInto('layers').values(layer).execute()
      await tx.insertInto('resources').values(volumeResource(id)).execute()
      await insertPool(tx)
    })
    expect(await catalog.db.selectFrom('layers').select('volume_id').execute()).toEqual([{ volume_id: id }])
  })

  test('a volume cannot go before its snapshots, and a clone outlives what it was made from', async () => {
    const catalog = await open()
    const [volume, snapshot, clone] = [newId(), newId(), newId()]
    await catalog.write(async (tx) => {
      await insertPool(tx)
      await tx.insertInto('resources').values(volumeResource(volume)).execute()
      await tx
        .insertInto('resources')
        .values(volumeResource(snapshot, { kind: 'snapshot', volume_id: volume }))
        .execute()
      await tx
        .insertInto('resources')
        .values(volumeResource(clone, { parent_id: snapshot }))
        .execute()
    })
    const remove = (...ids: string[]): Promise<unknown> =>
      catalog.write(async (tx) => {
        for (const id of ids) await tx.deleteFrom('resources').where('id', '=', id).execute()
      })
    await expect(remove(volume)).rejects.toMatchObject({ code: 'CATALOG_CONSTRAINT' })
    await remove(volume, snapshot)
    expect(await catalog.db.selectFrom('resources').select(['id', 'parent_id']).execute()).toEqual([
      { id: clone, parent_id: null },
    ])
  })

  test('states, kinds and sizes that do not exist are refused', async () => {
    const catalog = await open()
    await catalog.write((tx) => insertPool(tx))
    const insert = (changes: object): Promise<unknown> =>
      catalog.write((tx) => tx.insertInto('resources').values(volumeResource(newId(), changes)).execute())
    for (const changes of [
      { kind: 'tape' },
      { status: 'fine' },
      { size_bytes: -1 },
      { size_bytes: 2 ** 50 },
      { name: '' },
      { size_bytes: 'big' },
    ]) {
      await expect(insert(changes)).rejects.toMatchObject({ code: 'CATALOG_CONSTRAINT' })
    }
    expect(await catalog.db.selectFrom('resources').select('id').execute()).toEqual([])
  })

  test('two pools cannot have one name', async () => {
    const catalog = await open()
    await catalog.write((tx) => insertPool(tx))
    const again = catalog.write((tx) =>
      tx
        .insertInto('pools')
        .values({ id: newId(), project_id: adminProject.id, name: 'default', driver: 'file', options: {}, created_at: 2 })
        .execute(),
    )
    await expect(again).rejects.toMatchObject({ code: 'CATALOG_CONSTRAINT' })
    expect(await catalog.db.selectFrom('pools').select('id').execute()).toEqual([{ id: testPoolId }])
  })
})

describe('a full disk', () => {
  test('a write on a full disk changes nothing and says so', async () => {
    const catalog = await open()
    await sql.raw('pragma max_page_count = 64').execute(catalog.db)
    const write = catalog.write(() => catalog.pages.insert([1], [new Uint8Array(2 ** 20)]))
    await expect(write).rejects.toMatchObject({ code: 'NO_SPACE', retryable: true, values: { path } })
    expect(await catalog.pages.maxId()).toBe(0)
    await setMeta(catalog, 'k', 'v')
  })

  test('a sound catalog is found sound, whether it is a file or in memory', async () => {
    for (const catalog of [await open(), await open(':memory:')]) {
      await catalog.write(async (tx) => await insertPool(tx))
      expect(await catalog.verify()).toEqual({ damages: [], dangling: [] })
    }
  })

  test('a catalog is looked at while it is written, and rows that refer to nothing are told', async () => {
    const catalog = await open()
    const other = new Database(path)
    other.pragma('foreign_keys = off')
    other.prepare("insert into attachments values ('a', ?, 'gone', 'nbd', 0, 0, '{}', 0, null)").run(adminProject.id)
    other.close()
    const [faults] = await Promise.all([catalog.verify(), setMeta(catalog, 'k', 'v')])
    expect(faults).toEqual({ damages: [], dangling: [{ table: 'attachments', rowId: 1, parent: 'resources' }] })
  })

  test('a catalog whose file is damaged says so', async () => {
    const catalog = await open()
    await catalog.write(async (tx) => await insertPool(tx))
    const rootPage = await sql
      .raw<{ rootpage: number }>("select rootpage from sqlite_schema where name = 'pools'")
      .execute(catalog.db)
    await catalog.close()
    const file = await readFile(path)
    // The header of the b-tree page.
    file.fill(0xff, ((rootPage.rows[0]?.rootpage ?? 0) - 1) * 4096, ((rootPage.rows[0]?.rootpage ?? 0) - 1) * 4096 + 8)
    await writeFile(path, file)
    const { damages } = await (await open()).verify()
    expect(damages.length).toBeGreaterThan(0)
  })

  test('an emergency write gives up as much of the reserve as it needs', async () => {
    const reserveBytes = 4 * 2 ** 20
    const catalog = await open(path, { reserveBytes })
    const reserve = join(folder, 'catalog.reserve')
    expect((await stat(reserve)).size).toBe(reserveBytes)
    let attempts = 0
    await catalog.write(
      async (tx) => {
        attempts += 1
        // Stands for a disk on which there is space again when a little of the reserve is gone.
        const { size } = await stat(reserve)
        await sql.raw(`pragma max_page_count = ${size < reserveBytes - 2 ** 20 ? 100_000 : 64}`).execute(tx)
        await catalog.pages.insert([1], [new Uint8Array(2 ** 20)])
      },
      { emergency: true },
    )
    expect(attempts).toBeGreaterThan(2)
    expect(await catalog.pages.maxId()).toBe(1)
    expect((await stat(reserve)).size).toBeGreaterThan(reserveBytes / 2)
    expect(await catalog.restoreReserve()).toBe(reserveBytes)
    expect((await stat(reserve)).size).toBe(reserveBytes)
    await catalog.releaseReserve()
    await catalog.releaseReserve()
    await expect(stat(reserve)).rejects.toThrow('ENOENT')
  })

  test('a commit that is lost for lack of space in the index of the log cannot come back', async () => {
    let failures = 0
    const catalog = await open(path, {
      reserveBytes: 4096,
      commitWith: (commit) => {
        if (failures === 0) {
          failures += 1
          throw new Database.SqliteError('disk I/O error', 'SQLITE_IOERR_SHMSIZE')
        }
        commit()
      },
    })
    await expect(setMeta(catalog, 'k', 'lost')).rejects.toMatchObject({ code: 'NO_SPACE' })
    // Another commit has taken its place, on the space of the reserve.
    expect(await readMeta(catalog, 'lost_commit_at')).toMatch(/^\d+$/)
    await expect(stat(join(folder, 'catalog.reserve'))).rejects.toThrow('ENOENT')
    expect(await readMeta(catalog, 'k')).toBeUndefined()
    await setMeta(catalog, 'k', 'v')
  })

  test('an emergency write that fails again reports the full disk', async () => {
    const catalog = await open(path, { reserveBytes: 4096 })
    await sql.raw('pragma max_page_count = 64').execute(catalog.db)
    const write = catalog.write(() => catalog.pages.insert([1], [new Uint8Array(2 ** 20)]), { emergency: true })
    await expect(write).rejects.toMatchObject({ code: 'NO_SPACE' })
  })
})
