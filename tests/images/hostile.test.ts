import { createReadStream } from 'node:fs'
import { chmod, mkdtemp, open, readFile, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import type { ImageFormat } from '@atoll/composer'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { hasPrograms } from '../cli/test-programs.ts'
import { ImageStand, mebibyte, nothingLeft, run } from './image-stand.ts'

const virtualSizeBytes = 16 * mebibyte

/** What a hostile image would like to have: a file of the host that everybody may read. */
const canaryText = 'the canary that no image may ever hold '

interface Sample {
  image: Buffer
  /** Where the metadata lies. */
  areas: readonly (readonly [offsetBytes: number, lengthBytes: number])[]
}

describe.skipIf(!hasPrograms('qemu-img', 'setpriv'))('hostile images (package qemu-utils)', () => {
  const samples = new Map<Exclude<ImageFormat, 'raw'>, Sample>()
  let shared: string
  let canary: string
  let stand: ImageStand

  beforeAll(async () => {
    shared = await mkdtemp(join(tmpdir(), 'atoll-hostile-'))
    await chmod(shared, 0o755)
    canary = join(shared, 'canary.raw')
    await writeFile(canary, Buffer.alloc(mebibyte, canaryText), { mode: 0o644 })
    const raw = join(shared, 'raw')
    const handle = await open(raw, 'w')
    await handle.truncate(virtualSizeBytes)
    await handle.write(Buffer.alloc(300_000, 'the content '), 0, undefined, 0)
    await handle.write(Buffer.alloc(300_000, 'the content '), 0, undefined, 9 * mebibyte)
    await handle.close()
    const make = async (format: string, ...options: string[]): Promise<Buffer> => {
      const path = join(shared, 'image')
      await run('qemu-img', ['convert', '-f', 'raw', '-O', format, ...options, raw, path])
      return await readFile(path)
    }
    const qcow2 = await make('qcow2', '-c')
    const l1 = Number(qcow2.readBigUInt64BE(40))
    samples.set('qcow2', {
      image: qcow2,
      areas: [
        [0, 112],
        [l1, 8],
        [Number(qcow2.readBigUInt64BE(l1) & 0x00ff_ffff_ffff_fe00n), 64],
      ],
    })
    const vmdk = await make('vmdk')
    const directory = Number(vmdk.readBigUInt64LE(56)) * 512
    samples.set('vmdk', {
      image: vmdk,
      areas: [
        [0, 92],
        [512, 400],
        [directory, 8],
        [vmdk.readUInt32LE(directory) * 512, 64],
      ],
    })
    samples.set('vdi', {
      image: await make('vdi'),
      areas: [
        [64, 400],
        [512, 64],
      ],
    })
    samples.set('vhdx', {
      image: await make('vhdx', '-o', 'block_size=1M'),
      areas: [
        [2 * mebibyte, 300],
        [2 * mebibyte + 65_536, 64],
        [3 * mebibyte, 128],
      ],
    })
    samples.set('vhd', { image: await make('vpc', '-o', 'force_size=on'), areas: [[1536, 64]] })
  })
  afterAll(() => rm(shared, { recursive: true, force: true }))
  beforeEach(async () => {
    stand = await ImageStand.open()
  })
  afterEach(() => stand.remove())

  /** The code of the refusal, at once or of the job; null if there is an image. */
  async function tried(content: Buffer, format?: ImageFormat): Promise<string | null> {
    const path = stand.path('hostile')
    await writeFile(path, content)
    try {
      const job = await stand.composer.images.import({ name: 'image', path, ...(format === undefined ? {} : { format }) })
      const { state, error } = await stand.composer.jobs.wait(job.id)
      return state === 'done' ? null : (error?.code ?? state)
    } catch (error) {
      return (error as { code?: string }).code ?? String(error)
    }
  }
  async function triedAsStream(content: Buffer): Promise<string | null> {
    const path = stand.path('hostile')
    await writeFile(path, content)
    const job = await stand.composer.images.importStream({ name: 'image', stream: createReadStream(path) })
    const { state, error } = await stand.composer.jobs.wait(job.id)
    return state === 'done' ? null : (error?.code ?? state)
  }
  const sampleOf = (format: Exclude<ImageFormat, 'raw'>): Buffer => Buffer.from(samples.get(format)?.image ?? [])

  function qcow2With(change: (image: Buffer) => void): Buffer {
    const image = sampleOf('qcow2')
    change(image)
    return image
  }
  /** A qcow2 image that names a file, as qemu-img makes it. */
  async function created(name: string, ...args: string[]): Promise<Buffer> {
    const path = join(shared, name)
    await run('qemu-img', ['create', '-q', ...args, path, '16M'])
    return await readFile(path)
  }

  const corpus: readonly [what: string, code: string, make: () => Buffer | Promise<Buffer>][] = [
    ['qcow2 over a file of the host', 'IMAGE_HAS_BACKING_FILE', () => created('a', '-f', 'qcow2', '-F', 'raw', '-b', canary)],
    [
      'qcow2 whose data is a file of the host',
      'IMAGE_HAS_DATA_FILE',
      () => created('b', '-f', 'qcow2', '-o', `data_file=${join(shared, 'data')},data_file_raw=on`),
    ],
    [
      'vmdk over a file of the host',
      'IMAGE_HAS_BACKING_FILE',
      async () => {
        const parent = join(shared, 'parent.vmdk')
        await writeFile(parent, sampleOf('vmdk'))
        return await created('c', '-f', 'vmdk', '-F', 'vmdk', '-b', parent)
      },
    ],
    [
      'vmdk descriptor that names a file of the host',
      'IMAGE_HAS_DATA_FILE',
      () =>
        Buffer.from(
          `# Disk DescriptorFile\nversion=1\nCID=1\nparentCID=ffffffff\ncreateType="monolithicFlat"\nRW 2048 FLAT "${canary}" 0\n`,
        ),
    ],
    [
      'qcow2 that is marked as corrupt',
      'IMAGE_CORRUPT',
      () => qcow2With((image) => void image.writeUInt8(image.readUInt8(79) | 2, 79)),
    ],
    ['qcow2 of 2^63 bytes', 'SIZE_INVALID', () => qcow2With((image) => void image.writeBigUInt64BE(2n ** 63n, 24))],
    ['qcow2 whose L1 table is on its header', 'IMAGE_CORRUPT', () => qcow2With((image) => void image.writeBigUInt64BE(0n, 40))],
    [
      'qcow2 whose refcount table is its L1 table',
      'IMAGE_CORRUPT',
      () => qcow2With((image) => void image.writeBigUInt64BE(image.readBigUInt64BE(40), 48)),
    ],
    ['qcow2 that is cut', 'IMAGE_CORRUPT', () => sampleOf('qcow2').subarray(0, 200_000)],
    ['vmdk that is cut', 'IMAGE_CORRUPT', () => sampleOf('vmdk').subarray(0, 70_000)],
    ['vdi that is cut', 'IMAGE_CORRUPT', () => sampleOf('vdi').subarray(0, mebibyte)],
    ['vhd that is cut', 'IMAGE_CORRUPT', () => sampleOf('vhd').subarray(0, 4096)],
    ['vhdx that is cut', 'IMAGE_CORRUPT', () => sampleOf('vhdx').subarray(0, 3 * mebibyte)],
  ]
  test.each(corpus)('are refused and leave nothing, from a file and from a stream: %s', async (_what, code, make) => {
    const content = await make()
    expect(await tried(content)).toBe(code)
    expect(await triedAsStream(content)).toBe(code)
    await expect(stand.left()).resolves.toEqual(nothingLeft)
  })

  // Accepted images are converted, which takes a quarter of a second each: few rounds here, more by ATOLL_FUZZ_ROUNDS.
  test.each(['qcow2', 'vmdk', 'vdi', 'vhdx', 'vhd'] as const)(
    'of changed bytes are refused with a code, or give an image of the right size without a byte of another file: %s',
    async (format) => {
      const sample = samples.get(format)
      if (sample === undefined) throw new Error('there is no sample')
      const firstSeed = Number(process.env['ATOLL_FUZZ_SEED'] ?? 1)
      const rounds = Number(process.env['ATOLL_FUZZ_ROUNDS'] ?? 10)
      const wrong: string[] = []
      for (let seed = firstSeed; seed < firstSeed + rounds; seed++) {
        const random = mulberry32(seed)
        const image = Buffer.from(sample.image)
        for (let count = Math.floor(random() * 3); count >= 0; count--) {
          const [offsetBytes, lengthBytes] = sample.areas[Math.floor(random() * sample.areas.length)] ?? [0, 1]
          image[offsetBytes + Math.floor(random() * lengthBytes)] = Math.floor(random() * 256)
        }
        // Where a name could be: the header of qcow2 and the descriptor of vmdk may come to refer to it.
        if (random() < 0.5) image.write(canary, format === 'vmdk' ? 900 : 400, 'latin1')
        const code = await tried(image, format)
        if (code === null) {
          const { sizeBytes } = await stand.composer.images.show('image')
          const { storedBytes } = await stand.composer.pools.show('default')
          const isSmall = sizeBytes > 64 * mebibyte || !(await stand.exported('image')).includes(canaryText)
          if (!isSmall || storedBytes > 64 * mebibyte) wrong.push(`seed ${seed}: ${sizeBytes} bytes, ${storedBytes} stored`)
          await stand.composer.images.delete('image')
        } else if (!/^(?:IMAGE_[A-Z_]+|SIZE_INVALID)$/.test(code)) wrong.push(`seed ${seed}: ${code}`)
      }
      expect(wrong, 'run with ATOLL_FUZZ_SEED').toEqual([])
      await expect(stand.left()).resolves.toEqual(nothingLeft)
    },
  )
})

/** Numbers in [0, 1) that a seed determines. */
function mulberry32(seed: number): () => number {
  let state = seed
  return () => {
    state = (state + 0x6d2b_79f5) | 0
    let value = Math.imul(state ^ (state >>> 15), 1 | state)
    value = (value + Math.imul(value ^ (value >>> 7), 61 | value)) ^ value
    return ((value ^ (value >>> 14)) >>> 0) / 2 ** 32
  }
}
