import type { Device } from '@atoll/native'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { Bench, bytes, leaf, slot } from './test-bench.ts'

describe('checkpoints', () => {
  let bench: Bench
  beforeEach(async () => {
    bench = await Bench.open()
  })
  afterEach(async () => {
    await bench.close()
  })

  /** A volume over a snapshot, so that writes change its map. */
  async function cloned(sizeBytes: number) {
    const volume = await bench.volume('v', sizeBytes)
    await bench.snapshot(volume.id)
    // Only when the test says so.
    const { device } = await bench.mapper.open(volume.id, {
      holder: 'test',
      readOnly: false,
      limits: { dirtyLeavesSoft: 100_000 },
    })
    return { volume, device }
  }

  /** Enough leaves, each with enough runs, for several transactions of pages. */
  const leaves = 600
  async function scatter(device: Device) {
    for (let index = 0; index < leaves; index += 1) {
      await Promise.all(Array.from({ length: 12 }, async (_, odd) => await device.write(index * leaf + odd * 2 * slot, bytes(1))))
    }
  }

  it('bring the map into the catalog, and shorten what an open after a crash replays', async () => {
    const { volume, device } = await cloned(4 * leaf)
    await device.write(0, bytes(1))
    await device.write(leaf, bytes(2))
    await bench.mapper.checkpoint(volume.id)
    expect(await bench.pageCount()).toBeGreaterThan(0)
    await bench.kill()
    await bench.attach(volume.id)
    expect(bench.mapper.opened(volume.id)?.report.framesReplayed).toBe(0)
    expect(await bench.read(volume.id, leaf, slot)).toEqual(bytes(2))
  })

  it('leave no garbage: the pages they replace go with them', async () => {
    const { volume, device } = await cloned(4 * leaf)
    await device.write(0, bytes(1))
    await bench.mapper.checkpoint(volume.id)
    const count = await bench.pageCount()
    for (let index = 2; index < 20; index += 2) {
      await device.write(index * slot, bytes(index))
      await bench.mapper.checkpoint(volume.id)
    }
    expect(await bench.pageCount()).toBe(count)
    expect(await bench.findLeak()).toBe(null)
  })

  it('keep the pages that a snapshot shares', async () => {
    const { volume, device } = await cloned(4 * leaf)
    await device.write(0, bytes(1))
    const snapshot = await bench.snapshot(volume.id, 'second')
    const count = await bench.pageCount()
    await device.write(2 * slot, bytes(2))
    await bench.mapper.checkpoint(volume.id)
    expect(await bench.pageCount()).toBeGreaterThan(count)
    await bench.restart()
    expect(await bench.read(snapshot.id, 0, 3 * slot)).toEqual(Buffer.concat([bytes(1), bytes(0, 2 * slot)]))
  })

  it('of many pages go in small transactions, with the root in the last one', async () => {
    const { volume, device } = await cloned(leaves * leaf)
    await scatter(device)
    const commits: boolean[] = []
    const stop = bench.inner.onCommit(({ durable }) => commits.push(durable))
    await bench.mapper.checkpoint(volume.id)
    stop()
    expect(commits.length).toBeGreaterThan(1)
    expect(commits.at(-1)).toBe(true)
    expect(commits.slice(0, -1)).not.toContain(true)
    expect(await bench.inner.db.selectFrom('page_ranges').selectAll().execute()).toEqual([])
    // And again: every page of before is replaced.
    const count = await bench.pageCount()
    for (let index = 0; index < leaves; index += 1) await device.write(index * leaf + 64 * slot, bytes(2))
    await bench.mapper.checkpoint(volume.id)
    await expect.poll(() => bench.pageCount()).toBe(count)
    await bench.restart()
    expect(await bench.read(volume.id, (leaves - 1) * leaf + 64 * slot, slot)).toEqual(bytes(2))
    expect(await bench.findLeak()).toBe(null)
  })

  it.each([0, 1, 2])('that fail at write %d leave nothing behind and are made up for', async (skip) => {
    const { volume, device } = await cloned(leaves * leaf)
    await scatter(device)
    let count = 0
    let failed = false
    bench.failing.beforeWrite = () => {
      if (count++ < skip || failed) return
      failed = true
      throw new Error('no catalog')
    }
    await expect(bench.mapper.checkpoint(volume.id)).rejects.toThrow('no catalog')
    expect(await bench.pageCount()).toBe(0)
    expect(await bench.inner.db.selectFrom('page_ranges').selectAll().execute()).toEqual([])
    await device.write(slot, bytes(3))
    await bench.mapper.checkpoint(volume.id)
    await bench.restart()
    expect(await bench.read(volume.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(3)]))
    expect(await bench.findLeak()).toBe(null)
  })

  it('that a crash interrupts leave pages that the next start deletes', async () => {
    const { volume, device } = await cloned(leaves * leaf)
    await scatter(device)
    await device.flush()
    // The process dies after some pages: nothing it would do later reaches the catalog.
    let count = 0
    bench.failing.beforeWrite = () => {
      if (count++ >= 2) throw new Error('dead')
    }
    await expect(bench.mapper.checkpoint(volume.id)).rejects.toThrow('dead')
    expect(await bench.pageCount()).toBeGreaterThan(0)
    await bench.kill()
    expect(await bench.pageCount()).toBe(0)
    expect(await bench.inner.db.selectFrom('page_ranges').selectAll().execute()).toEqual([])
    expect(await bench.read(volume.id, 7 * leaf, slot)).toEqual(bytes(1))
  })

  it('are taken by themselves when a volume has changes, and tried again when they fail', async () => {
    const { volume, device } = await cloned(leaf)
    await device.write(0, bytes(1))
    const root = (await bench.row(volume.id)).root_word
    bench.failing.beforeWrite = () => {
      throw new Error('no catalog')
    }
    bench.timers.fire()
    await expect.poll(() => bench.log.lines.some((line) => line.message.includes('checkpoint of volume'))).toBe(true)
    expect((await bench.row(volume.id)).root_word).toBe(root)
    bench.failing.beforeWrite = () => undefined
    bench.timers.fire()
    await expect.poll(async () => (await bench.row(volume.id)).root_word).not.toBe(root)
  })

  it('are taken when the device asks for one', async () => {
    const volume = await bench.volume('v', 64 * leaf)
    await bench.snapshot(volume.id)
    const { device } = await bench.mapper.open(volume.id, { holder: 'test', readOnly: false, limits: { dirtyLeavesSoft: 4 } })
    const root = (await bench.row(volume.id)).root_word
    for (let index = 0; index < 8; index += 1) await device.write(index * leaf, bytes(1))
    await expect.poll(async () => (await bench.row(volume.id)).root_word).not.toBe(root)
  })
})
