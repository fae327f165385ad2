/**
 * The numbers of the NBD negotiation (doc/proto.md of the NetworkBlockDevice project). Everything on the wire is big-endian.
 * What comes after the negotiation is native and has its numbers there.
 */

export const greetingMagic = 0x4e42444d41474943n // "NBDMAGIC"
export const newstyleMagic = 0x49484156454f5054n // "IHAVEOPT"
export const optionReplyMagic = 0x3e889045565a9n

export const handshakeFlag = { fixedNewstyle: 1 << 0, noZeroes: 1 << 1 } as const
export const clientFlag = { fixedNewstyle: 1 << 0, noZeroes: 1 << 1 } as const

export const option = {
  exportName: 1,
  abort: 2,
  list: 3,
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
  errorTooBig: 0x80000009,
  errorExtendedHeadersRequired: 0x8000000a,
} as const

export const infoItem = { export: 0, name: 1, description: 2, blockSize: 3 } as const

export const transmissionFlag = {
  hasFlags: 1 << 0,
  readOnly: 1 << 1,
  flush: 1 << 2,
  fua: 1 << 3,
  trim: 1 << 5,
  writeZeroes: 1 << 6,
  df: 1 << 7,
  canMultiConn: 1 << 8,
  cache: 1 << 10,
  fastZero: 1 << 11,
  blockStatusPayload: 1 << 12,
} as const

export const greetingBytes = 18
export const optionHeaderBytes = 16
export const optionReplyHeaderBytes = 20
/** Zeros after the answer to EXPORT_NAME unless the client asked to leave them out; never after GO. */
export const exportNamePaddingBytes = 124
/** Longest string of the protocol: export names, descriptions, queries. */
export const stringBytesMax = 4096

/** Smallest unit of a request: any byte may be addressed. */
export const blockBytesMin = 1
/** What requests should be multiples of: the slot of the map. */
export const blockBytesPreferred = 4096
/** Longest read or write. */
export const blockBytesMax = 32 * 1024 * 1024
