//! What crosses the device's border: specifications, reports, counters.
use super::BatchLogPlace;
use crate::{Latency, ThrottleLimits};
use atoll_io::{LayerId, Store};
use atoll_map::{FrozenMap, PageSet, RootRef};
use std::sync::Arc;
use std::time::Duration;

/// A layer the device may meet in its map.
#[derive(Clone)]
pub struct LayerSpec {
    /// The u32 in maps.
    pub alias: u32,
    /// The layer.
    pub id: LayerId,
    /// Where its bytes are.
    pub store: Arc<dyn Store>,
}

impl LayerSpec {
    /// Whether the other one lies in the same store.
    pub(super) fn shares_store(&self, other: &LayerSpec) -> bool {
        std::ptr::addr_eq(Arc::as_ptr(&self.store), Arc::as_ptr(&other.store))
    }
}

/// Bounds of a device (I8).
#[derive(Debug, Clone, Copy)]
pub struct DeviceLimits {
    /// A background flush starts when this much was written since the last.
    pub dirty_bytes_max: u64,
    /// A background flush starts when the open batch has this many deltas.
    pub batch_deltas_max: usize,
    /// `CheckpointWanted` is sent at this many dirty leaves.
    pub dirty_leaves_soft: u64,
    /// First writes wait (outside the gate) at this many dirty leaves.
    pub dirty_leaves_hard: u64,
    /// `CheckpointWanted` is sent when the journal is this long.
    pub journal_bytes_soft: u64,
}

impl Default for DeviceLimits {
    fn default() -> Self {
        DeviceLimits {
            dirty_bytes_max: 64 << 20,
            batch_deltas_max: 65_536,
            dirty_leaves_soft: 512,
            dirty_leaves_hard: 16_384,
            journal_bytes_soft: 16 << 20,
        }
    }
}

/// What is opened.
pub struct DeviceSpec {
    /// The volume (or snapshot, image).
    pub volume: [u8; 16],
    /// Size.
    pub size_bytes: u64,
    /// Epoch of the lease (I1).
    pub epoch: u64,
    /// The durable map.
    pub map: FrozenMap,
    /// lsn of the durable map.
    pub map_lsn: u64,
    /// Every layer the map refers to, and the active and the next one.
    pub layers: Vec<LayerSpec>,
    /// The active layer's alias; `None`: read-only device.
    pub active: Option<u32>,
    /// The prepared layer that the catalog has recorded as next.
    pub next: Option<u32>,
    /// Rate limits.
    pub throttle: ThrottleLimits,
    /// Bounds.
    pub limits: DeviceLimits,
    /// Where the open batch is kept beyond the end of the process; `None`: it is not (a restart then shows what was flushed).
    pub batch_log: Option<BatchLogPlace>,
    /// What it has of an older epoch means nothing: others, with logs elsewhere, had the volume since.
    pub batch_log_since_epoch: u64,
    /// Called from engine threads when the layer above should do something; must not block.
    pub on_event: Option<Box<dyn Fn(DeviceEvent) + Send + Sync>>,
}

/// What a device asks of the layer above.
#[derive(Debug, Clone)]
pub enum DeviceEvent {
    /// Take a checkpoint soon: dirty leaves or journal length passed a bound.
    CheckpointWanted,
    /// The device is poisoned (I6): a sync failed. The code and message say what happened.
    Poisoned(String),
    /// A background flush failed without poison (no space); the next flush tries again.
    FlushFailed(String),
}

/// What opening found.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct OpenReport {
    /// lsn after replay.
    pub last_lsn: u64,
    /// Frames replayed.
    pub frames_replayed: u64,
    /// Batches that an earlier process of this boot had answered but not flushed; they are durable now.
    pub batches_recalled: u64,
    /// Bytes of torn tails that were cut.
    pub torn_tail_bytes: u64,
    /// The next layer held frames and is now the active one. Before serving: `checkpoint`, commit its root and lsn, active =
    /// next and a new spare in one transaction, then `checkpoint_committed` and `swap_committed`.
    pub promoted_next: bool,
}

/// What a swap left behind.
pub struct SwapReport {
    /// The map as it was at the swap: the root of the snapshot.
    pub frozen: FrozenMap,
    /// lsn that `frozen` includes.
    pub lsn: u64,
    /// How long the gate was closed.
    pub pause: Duration,
}

/// A frozen map on its way to the catalog.
pub struct Checkpoint {
    /// lsn that the root includes; everything up to it is durable in the journal.
    pub lsn: u64,
    /// Pages and root.
    pub pages: PageSet,
    pub(super) frozen: FrozenMap,
}

impl Checkpoint {
    /// The frozen map (for snapshots of it).
    pub fn frozen(&self) -> &FrozenMap {
        &self.frozen
    }
    /// The root to commit.
    pub fn root(&self) -> RootRef {
        self.pages.root
    }
}

/// One stretch of `base:allocation`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockStatus {
    /// Length.
    pub length_bytes: u64,
    /// Not allocated.
    pub hole: bool,
    /// Reads as zeros.
    pub zero: bool,
}

/// One stretch of a metadata context.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StatusExtent {
    /// Length, never 0.
    pub length_bytes: u64,
    /// What its context means by them.
    pub flags: u32,
}

/// What a client asked for, as latencies are counted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Served {
    Read,
    Write,
    /// Discards and zeroes.
    Discard,
    Flush,
}

/// How long things took since the device was opened.
#[derive(Default)]
pub struct DeviceLatencies {
    /// From when a client's request was received until its answer was ready, waiting for others, workers and the throttle
    /// included. A write that is received piece by piece: the time it spent in the device.
    pub read: Latency,
    /// As `read`. With FUA, the flush is a part of it.
    pub write: Latency,
    /// As `read`, of discards and zeroes.
    pub discard: Latency,
    /// As `read`.
    pub flush: Latency,
    /// Reads that may have waited for the backend: those that were not answered from what was at hand.
    pub backend_read: Latency,
    /// Syncs of the data of a layer.
    pub backend_sync: Latency,
}

/// Counters since the device was opened, and present gauges.
#[derive(Debug, Clone, Copy, Default)]
#[allow(missing_docs)]
pub struct DeviceStats {
    pub read_operations: u64,
    pub read_bytes: u64,
    pub write_operations: u64,
    pub write_bytes: u64,
    pub discard_operations: u64,
    pub flush_operations: u64,
    pub first_write_slots: u64,
    pub throttled_operations: u64,
    pub dirty_leaves: u64,
    pub journal_bytes: u64,
    pub lsn: u64,
    pub poisoned: bool,
    /// Requests of clients that workers have.
    pub requests_waiting: u64,
    /// Reads and syncs that wait for the backend now.
    pub backend_reads_running: u64,
    pub backend_syncs_running: u64,
}
