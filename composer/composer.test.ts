import { newId } from '@atoll/core'
import { setFaults } from '@atoll/southbound'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { killAtScenario, ManualTimers, makeFolder, mebibyte, TestClient, TestDaemon, until } from './testing.ts'
import type { ComposerOptions, Composer } from './composer.ts'

let folder: string
let removeFolder: () => Promise<void>
let daemon: TestDaemon
let composer: Composer

async function start(options: Partial<ComposerOptions> = {}): Promise<void> {
  daemon = await TestDaemon.open(folder, options)
  composer = daemon.composer
}
async function restart(): Promise<void> {
  await daemon.stop()
  await start()
}

beforeEach(async () => {
  const made = await makeFolder()
  folder = made.folder
  removeFolder = made.remove
  await start()
})
afterEach(async () => {
  await daemon.stop()
  await removeFolder()
})

const text = (value: string): Buffer => Buffer.from(value)
const readText = async (client: TestClient, offsetBytes: number, lengthBytes: number): Promise<string> =>
  Buffer.from(await client.device.read(offsetBytes, lengthBytes)).toString()

describe('attaching a volume', () => {
  test('exports it under its id, and again gives the same URI', async () => {
    const volume = await composer.volumes.create({ name: 'disk', sizeBytes: 16 * mebibyte })
    expect(volume).toMatchObject({ status: 'available', pool: 'default', parent: null, attachments: [] })
    const first = await composer.volumes.attach('disk')
    expect(first.uri).toBe(`nbd+unix:///${volume.id}?socket=${folder}/nbd.sock`)
    await expect(composer.volumes.attach(volume.id)).resolves.toEqual(first)
    await expect(composer.volumes.show('disk')).resolves.toMatchObject({
      status: 'in-use',
      attachments: [first],
      sizeBytes: 16 * mebibyte,
    })
    expect(composer.exports.list().map(({ id }) => id)).toEqual([volume.id])
    const clients = [new TestClient(composer, volume.id), new TestClient(composer, volume.id)]
    await clients[0]?.device.write(0, text('hello'))
    await expect(readText(clients[1] as TestClient, 0, 5)).resolves.toBe('hello')
    await expect(composer.volumes.attach('disk')).resolves.toMatchObject({ connections: 2 })
  })

  test('with other options is refused unless it is shared', async () => {
    const volume = await composer.volumes.create({ name: 'disk', sizeBytes: mebibyte })
    await composer.volumes.attach('disk')
    await expect(composer.volumes.attach('disk', { readOnly: true })).rejects.toMatchObject({ code: 'VOLUME_IN_USE' })
    const reader = await composer.volumes.attach('disk', { readOnly: true, shared: true })
    expect(reader.exportName).not.toBe(volume.id)
    expect(composer.exports.get(reader.exportName)?.readOnly).toBe(true)
    expect(composer.exports.get(volume.id)?.readOnly).toBe(false)
    await composer.volumes.detach('disk')
    expect(composer.exports.list()).toEqual([])
    await expect(composer.volumes.attach('disk', { protocol: 'iscsi' })).rejects.toMatchObject({ code: 'ARGUMENT_INVALID' })
  })

  test('forbids delete, rollback and a smaller size, but not snapshot, clone and growing', async () => {
    const { id } = await composer.volumes.create({ name: 'disk', sizeBytes: 16 * mebibyte })
    await composer.volumes.attach('disk')
    const client = new TestClient(composer, id)
    await client.device.write(0, text('one'))
    await composer.snapshots.create(['disk@first'])
    await client.device.write(0, text('two'))
    await expect(composer.volumes.delete('disk', { withSnapshots: true })).rejects.toMatchObject({ code: 'VOLUME_IN_USE' })
    await expect(composer.snapshots.rollback('disk@first')).rejects.toMatchObject({ code: 'VOLUME_IN_USE' })
    await expect(composer.volumes.resize('disk', 8 * mebibyte, { force: true })).rejects.toMatchObject({ code: 'VOLUME_IN_USE' })
    await composer.volumes.resize('disk', 32 * mebibyte)
    expect(composer.exports.get(id)?.sizeBytes).toBe(32 * mebibyte)
    const clone = await composer.volumes.create({ name: 'clone', from: 'volume:disk' })
    expect(clone).toMatchObject({ sizeBytes: 32 * mebibyte, parent: id })
    await composer.volumes.attach('clone')
    await expect(readText(new TestClient(composer, clone.id), 0, 3)).resolves.toBe('two')
    const snapshot = await composer.volumes.attach('disk@first')
    expect(snapshot.readOnly).toBe(true)
    await expect(readText(new TestClient(composer, snapshot.exportName), 0, 3)).resolves.toBe('one')
    await expect(composer.snapshots.delete('disk@first')).rejects.toMatchObject({ code: 'SNAPSHOT_IN_USE' })
  })

  test('ends with detach, which drains and disconnects the clients', async () => {
    const { id } = await composer.volumes.create({ name: 'disk', sizeBytes: mebibyte })
    await expect(composer.volumes.detach('disk')).rejects.toMatchObject({ code: 'NOT_ATTACHED' })
    await composer.volumes.attach('disk')
    const client = new TestClient(composer, id)
    await client.device.write(4096, text('kept'))
    await composer.volumes.detach('disk')
    expect(client).toMatchObject({ drained: true, closed: true })
    await expect(client.device.read(0, 1)).rejects.toMatchObject({ code: 'DEVICE_CLOSED' })
    await expect(composer.volumes.show('disk')).resolves.toMatchObject({ status: 'available', attachments: [] })
    await composer.volumes.attach('disk')
    await expect(readText(new TestClient(composer, id), 4096, 4)).resolves.toBe('kept')
  })

  test('survives a restart of the daemon with the same URI', async () => {
    const { id } = await composer.volumes.create({ name: 'disk', sizeBytes: 64 * mebibyte })
    const before = await composer.volumes.attach('disk', { readOnly: true, shared: true })
    await restart()
    await expect(composer.volumes.show('disk')).resolves.toMatchObject({ attachments: [before] })
    expect(composer.exports.get(id)?.readOnly).toBe(true)
  })

  test('survives a kill of the daemon with the same URI and what was flushed', async () => {
    await daemon.stop()
    const uri = await killAtScenario(folder, 'attached')
    await start()
    const { id, attachments } = await composer.volumes.show('disk')
    expect(attachments.map((attachment) => attachment.uri)).toEqual([uri])
    await expect(readText(new TestClient(composer, id), 40 * mebibyte, 7)).resolves.toBe('flushed')
    await composer.volumes.detach('disk')
    await composer.snapshots.rollback('disk@first')
    await composer.volumes.attach('disk')
    await expect(readText(new TestClient(composer, id), 0, 6)).resolves.toBe('before')
  })

  test('a hundred volumes are exported again after a restart', async () => {
    const ids: string[] = []
    for (let index = 0; index < 100; index++) {
      ids.push((await composer.volumes.create({ name: `disk-${index}`, sizeBytes: mebibyte })).id)
      await composer.volumes.attach(`disk-${index}`)
    }
    await restart()
    expect(composer.exports.list().map(({ id }) => id)).toEqual(ids.toSorted())
    await expect(composer.status()).resolves.toMatchObject({ volumes: 100, attachedVolumes: 100, connections: 0, pools: 1 })
  })

  test('one that cannot be opened at start is shown in error and harms no other', async () => {
    await composer.pools.create({ name: 'gone', driver: 'memory', options: {} })
    const lost = await composer.volumes.create({ name: 'lost', sizeBytes: mebibyte, pool: 'gone' })
    const kept = await composer.volumes.create({ name: 'kept', sizeBytes: mebibyte })
    await composer.volumes.attach('lost')
    await composer.volumes.attach('kept')
    await restart()
    expect(composer.exports.list().map(({ id }) => id)).toEqual([kept.id])
    expect(composer.exports.isSuspended(lost.id)).toBe(true)
    const shown = (await composer.volumes.list()).entries.find(({ name }) => name === 'lost')
    expect(shown).toMatchObject({ status: 'error', error: { code: expect.any(String) } })
    await composer.volumes.detach('lost')
    expect(composer.exports.isSuspended(lost.id)).toBe(false)
  })
})

