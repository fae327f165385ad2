import { randomFillSync } from 'node:crypto'
import { mkdtemp, open, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, expect, it } from 'vitest'
import { connect, connectRaw, formatNbdUri, info, list, NbdOptionError, protocol } from './index.ts'
import type { NbdError } from './index.ts'
import { describeWithTools, nbdkitTool, qemuNbdTool, startNbdkit, startQemuNbd } from './testing/index.ts'
import type { PeerProcess } from './testing/index.ts'

const MiB = 1024 * 1024
const sizeBytes = 8 * MiB

let directory: string
let peer: PeerProcess | null = null

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'nbd-client-'))
})
afterEach(async () => {
  await peer?.stop()
  peer = null
  await rm(directory, { recursive: true, force: true })
})

function randomBytes(lengthBytes: number): Buffer {
  return randomFillSync(Buffer.alloc(lengthBytes))
}

async function sparseFile(lengthBytes: number): Promise<string> {
  const path = join(directory, 'disk.raw')
  const file = await open(path, 'w')
  await file.truncate(lengthBytes)
  await file.close()
  return path
}

const socketPath = (): string => join(directory, 'nbd.sock')

const peers = [
  {
    name: 'qemu-nbd',
    tool: qemuNbdTool,
    exportName: 'disk',
    start: async () =>
      startQemuNbd(socketPath(), await sparseFile(sizeBytes), [
        '--export-name',
        'disk',
        '--description',
        'a disk',
        '--discard',
        'unmap',
      ]),
  },
  {
    name: 'nbdkit',
    tool: nbdkitTool,
    exportName: '',
    start: async () => startNbdkit(socketPath(), ['file', await sparseFile(sizeBytes)]),
  },
]

for (const { name, tool, exportName, start } of peers) {
  describeWithTools(`the client and ${name}`, [tool], () => {
    beforeEach(async () => {
      peer = await start()
    })

    const uri = (): string => formatNbdUri({ path: socketPath() }, exportName)

    for (const structuredReplies of [true, false]) {
      const how = structuredReplies ? 'structured' : 'simple'

      it(`read back what was written, with ${how} replies`, async () => {
        await using connection = await connect(uri(), { structuredReplies })
        expect(connection.structuredReplies).toBe(structuredReplies)
        expect(connection.sizeBytes).toBe(sizeBytes)
        const data = randomBytes(100_000)
        await connection.write(4096, data)
        expect(Buffer.from(await connection.read(4096, data.length)).equals(data)).toBe(true)
        expect(Buffer.from(await connection.read(0, 4096)).equals(Buffer.alloc(4096))).toBe(true)
        await connection.flush()
      })

      it(`pass the server's errno on, with ${how} replies, and go on`, async () => {
        await using connection = await connect(uri(), { structuredReplies })
        await expect(connection.read(sizeBytes, 4096)).rejects.toMatchObject({ code: 'NBD_REQUEST_FAILED', errnoName: 'EINVAL' })
        expect((await connection.read(0, 512)).length).toBe(512)
      })
    }

    it('keep many requests of all kinds in flight without mixing them up', async () => {
      await using connection = await connect(uri(), { inFlightMax: 32 })
      const blocks = Array.from({ length: 512 }, (_, index) => ({ offsetBytes: index * 8192, data: randomBytes(8192) }))
      await Promise.all(blocks.map((block) => connection.write(block.offsetBytes, block.data)))
      const read = await Promise.all(blocks.map((block) => connection.read(block.offsetBytes, block.data.length)))
      expect(read.every((data, index) => blocks[index]!.data.equals(data))).toBe(true)
    })

    it('move the largest request there is', async () => {
      await using connection = await connect(uri())
      const data = randomBytes(sizeBytes)
      await connection.write(0, data, { fua: connection.flags.fua })
      expect(data.equals(await connection.read(0, sizeBytes))).toBe(true)
    })

    it('zero, trim and report what is a hole', async () => {
      await using connection = await connect(uri(), { metaContexts: ['base:allocation', 'x-nobody:knows'] })
      expect([...connection.metaContexts.keys()]).toEqual(['base:allocation'])
      await connection.write(0, randomBytes(2 * MiB))
      await connection.writeZeroes(64 * 1024, 64 * 1024)
      await connection.writeZeroes(256 * 1024, 64 * 1024, { noHole: true })
      await connection.trim(MiB, 64 * 1024)
      await connection.flush()
      expect(Buffer.from(await connection.read(64 * 1024, 64 * 1024)).equals(Buffer.alloc(64 * 1024))).toBe(true)
      expect(Buffer.from(await connection.read(256 * 1024, 64 * 1024)).equals(Buffer.alloc(64 * 1024))).toBe(true)
      const extents = (await connection.blockStatus(0, sizeBytes)).get('base:allocation')!
      expect(extents[0]).toMatchObject({ offsetBytes: 0, flags: 0 })
      expect(extents.at(-1)).toMatchObject({ flags: protocol.allocationFlag.hole | protocol.allocationFlag.zero })
      const [one, ...others] = (await connection.blockStatus(0, sizeBytes, { reqOne: true })).get('base:allocation')!
      expect(one!.offsetBytes).toBe(0)
      expect(others).toEqual([])
    })

    it('show what the server says of the export', async () => {
      const shown = await info(uri())
      expect(shown).toMatchObject({
        exportName,
        sizeBytes,
        structuredReplies: true,
        metaContexts: expect.arrayContaining(['base:allocation']),
      })
      expect(shown.blockSizes.maximumBytes).toBeGreaterThanOrEqual(32 * MiB)
    })

    it('list the exports', async () => {
      expect((await list({ path: socketPath() })).map((entry) => entry.name)).toEqual([exportName])
    })

    it('end in an orderly way after what was asked before is answered', async () => {
      const connection = await connect(uri())
      const reading = connection.read(0, 4096)
      await connection.disconnect()
      expect((await reading).length).toBe(4096)
      expect(await connection.closed).toBeNull()
      await expect(connection.read(0, 4096)).rejects.toMatchObject({ code: 'NBD_CLOSED' })
    })

    it('fail everything in flight when the server dies', async () => {
      const connection = await connect(uri())
      const writes = Array.from({ length: 200 }, (_, index) => connection.write(index * 4096, randomBytes(4096)))
      const settled = Promise.allSettled(writes)
      await peer!.kill()
      const codes = new Set(
        (await settled).map((outcome) => (outcome.status === 'fulfilled' ? 'done' : (outcome.reason as NbdError).code)),
      )
      for (const code of codes) expect(['done', 'NBD_CONNECTION_LOST', 'NBD_CLOSED']).toContain(code)
      expect((await connection.closed)?.code).toBe('NBD_CONNECTION_LOST')
      await expect(connection.read(0, 1)).rejects.toMatchObject({ code: 'NBD_CLOSED' })
    })

    it('do without a look at the flags what request() is told to', async () => {
      await using connection = await connect(uri())
      await expect(connection.request({ command: 77, flags: 0, offsetBytes: 0n, lengthBytes: 0 })).rejects.toMatchObject({
        errnoName: 'EINVAL',
      })
      await expect(
        connection.request({ command: protocol.command.read, flags: 0, offsetBytes: 2n ** 64n - 512n, lengthBytes: 512 }),
      ).rejects.toMatchObject({ errnoName: 'EINVAL' })
    })

    it('exchange raw bytes', async () => {
      await using raw = await connectRaw({ path: socketPath() })
      const greeting = await raw.greet()
      expect(greeting.magic).toBe(protocol.greetingMagic)
      expect((await raw.ask(99)).map((reply) => reply.type)).toEqual([protocol.optionReply.errorUnsupported])
      expect((await raw.ask(protocol.option.abort)).at(-1)!.type).toBe(protocol.optionReply.ack)
      await raw.receiveEnd()
    })
  })
}

