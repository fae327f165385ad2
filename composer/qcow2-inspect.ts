/**
 * Reads the metadata of a qcow2 image with our own code before anything else touches it, and refuses what must not be
 * followed (backing files, data files), what we cannot know to be right (unknown features, encryption) and what is damaged.
 *
 * The layout is that of docs/interop/qcow2.txt of QEMU; all numbers are big-endian.
 * | offset | bytes | field | valid when |
 * |---|---|---|---|
 * | 0 | 4 | magic "QFI\xfb" | always |
 * | 4 | 4 | version | always, 2 or 3 |
 * | 8 | 8 | backing file name offset | always, 0 here |
 * | 16 | 4 | backing file name bytes | always, 0 here |
 * | 20 | 4 | cluster bits | always, 9 to 21 |
 * | 24 | 8 | virtual size in bytes | always |
 * | 32 | 4 | encryption method | always, 0 here |
 * | 36 | 4 | L1 entries | always |
 * | 40 | 8 | L1 table offset | always |
 * | 48 | 8 | refcount table offset | always |
 * | 56 | 4 | refcount table clusters | always |
 * | 60 | 4 | snapshot count | always |
 * | 64 | 8 | snapshot table offset | snapshot count > 0 |
 * | 72 | 8 | incompatible features | version 3 |
 * | 80 | 8 | compatible features | version 3 |
 * | 88 | 8 | autoclear features | version 3 |
 * | 96 | 4 | refcount order | version 3 |
 * | 100 | 4 | header bytes | version 3 |
 * | 104 | 1 | compression type | header bytes > 104 |
 *
 * Every bound is checked before a read depends on it (I7): the tables lie within the file, none overlaps another, and none is
 * read twice, so the bytes read are at most those of the file.
 */
import { setImmediate } from 'node:timers/promises'
import type { AtollError, ErrorCode } from '@atoll/core'
import { checkImageSize } from './image-size.ts'
import { MetadataMap, Refusals, tablesOf, type ByteSource, type Inspected } from './image-metadata.ts'

export interface Qcow2Info extends Inspected {
  version: 2 | 3
  clusterBytes: number
}

const refusals = new Refusals('qcow2')

const headerVersion2Bytes = 72
const headerVersion3BytesMin = 104
/** QEMU's own limits (block/qcow2.h): an image beyond them cannot be opened by it either. */
const l1TableBytesMax = 32 * 2 ** 20
const refcountTableBytesMax = 8 * 2 ** 20
const snapshotCountMax = 65_536
const headerExtensionCountMax = 64
/** No compression makes less of a cluster. */
const compressedClusterBytesMin = 8
const entriesPerTurn = 131_072

const incompatible = { dirty: 0x01, corrupt: 0x02, dataFile: 0x04, compressionType: 0x08, extendedL2: 0x10 } as const
const incompatibleKnown = incompatible.dirty | incompatible.compressionType | incompatible.extendedL2

const extensionEnd = 0
const extensionDataFile = 0x44415441
const extensionCrypto = 0x0537be77

/** Bits 9 to 55 of an L1 or L2 entry are the offset; here of its upper and lower half. */
const offsetHighMask = 0x00ff_ffff
const offsetLowMask = 0xffff_fe00
/** Bit 62 of an L2 entry. */
const compressedHighBit = 0x4000_0000

/**
 * Inspects the image and walks all its tables.
 * @throws AtollError IMAGE_CORRUPT, IMAGE_HAS_BACKING_FILE, IMAGE_HAS_DATA_FILE, IMAGE_ENCRYPTED, IMAGE_FEATURE_UNSUPPORTED,
 *   SIZE_INVALID
 */
