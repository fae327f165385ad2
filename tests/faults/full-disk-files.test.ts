import { randomBytes } from 'node:crypto'
import { readdir, readFile, rm, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { TestHome } from '../test-home.ts'
import { expectServed, makeOther, mebibyte } from './broken-home.ts'
import { SmallDisk, whyNoSmallDisk } from './small-disk.ts'

const reason = await whyNoSmallDisk()
if (reason !== null) console.log(`the tests of files on a full disk are skipped: ${reason}`)

describe.skipIf(reason !== null)('on a full disk', () => {
  test('a put is refused and leaves nothing, also over kill -9, and what fits is stored', async () => {
    await using disk = await SmallDisk.mount(192 * mebibyte)
    await using home = TestHome.at(disk.path, { logPath: join(disk.outside, 'log') })
    await home.start()
    await makeOther(home)
    const small = join(disk.outside, 'small')
    const large = join(disk.outside, 'large')
    await writeFile(small, randomBytes(mebibyte))
    await writeFile(large, randomBytes(160 * mebibyte))
    home.cli('file', 'put', 'c/kept', small)
    const names = (): string[] => home.json<{ name: string }[]>('file', 'list', 'c').map(({ name }) => name)
    const storedBytes = (): number => {
      home.cli('pool', 'reclaim', 'default')
      return home.json<{ storedBytes: number }>('pool', 'show', 'default').storedBytes
    }
    // What other volumes write meanwhile is little.
    const limitBytes = storedBytes() + mebibyte / 2

    for (const path of ['c/new', 'c/kept', 'other/new']) {
      expect(home.fail('file', 'put', path, large), path).toBe('NO_SPACE')
      expect(home.runWith({ input: await readFile(large) }, 'file', 'put', path, '-').stderr, path).toContain('NO_SPACE')
    }
    expect(names()).toEqual(['kept'])
    expect(home.json<{ name: string }[]>('file', 'list').map(({ name }) => name)).toEqual(['c'])
    home.cli('file', 'get', 'c/kept', join(disk.outside, 'got'))
    expect((await readFile(join(disk.outside, 'got'))).equals(await readFile(small))).toBe(true)
    expect(storedBytes()).toBeLessThan(limitBytes)
    await expectServed(home)
    await home.end('SIGKILL')
    await home.start()
    expect(storedBytes()).toBeLessThan(limitBytes)
    expect(names()).toEqual(['kept'])

    // Filled by what fits, to the last byte that is given.
    let count = 0
    while (home.runWith({ input: randomBytes(12 * mebibyte) }, 'file', 'put', `c/fill-${count}`, '-').exitCode === 0) count += 1
    expect(count).toBeGreaterThan(3)
    expect(home.fail('file', 'put', 'c/new', large)).toBe('NO_SPACE')
    expect(names()).toHaveLength(count + 1)
    for (let index = 0; index < count; index += 1) home.cli('file', 'delete', `c/fill-${index}`)
    expect(storedBytes()).toBeLessThan(limitBytes)
    home.cli('file', 'put', 'c/again', small)
    await expectServed(home)
    expect(await home.end()).toBe(0)
  })

  test('a get fails, leaves the old file and nothing else', async () => {
    await using disk = await SmallDisk.mount(mebibyte)
    await using home = await TestHome.create()
    await home.start()
    const source = join(home.path, 'source')
    const destination = join(disk.path, 'out')
    // The last write stores a part of what it is given.
    for (const sizeBytes of [mebibyte + 1, mebibyte + 4096, 3 * mebibyte]) {
      await writeFile(source, randomBytes(sizeBytes))
      home.cli('file', 'put', 'c/n', source)
      expect(home.fail('file', 'get', 'c/n', destination), `${sizeBytes} bytes`).toBe('IO_ERROR')
      expect(await readdir(disk.path)).toEqual([])
    }
    await writeFile(destination, 'old')
    expect(home.fail('file', 'get', 'c/n', destination)).toBe('IO_ERROR')
    expect(await readFile(destination, 'utf8')).toBe('old')
    await rm(destination)
    home.cli('file', 'get', 'c/n', destination, '--length', '500K')
    expect((await readFile(destination)).equals((await readFile(source)).subarray(0, 500 * 1024))).toBe(true)
  })
})
