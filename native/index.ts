/**
 * The one door to the native engine. Methods that may take time return promises, which native threads settle; failures are
 * `AtollError`s with the code that the engine gave. Sizes, offsets, slots, lsns and page ids are numbers (exact below 2^53);
 * only the root word of a map is a bigint.
 */
import { addon } from './addon.ts'

export type {
  BlockStatus,
  CopyReport,
  CrashOptions,
  DeviceEventKind,
  DeviceLatencies,
  DeviceLimits,
  DeviceStats,
  EngineStats,
  FaultPlan,
  FaultRule,
  FillReport,
  JournalSummary,
  LayerEntry,
  LatencyHistogram,
  LayerExtent,
  ListenerAddress,
  OpenReport,
  PageBatch,
  PageFault,
  RootRef,
  ServeEnd,
  StoreCapabilities,
  StoreFailure,
  StoreHealth,
  StoreUsage,
  ThrottleLimits,
  TlsPeer,
} from './addon.ts'
export { Connection, Listener, TlsConfig, type NbdMetaContext, type NbdReplyForm, type ServeNbdOptions } from './connection.ts'
export { Checkpoint, Device, type LayerRef } from './device.ts'
export {
  Engine,
  type DeviceEvent,
  type DeviceSpec,
  type EngineOptions,
  type FillSpec,
  type RadosStoreOptions,
  type SwapReport,
} from './engine.ts'
export { FrozenMap, MapCheck, MapLoader, PageSet, Reach } from './maps.ts'
export { Store, StoreLock } from './store.ts'
export { UsageTable, type UsageRoots } from './usage-table.ts'

/** Bytes of a slot: the unit of the map. */
export const slotBytes = 4096
/** Bytes that one leaf of a map spans. */
export const leafBytes = 8192 * slotBytes
/** Bytes of the whole address space of a map. */
export const mapBytesMax = leafBytes * 256 ** 3

/** What is counted in a bucket of a `LatencyHistogram` took less than this; what took longer than the last is in the last. */
export function latencyBucketEndsSeconds(): number[] {
  return addon()
    .constants()
    .latencyBucketEnds.map((nanoseconds) => nanoseconds / 1e9)
}

/** Whether the addon was built for the same formats; call it once at start-up, so that a stale addon is refused at once. */
export function checkNative(): void {
  const built = addon().constants()
  if (built.slotBytes !== slotBytes || built.leafBytes !== leafBytes || built.mapBytesMax !== mapBytesMax) {
    throw new Error('the native addon was built from other sources: run "npm run build:native"')
  }
}
