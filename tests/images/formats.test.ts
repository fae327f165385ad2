import { randomBytes } from 'node:crypto'
import { createReadStream, existsSync } from 'node:fs'
import { mkdir, open, readdir, readFile, stat, truncate, writeFile } from 'node:fs/promises'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { hasPrograms } from '../cli/test-programs.ts'
import { ImageStand, mebibyte, nothingLeft, run } from './image-stand.ts'

const rawBytes = 80 * mebibyte
/** At odd places, at both ends, and over the borders of clusters, grains and blocks. */
const dataOffsetsBytes = [0, 15 * mebibyte - 4096, 31 * mebibyte + 512, 64 * mebibyte - 512, rawBytes - 5120]

/** Everything that qemu-img can make of the formats that can be imported. */
const kinds: readonly [name: string, format: string, options: readonly string[]][] = [
  ['vmdk monolithicSparse', 'vmdk', []],
  ['vmdk streamOptimized', 'vmdk', ['-o', 'subformat=streamOptimized']],
  ['vmdk with zeroed grains', 'vmdk', ['-o', 'zeroed_grain=on']],
  ['vdi dynamic', 'vdi', []],
  ['vdi fixed', 'vdi', ['-o', 'static=on']],
  ['vhdx dynamic', 'vhdx', []],
  ['vhdx with blocks of 1 MiB', 'vhdx', ['-o', 'block_size=1M']],
  ['vhdx with blocks of 64 MiB', 'vhdx', ['-o', 'block_size=64M']],
  ['vhdx fixed', 'vhdx', ['-o', 'subformat=fixed']],
  ['vhd dynamic', 'vpc', ['-o', 'force_size=on']],
  ['vhd fixed', 'vpc', ['-o', 'subformat=fixed,force_size=on']],
  ['vhd of a geometry that is larger than the disk', 'vpc', []],
  ['qcow2 compressed with zstd', 'qcow2', ['-c', '-o', 'compression_type=zstd,cluster_size=2M']],
  ['qcow2 of version 2, compressed', 'qcow2', ['-c', '-o', 'compat=0.10,cluster_size=512']],
  ['qcow2 with extended L2 entries', 'qcow2', ['-o', 'extended_l2=on,cluster_size=16k']],
  ['qcow2 with preallocated metadata', 'qcow2', ['-o', 'preallocation=metadata']],
]

