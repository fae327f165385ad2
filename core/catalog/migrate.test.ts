import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import Database from 'better-sqlite3'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { catalogFormatVersion } from './migrate.ts'
import { createTables } from './migrations/0001-create-tables.ts'
import { migrations } from './migrations/index.ts'
import { openCatalog } from './open-catalog.ts'
import { adminProject } from './schema.ts'
import { kyselyOver, SqliteConnection } from './sqlite-connection.ts'

let folder: string

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'atoll-migrate-'))
})
afterEach(async () => {
  await rm(folder, { recursive: true, force: true })
})

const ids = { catalog: '11111111-1111-4111-8111-111111111111', pool: '22222222-2222-4222-8222-222222222222' }

/** A catalog as the first format had it, with a pool and a volume. */
async function firstFormat(path: string): Promise<void> {
  const database = new Database(path)
  await createTables.up(kyselyOver(new SqliteConnection(database, path), async () => () => {}) as never)
  database.exec(`
    create table meta (key text primary key not null, value text not null) strict;
    insert into meta values ('format_version', '1'), ('catalog_id', '${ids.catalog}'), ('created_at', '1');
    insert into projects values ('${adminProject.id}', 'admin', 1);
    insert into pools values ('${ids.pool}', '${adminProject.id}', 'default', 'memory', '{}', 1);
    insert into resources values ('33333333-3333-4333-8333-333333333333', '${adminProject.id}', 'image', 'old', 4096, 0, 0,
      '${ids.pool}', null, null, 'available', 1, 1);
  `)
  database.close()
}

test('a catalog of the first format is brought to the present one and keeps its rows', async () => {
  const path = join(folder, 'catalog.db')
  await firstFormat(path)
  const catalog = await openCatalog(path, { reserveBytes: 0 })
  try {
    expect(catalog.id).toBe(ids.catalog)
    expect(catalog.formatVersion).toBe(catalogFormatVersion)
    expect(await catalog.db.selectFrom('pools').select(['id', 'name', 'options']).execute()).toEqual([
      { id: ids.pool, name: 'default', options: {} },
    ])
    expect(await catalog.db.selectFrom('resources').select(['name', 'root_word']).execute()).toEqual([
      { name: 'old', root_word: 0n },
    ])
    expect(await catalog.db.selectFrom('containers').selectAll().execute()).toEqual([])
    expect(await catalog.db.selectFrom('files').selectAll().execute()).toEqual([])
  } finally {
    await catalog.close()
  }
})

test('the files of an older catalog are counted when it is brought forward', async () => {
  const path = join(folder, 'catalog.db')
  await firstFormat(path)
  const database = new Database(path)
  const db = kyselyOver(new SqliteConnection(database, path), async () => () => {}) as never
  for (const { up } of migrations.slice(1, 5)) await up(db)
  database.pragma('foreign_keys = off')
  const [project, pool] = [adminProject.id, ids.pool]
  database.exec(`update meta set value = '5' where key = 'format_version';
    insert into containers values ('c', '${project}', 'c', 0, '{}', 1, 1), ('d', '${project}', 'd', 0, '{}', 1, 1);`)
  for (const [id, sizeBytes, isCurrent] of [
    ['f1', 2 ** 49, 1],
    ['f2', 5, 1],
    ['f3', 70, 0],
  ] as const) {
    database.exec(`
      insert into resources values ('${id}', '${project}', 'file', 'f', ${sizeBytes}, 0, 0, '${pool}', null, null, 'available', 1, 1);
      insert into files values ('${id}', '${project}', 'c', '${id}', ${isCurrent}, 0, 0, null, 't', '{}', 1);`)
  }
  database.close()
  const catalog = await openCatalog(path, { reserveBytes: 0 })
  try {
    const counts = async () => await catalog.db.selectFrom('container_counts').selectAll().orderBy('container_id').execute()
    const none = { container_id: 'd', file_count: 0, size_high: 0, size_low: 0 }
    expect(await counts()).toEqual([{ container_id: 'c', file_count: 2, size_high: 2 ** 17, size_low: 5 }, none])
    await catalog.write(async (tx) => void (await tx.deleteFrom('resources').where('id', '=', 'f1').execute()))
    expect(await counts()).toEqual([{ container_id: 'c', file_count: 1, size_high: 0, size_low: 5 }, none])
    await catalog.write(async (tx) => void (await tx.deleteFrom('containers').where('id', '=', 'd').execute()))
    expect(await counts()).toHaveLength(1)
  } finally {
    await catalog.close()
  }
})

test('a name means one current file, which is no delete marker, of a container that is there', async () => {
  const catalog = await openCatalog(':memory:')
  const container = {
    id: 'c',
    project_id: adminProject.id,
    name: 'c',
    versioned: true,
    metadata: { k: 'v' },
    created_at: 1,
    updated_at: 1,
  }
  const pool = { id: ids.pool, project_id: adminProject.id, name: 'p', driver: 'memory', options: {}, created_at: 1 }
  const insert = async (
    id: string,
    file: { name?: string; container_id?: string; is_current?: boolean; delete_marker?: boolean },
  ) =>
    await catalog.write(async (tx) => {
      const common = { id, project_id: adminProject.id, created_at: 1 }
      const root = { size_bytes: 0, root_word: 0n, root_crc: 0, home_pool_id: ids.pool, parent_id: null, volume_id: null }
      await tx
        .insertInto('resources')
        .values({ ...common, ...root, kind: 'file', name: 'f', status: 'available', updated_at: 1 })
        .execute()
      const shape = { container_id: 'c', name: 'n', is_current: true, delete_marker: false, ...file }
      await tx
        .insertInto('files')
        .values({ ...common, ...shape, versioned: false, etag: null, content_type: 't', metadata: {} })
        .execute()
    })
  try {
    await catalog.write(async (tx) => {
      await tx
        .insertInto('pools')
        .values(pool as never)
        .execute()
      await tx.insertInto('containers').values(container).execute()
    })
    await insert('1', {})
    await insert('2', { is_current: false })
    await insert('3', { is_current: false, delete_marker: true })
    await insert('4', { name: 'é'.repeat(512) })
    const refused = { code: 'CATALOG_CONSTRAINT' }
    await expect(insert('5', {})).rejects.toMatchObject(refused)
    await expect(insert('5', { name: 'm', delete_marker: true })).rejects.toMatchObject(refused)
    await expect(insert('5', { name: 'm', container_id: 'd' })).rejects.toMatchObject(refused)
    await expect(insert('5', { name: `${'é'.repeat(512)}x` })).rejects.toMatchObject(refused)
    await expect(insert('5', { name: '' })).rejects.toMatchObject(refused)
    await expect(catalog.write(async (tx) => void (await tx.deleteFrom('containers').execute()))).rejects.toMatchObject(refused)
    await catalog.write(async (tx) => void (await tx.deleteFrom('resources').where('id', '=', '1').execute()))
    const rows = await catalog.db.selectFrom('files').select(['id', 'is_current', 'delete_marker']).orderBy('id').execute()
    expect(rows.slice(0, 2)).toEqual([
      { id: '2', is_current: false, delete_marker: false },
      { id: '3', is_current: false, delete_marker: true },
    ])
    expect(await catalog.db.selectFrom('containers').select(['versioned', 'metadata']).execute()).toEqual([
      { versioned: true, metadata: { k: 'v' } },
    ])
  } finally {
    await catalog.close()
  }
})
