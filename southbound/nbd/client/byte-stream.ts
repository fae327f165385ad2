import { createConnection } from 'node:net'
import type { Socket } from 'node:net'
import { NbdError } from './nbd-error.ts'
import type { NbdAddress } from './nbd-target.ts'

/** Received bytes that nobody has asked for yet; beyond this the socket is paused. */
const bufferedBytesMax = 1 << 20

interface Waiter {
  readonly target: Uint8Array
  filled: number
  readonly resolve: () => void
  readonly reject: (error: NbdError) => void
}

/**
 * A socket from which exact numbers of bytes are read. One read at a time; writes are queued by the socket, so the caller
 * bounds how much it has under way.
 */
export class ByteStream {
  readonly #socket: Socket
  #chunks: Buffer[] = []
  #bufferedBytes = 0
  #waiter: Waiter | null = null
  #end: NbdError | null = null
  readonly #closed = Promise.withResolvers<void>()

  constructor(socket: Socket) {
    this.#socket = socket
    socket.on('data', (chunk: Buffer) => this.#receive(chunk))
    socket.on('end', () => this.#finish(new NbdError('NBD_CONNECTION_LOST', 'the peer closed the connection')))
    socket.on('error', (cause) =>
      this.#finish(new NbdError('NBD_CONNECTION_LOST', `the connection failed: ${cause.message}`, { cause })),
    )
    socket.on('close', () => {
      this.#finish(new NbdError('NBD_CONNECTION_LOST', 'the connection is closed'))
      this.#closed.resolve()
    })
  }

  /** Resolves when the socket is closed, whoever closed it. */
  get closed(): Promise<void> {
    return this.#closed.promise
  }

  /** Fills `target`. @throws NbdError NBD_CONNECTION_LOST if the connection ends before. */
  readInto(target: Uint8Array): Promise<void> {
    if (this.#waiter !== null) throw new Error('two reads of one stream at a time')
    const filled = this.#take(target)
    if (filled === target.length) return Promise.resolve()
    if (this.#end !== null) return Promise.reject(this.#end)
    return new Promise((resolve, reject) => {
      this.#waiter = { target, filled, resolve, reject }
    })
  }

  /** The next `lengthBytes` bytes. @throws as `readInto`. */
  async read(lengthBytes: number): Promise<Buffer> {
    const target = Buffer.allocUnsafeSlow(lengthBytes)
    await this.readInto(target)
    return target
  }

  /** Bytes that can be read without waiting. */
  get bufferedBytes(): number {
    return this.#bufferedBytes
  }

  /** Queues `parts` in order. They belong to the socket until it has sent them. Silently dropped after the end. */
  write(...parts: readonly Uint8Array[]): void {
    if (this.#socket.destroyed || this.#socket.writableEnded) return
    if (parts.length === 1) {
      this.#socket.write(parts[0]!)
      return
    }
    this.#socket.cork()
    for (const part of parts) if (part.length > 0) this.#socket.write(part)
    this.#socket.uncork()
  }

  /** Sends what is queued, then tells the peer that nothing more comes. */
  finishWriting(): void {
    if (!this.#socket.destroyed) this.#socket.end()
  }

  /** Closes at once; a waiting read fails. */
  destroy(): void {
    this.#socket.destroy()
    this.#finish(new NbdError('NBD_CONNECTION_LOST', 'the connection is closed'))
  }

  /** Sends a TCP reset where there is one; else as `destroy`. */
  reset(): void {
    if ('remotePort' in this.#socket && this.#socket.remotePort !== undefined) this.#socket.resetAndDestroy()
    else this.destroy()
  }

  #receive(chunk: Buffer): void {
    let rest = chunk
    const waiter = this.#waiter
    // A waiter exists only while nothing is buffered, so the chunk goes straight to where it is wanted.
    if (waiter !== null) {
      const count = Math.min(rest.length, waiter.target.length - waiter.filled)
      waiter.target.set(count === rest.length ? rest : rest.subarray(0, count), waiter.filled)
      waiter.filled += count
      rest = rest.subarray(count)
      if (waiter.filled === waiter.target.length) {
        this.#waiter = null
        waiter.resolve()
      }
    }
    if (rest.length === 0) return
    this.#chunks.push(rest)
    this.#bufferedBytes += rest.length
    if (this.#bufferedBytes > bufferedBytesMax) this.#socket.pause()
  }

  #take(target: Uint8Array): number {
    let filled = 0
    while (filled < target.length && this.#chunks.length > 0) {
      const chunk = this.#chunks[0]!
      const count = Math.min(chunk.length, target.length - filled)
      target.set(count === chunk.length ? chunk : chunk.subarray(0, count), filled)
      filled += count
      if (count === chunk.length) this.#chunks.shift()
      else this.#chunks[0] = chunk.subarray(count)
    }
    this.#bufferedBytes -= filled
    if (this.#bufferedBytes <= bufferedBytesMax && this.#socket.isPaused()) this.#socket.resume()
    return filled
  }

  #finish(error: NbdError): void {
    if (this.#end !== null) return
    this.#end = error
    const waiter = this.#waiter
    this.#waiter = null
    waiter?.reject(error)
  }
}

/**
 * Opens a socket. The signal ends the attempt; afterwards it has no effect.
 * @throws NbdError NBD_CONNECT_FAILED, or the signal's reason if that is an NbdError, else NBD_ABORTED.
 */
export function openByteStream(address: NbdAddress, signal: AbortSignal | null): Promise<ByteStream> {
  return new Promise((resolve, reject) => {
    if (signal?.aborted) {
      reject(abortError(signal))
      return
    }
    // Half-open, so that what the server sends after we have finished writing (or the other way round) still arrives.
    const socket = createConnection(
      'path' in address ? { path: address.path, allowHalfOpen: true } : { ...address, allowHalfOpen: true },
    )
    const settle = (): void => {
      signal?.removeEventListener('abort', aborted)
      socket.removeListener('error', failed)
      socket.removeListener('connect', connected)
    }
    const aborted = (): void => {
      settle()
      socket.on('error', () => {})
      socket.destroy()
      reject(abortError(signal!))
    }
    const failed = (cause: Error): void => {
      settle()
      const where = 'path' in address ? address.path : `${address.host}:${address.port}`
      reject(new NbdError('NBD_CONNECT_FAILED', `cannot connect to ${where}: ${cause.message}`, { cause }))
    }
    const connected = (): void => {
      settle()
      // Requests are small and answered one by one: waiting to fill a segment would only add latency.
      socket.setNoDelay(true)
      resolve(new ByteStream(socket))
    }
    signal?.addEventListener('abort', aborted, { once: true })
    socket.once('error', failed)
    socket.once('connect', connected)
  })
}

/** The error that an aborted signal stands for. */
export function abortError(signal: AbortSignal): NbdError {
  if (signal.reason instanceof NbdError) return signal.reason
  return new NbdError('NBD_ABORTED', 'the caller gave up', { cause: signal.reason })
}
