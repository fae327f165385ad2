import type { ByteStream } from './byte-stream.ts'
import type { NbdBlockSizes, NbdExportFlags, NbdExportInfo } from './export-info.ts'
import { NbdError, NbdReplyError } from './nbd-error.ts'
import { command, commandFlag, requestLengthMax } from './protocol.ts'
import { describeRequest, StructuredReply } from './structured-reply.ts'
import type { AskedRequest, NbdExtent } from './structured-reply.ts'
import { encodeExtendedRequest, encodeRequest, readReplyHeader } from './wire.ts'
import type { ReplyHeader } from './wire.ts'

/** Bounds of a connection. Requests beyond the first two wait; they fail only when `waitingMax` wait already. */
export interface NbdConnectionLimits {
  /** Requests sent and not answered. Default 64. */
  readonly inFlightMax: number
  /** Bytes of data (written or expected) of those requests; one request may always go. Default 64 MiB. */
  readonly inFlightBytesMax: number
  /** Requests that wait for their turn. Default 65,536. */
  readonly waitingMax: number
  /** How long `disconnect` waits for the server to close. Default 5,000. */
  readonly disconnectTimeoutMs: number
}

export const defaultConnectionLimits: NbdConnectionLimits = {
  inFlightMax: 64,
  inFlightBytesMax: 64 * 1024 * 1024,
  waitingMax: 65_536,
  disconnectTimeoutMs: 5_000,
}

/** A request as it is, whatever the server has offered: for tests of servers. */
export interface NbdRequest extends AskedRequest {
  /** Follows the header; `lengthBytes` need not be its length. */
  readonly payload?: Uint8Array
}

/** What came back. `data` is empty unless it was a read, `extents` unless it was a block status. */
export interface NbdReply {
  readonly data: Uint8Array
  readonly extents: Map<string, NbdExtent[]>
}

/** What the negotiation left for the transmission. */
export interface NegotiatedSession {
  readonly exportName: string
  readonly info: NbdExportInfo
  readonly structuredReplies: boolean
  readonly extendedHeaders: boolean
  /** Name to id. */
  readonly metaContexts: ReadonlyMap<string, number>
}

interface PendingRequest {
  readonly asked: AskedRequest
  readonly payload: Uint8Array | null
  /** What it counts against `inFlightBytesMax`. */
  readonly costBytes: number
  readonly resolve: (reply: NbdReply) => void
  readonly reject: (error: NbdError) => void
  structured: StructuredReply | null
}

const cookieMax = 0xffff_ffff
const noData = new Uint8Array()

/**
 * State 3 of a connection: requests, many at a time, answered in any order.
 *
 * Rules: every promise settles, once. When the connection ends, for whatever reason, everything in flight is rejected with
 * NBD_CONNECTION_LOST (or with NBD_PROTOCOL, if we ended it because of what the peer sent): it may or may not have been done.
 * What was still waiting fails with NBD_CLOSED: it was not done. Data given to `write` must not change until the promise settles.
 */
export class NbdConnection {
  readonly #stream: ByteStream
  readonly #session: NegotiatedSession
  readonly #limits: NbdConnectionLimits
  readonly #contextNames: ReadonlyMap<number, string>
  readonly #inFlight = new Map<number, PendingRequest>()
  readonly #waiting: PendingRequest[] = []
  #inFlightBytes = 0
  #nextCookie = 1
  #disconnecting = false
  #end: NbdError | null = null
  #idle: (() => void) | null = null
  #disconnected: Promise<void> | null = null
  readonly #closed = Promise.withResolvers<NbdError | null>()

  constructor(stream: ByteStream, session: NegotiatedSession, limits: NbdConnectionLimits) {
    this.#stream = stream
    this.#session = session
    this.#limits = limits
    this.#contextNames = new Map([...session.metaContexts].map(([name, id]) => [id, name]))
    void this.#receiveReplies()
  }

