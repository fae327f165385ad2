/** The rules of the transmission that servers break, over real sockets and the native engine. */
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import {
  connect,
  connectRaw,
  encodeMetaContextRequest,
  encodeExtendedRequest,
  encodeRequest,
  protocol,
  type NbdConnection,
  type RawNbdConnection,
  type RequestHeader,
} from '@atoll/nbd-client'
import { KiB, MiB, NbdFixture } from './testing/nbd-fixture.ts'

const { option, optionReply, command, commandFlag, chunkType } = protocol

let fixture: NbdFixture
afterEach(async () => {
  await fixture.close()
})

const pattern = (lengthBytes: number, seed: number): Buffer => {
  const bytes = Buffer.alloc(lengthBytes)
  for (let index = 0; index < lengthBytes; index += 1) bytes[index] = (index * 7 + (index >> 8) * 13 + seed) & 0xff
  return bytes
}

type Form = 'simple' | 'structured' | 'extended'
const optionsOf = (form: Form): { structuredReplies: boolean; extendedHeaders: boolean } => ({
  structuredReplies: form === 'structured',
  extendedHeaders: form === 'extended',
})

async function rawTransmission(form: Form, exportName = 'disk', contexts: readonly string[] = []): Promise<RawNbdConnection> {
  const client = await connectRaw(fixture.target)
  await client.greet()
  if (form !== 'simple') {
    const answers = await client.ask(form === 'extended' ? option.extendedHeaders : option.structuredReply)
    if (answers[0]?.type !== optionReply.ack) throw new Error(`${form} replies were refused`)
  }
  if (contexts.length > 0) await client.ask(option.setMetaContext, encodeMetaContextRequest(exportName, contexts))
  await client.go(exportName)
  return client
}

