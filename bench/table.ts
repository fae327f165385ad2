/** What a run found: one row for each figure and peer, printed beside its target and written as JSON. */
export interface Row {
  readonly name: string
  readonly unit: string
  readonly peer: string
  readonly ours: number
  readonly theirs: number
  /** How many times better ours is: above 1 is better, whichever way the unit points. */
  readonly ratio: number
  /** Ratio that we hold ourselves to; null: only reported. */
  readonly target: number | null
}

export interface Figure {
  readonly name: string
  readonly unit: string
  readonly value: number
  /** Upper bound that we hold ourselves to; null: only reported. */
  readonly limit: number | null
}

export interface Document {
  readonly machine: {
    readonly cpus: number
    readonly model: string
    readonly kernel: string
    readonly memory: string
    readonly disk: string
    readonly loadBefore: string
  }
  readonly rounds: number
  readonly seconds: number
  readonly rows: Row[]
  readonly figures: Figure[]
  /** What was not compared, and why. */
  readonly skipped: string[]
}

export function median(values: readonly number[]): number {
  const sorted = values.toSorted((a, b) => a - b)
  const middle = Math.floor(sorted.length / 2)
  return sorted.length % 2 === 1 ? (sorted[middle] ?? NaN) : ((sorted[middle - 1] ?? NaN) + (sorted[middle] ?? NaN)) / 2
}

export function rowLine(row: Row): string {
  const verdict = row.target === null ? '' : row.ratio >= row.target ? `>= ${row.target}` : `BELOW ${row.target}`
  const columns = [
    row.name.padEnd(54),
    row.peer.padEnd(16),
    short(row.ours).padStart(10),
    short(row.theirs).padStart(10),
    row.unit.padEnd(6),
    `${row.ratio.toFixed(2)}x`.padStart(8),
    verdict,
  ]
  return columns.join(' ').trimEnd()
}

export function figureLine(figure: Figure): string {
  const { limit } = figure
  const verdict = limit === null ? '' : figure.value <= limit ? `<= ${limit}` : `OVER ${limit}`
  return [figure.name.padEnd(71), short(figure.value).padStart(10), figure.unit.padEnd(6), verdict].join(' ').trimEnd()
}

export const heading = `${'WHAT'.padEnd(54)} ${'PEER'.padEnd(16)} ${'OURS'.padStart(10)} ${'PEER'.padStart(10)} ${'UNIT'.padEnd(6)} ${'RATIO'.padStart(8)} TARGET`

function short(value: number): string {
  if (value >= 10_000) return `${(value / 1000).toFixed(1)}k`
  return value >= 100 ? value.toFixed(0) : value.toFixed(2)
}