describe('after a failed sync', () => {
  test('clients are cut off, the device is opened again from its journal, and clients may come back', async () => {
    await daemon.stop()
    const timers = new ManualTimers()
    await start({ setTimer: timers.setTimer })
    const pool = await composer.pools.create({ name: 'faulty', driver: 'fault-memory', options: {} })
    const { id } = await composer.volumes.create({ name: 'disk', sizeBytes: 16 * mebibyte, pool: 'faulty' })
    await composer.volumes.attach('disk')
    const client = new TestClient(composer, id)
    await client.device.write(0, text('safe'))
    await client.device.flush()
    const handle = await daemon.mapper.pools.handle(pool.id)
    setFaults(handle, { rules: [{ operation: 'sync' }] })
    await client.device.write(8192, text('lost'))
    await expect(client.device.flush()).rejects.toMatchObject({ code: expect.stringMatching(/IO_ERROR|DEVICE_POISONED/) })
    setFaults(handle, {})
    await until(() => {
      timers.expireAll()
      return client.closed && composer.exports.get(id) !== null
    })
    expect(client.drained).toBe(false)
    const back = new TestClient(composer, id)
    await expect(readText(back, 0, 4)).resolves.toBe('safe')
    await back.device.write(4096, text('more'))
    await back.device.flush()
    await expect(composer.volumes.show('disk')).resolves.toMatchObject({ status: 'in-use', error: null })
  })
})

