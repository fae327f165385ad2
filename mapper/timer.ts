/** Timers as they are handed in, so that a test decides when one is due. */

/** Calls back once after `delayMs`; the value cancels it (calling that twice is harmless). */
export type SetTimer = (callback: () => void, delayMs: number) => () => void

/** Real timers; they never keep the process alive. */
export const systemTimer: SetTimer = (callback, delayMs) => {
  const handle = setTimeout(callback, delayMs)
  handle.unref()
  return () => clearTimeout(handle)
}
