/**
 * Rows as pools export them (migration 0003 notes their changes): by table and key, whatever columns they have, and which pool
 * each belongs to.
 *
 * A pool's export has the pool's own row, every project and container, the layers with a replica there and these replicas,
 * and the resources that call it home with what else the catalog says of them.
 */
import { type Kysely, sql } from 'kysely'
import type { CatalogTransaction } from './catalog.ts'
import type { JsonValue, Schema } from './schema.ts'

/** The tables whose rows are exported, with the column that names a row. Others are made anew or not needed. */
export const exportedTables = {
  projects: 'id',
  pools: 'id',
  layers: 'alias',
  replicas: 'layer_alias',
  containers: 'id',
  resources: 'id',
  volumes: 'id',
  files: 'id',
} as const
export type ExportedTable = keyof typeof exportedTables
export const exportedTableNames = Object.keys(exportedTables) as ExportedTable[]

/** A row as the catalog gives it, but for `root_word`, which is a decimal text. */
export type ExportedRow = { [column: string]: JsonValue }
export type RowKey = string | number

/** A row and the pool it belongs to; null: every one. */
export interface PoolRowOf {
  readonly row: ExportedRow
  readonly poolId: string | null
}

/** Rows read by one statement. */
export const exportedRowBatch = 500

/** What follows the table's own columns in a select, and where the pool of a row stands. */
const poolOf: Record<ExportedTable, { readonly pool: string; readonly join: string }> = {
  projects: { pool: 'null', join: '' },
  containers: { pool: 'null', join: '' },
  pools: { pool: 't.id', join: '' },
  resources: { pool: 't.home_pool_id', join: '' },
  volumes: { pool: 'r.home_pool_id', join: 'join resources as r on r.id = t.id' },
  files: { pool: 'r.home_pool_id', join: 'join resources as r on r.id = t.id' },
  replicas: { pool: 't.pool_id', join: '' },
  layers: { pool: 'r.pool_id', join: 'join replicas as r on r.layer_alias = t.alias' },
}

const ofEveryPool: ReadonlySet<ExportedTable> = new Set(['projects', 'containers'])

/** The exported tables that this catalog has. */
export async function presentTables(tx: CatalogTransaction): Promise<ExportedTable[]> {
  const { rows } = await sql<{ name: string }>`select name from sqlite_schema where type = 'table'`.execute(tx)
  const names = new Set(rows.map((row) => row.name))
  return exportedTableNames.filter((name) => names.has(name))
}

/** The key of a row. */
export function keyOfRow(table: ExportedTable, row: ExportedRow): RowKey {
  return row[exportedTables[table]] as RowKey
}

/** The rows that the keys name, as far as there are any; a layer once for each of its replicas. */
export async function readRowsByKey(tx: CatalogTransaction, table: ExportedTable, keys: readonly RowKey[]): Promise<PoolRowOf[]> {
  const { pool, join } = poolOf[table]
  const found: PoolRowOf[] = []
  for (let start = 0; start < keys.length; start += exportedRowBatch) {
    const wanted = JSON.stringify(keys.slice(start, start + exportedRowBatch))
    const { rows } = await sql<SelectedRow>`
      select t.*, ${sql.raw(pool)} as export_pool from ${sql.raw(table)} as t ${sql.raw(join)}
      where t.${sql.raw(exportedTables[table])} in (select value from json_each(${wanted}))`.execute(tx)
    for (const row of rows) found.push(asPoolRow(row))
  }
  return found
}

/** Up to `exportedRowBatch` rows of one pool with a key above `after` (null: from the first), by key. */
export async function readRowsOfPool(
  tx: CatalogTransaction,
  table: ExportedTable,
  poolId: string,
  after: RowKey | null,
): Promise<ExportedRow[]> {
  const { pool, join } = poolOf[table]
  const key = sql.raw(`t.${exportedTables[table]}`)
  const inPool = ofEveryPool.has(table) ? sql`true` : sql`${sql.raw(pool)} = ${poolId}`
  const { rows } = await sql<SelectedRow>`
    select t.*, ${sql.raw(pool)} as export_pool from ${sql.raw(table)} as t ${sql.raw(join)}
    where ${inPool} and (${after} is null or ${key} > ${after})
    order by ${key} limit ${exportedRowBatch}`.execute(tx)
  return rows.map((row) => asPoolRow(row).row)
}

type SelectedRow = { export_pool: string | null } & Record<string, unknown>

function asPoolRow({ export_pool: poolId, ...columns }: SelectedRow): PoolRowOf {
  const row: ExportedRow = {}
  for (const [name, value] of Object.entries(columns)) {
    row[name] = (typeof value === 'bigint' ? value.toString() : value) as JsonValue
  }
  return { row, poolId }
}

/** Names of the columns of a table. */
export async function columnsOf(tx: CatalogTransaction, table: ExportedTable): Promise<Set<string>> {
  const { rows } = await sql<{ name: string }>`select name from pragma_table_info(${table})`.execute(tx)
  return new Set(rows.map((row) => row.name))
}

/** Puts an exported row into this catalog; false: `orIgnore` and there is one. @throws AtollError CATALOG_CONSTRAINT for a row that cannot be */
export async function insertExportedRow(
  tx: CatalogTransaction,
  table: ExportedTable,
  row: ExportedRow,
  options: { orIgnore?: boolean } = {},
): Promise<boolean> {
  const values: Record<string, unknown> = { ...row }
  if (table === 'resources') values['root_word'] = BigInt(String(row['root_word']))
  const insert = (tx as unknown as Kysely<Record<string, Record<string, unknown>>>).insertInto(table).values(values)
  const result = await (
    options.orIgnore === true ? insert.onConflict((conflict) => conflict.doNothing()) : insert
  ).executeTakeFirst()
  return (result.numInsertedOrUpdatedRows ?? 0n) > 0n
}

/** The number of the last note that was ever made in the outbox. */
export async function lastExportSeq(tx: CatalogTransaction): Promise<number> {
  return await sequenceOf(tx, 'export_changes')
}

/** The largest alias that was ever given to a layer. */
export async function lastLayerAlias(tx: CatalogTransaction): Promise<number> {
  return await sequenceOf(tx, 'layers')
}

async function sequenceOf(tx: CatalogTransaction, table: keyof Schema): Promise<number> {
  const { rows } = await sql<{ seq: number }>`select seq from sqlite_sequence where name = ${table}`.execute(tx)
  return rows[0]?.seq ?? 0
}

/** From now on new layers get aliases above `alias`. Inside a write. */
export async function raiseLayerAliases(tx: CatalogTransaction, alias: number): Promise<void> {
  await raiseSequence(tx, 'layers', alias)
}

/** From now on new notes in the outbox get numbers above `seq`. Inside a write. */
export async function raiseExportSeq(tx: CatalogTransaction, seq: number): Promise<void> {
  await raiseSequence(tx, 'export_changes', seq)
}

async function raiseSequence(tx: CatalogTransaction, table: keyof Schema, seq: number): Promise<void> {
  if ((await sequenceOf(tx, table)) >= seq) return
  await sql`delete from sqlite_sequence where name = ${table}`.execute(tx)
  await sql`insert into sqlite_sequence (name, seq) values (${table}, ${seq})`.execute(tx)
}
