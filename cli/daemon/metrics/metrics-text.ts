// The text format of Prometheus (version 0.0.4). By hand: our histograms are counted in the engine, and client libraries only
// take those that they count themselves; what is left is these few lines, which promtool checks in a test.
import type { Latencies } from '@atoll/core'

export const metricsContentType = 'text/plain; version=0.0.4; charset=utf-8'

export type Labels = Readonly<Record<string, string>>
export type Sample = readonly [labels: Labels, value: number]

/** Every fourth bucket or so is enough to see a latency by, and keeps a scrape small. */
const shownBucketEndsSecondsMin = 8e-6

export class MetricsText {
  readonly #lines: string[] = []
  /** Which buckets of a histogram end where a shown one does. */
  readonly #shownBuckets: readonly { readonly index: number; readonly le: string }[]

  /** `bucketEndsSeconds`: of the histograms that will be written. */
  constructor(bucketEndsSeconds: readonly number[]) {
    this.#shownBuckets = bucketEndsSeconds
      .map((end, index) => ({ end, index }))
      // One for each power of four.
      .filter(({ end, index }) => end >= shownBucketEndsSecondsMin && (index - firstShown(bucketEndsSeconds)) % 8 === 0)
      .map(({ end, index }) => ({ index, le: String(end) }))
  }

  /** A value that goes up and down. */
  gauge(name: string, help: string, samples: readonly Sample[]): void {
    this.#family(name, 'gauge', help, samples)
  }

  /** A value that only grows while the process lives; its name ends with `_total`. */
  counter(name: string, help: string, samples: readonly Sample[]): void {
    this.#family(name, 'counter', help, samples)
  }

  /** How long things took; its name ends with `_seconds`. */
  histogram(name: string, help: string, samples: readonly (readonly [Labels, Latencies])[]): void {
    if (samples.length === 0) return
    this.#head(name, 'histogram', help)
    for (const [labels, { counts, sumSeconds }] of samples) {
      let [seen, at] = [0, 0]
      for (const { index, le } of this.#shownBuckets) {
        for (; at <= index; at += 1) seen += counts[at] ?? 0
        this.#line(`${name}_bucket`, { ...labels, le }, seen)
      }
      for (; at < counts.length; at += 1) seen += counts[at] ?? 0
      this.#line(`${name}_bucket`, { ...labels, le: '+Inf' }, seen)
      this.#line(`${name}_sum`, labels, sumSeconds)
      this.#line(`${name}_count`, labels, seen)
    }
  }

  toString(): string {
    return this.#lines.join('')
  }

  #family(name: string, type: string, help: string, samples: readonly Sample[]): void {
    if (samples.length === 0) return
    this.#head(name, type, help)
    for (const [labels, value] of samples) this.#line(name, labels, value)
  }

  #head(name: string, type: string, help: string): void {
    this.#lines.push(`# HELP ${name} ${escape(help)}\n# TYPE ${name} ${type}\n`)
  }

  #line(name: string, labels: Labels, value: number): void {
    const pairs = Object.entries(labels).map(([label, text]) => `${label}="${escape(text).replaceAll('"', '\\"')}"`)
    this.#lines.push(`${name}${pairs.length === 0 ? '' : `{${pairs.join(',')}}`} ${Number.isFinite(value) ? value : 'NaN'}\n`)
  }
}

function firstShown(bucketEndsSeconds: readonly number[]): number {
  return bucketEndsSeconds.findIndex((end) => end >= shownBucketEndsSecondsMin)
}

function escape(text: string): string {
  return text.replaceAll('\\', '\\\\').replaceAll('\n', '\\n')
}
