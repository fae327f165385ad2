/** Brings a catalog to the format of this build, or refuses it. Runs before anything else uses the connection. */
import type Database from 'better-sqlite3'
import { AtollError } from '../errors.ts'
import { migrations } from './migrations/index.ts'
import { adminProject } from './schema.ts'
import { kyselyOver, SqliteConnection } from './sqlite-connection.ts'

/** The format that this build reads and writes. */
export const catalogFormatVersion = migrations.length

/** "Atol": what `file` and a look at the header recognise a catalog by. */
const applicationId = 0x41746f6c

interface NewCatalog {
  id: string
  createdAtMs: number
}

/**
 * The format version that the file says, 0 for an empty file.
 * @throws AtollError CATALOG_CORRUPT if it is a database of something else
 */
export function readFormatVersion(database: Database.Database, path: string): number {
  const tables = new Set(database.prepare("select name from sqlite_schema where type = 'table'").pluck().all())
  if (tables.size === 0) return 0
  const version: unknown = tables.has('meta')
    ? database.prepare("select value from meta where key = 'format_version'").pluck().get()
    : undefined
  if (typeof version !== 'string' || !/^[1-9]\d{0,8}$/.test(version)) {
    throw new AtollError('CATALOG_CORRUPT', `${path} is a database, but not a catalog of Atoll: check the path`, {
      values: { path },
    })
  }
  return Number(version)
}

/**
 * Refuses what this build cannot work with; changes nothing. Returns the version found.
 * @throws AtollError FORMAT_VERSION for a catalog of a newer version, or of an older one that is opened read-only; CATALOG_CORRUPT
 */
export function checkFormatVersion(database: Database.Database, path: string, readonly: boolean): number {
  const found = readFormatVersion(database, path)
  const values = { path, foundVersion: found, knownVersion: catalogFormatVersion }
  if (found > catalogFormatVersion) {
    throw new AtollError(
      'FORMAT_VERSION',
      `the catalog ${path} has format version ${found}, this build knows up to ${catalogFormatVersion}: use the version of Atoll that wrote it, or a later one`,
      { values },
    )
  }
  if (readonly && found < catalogFormatVersion) {
    throw new AtollError(
      'FORMAT_VERSION',
      `the catalog ${path} has format version ${found}, this build works with ${catalogFormatVersion}: start the daemon on it once, which migrates it`,
      { values },
    )
  }
  return found
}

/** Migrates from version `found`, as `checkFormatVersion` returned it, to the one of this build. */
export async function migrate(database: Database.Database, path: string, found: number, fresh: NewCatalog): Promise<void> {
  const db = kyselyOver(new SqliteConnection(database, path), async () => () => {})
  for (let version = found; version < catalogFormatVersion; version += 1) {
    database.exec('begin immediate')
    try {
      if (version === 0) initialise(database, fresh)
      await migrations[version]?.up(db as never)
      if (version === 0) {
        database
          .prepare('insert into projects (id, name, created_at) values (?, ?, ?)')
          .run(adminProject.id, adminProject.name, fresh.createdAtMs)
      }
      database.prepare("update meta set value = ? where key = 'format_version'").run(String(version + 1))
      database.exec('commit')
    } catch (error) {
      if (database.inTransaction) database.exec('rollback')
      throw error
    }
  }
}

function initialise(database: Database.Database, fresh: NewCatalog): void {
  database.pragma(`application_id = ${applicationId}`)
  database.exec('create table meta (key text primary key not null, value text not null) strict')
  const insert = database.prepare('insert into meta (key, value) values (?, ?)')
  insert.run('format_version', '0')
  insert.run('catalog_id', fresh.id)
  insert.run('created_at', String(fresh.createdAtMs))
}
