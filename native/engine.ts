/** The engine: everything that is open natively hangs on one. */
import {
  addon,
  type DeviceEventKind,
  type DeviceLimits,
  type EngineStats,
  type FillReport,
  type OpenReport,
  type RawEngine,
  type RootRef,
  type ThrottleLimits,
} from './addon.ts'
import { Listener, TlsConfig } from './connection.ts'
import { Device, flatten, type LayerRef } from './device.ts'
import { FrozenMap, MapCheck, MapLoader, Reach } from './maps.ts'
import { UsageTable } from './usage-table.ts'
import { call, settle } from './native-error.ts'
import { Store } from './store.ts'

export interface EngineOptions {
  /** The local file that clean leaves of maps are evicted to; absent: maps stay in memory. */
  pageFile?: string
  /** Memory for maps; default: 128 MiB for each TiB open, at least 128 MiB. */
  cacheBoundBytes?: number
  /**
   * A local directory in which what was answered but not flushed outlives the process; absent: after a kill only what was
   * flushed is there. One engine per directory at a time.
   */
  batchLogDirectory?: string
  /** Whether reads that have to wait may do so over io_uring; default: where the kernel allows it. */
  ioUring?: boolean
}

export interface DeviceEvent {
  kind: DeviceEventKind
  message: string
}

export interface DeviceSpec {
  volumeId: string
  sizeBytes: number
  /** Epoch of the lease. */
  epoch: number
  /** What the batch log of this volume has of an older epoch means nothing: others wrote the volume since. Default 0. */
  batchLogSinceEpoch?: number
  /** The durable map, and the lsn it includes. */
  map: FrozenMap
  mapLsn: number
  /** Every layer the map refers to, and the active and the next one. */
  layers: LayerRef[]
  /** Alias of the active layer; null: a read-only device. */
  active: number | null
  /** Alias of the layer that the catalog has recorded as next. */
  next: number | null
  throttle?: ThrottleLimits
  limits?: Partial<DeviceLimits>
  /** Called on the event loop, which it does not keep alive. At most 1024 events wait; later ones are dropped. */
  onEvent?: (event: DeviceEvent) => void
}

export interface SwapReport {
  /** The map as it was at the swap. */
  frozen: FrozenMap
  /** What it includes. */
  lsn: number
  /** How long the gate was closed. */
  pauseMs: number
}

/** A piece of a layer that is brought into another store. */
export interface FillSpec {
  /** The layer, sealed, where it is complete. */
  source: Pick<LayerRef, 'id' | 'store'>
  /** Where it is to be: made already, written by nobody else, and of the slots asked for read by nobody. */
  target: Pick<LayerRef, 'id' | 'store'>
  /** The slots that are to be there: triples (start slot, slot count, anything), ascending, not overlapping. */
  runs: Float64Array
  /** Slots before it are there. */
  fromSlot: number
  /** No further piece is begun when this much was copied; what is offloaded does not count. */
  maxBytes: number
  /** No further piece is begun after this time. */
  maxMilliseconds: number
  /** Whether blocks may be shared instead of copied, where both stores can. */
  offload: boolean
  /** Bytes copied in a second, on the average of the call, which takes as long as that needs; default: unlimited. */
  throttle?: number
}

/** Where a pool lies in a Ceph cluster. */
export interface RadosStoreOptions {
  /** ceph.conf; null: where Ceph's own programs look for it. */
  conf: string | null
  /** null: what the conf says. */
  keyring: string | null
  user: string
  pool: string
  namespace: string
  requestTimeoutMs: number
  connectTimeoutMs: number
  create: boolean
}

/** An engine with its threads and caches. Everything it gave out is unusable after `close`. */
export class Engine {
  readonly #raw: RawEngine

