/**
 * Backups of a catalog: one file, made while the catalog is in use.
 *
 * It is a database like the catalog's own, with one page behind its end that says what it is: a line of JSON, filled up with
 * spaces. SQLite goes by the size in the database's header and does not see it. The checksum is over everything before that
 * page, so a backup that was cut short or changed is never taken for one.
 *
 * A restored catalog is older than its pools. Nothing here knows what that means for them: a volume whose journal went on
 * is refused when it is opened (CATALOG_BEHIND), and so is what refers to layers that were freed in part since.
 */
import { createHash } from 'node:crypto'
import { type FileHandle, link, open, rename, rm, stat } from 'node:fs/promises'
import { basename, dirname, isAbsolute, join } from 'node:path'
import Database from 'better-sqlite3'
import { z } from 'zod'
import { AtollError } from '../errors.ts'
import { isId } from '../ids.ts'
import { ownerFormatVersion, ownPath, presentEpoch, requireNoOwner } from './catalog-owner.ts'
import { checkFormatVersion } from './migrate.ts'
import { translateSqliteError } from './sqlite-errors.ts'
import { verifyDatabase } from './verify-database.ts'

const trailerBytes = 4096
const copyBytes = 1 << 20
const magic = 'atoll-catalog-backup'
const backupVersion = 1

const trailerSchema = z.strictObject({
  magic: z.literal(magic),
  version: z.literal(backupVersion),
  catalogId: z.string().refine(isId),
  formatVersion: z.int().positive(),
  generation: z.int().positive(),
  createdAt: z.iso.datetime(),
  imageBytes: z.int().positive(),
  sha256: z.string().regex(/^[0-9a-f]{64}$/),
})

export interface BackupInfo {
  readonly catalogId: string
  readonly formatVersion: number
  /** Of two backups of one catalog, the one with the larger number is the newer one. */
  readonly generation: number
  /** ISO 8601. */
  readonly createdAt: string
  /** Bytes of the database in it. */
  readonly imageBytes: number
  /** Of the database in it, in hex. */
  readonly sha256: string
}

/** What stands in the trailer besides what is found in the image. */
export type BackupLabel = Pick<BackupInfo, 'catalogId' | 'formatVersion' | 'generation' | 'createdAt'>

/**
 * Makes a backup at `path` of what `writeImage` puts into the empty file that it is given. Durable on return; until then
 * nothing is there under that name.
 * @throws AtollError DESTINATION_INVALID, DESTINATION_EXISTS, and what `writeImage` throws
 */
export async function writeBackup(
  path: string,
  label: BackupLabel,
  writeImage: (partialPath: string) => Promise<void>,
): Promise<BackupInfo> {
  await checkNewFile(path)
  const partial = join(dirname(path), `.${basename(path)}.partial`)
  await rm(partial, { force: true })
  try {
    await (await open(partial, 'wx', 0o600)).close()
    await writeImage(partial)
    const file = await open(partial, 'r+')
    try {
      const { size } = await file.stat()
      const sha256 = await hashOf(file, size)
      const info: BackupInfo = { ...label, imageBytes: size, sha256 }
      const text = JSON.stringify({ magic, version: backupVersion, ...info })
      await file.write(`${text.padEnd(trailerBytes - 1)}\n`, size)
      await file.sync()
      // A link, because a rename would replace what somebody put there meanwhile.
      await link(partial, path).catch((error: unknown) => {
        throw (error as NodeJS.ErrnoException).code === 'EEXIST' ? existsError(path) : error
      })
      return info
    } finally {
      await file.close()
    }
  } finally {
    await rm(partial, { force: true })
    await syncFolder(dirname(path))
  }
}

/**
 * Reads all of a backup and checks it against its checksum.
 * @throws AtollError CATALOG_BACKUP_INVALID with the reason, FORMAT_VERSION of a newer kind of backup
 */
