/**
 * Export records: what a pool says about itself, so that its content can be brought back when the catalog is lost.
 *
 * A pool's export is one *base*, everything at one time, and the *deltas* after it. Each is one record of the pool's store or
 * several; a base may be read while rows change, and is whole together with the deltas up to `neededSeq`.
 *
 * | offset | bytes | field |
 * |---|---|---|
 * | 0 | 8 | magic `ATOLLEXP` |
 * | 8 | 4 | version: 2 if the header names linked pools (`readers`, `sources`), else 1 |
 * | 12 | 4 | crc32 (ISO-HDLC, that of zlib) of everything after it |
 * | 16 | 4 | length of the JSON text |
 * | 20 | 4 | number of map pages |
 * | 24 | … | the text: header, rows, keys of deleted rows |
 * | … | 12 each | id (8) and length (4) of each page, then the bodies |
 *
 * All numbers are little-endian. Bytes of a record are hostile (I7): nothing of it is used before magic, version, checksum and
 * bounds are checked; a row is checked again by the catalog that it is put into.
 */
import { crc32 } from 'node:zlib'
import { AtollError, exportedTableNames, isId, type ExportedRow, type ExportedTable, type RowKey } from '@atoll/core'
import { z } from 'zod'

const magic = Buffer.from('ATOLLEXP', 'latin1')
const version = 2
/** Of a record that names no linked pools: what has none is as it was before there were any. */
const versionWithoutLinks = 1
const headBytes = 24
const pageHeadBytes = 12

/** Bodies of pages and rows that one record takes, about: what a base or a large delta is divided by. */
export const recordBytesTarget = 2 * 2 ** 20

const count = z.int().min(0)
const linkedPools = z.array(z.strictObject({ id: z.string().refine(isId), name: z.string(), driver: z.string() })).min(1)
const headerSchema = z.strictObject({
  kind: z.enum(['base', 'delta']),
  /** A base's number, or that of a delta record: both only rise. */
  number: count,
  /** Of a base: from 0. Of a delta: the number of the first record of the same delta. */
  part: count,
  /** The last record of a base or of a delta; without it the others mean nothing. */
  last: z.boolean(),
  catalogId: z.string().refine(isId),
  poolId: z.string().refine(isId),
  /** Of the catalog that the rows are from. */
  formatVersion: z.int().min(1),
  /** Milliseconds since 1970. */
  writtenAt: z.number(),
  /** The delta follows on a state that has all changes up to here. Of a base: it has all changes up to here. */
  fromSeq: count,
  /** With this delta the state has all changes up to here. Of a base: the deltas that belong to it reach at least to here. */
  toSeq: count,
  /** Of a base: the first delta that comes after it. Of a delta: 0. */
  deltasFrom: count,
  /** No alias of a layer and no page id above these was given out, in the whole catalog. */
  aliasMax: count,
  pageIdMax: count,
  /** Pools of the same catalog whose resources may read from this one, at the time of the record. */
  readers: linkedPools.optional(),
  /** Pools that resources of this one may read from. */
  sources: linkedPools.optional(),
})
export type ExportHeader = z.infer<typeof headerSchema>

const scalar = z.union([z.string(), z.number(), z.boolean(), z.null()])
const rowSchema = z.record(z.string().max(64), z.union([scalar, z.record(z.string(), z.json())]))
const tableName = z.enum(exportedTableNames as [ExportedTable, ...ExportedTable[]])
const contentSchema = z.strictObject({
  header: headerSchema,
  upserts: z.partialRecord(tableName, z.array(rowSchema)),
  deletes: z.partialRecord(tableName, z.array(z.union([z.string(), z.number()]))),
})

export interface ExportedPage {
  readonly id: number
  readonly body: Uint8Array
}

export interface ExportRecord {
  readonly header: ExportHeader
  readonly upserts: Partial<Record<ExportedTable, ExportedRow[]>>
  readonly deletes: Partial<Record<ExportedTable, RowKey[]>>
  readonly pages: readonly ExportedPage[]
}

export const recordPrefix = 'export.'
const namePattern = /^export\.(base|delta)\.(\d{12})(?:\.(\d{6}))?$/

