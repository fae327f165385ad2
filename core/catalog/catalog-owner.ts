/**
 * Who is active on a catalog: one process at a time, however many share the file.
 *
 * Rules:
 * - The table `catalog_owner` has an epoch and the owner's name. Every transaction that writes looks in itself whether the epoch is
 *   still the one that its process has: SQLite has one writer at a time, so nobody writes after another has taken over.
 * - The owner of epoch N holds the process lock `catalog.N.lock`, taken before the transaction that makes it the owner. If the
 *   lock of the present epoch is free, its owner is gone and anybody may be the next. If it is held, the owner lives, or is
 *   stopped; then who wants to be the next has to say so (`takeOver`).
 * - Whoever becomes the owner, or looks whether there is one, holds `catalog.lock` meanwhile, for a moment. An Atoll older than
 *   this rule holds it as long as it has the catalog open.
 */
import { readdirSync, realpathSync, rmSync } from 'node:fs'
import { basename, dirname, join } from 'node:path'
import { setTimeout as delay } from 'node:timers/promises'
import Database from 'better-sqlite3'
import { AtollError } from '../errors.ts'
import { type ProcessLock, takeProcessLock } from '../process-lock.ts'
import { isBusyError } from './sqlite-errors.ts'

/** The first format with the table `catalog_owner`. */
export const ownerFormatVersion = 7

/** What others hold for a moment only is waited for this long: who keeps it longer is stopped, or hangs. */
export const patienceMsDefault = 10_000
const attemptDelayMs = 20

export interface CatalogOwner {
  /** 0: there was none yet. */
  readonly epoch: number
  /** For people: `pid N on HOST, home PATH, since T`. */
  readonly holder: string
}

/**
 * The file itself, where `path` is a link: SQLite follows links, and the locks have to lie beside what they lock. As it is if there is
 * none yet.
 */
export function ownPath(path: string): string {
  try {
    return realpathSync(path)
  } catch {
    return path
  }
}

const stemOf = (path: string): string => path.replace(/\.db$/, '')
const epochLockPath = (path: string, epoch: number): string => `${stemOf(path)}.${epoch}.lock`

/** The owner as the catalog has it; null: it is older than owners are. */
export function readOwner(database: Database.Database): CatalogOwner | null {
  const hasOwners = database.prepare("select 1 from sqlite_schema where type = 'table' and name = 'catalog_owner'").get()
  if (hasOwners === undefined) return null
  return database.prepare<[], CatalogOwner>('select epoch, holder from catalog_owner').get() ?? { epoch: 0, holder: '' }
}

/**
 * Takes `catalog.lock`, which others hold for a moment only: waits for them.
 * @throws AtollError CATALOG_LOCKED naming who does not let go
 */
export async function takeDoor(path: string, ownerText: string, patienceMs = patienceMsDefault): Promise<ProcessLock> {
  for (let waitedMs = 0; ; waitedMs += attemptDelayMs) {
    const taken = takeProcessLock(`${stemOf(path)}.lock`, ownerText)
    if ('lock' in taken) return taken.lock
    if (waitedMs >= patienceMs) throw lockedError(path, taken.owner)
    await delay(attemptDelayMs)
  }
}

/** A process that is about to be the owner. */
export interface OwnerClaim {
  /** The epoch that it will have, or has. */
  readonly epoch: number
  /**
   * Makes it the owner, in a transaction. @throws AtollError CATALOG_LOCKED if the present owner does not end a transaction, or if
   * somebody else has become the owner
   */
  commit(): Promise<void>
  /** Ends it: the lock of the epoch is let go. Idempotent. */
  release(): void
}

/**
 * Begins to be the owner; the caller has the door. `takeOver`: although the present one lives, or is stopped.
 * @throws AtollError CATALOG_LOCKED naming the owner
 */
