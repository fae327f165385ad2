/**
 * Reads the metadata of a VMDK with our own code before qemu-img sees it.
 *
 * Taken are files that hold everything themselves: hosted sparse extents with magic "KDMV" (monolithicSparse, and
 * streamOptimized with or without a footer). A text descriptor only names files of the host, so it is refused, whatever it
 * names. Numbers are little-endian; a sector has 512 bytes.
 * | offset | bytes | field | valid when |
 * |---|---|---|---|
 * | 0 | 4 | magic "KDMV" | always |
 * | 4 | 4 | version | 1 to 3 |
 * | 8 | 4 | flags: 1 = two directories, 16 = compressed grains, 17 = markers | always |
 * | 12 | 8 | capacity in sectors | always, not 0: qemu would read a descriptor then |
 * | 20 | 8 | grain size in sectors | power of two |
 * | 28, 36 | 8, 8 | descriptor: first sector, sector count | 0 without one |
 * | 44 | 4 | entries of a grain table | always 512 |
 * | 48 | 8 | first sector of the redundant grain directory | flag 1 |
 * | 56 | 8 | first sector of the grain directory; all ones: look at the footer | always |
 * | 77 | 2 | compression: 1 = deflate | flag 16 |
 */
import type { AtollError } from '@atoll/core'
import { checkImageSize } from './image-size.ts'
import {
  exactNumber,
  isPowerOfTwo,
  MetadataMap,
  piecesOf,
  Refusals,
  tablesMax,
  tablesOf,
  type ByteSource,
  type Inspected,
} from './image-metadata.ts'

const sectorBytes = 512
const headerBytes = 512
const grainTableEntries = 512
const grainTableBytes = grainTableEntries * 4
const grainBytesMin = 4096
const grainBytesMax = 2 * 2 ** 20
/** QEMU reads the embedded descriptor here, whatever the header says. */
const descriptorOffsetBytes = 512
const descriptorBytes = 20 * 512
const descriptorBytesMax = 2 ** 20
/** A marker, a copy of the header and an end-of-stream marker. */
const footerBytes = 3 * 512
const directoryAtEnd = 0xffff_ffff_ffff_ffffn
/** QEMU's own limit. */
const directoryEntriesMax = 32 * 2 ** 20

const flag = { redundant: 0x2, compressed: 0x1_0000 } as const
const grainUnallocated = 0
const grainZero = 1

const refusals = new Refusals('vmdk')

/**
 * Inspects the image and walks its grain directory and tables.
 * @throws AtollError IMAGE_CORRUPT, IMAGE_HAS_DATA_FILE, IMAGE_HAS_BACKING_FILE, IMAGE_FEATURE_UNSUPPORTED, SIZE_INVALID
 */
