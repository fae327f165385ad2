import type { NegotiationLimits } from './negotiation-limits.ts'
import { newstyleMagic, option, optionHeaderBytes, optionReplyHeaderBytes, optionReplyMagic } from './protocol.ts'

/** What the negotiation needs of a connection; the native `Connection` is one. */
export interface NegotiationSocket {
  /** Exactly `lengthBytes` bytes, or null when the peer closed before. */
  read(lengthBytes: number): Promise<Uint8Array | null>
  write(bytes: Uint8Array): Promise<void>
}

/** The negotiation is over without transmission, and the connection is to be closed. Not a failure of ours. */
export class NegotiationEnded extends Error {
  constructor(reason: string) {
    super(reason)
    this.name = 'NegotiationEnded'
  }
}

/** An option as it came; nothing in it is checked but its length. */
export interface ReceivedOption {
  readonly number: number
  readonly data: Buffer
}

/** One answer. */
export interface Reply {
  readonly type: number
  readonly data?: Uint8Array
}

/** Longest single read of a native connection. */
const readBytesMax = 64 * 1024
const noData = new Uint8Array()

/** Options in, answers out, always in step: the data of an option is consumed whatever becomes of the option. */
export class OptionChannel {
  readonly #socket: NegotiationSocket
  readonly #limits: NegotiationLimits
  #optionCount = 0

  constructor(socket: NegotiationSocket, limits: NegotiationLimits) {
    this.#socket = socket
    this.#limits = limits
  }

  /** @throws NegotiationEnded when the peer closes. */
  async read(lengthBytes: number): Promise<Buffer> {
    const bytes = await this.#socket.read(lengthBytes)
    if (bytes === null) throw new NegotiationEnded('the client closed the connection')
    return Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength)
  }

  write(bytes: Uint8Array): Promise<void> {
    return this.#socket.write(bytes)
  }

  /**
   * The next option whose data is not too long; longer ones are answered `tooLongReply` here. The data of ABORT means nothing and
   * may have any length.
   * @throws NegotiationEnded at the end, out of step, beyond a bound.
   */
  async nextOption(tooLongReply: number): Promise<ReceivedOption> {
    for (;;) {
      this.#optionCount += 1
      if (this.#optionCount > this.#limits.optionCountMax)
        throw new NegotiationEnded(`more than ${this.#limits.optionCountMax} options`)
      const header = await this.read(optionHeaderBytes)
      const magic = header.readBigUInt64BE(0)
      if (magic !== newstyleMagic) throw new NegotiationEnded(`an option starts with 0x${magic.toString(16)}: out of step`)
      const number = header.readUInt32BE(8)
      const lengthBytes = header.readUInt32BE(12)
      if (lengthBytes <= this.#limits.optionDataBytesMax) return { number, data: await this.#readData(lengthBytes) }
      if (lengthBytes > this.#limits.optionDataSkippedBytesMax) {
        throw new NegotiationEnded(
          `option ${number} has ${lengthBytes} bytes, more than ${this.#limits.optionDataSkippedBytesMax}`,
        )
      }
      if (number === option.exportName) {
        throw new NegotiationEnded(`option ${number} has ${lengthBytes} bytes and no way to be refused`)
      }
      for (let left = lengthBytes; left > 0; left -= Math.min(left, readBytesMax)) await this.read(Math.min(left, readBytesMax))
      if (number === option.abort) return { number, data: Buffer.alloc(0) }
      await this.refuse(number, tooLongReply, `${lengthBytes} bytes of data; the limit is ${this.#limits.optionDataBytesMax}`)
    }
  }

  /** Sends the answers to an option in one go. */
  reply(number: number, ...replies: readonly Reply[]): Promise<void> {
    return this.write(Buffer.concat(replies.flatMap(({ type, data = noData }) => [replyHeader(number, type, data.length), data])))
  }

  /** Answers with an error and a sentence for the client's user. */
  refuse(number: number, type: number, message: string): Promise<void> {
    return this.reply(number, { type, data: Buffer.from(message) })
  }

  async #readData(lengthBytes: number): Promise<Buffer> {
    if (lengthBytes === 0) return Buffer.alloc(0)
    if (lengthBytes <= readBytesMax) return this.read(lengthBytes)
    const parts: Buffer[] = []
    for (let left = lengthBytes; left > 0; left -= Math.min(left, readBytesMax))
      parts.push(await this.read(Math.min(left, readBytesMax)))
    return Buffer.concat(parts)
  }
}

function replyHeader(number: number, type: number, lengthBytes: number): Buffer {
  const header = Buffer.alloc(optionReplyHeaderBytes)
  header.writeBigUInt64BE(optionReplyMagic, 0)
  header.writeUInt32BE(number, 8)
  header.writeUInt32BE(type, 12)
  header.writeUInt32BE(lengthBytes, 16)
  return header
}
