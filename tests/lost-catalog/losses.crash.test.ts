/** kill -9 and the loss of the catalog, sized down for every run; 60 rounds with ATOLL_TEST_CRASH=full. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { runLosses } from './losses.ts'

const full = process.env['ATOLL_TEST_CRASH'] === 'full'
const seed = Number(process.env['ATOLL_SEED'] ?? '20261121')
const roundCount = full ? 60 : 3

test(
  `${roundCount} times the daemon is killed under load and its catalog lost: an import brings back all that was answered`,
  async () => {
    const home = await mkdtemp(join(tmpdir(), 'atoll-losses-'))
    try {
      const report = await runLosses({ home, seed, roundCount })
      console.log(`seed ${seed}:`, report)
      expect(report.rounds).toBe(roundCount)
    } finally {
      await rm(home, { recursive: true, force: true })
    }
  },
  full ? 4 * 3_600_000 : 3_600_000,
)
