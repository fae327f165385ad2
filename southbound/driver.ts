/**
 * What a southbound driver is: it makes pools on one kind of backend.
 *
 * A driver decides where a pool's bytes lie, who may have it open (the lock and the owner record) and what the backend can
 * do; the bytes themselves are moved by the pool's native store. What drivers can do differently are fields of
 * `PoolCapabilities`, never a question after a driver's name.
 */
import type { Engine, Store } from '@atoll/native'

/** No reserve is larger. */
export const reserveBytesMax = 64 * 2 ** 30

/** What a pool can do. Constant while it is open. */
export interface PoolCapabilities {
  /** The unit that a first write to a shared slot copies up. */
  readonly copyUnitBytes: number
  /** Smaller ranges cannot be freed; 0: nothing can be punched, space comes back only when a whole layer goes. */
  readonly punchUnitBytes: number
  /** A write that returned is durable: a sync costs nothing. */
  readonly ackIsDurable: boolean
  /** What keeps a second writer out: a lock that dies with its process, the backend's blocklist, a lease in time, or nothing. */
  readonly fence: 'lock' | 'blocklist' | 'lease' | 'none'
  /** Two pools with the same value can copy inside the backend; null: never. */
  readonly offloadDomain: string | null
  /** Other nodes can open the same pool. */
  readonly sharedByNodes: boolean
  /** Survives the end of the process. */
  readonly persistent: boolean
}

/** One layer as the backend shows it. */
export interface LayerListing {
  id: string
  allocatedBytes: number
  /** Offset after the last byte ever written. */
  lengthBytes: number
}

export interface PoolUsage {
  /** Size of the backend. */
  totalBytes: number
  /** Free for new data. */
  freeBytes: number
  /** Allocated by this pool. */
  storedBytes: number
  /** Kept back at present for deletes on a full backend; 0: given up, or the pool keeps none. */
  reserveBytes: number
}

/** One thing that a check found. */
export interface Finding {
  severity: 'note' | 'warning' | 'error'
  /** Stable, kebab-case: 'owner-record-missing', 'no-free-space', … */
  kind: string
  /** The file, layer or record it is about. */
  object: string
  /** A sentence with what to do. */
  message: string
}

/** What may be the matter with the backend of a pool that is open. */
export type PoolConditionKind =
  /** The pool does not answer. */
  | 'silent'
  /** The backend lets this daemon do nothing any more: somebody has taken the pool over. */
  | 'shut-out'
  /** The pool answers with errors. */
  | 'failing'
  | 'full'
  | 'nearly-full'
  | 'osds-full'
  | 'osds-down'
  | 'inactive'
  | 'degraded'
  | 'damaged'
  | 'paused'
  | 'slow-requests'
  | 'monitors-silent'
  | 'monitors-down'
  /** The backend calls something else an error. */
  | 'cluster-error'
  /** Of no harm: `PoolUsage.storedBytes` is not known yet. */
  | 'counting'

/** Under these, clients of the pool wait: what needs the pool for something else had better not. */
const stalling: ReadonlySet<PoolConditionKind> = new Set(['silent', 'full', 'inactive', 'paused'])

/** Whether requests to the pool wait, as far as it is known. */
export function isStalled({ conditions }: PoolHealth): boolean {
  return conditions.some(({ kind }) => stalling.has(kind))
}

export interface PoolCondition {
  readonly kind: PoolConditionKind
  readonly severity: Finding['severity']
  /** A sentence with the backend's own words and what follows from them. */
  readonly message: string
}

/** How the backend of an open pool is, as it was found not long ago. */
export interface PoolHealth {
  /** Milliseconds since 1970. */
  readonly observedAt: number
  /** How long it took to read a few bytes; null: they were not read, or nobody tried. */
  readonly answerMs: number | null
  /** Empty: there is nothing to say. */
  readonly conditions: readonly PoolCondition[]
}

/** How a layer's journal ends: `Store.sealLayer`. */
export interface LayerSeal {
  volumeId: string
  epoch: number
  finalLsn: number
  /** The layer that became active instead; null: none. */
  successor: string | null
}

/** What a driver needs to open a pool. */
export interface PoolContext {
  readonly engine: Engine
  readonly poolId: string
  /** As the user gave them; the driver parses them again. */
  readonly options: Readonly<Record<string, string>>
  /** Who opens: stands in the pool's owner record. */
  readonly catalogId: string
  /** What somebody who is kept out reads: `pid 123 on host since …`. */
  readonly ownerText: string
  /** Now, in milliseconds since 1970. */
  readonly now: () => number
  /**
   * True (the default): what is missing is made. False: the pool must be there already, so that a disk that is not mounted is
   * found out rather than hidden under a new, empty pool.
   */
  readonly create?: boolean
  /** The reserve that the operator set for this pool (at most `reserveBytesMax`), instead of what the options say. */
  readonly reserveBytes?: number
  /**
   * True: whoever has the pool is shut out of the backend for good, so that nothing of it lands any more, and then the pool is
   * opened. Only a driver that `canShutOut` does that; for others it is as false (the default): POOL_LOCKED.
   */
  readonly shutOutHolder?: boolean
  /** A pool of this other catalog is taken over instead of refused: its content was brought into the catalog that opens it. */
  readonly takeOverFrom?: string
}