describe.each(['simple', 'structured', 'extended'] as const)('the transmission, %s replies', (form) => {
  const structuredReplies = form !== 'simple'
  const encode = form === 'extended' ? encodeExtendedRequest : encodeRequest
  const writeFlag = form === 'extended' ? commandFlag.payloadLength : 0
  const send = (client: RawNbdConnection, request: RequestHeader): void => client.send(encode(request))

  beforeEach(async () => {
    fixture = await NbdFixture.start({ sizeBytes: 8 * MiB })
  })

  it('rule 14: echoes cookies as they are, and answers reads in the negotiated form, also when they fail', async () => {
    await using client = await rawTransmission(form)
    const cookies = [0n, 0xffff_ffff_ffff_ffffn, 0x0102030405060708n, 0n]
    for (const cookie of cookies) {
      send(client, { flags: 0, command: command.read, cookie, offsetBytes: 9 * MiB, lengthBytes: 512 })
      const header = await client.receiveReplyHeader()
      expect(header).toMatchObject({ kind: form, cookie })
      const errno = header.kind === 'simple' ? header.errno : (await client.receive(header.lengthBytes)).readUInt32BE(0)
      expect(errno).toBe(22)
    }
  })

  it('rule 17: consumes the payload of a write that it refuses, and bounds do not overflow', async () => {
    await using connection = await connect(fixture.uri(), optionsOf(form))
    const payload = pattern(3000, 1)
    for (const offsetBytes of [8n * 1024n * 1024n, 2n ** 64n - 512n, 2n ** 63n, 2n ** 64n - 3000n]) {
      await expect(
        connection.request({ command: command.write, flags: 0, offsetBytes, lengthBytes: 3000, payload }),
      ).rejects.toMatchObject({ errnoName: 'ENOSPC' })
      await expect(connection.request({ command: command.read, flags: 0, offsetBytes, lengthBytes: 3000 })).rejects.toMatchObject(
        { errnoName: 'EINVAL' },
      )
    }
    const large = pattern(2 * MiB, 3)
    await expect(
      connection.request({ command: command.write, flags: 0, offsetBytes: 7 * MiB, lengthBytes: large.length, payload: large }),
    ).rejects.toMatchObject({ errnoName: 'ENOSPC' })
    await connection.write(0, payload)
    expect(payload.equals(await connection.read(0, 3000))).toBe(true)
  })

  it('rule 18: uses the errno that the protocol wants', async () => {
    const { device } = await fixture.openDevice()
    fixture.exports.add('frozen', device, { readOnly: true })
    await using connection = await connect(fixture.uri(), { ...optionsOf(form), metaContexts: ['base:allocation'] })
    const fails = async (
      to: NbdConnection,
      number: number,
      flags: number,
      offsetBytes: number,
      lengthBytes: number,
      payload?: Uint8Array,
    ): Promise<string> => {
      const error = await to.request({ command: number, flags, offsetBytes, lengthBytes, payload }).then(
        () => null,
        (reason: { errnoName: string }) => reason,
      )
      return error === null ? 'done' : error.errnoName
    }
    const end = 8 * MiB
    expect(await fails(connection, command.read, 0, end, 1)).toBe('EINVAL')
    expect(await fails(connection, command.trim, 0, end, 1)).toBe('EINVAL')
    expect(await fails(connection, command.blockStatus, 0, end, 1)).toBe('EINVAL')
    expect(await fails(connection, command.write, 0, end - 1, 2, Buffer.alloc(2))).toBe('ENOSPC')
    expect(await fails(connection, command.writeZeroes, 0, end - 1, 2)).toBe('ENOSPC')
    for (const number of [8, 9, 100, 0xffff]) expect(await fails(connection, number, 0, 0, 0)).toBe('EINVAL')
    for (const flag of [commandFlag.noHole, commandFlag.reqOne, commandFlag.fastZero, 1 << 6, 1 << 15])
      expect(await fails(connection, command.read, flag, 0, 512)).toBe('EINVAL')
    expect(await fails(connection, command.read, commandFlag.df, 0, 512)).toBe(structuredReplies ? 'done' : 'EINVAL')
    expect(await fails(connection, command.write, commandFlag.df, 0, 4, Buffer.alloc(4))).toBe('EINVAL')
    expect(await fails(connection, command.read, 0, 0, 33 * MiB)).toMatch(/EOVERFLOW|EINVAL/)
    await using frozen = await connect(fixture.uri('frozen'), optionsOf(form))
    expect(frozen.flags.readOnly).toBe(true)
    expect(await fails(frozen, command.write, 0, 0, 4, Buffer.alloc(4))).toBe('EPERM')
    expect(await fails(frozen, command.trim, 0, 0, 4096)).toBe('EPERM')
    expect(await fails(frozen, command.writeZeroes, 0, 0, 4096)).toBe('EPERM')
    expect(await fails(frozen, command.read, 0, 0, 4096)).toBe('done')
    expect(await fails(frozen, command.flush, 0, 0, 0)).toBe('done')
    expect((await connection.read(0, 512)).length).toBe(512)
  })

  // nbdkit 1.32.5 and 1.42.3 with the file plugin abort on this one request: a client could stop the server.
  it('rule 19: refuses a FAST_ZERO that it does not offer, and lives on', async () => {
    const { device } = await fixture.openDevice()
    fixture.exports.add('frozen', device, { readOnly: true })
    await using connection = await connect(fixture.uri('frozen'), optionsOf(form))
    expect(connection.flags).toMatchObject({ readOnly: true, fastZero: false, writeZeroes: false, cache: true })
    for (const flags of [commandFlag.fastZero, commandFlag.fastZero | commandFlag.noHole | commandFlag.fua]) {
      await expect(
        connection.request({ command: command.writeZeroes, flags, offsetBytes: 0, lengthBytes: 4096 }),
      ).rejects.toMatchObject({ errnoName: 'EINVAL' })
    }
    expect((await connection.read(0, 512)).length).toBe(512)
    await using other = await connect(fixture.uri())
    expect((await other.read(0, 512)).length).toBe(512)
  })

  it('rule 24: prefetches as it is told, refuses flags that it does not know, and changes nothing', async () => {
    await using connection = await connect(fixture.uri(), optionsOf(form))
    expect(connection.flags).toMatchObject({ cache: true, rotational: false })
    await connection.write(5000, pattern(9000, 1))
    for (const [offsetBytes, lengthBytes] of [
      [0, 8 * MiB],
      [5001, 10],
      [8 * MiB - 1, 1],
    ] as const)
      // prettier-ignore
      await connection.cache(offsetBytes, lengthBytes)
    for (const flags of [commandFlag.noHole, commandFlag.df, commandFlag.reqOne, commandFlag.fastZero, 1 << 6, 1 << 15]) {
      await expect(
        connection.request({ command: command.cache, flags, offsetBytes: 0, lengthBytes: 4096 }),
      ).rejects.toMatchObject({ errnoName: 'EINVAL' })
    }
    await expect(connection.cache(8 * MiB - 1, 2)).rejects.toMatchObject({ errnoName: 'EINVAL' })
    expect(pattern(9000, 1).equals(await connection.read(5000, 9000))).toBe(true)
  })

  it('rule 23: FAST_ZERO zeroes whole slots at once, and leaves alone what it would have to write', async () => {
    await using connection = await connect(fixture.uri(), optionsOf(form))
    expect(connection.flags.fastZero).toBe(true)
    const data = pattern(MiB, 1)
    await connection.write(0, data)
    for (const [offsetBytes, lengthBytes, noHole] of [
      [0, 65536, true],
      [1, 4095, false],
      [4096, 8191, false],
      [512, 65536, false],
    ] as const) {
      await expect(connection.writeZeroes(offsetBytes, lengthBytes, { fastZero: true, noHole })).rejects.toMatchObject({
        errnoName: 'ENOTSUP',
      })
    }
    expect(data.equals(await connection.read(0, MiB))).toBe(true)
    await connection.writeZeroes(8192, 65536, { fastZero: true, fua: true })
    data.fill(0, 8192, 8192 + 65536)
    // Without the flag nothing is too slow.
    await connection.writeZeroes(200_001, 5001, { noHole: true })
    data.fill(0, 200_001, 205_002)
    expect(data.equals(await connection.read(0, MiB))).toBe(true)
  })

  it('rule 20: accepts FUA on every command', async () => {
    await using connection = await connect(fixture.uri(), { ...optionsOf(form), metaContexts: ['base:allocation'] })
    const flags = commandFlag.fua
    await connection.request({ command: command.write, flags, offsetBytes: 0, lengthBytes: 4, payload: Buffer.from('data') })
    await connection.request({ command: command.read, flags, offsetBytes: 0, lengthBytes: 4 })
    await connection.request({ command: command.flush, flags, offsetBytes: 0, lengthBytes: 0 })
    await connection.request({ command: command.cache, flags, offsetBytes: 0, lengthBytes: 4096 })
    await connection.request({ command: command.trim, flags, offsetBytes: 0, lengthBytes: 4096 })
    await connection.request({ command: command.writeZeroes, flags, offsetBytes: 0, lengthBytes: 4096 })
    if (structuredReplies) await connection.request({ command: command.blockStatus, flags, offsetBytes: 0, lengthBytes: 4096 })
  })

  it('rule 22: takes every command with a length of nothing', async () => {
    await using connection = await connect(fixture.uri(), optionsOf(form))
    for (const number of [command.read, command.write, command.trim, command.writeZeroes, command.cache, command.flush]) {
      for (const offsetBytes of [0, 4095, 8 * MiB])
        await connection.request({ command: number, flags: 0, offsetBytes, lengthBytes: 0 })
    }
    await connection.request({ command: command.blockStatus, flags: 0, offsetBytes: 0, lengthBytes: 0 }).catch(() => {})
    expect((await connection.read(0, 512)).length).toBe(512)
  })

  it('rule 26: finishes what was asked before DISC, answers it, and closes without an answer to DISC', async () => {
    await using client = await rawTransmission(form)
    const payload = pattern(4096, 9)
    const requests: Buffer[] = []
    for (let index = 0; index < 50; index += 1) {
      requests.push(
        encode({
          flags: writeFlag | (index % 5 === 0 ? commandFlag.fua : 0),
          command: command.write,
          cookie: BigInt(index),
          offsetBytes: index * 4096,
          lengthBytes: 4096,
        }),
        payload,
      )
    }
    requests.push(encode({ flags: 0, command: command.disconnect, cookie: 99n, offsetBytes: 0, lengthBytes: 0 }))
    client.send(Buffer.concat(requests))
    const answered = new Set<bigint>()
    for (let index = 0; index < 50; index += 1) {
      const header = await client.receiveReplyHeader()
      expect(header.kind === 'simple' ? header.errno : header.type).toBe(0)
      answered.add(header.cookie)
    }
    expect(answered.size).toBe(50)
    await client.receiveEnd()
    await using after = await connect(fixture.uri())
    expect(payload.equals(await after.read(49 * 4096, 4096))).toBe(true)
  })

  it('rule 27: takes 32 MiB, and survives the header of a write of 2 GiB', async () => {
    const { device } = await fixture.openDevice({ sizeBytes: 4096 * MiB })
    fixture.exports.add('large', device)
    await using connection = await connect(fixture.uri('large'), optionsOf(form))
    const data = pattern(32 * MiB, 5)
    await connection.write(1024 * MiB - 100, data)
    expect(data.equals(await connection.read(1024 * MiB - 100, 32 * MiB))).toBe(true)
    await using greedy = await rawTransmission(form, 'large')
    send(greedy, { flags: writeFlag, command: command.write, cookie: 1n, offsetBytes: 0, lengthBytes: 0x8000_0000 })
    greedy.send(Buffer.alloc(64 * KiB))
    await greedy.receiveReplyHeader().catch(() => {})
    greedy.destroy()
    expect(data.subarray(0, 512).equals(await connection.read(1024 * MiB - 100, 512))).toBe(true)
  })

  it('garbage where a request should be ends that connection and no other', async () => {
    await using other = await connect(fixture.uri(), optionsOf(form))
    await using client = await rawTransmission(form)
    client.send(Buffer.alloc(32, 0xaa))
    await client.receiveEnd()
    expect((await other.read(0, 512)).length).toBe(512)
  })
})

