import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { openComposer, type Composer } from '@atoll/composer'
import { openCatalog, silentLog, type Catalog } from '@atoll/core'
import { openMapper, type Mapper } from '@atoll/mapper'
import { Engine } from '@atoll/native'
import { connect, type NbdConnection } from '@atoll/nbd-client'
import { serveTemporaryNbd, startNbdServer, type NbdServer } from '@atoll/northbound'
import { drivers, memoryDriver, setFaults, withFaults } from '@atoll/southbound'
import { afterEach, beforeEach, describe, expect, test } from 'vitest'
import { mebibyte, pattern, slotBytes } from './broken-home.ts'
import { withoutCheckpoints } from './without-checkpoints.ts'

type Faults = Parameters<typeof setFaults>[1]

// Everything of a daemon but its process, so that its disk can fail when the test says so; the clients are real.
let folder: string
let catalog: Catalog
let engine: Engine
let mapper: Mapper
let composer: Composer
let server: NbdServer
let uri: string
let otherUri: string
let id: string

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), 'atoll-'))
  const log = silentLog()
  catalog = await openCatalog(join(folder, 'catalog.db'), { reserveBytes: 0 })
  engine = new Engine()
  mapper = await openMapper({
    catalog,
    engine,
    drivers: [...drivers, withFaults(memoryDriver)],
    log,
    setTimer: withoutCheckpoints,
  })
  composer = await openComposer({
    catalog,
    engine,
    mapper,
    log,
    home: folder,
    serveTemporaryNbd: (exports, options) => serveTemporaryNbd(engine, exports, options),
  })
  const path = join(folder, 'nbd.sock')
  server = await startNbdServer({ engine, exports: composer.exports, log, listen: { path, mode: 0o600 } })
  await composer.pools.create({ name: 'failing', driver: 'fault-memory', options: {} })
  await composer.pools.create({ name: 'sound', driver: 'memory', options: {} })
  // Over a snapshot: what is written changes owners, so it goes through the journal, too.
  ;({ id } = await composer.volumes.create({ name: 'disk', sizeBytes: 16 * mebibyte, pool: 'failing' }))
  await composer.snapshots.create(['disk@base'])
  await composer.volumes.create({ name: 'other', sizeBytes: 16 * mebibyte, pool: 'sound' })
  ;({ uri } = await composer.volumes.attach('disk'))
  ;({ uri: otherUri } = await composer.volumes.attach('other'))
})
afterEach(async () => {
  await server.close()
  await composer.close()
  await mapper.close()
  await engine.close()
  await catalog.close()
  await rm(folder, { recursive: true, force: true })
})

async function inject(plan: Faults): Promise<void> {
  const pool = await composer.pools.show('failing')
  setFaults(await mapper.pools.handle(pool.id), plan)
}

async function expectOtherServed(): Promise<void> {
  await using other = await connect(otherUri)
  await other.write(0, pattern(3, mebibyte))
  await other.flush()
  expect(await other.read(0, mebibyte)).toEqual(pattern(3, mebibyte))
  await expect(composer.volumes.show('other')).resolves.toMatchObject({ status: 'in-use', error: null })
}

async function flushed(): Promise<NbdConnection> {
  const client = await connect(uri)
  await client.write(0, pattern(1, mebibyte))
  await client.flush()
  return client
}

const failedWith = (errnoName: string): object => ({ code: 'NBD_REQUEST_FAILED', errnoName })

