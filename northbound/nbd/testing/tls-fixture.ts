import { once } from 'node:events'
import { readFile } from 'node:fs/promises'
import { createConnection, createServer, type Socket } from 'node:net'
import { join } from 'node:path'
import { connect as connectTls, type ConnectionOptions, type TLSSocket } from 'node:tls'
import { silentLog } from '@atoll/core'
import { connectRaw, encodeOption, protocol, type RawNbdConnection } from '@atoll/nbd-client'
import { TestAuthority } from '@atoll/nbd-client/testing'
import type { TlsMode } from '../option-starttls.ts'
import { startNbdServer, type NbdServer, type NbdServerOptions } from '../nbd-server.ts'
import { NbdFixture, unhurried, type DeviceOptions } from './nbd-fixture.ts'

/** A server on TCP with TLS for the export `disk`, an authority, and certificates of both sides. `close` ends all of it. */
export class TlsFixture {
  readonly plain: NbdFixture
  readonly authority: TestAuthority
  /** Folder with ca-cert.pem and the server's certificate. */
  readonly serverDirectory: string
  /** Folder with ca-cert.pem and a client's certificate, in the name `guest-host`. */
  readonly clientDirectory: string
  readonly #servers: NbdServer[] = []

  private constructor(plain: NbdFixture, authority: TestAuthority) {
    this.plain = plain
    this.authority = authority
    this.serverDirectory = plain.file('server')
    this.clientDirectory = plain.file('client')
  }

  static async start(options: DeviceOptions = {}): Promise<TlsFixture> {
    const plain = await NbdFixture.start(options)
    try {
      const fixture = new TlsFixture(plain, await TestAuthority.create(plain.file('authority')))
      await fixture.authority.issue(fixture.serverDirectory, { commonName: 'localhost' })
      await fixture.authority.issue(fixture.clientDirectory, { commonName: 'guest-host', usage: 'client' })
      return fixture
    } catch (error) {
      await plain.close()
      throw error
    }
  }

  /** Starts a server on a free port of 127.0.0.1 (or another address). */
  async serve(
    options: Partial<NbdServerOptions> & { mode?: TlsMode; verifyClients?: boolean; directory?: string; host?: string } = {},
  ): Promise<RunningTlsServer> {
    const { mode = 'required', verifyClients = true, directory = this.serverDirectory, host = '127.0.0.1', ...rest } = options
    const config = await this.plain.engine.loadTls({ directory, verifyClients })
    const server = await startNbdServer({
      engine: this.plain.engine,
      exports: this.plain.exports,
      log: silentLog(),
      listen: { host, port: 0 },
      tls: { mode, config: () => config },
      ...unhurried,
      ...rest,
    })
    this.#servers.push(server)
    return new RunningTlsServer(server, host)
  }

  /** What a client of this fixture's authority uses; `changes` make it another one. */
  async clientOptions(changes: ConnectionOptions = {}): Promise<ConnectionOptions> {
    const read = (name: string): Promise<Buffer> => readFile(join(this.clientDirectory, name))
    return {
      ca: await read('ca-cert.pem'),
      cert: await read('client-cert.pem'),
      key: await read('client-key.pem'),
      servername: 'localhost',
      ...changes,
    }
  }

  /** A client that has started TLS; what it sends comes behind the handshake. The greeting is over. */
  async connect(server: RunningTlsServer, changes: ConnectionOptions = {}): Promise<RawNbdConnection> {
    const socket = await upgrade(await startTlsOption(server.port, server.host), await this.clientOptions(changes))
    return rawOver(socket, this.plain.file(`bridge-${(bridgeCount += 1)}`))
  }

  async close(): Promise<void> {
    await Promise.all(this.#servers.map((server) => server.close()))
    await this.plain.close()
  }
}

export class RunningTlsServer {
  readonly server: NbdServer
  readonly host: string

  constructor(server: NbdServer, host: string) {
    this.server = server
    this.host = host
  }

  get port(): number {
    return this.server.address.port ?? 0
  }

  get target(): { host: string; port: number } {
    return { host: this.host, port: this.port }
  }

  /** For libnbd; `certificates` is a folder of a client. */
  uri(certificates: string, exportName = 'disk'): string {
    return `nbds://${this.host.includes(':') ? `[${this.host}]` : this.host}:${this.port}/${exportName}?tls-certificates=${certificates}`
  }
}

const greetingBytes = 18

let bridgeCount = 0

/** Exactly `lengthBytes` bytes of a socket; the rest stays in it. @throws if it ends before. */
async function take(socket: Socket, lengthBytes: number): Promise<Buffer> {
  for (;;) {
    if (socket.readableLength >= lengthBytes) return socket.read(lengthBytes) as Buffer
    if (socket.readableEnded || socket.destroyed) throw new Error('the server closed the connection')
    // Asking for nothing makes the socket fetch more, and see its end.
    socket.read(0)
    await Promise.race(['readable', 'end', 'close'].map((event) => once(socket, event)))
  }
}

/** Connects, greets and asks for TLS; the next bytes in both directions are the handshake's. */
export async function startTlsOption(port: number, host = '127.0.0.1'): Promise<Socket> {
  const socket = createConnection({ port, host })
  await once(socket, 'connect')
  await take(socket, greetingBytes)
  socket.write(Buffer.from([0, 0, 0, 3]))
  socket.write(encodeOption(protocol.option.startTls, new Uint8Array()))
  const reply = await take(socket, protocol.optionReplyHeaderBytes)
  if (reply.readUInt32BE(12) !== protocol.optionReply.ack) throw new Error(`STARTTLS was refused: 0x${reply.toString('hex')}`)
  return socket
}

/** Shakes hands over a connected socket. @throws what Node says of the handshake, or that the server closed. */
export async function upgrade(socket: Socket, options: ConnectionOptions): Promise<TLSSocket> {
  const secure = connectTls({ ...options, socket })
  await new Promise<void>((resolve, reject) => {
    secure.once('secureConnect', resolve)
    secure.once('error', reject)
    secure.once('close', () => reject(new Error('the server closed the connection')))
  })
  return secure
}

/** Hands a socket of Node's to the raw client, which knows plain sockets only. */
async function rawOver(secure: TLSSocket, path: string): Promise<RawNbdConnection> {
  const bridge = createServer({ allowHalfOpen: true }, (inner) => {
    inner.pipe(secure)
    secure.pipe(inner)
    for (const socket of [inner, secure]) {
      socket.on('error', () => {})
      socket.on('close', () => {
        inner.destroy()
        secure.destroy()
      })
    }
    bridge.close()
    // It may have ended before anybody listened here.
    if (secure.destroyed) inner.destroy()
  })
  bridge.listen(path)
  await once(bridge, 'listening')
  return connectRaw({ path })
}
