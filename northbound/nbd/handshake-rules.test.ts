/** The rules of the handshake that servers break, each over a real socket. The parser's own tests are in negotiation.test.ts. */
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import {
  connect,
  connectRaw,
  encodeInfoRequest,
  encodeMetaContextRequest,
  info,
  list,
  protocol,
  type RawNbdConnection,
} from '@atoll/nbd-client'
import { MiB, NbdFixture } from './testing/nbd-fixture.ts'

const { option, optionReply, infoItem, command, transmissionFlag } = protocol

let fixture: NbdFixture
beforeEach(async () => {
  fixture = await NbdFixture.start()
})
afterEach(async () => {
  await fixture.close()
})

const raw = (): Promise<RawNbdConnection> => connectRaw(fixture.target)

/** Reads 512 bytes over a connection that is in transmission: it is in step. */
async function expectTransmission(connection: RawNbdConnection): Promise<void> {
  connection.sendRequest({ flags: 0, command: command.read, cookie: 77n, offsetBytes: 0, lengthBytes: 512 })
  expect(await connection.receiveReplyHeader()).toEqual({ kind: 'simple', errno: 0, cookie: 77n })
  expect((await connection.receive(512)).equals(Buffer.alloc(512))).toBe(true)
}

async function lastReply(connection: RawNbdConnection, number: number, data: Uint8Array | string = ''): Promise<number> {
  return (await connection.ask(number, data)).at(-1)!.type
}

