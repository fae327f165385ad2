/** Volumes on a real Ceph cluster of one node beside librbd (fio's rbd engine) on the same cluster, without its write-back cache. */
import { execFileSync, spawn } from 'node:child_process'
import { once } from 'node:events'
import { appendFileSync, existsSync, readFileSync, writeFileSync } from 'node:fs'
import { setTimeout as wait } from 'node:timers/promises'
import { CephCluster } from '@atoll/southbound/ceph-cluster'
import { type Bench, GiB, MiB, standing } from '../bench.ts'
import type { Contender } from '../contenders.ts'
import type { FioTarget } from '../fio.ts'
import { median } from '../table.ts'
import type { Atoll } from '../servers.ts'

const diskBytes = GiB
const firstWrittenBytes = 40 * MiB
const repeats = 7

export async function ceph(bench: Bench): Promise<void> {
  if (!bench.has('fio', 'fio') || !bench.has('nbdcopy', 'libnbd-bin') || !bench.has('rbd', 'ceph-common')) return
  if (!bench.has('ceph-mon', 'ceph-mon') || !bench.has('ceph-osd', 'ceph-osd')) return
  const cluster = await CephCluster.start({ parent: bench.folder, pools: ['atoll', 'rbd', 'plain'] })
  bench.add({ stop: () => cluster.remove() })
  const peer = new Librbd(bench, cluster)
  await peer.proveThatNothingIsCached()

  const raw = bench.path('content.raw')
  bench.makeContent(raw, diskBytes)
  const atoll = await bench.atoll()
  const options = Object.entries(cluster.optionsIn('bench')).flatMap(([key, value]) => ['--option', `${key}=${value}`])
  atoll.cli('pool', 'create', 'fast', '--driver', 'ceph', ...options)
  atoll.cli('volume', 'create', 'disk', '--size', String(diskBytes), '--pool', 'fast')
  const ours = standing('atoll', atoll.attach('disk'))
  execFileSync('nbdcopy', [raw, atoll.attach('disk')])
  peer.run('import', raw, 'rbd/disk')
  const peers = [{ contender: standing('librbd', peer.target('disk')), target: 0.9 }]
  // The same library behind the same kind of socket.
  const overNbd = await bench.serveRbd('disk', peer.conf)
  if (overNbd !== null) peers.push({ contender: standing('qemu-nbd, librbd', overNbd), target: 0.9 })

  const timed = { sizeBytes: diskBytes, runtimeSeconds: bench.seconds }
  for (const [name, job] of [
    ['4 KiB random read, depth 32', { rw: 'randread', blockBytes: 4096, depth: 32 }],
    ['4 KiB random write, depth 32', { rw: 'randwrite', blockBytes: 4096, depth: 32 }],
    ['4 KiB random read, depth 1', { rw: 'randread', blockBytes: 4096, depth: 1 }],
    ['4 KiB random write, depth 1', { rw: 'randwrite', blockBytes: 4096, depth: 1 }],
    ['1 MiB sequential read, depth 8', { rw: 'read', blockBytes: MiB, depth: 8 }],
    ['1 MiB sequential write, depth 8', { rw: 'write', blockBytes: MiB, depth: 8 }],
  ] as const) {
    await bench.compare({ name: `Ceph: ${name}`, job: { ...timed, ...job }, ours, peers })
  }
  atoll.cli('volume', 'detach', 'disk')

  await firstWrites(bench, cluster, peer, atoll)
  latencies(bench, peer, atoll)
}

/** 4 KiB blocks that are written for the first time, all over a clone: what copy-on-write costs. */
async function firstWrites(bench: Bench, cluster: CephCluster, peer: Librbd, atoll: Atoll): Promise<void> {
  atoll.cli('snapshot', 'create', 'disk@clean')
  peer.run('snap', 'create', 'rbd/disk@clean')
  peer.run('snap', 'protect', 'rbd/disk@clean')
  const ours: Contender = {
    name: 'atoll clone',
    prepare: (round) => {
      atoll.cli('volume', 'create', `clone-${round}`, '--from', 'snapshot:disk@clean')
      return Promise.resolve(atoll.attach(`clone-${round}`))
    },
    finish: (round) => {
      atoll.cli('volume', 'detach', `clone-${round}`)
      atoll.cli('volume', 'delete', `clone-${round}`)
      atoll.cli('pool', 'reclaim', 'fast')
      return Promise.resolve()
    },
  }
  const clone: Contender = {
    name: 'librbd clone',
    prepare: (round) => {
      peer.run('clone', 'rbd/disk@clean', `rbd/clone-${round}`)
      return Promise.resolve(peer.target(`clone-${round}`))
    },
    finish: (round) => Promise.resolve(peer.run('rm', `rbd/clone-${round}`)),
  }
  // New objects of 4 MiB, as a clone of ours has them, without anybody who remembers what was written.
  const plain: Contender = {
    name: 'rados aio',
    prepare: () =>
      Promise.resolve({
        engine: [
          '--ioengine=rados',
          `--conf=${peer.conf}`,
          '--clientname=admin',
          '--pool=plain',
          `--nrfiles=${diskBytes / (4 * MiB)}`,
          '--file_service_type=random',
        ],
        environment: {},
      }),
    finish: async () => {
      await cluster.rados('purge', 'plain', '--yes-i-really-really-mean-it')
    },
  }
  await bench.compare({
    name: 'Ceph: first 4 KiB writes on a fresh clone, depth 32',
    job: { rw: 'randwrite', blockBytes: 4096, depth: 32, sizeBytes: diskBytes, bytesMax: firstWrittenBytes },
    ours,
    peers: [
      { contender: clone, target: 2 },
      { contender: plain, target: 0.9 },
    ],
  })
}

