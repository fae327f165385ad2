/**
 * Loads the addon, and declares what it exports. No other file imports it.
 *
 * Everything here is the addon's own shape: handles, flat arguments, numbers in bytes. The classes of this folder give it
 * its public form. Buffers that go in are copied before the call returns; buffers that come out belong to the caller.
 */
import { existsSync } from 'node:fs'
import { createRequire } from 'node:module'
import { fileURLToPath } from 'node:url'
import { AtollError } from '@atoll/core'

export interface RootRef {
  /** 0 HOLE; 1 << 60 | layer alias; 2 << 60 | page id. */
  word: bigint
  /** crc32c of the root page, 0 where there is none. */
  crc: number
}

export interface PageBatch {
  ids: Float64Array
  bodies: Uint8Array[]
}

export interface RawPageSet {
  pageCount(): number
  root(): RootRef
  replaced(): Float64Array
  displaced(): Float64Array
  pages(startIndex: number, maxBytes: number): PageBatch
  commit(): void
}

export interface RawCheckpoint {
  lsn(): number
  pageCount(): number
  root(): RootRef
  replaced(): Float64Array
  displaced(): Float64Array
  pages(startIndex: number, maxBytes: number): PageBatch
  frozen(): RawFrozenMap
}

export interface RawFrozenMap {
  root(): RootRef | null
  layers(sizeBytes: number): Uint32Array
  withRun(startSlot: number, slotCount: number, owner: number): RawFrozenMap
  prepare(durable: RawFrozenMap, firstPageId: number): Promise<RawPageSet>
  diff(base: RawFrozenMap, sizeBytes: number): Promise<Float64Array>
  ownerCounts(sizeBytes: number): Promise<{ owner: number; slotCount: number }[]>
  memoryBytes(): number
}

export interface RawMapLoader {
  missing(limit: number): Float64Array
  supply(ids: Float64Array, bodies: Uint8Array[]): void
  finish(): RawFrozenMap
}

export interface RawUsage {
  setRoots(
    keys: Float64Array,
    lineages: Float64Array,
    words: BigUint64Array,
    crcs: Uint32Array,
    active: Uint32Array,
  ): Promise<void>
  pending(limit: number): Promise<Float64Array>
  settle(ids: Float64Array, bodies: (Uint8Array | null)[]): Promise<void>
  unknownLayers(): Promise<Uint32Array>
  scan(store: RawStore, aliases: Uint32Array, ids: string[]): Promise<Uint32Array>
  setEmpty(aliases: Uint32Array): void
  taken(key: number): Promise<Float64Array>
  totals(keys: Float64Array): Promise<Float64Array>
  memoryBytes(): Promise<number>
  clear(): void
}

export interface RawReach {
  addRoot(root: RootRef, sizeBytes: number): void
  pending(limit: number): Float64Array
  supply(ids: Float64Array, bodies: Uint8Array[]): Promise<void>
  layers(): Uint32Array
  runs(layer: number): Promise<Float64Array>
  slotCounts(layers: Uint32Array): Promise<Float64Array>
  hasPages(ids: Float64Array): Uint8Array
  clear(): void
}

/** A map page that cannot be used. */
export interface PageFault {
  pageId: number
  /** PAGE_CORRUPT, PAGE_MISSING or FORMAT_VERSION. */
  code: string
  message: string
}

export interface RawMapCheck {
  addRoot(root: RootRef): void
  pending(limit: number): Float64Array
  supply(ids: Float64Array, bodies: (Uint8Array | undefined)[]): Promise<void>
  faults(): PageFault[]
  faultCount(): number
  pageReferrers(): Float64Array
  layerReferrers(): Float64Array
  slotEnds(layers: Uint32Array): Promise<Float64Array>
  layers(): Uint32Array
  runs(layer: number): Promise<Float64Array>
  hasPages(ids: Float64Array): Uint8Array
  clear(): void
}

export interface StoreCapabilities {
  /** What a first write copies up. */
  copyUnitBytes: number
  /** Smallest range that can be punched; 0: no punching. */
  punchUnitBytes: number
  /** Layers can share blocks with those of another store on the same backend (`Engine.fillPiece`). */
  canClone: boolean
  /** A write that returned is durable. */
  ackIsDurable: boolean
  /** Survives the end of the process. */
  persistent: boolean
}

