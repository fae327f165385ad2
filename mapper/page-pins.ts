/**
 * Keeps pages in the catalog while somebody walks over trees without holding their resources.
 *
 * Rules:
 * - Who reads roots and then fetches their pages holds a pin from before the roots were read until the last page is there.
 * - While any pin is held, a checkpoint does not delete the pages it replaced; they are kept in a list and deleted when the
 *   last pin is gone. A crash in between leaves them to the next reclaim.
 * - A sweep deletes only after every pin older than its own is gone: what it found unreachable may still be read by them.
 */

export interface PagePin {
  readonly sequence: number
  /** Idempotent. */
  release(): void
}

interface Waiter {
  below: number
  resolve: () => void
}

export class PagePins {
  #sequence = 0
  readonly #held = new Set<number>()
  #deferred: number[][] = []
  #waiters: Waiter[] = []
  readonly #onFree: (pageIds: number[]) => void

  /** @param onFree is given what was deferred, once no pin is left */
  constructor(onFree: (pageIds: number[]) => void) {
    this.#onFree = onFree
  }

  /** Whether replaced pages have to stay for now. */
  get active(): boolean {
    return this.#held.size > 0
  }

  pin(): PagePin {
    const sequence = ++this.#sequence
    this.#held.add(sequence)
    return {
      sequence,
      release: () => {
        if (this.#held.delete(sequence)) this.#released()
      },
    }
  }

  /** Runs `fn` under a pin. */
  async run<T>(fn: (pin: PagePin) => Promise<T>): Promise<T> {
    const pin = this.pin()
    try {
      return await fn(pin)
    } finally {
      pin.release()
    }
  }

  /** These pages are replaced: to be deleted when no pin is left. */
  defer(pageIds: number[]): void {
    if (pageIds.length > 0) this.#deferred.push(pageIds)
  }

  /** Waits until no pin is held that is older than `pin`. */
  async olderReleased(pin: PagePin): Promise<void> {
    if (!this.#anyBelow(pin.sequence)) return
    const { promise, resolve } = Promise.withResolvers<void>()
    this.#waiters.push({ below: pin.sequence, resolve })
    await promise
  }

  #anyBelow(sequence: number): boolean {
    for (const held of this.#held) if (held < sequence) return true
    return false
  }

  #released(): void {
    this.#waiters = this.#waiters.filter((waiter) => {
      if (this.#anyBelow(waiter.below)) return true
      waiter.resolve()
      return false
    })
    if (this.#held.size > 0 || this.#deferred.length === 0) return
    const free = this.#deferred.flat()
    this.#deferred = []
    this.#onFree(free)
  }
}
