/** `node run-costs.ts`: measures what snapshots, clones, maps, checkpoints and opening cost, and prints it beside the limits. */
import { checkpointDelay, fileCosts, mapMemory, openManyMs, shareCosts } from './costs.ts'
import { GiB, MiB, openStand, TiB } from './stand.ts'

interface Row {
  readonly what: string
  readonly value: number
  readonly limit: number
  readonly unit: string
}

const rows: Row[] = []
function row(what: string, value: number, limit: number, unit: string): void {
  rows.push({ what, value, limit, unit })
  const verdict = limit === Infinity ? '' : value <= limit ? `<= ${limit}` : `OVER ${limit}`
  process.stdout.write(`${what.padEnd(66)} ${value.toFixed(2).padStart(10)} ${unit.padEnd(4)} ${verdict}\n`)
}

const stand = await openStand()
const small = await shareCosts(stand, GiB, '1gib')
const large = await shareCosts(stand, TiB, '1tib')
await stand.close()
row('snapshot of an open 1 GiB clone, idle (median)', small.idle.snapshotMs.median, Infinity, 'ms')
row('snapshot of an open 1 TiB clone, idle (median)', large.idle.snapshotMs.median, 20, 'ms')
row('snapshot of an open 1 TiB clone, idle (largest)', large.idle.snapshotMs.max, Infinity, 'ms')
row('clone of an open 1 GiB clone, idle (median)', small.idle.cloneMs.median, Infinity, 'ms')
row('clone of an open 1 TiB clone, idle (median)', large.idle.cloneMs.median, 20, 'ms')
row('snapshot, 1 TiB : 1 GiB', large.idle.snapshotMs.median / small.idle.snapshotMs.median, 2, 'x')
row('clone, 1 TiB : 1 GiB', large.idle.cloneMs.median / small.idle.cloneMs.median, 2, 'x')
row('gate closed, idle (largest)', large.idle.pauseMsMax, 5, 'ms')
row('snapshot of 1 TiB under full write load (median)', large.underLoad.snapshotMs.median, Infinity, 'ms')
row('clone of 1 TiB under full write load (median)', large.underLoad.cloneMs.median, Infinity, 'ms')
row('gate closed, under full write load (largest)', large.underLoad.pauseMsMax, Infinity, 'ms')

const memory = await mapMemory()
row('map of a fresh 1 TiB volume', memory.freshBytes / MiB, 0.1, 'MiB')
row('map of a 1 TiB clone with 1 GiB of sequential writes', memory.sequentialBytes / MiB, 1, 'MiB')
row('map of a 1 TiB clone with 200 MiB of random 4 KiB writes', memory.randomBytes / MiB, 32, 'MiB')

const delay = await checkpointDelay(16_000)
row(
  `event loop held by a checkpoint of ${delay.leafCount} leaves (${delay.totalMs.toFixed(0)} ms)`,
  delay.eventLoopDelayMsMax,
  20,
  'ms',
)
row('1,000 volumes opened', await openManyMs(1000), 5000, 'ms')

const files = await fileCosts(1000)
row('a file of 4 KiB put in the place of another (median of 1,000)', files.putMs.median, Infinity, 'ms')
row('files of 4 KiB put, 16 at a time', files.filesPerSecond, Infinity, '/s')

process.exitCode = rows.some(({ value, limit }) => value > limit) ? 1 : 0