describe('the handshake', () => {
  it('greets with FIXED_NEWSTYLE and NO_ZEROES', async () => {
    await using client = await raw()
    expect(await client.receiveGreeting()).toEqual({ magic: protocol.greetingMagic, style: protocol.newstyleMagic, flags: 3 })
  })

  it('rule 1: closes when the client sets a flag that it does not know', async () => {
    for (const flags of [4, 0x80000000, 7]) {
      await using client = await raw()
      await client.greet(flags)
      await client.receiveEnd()
    }
  })

  it('rule 2: refuses an unknown option, eats its data, and parses the next', async () => {
    await using client = await raw()
    await client.greet()
    for (const number of [0, 4, 12, 100, 0xffffffff]) {
      expect(await lastReply(client, number, Buffer.alloc(5000, 1))).toBe(optionReply.errorUnsupported)
    }
    await client.go('disk')
    await expectTransmission(client)
  })

  it('rule 3: refuses LIST, STRUCTURED_REPLY and EXTENDED_HEADERS that carry data, with one reply, and stays in step', async () => {
    await using client = await raw()
    await client.greet()
    expect((await client.ask(option.list, 'x')).map((reply) => reply.type)).toEqual([optionReply.errorInvalid])
    for (const number of [option.structuredReply, option.extendedHeaders])
      expect((await client.ask(number, 'x')).map((reply) => reply.type)).toEqual([optionReply.errorInvalid])
    await client.go('disk')
    await expectTransmission(client)
  })

  it('rule 4: acknowledges ABORT whatever comes with it, and closes', async () => {
    for (const data of ['', 'x'.repeat(1000)]) {
      await using client = await raw()
      await client.greet()
      expect(await lastReply(client, option.abort, data)).toBe(optionReply.ack)
      await client.receiveEnd()
    }
  })

  it('rule 5: refuses GO whose name length or count does not fit, and stays in step', async () => {
    await using client = await raw()
    await client.greet()
    const good = encodeInfoRequest('disk', [1, 2])
    for (const [at, value] of [
      [3, 9],
      [0, 0xff],
      [9, 3],
      [9, 1],
    ] as const) {
      const bad = Buffer.from(good)
      bad[at] = value
      for (const number of [option.go, option.info]) expect(await lastReply(client, number, bad)).toBe(optionReply.errorInvalid)
    }
    await client.go('disk')
    await expectTransmission(client)
  })

  it('rule 6: says the same size and flags in INFO as in GO', async () => {
    const shown = await info(fixture.uri())
    await using connection = await connect(fixture.uri())
    expect(shown).toMatchObject(connection.info)
    expect(shown.sizeBytes).toBe(8 * MiB)
  })

  it('rule 7: sets HAS_FLAGS always, and DF only with structured replies', async () => {
    await using structured = await connect(fixture.uri())
    await using simple = await connect(fixture.uri(), { structuredReplies: false })
    expect(structured.flags).toMatchObject({
      df: true,
      flush: true,
      fua: true,
      trim: true,
      writeZeroes: true,
      multiConn: true,
      cache: true,
      fastZero: true,
      rotational: false,
      blockStatusPayload: false,
      readOnly: false,
    })
    expect(simple.info.transmissionFlags).toBe(structured.info.transmissionFlags & ~transmissionFlag.df)
    await using extended = await connect(fixture.uri(), { extendedHeaders: true })
    expect(extended.info.transmissionFlags).toBe(structured.info.transmissionFlags)
  })

  it('rule 8: never pads after GO, and after EXPORT_NAME only without NO_ZEROES', async () => {
    for (const flags of [0, 1, 2, 3]) {
      await using byGo = await raw()
      await byGo.greet(flags)
      await byGo.go('disk')
      await expectTransmission(byGo)
      await using byName = await raw()
      await byName.greet(flags)
      byName.sendOption(option.exportName, 'disk')
      const answer = await byName.receive(10)
      expect(answer.readBigUInt64BE(0)).toBe(BigInt(8 * MiB))
      const padding = (flags & 2) === 0 ? 124 : 0
      expect((await byName.receive(padding)).equals(Buffer.alloc(padding))).toBe(true)
      await expectTransmission(byName)
    }
  })

  it('rules 9 and 10: shows block sizes to who asks, ignores unknown info requests, and never insists', async () => {
    await using client = await raw()
    await client.greet()
    const replies = await client.ask(option.info, encodeInfoRequest('disk', [infoItem.blockSize, 999, 65535]))
    expect(replies.map((reply) => reply.type)).toEqual([optionReply.info, optionReply.info, optionReply.ack])
    expect((await info(fixture.uri())).blockSizes).toEqual({ minimumBytes: 1, preferredBytes: 4096, maximumBytes: 32 * MiB })
    expect((await client.ask(option.go, encodeInfoRequest('disk', []))).map((reply) => reply.type)).toEqual([
      optionReply.info,
      optionReply.ack,
    ])
    await expectTransmission(client)
  })

  it('rule 11: takes names without NUL, in UTF-8, of at most 4096 bytes', async () => {
    await using client = await raw()
    await client.greet()
    const named = (name: Buffer): Buffer =>
      Buffer.concat([Buffer.from([0, 0, name.length >> 8, name.length & 0xff]), name, Buffer.alloc(2)])
    for (const name of [Buffer.from('disk\0'), Buffer.from([0x64, 0xff]), Buffer.alloc(4097, 0x61)]) {
      expect(await lastReply(client, option.go, named(name))).toBe(optionReply.errorInvalid)
    }
    expect(await lastReply(client, option.go, named(Buffer.alloc(4096, 0x61)))).toBe(optionReply.errorUnknown)
    await client.go('disk')
    await expectTransmission(client)
    for (const name of ['disk\0', 'other', 'x'.repeat(5000)]) {
      await using byName = await raw()
      await byName.greet()
      byName.sendOption(option.exportName, name)
      await byName.receiveEnd()
    }
  })

  it('rule 12: answers STARTTLS with ERR_UNSUP and never asks for TLS', async () => {
    await using client = await raw()
    await client.greet()
    expect(await lastReply(client, 5)).toBe(optionReply.errorUnsupported)
    await client.go('disk')
    await expectTransmission(client)
  })

  it('rule 13: selects each metadata context once, drops the selection when SET fails, and ties it to the export', async () => {
    const { device } = await fixture.openDevice()
    fixture.exports.add('other', device)
    const status = async (steps: (client: RawNbdConnection) => Promise<void>, exportName = 'disk'): Promise<number> => {
      await using client = await raw()
      await client.greet()
      expect(await lastReply(client, option.structuredReply)).toBe(optionReply.ack)
      await steps(client)
      await client.go(exportName)
      client.sendRequest({ flags: 0, command: command.blockStatus, cookie: 1n, offsetBytes: 0, lengthBytes: 4096 })
      const header = await client.receiveReplyHeader()
      return header.kind === 'structured' ? header.type : -1
    }
    const set = async (client: RawNbdConnection, queries: string[], name = 'disk'): Promise<number[]> =>
      (await client.ask(option.setMetaContext, encodeMetaContextRequest(name, queries))).map((reply) => reply.type)

    const twice = await status(async (client) => {
      expect(await set(client, ['base:allocation', 'base:allocation'])).toEqual([optionReply.metaContext, optionReply.ack])
    })
    expect(twice).toBe(protocol.chunkType.blockStatus)
    const failed = await status(async (client) => {
      await set(client, ['base:allocation'])
      expect(await set(client, ['base:allocation'], 'missing')).toEqual([optionReply.errorUnknown])
    })
    expect(failed).toBe(protocol.chunkType.error)
    expect(await status(async (client) => void (await set(client, ['base:allocation'])), 'other')).toBe(protocol.chunkType.error)
    expect(await status(async (client) => void (await set(client, ['base:'])))).toBe(protocol.chunkType.error)
    expect(await status(async (client) => void (await set(client, ['qemu:'])))).toBe(protocol.chunkType.error)
  })

  it('rule 29: after extended headers there is no STRUCTURED_REPLY and no EXPORT_NAME, and GO leads to them', async () => {
    await using client = await raw()
    await client.greet()
    expect(await lastReply(client, option.structuredReply)).toBe(optionReply.ack)
    expect(await lastReply(client, option.extendedHeaders)).toBe(optionReply.ack)
    expect(await lastReply(client, option.structuredReply)).toBe(optionReply.errorExtendedHeadersRequired)
    await client.go('disk')
    const request = { flags: 0, command: command.read, cookie: 5n, offsetBytes: 4096, lengthBytes: 512 }
    client.sendExtendedRequest(request)
    expect(await client.receiveReplyHeader()).toMatchObject({ kind: 'extended', cookie: 5n, offsetBytes: 4096n, flags: 1 })
    await using byName = await raw()
    await byName.greet()
    expect(await lastReply(byName, option.extendedHeaders)).toBe(optionReply.ack)
    byName.sendOption(option.exportName, 'disk')
    await byName.receiveEnd()
  })
})

