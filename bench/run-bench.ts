/**
 * `npm run bench [-- OPTIONS]`: drives the daemon and other NBD servers with the same fio jobs on the same machine, in turns,
 * prints medians side by side with our targets, and writes them as JSON. Exit code 1: a target was missed.
 */
import { mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs'
import { cpus, release, tmpdir } from 'node:os'
import { join, resolve } from 'node:path'
import { parseArgs } from 'node:util'
import { Bench } from './bench.ts'
import { figureLine, heading, rowLine, type Document } from './table.ts'
import { ceph } from './suites/ceph.ts'
import { commandCosts } from './suites/command-costs.ts'
import { firstWrites } from './suites/first-writes.ts'
import { migrate } from './suites/migrate.ts'
import { manySnapshots } from './suites/many-snapshots.ts'
import { steady } from './suites/steady.ts'
import { synced } from './suites/synced.ts'

const help = `npm run bench -- [options]
  --rounds N      rounds of which the median counts (default 3)
  --seconds N     length of each timed job (default 4)
  --only TEXT     only suites whose name has TEXT: ${['steady', 'first-writes', 'many-snapshots', 'synced', 'command-costs', 'ceph', 'migrate'].join(', ')}
  --memory DIR    where everything else lies (default /dev/shm: no disk in between)
  --disk DIR      where the synced jobs, the disk of the Ceph cluster and what is migrated lie (default ${tmpdir()})
  --json FILE     where the figures go (default bench.json)
`

/** Suites that are about disks. */
const onDisk = ['synced', 'ceph', 'migrate']

const { values } = parseArgs({
  options: {
    rounds: { type: 'string', default: '3' },
    seconds: { type: 'string', default: '4' },
    only: { type: 'string', default: '' },
    memory: { type: 'string', default: '/dev/shm' },
    disk: { type: 'string', default: tmpdir() },
    json: { type: 'string', default: 'bench.json' },
    help: { type: 'boolean', default: false },
  },
})

if (values.help) {
  process.stdout.write(help)
} else {
  const suites = {
    steady,
    'first-writes': firstWrites,
    'many-snapshots': manySnapshots,
    synced,
    'command-costs': commandCosts,
    ceph,
    migrate,
  }
  const document: Document = {
    machine: {
      cpus: cpus().length,
      model: cpus()[0]?.model ?? '',
      kernel: release(),
      memory: values.memory,
      disk: values.disk,
      loadBefore: readFileSync('/proc/loadavg', 'utf8').split(' ')[0] ?? '',
    },
    rounds: positive('rounds', values.rounds),
    seconds: positive('seconds', values.seconds),
    rows: [],
    figures: [],
    skipped: [],
  }
  process.stdout.write(`${heading}\n`)
  for (const [name, suite] of Object.entries(suites)) {
    if (!name.includes(values.only)) continue
    const parent = resolve(onDisk.includes(name) ? values.disk : values.memory)
    const folder = mkdtempSync(join(parent, 'atoll-bench-'))
    const bench = new Bench(folder, document, (line) => process.stdout.write(`${line}\n`))
    try {
      await suite(bench)
    } finally {
      await bench.close()
      rmSync(folder, { recursive: true, force: true })
    }
  }
  for (const reason of document.skipped) process.stdout.write(`skipped: ${reason}\n`)
  writeFileSync(values.json, `${JSON.stringify(document, null, 2)}\n`)
  const missed = [
    ...document.rows.filter((row) => row.target !== null && row.ratio < row.target).map(rowLine),
    ...document.figures.filter((figure) => figure.limit !== null && figure.value > figure.limit).map(figureLine),
  ]
  if (missed.length > 0) {
    process.stdout.write(`\n${missed.length} missed:\n${missed.join('\n')}\n`)
    process.exitCode = 1
  }
}

function positive(name: string, text: string): number {
  const value = Number(text)
  if (Number.isInteger(value) && value >= 1 && value <= 1000) return value
  process.stderr.write(`--${name} ${text}: a whole number from 1 to 1000 is wanted\n`)
  process.exit(2)
}
