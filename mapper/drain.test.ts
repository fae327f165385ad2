import { afterEach, describe, expect, it } from 'vitest'
import { beginDrain, beginMove, Contents, endMove, type Phase, poolsOf, runMove, storedBytes } from './test-moves.ts'
import { Bench, bytes, slot } from './test-bench.ts'

const MiB = 1 << 20
const slotCount = MiB / slot
const phases: Phase[] = ['freeze', 'claim', 'fill', 'home', 'drop']
let bench: Bench
afterEach(async () => await bench.close())

/** Two volumes with a snapshot each, a clone, an image and a file in the first pool; a clone of it all in the second and the third. */
async function crowd(contents: Contents) {
  const [first = '', second = '', third = ''] = bench.poolIds
  const own: string[] = []
  for (const name of ['v', 'w']) {
    const volume = await bench.volume(name, MiB)
    await bench.attach(volume.id)
    for (let at = 0; at < 40; at += 1) await contents.write(volume.id, at, 1 + at)
    const snapshot = await bench.snapshot(volume.id)
    contents.copy(volume.id, snapshot.id)
    for (let at = 0; at < 20; at += 1) await contents.write(volume.id, at, 101 + at)
    own.push(volume.id, snapshot.id)
  }
  const [volume = '', snapshot = '', closed = ''] = own
  const clone = await bench.volume('c', MiB, snapshot)
  contents.copy(snapshot, clone.id)
  const image = await bench.mapper.createImage({ projectId: clone.project_id, name: 'i', fromId: volume })
  contents.copy(volume, image.id)
  await bench.mapper.close(closed)
  own.push(clone.id, image.id)
  const away: string[] = []
  for (const poolId of [second, third]) {
    const { id } = await bench.volume(`away-${away.length}`, MiB, snapshot, poolId)
    contents.copy(snapshot, id)
    await bench.attach(id)
    await contents.write(id, 39, 200)
    away.push(id)
  }
  return { first, second, third, volume, snapshot, closed, own, away }
}