export async function inspectVmdk(source: ByteSource, signal?: AbortSignal): Promise<Inspected> {
  const start = await source.read(0, Math.min(source.sizeBytes, descriptorOffsetBytes + descriptorBytes))
  const magic = start.toString('latin1', 0, 4)
  if (start.toString('latin1', 0, 21) === '# Disk DescriptorFile') throw descriptorRefusal(start.toString('latin1'))
  if (magic === 'COWD') throw refusals.refused('IMAGE_FEATURE_UNSUPPORTED', 'it is an extent of an ESX disk (magic COWD)')
  if (magic !== 'KDMV') throw refusals.corrupt('it does not start with the magic of vmdk')
  if (start.length < headerBytes) throw refusals.corrupt(`it has ${source.sizeBytes} bytes, less than a header`)
  checkDescriptor(start.subarray(descriptorOffsetBytes).toString('latin1'))

  const map = new MetadataMap(source.sizeBytes, refusals)
  let header = readHeader(start)
  map.add('header', 0, headerBytes)
  if (header.directorySector === directoryAtEnd) {
    if (source.sizeBytes < headerBytes + footerBytes || source.sizeBytes % sectorBytes !== 0) {
      throw refusals.corrupt('its header says that a footer follows, and there is none: it is truncated')
    }
    const footer = await source.read(source.sizeBytes - footerBytes, footerBytes)
    const marker = { value: footer.readBigUInt64LE(0), sizeBytes: footer.readUInt32LE(8), type: footer.readUInt32LE(12) }
    if (marker.value !== 1n || marker.sizeBytes !== 0 || marker.type !== 3 || footer.toString('latin1', 512, 516) !== 'KDMV') {
      throw refusals.corrupt('its last 1536 bytes are no footer: it is truncated')
    }
    const capacity = header.capacityBytes
    header = readHeader(footer.subarray(512, 1024))
    if (header.directorySector === directoryAtEnd) throw refusals.corrupt('its footer names no grain directory')
    if (header.capacityBytes !== capacity) throw refusals.corrupt('the capacities in its header and its footer differ')
    map.add('footer', source.sizeBytes - footerBytes, footerBytes)
  }
  const { capacityBytes, grainBytes } = header
  checkImageSize(capacityBytes)

  if (header.descriptorSectors !== 0) {
    if (header.descriptorSectors > descriptorBytesMax / sectorBytes) {
      throw refusals.corrupt(
        `its descriptor has ${header.descriptorSectors} sectors; the limit is ${descriptorBytesMax / sectorBytes}`,
      )
    }
    const lengthBytes = header.descriptorSectors * sectorBytes
    const offsetBytes = map.add('descriptor', header.descriptorSector * BigInt(sectorBytes), lengthBytes)
    checkDescriptor((await source.read(offsetBytes, lengthBytes)).toString('latin1'))
  }
  const directoryEntries = Math.ceil(capacityBytes / (grainTableEntries * grainBytes))
  if (directoryEntries > directoryEntriesMax) {
    throw refusals.corrupt(`its grain directory has ${directoryEntries} entries; the limit is ${directoryEntriesMax}`)
  }
  const directoryOffsetBytes = map.add('grain directory', header.directorySector * BigInt(sectorBytes), directoryEntries * 4)
  if (header.isRedundant) map.add('redundant grain directory', header.redundantSector * BigInt(sectorBytes), directoryEntries * 4)

  map.seal()
  const tables: number[] = []
  for await (const { startBytes, piece } of piecesOf(source, directoryOffsetBytes, directoryEntries * 4, signal)) {
    for (let position = 0; position < piece.length; position += 4) {
      const sector = piece.readUInt32LE(position)
      if (sector === 0) continue
      if (sector * sectorBytes + grainTableBytes > source.sizeBytes) {
        throw cutOff(`grain table ${(startBytes + position) / 4}`, sector, source.sizeBytes)
      }
      if (tables.length >= tablesMax / 2) {
        throw refusals.refused('IMAGE_FEATURE_UNSUPPORTED', `it has more than ${tablesMax / 2} grain tables`, {
          limit: tablesMax / 2,
        })
      }
      tables.push(sector * sectorBytes)
    }
  }
  map.addTables('grain table', grainTableBytes, Float64Array.from(tables))
  map.seal()

  let grainCount = 0
  for await (const { offsetBytes, table } of tablesOf(source, tables, grainTableBytes, signal)) {
    for (let index = 0; index < grainTableEntries; index++) {
      const sector = table.readUInt32LE(index * 4)
      if (sector === grainUnallocated || sector === grainZero) continue
      const grainOffsetBytes = sector * sectorBytes
      // The last grain may be written in part only; a compressed one is as long as its marker says, which qemu-img checks.
      if (grainOffsetBytes >= source.sizeBytes)
        throw cutOff(`grain ${index} of the table at ${offsetBytes}`, sector, source.sizeBytes)
      map.checkData(() => `grain ${index} of the table at ${offsetBytes}`, grainOffsetBytes, header.isCompressed ? 1 : grainBytes)
      grainCount += 1
    }
  }
  // Grains that share their bytes would make a small file a large disk.
  if (grainCount * (header.isCompressed ? sectorBytes : grainBytes) > source.sizeBytes + grainBytes) {
    throw refusals.corrupt(`its tables name ${grainCount} grains, for which its ${source.sizeBytes} bytes have no room`)
  }
  return { virtualSizeBytes: capacityBytes, allocatedBytes: Math.min(grainCount * grainBytes, capacityBytes) }
}

