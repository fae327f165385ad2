import { spawnSync } from 'node:child_process'
import { copyFile, open, readdir, readFile, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { setImmediate as nextTurn } from 'node:timers/promises'
import Database from 'better-sqlite3'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { restoreCatalog, verifyBackup } from './catalog-backup.ts'
import type { Catalog } from './catalog.ts'
import { openCatalog } from './open-catalog.ts'
import { insertPool, makeTemporaryFolder, testPoolId } from './testing.ts'

let folder: string
let path: string
let backup: string
const cleanups: (() => Promise<void>)[] = []

beforeEach(async () => {
  const made = await makeTemporaryFolder()
  folder = made.folder
  path = join(folder, 'catalog.db')
  backup = join(folder, 'backup')
  cleanups.push(made.remove)
})
afterEach(async () => {
  for (const cleanup of cleanups.splice(0).toReversed()) await cleanup()
})

async function openIt(source: string = path): Promise<Catalog> {
  const catalog = await openCatalog(source, { reserveBytes: 0 })
  cleanups.push(() => catalog.close())
  return catalog
}

const restore = async (source = backup) => await restoreCatalog({ source, path, ownerText: 'a test', nowMs: 1_700_000_000_000 })
const poolNames = async (catalog: Catalog): Promise<string[]> =>
  (await catalog.db.selectFrom('pools').select('name').execute()).map((row) => row.name)
const rename = async (catalog: Catalog, name: string): Promise<void> =>
  await catalog.write(async (tx) => void (await tx.updateTable('pools').set({ name }).where('id', '=', testPoolId).execute()))

describe('a backup', () => {
  test('is one state of the catalog, made while it is written, and only its user can read it', async () => {
    const catalog = await openIt()
    await catalog.write(async (tx) => await insertPool(tx, 'name-0'))
    // Two rows that change together.
    const change = async (count: number): Promise<void> =>
      await catalog.write(async (tx) => {
        await tx
          .updateTable('pools')
          .set({ name: `name-${count}` })
          .execute()
        await catalog.pages.delete([1])
        await catalog.pages.insert([1], [Buffer.from(`name-${count}`)])
      })
    await change(1)
    let ended = false
    let count = 1
    const writing = (async () => {
      while (!ended) {
        await change((count += 1))
        await nextTurn()
      }
    })()
    for (let number = 1; number <= 5; number += 1) {
      const atLeast = count
      const info = await catalog.backup(`${backup}-${number}`)
      expect(info).toMatchObject({ catalogId: catalog.id, formatVersion: catalog.formatVersion, generation: number })
      expect(await verifyBackup(`${backup}-${number}`)).toEqual(info)
      expect((await stat(`${backup}-${number}`)).mode & 0o777).toBe(0o600)
      const copy = new Database(`${backup}-${number}`, { readonly: true })
      const name = copy.prepare('select name from pools').pluck().get() as string
      const body = copy.prepare('select body from pages').pluck().get() as Buffer
      copy.close()
      expect(body.toString()).toBe(name)
      expect(Number(name.slice(5))).toBeGreaterThanOrEqual(atLeast)
    }
    ended = true
    await writing
    expect((await readdir(folder)).filter((name) => name.includes('partial'))).toEqual([])
  })

  test('replaces nothing, and leaves nothing behind when it cannot be made', async () => {
    const catalog = await openIt()
    await writeFile(backup, 'mine')
    await expect(catalog.backup(backup)).rejects.toMatchObject({ code: 'DESTINATION_EXISTS' })
    expect(await readFile(backup, 'utf8')).toBe('mine')
    await expect(catalog.backup(join(folder, 'nowhere', 'backup'))).rejects.toMatchObject({ code: 'DESTINATION_INVALID' })
    await expect(catalog.backup('relative')).rejects.toMatchObject({ code: 'DESTINATION_INVALID' })
    expect((await readdir(folder)).toSorted()).toEqual([
      'backup',
      'catalog.1.lock',
      'catalog.db',
      'catalog.db-shm',
      'catalog.db-wal',
      'catalog.lock',
    ])
  })

  test('of a catalog in memory works, too', async () => {
    const catalog = await openIt(':memory:')
    await catalog.write(async (tx) => await insertPool(tx))
    await catalog.backup(backup)
    await restore()
    expect(await poolNames(await openIt())).toEqual(['default'])
  })
})

describe('a restore', () => {
  test('puts the backup in place and keeps the catalog that was there', async () => {
    const catalog = await openIt()
    await catalog.write(async (tx) => await insertPool(tx, 'older'))
    const info = await catalog.backup(backup)
    await rename(catalog, 'newer')
    await catalog.backup(`${backup}-2`)
    await catalog.close()
    const restored = await restore()
    expect(restored).toEqual({ ...info, replacedPath: `${path}.replaced-20231114T221320Z` })
    const again = await openIt()
    expect(again.id).toBe(catalog.id)
    expect(await poolNames(again)).toEqual(['older'])
    // Newer than every backup of what was replaced.
    expect((await again.backup(`${backup}-3`)).generation).toBeGreaterThan(2)
    await again.close()
    expect(await poolNames(await openIt(restored.replacedPath ?? ''))).toEqual(['newer'])
  })

  test('into an empty place works, and twice at one moment keeps both', async () => {
    const catalog = await openIt()
    await catalog.backup(backup)
    await catalog.close()
    await restore()
    expect((await restore()).replacedPath).toBe(`${path}.replaced-20231114T221320Z-1`)
    expect((await restore()).replacedPath).toBe(`${path}.replaced-20231114T221320Z-2`)
  })

  test('does not let the log of a damaged catalog run into the new one', async () => {
    const first = await openIt()
    await first.write(async (tx) => await insertPool(tx, 'older'))
    await first.backup(backup)
    await first.close()
    const catalog = await openIt()
    await rename(catalog, 'newer')
    // As a kill leaves them, and the file damaged besides.
    for (const suffix of ['', '-wal']) await copyFile(`${path}${suffix}`, join(folder, `aside${suffix}`))
    await catalog.close()
    for (const suffix of ['', '-wal']) await copyFile(join(folder, `aside${suffix}`), `${path}${suffix}`)
    await writeFile(path, 'rubbish')
    const { replacedPath } = await restore()
    expect(await poolNames(await openIt())).toEqual(['older'])
    expect(await readFile(replacedPath ?? '', 'utf8')).toBe('rubbish')
    expect((await stat(`${replacedPath}-wal`)).size).toBeGreaterThan(0)
  })

  test('of anything that is damaged, cut short or no backup is refused, and changes nothing', async () => {
    const catalog = await openIt()
    await catalog.write(async (tx) => await insertPool(tx, 'older'))
    await catalog.backup(backup)
    await rename(catalog, 'newer')
    await catalog.close()
    const before = await readFile(path)
    const whole = await readFile(backup)
    const { imageBytes } = await verifyBackup(backup)
    const flipped = (at: number): Buffer => {
      const bytes = Buffer.from(whole)
      bytes[at] = (bytes[at] ?? 0) ^ 1
      return bytes
    }
    const damaged = [
      flipped(0),
      flipped(imageBytes - 1),
      flipped(imageBytes + 2),
      flipped(imageBytes + whole.subarray(imageBytes).indexOf('sha256') + 12),
      whole.subarray(0, -1),
      whole.subarray(0, imageBytes),
      whole.subarray(4096),
      Buffer.concat([whole, Buffer.alloc(4096)]),
      Buffer.alloc(0),
      before,
    ]
    for (const [index, bytes] of damaged.entries()) {
      await writeFile(backup, bytes)
      await expect(restore(), `damage ${index}`).rejects.toMatchObject({ code: 'CATALOG_BACKUP_INVALID' })
    }
    await expect(restore(join(folder, 'nothing'))).rejects.toMatchObject({ code: 'CATALOG_BACKUP_INVALID' })
    const newer = Buffer.from(whole.toString('latin1').replace('"version":1', '"version":2'), 'latin1')
    await writeFile(backup, newer)
    await expect(restore()).rejects.toMatchObject({ code: 'FORMAT_VERSION' })
    expect(await readFile(path)).toEqual(before)
    expect((await readdir(folder)).filter((name) => name.includes('restoring') || name.includes('replaced'))).toEqual([])
  })

  test('is refused while another process has the catalog open', async () => {
    const catalog = await openIt()
    await catalog.backup(backup)
    await catalog.close()
    const holder = `
      import { openCatalog } from ${JSON.stringify(join(import.meta.dirname, 'open-catalog.ts'))}
      import { restoreCatalog } from ${JSON.stringify(join(import.meta.dirname, 'catalog-backup.ts'))}
      import { spawnSync } from 'node:child_process'
      await openCatalog(${JSON.stringify(path)}, { ownerText: 'the holder', reserveBytes: 0 })
      const script = \`
        import { restoreCatalog } from ${JSON.stringify(join(import.meta.dirname, 'catalog-backup.ts'))}
        const options = { source: ${JSON.stringify(backup)}, path: ${JSON.stringify(path)}, ownerText: 'x', nowMs: 0 }
        await restoreCatalog(options).catch((error) => console.log(error.code, error.message))\`
      console.log(spawnSync(process.execPath, ['--input-type=module', '-e', script], { encoding: 'utf8' }).stdout)
      process.exit(0)`
    const { stdout, stderr } = spawnSync(process.execPath, ['--input-type=module', '-e', holder], { encoding: 'utf8' })
    expect(stdout, stderr).toContain('CATALOG_LOCKED')
    expect(stdout).toContain('the holder')
  })

  test('begins anew where an earlier one was interrupted', async () => {
    const catalog = await openIt()
    await catalog.backup(backup)
    await catalog.close()
    // What an interrupted restore left is no obstacle.
    await (await open(`${path}.restoring`, 'w')).close()
    await restore()
    expect((await readdir(folder)).includes('catalog.db.restoring')).toBe(false)
    expect((await stat(path)).mode & 0o777).toBe(0o600)
  })
})
