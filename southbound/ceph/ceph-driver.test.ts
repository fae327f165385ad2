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
    // Three OSDs, and everything twice: one may go.
    cluster = await CephCluster.start({ manager: true, pools: ['atoll', 'other'], osds: 3, copies: 2 })
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

    test('an erasure-coded pool is refused, with what is wanted instead, and nothing is left in it', async () => {
      await cluster.ceph('osd', 'erasure-code-profile', 'set', 'small', 'k=2', 'm=1', 'crush-failure-domain=osd')
      await cluster.ceph('osd', 'pool', 'create', 'coded', '8', '8', 'erasure', 'small')
      const refused = expect.objectContaining({
        code: 'POOL_UNAVAILABLE',
        message: expect.stringMatching(/pool coded cannot do this: it must be a replicated pool/) as string,
      }) as unknown
      await expect(open({ ...freshOptions(), pool: 'coded' })).rejects.toEqual(refused)
      expect(await cluster.rados('-p', 'coded', '--all', 'ls')).toBe('')
      await cluster.ceph('osd', 'pool', 'rm', 'coded', 'coded', '--yes-i-really-really-mean-it')
    })

    test('a user who may not shut out a dead daemon is refused when the pool is made', async () => {
      const options = freshOptions()
      const osd = `allow rwx pool=atoll namespace=${options['namespace']}`
      const keyring = await cluster.addUser('unfencing', 'mon', 'allow r', 'osd', osd)
      await expect(open({ ...options, user: 'unfencing', keyring })).rejects.toEqual(
        expect.objectContaining({
          code: 'POOL_ACCESS_DENIED',
          message: expect.stringMatching(
            /client\.unfencing may not shut out .*`ceph auth caps client\.unfencing mon 'profile rbd'/,
          ) as string,
        }),
      )
      expect(await cluster.rados('-p', 'atoll', '-N', options['namespace'] ?? '', 'ls')).toBe('')
    })

    test('a pool whose quota is reached is full: nothing is made in it, and what is there can be removed', async () => {
      const options = { ...freshOptions(), pool: 'other' }
      const pool = await open(options)
      await pool.createLayer(layerId)
      await pool.store.writeRecord('note', new Uint8Array(1000))
      await cluster.ceph('osd', 'pool', 'set-quota', 'other', 'max_objects', '1')
      const kinds = (): string[] => pool.health().conditions.map(({ kind }) => kind)
      try {
        await expect.poll(kinds).toContain('full')
        expect(await pool.check()).toContainEqual(expect.objectContaining({ severity: 'error', kind: 'backend-full' }))
        const full = expect.objectContaining({
          code: 'NO_SPACE',
          message: expect.stringMatching(/pool other is full/) as string,
        }) as unknown
        await expect(open({ ...freshOptions(), pool: 'other' })).rejects.toEqual(full)
        await expect(pool.createLayer('a0000000-0000-4000-8000-000000000002')).rejects.toEqual(full)
        // Without a record nothing would be deleted.
        await pool.store.writeRecord('note', new Uint8Array(2000))
        await pool.removeLayer(layerId)
        expect(await pool.listLayerIds()).toEqual([])
        await pool.close()
        await (await open(options)).close()
      } finally {
        await cluster.ceph('osd', 'pool', 'set-quota', 'other', 'max_objects', '0')
      }
      const again = await open(options)
      await expect.poll(() => again.health().conditions).toEqual([])
      await again.createLayer(layerId)
    })

    test('an OSD that is down is told, and the pool goes on without it', async () => {
      const pool = await open(freshOptions())
      const kinds = (): string[] => pool.health().conditions.map(({ kind }) => kind)
      process.kill(await cluster.pidOf('osd.2'), 'SIGKILL')
      await expect.poll(kinds).toContain('osds-down')
      await pool.createLayer(layerId)
      expect(await pool.listLayerIds()).toEqual([layerId])
      await cluster.resume()
      await expect.poll(kinds).toEqual([])
      expect(pool.health().answerMs).toBeGreaterThan(0)
    })

    test('what a pool holds is counted after it was opened', async () => {
      const options = freshOptions()
      const pool = await open(options)
      await pool.createLayer(layerId)
      const layer = { alias: 1, id: layerId, store: pool.store }
      const map = engine.uniformMap(1)
      const spec = { volumeId: poolId, sizeBytes: 2 ** 30, epoch: 1, map, mapLsn: 0, layers: [layer], active: 1, next: null }
      const { device } = await engine.openDevice(spec)
      for (let index = 0; index < 20; index++) await device.write(index * 5 * 2 ** 20, new Uint8Array(slotBytes).fill(7))
      await device.flush()
      await device.close()
      expect(await pool.usage()).toMatchObject({ storedBytes: 20 * slotBytes })
      await pool.close()
      const again = await open(options)
      expect(await again.usage()).toMatchObject({ storedBytes: 20 * slotBytes })
      expect(again.health().conditions.map(({ kind }) => kind)).not.toContain('counting')
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
