import { mkdtemp, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { connect, info, list } from './index.ts'
import type { NbdConnectOptions, NbdError, NbdReplyError } from './index.ts'
import {
  chunkFlag,
  chunkType,
  greetingMagic,
  infoItem,
  newstyleMagic,
  option,
  optionReply,
  transmissionFlag,
} from './protocol.ts'
import { startScriptedServer } from './testing/index.ts'
import type { ScriptedPeer } from './testing/index.ts'

let directory: string
let server: Awaited<ReturnType<typeof startScriptedServer>> | null = null

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'nbd-scripted-'))
})
afterEach(async () => {
  await server?.close()
  server = null
  await rm(directory, { recursive: true, force: true })
})

const target = (): { path: string } => ({ path: join(directory, 'nbd.sock') })

async function serve(script: (peer: ScriptedPeer, connectionIndex: number) => Promise<void>): Promise<void> {
  server = await startScriptedServer(target().path, script)
}

function uint64(value: number): Buffer {
  const bytes = Buffer.alloc(8)
  bytes.writeBigUInt64BE(BigInt(value), 0)
  return bytes
}
function uint32(value: number): Buffer {
  const bytes = Buffer.alloc(4)
  bytes.writeUInt32BE(value, 0)
  return bytes
}
function uint16(value: number): Buffer {
  const bytes = Buffer.alloc(2)
  bytes.writeUInt16BE(value, 0)
  return bytes
}
const dataChunk = (offsetBytes: number, text: string): Buffer => Buffer.concat([uint64(offsetBytes), Buffer.from(text)])
const holeChunk = (offsetBytes: number, lengthBytes: number): Buffer => Buffer.concat([uint64(offsetBytes), uint32(lengthBytes)])
const errorChunk = (errno: number, message: string): Buffer =>
  Buffer.concat([uint32(errno), uint16(message.length), Buffer.from(message)])

describe('a greeting', () => {
  it.each([
    ['that is not NBD', Buffer.from('SSH-2.0-OpenSSH_9.2 a'), 'NBD_PROTOCOL'],
    ['with a wrong style', Buffer.concat([uint64(0), uint64(0), uint16(3)]), 'NBD_PROTOCOL'],
  ])('%s ends the attempt', async (_, bytes, code) => {
    await serve(async (peer) => peer.send(bytes))
    await expect(connect(target())).rejects.toMatchObject({ code, retryable: false })
  })

  it('that stops in the middle is a lost connection', async () => {
    await serve(async (peer) => {
      peer.send(uint64(0))
      peer.stream.finishWriting()
    })
    await expect(connect(target())).rejects.toMatchObject({ code: 'NBD_CONNECTION_LOST', retryable: true })
  })

  it('that never comes is given up after connectTimeoutMs', async () => {
    await serve(async () => {})
    await expect(connect(target(), { connectTimeoutMs: 50 })).rejects.toMatchObject({ code: 'NBD_CONNECT_TIMEOUT' })
  })

  it('is no longer waited for when the caller gives up', async () => {
    await serve(async () => {})
    const giveUp = new AbortController()
    const connecting = connect(target(), { signal: giveUp.signal })
    giveUp.abort()
    await expect(connecting).rejects.toMatchObject({ code: 'NBD_ABORTED' })
  })

  it('needs a server: nothing there is NBD_CONNECT_FAILED with the reason', async () => {
    await expect(connect(target())).rejects.toMatchObject({
      code: 'NBD_CONNECT_FAILED',
      retryable: true,
      cause: { code: 'ENOENT' },
    })
  })
})

