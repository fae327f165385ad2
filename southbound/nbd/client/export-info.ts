import { NbdError } from './nbd-error.ts'
import { defaultBlockSizes, infoItem, stringBytesMax, transmissionFlag } from './protocol.ts'

/** What a server offers for an export. */
export interface NbdExportFlags {
  readonly readOnly: boolean
  readonly flush: boolean
  readonly fua: boolean
  readonly rotational: boolean
  readonly trim: boolean
  readonly writeZeroes: boolean
  readonly df: boolean
  readonly multiConn: boolean
  readonly cache: boolean
  readonly fastZero: boolean
  /** A status may be asked of some of the contexts only. */
  readonly blockStatusPayload: boolean
}

export interface NbdBlockSizes {
  /** Offsets and lengths are multiples of it. */
  readonly minimumBytes: number
  readonly preferredBytes: number
  /** Longest read or write. */
  readonly maximumBytes: number
}

/** What the negotiation says of an export. */
export interface NbdExportInfo {
  readonly sizeBytes: number
  /** The flags as they came. */
  readonly transmissionFlags: number
  readonly flags: NbdExportFlags
  readonly blockSizes: NbdBlockSizes
  /** The server's own name for the export, if it said one. */
  readonly canonicalName: string | null
  readonly description: string | null
}

/** Gathers the INFO replies to INFO or GO, checking each. */
export class ExportInfoBuilder {
  #size: { sizeBytes: number; transmissionFlags: number } | null = null
  #blockSizes: NbdBlockSizes | null = null
  #canonicalName: string | null = null
  #description: string | null = null

  /** One INFO reply. Unknown items are ignored, as the protocol wants. @throws NbdError NBD_PROTOCOL, NBD_UNSUPPORTED. */
  add(data: Buffer): void {
    if (data.length < 2) throw new NbdError('NBD_PROTOCOL', `an info reply of ${data.length} bytes`)
    const item = data.readUInt16BE(0)
    switch (item) {
      case infoItem.export:
        expectLength('export', data, 12)
        this.#size = readSizeAndFlags(data.subarray(2))
        return
      case infoItem.name:
        this.#canonicalName = readText('name', data.subarray(2))
        return
      case infoItem.description:
        this.#description = readText('description', data.subarray(2))
        return
      case infoItem.blockSize:
        expectLength('block size', data, 14)
        this.#blockSizes = readBlockSizes(data)
        return
      default:
    }
  }

  /** @throws NbdError NBD_PROTOCOL if the server never said the size. */
  finish(): NbdExportInfo {
    if (this.#size === null) throw new NbdError('NBD_PROTOCOL', 'the server acknowledged without saying the size of the export')
    return {
      ...exportInfoOf(this.#size.sizeBytes, this.#size.transmissionFlags),
      blockSizes: this.#blockSizes ?? defaultBlockSizes,
      canonicalName: this.#canonicalName,
      description: this.#description,
    }
  }
}

/** What is known of an export from size and flags alone. */
export function exportInfoOf(sizeBytes: number, transmissionFlags: number): NbdExportInfo {
  const has = (bit: number): boolean => (transmissionFlags & bit) !== 0
  return {
    sizeBytes,
    transmissionFlags,
    flags: {
      readOnly: has(transmissionFlag.readOnly),
      flush: has(transmissionFlag.flush),
      fua: has(transmissionFlag.fua),
      rotational: has(transmissionFlag.rotational),
      trim: has(transmissionFlag.trim),
      writeZeroes: has(transmissionFlag.writeZeroes),
      df: has(transmissionFlag.df),
      multiConn: has(transmissionFlag.multiConn),
      cache: has(transmissionFlag.cache),
      fastZero: has(transmissionFlag.fastZero),
      blockStatusPayload: has(transmissionFlag.blockStatusPayload),
    },
    blockSizes: defaultBlockSizes,
    canonicalName: null,
    description: null,
  }
}

/** The ten bytes that INFO_EXPORT and the answer to EXPORT_NAME share. @throws NbdError NBD_UNSUPPORTED, NBD_PROTOCOL. */
export function readSizeAndFlags(data: Buffer): { sizeBytes: number; transmissionFlags: number } {
  const size = data.readBigUInt64BE(0)
  if (size > BigInt(Number.MAX_SAFE_INTEGER))
    throw new NbdError('NBD_UNSUPPORTED', `the export has ${size} bytes, more than 2^53`)
  const transmissionFlags = data.readUInt16BE(8)
  if ((transmissionFlags & transmissionFlag.hasFlags) === 0) {
    throw new NbdError('NBD_PROTOCOL', `the transmission flags 0x${transmissionFlags.toString(16)} lack HAS_FLAGS`)
  }
  return { sizeBytes: Number(size), transmissionFlags }
}

function readBlockSizes(data: Buffer): NbdBlockSizes {
  const minimumBytes = data.readUInt32BE(2)
  const preferredBytes = data.readUInt32BE(6)
  const maximumBytes = data.readUInt32BE(10)
  const isPowerOfTwo = (value: number): boolean => value !== 0 && (value & (value - 1)) === 0
  if (
    !isPowerOfTwo(minimumBytes) ||
    !isPowerOfTwo(preferredBytes) ||
    minimumBytes > 65536 ||
    preferredBytes < Math.max(minimumBytes, 512) ||
    maximumBytes < preferredBytes
  ) {
    throw new NbdError(
      'NBD_PROTOCOL',
      `block sizes that cannot be: minimum ${minimumBytes}, preferred ${preferredBytes}, maximum ${maximumBytes}`,
    )
  }
  return { minimumBytes, preferredBytes, maximumBytes }
}

function readText(what: string, data: Buffer): string {
  if (data.length > stringBytesMax) {
    throw new NbdError('NBD_PROTOCOL', `a ${what} of ${data.length} bytes is longer than the limit of ${stringBytesMax}`)
  }
  return data.toString('utf8')
}

function expectLength(what: string, data: Buffer, lengthBytes: number): void {
  if (data.length !== lengthBytes)
    throw new NbdError('NBD_PROTOCOL', `the info item ${what} has ${data.length} bytes instead of ${lengthBytes}`)
}
