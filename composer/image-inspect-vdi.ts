/**
 * Reads the metadata of a VDI (VirtualBox) with our own code before qemu-img sees it. Numbers are little-endian.
 * | offset | bytes | field | valid when |
 * |---|---|---|---|
 * | 64 | 4 | signature 0xbeda107f | always |
 * | 68 | 4 | version | 0x00010001 |
 * | 72 | 4 | header bytes | at least 400 - 72 |
 * | 76 | 4 | type: 1 dynamic, 2 fixed, 3 undo, 4 differencing | 1 and 2 here |
 * | 340 | 4 | offset of the block map | multiple of 512 |
 * | 344 | 4 | offset of the data | multiple of 512 |
 * | 360 | 4 | sector bytes | 512 |
 * | 368 | 8 | disk bytes | always |
 * | 376 | 4 | block bytes | 1 MiB |
 * | 384, 388 | 4, 4 | blocks in the map, blocks that hold data | always |
 * | 424, 440 | 16, 16 | UUIDs of the link and of the parent | zero here |
 */
import { checkImageSize } from './image-size.ts'
import { exactNumber, MetadataMap, piecesOf, Refusals, type ByteSource, type Inspected } from './image-metadata.ts'

const headerBytes = 512
const blockBytes = 2 ** 20
/** 64 TiB of disk; qemu-img keeps the whole map in memory. */
const mapBytesMax = 256 * 2 ** 20
const blockUnallocated = 0xffff_ffff
const blockDiscarded = 0xffff_fffe

const refusals = new Refusals('vdi')

/**
 * Inspects the image and walks its block map.
 * @throws AtollError IMAGE_CORRUPT, IMAGE_HAS_BACKING_FILE, IMAGE_FEATURE_UNSUPPORTED, SIZE_INVALID
 */
export async function inspectVdi(source: ByteSource, signal?: AbortSignal): Promise<Inspected> {
  if (source.sizeBytes < headerBytes) throw refusals.corrupt(`it has ${source.sizeBytes} bytes, less than a header`)
  const header = await source.read(0, headerBytes)
  if (header.readUInt32LE(64) !== 0xbeda_107f) throw refusals.corrupt('it has no signature of vdi')
  const version = header.readUInt32LE(68)
  if (version !== 0x0001_0001) {
    throw refusals.refused('IMAGE_FEATURE_UNSUPPORTED', `its version is 0x${version.toString(16)}; 0x10001 is supported`, {
      version,
    })
  }
  const type = header.readUInt32LE(76)
  if (type === 3 || type === 4) {
    throw refusals.refused('IMAGE_HAS_BACKING_FILE', `it is a differencing image (type ${type}); its parent is never followed`, {
      type,
    })
  }
  if (type !== 1 && type !== 2)
    throw refusals.refused('IMAGE_FEATURE_UNSUPPORTED', `its type is ${type}; 1 and 2 are supported`, { type })
  if (!isZero(header.subarray(424, 440)) || !isZero(header.subarray(440, 456))) {
    throw refusals.refused('IMAGE_HAS_BACKING_FILE', 'it has a link or a parent, which is never followed')
  }
  if (header.readUInt32LE(360) !== 512)
    throw refusals.corrupt(`its sectors have ${header.readUInt32LE(360)} bytes; 512 are possible`)
  if (header.readUInt32LE(376) !== blockBytes || header.readUInt32LE(380) !== 0) {
    throw refusals.refused(
      'IMAGE_FEATURE_UNSUPPORTED',
      `its blocks have ${header.readUInt32LE(376)} bytes and ${header.readUInt32LE(380)} extra; ${blockBytes} and 0 are supported`,
      { blockBytes: header.readUInt32LE(376) },
    )
  }
  const diskBytes = exactNumber(header.readBigUInt64LE(368))
  checkImageSize(diskBytes)
  // qemu counts in sectors.
  const virtualSizeBytes = Math.ceil(diskBytes / 512) * 512
  const blockCount = header.readUInt32LE(384)
  if (blockCount * blockBytes < virtualSizeBytes) {
    throw refusals.corrupt(`its map has ${blockCount} blocks, too few for its ${virtualSizeBytes} bytes`)
  }
  if (blockCount * 4 > mapBytesMax) {
    throw refusals.refused('IMAGE_FEATURE_UNSUPPORTED', `its map has ${blockCount} blocks; the limit is ${mapBytesMax / 4}`, {
      blockCount,
      limit: mapBytesMax / 4,
    })
  }
  const allocatedCount = header.readUInt32LE(388)
  if (allocatedCount > blockCount) throw refusals.corrupt(`${allocatedCount} of its ${blockCount} blocks hold data`)
  const mapOffsetBytes = header.readUInt32LE(340)
  const dataOffsetBytes = header.readUInt32LE(344)
  if (mapOffsetBytes % 512 !== 0) throw refusals.corrupt(`its block map lies at offset ${mapOffsetBytes}`)
  if (dataOffsetBytes % 512 !== 0) throw refusals.corrupt(`its data lies at offset ${dataOffsetBytes}`)

  const places = new MetadataMap(source.sizeBytes, refusals)
  places.add('header', 0, headerBytes)
  places.add('block map', mapOffsetBytes, blockCount * 4)
  places.seal()
  let dataCount = 0
  for await (const { startBytes, piece } of piecesOf(source, mapOffsetBytes, blockCount * 4, signal)) {
    for (let position = 0; position < piece.length; position += 4) {
      const block = piece.readUInt32LE(position)
      if (block === blockUnallocated || block === blockDiscarded) continue
      const index = (startBytes + position) / 4
      if (block >= allocatedCount) throw refusals.corrupt(`block ${index} is number ${block} of ${allocatedCount} that hold data`)
      const offsetBytes = dataOffsetBytes + block * blockBytes
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
  if (dataCount > allocatedCount || (dataCount - 1) * blockBytes > source.sizeBytes) {
    throw refusals.corrupt(`its map names ${dataCount} blocks with data, but ${allocatedCount} are there`)
  }
  return { virtualSizeBytes, allocatedBytes: Math.min(dataCount * blockBytes, virtualSizeBytes) }
}

function isZero(bytes: Buffer): boolean {
  return bytes.every((byte) => byte === 0)
}
