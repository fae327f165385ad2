/**
 * Opens a catalog in SQLite: a file, `:memory:`, or the bytes of another one.
 *
 * One connection does everything, under one mutex that writes and reads take in the order they come: better-sqlite3 answers
 * at once, so a second connection would not be faster, and a read never sees half of a write. A file has one owner
 * (catalog-owner.ts), because page ids are given out from a counter in this process; one that was taken over changes nothing any more.
 *
 * Durability: WAL with synchronous=FULL, so a commit is on the disk before `write` returns. A write with `durable: false`
 * commits under synchronous=NORMAL, without a sync, and is ordered before every later commit all the same. The bulk that such
 * writes left in the log is synced by a thread before the next durable commit, so that its own sync, which runs on this
 * thread, has little to do; some rows are little.
 *
 * After an error from the disk during a commit nobody knows whether the commit will be there after a restart: the catalog
 * then refuses every write until it is opened again (CATALOG_BROKEN), rather than guess.
 */
import { AsyncLocalStorage } from 'node:async_hooks'
import { type FileHandle, open } from 'node:fs/promises'
import Database from 'better-sqlite3'
import type { Kysely } from 'kysely'
import { type Clock, systemClock } from '../clock.ts'
import { AtollError, isAtollError } from '../errors.ts'
import { newId, type NewId } from '../ids.ts'
import { Mutex } from '../mutex.ts'
import type { Catalog, CatalogFaults, CatalogPages, CatalogTransaction, CommitEvent, WriteOptions } from './catalog.ts'
import { type BackupInfo, writeBackup } from './catalog-backup.ts'
import {
  beginImmediate,
  type CatalogOwner,
  claimOwnership,
  type OwnerClaim,
  ownPath,
  patienceMsDefault,
  readOwner,
  takeDoor,
  takenOverError,
} from './catalog-owner.ts'
import { CatalogReserve } from './catalog-reserve.ts'
import { runCatalogTask } from './catalog-task.ts'
import { catalogFormatVersion, checkFormatVersion, migrate } from './migrate.ts'
import type { Schema } from './schema.ts'
import { kyselyOver, SqliteConnection } from './sqlite-connection.ts'
import { isDiskError, isIndexFull, translateSqliteError } from './sqlite-errors.ts'
import { SqlitePages } from './sqlite-pages.ts'
import { verifyDatabase } from './verify-database.ts'
import { logFileBytesMax, WalCheckpointer } from './wal-checkpointer.ts'

export interface OpenCatalogOptions {
  /** Default false. True: nothing is migrated or written, and the file may be open elsewhere. */
  readonly?: boolean
  /** Stands in the catalog and in the lock, for whoever is refused. Default: `pid N`. */
  ownerText?: string
  /**
   * Default false. True: becomes the owner although another process is: that one changes nothing from then on (CATALOG_TAKEN_OVER).
   * What it has under way elsewhere is the caller's to stop.
   */
  takeOver?: boolean
  /** How long what others hold for a moment is waited for; default 10 s. */
  patienceMs?: number
  /** Told once, by a write or by a look every second, when another process has taken over; this one must end. */
  onTakenOver?: (error: AtollError) => void
  /** Called when nobody else is the owner, or is to be any more, and before this process is: what it throws leaves everything as it is. */
  beforeOwning?: () => Promise<void>
  /** Size of the reserve file; 0: none. Default 16 MiB. */
  reserveBytes?: number
  clock?: Clock
  newId?: NewId
  /** Told of failures that nobody waits for (folding the write-ahead log). Default: ignored, the next commit tries again. */
  onWarning?: (message: string) => void
  /** Runs each COMMIT; for tests of what a failing disk does. */
  commitWith?: (commit: () => void) => void
}

/** Whether code runs inside `write` or `read`, and of which catalog. */
interface Scope {
  readonly catalog: SqliteCatalog
  readonly kind: 'write' | 'read'
  open: boolean
}

/** So many rows take a durable commit no longer to sync than a sync takes anyway. */
const syncedChangesMax = 32

/** How often who is idle looks whether he was taken over. */
const ownerLookMs = 1000

