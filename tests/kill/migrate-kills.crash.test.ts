/** kill -9 of the real daemon while everything moves between two pools of files; 60 kills with ATOLL_TEST_CRASH=full. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { expect, test } from 'vitest'
import { runMigrateKills } from './migrate-kills.ts'

const full = process.env['ATOLL_TEST_CRASH'] === 'full'
const seed = Number(process.env['ATOLL_SEED'] ?? '20261122')
const killCount = full ? 60 : 5

test(
  `${killCount} kills of the daemon while a volume, its snapshots and clones move lose nothing and leave nothing behind`,
  async () => {
    const home = await mkdtemp(join(tmpdir(), 'atoll-kills-'))
    try {
      const other = { driver: 'file', options: { path: join(home, 'pools', 'other') } }
      const report = await runMigrateKills({ home, seed, killCount, other })
      console.log(`seed ${seed}:`, report)
      expect(report.kills).toBe(killCount)
    } finally {
      await rm(home, { recursive: true, force: true })
    }
  },
  full ? 4 * 3_600_000 : 3_600_000,
)
