/** kill -9 of the real daemon while files are put; 100 kills with ATOLL_TEST_CRASH=full. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { runFileKills } from './file-kills.ts'

const full = process.env['ATOLL_TEST_CRASH'] === 'full'
const seed = Number(process.env['ATOLL_SEED'] ?? '20261121')
const killCount = full ? 100 : 6

test(
  `${killCount} kills of the daemon while files are put and deleted leave whole files and nothing else`,
  async () => {
    const home = await mkdtemp(join(tmpdir(), 'atoll-kills-'))
    try {
      const report = await runFileKills({ home, seed, killCount })
      console.log(`seed ${seed}:`, report)
      expect(report.kills).toBe(killCount)
    } finally {
      await rm(home, { recursive: true, force: true })
    }
  },
  full ? 4 * 3_600_000 : 3_600_000,
)
