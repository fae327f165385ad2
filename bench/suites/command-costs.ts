/** What an admin waits for: whole commands, the start of the process included, and the memory of maps. */
import { execFileSync } from 'node:child_process'
import { mapMemory } from '../cost/costs.ts'
import { type Bench, GiB, MiB } from '../bench.ts'
import { median } from '../table.ts'

const repeats = 7

export async function commandCosts(bench: Bench): Promise<void> {
  const atoll = await bench.atoll()
  const raw = bench.path('image.raw')
  bench.makeContent(raw, 64 * MiB)
  atoll.cli('image', 'import', 'image', raw)
  const nothingMs = median(Array.from({ length: repeats }, () => elapsedMs(() => atoll.cli('--version'))))
  bench.figure({ name: 'a command that does nothing (start of the process)', unit: 'ms', value: nothingMs, limit: null })
  for (const [label, sizeBytes] of [
    ['1 GiB', GiB],
    ['1 TiB', 1024 * GiB],
  ] as const) {
    const volume = `disk-${label.replace(' ', '')}`
    atoll.cli('volume', 'create', volume, '--size', String(sizeBytes), '--from', 'image:image')
    atoll.attach(volume)
    const snapshots = Array.from({ length: repeats }, (_, index) =>
      elapsedMs(() => atoll.cli('snapshot', 'create', `${volume}@s${index}`)),
    )
    bench.figure({
      name: `snapshot of an attached volume of ${label} (whole command)`,
      unit: 'ms',
      value: median(snapshots),
      limit: null,
    })
    const clones = Array.from({ length: repeats }, (_, index) =>
      elapsedMs(() => atoll.cli('volume', 'create', `${volume}-c${index}`, '--from', `snapshot:${volume}@s0`)),
    )
    bench.figure({ name: `clone of a snapshot of ${label} (whole command)`, unit: 'ms', value: median(clones), limit: null })
  }
  const fromImage = Array.from({ length: repeats }, (_, index) =>
    elapsedMs(() => atoll.cli('volume', 'create', `from-image-${index}`, '--size', '1T', '--from', 'image:image')),
  )
  bench.figure({ name: 'volume of 1 TiB from an image (whole command)', unit: 'ms', value: median(fromImage), limit: null })
  if (bench.has('qemu-img', 'qemu-utils')) {
    execFileSync('qemu-img', ['create', '-q', '-f', 'qcow2', bench.path('peer.qcow2'), '1T'])
    const overlays = Array.from({ length: repeats }, (_, index) =>
      elapsedMs(() =>
        execFileSync('qemu-img', [
          'create',
          '-q',
          '-f',
          'qcow2',
          '-b',
          bench.path('peer.qcow2'),
          '-F',
          'qcow2',
          bench.path(`peer-${index}.qcow2`),
        ]),
      ),
    )
    bench.figure({ name: 'qcow2 overlay of 1 TiB (whole command, qemu-img)', unit: 'ms', value: median(overlays), limit: null })
  }
  bench.figure({ name: 'memory of the daemon with these volumes', unit: 'MiB', value: atoll.residentBytes() / MiB, limit: null })
  const memory = await mapMemory()
  bench.figure({ name: 'map of a fresh volume, per TiB', unit: 'MiB', value: memory.freshBytes / MiB, limit: 0.1 })
  bench.figure({
    name: 'map of a clone with 1 GiB of sequential writes, per TiB',
    unit: 'MiB',
    value: memory.sequentialBytes / MiB,
    limit: 1,
  })
  bench.figure({
    name: 'map of a clone with 200 MiB of random writes, per TiB',
    unit: 'MiB',
    value: memory.randomBytes / MiB,
    limit: 32,
  })
}

function elapsedMs(run: () => unknown): number {
  const startedAtMs = performance.now()
  run()
  return performance.now() - startedAtMs
}
