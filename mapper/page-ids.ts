/**
 * Numbers for map pages.
 *
 * Rules:
 * - A number is given to one checkpoint and, once its page may have been stored, never given again while the process lives:
 *   the engine shares nodes between maps by page id.
 * - A checkpoint that is in flight is in `#inFlight` from before its pages are numbered until its last transaction is
 *   committed or its pages are gone. `boundary()` is below all of them, so that a sweep never takes pages whose root is still
 *   to be committed.
 */
import { assert } from '@atoll/core'

/** Numbers of one checkpoint: firstPageId <= id < endPageId. */
export interface PageReservation {
  readonly firstPageId: number
  readonly endPageId: number
}

/**
 * Numbers kept free for a checkpoint whose page count is not known yet: the pages of 32 TiB of dirty leaves, far beyond the
 * bound on dirty leaves of a device. Only checkpoints that overlap in time leave the rest of it unused, and 2^33 of those
 * fit into the exact range of a number.
 */
export const reservedPagesMax = 1 << 20

export class PageIds {
  #next: number
  readonly #inFlight = new Set<PageReservation>()

  /** @param next the first number that was never used */
  constructor(next: number) {
    assert(Number.isSafeInteger(next) && next >= 1, `page id counter starts at ${next}`)
    this.#next = next
  }

  /** The number that the next reservation starts with: every page stored so far has a smaller one. */
  get next(): number {
    return this.#next
  }

  /** From now on only numbers from `next` on are given; nothing if they are anyway. */
  raise(next: number): void {
    assert(Number.isSafeInteger(next + reservedPagesMax), `page id counter raised to ${next}`)
    this.#next = Math.max(this.#next, next)
  }

  /** Pages with a smaller number belong to no checkpoint in flight. */
  boundary(): number {
    let boundary = this.#next
    for (const reservation of this.#inFlight) boundary = Math.min(boundary, reservation.firstPageId)
    return boundary
  }

  /** Whether a checkpoint in flight has the numbers from this one on. */
  isInFlight(firstPageId: number): boolean {
    for (const reservation of this.#inFlight) if (reservation.firstPageId === firstPageId) return true
    return false
  }

  /** Reserves numbers for one checkpoint. Ends with `release`. */
  reserve(pageCountMax: number = reservedPagesMax): PageReservation {
    const reservation = { firstPageId: this.#next, endPageId: this.#next + pageCountMax }
    assert(Number.isSafeInteger(reservation.endPageId), 'page ids are used up')
    this.#next = reservation.endPageId
    this.#inFlight.add(reservation)
    return reservation
  }

  /** Numbers from `firstPageId + usedCount` on were not given to any page: they are free again if nobody reserved later. */
  trim(reservation: PageReservation, usedCount: number): void {
    assert(reservation.firstPageId + usedCount <= reservation.endPageId, `${usedCount} pages in a reservation of fewer`)
    if (this.#next === reservation.endPageId) {
      this.#next = reservation.firstPageId + usedCount
    }
  }

  /** The checkpoint is committed, or its pages are gone. */
  release(reservation: PageReservation): void {
    this.#inFlight.delete(reservation)
  }
}
