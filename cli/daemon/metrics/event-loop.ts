// How long the event loop was held up: of the last whole window, so that whoever asks how often takes nothing from others.
import { monitorEventLoopDelay } from 'node:perf_hooks'

const windowMs = 10_000
/** How finely delays are seen; this often the process wakes up for it. */
const resolutionMs = 50

export interface EventLoopDelay {
  readonly p99Seconds: number
  readonly maxSeconds: number
}

export class EventLoopMonitor {
  readonly #delays = monitorEventLoopDelay({ resolution: resolutionMs })
  readonly #timer: NodeJS.Timeout
  #last: EventLoopDelay = { p99Seconds: 0, maxSeconds: 0 }

  constructor() {
    this.#delays.enable()
    this.#timer = setInterval(() => {
      this.#last = this.#window()
      this.#delays.reset()
    }, windowMs)
    this.#timer.unref()
  }

  /** Of the last whole window, or of the present one if that is worse already. */
  delay(): EventLoopDelay {
    const now = this.#window()
    return now.maxSeconds > this.#last.maxSeconds ? now : this.#last
  }

  close(): void {
    clearInterval(this.#timer)
    this.#delays.disable()
  }

  #window(): EventLoopDelay {
    // A timer that is due every `resolutionMs`: what is above that is delay. Nothing was seen yet: NaN and 0.
    const over = (nanoseconds: number): number => Math.max(0, nanoseconds / 1e9 - resolutionMs / 1000) || 0
    return { p99Seconds: over(this.#delays.percentile(99)), maxSeconds: over(this.#delays.max) }
  }
}
