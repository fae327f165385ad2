/**
 * Reads the metadata of a VHDX (Hyper-V) with our own code before qemu-img sees it. Numbers are little-endian; the layout is
 * that of [MS-VHDX].
 * | offset | bytes | what |
 * |---|---|---|
 * | 0 | 8 | "vhdxfile" |
 * | 64 Ki, 128 Ki | 4 Ki each | two headers "head": checksum, sequence number, log; the newer valid one counts |
 * | 192 Ki, 256 Ki | 64 Ki each | two region tables "regi": where block table (BAT) and metadata lie |
 *
 * The metadata region has a table "metadata" of items: file parameters (block size, has a parent), virtual disk size, logical
 * sector size. An entry of the BAT has a state in bits 0 to 2 and, in bits 20 to 63, the offset of the block in MiB.
 */
import { checkImageSize } from './image-size.ts'
import { exactNumber, isPowerOfTwo, MetadataMap, piecesOf, Refusals, type ByteSource, type Inspected } from './image-metadata.ts'

const mebibyte = 2 ** 20
const headerOffsetsBytes = [64 * 1024, 128 * 1024] as const
const headerBytes = 4096
const regionTableOffsetBytes = 192 * 1024
const regionTableBytes = 64 * 1024
const regionEntriesMax = 2047
const metadataEntriesMax = 2047
const metadataTableBytes = 64 * 1024
const blockBytesMax = 256 * mebibyte
const virtualSizeBytesMax = 64 * 2 ** 40
/** 32 TiB in blocks of 1 MiB; qemu-img keeps the whole table in memory. */
const batBytesMax = 256 * mebibyte

const batRegion = '2dc27766f62342009d64115e9bfd4a08'
const metadataRegion = '8b7ca20647904b9ab8fe575f050f886e'
const item = {
  fileParameters: 'caa16737fa364d43b3b633f0aa44e76b',
  virtualSize: '2fa54224cd1b4876b2115dbed83bf4b8',
  page83: 'beca12abb2e6452393efc309e000c746',
  logicalSector: '8141bf1da96f4709ba47f233a8faab5f',
  physicalSector: 'cda348c7445d44719cc9e9885251c556',
  parentLocator: 'a8d35f2db30b454dabf7d3d84834ab0c',
} as const
const knownItems: ReadonlySet<string> = new Set(Object.values(item))

const state = { fullyPresent: 6, partlyPresent: 7 } as const

const refusals = new Refusals('vhdx')

/**
 * Inspects the image and walks its block table.
 * @throws AtollError IMAGE_CORRUPT, IMAGE_HAS_BACKING_FILE, IMAGE_FEATURE_UNSUPPORTED, SIZE_INVALID
 */
export async function inspectVhdx(source: ByteSource, signal?: AbortSignal): Promise<Inspected> {
  if (source.sizeBytes < mebibyte) throw refusals.corrupt(`it has ${source.sizeBytes} bytes, less than its first MiB`)
  if ((await source.read(0, 8)).toString('latin1') !== 'vhdxfile')
    throw refusals.corrupt('it does not start with the magic of vhdx')
  const places = new MetadataMap(source.sizeBytes, refusals)
  places.add('first MiB', 0, mebibyte)
  const log = await currentLog(source)
  if (log.lengthBytes % mebibyte !== 0 || log.offset % BigInt(mebibyte) !== 0n) {
    throw refusals.corrupt(`its log lies at offset ${log.offset} with ${log.lengthBytes} bytes`)
  }
  places.add('log', log.offset, log.lengthBytes)

  const regions = await readRegions(source)
  const metadataOffsetBytes = places.add('metadata region', regions.metadata.offset, regions.metadata.lengthBytes)
  const { blockBytes, virtualSizeBytes, sectorBytes } = await readMetadata(
    source,
    metadataOffsetBytes,
    regions.metadata.lengthBytes,
  )
  const batOffsetBytes = places.add('block table', regions.bat.offset, regions.bat.lengthBytes)
  places.seal()

  const blockCount = Math.ceil(virtualSizeBytes / blockBytes)
  // After so many blocks follows the entry of a sector bitmap, which only images with a parent use.
  const chunkBlocks = (2 ** 23 * sectorBytes) / blockBytes
  const entryCount = blockCount + Math.floor((blockCount - 1) / chunkBlocks)
  if (entryCount * 8 > regions.bat.lengthBytes) {
    throw refusals.corrupt(
      `its block table has ${regions.bat.lengthBytes / 8} entries, but ${entryCount} are needed for its size`,
    )
  }
  let dataCount = 0
  for await (const { startBytes, piece } of piecesOf(source, batOffsetBytes, entryCount * 8, signal)) {
    for (let position = 0; position < piece.length; position += 8) {
      const index = (startBytes + position) / 8
      if (index % (chunkBlocks + 1) === chunkBlocks) continue
      const low = piece.readUInt32LE(position)
      const blockState = low & 7
      if (blockState === state.partlyPresent) {
        throw refusals.refused('IMAGE_HAS_BACKING_FILE', `block ${index} is partly in a parent, which is never followed`)
      }
      if (blockState === 4 || blockState === 5)
        throw refusals.corrupt(`entry ${index} of its block table has state ${blockState}`)
      if (blockState !== state.fullyPresent) continue
      // Bits 20 to 63 count MiB: the entry without its lower 20 bits is the offset in bytes.
      const offsetBytes = piece.readUInt32LE(position + 4) * 2 ** 32 + ((low & 0xfff0_0000) >>> 0)
      if (offsetBytes + blockBytes > source.sizeBytes) {
        throw refusals.corrupt(
          `block ${index} lies at offset ${offsetBytes}, past the end of the file (${source.sizeBytes} bytes): it is truncated`,
        )
      }
      places.checkData(() => `block ${index}`, offsetBytes, blockBytes)
      dataCount += 1
    }
  }
  // Blocks that share their bytes would make a small file a large disk.
  if (dataCount * blockBytes > source.sizeBytes) {
    throw refusals.corrupt(`its table names ${dataCount} blocks, for which its ${source.sizeBytes} bytes have no room`)
  }
  return { virtualSizeBytes, allocatedBytes: Math.min(dataCount * blockBytes, virtualSizeBytes) }
}

