import { createLog } from '@atoll/core'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { ManualTimers, makeFolder, mebibyte, TestClient, TestDaemon, until } from './testing.ts'

let folder: string
let removeFolder: () => Promise<void>
let daemon: TestDaemon
let timers: ManualTimers
let lines: { level: number; msg: string; pool?: string }[]

beforeEach(async () => {
  const made = await makeFolder()
  folder = made.folder
  removeFolder = made.remove
  timers = new ManualTimers()
  lines = []
  const log = createLog({ write: (line) => void lines.push(JSON.parse(line) as (typeof lines)[number]) })
  daemon = await TestDaemon.open(folder, { setTimer: timers.setTimer, log })
})
afterEach(async () => {
  await daemon.stop()
  await removeFolder()
})

const logged = (text: string): number => lines.filter(({ msg, pool }) => pool === 'small' && msg.includes(text)).length

describe('a pool that runs out of space', () => {
  test('is shown so and logged once, and again when it has space', async () => {
    const { composer } = daemon
    await composer.pools.create({ name: 'small', driver: 'memory', options: { capacity: '64M' } })
    // The disk of this machine may be fuller than the alarm of its pool likes.
    await composer.pools.set('default', { 'low-space': 'off' })
    const { id } = await composer.volumes.create({ name: 'disk', sizeBytes: 64 * mebibyte, pool: 'small' })
    await composer.volumes.attach('disk')
    const client = new TestClient(composer, id)
    await client.device.write(0, Buffer.alloc(50 * mebibyte, 1))
    await expect(composer.pools.show('small')).resolves.toMatchObject({ lowSpace: false, lowSpaceBytes: 6.4 * mebibyte - 0.4 })
    await client.device.write(50 * mebibyte, Buffer.alloc(8 * mebibyte, 1))
    await until(async () => {
      timers.expireAll()
      return (await composer.status()).lowSpacePools.length > 0
    })
    expect((await composer.status()).lowSpacePools).toEqual(['small'])
    // 6.5 MiB free is more than the threshold, but not by a tenth.
    await client.device.discard(50 * mebibyte, mebibyte / 2)
    await expect(composer.pools.show('small')).resolves.toMatchObject({ lowSpace: true })
    timers.expireAll()
    expect(logged('running out of space')).toBe(1)
    await client.device.discard(50 * mebibyte, 2 * mebibyte)
    await expect(composer.pools.show('small')).resolves.toMatchObject({ lowSpace: false })
    expect((await composer.status()).lowSpacePools).toEqual([])
    expect(logged('has space again')).toBe(1)
    await composer.pools.set('small', { 'low-space': '32M' })
    expect(logged('running out of space')).toBe(2)
    await expect(composer.pools.set('small', { 'low-space': 'off' })).resolves.toMatchObject({
      lowSpace: false,
      lowSpaceBytes: 0,
    })
  })

  test('that is deleted is forgotten', async () => {
    const { composer } = daemon
    await composer.pools.set('default', { 'low-space': 'off' })
    await composer.pools.create({ name: 'small', driver: 'memory', options: { capacity: '64M' } })
    await composer.pools.set('small', { 'low-space': '65M' })
    expect((await composer.status()).lowSpacePools).toEqual(['small'])
    await composer.pools.delete('small')
    await until(async () => {
      timers.expireAll()
      return (await composer.status()).lowSpacePools.length === 0
    })
  })
})

test('the reserve of a file pool is changed at once and kept over a restart', async () => {
  const reserve = async (): Promise<number> => (await daemon.composer.pools.show('default')).reserveBytes
  const byDefault = await reserve()
  expect(byDefault).toBe(64 * mebibyte)
  await daemon.composer.pools.set('default', { reserve: '3M' })
  await expect(reserve()).resolves.toBe(3 * mebibyte)
  await daemon.stop()
  daemon = await TestDaemon.open(folder)
  await expect(reserve()).resolves.toBe(3 * mebibyte)
  await daemon.composer.pools.set('default', { reserve: 'default' })
  await expect(reserve()).resolves.toBe(byDefault)
})
