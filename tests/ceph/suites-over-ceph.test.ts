/**
 * The tests of volumes, snapshots, clones, files, reclaim, check and what a kill leaves, again, with pools on a real Ceph cluster:
 * test-bench.ts of the mapper and testing.ts of the composer put the first pool of each test there.
 */
import { type ChildProcess, spawn } from 'node:child_process'
import { once } from 'node:events'
import { join } from 'node:path'
import { CephCluster, hasCeph } from '@atoll/southbound/ceph-cluster'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { repositoryRoot } from '../test-home.ts'

/** Each of the tests in a suite has a limit of its own. */
const hangLimitMs = 3_600_000
const full = process.env['ATOLL_TEST_CRASH'] === 'full'

const suites: Readonly<Record<string, readonly string[]>> = {
  'volumes, snapshots, clones and files': [
    'create',
    'delete',
    'snapshot',
    'rollback',
    'resize',
    'diff',
    'file-target',
    'import-target',
  ],
  'opening after a kill, and clones across pools': ['open', 'pool-links', 'pool-service'],
  'reclaim, check, usage and exports': ['reclaim', 'check', 'usage', 'exporter', 'pool-accept', 'pool-import', 'older-catalog'],
  'random operations against plain arrays': ['model'],
  // What they are about is the catalog, and they are many.
  ...(full ? { 'checkpoints and recovery': ['checkpoint', 'recover'] } : {}),
}
const composerSuites = ['composer', 'earlier-states', 'jobs', ...(full ? ['files', 'images', 'exports', 'activity'] : [])]

describe.skipIf(!hasCeph())('over a Ceph cluster pass the tests of', () => {
  let cluster: CephCluster
  let running: ChildProcess | null = null

  beforeAll(async () => {
    cluster = await CephCluster.start()
  })

  afterAll(async () => {
    running?.kill('SIGKILL')
    await cluster?.remove()
  })

  for (const [name, files] of Object.entries(suites)) {
    test(`the mapper: ${name}`, async () => await runSuites(files.map((file) => `mapper/${file}.test.ts`)), hangLimitMs)
  }

  test('the composer', async () => await runSuites(composerSuites.map((file) => `composer/${file}.test.ts`)), hangLimitMs)

  /** Those in which tests have put something, and which stay as long as that does. */
  async function namespaces(): Promise<Set<string>> {
    const names = (await cluster.rados('-p', 'atoll', 'ls', '--all')).split('\n').map((line) => line.split('\t')[0] ?? '')
    return new Set(names.filter((name) => /^(bench|atoll-composer)-/.test(name)))
  }

  async function runSuites(paths: readonly string[]): Promise<void> {
    const before = await namespaces()
    const program = join(repositoryRoot, 'node_modules/vitest/vitest.mjs')
    const child = spawn(process.execPath, [program, 'run', '--root', repositoryRoot, '--reporter=dot', ...paths], {
      env: { ...process.env, ATOLL_TEST_CEPH_CONF: cluster.conf, ATOLL_MODEL_CASES: full ? '200' : '6' },
      stdio: ['ignore', 'pipe', 'pipe'],
    })
    running = child
    let output = ''
    for (const stream of [child.stdout, child.stderr]) {
      stream.on('data', (chunk: Buffer) => {
        output = (output + chunk.toString()).slice(-50_000)
      })
    }
    await once(child, 'close')
    running = null
    expect(child.exitCode, output).toBe(0)
    expect((await namespaces()).difference(before).size, 'pools that were made in the cluster').toBeGreaterThan(0)
    console.log(
      output
        .split('\n')
        .filter((line) => /Tests|Duration/.test(line))
        .join('\n'),
    )
  }
})
