import { afterEach, describe, expect, it } from 'vitest'
import { Bench, bytes, slot } from './test-bench.ts'

const MiB = 1 << 20
let bench: Bench
afterEach(async () => await bench.close())

const placeOf = async (alias: number | null | undefined): Promise<string[]> => {
  const rows = await bench.inner.db.selectFrom('replicas').selectAll().execute()
  return rows.filter((row) => row.layer_alias === alias).map((row) => row.pool_id)
}

async function written(volumeId: string): Promise<{ active: string[]; next: string[] }> {
  const row = await bench.inner.db.selectFrom('volumes').selectAll().where('id', '=', volumeId).executeTakeFirstOrThrow()
  return { active: await placeOf(row.active_alias), next: row.next_alias === null ? [] : await placeOf(row.next_alias) }
}

async function freeze(volumeId: string, poolId = bench.poolIds[1] ?? ''): Promise<{ pauseMs: number }> {
  return await bench.mapper.moves.freeze(
    { jobId: 'job', volumeId, targetPoolId: poolId, withSnapshots: true },
    { deadlineMs: 5000 },
  )
}

describe('turning the writes of a volume to another pool', () => {
  it('leaves an open volume its content and its home, and what is written next lies in the target', async () => {
    bench = await Bench.open({ pools: 2 })
    const [first = '', second = ''] = bench.poolIds
    const volume = await bench.volume('v', MiB)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    const { pauseMs } = await freeze(volume.id)
    expect(pauseMs).toBeGreaterThanOrEqual(0)
    await device.write(slot, bytes(2))
    await device.flush()
    expect(await written(volume.id)).toEqual({ active: [second], next: [second] })
    expect((await bench.row(volume.id)).home_pool_id).toBe(first)
    const { sources } = await bench.mapper.pools.links(first)
    expect(sources.map((pool) => pool.id)).toEqual([second])
    const content = Buffer.concat([bytes(1), bytes(2)])
    expect(await bench.read(volume.id, 0, 2 * slot)).toEqual(content)
    await bench.mapper.reclaim(null)
    await bench.kill()
    expect(await bench.read(volume.id, 0, 2 * slot)).toEqual(content)
    await bench.mapper.reclaim(null)
    expect(await bench.findLeak()).toBeNull()
  })

  it('gives a closed volume its new layer in the catalog, and the link stays although no map names the target', async () => {
    bench = await Bench.open({ pools: 2 })
    const [first = '', second = ''] = bench.poolIds
    const volume = await bench.volume('v', MiB)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    await bench.mapper.close(volume.id)
    expect(await freeze(volume.id)).toEqual({ pauseMs: 0 })
    expect(await written(volume.id)).toEqual({ active: [second], next: [] })
    await bench.mapper.reclaim(null)
    await bench.mapper.reclaim(null)
    expect((await bench.mapper.pools.links(first)).sources.map((pool) => pool.id)).toEqual([second])
    expect(await bench.findLeak()).toBeNull()
    await bench.restart()
    const again = await bench.attach(volume.id)
    await again.write(slot, bytes(2))
    expect(await bench.read(volume.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2)]))
    expect(await written(volume.id)).toEqual({ active: [second], next: [second] })
  })

  it('is done once, however often it is asked for, and can be turned back', async () => {
    bench = await Bench.open({ pools: 2 })
    const [first = '', second = ''] = bench.poolIds
    const volume = await bench.volume('v', MiB)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    await freeze(volume.id)
    const layerCount = (await bench.layers('sealed')).length
    expect(await freeze(volume.id)).toEqual({ pauseMs: 0 })
    expect((await bench.layers('sealed')).length).toBe(layerCount)
    await device.write(slot, bytes(2))
    await freeze(volume.id, first)
    expect(await written(volume.id)).toEqual({ active: [first], next: [first] })
    await device.write(2 * slot, bytes(3))
    await bench.kill()
    expect(await bench.read(volume.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2)]))
    expect((await bench.mapper.pools.links(first)).sources.map((pool) => pool.id)).toEqual([second])
  })

  it('makes snapshots and clones of a volume whose home is another pool than it writes in', async () => {
    bench = await Bench.open({ pools: 2 })
    const [first = '', second = ''] = bench.poolIds
    const volume = await bench.volume('v', MiB)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    await freeze(volume.id)
    await device.write(slot, bytes(2))
    const snapshot = await bench.snapshot(volume.id)
    await device.write(slot, bytes(3))
    const clone = await bench.volume('c', MiB, volume.id)
    await device.write(slot, bytes(4))
    const away = await bench.volume('d', MiB, volume.id, second)
    await device.write(slot, bytes(5))
    await bench.mapper.checkpoint(volume.id)
    await bench.mapper.reclaim(null)
    const expected: [string, number, string][] = [
      [snapshot.id, 2, first],
      [clone.id, 3, first],
      [away.id, 4, second],
      [volume.id, 5, first],
    ]
    for (const [id, value, home] of expected) {
      expect((await bench.row(id)).home_pool_id).toBe(home)
      expect(await bench.read(id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(value)]))
    }
    expect(await bench.findLeak()).toBeNull()
  })

  it('loses nothing at whatever commit the process ends', async () => {
    for (const isOpen of [true, false]) {
      for (let dieAt = 1, survived = false; !survived; dieAt += 1) {
        bench = await Bench.open({ pools: 2 })
        const volume = await bench.volume('v', MiB)
        const device = await bench.attach(volume.id)
        await device.write(0, bytes(1))
        await device.flush()
        if (!isOpen) await bench.mapper.close(volume.id)
        let commits = 0
        bench.failing.beforeWrite = () => {
          commits += 1
          if (commits >= dieAt) throw new Error('this process dies')
        }
        survived = await freeze(volume.id).then(
          () => commits < dieAt,
          () => false,
        )
        const wantsMore = isOpen && !device.isPoisoned()
        if (wantsMore) await device.write(slot, bytes(2))
        if (wantsMore) await device.flush()
        await bench.kill()
        expect(await bench.read(volume.id, 0, 2 * slot), `open: ${isOpen}, died at commit ${dieAt}`).toEqual(
          Buffer.concat([bytes(1), bytes(isOpen ? 2 : 0)]),
        )
        await freeze(volume.id)
        expect((await written(volume.id)).active).toEqual([bench.poolIds[1]])
        await bench.mapper.reclaim(null)
        expect(await bench.findLeak()).toBeNull()
        if (!survived || isOpen) await bench.close()
      }
    }
  })

  it('does not swap while the exports do not name the next layer', async () => {
    bench = await Bench.open({ pools: 2 })
    const [first = '', second = ''] = bench.poolIds
    const volume = await bench.volume('v', MiB)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    bench.place(second).faulty.setFaults({ seed: 1, rules: [{ operation: 'record-write', errno: 5 }] })
    await expect(freeze(volume.id)).rejects.toMatchObject({ code: 'POOL_UNAVAILABLE' })
    expect((await written(volume.id)).active).toEqual([first])
    bench.place(second).faulty.setFaults({ seed: 1, rules: [] })
    bench.timers.fire()
    await bench.mapper.idle()
    await freeze(volume.id)
    expect((await written(volume.id)).active).toEqual([second])
  })
})
