/**
 * The one SQLite connection of a catalog, as Kysely's driver wants it: runs compiled queries on cached prepared statements
 * and converts the values of the columns that schema.ts names.
 */
import type Database from 'better-sqlite3'
import {
  type CompiledQuery,
  type DatabaseConnection,
  type Dialect,
  type Driver,
  Kysely,
  type QueryResult,
  SqliteAdapter,
  SqliteIntrospector,
  SqliteQueryCompiler,
} from 'kysely'
import { AtollError } from '../errors.ts'
import type { Schema } from './schema.ts'
import { translateSqliteError } from './sqlite-errors.ts'

/** Statements kept prepared; the code has a few hundred different queries at most. */
const statementCountMax = 512

type Codec = 'bigint' | 'boolean' | 'json'

/** By name of the column; a name means the same in every table. */
const codecByColumn: ReadonlyMap<string, Codec> = new Map<string, Codec>([
  ['root_word', 'bigint'],
  ['read_only', 'boolean'],
  ['shared', 'boolean'],
  ['versioned', 'boolean'],
  ['is_current', 'boolean'],
  ['delete_marker', 'boolean'],
  ['is_primary', 'boolean'],
  ['is_copy', 'boolean'],
  ['options', 'json'],
  ['throttle', 'json'],
  ['params', 'json'],
  ['cursor', 'json'],
  ['result', 'json'],
  ['metadata', 'json'],
  ['settings', 'json'],
])

interface PreparedQuery {
  readonly statement: Database.Statement
  /** Names in the result and how they are decoded; empty for most. */
  readonly decoders: readonly (readonly [name: string, codec: Codec])[]
  readonly hasBigint: boolean
}

export class SqliteConnection implements DatabaseConnection {
  readonly #database: Database.Database
  readonly #path: string
  readonly #queries = new Map<string, PreparedQuery>()

  constructor(database: Database.Database, path: string) {
    this.#database = database
    this.#path = path
  }

  // Asynchronous because Kysely and a later server want it so; better-sqlite3 answers at once.
  async executeQuery<R>(compiled: CompiledQuery): Promise<QueryResult<R>> {
    try {
      const query = this.#prepare(compiled.sql)
      const parameters = compiled.parameters.map(encodeParameter)
      if (query.statement.reader) {
        const rows = query.statement.all(parameters) as Record<string, unknown>[]
        if (query.decoders.length > 0) for (const row of rows) decodeRow(row, query)
        return { rows: rows as R[], numAffectedRows: BigInt(rows.length) }
      }
      const { changes, lastInsertRowid } = query.statement.run(parameters)
      return { rows: [], insertId: BigInt(lastInsertRowid), numAffectedRows: BigInt(changes) }
    } catch (error) {
      throw translateSqliteError(error, this.#path)
    }
  }

  // eslint-disable-next-line require-yield -- the interface wants a generator; large results are paged by key instead
  async *streamQuery<R>(): AsyncIterableIterator<QueryResult<R>> {
    throw new AtollError('INTERNAL', 'the catalog does not stream: an open cursor would hold back every write')
  }

  #prepare(sql: string): PreparedQuery {
    const known = this.#queries.get(sql)
    if (known !== undefined) return known
    const statement = this.#database.prepare(sql)
    const decoders: [string, Codec][] = []
    if (statement.reader) {
      for (const { name, column } of statement.columns()) {
        // RETURNING and expressions have no origin: there the name itself counts.
        const codec = codecByColumn.get(column ?? name)
        if (codec !== undefined) decoders.push([name, codec])
      }
    }
    const hasBigint = decoders.some(([, codec]) => codec === 'bigint')
    // Then every integer of the row comes as a bigint, and decodeRow turns the others back into numbers.
    if (hasBigint) statement.safeIntegers(true)
    const query = { statement, decoders, hasBigint }
    if (this.#queries.size >= statementCountMax) {
      const [oldest] = this.#queries.keys()
      if (oldest !== undefined) this.#queries.delete(oldest)
    }
    this.#queries.set(sql, query)
    return query
  }
}

function encodeParameter(value: unknown): unknown {
  if (typeof value === 'boolean') return value ? 1 : 0
  if (value === undefined) return null
  if (typeof value === 'object' && value !== null && !ArrayBuffer.isView(value)) return JSON.stringify(value)
  return value
}

function decodeRow(row: Record<string, unknown>, query: PreparedQuery): void {
  const roots = new Set<string>()
  for (const [name, codec] of query.decoders) {
    const value = row[name]
    if (value === null) continue
    if (codec === 'bigint') roots.add(name)
    else if (codec === 'boolean') row[name] = Number(value) !== 0
    else row[name] = JSON.parse(value as string)
  }
  if (!query.hasBigint) return
  for (const name of Object.keys(row)) {
    const value = row[name]
    if (typeof value === 'bigint' && !roots.has(name)) row[name] = Number(value)
  }
}

/** How a query gets hold of the connection, and how it lets go. */
export type AcquireConnection = () => Promise<() => void>

/** A Kysely over `connection` whose every query first waits for `acquire`. */
export function kyselyOver(connection: SqliteConnection, acquire: AcquireConnection): Kysely<Schema> {
  const dialect: Dialect = {
    createAdapter: () => new CatalogAdapter(),
    createDriver: () => new CatalogDriver(connection, acquire),
    createIntrospector: (db) => new SqliteIntrospector(db),
    createQueryCompiler: () => new SqliteQueryCompiler(),
  }
  return new Kysely<Schema>({ dialect })
}

/** Kysely must not queue by itself: a turn that `acquire` refuses would leave its queue stuck. */
class CatalogAdapter extends SqliteAdapter {
  override get supportsMultipleConnections(): boolean {
    return true
  }
}

class CatalogDriver implements Driver {
  readonly #connection: SqliteConnection
  readonly #acquire: AcquireConnection
  readonly #releases = new WeakMap<DatabaseConnection, () => void>()

  constructor(connection: SqliteConnection, acquire: AcquireConnection) {
    this.#connection = connection
    this.#acquire = acquire
  }

  async init(): Promise<void> {}

  async acquireConnection(): Promise<DatabaseConnection> {
    const release = await this.#acquire()
    const turn: DatabaseConnection = {
      executeQuery: (compiled) => this.#connection.executeQuery(compiled),
      streamQuery: () => this.#connection.streamQuery(),
    }
    this.#releases.set(turn, release)
    return turn
  }

  async releaseConnection(turn: DatabaseConnection): Promise<void> {
    this.#releases.get(turn)?.()
  }

  async beginTransaction(): Promise<void> {
    throw new AtollError('INTERNAL', 'use catalog.write() or catalog.read(), which order transactions')
  }

  async commitTransaction(): Promise<void> {}

  async rollbackTransaction(): Promise<void> {}

  async destroy(): Promise<void> {}
}
