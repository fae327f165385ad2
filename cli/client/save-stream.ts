// Where a download goes: a file of our own beside the destination, which gets its name when it is whole, so that an
// interrupted one leaves the old file; or standard output, a pipe or a device, which take the bytes as they come.
import { constants } from 'node:fs'
import { open, realpath, rename, stat, unlink } from 'node:fs/promises'
import type { FileHandle } from 'node:fs/promises'
import { basename, dirname, join } from 'node:path'
import type { Readable } from 'node:stream'
import { pipeline } from 'node:stream/promises'
import { CliError } from './cli-error.ts'

/** Blocks of zeros of this size become holes. */
const holeBytes = 4096
const zeros = Buffer.alloc(64 * 1024)

/**
 * Writes a stream of `lengthBytes` bytes to a path, or (`-`) to standard output.
 * @throws CliError IO_ERROR, DESTINATION_INVALID
 */
export async function saveStream(body: Readable, lengthBytes: number, dest: string): Promise<void> {
  if (dest === '-') {
    await pipeline(body, process.stdout, { end: false })
    return
  }
  const present = await stat(dest).catch(() => null)
  if (present?.isDirectory() === true) {
    throw new CliError('DESTINATION_INVALID', `${dest} is a directory: name a file in it`)
  }
  if (present !== null && !present.isFile()) {
    await written(dest, async () => {
      const handle = await open(dest, constants.O_WRONLY)
      await pipeline(body, handle.createWriteStream())
    })
    return
  }
  // What a link leads to is replaced, not the link.
  const target = present === null ? dest : await realpath(dest)
  const partial = join(dirname(target), `.${basename(target).slice(0, 50)}.atoll-${process.pid}`)
  await written(dest, async () => {
    // The mode is the user's as for every file that a program writes; one that is there keeps its own.
    const handle = await open(partial, constants.O_WRONLY | constants.O_CREAT | constants.O_EXCL, present?.mode ?? 0o666)
    try {
      try {
        await writeSparse(handle, body, lengthBytes)
      } finally {
        await handle.close()
      }
      await rename(partial, target)
    } catch (error) {
      await unlink(partial).catch(() => undefined)
      throw error
    }
  })
}

async function writeSparse(handle: FileHandle, body: Readable, lengthBytes: number): Promise<void> {
  let offsetBytes = 0
  for await (const chunk of body as AsyncIterable<Buffer>) {
    const isHole =
      chunk.length >= holeBytes && chunk.length <= zeros.length && zeros.compare(chunk, 0, chunk.length, 0, chunk.length) === 0
    if (!isHole) await handle.write(chunk, 0, chunk.length, offsetBytes)
    offsetBytes += chunk.length
  }
  if (offsetBytes !== lengthBytes) throw new Error(`it ended after ${offsetBytes} of ${lengthBytes} bytes`)
  await handle.truncate(lengthBytes)
}

async function written(dest: string, write: () => Promise<void>): Promise<void> {
  try {
    await write()
  } catch (error) {
    if (error instanceof CliError) throw error
    throw new CliError('IO_ERROR', `cannot write ${dest}: ${error instanceof Error ? error.message : String(error)}`)
  }
}