export async function inspectQcow2(source: ByteSource, signal?: AbortSignal): Promise<Qcow2Info> {
  if (source.sizeBytes < headerVersion2Bytes) throw corrupt(`it has ${source.sizeBytes} bytes, less than a header`)
  const header = await source.read(0, Math.min(source.sizeBytes, 4096))
  if (header.toString('latin1', 0, 4) !== 'QFI\xfb') throw corrupt('it does not start with the magic of qcow2')
  const version = header.readUInt32BE(4)
  if (version !== 2 && version !== 3) {
    throw refused('IMAGE_FEATURE_UNSUPPORTED', `its version is ${version}; versions 2 and 3 are supported`, { version })
  }
  if (header.readBigUInt64BE(8) !== 0n || header.readUInt32BE(16) !== 0) {
    throw refused('IMAGE_HAS_BACKING_FILE', 'it has a backing file, which is never followed', {})
  }
  if (header.readUInt32BE(32) !== 0) throw refused('IMAGE_ENCRYPTED', 'it is encrypted', { method: header.readUInt32BE(32) })
  const clusterBits = header.readUInt32BE(20)
  if (clusterBits < 9 || clusterBits > 21) throw corrupt(`its cluster size is 2^${clusterBits}; 2^9 to 2^21 are possible`)
  const clusterBytes = 2 ** clusterBits
  const features = version === 3 ? checkFeatures(header, clusterBytes) : { headerBytes: headerVersion2Bytes, extendedL2: false }
  if (features.extendedL2 && clusterBits < 14) throw corrupt('its clusters are too small for extended L2 entries')
  await checkExtensions(source, features.headerBytes, clusterBytes)
  const virtualSizeBytes = Number(header.readBigUInt64BE(24))
  checkImageSize(virtualSizeBytes)

  const places = new MetadataMap(source.sizeBytes, refusals)
  const table = (name: string, offsetBytes: bigint, lengthBytes: number): number => {
    if (lengthBytes > 0 && (offsetBytes % BigInt(clusterBytes) !== 0n || offsetBytes === 0n)) {
      throw corrupt(`its ${name} lies at offset ${offsetBytes}`)
    }
    return lengthBytes === 0 ? 0 : places.add(name, offsetBytes, lengthBytes)
  }
  places.add('header', 0, Math.min(clusterBytes, source.sizeBytes))
  const l2EntryBytes = features.extendedL2 ? 16 : 8
  const l1Count = header.readUInt32BE(36)
  const l1CountNeeded = Math.ceil(virtualSizeBytes / (clusterBytes * (clusterBytes / l2EntryBytes)))
  if (l1Count * 8 > l1TableBytesMax) throw corrupt(`its L1 table has ${l1Count} entries, more than ${l1TableBytesMax / 8}`)
  if (l1Count < l1CountNeeded) throw corrupt(`its L1 table has ${l1Count} entries, but ${l1CountNeeded} are needed for its size`)
  const l1OffsetBytes = table('L1 table', header.readBigUInt64BE(40), l1Count * 8)
  const refcountTableBytes = header.readUInt32BE(56) * clusterBytes
  if (refcountTableBytes === 0 || refcountTableBytes > refcountTableBytesMax) {
    throw corrupt(`its refcount table has ${refcountTableBytes} bytes; 1 cluster to ${refcountTableBytesMax} bytes are possible`)
  }
  table('refcount table', header.readBigUInt64BE(48), refcountTableBytes)
  const snapshotCount = header.readUInt32BE(60)
  if (snapshotCount > snapshotCountMax)
    throw corrupt(`it has ${snapshotCount} internal snapshots; the limit is ${snapshotCountMax}`)
  // A snapshot's record has at least 40 bytes.
  if (snapshotCount > 0) table('snapshot table', header.readBigUInt64BE(64), snapshotCount * 40)

  places.seal()
  const l1 = l1Count === 0 ? Buffer.alloc(0) : await source.read(l1OffsetBytes, l1Count * 8)
  const l2Offsets: number[] = []
  for (let index = 0; index < l1Count; index++) {
    // A large table of zeros must not hold up everything else.
    if (index % entriesPerTurn === entriesPerTurn - 1) await setImmediate()
    const l2OffsetBytes = offsetOf(l1.readUInt32BE(index * 8), l1.readUInt32BE(index * 8 + 4))
    if (l2OffsetBytes === 0) continue
    if (l2OffsetBytes % clusterBytes !== 0) throw corrupt(`its L2 table ${index} lies at offset ${l2OffsetBytes}`)
    if (l2OffsetBytes + clusterBytes > source.sizeBytes) {
      throw corrupt(
        `its L2 table ${index} at offset ${l2OffsetBytes} with ${clusterBytes} bytes goes past the end of the file (${source.sizeBytes} bytes): it is truncated`,
      )
    }
    l2Offsets.push(l2OffsetBytes)
  }
  places.addTables('L2 table', clusterBytes, Float64Array.from(l2Offsets))
  places.seal()
  const clusters = { clusterBits, entryBytes: l2EntryBytes, fileBytes: source.sizeBytes, places }
  const counts = { stored: 0, compressed: 0 }
  for await (const { offsetBytes, table: l2 } of tablesOf(source, l2Offsets, clusterBytes, signal)) {
    checkL2(l2, offsetBytes, clusters, counts)
  }
  // Clusters that share their bytes would make a small file a large disk.
  if ((counts.stored - 1) * clusterBytes + counts.compressed * compressedClusterBytesMin > source.sizeBytes) {
    throw corrupt(
      `its tables name ${counts.stored} clusters and ${counts.compressed} compressed ones, for which its ${source.sizeBytes} bytes have no room`,
    )
  }
  return {
    version,
    virtualSizeBytes,
    clusterBytes,
    allocatedBytes: Math.min((counts.stored + counts.compressed) * clusterBytes, virtualSizeBytes),
  }
}