describe('an option reply', () => {
  const cases: [string, (peer: ScriptedPeer) => void][] = [
    ['with a wrong magic', (peer) => peer.send(Buffer.alloc(20, 7))],
    ['for another option', (peer) => peer.sendOptionReply(option.list, optionReply.ack)],
    [
      'longer than any string',
      (peer) =>
        peer.send(
          Buffer.concat([
            Buffer.from('0003e889045565a9', 'hex'),
            uint32(option.structuredReply),
            uint32(optionReply.ack),
            uint32(0xffffffff),
          ]),
        ),
    ],
    ['of an unexpected type', (peer) => peer.sendOptionReply(option.structuredReply, optionReply.server, uint32(0))],
    ['that acknowledges with data', (peer) => peer.sendOptionReply(option.structuredReply, optionReply.ack, uint32(0))],
  ]
  it.each(cases)('%s ends the attempt', async (_, answer) => {
    await serve(async (peer) => {
      await peer.sendGreeting()
      await peer.receiveOption()
      answer(peer)
    })
    await expect(connect(target())).rejects.toMatchObject({ code: 'NBD_PROTOCOL' })
  })

  const infoCases: [string, (peer: ScriptedPeer) => void][] = [
    ['an acknowledgement without a size', () => {}],
    ['a size item of the wrong length', (peer) => peer.sendOptionReply(option.go, optionReply.info, Buffer.alloc(11))],
    ['flags without HAS_FLAGS', (peer) => peer.sendExportInfo(option.go, 512, 0)],
    [
      'a block size that is no power of two',
      (peer) =>
        peer.sendOptionReply(
          option.go,
          optionReply.info,
          Buffer.concat([uint16(infoItem.blockSize), uint32(3), uint32(4096), uint32(65536)]),
        ),
    ],
    ['an info item without a number', (peer) => peer.sendOptionReply(option.go, optionReply.info, Buffer.alloc(1))],
  ]
  it.each(infoCases)('to GO with %s ends the attempt', async (_, answer) => {
    await serve(async (peer) => {
      await peer.sendGreeting()
      await peer.receiveOption()
      peer.sendOptionReply(option.structuredReply, optionReply.errorUnsupported)
      await peer.receiveOption()
      answer(peer)
      peer.sendOptionReply(option.go, optionReply.ack)
    })
    await expect(connect(target())).rejects.toMatchObject({ code: 'NBD_PROTOCOL' })
  })

  it('of more than 2^53 bytes is refused', async () => {
    await serve(async (peer) => {
      await peer.sendGreeting(0)
      await peer.receiveOption()
      peer.send(Buffer.concat([Buffer.alloc(8, 0xff), uint16(transmissionFlag.hasFlags), Buffer.alloc(124)]))
    })
    await expect(connect(target())).rejects.toMatchObject({ code: 'NBD_UNSUPPORTED' })
  })

  it('with unknown info items is read past them', async () => {
    await serve(async (peer) => {
      await peer.sendGreeting()
      await peer.receiveOption()
      peer.sendOptionReply(option.structuredReply, optionReply.errorUnsupported)
      await peer.receiveOption()
      peer.sendOptionReply(option.go, optionReply.info, Buffer.concat([uint16(999), Buffer.alloc(50)]))
      peer.sendExportInfo(option.go, 4096, transmissionFlag.hasFlags)
      peer.sendOptionReply(option.go, optionReply.ack)
    })
    const connection = await connect(target())
    expect(connection.sizeBytes).toBe(4096)
    connection.destroy()
  })

  it('that refuses the export carries the server’s words', async () => {
    await serve(async (peer) => {
      await peer.sendGreeting()
      for (;;) {
        const { option: number } = await peer.receiveOption()
        peer.sendOptionReply(
          number,
          number === option.go ? optionReply.errorPolicy : optionReply.errorUnsupported,
          Buffer.from('not for you'),
        )
      }
    })
    await expect(connect(target())).rejects.toMatchObject({
      code: 'NBD_OPTION_REFUSED',
      replyName: 'errorPolicy',
      serverMessage: 'not for you',
    })
  })

  it('of a server that knows neither GO nor INFO leads to EXPORT_NAME, with its padding', async () => {
    const script = async (peer: ScriptedPeer): Promise<void> => {
      await peer.sendGreeting(1)
      for (;;) {
        const { option: number, data } = await peer.receiveOption()
        if (number !== option.exportName) {
          peer.sendOptionReply(number, number === option.abort ? optionReply.ack : optionReply.errorUnsupported)
          continue
        }
        expect(data.toString()).toBe('disk')
        peer.send(Buffer.concat([uint64(8192), uint16(transmissionFlag.hasFlags), Buffer.alloc(124)]))
        break
      }
      const request = await peer.receiveRequest()
      peer.sendSimpleReply(request.cookie, 0, Buffer.from('data'))
    }
    await serve(script)
    const connection = await connect(target(), { exportName: 'disk' })
    expect(Buffer.from(await connection.read(0, 4)).toString()).toBe('data')
    connection.destroy()
  })

  it('to LIST with a name longer than the reply ends the listing', async () => {
    await serve(async (peer) => {
      await peer.sendGreeting()
      await peer.receiveOption()
      peer.sendOptionReply(option.list, optionReply.server, Buffer.concat([uint32(100), Buffer.from('short')]))
      peer.sendOptionReply(option.list, optionReply.ack)
    })
    await expect(list(target())).rejects.toMatchObject({ code: 'NBD_PROTOCOL' })
  })

  it('that never ends is not waited for longer than connectTimeoutMs', async () => {
    await serve(async (peer) => {
      await peer.sendGreeting()
      await peer.receiveOption()
    })
    await expect(info(target(), { connectTimeoutMs: 50 })).rejects.toMatchObject({ code: 'NBD_CONNECT_TIMEOUT' })
  })

  it('that gives one id to two contexts ends the attempt', async () => {
    await serve(async (peer) => {
      await peer.sendGreeting()
      await peer.receiveOption()
      peer.sendOptionReply(option.structuredReply, optionReply.ack)
      await peer.receiveOption()
      for (const name of ['base:allocation', 'x-other:leaf'])
        peer.sendOptionReply(option.setMetaContext, optionReply.metaContext, Buffer.concat([uint32(1), Buffer.from(name)]))
      peer.sendOptionReply(option.setMetaContext, optionReply.ack)
    })
    await expect(connect(target(), { metaContexts: ['base:allocation', 'x-other:leaf'] })).rejects.toMatchObject({
      code: 'NBD_PROTOCOL',
    })
  })
})