/** The log of the newer valid header. */
async function currentLog(source: ByteSource): Promise<{ offset: bigint; lengthBytes: number }> {
  let newest: Buffer | null = null
  for (const offsetBytes of headerOffsetsBytes) {
    const header = await source.read(offsetBytes, headerBytes)
    if (header.toString('latin1', 0, 4) !== 'head' || header.readUInt32LE(4) !== crc32c(header, 4)) continue
    if (newest === null || header.readBigUInt64LE(8) > newest.readBigUInt64LE(8)) newest = header
  }
  if (newest === null) throw refusals.corrupt('neither of its headers is valid (signature, checksum)')
  const version = newest.readUInt16LE(66)
  if (version !== 1) throw refusals.refused('IMAGE_FEATURE_UNSUPPORTED', `its version is ${version}; 1 is supported`, { version })
  if (newest.subarray(48, 64).some((byte) => byte !== 0)) {
    throw refusals.corrupt('it was not closed cleanly: its log holds changes that were not written to their places')
  }
  return { offset: newest.readBigUInt64LE(72), lengthBytes: newest.readUInt32LE(68) }
}

interface Region {
  offset: bigint
  lengthBytes: number
}

async function readRegions(source: ByteSource): Promise<{ bat: Region; metadata: Region }> {
  const table = await source.read(regionTableOffsetBytes, regionTableBytes)
  if (table.toString('latin1', 0, 4) !== 'regi') throw refusals.corrupt('it has no region table')
  if (table.readUInt32LE(4) !== crc32c(table, 4)) throw refusals.corrupt('the checksum of its region table is wrong')
  const count = table.readUInt32LE(8)
  if (count > regionEntriesMax) throw refusals.corrupt(`its region table has ${count} entries; the limit is ${regionEntriesMax}`)
  const found = new Map<string, Region>()
  for (let index = 0; index < count; index++) {
    const entry = table.subarray(16 + index * 32, 48 + index * 32)
    const id = guidAt(entry, 0)
    if (id !== batRegion && id !== metadataRegion) {
      if ((entry.readUInt32LE(28) & 1) === 0) continue
      throw refusals.refused('IMAGE_FEATURE_UNSUPPORTED', `it needs an unknown region ${id}`, { region: id })
    }
    const region = { offset: entry.readBigUInt64LE(16), lengthBytes: entry.readUInt32LE(24) }
    if (found.has(id)) throw refusals.corrupt('a region is listed twice')
    if (region.offset % BigInt(mebibyte) !== 0n || region.lengthBytes % mebibyte !== 0 || region.lengthBytes === 0) {
      throw refusals.corrupt(`a region lies at offset ${region.offset} with ${region.lengthBytes} bytes`)
    }
    found.set(id, region)
  }
  const bat = found.get(batRegion)
  const metadata = found.get(metadataRegion)
  if (bat === undefined || metadata === undefined)
    throw refusals.corrupt('its region table lacks the block table or the metadata')
  if (bat.lengthBytes > batBytesMax) {
    throw refusals.refused(
      'IMAGE_FEATURE_UNSUPPORTED',
      `its block table has ${bat.lengthBytes} bytes; the limit is ${batBytesMax}`,
      {
        lengthBytes: bat.lengthBytes,
        limitBytes: batBytesMax,
      },
    )
  }
  return { bat, metadata }
}

