/**
 * Random operations against plain arrays.
 *
 * A case is a world of its own: volumes of a few leaves, of which only slots around the leaves' borders are written (so that
 * leaves, inner nodes and whole subtrees all take part), their snapshots, clones and images. After each reclaim, whatever is open,
 * nothing may be left that no durable root refers to; what is said to be used and shared is compared with a count; and every
 * resource must be, byte for byte, what the arrays say, also after a restart. In every third case there are two pools, and a clone
 * may lie in another one than its source.
 *
 * ATOLL_MODEL_CASES: number of cases (default 300; `npm run test:crash` runs 10,000). ATOLL_SEED: seed of the first one (default 1); case n has seed + n.
 */
import { adminProject } from '@atoll/core'
import type { Device } from '@atoll/native'
import { afterAll, describe, expect, it } from 'vitest'
import { Bench, leaf, Random, slot } from './test-bench.ts'

const caseCount = Number(process.env['ATOLL_MODEL_CASES'] ?? 300)
const firstSeed = Number(process.env['ATOLL_SEED'] ?? 1)
/** Cases that share one test, and so one time limit: some seconds of its ten minutes. */
const casesPerTest = 25
const operationsPerCase = 60
const volumesMax = 5
const resourcesMax = 14
const leavesMax = 3
/** Slots on both sides of a leaf's border that are written. */
const borderSlots = 6

/** Content by slot; what is not there is zeros. */
type Content = Map<number, Buffer>

interface Resource {
  id: string
  name: string
  kind: 'volume' | 'snapshot' | 'image'
  sizeBytes: number
  content: Content
  volumeId: string | null
  device: Device | null
}

class World {
  readonly random: Random
  readonly bench: Bench
  readonly resources = new Map<string, Resource>()
  readonly journal: string[] = []
  #counter = 0
  #stamp = 1

  constructor(bench: Bench, seed: number) {
    this.bench = bench
    this.random = new Random(seed)
  }

  of(kind: Resource['kind']): Resource[] {
    return [...this.resources.values()].filter((resource) => resource.kind === kind)
  }

  note(text: string): void {
    this.journal.push(text)
  }

  name(kind: string): string {
    return `${kind}${(this.#counter += 1)}`
  }

  poolId(): string {
    const { poolIds, poolId } = this.bench
    return poolIds.length === 1 ? poolId : this.random.pick(poolIds)
  }

  nextStamp(): number {
    this.#stamp = (this.#stamp % 250) + 1
    return this.#stamp
  }

  size(minBytes = slot): number {
    const border = (1 + this.random.below(leavesMax)) * leaf
    const sizeBytes = border + (this.random.below(2 * borderSlots) - borderSlots) * slot
    return Math.max(minBytes, Math.min(sizeBytes, leavesMax * leaf))
  }

  /** Slots that are looked at. */
  *slots(sizeBytes: number): Generator<number> {
    const end = Math.ceil(sizeBytes / slot)
    for (let border = 0; border <= leavesMax; border += 1) {
      const middle = (border * leaf) / slot
      for (let at = Math.max(0, middle - borderSlots); at < Math.min(end, middle + borderSlots); at += 1) yield at
    }
  }

  /** A range of bytes near the borders; sometimes a very long one. */
  range(sizeBytes: number, long: boolean): { offsetBytes: number; lengthBytes: number } {
    const slots = [...this.slots(sizeBytes)]
    let offsetBytes = this.random.pick(slots) * slot
    const aligned = this.random.below(3) > 0
    if (!aligned) offsetBytes += this.random.below(slot)
    let lengthBytes = (1 + this.random.below(4)) * slot
    if (!aligned) lengthBytes = 1 + this.random.below(3 * slot)
    if (long && this.random.below(4) === 0) lengthBytes = (1 + this.random.below(leavesMax)) * leaf
    return { offsetBytes, lengthBytes: Math.min(lengthBytes, sizeBytes - offsetBytes) }
  }

  read(resource: Resource, at: number): Buffer {
    return resource.content.get(at) ?? Buffer.alloc(slot)
  }