/** Which catalog a pool belongs to. */
export interface PoolOwner {
  /** null: it was given up. */
  readonly catalogId: string | null
  readonly epoch: number
  /** When this epoch began, ISO 8601. */
  readonly since: string
}

/** A pool that is looked at before it is opened. Its lock is held, and nothing of it is changed. */
export interface PoolInspection {
  /** For reading records; layers are not to be written. */
  readonly store: Store
  /** null: nobody has ever opened it. */
  readonly owner: PoolOwner | null
  /** Lets go of the lock. Idempotent. */
  close(): Promise<void>
}

/**
 * An open pool. Any method may run at the same time as any other, on other layers; the caller sees to it that a layer has at
 * most one mutating job at a time (I2). Errors are AtollErrors: those of the native store, and POOL_CLOSED after `close`.
 */
export interface PoolHandle {
  /** Name of the driver. For people and for `pool show`; nothing is decided by it. */
  readonly driver: string
  readonly poolId: string
  readonly capabilities: PoolCapabilities
  /** The native half: what devices open layers in. */
  readonly store: Store

  /** Makes an empty layer; durable on return. @throws AtollError LAYER_EXISTS, NO_SPACE */
  createLayer(id: string): Promise<void>
  /** Removes the layer and its journal; durable on return. What is not there is no error. */
  removeLayer(id: string): Promise<void>
  /** Every layer there is, known to the catalog or not (I11), in any order. */
  listLayers(): Promise<LayerListing[]>
  /** The same without their sizes, which may be much to ask for. */
  listLayerIds(): Promise<string[]>
  layerExists(id: string): Promise<boolean>
  /** A backend that has to be asked for free space was, not long ago. */
  usage(): Promise<PoolUsage>
  /** Waits for nothing. @throws AtollError POOL_CLOSED */
  health(): PoolHealth
  /**
   * Ends the journal of a closed volume's layer. Sealing again with the same values changes nothing.
   * @throws AtollError LAYER_MISSING, CATALOG_BEHIND if the journal goes on after `finalLsn` (nothing is changed then)
   */
  sealLayer(id: string, seal: LayerSeal): Promise<void>
  /**
   * Frees everything of a sealed layer but `keepRuns`: triples (start slot, slot count, owner) as `Reach.runs` gives them,
   * ascending, not overlapping. The caller has made sure that nothing reads the rest any more (I5).
   * @returns the bytes that were freed
   * @throws AtollError POOL_UNSUPPORTED if the pool cannot punch, LAYER_MISSING
   */
  punchExcept(id: string, keepRuns: Float64Array): Promise<number>
  /** Frees the space kept back for deletes on a full backend. Idempotent. */
  releaseReserve(): Promise<void>
  /** Makes the reserve whole again if there is space; returns its bytes. */
  restoreReserve(): Promise<number>
  /**
   * Keeps back this much from now on, until the pool is closed; null: as much as its options say.
   * @throws AtollError NO_SPACE if it does not fit: what was kept before stays; POOL_UNSUPPORTED if the pool keeps no reserve
   */
  setReserve(bytes: number | null): Promise<void>
  /** Looks at what the driver itself is responsible for: owner record, lock. Changes nothing. */
  check(): Promise<Finding[]>
  /** Ends the pool for good: its owner record goes, the pool is closed. @throws AtollError POOL_NOT_EMPTY if layers are left */
  destroy(): Promise<void>
  /** Lets go of the lock. Waits for calls that are running. Idempotent. */
  close(): Promise<void>
}

/** A kind of pool. */
export interface Driver {
  readonly name: string
  /** One line for `pool create --help`. */
  readonly summary: string
  /** Whether `open` knows `shutOutHolder`. */
  readonly canShutOut: boolean
  /**
   * Checks options without touching the backend and returns them as they are to be recorded (defaults are not filled in).
   * @throws AtollError POOL_OPTION_INVALID naming the option, the value and what is allowed
   */
  parseOptions(options: Readonly<Record<string, string>>): Record<string, string>
  /**
   * Opens the pool and makes it the catalog's: takes its lock and raises the epoch of its owner record.
   * @throws AtollError POOL_LOCKED naming the holder, POOL_OWNED_BY_OTHER naming the catalog, POOL_UNAVAILABLE, POOL_OPTION_INVALID
   */
  open(context: PoolContext): Promise<PoolHandle>
  /**
   * Takes the lock of a pool that is there, whosever it is, so that it can be read: `create` and `takeOverFrom` do not matter.
   * @throws AtollError POOL_LOCKED naming the holder, POOL_UNAVAILABLE, POOL_OPTION_INVALID, POOL_CORRUPT, FORMAT_VERSION
   */
  inspect(context: PoolContext): Promise<PoolInspection>
}
