/** Connections that say nothing: they must not keep others from being served. */
import { once } from 'node:events'
import { createConnection, type Socket } from 'node:net'
import { afterEach, beforeEach, expect, it } from 'vitest'
import { silentLog } from '@atoll/core'
import { connect, type NbdConnection } from '@atoll/nbd-client'
import { defaultConnectionLimits } from './connection-limits.ts'
import { startNbdServer, type NbdServer } from './nbd-server.ts'
import { NbdFixture } from './testing/nbd-fixture.ts'

let fixture: NbdFixture
let server: NbdServer
const flood: Socket[] = []
beforeEach(async () => {
  fixture = await NbdFixture.start()
  server = await startNbdServer({
    engine: fixture.engine,
    exports: fixture.exports,
    log: silentLog(),
    listen: { host: '127.0.0.1', port: 0 },
    // Longer than the test: what ends the flood is not the clock.
    limits: { handshakeTimeoutMs: 600_000 },
  })
})
afterEach(async () => {
  for (const socket of flood.splice(0)) socket.destroy()
  await server.close()
  await fixture.close()
})

const target = (): { host: string; port: number } => ({ host: server.address.host!, port: server.address.port! })

/** A connection that never says anything, once it is there. */
async function silentConnection(): Promise<void> {
  const socket = createConnection(target())
  socket.on('error', () => {})
  flood.push(socket)
  await Promise.race([once(socket, 'connect'), once(socket, 'close')])
}

async function expectServed(connection: NbdConnection): Promise<void> {
  expect((await connection.read(0, 512)).length).toBe(512)
}

it('2,000 connections that say nothing stop neither clients that are there nor new ones, on TCP and on the unix socket', async () => {
  await using before = await connect(target(), { exportName: 'disk' })
  for (let opened = 0; opened < 2000; opened += 100) {
    await Promise.all(Array.from({ length: 100 }, silentConnection))
    await using during = await connect(target(), { exportName: 'disk' })
    await expectServed(during)
    await expectServed(before)
  }
  expect(flood.length).toBe(2000)
  expect(server.connections().length).toBeLessThanOrEqual(defaultConnectionLimits.negotiatingCountMax + 2)
  await using after = await connect(target(), { exportName: 'disk' })
  await using local = await connect(fixture.target, { exportName: 'disk' })
  for (const connection of [before, after, local]) await expectServed(connection)
  // Those that made room are gone from the engine too: threads and descriptors do not pile up.
  await expect.poll(() => fixture.engine.stats().connections).toBeLessThanOrEqual(defaultConnectionLimits.negotiatingCountMax + 3)
})
