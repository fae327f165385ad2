import { readFile, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { describe, expect, test } from 'vitest'
import { atollPath, runProgram, TestHome } from '../test-home.ts'
import {
  attach,
  expectOnlyBroken,
  expectServed,
  inCatalog,
  layersOf,
  makeOther,
  mebibyte,
  pattern,
  poolPath,
  segmentPaths,
  show,
  slotBytes,
} from './broken-home.ts'
import { crc32c } from './crc32c.ts'

describe('the folder of a pool', () => {
  test('is refused to a second home, with the pid that has it open or the catalog that owns it', async () => {
    await using first = await TestHome.create()
    await using second = await TestHome.create()
    const { pid } = await first.start()
    await makeOther(first)
    await second.start()
    const owner = inCatalog(first, (database) =>
      database.prepare("select value from meta where key = 'catalog_id'").pluck().get(),
    ) as string
    const take = ['pool', 'create', 'taken', '--driver', 'file', '--option', `path=${poolPath(first)}`]

    const locked = second.failure(...take)
    expect(locked.code).toBe('POOL_LOCKED')
    expect(locked.message).toContain(`pid ${pid} `)
    expect(locked.message).toContain(poolPath(first))
    await expectServed(first)

    await first.end()
    const owned = second.failure(...take)
    expect(owned.code).toBe('POOL_OWNED_BY_OTHER')
    expect(owned.message).toContain(owner)
    expect(second.json<{ name: string }[]>('pool', 'list').map(({ name }) => name)).toEqual(['default'])

    await first.start()
    await expectServed(first)
    // Killed, it keeps the pool: the lock goes with the process, the owner record does not.
    await first.end('SIGKILL')
    expect(second.fail(...take)).toBe('POOL_OWNED_BY_OTHER')
    await first.start()
    await expectServed(first)
  })
})

describe('a newer format version', () => {
  test('of the catalog ends the start, saying which versions and what to do, and changes nothing', async () => {
    await using home = await TestHome.create()
    await home.start()
    await makeOther(home)
    await home.end()
    const setVersion = (version: string): string =>
      inCatalog(home, (database) => {
        const before = database.prepare("select value from meta where key = 'format_version'").pluck().get() as string
        database.prepare("update meta set value = ? where key = 'format_version'").run(version)
        return before
      })
    const known = setVersion('999')
    const before = await readFile(join(home.path, 'catalog.db'))
    const refused = runProgram(atollPath, ['serve', '--json', '--http', ':0', '--home', home.path])
    expect(refused).toMatchObject({ exitCode: 1, stdout: '' })
    for (const part of ['FORMAT_VERSION', join(home.path, 'catalog.db'), '999', `up to ${known}`, 'use the version of Atoll'])
      expect(refused.stderr).toContain(part)
    expect(await readFile(join(home.path, 'catalog.db'))).toEqual(before)
    setVersion(known)
    await home.start()
    await expectServed(home)
  })

  test('of a journal segment keeps its volume closed, saying which versions and what to do, and nothing is cut', async () => {
    await using home = await TestHome.create()
    await home.start()
    await makeOther(home)
    home.cli('volume', 'create', 'disk', '--size', '16M')
    home.cli('snapshot', 'create', 'disk@base')
    const client = await attach(home, 'disk')
    await client.write(0, pattern(1, slotBytes))
    await client.flush()
    await home.end('SIGKILL')
    const { active } = layersOf(home, 'disk')
    const [path] = (await segmentPaths(home, active)) as [string]
    const current = await readFile(path)
    // Magic, version and the header's crc are where every version has them (native/io/src/journal/format.rs).
    const newer = Buffer.from(current)
    newer.writeUInt16LE(7, 4)
    newer.writeUInt32LE(crc32c(newer.subarray(0, 60)), 60)
    await writeFile(path, newer)
    await home.start()
    await expectOnlyBroken(home, 'disk', 'FORMAT_VERSION', active, 'format version 7', 'use the build that wrote it')
    await home.end()
    expect(await readFile(path)).toEqual(newer)
    await writeFile(path, current)
    await home.start()
    await using back = await attach(home, 'disk')
    expect(await back.read(0, slotBytes)).toEqual(pattern(1, slotBytes))
  })

  test("of a pool's owner record keeps that pool closed, and other pools are served", async () => {
    await using home = await TestHome.create()
    await using elsewhere = await TestHome.create()
    await home.start()
    await makeOther(home)
    const path = join(elsewhere.path, 'pool')
    home.cli('pool', 'create', 'second', '--driver', 'file', '--option', `path=${path}`, '--option', 'reserve=0')
    home.cli('volume', 'create', 'disk', '--size', '16M', '--pool', 'second')
    const client = await attach(home, 'disk')
    await client.write(0, pattern(1, mebibyte))
    await client.disconnect()
    await home.end()
    const record = join(path, 'records', 'owner')
    const current = await readFile(record, 'utf8')
    const newer = JSON.stringify({ ...(JSON.parse(current) as object), version: 2 })
    await writeFile(record, newer)
    await home.start()
    const pool = home.json<{ error: { code: string; message: string } | null }>('pool', 'show', 'second')
    expect(pool.error?.code).toBe('FORMAT_VERSION')
    for (const part of [path, 'version 2', 'use the version of Atoll']) expect(pool.error?.message).toContain(part)
    const { status, error } = show(home, 'disk')
    expect({ status, code: error?.code }).toEqual({ status: 'error', code: 'POOL_UNAVAILABLE' })
    expect(error?.message).toContain('FORMAT_VERSION')
    expect(home.fail('volume', 'create', 'more', '--size', '1M', '--pool', 'second')).toBe('POOL_UNAVAILABLE')
    await expectServed(home)
    await home.end()
    expect(await readFile(record, 'utf8')).toBe(newer)

    await writeFile(record, current)
    await home.start()
    await using back = await attach(home, 'disk')
    expect(await back.read(0, mebibyte)).toEqual(pattern(1, mebibyte))
  })
})
