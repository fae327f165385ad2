/** The content of something, or a range of it, piece by piece. It holds what it reads until it ends or is given up. */
import type { Device } from '@atoll/native'

/** Read at once: bounds what a reader keeps in memory. */
const pieceBytes = 2 ** 20

export class FileReader implements AsyncIterableIterator<Uint8Array> {
  private readonly device: Device | null
  private readonly release: () => Promise<void>
  private offsetBytes: number
  private readonly endBytes: number
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
    this.offsetBytes = range.offsetBytes
    this.endBytes = range.offsetBytes + range.lengthBytes
  }

  [Symbol.asyncIterator](): this {
    return this
  }

  async next(): Promise<IteratorResult<Uint8Array>> {
    if (this.failure !== null) throw this.failure
    const lengthBytes = Math.min(pieceBytes, this.endBytes - this.offsetBytes)
    if (this.device === null || lengthBytes <= 0 || this.released !== null) return await this.return()
    try {
      const value = await this.device.read(this.offsetBytes, lengthBytes)
      this.offsetBytes += lengthBytes
      return { done: false, value }
    } catch (error) {
      await this.close()
      throw error
    }
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
}