const scopes = new AsyncLocalStorage<Scope>()

/**
 * Opens or makes a catalog. `source`: a path, `:memory:`, or bytes from `Catalog.serialize`, opened as a copy in memory.
 * @throws AtollError FORMAT_VERSION, CATALOG_CORRUPT, CATALOG_LOCKED naming the owner, CATALOG_ERROR, NO_SPACE
 */
export async function openCatalog(source: string | Uint8Array, options: OpenCatalogOptions = {}): Promise<Catalog> {
  const path = typeof source !== 'string' || source === ':memory:' ? ':memory:' : ownPath(source)
  const writable = path !== ':memory:' && options.readonly !== true
  const reserve = writable && options.reserveBytes !== 0 ? new CatalogReserve(path, options.reserveBytes) : undefined
  const ownerText = options.ownerText ?? `pid ${process.pid}`
  const door = writable ? await openDoor(path, ownerText, options.patienceMs) : undefined
  try {
    // Even opening takes some space, for the log and its index.
    return await withReserve(reserve, () => openLocked(source, path, { ...options, ownerText, writable, reserve }))
  } finally {
    door?.release()
  }
}

async function openDoor(path: string, ownerText: string, patienceMs?: number): ReturnType<typeof takeDoor> {
  try {
    return await takeDoor(path, ownerText, patienceMs)
  } catch (error) {
    throw translateOpenError(error, path)
  }
}

/** Runs `fn` again with a little more of the reserve given back, as long as the disk is too full for it. */
async function withReserve<T>(reserve: CatalogReserve | undefined, fn: () => Promise<T>): Promise<T> {
  for (;;) {
    try {
      return await fn()
    } catch (error) {
      if (reserve === undefined || !isAtollError(error, 'NO_SPACE') || (await reserve.shrink()) === 0) throw error
    }
  }
}

interface LockedOptions extends OpenCatalogOptions {
  ownerText: string
  /** A file that this process becomes the owner of. */
  writable: boolean
  reserve: CatalogReserve | undefined
}

async function openLocked(source: string | Uint8Array, path: string, options: LockedOptions): Promise<Catalog> {
  const { clock = systemClock, readonly = false, takeOver = false, patienceMs = patienceMsDefault, writable } = options
  let database: Database.Database | undefined
  let claim: OwnerClaim | undefined
  try {
    database = openDatabase(source, readonly && path !== ':memory:')
    // Before the first change: a catalog of a newer version, or a database of something else, is left as it is.
    const found = checkFormatVersion(database, path, readonly)
    if (writable) {
      claim = claimOwnership(database, path, { ownerText: options.ownerText, takeOver, patienceMs })
      database.pragma('journal_mode = wal')
    }
    // Every step of a migration is durable before the next begins.
    database.pragma('synchronous = full')
    // Before anything is changed. A format without owners has none who lives: it would have kept the door shut.
    const hasOwners = readOwner(database) !== null
    if (claim !== undefined) await options.beforeOwning?.()
    if (hasOwners) await claim?.commit()
    await migrate(database, path, found, { id: (options.newId ?? newId)(), createdAtMs: clock.nowMs() })
    if (!hasOwners) await claim?.commit()
    database.pragma('foreign_keys = on')
    if (writable) {
      database.pragma(`journal_size_limit = ${logFileBytesMax}`)
      // Passes run in a thread of their own, see wal-checkpointer.ts.
      database.pragma('wal_autocheckpoint = 0')
    }
    const catalog = new SqliteCatalog(database, path, options, claim)
    await catalog.restoreReserve()
    return catalog
  } catch (error) {
    database?.close()
    claim?.release()
    throw translateOpenError(error, path)
  }
}

/** Also what does not come from SQLite: a folder that is missing, a file that may not be read. */
function translateOpenError(error: unknown, path: string): unknown {
  const translated = translateSqliteError(error, path)
  if (isAtollError(translated)) return translated
  return new AtollError('CATALOG_ERROR', `${path} cannot be opened: ${(error as Error).message}`, {
    values: { path },
    cause: error,
  })
}