export function claimOwnership(
  database: Database.Database,
  path: string,
  { ownerText, takeOver, patienceMs }: { ownerText: string; takeOver: boolean; patienceMs: number },
): OwnerClaim {
  const present = readOwner(database) ?? { epoch: 0, holder: '' }
  if (present.epoch > 0) {
    const taken = takeProcessLock(epochLockPath(path, present.epoch), null)
    // Let go at once: nobody looks while we have the door.
    if ('lock' in taken) taken.lock.release()
    else if (!takeOver) throw lockedError(path, present.holder)
  }
  const epoch = present.epoch + 1
  const mine = takeProcessLock(epochLockPath(path, epoch), ownerText)
  if (!('lock' in mine)) throw lockedError(path, mine.owner)
  return {
    epoch,
    commit: async () => {
      await beginImmediate(database, patienceMs, () =>
        lockedError(path, present.holder, ', which is in the middle of a change and does not go on: continue it, or end it'),
      )
      try {
        const update = database.prepare('update catalog_owner set epoch = ?, holder = ? where epoch = ?')
        if (update.run(epoch, ownerText, present.epoch).changes !== 1) throw lockedError(path, readOwner(database)?.holder ?? '')
        database.exec('commit')
      } catch (error) {
        if (database.inTransaction) database.exec('rollback')
        throw error
      }
      removeOldLocks(path, epoch)
    },
    release: () => mine.lock.release(),
  }
}

/** Begins a transaction that writes; waits for another process that just does. @throws what `gaveUp` makes */
export async function beginImmediate(
  database: Database.Database,
  patienceMs: number,
  gaveUp: (error: unknown) => unknown,
): Promise<void> {
  for (let waitedMs = 0; ; waitedMs += attemptDelayMs) {
    try {
      database.exec('begin immediate')
      return
    } catch (error) {
      if (!isBusyError(error)) throw error
      if (waitedMs >= patienceMs) throw gaveUp(error)
    }
    await delay(attemptDelayMs)
  }
}

/**
 * For who replaces a catalog: nobody has it, and nobody gets it until `release`.
 * @throws AtollError CATALOG_LOCKED naming the owner
 */
export async function requireNoOwner(path: string, ownerText: string): Promise<ProcessLock> {
  const door = await takeDoor(path, ownerText)
  try {
    // The catalog itself may be beyond reading, so it is not asked for its epoch.
    for (const { epoch } of locksOf(path)) {
      const taken = takeProcessLock(epochLockPath(path, epoch), null)
      if (!('lock' in taken)) throw lockedError(path, taken.owner, ': stop it first')
      taken.lock.release()
    }
    return door
  } catch (error) {
    door.release()
    throw error
  }
}

/** The largest epoch that the catalog at `path` is known to have had; 0 if there is none. */
export function presentEpoch(path: string): number {
  const epochs = locksOf(path).map(({ epoch }) => epoch)
  try {
    const database = new Database(path, { fileMustExist: true })
    try {
      epochs.push(readOwner(database)?.epoch ?? 0)
    } finally {
      database.close()
    }
  } catch {
    // Not there, or damaged: its locks tell enough.
  }
  return Math.max(0, ...epochs)
}

/** Files of the locks of epochs; what SQLite may have beside them is named by its own name. */
function locksOf(path: string): { epoch: number; file: string }[] {
  const stem = basename(stemOf(path))
  return readdirSync(dirname(path)).flatMap((name) => {
    const digits = name.startsWith(`${stem}.`) ? /^(\d{1,15})\.lock$/.exec(name.slice(stem.length + 1))?.[1] : undefined
    return digits === undefined ? [] : [{ epoch: Number(digits), file: join(dirname(path), name) }]
  })
}

/** One who still holds such a lock does not have the epoch any more. */
function removeOldLocks(path: string, epoch: number): void {
  for (const lock of locksOf(path)) {
    if (lock.epoch >= epoch) continue
    for (const suffix of ['', '-journal']) rmSync(`${lock.file}${suffix}`, { force: true })
  }
}

function lockedError(path: string, owner: string, hint = ''): AtollError {
  const who = owner || 'owner unknown'
  return new AtollError('CATALOG_LOCKED', `the catalog ${path} is open in another process (${who})${hint}`, {
    values: { path, owner },
  })
}

export function takenOverError(path: string, { epoch, holder }: CatalogOwner, ownEpoch: number): AtollError {
  return new AtollError(
    'CATALOG_TAKEN_OVER',
    `the catalog ${path} was taken over by ${holder || 'another process'} (epoch ${epoch}; this process has ${ownEpoch}): nothing was changed, and this process ends`,
    { values: { path, owner: holder, epoch, ownEpoch } },
  )
}
