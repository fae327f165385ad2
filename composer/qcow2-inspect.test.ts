import { execFile } from 'node:child_process'
import { mkdtemp, open, readFile, rm, truncate, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { afterAll, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { ImageSource } from './image-source.ts'
import type { ByteSource } from './image-metadata.ts'
import { inspectQcow2, type Qcow2Info } from './qcow2-inspect.ts'
import { requireQemuImg } from './convert-sandbox.ts'

const run = promisify(execFile)
const haveQemuImg = await requireQemuImg().then(
  () => true,
  () => false,
)

function bytes(buffer: Buffer): ByteSource {
  return { sizeBytes: buffer.length, read: async (offset, length) => Buffer.from(buffer.subarray(offset, offset + length)) }
}

async function inspectFile(path: string): Promise<Qcow2Info> {
  const source = await ImageSource.open(path)
  try {
    return await inspectQcow2(source)
  } finally {
    await source.close()
  }
}

/** A valid image of version 3 with one data cluster; clusters of 64 KiB, 1 MiB virtual. */
function smallImage(): Buffer {
  const cluster = 65_536
  const image = Buffer.alloc(6 * cluster)
  image.write('QFI\xfb', 0, 'latin1')
  image.writeUInt32BE(3, 4)
  image.writeUInt32BE(16, 20)
  image.writeBigUInt64BE(2n ** 20n, 24)
  image.writeUInt32BE(1, 36)
  image.writeBigUInt64BE(BigInt(3 * cluster), 40)
  image.writeBigUInt64BE(BigInt(cluster), 48)
  image.writeUInt32BE(1, 56)
  image.writeUInt32BE(4, 96)
  image.writeUInt32BE(104, 100)
  image.writeBigUInt64BE(BigInt(4 * cluster), 3 * cluster)
  image.writeBigUInt64BE(BigInt(5 * cluster), 4 * cluster)
  return image
}

describe('our own inspection of qcow2', () => {
  let image: Buffer
  beforeEach(() => {
    image = smallImage()
  })

  test('reads size, version and what is allocated', async () => {
    await expect(inspectQcow2(bytes(image))).resolves.toEqual({
      version: 3,
      virtualSizeBytes: 2 ** 20,
      clusterBytes: 65_536,
      allocatedBytes: 65_536,
    })
  })

  const refusals: [string, string, (image: Buffer) => void][] = [
    ['a backing file', 'IMAGE_HAS_BACKING_FILE', (b) => b.writeBigUInt64BE(512n, 8)],
    ['an external data file bit', 'IMAGE_HAS_DATA_FILE', (b) => b.writeUInt32BE(4, 76)],
    ['the corrupt bit', 'IMAGE_CORRUPT', (b) => b.writeUInt32BE(2, 76)],
    ['an unknown incompatible feature', 'IMAGE_FEATURE_UNSUPPORTED', (b) => b.writeUInt32BE(0x20, 76)],
    ['an unknown feature in the upper half', 'IMAGE_FEATURE_UNSUPPORTED', (b) => b.writeUInt32BE(0x8000_0000, 72)],
    ['encryption', 'IMAGE_ENCRYPTED', (b) => b.writeUInt32BE(2, 32)],
    ['version 4', 'IMAGE_FEATURE_UNSUPPORTED', (b) => b.writeUInt32BE(4, 4)],
    ['clusters of 2^31 bytes', 'IMAGE_CORRUPT', (b) => b.writeUInt32BE(31, 20)],
    ['a virtual size of 2^63 bytes', 'SIZE_INVALID', (b) => b.writeBigUInt64BE(2n ** 63n, 24)],
    ['a virtual size of zero', 'SIZE_INVALID', (b) => b.writeBigUInt64BE(0n, 24)],
    ['an L1 table of 4 billion entries', 'IMAGE_CORRUPT', (b) => b.writeUInt32BE(0xffff_ffff, 36)],
    ['an L1 table that is too small for the size', 'IMAGE_CORRUPT', (b) => b.writeBigUInt64BE(2n ** 40n, 24)],
    ['an L1 table past the end of the file', 'IMAGE_CORRUPT', (b) => b.writeBigUInt64BE(2n ** 40n, 40)],
    ['an L1 table that wraps around', 'IMAGE_CORRUPT', (b) => b.writeBigUInt64BE(2n ** 64n - 65_536n, 40)],
    ['an L1 table inside the header', 'IMAGE_CORRUPT', (b) => b.writeBigUInt64BE(0n, 40)],
    ['an L1 table that is not aligned', 'IMAGE_CORRUPT', (b) => b.writeBigUInt64BE(65_537n, 40)],
    ['a refcount table of 2^32 clusters', 'IMAGE_CORRUPT', (b) => b.writeUInt32BE(0xffff_ffff, 56)],
    ['a refcount table past the end', 'IMAGE_CORRUPT', (b) => b.writeBigUInt64BE(2n ** 50n, 48)],
    ['too many internal snapshots', 'IMAGE_CORRUPT', (b) => b.writeUInt32BE(1_000_000, 60)],
    ['an L2 table past the end', 'IMAGE_CORRUPT', (b) => b.writeBigUInt64BE(2n ** 40n, 3 * 65_536)],
    ['a data cluster past the end', 'IMAGE_CORRUPT', (b) => b.writeBigUInt64BE(2n ** 40n, 4 * 65_536)],
    ['a data cluster that is not aligned', 'IMAGE_CORRUPT', (b) => b.writeBigUInt64BE(66_048n, 4 * 65_536)],
    ['a compressed cluster past the end', 'IMAGE_CORRUPT', (b) => b.writeBigUInt64BE((1n << 62n) | (2n ** 40n), 4 * 65_536)],
    ['a header of 4 GiB', 'IMAGE_CORRUPT', (b) => b.writeUInt32BE(0xffff_fff8, 100)],
    ['refcounts of 2^60 bits', 'IMAGE_CORRUPT', (b) => b.writeUInt32BE(60, 96)],
    [
      'a header extension longer than the header',
      'IMAGE_CORRUPT',
      (b) => b.writeUInt32BE(0x6803_f857, 104) && b.writeUInt32BE(0xffff_ffff, 108),
    ],
    [
      'the name of a data file without the bit',
      'IMAGE_HAS_DATA_FILE',
      (b) => b.writeUInt32BE(0x4441_5441, 104) && b.writeUInt32BE(4, 108),
    ],
    ['another magic', 'IMAGE_CORRUPT', (b) => b.writeUInt32BE(0, 0)],
  ]
  test.each(refusals)('refuses %s', async (_what, code, change) => {
    change(image)
    await expect(inspectQcow2(bytes(image))).rejects.toMatchObject({ code })
  })

  test('refuses two entries of the L1 table that name one L2 table, which would be read again and again', async () => {
    image.writeUInt32BE(2, 36)
    image.writeBigUInt64BE(BigInt(4 * 65_536), 3 * 65_536 + 8)
    await expect(inspectQcow2(bytes(image))).rejects.toMatchObject({ code: 'IMAGE_CORRUPT' })
  })

  test('refuses an image that was cut off anywhere before its last cluster', async () => {
    for (const lengthBytes of [0, 10, 72, 103, 4096, 65_536, 3 * 65_536, 4 * 65_536, 5 * 65_536]) {
      await expect(inspectQcow2(bytes(image.subarray(0, lengthBytes)))).rejects.toMatchObject({ code: 'IMAGE_CORRUPT' })
    }
  })

  test('never fails in another way, whatever bytes the tables have', async () => {
    let seed = 12_345
    const random = (limit: number): number => {
      seed = (Math.imul(seed, 1_103_515_245) + 12_345) & 0x7fff_ffff
      return seed % limit
    }
    for (let round = 0; round < 2000; round++) {
      const changed = Buffer.from(image)
      for (let count = random(4); count >= 0; count--) {
        const area = [0, 0, 0, 3 * 65_536, 4 * 65_536][random(5)] ?? 0
        changed[area + random(128)] = random(256)
      }
      const outcome = await inspectQcow2(bytes(changed)).then(
        () => 'accepted',
        (error: { code?: string }) => error.code ?? String(error),
      )
      expect(outcome, `round ${round}`).toMatch(/^(accepted|IMAGE_[A-Z_]+|SIZE_INVALID)$/)
    }
  })
})

describe.skipIf(!haveQemuImg)('images of qemu-img (package qemu-utils)', () => {
  let folder: string
  let raw: string
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'atoll-qcow2-'))
    raw = join(folder, 'source.raw')
    await writeFile(raw, Buffer.alloc(3 * 2 ** 20, 'some text that compresses '))
    await truncate(raw, 64 * 2 ** 20)
  })
  afterAll(() => rm(folder, { recursive: true, force: true }))

  const kinds: [string, string[]][] = [
    ['version 2', ['-o', 'compat=0.10']],
    ['version 3', []],
    ['compressed', ['-c']],
    ['compressed with zstd', ['-c', '-o', 'compression_type=zstd']],
    ['small clusters', ['-o', 'cluster_size=512']],
    ['large clusters', ['-o', 'cluster_size=2M']],
    ['extended L2 entries', ['-o', 'extended_l2=on,cluster_size=128k']],
    ['lazy refcounts', ['-o', 'lazy_refcounts=on']],
  ]
  test.each(kinds)('are accepted: %s', async (_name, options) => {
    const path = join(folder, 'image.qcow2')
    await run('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', ...options, raw, path])
    const info = await inspectFile(path)
    expect(info.virtualSizeBytes).toBe(64 * 2 ** 20)
    expect(info.allocatedBytes).toBeGreaterThanOrEqual(3 * 2 ** 20)
    expect(info.allocatedBytes).toBeLessThanOrEqual(4 * 2 ** 20)
  })

  test('with a backing file or a data file are refused', async () => {
    const overlay = join(folder, 'overlay.qcow2')
    await run('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', raw, '-F', 'raw', overlay])
    await expect(inspectFile(overlay)).rejects.toMatchObject({ code: 'IMAGE_HAS_BACKING_FILE' })
    const external = join(folder, 'external.qcow2')
    await run('qemu-img', [
      'create',
      '-q',
      '-f',
      'qcow2',
      '-o',
      `data_file=${join(folder, 'data')},data_file_raw=on`,
      external,
      '1M',
    ])
    await expect(inspectFile(external)).rejects.toMatchObject({ code: 'IMAGE_HAS_DATA_FILE' })
  })

  test('that were cut off by a cluster are refused', async () => {
    const path = join(folder, 'cut.qcow2')
    await run('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', raw, path])
    const { length } = await readFile(path)
    await truncate(path, length - 65_536 * 2)
    await expect(inspectFile(path)).rejects.toMatchObject({ code: 'IMAGE_CORRUPT' })
  })

  test('with internal snapshots are accepted as they are now', async () => {
    const path = join(folder, 'snapshots.qcow2')
    await run('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', raw, path])
    await run('qemu-img', ['snapshot', '-c', 'one', path])
    await expect(inspectFile(path)).resolves.toMatchObject({ virtualSizeBytes: 64 * 2 ** 20 })
  })
})

