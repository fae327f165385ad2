/**
 * A lock that belongs to this process and that the kernel drops when the process ends, however it ends.
 *
 * The lock file is a tiny SQLite database: its holder keeps a write transaction open, which is an fcntl lock underneath, and
 * whoever is refused can still read who holds it. Nothing in this process may open the file otherwise: closing any
 * descriptor of a file drops the fcntl locks that its process holds on it.
 */
import Database from 'better-sqlite3'

/** Locks that are held: a database that nobody refers to would be closed by the garbage collector, and its lock with it. */
const held = new Set<Database.Database>()

export interface ProcessLock {
  /** Idempotent. */
  release(): void
}

/**
 * Takes the lock, or tells who has it: `{ owner }` is the text that the holder gave (empty if it cannot be read).
 * Does not wait. The file is made if it is missing and stays when the lock is released. An `owner` of null leaves the text that is
 * there: for who only looks whether somebody has the lock.
 */
export function takeProcessLock(path: string, owner: string | null): { lock: ProcessLock } | { owner: string } {
  const database = new Database(path, { timeout: 0 })
  try {
    if (owner !== null) writeOwner(database, owner)
    // Between the two transactions another process may slip in: then it has the lock and its text replaces ours.
    database.exec('begin immediate')
  } catch (error) {
    const holder = sqliteCode(error).startsWith('SQLITE_BUSY') ? readOwner(database) : undefined
    database.close()
    if (holder !== undefined) return { owner: holder }
    throw error
  }
  held.add(database)
  return {
    lock: {
      release: () => {
        if (!held.delete(database)) return
        database.exec('rollback')
        database.close()
      },
    },
  }
}

function writeOwner(database: Database.Database, owner: string): void {
  try {
    database.exec('create table if not exists owner (text text not null)')
    database.exec('begin immediate')
    // Somebody who is being refused reads the owner for a moment; that must not make the commit fail.
    database.pragma('busy_timeout = 1000')
    database.exec('delete from owner')
    database.prepare('insert into owner values (?)').run(owner)
    database.exec('commit')
  } catch (error) {
    if (database.inTransaction) database.exec('rollback')
    // On a full disk the lock is taken without a name: it needs no space, and a daemon that does not start frees none.
    if (!/^SQLITE_(?:FULL|IOERR)/.test(sqliteCode(error))) throw error
  } finally {
    database.pragma('busy_timeout = 0')
  }
}

function sqliteCode(error: unknown): string {
  const { code } = error as { code?: unknown }
  return typeof code === 'string' ? code : ''
}

function readOwner(database: Database.Database): string {
  try {
    const owner: unknown = database.prepare('select text from owner').pluck().get()
    return typeof owner === 'string' ? owner : ''
  } catch {
    // The holder is just writing it. Who it is is a courtesy; that the lock is taken is known already.
    return ''
  }
}