/** Lists of one length. */
export interface LayerList {
  /** 36 characters each. */
  ids: Uint8Array
  allocatedBytes: Float64Array
  lengthBytes: Float64Array
}

export interface LayerEntry {
  id: string
  allocatedBytes: number
  lengthBytes: number
}

export interface StoreUsage {
  totalBytes: number
  freeBytes: number
  storedBytes: number
  /** Kept back at present for emergencies; 0: given up, or the store keeps none. */
  reserveBytes: number
}

export interface LayerExtent {
  offsetBytes: number
  lengthBytes: number
  /** False: a hole. A hint, never the meaning of the range. */
  data: boolean
}

/** What a journal holds. */
export interface JournalSummary {
  /** Segments with a good header. */
  segmentCount: number
  /** Bytes of the good part of them. */
  lengthBytes: number
  /** Bytes that the next open cuts off; 0: none. */
  tornTailBytes: number
  /** Frames after the lsn that was asked for. */
  frameCount: number
  /** lsn of the last frame; 0 where there never was one. */
  lastLsn: number
  /** Newest epoch in it. */
  epoch: number
  /** Aliases that its frames give slots to (0: hole). */
  owners: number[]
  /** Who claimed it last, where the pool keeps a note of that: under the lease of this epoch. */
  writer?: { epoch: number; owner: string }
  /** Set if the layer was sealed. */
  seal?: { finalLsn: number; successor?: string }
}

/** One way to fail; the first rule that matches a call counts. */
export interface FaultRule {
  /**
   * "read", "write", "punch", "zero", "sync", "append", "segment-sync", "create", "remove" or "open"; "lose-write": a write that is
   * answered as done and was not.
   */
  operation: string
  /** Only for this layer. */
  layer?: string
  /** Matching calls that pass first; default 0. */
  skipCount?: number
  /** Calls that are hit then; default: all. */
  applyCount?: number
  /** Out of 256 matching calls, about how many are hit; default 256. */
  probabilityOf256?: number
  /** What the call fails with; default 5 (EIO). 0: no failure, a delay only. */
  errno?: number
  /** Wait before answering, until other faults are set at most; default 0. */
  delayMs?: number
  /** A failed write leaves a part of its bytes behind; default false. */
  tear?: boolean
}

export interface FaultPlan {
  /** Of every random decision; an integer below 2^53. */
  seed: number
  rules: FaultRule[]
}

export interface CrashOptions {
  /** Unsynced operations survive each with this probability, in 1/256. */
  keepOf256: number
  /** Whether a surviving write may be torn at a 512-byte sector. */
  tear: boolean
  /** Whether surviving operations on one object may be applied in another order. */
  reorder: boolean
}

export interface RawStoreLock {
  release(): Promise<void>
}

export interface StoreFailure {
  code: string
  message: string
}

/** How a backend was when it was looked at last. */
export interface StoreHealth {
  observedAgoMs: number
  /** How long a small read took. */
  answerMs?: number
  /** What came instead of its answer. */
  failure?: StoreFailure
  /** For how long reads have not been answered; absent: the last one was. */
  silentMs?: number
  /** What the backend says of itself, in its own form; neither this nor the next: it was not asked yet. */
  report?: string
  reportFailure?: StoreFailure
  /** False: `usage` says less than is stored, because that is being counted. */
  isCounted: boolean
}

