/** Waiting as the composer sees it: handed in, so that a test decides when a time is over. */

/** Calls back once after `delayMs`; the value cancels it (calling that twice is harmless). */
export type SetTimer = (callback: () => void, delayMs: number) => () => void

/** Real timers; they never keep the process alive. */
export const systemTimer: SetTimer = (callback, delayMs) => {
  const handle = setTimeout(callback, delayMs)
  handle.unref()
  return () => clearTimeout(handle)
}

/** Resolves after `delayMs`, or at once when `signal` is aborted (without an error: the caller looks at the signal). */
export function delay(setTimer: SetTimer, delayMs: number, signal?: AbortSignal): Promise<void> {
  const { promise, resolve } = Promise.withResolvers<void>()
  const cancel = setTimer(resolve, delayMs)
  const aborted = (): void => {
    cancel()
    resolve()
  }
  if (signal?.aborted) aborted()
  else signal?.addEventListener('abort', aborted, { once: true })
  return promise.finally(() => signal?.removeEventListener('abort', aborted))
}

/** Whether `promise` settled (either way) within `timeoutMs`. It is not called off. */
export async function settledWithin(setTimer: SetTimer, promise: Promise<unknown>, timeoutMs: number): Promise<boolean> {
  const expiry = Promise.withResolvers<boolean>()
  const cancel = setTimer(() => expiry.resolve(false), timeoutMs)
  const settled = promise.then(
    () => true,
    () => true,
  )
  return await Promise.race([settled, expiry.promise]).finally(cancel)
}
