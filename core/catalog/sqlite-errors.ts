/** Translates what SQLite throws into our errors, once, at the edge of the catalog. */
import { AtollError, NoSpaceError } from '../errors.ts'

function sqliteCode(error: unknown): string | undefined {
  if (!(error instanceof Error) || error.name !== 'SqliteError') return undefined
  const { code } = error as Error & { code?: unknown }
  return typeof code === 'string' ? code : undefined
}

/** Whether another process has the lock that was wanted. */
export function isBusyError(error: unknown): boolean {
  return sqliteCode(error)?.startsWith('SQLITE_BUSY') ?? false
}

/** Whether the error came from the disk, so that nobody knows what reached it. */
export function isDiskError(error: unknown): boolean {
  return sqliteCode(error)?.startsWith('SQLITE_IOERR') ?? false
}

/** Whether there was no space to make the index of the log longer: by then all of the log was written. */
export function isIndexFull(error: unknown): boolean {
  return sqliteCode(error) === 'SQLITE_IOERR_SHMSIZE'
}

/** `error` as an error of ours that names the catalog's file; what SQLite did not throw passes unchanged. */
export function translateSqliteError(error: unknown, path: string): unknown {
  const code = sqliteCode(error)
  if (code === undefined) return error
  const { message } = error as Error
  const options = { cause: error, values: { path, sqlite: code } }
  // The index of the log (-shm) is made longer in steps; when there is no space for that, it is this and not SQLITE_FULL.
  if (code === 'SQLITE_FULL' || isIndexFull(error)) {
    return new NoSpaceError(`the disk of the catalog ${path} is full: delete something and reclaim, or make space there`, options)
  }
  if (code.startsWith('SQLITE_CORRUPT') || code === 'SQLITE_NOTADB') {
    return new AtollError('CATALOG_CORRUPT', `the catalog ${path} is damaged (${message}): restore it from a backup`, options)
  }
  if (code.startsWith('SQLITE_BUSY') || code.startsWith('SQLITE_LOCKED')) {
    return new AtollError('CATALOG_LOCKED', `another process has the catalog ${path} locked`, options)
  }
  if (code.startsWith('SQLITE_CONSTRAINT')) {
    return new AtollError('CATALOG_CONSTRAINT', `the catalog refused a change: ${message}`, options)
  }
  return new AtollError('CATALOG_ERROR', `the catalog ${path} failed: ${message} (${code})`, options)
}