  /** Changes the model: `fill` for bytes, null for zeros. Only slots that are looked at are kept. */
  put(resource: Resource, offsetBytes: number, lengthBytes: number, fill: number | null): void {
    for (const at of this.slots(resource.sizeBytes)) {
      const from = Math.max(offsetBytes, at * slot)
      const until = Math.min(offsetBytes + lengthBytes, (at + 1) * slot)
      if (from >= until) continue
      const block = Buffer.from(this.read(resource, at))
      block.fill(fill ?? 0, from - at * slot, until - at * slot)
      resource.content.set(at, block)
    }
  }

  add(resource: Omit<Resource, 'device'>): Resource {
    const added = { ...resource, device: null }
    this.resources.set(resource.id, added)
    return added
  }
}

function copyOf(content: Content, sizeBytes: number): Content {
  const copy: Content = new Map()
  for (const [at, block] of content) if (at * slot < sizeBytes) copy.set(at, Buffer.from(block))
  return copy
}

type Operation = (world: World) => Promise<void>

async function create(world: World): Promise<void> {
  if (world.of('volume').length >= volumesMax) return
  const sizeBytes = world.size()
  const row = await world.bench.volume(world.name('v'), sizeBytes, undefined, world.poolId())
  world.note(`create ${row.name} of ${sizeBytes}`)
  world.add({ id: row.id, name: row.name, kind: 'volume', sizeBytes, content: new Map(), volumeId: null })
}

async function clone(world: World): Promise<void> {
  if (world.of('volume').length >= volumesMax || world.resources.size === 0) return
  const source = world.random.pick([...world.resources.values()])
  const sizeBytes = Math.max(Math.ceil(source.sizeBytes / slot) * slot, world.random.below(2) === 0 ? world.size() : 0)
  const poolId = world.poolId()
  const row = await world.bench.volume(world.name('c'), sizeBytes, source.id, poolId)
  world.note(`clone ${source.name} as ${row.name} of ${sizeBytes} in pool ${world.bench.poolIds.indexOf(poolId)}`)
  world.add({
    id: row.id,
    name: row.name,
    kind: 'volume',
    sizeBytes,
    content: copyOf(source.content, source.sizeBytes),
    volumeId: null,
  })
}

async function open(world: World): Promise<void> {
  const closed = world.of('volume').filter((volume) => volume.device === null)
  if (closed.length === 0) return
  const volume = world.random.pick(closed)
  world.note(`open ${volume.name}`)
  volume.device = await world.bench.attach(volume.id)
}

async function close(world: World): Promise<void> {
  const opened = world.of('volume').filter((volume) => volume.device !== null)
  if (opened.length === 0) return
  const volume = world.random.pick(opened)
  world.note(`close ${volume.name}`)
  await world.bench.mapper.close(volume.id)
  volume.device = null
}

function withDevice(change: (world: World, volume: Resource, device: Device) => Promise<void>): Operation {
  return async (world) => {
    const opened = world.of('volume').filter((volume) => volume.device !== null)
    if (opened.length === 0) return await open(world)
    const volume = world.random.pick(opened)
    if (volume.device !== null) await change(world, volume, volume.device)
  }
}

const write = withDevice(async (world, volume, device) => {
  const { offsetBytes, lengthBytes } = world.range(volume.sizeBytes, false)
  const fill = world.nextStamp()
  world.note(`write ${volume.name} ${offsetBytes}+${lengthBytes} = ${fill}`)
  await device.write(offsetBytes, Buffer.alloc(lengthBytes, fill))
  world.put(volume, offsetBytes, lengthBytes, fill)
})

const discard = withDevice(async (world, volume, device) => {
  const { offsetBytes, lengthBytes } = world.range(volume.sizeBytes, true)
  world.note(`discard ${volume.name} ${offsetBytes}+${lengthBytes}`)
  await device.discard(offsetBytes, lengthBytes)
  // Whole slots read as zeros, the rest is untouched.
  const from = Math.ceil(offsetBytes / slot) * slot
  const until = Math.floor((offsetBytes + lengthBytes) / slot) * slot
  if (until > from) world.put(volume, from, until - from, null)
})

const writeZeroes = withDevice(async (world, volume, device) => {
  const { offsetBytes, lengthBytes } = world.range(volume.sizeBytes, true)
  const allocate = lengthBytes < leaf && world.random.below(2) === 0
  world.note(`zero ${volume.name} ${offsetBytes}+${lengthBytes}${allocate ? ' allocated' : ''}`)
  await device.writeZeroes(offsetBytes, lengthBytes, allocate)
  world.put(volume, offsetBytes, lengthBytes, null)
})