  get exportName(): string {
    return this.#session.exportName
  }
  get sizeBytes(): number {
    return this.#session.info.sizeBytes
  }
  get flags(): NbdExportFlags {
    return this.#session.info.flags
  }
  get blockSizes(): NbdBlockSizes {
    return this.#session.info.blockSizes
  }
  get info(): NbdExportInfo {
    return this.#session.info
  }
  get structuredReplies(): boolean {
    return this.#session.structuredReplies
  }
  get extendedHeaders(): boolean {
    return this.#session.extendedHeaders
  }
  /** The contexts that the server agreed to, with their ids. */
  get metaContexts(): ReadonlyMap<string, number> {
    return this.#session.metaContexts
  }
  get inFlightCount(): number {
    return this.#inFlight.size
  }
  /** Resolves when the connection has ended: null after `disconnect`, else the reason. Never rejects. */
  get closed(): Promise<NbdError | null> {
    return this.#closed.promise
  }

  /** Reads. At most `blockSizes.maximumBytes`. `df`: in one piece (the server must have offered it). */
  async read(offsetBytes: number, lengthBytes: number, options: { df?: boolean } = {}): Promise<Uint8Array> {
    this.#checkRange(offsetBytes, lengthBytes, this.blockSizes.maximumBytes)
    if (options.df) this.#checkOffered('df', 'DF')
    if (lengthBytes === 0) return new Uint8Array()
    const reply = await this.request({ command: command.read, flags: options.df ? commandFlag.df : 0, offsetBytes, lengthBytes })
    return reply.data
  }

  /** Writes. At most `blockSizes.maximumBytes`. `fua`: on stable storage when it resolves. */
  async write(offsetBytes: number, data: Uint8Array, options: { fua?: boolean } = {}): Promise<void> {
    this.#checkRange(offsetBytes, data.length, this.blockSizes.maximumBytes)
    this.#checkWritable('write')
    if (data.length === 0 && !options.fua) return
    await this.request({
      command: command.write,
      flags: this.#fua(options),
      offsetBytes,
      lengthBytes: data.length,
      payload: data,
    })
  }

