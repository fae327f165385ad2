/** Clients that write without a pause, each slot with a new version every time, and an oracle that knows what was answered. */
import { connect, type NbdConnection } from '@atoll/nbd-client'
import { type SlotOracle, slotBytes } from '../kill/slot-oracle.ts'

const connectionCount = 2
/** Requests under way on each connection. */
const depth = 8
const writesPerFlush = 32

export class Load {
  readonly oracle: SlotOracle
  /** Writes that were answered. */
  acknowledged = 0
  readonly #connections: NbdConnection[] = []
  #running: Promise<unknown> = Promise.resolve()
  #isStopping = false

  private constructor(oracle: SlotOracle) {
    this.oracle = oracle
  }

  /** `oracle`: of the volume, which holds what that says. */
  static async start(uri: string, oracle: SlotOracle): Promise<Load> {
    const load = new Load(oracle)
    for (let index = 0; index < connectionCount; index++) load.#connections.push(await connect(uri))
    const writers = load.#connections.flatMap((connection, index) =>
      Array.from({ length: depth }, (_, place) => load.#write(connection, index * depth + place)),
    )
    load.#running = Promise.all(writers)
    // Whoever stops it hears of it; until then it is nobody's.
    load.#running.catch(() => {})
    return load
  }

  /** Ends when what is under way is answered. @throws what a client was answered instead */
  async stop(): Promise<void> {
    this.#isStopping = true
    try {
      await this.#running
    } finally {
      for (const connection of this.#connections) await connection[Symbol.asyncDispose]()
    }
  }

  /** As `stop`, for a load whose daemon ends before: writes that were not answered may have happened or not. */
  async abandon(): Promise<void> {
    await this.stop().catch(() => {})
  }

  /** Each writer has slots of its own, so that the last version that was answered is what is there. */
  async #write(connection: NbdConnection, writer: number): Promise<void> {
    const writerCount = connectionCount * depth
    for (let count = 0, slot = writer; !this.#isStopping; count++, slot += writerCount) {
      if (slot >= this.oracle.slotCount) slot = writer
      const { version, data } = this.oracle.issue(slot)
      await connection.write(slot * slotBytes, data)
      this.oracle.acknowledge(slot, version)
      this.acknowledged += 1
      if (count % writesPerFlush === writer) await connection.flush()
    }
  }
}

/** Compares the volume with what was answered. */
export async function compare(uri: string, oracle: SlotOracle, context: string): Promise<void> {
  await using connection = await connect(uri)
  const pieceBytes = 2 ** 20
  const pieces: Buffer[] = []
  for (let at = 0; at < oracle.slotCount * slotBytes; at += pieceBytes)
    pieces.push(Buffer.from(await connection.read(at, Math.min(pieceBytes, oracle.slotCount * slotBytes - at))))
  oracle.settle(Buffer.concat(pieces), context)
}