const flush = withDevice(async (world, volume, device) => {
  world.note(`flush ${volume.name}`)
  await device.flush()
})

const checkpoint = withDevice(async (world, volume) => {
  world.note(`checkpoint ${volume.name}`)
  await world.bench.mapper.checkpoint(volume.id)
})

async function snapshot(world: World): Promise<void> {
  const volumes = world.of('volume')
  if (volumes.length === 0 || world.resources.size >= resourcesMax) return
  const chosen = volumes.filter(() => world.random.below(3) === 0)
  if (chosen.length === 0) chosen.push(world.random.pick(volumes))
  const items = chosen.map((volume) => ({ volumeId: volume.id, name: world.name('s') }))
  world.note(`snapshot ${chosen.map((volume, index) => `${volume.name}@${items[index]?.name}`).join(' ')}`)
  const { rows } = await world.bench.mapper.snapshot(items)
  for (const [index, row] of rows.entries()) {
    const volume = chosen[index] as Resource
    expect(row.size_bytes).toBe(volume.sizeBytes)
    world.add({
      id: row.id,
      name: row.name,
      kind: 'snapshot',
      sizeBytes: volume.sizeBytes,
      content: copyOf(volume.content, volume.sizeBytes),
      volumeId: volume.id,
    })
  }
}

async function image(world: World): Promise<void> {
  if (world.resources.size === 0 || world.resources.size >= resourcesMax) return
  const source = world.random.pick([...world.resources.values()])
  const row = await world.bench.mapper.createImage({ projectId: adminProject.id, name: world.name('i'), fromId: source.id })
  world.note(`image ${row.name} of ${source.name}`)
  world.add({
    id: row.id,
    name: row.name,
    kind: 'image',
    sizeBytes: source.sizeBytes,
    content: copyOf(source.content, source.sizeBytes),
    volumeId: null,
  })
}

async function importImage(world: World): Promise<void> {
  if (world.resources.size >= resourcesMax) return
  const sizeBytes = 1 + world.random.below(8 * slot)
  const wanted = { projectId: adminProject.id, name: world.name('m'), kind: 'image' as const, poolId: world.bench.poolId }
  const fill = world.nextStamp()
  world.note(`import ${wanted.name} of ${sizeBytes} = ${fill}`)
  const { resourceId, device } = await world.bench.mapper.beginImport({ ...wanted, sizeBytes })
  await device.write(0, Buffer.alloc(sizeBytes, fill))
  await world.bench.mapper.finishImport(resourceId)
  const added = world.add({ id: resourceId, name: wanted.name, kind: 'image', sizeBytes, content: new Map(), volumeId: null })
  world.put(added, 0, sizeBytes, fill)
}

async function resize(world: World): Promise<void> {
  const volumes = world.of('volume')
  if (volumes.length === 0) return
  const volume = world.random.pick(volumes)
  const sizeBytes = world.size()
  world.note(`resize ${volume.name} from ${volume.sizeBytes} to ${sizeBytes}`)
  await world.bench.mapper.resize(volume.id, sizeBytes)
  volume.content = copyOf(volume.content, sizeBytes)
  volume.sizeBytes = sizeBytes
}

async function rollback(world: World): Promise<void> {
  const snapshots = world.of('snapshot')
  if (snapshots.length === 0) return
  const chosen = world.random.pick(snapshots)
  const volume = world.resources.get(chosen.volumeId ?? '')
  if (volume === undefined) return
  if (volume.device !== null) {
    await world.bench.mapper.close(volume.id)
    volume.device = null
  }
  world.note(`rollback ${volume.name} to ${chosen.name}`)
  await world.bench.mapper.rollback(volume.id, chosen.id)
  volume.sizeBytes = chosen.sizeBytes
  volume.content = copyOf(chosen.content, chosen.sizeBytes)
}

async function remove(world: World): Promise<void> {
  if (world.resources.size < 3) return
  const gone = world.random.pick([...world.resources.values()])
  if (gone.device !== null) {
    await world.bench.mapper.close(gone.id)
    gone.device = null
  }
  const snapshots = world.of('snapshot').filter((other) => other.volumeId === gone.id)
  world.note(`delete ${gone.name}${snapshots.length > 0 ? ' and its snapshots' : ''}`)
  if (snapshots.length > 0)
    await expect(world.bench.mapper.deleteResource(gone.id)).rejects.toMatchObject({ code: 'VOLUME_HAS_SNAPSHOTS' })
  await world.bench.mapper.deleteResource(gone.id, { withSnapshots: true })
  for (const { id } of [gone, ...snapshots]) world.resources.delete(id)
}