describe('chunks', () => {
  beforeEach(async () => {
    fixture = await NbdFixture.start({ sizeBytes: 64 * MiB })
  })

  // The client checks on every read that chunks lie inside, do not overlap and cover everything.
  it('rule 15: cover a read of data and holes of any alignment, and DF gives one', async () => {
    await using connection = await connect(fixture.uri())
    const expected = Buffer.alloc(MiB)
    for (const [offsetBytes, lengthBytes] of [
      [0, 1],
      [8192, 4096],
      [100_000, 50_000],
      [300_001, 333],
      [MiB - 5, 5],
    ] as const) {
      const data = pattern(lengthBytes, offsetBytes)
      await connection.write(offsetBytes, data)
      data.copy(expected, offsetBytes)
    }
    for (const [offsetBytes, lengthBytes] of [
      [0, MiB],
      [1, MiB - 2],
      [4095, 4098],
      [99_999, 50_002],
      [300_000, 335],
      [200_000, 1],
      [12288, 65536],
    ] as const) {
      for (const df of [false, true]) {
        const data = await connection.read(offsetBytes, lengthBytes, { df })
        expect(expected.subarray(offsetBytes, offsetBytes + lengthBytes).equals(data)).toBe(true)
      }
    }
  })

  it('rule 15: a read of a hole moves no zeros over the wire', async () => {
    await using client = await rawTransmission('structured')
    client.sendRequest({ flags: 0, command: command.read, cookie: 5n, offsetBytes: 0, lengthBytes: 16 * MiB })
    expect(await client.receiveReplyHeader()).toMatchObject({ type: chunkType.offsetHole, lengthBytes: 12, flags: 1 })
  })
})

