/**
 * What is open in this process, and why the last attempt to open something failed.
 *
 * Rules:
 * - A resource is in the table from the moment its device serves until the device is closed; one entry per resource.
 * - Entries are added, removed and changed only by who holds the resource's lock. Apart from the device, the fields of a
 *   volume say what the catalog has.
 */
import { AtollError } from '@atoll/core'
import type { Device, OpenReport } from '@atoll/native'
import { PoolTotals, type DeviceTotals } from './device-totals.ts'

/** A layer by its two names. */
export interface LayerName {
  /** The u32 of maps. */
  readonly alias: number
  /** The UUID of its files. */
  readonly id: string
}

/** A layer and the pool whose replica is meant. */
export interface PlacedLayer extends LayerName {
  readonly poolId: string
}

/** What the owner of an open resource is told. */
export interface OpenEvent {
  /** poisoned: a sync failed (I6); flush-failed: no space, tried again; lease-lost: somebody else owns the volume now. */
  readonly kind: 'poisoned' | 'flush-failed' | 'lease-lost'
  readonly resourceId: string
  readonly message: string
}

/** A volume (or the target of an import) that is open for writing: this process holds its lease. */
export interface OpenVolume {
  readonly kind: 'writable'
  readonly id: string
  readonly projectId: string
  /** Its home; changed by a move. */
  poolId: string
  /** Pools that requests which began before a move may still read from. */
  readonly formerPools: Set<string>
  /** It may not have been told yet where its layers lie after a move: it reads from its former pools on. */
  readsFormerPools: boolean
  /** The pool that it writes into, that of the active layer: the home unless it is being moved, or was in part. */
  readonly writePoolId: string
  readonly device: Device
  readonly report: OpenReport
  /** Aliases of the layers that the device knows, but for the active and the next one. */
  readonly layers: Set<number>
  /** Epoch of our lease: guards every transaction (I1). */
  readonly epoch: number
  readonly onEvent: (event: OpenEvent) => void
  sizeBytes: number
  /** A shrink that the device has made and the catalog has not: the next checkpoint commits it. */
  pendingSizeBytes: number | null
  /** lsn that the durable map includes. */
  mapLsn: number
  sharedBelowPage: number
  active: PlacedLayer
  next: PlacedLayer
  /** The exports of `poolsOf` are known to name `active` and `next`: without that there is no swap. */
  nextExported: boolean
  /** The engine made a swap (`next` is the layer that is written) and the catalog does not have it yet. */
  swapUncommitted: boolean
  /** The active layer may hold bytes that no slot owns: after a crash, or a punch that failed. */
  orphansPossible: boolean
  /** Somebody raised the epoch: nothing of this volume is written any more. */
  leaseLost: boolean
}

/** A resource that is open for reading: its durable root, which nobody may delete meanwhile. */
export interface OpenReader {
  readonly kind: 'read-only'
  readonly id: string
  /** Its home; changed by a move. */
  poolId: string
  /** Pools that requests which began before a move may still read from. */
  readonly formerPools: Set<string>
  /** It may not have been told yet where its layers lie after a move: it reads from its former pools on. */
  readsFormerPools: boolean
  readonly device: Device
  readonly report: OpenReport
  /** Aliases of the layers that the device knows. */
  readonly layers: ReadonlySet<number>
  readonly sizeBytes: number
}

/** The pools whose exports must have what a volume commits: its home, and those of its active and its next layer. */
export function poolsOf(volume: Pick<OpenVolume, 'poolId' | 'active' | 'next'>): string[] {
  return [...new Set([volume.poolId, volume.active.poolId, volume.next.poolId])]
}

export type OpenEntry = OpenVolume | OpenReader

export class OpenTable {
  readonly #entries = new Map<string, OpenEntry>()
  readonly #totals = new PoolTotals()
  readonly #failures = new Map<string, AtollError>()
  /** Volumes of which this process has seen that their journal and the catalog belong together. */
  readonly #compared = new Set<string>()
  /** What is being opened, and may have asked already where its layers are. */
  readonly #opening = new Set<string>()

  /** Runs `fn`, which opens the resource. */
  async opening<T>(id: string, fn: () => Promise<T>): Promise<T> {
    this.#opening.add(id)
    try {
      return await fn()
    } finally {
      this.#opening.delete(id)
    }
  }

  /** Everything that is open or being opened. */
  idsAlsoOpening(): string[] {
    return [...new Set([...this.#entries.keys(), ...this.#opening])]
  }

  /** Of what is open, the pools that requests may still read from although it was moved. Copies. */
  formerPools(): [OpenEntry, string[]][] {
    return [...this.#entries.values()].map((entry) => [entry, [...entry.formerPools]])
  }

  get(id: string): OpenEntry | undefined {
    return this.#entries.get(id)
  }

  /** The entry if it is open for writing. */
  volume(id: string): OpenVolume | undefined {
    const entry = this.#entries.get(id)
    return entry?.kind === 'writable' ? entry : undefined
  }

  /** @throws AtollError NOT_OPEN */
  require(id: string): OpenEntry {
    const entry = this.#entries.get(id)
    if (entry === undefined) throw new AtollError('NOT_OPEN', `${id} is not open`, { values: { id } })
    return entry
  }

  /** @throws AtollError ALREADY_OPEN */
  requireClosed(id: string): void {
    if (!this.#entries.has(id)) return
    throw new AtollError('ALREADY_OPEN', `${id} is open already: use its device, or close it first`, { values: { id } })
  }

  add(entry: OpenEntry): void {
    this.requireClosed(entry.id)
    this.#entries.set(entry.id, entry)
    this.#failures.delete(entry.id)
    if (entry.kind === 'writable') this.#compared.add(entry.id)
  }

  /** A volume was made: nobody else has ever written it. */
  setNew(id: string): void {
    this.#compared.add(id)
  }

  /**
   * Whether the volume was made or opened for writing by this process. Of any other, the catalog may be older than the journal
   * (restored from a backup) without a trace in its rows.
   */
  isCompared(id: string): boolean {
    return this.#compared.has(id)
  }

  remove(id: string): void {
    const entry = this.#entries.get(id)
    if (entry !== undefined) this.#totals.addClosed(entry.poolId, entry.device)
    this.#entries.delete(id)
  }

  ids(): string[] {
    return [...this.#entries.keys()]
  }

  /** What has been done in each pool since this process started. */
  poolTotals(): Map<string, DeviceTotals> {
    return this.#totals.with(this.#entries.values())
  }

  forgetPool(poolId: string): void {
    this.#totals.forget(poolId)
  }

  /** Every volume that is open for writing. */
  volumes(): OpenVolume[] {
    return [...this.#entries.values()].filter((entry) => entry.kind === 'writable')
  }

  /** Why the resource could not be opened when that was tried last; undefined if it could, or it was not tried. */
  failure(id: string): AtollError | undefined {
    return this.#failures.get(id)
  }

  setFailure(id: string, error: AtollError): void {
    this.#failures.set(id, error)
  }

  /** The resource is gone. */
  forget(id: string): void {
    this.#failures.delete(id)
    this.#compared.delete(id)
  }
}