export async function verifyBackup(path: string): Promise<BackupInfo> {
  const invalid = (why: string, cause?: unknown): AtollError =>
    new AtollError('CATALOG_BACKUP_INVALID', `${path} is no backup of a catalog that can be used: ${why}`, {
      values: { path },
      cause,
    })
  const file = await open(path, 'r').catch((error: unknown) => {
    throw invalid((error as Error).message, error)
  })
  try {
    const { size } = await file.stat()
    if (size <= trailerBytes) throw invalid(`it has ${size} bytes only`)
    const { buffer } = await file.read(Buffer.alloc(trailerBytes), 0, trailerBytes, size - trailerBytes)
    const trailer = parseTrailer(buffer)
    const { magic: found, version } = (trailer ?? {}) as { magic?: unknown; version?: unknown }
    if (found === magic && typeof version === 'number' && version > backupVersion) {
      throw new AtollError(
        'FORMAT_VERSION',
        `${path} is a backup of version ${version}, this build knows ${backupVersion}: use the version of Atoll that wrote it`,
        { values: { path, foundVersion: version, knownVersion: backupVersion } },
      )
    }
    const checked = trailerSchema.safeParse(trailer)
    if (!checked.success) throw invalid('its end is missing or damaged', checked.error)
    const { magic: _magic, version: _version, ...info } = checked.data
    if (info.imageBytes !== size - trailerBytes)
      throw invalid(`it has ${size - trailerBytes} bytes where it should have ${info.imageBytes}`)
    if ((await hashOf(file, info.imageBytes)) !== info.sha256)
      throw invalid('its checksum is another: it was changed or is damaged')
    return info
  } finally {
    await file.close()
  }
}

export interface RestoredCatalog extends BackupInfo {
  /** Where the catalog lies that was there before; null: there was none. */
  readonly replacedPath: string | null
}

/**
 * Puts the catalog of a backup in the place of the one at `path`, which nobody has open. The replaced one is kept beside it. A
 * crash leaves the old catalog or the new one, each whole.
 * @throws AtollError CATALOG_BACKUP_INVALID, CATALOG_LOCKED, FORMAT_VERSION, CATALOG_CORRUPT, NO_SPACE, CATALOG_ERROR
 */
export async function restoreCatalog(options: {
  source: string
  path: string
  ownerText: string
  nowMs: number
}): Promise<RestoredCatalog> {
  const { source, ownerText, nowMs } = options
  const path = ownPath(options.path)
  const info = await verifyBackup(source)
  const held = await requireNoOwner(path, ownerText)
  const fresh = `${path}.restoring`
  try {
    await rm(fresh, { force: true })
    await copyImage(source, fresh, info.imageBytes)
    const generation = Math.max(info.generation, presentGeneration(path)) + 1
    checkImage(fresh, source, { generation, ownerEpoch: presentEpoch(path), nowMs })
    await syncFile(fresh)
    const replacedPath = await setAside(path, nowMs)
    await rename(fresh, path)
    await syncFolder(dirname(path))
    return { ...info, replacedPath }
  } catch (error) {
    await rm(fresh, { force: true })
    throw translateSqliteError(error, path)
  } finally {
    held.release()
  }
}

/** The restored image is sound, of a version that this build knows, and says from now on where it came from. */
function checkImage(
  path: string,
  source: string,
  { generation, ownerEpoch, nowMs }: { generation: number; ownerEpoch: number; nowMs: number },
): void {
  const database = new Database(path, { fileMustExist: true })
  try {
    const found = checkFormatVersion(database, source, false)
    const { damages } = verifyDatabase(database)
    if (damages.length > 0)
      throw new AtollError('CATALOG_CORRUPT', `the catalog in ${source} is damaged (${damages[0]})`, { values: { path: source } })
    database.pragma('journal_mode = delete')
    database.pragma('synchronous = full')
    const set = database.prepare('insert or replace into meta (key, value) values (?, ?)')
    set.run('generation', String(generation))
    set.run('restored_at', String(nowMs))
    // Whoever stood by knows larger epochs than the backup does.
    if (found >= ownerFormatVersion) database.prepare('update catalog_owner set epoch = max(epoch, ?)').run(ownerEpoch)
  } finally {
    database.close()
  }
}

