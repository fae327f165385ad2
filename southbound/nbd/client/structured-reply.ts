import type { ByteStream } from './byte-stream.ts'
import { IntervalCover } from './interval-cover.ts'
import { NbdError, NbdReplyError } from './nbd-error.ts'
import { chunkErrorBit, chunkFlag, chunkType, command, commandFlag, extentCountMax, nameOf, stringBytesMax } from './protocol.ts'

/** Most separate pieces of one read that have arrived and do not touch each other. */
const pieceCountMax = 65_536
const errorChunkBytesMax = 2 + 4 + stringBytesMax + 8

/** A stretch of an export with one status. `flags` means what its context says (`base:allocation`: 1 hole, 2 zero). */
export interface NbdExtent {
  readonly offsetBytes: number
  readonly lengthBytes: number
  readonly flags: number
}

export interface ChunkHeader {
  readonly flags: number
  readonly type: number
  readonly lengthBytes: number
}

/** What is asked, as far as its answer depends on it. */
export interface AskedRequest {
  readonly command: number
  readonly flags: number
  readonly offsetBytes: number | bigint
  /** What the command is about; of a status with a payload the range's, not the payload's. */
  readonly lengthBytes: number
  /** A status of this many chosen contexts; absent: of all. */
  readonly contextCount?: number
}

/**
 * Puts the chunks of one structured reply together and checks them: data inside the request, no overlap, everything covered
 * on success, one block status chunk a context, the last chunk marked. The server's first error is kept.
 */
export class StructuredReply {
  readonly #asked: AskedRequest
  readonly #contexts: ReadonlyMap<number, string>
  readonly #extendedHeaders: boolean
  #data: Buffer | null = null
  readonly extents = new Map<string, NbdExtent[]>()
  #cover: IntervalCover | null = null
  #contentChunkCount = 0
  #error: NbdReplyError | null = null

  constructor(asked: AskedRequest, contexts: ReadonlyMap<number, string>, extendedHeaders: boolean) {
    this.#asked = asked
    this.#contexts = contexts
    this.#extendedHeaders = extendedHeaders
  }

  /** What was read, of the length asked for; empty for other commands. Made of zeros when its first piece arrives. */
  get data(): Buffer {
    this.#data ??= Buffer.alloc(this.#asked.command === command.read ? this.#asked.lengthBytes : 0)
    return this.#data
  }

  /** The first error that the server reported. */
  get error(): NbdReplyError | null {
    return this.#error
  }

