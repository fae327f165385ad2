import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { Bench, bytes, leaf, slot } from './test-bench.ts'

describe('rollback', () => {
  let bench: Bench
  beforeEach(async () => {
    bench = await Bench.open()
  })
  afterEach(async () => {
    await bench.close()
  })

  it('gives the volume the content and the size of the snapshot, and later writes do not reach the snapshot', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    const snapshot = await bench.snapshot(volume.id)
    await device.write(0, bytes(2))
    await bench.mapper.resize(volume.id, 2 * leaf)
    await device.write(leaf, bytes(3))
    await bench.mapper.close(volume.id)
    expect(await bench.mapper.rollback(volume.id, snapshot.id)).toMatchObject({ size_bytes: leaf })
    expect(await bench.read(volume.id, 0, slot)).toEqual(bytes(1))
    const again = await bench.attach(volume.id)
    await again.write(0, bytes(4))
    expect(await bench.read(snapshot.id, 0, slot)).toEqual(bytes(1))
    await bench.mapper.close(volume.id)
    await bench.mapper.resize(volume.id, 2 * leaf)
    expect(await bench.read(volume.id, leaf, slot)).toEqual(bytes(0))
    await bench.mapper.reclaim(null)
    expect(await bench.findLeak()).toBe(null)
  })

  it('keeps later snapshots', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    const first = await bench.snapshot(volume.id, 'first')
    await device.write(0, bytes(2))
    const second = await bench.snapshot(volume.id, 'second')
    await bench.mapper.close(volume.id)
    await bench.mapper.rollback(volume.id, first.id)
    await bench.mapper.reclaim(null)
    expect(await bench.read(second.id, 0, slot)).toEqual(bytes(2))
    await bench.mapper.rollback(volume.id, second.id)
    expect(await bench.read(volume.id, 0, slot)).toEqual(bytes(2))
  })

  it('is refused while the volume is open, for writing or reading', async () => {
    const volume = await bench.volume('v', leaf)
    const snapshot = await bench.snapshot(volume.id)
    for (const readOnly of [false, true]) {
      await bench.mapper.open(volume.id, { holder: 'test', readOnly })
      await expect(bench.mapper.rollback(volume.id, snapshot.id)).rejects.toMatchObject({ code: 'VOLUME_IN_USE' })
      await bench.mapper.close(volume.id)
    }
  })

  it('is refused for a snapshot of another volume', async () => {
    const volume = await bench.volume('v', leaf)
    const other = await bench.volume('w', leaf)
    const snapshot = await bench.snapshot(other.id)
    await expect(bench.mapper.rollback(volume.id, snapshot.id)).rejects.toMatchObject({ code: 'SNAPSHOT_MISMATCH' })
    await expect(bench.mapper.rollback(volume.id, other.id)).rejects.toMatchObject({ code: 'SNAPSHOT_NOT_FOUND' })
  })

  it('drops what a killed process wrote without replaying it', async () => {
    const volume = await bench.volume('v', leaf)
    const device = await bench.attach(volume.id)
    await device.write(0, bytes(1))
    const snapshot = await bench.snapshot(volume.id)
    await device.write(0, bytes(2))
    await device.flush()
    await bench.kill()
    await bench.mapper.rollback(volume.id, snapshot.id)
    await bench.attach(volume.id)
    expect(bench.mapper.opened(volume.id)?.report.framesReplayed).toBe(0)
    expect(await bench.read(volume.id, 0, slot)).toEqual(bytes(1))
    await bench.mapper.close(volume.id)
    await bench.mapper.reclaim(null)
    expect(await bench.findLeak()).toBe(null)
  })
})
