/** Stores: the native half of a pool. */
import { setImmediate as nextTurn } from 'node:timers/promises'
import type {
  CrashOptions,
  FaultPlan,
  JournalSummary,
  LayerEntry,
  LayerExtent,
  RawStore,
  RawStoreLock,
  StoreCapabilities,
  StoreHealth,
  StoreUsage,
} from './addon.ts'
import { call, settle } from './native-error.ts'

/** Characters of a UUID. */
const idLength = 36
/** Layers listed in one turn of the event loop. */
const entriesAtOnce = 10_000

/** A held lock of a store. */
export class StoreLock {
  readonly #raw: RawStoreLock

  /** @internal */
  constructor(raw: RawStoreLock) {
    this.#raw = raw
  }

  /**
   * Idempotent. The end of the process releases it, too; a lock that others keep (of a cluster) is then broken by whoever wants it
   * next.
   */
  release(): Promise<void> {
    return settle(() => this.#raw.release())
  }
}

/** A namespace of layers, of the journals beside them, and of small records. Layer ids are UUIDs in lower case. */
export class Store {
  /** @internal */
  readonly raw: RawStore
  /** 'file', 'memory', 'rados' or 'fault'; for logs, never to decide on: that is what `capabilities` are for. */
  readonly kind: string

  /** @internal */
  constructor(raw: RawStore) {
    this.raw = raw
    this.kind = raw.kind()
  }

  capabilities(): StoreCapabilities {
    return call(() => this.raw.capabilities())
  }

  /**
   * Makes an empty layer; durable on return.
   *
   * @throws LAYER_EXISTS
   */
  createLayer(id: string): Promise<void> {
    return settle(() => this.raw.createLayer(id))
  }

  /** Removes a layer and its journal; durable on return. What is not there is no error. Open devices keep their handle. */
  removeLayer(id: string): Promise<void> {
    return settle(() => this.raw.removeLayer(id))
  }

  /** Many are made into objects in several turns of the event loop. */
  async listLayers(): Promise<LayerEntry[]> {
    const { ids, allocatedBytes, lengthBytes } = await settle(() => this.raw.listLayers())
    const text = Buffer.from(ids.buffer, ids.byteOffset, ids.byteLength)
    const entries: LayerEntry[] = []
    for (const [index, bytes] of lengthBytes.entries()) {
      const id = text.toString('latin1', index * idLength, (index + 1) * idLength)
      entries.push({ id, allocatedBytes: allocatedBytes[index] ?? 0, lengthBytes: bytes })
      if (index % entriesAtOnce === entriesAtOnce - 1) await nextTurn()
    }
    return entries
  }

  /** Without their sizes, which may be much to ask a backend for. */
  async listLayerIds(): Promise<string[]> {
    const bytes = await settle(() => this.raw.listLayerIds())
    const text = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength).toString('latin1')
    const ids: string[] = []
    for (let start = 0; start < text.length; start += idLength) {
      ids.push(text.slice(start, start + idLength))
      if (ids.length % entriesAtOnce === 0) await nextTurn()
    }
    return ids
  }

  layerExists(id: string): Promise<boolean> {
    return settle(() => this.raw.layerExists(id))
  }

  /** Makes everything written to the layer so far durable. */
  syncLayer(id: string): Promise<void> {
    return settle(() => this.raw.syncLayer(id))
  }

  usage(): Promise<StoreUsage> {
    return settle(() => this.raw.usage())
  }

  /** How the backend was when it was looked at last; null where there is nothing to say beyond what calls answer. */
  health(): StoreHealth | null {
    return call(() => this.raw.health())
  }

  /** A small record, null if there is none. Names: [a-z0-9.-]{1,64}. */
  readRecord(name: string): Promise<Uint8Array | null> {
    return settle(() => this.raw.readRecord(name))
  }

  /** Replaces a record at once or not at all; durable on return. */
  writeRecord(name: string, bytes: Uint8Array): Promise<void> {
    return settle(() => this.raw.writeRecord(name, bytes))
  }

  /** These records will be written soon: what the first writing of each needs beside the bytes may be done now. None of them is there yet. */
  expectRecords(names: readonly string[]): Promise<void> {
    return settle(() => this.raw.expectRecords([...names]))
  }

  /** Names of the records that begin with `prefix`, ascending. */
  listRecords(prefix: string): Promise<string[]> {
    return settle(() => this.raw.listRecords(prefix))
  }

  /** Removes a record; one that is not there is no error. Need not be durable: what a crash brings back is whole. */
  removeRecord(name: string): Promise<void> {
    return settle(() => this.raw.removeRecord(name))
  }

