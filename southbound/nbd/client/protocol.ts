/**
 * The numbers of the NBD protocol (doc/proto.md of the NetworkBlockDevice project). Everything on the wire is big-endian.
 */

export const greetingMagic = 0x4e42444d41474943n // "NBDMAGIC"
export const newstyleMagic = 0x49484156454f5054n // "IHAVEOPT"
export const oldstyleMagic = 0x00420281861253n
export const optionReplyMagic = 0x3e889045565a9n
export const requestMagic = 0x25609513
export const extendedRequestMagic = 0x21e41c71
export const simpleReplyMagic = 0x67446698
export const structuredReplyMagic = 0x668e33ef
export const extendedReplyMagic = 0x6e8a278c

export const handshakeFlag = { fixedNewstyle: 1 << 0, noZeroes: 1 << 1 } as const
export const clientFlag = { fixedNewstyle: 1 << 0, noZeroes: 1 << 1 } as const

export const option = {
  exportName: 1,
  abort: 2,
  list: 3,
  peekExport: 4,
  startTls: 5,
  info: 6,
  go: 7,
  structuredReply: 8,
  listMetaContext: 9,
  setMetaContext: 10,
  extendedHeaders: 11,
} as const

export const optionReply = {
  ack: 1,
  server: 2,
  info: 3,
  metaContext: 4,
  errorUnsupported: 0x80000001,
  errorPolicy: 0x80000002,
  errorInvalid: 0x80000003,
  errorPlatform: 0x80000004,
  errorTlsRequired: 0x80000005,
  errorUnknown: 0x80000006,
  errorShutdown: 0x80000007,
  errorBlockSizeRequired: 0x80000008,
  errorTooBig: 0x80000009,
  errorExtendedHeadersRequired: 0x8000000a,
} as const

/** An option reply whose type has this bit is a refusal. */
export const optionReplyErrorBit = 0x80000000

export const infoItem = { export: 0, name: 1, description: 2, blockSize: 3 } as const

export const transmissionFlag = {
  hasFlags: 1 << 0,
  readOnly: 1 << 1,
  flush: 1 << 2,
  fua: 1 << 3,
  rotational: 1 << 4,
  trim: 1 << 5,
  writeZeroes: 1 << 6,
  df: 1 << 7,
  multiConn: 1 << 8,
  cache: 1 << 10,
  fastZero: 1 << 11,
  blockStatusPayload: 1 << 12,
} as const

export const command = {
  read: 0,
  write: 1,
  disconnect: 2,
  flush: 3,
  trim: 4,
  cache: 5,
  writeZeroes: 6,
  blockStatus: 7,
} as const

export const commandFlag = {
  fua: 1 << 0,
  noHole: 1 << 1,
  df: 1 << 2,
  reqOne: 1 << 3,
  fastZero: 1 << 4,
  payloadLength: 1 << 5,
} as const

export const chunkFlag = { done: 1 << 0 } as const
export const chunkType = {
  none: 0,
  offsetData: 1,
  offsetHole: 2,
  blockStatus: 5,
  blockStatusExtended: 6,
  error: 0x8001,
  errorOffset: 0x8002,
} as const

/** A chunk whose type has this bit reports an error, also when the type itself is unknown. */
export const chunkErrorBit = 0x8000

/** Flags of an extent of the `base:allocation` context. */
export const allocationFlag = { hole: 1 << 0, zero: 1 << 1 } as const

export const defaultPort = 10809

/** Longest string of the protocol: export names, descriptions, context names. */
export const stringBytesMax = 4096
/** Longest option reply that a peer may send us: the longest legal one is two strings and a few integers. */
export const optionReplyBytesMax = 64 * 1024
/** Zeros after the answer to EXPORT_NAME unless both sides agreed on leaving them out. */
export const exportNamePaddingBytes = 124
export const optionReplyHeaderBytes = 20
export const requestHeaderBytes = 28
export const extendedRequestHeaderBytes = 32
export const simpleReplyHeaderBytes = 16
export const structuredReplyHeaderBytes = 20
export const extendedReplyHeaderBytes = 32
/** Most extents of one context in one answer. */
export const extentCountMax = 1 << 20
/** Largest length field of a request without extended headers. */
export const requestLengthMax = 0xffff_ffff

/** Sizes that hold when the server does not say any. */
export const defaultBlockSizes = { minimumBytes: 1, preferredBytes: 4096, maximumBytes: 32 * 1024 * 1024 } as const

/** The errno values of the protocol; servers may send no others. */
export const errnoNames: Readonly<Record<number, string>> = {
  1: 'EPERM',
  5: 'EIO',
  12: 'ENOMEM',
  22: 'EINVAL',
  28: 'ENOSPC',
  75: 'EOVERFLOW',
  95: 'ENOTSUP',
  108: 'ESHUTDOWN',
}

/** `name` of a value in one of the tables above, for messages. */
export function nameOf(table: Readonly<Record<string, number>>, value: number): string {
  for (const [name, known] of Object.entries(table)) if (known === value) return name
  return `0x${value.toString(16)}`
}
