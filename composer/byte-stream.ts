/**
 * What somebody sends, chunk by chunk, until it ends, breaks or is not wanted any more.
 *
 * Rule: who reads it ends it (`end`), whatever comes of it; who opened what it comes from closes that. A request must stay open
 * until it is answered, so its stream is handed over in a way that an end does not close it.
 */
import { AtollError, type ErrorCode } from '@atoll/core'

export class ByteStream {
  private readonly iterator: AsyncIterator<Uint8Array>
  private readonly lost: { code: ErrorCode; what: string }

  /** @param lost what a stream that breaks off is called, and the code of that */
  constructor(stream: AsyncIterable<Uint8Array>, lost: { code: ErrorCode; what: string }) {
    this.iterator = stream[Symbol.asyncIterator]()
    this.lost = lost
  }

  /**
   * The next bytes, at least one; null at the end. A signal that is aborted while they are waited for ends the waiting.
   * @throws AtollError with the code for a lost stream; the reason of the signal
   */
  async next(signal?: AbortSignal): Promise<Buffer | null> {
    for (;;) {
      const step = await this.step(signal)
      if (step.done === true) return null
      const { value } = step
      if (value.length > 0) return Buffer.from(value.buffer, value.byteOffset, value.length)
    }
  }

  private async step(signal: AbortSignal | undefined): Promise<IteratorResult<Uint8Array>> {
    if (signal === undefined) return await this.received()
    signal.throwIfAborted()
    const aborted = Promise.withResolvers<never>()
    const abort = (): void => aborted.reject(signal.reason as Error)
    signal.addEventListener('abort', abort, { once: true })
    try {
      return await Promise.race([this.received(), aborted.promise])
    } finally {
      signal.removeEventListener('abort', abort)
    }
  }

  private async received(): Promise<IteratorResult<Uint8Array>> {
    try {
      return await this.iterator.next()
    } catch (error) {
      const why = error instanceof Error ? error.message : String(error)
      throw new AtollError(this.lost.code, `the ${this.lost.what} broke off: ${why}`, { cause: error })
    }
  }

  /** Tells the sender that nothing more is read. Not waited for: a read that is under way may never end. */
  end(): void {
    this.iterator.return?.().catch(() => {
      // It failed before; the reader knows.
    })
  }
}
