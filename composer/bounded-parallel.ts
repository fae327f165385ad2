/** Runs `fn` over all items, at most `parallelMax` at a time. The first error stops new starts and is thrown at the end. */
export async function boundedParallel<T>(
  items: readonly T[],
  parallelMax: number,
  fn: (item: T) => Promise<void>,
): Promise<void> {
  let nextIndex = 0
  let failed = false
  const worker = async (): Promise<void> => {
    for (;;) {
      const index = nextIndex++
      if (failed || index >= items.length) return
      try {
        await fn(items[index] as T)
      } catch (error) {
        failed = true
        throw error
      }
    }
  }
  const outcomes = await Promise.allSettled(Array.from({ length: Math.min(parallelMax, items.length) }, worker))
  const failure = outcomes.find((outcome) => outcome.status === 'rejected')
  if (failure !== undefined) throw failure.reason
}