  /** @throws NATIVE_MISSING, PAGE_FILE_ERROR */
  constructor(options: EngineOptions = {}) {
    const { Engine: RawClass } = addon()
    this.#raw = call(
      () =>
        new RawClass(
          options.pageFile ?? null,
          options.cacheBoundBytes ?? null,
          options.batchLogDirectory ?? null,
          options.ioUring === false,
        ),
    )
  }

  /** Opens a directory of sparse files; `reserveBytes` are kept back for deletes on a full disk. */
  openFileStore(options: { path: string; create: boolean; reserveBytes: number }): Promise<Store> {
    return settle(async () => new Store(await this.#raw.openFileStore(options.path, options.create, options.reserveBytes)))
  }

  /**
   * Opens a namespace of a RADOS pool (option docs: southbound/ceph/README.md). `requestTimeoutMs`, `connectTimeoutMs`: whole seconds;
   * nothing waits longer for the cluster.
   *
   * @throws POOL_UNAVAILABLE the library is missing, no monitor answers; POOL_ACCESS_DENIED no key, or not the right ones;
   *   LAYER_MISSING (operation open-pool: no such RADOS pool; open: nothing of ours in it, and not `create`); FORMAT_VERSION
   */
  openRadosStore(options: RadosStoreOptions): Promise<Store> {
    const { conf, keyring, ...rest } = options
    return settle(
      async () => new Store(await this.#raw.openRadosStore({ conf: conf ?? undefined, keyring: keyring ?? undefined, ...rest })),
    )
  }

  /** Layers in memory. `record`: keep the history for crash images. */
  memoryStore(options: { capacityBytes: number; record?: boolean }): Store {
    return call(() => new Store(this.#raw.memoryStore(options.capacityBytes, options.record ?? false)))
  }

  /** A store around a store that fails on purpose, once `setFaults` says how. */
  faultStore(inner: Store): Store {
    return call(() => new Store(this.#raw.faultStore(inner.raw)))
  }

  mapLoader(root: RootRef): MapLoader {
    return call(() => new MapLoader(this.#raw.mapLoader(root)))
  }

  /** A map in which every slot has one owner (0: hole): no pages at all. */
  uniformMap(owner: number): FrozenMap {
    return call(() => new FrozenMap(this.#raw.uniformMap(owner)))
  }

  reach(): Reach {
    return call(() => new Reach(this.#raw.reach()))
  }

  /** A walk that goes on after damaged pages; it notes who names `watched` pages and layers. */
  mapCheck(watched: { pages?: Float64Array; layers?: Uint32Array } = {}): MapCheck {
    return call(() => new MapCheck(this.#raw.mapCheck(watched.pages ?? new Float64Array(), watched.layers ?? new Uint32Array())))
  }

  /** What resources take, to be filled with their roots. */
  usage(): UsageTable {
    return call(() => new UsageTable(this.#raw.usage()))
  }

  /**
   * Opens a device: replays the journal of its active and of its next layer.
   *
   * @throws CATALOG_BEHIND, JOURNAL_CORRUPT, LAYER_MISSING, PAGE_*: nothing was changed then but a torn tail that was cut
   */
  openDevice(spec: DeviceSpec): Promise<{ device: Device; report: OpenReport }> {
    const { aliases, ids, stores } = flatten(spec.layers)
    const { volumeId, sizeBytes, epoch, batchLogSinceEpoch = 0, mapLsn, throttle, limits, onEvent } = spec
    const active = spec.active ?? undefined
    const next = spec.next ?? undefined
    const fields = { volumeId, sizeBytes, epoch, batchLogSinceEpoch, mapLsn, active, next, throttle, limits, aliases, ids }
    const listener = onEvent === undefined ? null : (kind: DeviceEventKind, message: string): void => onEvent({ kind, message })
    return settle(async () => {
      const opened = await this.#raw.openDevice(fields, spec.map.raw, stores, listener)
      return { device: new Device(opened.device()), report: opened.report() }
    })
  }

  /**
   * Opens a regular file as a read-only device of its length: bytes of others, as a source. It is read through the one
   * descriptor that this opens.
   *
   * @throws LAYER_MISSING if there is no such file, IO_ERROR
   */
  openFileDevice(options: { path: string }): Promise<Device> {
    return settle(async () => new Device(await this.#raw.openFileDevice(options.path)))
  }

  /**
   * Freezes the maps of all devices at one point in time and makes `next` their active layers.
   *
   * @throws DEVICE_BUSY past the deadline, SWAP_UNCOMMITTED; nothing has changed then
   */
  swap(devices: { device: Device; next: LayerRef }[], deadlineMs: number): Promise<SwapReport[]> {
    const { aliases, ids, stores } = flatten(devices.map((entry) => entry.next))
    const handles = devices.map((entry) => entry.device.raw)
    return settle(async () => {
      const reports = await this.#raw.swap(handles, aliases, ids, stores, deadlineMs)
      return reports.map((report) => ({ frozen: new FrozenMap(report.frozen()), lsn: report.lsn(), pauseMs: report.pauseMs() }))
    })
  }

  /**
   * Fills a piece of a replica: copies what is data (of which a hole of the source, or a block of zeros, is none), makes it durable,
   * reads it back and compares it. At least one piece of some size is done however small the limits are.
   *
   * @throws VERIFY_FAILED naming layer and offset, LAYER_MISSING, NO_SPACE, IO_ERROR and what else stores answer (`side` in the
   *   values says whose it is: 'source' or 'target'). Any of the slots from `fromSlot` on may have been filled then; the same call
   *   may be made again
   */
  fillPiece(spec: FillSpec): Promise<FillReport> {
    const { source, target, runs, fromSlot, maxBytes, maxMilliseconds, offload, throttle = 0 } = spec
    const fields = { sourceId: source.id, targetId: target.id, fromSlot, maxBytes, maxMilliseconds, offload, throttle }
    return settle(async () => {
      const { nextSlot = null, ...rest } = await this.#raw.fillPiece(fields, source.store.raw, target.store.raw, runs)
      return { nextSlot, ...rest }
    })
  }

  /**
   * Resolves when every request that was in flight on any open device at the call has finished, or this time has passed: with the ids
   * of what is open and has requests that have not.
   */
  readBarrier(waitMs: number): Promise<string[]> {
    return settle(() => this.#raw.readBarrier(waitMs))
  }

  /**
   * Listens on a Unix socket of this mode (and group). A socket file that a killed process left is replaced.
   *
   * @throws ADDRESS_IN_USE, LISTEN_FAILED
   */
  listenUnix(options: { path: string; mode: number; groupId?: number; backlog?: number }): Promise<Listener> {
    const { path, mode, groupId, backlog } = options
    return settle(async () => new Listener(await this.#raw.listenUnix(path, mode, groupId ?? null, backlog ?? null)))
  }

  /**
   * Listens on a TCP address; port 0 picks a free one.
   *
   * @throws ADDRESS_IN_USE, LISTEN_FAILED
   */
  listenTcp(options: { host: string; port: number }): Promise<Listener> {
    return settle(async () => new Listener(await this.#raw.listenTcp(options.host, options.port)))
  }

  /**
   * Reads the credentials of a TLS server from a folder: `server-cert.pem` and `server-key.pem`, and to verify clients
   * `ca-cert.pem` and, if there is one, `ca-crl.pem`. With `verifyClients` a client needs a certificate of that authority.
   *
   * @throws TLS_CREDENTIALS_INVALID naming the file and what is wrong with it
   */
  loadTls(options: { directory: string; verifyClients: boolean }): Promise<TlsConfig> {
    return settle(async () => new TlsConfig(await this.#raw.loadTls(options.directory, options.verifyClients)))
  }

  stats(): EngineStats {
    return call(() => this.#raw.stats())
  }

  /** Closes listeners, connections and devices, and joins every thread. Rejects with the first error that closing a device gave. Idempotent. */
  close(): Promise<void> {
    return settle(() => this.#raw.close())
  }
}