describe('draining a pool', () => {
  it('brings everything to the target while it is in use, shared as it was; what other pools read is read there', async () => {
    bench = await Bench.open({ pools: 3 })
    const contents = new Contents(bench)
    const { first, second, third, volume, own, away } = await crowd(contents)
    const before = await storedBytes(bench, first)
    let value = 60
    await runMove(bench, await beginDrain(bench, first, second), async (phase) => {
      await contents.write(volume, value % slotCount, value)
      await contents.write(away[1] ?? '', value % slotCount, value)
      value += 1
      const { id } = await bench.snapshot(volume, `during ${phase} ${value}`)
      contents.copy(volume, id)
      own.push(id)
      expect(await contents.difference(slotCount), phase).toBeNull()
    })
    expect(await contents.difference(slotCount)).toBeNull()
    for (const id of own) expect(await poolsOf(bench, id)).toEqual([second])
    expect(await poolsOf(bench, away[0] ?? '')).toEqual([second])
    expect(await poolsOf(bench, away[1] ?? '')).toEqual([second, third].toSorted())
    await bench.mapper.reclaim(null)
    expect(await storedBytes(bench, first)).toBe(0)
    expect(await storedBytes(bench, second)).toBeLessThan(before + 20 * slot)
    expect(await contents.difference(slotCount)).toBeNull()
    await bench.mapper.pools.delete(first)
    expect(await contents.difference(slotCount)).toBeNull()
    expect(await bench.findLeak()).toBeNull()
    await bench.mapper.idle()
    await bench.restart()
    expect(await contents.difference(slotCount)).toBeNull()
  })

  it('lets nothing new into the pool, and everything again when it is given up', async () => {
    bench = await Bench.open({ pools: 3 })
    const contents = new Contents(bench)
    const { first, second, volume, snapshot } = await crowd(contents)
    const request = await beginDrain(bench, first, second)
    await bench.mapper.moves.freeze(request, { deadlineMs: 5000 })
    const draining = { code: 'POOL_DRAINING' }
    await expect(bench.volume('new', MiB)).rejects.toMatchObject(draining)
    await expect(bench.volume('new', MiB, snapshot)).rejects.toMatchObject(draining)
    await expect(
      bench.mapper.beginFile({ projectId: (await bench.row(volume)).project_id, name: 'f', poolId: first }),
    ).rejects.toMatchObject(draining)
    await expect(bench.mapper.pools.delete(first)).rejects.toMatchObject({ code: 'MOVE_RUNNING' })
    await expect(
      bench.mapper.moves.plan({ jobId: 'other', volumeId: volume, targetPoolId: second, withSnapshots: true }),
    ).rejects.toMatchObject({ code: 'MOVE_RUNNING' })
    contents.copy(volume, (await bench.snapshot(volume, 'still')).id)
    await bench.mapper.moves.release(request)
    await endMove(bench, request, 'cancelled')
    await bench.volume('new', MiB)
    expect(await contents.difference(slotCount)).toBeNull()
    await bench.mapper.reclaim(null)
    // What was written in the target meanwhile comes back.
    await runMove(bench, await beginMove(bench, volume, first))
    expect(await poolsOf(bench, volume)).toEqual([first])
    expect(await contents.difference(slotCount)).toBeNull()
  })

  it.each(phases)('goes on after the process ended before: %s', async (killAt) => {
    bench = await Bench.open({ pools: 3 })
    const contents = new Contents(bench)
    const { first, second, volume, closed, own, away } = await crowd(contents)
    let killed = false
    await runMove(bench, await beginDrain(bench, first, second), async (phase) => {
      if (killed || phase !== killAt) return
      killed = true
      for (const id of [volume, ...away]) await bench.mapper.opened(id)?.device.flush()
      await bench.kill()
      await bench.attach(closed)
      await contents.write(closed, 17, 77)
      await bench.mapper.reclaim(null)
      expect(await contents.difference(slotCount)).toBeNull()
    })
    expect(await contents.difference(slotCount)).toBeNull()
    for (const id of own) expect(await poolsOf(bench, id)).toEqual([second])
    await bench.mapper.reclaim(null)
    await bench.mapper.pools.delete(first)
    expect(await contents.difference(slotCount)).toBeNull()
  })

  it.each(phases)('can be given up before: %s, and done again', async (cancelAt) => {
    bench = await Bench.open({ pools: 3 })
    const contents = new Contents(bench)
    const { first, second, own } = await crowd(contents)
    const request = await beginDrain(bench, first, second)
    const cancelled = runMove(bench, request, async (phase) => {
      if (phase === cancelAt) throw new Error('cancelled')
    })
    await expect(cancelled).rejects.toThrow('cancelled')
    await bench.mapper.moves.release(request)
    await endMove(bench, request, 'cancelled')
    await bench.mapper.reclaim(null)
    expect(await contents.difference(slotCount)).toBeNull()
    await runMove(bench, await beginDrain(bench, first, second))
    expect(await contents.difference(slotCount)).toBeNull()
    for (const id of own) expect(await poolsOf(bench, id)).toEqual([second])
    await bench.mapper.reclaim(null)
    await bench.mapper.pools.delete(first)
    expect(await contents.difference(slotCount)).toBeNull()
  })

  it('waits for a volume that is on its way elsewhere', async () => {
    bench = await Bench.open({ pools: 3 })
    const contents = new Contents(bench)
    const { first, second, third, volume, own } = await crowd(contents)
    const moving = await beginMove(bench, volume, third)
    await bench.mapper.moves.freeze(moving, { deadlineMs: 5000 })
    await bench.mapper.moves.claim(moving)
    const draining = await beginDrain(bench, first, second)
    await bench.mapper.moves.freeze(draining, { deadlineMs: 5000 })
    expect(await bench.mapper.moves.claim(draining)).toEqual({ claimed: false, waitsForJobId: moving.jobId })
    await runMove(bench, moving)
    await runMove(bench, draining)
    expect(await contents.difference(slotCount)).toBeNull()
    expect((await bench.row(volume)).home_pool_id).toBe(third)
    for (const id of own.slice(2)) expect((await bench.row(id)).home_pool_id).toBe(second)
    await bench.mapper.reclaim(null)
    expect(await contents.difference(slotCount)).toBeNull()
    expect(await storedBytes(bench, first)).toBe(0)
  })

  it('refuses a pool into which something is being made, and one that is its own target', async () => {
    bench = await Bench.open({ pools: 2 })
    const [first = '', second = ''] = bench.poolIds
    const { project_id: projectId } = await bench.volume('v', MiB)
    const file = await bench.mapper.beginFile({ projectId, name: 'f', poolId: first })
    const plan = async (targetPoolId: string) => await bench.mapper.moves.plan({ jobId: 'job', poolId: first, targetPoolId })
    await expect(plan(first)).rejects.toMatchObject({ code: 'ARGUMENT_INVALID' })
    await expect(plan(second)).rejects.toMatchObject({ code: 'RESOURCE_STATUS' })
    await bench.mapper.abortFile(file)
    await bench.mapper.reclaim(null)
    expect(await plan(second)).toMatchObject({ bytesToCopy: 0, resources: [{ name: 'v' }] })
    const device = await bench.attach((await plan(second)).resources[0]?.id ?? '')
    await device.write(0, bytes(1))
    await bench.mapper.checkpoint((await plan(second)).resources[0]?.id ?? '')
    expect(await plan(second)).toMatchObject({ bytesToCopy: slot, layerCount: 1 })
  })
})
