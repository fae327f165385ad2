import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { Bench, bytes, leaf, nobody, slot } from './test-bench.ts'

const holder = 'test'

describe('open and close', () => {
  let bench: Bench
  beforeEach(async () => {
    bench = await Bench.open()
  })
  afterEach(async () => {
    await bench.close()
  })

  async function lease(id: string) {
    return await bench.inner.db.selectFrom('leases').selectAll().where('volume_id', '=', id).executeTakeFirstOrThrow()
  }

  it('raise the epoch with every open and release the lease with every close', async () => {
    const volume = await bench.volume('v', leaf)
    for (const epoch of [1, 2, 3]) {
      const opened = await bench.mapper.open(volume.id, { holder, readOnly: false })
      expect(opened.epoch).toBe(epoch)
      expect(await lease(volume.id)).toMatchObject({ epoch, holder, released_at: null })
      await bench.mapper.close(volume.id)
      expect((await lease(volume.id)).released_at).not.toBe(null)
    }
  })

  it('keep what was written, also through a restart', async () => {
    const volume = await bench.volume('v', leaf)
    const snapshot = await bench.snapshot(volume.id)
    const device = await bench.attach(volume.id)
    await device.write(slot, bytes(1))
    await bench.restart()
    expect(await bench.read(volume.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(0), bytes(1)]))
    expect(await bench.read(snapshot.id, slot, slot)).toEqual(bytes(0))
    expect(bench.log.lines.filter((line) => line.level !== 'debug')).toEqual([])
  })

  it('are one at a time', async () => {
    const volume = await bench.volume('v', leaf)
    await bench.attach(volume.id)
    await expect(bench.mapper.open(volume.id, { holder, readOnly: false })).rejects.toMatchObject({ code: 'ALREADY_OPEN' })
    await expect(bench.mapper.open(volume.id, { holder, readOnly: true })).rejects.toMatchObject({ code: 'ALREADY_OPEN' })
    await bench.mapper.close(volume.id)
    await expect(bench.mapper.close(volume.id)).rejects.toMatchObject({ code: 'NOT_OPEN' })
    expect(bench.mapper.isOpen(volume.id)).toBe(false)
  })

  it('of a snapshot are for reading only', async () => {
    const volume = await bench.volume('v', leaf)
    const snapshot = await bench.snapshot(volume.id)
    const { device, epoch } = await bench.mapper.open(snapshot.id, { holder, readOnly: false })
    expect(epoch).toBe(0)
    expect(device.readOnly()).toBe(true)
    await expect(device.write(0, bytes(1))).rejects.toThrow()
  })

  it('of what is not there are refused', async () => {
    await expect(bench.mapper.open(nobody, { holder, readOnly: true })).rejects.toMatchObject({ code: 'RESOURCE_NOT_FOUND' })
  })

  it('replay what a killed process flushed, and nothing else', async () => {
    const volume = await bench.volume('v', 2 * leaf)
    const snapshot = await bench.snapshot(volume.id)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    await device.write(leaf, bytes(2))
    await device.flush()
    await bench.mapper.checkpoint(volume.id)
    await device.write(slot, bytes(3))
    await device.flush()
    await device.write(2 * slot, bytes(4))
    await bench.kill()
    const { report, device: again } = await bench.mapper.open(volume.id, { holder, readOnly: false })
    expect(report).toMatchObject({ framesReplayed: 1, promotedNext: false })
    expect(Buffer.from(await again.read(0, 3 * slot))).toEqual(Buffer.concat([bytes(1), bytes(3), bytes(0)]))
    // A partial write does not merge with what nobody acknowledged.
    await again.write(2 * slot + 5, bytes(5, 1))
    expect(Buffer.from(await again.read(2 * slot, 8))).toEqual(Buffer.from([0, 0, 0, 0, 0, 5, 0, 0]))
    expect(await bench.read(snapshot.id, 0, slot)).toEqual(bytes(0))
    await bench.mapper.close(volume.id)
    await bench.mapper.reclaim(null)
    expect(await bench.findLeak()).toBe(null)
  })

  it.each([false, true])(
    'leave the layer of a dead holder who may have been elsewhere; he had begun a swap: %s',
    async (swapped) => {
      await bench.close()
      bench = await Bench.open({ fence: 'blocklist' })
      const volume = await bench.volume('v', leaf)
      const device = await bench.attach(volume.id)
      await device.write(0, bytes(1))
      await device.flush()
      if (swapped) {
        bench.failing.beforeWrite = ({ durable }) => {
          if (durable) throw new Error('no catalog')
        }
        await bench.snapshot(volume.id).catch(() => undefined)
        await device.write(slot, bytes(2))
        await device.flush()
      }
      const row = await bench.inner.db.selectFrom('volumes').selectAll().where('id', '=', volume.id).executeTakeFirstOrThrow()
      const written = [row.active_alias, ...(swapped ? [row.next_alias] : [])]
      await bench.kill()
      await bench.attach(volume.id)
      expect(bench.mapper.opened(volume.id)?.report.promotedNext).toBe(swapped)
      const [active] = await bench.layers('active')
      expect(written).not.toContain(active?.alias)
      expect(await bench.read(volume.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(swapped ? 2 : 0)]))
    },
  )

  it.each(['snapshot', 'clone', 'read', 'resize'])('replay a dirty volume before a %s of it', async (operation) => {
    const volume = await bench.volume('v', leaf)
    const first = await bench.snapshot(volume.id, 'first')
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    await device.flush()
    await bench.kill()
    let id = volume.id
    if (operation === 'snapshot') ({ id } = await bench.snapshot(volume.id))
    else if (operation === 'clone') ({ id } = await bench.volume('clone', leaf, volume.id))
    else if (operation === 'resize') await bench.mapper.resize(volume.id, 2 * leaf)
    expect(await bench.read(id, 0, slot)).toEqual(bytes(1))
    expect(await bench.read(first.id, 0, slot)).toEqual(bytes(0))
    expect((await lease(volume.id)).released_at).not.toBe(null)
  })

  it('of a volume with a missing layer fail naming volume and layer, and harm no other', async () => {
    const broken = await bench.volume('broken', leaf)
    const fine = await bench.volume('fine', leaf)
    await bench.snapshot(broken.id)
    const [sealed] = await bench.layers('sealed')
    await bench.store.removeLayer(sealed?.id ?? '')
    await expect(bench.attach(broken.id)).rejects.toMatchObject({
      code: 'LAYER_MISSING',
      message: expect.stringContaining(sealed?.id ?? 'no layer') as string,
      values: { resourceId: broken.id, layerId: sealed?.id },
    })
    expect(bench.mapper.failure(broken.id)).toMatchObject({ code: 'LAYER_MISSING' })
    expect((await lease(broken.id)).released_at).not.toBe(null)
    await bench.attach(fine.id)
    expect(bench.mapper.failure(fine.id)).toBe(undefined)
    expect(await bench.mapper.pools.check(bench.poolId)).toEqual([
      expect.objectContaining({ severity: 'error', kind: 'layer-missing', object: sealed?.id }),
    ])
  })

  it('of a volume with a damaged page fail naming it, and harm no other', async () => {
    const broken = await bench.volume('broken', leaf)
    await bench.snapshot(broken.id)
    const device = await bench.attach(broken.id)
    await device.write(0, bytes(1))
    await bench.mapper.close(broken.id)
    const fine = await bench.volume('fine', leaf)
    const [pageId] = await bench.inner.pages.listIds(0, Number.MAX_SAFE_INTEGER, 1)
    const [body] = await bench.inner.pages.get([pageId ?? 0])
    const damaged = Buffer.from(body ?? [])
    damaged[damaged.length - 1] = (damaged.at(-1) ?? 0) ^ 1
    await bench.restart()
    await bench.inner.write(async () => {
      await bench.inner.pages.delete([pageId ?? 0])
      await bench.inner.pages.insert([pageId ?? 0], [damaged])
    })
    await expect(bench.attach(broken.id)).rejects.toMatchObject({ code: 'PAGE_CORRUPT', values: { resourceId: broken.id } })
    await bench.inner.write(async () => await bench.inner.pages.delete([pageId ?? 0]))
    await expect(bench.attach(broken.id)).rejects.toMatchObject({ code: 'PAGE_MISSING', values: { pageId } })
    await bench.attach(fine.id)
    // Nothing sealed is touched while a map cannot be read.
    const before = await bench.layers('sealed')
    await expect(bench.mapper.reclaim(null)).rejects.toMatchObject({ code: 'PAGE_MISSING', values: { resourceId: broken.id } })
    expect(await bench.layers('sealed')).toEqual(before)
  })

  it('with a catalog that is older than the journal are refused', async () => {
    const volume = await bench.volume('v', leaf)
    await bench.snapshot(volume.id)
    const device = await bench.attach(volume.id)
    for (let index = 0; index < 3; index += 1) {
      await device.write(index * slot, bytes(1))
      await bench.mapper.checkpoint(volume.id)
    }
    await bench.mapper.close(volume.id)
    // As if an older catalog had been restored.
    await bench.inner.write(async (tx) => {
      await tx.updateTable('volumes').set({ map_lsn: 0 }).where('id', '=', volume.id).execute()
    })
    await expect(bench.attach(volume.id)).rejects.toMatchObject({ code: 'CATALOG_BEHIND', values: { resourceId: volume.id } })
    const other = await bench.volume('other', leaf)
    await bench.attach(other.id)
  })

  it('leave the catalog with every write that was answered, also those that came while it was closing', async () => {
    const volume = await bench.volume('v', 4 * leaf)
    await bench.snapshot(volume.id, 'first')
    const device = await bench.attach(volume.id)
    // Something to do for the checkpoint, so that writes come in between.
    await Promise.all(Array.from({ length: 500 }, async (_, index) => await device.write((index * 16 + 1) * slot, bytes(1))))
    const answered: number[] = []
    const begun = Promise.withResolvers<void>()
    let refused = false
    const writers = Array.from({ length: 4 }, async (_, writer) => {
      for (let index = 0; !refused; index += 1) {
        const at = 16_000 + (index * 4 + writer) * 2
        await device.write(at * slot, bytes(2)).then(
          () => {
            answered.push(at)
            begun.resolve()
          },
          () => {
            refused = true
          },
        )
      }
    })
    await begun.promise
    await bench.mapper.close(volume.id)
    await Promise.all(writers)
    expect(answered.length).toBeGreaterThan(0)
    expect((await lease(volume.id)).released_at).not.toBe(null)
    // A snapshot of a closed volume takes what the catalog has.
    const snapshot = await bench.snapshot(volume.id, 'second')
    for (const at of answered) expect((await bench.read(snapshot.id, at * slot, slot)).equals(bytes(2)), `slot ${at}`).toBe(true)
  })

  it('of a poisoned device replay from the journal', async () => {
    const volume = await bench.volume('v', leaf)
    await bench.snapshot(volume.id)
    const events: string[] = []
    const poisoned = Promise.withResolvers<void>()
    const { device } = await bench.mapper.open(volume.id, {
      holder,
      readOnly: false,
      onEvent: (event) => {
        events.push(event.kind)
        poisoned.resolve()
      },
    })
    await device.write(0, bytes(1))
    await device.flush()
    bench.fail({ operation: 'sync', errno: 5 })
    await device.write(slot, bytes(2))
    await expect(device.flush()).rejects.toMatchObject({ code: 'DEVICE_POISONED' })
    await poisoned.promise
    expect(events).toEqual(['poisoned'])
    bench.fail()
    await bench.mapper.close(volume.id)
    expect((await lease(volume.id)).released_at).toBe(null)
    expect(await bench.read(volume.id, 0, slot)).toEqual(bytes(1))
  })
})

