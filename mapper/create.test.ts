import { adminProject } from '@atoll/core'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { Bench, bytes, leaf, nobody, slot } from './test-bench.ts'

describe('making volumes and images', () => {
  let bench: Bench
  beforeEach(async () => {
    bench = await Bench.open()
  })
  afterEach(async () => {
    await bench.close()
  })

  it('gives a fresh volume one uniform map, no pages and zeros', async () => {
    const volume = await bench.volume('v', 2 * leaf)
    expect(volume).toMatchObject({
      kind: 'volume',
      name: 'v',
      size_bytes: 2 * leaf,
      root_crc: 0,
      status: 'available',
      parent_id: null,
    })
    expect(await bench.pageCount()).toBe(0)
    expect(await bench.read(volume.id, leaf - slot, 2 * slot)).toEqual(bytes(0, 2 * slot))
  })

  it.each([0, 4095, 5000, 2 ** 49 + 4096, -4096, 1.5])('refuses a volume of %d bytes and changes nothing', async (sizeBytes) => {
    await expect(bench.volume('v', sizeBytes)).rejects.toMatchObject({ code: 'SIZE_INVALID' })
    expect(await bench.inner.db.selectFrom('resources').selectAll().execute()).toEqual([])
  })

  it('refuses a source that is not there and gives its spare layer back', async () => {
    const spares = (await bench.layers('spare')).length
    await expect(bench.volume('v', slot, nobody)).rejects.toMatchObject({ code: 'RESOURCE_NOT_FOUND' })
    expect((await bench.layers('spare')).length).toBeGreaterThanOrEqual(spares)
    expect(await bench.layers('active')).toEqual([])
  })

  it('clones a snapshot without copying a byte, and both go their own way', async () => {
    const volume = await bench.volume('v', 2 * leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 8 * slot))
    const snapshot = await bench.snapshot(volume.id)
    const before = (await bench.store.usage()).storedBytes
    const clone = await bench.volume('clone', 2 * leaf, snapshot.id)
    expect((await bench.store.usage()).storedBytes).toBe(before)
    expect(clone).toMatchObject({ root_word: snapshot.root_word, parent_id: snapshot.id })
    const other = await bench.attach(clone.id)
    await other.write(slot, bytes(2))
    await device.write(2 * slot, bytes(3))
    expect(await bench.read(clone.id, 0, 3 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2), bytes(1)]))
    expect(await bench.read(volume.id, 0, 3 * slot)).toEqual(Buffer.concat([bytes(1), bytes(1), bytes(3)]))
    expect(await bench.read(snapshot.id, 0, 3 * slot)).toEqual(bytes(1, 3 * slot))
  })

  it('clones an open volume as it is now', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    const clone = await bench.volume('clone', leaf, volume.id)
    await device.write(0, bytes(2))
    expect(await bench.read(clone.id, 0, slot)).toEqual(bytes(1))
    expect(await bench.read(volume.id, 0, slot)).toEqual(bytes(2))
  })

  it('clones a closed volume, and what the volume writes later does not reach the clone', async () => {
    const volume = await bench.volume('v', leaf)
    await (await bench.attach(volume.id)).write(0, bytes(1))
    await bench.mapper.close(volume.id)
    const clone = await bench.volume('clone', leaf, volume.id)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(2))
    expect(await bench.read(clone.id, 0, slot)).toEqual(bytes(1))
  })

  it('lets a clone be larger than its source, and the rest reads as zeros', async () => {
    const volume = await bench.volume('v', 2 * leaf)
    const device = await bench.attach(volume.id)
    await device.write(leaf, bytes(1))
    await bench.mapper.resize(volume.id, leaf)
    const snapshot = await bench.snapshot(volume.id)
    const clone = await bench.volume('clone', 3 * leaf, snapshot.id)
    expect(await bench.read(clone.id, leaf, slot)).toEqual(bytes(0))
    const other = await bench.attach(clone.id)
    await other.write(2 * leaf, bytes(2))
    expect(await bench.read(clone.id, 2 * leaf, slot)).toEqual(bytes(2))
  })

  it('refuses a clone that is smaller than its source', async () => {
    const volume = await bench.volume('v', leaf)
    const snapshot = await bench.snapshot(volume.id)
    await expect(bench.volume('small', slot, snapshot.id)).rejects.toMatchObject({
      code: 'SIZE_INVALID',
      values: { minBytes: leaf },
    })
    await expect(bench.volume('small', slot, volume.id)).rejects.toMatchObject({ code: 'SIZE_INVALID' })
  })

  it('makes images of snapshots and of open volumes', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    const snapshot = await bench.snapshot(volume.id)
    const fromSnapshot = await bench.mapper.createImage({ projectId: adminProject.id, name: 'a', fromId: snapshot.id })
    await device.write(0, bytes(2))
    const fromVolume = await bench.mapper.createImage({ projectId: adminProject.id, name: 'b', fromId: volume.id })
    await device.write(0, bytes(3))
    expect(fromSnapshot).toMatchObject({ kind: 'image', size_bytes: leaf, status: 'available' })
    expect(await bench.read(fromSnapshot.id, 0, slot)).toEqual(bytes(1))
    expect(await bench.read(fromVolume.id, 0, slot)).toEqual(bytes(2))
    const clone = await bench.volume('clone', leaf, fromVolume.id)
    expect(await bench.read(clone.id, 0, slot)).toEqual(bytes(2))
  })

  it('keeps a clone whole when its source and the snapshots are gone', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    const snapshot = await bench.snapshot(volume.id)
    const clone = await bench.volume('clone', leaf, snapshot.id)
    await bench.mapper.close(volume.id)
    await bench.mapper.deleteResource(volume.id, { withSnapshots: true })
    await bench.mapper.reclaim(null)
    expect(await bench.read(clone.id, 0, slot)).toEqual(bytes(1))
    expect((await bench.row(clone.id)).parent_id).toBe(null)
    expect(await bench.findLeak()).toBe(null)
  })

  it('gives another name', async () => {
    const volume = await bench.volume('v', leaf)
    expect(await bench.mapper.rename(volume.id, 'w')).toMatchObject({ name: 'w' })
    await expect(bench.mapper.rename(volume.id, 'a/b')).rejects.toMatchObject({ code: 'NAME_INVALID' })
    await expect(bench.mapper.rename(nobody, 'w')).rejects.toMatchObject({ code: 'RESOURCE_NOT_FOUND' })
  })
})