export interface RawStore {
  kind(): string
  capabilities(): StoreCapabilities
  createLayer(id: string): Promise<void>
  removeLayer(id: string): Promise<void>
  listLayers(): Promise<LayerList>
  /** 36 characters each. */
  listLayerIds(): Promise<Uint8Array>
  layerExists(id: string): Promise<boolean>
  syncLayer(id: string): Promise<void>
  usage(): Promise<StoreUsage>
  health(): StoreHealth | null
  readRecord(name: string): Promise<Uint8Array | null>
  writeRecord(name: string, bytes: Uint8Array): Promise<void>
  expectRecords(names: string[]): Promise<void>
  listRecords(prefix: string): Promise<string[]>
  removeRecord(name: string): Promise<void>
  lock(owner: string, shutOutHolder: boolean): Promise<RawStoreLock>
  releaseReserve(): Promise<void>
  restoreReserve(): Promise<number>
  setReserve(bytes: number): Promise<number>
  sealLayer(id: string, volumeId: string, epoch: number, finalLsn: number, successor: string | null): Promise<void>
  inspectJournal(id: string, volumeId: string | null, epoch: number, afterLsn: number): Promise<JournalSummary>
  punchExcept(id: string, keepRuns: Float64Array): Promise<number>
  allocatedExcept(id: string, keepRuns: Float64Array): Promise<number>
  extents(id: string, offsetBytes: number, lengthBytes: number): Promise<LayerExtent[]>
  lengthBytes(ids: string[]): Promise<Float64Array>
  allocatedBytes(ids: string[]): Promise<Float64Array>
  setFaults(plan: FaultPlan): void
  injectedCount(): number
  sequence(): number
  boundaries(from: number): Float64Array
  tick(): number
  boundaryTicks(from: number): Float64Array
  sequenceAt(tick: number): number
  crashImage(sequence: number, seed: number, options: CrashOptions): RawStore
  forgetBefore(sequence: number): void
}

/** Rate limits; 0 or absent: unlimited. */
export interface ThrottleLimits {
  operationsPerSecond?: number
  bytesPerSecond?: number
  /** Operations that may be done at once after a pause; default: a tenth of a second's worth. */
  burstOperations?: number
  /** Bytes that may be moved at once after a pause; default: a tenth of a second's worth. */
  burstBytes?: number
}

/** Bounds of a device; what is absent has the engine's default. */
export interface DeviceLimits {
  /** A background flush starts when this much was written since the last. */
  dirtyBytesMax: number
  /** A background flush starts when this many changes of owners wait. */
  batchDeltasMax: number
  /** 'checkpoint-wanted' is sent at this many dirty leaves of the map … */
  dirtyLeavesSoft: number
  /** … and first writes wait at this many. */
  dirtyLeavesHard: number
  /** 'checkpoint-wanted' is sent when the journal is this long. */
  journalBytesSoft: number
}

export type DeviceEventKind = 'checkpoint-wanted' | 'poisoned' | 'flush-failed'

export interface OpenReport {
  /** lsn after replay. */
  lastLsn: number
  framesReplayed: number
  /** Batches that a killed process of this boot had answered but not flushed; they are durable now. */
  batchesRecalled: number
  /** Bytes of torn journal tails that were cut. */
  tornTailBytes: number
  /** The next layer held frames and is the active one now: commit that, with a new spare, before serving. */
  promotedNext: boolean
}

export interface BlockStatus {
  lengthBytes: number
  /** Not allocated. */
  hole: boolean
  /** Reads as zeros. */
  zero: boolean
}

export interface CopyReport {
  /** Bytes written to the target. */
  dataBytes: number
  /** Bytes that are zero and were not written. */
  zeroBytes: number
}

/** What one call of `Engine.fillPiece` did; the first three byte counts together are the slots up to `nextSlot`. */
export interface FillReport {
  /** Where the next call goes on; null: everything is there. */
  nextSlot: number | null
  /** Bytes written to the target. */
  copiedBytes: number
  /** Bytes that share their blocks with the source. */
  offloadedBytes: number
  /** Bytes that are zero and were not written. */
  zeroBytes: number
  /** Bytes read back from the target and compared. */
  verifiedBytes: number
}

/** Counters since the device was opened, and gauges. */
export interface DeviceStats {
  readOperations: number
  readBytes: number
  writeOperations: number
  writeBytes: number
  discardOperations: number
  flushOperations: number
  /** Slots that changed owner because they were written for the first time. */
  firstWriteSlots: number
  throttledOperations: number
  dirtyLeaves: number
  journalBytes: number
  /** lsn of the last durable batch. */
  lsn: number
  poisoned: boolean
  /** Requests of clients that workers have; one that is done at once is never among them. */
  requestsWaiting: number
  /** Reads and syncs that wait for the backend now. */
  backendReadsRunning: number
  backendSyncsRunning: number
}