function checkFeatures(header: Buffer, clusterBytes: number): { headerBytes: number; extendedL2: boolean } {
  if (header.length < headerVersion3BytesMin) throw corrupt(`it has ${header.length} bytes, less than a header of version 3`)
  const high = header.readUInt32BE(72)
  const low = header.readUInt32BE(76)
  if ((low & incompatible.dataFile) !== 0)
    throw refused('IMAGE_HAS_DATA_FILE', 'it keeps its data in another file, which is never followed', {})
  if ((low & incompatible.corrupt) !== 0) throw corrupt('it is marked as corrupt')
  const unknown = (BigInt(high) << 32n) | BigInt((low & ~incompatibleKnown) >>> 0)
  if (unknown !== 0n) {
    throw refused('IMAGE_FEATURE_UNSUPPORTED', `it uses unknown features (bits 0x${unknown.toString(16)})`, {
      featureBits: `0x${unknown.toString(16)}`,
    })
  }
  const headerBytes = header.readUInt32BE(100)
  if (headerBytes < headerVersion3BytesMin || headerBytes % 8 !== 0 || headerBytes > Math.min(clusterBytes, header.length)) {
    throw corrupt(`its header has ${headerBytes} bytes`)
  }
  if (header.readUInt32BE(96) > 6) throw corrupt(`its refcounts have 2^${header.readUInt32BE(96)} bits; at most 2^6 are possible`)
  const compressionType = headerBytes > headerVersion3BytesMin ? header.readUInt8(104) : 0
  // The bit and the field must agree: 0 (zlib) needs no bit, 1 (zstd) does.
  if (compressionType > 1)
    throw refused('IMAGE_FEATURE_UNSUPPORTED', `its compression type is ${compressionType}; 0 and 1 are supported`, {
      compressionType,
    })
  if ((compressionType !== 0) !== ((low & incompatible.compressionType) !== 0))
    throw corrupt('its compression type and its feature bit disagree')
  return { headerBytes, extendedL2: (low & incompatible.extendedL2) !== 0 }
}