describe('the bounds of the handshake', () => {
  it('data over 64 KiB is consumed and refused; far more, and the connection is closed', async () => {
    await using client = await raw()
    await client.greet()
    expect(await lastReply(client, option.list, Buffer.alloc(65537))).toBe(optionReply.errorTooBig)
    expect(await lastReply(client, 77, Buffer.alloc(MiB))).toBe(optionReply.errorTooBig)
    await client.go('disk')
    await expectTransmission(client)
    await using greedy = await raw()
    await greedy.greet()
    greedy.sendOption(option.list, '', 0xffffffff)
    await greedy.receiveEnd()
  })

  it('a client that never finishes is closed after the timeout, whatever it sends meanwhile', async () => {
    await fixture.server.close()
    // However many options a quick machine answers in that time: the time is what ends it.
    await fixture.startServer({ limits: { handshakeTimeoutMs: 2000, optionCountMax: Number.MAX_SAFE_INTEGER } })
    const { device } = await fixture.openDevice()
    for (let index = 0; index < 1000; index += 1)
      fixture.exports.add(`export-${index}`, device, { description: 'd'.repeat(4096) })
    await using silent = await raw()
    await using busy = await raw()
    await using deaf = await raw()
    await silent.receiveGreeting()
    deaf.sendClientFlags(3)
    // Answers to these fill every buffer between the two: the server waits in a write, not in a read.
    for (let index = 0; index < 10; index += 1) deaf.sendOption(option.list)
    const keepAsking = async (): Promise<never> => {
      await busy.greet()
      for (;;) await busy.ask(99)
    }
    await expect(keepAsking()).rejects.toMatchObject({ code: 'NBD_CONNECTION_LOST' })
    await silent.receiveEnd()
    await using other = await connect(fixture.uri())
    expect((await other.read(0, 512)).length).toBe(512)
  })

  it('a client that has finished is not bound by the timeout', async () => {
    await fixture.server.close()
    await fixture.startServer({ limits: { handshakeTimeoutMs: 2000 } })
    await using early = await connect(fixture.uri())
    await using late = await raw()
    await late.receiveGreeting()
    await late.receiveEnd()
    expect((await early.read(0, 512)).length).toBe(512)
  })

  it('too many options end the negotiation', async () => {
    await fixture.server.close()
    await fixture.startServer({ limits: { optionCountMax: 5 } })
    await using client = await raw()
    await client.greet()
    for (let count = 0; count < 5; count += 1) expect(await lastReply(client, 99)).toBe(optionReply.errorUnsupported)
    client.sendOption(99)
    await client.receiveEnd()
  })

  it('a list of many exports comes as a whole', async () => {
    const { device } = await fixture.openDevice()
    for (let index = 0; index < 2000; index += 1) fixture.exports.add(`export-${index}`, device, { description: 'd'.repeat(200) })
    expect(await list(fixture.target)).toHaveLength(2001)
  })
})