describeWithTools('the client and qemu-nbd, besides,', [qemuNbdTool], () => {
  it('agree on an unknown export being an error with the name in it', async () => {
    peer = await startQemuNbd(socketPath(), await sparseFile(sizeBytes), ['--export-name', 'disk', '--description', 'a disk'])
    await expect(connect({ path: socketPath() }, { exportName: 'other' })).rejects.toThrowError(/"other".*errorUnknown/)
    await expect(connect({ path: socketPath() }, { exportName: 'other' })).rejects.toBeInstanceOf(NbdOptionError)
    expect(await info({ path: socketPath() }, { exportName: 'disk' })).toMatchObject({ description: 'a disk' })
  })

  it('do not write to a read-only export', async () => {
    peer = await startQemuNbd(socketPath(), await sparseFile(sizeBytes), ['--read-only'])
    await using connection = await connect({ path: socketPath() })
    expect(connection.flags.readOnly).toBe(true)
    await expect(connection.write(0, new Uint8Array(512))).rejects.toMatchObject({ code: 'NBD_NOT_OFFERED' })
    const write = { command: protocol.command.write, flags: 0, offsetBytes: 0, lengthBytes: 512, payload: new Uint8Array(512) }
    await expect(connection.request(write)).rejects.toMatchObject({ code: 'NBD_REQUEST_FAILED' })
    expect((await connection.read(0, 512)).length).toBe(512)
  })
})

describeWithTools('the client and nbdkit, besides,', [nbdkitTool], () => {
  it('fall back to EXPORT_NAME when the server has no fixed newstyle', async () => {
    peer = await startNbdkit(socketPath(), ['--mask-handshake=0', 'memory', String(sizeBytes)])
    await using connection = await connect({ path: socketPath() })
    expect(connection).toMatchObject({ sizeBytes, structuredReplies: false })
    await connection.write(512, Buffer.from('over the old way'))
    expect(Buffer.from(await connection.read(512, 16)).toString()).toBe('over the old way')
    expect(await info({ path: socketPath() })).toMatchObject({ sizeBytes, metaContexts: [] })
    await expect(list({ path: socketPath() })).rejects.toMatchObject({ code: 'NBD_UNSUPPORTED' })
  })

  it('do not speak oldstyle', async () => {
    peer = await startNbdkit(socketPath(), ['--oldstyle', 'memory', '1M'])
    await expect(connect({ path: socketPath() })).rejects.toMatchObject({ code: 'NBD_UNSUPPORTED' })
  })

  it('tell the errors of the device apart', async () => {
    peer = await startNbdkit(socketPath(), ['--filter=error', 'memory', '1M', 'error-pwrite=ENOSPC', 'error-pwrite-rate=100%'])
    await using connection = await connect({ path: socketPath() })
    await expect(connection.write(0, new Uint8Array(512))).rejects.toMatchObject({
      errno: 28,
      errnoName: 'ENOSPC',
      retryable: false,
    })
    expect((await connection.read(0, 512)).length).toBe(512)
  })

  it('cache and zero fast where that is offered', async () => {
    peer = await startNbdkit(socketPath(), ['memory', '1M'])
    await using connection = await connect({ path: socketPath() })
    expect(connection.flags).toMatchObject({ cache: true, fastZero: true, multiConn: true })
    await connection.cache(0, 65536)
    await connection.writeZeroes(0, 4096, { fastZero: true })
  })
})
