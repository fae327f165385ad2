import { spawn } from 'node:child_process'
import { once } from 'node:events'
import { readdir } from 'node:fs/promises'
import { join } from 'node:path'
import { setImmediate as nextTurn } from 'node:timers/promises'
import Database from 'better-sqlite3'
import { afterEach, beforeEach, expect, test, vi } from 'vitest'
import { takeProcessLock } from '../process-lock.ts'
import type { Catalog } from './catalog.ts'
import { restoreCatalog } from './catalog-backup.ts'
import { openCatalog, type OpenCatalogOptions } from './open-catalog.ts'
import { makeTemporaryFolder } from './testing.ts'

let folder: string
let path: string
const cleanups: (() => Promise<void>)[] = []

beforeEach(async () => {
  const made = await makeTemporaryFolder()
  folder = made.folder
  path = join(folder, 'catalog.db')
  cleanups.push(made.remove)
})

afterEach(async () => {
  for (const cleanup of cleanups.splice(0).toReversed()) await cleanup()
})

async function open(ownerText: string, options: OpenCatalogOptions = {}): Promise<Catalog> {
  const catalog = await openCatalog(path, { reserveBytes: 0, ownerText, ...options })
  cleanups.push(() => catalog.close())
  return catalog
}

const setMeta = (catalog: Catalog, value: string): Promise<void> =>
  catalog.write(async (tx) => {
    await tx.replaceInto('meta').values({ key: 'k', value }).execute()
  })

const readMeta = async (catalog: Catalog): Promise<string | undefined> =>
  (await catalog.db.selectFrom('meta').select('value').where('key', '=', 'k').executeTakeFirst())?.value

const locks = async (): Promise<string[]> => (await readdir(folder)).filter((name) => /\.\d+\.lock/.test(name))

/** Another process with the catalog open, in which `script` runs, until it says something. */
async function openElsewhere(script: string): Promise<{ end: (signal: NodeJS.Signals) => Promise<void> }> {
  const module = JSON.stringify(join(import.meta.dirname, 'open-catalog.ts'))
  const text = `
    const { openCatalog } = await import(${module})
    const catalog = await openCatalog(${JSON.stringify(path)}, { reserveBytes: 0, ownerText: 'the other one' })
    setInterval(() => {}, 2 ** 30)
    ${script}`
  const child = spawn(process.execPath, ['--input-type=module', '-e', text], { stdio: ['ignore', 'pipe', 'inherit'] })
  const exited = once(child, 'exit')
  const end = async (signal: NodeJS.Signals): Promise<void> => {
    child.kill(signal)
    await exited
  }
  cleanups.push(() => end('SIGKILL'))
  await once(child.stdout, 'data')
  return { end }
}

test('an owner that was taken over writes nothing any more, and is told so once and by whom', async () => {
  const told: unknown[] = []
  const first = await open('the first', { onTakenOver: (error) => told.push(error) })
  await setMeta(first, '1')
  await expect(open('the second')).rejects.toMatchObject({ code: 'CATALOG_LOCKED', values: { owner: 'the first' } })
  const second = await open('the second', { takeOver: true })
  const lost = { code: 'CATALOG_TAKEN_OVER', values: { owner: 'the second', epoch: 2, ownEpoch: 1 } }
  await expect(setMeta(first, '2')).rejects.toMatchObject(lost)
  await expect(setMeta(first, '3')).rejects.toMatchObject(lost)
  expect(told).toEqual([expect.objectContaining({ code: 'CATALOG_TAKEN_OVER' })])
  expect(await readMeta(second)).toBe('1')
  await setMeta(second, '4')
  expect(await readMeta(second)).toBe('4')
  // And not by a third one either, nor after the second has gone.
  await second.close()
  const third = await open('the third')
  await expect(setMeta(first, '5')).rejects.toMatchObject(lost)
  expect(await readMeta(third)).toBe('4')
})

test('an owner that writes nothing hears of it, too', async () => {
  const told = vi.fn<(error: unknown) => void>()
  await open('the first', { onTakenOver: told })
  await open('the second', { takeOver: true })
  await vi.waitFor(() => expect(told).toHaveBeenCalledOnce(), { timeout: 60_000 })
})

test('who is refused disturbs the owner in nothing', async () => {
  const owner = await open('the owner')
  let isDone = false
  const asking = (async () => {
    for (let count = 0; !isDone || count < 20; count += 1) {
      await expect(open('another')).rejects.toMatchObject({ code: 'CATALOG_LOCKED', values: { owner: 'the owner' } })
      await nextTurn()
    }
  })()
  for (let count = 0; count < 200; count += 1) {
    await setMeta(owner, String(count))
    await nextTurn()
  }
  isDone = true
  await asking
  expect(await readMeta(owner)).toBe('199')
})

test('of several that want to be the next owner one is', async () => {
  await (await open('the first')).close()
  const results = await Promise.allSettled(Array.from({ length: 5 }, (_, index) => open(`number ${index}`)))
  expect(results.filter(({ status }) => status === 'fulfilled')).toHaveLength(1)
  const refusals = results.flatMap((result) => (result.status === 'rejected' ? [result.reason as unknown] : []))
  const refusal = { code: 'CATALOG_LOCKED', values: { owner: expect.stringMatching(/^number/) as string } }
  for (const error of refusals) expect(error).toMatchObject(refusal)
})

test('a killed owner has none but its successor to ask, and locks of earlier owners are removed', async () => {
  const other = await openElsewhere("console.log('open')")
  await expect(open('me')).rejects.toMatchObject({ code: 'CATALOG_LOCKED', values: { owner: 'the other one' } })
  await other.end('SIGKILL')
  const catalog = await open('me')
  await setMeta(catalog, 'mine')
  expect(await locks()).toEqual(['catalog.2.lock'])
})

test('an owner that stays in the middle of a change cannot be taken over, and that is said', async () => {
  await openElsewhere("await catalog.write(async () => { console.log('inside'); await new Promise(() => {}) })")
  await expect(open('me', { takeOver: true, patienceMs: 100 })).rejects.toMatchObject({
    code: 'CATALOG_LOCKED',
    values: { owner: 'the other one' },
    message: expect.stringContaining('middle of a change') as string,
  })
})

test('an Atoll from before there were owners keeps everybody out', async () => {
  const taken = takeProcessLock(join(folder, 'catalog.lock'), 'an old one')
  try {
    await expect(open('me', { patienceMs: 0 })).rejects.toMatchObject({
      code: 'CATALOG_LOCKED',
      values: { owner: 'an old one' },
    })
  } finally {
    if ('lock' in taken) taken.lock.release()
  }
})

test('a backup is not put in the place of a catalog that has an owner, and who was one before it stays none', async () => {
  const backup = join(folder, 'backup')
  const first = await open('the first')
  await setMeta(first, 'saved')
  await first.backup(backup)
  const restore = () => restoreCatalog({ source: backup, path, ownerText: 'a restore', nowMs: 0 })
  await expect(restore()).rejects.toMatchObject({ code: 'CATALOG_LOCKED', values: { owner: 'the first' } })
  const second = await open('the second', { takeOver: true })
  await setMeta(second, 'later')
  await second.close()
  await restore()
  await expect(setMeta(first, 'mine')).rejects.toMatchObject({ code: 'CATALOG_TAKEN_OVER' })
  const third = await open('the third')
  expect(await readMeta(third)).toBe('saved')
  const database = new Database(path, { readonly: true })
  expect(database.prepare('select epoch from catalog_owner').pluck().get()).toBe(3)
  database.close()
})
