import { afterEach, describe, expect, it } from 'vitest'
import { beginDrain, beginMove, Contents, runMove } from './test-moves.ts'
import { Bench, slot } from './test-bench.ts'

const MiB = 1 << 20
const slotCount = MiB / slot
let bench: Bench
afterEach(async () => await bench.close())

/** A volume in the first pool whose first snapshot stays there; what the volume names now is in the second pool, too. */
async function parted(contents: Contents) {
  const [first = '', second = '', third = ''] = bench.poolIds
  const volume = await bench.volume('v', MiB)
  await bench.attach(volume.id)
  for (let at = 0; at < 40; at += 1) await contents.write(volume.id, at, 1 + at)
  const snapshot = await bench.snapshot(volume.id)
  contents.copy(volume.id, snapshot.id)
  for (let at = 0; at < 20; at += 1) await contents.write(volume.id, at, 101 + at)
  await runMove(bench, await beginMove(bench, volume.id, second, false))
  await bench.mapper.reclaim(null)
  return { first, second, third, volume: volume.id, snapshot: snapshot.id }
}

describe('who comes into a pool from another', () => {
  it('finds there what only its source has named so far', async () => {
    bench = await Bench.open({ pools: 3 })
    const contents = new Contents(bench)
    const { second, third, snapshot } = await parted(contents)
    for (const poolId of [second, third]) {
      const { id } = await bench.volume('c', MiB, snapshot, poolId)
      contents.copy(snapshot, id)
    }
    await bench.mapper.reclaim(null)
    expect(await contents.difference(slotCount)).toBeNull()
    await bench.kill()
    expect(await contents.difference(slotCount)).toBeNull()
  })

  it('finds in the primary what only a secondary had', async () => {
    bench = await Bench.open({ pools: 3 })
    const contents = new Contents(bench)
    const { third, volume, snapshot } = await parted(contents)
    // The snapshot gone, the replica in the first pool, which is the primary, is not needed at all; a clone of it keeps a part.
    const clone = await bench.volume('c', MiB, snapshot)
    contents.copy(snapshot, clone.id)
    await bench.attach(clone.id)
    for (let at = 20; at < 40; at += 1) await contents.write(clone.id, at, 7)
    await bench.mapper.deleteResource(snapshot)
    contents.drop(snapshot)
    await bench.mapper.reclaim(null)
    expect(await contents.difference(slotCount)).toBeNull()
    const { id } = await bench.volume('away', MiB, volume, third)
    contents.copy(volume, id)
    await bench.mapper.reclaim(null)
    expect(await contents.difference(slotCount)).toBeNull()
  })

  it.each(
    ['claim', 'fill', 'home', 'drop'].flatMap((stage) => [
      { stage, isDrain: false },
      { stage, isDrain: true },
    ]),
  )('finds it also where a move is on its way (before $stage, drain: $isDrain)', async ({ stage, isDrain }) => {
    bench = await Bench.open({ pools: 3 })
    const contents = new Contents(bench)
    const [first = '', second = '', third = ''] = bench.poolIds
    const volume = await bench.volume('v', MiB)
    await bench.attach(volume.id)
    for (let at = 0; at < 40; at += 1) await contents.write(volume.id, at, 1 + at)
    const old = await bench.snapshot(volume.id)
    contents.copy(volume.id, old.id)
    for (let at = 0; at < 20; at += 1) await contents.write(volume.id, at, 101 + at)
    const request = isDrain ? await beginDrain(bench, first, second) : await beginMove(bench, volume.id, second, false)
    const clones: string[] = []
    await runMove(bench, request, async (phase) => {
      if (phase !== stage || clones.length > 0) return
      for (const [source, poolId] of [
        [old.id, second],
        [old.id, third],
        [volume.id, second],
        [volume.id, third],
      ] as const) {
        const { id } = await bench.volume('c', MiB, source, poolId)
        contents.copy(source, id)
        clones.push(id)
        await bench.attach(id)
      }
      await bench.mapper.deleteResource(old.id)
      contents.drop(old.id)
    })
    expect(await contents.difference(slotCount)).toBeNull()
    await bench.mapper.reclaim(null)
    await bench.mapper.reclaim(null)
    expect(await contents.difference(slotCount)).toBeNull()
    for (const id of [volume.id, ...clones]) await bench.mapper.opened(id)?.device.flush()
    await bench.kill()
    expect(await contents.difference(slotCount)).toBeNull()
  })
})
