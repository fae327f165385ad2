// What the tests of clients start from: a daemon, and volumes that are clones of an image with data and holes.
import { randomFillSync } from 'node:crypto'
import { open, readFile } from 'node:fs/promises'
import { join } from 'node:path'
import { TestHome } from '../test-home.ts'

export const KiB = 1024
export const MiB = 1024 * KiB

/** Size of the image and of its clones. */
export const diskBytes = 64 * MiB

/** Where the image has data: at its edges, across a slot's edge, and as a run. Everything else is a hole. */
const dataRanges: readonly (readonly [offsetBytes: number, lengthBytes: number])[] = [
  [0, 3 * MiB],
  [10 * MiB + 512, 3 * KiB],
  [20 * MiB, 64 * KiB],
  [31 * MiB - 100, 200],
  [40 * MiB, 5 * MiB],
  [diskBytes - 8 * KiB, 8 * KiB],
]
export const dataBytes = dataRanges.reduce((sum, [, lengthBytes]) => sum + lengthBytes, 0)

/** What a client shows of a map: a range, and whether it reads as zeros without being stored. */
export interface MappedRange {
  readonly offset: number
  readonly length: number
  readonly zero: boolean
}

/** A daemon with the image `base`. `await using` ends it and removes everything. */
export class ClientStand {
  readonly home: TestHome
  /** The content of the image, and the file it came from. */
  readonly content: Buffer
  readonly contentPath: string
  private readonly uris = new Map<string, string>()

  private constructor(home: TestHome, content: Buffer, contentPath: string) {
    this.home = home
    this.content = content
    this.contentPath = contentPath
  }

  static async create(): Promise<ClientStand> {
    const home = await TestHome.create()
    try {
      await home.start()
      const content = makeContent()
      const contentPath = join(home.path, 'base.raw')
      await writeSparse(contentPath, content)
      home.cli('image', 'import', 'base', contentPath, '--format', 'raw')
      return new ClientStand(home, content, contentPath)
    } catch (error) {
      await home[Symbol.asyncDispose]()
      throw error
    }
  }

  /** The path of a file that goes with the home. */
  file(name: string): string {
    return join(this.home.path, name)
  }

  /** Makes a clone of the image and attaches it; returns its URI. */
  clone(name: string): string {
    this.home.cli('volume', 'create', name, '--from', 'image:base')
    return this.attach(name)
  }

  /** Makes an empty volume and attaches it; returns its URI. */
  empty(name: string, sizeBytes = diskBytes): string {
    this.home.cli('volume', 'create', name, '--size', String(sizeBytes))
    return this.attach(name)
  }

  /** Attaches a volume; returns its URI, which stays the same over restarts. */
  attach(name: string, ...options: string[]): string {
    const uri = this.home.cli('volume', 'attach', name, '--format', 'uri', ...options)
    this.uris.set(name, uri)
    return uri
  }

  /** Kills the daemon as a crash does, and starts it again. */
  async crash(): Promise<void> {
    await this.home.end('SIGKILL')
    await this.home.start()
  }

  /** Bytes that a volume alone holds. */
  usedBytes(name: string): number {
    return this.home.json<{ usedBytes: number }>('volume', 'show', name).usedBytes
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.home[Symbol.asyncDispose]()
  }
}

/** Fresh random content with the data and holes of `dataRanges`. */
export function makeContent(): Buffer {
  const content = Buffer.alloc(diskBytes)
  for (const [offsetBytes, lengthBytes] of dataRanges) randomFillSync(content, offsetBytes, lengthBytes)
  return content
}

/** Writes content to a file with holes where it is zero (in steps of 4 KiB). */
export async function writeSparse(path: string, content: Buffer): Promise<void> {
  const file = await open(path, 'w')
  try {
    await file.truncate(content.length)
    const step = 4 * KiB
    for (let at = 0; at < content.length; at += step) {
      const piece = content.subarray(at, at + step)
      if (!isZero(piece)) await file.write(piece, 0, piece.length, at)
    }
  } finally {
    await file.close()
  }
}

export function isZero(bytes: Buffer): boolean {
  return bytes.equals(Buffer.alloc(bytes.length))
}

/**
 * Says what is wrong with a map of `content`: it must cover it without gaps, call nothing zero that is not, and show at most
 * `slackBytes` more data than there is. Null: nothing.
 */
export function mapTrouble(map: readonly MappedRange[], content: Buffer, slackBytes: number): string | null {
  let at = 0
  let shownBytes = 0
  for (const { offset, length, zero } of map) {
    if (offset !== at) return `the map goes on at ${offset} after ${at}`
    at += length
    if (!zero) shownBytes += length
    else if (!isZero(content.subarray(offset, at))) return `${offset}+${length} is said to be zero and is not`
  }
  if (at !== content.length) return `the map ends at ${at} of ${content.length}`
  const holdsBytes = nonZeroSlotBytes(content)
  if (shownBytes > holdsBytes + slackBytes) return `${shownBytes} bytes are said to be data, and ${holdsBytes} are`
  return null
}

/** Bytes of the 4 KiB slots that are not all zeros. */
function nonZeroSlotBytes(content: Buffer): number {
  const step = 4 * KiB
  let sum = 0
  for (let at = 0; at < content.length; at += step) if (!isZero(content.subarray(at, at + step))) sum += step
  return sum
}

/** Where two contents differ first; null when they are the same. Cheaper to read than a diff of 64 MiB. */
export function firstDifference(found: Buffer, expected: Buffer): string | null {
  if (found.length !== expected.length) return `${found.length} bytes instead of ${expected.length}`
  if (found.equals(expected)) return null
  const at = found.findIndex((byte, index) => byte !== expected[index])
  return `byte ${at} is ${found[at]} instead of ${expected[at]}`
}

/** As `firstDifference`, for a file. */
export async function fileDifference(path: string, expected: Buffer): Promise<string | null> {
  return firstDifference(await readFile(path), expected)
}
