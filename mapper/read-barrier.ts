/** Waiting for the requests that may still read what is about to go (I5). */
import type { MapperContext } from './context.ts'

/**
 * Waits until every request that was under way on any open device at the call has finished, at most `waitMs` milliseconds. Returns the ids of
 * the resources with some that have not, or that were not told where their layers lie now; whatever else is open reads only there.
 */
export async function passBarrier(
  { engine, open }: Pick<MapperContext, 'engine' | 'open'>,
  waitMs: number,
): Promise<Set<string>> {
  const before = open.formerPools()
  const hung = new Set(await engine.readBarrier(waitMs))
  for (const [entry, pools] of before) {
    if (entry.readsFormerPools) hung.add(entry.id)
    if (hung.has(entry.id)) continue
    for (const poolId of pools) entry.formerPools.delete(poolId)
  }
  return hung
}
