/**
 * A lock that many hold together, or one alone. Who asks for it alone comes before whoever asks later, so nobody waits for ever.
 */
export class SharedLock {
  #sharedCount = 0
  #isAlone = false
  readonly #waiting: { alone: boolean; start: () => void }[] = []

  async shared<T>(fn: () => Promise<T>): Promise<T> {
    return await this.#run(false, fn)
  }

  async alone<T>(fn: () => Promise<T>): Promise<T> {
    return await this.#run(true, fn)
  }

  async #run<T>(alone: boolean, fn: () => Promise<T>): Promise<T> {
    await new Promise<void>((start) => {
      this.#waiting.push({ alone, start })
      this.#admit()
    })
    try {
      return await fn()
    } finally {
      if (alone) this.#isAlone = false
      else this.#sharedCount -= 1
      this.#admit()
    }
  }

  #admit(): void {
    for (let next = this.#waiting[0]; next !== undefined; next = this.#waiting[0]) {
      if (this.#isAlone || (next.alone && this.#sharedCount > 0)) return
      this.#waiting.shift()
      if (next.alone) this.#isAlone = true
      else this.#sharedCount += 1
      next.start()
    }
  }
}
