import { adminProject, AtollError, openCatalog } from '@atoll/core'
import { Engine } from '@atoll/native'
import { drivers, type Driver } from '@atoll/southbound'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { openMapper } from './mapper.ts'
import { Bench, bytes, leaf, LogLines, ManualTimers, nobody, slot } from './test-bench.ts'

describe('pools', () => {
  let bench: Bench
  beforeEach(async () => {
    bench = await Bench.open()
  })
  afterEach(async () => {
    await bench.close()
  })

  it('are refused with an unknown driver, a wrong option or a name that is taken, and leave no row', async () => {
    const wanted = { projectId: adminProject.id, name: 'other', driver: 'memory', options: {} }
    await expect(bench.mapper.pools.create({ ...wanted, driver: 'tape' })).rejects.toMatchObject({ code: 'DRIVER_UNKNOWN' })
    await expect(bench.mapper.pools.create({ ...wanted, options: { colour: 'red' } })).rejects.toMatchObject({
      code: 'POOL_OPTION_INVALID',
    })
    await expect(bench.mapper.pools.create({ ...wanted, name: 'pool' })).rejects.toMatchObject({ code: 'NAME_TAKEN' })
    expect(await bench.mapper.pools.list()).toHaveLength(1)
  })

  it('that hold something are not deleted; empty ones are, with their spares', async () => {
    const volume = await bench.volume('v', leaf)
    await (await bench.attach(volume.id)).write(0, bytes(1))
    await bench.mapper.close(volume.id)
    await expect(bench.mapper.pools.delete(bench.poolId)).rejects.toMatchObject({
      code: 'POOL_NOT_EMPTY',
      values: { resourceCount: 1 },
    })
    await bench.volume('still usable', leaf)
    for (const { id } of await bench.inner.db.selectFrom('resources').select('id').execute())
      await bench.mapper.deleteResource(id)
    await bench.mapper.pools.delete(bench.poolId)
    expect(await bench.mapper.pools.list()).toEqual([])
    expect(await bench.store.listLayers()).toEqual([])
    expect(await bench.inner.db.selectFrom('layers').selectAll().execute()).toEqual([])
    await expect(bench.volume('v', leaf)).rejects.toMatchObject({ code: 'POOL_UNAVAILABLE' })
    await expect(bench.mapper.pools.status(bench.poolId)).rejects.toMatchObject({ code: 'POOL_NOT_FOUND' })
  })

  it('are deleted while their first spares are being made', async () => {
    await bench.mapper.pools.delete(bench.poolId)
    const { id } = await bench.mapper.pools.create({ projectId: adminProject.id, name: 'young', driver: 'memory', options: {} })
    await bench.mapper.pools.delete(id)
    await bench.mapper.idle()
    expect(await bench.store.listLayers()).toEqual([])
    expect(await bench.inner.db.selectFrom('layers').selectAll().execute()).toEqual([])
  })

  it('that are not there are refused', async () => {
    await expect(bench.mapper.pools.get(nobody)).rejects.toMatchObject({ code: 'POOL_NOT_FOUND' })
    await expect(bench.mapper.reclaim(nobody)).rejects.toMatchObject({ code: 'POOL_UNAVAILABLE' })
  })

  it('hold clones of what lies in another pool', async () => {
    const other = await bench.mapper.pools.create({ projectId: adminProject.id, name: 'other', driver: 'memory', options: {} })
    const volume = await bench.volume('v', leaf)
    await (await bench.attach(volume.id)).write(0, bytes(1))
    const snapshot = await bench.snapshot(volume.id)
    const clone = await bench.mapper.createVolume({
      projectId: adminProject.id,
      name: 'clone',
      sizeBytes: leaf,
      poolId: other.id,
      fromId: snapshot.id,
    })
    expect(clone.home_pool_id).toBe(other.id)
    await (await bench.attach(clone.id)).write(slot, bytes(2))
    expect(await bench.read(clone.id, 0, 2 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2)]))
  })
})

describe('a pool that cannot be opened', () => {
  it('keeps its reason, and what lies in other pools is served', async () => {
    const engine = new Engine()
    const catalog = await openCatalog(':memory:')
    const log = new LogLines()
    const timers = new ManualTimers()
    let down = false
    const memory = drivers.find((driver) => driver.name === 'memory') as Driver
    const flaky: Driver = {
      ...memory,
      name: 'flaky',
      open: async (context) => {
        if (down) throw new AtollError('POOL_UNAVAILABLE', 'the backend does not answer')
        return await memory.open(context)
      },
    }
    const options = { catalog, engine, drivers: [memory, flaky], log, setTimer: timers.set }
    let mapper = await openMapper(options)
    const wanted = { projectId: adminProject.id, options: {} }
    const good = await mapper.pools.create({ ...wanted, name: 'good', driver: 'memory' })
    const bad = await mapper.pools.create({ ...wanted, name: 'bad', driver: 'flaky' })
    const [there, gone] = await Promise.all(
      [good, bad].map(
        async (pool) =>
          await mapper.createVolume({ projectId: adminProject.id, name: pool.name, sizeBytes: leaf, poolId: pool.id }),
      ),
    )
    await mapper.close()
    down = true
    mapper = await openMapper(options)
    expect(mapper.pools.failure(bad.id)).toMatchObject({ code: 'POOL_UNAVAILABLE' })
    await expect(mapper.open(gone?.id ?? '', { holder: 'test', readOnly: false })).rejects.toMatchObject({
      code: 'POOL_UNAVAILABLE',
      message: expect.stringContaining('does not answer') as string,
    })
    await mapper.open(there?.id ?? '', { holder: 'test', readOnly: false })
    await mapper.reclaim(null)
    down = false
    await mapper.pools.open(bad)
    await mapper.open(gone?.id ?? '', { holder: 'test', readOnly: false })
    await mapper.close()
    await catalog.close()
    await engine.close()
  })
})
