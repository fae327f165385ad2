/** Randomness from a seed: the same seed replays the same run on every machine (splitmix64). */
const mask = (1n << 64n) - 1n

export class Random {
  #state: bigint

  constructor(seed: number) {
    this.#state = BigInt(seed) & mask
  }

  /** A whole number below `limit` (1 … 2^53). */
  below(limit: number): number {
    return Number(this.#next() % BigInt(limit))
  }

  /** A whole number from `min` to `max`, both included. */
  between(min: number, max: number): number {
    return min + this.below(max - min + 1)
  }

  chance(percent: number): boolean {
    return this.below(100) < percent
  }

  /** @throws RangeError if there is nothing to pick from */
  pick<T>(items: readonly T[]): T {
    const item = items[this.below(Math.max(items.length, 1))]
    if (item === undefined) throw new RangeError('nothing to pick from')
    return item
  }

  #next(): bigint {
    this.#state = (this.#state + 0x9e3779b97f4a7c15n) & mask
    let x = this.#state
    x = ((x ^ (x >> 30n)) * 0xbf58476d1ce4e5b9n) & mask
    x = ((x ^ (x >> 27n)) * 0x94d049bb133111ebn) & mask
    return x ^ (x >> 31n)
  }
}