interface Header {
  capacityBytes: number
  grainBytes: number
  descriptorSector: bigint
  descriptorSectors: number
  directorySector: bigint
  redundantSector: bigint
  isRedundant: boolean
  isCompressed: boolean
}

function readHeader(header: Buffer): Header {
  const version = header.readUInt32LE(4)
  if (version < 1 || version > 3) {
    throw refusals.refused('IMAGE_FEATURE_UNSUPPORTED', `its version is ${version}; 1 to 3 are supported`, { version })
  }
  const flags = header.readUInt32LE(8)
  const capacitySectors = header.readBigUInt64LE(12)
  if (capacitySectors === 0n) {
    throw refusals.refused(
      'IMAGE_HAS_DATA_FILE',
      'its capacity is 0: it is a descriptor that names other files, which are never followed',
    )
  }
  const grainBytes = exactNumber(header.readBigUInt64LE(20) * BigInt(sectorBytes))
  if (!isPowerOfTwo(grainBytes) || grainBytes < grainBytesMin || grainBytes > grainBytesMax) {
    throw refusals.corrupt(
      `its grain size is ${grainBytes} bytes; powers of two from ${grainBytesMin} to ${grainBytesMax} are possible`,
    )
  }
  const entries = header.readUInt32LE(44)
  if (entries !== grainTableEntries)
    throw refusals.corrupt(`its grain tables have ${entries} entries; ${grainTableEntries} are possible`)
  const isCompressed = (flags & flag.compressed) !== 0
  const compression = header.readUInt16LE(77)
  if (compression > 1 || (isCompressed && compression !== 1)) {
    throw refusals.refused('IMAGE_FEATURE_UNSUPPORTED', `its compression is ${compression}; 1 (deflate) is supported`, {
      compression,
    })
  }
  return {
    capacityBytes: exactNumber(capacitySectors * BigInt(sectorBytes)),
    grainBytes,
    descriptorSector: header.readBigUInt64LE(28),
    descriptorSectors: exactNumber(header.readBigUInt64LE(36)),
    directorySector: header.readBigUInt64LE(56),
    redundantSector: header.readBigUInt64LE(48),
    isRedundant: (flags & flag.redundant) !== 0,
    isCompressed,
  }
}

/** An embedded descriptor may name a parent, which qemu would open. */
function checkDescriptor(text: string): void {
  if (/parentFileNameHint/i.test(text)) {
    throw refusals.refused(
      'IMAGE_HAS_BACKING_FILE',
      'its descriptor names a parent (parentFileNameHint), which is never followed',
    )
  }
  for (const [, parent = ''] of text.matchAll(/parentCID[ \t]*=[ \t]*"?([0-9a-z]*)/gi)) {
    if (parent.toLowerCase() === 'ffffffff') continue
    throw refusals.refused('IMAGE_HAS_BACKING_FILE', `it has a parent (parentCID=${parent}), which is never followed`, { parent })
  }
}

function descriptorRefusal(text: string): AtollError {
  checkDescriptor(text)
  const type = /^[ \t]*createType[ \t]*=[ \t]*"?([0-9A-Za-z]+)/im.exec(text)?.[1] ?? 'unknown'
  const extent = /^[ \t]*(?:RW|RDONLY|NOACCESS)[ \t]+\d+[ \t]+[A-Z]+[ \t]+"([^"\n]{0,200})/im.exec(text)?.[1]
  const names = extent === undefined ? 'other files' : `other files, first ${JSON.stringify(extent)}`
  return refusals.refused(
    'IMAGE_HAS_DATA_FILE',
    `it is a descriptor (createType ${type}) that names ${names}, which are never followed`,
    {
      createType: type,
    },
  )
}

function cutOff(what: string, sector: number, fileBytes: number): AtollError {
  return refusals.corrupt(`${what} lies at sector ${sector}, past the end of the file (${fileBytes} bytes): it is truncated`)
}
