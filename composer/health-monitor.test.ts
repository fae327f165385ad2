import { AtollError, createLog } from '@atoll/core'
import { drivers, memoryDriver, type Driver, type PoolCondition, type PoolHandle } from '@atoll/southbound'
import { afterEach, beforeEach, expect, test } from 'vitest'
import { ManualTimers, makeFolder, TestDaemon, until } from './testing.ts'

let folder: string
let removeFolder: () => Promise<void>
let daemon: TestDaemon
let timers: ManualTimers
let lines: { msg: string; pool?: string; conditions?: string[] }[]
/** What the backend of every pool of the kind `remote` says. */
let conditions: PoolCondition[]
let isAway: boolean
/** Somebody has the pools of the kind `remote`, and cannot be shut out. */
let isHeld: boolean
let openCount: number

const remoteDriver: Driver = {
  ...memoryDriver,
  name: 'remote',
  async open(context) {
    openCount += 1
    if (isAway) throw new AtollError('POOL_UNAVAILABLE', 'the backend is away')
    if (isHeld) throw new AtollError('POOL_LOCKED', 'somebody has it', { values: { owner: 'somebody' } })
    const inner = await memoryDriver.open(context)
    const health: PoolHandle['health'] = () => ({ observedAt: 1_700_000_000_000, answerMs: 2, conditions })
    return new Proxy(inner, {
      get(target, name) {
        if (name === 'health') return health
        const value: unknown = Reflect.get(target, name, target)
        return typeof value === 'function' ? (value.bind(target) as unknown) : value
      },
    })
  },
}

const open = async (): Promise<TestDaemon> => {
  const log = createLog({ write: (line) => void lines.push(JSON.parse(line) as (typeof lines)[number]) })
  return await TestDaemon.open(folder, { setTimer: timers.setTimer, log, drivers: [...drivers, remoteDriver] })
}

beforeEach(async () => {
  const made = await makeFolder()
  folder = made.folder
  removeFolder = made.remove
  timers = new ManualTimers()
  lines = []
  conditions = []
  isAway = false
  isHeld = false
  openCount = 0
  daemon = await open()
})
afterEach(async () => {
  await daemon.stop()
  await removeFolder()
})

const logged = (text: string): (typeof lines)[number][] => lines.filter(({ msg, pool }) => pool === 'far' && msg.includes(text))
const troubles = async (): Promise<unknown> => (await daemon.composer.status()).troubledPools
const look = async (isDone: () => Promise<boolean>): Promise<void> =>
  await until(async () => {
    timers.expireAll()
    return await isDone()
  })

test('what is the matter with a backend is shown, logged when it begins and when it ends, and told in the status', async () => {
  const { composer } = daemon
  const made = await composer.pools.create({ name: 'far', driver: 'remote', options: {} })
  expect(made.health).toEqual({ state: 'ok', conditions: [], answerMs: 2, observedAt: '2023-11-14T22:13:20.000Z' })
  await expect(composer.pools.show('default')).resolves.toMatchObject({ health: { state: 'ok', answerMs: null } })

  conditions = [{ kind: 'osds-down', severity: 'warning', message: '1 osds down; what only they have waits' }]
  await look(async () => logged('something is the matter').length > 0)
  expect(await troubles()).toEqual([{ name: 'far', conditions: ['osds-down'] }])
  await expect(composer.pools.show('far')).resolves.toMatchObject({ health: { state: 'warning', conditions } })

  conditions = [...conditions, { kind: 'full', severity: 'error', message: '1 pool(s) full; writes wait' }]
  await expect(composer.pools.show('far')).resolves.toMatchObject({ health: { state: 'error' } })
  expect(await composer.pools.states()).toContainEqual(
    expect.objectContaining({ name: 'far', health: expect.anything() as unknown }),
  )
  expect(logged('something is the matter').map((line) => line.conditions)).toEqual([['osds-down'], ['osds-down', 'full']])

  conditions = [{ kind: 'counting', severity: 'note', message: 'what the pool holds is being counted' }]
  await expect(composer.pools.show('far')).resolves.toMatchObject({ health: { state: 'ok', conditions } })
  expect(await troubles()).toEqual([])
  expect(logged('nothing is the matter')).toHaveLength(1)
})

test('a pool whose backend was away at the start is opened when it is back', async () => {
  await daemon.composer.pools.create({ name: 'far', driver: 'remote', options: {} })
  await daemon.stop()
  isAway = true
  daemon = await open()
  await look(async () => logged('something is the matter').length > 0)
  expect(await troubles()).toEqual([{ name: 'far', conditions: ['POOL_UNAVAILABLE'] }])
  await expect(daemon.composer.pools.show('far')).resolves.toMatchObject({ health: null, error: { code: 'POOL_UNAVAILABLE' } })
  isAway = false
  await look(async () => logged('the pool is open again').length > 0)
  await look(async () => (await daemon.composer.status()).troubledPools.length === 0)
  await expect(daemon.composer.pools.show('far')).resolves.toMatchObject({ health: { state: 'ok' }, error: null })
})

test('a pool that somebody has is tried less and less often, and opened when it is free', async () => {
  await daemon.composer.pools.create({ name: 'far', driver: 'remote', options: {} })
  await daemon.stop()
  isHeld = true
  daemon = await open()
  openCount = 0
  for (let looks = 0; looks < 60; looks += 1) {
    timers.expireAll()
    await daemon.composer.pools.states()
  }
  // After 1, 2, 4, 8 looks and then every 12th.
  expect(openCount).toBeLessThanOrEqual(9)
  isHeld = false
  await look(async () => logged('the pool is open again').length > 0)
})

test('a pool that is deleted is not talked of any more', async () => {
  const { composer } = daemon
  await composer.pools.create({ name: 'far', driver: 'remote', options: {} })
  conditions = [{ kind: 'slow-requests', severity: 'warning', message: '3 slow ops' }]
  await look(async () => (await composer.status()).troubledPools.length > 0)
  await composer.pools.delete('far')
  await look(async () => (await composer.status()).troubledPools.length === 0)
})