/** How long things took since the device was opened. */
export interface LatencyHistogram {
  /** By bucket (`latencyBucketEndsSeconds`), without the empty ones at the end. */
  counts: number[]
  sumSeconds: number
}

/**
 * The first four: from when a client's request was received until its answer was ready, waiting for others, for workers and
 * for the throttle included.
 */
export interface DeviceLatencies {
  read: LatencyHistogram
  write: LatencyHistogram
  /** Discards and zeroes. */
  discard: LatencyHistogram
  flush: LatencyHistogram
  /** Reads that may have waited for the backend: those that were not answered from what was at hand. */
  backendRead: LatencyHistogram
  /** Syncs of the data of a layer. */
  backendSync: LatencyHistogram
}

export interface RawDevice {
  sizeBytes(): number
  readOnly(): boolean
  isPoisoned(): boolean
  stats(): DeviceStats
  latencies(): DeviceLatencies
  read(offsetBytes: number, lengthBytes: number): Promise<Uint8Array>
  write(offsetBytes: number, data: Uint8Array): Promise<void>
  discard(offsetBytes: number, lengthBytes: number): Promise<void>
  writeZeroes(offsetBytes: number, lengthBytes: number, allocate: boolean): Promise<void>
  flush(): Promise<void>
  blockStatus(offsetBytes: number, lengthBytes: number, extentCountMax: number): Promise<BlockStatus[]>
  copyIn(path: string, sourceOffsetBytes: number, offsetBytes: number, lengthBytes: number): Promise<CopyReport>
  copyOut(path: string, offsetBytes: number, lengthBytes: number): Promise<CopyReport>
  checkpoint(firstPageId: number): Promise<RawCheckpoint | null>
  checkpointCommitted(checkpoint: RawCheckpoint, trimJournal: boolean): Promise<void>
  checkpointAborted(checkpoint: RawCheckpoint): void
  syncClosing(): Promise<void>
  swapCommitted(seal: boolean): Promise<void>
  grow(sizeBytes: number): Promise<void>
  shrinkPrepare(sizeBytes: number): Promise<void>
  shrinkPunch(): Promise<void>
  punchOrphans(): Promise<number>
  addLayers(aliases: number[], ids: string[], stores: RawStore[]): Promise<void>
  setThrottle(limits: ThrottleLimits): void
  readBarrier(waitMs: number): Promise<boolean>
  close(): Promise<void>
}

/** What a handshake settled. */
export interface TlsPeer {
  /** `TLSv1_3` or `TLSv1_2`. */
  protocol: string
  cipherSuite: string
  /** The peer's certificate (DER) where one is asked for: it was verified then. */
  certificate?: Uint8Array
}

/** Opaque: what a server shows and whom it lets in. */
export interface RawTlsConfig {
  readonly rawTlsConfig?: never
}

export interface RawConnection {
  peer(): string
  read(lengthBytes: number, timeoutMs: number | null): Promise<Uint8Array | null>
  write(bytes: Uint8Array): Promise<void>
  startTls(config: RawTlsConfig, timeoutMs: number): Promise<TlsPeer>
  serveNbd(
    device: RawDevice,
    replies: string,
    contextIds: number[],
    contextKinds: string[],
    contextMaps: (RawFrozenMap | null)[],
    readOnly: boolean,
    requestBytesMax: number | null,
  ): Promise<ServeEnd>
  drain(): Promise<void>
  close(): Promise<void>
}

export interface ServeEnd {
  /** 'disconnect': the client said so; 'eof': it went away; 'error': it broke the protocol, or the connection broke; 'closed': we ended it. */
  reason: 'disconnect' | 'eof' | 'error' | 'closed'
  /** For the log. */
  message: string
}

export interface ListenerAddress {
  path?: string
  host?: string
  port?: number
}

export interface RawListener {
  address(): ListenerAddress
  accept(): Promise<RawConnection | null>
  close(): Promise<void>
}

export interface RawSwapReport {
  frozen(): RawFrozenMap
  lsn(): number
  pauseMs(): number
}

