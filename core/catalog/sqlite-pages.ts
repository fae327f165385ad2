/**
 * Map pages on prepared statements: a point select through a query builder costs ten times as much, and a map has
 * thousands of pages.
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import type Database from 'better-sqlite3'
import { AtollError } from '../errors.ts'
import type { CatalogPages } from './catalog.ts'
import { translateSqliteError } from './sqlite-errors.ts'

/**
 * Pages read by one statement, before others get their turn on the event loop: 2 ms. (Measured with pages of 1200 bytes in a
 * file of 100,000: 3.5 us a page in batches, 6.5 us one by one.)
 */
export const pageBatchMax = 512

export interface PagesContext {
  readonly database: Database.Database
  readonly path: string
  /** Waits until no write of somebody else runs; the value lets go. */
  acquire(): Promise<() => void>
  /** Throws unless the caller is inside a write. */
  requireWrite(): void
}

export class SqlitePages implements CatalogPages {
  readonly #context: PagesContext
  readonly #get: Database.Statement
  readonly #insert: Database.Statement
  readonly #delete: Database.Statement
  readonly #deleteRange: Database.Statement
  readonly #listIds: Database.Statement
  readonly #maxId: Database.Statement
  readonly #usage: Database.Statement

  constructor(context: PagesContext) {
    this.#context = context
    const { database } = context
    this.#get = database
      .prepare('select pages.id, pages.body from json_each(?) as wanted join pages on pages.id = wanted.value')
      .raw()
    this.#insert = database.prepare('insert into pages (id, body) values (?, ?)')
    this.#delete = database.prepare('delete from pages where id = ?')
    this.#deleteRange = database.prepare(
      'delete from pages where id in (select id from pages where id >= ? and id < ? order by id limit ?)',
    )
    this.#listIds = database.prepare('select id from pages where id >= ? and id < ? order by id limit ?').pluck()
    this.#maxId = database.prepare('select coalesce(max(id), 0) from pages').pluck()
    this.#usage = database.prepare('select count(*) as pageCount, coalesce(sum(length(body)), 0) as bodyBytes from pages')
  }

  async get(ids: ArrayLike<number>): Promise<(Uint8Array | undefined)[]> {
    const bodies: (Uint8Array | undefined)[] = []
    for (let start = 0; start < ids.length; start += pageBatchMax) {
      if (start > 0) await nextTurn()
      const batch = Array.prototype.slice.call(ids, start, start + pageBatchMax) as number[]
      const rows = await this.#alone(() => this.#get.all(JSON.stringify(batch)) as [number, Uint8Array][])
      const found = new Map(rows)
      for (const id of batch) bodies.push(found.get(id))
    }
    return bodies
  }

  async insert(ids: ArrayLike<number>, bodies: readonly Uint8Array[]): Promise<void> {
    this.#context.requireWrite()
    if (ids.length !== bodies.length) {
      throw new AtollError('INTERNAL', `${ids.length} page ids with ${bodies.length} bodies`)
    }
    this.#translated(() => {
      for (let index = 0; index < ids.length; index += 1) this.#insert.run(ids[index], bodies[index])
    })
  }

  async delete(ids: ArrayLike<number>): Promise<number> {
    this.#context.requireWrite()
    return this.#translated(() => {
      let count = 0
      for (let index = 0; index < ids.length; index += 1) count += this.#delete.run(ids[index]).changes
      return count
    })
  }

  async deleteRange(firstPageId: number, endPageId: number, limit: number): Promise<number> {
    this.#context.requireWrite()
    return this.#translated(() => this.#deleteRange.run(firstPageId, endPageId, limit).changes)
  }

  listIds(firstPageId: number, endPageId: number, limit: number): Promise<Float64Array> {
    return this.#alone(() => Float64Array.from(this.#listIds.all(firstPageId, endPageId, limit) as number[]))
  }

  maxId(): Promise<number> {
    return this.#alone(() => this.#maxId.get() as number)
  }

  usage(): Promise<{ pageCount: number; bodyBytes: number }> {
    return this.#alone(() => this.#usage.get() as { pageCount: number; bodyBytes: number })
  }

  async #alone<T>(fn: () => T): Promise<T> {
    const release = await this.#context.acquire()
    try {
      return this.#translated(fn)
    } finally {
      release()
    }
  }

  #translated<T>(fn: () => T): T {
    try {
      return fn()
    } catch (error) {
      throw translateSqliteError(error, this.#context.path)
    }
  }
}
