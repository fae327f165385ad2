import { adminProject } from '@atoll/core'
import { afterEach, beforeEach, describe, expect, it, vi } from 'vitest'
import type { FileRows, FileTarget } from './file-target.ts'
import { Bench, bytes, slot } from './test-bench.ts'

/** A file that nobody has given a name. */
const nameless: FileRows = { mayDrop: [], write: async () => undefined }

describe('files', () => {
  let bench: Bench
  beforeEach(async () => {
    bench = await Bench.open()
  })
  afterEach(async () => {
    await bench.close()
  })

  const wanted = () => ({ projectId: adminProject.id, name: 'file', poolId: bench.poolId })

  async function begin(value: number, sizeBytes: number): Promise<FileTarget> {
    const target = await bench.mapper.beginFile(wanted())
    await target.device.write(0, bytes(value, sizeBytes))
    return target
  }

  async function made(value: number, sizeBytes: number) {
    return await bench.mapper.finishFile(await begin(value, sizeBytes), sizeBytes, nameless)
  }

  const dropping = (id: string): FileRows => ({ mayDrop: [id], write: async (_tx, _file, drop) => await drop(id) })

  it('have any size, told at the end, take one layer and no page, and become volumes and files without a copy', async () => {
    const file = await made(1, 2 * slot + 100)
    expect(file).toMatchObject({ kind: 'file', status: 'available', size_bytes: 2 * slot + 100 })
    expect(await bench.read(file.id, slot, slot + 100)).toEqual(bytes(1, slot + 100))
    expect(await bench.pageCount()).toBe(0)
    await bench.mapper.idle()
    expect(await bench.layers('sealed')).toHaveLength(1)
    const storedBytes = (await bench.store.usage()).storedBytes
    const clone = await bench.volume('clone', 4 * slot, file.id)
    expect(await bench.read(clone.id, 2 * slot, 2 * slot)).toEqual(Buffer.concat([bytes(1, 100), bytes(0, 2 * slot - 100)]))
    const copy = await bench.mapper.createFile(wanted(), file.id, nameless)
    await bench.mapper.deleteResource(file.id)
    await bench.mapper.reclaim(null)
    expect(await bench.read(copy.id, 0, slot)).toEqual(bytes(1))
    expect((await bench.store.usage()).storedBytes).toBe(storedBytes)
    await bench.mapper.close(clone.id).catch(() => undefined)
    expect(await bench.findLeak()).toBe(null)
  })

  it('are there before their layers are sealed; what else is done with them waits for that, and a killed process may leave it', async () => {
    const pool = await bench.mapper.pools.handle(bench.poolId)
    const gate = Promise.withResolvers<void>()
    const seal = pool.sealLayer.bind(pool)
    const sealing = vi.spyOn(pool, 'sealLayer').mockImplementation(async (...args) => {
      await gate.promise
      await seal(...args)
    })
    const [kept, deleted] = [await made(1, slot), await made(2, slot)]
    expect(await bench.layers('closing')).toHaveLength(2)
    const [reading, copying] = [bench.read(kept.id, 0, slot), bench.mapper.createFile(wanted(), deleted.id, nameless)]
    const deleting = bench.mapper.deleteResource(deleted.id)
    gate.resolve()
    expect(await reading).toEqual(bytes(1))
    const copy = await copying
    await deleting
    sealing.mockRestore()
    await bench.mapper.idle()
    expect(await bench.layers('closing')).toEqual([])
    await bench.mapper.reclaim(null)
    expect(await bench.read(copy.id, 0, slot)).toEqual(bytes(2))

    vi.spyOn(pool, 'sealLayer').mockRejectedValue(new Error('this process is dead'))
    const left = await made(3, slot)
    await bench.mapper.idle()
    expect(await bench.layers('closing')).toHaveLength(1)
    await bench.kill()
    expect(await bench.layers('closing')).toEqual([])
    expect(await bench.read(left.id, 0, slot)).toEqual(bytes(3))
    expect(await bench.findLeak()).toBe(null)
  })

  it('may be empty', async () => {
    const file = await bench.mapper.createFile(wanted(), null, nameless)
    expect(file).toMatchObject({ size_bytes: 0, status: 'available' })
    const clone = await bench.volume('clone', slot, file.id)
    expect(await bench.read(clone.id, 0, slot)).toEqual(bytes(0))
  })

  it('of a volume have what it had at that moment', async () => {
    const volume = await bench.volume('volume', 4 * slot)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    const file = await bench.mapper.createFile(wanted(), volume.id, nameless)
    await device.write(0, bytes(2))
    expect(file).toMatchObject({ size_bytes: 4 * slot, parent_id: volume.id })
    expect(await bench.read(file.id, 0, slot)).toEqual(bytes(1))
    await bench.mapper.close(volume.id)
  })

  it('that are given up leave nothing', async () => {
    await bench.mapper.abortFile(await begin(1, 10 * slot))
    const flushed = await begin(1, 10 * slot)
    await flushed.device.flush()
    await bench.mapper.abortFile(flushed)
    await bench.mapper.reclaim(null)
    expect((await bench.store.usage()).storedBytes).toBe(0)
    expect(await bench.inner.db.selectFrom('resources').selectAll().execute()).toEqual([])
    expect(await bench.findLeak()).toBe(null)
  })

  it('that a killed process was writing can be deleted, and what was finished is there', async () => {
    const file = await made(1, slot)
    const target = await begin(2, slot)
    await target.device.flush()
    await bench.kill()
    expect(await bench.read(file.id, 0, slot)).toEqual(bytes(1))
    await bench.mapper.deleteResource(target.resourceId)
    await bench.mapper.reclaim(null)
    expect((await bench.store.usage()).storedBytes).toBe(slot)
    expect(await bench.findLeak()).toBe(null)
  })

  it('stay unfinished if their rows cannot be written, or their bytes cannot be stored', async () => {
    const refused = await begin(1, slot)
    const failing: FileRows = {
      mayDrop: [],
      write: async () => {
        throw new Error('refused')
      },
    }
    await expect(bench.mapper.finishFile(refused, slot, failing)).rejects.toThrow('refused')
    expect(await bench.row(refused.resourceId)).toMatchObject({ status: 'creating' })
    await bench.mapper.abortFile(refused)
    const unsynced = await begin(1, slot)
    bench.fail({ operation: 'sync', errno: 5 })
    await expect(bench.mapper.finishFile(unsynced, slot, nameless)).rejects.toMatchObject({ code: 'DEVICE_POISONED' })
    bench.fail()
    await bench.mapper.abortFile(unsynced)
    await bench.mapper.reclaim(null)
    expect(await bench.inner.db.selectFrom('resources').selectAll().execute()).toEqual([])
    expect(await bench.findLeak()).toBe(null)
  })

  it('that are finished are not given up afterwards', async () => {
    const target = await begin(1, slot)
    const file = await bench.mapper.finishFile(target, slot, nameless)
    await bench.mapper.abortFile(target)
    expect(await bench.read(file.id, 0, slot)).toEqual(bytes(1))
  })

  it('that are replaced while they are read stay until they are closed, and nobody opens them any more', async () => {
    const old = await made(1, slot)
    const { device } = await bench.mapper.open(old.id, { holder: 'test', readOnly: true })
    const target = await begin(2, slot)
    await bench.mapper.finishFile(target, slot, dropping(old.id))
    await bench.mapper.reclaim(null)
    expect(Buffer.from(await device.read(0, slot))).toEqual(bytes(1))
    await expect(bench.mapper.deleteResource(old.id)).rejects.toMatchObject({ code: 'FILE_IN_USE' })
    await bench.mapper.close(old.id)
    await expect(bench.mapper.open(old.id, { holder: 'test', readOnly: true })).rejects.toMatchObject({ code: 'RESOURCE_STATUS' })
    await bench.mapper.deleteResource(old.id)
    const next = await begin(3, slot)
    const { resourceId } = next
    await bench.mapper.finishFile(next, slot, dropping(target.resourceId))
    expect((await bench.inner.db.selectFrom('resources').select('id').execute()).map(({ id }) => id)).toEqual([resourceId])
    await bench.mapper.dropFiles([resourceId], async (_tx, drop) => await drop(resourceId))
    await bench.mapper.reclaim(null)
    expect((await bench.store.usage()).storedBytes).toBe(0)
    expect(await bench.findLeak()).toBe(null)
  })
})