describe('a failing device', () => {
  it('rule 16: answers a failed read with an error and stays in step, in every form', async () => {
    fixture = await NbdFixture.start({ noExport: true })
    const store = fixture.engine.faultStore(fixture.engine.memoryStore({ capacityBytes: 64 * MiB }))
    const { device } = await fixture.openDevice({ store, uniform: true })
    fixture.exports.add('disk', device)
    for (const form of ['simple', 'structured', 'extended'] as const) {
      await using connection = await connect(fixture.uri(), optionsOf(form))
      await connection.write(0, pattern(MiB, 1))
      store.setFaults({ seed: 1, rules: [{ operation: 'read', errno: 5 }] })
      await expect(connection.read(0, MiB)).rejects.toMatchObject({ errnoName: 'EIO' })
      store.setFaults({ seed: 1, rules: [] })
      expect(pattern(MiB, 1).equals(await connection.read(0, MiB))).toBe(true)
    }
  })

  it('rule 18: answers a full disk with ENOSPC and goes on', async () => {
    fixture = await NbdFixture.start({ noExport: true })
    const store = fixture.engine.faultStore(fixture.engine.memoryStore({ capacityBytes: 64 * MiB }))
    const { device } = await fixture.openDevice({ store, uniform: true })
    fixture.exports.add('disk', device)
    await using connection = await connect(fixture.uri())
    store.setFaults({ seed: 1, rules: [{ operation: 'write', errno: 28 }] })
    await expect(connection.write(0, pattern(4096, 1))).rejects.toMatchObject({ errnoName: 'ENOSPC' })
    store.setFaults({ seed: 1, rules: [] })
    await connection.write(0, pattern(4096, 2))
    expect(pattern(4096, 2).equals(await connection.read(0, 4096))).toBe(true)
  })
})