/** Afterwards what is allocated is what is referred to, whether volumes are open or not. */
async function reclaim(world: World): Promise<void> {
  world.note('reclaim')
  await world.bench.mapper.reclaim(null)
  expect(await world.bench.findLeak()).toBe(null)
}

/** What is said to be used and shared is what a count slot by slot says. */
async function usage(world: World): Promise<void> {
  world.note('usage')
  for (const volume of world.of('volume')) if (volume.device !== null) await world.bench.mapper.checkpoint(volume.id)
  const counted = await world.bench.countUsage()
  for (const { id, name } of world.resources.values()) {
    const said = await world.bench.mapper.usage(id)
    if (world.bench.poolIds.length > 1) {
      const { home_pool_id: home } = await world.bench.row(id)
      const other = (await world.bench.mapper.readsFrom(id)).map((pool) => pool.id)
      expect(other, `the pools that ${name} reads from`).toEqual(await world.bench.poolsNamedBy(id, home))
    }
    // Of zeros that were written as allocated a file system says data or hole, by whether they were read since.
    if (world.bench.backend.folder === null) expect(said, `usage of ${name}`).toEqual(counted.get(id))
  }
}

/** Several things at once: the order among them does not change what the arrays say. */
async function together(world: World): Promise<void> {
  if (world.of('volume').every((volume) => volume.device === null)) return
  world.note('together:')
  await Promise.all([world.bench.mapper.reclaim(null), write(world), checkpoint(world)])
}

async function compareSome(world: World): Promise<void> {
  if (world.resources.size === 0) return
  await compare(world, world.random.pick([...world.resources.values()]))
}

async function diff(world: World): Promise<void> {
  const snapshots = world.of('snapshot')
  if (snapshots.length === 0) return
  const from = world.random.pick(snapshots)
  const volume = world.resources.get(from.volumeId ?? '')
  if (volume === undefined) return
  world.note(`diff ${from.name} ${volume.name}`)
  const ranges = await world.bench.mapper.diff(from.id, volume.id)
  for (const at of world.slots(volume.sizeBytes)) {
    const range = ranges.find(({ offsetBytes, lengthBytes }) => offsetBytes <= at * slot && at * slot < offsetBytes + lengthBytes)
    const present = world.read(volume, at)
    if (range === undefined)
      expect(present.equals(world.read(from, at)), `slot ${at} differs but is not in the difference`).toBe(true)
    else if (range.kind === 'zero') expect(present.equals(Buffer.alloc(slot)), `slot ${at} is said to be zero`).toBe(true)
  }
}

async function restart(world: World): Promise<void> {
  world.note('restart')
  await world.bench.restart()
  for (const resource of world.resources.values()) resource.device = null
}

/** kill -9 after a flush of everything: nothing may be lost. */
async function kill(world: World): Promise<void> {
  world.note('flush all and kill')
  for (const volume of world.of('volume')) {
    await volume.device?.flush()
    volume.device = null
  }
  await world.bench.kill()
}

/** kill -9 in the middle of a snapshot, between the swap and its commit, with writes and a flush in between. */
async function killInSnapshot(world: World): Promise<void> {
  const opened = world.of('volume').filter((volume) => volume.device !== null)
  const volume = opened[0]
  if (volume === undefined || volume.device === null) return
  world.note(`kill in a snapshot of ${volume.name}`)
  for (const other of opened) await other.device?.flush()
  world.bench.failing.beforeWrite = ({ durable }) => {
    if (durable) throw new Error('the catalog is gone')
  }
  await world.bench.mapper.snapshot([{ volumeId: volume.id, name: 'never' }]).catch(() => undefined)
  for (let count = world.random.below(3); count > 0; count -= 1) {
    const { offsetBytes, lengthBytes } = world.range(volume.sizeBytes, false)
    const fill = world.nextStamp()
    world.note(`write ${volume.name} ${offsetBytes}+${lengthBytes} = ${fill}`)
    await volume.device.write(offsetBytes, Buffer.alloc(lengthBytes, fill))
    world.put(volume, offsetBytes, lengthBytes, fill)
  }
  await volume.device.flush()
  for (const other of opened) other.device = null
  await world.bench.kill()
}

