/**
 * `node long-history.ts [--snapshots N] [--writes N] [--area-mib N] [--delete N] [--on DIRECTORY]`: what a volume with a long
 * history costs. `--on`: the history is there already, in a directory of a run that was ended (it is removed afterwards).
 *
 * A volume gets N snapshots with some random 4 KiB writes before each. Beside it lies a volume of the same content without
 * any history, so that reads of the two can be compared in the same run.
 */
import { readdirSync, statSync } from 'node:fs'
import { join } from 'node:path'
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { setImmediate as nextTurn } from 'node:timers/promises'
import { parseArgs } from 'node:util'
import type { Device } from '@atoll/native'
import { adminProject } from '@atoll/core'
import { GiB, MiB, openStand, spread, type Stand } from './stand.ts'

const { values } = parseArgs({
  options: {
    snapshots: { type: 'string', default: '10000' },
    writes: { type: 'string', default: '8' },
    'area-mib': { type: 'string', default: '1024' },
    delete: { type: 'string', default: '5000' },
    on: { type: 'string' },
  },
})
const snapshotCount = Number(values.snapshots)
const writesEach = Number(values.writes)
const areaBytes = Number(values['area-mib']) * MiB
const deleteCount = Math.min(Number(values.delete), snapshotCount)
const blockBytes = 4096
const sizeBytes = Math.max(4 * GiB, areaBytes)

function say(what: string, value: string): void {
  process.stdout.write(`${what.padEnd(66)} ${value}\n`)
}

const ms = (value: number): string => `${value.toFixed(1)} ms`
const mib = (value: number): string => `${(value / MiB).toFixed(1)} MiB`

function descriptors(): number {
  return readdirSync('/proc/self/fd').length
}

function memory(stand: Stand): string {
  const { rss, heapUsed } = process.memoryUsage()
  return `rss ${mib(rss)}, heap ${mib(heapUsed)}, maps ${mib(stand.engine.stats().mapBytes)}`
}

/**
 * Runs `fn` and says how long it took and how long the event loop stood still: by the clock, and by the processor time of its
 * thread in one turn, which other processes on a loaded machine do not add to.
 */
async function timed<T>(what: string, fn: () => Promise<T>): Promise<T> {
  const delay = monitorEventLoopDelay({ resolution: 1 })
  delay.enable()
  const turn = { longestMs: 0, isOver: false }
  const watched = watchTurns(turn)
  const startedAt = performance.now()
  const result = await fn()
  const tookMs = performance.now() - startedAt
  turn.isOver = true
  await watched
  await new Promise((resolve) => setTimeout(resolve, 5))
  delay.disable()
  say(what, `${ms(tookMs)}, event loop held ${ms(delay.max / 1e6)}, longest turn ${ms(turn.longestMs)} of processor time`)
  return result
}

const processorMs = (): number => {
  const { user, system } = process.threadCpuUsage()
  return (user + system) / 1000
}

/** A turn of the event loop lies between two immediates. */
async function watchTurns(turn: { longestMs: number; isOver: boolean }): Promise<void> {
  for (let before = processorMs(); !turn.isOver;) {
    await nextTurn()
    const now = processorMs()
    turn.longestMs = Math.max(turn.longestMs, now - before)
    before = now
  }
}

let state = 4711
function random(limit: number): number {
  state = (Math.imul(state, 1664525) + 1013904223) >>> 0
  return Math.floor((state / 2 ** 32) * limit)
}

async function fill(device: Device): Promise<void> {
  const data = Buffer.alloc(4 * MiB, 1)
  for (let offset = 0; offset < areaBytes; offset += data.length) await device.write(offset, data)
}

/** MiB/s of sequential 1 MiB reads over the area, and operations per second of random 4 KiB reads, 32 in flight. */
async function readSpeed(device: Device): Promise<{ sequential: number; random: number }> {
  const startedAt = performance.now()
  for (let offset = 0; offset < areaBytes; offset += MiB) await device.read(offset, MiB)
  const sequential = areaBytes / MiB / ((performance.now() - startedAt) / 1000)
  const readsEach = 4000
  const randomAt = performance.now()
  await Promise.all(
    Array.from({ length: 32 }, async () => {
      for (let count = 0; count < readsEach; count++) await device.read(random(areaBytes / blockBytes) * blockBytes, blockBytes)
    }),
  )
  return { sequential, random: (32 * readsEach) / ((performance.now() - randomAt) / 1000) }
}

async function compareReads(label: string, withHistory: Device, without: Device): Promise<void> {
  const ratios: { sequential: number; random: number }[] = []
  let last = { sequential: 0, random: 0 }
  let lastPlain = last
  for (let round = 0; round < 5; round++) {
    lastPlain = await readSpeed(without)
    last = await readSpeed(withHistory)
    // The first round warms both.
    if (round > 0) ratios.push({ sequential: last.sequential / lastPlain.sequential, random: last.random / lastPlain.random })
  }
  const sequential = spread(ratios.map((ratio) => ratio.sequential)).median
  const randomRatio = spread(ratios.map((ratio) => ratio.random)).median
  say(`${label}: sequential 1 MiB reads`, `${last.sequential.toFixed(0)} MiB/s, ${sequential.toFixed(2)}x of no history`)
  say(`${label}: random 4 KiB reads, 32 in flight`, `${last.random.toFixed(0)}/s, ${randomRatio.toFixed(2)}x of no history`)
}

async function makeVolume(stand: Stand, name: string): Promise<string> {
  const row = await stand.mapper.createVolume({ projectId: adminProject.id, name, sizeBytes, poolId: stand.poolId })
  return row.id
}

