/** Lets one caller in at a time; the others wait in the order they came. */
export class Mutex {
  #held = false
  readonly #waiting: (() => void)[] = []

  /** Resolves when the caller has it; the value lets go of it (calling that twice is harmless). */
  async acquire(): Promise<() => void> {
    if (this.#held) await new Promise<void>((resolve) => this.#waiting.push(resolve))
    this.#held = true
    let released = false
    return () => {
      if (released) return
      released = true
      const next = this.#waiting.shift()
      // Handed over without a gap, so that nobody who comes now overtakes those who wait.
      if (next === undefined) this.#held = false
      else next()
    }
  }

  /** Runs `fn` alone. */
  async run<T>(fn: () => Promise<T> | T): Promise<T> {
    const release = await this.acquire()
    try {
      return await fn()
    } finally {
      release()
    }
  }

  /** Whether somebody has it. */
  get isHeld(): boolean {
    return this.#held
  }

  get waitingCount(): number {
    return this.#waiting.length
  }
}
