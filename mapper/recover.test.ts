import { adminProject, type LayerRow, type LayerState } from '@atoll/core'
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
    expect(await bench.layers('closing')).toHaveLength(1)
    bench.fail()
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

describe('a start over rows that cannot be true', () => {
  let bench: Bench
  /** What each resource read before the damage: its first slots. */
  let contents: Map<string, Buffer>
  const slots = 6

  beforeEach(async () => {
    bench = await Bench.open()
    contents = new Map()
    const [disk, dirty, empty] = [
      await bench.volume('disk', 4 * leaf),
      await bench.volume('dirty', 4 * leaf),
      await bench.volume('empty', leaf),
    ]
    const device = await bench.attach(disk.id)
    await device.write(0, bytes(1))
    const first = await bench.snapshot(disk.id, 'first')
    await device.write(slot, bytes(2))
    await device.write(2 * leaf, bytes(2))
    const second = await bench.snapshot(disk.id, 'second')
    const image = await bench.mapper.createImage({ projectId: adminProject.id, name: 'image', fromId: second.id })
    await device.write(2 * slot, bytes(3))
    // A layer that is sealed and holds nothing, named by the whole of a map.
    const hollow = await bench.snapshot(empty.id, 'hollow')
    const written = await bench.attach(dirty.id)
    await written.write(0, bytes(4))
    const base = await bench.snapshot(dirty.id, 'base')
    await bench.mapper.close(disk.id)
    for (const row of [disk, dirty, empty, first, second, image, hollow, base]) {
      contents.set(row.id, await bench.read(row.id, 0, slots * slot))
    }
    // Only the journal of the layer that it writes says so.
    await written.write(3 * slot, bytes(5))
    await written.flush()
    contents.set(dirty.id, Buffer.concat([bytes(4), bytes(0, 2 * slot), bytes(5), bytes(0, 2 * slot)]))
  })

  afterEach(async () => await bench.close())

  const volume = async (name: string) => {
    const { id } = await bench.inner.db.selectFrom('resources').select('id').where('name', '=', name).executeTakeFirstOrThrow()
    return await bench.inner.db.selectFrom('volumes').selectAll().where('id', '=', id).executeTakeFirstOrThrow()
  }
  /** The layer that was sealed by the snapshot. */
  const sealedBy = async (name: string): Promise<number> => {
    const { volume_id: volumeId, root_word: root } = await bench.inner.db
      .selectFrom('resources')
      .selectAll()
      .where('name', '=', name)
      .executeTakeFirstOrThrow()
    const sealed = (await bench.layers('sealed')).filter((layer) => layer.volume_id === volumeId)
    return (sealed.find((layer) => root === ((1n << 60n) | BigInt(layer.alias))) ?? sealed.at(-1))?.alias ?? 0
  }
  const places: Record<string, () => Promise<number>> = {
    'is part of an image': async () => await sealedBy('second'),
    'is sealed and holds nothing': async () => await sealedBy('hollow'),
    'a dirty volume writes': async () => (await volume('dirty')).active_alias,
    'a closed volume writes': async () => (await volume('disk')).active_alias,
    'a volume is to write next': async () => (await volume('dirty')).next_alias ?? 0,
  }
  const states: readonly LayerState[] = ['making', 'spare', 'active', 'closing', 'sealed', 'condemned']
  const owners = ['nobody', 'its volume', 'another volume'] as const
  const cases = Object.keys(places).flatMap((place) =>
    states.flatMap((state) => {
      // Neither is anything that a start deals with, but for whose it is.
      const some = state === 'active' || state === 'sealed' ? owners.slice(-1) : owners
      return some.map((owner) => ({ place, state, owner }))
    }),
  )

  async function expectEverything(): Promise<void> {
    for (const [id, content] of contents) expect(await bench.read(id, 0, slots * slot)).toEqual(content)
  }

  it.each(cases)('keeps the layer that $place, called $state of $owner', async ({ place, state, owner }) => {
    const alias = (await places[place]?.()) ?? 0
    const row = await bench.inner.db.selectFrom('layers').selectAll().where('alias', '=', alias).executeTakeFirstOrThrow()
    const { id: other } = await volume('empty')
    const volumeId = owner === 'nobody' ? null : owner === 'its volume' ? row.volume_id : row.volume_id === other ? null : other
    await bench.inner.write(async (tx) => {
      await tx.updateTable('layers').set({ state, volume_id: volumeId }).where('alias', '=', alias).execute()
    })
    await bench.kill()
    expect(await bench.store.layerExists(row.id)).toBe(true)
    const found = (await bench.mapper.check()).findings.filter((finding) =>
      `${finding.object} ${finding.message}`.includes(row.id),
    )
    const logged = bench.log.lines.filter(({ level, values }) => level === 'error' && JSON.stringify(values).includes(row.id))
    // A next layer of its volume is called a spare rightly, and one that is sealed again is as it was.
    const isTold = ['making', 'spare', 'condemned'].includes(state) && (state !== row.state || volumeId !== row.volume_id)
    expect(found.some(({ severity }) => severity === 'error') || !isTold).toBe(true)
    expect(logged.some(({ message }) => message.includes('see atoll check')) || !isTold).toBe(true)
    // Nobody else is given it.
    for (let index = 0; index < sparesPerPool + 2; index += 1) {
      const fresh = await bench.volume(`fresh-${index}`, leaf)
      const device = await bench.attach(fresh.id)
      await device.write(0, bytes(99))
      await bench.mapper.close(fresh.id)
      expect((await volume(`fresh-${index}`)).active_alias).not.toBe(alias)
    }
    await expectEverything()
    await bench.mapper.reclaim(null)
    await expectEverything()
    await bench.restart()
    await expectEverything()
  })

  it('keeps what only a journal names in a layer that is called sealed, while its volume cannot be opened', async () => {
    const { id, active_alias: alias } = await volume('dirty')
    await bench.mapper.close(id)
    const device = await bench.attach(id)
    await device.write(4 * slot, bytes(6))
    await device.flush()
    contents.set(id, Buffer.concat([bytes(4), bytes(0, 2 * slot), bytes(5), bytes(6), bytes(0)]))
    await bench.inner.write(async (tx) => {
      await tx.updateTable('layers').set({ state: 'sealed' }).where('alias', '=', alias).execute()
    })
    await bench.kill()
    bench.fail({ operation: 'open', errno: 5, applyCount: 1 })
    await bench.mapper.reclaim(null)
    expect(bench.log.lines.map(({ message }) => message)).toContainEqual(expect.stringContaining('could not be replayed'))
    bench.fail()
    await expectEverything()
  })

  it('keeps pages of an unfinished checkpoint that are part of a map', async () => {
    const [first] = await bench.inner.pages.listIds(1, Number.MAX_SAFE_INTEGER, 1)
    const count = await bench.pageCount()
    const range = { first_page_id: first ?? 0, end_page_id: (first ?? 0) + 1000, volume_id: (await volume('disk')).id }
    await bench.inner.write(async (tx) => await tx.insertInto('page_ranges').values(range).execute())
    await bench.kill()
    expect(await bench.pageCount()).toBe(count)
    expect(
      bench.log.lines.some(({ level, values }) => level === 'error' && JSON.stringify(values).includes(`"firstPageId":${first}`)),
    ).toBe(true)
    expect((await bench.mapper.check()).findings).toContainEqual(
      expect.objectContaining({ kind: 'page-range-stale', object: `page ${first}` }),
    )
    await expectEverything()
    await bench.mapper.check({ repair: true })
    await bench.restart()
    await expectEverything()
  })

  it('destroys nothing while a map cannot be read', async () => {
    const [page] = await bench.inner.pages.listIds(1, Number.MAX_SAFE_INTEGER, 1)
    const { id } = await volume('empty')
    const alias = await sealedBy('second')
    const [body] = await bench.inner.pages.get([page ?? 0])
    await bench.mapper.close(await volume('dirty').then((row) => row.id))
    await bench.inner.write(async (tx) => {
      await bench.inner.pages.delete([page ?? 0])
      await tx.updateTable('layers').set({ state: 'condemned', volume_id: id }).where('alias', '=', alias).execute()
    })
    await bench.restart()
    await expect(bench.mapper.reclaim(null)).rejects.toMatchObject({ code: 'PAGE_MISSING' })
    await bench.inner.write(async () => await bench.inner.pages.insert([page ?? 0], [body as Uint8Array]))
    await bench.restart()
    await expectEverything()
  })
})
