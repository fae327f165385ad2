/** Open devices. */
import type {
  BlockStatus,
  CopyReport,
  DeviceLatencies,
  DeviceStats,
  PageBatch,
  RawCheckpoint,
  RawDevice,
  RootRef,
  ThrottleLimits,
} from './addon.ts'
import { FrozenMap } from './maps.ts'
import { call, settle } from './native-error.ts'
import type { Store } from './store.ts'

/** A layer that a map may refer to. */
export interface LayerRef {
  /** The number in maps. */
  alias: number
  /** The UUID, in lower case. */
  id: string
  store: Store
}

/** A frozen map on its way to the catalog. It ends with `Device.checkpointCommitted` or `checkpointAborted`, after which only `lsn` and `pageCount` may be asked. */
export class Checkpoint {
  /** @internal */
  readonly raw: RawCheckpoint
  /** What the root includes; everything up to it is durable in the journal. */
  readonly lsn: number
  /** Pages to insert; their ids follow each other from the first id that was given. */
  readonly pageCount: number

  /** @internal */
  constructor(raw: RawCheckpoint) {
    this.raw = raw
    this.lsn = raw.lsn()
    this.pageCount = raw.pageCount()
  }

  /** The root to commit. */
  root(): RootRef {
    return call(() => this.raw.root())
  }

  /** Ids of pages of the last committed map that this one no longer has. */
  replaced(): Float64Array {
    return call(() => this.raw.replaced())
  }

  /** Triples of start slot, slot count, old owner: space that may become free. */
  displaced(): Float64Array {
    return call(() => this.raw.displaced())
  }

  /** Pages from `startIndex` on, at most `maxBytes` of bodies but at least one page; empty past the end. The bodies are copies. */
  pages(startIndex: number, maxBytes: number): PageBatch {
    return call(() => this.raw.pages(startIndex, maxBytes))
  }

  /** The map that is made durable, for snapshots of it. */
  frozen(): FrozenMap {
    return call(() => new FrozenMap(this.raw.frozen()))
  }
}

/**
 * An open device. Calls may overlap; each runs on a native thread. Offsets and lengths are bytes of any alignment.
 *
 * Data calls fail with OUT_OF_RANGE, READ_ONLY, DEVICE_CLOSED, DEVICE_POISONED (until the device is closed and opened
 * again), NO_SPACE, IO_ERROR.
 */
export class Device {
  /** @internal */
  readonly raw: RawDevice

  /** @internal */
  constructor(raw: RawDevice) {
    this.raw = raw
  }

  sizeBytes(): number {
    return call(() => this.raw.sizeBytes())
  }

  readOnly(): boolean {
    return call(() => this.raw.readOnly())
  }

  /** Whether a sync failed: nothing is accepted any more. */
  isPoisoned(): boolean {
    return call(() => this.raw.isPoisoned())
  }

  stats(): DeviceStats {
    return call(() => this.raw.stats())
  }

  /** How long things took since it was opened; also after it was closed. */
  latencies(): DeviceLatencies {
    return call(() => this.raw.latencies())
  }

  /** At most 64 MiB. The bytes belong to the caller. */
  read(offsetBytes: number, lengthBytes: number): Promise<Uint8Array> {
    return settle(() => this.raw.read(offsetBytes, lengthBytes))
  }

  /** Durable after the next `flush` that starts afterwards. `data` is copied before the call returns. */
  write(offsetBytes: number, data: Uint8Array): Promise<void> {
    return settle(() => this.raw.write(offsetBytes, data))
  }

  /** Advisory: whole slots of the range read as zeros afterwards, the rest is untouched. */
  discard(offsetBytes: number, lengthBytes: number): Promise<void> {
    return settle(() => this.raw.discard(offsetBytes, lengthBytes))
  }

  /** The range reads as zeros. `allocate`: space is kept for it. */
  writeZeroes(offsetBytes: number, lengthBytes: number, allocate = false): Promise<void> {
    return settle(() => this.raw.writeZeroes(offsetBytes, lengthBytes, allocate))
  }

  /** Everything that completed before the call is durable when it resolves. */
  flush(): Promise<void> {
    return settle(() => this.raw.flush())
  }

  /** Allocation of the range, at most `extentCountMax` entries, so it may end early (never empty). */
  blockStatus(offsetBytes: number, lengthBytes: number, extentCountMax: number): Promise<BlockStatus[]> {
    return settle(() => this.raw.blockStatus(offsetBytes, lengthBytes, extentCountMax))
  }

