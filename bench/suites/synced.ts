/** Writes that are flushed, on a real file system: databases in guests. */
import { execFileSync } from 'node:child_process'
import { type Bench, GiB } from '../bench.ts'
import type { Contender } from '../contenders.ts'
import type { Atoll } from '../servers.ts'
import { fileForARound } from './file-for-a-round.ts'
import { overlay } from './first-writes.ts'

const diskBytes = GiB
const usedBytes = 256 * 2 ** 20

export async function synced(bench: Bench): Promise<void> {
  if (!bench.has('fio', 'fio') || !bench.has('nbdcopy', 'libnbd-bin') || !bench.has('qemu-nbd', 'qemu-utils')) return
  const raw = bench.path('content.raw')
  bench.makeContent(raw, diskBytes)
  execFileSync('qemu-img', ['convert', '-f', 'raw', '-O', 'qcow2', raw, bench.path('base.qcow2')])
  const atoll = await bench.atoll()
  atoll.cli('volume', 'create', 'base', '--size', String(diskBytes))
  execFileSync('nbdcopy', ['--flush', raw, atoll.attach('base')])
  atoll.cli('volume', 'detach', 'base')
  atoll.cli('snapshot', 'create', 'base@clean')

  for (const writesPerFlush of [1, 32]) {
    const job = {
      rw: 'randwrite',
      blockBytes: 4096,
      depth: writesPerFlush === 1 ? 1 : 32,
      sizeBytes: usedBytes,
      runtimeSeconds: bench.seconds,
      writesPerFlush,
    } as const
    await bench.compare({
      name: `4 KiB random write, fsync=${writesPerFlush}, fresh volume`,
      job,
      ours: freshVolume(atoll, []),
      peers: [{ contender: freshImage(bench), target: 1 }],
    })
    await bench.compare({
      name: `4 KiB random write, fsync=${writesPerFlush}, clone`,
      job,
      ours: freshVolume(atoll, ['--from', 'snapshot:base@clean']),
      peers: [{ contender: overlay(bench, bench.path('base.qcow2')), target: 1 }],
    })
  }
}

function freshVolume(atoll: Atoll, source: readonly string[]): Contender {
  return {
    name: 'atoll',
    prepare() {
      atoll.cli('volume', 'create', 'fresh', '--size', String(diskBytes), ...source)
      return Promise.resolve(atoll.attach('fresh'))
    },
    finish() {
      atoll.cli('volume', 'detach', 'fresh')
      atoll.cli('volume', 'delete', 'fresh')
      atoll.cli('pool', 'reclaim', 'default')
      return Promise.resolve()
    },
  }
}

function freshImage(bench: Bench): Contender {
  const make = (path: string): void => void execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', path, String(diskBytes)])
  return fileForARound(bench, { name: 'qemu-nbd qcow2', kind: 'qemu-nbd', format: 'qcow2', make })
}
