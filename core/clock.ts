/** Time is handed in, so that a test decides what time it is. */
export interface Clock {
  /** Milliseconds since 1970; may jump when the machine's time is set. For records that people read. */
  nowMs(): number
  /** Milliseconds since some moment; never goes back. For durations and deadlines. */
  monotonicMs(): number
}

export const systemClock: Clock = {
  nowMs: () => Date.now(),
  monotonicMs: () => performance.now(),
}

/** A clock that stands still until it is told otherwise. */
export class ManualClock implements Clock {
  #nowMs: number
  #monotonicMs = 0

  constructor(startMs = 1_700_000_000_000) {
    this.#nowMs = startMs
  }

  nowMs(): number {
    return this.#nowMs
  }

  monotonicMs(): number {
    return this.#monotonicMs
  }

  advance(durationMs: number): void {
    this.#nowMs += durationMs
    this.#monotonicMs += durationMs
  }
}