describe('an error of the disk', () => {
  test('in a write fails that request and no other', async () => {
    await using client = await flushed()
    await inject({ rules: [{ operation: 'write', applyCount: 1, errno: 'EIO' }] })
    await expect(client.write(2 * mebibyte, pattern(2, slotBytes))).rejects.toMatchObject(failedWith('EIO'))
    await expectOtherServed()
    // The slot is what it was, and the next write of it succeeds.
    expect(await client.read(2 * mebibyte, slotBytes)).toEqual(Buffer.alloc(slotBytes))
    await client.write(2 * mebibyte, pattern(2, slotBytes))
    await client.flush()
    expect(await client.read(2 * mebibyte, slotBytes)).toEqual(pattern(2, slotBytes))
    expect(await client.read(0, mebibyte)).toEqual(pattern(1, mebibyte))
    await expect(composer.volumes.show('disk')).resolves.toMatchObject({ status: 'in-use', error: null })
  })

  test('in a read fails that request and no other', async () => {
    await using client = await flushed()
    await inject({ rules: [{ operation: 'read', applyCount: 1, errno: 'EIO' }] })
    await expect(client.read(0, slotBytes)).rejects.toMatchObject(failedWith('EIO'))
    expect(await client.read(0, mebibyte)).toEqual(pattern(1, mebibyte))
    await expectOtherServed()
  })

  test('for want of space fails writes and flushes with ENOSPC until there is some, and loses nothing', async () => {
    await using client = await flushed()
    await inject({ rules: [{ operation: 'write', errno: 'ENOSPC' }] })
    await expect(client.write(2 * mebibyte, pattern(2, slotBytes))).rejects.toMatchObject(failedWith('ENOSPC'))
    await inject({ rules: [{ operation: 'append', errno: 'ENOSPC' }] })
    await client.write(2 * mebibyte, pattern(2, slotBytes))
    for (let again = 0; again < 3; again += 1) await expect(client.flush()).rejects.toMatchObject(failedWith('ENOSPC'))
    expect(await client.read(2 * mebibyte, slotBytes)).toEqual(pattern(2, slotBytes))
    await expectOtherServed()
    await inject({})
    await client.flush()
    expect(await client.read(0, mebibyte)).toEqual(pattern(1, mebibyte))
  })
})

describe.each([
  ['the data', { rules: [{ operation: 'sync', errno: 'EIO' }] }],
  ['the journal', { rules: [{ operation: 'segment-sync', errno: 'EIO' }] }],
  ['the journal after a torn append', { rules: [{ operation: 'append', errno: 'EIO', tear: true }] }],
] satisfies [string, Faults][])('a failed sync of %s', (_, plan) => {
  test('ends every connection, no flush ever succeeds, and what was flushed is served again from the journal', async () => {
    const writer = await flushed()
    const bystander = await connect(uri)
    await bystander.write(4 * mebibyte, pattern(4, slotBytes))
    await bystander.flush()
    await inject(plan)
    await writer.write(2 * mebibyte, pattern(2, slotBytes))
    const outcomes = await Promise.allSettled([writer.flush(), bystander.flush(), writer.flush()])
    expect(outcomes.map(({ status }) => status)).toEqual(['rejected', 'rejected', 'rejected'])
    // Poisoned for all, also for those who had nothing to flush; they need not ask to learn it.
    expect(await writer.closed).not.toBe(null)
    expect(await bystander.closed).not.toBe(null)
    await expectOtherServed()
    await inject({})

    // Without asking for it: attach is how it would be tried at once.
    await expect.poll(() => composer.exports.get(id)).not.toBe(null)
    await using back = await connect(uri)
    expect(await back.read(0, mebibyte)).toEqual(pattern(1, mebibyte))
    expect(await back.read(4 * mebibyte, slotBytes)).toEqual(pattern(4, slotBytes))
    // Never answered as flushed: old or new, nothing else.
    const unflushed = Buffer.from(await back.read(2 * mebibyte, slotBytes))
    expect([Buffer.alloc(slotBytes), pattern(2, slotBytes)]).toContainEqual(unflushed)
    await back.write(2 * mebibyte, pattern(5, slotBytes))
    await back.flush()
    expect(await back.read(2 * mebibyte, slotBytes)).toEqual(pattern(5, slotBytes))
    await expect(composer.volumes.show('disk')).resolves.toMatchObject({ status: 'in-use', error: null })
  })

  test('that happens again and again is never answered as a flush, and loses nothing that was', async () => {
    await (await flushed()).disconnect()
    for (const at of [2, 3, 4]) {
      await inject({})
      await expect.poll(() => composer.exports.get(id)).not.toBe(null)
      const client = await connect(uri)
      await inject(plan)
      await client.write(at * mebibyte, pattern(2, slotBytes))
      await expect(client.flush()).rejects.toMatchObject({ code: expect.stringMatching(/^NBD_/) as string })
      expect(await client.closed).not.toBe(null)
      await expectOtherServed()
    }
    await inject({})
    await expect.poll(() => composer.exports.get(id)).not.toBe(null)
    await using back = await connect(uri)
    expect(await back.read(0, mebibyte)).toEqual(pattern(1, mebibyte))
  })
})