describe('the source of an import', () => {
  let folder: string
  beforeAll(async () => {
    folder = await mkdtemp(join(tmpdir(), 'atoll-source-'))
  })
  afterAll(() => rm(folder, { recursive: true, force: true }))

  test('is refused if it is relative, missing, a directory or a pipe', async () => {
    const pipe = join(folder, 'pipe')
    await run('mkfifo', [pipe])
    for (const path of ['relative.raw', join(folder, 'missing'), folder, pipe, '/dev/zero']) {
      await expect(ImageSource.open(path)).rejects.toMatchObject({ code: 'IMAGE_SOURCE_INVALID' })
    }
  })

  test('counts as changed when it was written, cut or replaced', async () => {
    const path = join(folder, 'source')
    await writeFile(path, 'before')
    const source = await ImageSource.open(path)
    try {
      await source.requireUnchanged()
      await rm(path)
      await writeFile(path, 'before')
      await source.requireUnchanged()
      await expect(ImageSource.openAgain(source.identity)).rejects.toMatchObject({ code: 'IMAGE_SOURCE_CHANGED' })
    } finally {
      await source.close()
    }
    const second = await ImageSource.open(path)
    const writer = await open(path, 'r+')
    try {
      await writer.truncate(3)
      await expect(second.requireUnchanged()).rejects.toMatchObject({ code: 'IMAGE_SOURCE_CHANGED' })
    } finally {
      await writer.close()
      await second.close()
    }
  })
})
