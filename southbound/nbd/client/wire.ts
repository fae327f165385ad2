import type { ByteStream } from './byte-stream.ts'
import { NbdError } from './nbd-error.ts'
import {
  newstyleMagic,
  optionReplyBytesMax,
  optionReplyHeaderBytes,
  optionReplyMagic,
  extendedReplyHeaderBytes,
  extendedReplyMagic,
  extendedRequestHeaderBytes,
  extendedRequestMagic,
  requestHeaderBytes,
  requestMagic,
  simpleReplyHeaderBytes,
  simpleReplyMagic,
  structuredReplyHeaderBytes,
  structuredReplyMagic,
} from './protocol.ts'

/** One answer to an option. */
export interface OptionReply {
  readonly option: number
  readonly type: number
  readonly data: Buffer
}

/** The header of a request; `cookie` comes back with the answer. */
export interface RequestHeader {
  readonly flags: number
  readonly command: number
  readonly cookie: bigint
  readonly offsetBytes: number | bigint
  /** Beyond 32 bits only in an extended request. */
  readonly lengthBytes: number | bigint
}

/** The header of an answer. A simple reply to a successful read is followed by data, the others by `lengthBytes` bytes. */
export type ReplyHeader =
  | { readonly kind: 'simple'; readonly errno: number; readonly cookie: bigint }
  | {
      readonly kind: 'structured'
      readonly flags: number
      readonly type: number
      readonly cookie: bigint
      readonly lengthBytes: number
    }
  | {
      readonly kind: 'extended'
      readonly flags: number
      readonly type: number
      readonly cookie: bigint
      /** That of the request. */
      readonly offsetBytes: bigint
      readonly lengthBytes: number
    }

/** An option as it goes over the wire. `lengthBytes` lies about the length of `data` where a test wants that. */
export function encodeOption(option: number, data: Uint8Array, lengthBytes: number = data.length): Buffer {
  const buffer = Buffer.alloc(16 + data.length)
  buffer.writeBigUInt64BE(newstyleMagic, 0)
  buffer.writeUInt32BE(option, 8)
  buffer.writeUInt32BE(lengthBytes, 12)
  buffer.set(data, 16)
  return buffer
}

/** Reads one answer to an option, at most 64 KiB long. @throws NbdError NBD_PROTOCOL, NBD_CONNECTION_LOST. */
export async function readOptionReply(stream: ByteStream): Promise<OptionReply> {
  const header = await stream.read(optionReplyHeaderBytes)
  if (header.readBigUInt64BE(0) !== optionReplyMagic) {
    throw new NbdError('NBD_PROTOCOL', `an option reply starts with 0x${header.readBigUInt64BE(0).toString(16)}`)
  }
  const lengthBytes = header.readUInt32BE(16)
  if (lengthBytes > optionReplyBytesMax) {
    throw new NbdError(
      'NBD_PROTOCOL',
      `an option reply of ${lengthBytes} bytes is longer than the limit of ${optionReplyBytesMax}`,
    )
  }
  return { option: header.readUInt32BE(8), type: header.readUInt32BE(12), data: await stream.read(lengthBytes) }
}

/** A request without its payload. */
export function encodeRequest(request: RequestHeader): Buffer {
  const buffer = Buffer.allocUnsafe(requestHeaderBytes)
  buffer.writeUInt32BE(requestMagic, 0)
  buffer.writeUInt16BE(request.flags, 4)
  buffer.writeUInt16BE(request.command, 6)
  buffer.writeBigUInt64BE(request.cookie, 8)
  buffer.writeBigUInt64BE(BigInt(request.offsetBytes), 16)
  buffer.writeUInt32BE(Number(request.lengthBytes), 24)
  return buffer
}

/** The same with extended headers. */
export function encodeExtendedRequest(request: RequestHeader): Buffer {
  const buffer = Buffer.allocUnsafe(extendedRequestHeaderBytes)
  buffer.writeUInt32BE(extendedRequestMagic, 0)
  buffer.writeUInt16BE(request.flags, 4)
  buffer.writeUInt16BE(request.command, 6)
  buffer.writeBigUInt64BE(request.cookie, 8)
  buffer.writeBigUInt64BE(BigInt(request.offsetBytes), 16)
  buffer.writeBigUInt64BE(BigInt(request.lengthBytes), 24)
  return buffer
}

/** Reads the header of the next answer. @throws NbdError NBD_PROTOCOL, NBD_CONNECTION_LOST. */
export async function readReplyHeader(stream: ByteStream): Promise<ReplyHeader> {
  const head = await stream.read(simpleReplyHeaderBytes)
  const magic = head.readUInt32BE(0)
  if (magic === simpleReplyMagic) return { kind: 'simple', errno: head.readUInt32BE(4), cookie: head.readBigUInt64BE(8) }
  if (magic === extendedReplyMagic) {
    const tail = await stream.read(extendedReplyHeaderBytes - simpleReplyHeaderBytes)
    const lengthBytes = tail.readBigUInt64BE(8)
    // No chunk of today needs more than 32 bits.
    if (lengthBytes > 0xffff_ffffn) throw new NbdError('NBD_PROTOCOL', `a chunk of ${lengthBytes} bytes`)
    return {
      kind: 'extended',
      flags: head.readUInt16BE(4),
      type: head.readUInt16BE(6),
      cookie: head.readBigUInt64BE(8),
      offsetBytes: tail.readBigUInt64BE(0),
      lengthBytes: Number(lengthBytes),
    }
  }
  if (magic !== structuredReplyMagic) throw new NbdError('NBD_PROTOCOL', `a reply starts with 0x${magic.toString(16)}`)
  const rest = await stream.read(structuredReplyHeaderBytes - simpleReplyHeaderBytes)
  return {
    kind: 'structured',
    flags: head.readUInt16BE(4),
    type: head.readUInt16BE(6),
    cookie: head.readBigUInt64BE(8),
    lengthBytes: rest.readUInt32BE(0),
  }
}

/** A string with its length before it, as INFO, GO and the meta context options carry names. */
export function encodeCountedString(text: string | Uint8Array): Buffer {
  const bytes = typeof text === 'string' ? Buffer.from(text) : text
  const buffer = Buffer.alloc(4 + bytes.length)
  buffer.writeUInt32BE(bytes.length, 0)
  buffer.set(bytes, 4)
  return buffer
}

/** The data of INFO and GO. */
export function encodeInfoRequest(exportName: string, items: readonly number[]): Buffer {
  const tail = Buffer.alloc(2 + 2 * items.length)
  tail.writeUInt16BE(items.length, 0)
  items.forEach((item, index) => tail.writeUInt16BE(item, 2 + 2 * index))
  return Buffer.concat([encodeCountedString(exportName), tail])
}

/** The data of LIST_META_CONTEXT and SET_META_CONTEXT. */
export function encodeMetaContextRequest(exportName: string, queries: readonly string[]): Buffer {
  const count = Buffer.alloc(4)
  count.writeUInt32BE(queries.length, 0)
  return Buffer.concat([encodeCountedString(exportName), count, ...queries.map(encodeCountedString)])
}
