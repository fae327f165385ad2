/**
 * Sums and differences of histograms of latencies. What a bucket stands for is told by the list of its ends: a bucket counts
 * what took less than its end, and no less than the end of the one before.
 */
export interface Latencies {
  /** By bucket; buckets that are not there are empty. */
  readonly counts: readonly number[]
  readonly sumSeconds: number
}

export const noLatencies: Latencies = { counts: [], sumSeconds: 0 }

function combine(a: Latencies, b: Latencies, sign: 1 | -1): Latencies {
  // Most volumes are idle most of the time.
  if (b.counts.length === 0) return a
  const length = Math.max(a.counts.length, b.counts.length)
  const counts = Array.from({ length }, (_, index) => (a.counts[index] ?? 0) + sign * (b.counts[index] ?? 0))
  return { counts, sumSeconds: a.sumSeconds + sign * b.sumSeconds }
}

/** Both together. */
export function addLatencies(a: Latencies, b: Latencies): Latencies {
  return combine(a, b, 1)
}

/** What was counted after `before` was; of a histogram that started anew meanwhile, all of it. */
export function latenciesSince(before: Latencies, after: Latencies): Latencies {
  const since = combine(after, before, -1)
  return since.counts.some((count) => count < 0) ? after : { ...since, sumSeconds: Math.max(0, since.sumSeconds) }
}

/** How many were counted. */
export function latencyCount(latencies: Latencies): number {
  return latencies.counts.reduce((sum, count) => sum + count, 0)
}

/** null: nothing was counted. */
export function meanSeconds(latencies: Latencies): number | null {
  const count = latencyCount(latencies)
  return count === 0 ? null : latencies.sumSeconds / count
}

/** What at least `quantile` (0 to 1) of all took at most: the end of the bucket in which that lies. null: nothing was counted. */
export function quantileSeconds(latencies: Latencies, quantile: number, bucketEndsSeconds: readonly number[]): number | null {
  const count = latencyCount(latencies)
  if (count === 0) return null
  const rank = Math.max(1, Math.ceil(quantile * count))
  let seen = 0
  for (const [index, bucket] of latencies.counts.entries()) {
    seen += bucket
    if (seen >= rank) return bucketEndsSeconds[index] ?? null
  }
  return null
}
