/**
 * `node run-kills.ts --seed N --kills N [--dir DIR] [--pool-driver DRIVER [--across]]`: kills the real daemon N times under load; its
 * report as JSON. `--pool-driver ceph` starts a cluster and has the volume there, with `--across` its image on files.
 */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { parseArgs } from 'node:util'
import { CephCluster } from '@atoll/southbound/ceph-cluster'
import { runKills } from './kills.ts'

const { values } = parseArgs({
  options: {
    seed: { type: 'string', default: '1' },
    kills: { type: 'string', default: '10' },
    dir: { type: 'string', default: tmpdir() },
    'pool-driver': { type: 'string', default: 'file' },
    across: { type: 'boolean', default: false },
  },
})
const driver = values['pool-driver']
const cluster = driver === 'ceph' ? await CephCluster.start() : null
const home = await mkdtemp(join(values.dir, 'atoll-kills-'))
try {
  const report = await runKills({
    home,
    seed: Number(values.seed),
    killCount: Number(values.kills),
    ...(cluster === null ? {} : { pool: { driver, options: cluster.optionsIn('kills') } }),
    ...(values.across ? { across: { image: 'default', volume: 'other' } as const } : {}),
    onProgress: (text) => process.stderr.write(`${text}\n`),
  })
  process.stdout.write(`${JSON.stringify(report)}\n`)
} finally {
  await rm(home, { recursive: true, force: true })
  await cluster?.remove()
}
