/** What somebody sends, chunk by chunk, until it ends, breaks or is not wanted any more. */
import { AtollError } from '@atoll/core'

export class ByteStream {
  private readonly iterator: AsyncIterator<Uint8Array>
  private readonly signal: AbortSignal

  /** @param signal aborted with an error: nothing more is waited for */
  constructor(stream: AsyncIterable<Uint8Array>, signal: AbortSignal) {
    this.iterator = stream[Symbol.asyncIterator]()
    this.signal = signal
  }

  /** The next bytes, at least one; null at the end. @throws AtollError FILE_STREAM_LOST, or the reason of the signal */
  async next(): Promise<Buffer | null> {
    for (;;) {
      const step = await this.step()
      if (step.done === true) return null
      const { value } = step
      if (value.length > 0) return Buffer.from(value.buffer, value.byteOffset, value.length)
    }
  }

  private async step(): Promise<IteratorResult<Uint8Array>> {
    this.signal.throwIfAborted()
    const aborted = Promise.withResolvers<never>()
    const abort = (): void => aborted.reject(this.signal.reason as Error)
    this.signal.addEventListener('abort', abort, { once: true })
    try {
      return await Promise.race([this.received(), aborted.promise])
    } finally {
      this.signal.removeEventListener('abort', abort)
    }
  }

  private async received(): Promise<IteratorResult<Uint8Array>> {
    try {
      return await this.iterator.next()
    } catch (error) {
      const why = error instanceof Error ? error.message : String(error)
      throw new AtollError('FILE_STREAM_LOST', `the content broke off: ${why}`, { cause: error })
    }
  }

  /** Tells the sender that nothing more is read. Not waited for: a read that is under way may never end. */
  end(): void {
    this.iterator.return?.().catch(() => {
      // It failed before; the reader knows.
    })
  }
}