/** The generation of the catalog that is about to be replaced; 0 if it cannot be read. Folds its write-ahead log into it. */
function presentGeneration(path: string): number {
  try {
    const database = new Database(path, { fileMustExist: true })
    try {
      database.pragma('wal_checkpoint(truncate)')
      return Number(database.prepare("select value from meta where key = 'generation'").pluck().get() ?? 0)
    } finally {
      // The last connection folds the log into the file and removes it.
      database.close()
    }
  } catch {
    return 0
  }
}

/** Gives the present catalog, and what a damaged one may still have in its log, another name beside it. */
async function setAside(path: string, nowMs: number): Promise<string | null> {
  const stamp = new Date(nowMs).toISOString().replaceAll(/[-:]|\.\d+/g, '')
  let replaced: string | null = null
  for (let attempt = 0; replaced === null; attempt += 1) {
    const name = `${path}.replaced-${stamp}${attempt === 0 ? '' : `-${attempt}`}`
    try {
      await link(path, name)
      replaced = name
    } catch (error) {
      const { code } = error as NodeJS.ErrnoException
      if (code === 'ENOENT') break
      if (code !== 'EEXIST') throw error
    }
  }
  // A log that is left belongs to a catalog that could not be opened. The new one must not be taken for what it goes on from.
  for (const suffix of ['-wal', '-shm']) {
    if (replaced !== null) await link(`${path}${suffix}`, `${replaced}${suffix}`).catch(() => undefined)
    await rm(`${path}${suffix}`, { force: true })
  }
  return replaced
}

async function copyImage(source: string, target: string, lengthBytes: number): Promise<void> {
  const [from, to] = [await open(source, 'r'), await open(target, 'wx', 0o600)]
  try {
    const buffer = Buffer.alloc(copyBytes)
    for (let at = 0; at < lengthBytes;) {
      const { bytesRead } = await from.read(buffer, 0, Math.min(copyBytes, lengthBytes - at), at)
      if (bytesRead === 0)
        throw new AtollError('CATALOG_BACKUP_INVALID', `${source} became shorter`, { values: { path: source } })
      await to.write(buffer, 0, bytesRead, at)
      at += bytesRead
    }
    await to.sync()
  } finally {
    await from.close()
    await to.close()
  }
}

async function hashOf(file: FileHandle, lengthBytes: number): Promise<string> {
  const hash = createHash('sha256')
  const buffer = Buffer.alloc(copyBytes)
  for (let at = 0; at < lengthBytes;) {
    const { bytesRead } = await file.read(buffer, 0, Math.min(copyBytes, lengthBytes - at), at)
    if (bytesRead === 0) break
    hash.update(buffer.subarray(0, bytesRead))
    at += bytesRead
  }
  return hash.digest('hex')
}

function parseTrailer(bytes: Buffer): unknown {
  try {
    return JSON.parse(bytes.toString('utf8'))
  } catch {
    return null
  }
}

async function checkNewFile(path: string): Promise<void> {
  const invalid = (why: string): AtollError =>
    new AtollError('DESTINATION_INVALID', `cannot write a backup to ${JSON.stringify(path)}: ${why}`, { values: { path } })
  if (!isAbsolute(path) || path.includes('\0') || path.endsWith('/')) throw invalid('it is not an absolute path of a file')
  const folder = await stat(dirname(path)).catch(() => null)
  if (folder === null || !folder.isDirectory()) throw invalid(`there is no directory ${dirname(path)}`)
  if ((await stat(path).catch(() => null)) !== null) throw existsError(path)
}

function existsError(path: string): AtollError {
  return new AtollError('DESTINATION_EXISTS', `${path} exists already: choose another path`, { values: { path } })
}

async function syncFile(path: string): Promise<void> {
  const file = await open(path, 'r+')
  try {
    await file.sync()
  } finally {
    await file.close()
  }
}

async function syncFolder(path: string): Promise<void> {
  const folder = await open(path, 'r')
  try {
    await folder.sync()
  } finally {
    await folder.close()
  }
}
