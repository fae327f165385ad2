import { adminProject } from '@atoll/core'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { Bench, bytes, leaf, nobody, slot } from './test-bench.ts'

describe('usage', () => {
  let bench: Bench
  beforeEach(async () => {
    bench = await Bench.open()
  })
  afterEach(async () => {
    await bench.close()
  })

  it('of a fresh volume is what was written, not its size', async () => {
    const volume = await bench.volume('v', 4 * leaf)
    expect(await bench.mapper.usage(volume.id)).toEqual({ usedBytes: 0, sharedBytes: 0 })
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 16 * slot))
    await bench.restart()
    expect(await bench.mapper.usage(volume.id)).toEqual({ usedBytes: 16 * slot, sharedBytes: 0 })
  })

  it('tells what is shared with a snapshot or a clone from what is a volume alone', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 16 * slot))
    const snapshot = await bench.snapshot(volume.id)
    const clone = await bench.volume('clone', leaf, snapshot.id)
    const other = await bench.attach(clone.id)
    await other.write(0, bytes(2, 4 * slot))
    await bench.restart()
    // What the clone has overwritten is not in its map any more.
    expect(await bench.mapper.usage(clone.id)).toEqual({ usedBytes: 4 * slot, sharedBytes: 12 * slot })
    expect(await bench.mapper.usage(volume.id)).toEqual({ usedBytes: 0, sharedBytes: 16 * slot })
    expect(await bench.mapper.usage(snapshot.id)).toEqual({ usedBytes: 0, sharedBytes: 16 * slot })
    await bench.mapper.deleteResource(volume.id, { withSnapshots: true })
    expect(await bench.mapper.usage(clone.id)).toEqual({ usedBytes: 16 * slot, sharedBytes: 0 })
  })

  it('tells by slot what each snapshot of a volume holds alone', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 16 * slot))
    const first = await bench.snapshot(volume.id, 'first')
    await device.write(0, bytes(2, 6 * slot))
    const second = await bench.snapshot(volume.id, 'second')
    await device.write(4 * slot, bytes(3, 4 * slot))
    await bench.mapper.checkpoint(volume.id)
    expect(await bench.mapper.usage(first.id)).toEqual({ usedBytes: 6 * slot, sharedBytes: 10 * slot })
    expect(await bench.mapper.usage(second.id)).toEqual({ usedBytes: 2 * slot, sharedBytes: 14 * slot })
    expect(await bench.mapper.usage(volume.id)).toEqual({ usedBytes: 4 * slot, sharedBytes: 12 * slot })
    // Deleting one frees what it held alone; the other then holds what they had in common.
    await bench.mapper.deleteResource(first.id)
    expect((await bench.mapper.reclaim(null)).freedBytes).toBe(6 * slot)
    expect(await bench.mapper.usage(second.id)).toEqual({ usedBytes: 4 * slot, sharedBytes: 12 * slot })
  })

  it('counts a slot that a rollback brought back as shared with the snapshot it came from', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 4 * slot))
    const snapshot = await bench.snapshot(volume.id, 'first')
    await device.write(0, bytes(2, 4 * slot))
    const later = await bench.snapshot(volume.id, 'later')
    await bench.mapper.close(volume.id)
    await bench.mapper.rollback(volume.id, snapshot.id)
    expect(await bench.mapper.usage(volume.id)).toEqual({ usedBytes: 0, sharedBytes: 4 * slot })
    expect(await bench.mapper.usage(snapshot.id)).toEqual({ usedBytes: 0, sharedBytes: 4 * slot })
    expect(await bench.mapper.usage(later.id)).toEqual({ usedBytes: 4 * slot, sharedBytes: 0 })
  })

  it('of a pool counts shared bytes once as stored and for each resource as logical', async () => {
    const volume = await bench.volume('v', leaf)
    await (await bench.attach(volume.id)).write(0, bytes(1, 16 * slot))
    await bench.mapper.close(volume.id)
    await bench.mapper.createImage({ projectId: adminProject.id, name: 'image', fromId: volume.id })
    expect(await bench.mapper.pools.status(bench.poolId)).toMatchObject({
      storedBytes: 16 * slot,
      logicalBytes: 32 * slot,
      dedupRatio: 2,
    })
  })

  it('is not known where the maps differ in more than may be kept, and everything else goes on', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 16 * slot))
    const snapshot = await bench.snapshot(volume.id, 'first')
    await bench.restart({ usageTableBytesMax: 1 })
    expect(await bench.mapper.usage(volume.id)).toEqual({ usedBytes: null, sharedBytes: null })
    expect(await bench.mapper.usage(snapshot.id)).toEqual({ usedBytes: null, sharedBytes: null })
    expect(bench.log.lines.filter(({ message }) => message.includes('differ in too much'))).toHaveLength(1)
    await expect(bench.mapper.usage(nobody)).rejects.toMatchObject({ code: 'RESOURCE_NOT_FOUND' })
    expect(await bench.mapper.pools.status(bench.poolId)).toMatchObject({ logicalBytes: 16 * slot, dedupRatio: 1 })
    expect(await bench.mapper.check({ deep: true })).toMatchObject({ errors: 0, warnings: 0 })
    await bench.mapper.deleteResource(volume.id, { withSnapshots: true })
    expect((await bench.mapper.reclaim(null)).freedBytes).toBe(16 * slot)
    expect(await bench.mapper.pools.status(bench.poolId)).toMatchObject({ logicalBytes: 0, dedupRatio: 1 })
    // Another process with more memory knows.
    const other = await bench.volume('other', leaf)
    await bench.restart()
    expect(await bench.mapper.usage(other.id)).toEqual({ usedBytes: 0, sharedBytes: 0 })
  })

  it('of an unknown id is refused', async () => {
    await expect(bench.mapper.usage(nobody)).rejects.toMatchObject({ code: 'RESOURCE_NOT_FOUND' })
  })
})
