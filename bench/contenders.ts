/** What one row compares: disks of the same content behind different servers, driven by the same fio job in turns. */
import { type FioJob, type FioResult, type FioTarget, runFio } from './fio.ts'
import { median, type Row } from './table.ts'

/** A disk that can be driven; `prepare` makes it new for a round where the job needs that. */
export interface Contender {
  readonly name: string
  /** The disk for this round. */
  prepare(round: number): Promise<FioTarget>
  /** After the round: what was made for it is thrown away. */
  finish?(round: number): Promise<void>
}

export interface Comparison {
  readonly name: string
  readonly job: Omit<FioJob, 'seed'>
  readonly ours: Contender
  readonly peers: readonly { readonly contender: Contender; readonly target: number | null }[]
}

/** Runs every contender once in each round, in an order that turns, and compares the medians. */
export async function compare(comparison: Comparison, rounds: number): Promise<Row[]> {
  const all = [comparison.ours, ...comparison.peers.map((peer) => peer.contender)]
  const results = new Map<string, FioResult[]>(all.map((contender) => [contender.name, []]))
  for (let round = 0; round < rounds; round += 1) {
    for (let turn = 0; turn < all.length; turn += 1) {
      const contender = all[(round + turn) % all.length] as Contender
      const target = await contender.prepare(round)
      try {
        results.get(contender.name)?.push(await runFio(target, { ...comparison.job, seed: 1000 + round }))
      } finally {
        await contender.finish?.(round)
      }
    }
  }
  const isSequential = !comparison.job.rw.startsWith('rand')
  const valueOf = (name: string): number => {
    const values = results.get(name) ?? []
    return median(values.map((result) => (isSequential ? result.bytesPerSecond / 2 ** 20 : result.operationsPerSecond)))
  }
  const ours = valueOf(comparison.ours.name)
  return comparison.peers.map(({ contender, target }) => {
    const theirs = valueOf(contender.name)
    const unit = isSequential ? 'MiB/s' : 'IOPS'
    return { name: comparison.name, unit, peer: contender.name, ours, theirs, ratio: ours / theirs, target }
  })
}
