import { adminProject } from '@atoll/core'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { Bench, bytes, leaf, slot } from './test-bench.ts'

describe('imports', () => {
  let bench: Bench
  beforeEach(async () => {
    bench = await Bench.open()
  })
  afterEach(async () => {
    await bench.close()
  })

  async function begin(sizeBytes: number) {
    return await bench.mapper.beginImport({
      projectId: adminProject.id,
      name: 'image',
      kind: 'image',
      sizeBytes,
      poolId: bench.poolId,
    })
  }

  it('become an image of any size, whose clones are rounded up and read zeros behind it', async () => {
    const { resourceId, device } = await begin(2 * slot + 100)
    await device.write(0, bytes(1, 2 * slot + 100))
    const image = await bench.mapper.finishImport(resourceId)
    expect(image).toMatchObject({ kind: 'image', status: 'available', size_bytes: 2 * slot + 100 })
    expect(await bench.read(image.id, 2 * slot, 100)).toEqual(bytes(1, 100))
    await expect(bench.volume('small', 2 * slot, image.id)).rejects.toMatchObject({ code: 'SIZE_INVALID' })
    const clone = await bench.volume('clone', 4 * slot, image.id)
    expect(await bench.read(clone.id, 2 * slot, 2 * slot)).toEqual(Buffer.concat([bytes(1, 100), bytes(0, 2 * slot - 100)]))
    expect(await bench.layers('sealed')).toHaveLength(1)
    expect(await bench.inner.db.selectFrom('leases').selectAll().execute()).toEqual([])
    await bench.mapper.reclaim(null)
    expect(await bench.findLeak()).toBe(null)
  })

  it('cannot be used before they are finished', async () => {
    const { resourceId } = await begin(leaf)
    await expect(bench.volume('clone', leaf, resourceId)).rejects.toMatchObject({ code: 'RESOURCE_STATUS' })
    await expect(bench.mapper.open(resourceId, { holder: 'test', readOnly: true })).rejects.toMatchObject({
      code: 'RESOURCE_STATUS',
    })
  })

  it('go on after the process was killed with what was flushed', async () => {
    const { resourceId, device } = await begin(leaf)
    await device.write(0, bytes(1))
    await device.flush()
    await bench.kill()
    const resumed = await bench.mapper.resumeImport(resourceId)
    expect(Buffer.from(await resumed.device.read(0, slot))).toEqual(bytes(1))
    await resumed.device.write(slot, bytes(2))
    await bench.mapper.finishImport(resourceId)
    expect(await bench.read(resourceId, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2)]))
    await expect(bench.mapper.resumeImport(resourceId)).rejects.toMatchObject({ code: 'RESOURCE_STATUS' })
  })

  it('may be finished after a restart without being opened again', async () => {
    const { resourceId, device } = await begin(leaf)
    await device.write(0, bytes(1))
    await device.flush()
    await bench.kill()
    await bench.mapper.finishImport(resourceId)
    expect(await bench.read(resourceId, 0, slot)).toEqual(bytes(1))
  })

  it('of unknown size are cut when it is known, and nothing shows beyond', async () => {
    const { resourceId, device } = await begin(2 ** 49)
    await device.write(0, bytes(1, 3 * slot))
    const image = await bench.mapper.finishImport(resourceId, { sizeBytes: slot + 10 })
    expect(image.size_bytes).toBe(slot + 10)
    const clone = await bench.volume('clone', leaf, image.id)
    expect(await bench.read(clone.id, 0, 3 * slot)).toEqual(Buffer.concat([bytes(1, slot + 10), bytes(0, 2 * slot - 10)]))
    const other = await begin(leaf)
    await expect(bench.mapper.finishImport(other.resourceId, { sizeBytes: 2 * leaf })).rejects.toMatchObject({
      code: 'SIZE_INVALID',
    })
  })

  it('that are given up leave nothing', async () => {
    const { resourceId, device } = await begin(leaf)
    await device.write(0, bytes(1))
    await bench.mapper.abortImport(resourceId)
    await bench.mapper.reclaim(null)
    expect((await bench.store.usage()).storedBytes).toBe(0)
    expect(await bench.inner.db.selectFrom('resources').selectAll().execute()).toEqual([])
    await expect(bench.mapper.abortImport(resourceId)).rejects.toMatchObject({ code: 'RESOURCE_NOT_FOUND' })
  })

  it('that are finished are given up by nobody, whatever their status says', async () => {
    const { resourceId, device } = await begin(leaf)
    await device.write(0, bytes(1))
    await bench.mapper.finishImport(resourceId)
    const setStatus = async (status: 'creating' | 'available') =>
      await bench.inner.write(
        async (tx) => await tx.updateTable('resources').set({ status }).where('id', '=', resourceId).execute(),
      )
    await setStatus('creating')
    for (const attempt of [
      bench.mapper.abortImport(resourceId),
      bench.mapper.resumeImport(resourceId),
      bench.mapper.finishImport(resourceId),
    ]) {
      await expect(attempt).rejects.toMatchObject({ code: 'RESOURCE_STATUS' })
    }
    const [finding] = (await bench.mapper.check()).findings
    expect(finding).toMatchObject({ severity: 'error', kind: 'volume-row-missing', object: resourceId })
    await setStatus('available')
    await bench.mapper.reclaim(null)
    expect(await bench.read(resourceId, 0, slot)).toEqual(bytes(1))
  })

  it('refuse sizes that no image has', async () => {
    for (const sizeBytes of [0, -1, 2 ** 49 + 1]) await expect(begin(sizeBytes)).rejects.toMatchObject({ code: 'SIZE_INVALID' })
  })
})
