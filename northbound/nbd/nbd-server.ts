/**
 * Listens, and runs one `NbdClientConnection` for every client.
 *
 * Negotiation is TypeScript over native connections. Rejected: accepting with `node:net` and handing the descriptor over;
 * Node gives no descriptor away without keeping it too, and the two would read from one socket.
 */
import type { Logger } from '@atoll/core'
import type { Connection, Engine, Listener } from '@atoll/native'
import type { ExportTable } from './export-table.ts'
import { admit, addressOf, defaultConnectionLimits, type ConnectionLimits } from './connection-limits.ts'
import { NbdClientConnection, type ServerTls } from './nbd-client-connection.ts'
import { defaultNegotiationLimits, type NegotiationLimits } from './negotiation-limits.ts'

/** Where to listen: a unix socket with its file mode and group, or TCP (port 0 picks a free one). */
export type NbdListen =
  | { readonly path: string; readonly mode: number; readonly groupId?: number; readonly backlog?: number }
  | { readonly host: string; readonly port: number }

export interface NbdServerOptions {
  readonly engine: Pick<Engine, 'listenUnix' | 'listenTcp'>
  readonly exports: ExportTable
  readonly log: Logger
  readonly listen: NbdListen
  /** Whether LIST names the exports. Default true. */
  readonly listing?: boolean
  /** Default: none. Without it everything goes in the clear. */
  readonly tls?: ServerTls
  /** How many clients it takes; see connection-limits.ts. */
  readonly connectionLimits?: Partial<ConnectionLimits>
  /** How long `drain` waits for requests in flight before it cuts a client off. Default 10,000. */
  readonly drainTimeoutMs?: number
  readonly limits?: Partial<NegotiationLimits>
}

/** A client, for listings. */
export interface NbdServerConnection {
  readonly peer: string
  /** Null while it negotiates. */
  readonly exportId: string | null
}

export interface NbdServer {
  readonly address: Listener['address']
  connections(): NbdServerConnection[]
  /** Finishes the requests in flight of every client of the export and closes them. Resolves when all have left. */
  disconnectExport(exportId: string): Promise<void>
  /**
   * For the shutdown: clients finish what is in flight and are closed; new ones, and those that negotiate, are answered
   * ERR_SHUTDOWN until `close`. Idempotent.
   */
  drain(): Promise<void>
  /** Closes the listener and every client, and resolves when all have left their exports. Idempotent. */
  close(): Promise<void>
}

/** Pause after an accept that failed: it will mostly fail again at once. */
const acceptRetryMs = 100

/** Listens and serves. @throws AtollError what `listenUnix` and `listenTcp` throw (ADDRESS_IN_USE, LISTEN_FAILED). */
export async function startNbdServer(options: NbdServerOptions): Promise<NbdServer> {
  const listener = await ('path' in options.listen
    ? options.engine.listenUnix(options.listen)
    : options.engine.listenTcp(options.listen))
  return new RunningNbdServer(listener, options)
}

class RunningNbdServer implements NbdServer {
  readonly #listener: Listener
  readonly #options: NbdServerOptions
  readonly #limits: NegotiationLimits
  readonly #connectionLimits: ConnectionLimits
  /** Those that count, the oldest first. */
  readonly #clients = new Set<NbdClientConnection>()
  /** Those that made room for others and are not gone yet. */
  readonly #leaving = new Set<NbdClientConnection>()
  readonly #accepting: Promise<void>
  #madeRoomCount = 0
  #isDraining = false
  #isClosing = false
  #drained: Promise<void> | null = null
  #closed: Promise<void> | null = null

  constructor(listener: Listener, options: NbdServerOptions) {
    this.#listener = listener
    this.#options = options
    this.#limits = { ...defaultNegotiationLimits, ...options.limits }
    this.#connectionLimits = { ...defaultConnectionLimits, ...options.connectionLimits }
    this.#accepting = this.#accept()
  }

  get address(): Listener['address'] {
    return this.#listener.address
  }

