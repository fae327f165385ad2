/** A change that was answered. */
export interface Change {
  readonly kind: 'write' | 'trim' | 'zeroes' | 'allocate-zeroes'
  readonly offsetBytes: number
  readonly lengthBytes: number
  /** Of a write; null for the others. */
  readonly data: Uint8Array | null
}

/** What a change without data counts: its record must be bounded too. */
const recordBytes = 128

/**
 * Changes that the server has answered since the last flush, in the order of their answers. All of them are kept, also those
 * with FUA: a lost older write that is sent again must be followed by the newer one that survived.
 */
export class UnflushedChanges {
  readonly #bytesMax: number
  #changes: Change[] = []
  /** Number of the first change kept; numbers only grow, so a mark stays valid. */
  #firstNumber = 0
  #bytes = 0

  constructor(bytesMax: number) {
    this.#bytesMax = bytesMax
  }

  /** Whether keeping `change` stays within the bound. An empty record has room for anything. */
  hasRoomFor(change: Change): boolean {
    return this.#bytesMax === 0 || this.#changes.length === 0 || this.#bytes + costBytes(change) <= this.#bytesMax
  }

  /** Keeps a copy. */
  add(change: Change): void {
    if (this.#bytesMax === 0) return
    this.#changes.push({ ...change, data: change.data === null ? null : change.data.slice() })
    this.#bytes += costBytes(change)
  }

  /** The point up to which a flush that is sent now vouches. */
  mark(): number {
    return this.#firstNumber + this.#changes.length
  }

  /** The flush sent at `mark` was answered. */
  flushed(mark: number): void {
    const count = Math.max(0, mark - this.#firstNumber)
    for (const change of this.#changes.splice(0, count)) this.#bytes -= costBytes(change)
    this.#firstNumber += count
  }

  /** Oldest first. */
  changes(): readonly Change[] {
    return this.#changes.slice()
  }
}

function costBytes(change: Change): number {
  return recordBytes + (change.data?.length ?? 0)
}
