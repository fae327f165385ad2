// The name of a home's batch logs, by which a catalog that homes share tells whose logs belong to a volume.
import { readFile, rename, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { isId, newId } from '@atoll/core'

/**
 * The id in the folder; made if there is none. It is not synced: after a power cut the logs mean nothing either.
 */
export async function batchLogId(directory: string): Promise<string> {
  const path = join(directory, 'id')
  const found = await readFile(path, 'utf8').catch(() => '')
  if (isId(found.trim())) return found.trim()
  const id = newId()
  await writeFile(`${path}.new`, `${id}\n`)
  await rename(`${path}.new`, path)
  return id
}
