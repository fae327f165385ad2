/** What each of many resources takes, slot by slot: the native half of the mapper's accounts. */
import type { RawUsage } from './addon.ts'
import { call, settle } from './native-error.ts'
import type { Store } from './store.ts'

/** Roots as lists of one length. */
export interface UsageRoots {
  /** Numbers that name the resources; each stands once. */
  readonly keys: Float64Array
  /** The same number for resources that come from one volume. */
  readonly lineages: Float64Array
  readonly words: BigUint64Array
  readonly crcs: Uint32Array
}

/**
 * Kept between calls: `setRoots`, then pages until none is pending and `settle` was called at least once, then `scan` for every
 * unknown layer; then it answers. A root that changed costs the pages that are new in it. Calls one after the other.
 */
export class UsageTable {
  readonly #raw: RawUsage

  /** @internal */
  constructor(raw: RawUsage) {
    this.#raw = raw
  }

  /**
   * Which roots there are now, and which layers are active.
   *
   * @throws PAGE_CORRUPT for a root that is none; the table is of no use then
   */
  setRoots(roots: UsageRoots, active: Uint32Array): Promise<void> {
    return settle(() => this.#raw.setRoots(roots.keys, roots.lineages, roots.words, roots.crcs, active))
  }

  /** Ids of pages to fetch next, at most `limit`. */
  pending(limit: number): Promise<Float64Array> {
    return settle(() => this.#raw.pending(limit))
  }

  /** Takes pages that were pending, null for one that is missing. A bad one is an error of `taken` for who reaches it. */
  settle(ids: Float64Array, bodies: (Uint8Array | null)[]): Promise<void> {
    return settle(() => this.#raw.settle(ids, bodies))
  }

  /** Aliases of layers that are not active and whose allocation is not known yet. */
  unknownLayers(): Promise<Uint32Array> {
    return settle(() => this.#raw.unknownLayers())
  }

  /**
   * Looks at what layers have allocated in one store, beside what was found in others; returns the aliases of those that could not be
   * looked at, of which nothing is added.
   */
  scan(store: Store, aliases: Uint32Array, ids: readonly string[]): Promise<Uint32Array> {
    return settle(() => this.#raw.scan(store.raw, aliases, [...ids]))
  }

  /** These layers cannot be looked at, and count as empty. */
  setEmpty(aliases: Uint32Array): void {
    call(() => this.#raw.setEmpty(aliases))
  }

  /**
   * Bytes in sealed layers that only this resource refers to, and that others refer to as well.
   *
   * @throws PAGE_MISSING, PAGE_CORRUPT, FORMAT_VERSION naming a page of its map
   */
  async taken(key: number): Promise<{ usedBytes: number; sharedBytes: number }> {
    const [usedBytes = 0, sharedBytes = 0] = await settle(() => this.#raw.taken(key))
    return { usedBytes, sharedBytes }
  }

  /** Bytes in sealed layers that each resource refers to; -1 for one whose map cannot be read. */
  totals(keys: Float64Array): Promise<Float64Array> {
    return settle(() => this.#raw.totals(keys))
  }

  /** About how much memory this takes. */
  memoryBytes(): Promise<number> {
    return settle(() => this.#raw.memoryBytes())
  }

  /** Forgets everything and gives its memory back, which the collector would do at some time. */
  clear(): void {
    call(() => this.#raw.clear())
  }
}