describe('after its lease was lost', () => {
  test('a volume is served no more, and attaching it again takes it over', async () => {
    const { id } = await composer.volumes.create({ name: 'disk', sizeBytes: 16 * mebibyte })
    await composer.volumes.attach('disk')
    const client = new TestClient(composer, id)
    await client.device.write(0, text('before'))
    await client.device.flush()
    // What another daemon on the same catalog would do.
    await daemon.catalog.write(async (tx) => {
      await tx
        .updateTable('volumes')
        .set(({ eb }) => ({ epoch: eb('epoch', '+', 10) }))
        .where('id', '=', id)
        .execute()
    })
    await expect(composer.snapshots.create(['disk@never'])).rejects.toMatchObject({ code: 'LEASE_LOST' })
    await until(() => client.closed && composer.exports.get(id) === null)
    await until(async () => (await composer.volumes.show('disk')).error?.code === 'LEASE_LOST')
    await expect(composer.volumes.show('disk')).resolves.toMatchObject({ status: 'error' })
    await until(() => !daemon.mapper.isOpen(id))
    await composer.volumes.attach('disk')
    await expect(readText(new TestClient(composer, id), 0, 6)).resolves.toBe('before')
    await expect(composer.volumes.show('disk')).resolves.toMatchObject({ status: 'in-use', error: null })
  })
})

