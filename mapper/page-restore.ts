/**
 * Bringing damaged map pages back from the exports of the pools.
 *
 * A page number is never given to two pages, so a page of that number in an export is the one that is missed, or is damaged
 * itself: which of both it is, the checksum in the parent of the page says. What cannot be used is not put in place of what
 * was there.
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import type { RootRef } from '@atoll/native'
import type { MapperContext } from './context.ts'
import { decodeRecord, parseRecordName, recordPrefix } from './export-format.ts'
import { pageBatch } from './maps.ts'

/** Damaged pages that are looked for at a time. */
const wantedPagesMax = 500

/** What the exports of all open pools have for these pages; the newest record that has one counts. One record at a time is in memory. */
export async function findExportedPages(
  context: Pick<MapperContext, 'pools'>,
  pageIds: readonly number[],
): Promise<Map<number, Uint8Array[]>> {
  const wanted = new Set(pageIds.slice(0, wantedPagesMax))
  const found = new Map<number, Uint8Array[]>()
  for (const poolId of context.pools.openIds()) {
    const { store } = context.pools.handle(poolId)
    for (const name of await store.listRecords(recordPrefix)) {
      if (parseRecordName(name) === null) continue
      try {
        const bytes = await store.readRecord(name)
        if (bytes === null) continue
        for (const page of decodeRecord(name, bytes).pages)
          if (wanted.has(page.id)) found.set(page.id, [...(found.get(page.id) ?? []), page.body.slice()])
      } catch {
        // A damaged record has nothing to offer; the check of the exports tells of it.
      }
    }
  }
  return found
}

/** The one of these bodies that the parent of the page means; `root` leads to it. Undefined: none, or the page is not reached. */
export async function findUsable(
  { catalog, engine, pins }: Pick<MapperContext, 'catalog' | 'engine' | 'pins'>,
  pageId: number,
  bodies: readonly Uint8Array[],
  root: RootRef,
): Promise<Uint8Array | undefined> {
  return await pins.run(async () => {
    for (const body of bodies) {
      const walk = engine.mapCheck()
      walk.addRoot(root)
      for (let ids = walk.pending(pageBatch); ids.length > 0; ids = walk.pending(pageBatch)) {
        const present = await catalog.pages.get(ids)
        await walk.supply(
          ids,
          present.map((found, index) => (ids[index] === pageId ? body : found)),
        )
        await nextTurn()
      }
      const [reached] = walk.hasPages(Float64Array.of(pageId))
      if (reached === 1 && !walk.faults().some((fault) => fault.pageId === pageId)) return body
    }
    return undefined
  })
}

/** Puts a page in the place of a damaged one; durable on return. */
export async function replacePage({ catalog }: Pick<MapperContext, 'catalog'>, pageId: number, body: Uint8Array): Promise<void> {
  await catalog.write(async () => {
    await catalog.pages.delete([pageId])
    await catalog.pages.insert([pageId], [body])
  })
}
