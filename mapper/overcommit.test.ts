import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { Bench, bytes, leaf } from './test-bench.ts'

describe('a pool with an over-commit limit', () => {
  let bench: Bench
  // 4 leaves of space, volumes may have 8.
  const maxBytes = 8 * leaf
  beforeEach(async () => {
    bench = await Bench.open({ capacityBytes: 4 * leaf })
    await bench.mapper.pools.set(bench.poolId, { overcommit: '2' })
  })
  afterEach(async () => {
    await bench.close()
  })

  it('takes volumes up to the limit and refuses what goes beyond with the figures', async () => {
    await bench.volume('first', 5 * leaf)
    await bench.volume('second', 3 * leaf)
    await expect(bench.volume('third', 4096)).rejects.toMatchObject({
      code: 'POOL_OVERCOMMITTED',
      httpStatus: 507,
      values: { pool: 'pool', overcommit: 2, totalBytes: 4 * leaf, maxBytes, provisionedBytes: maxBytes, addedBytes: 4096 },
    })
    expect(await bench.mapper.pools.space(bench.poolId)).toMatchObject({
      provisionedBytes: maxBytes,
      provisionedMaxBytes: maxBytes,
    })
  })

  it('refuses a clone and a larger size alike, and nothing has changed then', async () => {
    const volume = await bench.volume('disk', 5 * leaf)
    await (await bench.attach(volume.id)).write(0, bytes(1))
    const lsn = bench.mapper.opened(volume.id)?.device.stats().lsn
    const layers = await bench.layers('active')
    await expect(bench.volume('clone', 5 * leaf, volume.id)).rejects.toMatchObject({ code: 'POOL_OVERCOMMITTED' })
    // A swap that was made for nothing would be found in the catalog by now.
    await bench.mapper.close(volume.id)
    expect(await bench.layers('active')).toEqual(layers)
    await bench.attach(volume.id)
    expect(bench.mapper.opened(volume.id)?.device.stats().lsn).toBe(lsn)
    await expect(bench.mapper.resize(volume.id, 9 * leaf)).rejects.toMatchObject({
      code: 'POOL_OVERCOMMITTED',
      values: { addedBytes: 4 * leaf, provisionedBytes: 5 * leaf },
    })
    expect((await bench.row(volume.id)).size_bytes).toBe(5 * leaf)
    await bench.mapper.resize(volume.id, 8 * leaf)
    await bench.mapper.resize(volume.id, 2 * leaf)
    await bench.volume('clone', 6 * leaf, volume.id)
  })

  it('is not passed by volumes that are made at the same time', async () => {
    const made = await Promise.allSettled(Array.from({ length: 12 }, (_, index) => bench.volume(`disk ${index}`, leaf)))
    expect(made.filter(({ status }) => status === 'fulfilled')).toHaveLength(8)
  })

  it.each(['made', 'made larger'])('is asked when a volume is %s, not only before', async (what) => {
    const other = await bench.volume('other', leaf)
    const disk = await bench.volume('disk', leaf)
    // The other volume grows after the first question and before the write.
    let grown: Promise<unknown> | undefined
    bench.failing.beforeWrite = () => {
      grown ??= bench.inner.write(async (tx) => {
        await tx
          .updateTable('resources')
          .set({ size_bytes: 7 * leaf })
          .where('id', '=', other.id)
          .execute()
      })
    }
    const refused = what === 'made' ? bench.volume('late', 4 * leaf) : bench.mapper.resize(disk.id, 5 * leaf)
    await expect(refused).rejects.toMatchObject({ code: 'POOL_OVERCOMMITTED', values: { provisionedBytes: maxBytes } })
    await grown
  })

  it('leaves what is there alone when the limit is lowered, and lets a rollback take a size back', async () => {
    const volume = await bench.volume('disk', 8 * leaf)
    const snapshot = await bench.snapshot(volume.id)
    await bench.mapper.resize(volume.id, leaf)
    await bench.mapper.pools.set(bench.poolId, { overcommit: '0.5' })
    await expect(bench.mapper.resize(volume.id, 3 * leaf)).rejects.toMatchObject({ code: 'POOL_OVERCOMMITTED' })
    await bench.mapper.rollback(volume.id, snapshot.id)
    expect((await bench.row(volume.id)).size_bytes).toBe(8 * leaf)
    await bench.mapper.resize(volume.id, 2 * leaf)
    await bench.mapper.pools.set(bench.poolId, { overcommit: 'default' })
    await bench.volume('large', 2 ** 49)
    expect((await bench.mapper.pools.space(bench.poolId)).provisionedMaxBytes).toBe(null)
  })

  it('keeps its settings over a restart; a reserve that it cannot have is refused and not kept', async () => {
    await expect(bench.mapper.pools.set(bench.poolId, { reserve: '1M', overcommit: '3' })).rejects.toMatchObject({
      code: 'POOL_UNSUPPORTED',
    })
    await bench.restart()
    expect((await bench.mapper.pools.get(bench.poolId)).settings).toEqual({ overcommit: '2' })
    await expect(bench.volume('disk', 9 * leaf)).rejects.toMatchObject({ code: 'POOL_OVERCOMMITTED' })
  })
})
