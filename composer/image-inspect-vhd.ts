/**
 * Reads the metadata of a VHD (Virtual PC, "vpc" to QEMU) with our own code. A fixed one is the bare disk with a footer of
 * 512 bytes, so it is copied without qemu-img; a dynamic one has a copy of the footer in front. Numbers are big-endian.
 * | offset in the footer | bytes | field | valid when |
 * |---|---|---|---|
 * | 0 | 8 | "conectix" | always |
 * | 16 | 8 | offset of the dynamic header; all ones if fixed | always |
 * | 48 | 8 | current size in bytes | always |
 * | 60 | 4 | type: 2 fixed, 3 dynamic, 4 differencing | 2 and 3 here |
 * | 64 | 4 | ones' complement of the sum of the other bytes | always |
 *
 * | offset in the dynamic header | bytes | field |
 * |---|---|---|
 * | 0 | 8 | "cxsparse" |
 * | 16 | 8 | offset of the block table |
 * | 28 | 4 | entries of the table |
 * | 32 | 4 | block bytes, a power of two |
 * | 36 | 4 | checksum as above |
 */
import { checkImageSize } from './image-size.ts'
import { exactNumber, isPowerOfTwo, MetadataMap, piecesOf, Refusals, type ByteSource, type Inspected } from './image-metadata.ts'

export const vhdFooterBytes = 512
const dynamicHeaderBytes = 1024
const blockBytesMin = 4096
const blockBytesMax = 256 * 2 ** 20
/** 2 TiB in blocks of 128 KiB; qemu-img keeps the whole table in memory. */
const tableEntriesMax = 16 * 2 ** 20
const blockUnallocated = 0xffff_ffff

const refusals = new Refusals('vhd')

export interface VhdInfo extends Inspected {
  /** True: the disk is the first `virtualSizeBytes` of the file. */
  isFixed: boolean
}

/** Whether these last 512 bytes of a file say that it is a VHD. */
export function isVhdFooter(tail: Uint8Array): boolean {
  return tail.length === vhdFooterBytes && Buffer.from(tail.subarray(0, 8)).toString('latin1') === 'conectix'
}

/** The size of the disk in a fixed VHD of `fileBytes` with this footer. @throws AtollError as `inspectVhd` */
export function fixedVhdSize(footer: Buffer, fileBytes: number): number {
  const { type, sizeBytes } = readFooter(footer)
  if (type !== 2) throw refusals.corrupt(`it has no header, but its footer's type is ${type}, not 2 (fixed)`)
  if (sizeBytes !== fileBytes - vhdFooterBytes) {
    throw refusals.corrupt(
      `its footer says ${sizeBytes} bytes, but the file has ${fileBytes - vhdFooterBytes} before it: it is truncated`,
    )
  }
  return sizeBytes
}

/**
 * Inspects the image; of a dynamic one walks the block table.
 * @throws AtollError IMAGE_CORRUPT, IMAGE_HAS_BACKING_FILE, IMAGE_FEATURE_UNSUPPORTED, SIZE_INVALID
 */
