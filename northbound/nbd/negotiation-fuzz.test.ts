/**
 * Random and mutated option streams, for ATOLL_FUZZ_MS (default 5 s). Whatever comes, the server neither crashes nor hangs,
 * answers nobody else wrongly, and forgets the connection. A run is replayed with ATOLL_FUZZ_SEED.
 */
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import {
  connect,
  connectRaw,
  encodeExtendedRequest,
  encodeInfoRequest,
  encodeMetaContextRequest,
  encodeOption,
  encodeRequest,
  protocol,
} from '@atoll/nbd-client'
import { NbdFixture } from './testing/nbd-fixture.ts'

const { option } = protocol

/** So many in any case, however slow the machine is. */
const streamCountMin = 10
const durationMs = Number(process.env['ATOLL_FUZZ_MS'] ?? 5_000)
const seed = Number(process.env['ATOLL_FUZZ_SEED'] ?? 20_261_121)

/** mulberry32: small, and the same everywhere. */
function generator(start: number): (below: number) => number {
  let state = start >>> 0
  return (below) => {
    state = (state + 0x6d2b79f5) >>> 0
    let mixed = Math.imul(state ^ (state >>> 15), state | 1)
    mixed ^= mixed + Math.imul(mixed ^ (mixed >>> 7), mixed | 61)
    return Math.floor((((mixed ^ (mixed >>> 14)) >>> 0) / 2 ** 32) * below)
  }
}

type Random = (below: number) => number

function randomBytes(random: Random, lengthBytes: number): Buffer {
  const bytes = Buffer.alloc(lengthBytes)
  for (let index = 0; index < lengthBytes; index += 1) bytes[index] = random(256)
  return bytes
}

const names = ['disk', 'disk', 'disk', '', 'other', 'disk\0', 'ä'.repeat(100), 'x'.repeat(4097)]
const queries = [
  'base:allocation',
  'qemu:allocation-depth',
  'qemu:dirty-bitmap:',
  'qemu:',
  'base:',
  'x-y:z',
  '',
  'q'.repeat(5000),
  'a\0b',
]

function randomOption(random: Random): Buffer {
  const name = names[random(names.length)]!
  switch (random(9)) {
    case 0:
      return encodeOption(option.list, randomBytes(random, random(4) === 0 ? random(100) : 0))
    case 1:
      return encodeOption(random(2) === 0 ? option.structuredReply : option.extendedHeaders, Buffer.alloc(0))
    case 2:
    case 3:
      return encodeOption(
        random(2) === 0 ? option.info : option.go,
        encodeInfoRequest(
          name,
          Array.from({ length: random(6) }, () => random(5)),
        ),
      )
    case 4:
    case 5:
      return encodeOption(
        random(2) === 0 ? option.setMetaContext : option.listMetaContext,
        encodeMetaContextRequest(
          name,
          Array.from({ length: random(5) }, () => queries[random(queries.length)]!),
        ),
      )
    case 6:
      return encodeOption(random(20), randomBytes(random, random(200)))
    case 7:
      return encodeOption(random(8) === 0 ? option.exportName : random(2 ** 32), Buffer.from(name))
    default: {
      const lengthBytes = [0, 1, 65535, 65536, 65537, 100_000, 2 ** 20 + 1, 2 ** 31, 2 ** 32 - 1][random(9)]!
      return encodeOption(1 + random(12), Buffer.alloc(Math.min(lengthBytes, 200_000)), lengthBytes)
    }
  }
}

function randomStream(random: Random): Buffer {
  const flags = Buffer.alloc(4)
  flags.writeUInt32BE(random(10) === 0 ? random(2 ** 32) : random(4), 0)
  const parts = [flags, ...Array.from({ length: random(12) }, () => randomOption(random))]
  if (random(3) === 0)
    parts.push(
      (random(2) === 0 ? encodeRequest : encodeExtendedRequest)({
        flags: random(64),
        command: random(9),
        cookie: 1n,
        offsetBytes: random(2 ** 24),
        lengthBytes: random(2 ** 20),
      }),
    )
  const stream = Buffer.concat(parts)
  // A stream that is good is mutated half of the time: bytes changed, cut out, doubled.
  if (random(2) === 0 && stream.length > 5) {
    for (let count = 1 + random(4); count > 0; count -= 1) stream[random(stream.length)] = random(4) === 0 ? 0xff : random(256)
  }
  const cut = random(4) === 0 ? random(stream.length) : stream.length
  return random(6) === 0
    ? Buffer.concat([stream.subarray(0, cut), stream.subarray(random(stream.length))])
    : stream.subarray(0, cut)
}

let fixture: NbdFixture
beforeEach(async () => {
  fixture = await NbdFixture.start({ server: { limits: { handshakeTimeoutMs: 10_000 } } })
})
afterEach(async () => {
  await fixture.close()
})

describe('the negotiation under fuzz', () => {
  it(
    `survives every stream (ATOLL_FUZZ_SEED=${seed}), and serves others meanwhile and afterwards`,
    async () => {
      await using steady = await connect(fixture.uri())
      await steady.write(0, Buffer.from('steady'))
      const deadline = performance.now() + durationMs
      let streamCount = 0
      const worker = async (workerIndex: number): Promise<void> => {
        for (let round = 0; performance.now() < deadline || streamCount <= streamCountMin; round += 1) {
          const streamSeed = (seed + workerIndex * 0x1000003 + round * 0x9e3779b1) >>> 0
          const random = generator(streamSeed)
          const client = await connectRaw(fixture.target)
          const stream = randomStream(random)
          for (let at = 0; at < stream.length;) {
            const lengthBytes = 1 + random(random(3) === 0 ? 40 : 70_000)
            client.send(stream.subarray(at, at + lengthBytes))
            at += lengthBytes
          }
          // Most end their stream, and the server must then end, too; the others just go.
          if (random(4) !== 0) {
            client.finishWriting()
            await client.receiveRest(64 * 1024 * 1024).catch((cause: unknown) => {
              throw new Error(`the server did not end after the stream of seed ${streamSeed}`, { cause })
            })
          }
          client.destroy()
          streamCount += 1
        }
      }
      await Promise.all([0, 1, 2, 3].map(worker))
      expect(Buffer.from(await steady.read(0, 6)).toString()).toBe('steady')
      await using after = await connect(fixture.uri(), { metaContexts: ['base:allocation'] })
      expect((await after.blockStatus(0, 4096)).size).toBe(1)
      await expect.poll(() => fixture.server.connections()).toHaveLength(2)
      expect(fixture.exports.count('disk')).toBe(2)
    },
    durationMs + 600_000,
  )
})
