/** Listeners and the connections they accept. */
import type { ListenerAddress, RawConnection, RawListener, RawTlsConfig, ServeEnd, TlsPeer } from './addon.ts'
import type { Device } from './device.ts'
import type { FrozenMap } from './maps.ts'
import { call, settle } from './native-error.ts'

/** What a server of TLS shows, and whom it lets in: made by `Engine.loadTls`, used by any number of connections. */
export class TlsConfig {
  /** @internal */
  readonly raw: RawTlsConfig

  /** @internal */
  constructor(raw: RawTlsConfig) {
    this.raw = raw
  }
}

/** How replies look, and requests with them: numbers, chunks, or headers of 32 bytes with lengths of 64 bits. */
export type NbdReplyForm = 'simple' | 'structured' | 'extended'

/**
 * What a metadata context tells: `allocation` (1 hole, 2 zero), `depth` (0 nowhere, 1 in the layer that the volume writes, 2 in
 * one that it shares), or `changed-since` (1 where the device's map is no longer `base`).
 */
export type NbdMetaContext =
  | { readonly id: number; readonly kind: 'allocation' | 'depth' }
  | { readonly id: number; readonly kind: 'changed-since'; readonly base: FrozenMap }

/** What the negotiation of NBD settled. */
export interface ServeNbdOptions {
  replies: NbdReplyForm
  /** What the client selected, at most 32, each with an id of its own; none without chunks. */
  contexts: readonly NbdMetaContext[]
  /** The export is read-only, whatever the device is. */
  readOnly: boolean
  /** Longest read and longest payload; default 32 MiB. */
  requestBytesMax?: number
}

/**
 * One client. It is driven from here during the negotiation, one call after the other; then `serveNbd` takes it over.
 * A connection that nobody refers to any more is closed, unless it serves.
 */
export class Connection {
  readonly #raw: RawConnection
  /** Who is at the other end, for logs and listings. */
  readonly peer: string

  /** @internal */
  constructor(raw: RawConnection) {
    this.#raw = raw
    this.peer = raw.peer()
  }

  /**
   * Exactly `lengthBytes` (at most 64 KiB), or null at the end of the stream.
   *
   * @throws READ_TIMEOUT after `timeoutMs`, CONNECTION_CLOSED
   */
  read(lengthBytes: number, timeoutMs?: number): Promise<Uint8Array | null> {
    return settle(() => this.#raw.read(lengthBytes, timeoutMs ?? null))
  }

  /**
   * Sends everything. `bytes` are copied before the call returns.
   *
   * @throws CONNECTION_CLOSED
   */
  write(bytes: Uint8Array): Promise<void> {
    return settle(() => this.#raw.write(bytes))
  }

  /**
   * Shakes hands as the server of a TLS connection; what is read and written from then on goes through TLS. Call it while no
   * other call of the connection is under way. The connection is closed if it fails.
   *
   * @throws TLS_HANDSHAKE_FAILED, READ_TIMEOUT after `timeoutMs`, CONNECTION_CLOSED
   */
  startTls(config: TlsConfig, timeoutMs: number): Promise<TlsPeer> {
    return settle(() => this.#raw.startTls(config.raw, timeoutMs))
  }

  /** Serves the device natively until the connection ends; whatever the client does is no rejection but a reason. */
  serveNbd(device: Device, options: ServeNbdOptions): Promise<ServeEnd> {
    const { replies, contexts, readOnly, requestBytesMax } = options
    const ids = contexts.map(({ id }) => id)
    const kinds = contexts.map(({ kind }) => kind)
    const maps = contexts.map((context) => (context.kind === 'changed-since' ? context.base.raw : null))
    return settle(() => this.#raw.serveNbd(device.raw, replies, ids, kinds, maps, readOnly, requestBytesMax ?? null))
  }

  /**
   * Takes no more requests, finishes those in flight, answers with ESHUTDOWN what comes meanwhile and for a moment after,
   * closes. Resolves when the connection has ended; a client that does not take its answers holds that up until `close`.
   */
  drain(): Promise<void> {
    return settle(() => this.#raw.drain())
  }

  /** Ends the connection now, also while it serves. Resolves when nothing of it touches a device any more. Idempotent. */
  close(): Promise<void> {
    return settle(() => this.#raw.close())
  }
}

/** A listening socket. */
export class Listener {
  readonly #raw: RawListener
  /** Where it listens: a path, or a host with the port that was really taken. */
  readonly address: ListenerAddress

  /** @internal */
  constructor(raw: RawListener) {
    this.#raw = raw
    this.address = call(() => raw.address())
  }

  /** The next connection; null once the listener is closed. */
  accept(): Promise<Connection | null> {
    return settle(async () => {
      const raw = await this.#raw.accept()
      return raw === null ? null : new Connection(raw)
    })
  }

  /** Stops listening and removes the socket file; connections live on. Idempotent. */
  close(): Promise<void> {
    return settle(() => this.#raw.close())
  }
}
