/**
 * Moving a volume into another pool, beside nbdcopy from the volume to a new one in that pool: both end with everything durable. And
 * a move within a file system that shares blocks.
 */
import { execFileSync, spawnSync } from 'node:child_process'
import { mkdirSync, truncateSync, writeFileSync } from 'node:fs'
import { CephCluster } from '@atoll/southbound/ceph-cluster'
import { type Bench, GiB, MiB } from '../bench.ts'
import type { Atoll } from '../servers.ts'
import { median } from '../table.ts'

const sharedBytes = 10 * GiB

export async function migrate(bench: Bench): Promise<void> {
  if (!bench.has('nbdcopy', 'libnbd-bin')) return
  const atoll = await bench.atoll()
  for (const pool of ['one', 'two']) {
    mkdirSync(bench.path(pool))
    atoll.cli('pool', 'create', pool, '--driver', 'file', '--option', `path=${bench.path(pool)}`)
  }
  const raw = bench.path('content.raw')
  bench.makeContent(raw, 2 * GiB)
  beside(bench, atoll, { name: 'migrate: files to files on one disk', raw, sizeBytes: 2 * GiB, target: 'two' })

  if (bench.has('ceph-mon', 'ceph-mon') && bench.has('ceph-osd', 'ceph-osd')) {
    const cluster = await CephCluster.start({ parent: bench.folder })
    bench.add({ stop: () => cluster.remove() })
    const options = Object.entries(cluster.optionsIn('bench')).flatMap(([key, value]) => ['--option', `${key}=${value}`])
    atoll.cli('pool', 'create', 'far', '--driver', 'ceph', ...options)
    truncateSync(raw, GiB)
    beside(bench, atoll, { name: 'migrate: files to Ceph', raw, sizeBytes: GiB, target: 'far' })
  }
  if (bench.has('mkfs.xfs', 'xfsprogs')) sharing(bench, atoll)
}

/** In turns, from the same pool into the same pool, over the same content. */
function beside(
  bench: Bench,
  atoll: Atoll,
  { name, raw, sizeBytes, target }: { name: string; raw: string; sizeBytes: number; target: string },
): void {
  const rates: { ours: number[]; theirs: number[] } = { ours: [], theirs: [] }
  const pausesMs: number[] = []
  for (let round = 0; round < bench.rounds; round += 1) {
    const size = String(sizeBytes)
    atoll.cli('volume', 'create', 'disk', '--size', size, '--pool', 'one')
    const from = atoll.attach('disk')
    execFileSync('nbdcopy', ['--flush', raw, from])
    atoll.cli('volume', 'create', 'copy', '--size', size, '--pool', target)
    const to = atoll.attach('copy')
    const rate = (run: () => unknown): number => {
      // What the other one has left to be written is not waited for by this one.
      execFileSync('sync')
      const startedAtMs = performance.now()
      run()
      return ((sizeBytes / MiB) * 1000) / (performance.now() - startedAtMs)
    }
    const theirs = (): unknown => rates.theirs.push(rate(() => execFileSync('nbdcopy', ['--flush', from, to])))
    const ours = (): void => {
      const move = (): { job: { result: { pauseMs: number } } } => atoll.json('migrate', 'disk', '--to', target, '--wait')
      rates.ours.push(rate(() => pausesMs.push(move().job.result.pauseMs)))
    }
    // Once moved the volume is in the same pool as the copy.
    theirs()
    ours()
    for (const volume of ['disk', 'copy']) {
      atoll.cli('volume', 'detach', volume)
      atoll.cli('volume', 'delete', volume)
    }
    for (const pool of ['one', target]) atoll.cli('pool', 'reclaim', pool)
  }
  const [ours, theirs] = [median(rates.ours), median(rates.theirs)]
  bench.row({ name, unit: 'MiB/s', peer: 'nbdcopy', ours, theirs, ratio: ours / theirs, target: 0.8 })
  bench.figure({ name: `${name}: longest that clients were held up`, unit: 'ms', value: Math.max(...pausesMs), limit: 100 })
}

/** Two pools in one XFS: the blocks are shared instead of copied. */
function sharing(bench: Bench, atoll: Atoll): void {
  const name = 'migrate: 10 GiB within one XFS (whole command)'
  const device = bench.path('xfs.img')
  writeFileSync(device, '')
  truncateSync(device, sharedBytes + 2 * GiB)
  execFileSync('mkfs.xfs', ['-q', '-m', 'reflink=1', device])
  const folder = bench.path('xfs')
  mkdirSync(folder)
  const mounted = spawnSync('mount', ['-o', 'loop', device, folder], { encoding: 'utf8' })
  if (mounted.status !== 0) {
    bench.skip(`${name}: ${mounted.stderr.trim()}`)
    return
  }
  bench.add({ stop: () => Promise.resolve(void execFileSync('umount', ['--lazy', folder])) })
  for (const pool of ['near', 'nearer']) {
    mkdirSync(`${folder}/${pool}`)
    atoll.cli('pool', 'create', pool, '--driver', 'file', '--option', `path=${folder}/${pool}`)
  }
  atoll.cli('volume', 'create', 'large', '--size', String(sharedBytes), '--pool', 'near')
  const uri = atoll.attach('large')
  execFileSync('sh', ['-c', `yes atoll | head -c ${sharedBytes} | nbdcopy --flush - "$0"`, uri])
  const times: number[] = []
  for (let round = 0; round < bench.rounds; round += 1) {
    const startedAtMs = performance.now()
    atoll.cli('migrate', 'large', '--to', round % 2 === 0 ? 'nearer' : 'near', '--wait')
    times.push(performance.now() - startedAtMs)
  }
  bench.figure({ name, unit: 's', value: median(times) / 1000, limit: 1 })
}