describe('names, ids and sizes', () => {
  test('a duplicate name is refused unless the caller allows it, and is then ambiguous', async () => {
    const first = await composer.volumes.create({ name: 'disk', sizeBytes: mebibyte })
    await expect(composer.volumes.create({ name: 'disk', sizeBytes: mebibyte })).rejects.toMatchObject({ code: 'NAME_TAKEN' })
    const second = await composer.volumes.create({ name: 'disk', sizeBytes: mebibyte, allowDuplicateName: true })
    await expect(composer.volumes.show('disk')).rejects.toMatchObject({
      code: 'NAME_AMBIGUOUS',
      values: { name: 'disk', ids: expect.arrayContaining([first.id, second.id]) },
    })
    await expect(composer.volumes.show(second.id.toUpperCase())).resolves.toMatchObject({ id: second.id })
    await expect(composer.volumes.rename(second.id, 'other')).resolves.toMatchObject({ name: 'other' })
    await expect(composer.volumes.rename('other', 'disk')).rejects.toMatchObject({ code: 'NAME_TAKEN' })
    await expect(composer.volumes.rename('other', 'other')).resolves.toMatchObject({ name: 'other' })
  })

  test('the same name asked for twice at once is made once', async () => {
    const both = await Promise.allSettled([1, 2].map(() => composer.volumes.create({ name: 'disk', sizeBytes: mebibyte })))
    expect(both.map(({ status }) => status).toSorted()).toEqual(['fulfilled', 'rejected'])
  })

  test.each([
    ['', 'NAME_INVALID'],
    ['a@b', 'NAME_INVALID'],
    ['a/b', 'NAME_INVALID'],
    ['line\nbreak', 'NAME_INVALID'],
    [newId(), 'NAME_INVALID'],
  ])('the name %j is refused', async (name, code) => {
    await expect(composer.volumes.create({ name, sizeBytes: mebibyte })).rejects.toMatchObject({ code })
  })

  test.each([0, 4095, 4097, -4096, 2 ** 49 + 4096, Number.NaN, 2 ** 60])('the size %d is refused', async (sizeBytes) => {
    await expect(composer.volumes.create({ name: 'disk', sizeBytes })).rejects.toMatchObject({ code: 'SIZE_INVALID' })
    await expect(composer.volumes.list()).resolves.toEqual({ entries: [], next: null })
  })

  test('unknown names are named in the error', async () => {
    await expect(composer.volumes.show('nothing')).rejects.toMatchObject({
      code: 'VOLUME_NOT_FOUND',
      values: { volume: 'nothing' },
    })
    await expect(composer.images.show('nothing')).rejects.toMatchObject({ code: 'IMAGE_NOT_FOUND' })
    await expect(composer.snapshots.delete('disk@nothing')).rejects.toMatchObject({ code: 'VOLUME_NOT_FOUND' })
    await expect(composer.volumes.create({ name: 'disk', sizeBytes: mebibyte, pool: 'nothing' })).rejects.toMatchObject({
      code: 'POOL_NOT_FOUND',
    })
    await expect(composer.volumes.list({ project: 'nothing' })).rejects.toMatchObject({ code: 'PROJECT_NOT_FOUND' })
    await expect(composer.volumes.create({ name: 'disk', from: 'file:x/y' })).rejects.toMatchObject({
      code: 'CONTAINER_NOT_FOUND',
    })
  })

  test('a project sees its own resources only', async () => {
    await daemon.catalog.write(
      async (tx) => void (await tx.insertInto('projects').values({ id: newId(), name: 'other', created_at: 1 }).execute()),
    )
    await composer.volumes.create({ name: 'disk', sizeBytes: mebibyte })
    const mine = await composer.volumes.create({ name: 'disk', sizeBytes: mebibyte, project: 'other' })
    await expect(composer.volumes.show('disk', { project: 'other' })).resolves.toMatchObject({ id: mine.id })
    await expect(composer.volumes.show(mine.id)).rejects.toMatchObject({ code: 'VOLUME_NOT_FOUND' })
    await expect(composer.volumes.list({ project: 'other' })).resolves.toMatchObject({ entries: [{}] })
  })
})

describe('snapshots', () => {
  test('roll a volume back, show differences, and hold its deletion up', async () => {
    const { id } = await composer.volumes.create({ name: 'disk', sizeBytes: 16 * mebibyte })
    await composer.volumes.attach('disk')
    let client = new TestClient(composer, id)
    await client.device.write(0, text('one'))
    await composer.snapshots.create(['disk@first'])
    await client.device.write(mebibyte, text('two'))
    const { snapshots } = await composer.snapshots.create(['disk@second'])
    expect(snapshots).toEqual([expect.objectContaining({ name: 'second', volume: 'disk', volumeId: id, status: 'available' })])
    await expect(composer.snapshots.diff('disk@first', 'disk@second')).resolves.toEqual([
      { offsetBytes: mebibyte, lengthBytes: 4096, kind: 'data' },
    ])
    await expect(composer.snapshots.diff('disk@second', undefined)).resolves.toEqual([])
    await expect(composer.snapshots.create(['disk@first'])).rejects.toMatchObject({ code: 'NAME_TAKEN' })
    await composer.volumes.detach('disk')
    await composer.snapshots.rollback('disk@first')
    await composer.volumes.attach('disk')
    client = new TestClient(composer, id)
    await expect(readText(client, mebibyte, 3)).resolves.toBe('\0\0\0')
    await expect(readText(client, 0, 3)).resolves.toBe('one')
    await composer.volumes.detach('disk')
    await expect(composer.volumes.delete('disk')).rejects.toMatchObject({ code: 'VOLUME_HAS_SNAPSHOTS' })
    await composer.volumes.delete('disk', { withSnapshots: true })
    await expect(composer.volumes.list()).resolves.toEqual({ entries: [], next: null })
  })

  test('of several volumes are made together or not at all', async () => {
    for (const name of ['a', 'b']) await composer.volumes.create({ name, sizeBytes: mebibyte })
    await composer.snapshots.create(['b@taken'])
    await expect(composer.snapshots.create(['a@taken', 'b@taken'])).rejects.toMatchObject({ code: 'NAME_TAKEN' })
    await expect(composer.snapshots.list('a')).resolves.toEqual({ entries: [], next: null })
    await expect(composer.snapshots.create(['a@x', 'a@y'])).rejects.toMatchObject({ code: 'ARGUMENT_INVALID' })
    const { snapshots } = await composer.snapshots.create(['a@both', 'b@both'])
    expect(snapshots.map(({ volume }) => volume)).toEqual(['a', 'b'])
    await expect(composer.snapshots.diff('a@both', 'b@both')).rejects.toMatchObject({ code: 'SNAPSHOT_MISMATCH' })
  })
})

