import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { Bench, bytes, leaf, slot } from './test-bench.ts'

describe('snapshots', () => {
  let bench: Bench
  beforeEach(async () => {
    bench = await Bench.open()
  })
  afterEach(async () => {
    await bench.close()
  })

  it('keep the content of an open volume while the volume goes on', async () => {
    const volume = await bench.volume('v', 4 * leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    await device.write(leaf, bytes(2))
    const snapshot = await bench.snapshot(volume.id)
    await device.write(0, bytes(3))
    await device.write(2 * leaf, bytes(4))
    expect(await bench.read(snapshot.id, 0, slot)).toEqual(bytes(1))
    expect(await bench.read(snapshot.id, leaf, slot)).toEqual(bytes(2))
    expect(await bench.read(snapshot.id, 2 * leaf, slot)).toEqual(bytes(0))
    expect(await bench.read(volume.id, 0, slot)).toEqual(bytes(3))
    expect(snapshot).toMatchObject({ kind: 'snapshot', volume_id: volume.id, size_bytes: 4 * leaf, status: 'available' })
  })

  it('of a fresh volume share its one layer, which is sealed then', async () => {
    const volume = await bench.volume('v', leaf)
    const [active] = await bench.layers('active')
    const snapshot = await bench.snapshot(volume.id)
    expect(snapshot.root_word).toBe((1n << 60n) | BigInt(active?.alias ?? 0))
    expect(await bench.layers('sealed')).toEqual([expect.objectContaining({ id: active?.id })])
    expect((await bench.layers('active')).map((layer) => layer.id)).not.toContain(active?.id)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    expect(await bench.read(snapshot.id, 0, slot)).toEqual(bytes(0))
  })

  it('of a closed volume whose map cannot name its active layer leave that layer as it is', async () => {
    const volume = await bench.volume('v', leaf)
    const first = await bench.snapshot(volume.id, 'first')
    const clone = await bench.volume('clone', leaf, first.id)
    const before = await bench.inner.db.selectFrom('volumes').selectAll().where('id', '=', clone.id).executeTakeFirstOrThrow()
    await bench.snapshot(clone.id, 'of the clone')
    const after = await bench.inner.db.selectFrom('volumes').selectAll().where('id', '=', clone.id).executeTakeFirstOrThrow()
    expect(after.active_alias).toBe(before.active_alias)
  })

  it('are answered before the layers behind them are sealed, and what comes next for the volume waits for that', async () => {
    const volume = await bench.volume('v', leaf)
    for (const name of ['first', 'second', 'third']) {
      const device = await bench.attach(volume.id)
      await device.write(0, bytes(1))
      await bench.mapper.snapshot([{ volumeId: volume.id, name }])
      await bench.mapper.close(volume.id)
      const layers = await bench.inner.db.selectFrom('layers').select('state').execute()
      expect(layers.map(({ state }) => state)).not.toContain('closing')
    }
  })

  it('may follow each other without anything written in between', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    const snapshots = []
    for (let index = 0; index < 12; index += 1) snapshots.push(await bench.snapshot(volume.id, `s${index}`))
    for (const snapshot of snapshots) expect(await bench.read(snapshot.id, 0, slot)).toEqual(bytes(1))
  })

  it('of several volumes, open and closed, are taken together', async () => {
    const open = await bench.volume('open', leaf)
    const closed = await bench.volume('closed', leaf)
    const device = await bench.attach(open.id)
    await device.write(0, bytes(1))
    const other = await bench.attach(closed.id)
    await other.write(0, bytes(2))
    await bench.mapper.close(closed.id)
    const { rows, pauseMs } = await bench.mapper.snapshot([
      { volumeId: closed.id, name: 'a' },
      { volumeId: open.id, name: 'b' },
    ])
    expect(rows.map((row) => [row.name, row.volume_id])).toEqual([
      ['a', closed.id],
      ['b', open.id],
    ])
    expect(pauseMs).toBeGreaterThanOrEqual(0)
    expect(await bench.read(rows[0]?.id ?? '', 0, slot)).toEqual(bytes(2))
    expect(await bench.read(rows[1]?.id ?? '', 0, slot)).toEqual(bytes(1))
  })

  it('of a group with one unknown volume are not taken of any', async () => {
    const volume = await bench.volume('v', leaf)
    const group = [
      { volumeId: volume.id, name: 'a' },
      { volumeId: '00000000-0000-4000-8000-00000000ffff', name: 'b' },
    ]
    await expect(bench.mapper.snapshot(group)).rejects.toMatchObject({ code: 'VOLUME_NOT_FOUND' })
    const rows = await bench.inner.db.selectFrom('resources').selectAll().where('kind', '=', 'snapshot').execute()
    expect(rows).toEqual([])
  })

  it('refuse an empty group and a volume named twice', async () => {
    const volume = await bench.volume('v', leaf)
    await expect(bench.mapper.snapshot([])).rejects.toMatchObject({ code: 'ARGUMENT_INVALID' })
    const twice = [
      { volumeId: volume.id, name: 'a' },
      { volumeId: volume.id, name: 'b' },
    ]
    await expect(bench.mapper.snapshot(twice)).rejects.toMatchObject({ code: 'ARGUMENT_INVALID' })
  })

  it('that fail at their commit leave no snapshot and lose nothing, also when the process dies then', async () => {
    const volume = await bench.volume('v', 2 * leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    bench.failing.beforeWrite = ({ durable }) => {
      if (durable) throw new Error('no catalog')
    }
    await expect(bench.snapshot(volume.id)).rejects.toThrow('no catalog')
    // The swap happened: this goes to the next layer.
    await device.write(slot, bytes(2))
    await device.flush()
    await bench.kill()
    await bench.attach(volume.id)
    expect(bench.mapper.opened(volume.id)?.report.promotedNext).toBe(true)
    expect(await bench.read(volume.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2)]))
    expect(await bench.inner.db.selectFrom('resources').selectAll().where('kind', '=', 'snapshot').execute()).toEqual([])
    await bench.mapper.close(volume.id)
    await bench.mapper.reclaim(null)
    expect(await bench.findLeak()).toBe(null)
  })

  it('that fail at their commit are no obstacle to the next one', async () => {
    const volume = await bench.volume('v', 2 * leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    let failures = 1
    bench.failing.beforeWrite = ({ durable }) => {
      if (durable && failures-- > 0) throw new Error('no catalog')
    }
    await expect(bench.snapshot(volume.id, 'first')).rejects.toThrow('no catalog')
    await device.write(slot, bytes(2))
    const snapshot = await bench.snapshot(volume.id, 'second')
    await device.write(0, bytes(3, 2 * slot))
    expect(await bench.read(snapshot.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2)]))
    await bench.mapper.close(volume.id)
    await bench.mapper.reclaim(null)
    expect(await bench.findLeak()).toBe(null)
  })

  it('whose next layer has data but no frames when the process dies leave none of that data behind', async () => {
    const volume = await bench.volume('v', 2 * leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    await device.flush()
    bench.failing.beforeWrite = ({ durable }) => {
      if (durable) throw new Error('no catalog')
    }
    await expect(bench.snapshot(volume.id)).rejects.toThrow('no catalog')
    // Not flushed: it reaches the file of the next layer, its frame reaches nothing.
    await device.write(slot, bytes(2))
    await bench.kill()
    const again = await bench.attach(volume.id)
    expect(bench.mapper.opened(volume.id)?.report.promotedNext).toBe(false)
    expect(await bench.read(volume.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(0)]))
    await bench.snapshot(volume.id)
    await again.write(slot + 100, bytes(3, 10))
    expect(await bench.read(volume.id, slot, 100)).toEqual(bytes(0, 100))
    await bench.mapper.close(volume.id)
    await bench.mapper.reclaim(null)
    expect(await bench.findLeak()).toBe(null)
  })

  it('whose next layer was written in vain leave it to be replaced when the volume is opened again', async () => {
    const volume = await bench.volume('v', 2 * leaf)
    const device = await bench.attach(volume.id)
    bench.failing.beforeWrite = ({ durable }) => {
      if (durable) throw new Error('no catalog')
    }
    await expect(bench.snapshot(volume.id)).rejects.toThrow('no catalog')
    await device.write(slot, bytes(2))
    const { next_alias: before } = await bench.inner.db.selectFrom('volumes').selectAll().executeTakeFirstOrThrow()
    await bench.kill()
    await bench.attach(volume.id)
    const { next_alias: after } = await bench.inner.db.selectFrom('volumes').selectAll().executeTakeFirstOrThrow()
    expect(after).not.toBe(before)
    await bench.mapper.close(volume.id)
    await bench.mapper.reclaim(null)
    expect(await bench.findLeak()).toBe(null)
    expect((await bench.store.usage()).storedBytes).toBe(0)
  })
})