  /**
   * Reads one chunk's payload. Resolves to true after the last one.
   * @throws NbdError NBD_PROTOCOL, NBD_CONNECTION_LOST.
   */
  async receive(stream: ByteStream, header: ChunkHeader): Promise<boolean> {
    const done = (header.flags & chunkFlag.done) !== 0
    switch (header.type) {
      case chunkType.none:
        if (header.lengthBytes !== 0 || !done)
          this.#fail(`a chunk of type none with ${header.lengthBytes} bytes${done ? '' : ' that is not the last'}`)
        break
      case chunkType.offsetData:
        await this.#receiveData(stream, header.lengthBytes)
        break
      case chunkType.offsetHole:
        await this.#receiveHole(stream, header.lengthBytes)
        break
      case chunkType.blockStatus:
      case chunkType.blockStatusExtended:
        if ((header.type === chunkType.blockStatusExtended) !== this.#extendedHeaders)
          this.#fail(`a block status chunk of type ${header.type}`)
        await this.#receiveBlockStatus(stream, header.lengthBytes)
        break
      default:
        if ((header.type & chunkErrorBit) === 0) this.#fail(`a chunk of unknown type 0x${header.type.toString(16)}`)
        await this.#receiveError(stream, header)
    }
    if (done && this.#error === null) this.#checkComplete()
    return done
  }

  async #receiveData(stream: ByteStream, lengthBytes: number): Promise<void> {
    if (lengthBytes < 9 || lengthBytes - 8 > this.#asked.lengthBytes) this.#fail(`a data chunk of ${lengthBytes} bytes`)
    const offset = (await stream.read(8)).readBigUInt64BE(0)
    const start = this.#claim(offset, lengthBytes - 8)
    await stream.readInto(this.data.subarray(start, start + lengthBytes - 8))
  }

  async #receiveHole(stream: ByteStream, lengthBytes: number): Promise<void> {
    if (lengthBytes !== 12) this.#fail(`a hole chunk of ${lengthBytes} bytes`)
    const chunk = await stream.read(12)
    // The buffer is made of zeros and no byte is claimed twice, so the hole is there already.
    this.#claim(chunk.readBigUInt64BE(0), chunk.readUInt32BE(8))
  }

  /** Marks a piece of a read as arrived and returns where it lies in `data`. */
  #claim(offset: bigint, lengthBytes: number): number {
    if (this.#asked.command !== command.read) this.#fail('data')
    const start = Number(offset - BigInt(this.#asked.offsetBytes))
    this.#cover ??= new IntervalCover(this.#asked.lengthBytes, pieceCountMax)
    const result = this.#cover.add(start, lengthBytes)
    if (result !== 'added') this.#fail(`a chunk for ${offset}+${lengthBytes} (${result})`)
    this.#contentChunkCount += 1
    if ((this.#asked.flags & commandFlag.df) !== 0 && this.#contentChunkCount > 1)
      this.#fail('several chunks although DF was asked for')
    return start
  }

  async #receiveBlockStatus(stream: ByteStream, lengthBytes: number): Promise<void> {
    if (this.#asked.command !== command.blockStatus) this.#fail('a block status chunk')
    const [headBytes, extentBytes] = this.#extendedHeaders ? [8, 16] : [4, 8]
    const count = (lengthBytes - headBytes) / extentBytes
    if (!Number.isInteger(count) || count < 1 || count > extentCountMax)
      this.#fail(`a block status chunk of ${lengthBytes} bytes`)
    const chunk = await stream.read(lengthBytes)
    const name = this.#contexts.get(chunk.readUInt32BE(0))
    if (name === undefined)
      return this.#fail(`a block status chunk for context ${chunk.readUInt32BE(0)}, which was not negotiated`)
    if (this.extents.has(name)) this.#fail(`two block status chunks for context ${name}`)
    if (this.#extendedHeaders && chunk.readUInt32BE(4) !== count)
      this.#fail(`a block status chunk of ${count} extents that says ${chunk.readUInt32BE(4)}`)
    const extents: NbdExtent[] = []
    let offsetBytes = Number(this.#asked.offsetBytes)
    let beforeLast = 0
    let total = 0
    for (let at = headBytes; at < chunk.length; at += extentBytes) {
      // Flags beyond 2^53 would be cut; no context that is asked for has more than 32 bits.
      const [extentLength, flags] = this.#extendedHeaders
        ? [Number(chunk.readBigUInt64BE(at)), Number(chunk.readBigUInt64BE(at + 8))]
        : [chunk.readUInt32BE(at), chunk.readUInt32BE(at + 4)]
      const extent = { offsetBytes, lengthBytes: extentLength, flags }
      if (extent.lengthBytes === 0) this.#fail(`an extent of no length in context ${name}`)
      beforeLast = total
      total += extent.lengthBytes
      offsetBytes += extent.lengthBytes
      extents.push(extent)
    }
    if (extents.length > 1 && beforeLast >= this.#asked.lengthBytes)
      this.#fail(`extents that go on past the ${this.#asked.lengthBytes} bytes asked about`)
    if ((this.#asked.flags & commandFlag.reqOne) !== 0 && (extents.length > 1 || total > this.#asked.lengthBytes)) {
      this.#fail(`${extents.length} extents of ${total} bytes although one of at most ${this.#asked.lengthBytes} was asked for`)
    }
    this.extents.set(name, extents)
  }

  async #receiveError(stream: ByteStream, header: ChunkHeader): Promise<void> {
    if (header.lengthBytes < 6 || header.lengthBytes > errorChunkBytesMax)
      this.#fail(`an error chunk of ${header.lengthBytes} bytes`)
    const chunk = await stream.read(header.lengthBytes)
    const errno = chunk.readUInt32BE(0)
    const messageBytes = chunk.readUInt16BE(4)
    const tailBytes = header.type === chunkType.errorOffset ? 8 : 0
    if (errno === 0) this.#fail('an error chunk without an error')
    if (6 + messageBytes + tailBytes > chunk.length)
      this.#fail(`an error chunk of ${chunk.length} bytes with a message of ${messageBytes}`)
    const message = messageBytes === 0 ? null : chunk.toString('utf8', 6, 6 + messageBytes)
    let offsetBytes: number | null = null
    if (tailBytes > 0) {
      offsetBytes = Number(chunk.readBigUInt64BE(6 + messageBytes))
      const start = offsetBytes - Number(this.#asked.offsetBytes)
      if (start < 0 || start > this.#asked.lengthBytes) this.#fail(`an error at offset ${offsetBytes}, outside of the request`)
    }
    this.#error ??= new NbdReplyError(describeRequest(this.#asked), errno, message, offsetBytes)
  }

  #checkComplete(): void {
    const contextCount = this.#asked.contextCount ?? this.#contexts.size
    if (this.#asked.command === command.read && !(this.#cover?.complete ?? this.#asked.lengthBytes === 0)) {
      this.#fail('success without all of the data')
    }
    if (this.#asked.command === command.blockStatus && this.extents.size !== contextCount) {
      this.#fail(`success with ${this.extents.size} of ${contextCount} contexts`)
    }
  }

  #fail(what: string): never {
    throw new NbdError('NBD_PROTOCOL', `the server answered ${describeRequest(this.#asked)} with ${what}`)
  }
}

/** A request in words. */
export function describeRequest(asked: AskedRequest): string {
  return `${nameOf(command, asked.command)} of ${asked.lengthBytes} bytes at ${asked.offsetBytes}`
}
