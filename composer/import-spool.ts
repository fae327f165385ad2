/**
 * Files in the home that hold a foreign image while it arrives, because its format needs random access. Each is named after
 * the image it becomes, so that those without an unfinished job are found and removed at the start.
 *
 * A spool never fills the home: the catalog lives there, too. `spoolReserveBytes` stay free.
 */
import { constants, mkdir, open, readdir, rm, stat, statfs, type FileHandle } from 'node:fs/promises'
import { join } from 'node:path'
import { AtollError, NoSpaceError, type Logger } from '@atoll/core'
import type { ImportSink } from './import-sink.ts'

/** What a spool leaves free on the home's file system. */
export const spoolReserveBytes = 512 * 2 ** 20
/** The room is looked at again after so many bytes. */
const roomCheckBytes = 64 * 2 ** 20

export class Spool {
  readonly directory: string

  constructor(home: string) {
    this.directory = join(home, 'spool')
  }

  pathOf(imageId: string): string {
    return join(this.directory, imageId)
  }

  /**
   * Opens the spool of an image for writing at `startBytes`, or an empty one with 0. Close it.
   * @param sizeBytes what will be written in all, if it is known
   * @throws NoSpaceError
   * @throws AtollError IMAGE_STREAM_LOST when less than `startBytes` is there
   */
  async open(imageId: string, startBytes: number, sizeBytes: number | null): Promise<SpoolSink> {
    await mkdir(this.directory, { recursive: true, mode: 0o700 })
    await this.requireRoom((sizeBytes ?? startBytes) - startBytes)
    const flags = constants.O_RDWR | constants.O_CREAT | constants.O_NOFOLLOW
    // Only we can enter the directory. The confined qemu-img may read the file when it is handed over as a descriptor.
    const handle = await open(this.pathOf(imageId), flags, 0o644)
    try {
      if ((await handle.stat()).size < startBytes) {
        throw new AtollError(
          'IMAGE_STREAM_LOST',
          `what had arrived of the image is gone from ${this.directory}: start the import again`,
          {
            values: { path: this.pathOf(imageId), sizeBytes: startBytes },
          },
        )
      }
      // What lies behind was not saved, so it may be anything.
      await handle.truncate(startBytes)
      if (startBytes === 0) await this.syncDirectory()
      return new SpoolSink(this, handle, startBytes)
    } catch (error) {
      await handle.close()
      throw error
    }
  }

  /** Whether as much of an image is here. Not so after a daemon with another home went on with the import. */
  async holds(imageId: string, lengthBytes: number): Promise<boolean> {
    try {
      return (await stat(this.pathOf(imageId))).size >= lengthBytes
    } catch (error) {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return false
      throw error
    }
  }

  /** @throws NoSpaceError when `wantedBytes` more would leave too little */
  async requireRoom(wantedBytes: number): Promise<void> {
    const { bavail, bsize } = await statfs(this.directory)
    const freeBytes = bavail * bsize
    if (freeBytes - spoolReserveBytes >= wantedBytes) return
    throw new NoSpaceError(
      `the image must be stored in the home before it can be converted, and ${this.directory} has ${freeBytes} bytes free, of which ${spoolReserveBytes} are kept: ${wantedBytes} more do not fit`,
      { values: { path: this.directory, freeBytes, wantedBytes, reserveBytes: spoolReserveBytes } },
    )
  }

  /** The name must be as durable as what a cursor vouches for. */
  private async syncDirectory(): Promise<void> {
    const directory = await open(this.directory, constants.O_RDONLY | constants.O_DIRECTORY)
    try {
      await directory.sync()
    } finally {
      await directory.close()
    }
  }

  /** Nothing happens if there is none. */
  async remove(imageId: string): Promise<void> {
    await rm(this.pathOf(imageId), { force: true })
  }

  /** Removes what no unfinished import owns. */
  async removeOrphans(imageIds: ReadonlyMap<string, string>, log: Logger): Promise<void> {
    const names = await readdir(this.directory).catch((error: unknown) => {
      if ((error as NodeJS.ErrnoException).code === 'ENOENT') return []
      throw error
    })
    for (const name of names) {
      if (imageIds.has(name)) continue
      await rm(join(this.directory, name), { force: true })
      log.warn({ imageId: name }, 'the spool of an import that nobody works on was removed')
    }
  }
}

export class SpoolSink implements ImportSink {
  takenBytes: number
  private readonly spool: Spool
  private readonly handle: FileHandle
  private checkedBytes: number

  constructor(spool: Spool, handle: FileHandle, startBytes: number) {
    this.spool = spool
    this.handle = handle
    this.takenBytes = startBytes
    this.checkedBytes = startBytes
  }

  async write(chunk: Buffer): Promise<void> {
    if (this.takenBytes + chunk.length - this.checkedBytes >= roomCheckBytes) {
      await this.spool.requireRoom(chunk.length)
      this.checkedBytes = this.takenBytes
    }
    let doneBytes = 0
    while (doneBytes < chunk.length) {
      const { bytesWritten } = await this.handle.write(chunk, doneBytes, chunk.length - doneBytes, this.takenBytes + doneBytes)
      doneBytes += bytesWritten
    }
    this.takenBytes += chunk.length
  }

  async save(): Promise<number> {
    await this.handle.datasync()
    return this.takenBytes
  }

  async end(): Promise<void> {
    // Everything is in the file already.
  }

  async close(): Promise<void> {
    await this.handle.close()
  }
}
