import { existsSync } from 'node:fs'
import { stat } from 'node:fs/promises'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { connect, list } from '@atoll/nbd-client'
import { serveTemporaryNbd } from './temporary-nbd.ts'
import { MiB, NbdFixture } from './testing/nbd-fixture.ts'

let fixture: NbdFixture
beforeEach(async () => {
  fixture = await NbdFixture.start({ noExport: true })
})
afterEach(async () => {
  await fixture.close()
})

describe('a temporary server', () => {
  it('serves the devices that it was given, each writable or not, on a socket of its own', async () => {
    const source = await fixture.openDevice({ sizeBytes: MiB })
    const target = await fixture.openDevice({ sizeBytes: 2 * MiB })
    const temporary = await serveTemporaryNbd(
      fixture.engine,
      [
        { name: 'source', device: source.device, readOnly: true },
        { name: 'target', device: target.device, readOnly: false },
      ],
      { dir: fixture.directory },
    )
    const server = { path: temporary.socketPath }
    expect((await list(server)).map(({ name }) => name)).toEqual(['source', 'target'])
    const reading = await connect(server, { exportName: 'source' })
    const writing = await connect(server, { exportName: 'target' })
    expect([reading.flags.readOnly, writing.flags.readOnly]).toEqual([true, false])
    await writing.write(0, Buffer.from('bytes'))
    await temporary.close()
    await temporary.close()
    expect(existsSync(temporary.socketPath)).toBe(false)
    expect((await writing.closed)?.code).toBe('NBD_CONNECTION_LOST')
    // The devices are still the caller's.
    expect(Buffer.from(await target.device.read(0, 5)).toString()).toBe('bytes')
  })

  it('lets only its user in, or its group too when it was given one', async () => {
    const { device } = await fixture.openDevice()
    const own = await serveTemporaryNbd(fixture.engine, [{ name: 'disk', device, readOnly: true }], { dir: fixture.directory })
    const shared = await serveTemporaryNbd(fixture.engine, [{ name: 'disk', device, readOnly: true }], {
      dir: fixture.directory,
      groupId: process.getgid!(),
    })
    expect((await stat(own.socketPath)).mode & 0o777).toBe(0o600)
    expect((await stat(shared.socketPath)).mode & 0o777).toBe(0o660)
    expect(own.socketPath).not.toBe(shared.socketPath)
    await own.close()
    await shared.close()
  })
})
