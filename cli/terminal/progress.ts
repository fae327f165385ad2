// Progress of long work on a terminal: one line that is written over, with bytes, rate and time left.
import type { Writable } from 'node:stream'
import { formatBytes, formatSeconds } from './format-bytes.ts'

/** How far something is; null: not known. */
export interface Progress {
  readonly progressBytes: number
  readonly totalBytes: number | null
  readonly rateBytesPerSecond: number
  readonly secondsLeft: number | null
  /** Why it does not go on at present. */
  readonly waiting?: string | null
}

/** `42 %  4.2 GiB of 10 GiB  310 MiB/s  19 s left`, without the parts that are not known. */
export function describeProgress(progress: Progress): string {
  const { progressBytes, totalBytes, rateBytesPerSecond, secondsLeft } = progress
  const parts: string[] = []
  if (totalBytes !== null && totalBytes > 0) parts.push(`${Math.floor((progressBytes / totalBytes) * 100)} %`)
  parts.push(totalBytes === null ? formatBytes(progressBytes) : `${formatBytes(progressBytes)} of ${formatBytes(totalBytes)}`)
  if (rateBytesPerSecond > 0) parts.push(`${formatBytes(rateBytesPerSecond)}/s`)
  if (secondsLeft !== null && secondsLeft > 0) parts.push(`${formatSeconds(secondsLeft)} left`)
  if (typeof progress.waiting === 'string') parts.push(`waiting: ${progress.waiting}`)
  return parts.join('  ')
}

/** Shows progress on `output` if that is a terminal, and nothing otherwise. */
export class ProgressLine {
  private readonly output: Writable & { isTTY?: boolean; columns?: number }
  private readonly label: string
  private shown = false

  constructor(label: string, output: Writable & { isTTY?: boolean; columns?: number }) {
    this.label = label
    this.output = output
  }

  update(progress: Progress): void {
    if (this.output.isTTY !== true) return
    this.shown = true
    // Back to the first column, clear to the end of the line.
    const line = `${this.label}  ${describeProgress(progress)}`
    this.output.write(`\r\u001b[K${line.slice(0, (this.output.columns ?? line.length + 1) - 1)}`)
  }

  /** Leaves the last state on a line of its own. */
  end(): void {
    if (this.shown) this.output.write('\n')
    this.shown = false
  }
}
