import { afterEach, beforeEach, expect, test } from 'vitest'
import type { Catalog } from './catalog.ts'
import { openCatalog } from './open-catalog.ts'
import { pageBatchMax } from './sqlite-pages.ts'

let catalog: Catalog

beforeEach(async () => {
  catalog = await openCatalog(':memory:')
})

afterEach(() => catalog.close())

const body = (id: number): Uint8Array => Uint8Array.of(id % 256, id >> 8)
const insert = (...ids: number[]): Promise<void> => catalog.write(() => catalog.pages.insert(ids, ids.map(body)))

test('bodies come in the order of the ids, undefined where there is no page, also over several batches', async () => {
  const ids = Array.from({ length: 3 * pageBatchMax }, (_, index) => index + 1)
  await insert(...ids)
  const wanted = [...ids.toReversed(), 999_999, 7, 7]
  const bodies = await catalog.pages.get(Float64Array.from(wanted))
  expect(bodies.map((found) => found && Buffer.from(found).toString('hex'))).toEqual(
    wanted.map((id) => (id === 999_999 ? undefined : Buffer.from(body(id)).toString('hex'))),
  )
  expect(await catalog.pages.get([])).toEqual([])
})

test('pages are changed inside of a write only, and a rollback takes them back', async () => {
  await expect(catalog.pages.insert([1], [body(1)])).rejects.toMatchObject({ code: 'INTERNAL' })
  await expect(catalog.pages.delete([1])).rejects.toMatchObject({ code: 'INTERNAL' })
  await expect(catalog.pages.deleteRange(1, 2, 1)).rejects.toMatchObject({ code: 'INTERNAL' })
  const attempt = catalog.write(async () => {
    await catalog.pages.insert([1, 2], [body(1), body(2)])
    expect(await catalog.pages.maxId()).toBe(2)
    expect((await catalog.pages.get([2]))[0]).toBeDefined()
    throw new Error('no')
  })
  await expect(attempt).rejects.toThrow('no')
  expect(await catalog.pages.maxId()).toBe(0)
})

test('a read outside waits for the write that is running', async () => {
  const write = catalog.write(async (tx) => {
    await catalog.pages.insert([1], [body(1)])
    for (let turn = 0; turn < 10; turn += 1) await tx.selectFrom('meta').selectAll().execute()
    await catalog.pages.delete([1])
  })
  const [, bodies] = await Promise.all([write, catalog.pages.get([1])])
  expect(bodies).toEqual([undefined])
})

test('delete tells how many pages there were', async () => {
  await insert(1, 2, 3)
  expect(await catalog.write(() => catalog.pages.delete([2, 3, 4]))).toBe(2)
  expect(await catalog.pages.usage()).toEqual({ pageCount: 1, bodyBytes: 2 })
})

test('a range is listed and deleted in bounded steps, without its end', async () => {
  await insert(5, 6, 7, 8, 20)
  expect([...(await catalog.pages.listIds(6, 20, 2))]).toEqual([6, 7])
  expect([...(await catalog.pages.listIds(8, 20, 2))]).toEqual([8])
  expect(await catalog.write(() => catalog.pages.deleteRange(6, 20, 2))).toBe(2)
  expect(await catalog.write(() => catalog.pages.deleteRange(6, 20, 2))).toBe(1)
  expect([...(await catalog.pages.listIds(1, 100, 100))]).toEqual([5, 20])
})

test('a page id is given once', async () => {
  await insert(1)
  await expect(insert(1)).rejects.toMatchObject({ code: 'CATALOG_CONSTRAINT' })
})