  /**
   * Takes the store's exclusive lock for this process; `owner` is what the other side reads. `shutOutHolder` (default false): whoever
   * has it is shut out of the backend first, if that can be done there. That takes some seconds, in which its last answers go out.
   *
   * @throws STORE_LOCKED with the owner's text
   */
  async lock(owner: string, { shutOutHolder = false } = {}): Promise<StoreLock> {
    return settle(async () => new StoreLock(await this.raw.lock(owner, shutOutHolder)))
  }

  /** Frees the space that is kept back for deletes on a full disk. Idempotent. */
  releaseReserve(): Promise<void> {
    return settle(() => this.raw.releaseReserve())
  }

  /** Makes the reserve whole again as far as there is space; returns its bytes. */
  restoreReserve(): Promise<number> {
    return settle(() => this.raw.restoreReserve())
  }

  /**
   * Keeps back this much from now on; returns the bytes that there are: 0 from a store that keeps no reserve.
   *
   * @throws NO_SPACE it does not fit; what was kept before stays
   */
  setReserve(bytes: number): Promise<number> {
    return settle(() => this.raw.setReserve(bytes))
  }

  /**
   * Marks a layer of a closed volume as sealed: its journal ends with `finalLsn`. Idempotent.
   *
   * @throws CATALOG_BEHIND if the journal holds changes after `finalLsn`: nothing was changed then
   */
  sealLayer(id: string, volumeId: string, epoch: number, finalLsn: number, successor: string | null): Promise<void> {
    return settle(() => this.raw.sealLayer(id, volumeId, epoch, finalLsn, successor))
  }

  /**
   * Reads the journal of a layer and changes nothing; may run beside its writer. `volumeId` null: of any volume. Frames after
   * `afterLsn` are counted.
   *
   * @throws JOURNAL_CORRUPT, CATALOG_BEHIND, FORMAT_VERSION as an open of the volume would
   */
  inspectJournal(id: string, volumeId: string | null, epoch: number, afterLsn: number): Promise<JournalSummary> {
    return settle(() => this.raw.inspectJournal(id, volumeId, epoch, afterLsn))
  }

  /** Frees everything of a sealed layer but the given runs (triples as `Reach.runs` gives them, ascending); returns the bytes freed. */
  punchExcept(id: string, keepRuns: Float64Array): Promise<number> {
    return settle(() => this.raw.punchExcept(id, keepRuns))
  }

  /** Bytes that a layer has allocated outside the given runs, which is what `punchExcept` with them would free. */
  allocatedExcept(id: string, keepRuns: Float64Array): Promise<number> {
    return settle(() => this.raw.allocatedExcept(id, keepRuns))
  }

  /** What of a range is allocated; a hint. */
  extents(id: string, offsetBytes: number, lengthBytes: number): Promise<LayerExtent[]> {
    return settle(() => this.raw.extents(id, offsetBytes, lengthBytes))
  }

  /** Offset after the last byte ever written to each layer, -1 for one that is not there. */
  lengthBytes(ids: readonly string[]): Promise<Float64Array> {
    return settle(() => this.raw.lengthBytes([...ids]))
  }

  /** Bytes that each layer has allocated, -1 for one that is not there: many at once, off the event loop. */
  allocatedBytes(ids: readonly string[]): Promise<Float64Array> {
    return settle(() => this.raw.allocatedBytes([...ids]))
  }

  /** Fault kind only: replaces the rules, counters start again. */
  setFaults(plan: FaultPlan): void {
    call(() => this.raw.setFaults(plan))
  }

  /** Fault kind only: calls hit since the rules were set. */
  injectedCount(): number {
    return call(() => this.raw.injectedCount())
  }

  /** Memory kind only: number of the last event (write, punch, append, sync, …). */
  sequence(): number {
    return call(() => this.raw.sequence())
  }

  /** Memory kind only, recording: events after `from` that are sync boundaries. */
  boundaries(from: number): Float64Array {
    return call(() => this.raw.boundaries(from))
  }

  /** A number above that of everything that any recording store has recorded so far, and below that of all that comes. */
  tick(): number {
    return call(() => this.raw.tick())
  }

  /** As `boundaries`, by ticks, which order the events of several stores. */
  boundaryTicks(from: number): Float64Array {
    return call(() => this.raw.boundaryTicks(from))
  }

  /** Memory kind only, recording: number of the last event of this store up to a tick. */
  sequenceAt(tick: number): number {
    return call(() => this.raw.sequenceAt(tick))
  }

  /** Memory kind only, recording: what could be found after a power cut just after event `sequence`. */
  crashImage(sequence: number, seed: number, options: CrashOptions): Store {
    return call(() => new Store(this.raw.crashImage(sequence, seed, options)))
  }

  /** Memory kind only, recording: forgets the history before `sequence`. */
  forgetBefore(sequence: number): void {
    call(() => this.raw.forgetBefore(sequence))
  }
}
