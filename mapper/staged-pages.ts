/**
 * Pages of a checkpoint on their way into the catalog.
 *
 * Rules:
 * - A few pages go into the last transaction, with the root. Many are inserted ahead of it in transactions of about
 *   `batchMs`, which need not be durable by themselves: the last one is, and commits are never reordered.
 * - Before the first page of many, a row in `page_ranges` says whose they are. The last transaction deletes it, so a row that
 *   is found at start names pages that no root refers to. A failed checkpoint takes its pages back at once.
 * - The event loop turns between two transactions.
 */
import { setImmediate as nextTurn } from 'node:timers/promises'
import { assert, type CatalogTransaction } from '@atoll/core'
import type { RootRef } from '@atoll/native'
import type { MapperContext } from './context.ts'
import type { PageReservation } from './page-ids.ts'

/** What a checkpoint and a page set have in common. */
export interface PageSource {
  readonly pageCount: number
  root(): RootRef
  replaced(): Float64Array
  pages(startIndex: number, maxBytes: number): { ids: Float64Array; bodies: Uint8Array[] }
}

export interface StagedPages {
  readonly reservation: PageReservation
  readonly root: RootRef
  /** Pages of the old tree that the new one no longer has. */
  readonly replaced: Float64Array
  /** Pages that the last transaction inserts. */
  readonly inline: { readonly ids: Float64Array; readonly bodies: readonly Uint8Array[] } | null
  /** End of the range that is in the catalog already; null: none is. */
  readonly rangeEnd: number | null
}

/** At most this much goes into the last transaction. */
const inlineBytesMax = 64 * 1024
const inlinePagesMax = 128
/** How long a transaction of many pages should take, and the bounds of what it carries. */
const batchMs = 5
const batchBytesMin = 8 * 1024
const batchBytesMax = 512 * 1024
/** Pages deleted in one transaction. */
export const deleteBatch = 512

type Context = Pick<MapperContext, 'catalog' | 'clock' | 'log'>

/**
 * Brings the pages of a source into the catalog as far as that is possible without the root. On an error nothing is left.
 * @throws NoSpaceError and the other errors of `Catalog.write`
 */
export async function stagePages(
  context: Context,
  volumeId: string,
  reservation: PageReservation,
  source: PageSource,
  emergency = false,
): Promise<StagedPages> {
  const { pageCount } = source
  const common = { reservation, root: source.root(), replaced: source.replaced() }
  if (pageCount === 0) return { ...common, inline: null, rangeEnd: null }
  if (pageCount <= inlinePagesMax) {
    const inline = source.pages(0, inlineBytesMax)
    if (inline.ids.length === pageCount) return { ...common, inline, rangeEnd: null }
  }
  const rangeEnd = reservation.firstPageId + pageCount
  const staged: StagedPages = { ...common, inline: null, rangeEnd }
  try {
    let batchBytes = inlineBytesMax
    for (let index = 0; index < pageCount;) {
      const copyingMs = context.clock.monotonicMs()
      const { ids, bodies } = source.pages(index, batchBytes)
      const copiedMs = context.clock.monotonicMs() - copyingMs
      assert(ids.length > 0, 'a checkpoint gave no more pages before its end')
      const first = index === 0
      // Waiting for the catalog's turn is not this batch's cost, so the time counts from inside.
      const tookMs = await context.catalog.write(
        async (tx) => {
          const startedMs = context.clock.monotonicMs()
          if (first) {
            await tx
              .insertInto('page_ranges')
              .values({ first_page_id: reservation.firstPageId, end_page_id: rangeEnd, volume_id: volumeId })
              .execute()
          }
          await context.catalog.pages.insert(ids, bodies)
          return copiedMs + context.clock.monotonicMs() - startedMs
        },
        { durable: false, emergency },
      )
      if (tookMs > batchMs) batchBytes = Math.max(batchBytesMin, Math.floor(batchBytes / 2))
      else if (tookMs < batchMs / 3) batchBytes = Math.min(batchBytesMax, batchBytes * 2)
      index += ids.length
      await nextTurn()
    }
    return staged
  } catch (error) {
    await unstagePages(context, staged)
    throw error
  }
}

/** What the last transaction does for these pages. Inside a write. */
export async function finishStaged(context: Context, tx: CatalogTransaction, staged: StagedPages): Promise<void> {
  if (staged.inline !== null) await context.catalog.pages.insert(staged.inline.ids, staged.inline.bodies)
  if (staged.rangeEnd !== null) {
    const result = await tx
      .deleteFrom('page_ranges')
      .where('first_page_id', '=', staged.reservation.firstPageId)
      .executeTakeFirst()
    assert(result.numDeletedRows === 1n, `page range ${staged.reservation.firstPageId} is not there`)
  }
}

/** The checkpoint failed: takes its pages back. What cannot be taken back now (no space) is taken back at the next start. */
export async function unstagePages(context: Context, staged: StagedPages): Promise<void> {
  if (staged.rangeEnd === null) return
  try {
    await deletePageRange(context, staged.reservation.firstPageId, staged.rangeEnd)
  } catch (error) {
    context.log.warn(
      { err: error, firstPageId: staged.reservation.firstPageId },
      'pages of a failed checkpoint stay until the next start',
    )
  }
}

/** Deletes the pages of an unfinished range in bounded transactions, and its row with the last of them. */
export async function deletePageRange(context: Pick<Context, 'catalog'>, firstPageId: number, endPageId: number): Promise<void> {
  for (let done = false; !done;) {
    done = await context.catalog.write(
      async (tx) => {
        const deleted = await context.catalog.pages.deleteRange(firstPageId, endPageId, deleteBatch)
        if (deleted === deleteBatch) return false
        await tx.deleteFrom('page_ranges').where('first_page_id', '=', firstPageId).execute()
        return true
      },
      { durable: false, emergency: true },
    )
    await nextTurn()
  }
}
