import { stringBytesMax } from './protocol.ts'

const decoder = new TextDecoder('utf-8', { fatal: true, ignoreBOM: true })

/** A string of the protocol: UTF-8, without NUL, at most 4096 bytes. Null if it is anything else. */
export function decodeText(bytes: Uint8Array): string | null {
  if (bytes.length > stringBytesMax || bytes.includes(0)) return null
  try {
    return decoder.decode(bytes)
  } catch {
    return null
  }
}

/** As much of `text` as fits into a string of the protocol, cut between characters. */
export function encodeText(text: string): Buffer {
  const bytes = Buffer.from(text.replaceAll('\0', ' '))
  if (bytes.length <= stringBytesMax) return bytes
  let end = stringBytesMax
  // A continuation byte at the cut belongs to a character that began before it.
  while ((bytes[end]! & 0xc0) === 0x80) end -= 1
  return bytes.subarray(0, end)
}

/** Takes an option's data apart; every method gives null past the end, never a part. */
export class OptionReader {
  readonly #data: Buffer
  #at = 0

  constructor(data: Buffer) {
    this.#data = data
  }

  get leftBytes(): number {
    return this.#data.length - this.#at
  }

  uint16(): number | null {
    if (this.leftBytes < 2) return null
    this.#at += 2
    return this.#data.readUInt16BE(this.#at - 2)
  }

  uint32(): number | null {
    if (this.leftBytes < 4) return null
    this.#at += 4
    return this.#data.readUInt32BE(this.#at - 4)
  }

  /** A string behind its length. */
  countedText(): string | null {
    const lengthBytes = this.uint32()
    if (lengthBytes === null || lengthBytes > this.leftBytes) return null
    this.#at += lengthBytes
    return decodeText(this.#data.subarray(this.#at - lengthBytes, this.#at))
  }
}