describe('a structured read', () => {
  type Chunk = [flags: number, type: number, data: Buffer]
  const done = chunkFlag.done

  async function readAnsweredWith(chunks: Chunk[], lengthBytes = 8, df = false): Promise<Uint8Array> {
    await serve(async (peer) => {
      await peer.negotiate({ sizeBytes: 65536, structuredReplies: true, flags: transmissionFlag.df })
      const request = await peer.receiveRequest()
      for (const [flags, type, data] of chunks) peer.sendChunk(request.cookie, flags, type, data)
    })
    const connection = await connect(target())
    try {
      return await connection.read(1000, lengthBytes, { df })
    } finally {
      connection.destroy()
    }
  }

  it('puts chunks together that come in any order, with holes between', async () => {
    const data = await readAnsweredWith([
      [0, chunkType.offsetData, dataChunk(1006, 'gh')],
      [0, chunkType.offsetHole, holeChunk(1002, 4)],
      [0, chunkType.offsetData, dataChunk(1000, 'ab')],
      [done, chunkType.none, Buffer.alloc(0)],
    ])
    expect(Buffer.from(data).toString()).toBe('ab\0\0\0\0gh')
  })

  const violations: [string, Chunk[]][] = [
    ['data before the request', [[done, chunkType.offsetData, dataChunk(999, 'abcdefgh')]]],
    ['data past the request', [[done, chunkType.offsetData, dataChunk(1001, 'abcdefgh')]]],
    ['more data than asked for', [[done, chunkType.offsetData, dataChunk(1000, 'abcdefghi')]]],
    ['a hole past the request', [[done, chunkType.offsetHole, holeChunk(1004, 5)]]],
    ['an offset that wraps around', [[done, chunkType.offsetHole, Buffer.concat([Buffer.alloc(8, 0xff), uint32(8)])]]],
    [
      'overlapping chunks',
      [
        [0, chunkType.offsetData, dataChunk(1000, 'abcde')],
        [done, chunkType.offsetHole, holeChunk(1004, 4)],
      ],
    ],
    [
      'a gap',
      [
        [0, chunkType.offsetData, dataChunk(1000, 'abc')],
        [done, chunkType.offsetData, dataChunk(1004, 'efgh')],
      ],
    ],
    ['nothing at all', [[done, chunkType.none, Buffer.alloc(0)]]],
    [
      'an empty data chunk',
      [
        [0, chunkType.offsetData, dataChunk(1000, '')],
        [done, chunkType.offsetData, dataChunk(1000, 'abcdefgh')],
      ],
    ],
    [
      'an empty hole',
      [
        [0, chunkType.offsetHole, holeChunk(1000, 0)],
        [done, chunkType.offsetData, dataChunk(1000, 'abcdefgh')],
      ],
    ],
    ['a none chunk in the middle', [[0, chunkType.none, Buffer.alloc(0)]]],
    ['a none chunk with data', [[done, chunkType.none, Buffer.alloc(1)]]],
    ['an unknown chunk', [[done, 77, Buffer.alloc(8)]]],
    ['block status', [[done, chunkType.blockStatus, Buffer.concat([uint32(7), uint32(8), uint32(0)])]]],
    ['an error chunk that is too short', [[done, chunkType.error, Buffer.alloc(5, 1)]]],
    ['an error without an errno', [[done, chunkType.error, errorChunk(0, '')]]],
    ['an error message longer than its chunk', [[done, chunkType.error, Buffer.concat([uint32(5), uint16(99)])]]],
  ]
  it.each(violations)('that is answered with %s ends the connection with NBD_PROTOCOL', async (_, chunks) => {
    await expect(readAnsweredWith(chunks)).rejects.toMatchObject({ code: 'NBD_PROTOCOL' })
  })

  it('with DF takes one chunk only', async () => {
    const halves: Chunk[] = [
      [0, chunkType.offsetData, dataChunk(1000, 'abcd')],
      [done, chunkType.offsetData, dataChunk(1004, 'efgh')],
    ]
    await expect(readAnsweredWith(halves, 8, true)).rejects.toMatchObject({ code: 'NBD_PROTOCOL' })
  })

  it('fails with the first error, its message and its place', async () => {
    const failing = readAnsweredWith([
      [0, chunkType.offsetData, dataChunk(1000, 'ab')],
      [0, chunkType.errorOffset, Buffer.concat([errorChunk(5, 'bad sector'), uint64(1002)])],
      [done, chunkType.error, errorChunk(22, 'later')],
    ])
    await expect(failing).rejects.toMatchObject({ errnoName: 'EIO', serverMessage: 'bad sector', offsetBytes: 1002 })
  })

  it('takes an unknown kind of error for an error', async () => {
    await expect(readAnsweredWith([[done, 0x8123, errorChunk(28, '')]])).rejects.toMatchObject({ errnoName: 'ENOSPC' })
  })

  it('that is answered in the simple way ends the connection', async () => {
    await serve(async (peer) => {
      await peer.negotiate({ sizeBytes: 65536, structuredReplies: true })
      peer.sendSimpleReply((await peer.receiveRequest()).cookie, 22)
    })
    const connection = await connect(target())
    await expect(connection.read(0, 8)).rejects.toMatchObject({ code: 'NBD_PROTOCOL' })
  })
})

