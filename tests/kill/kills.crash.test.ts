/** kill -9 of the real daemon, sized down for every run; 200 kills with ATOLL_TEST_CRASH=full. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { runKills } from './kills.ts'

const full = process.env['ATOLL_TEST_CRASH'] === 'full'
const seed = Number(process.env['ATOLL_SEED'] ?? '20261121')
const killCount = full ? 200 : 12

test(
  `${killCount} kills of the daemon under four connections at depth 16 lose no answered write and change no snapshot`,
  async () => {
    const home = await mkdtemp(join(tmpdir(), 'atoll-kills-'))
    try {
      const report = await runKills({ home, seed, killCount })
      console.log(`seed ${seed}:`, report)
      expect(report.kills).toBe(killCount)
    } finally {
      await rm(home, { recursive: true, force: true })
    }
  },
  full ? 4 * 3_600_000 : 3_600_000,
)
