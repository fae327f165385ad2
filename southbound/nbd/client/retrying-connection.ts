import { connect } from './connect.ts'
import type { NbdConnectOptions } from './connect.ts'
import type { NbdConnection } from './nbd-connection.ts'
import { NbdError } from './nbd-error.ts'
import type { NbdTarget } from './nbd-target.ts'
import type { NbdExtent } from './structured-reply.ts'
import { UnflushedChanges } from './unflushed-changes.ts'
import type { Change } from './unflushed-changes.ts'

/** How long and how often to try. */
export interface NbdRetryOptions extends NbdConnectOptions {
  /** How long after a loss (and at the start) connecting is tried. Default 60,000. */
  readonly retryForMs?: number
  /** Pause after a failed attempt, doubled each time. Default 20. */
  readonly retryDelayMs?: number
  /** Longest pause. Default 1,000. */
  readonly retryDelayMaxMs?: number
  /**
   * Changes that were answered but not flushed are kept, up to this many bytes, and sent again over a new connection: a
   * server that died may have lost them, and a later flush would wrongly vouch for them. When the bound is reached a flush
   * is sent. 0 keeps nothing: then a flush vouches only for what was written since the last reconnect. Default 32 MiB.
   */
  readonly unflushedBytesMax?: number
  /** Told of every lost connection and every new one after the first. */
  readonly onEvent?: (
    event: { readonly kind: 'lost'; readonly error: NbdError } | { readonly kind: 'reconnected'; readonly sizeBytes: number },
  ) => void
}

/**
 * A connection that outlives its server: when it is lost, what was not answered is sent again over a new one, until
 * `retryForMs` have passed since the loss; then NBD_RETRY_EXHAUSTED. Errors that the server answers with are passed on,
 * but for ESHUTDOWN, which counts as a loss. A request may so be done twice; all of them can be.
 */
export class RetryingNbdConnection {
  readonly #target: NbdTarget
  readonly #options: NbdRetryOptions
  readonly #unflushed: UnflushedChanges
  readonly #ended = new AbortController()
  #current: Promise<NbdConnection>
  #latest: NbdConnection
  #reconnectCount = 0
  #makingRoom: Promise<void> | null = null

  constructor(target: NbdTarget, options: NbdRetryOptions, first: NbdConnection) {
    this.#target = target
    this.#options = options
    this.#unflushed = new UnflushedChanges(options.unflushedBytesMax ?? 32 * 1024 * 1024)
    this.#current = Promise.resolve(first)
    this.#latest = first
  }

  /** The newest connection: its size, flags and contexts hold until the next loss. */
  get connection(): NbdConnection {
    return this.#latest
  }
  get sizeBytes(): number {
    return this.#latest.sizeBytes
  }
  /** New connections after the first. */
  get reconnectCount(): number {
    return this.#reconnectCount
  }

  /** As `NbdConnection.read`. */
  read(offsetBytes: number, lengthBytes: number): Promise<Uint8Array> {
    return this.#attempt((connection) => connection.read(offsetBytes, lengthBytes))
  }