function openDatabase(source: string | Uint8Array, readonly: boolean): Database.Database {
  if (typeof source !== 'string') {
    const bytes = Buffer.from(source)
    // Bytes 18 and 19 of the header say "write-ahead log" (2); a database in memory knows the other journal (1) only.
    if (bytes[18] === 2) bytes[18] = 1
    if (bytes[19] === 2) bytes[19] = 1
    return new Database(bytes, { timeout: 0 })
  }
  return new Database(source, { readonly, timeout: 0 })
}

class SqliteCatalog implements Catalog {
  readonly id: string
  readonly path: string
  readonly formatVersion = catalogFormatVersion
  readonly db: Kysely<Schema>
  readonly pages: CatalogPages
  readonly #database: Database.Database
  /** undefined: there are no owners of it, as of one in memory. */
  readonly #claim: OwnerClaim | undefined
  readonly #patienceMs: number
  readonly #onTakenOver: (error: AtollError) => void
  #ownerQuery: Database.Statement<[], CatalogOwner> | undefined
  #ownerLook: NodeJS.Timeout | undefined
  #takenOver: AtollError | undefined
  readonly #clock: Clock
  readonly #mutex = new Mutex()
  readonly #inside: Kysely<Schema>
  readonly #reserve: CatalogReserve | undefined
  readonly #checkpointer: WalCheckpointer | undefined
  readonly #commitWith: (commit: () => void) => void
  readonly #listeners = new Set<(event: CommitEvent) => void>()
  readonly #logPath: string | undefined
  #log: FileHandle | undefined
  #unsyncedCommits = false
  /** `#changes()` when everything was synced last. */
  #syncedChanges = 0
  #countChanges: Database.Statement<[], number> | undefined
  #broken: unknown
  #closing: Promise<void> | undefined

  constructor(database: Database.Database, path: string, options: LockedOptions, claim: OwnerClaim | undefined) {
    this.#database = database
    this.#claim = claim
    this.#patienceMs = options.patienceMs ?? patienceMsDefault
    this.#onTakenOver = options.onTakenOver ?? (() => {})
    this.#reserve = options.reserve
    this.#clock = options.clock ?? systemClock
    this.path = path
    this.id = database.prepare("select value from meta where key = 'catalog_id'").pluck().get() as string
    const connection = new SqliteConnection(database, path)
    this.db = kyselyOver(connection, () => this.#acquireForRead())
    this.#inside = kyselyOver(connection, async () => () => {})
    this.pages = new SqlitePages({
      database,
      path,
      acquire: () => this.#acquireForPages(),
      requireWrite: () => {
        if (this.#scope()?.kind !== 'write') throw new AtollError('INTERNAL', 'pages are changed inside catalog.write() only')
      },
    })
    this.#commitWith = options.commitWith ?? ((commit) => commit())
    if (claim !== undefined) {
      this.#ownerLook = setInterval(() => this.#lookForOwner(), ownerLookMs).unref()
      this.#logPath = `${path}-wal`
      this.#checkpointer = new WalCheckpointer(path, database, this.#mutex, options.onWarning ?? (() => {}))
    }
  }

  async read<T>(fn: (tx: CatalogTransaction) => Promise<T>): Promise<T> {
    this.#refuseNested('read')
    return this.#mutex.run(async () => {
      this.#requireOpen()
      return this.#scoped('read', async () => {
        this.#database.exec('begin')
        try {
          // Who was taken over acts on nothing that the next owner wrote.
          this.#requireOwner()
          return await fn(this.#inside)
        } finally {
          if (this.#database.inTransaction) this.#database.exec('rollback')
        }
      })
    })
  }

  async write<T>(fn: (tx: CatalogTransaction) => Promise<T>, options: WriteOptions = {}): Promise<T> {
    this.#refuseNested('write')
    const durable = options.durable ?? true
    const reserve = options.emergency === true ? this.#reserve : undefined
    const result = await this.#mutex.run(async () => withReserve(reserve, () => this.#writeOnce(fn, durable)))
    // Writes that are not durable come in long rows, and none of them waits for anything: without this, nobody else would
    // get a turn.
    if (!durable) await this.#checkpointer?.pace()
    return result
  }

