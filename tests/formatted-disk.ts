/** A file system of a kind that a test names, in an image on a loop device, which only root can mount. */
import { spawnSync } from 'node:child_process'
import { mkdir, mkdtemp, open, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'

/** Kinds whose files can share blocks, how they are made, and the Debian package that has the program. */
export const sharingKinds = {
  xfs: { command: ['mkfs.xfs', '-q', '-m', 'reflink=1'], debianPackage: 'xfsprogs' },
  btrfs: { command: ['mkfs.btrfs', '-q'], debianPackage: 'btrfs-progs' },
} as const

export type SharingKind = keyof typeof sharingKinds

/** What mkfs.xfs takes at least. The image is sparse. */
const imageBytes = 512 * 2 ** 20

// sbin holds the programs and is not on every user's PATH.
const env = { ...process.env, PATH: `${process.env['PATH'] ?? ''}:/usr/sbin:/sbin` }

export class FormattedDisk {
  /** Where it is mounted. */
  readonly path: string
  readonly #folder: string

  private constructor(folder: string, path: string) {
    this.#folder = folder
    this.path = path
  }

  /** @throws Error with what is missing, or what the programs said */
  static async make(kind: SharingKind): Promise<FormattedDisk> {
    const folder = await mkdtemp(join(tmpdir(), `atoll-${kind}-`))
    try {
      const [image, path] = [join(folder, 'image'), join(folder, 'disk')]
      await using file = await open(image, 'wx')
      await file.truncate(imageBytes)
      await mkdir(path)
      const [program, ...options] = sharingKinds[kind].command
      run(program, ...options, image)
      run('mount', '-o', 'loop', image, path)
      return new FormattedDisk(folder, path)
    } catch (error) {
      await rm(folder, { recursive: true, force: true })
      throw error
    }
  }

  async [Symbol.asyncDispose](): Promise<void> {
    // Handles that wait for their garbage collector keep it, and the loop device, only until they are gone.
    run('umount', '--lazy', this.path)
    await rm(this.#folder, { recursive: true, force: true })
  }
}

/** Why no such file system can be mounted here; null if one can. */
export async function whyNoFormattedDisk(kind: SharingKind): Promise<string | null> {
  try {
    await using _ = await FormattedDisk.make(kind)
    return null
  } catch (error) {
    return `no ${kind} (package ${sharingKinds[kind].debianPackage}): ${(error as Error).message.trim()}`
  }
}

function run(program: string, ...options: string[]): void {
  const { status, stderr, error } = spawnSync(program, options, { env, encoding: 'utf8' })
  if (status !== 0) throw new Error(`${program}: ${error?.message ?? stderr}`)
}