  /** As `NbdConnection.write`. `data` may be reused once this resolves. */
  write(offsetBytes: number, data: Uint8Array, options: { fua?: boolean } = {}): Promise<void> {
    return this.#change({ kind: 'write', offsetBytes, lengthBytes: data.length, data }, (connection) =>
      connection.write(offsetBytes, data, options),
    )
  }

  /** As `NbdConnection.trim`. */
  trim(offsetBytes: number, lengthBytes: number, options: { fua?: boolean } = {}): Promise<void> {
    return this.#change({ kind: 'trim', offsetBytes, lengthBytes, data: null }, (connection) =>
      connection.trim(offsetBytes, lengthBytes, options),
    )
  }

  /** As `NbdConnection.writeZeroes`. */
  writeZeroes(
    offsetBytes: number,
    lengthBytes: number,
    options: { noHole?: boolean; fua?: boolean; fastZero?: boolean } = {},
  ): Promise<void> {
    const kind = options.noHole ? 'allocate-zeroes' : 'zeroes'
    return this.#change({ kind, offsetBytes, lengthBytes, data: null }, (connection) =>
      connection.writeZeroes(offsetBytes, lengthBytes, options),
    )
  }

  /** As `NbdConnection.flush`; vouches for everything answered before, over whichever connection. */
  flush(): Promise<void> {
    const mark = this.#unflushed.mark()
    return this.#attempt(async (connection) => {
      await connection.flush()
      this.#unflushed.flushed(mark)
    })
  }

  /** As `NbdConnection.blockStatus`. */
  blockStatus(offsetBytes: number, lengthBytes: number, options: { reqOne?: boolean } = {}): Promise<Map<string, NbdExtent[]>> {
    return this.#attempt((connection) => connection.blockStatus(offsetBytes, lengthBytes, options))
  }

  /** Stops trying and closes in an orderly way. Idempotent; never rejects. */
  async disconnect(): Promise<void> {
    this.#ended.abort(new NbdError('NBD_CLOSED', 'the connection is closed: the request was not sent', { retryable: false }))
    await this.#latest.disconnect()
    const [outcome] = await Promise.allSettled([this.#current])
    if (outcome.status === 'fulfilled') await outcome.value.disconnect()
  }

  async [Symbol.asyncDispose](): Promise<void> {
    await this.disconnect()
  }

  async #change(change: Change, send: (connection: NbdConnection) => Promise<void>): Promise<void> {
    while (!this.#unflushed.hasRoomFor(change)) {
      // One flush makes room for everybody who waits.
      this.#makingRoom ??= this.flush().finally(() => {
        this.#makingRoom = null
      })
      await this.#makingRoom
    }
    await this.#attempt(async (connection) => {
      await send(connection)
      this.#unflushed.add(change)
    })
  }

  async #attempt<T>(send: (connection: NbdConnection) => Promise<T>): Promise<T> {
    for (;;) {
      if (this.#ended.signal.aborted) throw this.#ended.signal.reason
      const current = this.#current
      const connection = await current
      try {
        return await send(connection)
      } catch (error) {
        if (!(error instanceof NbdError) || !error.retryable || this.#ended.signal.aborted) throw error
        // The first of all who lost the same connection starts the search for another.
        if (this.#current === current) {
          connection.destroy()
          this.#options.onEvent?.({ kind: 'lost', error })
          this.#current = this.#reconnect()
          this.#current.catch(() => {})
        }
      }
    }
  }

  async #reconnect(): Promise<NbdConnection> {
    const connection = await connectUntil(this.#target, this.#options, this.#ended.signal, async (fresh) => {
      for (const change of this.#unflushed.changes()) await resend(fresh, change)
    })
    this.#latest = connection
    this.#reconnectCount += 1
    this.#options.onEvent?.({ kind: 'reconnected', sizeBytes: connection.sizeBytes })
    return connection
  }
}

/**
 * Connects, trying again until `retryForMs` have passed, and gives a connection that does the same whenever it is lost.
 * @throws NbdError NBD_RETRY_EXHAUSTED, with the last failure as its cause; at once what no retry can mend (see `retryable`).
 */
export async function connectWithRetry(target: NbdTarget, options: NbdRetryOptions = {}): Promise<RetryingNbdConnection> {
  const first = await connectUntil(target, options, options.signal ?? null, async () => {})
  return new RetryingNbdConnection(target, options, first)
}

/** Tries to connect, and to `prepare` the connection, until it works, cannot work, or the time is over. */
async function connectUntil(
  target: NbdTarget,
  options: NbdRetryOptions,
  signal: AbortSignal | null,
  prepare: (connection: NbdConnection) => Promise<void>,
): Promise<NbdConnection> {
  const retryForMs = options.retryForMs ?? 60_000
  const delayMaxMs = options.retryDelayMaxMs ?? 1_000
  const deadline = performance.now() + retryForMs
  let delayMs = options.retryDelayMs ?? 20
  for (;;) {
    try {
      const connection = await connect(target, signal === null ? options : { ...options, signal })
      try {
        await prepare(connection)
        return connection
      } catch (error) {
        connection.destroy()
        throw error
      }
    } catch (error) {
      if (signal?.aborted || !(error instanceof NbdError) || !error.retryable) throw error
      if (performance.now() + delayMs > deadline) {
        throw new NbdError('NBD_RETRY_EXHAUSTED', `no connection within ${retryForMs} ms: ${error.message}`, { cause: error })
      }
    }
    await pause(delayMs, signal)
    delayMs = Math.min(2 * delayMs, delayMaxMs)
  }
}

function resend(connection: NbdConnection, change: Change): Promise<void> {
  switch (change.kind) {
    case 'write':
      return connection.write(change.offsetBytes, change.data ?? new Uint8Array())
    case 'trim':
      return connection.trim(change.offsetBytes, change.lengthBytes)
    case 'zeroes':
      return connection.writeZeroes(change.offsetBytes, change.lengthBytes)
    case 'allocate-zeroes':
      return connection.writeZeroes(change.offsetBytes, change.lengthBytes, { noHole: true })
    default:
      return change.kind satisfies never
  }
}

function pause(delayMs: number, signal: AbortSignal | null): Promise<void> {
  return new Promise((resolve) => {
    const done = (): void => {
      clearTimeout(timer)
      signal?.removeEventListener('abort', done)
      resolve()
    }
    const timer = setTimeout(done, delayMs)
    if (signal?.aborted) done()
    else signal?.addEventListener('abort', done, { once: true })
  })
}
