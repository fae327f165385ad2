/** libnbd's command-line tools against the real daemon: nbdinfo, nbdcopy and nbdfuse with the tools of ext4. */
import { randomFillSync } from 'node:crypto'
import { mkdir, readFile, stat, writeFile } from 'node:fs/promises'
import { basename } from 'node:path'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { hasPrograms } from '../cli/test-programs.ts'
import { ClientStand, diskBytes, fileDifference, KiB, makeContent, mapTrouble, MiB, writeSparse } from './client-stand.ts'
import type { MappedRange } from './client-stand.ts'
import { mountExport } from './mounted-export.ts'
import { clientOutcome, runClient } from './run-client.ts'

let stand: ClientStand
beforeAll(async () => {
  stand = await ClientStand.create()
})
afterAll(async () => {
  await stand?.[Symbol.asyncDispose]()
})

async function mapOf(uri: string): Promise<MappedRange[]> {
  const map = JSON.parse(await runClient('nbdinfo', '--json', '--map', uri)) as { offset: number; length: number; type: number }[]
  return map.map(({ offset, length, type }) => ({ offset, length, zero: (type & 2) !== 0 }))
}

describe.skipIf(!hasPrograms('nbdinfo', 'nbdcopy'))('nbdinfo (package libnbd-bin)', () => {
  test('shows a clone with the size of its image, writable and open to several connections', async () => {
    const uri = stand.clone('info')
    const [shown] = (JSON.parse(await runClient('nbdinfo', '--json', uri)) as { exports: Record<string, unknown>[] }).exports
    expect(shown).toMatchObject({
      description: 'volume info',
      'export-size': diskBytes,
      contexts: expect.arrayContaining(['base:allocation']),
      is_read_only: false,
      can_df: true,
      can_flush: true,
      can_fua: true,
      can_multi_conn: true,
      can_trim: true,
      can_zero: true,
    })
    expect(await runClient('nbdinfo', '--size', uri)).toBe(`${diskBytes}\n`)
    expect(await clientOutcome('nbdinfo', '--can', 'multi-conn', uri)).toMatchObject({ exitCode: 0 })
    // 2: the answer is no.
    expect(await clientOutcome('nbdinfo', '--is', 'read-only', uri)).toMatchObject({ exitCode: 2 })
    expect(await clientOutcome('nbdinfo', '--can', 'zero', uri)).toMatchObject({ exitCode: 0 })
  })

  test('shows a volume attached for reading as read-only, without what writes', async () => {
    stand.home.cli('volume', 'create', 'frozen', '--from', 'image:base')
    const uri = stand.attach('frozen', '--read-only')
    expect(await clientOutcome('nbdinfo', '--is', 'read-only', uri)).toMatchObject({ exitCode: 0 })
    expect(await clientOutcome('nbdinfo', '--can', 'trim', uri)).toMatchObject({ exitCode: 2 })
    await runClient('nbdcopy', uri, stand.file('frozen.raw'))
    expect(await fileDifference(stand.file('frozen.raw'), stand.content)).toBeNull()
  })

  test('lists what is attached and nothing else', async () => {
    stand.clone('listed')
    stand.home.cli('volume', 'create', 'unlisted', '--from', 'image:base')
    const socket = `nbd+unix:///?socket=${stand.file('nbd.sock')}`
    const descriptions = async (): Promise<unknown[]> =>
      (JSON.parse(await runClient('nbdinfo', '--json', '--list', socket)) as { exports: { description: string }[] }).exports.map(
        ({ description }) => description,
      )
    expect(await descriptions()).toContain('volume listed')
    expect(await descriptions()).not.toContain('volume unlisted')
    stand.home.cli('volume', 'detach', 'listed')
    expect(await descriptions()).not.toContain('volume listed')
  })

  test('maps a clone as its image, follows writes and trims, and keeps to the snapshot on a clone of one', async () => {
    const uri = stand.clone('mapped')
    expect(mapTrouble(await mapOf(uri), stand.content, 64 * KiB)).toBeNull()

    stand.home.cli('snapshot', 'create', 'mapped@before')
    const content = Buffer.from(stand.content)
    const patch = randomFillSync(Buffer.alloc(2 * MiB))
    await writeFile(stand.file('patch'), patch)
    // 1 MiB into a hole, 1 MiB over data of the image; then all of the image's first data goes.
    await runClient(
      'qemu-io',
      '-f',
      'raw',
      '-d',
      'unmap',
      '-c',
      `write -s ${stand.file('patch')} 39M 2M`,
      '-c',
      'discard 0 3M',
      uri,
    )
    patch.copy(content, 39 * MiB)
    content.fill(0, 0, 3 * MiB)
    expect(mapTrouble(await mapOf(uri), content, 64 * KiB)).toBeNull()

    stand.home.cli('volume', 'create', 'past', '--from', 'snapshot:mapped@before')
    expect(mapTrouble(await mapOf(stand.attach('past')), stand.content, 64 * KiB)).toBeNull()
  })
})

