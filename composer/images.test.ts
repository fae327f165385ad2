import { randomBytes } from 'node:crypto'
import { linkSync, truncateSync } from 'node:fs'
import { mkdir, open, readdir, readFile, rm, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import type { Composer } from './composer.ts'
import { JobInterrupted, type JobView } from './job-kind.ts'
import { killAtScenario, makeFolder, mebibyte, testStepBytes as stepBytes, TestDaemon } from './testing.ts'

let folder: string
let removeFolder: () => Promise<void>
let daemon: TestDaemon
let composer: Composer

async function start(): Promise<void> {
  daemon = await TestDaemon.open(folder)
  composer = daemon.composer
}

beforeEach(async () => {
  const made = await makeFolder()
  folder = made.folder
  removeFolder = made.remove
  await start()
})
afterEach(async () => {
  await daemon.stop()
  await removeFolder()
})

/** A file of `sizeBytes` with some random data at each of the offsets, and holes between them. */
async function sparseFile(name: string, sizeBytes: number, offsetsBytes: readonly number[]): Promise<string> {
  const path = join(folder, name)
  const handle = await open(path, 'w')
  try {
    await handle.truncate(sizeBytes)
    for (const offsetBytes of offsetsBytes)
      await handle.write(randomBytes(Math.min(10_000, sizeBytes - offsetBytes)), 0, undefined, offsetBytes)
  } finally {
    await handle.close()
  }
  return path
}

const finished = async (job: JobView): Promise<JobView> => composer.jobs.wait(job.id)
const storedBytes = async (): Promise<number> => (await composer.pools.show('default')).storedBytes

async function exported(image: string): Promise<Buffer> {
  const path = join(folder, `exported-${image}`)
  await expect(finished(await composer.images.export(image, { path }))).resolves.toMatchObject({
    state: 'done',
    result: { path },
  })
  const bytes = await readFile(path)
  await rm(path)
  return bytes
}

/** Calls `act` within the first step's report, so that the job cannot be faster. */
async function afterFirstStep(job: JobView, act: (id: string) => unknown): Promise<void> {
  const acted = Promise.withResolvers<unknown>()
  const controller = new AbortController()
  let stepped = false
  const watching = composer.jobs.wait(job.id, {
    signal: controller.signal,
    onProgress: (view) => {
      if (stepped || view.progressBytes === 0) return
      stepped = true
      acted.resolve(act(job.id))
    },
  })
  watching.catch(() => undefined)
  await acted.promise
  controller.abort()
}

describe('importing a raw file', () => {
  test('keeps size, bytes and holes', async () => {
    const sizeBytes = 200 * mebibyte + 777
    const path = await sparseFile('source.raw', sizeBytes, [0, 65 * mebibyte, 128 * mebibyte - 5000, sizeBytes - 700])
    const before = await storedBytes()
    const job = await composer.images.import({ name: 'image', path })
    await expect(composer.images.show(job.subject)).resolves.toMatchObject({
      name: 'image',
      status: expect.stringMatching(/queued|active/),
    })
    await expect(finished(job)).resolves.toMatchObject({ state: 'done', progressBytes: sizeBytes, totalBytes: sizeBytes })
    await expect(composer.images.show('image')).resolves.toMatchObject({
      status: 'active',
      sizeBytes,
      jobId: null,
      pool: 'default',
    })
    expect((await storedBytes()) - before).toBeLessThan(mebibyte)
    expect((await exported('image')).equals(await readFile(path))).toBe(true)
    const volume = await composer.volumes.create({ name: 'disk', from: 'image:image' })
    expect(volume).toMatchObject({ sizeBytes: 200 * mebibyte + 4096, parent: job.subject })
  })

  test.each([1, 511, 4096, 4097])('of %d bytes makes an image of exactly that size', async (sizeBytes) => {
    const path = await sparseFile('tiny.raw', sizeBytes, [0])
    await finished(await composer.images.import({ name: 'tiny', path }))
    await expect(composer.images.show('tiny')).resolves.toMatchObject({ sizeBytes })
    expect((await exported('tiny')).equals(await readFile(path))).toBe(true)
  })

  test('that is known to be raw is not looked at, whatever it begins with', async () => {
    const path = join(folder, 'looks-like.qcow2')
    await writeFile(path, Buffer.concat([Buffer.from('QFI\xfb\0\0\0\x03', 'latin1'), randomBytes(5000)]))
    await expect(composer.images.import({ name: 'image', path })).rejects.toMatchObject({
      code: expect.stringMatching(/^IMAGE_/),
    })
    await finished(await composer.images.import({ name: 'image', path, format: 'raw' }))
    expect((await exported('image')).equals(await readFile(path))).toBe(true)
  })

  test('can be paused, goes on after a restart only when it is resumed, and is whole in the end', async () => {
    const path = await sparseFile('source.raw', 6 * stepBytes, [0, stepBytes + 5, 3 * stepBytes, 6 * stepBytes - 10_000])
    const job = await composer.images.import({ name: 'image', path })
    await afterFirstStep(job, (id) => composer.jobs.pause(id))
    const paused = await composer.jobs.show(job.id)
    expect(paused).toMatchObject({ state: 'paused' })
    expect(paused.progressBytes).toBeLessThan(6 * stepBytes)
    await expect(composer.images.delete('image')).rejects.toMatchObject({ code: 'IMAGE_IN_USE' })
    await daemon.stop()
    await start()
    await expect(composer.jobs.show(job.id)).resolves.toMatchObject({ state: 'paused', progressBytes: paused.progressBytes })
    await expect(composer.images.show('image')).resolves.toMatchObject({ status: 'queued', jobId: job.id })
    await composer.jobs.resume(job.id)
    await expect(finished(job)).resolves.toMatchObject({ state: 'done' })
    expect((await exported('image')).equals(await readFile(path))).toBe(true)
  })

  test('goes on by itself after a restart of the daemon', async () => {
    const path = await sparseFile('source.raw', 6 * stepBytes, [0, 5 * stepBytes])
    const job = await composer.images.import({ name: 'image', path })
    await afterFirstStep(job, () => daemon.stop())
    await start()
    await expect(finished(job)).resolves.toMatchObject({ state: 'done' })
    expect((await exported('image')).equals(await readFile(path))).toBe(true)
  })

  test('goes on by itself after a kill of the daemon', async () => {
    const path = await sparseFile('source.raw', 50 * stepBytes, [0, 5 * stepBytes, 49 * stepBytes])
    await daemon.stop()
    const id = await killAtScenario(folder, 'import', path)
    await start()
    await expect(composer.jobs.wait(id)).resolves.toMatchObject({ state: 'done' })
    expect((await exported('image')).equals(await readFile(path))).toBe(true)
  })

  test('that is cancelled leaves nothing', async () => {
    const before = await storedBytes()
    const path = await sparseFile('source.raw', 6 * stepBytes, [0, stepBytes, 2 * stepBytes])
    const job = await composer.images.import({ name: 'image', path })
    await afterFirstStep(job, (id) => composer.jobs.cancel(id))
    await expect(composer.jobs.show(job.id)).resolves.toMatchObject({ state: 'cancelled' })
    await expect(composer.images.list()).resolves.toEqual({ entries: [], next: null })
    await finished(await composer.pools.reclaim('default'))
    expect(await storedBytes()).toBeLessThanOrEqual(before)
  })

  test('fails when the source changes meanwhile, and leaves nothing', async () => {
    const path = await sparseFile('source.raw', 6 * stepBytes, [0])
    const job = await composer.images.import({ name: 'image', path })
    await afterFirstStep(job, () => truncateSync(path, 5 * stepBytes))
    await expect(finished(job)).resolves.toMatchObject({ state: 'failed', error: { code: 'IMAGE_SOURCE_CHANGED' } })
    await expect(composer.images.list()).resolves.toEqual({ entries: [], next: null })
  })

  test('is refused for what cannot be a source, a taken name and an unknown pool', async () => {
    const path = await sparseFile('source.raw', 4096, [0])
    await expect(composer.images.import({ name: 'image', path: 'source.raw' })).rejects.toMatchObject({
      code: 'IMAGE_SOURCE_INVALID',
    })
    await expect(composer.images.import({ name: 'image', path: join(folder, 'none') })).rejects.toMatchObject({
      code: 'IMAGE_SOURCE_INVALID',
    })
    await expect(composer.images.import({ name: 'image', path, pool: 'none' })).rejects.toMatchObject({ code: 'POOL_NOT_FOUND' })
    const empty = await sparseFile('empty.raw', 0, [])
    await expect(composer.images.import({ name: 'image', path: empty })).rejects.toMatchObject({ code: 'SIZE_INVALID' })
    const foreign = join(folder, 'disk.qed')
    await writeFile(foreign, 'QED\0 and so on')
    await expect(composer.images.import({ name: 'image', path: foreign })).rejects.toMatchObject({
      code: 'IMAGE_FORMAT_UNSUPPORTED',
      values: { format: 'qed' },
    })
    await finished(await composer.images.import({ name: 'image', path }))
    await expect(composer.images.import({ name: 'image', path })).rejects.toMatchObject({ code: 'NAME_TAKEN' })
    await expect(composer.jobs.list()).resolves.toHaveLength(1)
  })

  test('an image that no job works on is gone after the next start', async () => {
    const pool = await composer.pools.show('default')
    const { id: projectId } = await composer.resolver.project({})
    await daemon.mapper.beginImport({ projectId, name: 'orphan', kind: 'image', sizeBytes: mebibyte, poolId: pool.id })
    await expect(composer.images.list()).resolves.toMatchObject({ entries: [{}] })
    await daemon.stop()
    await start()
    await expect(composer.images.list()).resolves.toEqual({ entries: [], next: null })
  })
})

describe('importing a stream', () => {
  async function* chunks(data: Buffer, chunkBytes: number): AsyncGenerator<Uint8Array> {
    for (let offset = 0; offset < data.length; offset += chunkBytes) yield data.subarray(offset, offset + chunkBytes)
  }

  test.each([100, 4096, 70_000])('in chunks of %d bytes makes the image that was sent', async (chunkBytes) => {
    const data = Buffer.concat([randomBytes(3 * mebibyte + 12), Buffer.alloc(5 * mebibyte), randomBytes(1001)])
    const job = await composer.images.importStream({ name: 'image', stream: chunks(data, chunkBytes) })
    await expect(finished(job)).resolves.toMatchObject({ state: 'done', result: { sizeBytes: data.length } })
    await expect(composer.images.show('image')).resolves.toMatchObject({ sizeBytes: data.length })
    expect((await exported('image')).equals(data)).toBe(true)
  })

  test('that breaks or ends early leaves nothing', async () => {
    async function* broken(): AsyncGenerator<Uint8Array> {
      yield randomBytes(mebibyte)
      throw new Error('the line went dead')
    }
    const first = await composer.images.importStream({ name: 'image', stream: broken() })
    await expect(finished(first)).resolves.toMatchObject({ state: 'failed', error: { code: 'IMAGE_STREAM_LOST' } })
    const second = await composer.images.importStream({ name: 'image', stream: chunks(randomBytes(5000), 1000), sizeBytes: 6000 })
    await expect(finished(second)).resolves.toMatchObject({ state: 'failed', error: { code: 'IMAGE_STREAM_LOST' } })
    const third = await composer.images.importStream({ name: 'image', stream: chunks(randomBytes(5000), 1000), sizeBytes: 4000 })
    await expect(finished(third)).resolves.toMatchObject({ state: 'failed', error: { code: 'SIZE_INVALID' } })
    await expect(composer.images.list()).resolves.toEqual({ entries: [], next: null })
  })

  test('is cancelled although nothing comes', async () => {
    async function* stuck(): AsyncGenerator<Uint8Array> {
      yield randomBytes(mebibyte)
      await new Promise(() => undefined)
    }
    const job = await composer.images.importStream({ name: 'image', stream: stuck() })
    await expect(composer.jobs.pause(job.id)).rejects.toMatchObject({ code: 'JOB_STATE' })
    await expect(composer.jobs.cancel(job.id)).resolves.toMatchObject({ state: 'cancelled' })
    await expect(composer.images.list()).resolves.toEqual({ entries: [], next: null })
  })

  test('whose sender has not even said what it is ends when nobody wants it any more', async () => {
    const stopping = new AbortController()
    async function* silent(): AsyncGenerator<Uint8Array> {
      yield Buffer.from('QED')
      stopping.abort()
      await new Promise(() => undefined)
    }
    const begun = composer.images.importStream({ name: 'image', stream: silent(), signal: stopping.signal })
    await expect(begun).rejects.toBeInstanceOf(JobInterrupted)
    await expect(composer.images.list()).resolves.toEqual({ entries: [], next: null })
  })

  test('of a foreign format is refused before anything is made', async () => {
    const stream = chunks(Buffer.from('QED\0 and so on', 'latin1'), 3)
    await expect(composer.images.importStream({ name: 'image', stream })).rejects.toMatchObject({
      code: 'IMAGE_FORMAT_UNSUPPORTED',
    })
    await expect(composer.images.list()).resolves.toEqual({ entries: [], next: null })
  })

  test('does not survive a restart', async () => {
    const sent = Promise.withResolvers<void>()
    async function* slow(): AsyncGenerator<Uint8Array> {
      yield randomBytes(2 * mebibyte)
      sent.resolve()
      await new Promise(() => undefined)
    }
    const job = await composer.images.importStream({ name: 'image', stream: slow() })
    await sent.promise
    await daemon.stop()
    await start()
    await expect(finished(job)).resolves.toMatchObject({ state: 'failed', error: { code: 'IMAGE_STREAM_LOST' } })
    await expect(composer.images.list()).resolves.toEqual({ entries: [], next: null })
  })
})

describe('exporting an image', () => {
  let path: string
  let source: string
  beforeEach(async () => {
    source = await sparseFile('source.raw', 5 * stepBytes + 99, [0, 3 * stepBytes, 5 * stepBytes])
    await finished(await composer.images.import({ name: 'image', path: source }))
    await mkdir(join(folder, 'out'))
    path = join(folder, 'out', 'image.raw')
  })

  test('makes a sparse file of its own mode, and nothing beside it', async () => {
    await finished(await composer.images.export('image', { path }))
    const { mode, blocks, size } = await stat(path)
    expect(mode & 0o777).toBe(0o600)
    expect(size).toBe(5 * stepBytes + 99)
    expect(blocks * 512).toBeLessThan(mebibyte)
    expect((await readFile(path)).equals(await readFile(source))).toBe(true)
    await expect(readdir(join(folder, 'out'))).resolves.toEqual(['image.raw'])
  })

  test('does not overwrite a file unless it is told to', async () => {
    await writeFile(path, 'precious')
    await expect(composer.images.export('image', { path })).rejects.toMatchObject({ code: 'DESTINATION_EXISTS' })
    await expect(readFile(path, 'utf8')).resolves.toBe('precious')
    await finished(await composer.images.export('image', { path, overwrite: true }))
    expect((await readFile(path)).equals(await readFile(source))).toBe(true)
    for (const bad of ['relative', join(folder, 'none', 'x'), join(folder, 'out'), '/dev/null']) {
      await expect(composer.images.export('image', { path: bad, overwrite: true })).rejects.toMatchObject({
        code: 'DESTINATION_INVALID',
      })
    }
    await expect(composer.images.export('image', { path: join(folder, 'x'), format: 'vmdk' })).rejects.toMatchObject({
      code: 'IMAGE_FORMAT_UNSUPPORTED',
    })
  })

  test('does not overwrite a file that came meanwhile', async () => {
    const job = await composer.images.export('image', { path })
    await afterFirstStep(job, () => linkSync(source, path))
    await expect(finished(job)).resolves.toMatchObject({ state: 'failed', error: { code: 'DESTINATION_EXISTS' } })
    await expect(readdir(join(folder, 'out'))).resolves.toEqual(['image.raw'])
  })

  test('that is cancelled leaves nothing', async () => {
    const job = await composer.images.export('image', { path })
    await afterFirstStep(job, (id) => composer.jobs.cancel(id))
    await expect(readdir(join(folder, 'out'))).resolves.toEqual([])
    await composer.images.delete('image')
  })

  test.each(['pause', 'restart'] as const)('goes on after a %s', async (how) => {
    const job = await composer.images.export('image', { path })
    await afterFirstStep(job, async (id) => {
      if (how === 'pause') await composer.jobs.pause(id)
      else await daemon.stop()
    })
    if (how === 'pause') await composer.jobs.resume(job.id)
    else await start()
    await expect(finished(job)).resolves.toMatchObject({ state: 'done' })
    expect((await readFile(path)).equals(await readFile(source))).toBe(true)
    await expect(readdir(join(folder, 'out'))).resolves.toEqual(['image.raw'])
  })

  test('goes on after a kill of the daemon', async () => {
    await daemon.stop()
    const id = await killAtScenario(folder, 'export', path)
    await start()
    await expect(composer.jobs.wait(id)).resolves.toMatchObject({ state: 'done' })
    expect((await readFile(path)).equals(await readFile(source))).toBe(true)
    await expect(readdir(join(folder, 'out'))).resolves.toEqual(['image.raw'])
  })
})

describe('an image', () => {
  test('is made of a snapshot without copying, and lives on when that is gone', async () => {
    const path = await sparseFile('source.raw', mebibyte, [0])
    await finished(await composer.images.import({ name: 'image', path }))
    await composer.volumes.create({ name: 'disk', from: 'image:image' })
    await composer.snapshots.create(['disk@one'])
    const image = await composer.images.create({ name: 'second', from: 'disk@one' })
    expect(image).toMatchObject({ status: 'active', sizeBytes: mebibyte })
    await composer.volumes.delete('disk', { withSnapshots: true })
    await composer.images.delete('image')
    await finished(await composer.pools.reclaim('default'))
    expect((await exported('second')).equals(await readFile(path))).toBe(true)
    await expect(composer.images.rename('second', 'third')).resolves.toMatchObject({ name: 'third' })
  })

  test('can be attached for reading, and is not deleted meanwhile', async () => {
    const path = await sparseFile('source.raw', mebibyte, [0])
    await finished(await composer.images.import({ name: 'image', path }))
    const attachment = await composer.volumes.attach('image:image')
    expect(attachment.readOnly).toBe(true)
    await expect(composer.images.delete('image')).rejects.toMatchObject({ code: 'IMAGE_IN_USE' })
    expect((await exported('image')).equals(await readFile(path))).toBe(true)
    await composer.volumes.detach('image:image')
    await composer.images.delete('image')
  })
})
