/**
 * What each slot of a volume may hold: the oracle lives outside of the daemon and survives its kills. A slot holds its
 * number and a version, repeated; version 0 is zeros, what an empty image has.
 */
export const slotBytes = 4096

export class SlotOracle {
  readonly slotCount: number
  readonly #issued: Uint32Array
  readonly #acknowledged: Uint32Array
  #version = 0

  constructor(slotCount: number) {
    this.slotCount = slotCount
    this.#issued = new Uint32Array(slotCount)
    this.#acknowledged = new Uint32Array(slotCount)
  }

  /** The content of an image in which every slot has a version, which is what it has from now on. */
  fill(): Buffer {
    const version = ++this.#version
    this.#issued.fill(version)
    this.#acknowledged.fill(version)
    return Buffer.concat(Array.from({ length: this.slotCount }, (_, slot) => encodeSlot(slot, version)))
  }

  /** The next content of a slot; from now on it may be found. One write of a slot at a time. */
  issue(slot: number): { version: number; data: Buffer } {
    const version = ++this.#version
    this.#issued[slot] = version
    return { version, data: encodeSlot(slot, version) }
  }

  acknowledge(slot: number, version: number): void {
    this.#acknowledged[slot] = version
  }

  /** Bounds of each slot's version at this moment, for a snapshot that is about to be made. */
  bounds(): { acknowledged: Uint32Array; issued: Uint32Array } {
    return { acknowledged: this.#acknowledged.slice(), issued: this.#issued.slice() }
  }

  /**
   * Compares what a restarted daemon shows with what is possible, and takes it as the new truth. A kill ends the process, not
   * the kernel: everything that was answered must be there, flushed or not, because a client that reconnects never learns
   * that there was a crash. @throws Error naming the slot
   */
  settle(content: Uint8Array, context: string): void {
    this.settleFrom(this.#acknowledged, content, context)
  }

  /** As `settle` where less must be there: at least the versions in `lower`, which were flushed, say. */
  settleFrom(lower: Uint32Array, content: Uint8Array, context: string): void {
    for (let slot = 0; slot < this.slotCount; slot++) {
      const found = decodeSlot(content, slot, context)
      const acknowledged = lower[slot] ?? 0
      const issued = this.#issued[slot] ?? 0
      if (found < acknowledged)
        throw new Error(`${context}: slot ${slot} has version ${found}, but ${acknowledged} was answered: a write is lost`)
      if (found > issued) throw new Error(`${context}: slot ${slot} has version ${found}, but only ${issued} was ever written`)
      this.#issued[slot] = found
      this.#acknowledged[slot] = found
    }
  }
}

/** @throws Error if a slot of a snapshot is not between the two bounds */
export function checkWithin(content: Uint8Array, lower: Uint32Array, upper: Uint32Array, context: string): void {
  for (let slot = 0; slot < lower.length; slot++) {
    const found = decodeSlot(content, slot, context)
    const low = lower[slot] ?? 0
    const high = upper[slot] ?? 0
    if (found < low || found > high)
      throw new Error(`${context}: slot ${slot} has version ${found}, not between ${low} and ${high}`)
  }
}

/** What a slot holds at a version. */
export function encodeSlot(slot: number, version: number): Buffer {
  const pair = Buffer.alloc(8)
  pair.writeUInt32LE(slot, 0)
  pair.writeUInt32LE(version, 4)
  return Buffer.alloc(slotBytes, pair)
}

/** The version in a slot. @throws Error if it is torn or belongs elsewhere */
function decodeSlot(content: Uint8Array, slot: number, context: string): number {
  const bytes = Buffer.from(content.buffer, content.byteOffset + slot * slotBytes, slotBytes)
  const version = bytes.readUInt32LE(4)
  const expected = version === 0 ? Buffer.alloc(slotBytes) : encodeSlot(slot, version)
  if (!bytes.equals(expected)) {
    throw new Error(`${context}: slot ${slot} is torn or foreign (it begins with ${bytes.subarray(0, 16).toString('hex')})`)
  }
  return version
}