/** Header extensions: {type u32, length u32, data padded to 8 bytes}, between the header and the end of the first cluster. */
async function checkExtensions(source: ByteSource, headerBytes: number, clusterBytes: number): Promise<void> {
  const endBytes = Math.min(clusterBytes, source.sizeBytes)
  const area = await source.read(0, endBytes)
  let offsetBytes = headerBytes
  for (let count = 0; offsetBytes + 8 <= endBytes; count++) {
    const type = area.readUInt32BE(offsetBytes)
    const lengthBytes = area.readUInt32BE(offsetBytes + 4)
    if (type === extensionEnd) return
    if (count >= headerExtensionCountMax) throw corrupt(`it has more than ${headerExtensionCountMax} header extensions`)
    if (lengthBytes > endBytes - offsetBytes - 8)
      throw corrupt(`a header extension at offset ${offsetBytes} has ${lengthBytes} bytes`)
    if (type === extensionDataFile)
      throw refused('IMAGE_HAS_DATA_FILE', 'it names an external data file, which is never followed', {})
    if (type === extensionCrypto) throw refused('IMAGE_ENCRYPTED', 'it has an encryption header', {})
    offsetBytes += 8 + Math.ceil(lengthBytes / 8) * 8
  }
}

interface Clusters {
  clusterBits: number
  entryBytes: number
  fileBytes: number
  places: MetadataMap
}

/** Checks that every cluster of an L2 table lies within the file and not on metadata; counts those that hold data. */
function checkL2(l2: Buffer, l2OffsetBytes: number, clusters: Clusters, counts: { stored: number; compressed: number }): void {
  const { clusterBits, entryBytes, fileBytes, places } = clusters
  const clusterBytes = 2 ** clusterBits
  // The last cluster may be written in part only; QEMU tolerates that, and so do we. What starts past the end was cut off.
  const endBytesMax = Math.ceil(fileBytes / clusterBytes) * clusterBytes
  for (let position = 0; position < l2.length; position += entryBytes) {
    const high = l2.readUInt32BE(position)
    const low = l2.readUInt32BE(position + 4)
    if (high === 0 && low === 0) continue
    const name = (): string => `cluster ${position / entryBytes} of the L2 table at ${l2OffsetBytes}`
    if ((high & compressedHighBit) === 0) {
      const offsetBytes = offsetOf(high, low)
      if (offsetBytes === 0) continue
      if (offsetBytes % clusterBytes !== 0)
        throw corrupt(`${name()} lies at offset ${offsetBytes}, which is no start of a cluster`)
      if (offsetBytes >= fileBytes) throw cutOff(name(), offsetBytes, fileBytes)
      places.checkData(name, offsetBytes, clusterBytes)
      // Bit 0, "reads as zeros", may stand beside a cluster kept for later.
      if ((low & 1) === 0) counts.stored += 1
    } else {
      // Bits 0 to x-1 are the offset, x to 61 the sectors beyond the first; x = 62 - (cluster bits - 8).
      const offsetBits = 62 - (clusterBits - 8)
      const descriptor = (BigInt(high & 0x3fff_ffff) << 32n) | BigInt(low)
      const offsetBytes = Number(descriptor & ((1n << BigInt(offsetBits)) - 1n))
      const sectorCount = Number(descriptor >> BigInt(offsetBits)) + 1
      const endBytes = Math.floor(offsetBytes / 512) * 512 + sectorCount * 512
      if (offsetBytes >= fileBytes || endBytes > endBytesMax) throw cutOff(name(), offsetBytes, fileBytes)
      places.checkData(name, offsetBytes, 1)
      counts.compressed += 1
    }
  }
}

function offsetOf(high: number, low: number): number {
  return (high & offsetHighMask) * 2 ** 32 + ((low & offsetLowMask) >>> 0)
}

function corrupt(what: string): AtollError {
  return refusals.corrupt(what)
}

function cutOff(what: string, offsetBytes: number, fileBytes: number): AtollError {
  return corrupt(`${what} lies at offset ${offsetBytes}, past the end of the file (${fileBytes} bytes): it is truncated`)
}

function refused(code: ErrorCode, what: string, values: Record<string, string | number>): AtollError {
  return refusals.refused(code, what, values)
}