describe.skipIf(!hasPrograms('nbdcopy'))('nbdcopy (package libnbd-bin)', () => {
  test('copies a clone out: every byte, and holes stay holes', async () => {
    const uri = stand.clone('out')
    const path = stand.file('out.raw')
    await runClient('nbdcopy', '--connections=4', '--requests=32', uri, path)
    expect(await fileDifference(path, stand.content)).toBeNull()
    expect((await stat(path)).blocks * 512).toBeLessThan(10 * MiB)
    // Through a pipe, where only one connection and the order of the bytes are possible.
    const piped = await runClient('sh', '-c', 'nbdcopy "$1" - | sha256sum', 'sh', uri)
    expect(piped).toBe(await runClient('sh', '-c', 'sha256sum <"$1"', 'sh', stand.contentPath))
  })

  test('copies into an empty volume without storing the holes', async () => {
    const uri = stand.empty('in')
    await runClient('nbdcopy', '--connections=4', '--flush', stand.contentPath, uri)
    expect(stand.usedBytes('in')).toBeLessThan(10 * MiB)
    await runClient('nbdcopy', '--synchronous', uri, stand.file('in.raw'))
    expect(await fileDifference(stand.file('in.raw'), stand.content)).toBeNull()
  })

  test('copies other content over a clone: what becomes zero is zero, the image is what it was', async () => {
    const uri = stand.clone('over')
    // The same holes in other places: shifted by half the disk.
    const fresh = makeContent()
    const shifted = Buffer.concat([fresh.subarray(diskBytes / 2), fresh.subarray(0, diskBytes / 2)])
    await writeSparse(stand.file('shifted.raw'), shifted)
    await runClient('nbdcopy', '--connections=2', '--flush', stand.file('shifted.raw'), uri)
    await stand.crash()
    await runClient('nbdcopy', uri, stand.file('over.raw'))
    expect(await fileDifference(stand.file('over.raw'), shifted)).toBeNull()
    expect(mapTrouble(await mapOf(uri), shifted, 64 * KiB)).toBeNull()
    await runClient('nbdcopy', stand.clone('untouched'), stand.file('untouched.raw'))
    expect(await fileDifference(stand.file('untouched.raw'), stand.content)).toBeNull()
  })

  test('copies from one volume to another of the same daemon', async () => {
    const [source, target] = [stand.clone('source'), stand.empty('target')]
    await runClient('nbdcopy', '--destination-is-zero', '--flush', source, target)
    await runClient('nbdcopy', target, stand.file('target.raw'))
    expect(await fileDifference(stand.file('target.raw'), stand.content)).toBeNull()
    expect(stand.usedBytes('target')).toBeLessThan(10 * MiB)
  })
})

describe.skipIf(!hasPrograms('nbdfuse', 'mke2fs', 'e2fsck', 'debugfs'))('nbdfuse (packages libnbd-bin, e2fsprogs)', () => {
  test('carries an ext4 file system: made, filled, checked, changed, and as it was in the snapshot', async () => {
    const uri = stand.empty('ext4', 256 * MiB)
    const [folder, tree] = [stand.file('mounted'), stand.file('tree')]
    await mkdir(folder)
    await mkdir(tree)
    const first = randomFillSync(Buffer.alloc(3 * MiB + 17))
    await writeFile(`${tree}/first`, first)
    await writeFile(`${tree}/empty`, '')
    const second = stand.file('second')
    await writeFile(second, randomFillSync(Buffer.alloc(700 * KiB)))
    {
      await using mounted = await mountExport(uri, folder)
      await runClient('mke2fs', '-q', '-t', 'ext4', '-d', tree, mounted.path)
      await checkClean(mounted.path)
    }
    stand.home.cli('snapshot', 'create', 'ext4@first')
    {
      await using mounted = await mountExport(uri, folder)
      await runClient('debugfs', '-w', '-R', `write ${second} second`, mounted.path)
      await runClient('debugfs', '-w', '-R', 'rm first', mounted.path)
      await checkClean(mounted.path)
      expect(await filesOf(mounted.path)).toEqual(['empty', 'second'])
    }
    await stand.crash()
    {
      await using mounted = await mountExport(uri, folder, '--readonly')
      await checkClean(mounted.path)
      expect(await filesOf(mounted.path)).toEqual(['empty', 'second'])
      await dump(mounted.path, 'second')
      expect(await fileDifference(stand.file('dumped'), await readFile(second))).toBeNull()
    }
    stand.home.cli('volume', 'create', 'ext4-past', '--from', 'snapshot:ext4@first')
    {
      await using mounted = await mountExport(stand.attach('ext4-past', '--read-only'), folder, '--readonly')
      await checkClean(mounted.path)
      expect(await filesOf(mounted.path)).toEqual(['empty', 'first'])
      await dump(mounted.path, 'first')
      expect(await fileDifference(stand.file('dumped'), first)).toBeNull()
    }
  })

  async function checkClean(path: string): Promise<void> {
    const checked = await clientOutcome('e2fsck', '-f', '-n', path)
    expect(checked, checked.output).toMatchObject({ exitCode: 0 })
  }

  /** The files in the root directory of a file system, sorted. */
  async function filesOf(path: string): Promise<string[]> {
    const lines = (await runClient('debugfs', '-R', 'ls -p /', path)).split('\n')
    // "/INODE/MODE/UID/GID/NAME/SIZE/": regular files have a mode of 100NNN.
    return lines
      .map((line) => line.split('/'))
      .filter((fields) => fields[2]?.startsWith('100'))
      .map((fields) => basename(fields[5] ?? ''))
      .toSorted((a, b) => (a < b ? -1 : 1))
  }

  async function dump(path: string, name: string): Promise<void> {
    await runClient('debugfs', '-R', `dump ${name} ${stand.file('dumped')}`, path)
  }
})
