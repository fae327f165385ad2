/**
 * What the inspections of foreign images share: where bytes come from, how a refusal is worded, and where metadata lies.
 *
 * An inspection runs before anything of others sees the file. It reads every table of the format at most once and in pieces,
 * so its time is bounded by the file's tables (`tableBytesMax`) and its memory by `tablesMax` offsets.
 */
import { AtollError, type ErrorCode } from '@atoll/core'

/** Where the image's bytes come from. */
export interface ByteSource {
  readonly sizeBytes: number
  /** Exactly `lengthBytes`; the range lies within the source. */
  read(offsetBytes: number, lengthBytes: number): Promise<Buffer>
}

/** What an inspection finds. */
export interface Inspected {
  /** What the guest sees. */
  virtualSizeBytes: number
  /** Bytes of the virtual disk for which the image holds data. */
  allocatedBytes: number
}

/** All tables of one image together: as much as 32 TiB of scattered data need with the smallest usual tables. */
export const tableBytesMax = 4 * 2 ** 30
/** Tables of one kind whose places are kept in memory. */
export const tablesMax = 4 * 2 ** 20
/** Large tables are read in pieces of this size. */
const pieceBytes = 2 ** 20

/** Makes the errors of one format's inspection. */
export class Refusals {
  private readonly format: string

  constructor(format: string) {
    this.format = format
  }

  corrupt(what: string): AtollError {
    return new AtollError('IMAGE_CORRUPT', `the ${this.format} image is damaged: ${what}`, { values: { format: this.format } })
  }

  refused(code: ErrorCode, what: string, values: Record<string, string | number> = {}): AtollError {
    return new AtollError(code, `the ${this.format} image is refused: ${what}`, { values: { format: this.format, ...values } })
  }
}

/** A table in pieces of at most 1 MiB, each with its place in the table. The pieces are whole multiples of 1 MiB but the last. */
export async function* piecesOf(
  source: ByteSource,
  offsetBytes: number,
  lengthBytes: number,
  signal?: AbortSignal,
): AsyncGenerator<{ startBytes: number; piece: Buffer }> {
  for (let startBytes = 0; startBytes < lengthBytes; startBytes += pieceBytes) {
    signal?.throwIfAborted()
    yield { startBytes, piece: await source.read(offsetBytes + startBytes, Math.min(pieceBytes, lengthBytes - startBytes)) }
  }
}

/** Tables of one length, in the order of their offsets, those that follow each other read at once. Tables of zeros are left out. */
export async function* tablesOf(
  source: ByteSource,
  offsetsBytes: readonly number[],
  tableBytes: number,
  signal?: AbortSignal,
): AsyncGenerator<{ offsetBytes: number; table: Buffer }> {
  const sorted = Float64Array.from(offsetsBytes).toSorted()
  const zeros = Buffer.alloc(tableBytes)
  for (let index = 0; index < sorted.length;) {
    signal?.throwIfAborted()
    const startBytes = sorted[index] ?? 0
    let count = 1
    while (sorted[index + count] === startBytes + count * tableBytes && (count + 1) * tableBytes <= pieceBytes) count += 1
    const piece = await source.read(startBytes, count * tableBytes)
    for (let position = 0; position < piece.length; position += tableBytes) {
      const table = piece.subarray(position, position + tableBytes)
      if (!table.equals(zeros)) yield { offsetBytes: startBytes + position, table }
    }
    index += count
  }
}

interface NamedRange {
  name: string
  startBytes: number
  endBytes: number
}

/** Where an image's metadata lies. First every place is added, then `seal` compares them, then data is compared with them. */
export class MetadataMap {
  private readonly fileBytes: number
  private readonly refusals: Refusals
  private readonly ranges: NamedRange[] = []
  private tableName = ''
  private tableBytes = 0
  private tables = new Float64Array(0)

  constructor(fileBytes: number, refusals: Refusals) {
    this.fileBytes = fileBytes
    this.refusals = refusals
  }