async function readMetadata(
  source: ByteSource,
  regionOffsetBytes: number,
  regionBytes: number,
): Promise<{ blockBytes: number; virtualSizeBytes: number; sectorBytes: number }> {
  const table = await source.read(regionOffsetBytes, metadataTableBytes)
  if (table.toString('latin1', 0, 8) !== 'metadata') throw refusals.corrupt('it has no metadata table')
  const count = table.readUInt16LE(10)
  if (count > metadataEntriesMax)
    throw refusals.corrupt(`its metadata table has ${count} entries; the limit is ${metadataEntriesMax}`)
  const values = new Map<string, Buffer>()
  for (let index = 0; index < count; index++) {
    const entry = table.subarray(32 + index * 32, 64 + index * 32)
    const id = guidAt(entry, 0)
    const flags = entry.readUInt32LE(24)
    if (!knownItems.has(id)) {
      if ((flags & 4) === 0) continue
      throw refusals.refused('IMAGE_FEATURE_UNSUPPORTED', `it needs an unknown metadata item ${id}`, { item: id })
    }
    if (id === item.parentLocator) {
      throw refusals.refused(
        'IMAGE_HAS_BACKING_FILE',
        'it is a differencing image (it has a parent locator); its parent is never followed',
      )
    }
    const offsetBytes = entry.readUInt32LE(16)
    const lengthBytes = entry.readUInt32LE(20)
    if (offsetBytes < metadataTableBytes || offsetBytes + lengthBytes > regionBytes || lengthBytes > 64) {
      throw refusals.corrupt(`a metadata item lies at ${offsetBytes} with ${lengthBytes} bytes`)
    }
    if (values.has(id)) throw refusals.corrupt('a metadata item is listed twice')
    values.set(id, await source.read(regionOffsetBytes + offsetBytes, lengthBytes))
  }
  const valueOf = (id: string, name: string, lengthBytes: number): Buffer => {
    const value = values.get(id)
    if (value?.length === lengthBytes) return value
    throw refusals.corrupt(`its ${name} has ${value?.length ?? 0} bytes, not ${lengthBytes}`)
  }
  const parameters = valueOf(item.fileParameters, 'file parameters', 8)
  if ((parameters.readUInt32LE(4) & 2) !== 0) {
    throw refusals.refused('IMAGE_HAS_BACKING_FILE', 'it is a differencing image; its parent is never followed')
  }
  const blockBytes = parameters.readUInt32LE(0)
  if (!isPowerOfTwo(blockBytes) || blockBytes < mebibyte || blockBytes > blockBytesMax) {
    throw refusals.corrupt(`its blocks have ${blockBytes} bytes; powers of two from ${mebibyte} to ${blockBytesMax} are possible`)
  }
  const sectorBytes = valueOf(item.logicalSector, 'logical sector size', 4).readUInt32LE(0)
  if (sectorBytes !== 512 && sectorBytes !== 4096)
    throw refusals.corrupt(`its sectors have ${sectorBytes} bytes; 512 and 4096 are possible`)
  const virtualSizeBytes = exactNumber(valueOf(item.virtualSize, 'virtual disk size', 8).readBigUInt64LE(0))
  checkImageSize(virtualSizeBytes)
  if (virtualSizeBytes > virtualSizeBytesMax || virtualSizeBytes % sectorBytes !== 0) {
    throw refusals.corrupt(
      `its size is ${virtualSizeBytes} bytes; multiples of ${sectorBytes} up to ${virtualSizeBytesMax} are possible`,
    )
  }
  return { blockBytes, virtualSizeBytes, sectorBytes }
}

/** The identifier in the usual order of its digits, without dashes. */
function guidAt(bytes: Buffer, offsetBytes: number): string {
  const hex = (value: number, digits: number): string => value.toString(16).padStart(digits, '0')
  return (
    hex(bytes.readUInt32LE(offsetBytes), 8) +
    hex(bytes.readUInt16LE(offsetBytes + 4), 4) +
    hex(bytes.readUInt16LE(offsetBytes + 6), 4) +
    bytes.toString('hex', offsetBytes + 8, offsetBytes + 16)
  )
}

const crcTable = Uint32Array.from({ length: 256 }, (_, index) => {
  let value = index
  for (let bit = 0; bit < 8; bit++) value = (value & 1) === 0 ? value >>> 1 : (value >>> 1) ^ 0x82f6_3b78
  return value >>> 0
})

/** CRC-32C of the bytes, with the checksum's own four taken as zero. */
export function crc32c(bytes: Buffer, checksumOffset: number): number {
  let value = 0xffff_ffff
  for (const [index, byte] of bytes.entries()) {
    const masked = index >= checksumOffset && index < checksumOffset + 4 ? 0 : byte
    value = (value >>> 8) ^ (crcTable[(value ^ masked) & 0xff] ?? 0)
  }
  return ~value >>> 0
}
