import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { Bench, bytes, leaf, slot } from './test-bench.ts'

describe('resize', () => {
  let bench: Bench
  beforeEach(async () => {
    bench = await Bench.open()
  })
  afterEach(async () => {
    await bench.close()
  })

  it('grows an open volume at once, and the new space reads as zeros and can be written', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await expect(device.write(leaf, bytes(1))).rejects.toThrow()
    await bench.mapper.resize(volume.id, 2 * leaf)
    expect(device.sizeBytes()).toBe(2 * leaf)
    expect(await bench.read(volume.id, leaf, slot)).toEqual(bytes(0))
    await device.write(2 * leaf - slot, bytes(1))
    await bench.mapper.close(volume.id)
    expect(await bench.read(volume.id, 2 * leaf - slot, slot)).toEqual(bytes(1))
    expect((await bench.row(volume.id)).size_bytes).toBe(2 * leaf)
  })

  it('grows a closed volume', async () => {
    const volume = await bench.volume('v', leaf)
    await bench.mapper.resize(volume.id, 2 * leaf)
    expect((await bench.row(volume.id)).size_bytes).toBe(2 * leaf)
    expect(await bench.read(volume.id, leaf, slot)).toEqual(bytes(0))
  })

  it.each(['open', 'closed'])('shrinks an %s volume: what lay beyond is gone for good', async (how) => {
    const volume = await bench.volume('v', 2 * leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    await device.write(leaf, bytes(2, 4 * slot))
    if (how === 'closed') await bench.mapper.close(volume.id)
    await bench.mapper.resize(volume.id, leaf)
    expect((await bench.row(volume.id)).size_bytes).toBe(leaf)
    await bench.mapper.resize(volume.id, 2 * leaf)
    expect(await bench.read(volume.id, leaf, 4 * slot)).toEqual(bytes(0, 4 * slot))
    expect(await bench.read(volume.id, 0, slot)).toEqual(bytes(1))
    const layers = await bench.layers('active')
    const extents = await bench.store.extents(layers[0]?.id ?? '', leaf, leaf)
    expect(extents.filter((extent) => extent.data)).toEqual([])
  })

  it('leaves a snapshot with what the volume lost', async () => {
    const volume = await bench.volume('v', 2 * leaf)
    const device = await bench.attach(volume.id)
    await device.write(leaf, bytes(2))
    const snapshot = await bench.snapshot(volume.id)
    await bench.mapper.resize(volume.id, leaf)
    await bench.mapper.resize(volume.id, 2 * leaf)
    expect(await bench.read(volume.id, leaf, slot)).toEqual(bytes(0))
    expect(await bench.read(snapshot.id, leaf, slot)).toEqual(bytes(2))
  })

  it('changes nothing when the shrink cannot be committed, and can be tried again', async () => {
    const volume = await bench.volume('v', 2 * leaf)
    const device = await bench.attach(volume.id)
    await device.write(leaf, bytes(2))
    bench.failing.beforeWrite = ({ durable }) => {
      if (durable) throw new Error('no catalog')
    }
    await expect(bench.mapper.resize(volume.id, leaf)).rejects.toThrow('no catalog')
    bench.failing.beforeWrite = () => undefined
    expect(device.sizeBytes()).toBe(2 * leaf)
    expect(await bench.read(volume.id, leaf, slot)).toEqual(bytes(2))
    await bench.mapper.resize(volume.id, leaf)
    expect(device.sizeBytes()).toBe(leaf)
    expect((await bench.row(volume.id)).size_bytes).toBe(leaf)
  })

  it('takes effect whole when the process dies right after the commit, before anything was punched', async () => {
    const volume = await bench.volume('v', 2 * leaf)
    const device = await bench.attach(volume.id)
    await device.write(leaf, bytes(2, 4 * slot))
    await device.flush()
    bench.fail({ operation: 'punch', errno: 5 })
    await bench.mapper.resize(volume.id, leaf)
    bench.fail()
    await bench.kill()
    await bench.mapper.resize(volume.id, 2 * leaf)
    expect(await bench.read(volume.id, leaf, 4 * slot)).toEqual(bytes(0, 4 * slot))
    await bench.mapper.reclaim(null)
    expect(await bench.findLeak()).toBe(null)
  })

  // A map that was uniform once names its first layer beyond the end, too. Reclaim removed that layer when every slot below the
  // end had another owner, and an open device did not know it: the volume could not be grown, or not be opened any more.
  it.each(['open', 'closed'])('grows an %s volume whose first layer is overwritten up to the end', async (how) => {
    const volume = await bench.volume('v', 8 * slot)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 8 * slot))
    const snapshot = await bench.snapshot(volume.id)
    await device.write(0, bytes(2, 8 * slot))
    await bench.mapper.close(volume.id)
    await bench.mapper.deleteResource(snapshot.id)
    await bench.mapper.reclaim(null)
    if (how === 'open') await bench.attach(volume.id)
    await bench.mapper.resize(volume.id, leaf)
    expect(await bench.read(volume.id, 0, 16 * slot)).toEqual(Buffer.concat([bytes(2, 8 * slot), bytes(0, 8 * slot)]))
    if (how === 'open') await bench.mapper.close(volume.id)
    await bench.mapper.reclaim(null)
    expect(await bench.read(volume.id, 7 * slot, 2 * slot)).toEqual(Buffer.concat([bytes(2), bytes(0)]))
    expect((await bench.store.usage()).storedBytes).toBe(8 * slot)
    expect(await bench.findLeak()).toBe(null)
  })

  it('refuses sizes that no volume has', async () => {
    const volume = await bench.volume('v', leaf)
    for (const sizeBytes of [0, 100, 2 ** 50]) {
      await expect(bench.mapper.resize(volume.id, sizeBytes)).rejects.toMatchObject({ code: 'SIZE_INVALID' })
    }
  })

  it('refuses a volume that is open for reading', async () => {
    const volume = await bench.volume('v', leaf)
    await bench.mapper.open(volume.id, { holder: 'test', readOnly: true })
    await expect(bench.mapper.resize(volume.id, 2 * leaf)).rejects.toMatchObject({ code: 'VOLUME_IN_USE' })
  })
})
