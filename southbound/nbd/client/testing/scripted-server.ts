import { createServer } from 'node:net'
import type { Socket } from 'node:net'
import { once } from 'node:events'
import { ByteStream } from '../byte-stream.ts'
import {
  greetingMagic,
  handshakeFlag,
  infoItem,
  newstyleMagic,
  option,
  optionReply,
  optionReplyMagic,
  requestHeaderBytes,
  simpleReplyMagic,
  structuredReplyMagic,
  transmissionFlag,
} from '../protocol.ts'

/** The server's end of a connection, for scripts that send what no server should. */
export class ScriptedPeer {
  readonly stream: ByteStream

  constructor(socket: Socket) {
    this.stream = new ByteStream(socket)
  }

  send(...parts: readonly Uint8Array[]): void {
    this.stream.write(...parts)
  }

  async sendGreeting(flags: number = handshakeFlag.fixedNewstyle | handshakeFlag.noZeroes): Promise<number> {
    const greeting = Buffer.alloc(18)
    greeting.writeBigUInt64BE(greetingMagic, 0)
    greeting.writeBigUInt64BE(newstyleMagic, 8)
    greeting.writeUInt16BE(flags, 16)
    this.send(greeting)
    return (await this.stream.read(4)).readUInt32BE(0)
  }

  async receiveOption(): Promise<{ option: number; data: Buffer }> {
    const header = await this.stream.read(16)
    return { option: header.readUInt32BE(8), data: await this.stream.read(header.readUInt32BE(12)) }
  }

  sendOptionReply(number: number, type: number, data: Uint8Array = new Uint8Array()): void {
    const header = Buffer.alloc(20)
    header.writeBigUInt64BE(optionReplyMagic, 0)
    header.writeUInt32BE(number, 8)
    header.writeUInt32BE(type, 12)
    header.writeUInt32BE(data.length, 16)
    this.send(header, data)
  }

  sendExportInfo(number: number, sizeBytes: number, flags: number): void {
    const data = Buffer.alloc(12)
    data.writeUInt16BE(infoItem.export, 0)
    data.writeBigUInt64BE(BigInt(sizeBytes), 2)
    data.writeUInt16BE(flags, 10)
    this.sendOptionReply(number, optionReply.info, data)
  }

  /** A whole negotiation as a good server does it, up to the transmission. */
  async negotiate(offer: { sizeBytes: number; flags?: number; structuredReplies?: boolean }): Promise<void> {
    await this.sendGreeting()
    for (;;) {
      const { option: number } = await this.receiveOption()
      if (number === option.go) {
        this.sendExportInfo(number, offer.sizeBytes, (offer.flags ?? 0) | transmissionFlag.hasFlags)
        this.sendOptionReply(number, optionReply.ack)
        return
      }
      if (number === option.structuredReply && offer.structuredReplies) {
        this.sendOptionReply(number, optionReply.ack)
      } else if (number === option.setMetaContext && offer.structuredReplies) {
        const context = Buffer.from('\0\0\0\x07base:allocation')
        this.sendOptionReply(number, optionReply.metaContext, context)
        this.sendOptionReply(number, optionReply.ack)
      } else {
        this.sendOptionReply(number, optionReply.errorUnsupported)
      }
    }
  }

  async receiveRequest(): Promise<{ flags: number; command: number; cookie: bigint; offsetBytes: bigint; lengthBytes: number }> {
    const header = await this.stream.read(requestHeaderBytes)
    return {
      flags: header.readUInt16BE(4),
      command: header.readUInt16BE(6),
      cookie: header.readBigUInt64BE(8),
      offsetBytes: header.readBigUInt64BE(16),
      lengthBytes: header.readUInt32BE(24),
    }
  }

  sendSimpleReply(cookie: bigint, errno: number, data: Uint8Array = new Uint8Array()): void {
    const header = Buffer.alloc(16)
    header.writeUInt32BE(simpleReplyMagic, 0)
    header.writeUInt32BE(errno, 4)
    header.writeBigUInt64BE(cookie, 8)
    this.send(header, data)
  }

  sendChunk(cookie: bigint, flags: number, type: number, data: Uint8Array): void {
    const header = Buffer.alloc(20)
    header.writeUInt32BE(structuredReplyMagic, 0)
    header.writeUInt16BE(flags, 4)
    header.writeUInt16BE(type, 6)
    header.writeBigUInt64BE(cookie, 8)
    header.writeUInt32BE(data.length, 16)
    this.send(header, data)
  }
}

/** A server on a unix socket that does what the script says, once for every connection. A script that ends leaves its connection open. */
export async function startScriptedServer(
  socketPath: string,
  script: (peer: ScriptedPeer, connectionIndex: number) => Promise<void>,
): Promise<{ close(): Promise<void>; failures: unknown[] }> {
  const sockets = new Set<Socket>()
  const failures: unknown[] = []
  let connectionCount = 0
  const server = createServer({ allowHalfOpen: true }, (socket) => {
    sockets.add(socket)
    socket.on('close', () => sockets.delete(socket))
    const index = connectionCount
    connectionCount += 1
    script(new ScriptedPeer(socket), index).catch((error: unknown) => failures.push(error))
  })
  server.listen(socketPath)
  await once(server, 'listening')
  return {
    failures,
    close: async () => {
      server.close()
      for (const socket of sockets) socket.destroy()
      await once(server, 'close')
    },
  }
}