describe('what is called stable', () => {
  /** Opens what a power cut at this moment would leave, if nothing unsynced survives. */
  async function afterPowerCut(opened: Awaited<ReturnType<NbdFixture['openDevice']>>) {
    const image = opened.store.crashImage(opened.store.sequence(), 1, { keepOf256: 0, tear: false, reorder: false })
    const { device } = await fixture.engine.openDevice({
      volumeId: opened.volumeId,
      sizeBytes: 8 * MiB,
      epoch: 2,
      map: fixture.engine.uniformMap(0),
      mapLsn: 0,
      layers: [{ alias: 1, id: opened.layerId, store: image }],
      active: 1,
      next: null,
    })
    return device
  }

  it('rules 20 and 21: a flush covers what was answered on any connection, FUA covers its own write, and nothing else is promised', async () => {
    fixture = await NbdFixture.start({ noExport: true })
    const opened = await fixture.openDevice({ store: fixture.engine.memoryStore({ capacityBytes: 64 * MiB, record: true }) })
    fixture.exports.add('disk', opened.device)
    await using first = await connect(fixture.uri())
    await using second = await connect(fixture.uri())
    await first.write(0, pattern(4096, 1))
    await first.writeZeroes(MiB, 8192)
    await first.write(4 * MiB + 1, pattern(10_000, 2))
    await second.flush()
    const unflushed = first.write(6 * MiB, pattern(4096, 3))
    await second.write(7 * MiB, pattern(4096, 4), { fua: true })
    await unflushed
    const found = await afterPowerCut(opened)
    expect(pattern(4096, 1).equals(await found.read(0, 4096))).toBe(true)
    expect(Buffer.alloc(8192).equals(await found.read(MiB, 8192))).toBe(true)
    expect(pattern(10_000, 2).equals(await found.read(4 * MiB + 1, 10_000))).toBe(true)
    expect(pattern(4096, 4).equals(await found.read(7 * MiB, 4096))).toBe(true)
    await found.close()
  })
})

