import { adminProject, type LayerRow } from '@atoll/core'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { sparesPerPool } from './layers.ts'
import { Bench, bytes, leaf, slot } from './test-bench.ts'

describe('a start', () => {
  let bench: Bench
  beforeEach(async () => {
    bench = await Bench.open()
  })
  afterEach(async () => {
    await bench.close()
  })

  async function spares() {
    return (await bench.layers('spare')).filter((layer) => layer.volume_id === null)
  }

  async function spareRows(): Promise<number[]> {
    await expect.poll(() => spares()).toHaveLength(sparesPerPool)
    return (await spares()).map((layer) => layer.alias)
  }

  it('makes the spares of a pool, with their files', async () => {
    await expect.poll(() => spares()).toHaveLength(sparesPerPool)
    for (const layer of await spares()) expect(await bench.store.layerExists(layer.id)).toBe(true)
  })

  it('removes layers that were being made, file and row', async () => {
    await expect.poll(() => spares()).toHaveLength(sparesPerPool)
    const [withFile, without] = await spares()
    await bench.mapper.close()
    await bench.inner.write(async (tx) => {
      const aliases = [withFile?.alias ?? 0, without?.alias ?? 0]
      await tx.updateTable('layers').set({ state: 'making' }).where('alias', 'in', aliases).execute()
    })
    await bench.store.removeLayer(without?.id ?? '')
    await bench.restart()
    expect(await bench.layers('making')).toEqual([])
    expect(await bench.store.layerExists(withFile?.id ?? '')).toBe(false)
  })

  it('commits the row of a layer before its file is made', async () => {
    await expect.poll(() => spares()).toHaveLength(sparesPerPool)
    bench.fail({ operation: 'create', errno: 5 })
    // More than there are spares, so that new ones have to be made and cannot.
    const made = await Promise.allSettled(
      Array.from({ length: sparesPerPool + 4 }, async (_, index) => await bench.volume(`v${index}`, leaf)),
    )
    expect(made.some((result) => result.status === 'rejected')).toBe(true)
    bench.fail()
    expect(await bench.mapper.unknownLayers(bench.poolId)).toEqual([])
    const left = (await bench.layers('making')).map((layer) => layer.id)
    await bench.restart()
    const making = (await bench.layers('making')).map((layer) => layer.id)
    expect(left.filter((id) => making.includes(id))).toEqual([])
    expect(await bench.mapper.pools.check(bench.poolId)).toEqual([])
  })

  it('ends the removal of condemned layers', async () => {
    const volume = await bench.volume('v', leaf)
    await (await bench.attach(volume.id)).write(0, bytes(1))
    await bench.mapper.close(volume.id)
    await bench.mapper.deleteResource(volume.id)
    expect((await bench.layers('condemned')).length).toBeGreaterThan(0)
    await bench.restart()
    expect(await bench.layers('condemned')).toEqual([])
    expect((await bench.store.usage()).storedBytes).toBe(0)
  })

  it.each(['open', 'closed'])('seals the layer that a snapshot of an %s volume left closing', async (how) => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await bench.snapshot(volume.id, 'first')
    await device.write(0, bytes(1))
    if (how === 'closed') await bench.mapper.close(volume.id)
    // The mark of the seal is a frame, too.
    bench.fail({ operation: 'append', errno: 5 })
    if (how === 'open') {
      bench.fail()
      await device.flush()
      await bench.mapper.checkpoint(volume.id)
      bench.fail({ operation: 'append', errno: 5 })
    }
    const snapshot = await bench.snapshot(volume.id, 'second')
    bench.fail()
    expect(await bench.layers('closing')).toHaveLength(1)
    await bench.kill()
    expect(await bench.layers('closing')).toEqual([])
    expect(await bench.read(snapshot.id, 0, slot)).toEqual(bytes(1))
    const again = await bench.attach(volume.id)
    await again.write(0, bytes(2))
    await bench.snapshot(volume.id, 'third')
    expect(await bench.read(snapshot.id, 0, slot)).toEqual(bytes(1))
    await bench.mapper.close(volume.id)
    await bench.mapper.reclaim(null)
    expect(await bench.findLeak()).toBe(null)
  })

  it('reports a file without a row and never touches it', async () => {
    const unknown = '00000000-0000-4000-8000-00000000abcd'
    await bench.store.createLayer(unknown)
    await bench.restart()
    expect(await bench.mapper.unknownLayers(bench.poolId)).toEqual([unknown])
    expect(bench.log.lines.some((line) => line.message.includes('does not know'))).toBe(true)
    expect(await bench.mapper.pools.check(bench.poolId)).toEqual([
      expect.objectContaining({ kind: 'layer-unknown', object: unknown }),
    ])
    await bench.mapper.reclaim(null)
    expect(await bench.store.layerExists(unknown)).toBe(true)
    await bench.store.removeLayer(unknown)
  })

  it('replaces spares whose files are missing', async () => {
    await expect.poll(() => spares()).toHaveLength(sparesPerPool)
    const lost = await spares()
    await bench.mapper.close()
    for (const layer of lost) await bench.store.removeLayer(layer.id)
    await bench.restart()
    await bench.volume('v', leaf)
    await expect.poll(async () => (await spares()).length).toBeGreaterThanOrEqual(sparesPerPool / 2)
    const ids = (await spares()).map((layer) => layer.id)
    for (const layer of lost) expect(ids).not.toContain(layer.id)
  })

  it('with an older catalog takes no layer for a spare that a newer one has given away, and keeps its file', async () => {
    const older = await spareRows()
    const volume = await bench.volume('newer', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    await bench.mapper.close()
    const [written] = await bench.layers('active')
    expect(older).toContain(written?.alias)
    for (const state of ['spare', 'making'] as const) {
      // What the older catalog says of that layer.
      await bench.inner.write(async (tx) => {
        await tx.deleteFrom('resources').where('id', '=', volume.id).execute()
        await tx
          .insertInto('layers')
          .values({ ...(written as LayerRow), state, volume_id: null })
          .onConflict((conflict) => conflict.column('alias').doUpdateSet({ state, volume_id: null }))
          .execute()
        await tx
          .insertInto('replicas')
          .values({ layer_alias: written?.alias ?? 0, pool_id: bench.poolId, project_id: adminProject.id, state: 'complete' })
          .onConflict((conflict) => conflict.doNothing())
          .execute()
      })
      await bench.restart()
      expect(await bench.mapper.unknownLayers(bench.poolId)).toEqual([written?.id])
      for (let index = 0; index < 2 * sparesPerPool; index += 1) {
        const fresh = await bench.volume(`${state}-${index}`, leaf)
        expect(await bench.read(fresh.id, 0, slot)).toEqual(bytes(0))
      }
      await bench.mapper.reclaim(null)
      expect(await bench.store.layerExists(written?.id ?? '')).toBe(true)
      await bench.mapper.close()
    }
  })

  it('gives page ids that nothing had before', async () => {
    const volume = await bench.volume('v', 4 * leaf)
    await bench.snapshot(volume.id, 'first')
    let device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    const snapshot = await bench.snapshot(volume.id, 'second')
    await bench.restart()
    device = await bench.attach(volume.id)
    await device.write(2 * slot, bytes(2))
    await bench.mapper.checkpoint(volume.id)
    const pages = await bench.pageCount()
    await device.write(4 * slot, bytes(3))
    await bench.mapper.checkpoint(volume.id)
    expect(await bench.pageCount()).toBe(pages)
    await bench.restart()
    expect(await bench.read(snapshot.id, 0, 5 * slot)).toEqual(Buffer.concat([bytes(1), bytes(0, 4 * slot)]))
    const content = Buffer.concat([bytes(1), bytes(0), bytes(2), bytes(0), bytes(3)])
    expect(await bench.read(volume.id, 0, 5 * slot)).toEqual(content)
  })
})
