import { afterEach, describe, expect, it } from 'vitest'
import { beginMove, Contents, endMove, type Phase, poolsOf, runMove, storedBytes } from './test-moves.ts'
import { Bench, bytes, slot } from './test-bench.ts'

const MiB = 1 << 20
const slotCount = MiB / slot
const phases: Phase[] = ['freeze', 'claim', 'fill', 'home', 'drop']
let bench: Bench
afterEach(async () => await bench.close())

/** A volume with five snapshots and two clones, one of a snapshot and one of the volume, each with something of its own. */
async function family(contents: Contents) {
  const volume = await bench.volume('v', MiB)
  await bench.attach(volume.id)
  const snapshots: string[] = []
  for (let index = 0; index < 5; index += 1) {
    for (let at = 0; at < 8; at += 1) await contents.write(volume.id, index * 6 + at, 1 + index)
    const { id } = await bench.snapshot(volume.id, `s${index}`)
    contents.copy(volume.id, id)
    snapshots.push(id)
  }
  const clones: string[] = []
  for (const source of [snapshots[2] ?? '', volume.id]) {
    const { id } = await bench.volume(`c${clones.length}`, MiB, source)
    contents.copy(source, id)
    await bench.attach(id)
    await contents.write(id, 3, 90 + clones.length)
    clones.push(id)
  }
  await contents.write(volume.id, 200, 50)
  return { volume: volume.id, snapshots, clones }
}