export interface EngineStats {
  /** Bytes of map nodes in memory. */
  mapBytes: number
  /** The bound that eviction keeps. */
  mapBoundBytes: number
  openDevices: number
  connections: number
  /** Why the last eviction of map leaves failed, if it did. */
  evictionError?: string
  /** Why reads that have to wait do so on threads; absent: the kernel takes them, many at a time, over io_uring. */
  ringRefused?: string
}

export interface RawEngine {
  openFileStore(path: string, create: boolean, reserveBytes: number): Promise<RawStore>
  openRadosStore(options: {
    // Absent, never null.
    conf: string | undefined
    keyring: string | undefined
    user: string
    pool: string
    namespace: string
    requestTimeoutMs: number
    connectTimeoutMs: number
    create: boolean
  }): Promise<RawStore>
  memoryStore(capacityBytes: number, record: boolean): RawStore
  faultStore(inner: RawStore): RawStore
  mapLoader(root: RootRef): RawMapLoader
  usage(): RawUsage
  reach(): RawReach
  mapCheck(watchedPages: Float64Array, watchedLayers: Uint32Array): RawMapCheck
  uniformMap(owner: number): RawFrozenMap
  openFileDevice(path: string): Promise<RawDevice>
  openDevice(
    spec: {
      volumeId: string
      sizeBytes: number
      epoch: number
      batchLogSinceEpoch: number
      mapLsn: number
      // Absent, never null: a field of an object that is null is not taken for one that is not there.
      active: number | undefined
      next: number | undefined
      throttle: ThrottleLimits | undefined
      limits: Partial<DeviceLimits> | undefined
      aliases: number[]
      ids: string[]
    },
    map: RawFrozenMap,
    stores: RawStore[],
    onEvent: ((kind: DeviceEventKind, message: string) => void) | null,
  ): Promise<RawOpenedDevice>
  swap(devices: RawDevice[], aliases: number[], ids: string[], stores: RawStore[], deadlineMs: number): Promise<RawSwapReport[]>
  fillPiece(
    spec: {
      sourceId: string
      targetId: string
      fromSlot: number
      maxBytes: number
      maxMilliseconds: number
      offload: boolean
      throttle: number
    },
    source: RawStore,
    target: RawStore,
    runs: Float64Array,
  ): Promise<Omit<FillReport, 'nextSlot'> & { nextSlot?: number }>
  readBarrier(waitMs: number): Promise<string[]>
  listenUnix(path: string, mode: number, groupId: number | null, backlog: number | null): Promise<RawListener>
  listenTcp(host: string, port: number): Promise<RawListener>
  loadTls(directory: string, verifyClients: boolean): Promise<RawTlsConfig>
  stats(): EngineStats
  close(): Promise<void>
}

export interface RawOpenedDevice {
  device(): RawDevice
  report(): OpenReport
}

interface Addon {
  Engine: new (
    pageFile: string | null,
    cacheBoundBytes: number | null,
    batchLogDirectory: string | null,
    withoutIoUring: boolean,
  ) => RawEngine
  constants(): { slotBytes: number; leafBytes: number; mapBytesMax: number; latencyBucketEnds: number[] }
}

let loaded: Addon | undefined

/**
 * The addon, loaded at the first call: ATOLL_ADDON, or the file that build.sh makes beside this one.
 *
 * @throws NATIVE_MISSING if it is not built, or does not load
 */
export function addon(): Addon {
  loaded ??= load()
  return loaded
}

function load(): Addon {
  const path = process.env['ATOLL_ADDON'] ?? fileURLToPath(new URL(`atoll.linux-${process.arch}.node`, import.meta.url))
  if (!existsSync(path)) {
    throw new AtollError(
      'NATIVE_MISSING',
      `the native addon ${path} is not there: run "npm start" or "npm run build:native", which build it`,
      {
        values: { path },
      },
    )
  }
  try {
    return createRequire(import.meta.url)(path) as Addon
  } catch (error) {
    const reason = error instanceof Error ? error.message : String(error)
    throw new AtollError(
      'NATIVE_MISSING',
      `the native addon ${path} does not load (${reason}): run "npm run build:native", which builds it anew`,
      {
        values: { path },
        cause: error,
      },
    )
  }
}
