/** Files that take longer to inspect than a request may: the job of the import goes on with them. */
import { open, readFile, writeFile } from 'node:fs/promises'
import type { ComposerOptions } from '@atoll/composer'
import { afterEach, describe, expect, test } from 'vitest'
import { hasPrograms } from '../cli/test-programs.ts'
import { ImageStand, mebibyte, nothingLeft, run } from './image-stand.ts'

let stand: ImageStand
afterEach(async () => {
  await stand.remove()
})

/** As if nothing could be inspected within a request. */
const alwaysLate: Partial<ComposerOptions> = {
  inspectLimitMs: 4321,
  setTimer: (callback, delayMs) => {
    if (delayMs === 4321) callback()
    const handle = setTimeout(callback, delayMs)
    handle.unref()
    return () => clearTimeout(handle)
  },
}

const sectorBytes = 512
const tableSpacingSectors = 8
const directorySector = 2048

/**
 * A vmdk of holes with so many grain tables, none beside another, so that each is read by itself. The very last of them names a
 * grain behind the end of the file.
 */
async function writeScatteredVmdk(path: string, tableCount: number): Promise<void> {
  const header = Buffer.alloc(sectorBytes)
  header.write('KDMV', 0, 'latin1')
  header.writeUInt32LE(1, 4)
  header.writeUInt32LE(1, 8)
  header.writeBigUInt64LE(BigInt(tableCount) * 4096n, 12)
  header.writeBigUInt64LE(8n, 20)
  header.writeUInt32LE(512, 44)
  header.writeBigUInt64LE(BigInt(directorySector), 56)
  const directorySectors = Math.ceil((tableCount * 4) / sectorBytes)
  const firstTableSector = directorySector + Math.ceil(directorySectors / tableSpacingSectors) * tableSpacingSectors
  const sectors = Array.from({ length: tableCount }, (_, index) => firstTableSector + index * tableSpacingSectors)
  const last = sectors.at(-1) ?? 0
  const handle = await open(path, 'w')
  try {
    await handle.truncate((last + tableSpacingSectors) * sectorBytes)
    await handle.write(header, 0, header.length, 0)
    const directory = Buffer.from(Uint32Array.from(sectors).buffer)
    await handle.write(directory, 0, directory.length, directorySector * sectorBytes)
    await handle.write(Buffer.from(Uint32Array.of(0, 0x7fff_ffff).buffer), 0, 8, last * sectorBytes)
  } finally {
    await handle.close()
  }
}

describe.skipIf(!hasPrograms('qemu-img', 'setpriv'))('a file that takes too long to inspect (package qemu-utils)', () => {
  test.each(['qcow2', 'vmdk'])('is inspected and converted by its job (%s), over a restart too', async (format) => {
    stand = await ImageStand.open(alwaysLate)
    const raw = stand.path('source.raw')
    await writeFile(raw, Buffer.concat([Buffer.alloc(300_000, 'content'), Buffer.alloc(5 * mebibyte - 300_000)]))
    const path = stand.path('image')
    await run('qemu-img', ['convert', '-f', 'raw', '-O', format, raw, path])
    const job = await stand.composer.images.import({ name: 'image', path })
    expect(job).toMatchObject({ kind: 'image-import-inspect' })
    await stand.stop()
    await stand.start()
    await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'done', error: null })
    expect((await stand.exported('image')).equals(await readFile(raw))).toBe(true)
  })

  test('holds up nobody, is refused by its job with the reason, and leaves nothing', async () => {
    stand = await ImageStand.open(alwaysLate)
    const path = stand.path('image')
    await writeScatteredVmdk(path, 20_000)
    const job = await stand.composer.images.import({ name: 'image', path })
    expect(job).toMatchObject({ kind: 'image-import-inspect' })
    await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'failed', error: { code: 'IMAGE_CORRUPT' } })
    await expect(stand.left()).resolves.toEqual(nothingLeft)
  })

  test('can be cancelled while it is inspected', async () => {
    // More reads than any machine does in that time.
    stand = await ImageStand.open({ inspectLimitMs: 100 })
    const path = stand.path('image')
    await writeScatteredVmdk(path, 2_000_000)
    const job = await stand.composer.images.import({ name: 'image', path })
    await stand.composer.jobs.cancel(job.id)
    await expect(stand.composer.jobs.wait(job.id)).resolves.toMatchObject({ state: 'cancelled' })
    await expect(stand.left()).resolves.toEqual(nothingLeft)
  })
})
