/**
 * What a volume may contain after a crash: the value of the last flush or of any write issued since; never an older one,
 * and never zeros unless zeros were written.
 */
const slotBytes = 4096

export class PossibleContent {
  /** The content as the client sees it now. */
  current: Buffer
  /** For each slot: contents it may have, oldest first. */
  #values: Buffer[][]
  /** Flushes that returned inside the operation under way: from this event on, values before these are impossible. */
  #marks: { readonly sequence: number; readonly firstPossible: readonly number[] }[] = []

  constructor(content: Buffer) {
    this.current = Buffer.from(content)
    this.#values = slotsOf(this.current).map((slot) => [Buffer.from(slot)])
  }

  get sizeBytes(): number {
    return this.current.length
  }

  /** A write (or zeros, or a discard) was issued: its bytes, or what was there, or a mixture, may be found. */
  write(offsetBytes: number, data: Buffer): void {
    data.copy(this.current, offsetBytes)
    const first = Math.floor(offsetBytes / slotBytes)
    const end = Math.ceil((offsetBytes + data.length) / slotBytes)
    for (let slot = first; slot < end; slot++) {
      this.#values[slot]?.push(Buffer.from(this.current.subarray(slot * slotBytes, (slot + 1) * slotBytes)))
    }
  }

  /** A flush that covers everything has returned, after event `sequence` of the store. */
  markFlushed(sequence: number): void {
    this.#marks.push({ sequence, firstPossible: this.#values.map((values) => values.length - 1) })
  }

  /** A flush that covers everything has returned. */
  flushed(): void {
    this.#marks = []
    this.#values = slotsOf(this.current).map((slot) => [Buffer.from(slot)])
  }

  /** Grew without a flush: what was possible stays possible, what is new reads as zeros. */
  grow(sizeBytes: number): void {
    const added = Buffer.alloc(sizeBytes - this.current.length)
    this.#values.push(...slotsOf(added).map((slot) => [Buffer.from(slot)]))
    this.current = Buffer.concat([this.current, added])
  }

  /** The size changed; what is new reads as zeros. Only after a flush. */
  resize(sizeBytes: number): void {
    const next = Buffer.alloc(sizeBytes)
    this.current.copy(next, 0, 0, Math.min(sizeBytes, this.current.length))
    this.current = next
    this.flushed()
  }

  copy(): PossibleContent {
    const copy = new PossibleContent(this.current)
    copy.#values = this.#values.map((values) => [...values])
    copy.#marks = [...this.#marks]
    return copy
  }

  /** null, or a sentence about the first byte that cannot be found after a crash just after event `sequence`. */
  findImpossible(found: Buffer, sequence: number): string | null {
    if (found.length !== this.current.length) return `${found.length} bytes instead of ${this.current.length}`
    const mark = this.#marks.findLast((each) => each.sequence <= sequence)
    for (let slot = 0; slot < this.#values.length; slot++) {
      const values = (this.#values[slot] ?? []).slice(mark?.firstPossible[slot] ?? 0)
      const at = slot * slotBytes
      const end = Math.min(at + slotBytes, found.length)
      if (values.some((value) => found.compare(value, 0, end - at, at, end) === 0)) continue
      // Two unsynced writes to parts of one slot survive independently, so each byte stands for itself.
      for (let byte = at; byte < end; byte++) {
        if (values.some((value) => value[byte - at] === found[byte])) continue
        const word = byte - ((byte - at) % 4)
        const wanted = values.map((value) => value.readUInt32LE(word - at).toString(16))
        return `slot ${slot} (of ${this.#values.length}), byte ${byte - at}: found ${found.readUInt32LE(word).toString(16)}, possible were ${wanted.join(' ')}`
      }
    }
    return null
  }
}

function slotsOf(content: Buffer): Buffer[] {
  const slots: Buffer[] = []
  for (let at = 0; at < content.length; at += slotBytes) slots.push(content.subarray(at, at + slotBytes))
  return slots
}