describe('moving a volume', () => {
  it.each([
    ['there', false],
    ['there', true],
    ['back', false],
    ['back', true],
  ])('takes it and its snapshots %s while they are in use; clones stay (files: %s)', async (direction, files) => {
    bench = await Bench.open({ pools: 2, files })
    const [first = '', second = ''] = bench.poolIds
    const contents = new Contents(bench)
    const { volume, snapshots, clones } = await family(contents)
    if (direction === 'back') await runMove(bench, await beginMove(bench, volume, second))
    const target = direction === 'back' ? first : second
    await bench.mapper.open(snapshots[1] ?? '', { holder: 'test', readOnly: true })
    let value = 100
    const totals = await runMove(bench, await beginMove(bench, volume, target), async (phase) => {
      await contents.write(volume, value % slotCount, value)
      await contents.write(volume, 0, value)
      await contents.write(clones[1] ?? '', 1, value)
      value += 1
      const { id } = await bench.snapshot(volume, `at ${phase}`)
      contents.copy(volume, id)
      snapshots.push(id)
      const gone = snapshots.splice(3, 1)[0] ?? ''
      await bench.mapper.deleteResource(gone)
      contents.drop(gone)
      expect(await contents.difference(slotCount), phase).toBeNull()
    })
    expect(await contents.difference(slotCount)).toBeNull()
    for (const id of [volume, ...snapshots]) expect(await poolsOf(bench, id)).toEqual([target])
    expect((await bench.row(clones[0] ?? '')).home_pool_id).toBe(first)
    expect(await poolsOf(bench, clones[0] ?? '')).toEqual([first])
    expect(totals.copiedBytes + totals.offloadedBytes).toBeGreaterThan(0)
    expect(totals.freedBytes).toBeGreaterThan(0)
    await bench.mapper.reclaim(null)
    for (const id of [volume, ...clones]) await bench.mapper.opened(id)?.device.flush()
    await bench.kill()
    expect(await contents.difference(slotCount)).toBeNull()
    await bench.mapper.reclaim(null)
    expect(await contents.difference(slotCount)).toBeNull()
  })

  it('gives the space at the old place back', async () => {
    bench = await Bench.open({ pools: 2 })
    const [first = '', second = ''] = bench.poolIds
    const contents = new Contents(bench)
    const volume = await bench.volume('v', MiB)
    await bench.attach(volume.id)
    for (let at = 0; at < 100; at += 1) await contents.write(volume.id, at, 1 + at)
    const plan = await bench.mapper.moves.plan({ jobId: 'job', volumeId: volume.id, targetPoolId: second, withSnapshots: true })
    expect(plan.bytesToCopy + plan.bytesToOffload).toBe(100 * slot)
    const totals = await runMove(bench, await beginMove(bench, volume.id, second))
    expect(totals.copiedBytes + totals.offloadedBytes).toBe(100 * slot)
    expect(totals.freedBytes).toBe(100 * slot)
    expect(await storedBytes(bench, first)).toBe(0)
    expect(await storedBytes(bench, second)).toBe(100 * slot)
    expect(await contents.difference(slotCount)).toBeNull()
    expect(await bench.findLeak()).toBeNull()
    expect((await bench.mapper.pools.links(first)).sources).toEqual([])
    await bench.mapper.pools.delete(first)
  })

  it('copies neither holes nor zeros, nor what was overwritten', async () => {
    bench = await Bench.open({ pools: 2 })
    const [, second = ''] = bench.poolIds
    const contents = new Contents(bench)
    const volume = await bench.volume('v', MiB)
    await bench.attach(volume.id)
    for (let at = 0; at < 64; at += 1) await contents.write(volume.id, at, at % 2)
    await bench.mapper.snapshot([{ volumeId: volume.id, name: 'gone' }])
    for (let at = 0; at < 32; at += 1) await contents.write(volume.id, at, 7)
    const rows = await bench.inner.db.selectFrom('resources').select('id').where('kind', '=', 'snapshot').execute()
    await bench.mapper.deleteResource(rows[0]?.id ?? '')
    await bench.mapper.checkpoint(volume.id)
    const totals = await runMove(bench, await beginMove(bench, volume.id, second))
    // 32 slots were overwritten, and half of the other 32 are zeros.
    expect(totals.copiedBytes + totals.offloadedBytes).toBe((32 + 16) * slot)
    expect(await contents.difference(slotCount)).toBeNull()
  })

  it('leaves snapshots where they are if that is asked for, and rolls back to them from there', async () => {
    bench = await Bench.open({ pools: 2 })
    const [first = '', second = ''] = bench.poolIds
    const contents = new Contents(bench)
    const { volume, snapshots } = await family(contents)
    await runMove(bench, await beginMove(bench, volume, second, false))
    expect(await poolsOf(bench, volume)).toEqual([second])
    for (const id of snapshots) expect(await poolsOf(bench, id)).toEqual([first])
    expect(await contents.difference(slotCount)).toBeNull()
    await bench.mapper.reclaim(null)
    await bench.mapper.close(volume)
    await bench.mapper.rollback(volume, snapshots[0] ?? '')
    contents.copy(snapshots[0] ?? '', volume)
    await bench.mapper.reclaim(null)
    await bench.attach(volume)
    await contents.write(volume, 9, 9)
    expect(await contents.difference(slotCount)).toBeNull()
    await bench.mapper.opened(volume)?.device.flush()
    await bench.kill()
    expect(await contents.difference(slotCount)).toBeNull()
    // What the volume lacked of the snapshot was brought where it is.
    expect(await poolsOf(bench, volume)).toEqual([second])
  })

  it('takes a closed volume, too', async () => {
    bench = await Bench.open({ pools: 2 })
    const [first = '', second = ''] = bench.poolIds
    const contents = new Contents(bench)
    const { volume, snapshots } = await family(contents)
    await bench.mapper.close(volume)
    await runMove(bench, await beginMove(bench, volume, second))
    expect(await contents.difference(slotCount)).toBeNull()
    for (const id of [volume, ...snapshots]) expect(await poolsOf(bench, id)).toEqual([second])
    await bench.attach(volume)
    await contents.write(volume, 0, 33)
    await runMove(bench, await beginMove(bench, volume, first))
    expect(await contents.difference(slotCount)).toBeNull()
    await bench.mapper.reclaim(null)
    expect(await storedBytes(bench, second)).toBe(0)
  })

  it.each(phases)('goes on after the process ended before: %s', async (killAt) => {
    bench = await Bench.open({ pools: 2 })
    const [, second = ''] = bench.poolIds
    const contents = new Contents(bench)
    const { volume, snapshots, clones } = await family(contents)
    let killed = false
    await runMove(bench, await beginMove(bench, volume, second), async (phase) => {
      if (killed || phase !== killAt) return
      killed = true
      for (const id of [volume, ...clones]) await bench.mapper.opened(id)?.device.flush()
      await bench.kill()
      await bench.attach(volume)
      await contents.write(volume, 17, 77)
      await bench.mapper.reclaim(null)
      expect(await contents.difference(slotCount)).toBeNull()
    })
    expect(await contents.difference(slotCount)).toBeNull()
    for (const id of [volume, ...snapshots]) expect(await poolsOf(bench, id)).toEqual([second])
  })

  it.each(phases)('can be given up before: %s, begun again and finished, and taken back', async (cancelAt) => {
    bench = await Bench.open({ pools: 2 })
    const [first = '', second = ''] = bench.poolIds
    const contents = new Contents(bench)
    const { volume, clones } = await family(contents)
    const request = await beginMove(bench, volume, second)
    const cancelled = runMove(bench, request, async (phase) => {
      if (phase === cancelAt) throw new Error('cancelled')
    })
    await expect(cancelled).rejects.toThrow('cancelled')
    await bench.mapper.moves.release(request)
    await endMove(bench, request, 'cancelled')
    await contents.write(volume, 5, 55)
    expect(await contents.difference(slotCount)).toBeNull()
    const isMoved = cancelAt === 'drop'
    expect((await bench.row(volume)).home_pool_id).toBe(isMoved ? second : first)
    const marked = await bench.inner.db.selectFrom('replicas').selectAll().where('filling_job', 'is not', null).execute()
    expect(marked).toEqual([])
    await bench.mapper.reclaim(null)
    expect(await contents.difference(slotCount)).toBeNull()
    for (const id of [volume, ...clones]) await bench.mapper.opened(id)?.device.flush()
    await bench.kill()
    await bench.attach(volume)
    if (!isMoved) await runMove(bench, await beginMove(bench, volume, second))
    expect(await contents.difference(slotCount)).toBeNull()
    await runMove(bench, await beginMove(bench, volume, first))
    await bench.mapper.reclaim(null)
    expect(await contents.difference(slotCount)).toBeNull()
    expect(await storedBytes(bench, second)).toBe(0)
  })

  it('fails as a whole where the target is full or does not answer, and goes on when it does again', async () => {
    for (const errno of [28, 5]) {
      bench = await Bench.open({ pools: 2 })
      const [first = '', second = ''] = bench.poolIds
      const contents = new Contents(bench)
      const { volume, snapshots } = await family(contents)
      const { faulty } = bench.place(second)
      for (const operation of ['create', 'write', 'sync', 'read']) {
        const request = await beginMove(bench, volume, second)
        faulty.setFaults({ seed: 1, rules: [{ operation, errno }] })
        const failing = runMove(bench, request)
        // Not every fault concerns a move: then it succeeds.
        const failure: unknown = await failing.then(
          () => null,
          (error: unknown) => error,
        )
        faulty.setFaults({ seed: 1, rules: [] })
        if (failure === null) continue
        expect(['NO_SPACE', 'IO_ERROR', 'POOL_UNAVAILABLE', 'DEVICE_POISONED']).toContain((failure as { code: string }).code)
        expect(await contents.difference(slotCount), operation).toBeNull()
        await bench.mapper.moves.release(request)
        await endMove(bench, request, 'cancelled')
        expect((await bench.row(volume)).home_pool_id).toBe(first)
      }
      await runMove(bench, await beginMove(bench, volume, second))
      expect(await contents.difference(slotCount)).toBeNull()
      for (const id of [volume, ...snapshots]) expect(await poolsOf(bench, id)).toEqual([second])
      if (errno === 28) await bench.close()
    }
  })

  it('reads in the target what it had open and had not read yet', async () => {
    bench = await Bench.open({ pools: 2, files: true })
    const [, second = ''] = bench.poolIds
    const contents = new Contents(bench)
    const { volume, snapshots } = await family(contents)
    await bench.mapper.close(volume)
    await bench.attach(volume)
    await bench.mapper.open(snapshots[0] ?? '', { holder: 'test', readOnly: true })
    await runMove(bench, await beginMove(bench, volume, second))
    expect(await contents.difference(slotCount)).toBeNull()
  })

  it('reads where it did when the home cannot be changed and the move is given up', async () => {
    bench = await Bench.open({ pools: 2 })
    const [first = '', second = ''] = bench.poolIds
    const contents = new Contents(bench)
    const { volume } = await family(contents)
    await bench.mapper.close(volume)
    await bench.attach(volume)
    const request = await beginMove(bench, volume, second)
    const failing = runMove(bench, request, async (phase) => {
      if (phase !== 'home') return
      bench.failing.beforeWrite = () => {
        throw new Error('the catalog cannot be written')
      }
    })
    await expect(failing).rejects.toThrow('the catalog cannot be written')
    bench.failing.beforeWrite = () => undefined
    await bench.mapper.moves.release(request)
    await endMove(bench, request, 'cancelled')
    expect((await bench.row(volume)).home_pool_id).toBe(first)
    expect(await contents.difference(slotCount)).toBeNull()
    await bench.mapper.reclaim(null)
    expect(await contents.difference(slotCount)).toBeNull()
  })

  it('frees nothing that a device reads which was not told yet where its layers are', async () => {
    bench = await Bench.open({ pools: 2 })
    const [first = '', second = ''] = bench.poolIds
    const contents = new Contents(bench)
    const { volume } = await family(contents)
    const device = bench.mapper.opened(volume)?.device
    if (device === undefined) throw new Error('the volume is not open')
    const request = await beginMove(bench, volume, second)
    const addLayers = device.addLayers.bind(device)
    const failing = runMove(bench, request, async (phase) => {
      if (phase !== 'home') return
      device.addLayers = async () => await Promise.reject(new Error('the device cannot be told'))
    })
    await expect(failing).rejects.toThrow('the device cannot be told')
    expect((await bench.row(volume)).home_pool_id).toBe(second)
    const before = await storedBytes(bench, first)
    expect((await bench.mapper.reclaim(first)).freedBytes).toBe(0)
    expect(await storedBytes(bench, first)).toBe(before)
    expect(await contents.difference(slotCount)).toBeNull()
    device.addLayers = addLayers
    await bench.mapper.moves.home(request)
    expect((await bench.mapper.moves.drop(request, {})).freedBytes).toBeGreaterThan(0)
    await endMove(bench, request, 'done')
    expect(await contents.difference(slotCount)).toBeNull()
  })

  it('refuses what would take something from under it, naming the job', async () => {
    bench = await Bench.open({ pools: 3 })
    const [, second = '', third = ''] = bench.poolIds
    const contents = new Contents(bench)
    const { volume, snapshots } = await family(contents)
    const request = await beginMove(bench, volume, second)
    const running = { code: 'MOVE_RUNNING', values: { jobId: request.jobId } }
    await bench.mapper.moves.freeze(request, { deadlineMs: 5000 })
    const other = { jobId: 'other', volumeId: volume, targetPoolId: third, withSnapshots: true }
    await expect(bench.mapper.moves.plan(other)).rejects.toMatchObject(running)
    await expect(bench.mapper.pools.delete(second)).rejects.toMatchObject(running)
    await bench.mapper.close(volume)
    await expect(bench.mapper.rollback(volume, snapshots[0] ?? '')).rejects.toMatchObject(running)
    await expect(bench.mapper.deleteResource(volume, { withSnapshots: true })).rejects.toMatchObject(running)
    await bench.mapper.deleteResource(snapshots[4] ?? '')
    contents.drop(snapshots[4] ?? '')
    expect(await contents.difference(slotCount)).toBeNull()
  })

  it('plans only what can be done', async () => {
    bench = await Bench.open({ pools: 2, capacityBytes: 4 * MiB })
    const [first = '', second = ''] = bench.poolIds
    const volume = await bench.volume('v', 64 * MiB)
    const plan = async (targetPoolId: string) =>
      await bench.mapper.moves.plan({ jobId: 'job', volumeId: volume.id, targetPoolId, withSnapshots: true })
    await expect(plan(first)).rejects.toMatchObject({ code: 'MOVE_NEEDLESS' })
    await expect(plan('00000000-0000-4000-8000-00000000ffff')).rejects.toMatchObject({ code: 'POOL_NOT_FOUND' })
    expect(await plan(second)).toMatchObject({ bytesToCopy: 0, bytesThere: 0, resources: [{ id: volume.id }] })
    const device = await bench.attach(volume.id)
    for (let at = 0; at < 600; at += 1) await device.write(at * slot, bytes(1))
    const other = await bench.volume('w', 64 * MiB, undefined, second)
    const filling = await bench.attach(other.id)
    for (let at = 0; at < 600; at += 1) await filling.write(at * slot, bytes(1))
    await expect(plan(second)).rejects.toMatchObject({ code: 'NO_SPACE', values: { bytesToCopy: 600 * slot } })
    await bench.mapper.pools.set(second, { overcommit: '1' })
    await expect(plan(second)).rejects.toMatchObject({ code: 'POOL_OVERCOMMITTED' })
    await bench.mapper.pools.set(second, { overcommit: 'default', draining: 'yes' })
    await expect(plan(second)).rejects.toMatchObject({ code: 'POOL_DRAINING' })
    await expect(bench.volume('x', MiB, undefined, second)).rejects.toMatchObject({ code: 'POOL_DRAINING' })
    await bench.mapper.pools.set(second, { draining: 'no' })
    await bench.volume('x', MiB, undefined, second)
  })
})
