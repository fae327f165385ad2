import type { ResourceRow } from '@atoll/core'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { Bench, bytes, slot } from './test-bench.ts'

const refusal = expect.objectContaining({ code: 'CATALOG_BEHIND' })

describe('with a catalog that is older than its pool', () => {
  let bench: Bench
  let volume: ResourceRow
  let before: Uint8Array
  beforeEach(async () => {
    bench = await Bench.open()
    volume = await bench.volume('disk', 8 * slot)
    await write(volume.id, 0, 1)
  })
  afterEach(async () => {
    await bench.close()
  })

  async function write(id: string, at: number, value: number): Promise<void> {
    const device = await bench.attach(id)
    await device.write(at * slot, bytes(value))
    await bench.mapper.close(id)
  }
  async function read(id: string, at: number): Promise<Buffer> {
    return await bench.read(id, at * slot, slot)
  }
  /** Keeps the catalog as it is: `goBack` comes back to it. */
  async function backUp(): Promise<void> {
    before = await bench.inner.serialize()
  }
  async function goBack(): Promise<void> {
    await bench.restoreCatalog(before)
  }

  it('what was deleted since is used by nobody, also after a restart, and the rest is as it was', async () => {
    const kept = await bench.snapshot(volume.id, 'kept')
    await write(volume.id, 0, 2)
    const doomed = await bench.snapshot(volume.id, 'doomed')
    await write(volume.id, 0, 3)
    await bench.snapshot(volume.id, 'last')
    await backUp()
    await bench.mapper.deleteResource(doomed.id)
    expect((await bench.mapper.reclaim(null)).freedBytes).toBe(slot)
    await goBack()
    for (const life of ['the first', 'the second']) {
      await expect(read(doomed.id, 0), life).rejects.toEqual(refusal)
      await expect(bench.volume('clone', 8 * slot, doomed.id), life).rejects.toEqual(refusal)
      await expect(bench.mapper.rollback(volume.id, doomed.id), life).rejects.toEqual(refusal)
      expect(await read(kept.id, 0), life).toEqual(bytes(1))
      expect(await read(volume.id, 0), life).toEqual(bytes(3))
      await bench.restart()
    }
  })

  it('a volume that went on since is refused until it is rolled back, and then is this catalog’s own', async () => {
    const snapshot = await bench.snapshot(volume.id, 'base')
    await write(volume.id, 1, 2)
    await backUp()
    await write(volume.id, 2, 3)
    await goBack()
    await expect(bench.attach(volume.id)).rejects.toEqual(refusal)
    expect(await read(snapshot.id, 0)).toEqual(bytes(1))
    await bench.mapper.rollback(volume.id, snapshot.id)
    expect(await bench.read(volume.id, slot, 2 * slot)).toEqual(bytes(0, 2 * slot))
    await write(volume.id, 1, 4)
    await bench.restart()
    expect(await read(volume.id, 0)).toEqual(bytes(1))
    expect(await read(volume.id, 1)).toEqual(bytes(4))
  })

  it('a volume whose next layer was taken since is refused, although its map is the same', async () => {
    await backUp()
    await bench.snapshot(volume.id, 'later')
    await goBack()
    await expect(bench.attach(volume.id)).rejects.toEqual(refusal)
  })

  it('a volume that was only opened since goes on, with what its journal has', async () => {
    await bench.snapshot(volume.id, 'base')
    await write(volume.id, 1, 2)
    await backUp()
    const device = await bench.attach(volume.id)
    await device.write(2 * slot, bytes(3))
    await device.flush()
    await bench.restoreCatalog(before, { kill: true })
    expect(await bench.read(volume.id, slot, 2 * slot)).toEqual(Buffer.concat([bytes(2), bytes(3)]))
    await write(volume.id, 1, 4)
    await bench.restart()
    expect(await bench.read(volume.id, slot, 2 * slot)).toEqual(Buffer.concat([bytes(4), bytes(3)]))
  })
})