describe.skipIf(!hasPrograms('qemu-img', 'setpriv'))('images of other formats (package qemu-utils)', () => {
  let stand: ImageStand
  let raw: string

  beforeEach(async () => {
    stand = await ImageStand.open()
    raw = stand.path('source.raw')
    const handle = await open(raw, 'w')
    await handle.truncate(rawBytes)
    for (const offsetBytes of dataOffsetsBytes) await handle.write(randomBytes(5120), 0, undefined, offsetBytes)
    await handle.write(Buffer.alloc(3 * mebibyte, 'compressible '), 0, undefined, 70 * mebibyte)
    await handle.close()
  })
  afterEach(() => stand.remove())

  async function convert(format: string, options: readonly string[], name = `image.${format}`): Promise<string> {
    const path = stand.path(name)
    await run('qemu-img', ['convert', '-f', 'raw', '-O', format, ...options, raw, path])
    return path
  }

  /**
   * qemu-img times its key derivation by the thread's CPU clock, and gives up where a probe takes less than the clock shows (one try in
   * five on a quick machine): that failure, and no other, is tried again.
   */
  async function createEncrypted(path: string): Promise<void> {
    const key = ['--object', 'secret,id=key,data=passphrase']
    const options = ['-o', 'encrypt.format=luks,encrypt.key-secret=key,encrypt.iter-time=10']
    for (let triesLeft = 50; ; triesLeft -= 1) {
      try {
        await run('qemu-img', ['create', '-q', ...key, '-f', 'qcow2', ...options, path, '8M'])
        return
      } catch (error) {
        if (triesLeft === 1 || !String(error).includes('Unable to get accurate CPU usage')) throw error
      }
    }
  }

  /** A geometry may be larger than the disk; what it has more is zero. */
  async function expectSameBytes(image: string): Promise<void> {
    const [bytes, wanted] = [await stand.exported(image), await readFile(raw)]
    expect(bytes.subarray(0, wanted.length).equals(wanted)).toBe(true)
    expect(bytes.subarray(wanted.length).every((byte) => byte === 0)).toBe(true)
    expect(bytes.length - wanted.length).toBeLessThan(mebibyte)
  }

  test.each(kinds)('give the bytes that went in, from a file whose name says nothing: %s', async (_name, format, options) => {
    const path = await convert(format, options, 'image.img')
    const job = await stand.composer.images.import({ name: 'image', path })
    await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done', error: null })
    await expectSameBytes('image')
    expect((await stand.composer.pools.show('default')).storedBytes).toBeLessThan(12 * mebibyte)
    await expect(readdir(stand.path('tmp'))).resolves.toEqual([])
  })

  test.each([
    ['vmdk', []],
    ['vdi', []],
    ['vhdx', []],
    ['vpc', []],
    ['vpc', ['-o', 'subformat=fixed,force_size=on']],
    ['qcow2', ['-c']],
  ] as const)('come from a stream, too: %s %j', async (format, options) => {
    const path = await convert(format, options)
    for (const sizeBytes of [undefined, (await stat(path)).size]) {
      const stream = createReadStream(path)
      const job = await stand.composer.images.importStream({
        name: 'image',
        stream,
        ...(sizeBytes === undefined ? {} : { sizeBytes }),
      })
      await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done', error: null })
      await expectSameBytes('image')
      await expect(readdir(stand.path('spool')).catch(() => [])).resolves.toEqual([])
      await stand.composer.images.delete('image')
    }
  })

  test('from a stream that is damaged leave nothing, and neither does one that is cut', async () => {
    const path = await convert('qcow2', ['-c'])
    const bytes = await readFile(path)
    const damaged = Buffer.from(bytes)
    damaged.writeUInt32BE(60, 20)
    for (const content of [damaged, bytes.subarray(0, 1000)]) {
      const job = await stand.composer.images.importStream({
        name: 'image',
        stream: (async function* () {
          yield content
        })(),
      })
      await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'failed', error: { code: 'IMAGE_CORRUPT' } })
    }
    await expect(stand.left()).resolves.toEqual(nothingLeft)
  })

  test('with a footer after a stream (vmdk whose directory lies at its end) are read by the footer', async () => {
    const bytes = await readFile(await convert('vmdk', ['-o', 'subformat=streamOptimized']))
    const header = Buffer.from(bytes.subarray(0, 512))
    bytes.writeBigUInt64LE(2n ** 64n - 1n, 56)
    const marker = Buffer.alloc(512)
    marker.writeUInt32LE(1, 0)
    marker.writeUInt32LE(3, 12)
    const padding = Buffer.alloc((512 - (bytes.length % 512)) % 512)
    const path = stand.path('footer.vmdk')
    await writeFile(path, Buffer.concat([bytes, padding, marker, header, Buffer.alloc(512)]))
    const job = await stand.composer.images.import({ name: 'image', path })
    await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done', error: null })
    await expectSameBytes('image')
    await truncate(path, bytes.length + padding.length + 512)
    await expect(stand.composer.images.import({ name: 'cut', path })).rejects.toMatchObject({ code: 'IMAGE_CORRUPT' })
  })

  test('are what --format says: a disk that begins like qcow2 is raw on purpose, and raw bytes are no vmdk', async () => {
    const disguised = await convert('qcow2', [])
    const job = await stand.composer.images.import({ name: 'image', path: disguised, format: 'raw' })
    await stand.composer.jobs.wait(job.id)
    expect((await stand.exported('image')).equals(await readFile(disguised))).toBe(true)
    for (const format of ['qcow2', 'vmdk', 'vdi', 'vhdx', 'vhd'] as const) {
      await expect(stand.composer.images.import({ name: 'other', path: raw, format })).rejects.toMatchObject({
        code: 'IMAGE_CORRUPT',
        values: { format },
      })
    }
  })

  test.each([
    ['monolithicFlat', 'monolithicFlat'],
    ['twoGbMaxExtentFlat', 'twoGbMaxExtentFlat'],
    ['twoGbMaxExtentSparse', 'twoGbMaxExtentSparse'],
  ])('that name files of the host are refused: vmdk %s', async (_name, subformat) => {
    const path = await convert('vmdk', ['-o', `subformat=${subformat}`])
    await expect(stand.composer.images.import({ name: 'image', path })).rejects.toMatchObject({
      code: 'IMAGE_HAS_DATA_FILE',
      values: { createType: subformat },
    })
    await expect(stand.left()).resolves.toEqual(nothingLeft)
  })

  test('that have a parent or are encrypted are refused with the reason', async () => {
    const parent = await convert('vmdk', [])
    const child = stand.path('child.vmdk')
    await run('qemu-img', ['create', '-q', '-f', 'vmdk', '-b', parent, '-F', 'vmdk', child])
    await expect(stand.composer.images.import({ name: 'image', path: child })).rejects.toMatchObject({
      code: 'IMAGE_HAS_BACKING_FILE',
    })
    const secret = stand.path('secret.qcow2')
    await createEncrypted(secret)
    await expect(stand.composer.images.import({ name: 'image', path: secret })).rejects.toMatchObject({ code: 'IMAGE_ENCRYPTED' })
    await expect(stand.left()).resolves.toEqual(nothingLeft)
  })

  test('begin anew after a restart in the middle of a conversion', async () => {
    const path = await convert('vmdk', [])
    const job = await stand.composer.images.import({ name: 'image', path })
    await stand.stop()
    await stand.start()
    await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done', error: null })
    await expectSameBytes('image')
  })

  test('a spool that a killed daemon left is removed at the next start', async () => {
    await stand.stop()
    await mkdir(stand.path('spool'), { recursive: true })
    await writeFile(stand.path('spool/0b0f7c1e-5c0f-4b7e-8f39-000000000000'), 'left over')
    await stand.start()
    await expect(stand.left()).resolves.toEqual(nothingLeft)
  })

  describe('exported as qcow2', () => {
    beforeEach(async () => {
      const job = await stand.composer.images.import({ name: 'image', path: raw, format: 'raw' })
      await stand.composer.jobs.wait(job.id)
    })

    test.each([false, true])('are whole, sound and sparse (compress: %s)', async (compress) => {
      const path = stand.path('out.qcow2')
      const job = await stand.composer.images.export('image', { path, format: 'qcow2', compress })
      await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done', error: null, result: { path } })
      await run('qemu-img', ['check', '-f', 'qcow2', path])
      await run('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', raw, path])
      const status = await stat(path)
      expect(status).toMatchObject({ uid: process.getuid?.(), gid: process.getgid?.() })
      expect(status.mode & 0o777).toBe(0o600)
      expect(status.blocks * 512).toBeLessThan(compress ? 2 * mebibyte : 8 * mebibyte)
      // Nothing else is left beside it.
      const left = (await readdir(stand.folder)).filter((name) => name.startsWith('.atoll'))
      expect(left).toEqual([])
      await expect(readdir(stand.path('tmp'))).resolves.toEqual([])
    })

    test('of a size that is no multiple of 512 bytes are rounded up to one', async () => {
      const odd = stand.path('odd.raw')
      await writeFile(odd, randomBytes(70_001))
      await stand.composer.jobs.wait((await stand.composer.images.import({ name: 'odd', path: odd, format: 'raw' })).id)
      const path = stand.path('odd.qcow2')
      const job = await stand.composer.images.export('odd', { path, format: 'qcow2' })
      await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done', error: null })
      await run('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', odd, path])
    })

    test('do not replace a file unless told to, and what is cancelled leaves nothing', async () => {
      const path = stand.path('out.qcow2')
      await writeFile(path, 'precious')
      await expect(stand.composer.images.export('image', { path, format: 'qcow2' })).rejects.toMatchObject({
        code: 'DESTINATION_EXISTS',
      })
      const cancelled = await stand.composer.images.export('image', { path, format: 'qcow2', overwrite: true })
      await stand.composer.jobs.cancel(cancelled.id)
      await expect(stand.composer.jobs.show(cancelled.id)).resolves.toMatchObject({ state: 'cancelled' })
      await expect(readFile(path, 'utf8')).resolves.toBe('precious')
      const job = await stand.composer.images.export('image', { path, format: 'qcow2', overwrite: true })
      await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done' })
      await run('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', raw, path])
      expect(existsSync(stand.path(`.atoll-export-${cancelled.id}`))).toBe(false)
      await expect(stand.composer.images.export('image', { path: stand.path('x'), compress: true })).rejects.toMatchObject({
        code: 'ARGUMENT_INVALID',
      })
    })

    test('go on after a restart of the daemon', async () => {
      const path = stand.path('out.qcow2')
      const job = await stand.composer.images.export('image', { path, format: 'qcow2' })
      await stand.stop()
      await stand.start()
      await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done', error: null })
      await run('qemu-img', ['compare', '-f', 'raw', '-F', 'qcow2', raw, path])
    })
  })
})