/** Operations by weight. */
const operations: readonly (readonly [number, Operation])[] = [
  [3, create],
  [4, clone],
  [4, open],
  [3, close],
  [30, write],
  [6, discard],
  [5, writeZeroes],
  [4, flush],
  [5, checkpoint],
  [7, snapshot],
  [2, image],
  [2, importImage],
  [6, resize],
  [3, rollback],
  [4, remove],
  [4, reclaim],
  [3, together],
  [4, compareSome],
  [3, usage],
  [2, diff],
  [1, restart],
  [1, kill],
  [1, killInSnapshot],
]
const weightSum = operations.reduce((sum, [weight]) => sum + weight, 0)

function pickOperation(random: Random): Operation {
  let roll = random.below(weightSum)
  for (const [weight, operation] of operations) {
    roll -= weight
    if (roll < 0) return operation
  }
  return write
}

async function compare(world: World, resource: Resource): Promise<void> {
  const slots = [...world.slots(resource.sizeBytes)]
  const present = world.bench.mapper.opened(resource.id)
  const opened = present ?? (await world.bench.mapper.open(resource.id, { holder: 'test', readOnly: true }))
  try {
    expect(opened.device.sizeBytes()).toBe(resource.sizeBytes)
    for (let index = 0; index < slots.length;) {
      // One read for slots that follow each other.
      let end = index + 1
      while (end < slots.length && slots[end] === (slots[end - 1] ?? 0) + 1) end += 1
      const offsetBytes = (slots[index] ?? 0) * slot
      const lengthBytes = Math.min((end - index) * slot, resource.sizeBytes - offsetBytes)
      const found = Buffer.from(await opened.device.read(offsetBytes, lengthBytes))
      for (let each = index; each < end; each += 1) {
        const at = slots[each] ?? 0
        const from = at * slot - offsetBytes
        const part = found.subarray(from, from + slot)
        const wanted = world.read(resource, at).subarray(0, part.length)
        if (!part.equals(wanted))
          throw new Error(`slot ${at} of ${resource.name} has ${part[0]}…, not ${wanted[0]}… (${firstDifference(part, wanted)})`)
      }
      index = end
    }
  } finally {
    if (present === undefined) await world.bench.mapper.close(resource.id)
  }
}

function firstDifference(found: Buffer, wanted: Buffer): string {
  const at = found.findIndex((value, index) => value !== wanted[index])
  return `at byte ${at}: ${found[at]}, not ${wanted[at]}`
}

async function compareAll(world: World): Promise<void> {
  for (const resource of world.resources.values()) await compare(world, resource)
}

async function runCase(seed: number): Promise<void> {
  // One in ten over files: the same calls, through a real file system.
  const bench = await Bench.open({ files: seed % 10 === 0, pools: seed % 3 === 0 ? 2 : 1 })
  const world = new World(bench, seed)
  try {
    for (let index = 0; index < operationsPerCase; index += 1) await pickOperation(world.random)(world)
    await compareAll(world)
    await reclaim(world)
    await usage(world)
    await compareAll(world)
    for (const volume of world.of('volume')) {
      if (volume.device !== null) await bench.mapper.close(volume.id)
      volume.device = null
    }
    await bench.mapper.reclaim(null)
    expect(await bench.findLeak()).toBe(null)
    await compareAll(world)
    await bench.restart()
    await compareAll(world)
    expect((await bench.mapper.reclaim(null)).freedBytes).toBe(0)
  } catch (error) {
    throw new Error(`ATOLL_SEED=${seed} ATOLL_MODEL_CASES=1 shows it again. ${String(error)}\n${world.journal.join('\n')}`, {
      cause: error,
    })
  } finally {
    await bench.close()
  }
}

describe('random operations against plain arrays', () => {
  let done = 0
  afterAll(() => {
    process.stdout.write(`model: ${done} cases from seed ${firstSeed}\n`)
  })

  for (let start = 0; start < caseCount; start += casesPerTest) {
    const end = Math.min(caseCount, start + casesPerTest)
    it(`leave every resource as it must be and nothing behind, seeds ${firstSeed + start} to ${firstSeed + end - 1}`, async () => {
      for (let index = start; index < end; index += 1) {
        await runCase(firstSeed + index)
        done += 1
      }
    })
  }
})
