/**
 * Conversations with a server that wants TLS: a real handshake with anything inside, ended in any way, over a line that may damage
 * what is sent, put records in between or end at any byte; and handshakes that are none.
 */
import { createConnection, type Socket } from 'node:net'
import { Duplex } from 'node:stream'
import { connect as connectTls, type ConnectionOptions } from 'node:tls'
import { encodeOption, protocol } from '@atoll/nbd-client'
import type { Random } from './random.ts'

export interface TlsTarget {
  readonly port: number
  /** What a client that is let in uses. */
  readonly client: ConnectionOptions
  /** Records out of place. */
  readonly records: readonly Buffer[]
  /** The first flights of clients, as they are sent. */
  readonly hellos: readonly Buffer[]
}

/** What happens to the bytes of a client on their way, at a place counted in bytes behind STARTTLS. */
interface Damage {
  readonly at: number
  readonly kind: 'flip' | 'insert' | 'drop' | 'end' | 'reset'
  readonly bytes: Buffer
}

const greetingBytes = 18
const startTls = Buffer.concat([Buffer.from([0, 0, 0, 3]), encodeOption(protocol.option.startTls, new Uint8Array())])

/** Node's first flight for these options. */
export function helloOf(options: ConnectionOptions): Promise<Buffer> {
  return new Promise<Buffer>((resolve) => {
    const sink = new Duplex({
      read: () => {},
      write: (chunk: Buffer<ArrayBuffer>, _encoding, done) => {
        resolve(chunk)
        done()
      },
    })
    connectTls({ ...options, socket: sink }).on('error', () => {})
  })
}

/** STARTTLS, and behind it what is no handshake, or only the beginning of one. Sent without waiting for an answer. */
export function brokenHandshake(random: Random, target: TlsTarget): Buffer {
  const pick = (of: readonly Buffer[]): Buffer => of[random(of.length)]!
  const parts: Buffer[] = [startTls]
  for (let count = 1 + random(4); count > 0; count -= 1) {
    const kind = random(6)
    if (kind < 2) parts.push(pick(target.records))
    else if (kind === 2) parts.push(Buffer.from(Array.from({ length: 1 + random(600) }, () => random(256))))
    else {
      const hello = Buffer.from(pick(target.hellos))
      if (kind === 3) parts.push(hello.subarray(0, random(hello.length)))
      else if (kind === 4) {
        for (let flips = 1 + random(8); flips > 0; flips -= 1) hello[random(hello.length)] = random(256)
        parts.push(hello)
      } else parts.push(hello)
    }
  }
  return Buffer.concat(parts)
}

/** Ends a connection with a reset; where our end is finished already, Node can only close it. */
function reset(socket: Socket): void {
  if (socket.writableEnded) socket.destroy()
  else socket.resetAndDestroy()
}

/** A line from a TLS client to a socket that does damage to what is sent. */
class Line extends Duplex {
  readonly #socket: Socket
  readonly #damages: Damage[]
  readonly #pieceBytesMax: number
  /** Sent behind the last record. */
  readonly #trailer: Buffer
  #passedBytes = 0

  constructor(socket: Socket, damages: readonly Damage[], pieceBytesMax: number, trailer: Buffer) {
    super()
    this.#socket = socket
    this.#damages = damages.toSorted((one, other) => one.at - other.at)
    this.#pieceBytesMax = pieceBytesMax
    this.#trailer = trailer
    socket.on('data', (bytes: Buffer) => this.push(bytes))
    socket.on('end', () => this.push(null))
    socket.on('close', () => this.destroy())
  }

  override _read(): void {}

  override _write(chunk: Buffer, _encoding: BufferEncoding, done: () => void): void {
    let rest = Buffer.from(chunk)
    for (let next = this.#damages[0]; next !== undefined && next.at < this.#passedBytes + rest.length; next = this.#damages[0]) {
      this.#damages.shift()
      const at = Math.max(next.at - this.#passedBytes, 0)
      const { kind } = next
      if (kind === 'flip') rest[at]! ^= next.bytes[0]!
      else if (kind === 'insert') {
        this.#pass(rest.subarray(0, at))
        this.#send(next.bytes)
        rest = rest.subarray(at)
      } else if (kind === 'drop') {
        this.#pass(rest.subarray(0, at))
        rest = rest.subarray(at + next.bytes.length)
      } else {
        this.#pass(rest.subarray(0, at))
        if (kind === 'end') this.#socket.end()
        else reset(this.#socket)
        return done()
      }
    }
    this.#pass(rest)
    done()
  }

  override _final(done: () => void): void {
    this.#send(this.#trailer)
    this.#socket.end()
    done()
  }

  #pass(bytes: Buffer): void {
    this.#passedBytes += bytes.length
    this.#send(bytes)
  }

  #send(bytes: Buffer): void {
    for (let at = 0; at < bytes.length && this.#socket.writable; at += this.#pieceBytesMax) {
      this.#socket.write(bytes.subarray(at, at + this.#pieceBytesMax))
    }
  }
}

