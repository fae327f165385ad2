import type { ByteStream } from './byte-stream.ts'
import { withStream } from './connect.ts'
import type { NbdReachOptions } from './connect.ts'
import { NbdError } from './nbd-error.ts'
import { resolveTarget } from './nbd-target.ts'
import type { NbdTarget } from './nbd-target.ts'
import {
  encodeExtendedRequest,
  encodeInfoRequest,
  encodeOption,
  encodeRequest,
  readOptionReply,
  readReplyHeader,
} from './wire.ts'
import type { OptionReply, ReplyHeader, RequestHeader } from './wire.ts'
import { clientFlag, infoItem, option, optionReply } from './protocol.ts'

/** How long a raw `receive…` waits unless told otherwise: only for what hangs, however slow the machine is. */
const defaultReceiveTimeoutMs = 300_000

/** The server's 18 bytes, taken apart. */
export interface RawGreeting {
  readonly magic: bigint
  readonly style: bigint
  readonly flags: number
}

/**
 * A socket to an NBD server and nothing else: whatever is sent is sent, whatever comes is handed out. For tests of servers
 * with peers that break the rules. One `receive…` at a time.
 */
export class RawNbdConnection {
  readonly #stream: ByteStream
  readonly #receiveTimeoutMs: number

  constructor(stream: ByteStream, receiveTimeoutMs: number = defaultReceiveTimeoutMs) {
    this.#stream = stream
    this.#receiveTimeoutMs = receiveTimeoutMs
  }

  /** Sends bytes as they are. Dropped silently once the connection has ended. */
  send(...parts: readonly Uint8Array[]): void {
    this.#stream.write(...parts)
  }

  /** The next `lengthBytes` bytes. @throws NbdError NBD_CONNECTION_LOST, NBD_RECEIVE_TIMEOUT (the connection is closed then). */
  receive(lengthBytes: number): Promise<Buffer> {
    return this.#inTime(`${lengthBytes} bytes`, this.#stream.read(lengthBytes))
  }

  /** Waits for the server to close. @throws NbdError NBD_RECEIVE_TIMEOUT, NBD_PROTOCOL when more bytes come instead. */
  async receiveEnd(): Promise<void> {
    try {
      const byte = await this.#inTime('the end', this.#stream.read(1))
      throw new NbdError('NBD_PROTOCOL', `the server sent 0x${byte.toString('hex')} where it should have closed`)
    } catch (error) {
      if (!(error instanceof NbdError) || error.code !== 'NBD_CONNECTION_LOST') throw error
    }
  }

  /** Everything up to the end, at most `lengthBytesMax`. @throws NbdError NBD_RECEIVE_TIMEOUT, NBD_PROTOCOL if it is more. */
  async receiveRest(lengthBytesMax: number): Promise<Buffer> {
    const parts: Buffer[] = []
    for (let lengthBytes = 0; ;) {
      try {
        parts.push(await this.receive(1), await this.#stream.read(this.#stream.bufferedBytes))
      } catch (error) {
        if (!(error instanceof NbdError) || error.code !== 'NBD_CONNECTION_LOST') throw error
        return Buffer.concat(parts)
      }
      lengthBytes += 1 + parts.at(-1)!.length
      if (lengthBytes > lengthBytesMax) throw new NbdError('NBD_PROTOCOL', `the server sent more than ${lengthBytesMax} bytes`)
    }
  }

  async receiveGreeting(): Promise<RawGreeting> {
    const greeting = await this.receive(18)
    return { magic: greeting.readBigUInt64BE(0), style: greeting.readBigUInt64BE(8), flags: greeting.readUInt16BE(16) }
  }

  sendClientFlags(flags: number): void {
    const bytes = Buffer.alloc(4)
    bytes.writeUInt32BE(flags, 0)
    this.send(bytes)
  }

  /** Greets as a well-behaved client does, so that options can follow. */
  async greet(flags: number = clientFlag.fixedNewstyle | clientFlag.noZeroes): Promise<RawGreeting> {
    const greeting = await this.receiveGreeting()
    this.sendClientFlags(flags)
    return greeting
  }

  /** `lengthBytes`: what the header says, when that is to differ from the data. */
  sendOption(number: number, data: Uint8Array | string = new Uint8Array(), lengthBytes?: number): void {
    this.send(encodeOption(number, typeof data === 'string' ? Buffer.from(data) : data, lengthBytes))
  }

  receiveOptionReply(): Promise<OptionReply> {
    return this.#inTime('an option reply', readOptionReply(this.#stream))
  }

  /** Sends an option and collects its answers up to the acknowledgement or the first error, that one included. */
  async ask(number: number, data: Uint8Array | string = new Uint8Array()): Promise<OptionReply[]> {
    this.sendOption(number, data)
    const replies: OptionReply[] = []
    for (;;) {
      const reply = await this.receiveOptionReply()
      if (reply.option !== number) throw new NbdError('NBD_PROTOCOL', `an answer to option ${reply.option} instead of ${number}`)
      replies.push(reply)
      if (reply.type === optionReply.ack || reply.type >= 0x80000000) return replies
    }
  }

  /** GO for an export, after which requests can be sent. @throws NbdError NBD_PROTOCOL if it is refused. */
  async go(exportName: string): Promise<OptionReply[]> {
    const replies = await this.ask(option.go, encodeInfoRequest(exportName, [infoItem.blockSize]))
    const last = replies.at(-1)!
    if (last.type !== optionReply.ack)
      throw new NbdError('NBD_PROTOCOL', `GO was refused: 0x${last.type.toString(16)} ${last.data.toString()}`)
    return replies
  }

  sendRequest(request: RequestHeader, payload: Uint8Array = new Uint8Array()): void {
    this.send(encodeRequest(request), payload)
  }

  /** The same in the form of extended headers. */
  sendExtendedRequest(request: RequestHeader, payload: Uint8Array = new Uint8Array()): void {
    this.send(encodeExtendedRequest(request), payload)
  }

  /** The header of the next answer; what follows it is fetched with `receive`. */
  receiveReplyHeader(): Promise<ReplyHeader> {
    return this.#inTime('a reply', readReplyHeader(this.#stream))
  }

  /** Sends what is queued, then closes our direction. */
  finishWriting(): void {
    this.#stream.finishWriting()
  }

  /** Closes at once. Idempotent. */
  destroy(): void {
    this.#stream.destroy()
  }

  /** Ends a TCP connection with a reset; a unix socket is just closed. */
  reset(): void {
    this.#stream.reset()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    this.destroy()
    await this.#stream.closed
  }

  async #inTime<T>(what: string, received: Promise<T>): Promise<T> {
    let timer: NodeJS.Timeout | undefined
    const late = new Promise<never>((_, reject) => {
      timer = setTimeout(() => {
        reject(new NbdError('NBD_RECEIVE_TIMEOUT', `the server did not send ${what} within ${this.#receiveTimeoutMs} ms`))
        this.#stream.destroy()
      }, this.#receiveTimeoutMs)
    })
    try {
      return await Promise.race([received, late])
    } finally {
      clearTimeout(timer)
      // After a timeout the loser's rejection has nobody else to go to.
      received.catch(() => {})
    }
  }
}

/** Connects and sends nothing. @throws as `connect`, as far as that concerns the socket. */
export function connectRaw(
  target: NbdTarget,
  options: NbdReachOptions & { readonly receiveTimeoutMs?: number } = {},
): Promise<RawNbdConnection> {
  return withStream(
    resolveTarget(target).address,
    options,
    async (stream) => new RawNbdConnection(stream, options.receiveTimeoutMs),
  )
}
