import { stat } from 'node:fs/promises'
import { join } from 'node:path'
import { BackgroundProcess } from './background-process.ts'

export interface MountedExport {
  /** A file whose bytes are those of the export. */
  readonly path: string
  /** Unmounts it. */
  [Symbol.asyncDispose](): Promise<void>
}

/** Shows an export as the file `nbd` in an empty folder, by libnbd's nbdfuse. */
export async function mountExport(uri: string, folder: string, ...options: string[]): Promise<MountedExport> {
  const path = join(folder, 'nbd')
  const nbdfuse = new BackgroundProcess('nbdfuse', [...options, path, uri])
  const unmount = async (): Promise<void> => {
    // It unmounts itself when it is told to end.
    await nbdfuse.end('SIGTERM')
  }
  try {
    await nbdfuse.until('mounted', async () => await isFile(path))
  } catch (error) {
    await unmount()
    throw error
  }
  return { path, [Symbol.asyncDispose]: unmount }
}

async function isFile(path: string): Promise<boolean> {
  try {
    return (await stat(path)).isFile()
  } catch {
    return false
  }
}