export interface TlsConversation {
  readonly receivedBytes: number
  /** Whether the handshake came to its end. */
  readonly isSecure: boolean
  /** Whether nothing was done that could have kept it from that. */
  readonly isSound: boolean
}

/** A handshake, and `stream` in pieces inside; `hangLimitMs` after its last byte the server must have ended it. */
export function converseTls(target: TlsTarget, stream: Buffer, random: Random, hangLimitMs: number): Promise<TlsConversation> {
  const damages: Damage[] = []
  if (random(5) < 2) {
    for (let count = 1 + random(3); count > 0; count -= 1) {
      const kinds = ['flip', 'insert', 'insert', 'drop', 'end', 'reset'] as const
      const kind = kinds[random(kinds.length)]!
      // The handshake has about 1,500 bytes of ours.
      const at = random(random(2) === 0 ? 1500 : 1500 + stream.length)
      const bytes =
        kind === 'insert' ? target.records[random(target.records.length)]! : Buffer.alloc(1 + random(40), 1 << random(8))
      damages.push({ at, kind, bytes })
    }
  }
  const ending = random(8)
  // Something more behind close_notify.
  const trailer = ending < 4 ? target.records[random(target.records.length)]! : Buffer.alloc(0)
  const isStranger = random(12) === 0
  const pieceBytesMax = random(6) === 0 ? 1 + random(20) : 1 + random(20_000)
  const renegotiates = random(15) === 0
  const versions: ConnectionOptions = renegotiates || random(3) === 0 ? { maxVersion: 'TLSv1.2' } : {}
  const certificate: ConnectionOptions = isStranger ? { cert: undefined, key: undefined } : {}
  const pieces: Buffer[] = []
  for (let at = 0; at < stream.length; at += pieces.at(-1)!.length) {
    pieces.push(stream.subarray(at, at + 1 + random(random(4) === 0 ? 50 : 100_000)))
  }

  return new Promise((resolve, reject) => {
    const socket = createConnection({ port: target.port, host: '127.0.0.1' })
    let receivedBytes = 0
    let isSecure = false
    const timer = setTimeout(() => {
      socket.destroy()
      reject(new Error(`no end after ${hangLimitMs} ms (TLS ${isSecure ? 'was started' : 'was not started'})`))
    }, hangLimitMs)
    socket.on('error', () => {})
    socket.on('close', () => {
      clearTimeout(timer)
      resolve({ receivedBytes, isSecure, isSound: damages.length === 0 && !isStranger })
    })
    socket.write(startTls)
    let answer = Buffer.alloc(0)
    const hear = (bytes: Buffer): void => {
      answer = Buffer.concat([answer, bytes])
      if (answer.length < greetingBytes + protocol.optionReplyHeaderBytes) return
      socket.off('data', hear)
      shakeHands()
    }
    socket.on('data', hear)

    const shakeHands = (): void => {
      const line = new Line(socket, damages, pieceBytesMax, trailer)
      line.on('error', () => {})
      const secure = connectTls({ ...target.client, ...versions, ...certificate, socket: line })
      secure.on('data', (bytes: Buffer) => {
        receivedBytes += bytes.length
      })
      secure.on('error', () => socket.end())
      secure.on('end', () => socket.end())
      secure.on('secureConnect', () => {
        isSecure = true
        const renegotiateAt = renegotiates ? Math.floor(pieces.length / 2) : -1
        pieces.forEach((piece, index) => {
          if (index === renegotiateAt) secure.renegotiate({ rejectUnauthorized: true }, () => {})
          secure.write(piece)
        })
        end()
      })
      const end = (): void => {
        if (ending === 0) secure.write('', () => socket.end())
        else if (ending === 1) secure.write('', () => reset(socket))
        else secure.end()
      }
    }
  })
}
