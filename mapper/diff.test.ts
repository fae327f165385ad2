import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { Bench, bytes, leaf, slot } from './test-bench.ts'

describe('diff', () => {
  let bench: Bench
  beforeEach(async () => {
    bench = await Bench.open()
  })
  afterEach(async () => {
    await bench.close()
  })

  it('names what was written and what became zero between two snapshots', async () => {
    const volume = await bench.volume('v', 2 * leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1, 8 * slot))
    const first = await bench.snapshot(volume.id, 'first')
    await device.write(slot + 10, bytes(2, 10))
    await device.write(2 * slot, bytes(2))
    await device.discard(4 * slot, 2 * slot)
    await device.write(leaf, bytes(2))
    const second = await bench.snapshot(volume.id, 'second')
    expect(await bench.mapper.diff(first.id, second.id)).toEqual([
      { offsetBytes: slot, lengthBytes: 2 * slot, kind: 'data' },
      { offsetBytes: 4 * slot, lengthBytes: 2 * slot, kind: 'zero' },
      { offsetBytes: leaf, lengthBytes: slot, kind: 'data' },
    ])
    expect(await bench.mapper.diff(second.id, second.id)).toEqual([])
  })

  it('compares an open volume as it is now', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    const snapshot = await bench.snapshot(volume.id)
    await device.write(3 * slot, bytes(1))
    const expected = [{ offsetBytes: 3 * slot, lengthBytes: slot, kind: 'data' }]
    expect(await bench.mapper.diff(snapshot.id, volume.id)).toEqual(expected)
    await bench.mapper.close(volume.id)
    expect(await bench.mapper.diff(snapshot.id, volume.id)).toEqual(expected)
  })

  it('compares what a killed process wrote and flushed', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    const snapshot = await bench.snapshot(volume.id)
    await device.write(3 * slot, bytes(1))
    await device.flush()
    await bench.kill()
    expect(await bench.mapper.diff(snapshot.id, volume.id)).toEqual([{ offsetBytes: 3 * slot, lengthBytes: slot, kind: 'data' }])
  })

  it('covers nothing beyond the size of the second resource', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    const first = await bench.snapshot(volume.id, 'first')
    await device.write(0, bytes(2, 64 * slot))
    await bench.mapper.resize(volume.id, 8 * slot)
    const second = await bench.snapshot(volume.id, 'second')
    const ranges = await bench.mapper.diff(first.id, second.id)
    expect(ranges).toEqual([{ offsetBytes: 0, lengthBytes: 8 * slot, kind: 'data' }])
  })
})
