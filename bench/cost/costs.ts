/**
 * What snapshots, clones, maps and checkpoints cost, on this machine and file system. Each function measures one thing and
 * returns figures; run-costs.ts prints them beside their limits.
 */
import { monitorEventLoopDelay } from 'node:perf_hooks'
import { adminProject } from '@atoll/core'
import type { Device } from '@atoll/native'
import { cloneOf, GiB, leafBytes, makeImage, MiB, openStand, spread, TiB, type Stand } from './stand.ts'

export interface ShareCost {
  readonly snapshotMs: { median: number; max: number }
  readonly cloneMs: { median: number; max: number }
  readonly pauseMsMax: number
}

const rounds = 15
const blockBytes = 4096

/** An open clone of `sizeBytes` with one 4 KiB write in every leaf, checkpointed: snapshots and clones of it. */
export async function shareCosts(
  stand: Stand,
  sizeBytes: number,
  label: string,
): Promise<{ idle: ShareCost; underLoad: ShareCost }> {
  const image = await makeImage(stand, `image-${label}`, sizeBytes)
  const id = await cloneOf(stand, image, `volume-${label}`, sizeBytes)
  const { device } = await stand.mapper.open(id, { holder: 'cost', readOnly: false })
  await forEachLeaf(sizeBytes, (offset) => device.write(offset, Buffer.alloc(blockBytes, 7)))
  await stand.mapper.checkpoint(id)
  const idle = await measureShares(stand, id, sizeBytes, `${label}-idle`)
  const load = startLoad(device, sizeBytes)
  const underLoad = await measureShares(stand, id, sizeBytes, `${label}-load`)
  await load.stop()
  await stand.mapper.close(id)
  return { idle, underLoad }
}

async function forEachLeaf(sizeBytes: number, write: (offsetBytes: number) => Promise<void>): Promise<void> {
  const atOnce = 256
  for (let first = 0; first < sizeBytes; first += atOnce * leafBytes) {
    const offsets = Array.from({ length: atOnce }, (_, index) => first + index * leafBytes).filter((offset) => offset < sizeBytes)
    await Promise.all(offsets.map(write))
  }
}

async function measureShares(stand: Stand, volumeId: string, sizeBytes: number, label: string): Promise<ShareCost> {
  const snapshotMs: number[] = []
  const cloneMs: number[] = []
  let pauseMsMax = 0
  for (let round = 0; round < rounds; round++) {
    const startedAt = performance.now()
    const { pauseMs } = await stand.mapper.snapshot([{ volumeId, name: `${label}-${round}` }])
    snapshotMs.push(performance.now() - startedAt)
    pauseMsMax = Math.max(pauseMsMax, pauseMs)
    const clonedAt = performance.now()
    await cloneOf(stand, volumeId, `${label}-clone-${round}`, sizeBytes)
    cloneMs.push(performance.now() - clonedAt)
  }
  return { snapshotMs: spread(snapshotMs), cloneMs: spread(cloneMs), pauseMsMax }
}

/** Random 4 KiB writes, 32 in flight. */
function startLoad(device: Device, sizeBytes: number): { stop(): Promise<void> } {
  let running = true
  let state = 12345
  const next = (): number => {
    state = (Math.imul(state, 1664525) + 1013904223) >>> 0
    return state
  }
  const data = Buffer.alloc(blockBytes, 9)
  const workers = Array.from({ length: 32 }, async () => {
    while (running) await device.write((next() % Math.floor(sizeBytes / blockBytes)) * blockBytes, data)
  })
  return {
    async stop() {
      running = false
      await Promise.all(workers)
    },
  }
}

export interface MapMemory {
  readonly freshBytes: number
  readonly sequentialBytes: number
  readonly randomBytes: number
}

