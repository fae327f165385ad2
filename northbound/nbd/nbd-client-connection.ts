import { AtollError, isAtollError, type Logger } from '@atoll/core'
import type { Connection, TlsConfig } from '@atoll/native'
import { certificateName } from './certificate-name.ts'
import { addressOf, type LimitedClient } from './connection-limits.ts'
import type { ExportConnection, ExportTable, NbdExport } from './export-table.ts'
import { negotiate } from './negotiation.ts'
import type { NegotiationLimits } from './negotiation-limits.ts'
import { NegotiationEnded } from './option-channel.ts'
import type { TlsMode } from './option-starttls.ts'
import { transmit } from './phase-transmission.ts'

/** TLS of a server. */
export interface ServerTls {
  readonly mode: TlsMode
  /** Asked for each handshake: certificates may be replaced while the server runs. */
  config(): TlsConfig
}

/** What a connection takes from its server. */
export interface ServerSettings {
  readonly exports: ExportTable
  readonly log: Logger
  readonly listing: boolean
  readonly limits: NegotiationLimits
  readonly tls?: ServerTls
  isDraining(): boolean
}

/**
 * One client, from its first byte to its last. It is in its export's list from the moment that GO succeeds until native code
 * has let go of the device.
 */
export class NbdClientConnection implements ExportConnection, LimitedClient {
  /** Its network address, by which it is limited; null on a unix socket. */
  readonly address: string | null
  readonly #connection: Connection
  readonly #settings: ServerSettings
  readonly #ended = Promise.withResolvers<void>()
  #entry: NbdExport | null = null
  #peer: string
  #isProtected = false

  constructor(connection: Connection, settings: ServerSettings) {
    this.#connection = connection
    this.#settings = settings
    this.#peer = connection.peer
    this.address = addressOf(connection.peer)
  }

  /** Where it comes from and, once that is known, whom its certificate names. */
  get peer(): string {
    return this.#peer
  }

  get isNegotiating(): boolean {
    return this.#entry === null
  }

  /** The export that it serves; null while it negotiates. */
  get exportId(): string | null {
    return this.#entry?.id ?? null
  }

  /** Serves until the end. Never rejects: what goes wrong with a client is logged, and the others go on. */
  async run(): Promise<void> {
    const { log, limits } = this.#settings
    // Bounds also a client that does not read our answers; it is closed under the waiting read or write.
    const timer = setTimeout(() => {
      log.info({ peer: this.peer, limitMs: limits.handshakeTimeoutMs }, 'an NBD client did not finish its negotiation in time')
      void this.#closeQuietly()
    }, limits.handshakeTimeoutMs)
    try {
      const transmission = await negotiate(
        this.#connection,
        { ...this.#contextFacts(), enter: (entry) => this.#enter(entry) },
        limits,
      )
      clearTimeout(timer)
      log.debug({ peer: this.peer, export: transmission.entry.id }, 'NBD client connected')
      const end = await transmit(this.#connection, transmission)
      const fields = { peer: this.peer, export: transmission.entry.id, reason: end.reason, detail: end.message }
      if (end.reason === 'error') log.warn(fields, 'NBD client disconnected')
      else log.debug(fields, 'NBD client disconnected')
    } catch (error) {
      if (error instanceof NegotiationEnded) log.debug({ peer: this.peer, reason: error.message }, 'an NBD negotiation ended')
      else if (isAtollError(error) && connectionCodes.has(error.code))
        log.debug({ peer: this.peer, err: error }, 'an NBD client went away')
      else if (isAtollError(error, 'TLS_HANDSHAKE_FAILED'))
        log.info({ peer: this.peer, reason: error.message }, 'an NBD client could not start TLS')
      else log.error({ peer: this.peer, err: error }, 'serving an NBD client failed')
    } finally {
      clearTimeout(timer)
      await this.#closeQuietly()
      if (this.#entry !== null) this.#settings.exports.leave(this.#entry, this)
      this.#ended.resolve()
    }
  }

  /** Resolves when `run` has: the export is left. */
  get ended(): Promise<void> {
    return this.#ended.promise
  }

  async drain(): Promise<void> {
    await this.#connection.drain()
  }

  async close(): Promise<void> {
    await this.#connection.close()
  }

  #contextFacts(): Omit<Parameters<typeof negotiate>[1], 'enter'> {
    const { exports, listing } = this.#settings
    const facts = { exports, listing, isDraining: () => this.#settings.isDraining() }
    const { tls } = this.#settings
    if (tls === undefined) return facts
    const start = (): Promise<void> => this.#startTls(tls.config())
    return { ...facts, tls: { mode: tls.mode, isActive: () => this.#isProtected, start } }
  }

  async #startTls(config: TlsConfig): Promise<void> {
    const { log, limits } = this.#settings
    const { certificate, protocol, cipherSuite } = await this.#connection.startTls(config, limits.handshakeTimeoutMs)
    this.#isProtected = true
    if (certificate !== undefined) this.#peer = `${this.#connection.peer} (${certificateName(certificate)})`
    log.debug({ peer: this.#peer, protocol, cipherSuite }, 'an NBD client started TLS')
  }

  #enter(entry: NbdExport): void {
    // A drain that began while the option was looked at has not seen this client: it must not slip in behind.
    if (this.#settings.isDraining()) throw new AtollError('EXPORT_GONE', 'the server is shutting down')
    this.#settings.exports.enter(entry, this)
    this.#entry = entry
  }

  async #closeQuietly(): Promise<void> {
    try {
      await this.#connection.close()
    } catch (error) {
      this.#settings.log.warn({ peer: this.peer, err: error }, 'an NBD connection could not be closed cleanly')
    }
  }
}

/** What native connections fail with when the peer is gone or we have closed them. */
const connectionCodes: ReadonlySet<string> = new Set(['CONNECTION_CLOSED', 'READ_TIMEOUT'])