describe('resizing', () => {
  test('to a smaller size wants force, and what lay beyond is gone', async () => {
    const { id } = await composer.volumes.create({ name: 'disk', sizeBytes: 16 * mebibyte })
    await composer.volumes.attach('disk')
    const client = new TestClient(composer, id)
    await client.device.write(8 * mebibyte, text('beyond'))
    await composer.volumes.detach('disk')
    await expect(composer.volumes.resize('disk', 4 * mebibyte)).rejects.toMatchObject({ code: 'SHRINK_NEEDS_FORCE' })
    await expect(composer.volumes.resize('disk', 4 * mebibyte, { force: true })).resolves.toMatchObject({
      sizeBytes: 4 * mebibyte,
    })
    await composer.volumes.resize('disk', 16 * mebibyte)
    await composer.volumes.attach('disk')
    await expect(readText(new TestClient(composer, id), 8 * mebibyte, 6)).resolves.toBe('\0'.repeat(6))
  })
})

describe('space', () => {
  test('of what was deleted comes back by itself a little later', async () => {
    await daemon.stop()
    const timers = new ManualTimers()
    await start({ setTimer: timers.setTimer })
    const { id } = await composer.volumes.create({ name: 'disk', sizeBytes: 64 * mebibyte })
    const empty = (await composer.pools.show('default')).storedBytes
    await composer.volumes.attach('disk')
    const client = new TestClient(composer, id)
    await client.device.write(0, Buffer.alloc(32 * mebibyte, 1))
    await composer.volumes.detach('disk')
    expect((await composer.pools.show('default')).storedBytes).toBeGreaterThan(empty + 31 * mebibyte)
    await composer.volumes.delete('disk')
    await until(async () => {
      timers.expireAll()
      return (await composer.pools.show('default')).storedBytes < empty + mebibyte
    })
  })

  test('can be reclaimed by hand, as a job', async () => {
    const job = await composer.pools.reclaim('default')
    await expect(composer.jobs.wait(job.id)).resolves.toMatchObject({
      state: 'done',
      kind: 'reclaim',
      result: { freedBytes: expect.any(Number) },
    })
  })
})

describe('pools', () => {
  test('are made, shown and deleted when they are empty', async () => {
    await composer.pools.create({ name: 'fast', driver: 'memory', options: { capacity: '64M' } })
    await expect(composer.pools.create({ name: 'fast', driver: 'memory', options: {} })).rejects.toMatchObject({
      code: 'NAME_TAKEN',
    })
    await expect(composer.pools.create({ name: 'other', driver: 'floppy', options: {} })).rejects.toMatchObject({
      code: 'DRIVER_UNKNOWN',
    })
    await expect(composer.pools.show('fast')).resolves.toMatchObject({
      driver: 'memory',
      error: null,
      capabilities: { persistent: false },
    })
    await composer.volumes.create({ name: 'disk', sizeBytes: mebibyte, pool: 'fast' })
    await expect(composer.pools.delete('fast')).rejects.toMatchObject({ code: 'POOL_NOT_EMPTY' })
    await composer.volumes.delete('disk')
    const job = await composer.pools.reclaim('fast')
    await composer.jobs.wait(job.id)
    await composer.pools.delete('fast')
    await expect(composer.pools.list()).resolves.toEqual([expect.objectContaining({ name: 'default' })])
    await expect(composer.pools.check('default')).resolves.toEqual(expect.any(Array))
  })
})
