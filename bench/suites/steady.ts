/** Disks that are written all over: what a guest sees most of its life. */
import { execFileSync } from 'node:child_process'
import { type Bench, GiB, MiB, standing, type Peer } from '../bench.ts'

const diskBytes = GiB

export async function steady(bench: Bench): Promise<void> {
  if (!bench.has('fio', 'fio') || !bench.has('nbdcopy', 'libnbd-bin')) return
  const raw = bench.path('content.raw')
  bench.makeContent(raw, diskBytes)
  const atoll = await bench.atoll()
  atoll.cli('volume', 'create', 'disk', '--size', String(diskBytes))
  const uri = atoll.attach('disk')
  const ours = standing('atoll', uri)
  execFileSync('nbdcopy', [raw, uri])

  const nbdkit: Peer['contender'][] = []
  const qcow2: Peer['contender'][] = []
  const others: Peer['contender'][] = []
  if (bench.has('nbdkit', 'nbdkit')) {
    execFileSync('cp', ['--sparse=never', raw, bench.path('nbdkit.raw')])
    nbdkit.push(standing('nbdkit file', (await bench.serve('nbdkit', bench.path('nbdkit.raw'))).uri))
  }
  if (bench.has('qemu-nbd', 'qemu-utils')) {
    execFileSync('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', raw, bench.path('disk.qcow2')])
    qcow2.push(standing('qemu-nbd qcow2', (await bench.serve('qemu-nbd', bench.path('disk.qcow2'), 'qcow2')).uri))
    others.push(standing('qemu-nbd raw', (await bench.serve('qemu-nbd', raw)).uri))
  }
  const peers = (nbdkitTarget: number | null, qcow2Target: number | null): Peer[] => [
    ...nbdkit.map((contender) => ({ contender, target: nbdkitTarget })),
    ...qcow2.map((contender) => ({ contender, target: qcow2Target })),
    ...others.map((contender) => ({ contender, target: null })),
  ]
  const timed = { sizeBytes: diskBytes, runtimeSeconds: bench.seconds }
  await bench.compare({
    name: '4 KiB random read, depth 32',
    job: { ...timed, rw: 'randread', blockBytes: 4096, depth: 32 },
    ours,
    peers: peers(1.5, 4.5),
  })
  await bench.compare({
    name: '4 KiB random write, depth 32',
    job: { ...timed, rw: 'randwrite', blockBytes: 4096, depth: 32 },
    ours,
    peers: peers(1.15, 3.3),
  })
  await bench.compare({
    name: '4 KiB random read, depth 1',
    job: { ...timed, rw: 'randread', blockBytes: 4096, depth: 1 },
    ours,
    peers: peers(1, null),
  })
  await bench.compare({
    name: '4 KiB random write, depth 1',
    job: { ...timed, rw: 'randwrite', blockBytes: 4096, depth: 1 },
    ours,
    peers: peers(1, null),
  })
  await bench.compare({
    name: '1 MiB sequential read, depth 8',
    job: { ...timed, rw: 'read', blockBytes: MiB, depth: 8 },
    ours,
    peers: peers(1, null),
  })
  await bench.compare({
    name: '1 MiB sequential write, depth 8',
    job: { ...timed, rw: 'write', blockBytes: MiB, depth: 8 },
    ours,
    peers: peers(1, null),
  })
}
