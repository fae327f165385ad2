import { existsSync, readdirSync } from 'node:fs'
import { stat } from 'node:fs/promises'
import { afterEach, describe, expect, it } from 'vitest'
import { silentLog } from '@atoll/core'
import { connect, connectRaw, connectWithRetry, encodeInfoRequest, info, list, protocol } from '@atoll/nbd-client'
import { startNbdServer } from './nbd-server.ts'
import { KiB, MiB, NbdFixture, unhurried } from './testing/nbd-fixture.ts'

const { option, optionReply } = protocol

/** Of what goes on when other faults are set. */
const heldMs = 1_000_000

let fixture: NbdFixture
afterEach(async () => {
  await fixture.close()
})

describe('the NBD server', () => {
  it('serves several exports, each with its own bytes, id and description', async () => {
    fixture = await NbdFixture.start()
    const { device } = await fixture.openDevice({ sizeBytes: 1 * MiB })
    fixture.exports.add('second', device, { description: 'zwei ä' })
    expect(await list(fixture.target)).toEqual([
      { name: 'disk', description: 'a disk' },
      { name: 'second', description: 'zwei ä' },
    ])
    expect(await info(fixture.uri('second'))).toMatchObject({
      sizeBytes: MiB,
      canonicalName: 'second',
      description: 'zwei ä',
      metaContexts: ['base:allocation', 'qemu:allocation-depth'],
    })
    await using first = await connect(fixture.uri('disk'))
    await using second = await connect(fixture.uri('second'))
    await first.write(0, Buffer.from('one'))
    await second.write(0, Buffer.from('two'))
    expect(Buffer.from(await first.read(0, 3)).toString()).toBe('one')
    expect(Buffer.from(await second.read(0, 3)).toString()).toBe('two')
  })

  it('shows an export that comes later, and no longer one that went', async () => {
    fixture = await NbdFixture.start({ noExport: true })
    await expect(connect(fixture.uri())).rejects.toMatchObject({ replyName: 'errorUnknown' })
    const { device } = await fixture.openDevice()
    fixture.exports.add('disk', device)
    await using connection = await connect(fixture.uri())
    fixture.exports.entries.delete('disk')
    await expect(connect(fixture.uri())).rejects.toMatchObject({ replyName: 'errorUnknown' })
    expect((await connection.read(0, 512)).length).toBe(512)
  })

  it('keeps no descriptor of a client that has left', async () => {
    fixture = await NbdFixture.start()
    const descriptorCount = (): number => readdirSync('/proc/self/fd').length
    const before = descriptorCount()
    for (let index = 0; index < 40; index += 1) {
      const connection = await connect(fixture.uri())
      await connection.disconnect()
    }
    await expect.poll(() => fixture.server.connections()).toEqual([])
    await expect.poll(() => descriptorCount()).toBeLessThanOrEqual(before + 2)
  })

  it('tells clients of a suspended export to come back', async () => {
    fixture = await NbdFixture.start()
    fixture.exports.suspended.add('disk')
    await expect(connect(fixture.uri())).rejects.toMatchObject({ replyName: 'errorShutdown', retryable: true })
    const connecting = connectWithRetry(fixture.uri(), { retryDelayMs: 5 })
    fixture.exports.suspended.delete('disk')
    await using connection = await connecting
    expect(connection.sizeBytes).toBe(8 * MiB)
  })

  it('refuses listing by policy, and connects all the same', async () => {
    fixture = await NbdFixture.start({ server: { listing: false } })
    await expect(list(fixture.target)).rejects.toMatchObject({ replyName: 'errorPolicy' })
    await using connection = await connect(fixture.uri())
    expect(connection.sizeBytes).toBe(8 * MiB)
  })

  it('counts a connection from GO until it has ended', async () => {
    fixture = await NbdFixture.start()
    await using negotiating = await connectRaw(fixture.target)
    await negotiating.receiveGreeting()
    expect(fixture.server.connections()).toEqual([{ peer: expect.stringContaining(`pid=${process.pid}`), exportId: null }])
    const connection = await connect(fixture.uri())
    expect(fixture.exports.count('disk')).toBe(1)
    expect(fixture.server.connections().map(({ exportId }) => exportId)).toEqual([null, 'disk'])
    await connection.disconnect()
    await expect.poll(() => fixture.exports.count('disk')).toBe(0)
    const lost = await connect(fixture.uri())
    lost.destroy()
    await expect.poll(() => fixture.exports.count('disk')).toBe(0)
  })

  it('disconnects the clients of one export and leaves the others alone', async () => {
    fixture = await NbdFixture.start()
    const { device } = await fixture.openDevice()
    fixture.exports.add('other', device)
    const leaving = await Promise.all([connect(fixture.uri()), connect(fixture.uri())])
    await using staying = await connect(fixture.uri('other'))
    await fixture.server.disconnectExport('disk')
    expect(fixture.exports.count('disk')).toBe(0)
    for (const connection of leaving) expect((await connection.closed)?.code).toBe('NBD_CONNECTION_LOST')
    expect((await staying.read(0, 512)).length).toBe(512)
  })

  it('the owner of an export can disconnect what entered', async () => {
    fixture = await NbdFixture.start()
    const drained = await connect(fixture.uri())
    const [first] = fixture.exports.connections.get('disk')!
    await first!.drain()
    expect((await drained.closed)?.code).toBe('NBD_CONNECTION_LOST')
    const closed = await connect(fixture.uri())
    await expect.poll(() => fixture.exports.count('disk')).toBe(1)
    const [second] = fixture.exports.connections.get('disk')!
    await second!.close()
    expect((await closed.closed)?.code).toBe('NBD_CONNECTION_LOST')
  })

  it('finishes and answers what is in flight when it drains (rule 28)', async () => {
    fixture = await NbdFixture.start({ noExport: true })
    const store = fixture.engine.faultStore(fixture.engine.memoryStore({ capacityBytes: 64 * MiB }))
    const { device } = await fixture.openDevice({ store, uniform: true })
    fixture.exports.add('disk', device)
    const connection = await connect(fixture.uri())
    await connection.write(0, Buffer.alloc(4096, 1))
    store.setFaults({ seed: 1, rules: [{ operation: 'sync', errno: 0, delayMs: heldMs }] })
    const flushed = connection.flush()
    // The request must have been received: a read behind it has been answered.
    await connection.read(0, 512)
    const drained = fixture.server.drain()
    store.setFaults({ seed: 1, rules: [] })
    await drained
    await flushed
    await connection.closed
    expect(fixture.exports.count('disk')).toBe(0)
  })

  it.each(['unix', 'tcp'] as const)('answers ESHUTDOWN to what is asked while it drains, over %s (rule 28)', async (kind) => {
    fixture = await NbdFixture.start({ noExport: true })
    const store = fixture.engine.faultStore(fixture.engine.memoryStore({ capacityBytes: 64 * MiB }))
    const { device } = await fixture.openDevice({ store, uniform: true })
    fixture.exports.add('disk', device)
    const tcp = await startNbdServer({
      engine: fixture.engine,
      exports: fixture.exports,
      log: silentLog(),
      listen: { host: '127.0.0.1', port: 0 },
      ...unhurried,
    })
    const { host, port } = tcp.address
    const target = kind === 'unix' ? fixture.uri() : { host: host!, port: port! }
    const connection = await connect(target, { exportName: 'disk' })
    await connection.write(0, Buffer.alloc(4096, 1))
    store.setFaults({ seed: 1, rules: [{ operation: 'sync', errno: 0, delayMs: heldMs }] })
    const flushed = connection.flush()
    await connection.read(0, 512)
    const drained = (kind === 'unix' ? fixture.server : tcp).drain()
    await expect(connection.write(0, Buffer.alloc(MiB, 2))).rejects.toMatchObject({ errnoName: 'ESHUTDOWN' })
    await expect(connection.read(0, 512)).rejects.toMatchObject({ errnoName: 'ESHUTDOWN' })
    store.setFaults({ seed: 1, rules: [] })
    await flushed
    await drained
    expect((await connection.closed)?.code).toBe('NBD_CONNECTION_LOST')
    await tcp.close()
    expect(Buffer.alloc(4096, 1).equals(await device.read(0, 4096))).toBe(true)
  })

  it('while it drains, answers ERR_SHUTDOWN to new clients and to those that negotiate', async () => {
    fixture = await NbdFixture.start()
    await using negotiating = await connectRaw(fixture.target)
    await negotiating.greet()
    expect((await negotiating.ask(option.structuredReply))[0]!.type).toBe(optionReply.ack)
    await fixture.server.drain()
    expect((await negotiating.ask(option.go, encodeInfoRequest('disk', [])))[0]!.type).toBe(optionReply.errorShutdown)
    expect((await negotiating.ask(option.list))[0]!.type).toBe(optionReply.errorShutdown)
    await expect(connect(fixture.uri())).rejects.toMatchObject({ replyName: 'errorShutdown', retryable: true })
    expect((await negotiating.ask(option.abort))[0]!.type).toBe(optionReply.ack)
    expect(fixture.exports.count('disk')).toBe(0)
  })

  it('closes everything, also what negotiates, and removes its socket', async () => {
    fixture = await NbdFixture.start()
    await using negotiating = await connectRaw(fixture.target)
    await negotiating.greet()
    const connection = await connect(fixture.uri())
    await fixture.server.close()
    expect((await connection.closed)?.code).toBe('NBD_CONNECTION_LOST')
    await negotiating.receiveEnd()
    expect(fixture.exports.count('disk')).toBe(0)
    expect(fixture.server.connections()).toEqual([])
    expect(existsSync(fixture.socketPath)).toBe(false)
    await fixture.server.close()
  })

  it('turns clients away beyond its bound and takes others when one has left', async () => {
    fixture = await NbdFixture.start({ server: { connectionLimits: { connectionCountMax: 2 } } })
    const first = await connect(fixture.uri())
    await using second = await connect(fixture.uri())
    await expect(connect(fixture.uri())).rejects.toMatchObject({ code: 'NBD_CONNECTION_LOST' })
    await first.disconnect()
    await using third = await connectWithRetry(fixture.uri(), { retryDelayMs: 5 })
    expect((await third.read(0, 512)).length).toBe(512)
    expect((await second.read(0, 512)).length).toBe(512)
  })

  it('gives its socket the mode that was asked for', async () => {
    fixture = await NbdFixture.start()
    expect((await stat(fixture.socketPath)).mode & 0o777).toBe(0o600)
  })

  it('refuses to start where another one listens', async () => {
    fixture = await NbdFixture.start()
    const second = startNbdServer({
      engine: fixture.engine,
      exports: fixture.exports,
      log: silentLog(),
      listen: { path: fixture.socketPath, mode: 0o600 },
    })
    await expect(second).rejects.toMatchObject({ code: 'ADDRESS_IN_USE' })
    await using connection = await connect(fixture.uri())
    expect(connection.sizeBytes).toBe(8 * MiB)
  })

  it('listens on TCP, on a port of the system’s choice', async () => {
    fixture = await NbdFixture.start()
    const server = await startNbdServer({
      engine: fixture.engine,
      exports: fixture.exports,
      log: silentLog(),
      listen: { host: '127.0.0.1', port: 0 },
    })
    const { host, port } = server.address
    await using connection = await connect({ host, port }, { exportName: 'disk' })
    const data = Buffer.alloc(300 * KiB, 7)
    await connection.write(12345, data)
    expect(data.equals(await connection.read(12345, data.length))).toBe(true)
    await server.close()
  })

  it('shows one set of bytes to many connections at once (multi-conn)', async () => {
    fixture = await NbdFixture.start()
    const connections = await Promise.all(Array.from({ length: 8 }, () => connect(fixture.uri())))
    await Promise.all(
      Array.from({ length: 256 }, async (_, index) => {
        const data = Buffer.alloc(8192, index)
        await connections[index % 8]!.write(index * 8192, data)
        await connections[(index + 3) % 8]!.flush()
        expect(data.equals(await connections[(index + 5) % 8]!.read(index * 8192, 8192))).toBe(true)
      }),
    )
    await Promise.all(connections.map((connection) => connection.disconnect()))
  })

  it('serves the grown size to who connects after a grow', async () => {
    fixture = await NbdFixture.start()
    await using before = await connect(fixture.uri())
    await fixture.exports.get('disk')!.device.grow(16 * MiB)
    await using after = await connect(fixture.uri())
    expect([before.sizeBytes, after.sizeBytes]).toEqual([8 * MiB, 16 * MiB])
    await after.write(15 * MiB, Buffer.from('there'))
    expect(Buffer.from(await after.read(15 * MiB, 5)).toString()).toBe('there')
  })
})