  /** Says that the content of the range is no longer needed. Advisory: what it reads as afterwards is not defined. */
  async trim(offsetBytes: number, lengthBytes: number, options: { fua?: boolean } = {}): Promise<void> {
    this.#checkRange(offsetBytes, lengthBytes, this.#lengthMax)
    this.#checkWritable('trim')
    this.#checkOffered('trim', 'TRIM')
    if (lengthBytes === 0) return
    await this.request({ command: command.trim, flags: this.#fua(options), offsetBytes, lengthBytes })
  }

  /** The range reads as zeros afterwards. `noHole`: keeps its space; `fastZero`: fails (ENOTSUP) where it would be slow. */
  async writeZeroes(
    offsetBytes: number,
    lengthBytes: number,
    options: { noHole?: boolean; fua?: boolean; fastZero?: boolean } = {},
  ): Promise<void> {
    this.#checkRange(offsetBytes, lengthBytes, this.#lengthMax)
    this.#checkWritable('writeZeroes')
    this.#checkOffered('writeZeroes', 'WRITE_ZEROES')
    if (options.fastZero) this.#checkOffered('fastZero', 'FAST_ZERO')
    if (lengthBytes === 0) return
    const flags = this.#fua(options) | (options.noHole ? commandFlag.noHole : 0) | (options.fastZero ? commandFlag.fastZero : 0)
    await this.request({ command: command.writeZeroes, flags, offsetBytes, lengthBytes })
  }

  /** Resolves when every write answered before the call is on stable storage. */
  async flush(): Promise<void> {
    this.#checkOffered('flush', 'FLUSH')
    await this.request({ command: command.flush, flags: 0, offsetBytes: 0, lengthBytes: 0 })
  }

  /** Asks the server to have the range at hand. */
  async cache(offsetBytes: number, lengthBytes: number): Promise<void> {
    this.#checkRange(offsetBytes, lengthBytes, this.#lengthMax)
    this.#checkOffered('cache', 'CACHE')
    if (lengthBytes === 0) return
    await this.request({ command: command.cache, flags: 0, offsetBytes, lengthBytes })
  }

  /**
   * The extents of each negotiated context, from `offsetBytes` on. They may end before the range does (ask again from there),
   * and the last one may reach past it unless `reqOne` was asked for, which gives a single extent. `contexts`: of these only
   * (the server must have offered the filter, for which extended headers are needed).
   */
  async blockStatus(
    offsetBytes: number,
    lengthBytes: number,
    options: { reqOne?: boolean; contexts?: readonly string[] } = {},
  ): Promise<Map<string, NbdExtent[]>> {
    this.#checkRange(offsetBytes, lengthBytes, this.#lengthMax)
    if (this.metaContexts.size === 0)
      throw new NbdError('NBD_NOT_OFFERED', 'no metadata context was negotiated (connect with metaContexts)')
    if (lengthBytes === 0) throw new NbdError('NBD_REQUEST_INVALID', 'the block status of no bytes')
    const flags = options.reqOne ? commandFlag.reqOne : 0
    const asked = { command: command.blockStatus, flags, offsetBytes, lengthBytes }
    if (options.contexts === undefined) return (await this.request(asked)).extents
    this.#checkOffered('blockStatusPayload', 'a filter of contexts')
    const ids = options.contexts.map((name) => this.metaContexts.get(name))
    const payload = Buffer.alloc(8 + 4 * ids.length)
    payload.writeBigUInt64BE(BigInt(lengthBytes), 0)
    ids.forEach((id, index) => {
      if (id === undefined) throw new NbdError('NBD_NOT_OFFERED', `the context ${options.contexts?.[index]} was not negotiated`)
      payload.writeUInt32BE(id, 8 + 4 * index)
    })
    const filtered = { ...asked, flags: flags | commandFlag.payloadLength, contextCount: ids.length, payload }
    return (await this.request(filtered)).extents
  }

  /**
   * Sends any request as it is, without a look at what the server offered. Rejects with NbdReplyError when the server
   * answers with an error. For tests of servers; a request that has no answer (disconnect) stays pending until the end.
   */
  request(request: NbdRequest): Promise<NbdReply> {
    return new Promise((resolve, reject) => {
      if (this.#end !== null || this.#disconnecting) {
        reject(this.#closedError())
        return
      }
      const { command: number, offsetBytes, lengthBytes, payload, contextCount } = request
      if (!Number.isInteger(lengthBytes) || lengthBytes < 0 || lengthBytes > this.#lengthMax) {
        reject(new NbdError('NBD_REQUEST_INVALID', `a length of ${lengthBytes} is not from 0 to ${this.#lengthMax}`))
        return
      }
      // With extended headers a payload is announced by a flag; a write always has one.
      const isAnnounced = this.extendedHeaders && number === command.write
      const flags = isAnnounced ? request.flags | commandFlag.payloadLength : request.flags
      const asked: AskedRequest = {
        command: number,
        flags,
        offsetBytes,
        lengthBytes,
        ...(contextCount === undefined ? {} : { contextCount }),
      }
      const pending: PendingRequest = {
        asked,
        payload: payload ?? null,
        costBytes: (payload?.length ?? 0) + (number === command.read ? lengthBytes : 0),
        resolve,
        reject,
        structured: null,
      }
      if (this.#waiting.length === 0 && this.#maySend(pending)) {
        this.#send(pending)
      } else if (this.#waiting.length >= this.#limits.waitingMax) {
        reject(
          new NbdError('NBD_QUEUE_FULL', `${this.#waiting.length} requests are waiting, the limit is ${this.#limits.waitingMax}`),
        )
      } else {
        this.#waiting.push(pending)
      }
    })
  }

  /**
   * Waits for what was asked before, says goodbye and waits for the server to close. Never rejects; idempotent.
   */
  disconnect(): Promise<void> {
    this.#disconnected ??= this.#disconnect()
    return this.#disconnected
  }

  /** Closes at once; what is in flight is rejected with NBD_CONNECTION_LOST. */
  destroy(): void {
    this.#finish(new NbdError('NBD_CONNECTION_LOST', 'the connection was closed by its owner'))
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.disconnect()
  }

  async #disconnect(): Promise<void> {
    this.#disconnecting = true
    if (this.#end !== null) return
    if (this.#inFlight.size > 0 || this.#waiting.length > 0) {
      await new Promise<void>((resolve) => {
        this.#idle = resolve
      })
    }
    if (this.#end !== null) return
    const goodbye = { command: command.disconnect, flags: 0, cookie: 0n, offsetBytes: 0, lengthBytes: 0 }
    this.#stream.write(this.extendedHeaders ? encodeExtendedRequest(goodbye) : encodeRequest(goodbye))
    this.#stream.finishWriting()
    const timer = setTimeout(() => this.#finish(null), this.#limits.disconnectTimeoutMs)
    await this.#closed.promise
    clearTimeout(timer)
    await this.#stream.closed
  }

  #maySend(pending: PendingRequest): boolean {
    if (this.#inFlight.size === 0) return true
    return (
      this.#inFlight.size < this.#limits.inFlightMax && this.#inFlightBytes + pending.costBytes <= this.#limits.inFlightBytesMax
    )
  }

  #send(pending: PendingRequest): void {
    let cookie = this.#nextCookie
    while (this.#inFlight.has(cookie)) cookie = cookie === cookieMax ? 1 : cookie + 1
    this.#nextCookie = cookie === cookieMax ? 1 : cookie + 1
    this.#inFlight.set(cookie, pending)
    this.#inFlightBytes += pending.costBytes
    const { asked } = pending
    // A payload is as long as the header says, but for the status, whose own length is in its payload.
    const lengthBytes = asked.contextCount === undefined ? asked.lengthBytes : (pending.payload?.length ?? 0)
    const fields = { ...asked, lengthBytes, cookie: BigInt(cookie) }
    const header = this.extendedHeaders ? encodeExtendedRequest(fields) : encodeRequest(fields)
    if (pending.payload === null) this.#stream.write(header)
    else this.#stream.write(header, pending.payload)
  }

  #answered(cookie: number, pending: PendingRequest): void {
    this.#inFlight.delete(cookie)
    this.#inFlightBytes -= pending.costBytes
    while (this.#waiting.length > 0 && this.#maySend(this.#waiting[0]!)) this.#send(this.#waiting.shift()!)
    if (this.#inFlight.size === 0) this.#idle?.()
  }

  async #receiveReplies(): Promise<void> {
    try {
      for (;;) {
        const header = await readReplyHeader(this.#stream)
        const cookie = header.cookie <= BigInt(cookieMax) ? Number(header.cookie) : 0
        const pending = this.#inFlight.get(cookie)
        if (pending === undefined) throw new NbdError('NBD_PROTOCOL', `a reply to ${header.cookie}, which is not in flight`)
        if (header.kind === 'simple') await this.#receiveSimple(cookie, pending, header)
        else await this.#receiveChunk(cookie, pending, header)
      }
    } catch (error) {
      if (!(error instanceof NbdError)) {
        const message = error instanceof Error ? error.message : String(error)
        this.#finish(new NbdError('NBD_CONNECTION_LOST', `the client failed: ${message}`, { cause: error, retryable: false }))
        return
      }
      const expected =
        error.code === 'NBD_CONNECTION_LOST' && this.#disconnecting && this.#inFlight.size === 0 && this.#waiting.length === 0
      this.#finish(expected ? null : error)
    }
  }

  async #receiveSimple(cookie: number, pending: PendingRequest, header: ReplyHeader & { kind: 'simple' }): Promise<void> {
    const { asked } = pending
    if (this.extendedHeaders)
      throw new NbdError('NBD_PROTOCOL', `a simple reply to ${describeRequest(asked)} with extended headers`)
    if (this.structuredReplies && (asked.command === command.read || asked.command === command.blockStatus)) {
      throw new NbdError('NBD_PROTOCOL', `a simple reply to ${describeRequest(asked)} after structured replies were negotiated`)
    }
    if (pending.structured !== null)
      throw new NbdError('NBD_PROTOCOL', `a simple reply in the middle of a structured one to ${describeRequest(asked)}`)
    if (header.errno !== 0) {
      this.#answered(cookie, pending)
      pending.reject(new NbdReplyError(describeRequest(asked), header.errno, null, null))
      return
    }
    let data: Uint8Array = noData
    if (asked.command === command.read) {
      data = Buffer.allocUnsafeSlow(asked.lengthBytes)
      await this.#stream.readInto(data)
    }
    this.#answered(cookie, pending)
    pending.resolve({ data, extents: new Map() })
  }

  async #receiveChunk(
    cookie: number,
    pending: PendingRequest,
    header: ReplyHeader & { kind: 'structured' | 'extended' },
  ): Promise<void> {
    if (!this.structuredReplies) throw new NbdError('NBD_PROTOCOL', 'a structured reply without negotiating that')
    if ((header.kind === 'extended') !== this.extendedHeaders)
      throw new NbdError('NBD_PROTOCOL', `a reply with ${header.kind} headers to ${describeRequest(pending.asked)}`)
    if (header.kind === 'extended' && header.offsetBytes !== BigInt(pending.asked.offsetBytes)) {
      throw new NbdError('NBD_PROTOCOL', `a reply for offset ${header.offsetBytes} to ${describeRequest(pending.asked)}`)
    }
    pending.structured ??= new StructuredReply(pending.asked, this.#contextNames, this.extendedHeaders)
    if (!(await pending.structured.receive(this.#stream, header))) return
    this.#answered(cookie, pending)
    const { error, extents } = pending.structured
    // The data of a refused read is not even made: it may have been refused for its length.
    if (error === null) pending.resolve({ data: pending.structured.data, extents })
    else pending.reject(error)
  }

  #finish(reason: NbdError | null): void {
    if (this.#end !== null) return
    this.#end = reason ?? new NbdError('NBD_CLOSED', 'the connection was closed by disconnect()')
    this.#stream.destroy()
    const lost =
      reason === null || reason.code === 'NBD_PROTOCOL' || reason.code === 'NBD_CONNECTION_LOST'
        ? reason
        : new NbdError('NBD_CONNECTION_LOST', reason.message, { cause: reason })
    for (const pending of this.#inFlight.values()) {
      pending.reject(
        lost ??
          new NbdError('NBD_CONNECTION_LOST', `no answer to ${describeRequest(pending.asked)} before the connection was closed`),
      )
    }
    this.#inFlight.clear()
    this.#inFlightBytes = 0
    for (const pending of this.#waiting.splice(0)) pending.reject(this.#closedError())
    this.#idle?.()
    this.#closed.resolve(reason)
  }

  #closedError(): NbdError {
    return new NbdError(
      'NBD_CLOSED',
      'the connection is closed: the request was not sent',
      this.#end === null ? {} : { cause: this.#end },
    )
  }

  /** Longest range of a request that carries no data. */
  get #lengthMax(): number {
    return this.extendedHeaders ? Number.MAX_SAFE_INTEGER : requestLengthMax
  }

  #fua(options: { fua?: boolean }): number {
    if (!options.fua) return 0
    this.#checkOffered('fua', 'FUA')
    return commandFlag.fua
  }

  #checkOffered(flag: keyof NbdExportFlags, name: string): void {
    if (!this.flags[flag])
      throw new NbdError('NBD_NOT_OFFERED', `the server does not offer ${name} for export ${JSON.stringify(this.exportName)}`)
  }

  #checkWritable(what: string): void {
    if (this.flags.readOnly)
      throw new NbdError('NBD_NOT_OFFERED', `export ${JSON.stringify(this.exportName)} is read-only: no ${what}`)
  }

  #checkRange(offsetBytes: number, lengthBytes: number, lengthBytesMax: number): void {
    if (!Number.isSafeInteger(offsetBytes) || offsetBytes < 0) {
      throw new NbdError('NBD_REQUEST_INVALID', `offset ${offsetBytes} is not a whole number from 0 to 2^53 - 1`)
    }
    if (!Number.isInteger(lengthBytes) || lengthBytes < 0 || lengthBytes > lengthBytesMax) {
      throw new NbdError('NBD_REQUEST_INVALID', `length ${lengthBytes} is not a whole number from 0 to ${lengthBytesMax}`)
    }
  }
}