describe('a block status', () => {
  async function statusAnsweredWith(chunks: Buffer[], reqOne = false): Promise<unknown> {
    await serve(async (peer) => {
      await peer.negotiate({ sizeBytes: 65536, structuredReplies: true })
      const request = await peer.receiveRequest()
      chunks.forEach((data, index) =>
        peer.sendChunk(
          request.cookie,
          index === chunks.length - 1 ? chunkFlag.done : 0,
          data.length === 0 ? chunkType.none : chunkType.blockStatus,
          data,
        ),
      )
    })
    const connection = await connect(target(), { metaContexts: ['base:allocation'] })
    try {
      return Object.fromEntries(await connection.blockStatus(100, 1000, { reqOne }))
    } finally {
      connection.destroy()
    }
  }
  const status = (context: number, ...extents: [number, number][]): Buffer =>
    Buffer.concat([uint32(context), ...extents.flatMap(([length, flags]) => [uint32(length), uint32(flags)])])

  it('gives the extents with their offsets; the last may reach past the request', async () => {
    expect(await statusAnsweredWith([status(7, [400, 0], [5000, 3])])).toEqual({
      'base:allocation': [
        { offsetBytes: 100, lengthBytes: 400, flags: 0 },
        { offsetBytes: 500, lengthBytes: 5000, flags: 3 },
      ],
    })
  })

  const violations: [string, Buffer[], boolean][] = [
    ['a context nobody asked for', [status(8, [1000, 0])], false],
    ['one context twice', [status(7, [1000, 0]), status(7, [1000, 0])], false],
    ['an extent of no length', [status(7, [0, 0], [1000, 0])], false],
    ['extents that start past the request', [status(7, [1000, 0], [1, 0])], false],
    ['no extents', [status(7)], false],
    ['a broken length', [status(7, [1000, 0]).subarray(0, 11)], false],
    ['no context', [Buffer.alloc(0)], false],
    ['two extents when one was asked for', [status(7, [10, 0], [20, 3])], true],
    ['an extent past the request when one was asked for', [status(7, [1001, 0])], true],
  ]
  it.each(violations)('with %s ends the connection with NBD_PROTOCOL', async (_, chunks, reqOne) => {
    await expect(statusAnsweredWith(chunks, reqOne)).rejects.toMatchObject({ code: 'NBD_PROTOCOL' })
  })
})