  onCommit(listener: (event: CommitEvent) => void): () => void {
    this.#listeners.add(listener)
    return () => this.#listeners.delete(listener)
  }

  async serialize(): Promise<Uint8Array> {
    this.#refuseNested('serialize')
    return this.#mutex.run(() => {
      this.#requireOpen()
      return this.#database.serialize()
    })
  }

  async verify(): Promise<CatalogFaults> {
    this.#refuseNested('verify')
    try {
      if (this.path !== ':memory:') {
        this.#requireOpen()
        return await runCatalogTask<CatalogFaults>({ path: this.path })
      }
      return await this.#mutex.run(() => {
        this.#requireOpen()
        return verifyDatabase(this.#database)
      })
    } catch (error) {
      const known = translateSqliteError(error, this.path)
      // Too damaged to be asked: that is an answer, too.
      if (isAtollError(known, 'CATALOG_CORRUPT')) return { damages: [known.message], dangling: [] }
      throw known
    }
  }

  async backup(path: string): Promise<BackupInfo> {
    const generation = await this.#raiseGeneration()
    const createdAt = new Date(this.#clock.nowMs()).toISOString()
    const label = { catalogId: this.id, formatVersion: this.formatVersion, generation, createdAt }
    try {
      return await writeBackup(path, label, async (imagePath) => {
        if (this.path === ':memory:') await this.#mutex.run(() => this.#database.prepare('vacuum into ?').run(imagePath))
        else await runCatalogTask<null>({ path: this.path, imagePath })
      })
    } catch (error) {
      throw translateSqliteError(error, this.path)
    }
  }

  /** Backups are numbered, and each is in itself: of a catalog that was restored, the next ones have larger numbers. */
  async #raiseGeneration(): Promise<number> {
    return await this.write(
      async (tx) => {
        const row = await tx.selectFrom('meta').select('value').where('key', '=', 'generation').executeTakeFirst()
        const generation = Number(row?.value ?? 0) + 1
        await tx
          .replaceInto('meta')
          .values({ key: 'generation', value: String(generation) })
          .execute()
        return generation
      },
      { emergency: true },
    )
  }

  async releaseReserve(): Promise<void> {
    await this.#reserve?.release()
  }

  async restoreReserve(): Promise<number> {
    return (await this.#reserve?.restore()) ?? 0
  }

  close(): Promise<void> {
    this.#closing ??= this.#close()
    return this.#closing
  }

  async #close(): Promise<void> {
    clearInterval(this.#ownerLook)
    // Its passes take the mutex, so it ends first.
    await this.#checkpointer?.close()
    await this.#mutex.run(async () => {
      await this.#log?.close()
      // The last connection folds the log into the file and removes it.
      this.#database.close()
      this.#claim?.release()
    })
  }

  async #writeOnce<T>(fn: (tx: CatalogTransaction) => Promise<T>, durable: boolean): Promise<T> {
    this.#requireOpen()
    this.#requireSound()
    if (durable && this.#unsyncedCommits && this.#changes() - this.#syncedChanges > syncedChangesMax) await this.#syncLog()
    const database = this.#database
    try {
      // Cannot be changed inside a transaction. FULL is how the connection stays in between.
      if (!durable) database.pragma('synchronous = normal')
      await beginImmediate(database, this.#patienceMs, (error) => error)
      this.#requireOwner()
      const result = await this.#scoped('write', () => fn(this.#inside))
      await this.#commit()
      this.#unsyncedCommits = !durable
      if (durable) this.#syncedChanges = this.#changes()
      for (const listener of this.#listeners) listener({ durable })
      this.#checkpointer?.afterCommit()
      return result
    } catch (error) {
      // SQLite has rolled back by itself after some errors.
      if (database.inTransaction) database.exec('rollback')
      throw translateSqliteError(error, this.path)
    } finally {
      if (!durable) database.pragma('synchronous = full')
    }
  }

  async #commit(): Promise<void> {
    try {
      this.#commitWith(() => this.#database.exec('commit'))
    } catch (error) {
      if (!isDiskError(error)) throw error
      this.#broken = error
      if (isIndexFull(error)) await this.#overwriteLostCommit()
      throw error
    }
  }

  /**
   * After a commit that failed when its whole content was in the log already: a crash now would bring it back. The next commit
   * takes its place in the log, so one is made at once, on the space of the reserve.
   */
  async #overwriteLostCommit(): Promise<void> {
    const database = this.#database
    if (database.inTransaction) database.exec('rollback')
    await this.#reserve?.release()
    try {
      await beginImmediate(database, this.#patienceMs, (error) => error)
      this.#requireOwner()
      database.prepare("insert or replace into meta (key, value) values ('lost_commit_at', ?)").run(String(this.#clock.nowMs()))
      this.#commitWith(() => database.exec('commit'))
      this.#broken = undefined
    } catch {
      // Still nobody knows: the catalog stays broken, for the first reason.
      if (database.inTransaction) database.exec('rollback')
    }
  }

  /** Rows that this connection has changed, those that were rolled back included. */
  #changes(): number {
    this.#countChanges ??= this.#database.prepare<[], number>('select total_changes()').pluck()
    return this.#countChanges.get() ?? 0
  }

  /** Syncs what non-durable commits left in the log, on a thread of the pool. Only to keep the next commit's own sync short. */
  async #syncLog(): Promise<void> {
    if (this.#logPath === undefined) return
    try {
      this.#log ??= await open(this.#logPath, 'r+')
      await this.#log.datasync()
    } catch (error) {
      // A failed sync may have dropped the pages, so that a later one reports success for nothing (I6).
      this.#broken = error
      this.#requireSound()
    }
  }

  #scoped<T>(kind: Scope['kind'], fn: () => Promise<T>): Promise<T> {
    const scope: Scope = { catalog: this, kind, open: true }
    return scopes.run(scope, async () => {
      try {
        return await fn()
      } finally {
        scope.open = false
      }
    })
  }

  /** The transaction of this catalog that the caller is in, if any. */
  #scope(): Scope | undefined {
    const scope = scopes.getStore()
    return scope !== undefined && scope.open && scope.catalog === this ? scope : undefined
  }

  #refuseNested(what: string): void {
    const scope = this.#scope()
    // It would wait for itself.
    if (scope !== undefined)
      throw new AtollError('INTERNAL', `${what} of the catalog inside ${scope.kind}(): use the transaction`)
  }

  async #acquireForRead(): Promise<() => void> {
    this.#refuseNested('a query on catalog.db')
    return this.#acquireForPages()
  }

  async #acquireForPages(): Promise<() => void> {
    if (this.#scope() !== undefined) return () => {}
    const release = await this.#mutex.acquire()
    if (this.#database.open) return release
    release()
    this.#requireOpen()
    return release
  }

  #requireOpen(): void {
    if (!this.#database.open) {
      throw new AtollError('CATALOG_CLOSED', `the catalog ${this.path} is closed`, { values: { path: this.path } })
    }
  }

  /** Nobody else becomes the owner while a transaction that writes is open. */
  #requireOwner(): void {
    if (this.#claim === undefined) return
    this.#ownerQuery ??= this.#database.prepare<[], CatalogOwner>('select epoch, holder from catalog_owner')
    const owner = this.#ownerQuery.get()
    if (this.#takenOver === undefined && owner?.epoch === this.#claim.epoch) return
    const isNews = this.#takenOver === undefined
    this.#takenOver ??= takenOverError(this.path, owner ?? { epoch: 0, holder: '' }, this.#claim.epoch)
    if (isNews) this.#onTakenOver(this.#takenOver)
    throw this.#takenOver
  }

  /** Who changes nothing hears of it here. */
  #lookForOwner(): void {
    // In a transaction the past is seen; one that writes looks itself.
    if (!this.#database.open || this.#database.inTransaction) return
    try {
      this.#requireOwner()
    } catch {
      // It was told; or the next one can be read.
    }
  }

  #requireSound(): void {
    if (this.#broken === undefined) return
    throw new AtollError(
      'CATALOG_BROKEN',
      `the disk failed during a commit to the catalog ${this.path}, so nobody knows what reached it: check the disk and restart`,
      { values: { path: this.path }, cause: this.#broken },
    )
  }
}
