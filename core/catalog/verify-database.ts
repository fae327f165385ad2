/** Asks a database whether it is sound. Long: it reads all of it. */
import type Database from 'better-sqlite3'
import { type CatalogFaults, catalogFaultsMax, type DanglingReference } from './catalog.ts'

export function verifyDatabase(database: Database.Database): CatalogFaults {
  const lines = database.prepare(`pragma integrity_check(${catalogFaultsMax})`).pluck().all() as string[]
  const dangling: DanglingReference[] = []
  const rows = database.prepare('pragma foreign_key_check').iterate() as IterableIterator<{
    table: string
    rowid: number | null
    parent: string
  }>
  for (const row of rows) {
    dangling.push({ table: row.table, rowId: row.rowid ?? 0, parent: row.parent })
    if (dangling.length === catalogFaultsMax) break
  }
  // The foreign keys of a sound database are asked for by themselves.
  return { damages: lines.filter((line) => line !== 'ok'), dangling }
}