export function baseName(number: number, part: number): string {
  return `${recordPrefix}base.${String(number).padStart(12, '0')}.${String(part).padStart(6, '0')}`
}

export function deltaName(number: number): string {
  return `${recordPrefix}delta.${String(number).padStart(12, '0')}`
}

export interface RecordName {
  readonly name: string
  readonly kind: 'base' | 'delta'
  readonly number: number
  /** Of a base; 0 of a delta. */
  readonly part: number
}

/** What a record's name says; null: it is none of ours. */
export function parseRecordName(name: string): RecordName | null {
  const [, kind, number, part] = namePattern.exec(name) ?? []
  if (kind === undefined || number === undefined || (kind === 'base') !== (part !== undefined)) return null
  return { name, kind: kind as 'base' | 'delta', number: Number(number), part: Number(part ?? 0) }
}

export function encodeRecord(record: ExportRecord): Uint8Array {
  const { header, upserts, deletes, pages } = record
  const text = Buffer.from(JSON.stringify({ header, upserts, deletes }), 'utf8')
  const pageHeads = Buffer.alloc(pages.length * pageHeadBytes)
  pages.forEach((page, index) => {
    pageHeads.writeBigUInt64LE(BigInt(page.id), index * pageHeadBytes)
    pageHeads.writeUInt32LE(page.body.length, index * pageHeadBytes + 8)
  })
  const head = Buffer.alloc(headBytes)
  magic.copy(head)
  head.writeUInt32LE(header.readers === undefined && header.sources === undefined ? versionWithoutLinks : version, 8)
  head.writeUInt32LE(text.length, 16)
  head.writeUInt32LE(pages.length, 20)
  const bytes = Buffer.concat([head, text, pageHeads, ...pages.map((page) => page.body)])
  bytes.writeUInt32LE(crc32(bytes.subarray(16)), 12)
  return bytes
}

/** @throws AtollError EXPORT_CORRUPT naming the record and what is wrong, FORMAT_VERSION of a newer version */
export function decodeRecord(name: string, input: Uint8Array): ExportRecord {
  const bytes = Buffer.from(input.buffer, input.byteOffset, input.length)
  const refuse = (why: string, cause?: unknown): never => {
    throw new AtollError('EXPORT_CORRUPT', `the record ${name} of the pool's export ${why}`, { values: { record: name }, cause })
  }
  if (bytes.length < headBytes || !bytes.subarray(0, 8).equals(magic)) refuse('is cut short or none of ours')
  const found = bytes.readUInt32LE(8)
  if (found > version) {
    throw new AtollError(
      'FORMAT_VERSION',
      `the record ${name} of the pool's export has version ${found}, this build knows ${version}: use the version of Atoll that wrote it`,
      { values: { record: name, foundVersion: found, knownVersion: version } },
    )
  }
  if (bytes.readUInt32LE(12) !== crc32(bytes.subarray(16))) refuse('is damaged: its checksum is wrong')
  const textEnd = headBytes + bytes.readUInt32LE(16)
  const pageCount = bytes.readUInt32LE(20)
  const bodiesStart = textEnd + pageCount * pageHeadBytes
  if (found < 1 || bodiesStart > bytes.length) refuse('is damaged: its parts do not fit into it')
  let content: unknown
  try {
    content = JSON.parse(bytes.toString('utf8', headBytes, textEnd))
  } catch (error) {
    refuse('is damaged: its text is no JSON', error)
  }
  const checked = contentSchema.safeParse(content)
  if (!checked.success) return refuse(`holds what no export has: ${z.prettifyError(checked.error)}`, checked.error)
  const pages: ExportedPage[] = []
  let at = bodiesStart
  for (let index = 0; index < pageCount; index += 1) {
    const head = textEnd + index * pageHeadBytes
    const id = Number(bytes.readBigUInt64LE(head))
    const length = bytes.readUInt32LE(head + 8)
    if (!Number.isSafeInteger(id) || id < 1 || at + length > bytes.length) refuse(`is damaged: page ${id} does not fit into it`)
    pages.push({ id, body: new Uint8Array(bytes.subarray(at, at + length)) })
    at += length
  }
  if (at !== bytes.length) refuse('is damaged: bytes follow its last page')
  return { ...(checked.data as Omit<ExportRecord, 'pages'>), pages }
}
