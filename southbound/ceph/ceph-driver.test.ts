import { spawn } from 'node:child_process'
import { writeFile } from 'node:fs/promises'
import { join } from 'node:path'
import { Engine, slotBytes } from '@atoll/native'
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from 'vitest'
import { describeDriver, type DriverSubject } from '../driver-contract.ts'
import type { PoolContext, PoolHandle } from '../driver.ts'
import { cephDriver } from './ceph-driver.ts'
import { CephCluster, hasCeph } from './testing/ceph-cluster.ts'

const poolId = 'b0000000-0000-4000-8000-000000000001'
const catalogId = 'ca000000-0000-4000-8000-000000000001'
const layerId = 'a0000000-0000-4000-8000-000000000001'

describe.skipIf(!hasCeph())('on a real cluster', () => {
  let cluster: CephCluster
  let namespaceCount = 0

  beforeAll(async () => {
    cluster = await CephCluster.start({ manager: true, pools: ['atoll', 'other'] })
  })

  afterAll(async () => {
    await cluster?.remove()
  })

  const freshOptions = (): Record<string, string> => {
    namespaceCount += 1
    return cluster.optionsIn(`test-${namespaceCount}`)
  }

  describeDriver('ceph', async (): Promise<DriverSubject> => ({
    driver: cephDriver,
    options: freshOptions(),
    invalidOptions: [
      {},
      { pool: '' },
      { pool: 'a b' },
      { pool: 'atoll', conf: 'ceph.conf' },
      { pool: 'atoll', user: 'client.admin' },
      { pool: 'atoll', namespace: '../x' },
      { pool: 'atoll', keyring: 'key' },
      { pool: 'atoll', timeout: '1' },
      { pool: 'atoll', timeout: 'soon' },
      { pool: 'atoll', 'connect-timeout': '9999' },
    ],
    cleanUp: async () => {},
  }))

  describe('the ceph driver alone', () => {
    let engine: Engine
    const pools: PoolHandle[] = []

    beforeEach(() => {
      engine = new Engine()
    })

    afterEach(async () => {
      for (const pool of pools.splice(0)) await pool.close()
      await engine.close()
    })

    const contextOf = (options: Record<string, string>, changes: Partial<PoolContext> = {}): PoolContext => ({
      engine,
      poolId,
      options: cephDriver.parseOptions(options),
      catalogId,
      ownerText: `pid ${process.pid}`,
      now: () => 0,
      ...changes,
    })

    async function open(options: Record<string, string>, changes: Partial<PoolContext> = {}): Promise<PoolHandle> {
      const pool = await cephDriver.open(contextOf(options, changes))
      pools.push(pool)
      return pool
    }

    test('a user with the least capabilities can do all that a pool needs', async () => {
      const options = freshOptions()
      const osd = `allow rwx pool=atoll namespace=${options['namespace']}`
      const keyring = await cluster.addUser('least', 'mon', 'profile rbd', 'osd', osd)
      const pool = await open({ ...options, user: 'least', keyring })
      await pool.createLayer(layerId)
      expect(await pool.usage()).toMatchObject({ storedBytes: 0, reserveBytes: 0 })
      expect((await pool.usage()).freeBytes).toBeGreaterThan(0)
      await pool.removeLayer(layerId)
      await pool.destroy()
    })

    test('what keeps a pool from being opened is named', async () => {
      const options = freshOptions()
      const denied = (values: Record<string, unknown> = {}): unknown =>
        expect.objectContaining({ code: 'POOL_ACCESS_DENIED', ...values }) as unknown
      const unavailable = (pattern: RegExp): unknown =>
        expect.objectContaining({ code: 'POOL_UNAVAILABLE', message: expect.stringMatching(pattern) as string }) as unknown

      await expect(open({ ...options, pool: 'nowhere' })).rejects.toEqual(
        unavailable(/nowhere.*no pool of this name.*ceph osd pool create nowhere/s),
      )
      await expect(open(options, { create: false })).rejects.toEqual(unavailable(/no pool of Atoll in this namespace/))
      const missing = join(cluster.folder, 'missing.conf')
      await expect(open({ ...options, conf: missing })).rejects.toEqual(unavailable(/missing\.conf.*no such file/))

      await expect(open({ ...options, user: 'nobody' })).rejects.toEqual(
        denied({ message: expect.stringMatching(/no key of client\.nobody was found/) }),
      )
      const wrongKey = join(cluster.folder, 'wrong.keyring')
      await writeFile(wrongKey, '[client.admin]\n\tkey = AQAAAAAAAAAAABAAAAAAAAAAAAAAAAAAAAAAAA==\n')
      await expect(open({ ...options, keyring: wrongKey })).rejects.toEqual(denied())
      const keyring = await cluster.addUser('elsewhere', 'mon', 'profile rbd', 'osd', 'allow rwx pool=other')
      await expect(open({ ...options, user: 'elsewhere', keyring })).rejects.toEqual(
        denied({ message: expect.stringMatching(/client\.elsewhere may not .* in pool atoll: `ceph auth caps/) }),
      )
    })

    test('a cluster that does not answer is said to be unreachable after a bounded time', async () => {
      const conf = join(cluster.folder, 'nobody.conf')
      await writeFile(conf, `[global]\nmon host = v2:127.0.0.1:1\nkeyring = ${cluster.folder}/client.admin.keyring\n`)
      await expect(open({ ...freshOptions(), conf, 'connect-timeout': '2' })).rejects.toMatchObject({
        code: 'POOL_UNAVAILABLE',
        message: expect.stringMatching(/no monitor answered within 2 s/) as string,
      })
    })

    test('the lock of a daemon that was killed is broken, and the dead one is shut out first', async () => {
      const options = freshOptions()
      const program = `
        import { Engine } from '@atoll/native'
        import { cephDriver } from ${JSON.stringify(join(import.meta.dirname, 'ceph-driver.ts'))}
        const context = ${JSON.stringify({ poolId, options, catalogId, ownerText: 'the dead one' })}
        const pool = await cephDriver.open({ ...context, engine: new Engine(), now: () => 0 })
        await pool.createLayer(${JSON.stringify(layerId)})
        console.log('ready')
        setInterval(() => {}, 1000)
      `
      const child = spawn(process.execPath, ['--input-type=module', '-e', program], {
        cwd: import.meta.dirname,
        stdio: ['ignore', 'pipe', 'inherit'],
      })
      const exited = new Promise((resolve) => child.once('exit', resolve))
      try {
        await new Promise((resolve, reject) => {
          child.stdout.once('data', resolve)
          child.once('exit', reject)
        })
        await expect(open(options)).rejects.toMatchObject({ code: 'POOL_LOCKED', values: { owner: 'the dead one' } })
      } finally {
        child.kill('SIGKILL')
        await exited
      }
      const before = (await cluster.ceph('osd', 'blocklist', 'ls', '-f', 'json')).match(/"addr"/g)?.length ?? 0
      const pool = await open(options)
      expect(await pool.layerExists(layerId)).toBe(true)
      const after = (await cluster.ceph('osd', 'blocklist', 'ls', '-f', 'json')).match(/"addr"/g)?.length ?? 0
      expect(after).toBe(before + 1)
    })

    test('a layer is in objects of its namespace, and none is left when it is removed', async () => {
      const options = freshOptions()
      const namespace = options['namespace'] ?? ''
      const pool = await open(options)
      await pool.createLayer(layerId)
      const layer = { alias: 1, id: layerId, store: pool.store }
      const map = engine.uniformMap(1)
      const spec = { volumeId: poolId, sizeBytes: 2 ** 30, epoch: 1, map, mapLsn: 0, layers: [layer], active: 1, next: null }
      const { device } = await engine.openDevice(spec)
      const data = new Uint8Array(slotBytes).fill(7)
      await device.write(4 * 2 ** 20 - slotBytes / 2, data)
      await device.write(900 * 2 ** 20, data)
      await device.flush()
      await device.close()
      const names = async (): Promise<string[]> =>
        (await cluster.rados('-p', 'atoll', '-N', namespace, 'ls')).split('\n').filter((name) => name.startsWith(layerId))
      expect((await names()).toSorted()).toEqual([`${layerId}.00000000`, `${layerId}.00000001`, `${layerId}.000000e1`])
      await pool.removeLayer(layerId)
      expect(await names()).toEqual([])
    })
  })
})
