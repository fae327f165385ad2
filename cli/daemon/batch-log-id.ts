// The name of a home's batch logs, by which a catalog that homes share tells whose logs belong to a volume.
import { createHash } from 'node:crypto'
import { readFile, rename, writeFile } from 'node:fs/promises'
import { join } from 'node:path'

/**
 * The id in the folder, so that a home that is moved keeps it. If there is none it is made of where the folder lies, and so is the same
 * again where it cannot be written: on a full disk a daemon has to start.
 * It is not synced: after a power cut the logs mean nothing either.
 */
export async function batchLogId(directory: string): Promise<string> {
  const path = join(directory, 'id')
  const found = await readFile(path, 'utf8').catch(() => '')
  if (/^[0-9a-f-]{32,64}$/.test(found.trim())) return found.trim()
  const id = createHash('sha256').update(directory).digest('hex')
  try {
    await writeFile(`${path}.new`, `${id}\n`)
    await rename(`${path}.new`, path)
  } catch (error) {
    if ((error as NodeJS.ErrnoException).code !== 'ENOSPC') throw error
  }
  return id
}
