/** Crash histories of moves between two pools, sized down for every run; ATOLL_TEST_CRASH=full makes them long. */
import { expect, test } from 'vitest'
import { runMoveHistory } from './move-history.ts'

const full = process.env['ATOLL_TEST_CRASH'] === 'full'
const seed = Number(process.env['ATOLL_SEED'] ?? '1')
const size = full ? { operationCount: 4000, drawsPerBoundary: 8 } : { operationCount: 70, drawsPerBoundary: 2 }
const timeoutMs = (full ? 12 : 1) * 3_600_000

test(
  `no power cut at any sync or commit of ${size.operationCount} operations on a volume that moves loses or changes anything`,
  async () => {
    const report = await runMoveHistory({ seed, ...size })
    console.log(`seed ${seed}: ${report.boundaries} boundaries, ${report.states} crash states`, report.byOperation)
    expect(report.operations).toBe(size.operationCount)
    expect(report.byOperation['move']).toBeGreaterThan(20)
    expect(report.states).toBeGreaterThan(size.operationCount)
  },
  timeoutMs,
)