export async function inspectVhd(source: ByteSource, signal?: AbortSignal): Promise<VhdInfo> {
  if (source.sizeBytes < vhdFooterBytes) throw refusals.corrupt(`it has ${source.sizeBytes} bytes, less than a footer`)
  const start = await source.read(0, vhdFooterBytes)
  if (!isVhdFooter(start)) {
    const sizeBytes = fixedVhdSize(await source.read(source.sizeBytes - vhdFooterBytes, vhdFooterBytes), source.sizeBytes)
    return { virtualSizeBytes: sizeBytes, allocatedBytes: sizeBytes, isFixed: true }
  }
  const { type, sizeBytes, headerOffset } = readFooter(start)
  if (type !== 3) throw refusals.corrupt(`it starts like a dynamic image, but its type is ${type}, not 3`)
  if (!isVhdFooter(await source.read(source.sizeBytes - vhdFooterBytes, vhdFooterBytes))) {
    throw refusals.corrupt('it does not end with a footer: it is truncated')
  }
  const places = new MetadataMap(source.sizeBytes, refusals)
  places.add('copy of the footer', 0, vhdFooterBytes)
  const header = await source.read(places.add('dynamic header', headerOffset, dynamicHeaderBytes), dynamicHeaderBytes)
  if (header.toString('latin1', 0, 8) !== 'cxsparse')
    throw refusals.corrupt(`there is no dynamic header at offset ${headerOffset}`)
  if (header.readUInt32BE(36) !== checksum(header, 36)) throw refusals.corrupt('the checksum of its dynamic header is wrong')
  const blockBytes = header.readUInt32BE(32)
  if (!isPowerOfTwo(blockBytes) || blockBytes < blockBytesMin || blockBytes > blockBytesMax) {
    throw refusals.corrupt(
      `its blocks have ${blockBytes} bytes; powers of two from ${blockBytesMin} to ${blockBytesMax} are possible`,
    )
  }
  const entryCount = header.readUInt32BE(28)
  if (entryCount > tableEntriesMax)
    throw refusals.corrupt(`its block table has ${entryCount} entries; the limit is ${tableEntriesMax}`)
  if (entryCount * blockBytes < sizeBytes)
    throw refusals.corrupt(`its block table has ${entryCount} entries, too few for its ${sizeBytes} bytes`)
  const tableOffset = header.readBigUInt64BE(16)
  if (tableOffset % 512n !== 0n) throw refusals.corrupt(`its block table lies at offset ${tableOffset}`)
  const tableOffsetBytes = places.add('block table', tableOffset, entryCount * 4)
  places.seal()

  const bitmapBytes = Math.ceil(blockBytes / 512 / 8 / 512) * 512
  let dataCount = 0
  for await (const { startBytes, piece } of piecesOf(source, tableOffsetBytes, entryCount * 4, signal)) {
    for (let position = 0; position < piece.length; position += 4) {
      const sector = piece.readUInt32BE(position)
      if (sector === blockUnallocated) continue
      const index = (startBytes + position) / 4
      if (sector * 512 + bitmapBytes + blockBytes > source.sizeBytes) {
        throw refusals.corrupt(
          `block ${index} lies at sector ${sector}, past the end of the file (${source.sizeBytes} bytes): it is truncated`,
        )
      }
      places.checkData(() => `block ${index}`, sector * 512, bitmapBytes + blockBytes)
      dataCount += 1
    }
  }
  // Blocks that share their bytes would make a small file a large disk.
  if (dataCount > 0 && (dataCount - 1) * (bitmapBytes + blockBytes) > source.sizeBytes) {
    throw refusals.corrupt(`its table names ${dataCount} blocks, for which its ${source.sizeBytes} bytes have no room`)
  }
  return { virtualSizeBytes: sizeBytes, allocatedBytes: Math.min(dataCount * blockBytes, sizeBytes), isFixed: false }
}

function readFooter(footer: Buffer): { type: number; sizeBytes: number; headerOffset: bigint } {
  if (!isVhdFooter(footer)) throw refusals.corrupt('it has neither a header nor a footer of vhd')
  if (footer.readUInt32BE(64) !== checksum(footer, 64)) throw refusals.corrupt('the checksum of its footer is wrong')
  const type = footer.readUInt32BE(60)
  if (type === 4) throw refusals.refused('IMAGE_HAS_BACKING_FILE', 'it is a differencing image; its parent is never followed')
  const sizeBytes = exactNumber(footer.readBigUInt64BE(48))
  checkImageSize(sizeBytes)
  if (sizeBytes % 512 !== 0) throw refusals.corrupt(`its size is ${sizeBytes} bytes, no multiple of 512`)
  return { type, sizeBytes, headerOffset: footer.readBigUInt64BE(16) }
}

/** The sum of all bytes but the checksum's own, complemented. */
function checksum(bytes: Buffer, checksumOffset: number): number {
  let sum = 0
  for (const [index, byte] of bytes.entries()) {
    if (index < checksumOffset || index >= checksumOffset + 4) sum += byte
  }
  return ~sum >>> 0
}
