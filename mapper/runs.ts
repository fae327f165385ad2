/** Sets of slots as the engine gives them: triples (start slot, slot count, owner), ascending, not overlapping. */

export const noRuns = new Float64Array()

export function slotCountOf(runs: Float64Array): number {
  let count = 0
  for (let at = 1; at < runs.length; at += 3) count += runs[at] ?? 0
  return count
}

/** What is in either. The owner of every run is `owner`. */
export function unionOfRuns(a: Float64Array, b: Float64Array, owner: number): Float64Array {
  if (a.length === 0) return b
  if (b.length === 0) return a
  const out: number[] = []
  let [atA, atB] = [0, 0]
  let start = -1
  let end = -1
  while (atA < a.length || atB < b.length) {
    const fromA = atB >= b.length || (atA < a.length && (a[atA] as number) <= (b[atB] as number))
    const source = fromA ? a : b
    const at = fromA ? atA : atB
    if (fromA) atA += 3
    else atB += 3
    const nextStart = source[at] as number
    const nextEnd = nextStart + (source[at + 1] as number)
    if (nextStart <= end) {
      end = Math.max(end, nextEnd)
      continue
    }
    if (start >= 0) out.push(start, end - start, owner)
    start = nextStart
    end = nextEnd
  }
  if (start >= 0) out.push(start, end - start, owner)
  return Float64Array.from(out)
}

/** What is in both. */
export function intersectRuns(a: Float64Array, b: Float64Array): Float64Array {
  return subtractRuns(a, subtractRuns(a, b))
}

/** What is in `a` and not in `b`. */
export function subtractRuns(a: Float64Array, b: Float64Array): Float64Array {
  if (a.length === 0 || b.length === 0) return a
  const out: number[] = []
  let atB = 0
  for (let atA = 0; atA < a.length; atA += 3) {
    let start = a[atA] as number
    const end = start + (a[atA + 1] as number)
    const owner = a[atA + 2] as number
    while (atB < b.length && (b[atB] as number) + (b[atB + 1] as number) <= start) atB += 3
    for (let at = atB; at < b.length && (b[at] as number) < end && start < end; at += 3) {
      const hole = b[at] as number
      if (hole > start) out.push(start, hole - start, owner)
      start = Math.max(start, hole + (b[at + 1] as number))
    }
    if (start < end) out.push(start, end - start, owner)
  }
  return Float64Array.from(out)
}

/** What lies before `endSlot`. */
export function clipRuns(runs: Float64Array, endSlot: number): Float64Array {
  const out: number[] = []
  for (let at = 0; at < runs.length; at += 3) {
    const start = runs[at] as number
    if (start >= endSlot) break
    out.push(start, Math.min(runs[at + 1] as number, endSlot - start), runs[at + 2] as number)
  }
  return Float64Array.from(out)
}
