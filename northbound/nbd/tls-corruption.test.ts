/**
 * A line that flips one bit of what a client sends, somewhere in the handshake or behind it. Whatever it hits, nothing but what a
 * client wrote gets into the volume, the connection ends, and others are served. Rounds: ATOLL_FUZZ_ROUNDS (default 60); a run is
 * replayed with ATOLL_FUZZ_SEED.
 */
import { once } from 'node:events'
import { createConnection, createServer, type AddressInfo, type Server } from 'node:net'
import { afterEach, beforeEach, expect, it } from 'vitest'
import { connect, encodeInfoRequest, encodeOption, encodeRequest, protocol } from '@atoll/nbd-client'
import { describeWithTools, opensslTool } from '@atoll/nbd-client/testing'
import { MiB } from './testing/nbd-fixture.ts'
import { startTlsOption, TlsFixture, upgrade } from './testing/tls-fixture.ts'

const { option, command } = protocol

const roundCount = Number(process.env['ATOLL_FUZZ_ROUNDS'] ?? 60)
const seed = Number(process.env['ATOLL_FUZZ_SEED'] ?? 20_261_121)

/** Bytes that a client sends in all, about: where the flip may fall. */
const sentBytes = 22_000
const pattern = 0xa5
const writeBytes = 16 * 1024

let fixture: TlsFixture
let line: Server
afterEach(async () => {
  line.close()
  await fixture.close()
})
beforeEach(async () => {
  fixture = await TlsFixture.start({ sizeBytes: 8 * MiB })
})

/** A relay to `port` that flips the bit `bitAt` of what comes from the client. */
function startLine(port: number, nextBit: () => number): Promise<Server> {
  line = createServer((client) => {
    const server = createConnection({ port, host: '127.0.0.1' })
    const flippedAt = nextBit()
    let passed = 0
    client.on('data', (chunk: Buffer) => {
      const at = Math.floor(flippedAt / 8) - passed
      passed += chunk.length
      if (at >= 0 && at < chunk.length) chunk[at]! ^= 1 << (flippedAt % 8)
      server.write(chunk)
    })
    client.on('end', () => server.end())
    server.pipe(client)
    for (const [one, other] of [
      [client, server],
      [server, client],
    ] as const) {
      one.on('error', () => {})
      one.on('close', () => other.destroy())
    }
  })
  line.listen(0, '127.0.0.1')
  return once(line, 'listening').then(() => line)
}

describeWithTools('a bit that is flipped on the way', [opensslTool], () => {
  it(
    `ends its connection and changes nothing else (ATOLL_FUZZ_SEED=${seed})`,
    async () => {
      const server = await fixture.serve({ limits: { handshakeTimeoutMs: 2000 } })
      let state = seed >>> 0
      const random = (below: number): number => {
        state = (Math.imul(state, 1_664_525) + 1_013_904_223) >>> 0
        return Math.floor((state / 2 ** 32) * below)
      }
      // Half of the flips hit the handshake, which is the smaller part.
      const nextBit = (): number => random(8 * (random(2) === 0 ? 1500 : sentBytes))
      const { port } = (await startLine(server.port, nextBit)).address() as AddressInfo
      const clientOptions = await fixture.clientOptions()
      await using steady = await connect(fixture.plain.target, { exportName: 'disk' })
      let entered = 0
      for (let round = 0; round < roundCount; round += 1) {
        try {
          const secure = await upgrade(await startTlsOption(port), clientOptions)
          entered += 1
          secure.on('error', () => {})
          const closed = once(secure.resume(), 'close')
          const write = {
            flags: 0,
            command: command.write,
            cookie: 1n,
            offsetBytes: (round % 256) * writeBytes,
            lengthBytes: writeBytes,
          }
          secure.write(encodeOption(option.go, encodeInfoRequest('disk', [])))
          secure.write(Buffer.concat([encodeRequest(write), Buffer.alloc(writeBytes, pattern)]))
          secure.end()
          await closed
        } catch {
          // Refused, as it should be mostly.
        }
        expect((await steady.read(0, 512)).length).toBe(512)
      }
      // Some were hit behind the handshake.
      expect(entered).toBeGreaterThan(0)
      await expect.poll(() => server.server.connections()).toEqual([])
      const content = await steady.read(0, 8 * MiB)
      expect(content.every((byte) => byte === 0 || byte === pattern)).toBe(true)
    },
    roundCount * 10_000,
  )
})
