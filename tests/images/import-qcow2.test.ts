import { execFile, spawnSync } from 'node:child_process'
import { chmod, copyFile, mkdir, mkdtemp, open, readFile, readdir, rm, truncate, writeFile } from 'node:fs/promises'
import { randomBytes } from 'node:crypto'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { openComposer, type Composer } from '@atoll/composer'
import { openCatalog, silentLog, type Catalog } from '@atoll/core'
import { openMapper, type Mapper } from '@atoll/mapper'
import { Engine } from '@atoll/native'
import { serveTemporaryNbd } from '@atoll/northbound'
import { drivers } from '@atoll/southbound'
import { afterEach, beforeEach, describe, expect, test, vi } from 'vitest'

const run = promisify(execFile)
const mebibyte = 2 ** 20
const haveQemuImg = spawnSync('qemu-img', ['--version']).status === 0

// The whole way of a foreign image: our inspection, qemu-img in its sandbox, exports over a private socket, the image.
describe.skipIf(!haveQemuImg)('importing qcow2 (package qemu-utils)', () => {
  let folder: string
  let raw: string
  let catalog: Catalog
  let engine: Engine
  let mapper: Mapper
  let composer: Composer
  /** Of each conversion: what qemu-img could reach. */
  let exportCounts: number[]

  async function start(): Promise<void> {
    const log = silentLog()
    catalog = await openCatalog(join(folder, 'catalog.db'), { reserveBytes: 0 })
    engine = new Engine()
    mapper = await openMapper({ catalog, engine, drivers, log })
    composer = await openComposer({
      catalog,
      engine,
      mapper,
      log,
      home: folder,
      serveTemporaryNbd: (exports, options) => {
        exportCounts.push(exports.length)
        return serveTemporaryNbd(engine, exports, options)
      },
    })
    await composer.pools.createFirst({ name: 'default', driver: 'file', options: { path: join(folder, 'pool') } })
  }
  async function stop(): Promise<void> {
    await composer.close()
    await mapper.close()
    await engine.close()
    await catalog.close()
  }

  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'atoll-qcow2-'))
    // The confined user passes through here.
    await chmod(folder, 0o711)
    await mkdir(join(folder, 'tmp'))
    await chmod(join(folder, 'tmp'), 0o711)
    vi.stubEnv('TMPDIR', join(folder, 'tmp'))
    raw = join(folder, 'source.raw')
    const handle = await open(raw, 'w')
    await handle.truncate(96 * mebibyte)
    for (const offsetBytes of [0, 31 * mebibyte + 512, 64 * mebibyte, 96 * mebibyte - 5120]) {
      await handle.write(randomBytes(5120), 0, undefined, offsetBytes)
    }
    await handle.write(Buffer.alloc(8 * mebibyte, 'compressible '), 0, undefined, 70 * mebibyte)
    await handle.close()
    exportCounts = []
    await start()
  })
  afterEach(async () => {
    vi.unstubAllEnvs()
    await stop()
    await rm(folder, { recursive: true, force: true })
  })

  async function convert(name: string, ...options: string[]): Promise<string> {
    const path = join(folder, name)
    await run('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', ...options, raw, path])
    return path
  }
  async function exported(image: string): Promise<Buffer> {
    const path = join(folder, `${image}.exported`)
    const job = await composer.images.export(image, { path })
    await expect(composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done' })
    return await readFile(path)
  }
  const leftInSandboxes = (): Promise<string[]> => readdir(join(folder, 'tmp'))

  test.each([
    ['version 3', []],
    ['version 2', ['-o', 'compat=0.10']],
    ['compressed', ['-c']],
    ['compressed with zstd', ['-c', '-o', 'compression_type=zstd']],
    ['small clusters', ['-o', 'cluster_size=4096']],
    ['large clusters', ['-o', 'cluster_size=2M']],
    ['extended L2 entries', ['-o', 'extended_l2=on,cluster_size=128k']],
  ])('gives the bytes that went in: %s', async (_name, options) => {
    const path = await convert('image.qcow2', ...options)
    const job = await composer.images.import({ name: 'image', path })
    await expect(composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done', error: null, progressBytes: 96 * mebibyte })
    await expect(composer.images.show('image')).resolves.toMatchObject({ status: 'active', sizeBytes: 96 * mebibyte })
    expect((await exported('image')).equals(await readFile(raw))).toBe(true)
    expect((await composer.pools.show('default')).storedBytes).toBeLessThan(12 * mebibyte)
    await expect(leftInSandboxes()).resolves.toEqual([])
  })

  // As root qemu-img runs as somebody else, who may not read a private file and so gets it as an export.
  test.each([
    [0o644, 1],
    [0o600, process.geteuid?.() === 0 ? 2 : 1],
  ])('that everybody may read, or only we (mode %i), gives the same bytes over %i exports', async (mode, exportCount) => {
    const path = await convert('image.qcow2')
    await chmod(path, mode)
    const job = await composer.images.import({ name: 'image', path })
    await expect(composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done', error: null })
    expect(exportCounts).toEqual([exportCount])
    expect((await exported('image')).equals(await readFile(raw))).toBe(true)
  })

  test('of a size that is no multiple of 4096 bytes keeps the size', async () => {
    await truncate(raw, 10 * mebibyte + 512)
    const path = await convert('image.qcow2')
    const job = await composer.images.import({ name: 'image', path })
    await expect(composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done' })
    expect((await exported('image')).equals(await readFile(raw))).toBe(true)
    await expect(composer.volumes.create({ name: 'disk', from: 'image:image' })).resolves.toMatchObject({
      sizeBytes: 10 * mebibyte + 4096,
    })
  })

  test('begins anew after a restart, and what the first attempt wrote does not show', async () => {
    const path = await convert('image.qcow2')
    const job = await composer.images.import({ name: 'image', path })
    await composer.jobs.pause(job.id)
    await expect(composer.jobs.show(job.id)).resolves.toMatchObject({ state: 'paused' })
    await stop()
    await start()
    // What an attempt may leave behind, at a place where the image is zero.
    await catalog.write(
      async (tx) =>
        void (await tx
          .updateTable('jobs')
          .set({ cursor: { begun: true } })
          .where('id', '=', job.id)
          .execute()),
    )
    const target = await mapper.resumeImport(job.subject)
    await target.device.write(50 * mebibyte, Buffer.alloc(8192, 'left over'))
    await target.device.flush()
    await stop()
    await start()
    await composer.jobs.resume(job.id)
    await expect(composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done' })
    expect((await exported('image')).equals(await readFile(raw))).toBe(true)
  })

  test('that is cancelled or refused leaves nothing', async () => {
    const path = await convert('image.qcow2', '-c')
    const job = await composer.images.import({ name: 'image', path })
    await composer.jobs.cancel(job.id)
    await expect(composer.images.list()).resolves.toEqual({ entries: [], next: null })
    const overlay = join(folder, 'overlay.qcow2')
    await run('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', path, '-F', 'qcow2', overlay])
    await expect(composer.images.import({ name: 'image', path: overlay })).rejects.toMatchObject({
      code: 'IMAGE_HAS_BACKING_FILE',
    })
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
    await expect(composer.images.import({ name: 'image', path: external })).rejects.toMatchObject({ code: 'IMAGE_HAS_DATA_FILE' })
    await expect(composer.images.list()).resolves.toEqual({ entries: [], next: null })
    await expect(leftInSandboxes()).resolves.toEqual([])
  })

  test('that qemu-img cannot read fails with what it said, and leaves nothing', async () => {
    const path = await convert('image.qcow2', '-c')
    // Damage inside compressed data: no inspection of the tables can see it.
    const damaged = join(folder, 'damaged.qcow2')
    await copyFile(path, damaged)
    const { length } = await readFile(path)
    const handle = await open(damaged, 'r+')
    await handle.write(Buffer.alloc(length - 5 * 65_536 - 100, 0xff), 0, undefined, 5 * 65_536)
    await handle.close()
    // Either the tables were hit, too, and it is refused at once, or the job fails.
    const code = await composer.images
      .import({ name: 'image', path: damaged })
      .then(async (job) => (await composer.jobs.wait(job.id)).error?.code)
      .catch((error: { code: string }) => error.code)
    expect(['IMAGE_CORRUPT', 'IMAGE_CONVERT_FAILED']).toContain(code)
    await expect(composer.images.list()).resolves.toEqual({ entries: [], next: null })
  })

  test('reads nothing but the image: a raw file that looks like qcow2 on the inside is not followed', async () => {
    const inner = await convert('inner.qcow2')
    const disguised = join(folder, 'disguised.raw')
    await writeFile(disguised, await readFile(inner))
    const job = await composer.images.import({ name: 'image', path: disguised, format: 'raw' })
    await composer.jobs.wait(job.id)
    expect((await exported('image')).equals(await readFile(inner))).toBe(true)
  })
})
