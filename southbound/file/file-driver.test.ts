import { mkdir, rm, stat, writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Engine } from '@atoll/native'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { describeDriver, type DriverSubject } from '../driver-contract.ts'
import type { PoolHandle } from '../driver.ts'
import { makeTemporaryFolder } from '../temporary-folder.ts'
import { parseFileConfig } from './file-config.ts'
import { fileDriver } from './file-driver.ts'

describeDriver('file', async (): Promise<DriverSubject> => {
  const { folder, remove } = await makeTemporaryFolder()
  return {
    driver: fileDriver,
    options: { path: join(folder, 'pool'), reserve: '1M' },
    invalidOptions: [
      {},
      { path: '' },
      { path: 'relative/path' },
      { path: '/tmp/x', reserve: 'much' },
      { path: '/tmp/x', reserve: '1P' },
    ],
    cleanUp: remove,
  }
})

describe('the file driver alone', () => {
  let engine: Engine
  let folder: string
  let remove: () => Promise<void>
  const pools: PoolHandle[] = []

  beforeEach(async () => {
    ;({ folder, remove } = await makeTemporaryFolder())
    engine = new Engine()
  })

  afterEach(async () => {
    for (const pool of pools.splice(0)) await pool.close()
    await engine.close()
    await remove()
  })

  async function open(path: string, create: boolean): Promise<PoolHandle> {
    const pool = await fileDriver.open({
      engine,
      poolId: 'b0000000-0000-4000-8000-000000000001',
      options: { path, reserve: '0' },
      catalogId: 'ca000000-0000-4000-8000-000000000001',
      ownerText: 'pid 1',
      now: () => 0,
      create,
    })
    pools.push(pool)
    return pool
  }

  test('a pool whose folder has gone is not made anew: its disk may not be mounted', async () => {
    const path = join(folder, 'pool')
    await (await open(path, true)).close()
    await rm(path, { recursive: true })
    await expect(open(path, false)).rejects.toMatchObject({ code: 'POOL_UNAVAILABLE', values: { path } })
    await expect(stat(path)).rejects.toThrow('ENOENT')
    await mkdir(path)
    await expect(open(path, false)).rejects.toMatchObject({ code: 'POOL_UNAVAILABLE', values: { path } })
  })

  test('a path that is a file is refused', async () => {
    const path = join(folder, 'file')
    await writeFile(path, 'not a folder')
    await expect(open(path, true)).rejects.toMatchObject({ code: 'POOL_UNAVAILABLE', values: { path } })
  })

  test('pools of one file system can copy inside it', async () => {
    const [first, second] = [await open(join(folder, 'a'), true), await open(join(folder, 'b'), true)]
    expect(first.capabilities.offloadDomain).toBe(second.capabilities.offloadDomain)
    expect(first.capabilities).toMatchObject({ fence: 'lock', sharedByNodes: false, persistent: true })
  })

  test('a path is normalised, so that one folder has one name', () => {
    expect(fileDriver.parseOptions({ path: '/srv//pool/../pool' })).toEqual({ path: '/srv/pool' })
    expect(parseFileConfig({ path: '/srv/pool', reserve: '128M' })).toEqual({ path: '/srv/pool', reserveBytes: 128 * 2 ** 20 })
  })
})
