/** First writes on a fresh clone: where copy-on-write costs. Every 4 KiB block is written once, in random order. */
import { execFileSync } from 'node:child_process'
import { type Bench, GiB, MiB, type Peer } from '../bench.ts'
import type { Contender } from '../contenders.ts'
import { median } from '../table.ts'
import { fileForARound } from './file-for-a-round.ts'

const diskBytes = GiB
const writtenBytes = 256 * MiB

export async function firstWrites(bench: Bench): Promise<void> {
  if (!bench.has('fio', 'fio') || !bench.has('nbdcopy', 'libnbd-bin')) return
  const raw = bench.path('content.raw')
  bench.makeContent(raw, diskBytes)
  const atoll = await bench.atoll()
  atoll.cli('volume', 'create', 'base', '--size', String(diskBytes))
  execFileSync('nbdcopy', [raw, atoll.attach('base')])
  atoll.cli('volume', 'detach', 'base')
  atoll.cli('snapshot', 'create', 'base@clean')
  const allocated: number[] = []
  const storedBytes = (): number => atoll.json<{ storedBytes: number }>('pool', 'show', 'default').storedBytes
  let before = 0
  const ours: Contender = {
    name: 'atoll clone',
    prepare: (round) => {
      atoll.cli('volume', 'create', `clone-${round}`, '--from', 'snapshot:base@clean')
      before = storedBytes()
      return Promise.resolve(atoll.attach(`clone-${round}`))
    },
    finish: (round) => {
      allocated.push((storedBytes() - before) / writtenBytes)
      atoll.cli('volume', 'detach', `clone-${round}`)
      atoll.cli('volume', 'delete', `clone-${round}`)
      atoll.cli('pool', 'reclaim', 'default')
      return Promise.resolve()
    },
  }
  const peers: Peer[] = []
  if (bench.has('nbdkit', 'nbdkit')) peers.push({ contender: sparseFile(bench), target: 0.85 })
  if (bench.has('qemu-nbd', 'qemu-utils')) {
    execFileSync('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', raw, bench.path('base.qcow2')])
    peers.push({ contender: overlay(bench, bench.path('base.qcow2')), target: 5 })
  }
  await bench.compare({
    name: 'first 4 KiB writes on a fresh clone, depth 32',
    job: { rw: 'randwrite', blockBytes: 4096, depth: 32, sizeBytes: writtenBytes },
    ours,
    peers,
  })
  bench.figure({
    name: 'allocated by first 4 KiB writes, in parts of the bytes written',
    unit: 'x',
    value: median(allocated),
    limit: 1.1,
  })
}

/** nbdkit on a new empty file of the disk's size: what no copy-on-write can beat by much. */
function sparseFile(bench: Bench): Contender {
  const make = (path: string): void => void execFileSync('truncate', ['-s', String(diskBytes), path])
  return fileForARound(bench, { name: 'nbdkit sparse', kind: 'nbdkit', format: 'raw', make })
}

/** A new qcow2 overlay over a full qcow2. */
export function overlay(bench: Bench, base: string): Contender {
  const make = (path: string): void =>
    void execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', '-b', base, '-F', 'qcow2', path])
  return fileForARound(bench, { name: 'qcow2 overlay', kind: 'qemu-nbd', format: 'qcow2', make })
}
