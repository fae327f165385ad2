/**
 * Which bytes of [0, length) have arrived: sorted, disjoint, never touching intervals. Chunks in order cost one interval in
 * total; a sender that scatters them cannot make the list longer than `intervalCountMax`.
 */
export class IntervalCover {
  readonly #lengthBytes: number
  readonly #intervalCountMax: number
  #starts: number[] = []
  #ends: number[] = []

  constructor(lengthBytes: number, intervalCountMax: number) {
    this.#lengthBytes = lengthBytes
    this.#intervalCountMax = intervalCountMax
  }

  /** Adds [start, start + length). Says why not when it is empty, outside, overlaps, or the list is full. */
  add(start: number, lengthBytes: number): 'added' | 'empty' | 'outside' | 'overlap' | 'too-many' {
    if (lengthBytes === 0) return 'empty'
    const end = start + lengthBytes
    if (start < 0 || end > this.#lengthBytes) return 'outside'
    let low = 0
    let high = this.#starts.length
    while (low < high) {
      const middle = (low + high) >>> 1
      if (this.#starts[middle]! < start) low = middle + 1
      else high = middle
    }
    const previousEnd = low > 0 ? this.#ends[low - 1]! : -1
    const nextStart = low < this.#starts.length ? this.#starts[low]! : Number.POSITIVE_INFINITY
    if (previousEnd > start || nextStart < end) return 'overlap'
    if (previousEnd === start && nextStart === end) {
      this.#ends[low - 1] = this.#ends[low]!
      this.#starts.splice(low, 1)
      this.#ends.splice(low, 1)
    } else if (previousEnd === start) {
      this.#ends[low - 1] = end
    } else if (nextStart === end) {
      this.#starts[low] = start
    } else {
      if (this.#starts.length === this.#intervalCountMax) return 'too-many'
      this.#starts.splice(low, 0, start)
      this.#ends.splice(low, 0, end)
    }
    return 'added'
  }

  /** Every byte has arrived. */
  get complete(): boolean {
    return this.#lengthBytes === 0 || (this.#starts.length === 1 && this.#starts[0] === 0 && this.#ends[0] === this.#lengthBytes)
  }
}
