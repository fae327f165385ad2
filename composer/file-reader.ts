/** The content of something, or a range of it, piece by piece. It holds what it reads until it ends or is given up. */
import type { Device } from '@atoll/native'
import { nonZeroRuns } from './non-zero-runs.ts'

/** Read at once: bounds what a reader keeps in memory. */
const pieceBytes = 2 ** 20
/** What is looked over at once for what is allocated: a step that takes milliseconds, however large the whole is. */
const lookBytes = 2 ** 40
/** Extents asked for at once. */
const extentsPerLook = 64
/** What is not allocated between two extents is read with them if it is no more than this: a read more costs more. */
const gapBytesMax = 2 ** 16

/** Some of the content that is not all zeros. */
export interface Stretch {
  /** From the beginning of the range. */
  readonly atBytes: number
  readonly data: Uint8Array
}

export class FileReader implements AsyncIterableIterator<Uint8Array> {
  /** Of the range. */
  readonly lengthBytes: number
  private readonly device: Device | null
  private readonly release: () => Promise<void>
  private readonly startBytes: number
  private readonly endBytes: number
  private offsetBytes: number
  /** Where what is allocated lies, from `offsetBytes` on, as far as it was looked up. */
  private extents: { startBytes: number; endBytes: number }[] = []
  private lookedBytes: number
  private released: Promise<void> | null = null
  private failure: unknown = null

  /** @param device null for an empty range; `release` is called once */
  constructor(
    device: Device | null,
    range: { offsetBytes: number; lengthBytes: number },
    release: () => Promise<void> = async () => undefined,
  ) {
    this.device = device
    this.release = release
    this.lengthBytes = range.lengthBytes
    this.startBytes = range.offsetBytes
    this.endBytes = range.offsetBytes + range.lengthBytes
    this.offsetBytes = range.offsetBytes
    this.lookedBytes = range.offsetBytes
  }

  [Symbol.asyncIterator](): this {
    return this
  }

  async next(): Promise<IteratorResult<Uint8Array>> {
    const value = await this.step(async (device) => await this.piece(device, this.endBytes))
    return value === null ? await this.return() : { done: false, value }
  }

  /**
   * The next pieces that are not zeros, at most 1 MiB together; null at the end. Instead of `next`: what is not allocated is not
   * read.
   */
  async nextStretches(): Promise<Stretch[] | null> {
    return await this.step(async (device) => {
      for (;;) {
        // Somebody may have let go meanwhile.
        if (this.failure !== null) throw this.failure
        const extent = await this.nextExtent(device)
        if (extent === null) return null
        this.offsetBytes = Math.max(this.offsetBytes, extent.startBytes)
        const from = this.offsetBytes
        const data = await this.piece(device, extent.endBytes)
        const runs = nonZeroRuns(data)
        if (runs.length > 0) {
          return runs.map(({ startBytes, endBytes }) => ({
            atBytes: from + startBytes - this.startBytes,
            data: data.subarray(startBytes, endBytes),
          }))
        }
      }
    })
  }

  /** Also before the first `next`: a stream over this calls it whenever it is done. */
  async return(): Promise<IteratorResult<Uint8Array>> {
    await this.close()
    return { done: true, value: undefined }
  }

  /** Lets go before the end: who reads on gets this error. */
  async abort(error: unknown): Promise<void> {
    this.failure = error
    await this.close()
  }

  /** Lets go; idempotent. */
  async close(): Promise<void> {
    await (this.released ??= this.release())
  }

  /** Runs a read and lets go when it fails, or when there is nothing more. */
  private async step<T>(read: (device: Device) => Promise<T | null>): Promise<T | null> {
    if (this.failure !== null) throw this.failure
    if (this.device === null || this.offsetBytes >= this.endBytes || this.released !== null) {
      await this.close()
      return null
    }
    try {
      return await read(this.device)
    } catch (error) {
      await this.close()
      throw error
    }
  }

  private async piece(device: Device, endBytes: number): Promise<Uint8Array> {
    const lengthBytes = Math.min(pieceBytes, endBytes - this.offsetBytes)
    const data = await device.read(this.offsetBytes, lengthBytes)
    this.offsetBytes += lengthBytes
    return data
  }

  /** What is allocated from `offsetBytes` on; null: nothing. */
  private async nextExtent(device: Device): Promise<{ startBytes: number; endBytes: number } | null> {
    for (;;) {
      const extent = this.extents.find(({ endBytes }) => endBytes > this.offsetBytes)
      if (extent !== undefined) return extent
      if (this.lookedBytes >= this.endBytes) return null
      const lengthBytes = Math.min(lookBytes, this.endBytes - this.lookedBytes)
      this.extents = []
      for (const status of await device.blockStatus(this.lookedBytes, lengthBytes, extentsPerLook)) {
        const startBytes = this.lookedBytes
        this.lookedBytes += status.lengthBytes
        if (status.zero) continue
        const last = this.extents.at(-1)
        if (last !== undefined && startBytes - last.endBytes <= gapBytesMax) last.endBytes = this.lookedBytes
        else this.extents.push({ startBytes, endBytes: this.lookedBytes })
      }
      if (this.failure !== null) throw this.failure
    }
  }
}
