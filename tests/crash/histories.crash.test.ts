/**
 * Crash histories, sized down for every run; `npm run test:crash` (ATOLL_TEST_CRASH=full) makes them a 20,000-operation run
 * with 20 subsets of each boundary, in two processes that share the boundaries.
 */
import { execFile } from 'node:child_process'
import { availableParallelism } from 'node:os'
import { join } from 'node:path'
import { promisify } from 'node:util'
import { expect, test } from 'vitest'
import type { HistoryReport } from './history.ts'

const run = promisify(execFile)
const full = process.env['ATOLL_TEST_CRASH'] === 'full'
const seed = Number(process.env['ATOLL_SEED'] ?? '20261121')
const size = full
  ? { operations: 20_000, draws: 20, parts: Math.min(availableParallelism(), 4) }
  : { operations: 500, draws: 4, parts: 1 }
const timeoutMs = (full ? 12 : 1) * 3_600_000

async function runPart(part: number, ...options: string[]): Promise<HistoryReport> {
  const args = { seed, operations: size.operations, draws: size.draws, part, parts: size.parts }
  const { stdout } = await run(
    process.execPath,
    [
      join(import.meta.dirname, 'run-history.ts'),
      ...Object.entries(args).flatMap(([name, value]) => [`--${name}`, String(value)]),
      ...options,
    ],
    { maxBuffer: 64 << 20 },
  )
  return JSON.parse(stdout) as HistoryReport
}

test.each([
  ['volumes', []],
  ['volumes and files', ['--files']],
])(
  `no power cut at any sync or commit of ${size.operations} operations on %s loses, changes, resurrects or leaks anything`,
  async (_what, options) => {
    const reports = await Promise.all(Array.from({ length: size.parts }, (_, part) => runPart(part, ...options)))
    const states = reports.reduce((sum, report) => sum + report.states, 0)
    console.log(`seed ${seed}: ${reports[0]?.boundaries} boundaries, ${states} crash states`, reports[0]?.byOperation)
    expect(reports[0]?.operations).toBe(size.operations)
    expect(states).toBeGreaterThan(size.operations)
  },
  timeoutMs,
)
