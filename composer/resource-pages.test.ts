import { systemClock } from '@atoll/core'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { makeFolder, mebibyte, TestDaemon } from './testing.ts'
import type { Composer } from './composer.ts'
import type { Page, PageOptions } from './resource-pages.ts'

let daemon: TestDaemon
let composer: Composer
let removeFolder: () => Promise<void>

beforeEach(async () => {
  const made = await makeFolder()
  removeFolder = made.remove
  // What is made within one millisecond is in the order of its ids: here every moment is one of its own.
  let nowMs = systemClock.nowMs()
  const clock = { ...systemClock, nowMs: () => (nowMs += 1) }
  daemon = await TestDaemon.open(made.folder, { clock })
  composer = daemon.composer
  await composer.volumes.create({ name: 'a', sizeBytes: mebibyte })
  await composer.volumes.create({ name: 'b', sizeBytes: mebibyte })
})
afterEach(async () => {
  await daemon.stop()
  await removeFolder()
})

async function snapshotsOfA(count: number): Promise<string[]> {
  const names = Array.from({ length: count }, (_, index) => `s${index}`)
  for (const name of names) await composer.snapshots.create([`a@${name}`])
  return names
}

/** Names, page by page; `between` is called after each. */
async function namesByPage(
  list: (options: PageOptions) => Promise<Page<{ name: string }>>,
  limit: number,
  between: () => Promise<void> = async () => {},
): Promise<string[][]> {
  const pages: string[][] = []
  for (let marker: string | undefined; ;) {
    const page = await list({ limit, ...(marker === undefined ? {} : { marker }) })
    pages.push(page.entries.map(({ name }) => name))
    if (page.next === null) return pages
    marker = page.next
    await between()
  }
}

test('a listing comes in pages of the size that is asked for, in the order in which things were made', async () => {
  const names = await snapshotsOfA(7)
  await composer.snapshots.create(['b@other'])
  const list = async (options: PageOptions): Promise<Page<{ name: string }>> => await composer.snapshots.list('a', options)
  expect(await namesByPage(list, 3)).toEqual([names.slice(0, 3), names.slice(3, 6), names.slice(6)])
  expect(await namesByPage(list, 7)).toEqual([names])
  expect(await namesByPage((options) => composer.volumes.list(options), 1)).toEqual([['a'], ['b']])
  for (const name of ['x', 'y', 'z']) await composer.images.create({ name, from: 'a@s0' })
  expect(await namesByPage((options) => composer.images.list(options), 2)).toEqual([['x', 'y'], ['z']])
})

test('a volume is shown with the names of all of its snapshots, on whatever page it is', async () => {
  const names = await snapshotsOfA(5)
  await composer.snapshots.create(['b@other'])
  const shown = await composer.volumes.list()
  expect(shown.entries.map(({ name, snapshots }) => [name, snapshots])).toEqual([
    ['a', names],
    ['b', ['other']],
  ])
  await expect(composer.volumes.show('a')).resolves.toMatchObject({ snapshots: names })
})

test('a listing goes on although what it showed last is deleted meanwhile', async () => {
  const names = await snapshotsOfA(6)
  const rest = [...names]
  const pages = await namesByPage(
    (options) => composer.snapshots.list('a', options),
    2,
    async () => {
      for (const name of rest.splice(0, 2)) await composer.snapshots.delete(`a@${name}`)
    },
  )
  expect(pages).toEqual([names.slice(0, 2), names.slice(2, 4), names.slice(4)])
})

test('limits out of range and markers of nothing are refused', async () => {
  for (const options of [{ limit: 0 }, { limit: 1001 }, { limit: 1.5 }, { marker: 'x' }, { marker: '1.2' }]) {
    await expect(composer.volumes.list(options)).rejects.toMatchObject({ code: 'ARGUMENT_INVALID' })
  }
})
