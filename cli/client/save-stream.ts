// Where a download goes: a file of our own beside the destination, which gets its name when it is whole, so that an
// interrupted one leaves the old file; or standard output, a pipe or a device, which take the bytes as they come.
import { unlinkSync } from 'node:fs'
import { constants, open, realpath, rename, stat, unlink } from 'node:fs/promises'
import type { FileHandle } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import type { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { readSparse } from '../sparse-frames.ts'
import { CliError } from './cli-error.ts'

/** What a user ends a command with. */
const endingSignals = ['SIGINT', 'SIGTERM', 'SIGHUP'] as const

/** Whether a path is, or will be, a file with holes; `-` is standard output. @throws CliError DESTINATION_INVALID for a directory */
export async function takesHoles(dest: string): Promise<boolean> {
  if (dest === '-') return false
  const present = await stat(dest).catch(() => null)
  if (present?.isDirectory() === true) {
    throw new CliError('DESTINATION_INVALID', `${dest} is a directory: name a file in it`)
  }
  return present === null || present.isFile()
}

/** Writes a stream to standard output (`-`), a pipe or a device. @throws CliError IO_ERROR */
export async function saveStream(body: Readable, dest: string): Promise<void> {
  if (dest === '-') {
    await pipeline(body, process.stdout, { end: false })
    return
  }
  await written(dest, async () => {
    const handle = await open(dest, constants.O_WRONLY)
    await pipeline(body, handle.createWriteStream())
  })
}

/**
 * Writes frames (sparse-frames.ts) of `lengthBytes` bytes to a file, which is replaced when all is there and durable.
 * @throws CliError IO_ERROR
 */
export async function saveSparse(
  body: AsyncIterable<Buffer>,
  lengthBytes: number,
  { dest, onProgress }: { dest: string; onProgress: (progressBytes: number) => void },
): Promise<void> {
  const present = await stat(dest).catch(() => null)
  await written(dest, async () => {
    // What a link leads to is replaced, not the link.
    const target = present === null ? dest : await realpath(dest)
    const partial = join(dirname(target), `.${basename(target).slice(0, 50)}.atoll-${process.pid}`)
    // The mode is the user's as for every file that a program writes; one that is there keeps its own.
    const handle = await open(partial, constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL, 0o666)
    const forget = removeWhenEnded(partial)
    try {
      try {
        if (present !== null) await handle.chmod(present.mode & 0o7777)
        await readSparse(body, lengthBytes, async (data, offsetBytes) => {
          await writeAll(handle, data, offsetBytes)
          onProgress(offsetBytes + data.length)
        })
        await handle.truncate(lengthBytes)
        await handle.sync()
      } finally {
        await handle.close()
      }
      await rename(partial, target)
    } catch (error) {
      await unlink(partial).catch(() => undefined)
      throw error
    } finally {
      forget()
    }
  })
}

/** A write may store less than it was given, above all the last one before a disk is full. */
async function writeAll(handle: FileHandle, data: Buffer, offsetBytes: number): Promise<void> {
  for (let doneBytes = 0; doneBytes < data.length;) {
    const { bytesWritten } = await handle.write(data, doneBytes, data.length - doneBytes, offsetBytes + doneBytes)
    doneBytes += bytesWritten
  }
}

/** Removes a file if a signal ends this process. Returns what takes that back. */
function removeWhenEnded(path: string): () => void {
  const end = (signal: NodeJS.Signals): void => {
    forget()
    try {
      unlinkSync(path)
    } catch {
      // It has its name already, or cannot be removed.
    }
    // Without the listener it ends the process as it would have.
    process.kill(process.pid, signal)
  }
  const forget = (): void => {
    for (const signal of endingSignals) process.off(signal, end)
  }
  for (const signal of endingSignals) process.on(signal, end)
  return forget
}

async function written(dest: string, write: () => Promise<void>): Promise<void> {
  try {
    await write()
  } catch (error) {
    if (error instanceof CliError) throw error
    throw new CliError('IO_ERROR', `cannot write ${dest}: ${error instanceof Error ? error.message : String(error)}`)
  }
}