describe('trim, zeroes and status', () => {
  const sizeBytes = 3 * 1024 * MiB

  beforeEach(async () => {
    fixture = await NbdFixture.start({ sizeBytes })
  })

  it('rule 22: TRIM and WRITE_ZEROES may be longer than any payload', async () => {
    await using connection = await connect(fixture.uri())
    await connection.write(2048 * MiB, pattern(4096, 1))
    await connection.writeZeroes(0, sizeBytes)
    expect(Buffer.alloc(4096).equals(await connection.read(2048 * MiB, 4096))).toBe(true)
    await connection.write(2048 * MiB, pattern(4096, 1))
    await connection.trim(0, sizeBytes)
  })

  it('rule 23: WRITE_ZEROES reads back zero to the byte, and allocates with NO_HOLE', async () => {
    await using connection = await connect(fixture.uri(), { metaContexts: ['base:allocation'] })
    const data = pattern(64 * KiB, 1)
    await connection.write(0, data)
    await connection.writeZeroes(5000, 20_000)
    await connection.writeZeroes(40_001, 10_001, { noHole: true })
    data.fill(0, 5000, 25_000)
    data.fill(0, 40_001, 50_002)
    expect(data.equals(await connection.read(0, 64 * KiB))).toBe(true)
    await connection.writeZeroes(MiB, MiB, { noHole: true })
    const extents = (await connection.blockStatus(MiB, MiB)).get('base:allocation')!
    // HOLE clear promises that a write finds its space.
    for (const extent of extents) expect(extent.flags & protocol.allocationFlag.hole).toBe(0)
  })

  it('rule 25: status tells data from holes, gives one extent to REQ_ONE, and EINVAL without a context', async () => {
    await using connection = await connect(fixture.uri(), { metaContexts: ['base:allocation'] })
    await connection.write(64 * KiB, pattern(64 * KiB, 1))
    const whole = (await connection.blockStatus(0, MiB)).get('base:allocation')!
    expect(whole[0]).toEqual({ offsetBytes: 0, lengthBytes: 64 * KiB, flags: 3 })
    expect(whole[1]).toEqual({ offsetBytes: 64 * KiB, lengthBytes: 64 * KiB, flags: 0 })
    expect(whole[2]).toMatchObject({ offsetBytes: 128 * KiB, flags: 3 })
    expect((await connection.blockStatus(1000, 2000, { reqOne: true })).get('base:allocation')).toEqual([
      { offsetBytes: 1000, lengthBytes: 2000, flags: 3 },
    ])
    expect((await connection.blockStatus(0, MiB, { reqOne: true })).get('base:allocation')).toEqual([
      { offsetBytes: 0, lengthBytes: 64 * KiB, flags: 3 },
    ])
    await using without = await connect(fixture.uri())
    await expect(
      without.request({ command: command.blockStatus, flags: 0, offsetBytes: 0, lengthBytes: 4096 }),
    ).rejects.toMatchObject({ errnoName: 'EINVAL' })
  })

  it('rule 25: many extents come in bounded answers that can be continued', async () => {
    await using connection = await connect(fixture.uri(), { metaContexts: ['base:allocation'] })
    const block = pattern(4096, 1)
    const blockCount = 3000
    await Promise.all(Array.from({ length: blockCount }, (_, index) => connection.write(index * 8192, block)))
    let dataBytes = 0
    for (let offsetBytes = 0; offsetBytes < blockCount * 8192;) {
      const extents = (await connection.blockStatus(offsetBytes, blockCount * 8192 - offsetBytes)).get('base:allocation')!
      for (const extent of extents) if (extent.flags === 0) dataBytes += extent.lengthBytes
      offsetBytes = extents.at(-1)!.offsetBytes + extents.at(-1)!.lengthBytes
    }
    expect(dataBytes).toBe(blockCount * 4096)
  })
})