async function takeSnapshots(stand: Stand, id: string, device: Device): Promise<void> {
  let tookMs: number[] = []
  const data = Buffer.alloc(blockBytes, 2)
  const step = Math.max(1, Math.floor(snapshotCount / 5))
  for (let number = 1; number <= snapshotCount; number++) {
    await Promise.all(Array.from({ length: writesEach }, () => device.write(random(areaBytes / blockBytes) * blockBytes, data)))
    const startedAt = performance.now()
    await stand.mapper.snapshot([{ volumeId: id, name: `s${number}` }])
    tookMs.push(performance.now() - startedAt)
    if (number % step > 0) continue
    const { median, max } = spread(tookMs)
    say(`snapshots up to the ${number}th`, `median ${ms(median)}, largest ${ms(max)}, ${descriptors()} descriptors`)
    tookMs = []
  }
}

async function usageCosts(stand: Stand, id: string, snapshots: readonly string[], label: string): Promise<void> {
  const { mapper } = stand
  const show = async (what: string, resourceId: string): Promise<void> => {
    const { usedBytes, sharedBytes } = await timed(`${label}: usage, ${what}`, () => mapper.usage(resourceId))
    say('', `used ${mib(usedBytes ?? NaN)}, shared ${mib(sharedBytes ?? NaN)}`)
  }
  await show('of the volume, first call', id)
  await show('of the volume, again', id)
  await show('of a snapshot', snapshots[Math.floor(snapshots.length / 2)] ?? id)
  const { device } = await mapper.open(id, { holder: 'cost', readOnly: false })
  for (let leaf = 0; leaf < areaBytes; leaf += 32 * MiB) await device.write(leaf, Buffer.alloc(blockBytes, 3))
  await mapper.checkpoint(id)
  await show('of the volume, every leaf changed', id)
  await mapper.close(id)
  await timed(`${label}: pool status, first call`, () => mapper.pools.status(stand.poolId))
  await timed(`${label}: pool status, again`, () => mapper.pools.status(stand.poolId))
}

function sizesOf(directory: string): string {
  let bytes = 0
  for (const name of readdirSync(directory)) if (name.startsWith('catalog.db')) bytes += statSync(join(directory, name)).size
  return mib(bytes)
}

/** Makes the volume with the history and the one without, and reads through both before anything was closed. */
async function makeHistory(first: Stand): Promise<void> {
  say('the history', `${snapshotCount} snapshots, ${writesEach} random 4 KiB writes before each, over ${mib(areaBytes)}`)
  const plain = await makeVolume(first, 'plain')
  const volume = await makeVolume(first, 'volume')
  for (const id of [plain, volume]) {
    const { device } = await first.mapper.open(id, { holder: 'cost', readOnly: false })
    await fill(device)
    await first.mapper.close(id)
  }
  const { device } = await first.mapper.open(volume, { holder: 'cost', readOnly: false })
  const { device: plainDevice } = await first.mapper.open(plain, { holder: 'cost', readOnly: false })
  await takeSnapshots(first, volume, device)
  say('memory', memory(first))
  await compareReads('never closed', device, plainDevice)
  say('descriptors after reading', String(descriptors()))
  await first.mapper.close(volume)
  await first.mapper.close(plain)
}

const first = await openStand(values.on)
if (values.on === undefined) await makeHistory(first)
const stand = await timed('process start (mapper opened)', () => first.reopen())
say('catalog', sizesOf(stand.directory))
const rows = await timed('rows of all resources', () =>
  stand.catalog.db.selectFrom('resources').selectAll().orderBy('created_at').orderBy('id').execute(),
)
const idOf = (name: string): string => rows.find((row) => row.name === name)?.id ?? ''
const volume = idOf('volume')
const plain = idOf('plain')
const snapshots = rows.filter((row) => row.kind === 'snapshot').map((row) => row.id)
const { device: reopened } = await timed('open', () => stand.mapper.open(volume, { holder: 'cost', readOnly: false }))
const { device: plainAgain } = await stand.mapper.open(plain, { holder: 'cost', readOnly: false })
say('descriptors after the open', String(descriptors()))
say('memory', memory(stand))
await compareReads('opened anew', reopened, plainAgain)
say('descriptors after reading', String(descriptors()))
say('memory', memory(stand))
const again = await timed('one more snapshot', () => stand.mapper.snapshot([{ volumeId: volume, name: 'more' }]))
say('', `gate closed ${ms(again.pauseMs)}`)
await timed('open of a snapshot', () => stand.mapper.open(snapshots[100] ?? volume, { holder: 'cost', readOnly: true }))
await stand.mapper.close(snapshots[100] ?? volume)
await stand.mapper.close(volume)
await stand.mapper.close(plain)

await usageCosts(stand, volume, snapshots, 'all')
say('memory', memory(stand))
await timed('check', () => stand.mapper.check())
await timed('check, deep', () => stand.mapper.check({ deep: true }))
const { sweptPages } = await timed('reclaim with nothing to free', () => stand.mapper.reclaim(null))
say('', `${sweptPages} pages swept`)
await timed('reclaim again', () => stand.mapper.reclaim(null))
await timed(`${deleteCount} snapshots deleted`, async () => {
  // Every other one, so that layers are left in part.
  const stride = Math.max(1, Math.floor(snapshotCount / deleteCount))
  for (let index = 0; index < deleteCount; index++) await stand.mapper.deleteResource(snapshots[index * stride] ?? '')
})
const result = await timed('reclaim after it', () => stand.mapper.reclaim(null))
say('', `${mib(result.freedBytes)} freed, ${result.removedLayers} layers removed, ${result.sweptPages} pages swept`)
say('memory', memory(stand))
await timed('usage of the volume after it', () => stand.mapper.usage(volume))
await stand.close()