/** Whole commands, in turns. */
function latencies(bench: Bench, peer: Librbd, atoll: Atoll): void {
  const compare = (name: string, ours: (index: number) => unknown, theirs: (index: number) => unknown): void => {
    const times: [number[], number[]] = [[], []]
    for (let index = 0; index < repeats; index += 1) {
      times[0].push(elapsedMs(() => ours(index)))
      times[1].push(elapsedMs(() => theirs(index)))
    }
    const [oursMs, theirsMs] = [median(times[0]), median(times[1])]
    bench.row({ name, unit: 'ms', peer: 'rbd', ours: oursMs, theirs: theirsMs, ratio: theirsMs / oursMs, target: 1 })
  }
  compare(
    'Ceph: snapshot (whole command)',
    (index) => atoll.cli('snapshot', 'create', `disk@s${index}`),
    (index) => peer.run('snap', 'create', `rbd/disk@s${index}`),
  )
  compare(
    'Ceph: clone of a snapshot (whole command)',
    (index) => atoll.cli('volume', 'create', `copy-${index}`, '--from', 'snapshot:disk@clean'),
    (index) => peer.run('clone', 'rbd/disk@clean', `rbd/copy-${index}`),
  )
}

function elapsedMs(run: () => unknown): number {
  const startedAtMs = performance.now()
  run()
  return performance.now() - startedAtMs
}

class Librbd {
  /** The cluster's, with the cache off. */
  readonly conf: string
  readonly #bench: Bench

  constructor(bench: Bench, cluster: CephCluster) {
    this.#bench = bench
    this.conf = bench.path('librbd.conf')
    writeFileSync(this.conf, readFileSync(cluster.conf, 'utf8'))
    appendFileSync(this.conf, '[client.admin]\nrbd cache = false\n')
  }

  run(...args: string[]): void {
    execFileSync('rbd', ['-c', this.conf, ...args], { stdio: ['ignore', 'ignore', 'pipe'] })
  }

  target(image: string, conf = this.conf): Exclude<FioTarget, string> {
    return {
      engine: ['--ioengine=rbd', '--clientname=admin', '--pool=rbd', `--rbdname=${image}`],
      environment: { CEPH_CONF: conf },
    }
  }

  /** Asks librbd inside of a running fio for its setting. */
  async proveThatNothingIsCached(): Promise<void> {
    this.run('create', '--size', '64M', 'rbd/probe')
    const socket = this.#bench.path('librbd.asok')
    const conf = this.#bench.path('probe.conf')
    writeFileSync(conf, `${readFileSync(this.conf, 'utf8')}admin socket = ${socket}\n`)
    const { engine, environment } = this.target('probe', conf)
    const args = [
      '--name=probe',
      ...engine,
      '--rw=randread',
      '--bs=4096',
      '--iodepth=1',
      '--size=64M',
      '--time_based',
      '--runtime=60',
    ]
    const fio = spawn('fio', args, { env: { ...process.env, ...environment }, stdio: 'ignore' })
    try {
      while (!existsSync(socket)) {
        if (fio.exitCode !== null) throw new Error(`fio ${args.join(' ')} ended without a socket of librbd`)
        await wait(20)
      }
      const answer = execFileSync('ceph', ['--admin-daemon', socket, 'config', 'get', 'rbd_cache'], { encoding: 'utf8' })
      if ((JSON.parse(answer) as { rbd_cache?: string }).rbd_cache !== 'false') throw new Error(`librbd in fio caches: ${answer}`)
    } finally {
      const ended = once(fio, 'exit')
      fio.kill('SIGKILL')
      if (fio.exitCode === null && fio.signalCode === null) await ended
    }
    this.run('rm', 'rbd/probe')
  }
}