describe('extended headers', () => {
  const sizeBytes = 32 * 1024 * 1024 * MiB
  const extendedHeaders = true

  beforeEach(async () => {
    fixture = await NbdFixture.start({ sizeBytes })
  })

  it('rule 29: every reply has 32 bytes and the offset of its request', async () => {
    await using client = await rawTransmission('extended', 'disk', ['base:allocation'])
    const payload = pattern(8192, 1)
    client.sendExtendedRequest(
      { flags: commandFlag.payloadLength, command: command.write, cookie: 1n, offsetBytes: 12288, lengthBytes: payload.length },
      payload,
    )
    const reply = { kind: 'extended', flags: 1, type: chunkType.none, cookie: 1n, offsetBytes: 12288n, lengthBytes: 0 }
    expect(await client.receiveReplyHeader()).toEqual(reply)
    // Data in the middle of the request: its own offset stands in the chunk, the request's in the header.
    client.sendExtendedRequest({ flags: 0, command: command.read, cookie: 2n, offsetBytes: 8192, lengthBytes: 16384 })
    const types: number[] = []
    const at: bigint[] = []
    for (let done = false; !done;) {
      const header = await client.receiveReplyHeader()
      expect(header).toMatchObject({ kind: 'extended', cookie: 2n, offsetBytes: 8192n })
      if (header.kind !== 'extended') return
      const chunk = await client.receive(header.lengthBytes)
      types.push(header.type)
      at.push(chunk.readBigUInt64BE(0))
      done = (header.flags & 1) !== 0
    }
    expect(types).toEqual([chunkType.offsetHole, chunkType.offsetData, chunkType.offsetHole])
    expect(at).toEqual([8192n, 12288n, 20480n])
    for (const [number, flags] of [
      [command.flush, 0],
      [command.trim, commandFlag.fua],
      [command.cache, 0],
    ] as const) {
      // prettier-ignore
      client.sendExtendedRequest({ flags, command: number, cookie: 3n, offsetBytes: 0, lengthBytes: 0 })
      expect(await client.receiveReplyHeader()).toMatchObject({ kind: 'extended', type: chunkType.none, offsetBytes: 0n })
    }
    client.sendExtendedRequest({ flags: 0, command: command.read, cookie: 4n, offsetBytes: sizeBytes, lengthBytes: 512 })
    expect(await client.receiveReplyHeader()).toMatchObject({ type: chunkType.error, offsetBytes: BigInt(sizeBytes) })
  })

  it('rule 29: a payload is what the flag says, and any write has one; elsewhere it is consumed and refused', async () => {
    await using client = await rawTransmission('extended')
    const errno = async (request: RequestHeader, payload?: Uint8Array): Promise<number> => {
      client.sendExtendedRequest(request, payload)
      const header = await client.receiveReplyHeader()
      if (header.kind !== 'extended') throw new Error('a reply of another form')
      const chunk = await client.receive(header.lengthBytes)
      return header.type === chunkType.error ? chunk.readUInt32BE(0) : 0
    }
    const request = { flags: 0, command: command.write, cookie: 1n, offsetBytes: 0, lengthBytes: 4096 }
    // QEMU's client (10.0) leaves the flag out of its writes, which have their payload all the same.
    expect(await errno(request, pattern(4096, 9))).toBe(0)
    expect(pattern(4096, 9).equals(await fixture.exports.get('disk')!.device.read(0, 4096))).toBe(true)
    for (const number of [
      command.read,
      command.flush,
      command.trim,
      command.cache,
      command.writeZeroes,
      command.blockStatus,
      8,
    ]) {
      for (const lengthBytes of [1, 12, 4096, MiB]) {
        const payload = pattern(lengthBytes, number)
        expect(await errno({ ...request, flags: commandFlag.payloadLength, command: number, lengthBytes }, payload)).toBe(22)
      }
    }
    expect(await errno({ ...request, flags: commandFlag.payloadLength }, pattern(4096, 1))).toBe(0)
    // A payload beyond every bound is not waited for: the connection ends, and no other.
    await using other = await connect(fixture.uri(), { extendedHeaders })
    expect(await errno({ ...request, flags: commandFlag.payloadLength, command: command.trim, lengthBytes: 2n ** 40n })).toBe(22)
    await client.receiveEnd()
    expect(pattern(4096, 1).equals(await other.read(0, 4096))).toBe(true)
  })

  it('rule 29: lengths beyond 32 bits work where no data moves, and are never cut', async () => {
    await using connection = await connect(fixture.uri(), { extendedHeaders, metaContexts: ['base:allocation'] })
    expect(connection.extendedHeaders).toBe(true)
    const far = 20 * 1024 * 1024 * MiB
    await connection.write(far, pattern(4096, 1))
    expect((await connection.blockStatus(0, sizeBytes)).get('base:allocation')).toEqual([
      { offsetBytes: 0, lengthBytes: far, flags: 3 },
      { offsetBytes: far, lengthBytes: 4096, flags: 0 },
      { offsetBytes: far + 4096, lengthBytes: sizeBytes - far - 4096, flags: 3 },
    ])
    await connection.cache(0, sizeBytes)
    await connection.writeZeroes(4096, far - 4096, { fastZero: true })
    expect(pattern(4096, 1).equals(await connection.read(far, 4096))).toBe(true)
    await connection.trim(0, sizeBytes)
    expect(Buffer.alloc(4096).equals(await connection.read(far, 4096))).toBe(true)
    for (const number of [command.trim, command.cache, command.blockStatus, command.read]) {
      // 4 KiB, if it were cut to 32 bits.
      const request = { command: number, flags: 0, offsetBytes: 8192, lengthBytes: 2 ** 52 + 4096 }
      await expect(connection.request(request)).rejects.toMatchObject({ errnoName: 'EINVAL' })
    }
    const zeroes = { command: command.writeZeroes, flags: 0, offsetBytes: 8192, lengthBytes: 2 ** 52 + 4096 }
    await expect(connection.request(zeroes)).rejects.toMatchObject({ errnoName: 'ENOSPC' })
  })

  it('rule 29: a status may be asked of some contexts, each negotiated and named once', async () => {
    const names = ['base:allocation', 'qemu:allocation-depth']
    await using connection = await connect(fixture.uri(), { extendedHeaders, metaContexts: names })
    expect(connection.flags.blockStatusPayload).toBe(true)
    expect([...(await connection.blockStatus(0, 65536)).keys()].toSorted()).toEqual(names)
    for (const name of names) expect([...(await connection.blockStatus(0, 65536, { contexts: [name] })).keys()]).toEqual([name])
    await using client = await rawTransmission('extended', 'disk', names)
    for (const [lengthBytes, ids] of [
      [4096n, [1, 1]],
      [4096n, [3]],
      [4096n, []],
      [2n ** 60n, [1]],
    ] as const) {
      // prettier-ignore
      const payload = Buffer.alloc(8 + 4 * ids.length)
      payload.writeBigUInt64BE(lengthBytes, 0)
      ids.forEach((id, index) => payload.writeUInt32BE(id, 8 + 4 * index))
      const flags = commandFlag.payloadLength
      client.sendExtendedRequest(
        { flags, command: command.blockStatus, cookie: 1n, offsetBytes: 0, lengthBytes: payload.length },
        payload,
      )
      const header = await client.receiveReplyHeader()
      if (header.kind === 'simple') throw new Error('a simple reply')
      expect(header.type).toBe(chunkType.error)
      expect((await client.receive(header.lengthBytes)).readUInt32BE(0)).toBe(22)
    }
    await using without = await connect(fixture.uri(), { extendedHeaders })
    expect(without.flags.blockStatusPayload).toBe(false)
  })
})