  /** The offset as a number; the range must lie within the file. @throws AtollError IMAGE_CORRUPT */
  add(name: string, offsetBytes: number | bigint, lengthBytes: number): number {
    if (BigInt(offsetBytes) + BigInt(lengthBytes) > BigInt(this.fileBytes)) {
      throw this.refusals.corrupt(
        `its ${name} at offset ${offsetBytes} with ${lengthBytes} bytes goes past the end of the file (${this.fileBytes} bytes): it is truncated`,
      )
    }
    const startBytes = Number(offsetBytes)
    if (lengthBytes > 0) this.ranges.push({ name, startBytes, endBytes: startBytes + lengthBytes })
    return startBytes
  }

  /** Many tables of one length, e.g. those of the second level; each lies within the file. @throws AtollError IMAGE_CORRUPT */
  addTables(name: string, lengthBytes: number, offsetsBytes: Float64Array): void {
    if (offsetsBytes.length * lengthBytes > tableBytesMax) {
      throw this.refusals.refused(
        'IMAGE_FEATURE_UNSUPPORTED',
        `its ${offsetsBytes.length} ${name}s of ${lengthBytes} bytes are more than ${tableBytesMax} bytes together`,
        { tableCount: offsetsBytes.length, limitBytes: tableBytesMax },
      )
    }
    this.tableName = name
    this.tableBytes = lengthBytes
    this.tables = offsetsBytes.toSorted()
  }

  /** @throws AtollError IMAGE_CORRUPT when two places overlap */
  seal(): void {
    for (const [index, range] of this.ranges.entries()) {
      for (const other of this.ranges.slice(0, index)) {
        if (range.startBytes < other.endBytes && other.startBytes < range.endBytes) {
          throw this.refusals.corrupt(`its ${range.name} at offset ${range.startBytes} overlaps its ${other.name}`)
        }
      }
      if (this.tableAt(range.startBytes, range.endBytes)) {
        throw this.refusals.corrupt(`one ${this.tableName} overlaps its ${range.name}`)
      }
    }
    for (let index = 1; index < this.tables.length; index++) {
      const offsetBytes = this.tables[index] ?? 0
      if (offsetBytes - (this.tables[index - 1] ?? 0) < this.tableBytes) {
        throw this.refusals.corrupt(`two ${this.tableName}s lie at offset ${offsetBytes}`)
      }
    }
  }

  /** @throws AtollError IMAGE_CORRUPT when the data lies where metadata does */
  checkData(what: () => string, offsetBytes: number, lengthBytes: number): void {
    const endBytes = offsetBytes + lengthBytes
    const range = this.ranges.find(
      ({ startBytes, endBytes: rangeEndBytes }) => offsetBytes < rangeEndBytes && startBytes < endBytes,
    )
    if (range !== undefined) throw this.refusals.corrupt(`${what()} at offset ${offsetBytes} overlaps its ${range.name}`)
    if (this.tableAt(offsetBytes, endBytes)) {
      throw this.refusals.corrupt(`${what()} at offset ${offsetBytes} overlaps one ${this.tableName}`)
    }
  }

  /** Whether a table has a byte in common with the range. */
  private tableAt(startBytes: number, endBytes: number): boolean {
    let low = 0
    let high = this.tables.length
    // The first table that ends behind the start.
    while (low < high) {
      const middle = (low + high) >>> 1
      if ((this.tables[middle] ?? 0) + this.tableBytes <= startBytes) low = middle + 1
      else high = middle
    }
    return low < this.tables.length && (this.tables[low] ?? 0) < endBytes
  }
}

export function isPowerOfTwo(value: number): boolean {
  return value > 0 && Number.isInteger(Math.log2(value))
}

/** A 64-bit number of a header that must be exact here; one that is too large for that is too large for anything. */
export function exactNumber(value: bigint): number {
  return value > BigInt(Number.MAX_SAFE_INTEGER) ? Number.POSITIVE_INFINITY : Number(value)
}
