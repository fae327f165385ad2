/**
 * The catalog as the layers above see it. The interface is asynchronous throughout, so that a server in another process can
 * stand behind it.
 *
 * Rules:
 * - One write runs at a time; the others wait in the order they came. Nothing but SQL is awaited inside a write.
 * - A read outside of a write sees committed rows only: it waits for the write that is running.
 * - Inside `write` and `read` only the transaction that was handed in is used; using `db` there is a defect and throws.
 * - A write that returned survives kill -9 and power loss, unless it was asked for with `durable: false`: such a write may be
 *   lost by a power cut, but only together with every later one (commits are never reordered).
 */
import type { Kysely } from 'kysely'
import type { BackupInfo } from './catalog-backup.ts'
import type { Schema } from './schema.ts'

/** What a function inside `write` and `read` gets: the same queries, in one transaction. */
export type CatalogTransaction = Kysely<Schema>

export interface CommitEvent {
  /** False: a power cut may still take the commit back. */
  durable: boolean
}

export interface WriteOptions {
  /** Default true: the commit is on stable storage on return. False: only ordered before every later commit. */
  durable?: boolean
  /**
   * Default false. True: on a full disk the write is tried again on the catalog's reserve, a little of which is given back each
   * time. For what frees space or leads to it (detach, delete, reclaim), and for opening a volume.
   */
  emergency?: boolean
}

/**
 * The bodies of map pages, on prepared statements. `insert` and `delete` are allowed inside `write` only and belong to its
 * transaction; `get` and `maxId` see what the surrounding transaction sees, or committed pages outside of one.
 */
export interface CatalogPages {
  /** The bodies in the order of `ids`; undefined for a page that is not there. At most `pageBatchMax` are read in one go. */
  get(ids: ArrayLike<number>): Promise<(Uint8Array | undefined)[]>
  insert(ids: ArrayLike<number>, bodies: readonly Uint8Array[]): Promise<void>
  /** Deletes the pages; those that are not there are no error. Returns how many were. */
  delete(ids: ArrayLike<number>): Promise<number>
  /** Deletes pages with firstPageId <= id < endPageId, at most `limit` of them (for bounded transactions); returns how many were. */
  deleteRange(firstPageId: number, endPageId: number, limit: number): Promise<number>
  /** Ids of at most `limit` pages with id >= firstPageId and id < endPageId, ascending: how a sweep walks over all pages. */
  listIds(firstPageId: number, endPageId: number, limit: number): Promise<Float64Array>
  /** The largest id in use, 0 if there is none. */
  maxId(): Promise<number>
  /** Number and bytes of all pages. */
  usage(): Promise<{ pageCount: number; bodyBytes: number }>
}

/** A row that refers to one that is not there. */
export interface DanglingReference {
  readonly table: string
  readonly rowId: number
  /** The table in which the other row is missing. */
  readonly parent: string
}

/** What is wrong with the catalog as a database. */
export interface CatalogFaults {
  /** What the database says of its own structure; empty: nothing. At most `catalogFaultsMax`. */
  readonly damages: readonly string[]
  /** At most `catalogFaultsMax`. */
  readonly dangling: readonly DanglingReference[]
}

export const catalogFaultsMax = 100

export interface Catalog {
  /** UUID of this catalog; pools record it as their owner. */
  readonly id: string
  /** The file, or ':memory:'. */
  readonly path: string
  readonly formatVersion: number
  /** Reads. Each query stands alone; several that must agree go into `read`. */
  readonly db: Kysely<Schema>
  readonly pages: CatalogPages

  /** Runs queries that see one state of the catalog. */
  read<T>(fn: (tx: CatalogTransaction) => Promise<T>): Promise<T>

  /**
   * Runs `fn` in a transaction and commits it; a throw from `fn` rolls back and passes through.
   * @throws NoSpaceError the disk is full; nothing was changed.
   * @throws AtollError CATALOG_CORRUPT, CATALOG_CONSTRAINT, CATALOG_ERROR, CATALOG_CLOSED
   */
  write<T>(fn: (tx: CatalogTransaction) => Promise<T>, options?: WriteOptions): Promise<T>

  /** Calls `listener` after every commit, before `write` returns. Returns how to stop. */
  onCommit(listener: (event: CommitEvent) => void): () => void

  /** Reads the whole database and looks whether it is sound; beside everything else, in a thread of its own. Changes nothing. */
  verify(): Promise<CatalogFaults>

  /**
   * Writes a backup to a new file, beside everything else that goes on: one state of the catalog, not older than this call.
   * @throws AtollError DESTINATION_INVALID, DESTINATION_EXISTS, NO_SPACE, CATALOG_CORRUPT
   */
  backup(path: string): Promise<BackupInfo>

  /** The whole committed catalog as bytes; `openCatalog(bytes)` opens a copy in memory. */
  serialize(): Promise<Uint8Array>

  /** Frees the space kept back beside the catalog, so that deletes go through on a full disk. Idempotent. */
  releaseReserve(): Promise<void>
  /** Makes the reserve whole again if there is space; returns the bytes that there are (0 for a catalog in memory). */
  restoreReserve(): Promise<number>

  /** Waits for the running write, folds the write-ahead log into the file and closes. Idempotent. */
  close(): Promise<void>
}
