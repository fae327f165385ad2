/** The operations of a volume's life over files, with a process that dies in between. */
import { mkdtemp, readdir, rm, writeFile } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { adminProject, openCatalog, type Catalog } from '@atoll/core'
import { Engine } from '@atoll/native'
import { drivers } from '@atoll/southbound'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { type Mapper, openMapper } from './mapper.ts'
import { Bench, bytes, leaf, LogLines, ManualTimers, slot } from './test-bench.ts'

describe('a file pool', () => {
  let folder: string
  let catalog: Catalog
  let engine: Engine
  let mapper: Mapper
  let poolId: string

  const start = async () => {
    engine = new Engine()
    mapper = await openMapper({ catalog, engine, drivers, log: new LogLines(), setTimer: new ManualTimers().set })
  }
  const stop = async () => {
    await mapper.close()
    await engine.close()
  }

  beforeEach(async () => {
    folder = await mkdtemp(join(tmpdir(), 'atoll-mapper-'))
    catalog = await openCatalog(join(folder, 'catalog.db'), { reserveBytes: 0 })
    await start()
    const options = { path: join(folder, 'pool') }
    poolId = (await mapper.pools.create({ projectId: adminProject.id, name: 'files', driver: 'file', options })).id
  })
  afterEach(async () => {
    await stop()
    await catalog.close()
    await rm(folder, { recursive: true })
  })

  it('keeps no descriptor for each snapshot of an open volume', async () => {
    const volume = await mapper.createVolume({ projectId: adminProject.id, sizeBytes: leaf, poolId, name: 'v' })
    const { device } = await mapper.open(volume.id, { holder: 'test', readOnly: false })
    const round = async (number: number) => {
      await device.write(number * slot, bytes(number))
      await mapper.snapshot([{ volumeId: volume.id, name: `s${number}` }])
    }
    await round(1)
    await mapper.idle()
    const before = (await readdir('/proc/self/fd')).length
    for (let number = 2; number <= 41; number += 1) await round(number)
    await mapper.idle()
    expect((await readdir('/proc/self/fd')).length).toBeLessThan(before + 10)
    for (let number = 1; number <= 41; number += 1) {
      expect(Buffer.from(await device.read(number * slot, slot))).toEqual(bytes(number))
    }
  })

  it('holds volumes, snapshots and clones through restarts, and is empty when they are gone', async () => {
    const wanted = { projectId: adminProject.id, sizeBytes: 2 * leaf, poolId }
    const volume = await mapper.createVolume({ ...wanted, name: 'v' })
    const { device } = await mapper.open(volume.id, { holder: 'test', readOnly: false })
    await device.write(leaf - slot, bytes(1, 2 * slot))
    const { rows } = await mapper.snapshot([{ volumeId: volume.id, name: 's' }])
    await device.write(leaf, bytes(2))
    await stop()
    await start()
    const clone = await mapper.createVolume({ ...wanted, name: 'c', fromId: rows[0]?.id ?? '' })
    const content: Record<string, Buffer> = {}
    for (const row of [volume, clone, rows[0]]) {
      const opened = await mapper.open(row?.id ?? '', { holder: 'test', readOnly: true })
      content[row?.name ?? ''] = Buffer.from(await opened.device.read(leaf - slot, 2 * slot))
      await mapper.close(row?.id)
    }
    expect(content['v']).toEqual(Buffer.concat([bytes(1), bytes(2)]))
    expect(content['c']).toEqual(bytes(1, 2 * slot))
    expect(content['s']).toEqual(bytes(1, 2 * slot))
    expect((await mapper.usage(volume.id)).usedBytes).toBe(slot)
    await mapper.deleteResource(volume.id, { withSnapshots: true })
    await mapper.deleteResource(clone.id)
    await mapper.reclaim(null)
    expect((await mapper.pools.status(poolId)).storedBytes).toBeLessThan(leaf)
    await mapper.pools.delete(poolId)
    expect(await mapper.pools.list()).toEqual([])
  })

  it('with a file that no row knows keeps it and says so', async () => {
    const unknown = '00000000-0000-4000-8000-00000000abcd'
    await writeFile(join(folder, 'pool', 'layers', `${unknown}.layer`), bytes(9))
    await stop()
    await start()
    expect(await mapper.unknownLayers(poolId)).toEqual([unknown])
    await mapper.reclaim(null)
    expect(await mapper.unknownLayers(poolId)).toEqual([unknown])
  })

  it('is refused to a second mapper of another catalog, which goes on without it', async () => {
    const other = await openCatalog(':memory:')
    const second = new Engine()
    const neighbour = await openMapper({
      catalog: other,
      engine: second,
      drivers,
      log: new LogLines(),
      setTimer: new ManualTimers().set,
    })
    const wanted = { projectId: adminProject.id, name: 'stolen', driver: 'file', options: { path: join(folder, 'pool') } }
    await expect(neighbour.pools.create(wanted)).rejects.toMatchObject({ code: 'POOL_LOCKED' })
    expect(await neighbour.pools.list()).toEqual([])
    await neighbour.close()
    await second.close()
    await other.close()
  })
})

describe('a killed process over files', () => {
  it('loses nothing that was flushed, and reclaim leaves nothing behind', async () => {
    const bench = await Bench.open({ files: true })
    try {
      const volume = await bench.volume('v', 2 * leaf)
      const device = await bench.attach(volume.id)
      await device.write(0, bytes(1, 4 * slot))
      const snapshot = await bench.snapshot(volume.id)
      await device.write(slot, bytes(2, 2 * slot))
      await device.flush()
      await device.write(leaf, bytes(3, 4 * slot))
      await bench.kill()
      expect(await bench.read(volume.id, 0, 4 * slot)).toEqual(Buffer.concat([bytes(1), bytes(2, 2 * slot), bytes(1)]))
      expect(await bench.read(snapshot.id, 0, 4 * slot)).toEqual(bytes(1, 4 * slot))
      expect(await bench.read(volume.id, leaf, slot)).toEqual(bytes(0))
      await bench.mapper.deleteResource(snapshot.id)
      const { freedBytes } = await bench.mapper.reclaim(null)
      expect(freedBytes).toBeGreaterThanOrEqual(2 * slot)
      expect(await bench.findLeak()).toBe(null)
    } finally {
      await bench.close()
    }
  })
})
