import { checkpointIntervalMs, type MapperOptions } from '@atoll/mapper'

/**
 * Timers of a mapper that writes no map down by itself, which happens every few seconds: what a test has put into a journal stays
 * there, and no sync but the test's own meets the faults that it sets.
 */
export const withoutCheckpoints: NonNullable<MapperOptions['setTimer']> = (callback, delayMs) => {
  if (delayMs >= checkpointIntervalMs) return () => undefined
  const handle = setTimeout(callback, delayMs)
  return () => clearTimeout(handle)
}
