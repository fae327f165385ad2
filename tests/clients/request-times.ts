// A client that writes and reads slots one after the other and remembers how long the slowest of them took.
import { connect, type NbdConnection } from '@atoll/nbd-client'
import { slotBytes } from '../kill/slot-oracle.ts'

export interface SlowestRequests {
  readonly writeMs: number
  readonly readMs: number
  readonly requests: number
}

/** Writes a slot, reads it again and compares, over and over, with a flush now and then. */
export class RequestTimes {
  readonly #connection: NbdConnection
  readonly #done: Promise<void>
  #stopping = false
  #writeMs = 0
  #readMs = 0
  #requests = 0

  private constructor(connection: NbdConnection) {
    this.#connection = connection
    this.#done = this.#work()
    // Whoever stops it learns of a failure.
    this.#done.catch(() => undefined)
  }

  static async start(uri: string): Promise<RequestTimes> {
    return new RequestTimes(await connect(uri))
  }

  /** The slowest since the last call. */
  take(): SlowestRequests {
    const slowest = { writeMs: this.#writeMs, readMs: this.#readMs, requests: this.#requests }
    this.#writeMs = this.#readMs = this.#requests = 0
    return slowest
  }

  /** @throws what a request failed with */
  async stop(): Promise<void> {
    this.#stopping = true
    await this.#done
    await this.#connection.disconnect()
  }

  async #work(): Promise<void> {
    const slots = this.#connection.sizeBytes / slotBytes
    for (let round = 1; !this.#stopping; round += 1) {
      const slot = (round * 7919) % slots
      const data = Buffer.alloc(slotBytes, round % 251)
      const writtenAt = performance.now()
      await this.#connection.write(slot * slotBytes, data)
      const readAt = performance.now()
      const found = await this.#connection.read(slot * slotBytes, slotBytes)
      const endedAt = performance.now()
      if (!data.equals(found)) throw new Error(`slot ${slot} has other bytes than were written in round ${round}`)
      this.#writeMs = Math.max(this.#writeMs, readAt - writtenAt)
      this.#readMs = Math.max(this.#readMs, endedAt - readAt)
      this.#requests += 2
      if (round % 256 === 0) await this.#connection.flush()
    }
  }
}
