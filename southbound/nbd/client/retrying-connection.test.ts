import { mkdtemp, open, rm } from 'node:fs/promises'
import { tmpdir } from 'node:os'
import { join } from 'node:path'
import { afterEach, beforeEach, describe, expect, it } from 'vitest'
import { connectWithRetry } from './index.ts'
import { transmissionFlag } from './protocol.ts'
import { describeWithTools, nbdkitTool, startNbdkit, startScriptedServer } from './testing/index.ts'
import type { PeerProcess } from './testing/index.ts'

let directory: string
let peer: PeerProcess | null = null

beforeEach(async () => {
  directory = await mkdtemp(join(tmpdir(), 'nbd-retry-'))
})
afterEach(async () => {
  await peer?.stop()
  peer = null
  await rm(directory, { recursive: true, force: true })
})

const socketPath = (): string => join(directory, 'nbd.sock')

describeWithTools('a retrying connection', [nbdkitTool], () => {
  it('carries on over a server that is killed again and again', async () => {
    const path = join(directory, 'disk.raw')
    const file = await open(path, 'w')
    await file.truncate(1 << 20)
    await file.close()
    peer = await startNbdkit(socketPath(), ['file', path])
    await using connection = await connectWithRetry({ path: socketPath() }, { retryDelayMaxMs: 20 })
    let blockIndex = 0
    for (let round = 0; round < 3; round += 1) {
      const writes = Array.from({ length: 64 }, () => {
        const block = blockIndex++
        return connection.write(block * 4096, Buffer.alloc(4096, block))
      })
      await peer.kill()
      peer = await startNbdkit(socketPath(), ['file', path])
      await Promise.all(writes)
    }
    await connection.flush()
    expect(connection.reconnectCount).toBeGreaterThan(0)
    for (let block = 0; block < blockIndex; block += 1) {
      expect(Buffer.from(await connection.read(block * 4096, 4096)).equals(Buffer.alloc(4096, block))).toBe(true)
    }
  })

  it('sends again what was answered but not flushed, in order, because the server may have lost it', async () => {
    // The memory plugin forgets everything when it dies, as a cache does that was never flushed.
    peer = await startNbdkit(socketPath(), ['memory', '1M'])
    await using connection = await connectWithRetry({ path: socketPath() })
    await connection.write(0, Buffer.from('older'))
    await connection.write(100, Buffer.from('zeroed'))
    await connection.writeZeroes(100, 6)
    await connection.write(0, Buffer.from('newer'), { fua: true })
    await peer.kill()
    peer = await startNbdkit(socketPath(), ['memory', '1M'])
    expect(Buffer.from(await connection.read(0, 5)).toString()).toBe('newer')
    expect(Buffer.from(await connection.read(100, 6)).toString()).toBe('\0\0\0\0\0\0')
    expect(connection.reconnectCount).toBe(1)
  })

  it('does not send again what a flush has vouched for, nor anything when it was told to keep nothing', async () => {
    for (const unflushedBytesMax of [undefined, 0]) {
      peer = await startNbdkit(socketPath(), ['memory', '1M'])
      await using connection = await connectWithRetry({ path: socketPath() }, { unflushedBytesMax })
      await connection.write(0, Buffer.from('data'))
      if (unflushedBytesMax === undefined) await connection.flush()
      await peer.kill()
      peer = await startNbdkit(socketPath(), ['memory', '1M'])
      expect(Buffer.from(await connection.read(0, 4)).toString()).toBe('\0\0\0\0')
      await peer.stop()
    }
  })

  it('flushes by itself when it would have to keep more than its bound', async () => {
    peer = await startNbdkit(socketPath(), ['--filter=stats', 'memory', '1M', `statsfile=${join(directory, 'stats')}`])
    await using connection = await connectWithRetry({ path: socketPath() }, { unflushedBytesMax: 10_000 })
    for (let index = 0; index < 10; index += 1) await connection.write(index * 4096, Buffer.alloc(4096, 1))
    await peer.kill()
    peer = await startNbdkit(socketPath(), ['memory', '1M'])
    // Only the newest two can have been kept, so the server that lost everything has no more than these.
    expect(Buffer.from(await connection.read(0, 4096)).equals(Buffer.alloc(4096))).toBe(true)
    expect(Buffer.from(await connection.read(9 * 4096, 4096)).equals(Buffer.alloc(4096, 1))).toBe(true)
  })
})

describe('a retrying connection', () => {
  it('gives up at the deadline, with the reason', async () => {
    await expect(connectWithRetry({ path: socketPath() }, { retryForMs: 50, retryDelayMs: 5 })).rejects.toMatchObject({
      code: 'NBD_RETRY_EXHAUSTED',
      cause: { code: 'NBD_CONNECT_FAILED' },
    })
  })

  it('starts before its server does', async () => {
    const connecting = connectWithRetry({ path: socketPath() }, { retryDelayMs: 1, retryDelayMaxMs: 5 })
    const server = await startScriptedServer(socketPath(), async (scripted) => scripted.negotiate({ sizeBytes: 4096 }))
    const connection = await connecting
    expect(connection.sizeBytes).toBe(4096)
    await server.close()
    await connection.disconnect()
  })

  it('passes an error of the device on and asks again after ESHUTDOWN', async () => {
    const server = await startScriptedServer(socketPath(), async (scripted, connectionIndex) => {
      await scripted.negotiate({ sizeBytes: 4096, flags: transmissionFlag.flush })
      scripted.sendSimpleReply((await scripted.receiveRequest()).cookie, connectionIndex === 0 ? 108 : 5)
    })
    const events: string[] = []
    const connection = await connectWithRetry({ path: socketPath() }, { onEvent: (event) => events.push(event.kind) })
    await expect(connection.flush()).rejects.toMatchObject({ errnoName: 'EIO' })
    expect(events).toEqual(['lost', 'reconnected'])
    await server.close()
    await connection.disconnect()
  })

  it('stops trying when it is disconnected', async () => {
    const server = await startScriptedServer(socketPath(), async (scripted, connectionIndex) => {
      if (connectionIndex === 0) await scripted.negotiate({ sizeBytes: 4096 })
      scripted.stream.destroy()
    })
    const lost = Promise.withResolvers<void>()
    const connection = await connectWithRetry({ path: socketPath() }, { retryDelayMs: 1, onEvent: () => lost.resolve() })
    const reading = connection.read(0, 1)
    reading.catch(() => {})
    await lost.promise
    await connection.disconnect()
    await expect(reading).rejects.toMatchObject({ code: 'NBD_CLOSED' })
    await server.close()
  })
})
