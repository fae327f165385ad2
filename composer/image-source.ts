/**
 * The file that an import reads. It is opened once and read through its descriptor, also by the engine, so that nobody can
 * put another file under the path between the inspection and the copy; after a restart it must be the same file again.
 */
import { constants, open, type FileHandle } from 'node:fs/promises'
import { isAbsolute } from 'node:path'
import { AtollError, type JsonObject } from '@atoll/core'
import { magicHeadBytes, magicTailBytes } from './image-format.ts'
import type { ByteSource } from './image-metadata.ts'

/** What must stay the same while an import reads its source; stands in the job. */
export interface SourceIdentity extends JsonObject {
  path: string
  sizeBytes: number
  /** Nanoseconds since 1970, as text: beyond the exact numbers. */
  modifiedNs: string
  inode: string
  deviceNumber: string
}

export class ImageSource implements ByteSource {
  readonly identity: SourceIdentity
  private readonly handle: FileHandle

  private constructor(handle: FileHandle, identity: SourceIdentity) {
    this.handle = handle
    this.identity = identity
  }

  /** @throws AtollError IMAGE_SOURCE_INVALID */
  static async open(path: string): Promise<ImageSource> {
    const invalid = (why: string, cause?: unknown): AtollError =>
      new AtollError('IMAGE_SOURCE_INVALID', `${JSON.stringify(path)} cannot be imported: ${why}`, { values: { path }, cause })
    if (!isAbsolute(path) || path.includes('\0')) throw invalid('it is not an absolute path')
    let handle: FileHandle
    try {
      // Not blocking: a pipe without a writer would hold up the open for ever.
      handle = await open(path, constants.O_RDONLY | constants.O_NONBLOCK)
    } catch (error) {
      throw invalid(
        (error as NodeJS.ErrnoException).code === 'ENOENT' ? 'there is no such file' : (error as Error).message,
        error,
      )
    }
    try {
      const identity = await identityOf(handle, path)
      if (identity === null) throw invalid('it is not a regular file')
      return new ImageSource(handle, identity)
    } catch (error) {
      await handle.close()
      throw error
    }
  }

  /** Opens the file of an earlier import. @throws AtollError IMAGE_SOURCE_INVALID, IMAGE_SOURCE_CHANGED */
  static async openAgain(identity: SourceIdentity): Promise<ImageSource> {
    const source = await ImageSource.open(identity.path)
    try {
      requireSame(identity, source.identity)
      return source
    } catch (error) {
      await source.close()
      throw error
    }
  }

  get sizeBytes(): number {
    return this.identity.sizeBytes
  }

  /** A path by which this process opens the very file that is open here. */
  get descriptorPath(): string {
    return `/proc/self/fd/${this.handle.fd}`
  }

  /** The descriptor itself, for reading; it is open until `close`. */
  get descriptor(): number {
    return this.handle.fd
  }

  /** Its type and permissions, as in `Stats`. */
  async mode(): Promise<number> {
    return (await this.handle.stat()).mode
  }

  /** @throws AtollError IMAGE_SOURCE_CHANGED if the file became shorter */
  async read(offsetBytes: number, lengthBytes: number): Promise<Buffer> {
    const buffer = Buffer.alloc(lengthBytes)
    let doneBytes = 0
    while (doneBytes < lengthBytes) {
      const { bytesRead } = await this.handle.read(buffer, doneBytes, lengthBytes - doneBytes, offsetBytes + doneBytes)
      if (bytesRead === 0) throw changed(this.identity.path)
      doneBytes += bytesRead
    }
    return buffer
  }

  /** The bytes by which the format is told. */
  async magicBytes(): Promise<{ head: Buffer; tail: Buffer }> {
    const tailBytes = Math.min(magicTailBytes, this.sizeBytes)
    return {
      head: await this.read(0, Math.min(magicHeadBytes, this.sizeBytes)),
      tail: await this.read(this.sizeBytes - tailBytes, tailBytes),
    }
  }

  /** @throws AtollError IMAGE_SOURCE_CHANGED if size or time of modification are not what they were */
  async requireUnchanged(): Promise<void> {
    requireSame(this.identity, await identityOf(this.handle, this.identity.path))
  }

  async close(): Promise<void> {
    await this.handle.close()
  }
}

async function identityOf(handle: FileHandle, path: string): Promise<SourceIdentity | null> {
  const status = await handle.stat({ bigint: true })
  if (!status.isFile()) return null
  return {
    path,
    sizeBytes: Number(status.size),
    modifiedNs: String(status.mtimeNs),
    inode: String(status.ino),
    deviceNumber: String(status.dev),
  }
}

function requireSame(before: SourceIdentity, now: SourceIdentity | null): void {
  const same =
    now !== null &&
    before.sizeBytes === now.sizeBytes &&
    before.modifiedNs === now.modifiedNs &&
    before.inode === now.inode &&
    before.deviceNumber === now.deviceNumber
  if (!same) throw changed(before.path)
}

function changed(path: string): AtollError {
  return new AtollError('IMAGE_SOURCE_CHANGED', `${path} changed while it was imported: import it again when nothing writes it`, {
    values: { path },
  })
}
