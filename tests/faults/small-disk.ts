/** A file system of a fixed size that a test can fill: a tmpfs of its own, which only root can mount. */
import { spawnSync } from 'node:child_process'
import { mkdtemp, rm, statfs } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

export class SmallDisk {
  /** Where it is mounted. */
  readonly path: string
  /** A folder beside it, which never fills. */
  readonly outside: string

  private constructor(outside: string, path: string) {
    this.outside = outside
    this.path = path
  }

  /** @throws Error with what mount said */
  static async mount(sizeBytes: number): Promise<SmallDisk> {
    // Short, because the path of a socket has 107 bytes.
    const outside = await mkdtemp(join(tmpdir(), 'atoll-disk-'))
    const path = join(outside, 'h')
    const made = spawnSync('mkdir', ['-m', '700', path])
    const result = made.status === 0 ? mountTmpfs(path, sizeBytes) : made
    if (result.status === 0) return new SmallDisk(outside, path)
    await rm(outside, { recursive: true, force: true })
    throw new Error(`mount -t tmpfs: ${String(result.stderr)}${result.error?.message ?? ''}`)
  }

  async freeBytes(): Promise<number> {
    const { bavail, bsize } = await statfs(this.path)
    return bavail * bsize
  }

  async [Symbol.asyncDispose](): Promise<void> {
    const result = spawnSync('umount', [this.path], { encoding: 'utf8' })
    if (result.status !== 0) throw new Error(`umount ${this.path}: ${result.stderr}`)
    await rm(this.outside, { recursive: true, force: true })
  }
}

/** Why no file system can be mounted here; null if one can. */
export async function whyNoSmallDisk(): Promise<string | null> {
  try {
    await using _ = await SmallDisk.mount(1 << 20)
    return null
  } catch (error) {
    return (error as Error).message.trim()
  }
}

function mountTmpfs(path: string, sizeBytes: number): ReturnType<typeof spawnSync> {
  return spawnSync('mount', ['-t', 'tmpfs', '-o', `size=${sizeBytes},mode=700`, 'atoll-test', path], { encoding: 'utf8' })
}
