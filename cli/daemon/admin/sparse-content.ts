// Content as frames (sparse-frames.ts): what is not allocated is neither read nor sent, and blocks of zeros are not sent.
import type { FileReader } from '@atoll/composer'
import { sparseHeader } from '../../sparse-frames.ts'

export class SparseContent implements AsyncIterableIterator<Uint8Array> {
  readonly #content: FileReader
  #ended = false

  /** It reads `content` to its end, or closes it. */
  constructor(content: FileReader) {
    this.#content = content
  }

  [Symbol.asyncIterator](): this {
    return this
  }

  async next(): Promise<IteratorResult<Uint8Array>> {
    if (this.#ended) return await this.return()
    const stretches = await this.#content.nextStretches()
    if (stretches !== null) {
      const parts = stretches.flatMap(({ atBytes, data }) => [sparseHeader(atBytes, data.length), data])
      return { done: false, value: Buffer.concat(parts) }
    }
    this.#ended = true
    return { done: false, value: sparseHeader(this.#content.lengthBytes, 0) }
  }

  /** Also before the first `next`: a stream over this calls it whenever it is done. */
  async return(): Promise<IteratorResult<Uint8Array>> {
    return await this.#content.return()
  }
}
