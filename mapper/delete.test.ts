import { adminProject } from '@atoll/core'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { Bench, bytes, leaf, nobody, slot } from './test-bench.ts'

describe('delete', () => {
  let bench: Bench
  beforeEach(async () => {
    bench = await Bench.open()
  })
  afterEach(async () => {
    await bench.close()
  })

  it('of everything leaves nothing behind but spares', async () => {
    const volume = await bench.volume('v', 2 * leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 100 * slot))
    const snapshot = await bench.snapshot(volume.id)
    const clone = await bench.volume('clone', 2 * leaf, snapshot.id)
    await (await bench.attach(clone.id)).write(slot, bytes(2))
    const image = await bench.mapper.createImage({ projectId: adminProject.id, name: 'image', fromId: clone.id })
    await bench.mapper.close(volume.id)
    await bench.mapper.close(clone.id)
    const own = await bench.inner.db.selectFrom('volumes').select(['active_alias', 'next_alias']).execute()
    await bench.mapper.deleteResource(volume.id, { withSnapshots: true })
    await bench.mapper.deleteResource(clone.id)
    await bench.mapper.deleteResource(image.id)
    await bench.mapper.reclaim(null)
    expect((await bench.store.usage()).storedBytes).toBe(0)
    expect(await bench.pageCount()).toBe(0)
    // Spares for those that were taken may still be in the making.
    await bench.mapper.idle()
    const layers = await bench.inner.db.selectFrom('layers').select(['alias', 'state']).execute()
    expect(new Set(layers.map((layer) => layer.state))).toEqual(new Set(['spare']))
    // A layer that a volume had never becomes a spare again: nobody knows what it holds.
    const had = own.flatMap((row) => [row.active_alias, row.next_alias])
    expect(layers.filter((layer) => had.includes(layer.alias))).toEqual([])
  })

  it('of a volume with snapshots is refused and names them', async () => {
    const volume = await bench.volume('v', leaf)
    const snapshot = await bench.snapshot(volume.id, 'monday')
    await expect(bench.mapper.deleteResource(volume.id)).rejects.toMatchObject({
      code: 'VOLUME_HAS_SNAPSHOTS',
      values: { snapshotCount: 1, snapshots: ['monday'] },
    })
    await bench.mapper.deleteResource(snapshot.id)
    await bench.mapper.deleteResource(volume.id)
    expect(await bench.inner.db.selectFrom('resources').selectAll().execute()).toEqual([])
  })

  it('of a snapshot with a clone is allowed', async () => {
    const volume = await bench.volume('v', leaf)
    await (await bench.attach(volume.id)).write(0, bytes(1))
    const snapshot = await bench.snapshot(volume.id)
    const clone = await bench.volume('clone', leaf, snapshot.id)
    await bench.mapper.deleteResource(snapshot.id)
    await bench.mapper.reclaim(null)
    expect(await bench.read(clone.id, 0, slot)).toEqual(bytes(1))
  })

  it('of what is open is refused, also of a snapshot that would go with its volume', async () => {
    const volume = await bench.volume('v', leaf)
    const snapshot = await bench.snapshot(volume.id)
    await bench.mapper.open(snapshot.id, { holder: 'test', readOnly: true })
    await expect(bench.mapper.deleteResource(snapshot.id)).rejects.toMatchObject({ code: 'SNAPSHOT_IN_USE' })
    await expect(bench.mapper.deleteResource(volume.id, { withSnapshots: true })).rejects.toMatchObject({
      code: 'SNAPSHOT_IN_USE',
    })
    await bench.mapper.close(snapshot.id)
    await bench.attach(volume.id)
    await expect(bench.mapper.deleteResource(volume.id, { withSnapshots: true })).rejects.toMatchObject({ code: 'VOLUME_IN_USE' })
    await bench.mapper.close(volume.id)
    await bench.mapper.deleteResource(volume.id, { withSnapshots: true })
  })

  it('of a volume whose process was killed needs no replay', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    await device.flush()
    await bench.kill()
    await bench.mapper.deleteResource(volume.id)
    await bench.mapper.reclaim(null)
    expect((await bench.store.usage()).storedBytes).toBe(0)
  })

  it('of an unknown id is refused', async () => {
    await expect(bench.mapper.deleteResource(nobody)).rejects.toMatchObject({ code: 'RESOURCE_NOT_FOUND' })
  })

  it('and reclaim go through on a full pool, and what they free can be written', async () => {
    await bench.close()
    bench = await Bench.open({ capacityBytes: 64 * slot })
    const full = await bench.volume('full', leaf)
    const device = await bench.attach(full.id)
    await expect(device.write(0, bytes(1, 100 * slot))).rejects.toMatchObject({ code: 'NO_SPACE' })
    for (let index = 0; index < 64; index += 1) await device.write(index * slot, bytes(1)).catch(() => undefined)
    await expect(device.write(100 * slot, bytes(1))).rejects.toMatchObject({ code: 'NO_SPACE' })
    await bench.mapper.close(full.id)
    await bench.mapper.deleteResource(full.id)
    const { freedBytes } = await bench.mapper.reclaim(null)
    expect(freedBytes).toBeGreaterThan(0)
    const next = await bench.volume('next', leaf)
    const again = await bench.attach(next.id)
    await again.write(0, bytes(2, 32 * slot))
    await again.flush()
    expect(await bench.read(next.id, 0, slot)).toEqual(bytes(2))
  })
})
