/** Where the bytes of a stream go: into the image, or into the spool. Bytes come in order; `takenBytes` were taken in all. */
import type { Device } from '@atoll/native'
import { nonZeroRuns, zeroBlockBytes } from './non-zero-runs.ts'

export interface ImportSink {
  readonly takenBytes: number
  write(chunk: Buffer): Promise<void>
  /** Makes what was taken durable; returns how much of it is, which is where a later sink of the same content may start. */
  save(): Promise<number>
  /** Stores what is left. Not durable. */
  end(): Promise<void>
}

/** Chunks are gathered to writes of this size. */
const writeBytes = 2 ** 20

/** Writes into a device that reads as zeros, skipping blocks of zeros. */
export class DeviceSink implements ImportSink {
  private readonly device: Device
  private pending: Buffer[] = []
  private pendingBytes = 0
  private writtenBytes: number

  /** @param startBytes where the content goes on; a multiple of 4096 */
  constructor(device: Device, startBytes = 0) {
    this.device = device
    this.writtenBytes = startBytes
  }

  get takenBytes(): number {
    return this.writtenBytes + this.pendingBytes
  }

  async write(chunk: Buffer): Promise<void> {
    this.pending.push(chunk)
    this.pendingBytes += chunk.length
    // Whole blocks only, so that a block of zeros is seen as one wherever the chunks of the stream end.
    if (this.pendingBytes >= writeBytes) await this.writePending(this.pendingBytes - (this.pendingBytes % zeroBlockBytes))
  }

  async save(): Promise<number> {
    await this.writePending(this.pendingBytes - (this.pendingBytes % zeroBlockBytes))
    await this.device.flush()
    return this.writtenBytes
  }

  async end(): Promise<void> {
    await this.writePending(this.pendingBytes)
  }

  private async writePending(lengthBytes: number): Promise<void> {
    const data = Buffer.concat(this.pending)
    for (const { startBytes, endBytes } of nonZeroRuns(data.subarray(0, lengthBytes))) {
      await this.device.write(this.writtenBytes + startBytes, data.subarray(startBytes, endBytes))
    }
    this.writtenBytes += lengthBytes
    this.pending = [data.subarray(lengthBytes)]
    this.pendingBytes -= lengthBytes
  }
}