describe('a lost lease', () => {
  it('stops its volume, changes nothing of it, and no other', async () => {
    const bench = await Bench.open()
    try {
      const volume = await bench.volume('v', leaf)
      const other = await bench.volume('w', leaf)
      await bench.snapshot(volume.id)
      const events: string[] = []
      const { device } = await bench.mapper.open(volume.id, {
        holder,
        readOnly: false,
        onEvent: (event) => events.push(event.kind),
      })
      const fine = await bench.attach(other.id)
      await device.write(0, bytes(1))
      const { root_word: before } = await bench.row(volume.id)
      await bench.inner.write(async (tx) => {
        await tx.updateTable('volumes').set({ epoch: 99 }).where('id', '=', volume.id).execute()
        await tx.updateTable('leases').set({ epoch: 99, holder: 'another' }).where('volume_id', '=', volume.id).execute()
      })
      await expect(bench.mapper.checkpoint(volume.id)).rejects.toMatchObject({ code: 'LEASE_LOST' })
      expect(events).toEqual(['lease-lost'])
      await expect(bench.snapshot(volume.id)).rejects.toMatchObject({ code: 'LEASE_LOST' })
      await expect(bench.mapper.resize(volume.id, 2 * leaf)).rejects.toMatchObject({ code: 'LEASE_LOST' })
      await expect(bench.mapper.resize(volume.id, slot)).rejects.toMatchObject({ code: 'LEASE_LOST' })
      await bench.mapper.close(volume.id)
      await expect(device.write(0, bytes(2))).rejects.toMatchObject({ code: 'DEVICE_CLOSED' })
      expect((await bench.row(volume.id)).root_word).toBe(before)
      expect(
        await bench.inner.db.selectFrom('leases').selectAll().where('volume_id', '=', volume.id).executeTakeFirst(),
      ).toMatchObject({
        epoch: 99,
        released_at: null,
      })
      expect(await bench.pageCount()).toBe(0)
      await fine.write(0, bytes(3))
      await bench.mapper.checkpoint(other.id)
    } finally {
      await bench.close()
    }
  })
})
