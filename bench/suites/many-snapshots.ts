/** A volume with a long history against one with none: depth must cost nothing. */
import { execFileSync } from 'node:child_process'
import { type Bench, GiB, standing } from '../bench.ts'
import { runFio } from '../fio.ts'

const diskBytes = GiB
const snapshotCount = 100
/** Written between two snapshots, at random places, so that a leaf has many owners in the end. */
const writesBetweenBytes = 4 * 2 ** 20

export async function manySnapshots(bench: Bench): Promise<void> {
  if (!bench.has('fio', 'fio') || !bench.has('nbdcopy', 'libnbd-bin')) return
  const raw = bench.path('content.raw')
  bench.makeContent(raw, diskBytes)
  const atoll = await bench.atoll()
  const uris = new Map<string, string>()
  for (const name of ['plain', 'deep']) {
    atoll.cli('volume', 'create', name, '--size', String(diskBytes))
    uris.set(name, atoll.attach(name))
    execFileSync('nbdcopy', [raw, uris.get(name) ?? ''])
  }
  const deepUri = uris.get('deep') ?? ''
  for (let index = 0; index < snapshotCount; index += 1) {
    atoll.cli('snapshot', 'create', `deep@s${index}`)
    const job = { rw: 'randwrite', blockBytes: 4096, depth: 32, sizeBytes: diskBytes } as const
    await runFio(deepUri, { ...job, bytesMax: writesBetweenBytes, seed: index })
  }
  const timed = { sizeBytes: diskBytes, runtimeSeconds: bench.seconds }
  const plain = standing('without', uris.get('plain') ?? '')
  const deep = standing(`atoll`, deepUri)
  await bench.compare({
    name: `4 KiB random read, depth 32, after ${snapshotCount} snapshots`,
    job: { ...timed, rw: 'randread', blockBytes: 4096, depth: 32 },
    ours: deep,
    peers: [{ contender: plain, target: 0.95 }],
  })
  await bench.compare({
    name: `1 MiB sequential read, depth 8, after ${snapshotCount} snapshots`,
    job: { ...timed, rw: 'read', blockBytes: 2 ** 20, depth: 8 },
    ours: deep,
    peers: [{ contender: plain, target: null }],
  })
  await bench.compare({
    name: `4 KiB random write, depth 32, after ${snapshotCount} snapshots`,
    job: { ...timed, rw: 'randwrite', blockBytes: 4096, depth: 32 },
    ours: deep,
    peers: [{ contender: plain, target: 0.95 }],
  })
}