describe('a connection', () => {
  async function transmission(script: (peer: ScriptedPeer) => Promise<void>, options: NbdConnectOptions = {}) {
    await serve(async (peer) => {
      await peer.negotiate({ sizeBytes: 1 << 20, flags: transmissionFlag.flush })
      await script(peer)
    })
    return connect(target(), options)
  }

  it('takes answers in any order', async () => {
    const connection = await transmission(async (peer) => {
      const requests = [await peer.receiveRequest(), await peer.receiveRequest(), await peer.receiveRequest()]
      for (const request of requests.toReversed())
        peer.sendSimpleReply(request.cookie, 0, Buffer.alloc(request.lengthBytes, request.lengthBytes))
    })
    const read = await Promise.all([1, 2, 3].map((lengthBytes) => connection.read(0, lengthBytes)))
    expect(read.map((data) => Buffer.from(data).toString('hex'))).toEqual(['01', '0202', '030303'])
    connection.destroy()
  })

  it.each([
    ['an answer to nothing that was asked', (peer: ScriptedPeer) => peer.sendSimpleReply(4711n, 0)],
    ['a wrong magic', (peer: ScriptedPeer) => peer.send(Buffer.alloc(16, 1))],
    ['a structured reply that was not negotiated', (peer: ScriptedPeer) => peer.sendChunk(1n, 1, 0, Buffer.alloc(0))],
  ])('ends with NBD_PROTOCOL at %s', async (_, answer) => {
    const connection = await transmission(async (peer) => {
      await peer.receiveRequest()
      answer(peer)
    })
    await expect(connection.read(0, 8)).rejects.toMatchObject({ code: 'NBD_PROTOCOL' })
    expect(await connection.closed).toMatchObject({ code: 'NBD_PROTOCOL' })
  })

  it('rejects everything in flight, and what waits, when the server closes', async () => {
    const connection = await transmission(
      async (peer) => {
        await peer.receiveRequest()
        peer.stream.destroy()
      },
      { inFlightMax: 2 },
    )
    const outcomes = await Promise.allSettled([connection.read(0, 8), connection.read(0, 8), connection.read(0, 8)])
    expect(outcomes.map((outcome) => (outcome.status === 'rejected' ? (outcome.reason as NbdError).code : 'done'))).toEqual([
      'NBD_CONNECTION_LOST',
      'NBD_CONNECTION_LOST',
      'NBD_CLOSED',
    ])
  })

  it('rejects a read whose data stops in the middle', async () => {
    const connection = await transmission(async (peer) => {
      peer.sendSimpleReply((await peer.receiveRequest()).cookie, 0, Buffer.alloc(10))
      peer.stream.finishWriting()
    })
    await expect(connection.read(0, 100)).rejects.toMatchObject({ code: 'NBD_CONNECTION_LOST' })
  })

  it('never has more requests or bytes under way than its bounds', async () => {
    let under = 0
    let most = 0
    const connection = await transmission(
      async (peer) => {
        const unanswered: { cookie: bigint; lengthBytes: number }[] = []
        for (let count = 0; count < 30;) {
          // Everything that may be sent is sent before the first answer.
          while (under < 3 && count + unanswered.length < 30) {
            unanswered.push(await peer.receiveRequest())
            under += 1
            most = Math.max(most, under)
          }
          const request = unanswered.shift()!
          under -= 1
          count += 1
          peer.sendSimpleReply(request.cookie, 0, Buffer.alloc(request.lengthBytes))
        }
      },
      { inFlightMax: 100, inFlightBytesMax: 3000 },
    )
    const reads = Array.from({ length: 30 }, () => connection.read(0, 1000))
    expect(connection.inFlightCount).toBe(3)
    await Promise.all(reads)
    expect(most).toBe(3)
    connection.destroy()
  })

  it('refuses what would wait beyond its bound', async () => {
    const connection = await transmission(async () => {}, { inFlightMax: 1, waitingMax: 1 })
    const first = connection.read(0, 8)
    const second = connection.read(0, 8)
    await expect(connection.read(0, 8)).rejects.toMatchObject({ code: 'NBD_QUEUE_FULL' })
    connection.destroy()
    await expect(first).rejects.toMatchObject({ code: 'NBD_CONNECTION_LOST' })
    await expect(second).rejects.toMatchObject({ code: 'NBD_CLOSED' })
  })

  it('takes an errno that the protocol does not have for what it is', async () => {
    const connection = await transmission(async (peer) => peer.sendSimpleReply((await peer.receiveRequest()).cookie, 4242))
    const error: NbdReplyError = await connection.flush().then(
      () => expect.unreachable(),
      (reason: NbdReplyError) => reason,
    )
    expect(error).toMatchObject({ errno: 4242, errnoName: 'UNKNOWN_4242' })
    connection.destroy()
  })

  it('sends nothing that the server has not offered and nothing that does not fit', async () => {
    const connection = await transmission(async () => {})
    await expect(connection.trim(0, 4096)).rejects.toMatchObject({ code: 'NBD_NOT_OFFERED' })
    await expect(connection.writeZeroes(0, 4096)).rejects.toMatchObject({ code: 'NBD_NOT_OFFERED' })
    await expect(connection.cache(0, 4096)).rejects.toMatchObject({ code: 'NBD_NOT_OFFERED' })
    await expect(connection.write(0, new Uint8Array(1), { fua: true })).rejects.toMatchObject({ code: 'NBD_NOT_OFFERED' })
    await expect(connection.blockStatus(0, 4096)).rejects.toMatchObject({ code: 'NBD_NOT_OFFERED' })
    await expect(connection.read(-1, 1)).rejects.toMatchObject({ code: 'NBD_REQUEST_INVALID' })
    await expect(connection.read(0.5, 1)).rejects.toMatchObject({ code: 'NBD_REQUEST_INVALID' })
    await expect(connection.read(0, 32 * 1024 * 1024 + 1)).rejects.toMatchObject({ code: 'NBD_REQUEST_INVALID' })
    await expect(connection.read(2 ** 53, 1)).rejects.toMatchObject({ code: 'NBD_REQUEST_INVALID' })
    connection.destroy()
  })

  it('is closed by us when the server does not after disconnect', async () => {
    const connection = await transmission(async () => {}, { disconnectTimeoutMs: 20 })
    await connection.disconnect()
    expect(await connection.closed).toBeNull()
  })

  it('keeps the greeting constants that the protocol prints', () => {
    expect(
      uint64(Number(greetingMagic >> 32n))
        .subarray(4)
        .toString(),
    ).toBe('NBDM')
    expect(
      uint64(Number(newstyleMagic >> 32n))
        .subarray(4)
        .toString(),
    ).toBe('IHAV')
  })
})