describe('what changed since a snapshot', () => {
  it('rule 25: depth and dirty bitmaps tell of every slot, each context in a chunk of its own', async () => {
    fixture = await NbdFixture.start({ noExport: true })
    const { device, store } = await fixture.openDevice({ sizeBytes: 8 * MiB })
    await device.write(0, pattern(64 * KiB, 1))
    const nextId = '10000000-0000-4000-8000-0000000fffff'
    await store.createLayer(nextId)
    const [report] = await fixture.engine.swap([{ device, next: { alias: 2, id: nextId, store } }], 300_000)
    const names = ['base:allocation', 'qemu:allocation-depth', 'qemu:dirty-bitmap:before']
    fixture.exports.add('disk', device, {
      changes: { list: async () => ['before'], open: async (name) => (name === 'before' ? report!.frozen : null) },
    })
    await device.write(4096, Buffer.from('new'))
    await device.discard(16 * KiB, 4096)
    await device.write(MiB, pattern(4096, 2))
    for (const form of ['structured', 'extended'] as const) {
      await using connection = await connect(fixture.uri(), { ...optionsOf(form), metaContexts: [...names, ...names, 'x-y:z'] })
      expect([...connection.metaContexts.keys()]).toEqual(names)
      const found = await connection.blockStatus(0, 2 * MiB)
      const shape = (name: string): [number, number][] =>
        (found.get(name) ?? []).map((extent) => [extent.lengthBytes, extent.flags])
      const [slot, toMiB] = [4096, MiB - 64 * KiB]
      expect(shape(names[0]!)).toEqual([[4 * slot, 0], [slot, 3], [11 * slot, 0], [toMiB, 3], [slot, 0], [MiB - slot, 3]]) // prettier-ignore
      expect(shape(names[1]!)).toEqual([[slot, 2], [slot, 1], [2 * slot, 2], [slot, 0], [11 * slot, 2], [toMiB, 0], [slot, 1], [MiB - slot, 0]]) // prettier-ignore
      expect(shape(names[2]!)).toEqual([[slot, 0], [slot, 1], [2 * slot, 0], [slot, 1], [MiB - 5 * slot, 0], [slot, 1], [MiB - slot, 0]]) // prettier-ignore
      const one = await connection.blockStatus(5000, MiB, { reqOne: true })
      expect([...one.values()].map((extents) => extents.length)).toEqual([1, 1, 1])
    }
  })
})