/** Bytes of map for 1 TiB: untouched; a clone with 1 GiB of sequential writes; a clone with 200 MiB of random 4 KiB writes. */
export async function mapMemory(): Promise<MapMemory> {
  const stand = await openStand()
  try {
    const measure = async (work: (device: Device) => Promise<void>, fromId?: string): Promise<number> => {
      const row = await stand.mapper.createVolume({
        projectId: adminProject.id,
        name: `memory-${performance.now()}`,
        sizeBytes: TiB,
        poolId: stand.poolId,
        ...(fromId === undefined ? {} : { fromId }),
      })
      const { device } = await stand.mapper.open(row.id, { holder: 'cost', readOnly: false })
      const before = stand.engine.stats().mapBytes
      await work(device)
      const after = stand.engine.stats().mapBytes
      await stand.mapper.close(row.id)
      return after - before
    }
    const image = await makeImage(stand, 'memory', TiB)
    const freshBytes = await measure(async (device) => device.write(0, Buffer.alloc(MiB, 1)))
    const sequentialBytes = await measure(async (device) => {
      const data = Buffer.alloc(4 * MiB, 1)
      for (let offset = 0; offset < GiB; offset += data.length) await device.write(offset, data)
    }, image)
    const randomBytes = await measure(async (device) => {
      let state = 99
      const data = Buffer.alloc(blockBytes, 3)
      for (let batch = 0; batch < (200 * MiB) / blockBytes / 256; batch++) {
        const offsets = Array.from({ length: 256 }, () => {
          state = (Math.imul(state, 1664525) + 1013904223) >>> 0
          return Math.floor((state / 2 ** 32) * (TiB / blockBytes)) * blockBytes
        })
        await Promise.all(offsets.map((offset) => device.write(offset, data)))
      }
    }, image)
    return { freshBytes, sequentialBytes, randomBytes }
  } finally {
    await stand.close()
  }
}

/** The longest time that the event loop stood still while the catalog took `leafCount` dirty leaves in one checkpoint. */
export async function checkpointDelay(
  leafCount: number,
): Promise<{ leafCount: number; totalMs: number; eventLoopDelayMsMax: number }> {
  const stand = await openStand()
  try {
    const sizeBytes = leafCount * leafBytes
    const image = await makeImage(stand, 'image', sizeBytes)
    const id = await cloneOf(stand, image, 'volume', sizeBytes)
    const { device } = await stand.mapper.open(id, {
      holder: 'cost',
      readOnly: false,
      limits: { dirtyLeavesSoft: leafCount * 2, dirtyLeavesHard: leafCount * 4 },
    })
    await forEachLeaf(sizeBytes, (offset) => device.write(offset, Buffer.alloc(blockBytes, 7)))
    const delay = monitorEventLoopDelay({ resolution: 1 })
    delay.enable()
    const startedAt = performance.now()
    await stand.mapper.checkpoint(id)
    const totalMs = performance.now() - startedAt
    delay.disable()
    await stand.mapper.close(id)
    return { leafCount, totalMs, eventLoopDelayMsMax: delay.max / 1e6 }
  } finally {
    await stand.close()
  }
}

/** Milliseconds to open `volumeCount` clones with a few writes each, in a process that has just started on their catalog. */
export async function openManyMs(volumeCount: number): Promise<number> {
  const first = await openStand()
  const image = await makeImage(first, 'image', GiB)
  const ids: string[] = []
  for (let index = 0; index < volumeCount; index++) {
    const id = await cloneOf(first, image, `volume-${index}`, GiB)
    ids.push(id)
    const { device } = await first.mapper.open(id, { holder: 'cost', readOnly: false })
    await device.write(index * blockBytes, Buffer.alloc(blockBytes, 5))
    await first.mapper.close(id)
  }
  const stand = await first.reopen()
  try {
    const startedAt = performance.now()
    const atOnce = 16
    for (let at = 0; at < ids.length; at += atOnce) {
      await Promise.all(ids.slice(at, at + atOnce).map((id) => stand.mapper.open(id, { holder: 'cost', readOnly: false })))
    }
    return performance.now() - startedAt
  } finally {
    await stand.close()
  }
}

/** How long it takes to put a file of 4 KiB, one after the other and each in the place of another, and several at once. */
export async function fileCosts(fileCount: number): Promise<{ putMs: ReturnType<typeof spread>; filesPerSecond: number }> {
  const stand = await openStand()
  const content = Buffer.alloc(4096, 5)
  const put = async (old: string | null): Promise<string> => {
    const target = await stand.mapper.beginFile({ projectId: adminProject.id, name: 'file', poolId: stand.poolId })
    await target.device.write(0, content)
    const row = await stand.mapper.finishFile(target, content.length, {
      mayDrop: old === null ? [] : [old],
      write: async (_tx, _file, drop) => {
        if (old !== null) await drop(old)
      },
    })
    return row.id
  }
  try {
    const times: number[] = []
    let last: string | null = null
    for (let index = 0; index < fileCount; index++) {
      const startedAt = performance.now()
      last = await put(last)
      times.push(performance.now() - startedAt)
    }
    const atOnce = 16
    const startedAt = performance.now()
    for (let at = 0; at < fileCount; at += atOnce) await Promise.all(Array.from({ length: atOnce }, () => put(null)))
    const filesPerSecond = (Math.ceil(fileCount / atOnce) * atOnce * 1000) / (performance.now() - startedAt)
    return { putMs: spread(times), filesPerSecond }
  } finally {
    await stand.close()
  }
}
