/**
 * A cluster in trouble under a daemon that serves: an OSD is killed, everything is stopped, the network to it is cut, it is full.
 * Clients wait and go on, nothing that was answered is lost, and what has nothing to do with the cluster works meanwhile.
 */
import { connect } from '@atoll/nbd-client'
import { canCutNetwork, CephCluster, hasCeph } from '@atoll/southbound/ceph-cluster'
import { afterAll, beforeAll, describe, expect, test } from 'vitest'
import { check, mebibyte, pattern } from '../faults/broken-home.ts'
import { slotBytes, SlotOracle } from '../kill/slot-oracle.ts'
import { type CommandResult, TestHome } from '../test-home.ts'
import { compare, Load } from './load.ts'

const slotCount = 2048

interface ShownPool {
  readonly storedBytes: number
  readonly error: { readonly code: string } | null
  readonly health: { readonly state: string; readonly conditions: readonly { readonly kind: string }[] } | null
}

describe.skipIf(!hasCeph() || !canCutNetwork())('a Ceph cluster in trouble', () => {
  let cluster: CephCluster
  let home: TestHome
  let http: string | null
  let namespaceCount = 0

  beforeAll(async () => {
    cluster = await CephCluster.start({ manager: true, network: true })
    home = await TestHome.create()
    ;({ http } = await home.start())
    home.cli('volume', 'create', 'local', '--size', '16M')
  })

  afterAll(async () => {
    await home?.[Symbol.asyncDispose]()
    await cluster?.remove()
  })

  /** Options of a pool whose trouble shows soon; a machine that is slow may take a moment for trouble, too. */
  const optionsIn = (namespace: string, changes: Record<string, string> = {}): string[] =>
    Object.entries({ ...cluster.optionsIn(namespace), 'connect-timeout': '5', ...changes }).flatMap(([key, value]) => [
      '--option',
      `${key}=${value}`,
    ])

  /** Runs a command that must succeed as soon as the pool answers. */
  const cli = async (...args: string[]): Promise<string> => await cliOf(home, ...args)

  async function cliOf(home: TestHome, ...args: string[]): Promise<string> {
    let result: CommandResult | undefined
    await expect
      .poll(() => {
        result = home.run(...args)
        return result.exitCode === 0 || !result.stderr.includes('POOL_UNAVAILABLE')
      })
      .toBe(true)
    expect({ args, ...result }).toMatchObject({ exitCode: 0 })
    return result?.stdout.trimEnd() ?? ''
  }

  /** A pool with a volume that is attached. */
  async function makePool(changes: Record<string, string> = {}): Promise<{ pool: string; volume: string; uri: string }> {
    const name = `trouble-${(namespaceCount += 1)}`
    await cli('pool', 'create', name, '--driver', 'ceph', ...optionsIn(name, changes))
    await cli('volume', 'create', name, '--size', String(slotCount * slotBytes), '--pool', name)
    return { pool: name, volume: name, uri: await cli('volume', 'attach', name, '--format', 'uri') }
  }

  const shown = async (pool: string): Promise<ShownPool> => await home.jsonMeanwhile<ShownPool>('pool', 'show', pool)

  const conditionsOf = async (pool: string): Promise<string[]> => {
    const { error, health } = await shown(pool)
    return [...(error === null ? [] : [error.code]), ...(health?.conditions.map(({ kind }) => kind) ?? [])]
  }

  async function untilCondition(pool: string, kind: string): Promise<void> {
    await expect.poll(() => conditionsOf(pool), { interval: 200 }).toContain(kind)
  }

  async function untilWell(pool: string): Promise<void> {
    await expect.poll(() => conditionsOf(pool), { interval: 200 }).toEqual([])
  }

  async function untilAnswered(load: Load, count: number): Promise<void> {
    const wanted = load.acknowledged + count
    await expect.poll(() => load.acknowledged).toBeGreaterThan(wanted)
  }

  /** What lies on this machine is served, and everything is shown, while the cluster is away. */
  async function expectRestWorks(pool: string): Promise<void> {
    await using client = await connect(home.cli('volume', 'attach', 'local', '--format', 'uri'))
    await client.write(0, pattern(namespaceCount, mebibyte))
    await client.flush()
    expect(await client.read(0, mebibyte)).toEqual(pattern(namespaceCount, mebibyte))
    const name = `local@${pool}-${await home.jsonMeanwhile<unknown[]>('snapshot', 'list', 'local').then((list) => list.length)}`
    await home.jsonMeanwhile('snapshot', 'create', name)
    const status = await home.jsonMeanwhile<{ troubledPools: { name: string; conditions: string[] }[] }>('status')
    expect(status.troubledPools.map((troubled) => troubled.name)).toContain(pool)
    const states = await home.jsonMeanwhile<{ name: string; error: unknown }[]>('pool', 'list')
    expect(states.find((listed) => listed.name === 'default')).toMatchObject({ error: null })
  }

  /** Under load, `hurt` is done until the pool says `kind`; then `heal`, and everything goes on. */
  async function expectToWait(options: {
    kind: string
    hurt: () => Promise<void> | void
    heal: () => Promise<void>
    meanwhile?: (pool: string) => Promise<void>
  }): Promise<void> {
    const { pool, volume, uri } = await makePool()
    const oracle = new SlotOracle(slotCount)
    const load = await Load.start(uri, oracle)
    try {
      await untilAnswered(load, 200)
      await options.hurt()
      await untilCondition(pool, options.kind)
      const answered = load.acknowledged
      await expectRestWorks(pool)
      await options.meanwhile?.(pool)
      // Of a pool that is full clients and OSDs learn one after the other.
      expect(options.kind === 'full' ? answered : load.acknowledged).toBe(answered)
    } finally {
      await options.heal()
    }
    await untilAnswered(load, 200)
    await load.stop()
    await untilWell(pool)
    await compare(uri, oracle, options.kind)
    await cli('snapshot', 'create', `${volume}@after`)
    await cli('volume', 'detach', volume)
    // What the cluster says of itself, on a machine that is slow, is its own affair.
    await expect.poll(() => check(home, 'pool', 'check', pool).filter(({ kind }) => !kind.startsWith('backend-'))).toEqual([])
  }

  test('an OSD that is killed and comes back', async () => {
    await expectToWait({
      kind: 'silent',
      hurt: async () => void process.kill(await cluster.pidOf('osd.0'), 'SIGKILL'),
      heal: () => cluster.resume(),
      meanwhile: async (pool) => {
        // What manages says at once that the pool does not answer.
        expect(await conditionsOf(pool)).toContain('POOL_UNAVAILABLE')
        const metrics = async (): Promise<string> => await (await fetch(`${http}/metrics`)).text()
        await expect.poll(metrics).toContain(`atoll_pool_condition{pool="${pool}",condition="silent",severity="error"} 1`)
      },
    })
  })

  test('a cluster that is stopped and started', async () => {
    await expectToWait({
      kind: 'monitors-silent',
      hurt: () => cluster.stop('KILL'),
      heal: () => cluster.resume(),
      meanwhile: async (pool) => await untilCondition(pool, 'silent'),
    })
  })

  test('a network that is cut and mended, with much that waits for the cluster', async () => {
    const waiting: Promise<unknown>[] = []
    await expectToWait({
      kind: 'silent',
      hurt: async () => {
        const { volume } = await makePool()
        await cluster.cutNetwork()
        // More than there are threads for all pools together.
        for (let index = 0; index < 24; index++)
          waiting.push(home.jsonMeanwhile('snapshot', 'create', `${volume}@s${index}`).catch(() => {}))
      },
      heal: () => cluster.mendNetwork(),
      meanwhile: async (pool) => await untilCondition(pool, 'monitors-silent'),
    })
    await Promise.all(waiting)
  })

  test('a cluster that is full and has space again', async () => {
    const ratios = async (nearly: string, full: string): Promise<void> => {
      await cluster.ceph('osd', 'set-nearfull-ratio', nearly)
      await cluster.ceph('osd', 'set-backfillfull-ratio', nearly)
      await cluster.ceph('osd', 'set-full-ratio', full)
    }
    await expectToWait({
      kind: 'full',
      hurt: () => ratios('0.0001', '0.0001'),
      heal: () => ratios('0.85', '0.95'),
      meanwhile: async () => {
        await expect
          .poll(() => home.failure('pool', 'create', 'other', '--driver', 'ceph', ...optionsIn('other')))
          .toMatchObject({ code: 'NO_SPACE', message: expect.stringMatching(/pool atoll is full/) as string })
      },
    })
    const { pool, volume, uri } = await makePool()
    {
      await using client = await connect(uri)
      await client.write(0, pattern(1, 4 * mebibyte))
      await client.flush()
    }
    await cli('volume', 'detach', volume)
    await ratios('0.0001', '0.0001')
    try {
      await untilCondition(pool, 'full')
      // What frees space is done.
      await cli('volume', 'delete', volume)
      const reclaimed = async (): Promise<unknown> => {
        await cli('pool', 'reclaim', pool)
        return await shown(pool)
      }
      await expect.poll(reclaimed).toMatchObject({ error: null, storedBytes: 0 })
    } finally {
      await ratios('0.85', '0.95')
    }
    await untilWell(pool)
  })

  test('a daemon that is started without the cluster serves what lies in it when it is back', async () => {
    const { pool, volume, uri } = await makePool()
    const oracle = new SlotOracle(slotCount)
    const load = await Load.start(uri, oracle)
    await untilAnswered(load, 200)
    await load.stop()
    await home.end('SIGTERM')
    await cluster.cutNetwork()
    try {
      await home.start()
      expect(await conditionsOf(pool)).toEqual(['POOL_UNAVAILABLE'])
      await expectRestWorks(pool)
      expect(home.json<{ status: string }>('volume', 'show', volume).status).toBe('error')
    } finally {
      await cluster.mendNetwork()
    }
    await untilWell(pool)
    await expect.poll(() => home.json<{ status: string }>('volume', 'show', volume).status).toBe('in-use')
    await compare(uri, oracle, 'after the start')
  })

  test('a daemon with many volumes in a pool that does not answer ends without waiting for each, and has lost nothing', async () => {
    await using alone = await TestHome.create()
    await alone.start()
    const timeoutSeconds = 60
    await cliOf(alone, 'pool', 'create', 'fast', '--driver', 'ceph', ...optionsIn('many', { timeout: String(timeoutSeconds) }))
    // More than are closed at the same time.
    const names = Array.from({ length: 18 }, (_, index) => `disk-${index}`)
    for (const [index, name] of names.entries()) {
      await cliOf(alone, 'volume', 'create', name, '--size', '1M', '--pool', 'fast')
      await using client = await connect(await cliOf(alone, 'volume', 'attach', name, '--format', 'uri'))
      await client.write(0, pattern(index, slotBytes))
    }
    await cluster.cutNetwork()
    try {
      const state = async (): Promise<string | undefined> =>
        (await alone.jsonMeanwhile<ShownPool>('pool', 'show', 'fast')).health?.conditions.map(({ kind }) => kind).join()
      await expect.poll(state).toContain('silent')
      const startedAt = performance.now()
      await alone.end('SIGTERM')
      expect(performance.now() - startedAt).toBeLessThan(2 * timeoutSeconds * 1000)
    } finally {
      await cluster.mendNetwork()
    }
    await alone.start()
    for (const [index, name] of names.entries()) {
      await using client = await connect(await cliOf(alone, 'volume', 'attach', name, '--format', 'uri'))
      expect(await client.read(0, slotBytes)).toEqual(pattern(index, slotBytes))
    }
  })

  test('a daemon ends while the cluster is away, and has lost nothing that it answered', async () => {
    await using alone = await TestHome.create()
    await alone.start()
    // A request fails after this time, and with it what waits for it.
    const options = optionsIn('alone', { timeout: '10', 'connect-timeout': '60' })
    await cliOf(alone, 'pool', 'create', 'fast', '--driver', 'ceph', ...options)
    await cliOf(alone, 'volume', 'create', 'disk', '--size', String(slotCount * slotBytes), '--pool', 'fast')
    const uri = await cliOf(alone, 'volume', 'attach', 'disk', '--format', 'uri')
    const oracle = new SlotOracle(slotCount)
    const load = await Load.start(uri, oracle)
    await untilAnswered(load, 200)
    await cluster.cutNetwork()
    try {
      await alone.end('SIGTERM')
    } finally {
      await cluster.mendNetwork()
    }
    await load.abandon()
    await alone.start()
    await cliOf(alone, 'volume', 'attach', 'disk')
    await compare(uri, oracle, 'after the end')
    expect(await alone.end('SIGTERM')).toBe(0)
  })
})
