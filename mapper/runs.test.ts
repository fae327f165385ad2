import { describe, expect, it } from 'vitest'
import { slotCountOf, subtractRuns, unionOfRuns } from './runs.ts'
import { Random } from './test-bench.ts'

const owner = 7

function runsOf(slots: ReadonlySet<number>): Float64Array {
  const out: number[] = []
  for (const slot of [...slots].toSorted((a, b) => a - b)) {
    const last = out.length - 3
    if (last >= 0 && (out[last] as number) + (out[last + 1] as number) === slot) out[last + 1] = (out[last + 1] as number) + 1
    else out.push(slot, 1, owner)
  }
  return Float64Array.from(out)
}

function slotsOf(runs: Float64Array): number[] {
  const slots: number[] = []
  for (let at = 0; at < runs.length; at += 3)
    for (let slot = runs[at] as number; slot < (runs[at] as number) + (runs[at + 1] as number); slot += 1) slots.push(slot)
  return slots
}

describe('sets of slots', () => {
  it('are united and subtracted as sets are, ascending and without overlaps', () => {
    for (let seed = 1; seed <= 300; seed += 1) {
      const random = new Random(seed)
      const some = () => new Set(Array.from({ length: random.below(30) }, () => random.below(40)))
      const [a, b] = [some(), some()]
      const union = unionOfRuns(runsOf(a), runsOf(b), owner)
      expect(slotsOf(union), `seed ${seed}`).toEqual([...a.union(b)].toSorted((x, y) => x - y))
      expect(slotCountOf(union)).toBe(a.union(b).size)
      expect(slotsOf(subtractRuns(runsOf(a), runsOf(b))), `seed ${seed}`).toEqual([...a.difference(b)].toSorted((x, y) => x - y))
    }
  })
})
