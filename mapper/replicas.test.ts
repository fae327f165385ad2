import { adminProject } from '@atoll/core'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { Bench, bytes, leaf, nobody, slot } from './test-bench.ts'

const complete = 'complete'
const primary = 'complete, primary'

describe('a layer with replicas in two pools', () => {
  let bench: Bench
  let first: string
  let second: string
  let alias: number
  let ids: { disk: string; snapshot: string; clone: string }

  /** The disk of the first pool has slots 0 to 3, the clone of its snapshot in the second pool has slot 3 itself. */
  beforeEach(async () => {
    bench = await Bench.open({ pools: 2 })
    first = bench.poolIds[0] ?? ''
    second = bench.poolIds[1] ?? ''
    const disk = await bench.volume('disk', leaf)
    await (await bench.attach(disk.id)).write(0, bytes(1, 4 * slot))
    const snapshot = await bench.snapshot(disk.id)
    const clone = await bench.volume('clone', leaf, snapshot.id, second)
    await (await bench.attach(clone.id)).write(3 * slot, bytes(2))
    await bench.mapper.close(disk.id)
    await bench.mapper.close(clone.id)
    ids = { disk: disk.id, snapshot: snapshot.id, clone: clone.id }
    alias = (await bench.layers('sealed')).find((layer) => layer.volume_id === disk.id)?.alias ?? 0
    await bench.addReplica(alias, second)
  })
  afterEach(async () => await bench.close())

  const read = async (id: string) => await bench.read(id, 0, 5 * slot)
  const ofDisk = Buffer.concat([bytes(1, 4 * slot), bytes(0)])
  const ofClone = Buffer.concat([bytes(1, 3 * slot), bytes(2), bytes(0)])
  const readsFrom = async (id: string) => (await bench.mapper.readsFrom(id)).map((pool) => pool.name)
  const reclaim = async () => await bench.mapper.reclaim(null)
  const setReplica = async (poolId: string, values: object) =>
    await bench.inner.write(
      async (tx) =>
        await tx.updateTable('replicas').set(values).where('layer_alias', '=', alias).where('pool_id', '=', poolId).execute(),
    )

  test('is read where the home of the reader is', async () => {
    expect(await bench.replicas(alias)).toEqual({ [first]: primary, [second]: complete })
    expect(await readsFrom(ids.clone)).toEqual([])
    await bench.place(first).store.removeLayer((await bench.layers('sealed')).find((layer) => layer.alias === alias)?.id ?? '')
    expect(await read(ids.clone)).toEqual(ofClone)
    await expect(read(ids.disk)).rejects.toMatchObject({ code: 'LAYER_MISSING' })
  })

  test('needs its other pool no more: the link goes, and what is stored is told for each pool', async () => {
    await reclaim()
    expect(await bench.mapper.pools.links(second)).toMatchObject({ sources: [] })
    expect(await bench.mapper.pools.status(second)).toMatchObject({ storedBytes: 4 * slot })
    expect(await bench.mapper.pools.status(first)).toMatchObject({ storedBytes: 4 * slot })
    // Three slots are read by both, whichever replica each reads.
    expect(await bench.mapper.usage(ids.clone)).toEqual({ usedBytes: slot, sharedBytes: 3 * slot })
    expect(await bench.mapper.usage(ids.disk)).toEqual({ usedBytes: 0, sharedBytes: 4 * slot })
  })

  test('keeps in each pool what is read there, and nothing else', async () => {
    await reclaim()
    expect(await bench.allocatedIn(alias, second)).toBe(3 * slot)
    const device = await bench.attach(ids.clone)
    await device.write(0, bytes(3, 2 * slot))
    await bench.mapper.close(ids.clone)
    await reclaim()
    expect(await bench.allocatedIn(alias, second)).toBe(slot)
    expect(await bench.allocatedIn(alias, first)).toBe(4 * slot)
    expect(await read(ids.clone)).toEqual(Buffer.concat([bytes(3, 2 * slot), bytes(1), bytes(2), bytes(0)]))
    expect(await read(ids.disk)).toEqual(ofDisk)
    await bench.mapper.deleteResource(ids.snapshot)
    await (await bench.attach(ids.disk)).write(2 * slot, bytes(4, 2 * slot))
    await bench.mapper.close(ids.disk)
    await reclaim()
    // The clone reads slot 2, and has it in its own pool.
    expect(await bench.allocatedIn(alias, first)).toBe(2 * slot)
    expect(await read(ids.clone)).toEqual(Buffer.concat([bytes(3, 2 * slot), bytes(1), bytes(2), bytes(0)]))
  })

  test('loses the replica that nobody reads any more, first its row says so', async () => {
    await bench.mapper.deleteResource(ids.clone)
    await reclaim()
    expect(await bench.replicas(alias)).toEqual({ [first]: primary })
    expect(await bench.allocatedIn(alias, second)).toBe(-1)
    expect(await bench.mapper.unknownLayers(second)).toEqual([])
    expect(await read(ids.disk)).toEqual(ofDisk)
  })

  test('lives on in the other pool when nobody reads the primary', async () => {
    await bench.mapper.deleteResource(ids.disk, { withSnapshots: true })
    await reclaim()
    expect(await bench.replicas(alias)).toEqual({ [second]: primary })
    expect(await bench.allocatedIn(alias, first)).toBe(-1)
    expect(await read(ids.clone)).toEqual(ofClone)
    expect((await bench.mapper.check({ deep: true })).findings).toEqual([])
    await bench.mapper.pools.delete(first)
    await bench.mapper.deleteResource(ids.clone)
    await reclaim()
    expect(await bench.inner.db.selectFrom('replicas').selectAll().where('layer_alias', '=', alias).execute()).toEqual([])
  })

  test('goes from both pools when nobody reads it', async () => {
    await bench.mapper.deleteResource(ids.disk, { withSnapshots: true })
    await bench.mapper.deleteResource(ids.clone)
    await reclaim()
    expect(await bench.inner.db.selectFrom('layers').selectAll().where('alias', '=', alias).execute()).toEqual([])
    for (const poolId of [first, second]) expect(await bench.mapper.pools.status(poolId)).toMatchObject({ storedBytes: 0 })
    expect(await bench.findLeak()).toBeNull()
  })

  test('is left alone in every pool while a job writes into one of them', async () => {
    await setReplica(second, { filling_job: nobody })
    await bench.mapper.deleteResource(ids.disk, { withSnapshots: true })
    await (await bench.attach(ids.clone)).write(0, bytes(3, 2 * slot))
    await bench.mapper.close(ids.clone)
    await reclaim()
    expect(await bench.replicas(alias)).toEqual({ [first]: primary, [second]: complete })
    expect(await bench.allocatedIn(alias, first)).toBe(4 * slot)
    expect(await bench.allocatedIn(alias, second)).toBe(3 * slot)
  })

  test('keeps in the target of a move what the volume will read there', async () => {
    await bench.inner.write(async (tx) => {
      const params = { targetPoolId: second, withSnapshots: true }
      const job = {
        id: nobody,
        project_id: adminProject.id,
        kind: 'migrate',
        subject: ids.disk,
        state: 'paused',
        params,
      } as const
      const rest = { progress_bytes: 0, total_bytes: null, cursor: null, result: null, error_code: null, error_message: null }
      await tx
        .insertInto('jobs')
        .values({ ...job, ...rest, created_at: 1, updated_at: 1 })
        .execute()
    })
    await bench.mapper.deleteResource(ids.clone)
    await reclaim()
    expect(await bench.replicas(alias)).toEqual({ [first]: primary, [second]: complete })
    expect(await bench.allocatedIn(alias, second)).toBe(3 * slot)
    await bench.inner.write(async (tx) => await tx.deleteFrom('jobs').execute())
    await reclaim()
    expect(await bench.replicas(alias)).toEqual({ [first]: primary })
  })

  test('is not removed, nor punched, while the export of a pool that has it cannot be written', async () => {
    await reclaim()
    bench.place(second).faulty.setFaults({ seed: 1, rules: [{ operation: 'record-write', errno: 5 }] })
    await bench.mapper.deleteResource(ids.disk, { withSnapshots: true })
    await reclaim()
    expect(await bench.allocatedIn(alias, first)).toBe(4 * slot)
    bench.place(second).faulty.setFaults({ seed: 1, rules: [] })
    bench.timers.fire()
    await bench.mapper.idle()
    await reclaim()
    expect(await bench.replicas(alias)).toEqual({ [second]: primary })
    expect(await read(ids.clone)).toEqual(ofClone)
  })

  test('whose fill was given up is removed at the next start, and its file is no unknown one', async () => {
    await setReplica(second, { state: 'filling', filling_job: nobody })
    expect(await bench.mapper.unknownLayers(second)).toEqual([])
    await bench.restart()
    await reclaim()
    expect(await bench.replicas(alias)).toEqual({ [first]: primary })
    expect(await bench.allocatedIn(alias, second)).toBe(-1)
    expect(await read(ids.clone)).toEqual(ofClone)
    expect(await readsFrom(ids.clone)).toEqual(['pool'])
  })

  test('is read again as before when the job that extended it is gone', async () => {
    await setReplica(second, { filling_job: nobody })
    await bench.restart()
    const rows = await bench.inner.db.selectFrom('replicas').select('filling_job').where('layer_alias', '=', alias).execute()
    expect(rows.map((row) => row.filling_job)).toEqual([null, null])
    expect(await read(ids.clone)).toEqual(ofClone)
  })

  test('is looked over: a copy that lacks what its pool reads, a file without a row, and no primary', async () => {
    const check = async (options = {}) => await bench.mapper.check({ deep: true, ...options })
    await reclaim()
    expect((await check()).findings).toEqual([])
    const { id } = await bench.inner.db.selectFrom('layers').select('id').where('alias', '=', alias).executeTakeFirstOrThrow()
    const { store } = bench.place(second)
    await store.punchExcept(id, Float64Array.of(0, 2, 0))
    const found = async () => (await check()).findings.map(({ kind, object }) => ({ kind, object }))
    expect(await found()).toEqual([{ kind: 'replica-short', object: id }])
    await store.removeLayer(id)
    expect(await found()).toEqual([{ kind: 'layer-missing', object: id }])
    await store.createLayer(id)
    await bench.inner.write(async (tx) => await tx.deleteFrom('replicas').where('pool_id', '=', second).execute())
    expect(await found()).toContainEqual({ kind: 'layer-unknown', object: id })
    expect(await bench.mapper.unknownLayers(second)).toContain(id)
    await setReplica(first, { is_primary: false })
    expect(await found()).toContainEqual({ kind: 'replica-primary-wrong', object: id })
    await check({ repair: true })
    expect(await bench.replicas(alias)).toEqual({ [first]: primary })
  })

  test('a replica that a damaged row calls unneeded stays while maps of its pool name it', async () => {
    await setReplica(second, { state: 'condemned' })
    await bench.restart()
    await reclaim()
    expect(await bench.allocatedIn(alias, second)).toBe(3 * slot)
    expect(bench.log.lines.some((line) => line.message.includes('replicas are to be removed'))).toBe(true)
  })
})
