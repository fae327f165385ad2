/** The rate of a job over a sliding window, so that it follows what happens now and not what happened an hour ago. */
export const rateWindowMs = 10_000
const samplesMax = 64
const sampleDistanceMs = 100

export class JobRate {
  private samples: { atMs: number; progressBytes: number }[] = []

  /** Takes a sample; several within `sampleDistanceMs` count as one. */
  add(atMs: number, progressBytes: number): void {
    const last = this.samples.at(-1)
    // Progress that goes back is a job that began anew.
    if (last !== undefined && progressBytes < last.progressBytes) this.samples = []
    const previous = this.samples.at(-2)
    if (previous !== undefined && last !== undefined && last.atMs - previous.atMs < sampleDistanceMs) this.samples.pop()
    this.samples.push({ atMs, progressBytes })
    while (
      this.samples.length > samplesMax ||
      (this.samples.length > 2 && atMs - (this.samples[0]?.atMs ?? atMs) > rateWindowMs)
    ) {
      this.samples.shift()
    }
  }

  bytesPerSecond(nowMs: number): number {
    const first = this.samples[0]
    const last = this.samples.at(-1)
    if (first === undefined || last === undefined || nowMs <= first.atMs) return 0
    return Math.round(((last.progressBytes - first.progressBytes) * 1000) / (nowMs - first.atMs))
  }
}