  connections(): NbdServerConnection[] {
    return [...this.#clients].map(({ peer, exportId }) => ({ peer, exportId }))
  }

  async disconnectExport(exportId: string): Promise<void> {
    await Promise.all([...this.#clients].filter((client) => client.exportId === exportId).map((client) => this.#end(client)))
  }

  drain(): Promise<void> {
    this.#isDraining = true
    this.#drained ??= Promise.all(
      [...this.#clients].filter((client) => client.exportId !== null).map((client) => this.#end(client)),
    ).then(() => {})
    return this.#drained
  }

  close(): Promise<void> {
    this.#closed ??= this.#close()
    return this.#closed
  }

  async #close(): Promise<void> {
    this.#isDraining = true
    this.#isClosing = true
    await this.#listener.close()
    await this.#accepting
    await Promise.all([...this.#clients, ...this.#leaving].map((client) => this.#cutOff(client)))
  }

  async #accept(): Promise<void> {
    while (!this.#isClosing) {
      let connection: Connection | null
      try {
        connection = await this.#listener.accept()
      } catch (error) {
        this.#options.log.error({ err: error }, 'accepting an NBD client failed')
        await new Promise((resolve) => setTimeout(resolve, acceptRetryMs))
        continue
      }
      if (connection === null) return
      this.#take(connection)
    }
  }

  #take(connection: Connection): void {
    const { exports, log, listing = true, tls } = this.#options
    const admission = this.#isClosing
      ? ({ admitted: false, reason: 'the server is closing' } as const)
      : admit(this.#clients, addressOf(connection.peer), this.#connectionLimits)
    if (!admission.admitted) {
      log.warn({ peer: connection.peer, reason: admission.reason }, 'an NBD client was turned away: too many connections')
      connection.close().catch((error: unknown) => log.warn({ err: error }, 'an NBD connection could not be closed cleanly'))
      return
    }
    if (admission.evicted !== null) this.#makeRoom(admission.evicted)
    const client = new NbdClientConnection(connection, {
      exports,
      log,
      listing,
      limits: this.#limits,
      isDraining: () => this.#isDraining,
      ...(tls === undefined ? {} : { tls }),
    })
    this.#clients.add(client)
    void client.run().finally(() => {
      this.#clients.delete(client)
      this.#leaving.delete(client)
    })
  }

  /** Ends a negotiation for another. It counts no more from here on, though it may take a moment to go. */
  #makeRoom(client: NbdClientConnection): void {
    const { log } = this.#options
    this.#madeRoomCount += 1
    const fields = { peer: client.peer, count: this.#madeRoomCount }
    const what = 'an NBD client that had not finished its negotiation made room for another'
    // Every power of two: a flood is seen in the log and does not fill it.
    if ((this.#madeRoomCount & (this.#madeRoomCount - 1)) === 0) log.warn(fields, what)
    else log.debug(fields, what)
    this.#clients.delete(client)
    this.#leaving.add(client)
    void this.#cutOff(client)
  }

  /** Drains a client, and cuts it off when that takes too long. */
  async #end(client: NbdClientConnection): Promise<void> {
    const timeoutMs = this.#options.drainTimeoutMs ?? 10_000
    const timer = setTimeout(() => {
      this.#options.log.warn(
        { peer: client.peer, export: client.exportId, timeoutMs },
        'requests in flight did not finish in time; the client is cut off',
      )
      void this.#cutOff(client)
    }, timeoutMs)
    try {
      await client.drain()
    } catch (error) {
      this.#options.log.warn({ err: error, peer: client.peer }, 'an NBD client could not be drained')
      await this.#cutOff(client)
    } finally {
      await client.ended
      clearTimeout(timer)
    }
  }

  async #cutOff(client: NbdClientConnection): Promise<void> {
    try {
      await client.close()
    } catch (error) {
      this.#options.log.warn({ err: error, peer: client.peer }, 'an NBD connection could not be closed cleanly')
    }
    await client.ended
  }
}
