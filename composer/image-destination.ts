/**
 * Where an export goes. Bytes go to a new file of our own beside the destination; it gets the destination's name when it is
 * whole and durable. So nobody sees half an image, and a failed export with `overwrite` leaves the old file as it was.
 */
import { constants, link, open, rename, stat, unlink } from 'node:fs/promises'
import { dirname, isAbsolute } from 'node:path'
import { AtollError, type JsonObject } from '@atoll/core'

export interface DestinationParams extends JsonObject {
  path: string
  /** Replace a regular file that is there. */
  overwrite: boolean
}

/**
 * Checks a destination before a job is started.
 * @throws AtollError DESTINATION_INVALID, DESTINATION_EXISTS
 */
export async function checkDestination(path: string, overwrite: boolean): Promise<void> {
  const invalid = (why: string): AtollError =>
    new AtollError('DESTINATION_INVALID', `cannot export to ${JSON.stringify(path)}: ${why}`, { values: { path } })
  if (!isAbsolute(path) || path.includes('\0') || path.endsWith('/')) throw invalid('it is not an absolute path of a file')
  const directory = await stat(dirname(path)).catch(() => null)
  if (directory === null || !directory.isDirectory()) throw invalid(`there is no directory ${dirname(path)}`)
  const present = await stat(path).catch(() => null)
  if (present === null) return
  if (!overwrite) throw destinationExists(path)
  if (!present.isFile()) throw invalid('it is not a regular file')
}

/** Gives the whole file its name; the name is durable on return. */
export async function placeExport(partial: string, params: DestinationParams): Promise<void> {
  if (params.overwrite) await rename(partial, params.path)
  else {
    // A link, because a rename would replace what somebody put there meanwhile.
    await link(partial, params.path).catch((error: unknown) => {
      throw (error as NodeJS.ErrnoException).code === 'EEXIST' ? destinationExists(params.path) : error
    })
    await unlinkIfPresent(partial)
  }
  const directory = await open(dirname(params.path), constants.O_RDONLY | constants.O_DIRECTORY)
  try {
    await directory.sync()
  } finally {
    await directory.close()
  }
}

/** Whether the destination is the file with this inode already: the daemon was stopped between that and the end of the job. */
export async function isPlaced(path: string, inode: string): Promise<boolean> {
  const status = await stat(path, { bigint: true }).catch(() => null)
  return status !== null && String(status.ino) === inode
}

export async function unlinkIfPresent(path: string): Promise<void> {
  await unlink(path).catch((error: unknown) => {
    if ((error as NodeJS.ErrnoException).code !== 'ENOENT') throw error
  })
}

function destinationExists(path: string): AtollError {
  return new AtollError('DESTINATION_EXISTS', `${path} exists already: choose another path, or overwrite it with --force`, {
    values: { path },
  })
}