  /**
   * A raw file into the device; holes and zero blocks are skipped, so the range of the device must be fresh. Not durable
   * before a flush.
   *
   * @throws FILE_ERROR, SOURCE_CHANGED (shorter than asked for, or written to meanwhile)
   */
  copyIn(options: { path: string; sourceOffsetBytes: number; offsetBytes: number; lengthBytes: number }): Promise<CopyReport> {
    return settle(() => this.raw.copyIn(options.path, options.sourceOffsetBytes, options.offsetBytes, options.lengthBytes))
  }

  /**
   * The device into an existing raw file, at the same offset; zeros become holes. The file is durable when it resolves.
   *
   * @throws FILE_ERROR
   */
  copyOut(options: { path: string; offsetBytes: number; lengthBytes: number }): Promise<CopyReport> {
    return settle(() => this.raw.copyOut(options.path, options.offsetBytes, options.lengthBytes))
  }

  /**
   * A flush whose state is frozen with the map, or null if nothing changed since the last committed one.
   *
   * @throws CHECKPOINT_BUSY while another one is not ended
   */
  checkpoint(firstPageId: number): Promise<Checkpoint | null> {
    return settle(async () => {
      const raw = await this.raw.checkpoint(firstPageId)
      return raw === null ? null : new Checkpoint(raw)
    })
  }

  /**
   * The catalog has pages, root and lsn. `trimJournal`: the pool's export has them too, and journal segments behind the
   * checkpoint go; without, they stay for a later one to remove.
   */
  checkpointCommitted(checkpoint: Checkpoint, trimJournal: boolean): Promise<void> {
    return settle(() => this.raw.checkpointCommitted(checkpoint.raw, trimJournal))
  }

  /** The catalog has not. */
  checkpointAborted(checkpoint: Checkpoint): void {
    call(() => this.raw.checkpointAborted(checkpoint.raw))
  }

  /** After a swap: everything of the layer that was active before is durable when it resolves. */
  syncClosing(): Promise<void> {
    return settle(() => this.raw.syncClosing())
  }

  /** The catalog has the swap: the next one may come. `seal`: the old layer's journal is sealed, which drops its frames. */
  swapCommitted(seal: boolean): Promise<void> {
    return settle(() => this.raw.swapCommitted(seal))
  }

  /** The new space reads as zeros. */
  grow(sizeBytes: number): Promise<void> {
    return settle(() => this.raw.grow(sizeBytes))
  }

  /** First half of a shrink: then commit a checkpoint and the size in one transaction, then call `shrinkPunch`. */
  shrinkPrepare(sizeBytes: number): Promise<void> {
    return settle(() => this.raw.shrinkPrepare(sizeBytes))
  }

  /** Second half of a shrink: frees what lies beyond the new end. */
  shrinkPunch(): Promise<void> {
    return settle(() => this.raw.shrinkPunch())
  }

  /** Frees what the active layer holds but the map does not refer to; returns the bytes. */
  punchOrphans(): Promise<number> {
    return settle(() => this.raw.punchOrphans())
  }

  /** Adds layers that a map may refer to from now on. */
  addLayers(layers: readonly LayerRef[]): Promise<void> {
    const { aliases, ids, stores } = flatten(layers)
    return settle(() => this.raw.addLayers(aliases, ids, stores))
  }

  /** Takes effect at once, also for requests that wait. */
  setThrottle(limits: ThrottleLimits): void {
    call(() => this.raw.setThrottle(limits))
  }

  /** Resolves when every request that was in flight at the call has finished: true. False: one has not within this time. */
  readBarrier(waitMs: number): Promise<boolean> {
    return settle(() => this.raw.readBarrier(waitMs))
  }

  /** Refuses new requests, waits for those in flight, flushes. Idempotent. */
  close(): Promise<void> {
    return settle(() => this.raw.close())
  }
}

/** Layers in the form in which they cross. */
export function flatten(layers: readonly LayerRef[]): { aliases: number[]; ids: string[]; stores: Store['raw'][] } {
  return {
    aliases: layers.map((layer) => layer.alias),
    ids: layers.map((layer) => layer.id),
    stores: layers.map((layer) => layer.store.raw),
  }
}
