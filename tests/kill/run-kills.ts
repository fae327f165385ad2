/**
 * `node run-kills.ts --seed N --kills N [--dir DIR] [--pool-driver DRIVER [--across]] [--migrate]`: kills the real daemon N times under
 * load; its report as JSON. `--pool-driver ceph` starts a cluster and has the volume there, with `--across` its image on files. With
 * `--migrate` a volume, its snapshots and clones move between a pool of files and one of that driver, to and fro, meanwhile.
 */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { CephCluster } from '@atoll/southbound/ceph-cluster'
import { runKills } from './kills.ts'
import { runMigrateKills } from './migrate-kills.ts'

const { values } = parseArgs({
  options: {
    seed: { type: 'string', default: '1' },
    kills: { type: 'string', default: '10' },
    dir: { type: 'string', default: tmpdir() },
    'pool-driver': { type: 'string', default: 'file' },
    across: { type: 'boolean', default: false },
    migrate: { type: 'boolean', default: false },
  },
})
const driver = values['pool-driver']
const cluster = driver === 'ceph' ? await CephCluster.start() : null
const home = await mkdtemp(join(values.dir, 'atoll-kills-'))
try {
  const common = {
    home,
    seed: Number(values.seed),
    killCount: Number(values.kills),
    onProgress: (text: string): void => void process.stderr.write(`${text}\n`),
  }
  const options = cluster === null ? { path: join(home, 'pools', 'other') } : cluster.optionsIn('kills')
  const report = values.migrate
    ? await runMigrateKills({ ...common, other: { driver, options } })
    : await runKills({
        ...common,
        ...(cluster === null ? {} : { pool: { driver, options } }),
        ...(values.across ? { across: { image: 'default', volume: 'other' } as const } : {}),
      })
  process.stdout.write(`${JSON.stringify(report)}\n`)
} finally {
  await rm(home, { recursive: true, force: true })
  await cluster?.remove()
}
