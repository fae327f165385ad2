import type { Clock } from '@atoll/core'

/**
 * Makes a function whose calls share what `make` makes: those that come while it is made, and for `keepMs` afterwards. A
 * failure is kept for nobody but those who waited.
 */
export function shared<T>({ clock, keepMs }: { clock: Clock; keepMs: number }, make: () => Promise<T>): () => Promise<T> {
  let made: { readonly promise: Promise<T>; endMs: number } | null = null
  return () => {
    if (made !== null && clock.monotonicMs() < made.endMs) return made.promise
    const mine = { promise: make(), endMs: Infinity }
    made = mine
    mine.promise.then(
      () => void (mine.endMs = clock.monotonicMs() + keepMs),
      () => void (mine.endMs = -Infinity),
    )
    return mine.promise
  }
}
