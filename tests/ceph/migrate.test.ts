/** Moves between files and a real Ceph cluster: under kill -9, and a client that goes on meanwhile. */
import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { CephCluster, hasCeph } from '@atoll/southbound/ceph-cluster'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { RequestTimes } from '../clients/request-times.ts'
import { writeIncompressible } from '../clients/write-incompressible.ts'
import { runMigrateKills } from '../kill/migrate-kills.ts'
import { TestHome } from '../test-home.ts'

const seed = Number(process.env['ATOLL_SEED'] ?? '20261122')
const full = process.env['ATOLL_TEST_CRASH'] === 'full'
const killCount = full ? 50 : 2

describe.skipIf(!hasCeph())('a volume that moves between files and Ceph', () => {
  let cluster: CephCluster

  beforeAll(async () => {
    cluster = await CephCluster.start()
  })

  afterAll(async () => {
    await cluster?.remove()
  })

  test('goes on serving its client, which sees no error and no other bytes', async () => {
    await using home = await TestHome.create()
    await home.start()
    const options = Object.entries(cluster.optionsIn('client')).flatMap(([key, value]) => ['--option', `${key}=${value}`])
    home.cli('pool', 'create', 'far', '--driver', 'ceph', ...options)
    const source = join(home.path, 'base.raw')
    await writeIncompressible(source, 64)
    home.cli('image', 'import', 'base', source, '--format', 'raw')
    home.cli('volume', 'create', 'disk', '--from', 'image:base')
    home.cli('image', 'delete', 'base')
    const client = await RequestTimes.start(home.cli('volume', 'attach', 'disk', '--format', 'uri'))
    try {
      for (const target of ['far', 'default']) {
        client.take()
        const { job } = await home.jsonMeanwhile<{ job: { result: object } }>('migrate', 'disk', '--to', target, '--wait')
        console.log(`to ${target}: slowest requests`, client.take(), 'of the job', job.result)
        expect(await home.jsonMeanwhile<object>('volume', 'show', 'disk')).toMatchObject({
          pool: target,
          readsFrom: [],
          move: null,
        })
      }
    } finally {
      await client.stop()
    }
    home.cli('pool', 'reclaim', 'far')
    expect(home.json<{ storedBytes: number }>('pool', 'show', 'far').storedBytes).toBe(0)
  })

  test(`${killCount} kills of the daemon while everything moves to Ceph and back lose nothing and leave nothing behind`, async () => {
    const home = await mkdtemp(join(tmpdir(), 'atoll-kills-'))
    try {
      const other = { driver: 'ceph', options: cluster.optionsIn('kills') }
      const report = await runMigrateKills({ home, seed, killCount, other })
      console.log(`seed ${seed}:`, report)
      expect(report.kills).toBe(killCount)
    } finally {
      await rm(home, { recursive: true, force: true })
    }
  }, 3_600_000)
})
