import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { Bench, bytes, leaf, slot } from './test-bench.ts'

describe('reclaim', () => {
  let bench: Bench
  beforeEach(async () => {
    bench = await Bench.open()
  })
  afterEach(async () => {
    await bench.close()
  })

  it('frees what overwrites and a deleted snapshot left, and nothing that is read', async () => {
    const volume = await bench.volume('v', 16 * slot)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 16 * slot))
    const snapshot = await bench.snapshot(volume.id)
    await device.write(0, bytes(2, 8 * slot))
    await bench.mapper.checkpoint(volume.id)
    expect(await bench.mapper.reclaim(null)).toMatchObject({ freedBytes: 0, removedLayers: 0 })
    await bench.mapper.deleteResource(snapshot.id)
    expect(await bench.mapper.reclaim(null)).toMatchObject({ freedBytes: 8 * slot, removedLayers: 0 })
    expect(await bench.read(volume.id, 0, 16 * slot)).toEqual(Buffer.concat([bytes(2, 8 * slot), bytes(1, 8 * slot)]))
    const second = await bench.snapshot(volume.id, 'second')
    await device.write(0, bytes(3, 16 * slot))
    await bench.mapper.checkpoint(volume.id)
    await bench.mapper.deleteResource(second.id)
    // The second layer goes; the first one, which the map still names beyond its end, stays and is empty.
    expect(await bench.mapper.reclaim(null)).toMatchObject({ freedBytes: 16 * slot, removedLayers: 1 })
    expect((await bench.store.usage()).storedBytes).toBe(16 * slot)
    expect(await bench.findLeak()).toBe(null)
    expect(await bench.mapper.reclaim(null)).toEqual({ freedBytes: 0, removedLayers: 0, sweptPages: 0 })
  })

  it('frees nothing in pools that requests which do not end may read from, and all in the others', async () => {
    await bench.close()
    bench = await Bench.open({ pools: 2 })
    const [first = '', second = ''] = bench.poolIds
    const near = await bench.volume('near', 16 * slot, undefined, first)
    const far = await bench.volume('far', 16 * slot, undefined, second)
    for (const { id } of [near, far]) {
      const device = await bench.attach(id)
      await device.write(0, bytes(1, 16 * slot))
      await bench.mapper.deleteResource((await bench.snapshot(id, `snap-${id}`)).id)
      await device.write(0, bytes(2, 8 * slot))
    }
    const barrier = bench.engine.readBarrier.bind(bench.engine)
    let hung = [far.id]
    bench.engine.readBarrier = async (waitMs) => (hung.length > 0 ? hung : await barrier(waitMs))
    expect(await bench.mapper.reclaim(null)).toMatchObject({ freedBytes: 8 * slot })
    expect(bench.log.lines).toContainEqual({
      level: 'warn',
      message: expect.stringContaining('requests that do not end may read from these pools') as string,
      values: { resourceIds: [far.id], poolIds: [second] },
    })
    // A volume that reads from the other pool as well keeps both.
    const clone = await bench.volume('clone', 16 * slot, near.id, second)
    await bench.mapper.deleteResource(clone.id)
    await bench.mapper.close(near.id)
    await bench.mapper.deleteResource(near.id)
    expect(await bench.mapper.reclaim(null)).toMatchObject({ freedBytes: 0, removedLayers: 0 })
    hung = []
    const { freedBytes } = await bench.mapper.reclaim(null)
    expect(freedBytes).toBeGreaterThanOrEqual(8 * slot + 16 * slot)
    expect(await bench.read(far.id, 0, 16 * slot)).toEqual(Buffer.concat([bytes(2, 8 * slot), bytes(1, 8 * slot)]))
    expect(await bench.findLeak()).toBe(null)
  })

  it('frees what open volumes have overwritten and discarded, also what was not in the catalog yet', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 8 * slot))
    await bench.mapper.deleteResource((await bench.snapshot(volume.id)).id)
    await device.write(0, bytes(2, 4 * slot))
    await device.discard(6 * slot, 2 * slot)
    expect(await bench.mapper.reclaim(null)).toMatchObject({ freedBytes: 6 * slot })
    expect(await bench.findLeak()).toBe(null)
    await bench.kill()
    expect(await bench.read(volume.id, 0, 8 * slot)).toEqual(
      Buffer.concat([bytes(2, 4 * slot), bytes(1, 2 * slot), bytes(0, 2 * slot)]),
    )
  })

  it('does not look at live maps: what is written but not in the catalog keeps the old bytes', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 4 * slot))
    const snapshot = await bench.snapshot(volume.id)
    await bench.mapper.deleteResource(snapshot.id)
    // After the checkpoint of the reclaim, before it punches: in the live map the old layer loses these slots; a crash then brings
    // the old bytes back.
    const barrier = bench.engine.readBarrier.bind(bench.engine)
    let wrote = false
    bench.engine.readBarrier = async (waitMs) => {
      await device.write(0, bytes(2, 4 * slot))
      wrote = true
      return await barrier(waitMs)
    }
    await bench.mapper.reclaim(null)
    expect(wrote).toBe(true)
    await bench.kill()
    expect(await bench.read(volume.id, 0, 4 * slot)).toEqual(bytes(1, 4 * slot))
  })

  it('leaves out the open volumes of a pool that answers nobody', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 4 * slot))
    await bench.mapper.deleteResource((await bench.snapshot(volume.id)).id)
    await device.write(0, bytes(2, 4 * slot))
    const pool = await bench.mapper.pools.handle(volume.home_pool_id)
    const health = pool.health.bind(pool)
    pool.health = () => ({ ...health(), conditions: [{ kind: 'silent', severity: 'error', message: 'no answer' }] })
    expect(await bench.mapper.reclaim(null)).toMatchObject({ freedBytes: 0 })
    pool.health = () => ({ ...health(), conditions: [{ kind: 'osds-down', severity: 'warning', message: 'one is down' }] })
    expect(await bench.mapper.reclaim(null)).toMatchObject({ freedBytes: 4 * slot })
    expect(await bench.findLeak()).toBe(null)
  })

  it('goes on with the last checkpoint of a volume that cannot have one now', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 4 * slot))
    await bench.mapper.deleteResource((await bench.snapshot(volume.id)).id)
    await device.write(0, bytes(2, 4 * slot))
    let isFirst = true
    bench.failing.beforeWrite = () => {
      if (!isFirst) return
      isFirst = false
      throw new Error('no')
    }
    expect(await bench.mapper.reclaim(null)).toMatchObject({ freedBytes: 0 })
    expect(bench.log.lines.some((line) => line.message.includes('no checkpoint before a reclaim'))).toBe(true)
    expect(await bench.read(volume.id, 0, 4 * slot)).toEqual(bytes(2, 4 * slot))
    expect(await bench.mapper.reclaim(null)).toMatchObject({ freedBytes: 4 * slot })
  })

  it('replays dirty volumes first', async () => {
    const volume = await bench.volume('v', leaf)
    await bench.snapshot(volume.id)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    await device.flush()
    await bench.kill()
    await bench.mapper.reclaim(null)
    expect((await bench.inner.db.selectFrom('leases').selectAll().executeTakeFirstOrThrow()).released_at).not.toBe(null)
    expect(await bench.read(volume.id, 0, slot)).toEqual(bytes(1))
  })

  it('leaves the layers of a volume alone that cannot be replayed', async () => {
    const volume = await bench.volume('v', leaf)
    const snapshot = await bench.snapshot(volume.id)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    await device.flush()
    const before = (await bench.layers('active')).map((layer) => layer.id)
    await bench.kill()
    bench.fail({ operation: 'open', errno: 5, layer: before[0] ?? '' })
    await bench.mapper.reclaim(null)
    bench.fail()
    expect((await bench.layers('active')).map((layer) => layer.id)).toEqual(before)
    expect(await bench.read(volume.id, 0, slot)).toEqual(bytes(1))
    expect(await bench.read(snapshot.id, 0, slot)).toEqual(bytes(0))
  })

  it('sweeps the pages of deleted volumes and no others', async () => {
    const gone = await bench.volume('gone', 4 * leaf)
    const kept = await bench.volume('kept', 4 * leaf)
    await bench.mapper.snapshot([
      { volumeId: gone.id, name: 'a' },
      { volumeId: kept.id, name: 'b' },
    ])
    for (const { id } of [gone, kept]) {
      const device = await bench.attach(id)
      for (let index = 0; index < 4; index += 1) await device.write(index * leaf, bytes(index + 1))
      await bench.mapper.close(id)
    }
    const pages = await bench.pageCount()
    await bench.mapper.deleteResource(gone.id, { withSnapshots: true })
    const { sweptPages } = await bench.mapper.reclaim(null)
    expect(sweptPages).toBe(pages / 2)
    expect(await bench.pageCount()).toBe(pages / 2)
    await bench.restart()
    expect(await bench.read(kept.id, 3 * leaf, slot)).toEqual(bytes(4))
  })

  it('does not take the pages of a checkpoint that is committed while it runs', async () => {
    const volume = await bench.volume('v', 4 * leaf)
    await bench.snapshot(volume.id)
    const device = await bench.attach(volume.id)
    for (let round = 1; round <= 30; round += 1) {
      await device.write((round % 4) * leaf + round * 2 * slot, bytes(round))
      await Promise.all([bench.mapper.reclaim(null), bench.mapper.checkpoint(volume.id)])
    }
    await bench.restart()
    for (let round = 1; round <= 30; round += 1) {
      expect(await bench.read(volume.id, (round % 4) * leaf + round * 2 * slot, slot)).toEqual(bytes(round))
    }
    await bench.mapper.reclaim(null)
    expect(await bench.findLeak()).toBe(null)
  })

  it('goes on beside snapshots, clones and deletes without harming them', async () => {
    const volume = await bench.volume('v', 2 * leaf)
    const device = await bench.attach(volume.id)
    const clones: { id: string; value: number }[] = []
    for (let round = 1; round <= 12; round += 1) {
      await device.write(0, bytes(round, 4 * slot))
      const work = async () => {
        const snapshot = await bench.snapshot(volume.id, `s${round}`)
        const clone = await bench.volume(`c${round}`, 2 * leaf, snapshot.id)
        clones.push({ id: clone.id, value: round })
        await bench.mapper.deleteResource(snapshot.id)
      }
      await Promise.all([work(), bench.mapper.reclaim(null)])
    }
    for (const { id, value } of clones) expect(await bench.read(id, 0, 4 * slot)).toEqual(bytes(value, 4 * slot))
    await bench.mapper.close(volume.id)
    await bench.mapper.reclaim(null)
    expect(await bench.findLeak()).toBe(null)
  })

  it('reports progress, and stops between two steps when it is cancelled', async () => {
    const volume = await bench.volume('v', leaf)
    await bench.snapshot(volume.id, 'a')
    const progress: number[] = []
    await bench.mapper.reclaim(null, { onProgress: ({ doneLayers }) => progress.push(doneLayers) })
    expect(progress).toEqual([1])
    const cancelled = bench.mapper.reclaim(null, { signal: AbortSignal.abort() })
    await expect(cancelled).rejects.toMatchObject({ code: 'JOB_CANCELLED' })
    await bench.mapper.reclaim(bench.poolId)
  })

  it('that fails to remove a file is made up for by the next one', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    await bench.mapper.close(volume.id)
    await bench.mapper.deleteResource(volume.id)
    bench.fail({ operation: 'remove', errno: 5 })
    expect((await bench.mapper.reclaim(null)).removedLayers).toBe(0)
    expect((await bench.layers('condemned')).length).toBeGreaterThan(0)
    bench.fail()
    expect((await bench.mapper.reclaim(null)).removedLayers).toBeGreaterThan(0)
    expect(await bench.findLeak()).toBe(null)
  })

  it.each([0, 1, 2, 3, 4, 5])(
    'that dies at write %d of the catalog harms nothing, and the next one ends the work',
    async (alive) => {
      const volume = await bench.volume('v', 2 * leaf)
      const device = await bench.attach(volume.id)
      await device.write(0, bytes(1, 8 * slot))
      const snapshot = await bench.snapshot(volume.id, 'a')
      await device.write(0, bytes(2, 4 * slot))
      await bench.snapshot(volume.id, 'b')
      await device.write(leaf, bytes(3))
      await bench.mapper.close(volume.id)
      const other = await bench.volume('other', 2 * leaf, snapshot.id)
      await bench.mapper.deleteResource(snapshot.id)
      await bench.mapper.deleteResource(other.id)
      let writes = 0
      bench.failing.beforeWrite = () => {
        if (writes++ >= alive) throw new Error('dead')
      }
      await bench.mapper.reclaim(null).catch(() => undefined)
      await bench.kill()
      expect(await bench.read(volume.id, 0, 8 * slot)).toEqual(Buffer.concat([bytes(2, 4 * slot), bytes(1, 4 * slot)]))
      await bench.mapper.reclaim(null)
      expect(await bench.read(volume.id, 0, 8 * slot)).toEqual(Buffer.concat([bytes(2, 4 * slot), bytes(1, 4 * slot)]))
      expect(await bench.read(volume.id, leaf, slot)).toEqual(bytes(3))
      expect(await bench.findLeak()).toBe(null)
    },
  )
})
