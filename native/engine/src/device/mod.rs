//! An open device: map, layers, journal, gate. One subject a file, with its rules at the head.
//!
//! Locks, in the order in which they may be taken: gate pass, range lock, `checkpoints`, writer of the batch log, batch, journal
//! of a layer. The flush turn is taken before the last two and never while a range lock is held. No lock is taken on the way of a
//! read.
mod background;
mod batch_log;
mod begun;
mod checkpoint;
mod discard;
mod flush;
mod gate;
mod layers;
mod open;
mod proof;
#[cfg(test)]
mod race_tests;
mod range_locks;
mod read;
#[cfg(test)]
mod replica_tests;
mod resize;
#[cfg(test)]
mod side_store;
mod status;
mod swap;
#[cfg(test)]
mod tests;
mod types;
mod write;

pub use batch_log::{BatchLogPlace, SettleMark};
pub(crate) use begun::{BegunRead, BegunWrite};
pub(crate) use read::{PREFETCH_BYTES_MAX, ReadPlan, StartedRead};
pub use types::{
    BlockStatus, Checkpoint, DeviceEvent, DeviceLatencies, DeviceLimits, DeviceSpec, DeviceStats, LayerSpec, OpenReport, Served,
    StatusExtent, SwapReport,
};

use crate::{Admission, EngineError, Latency, Result, Throttle, ThrottleLimits};
use arc_swap::ArcSwap;
use atoll_io::StoreCapabilities;
use atoll_map::{Map, SLOT_BYTES};
use batch_log::BatchLog;
use checkpoint::Checkpoints;
use flush::{Batch, FlushTurns};
use gate::{Gate, Pass};
use layers::{ActiveLayer, LayerTable, ReadLayer};
use parking_lot::{Condvar, Mutex, MutexGuard};
use proof::Proof;
use range_locks::RangeLocks;
use resize::Shrink;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

/// An open device. Every method may be called from any thread; data calls block the calling thread.
pub struct Device {
    /// Itself, for work handed to the background.
    myself: Weak<Device>,
    volume: [u8; 16],
    epoch: u64,
    size_bytes: AtomicU64,
    limits: DeviceLimits,
    gate: Gate,
    map: Map,
    layers: ArcSwap<LayerTable>,
    ranges: RangeLocks,
    batch: Mutex<Batch>,
    batch_log: Option<BatchLog>,
    flush_turns: FlushTurns,
    checkpoints: Mutex<Checkpoints>,
    shrink: Mutex<Option<Shrink>>,
    /// Signalled when a checkpoint made room for more dirty leaves, or the device died.
    room: Condvar,
    room_lock: Mutex<()>,
    /// Mutations that completed; and how many of them a flush has made durable.
    changes: AtomicU64,
    changes_durable: AtomicU64,
    /// Written since the last flush began.
    dirty_bytes: AtomicU64,
    open_delta_count: AtomicU64,
    journal_bytes: AtomicU64,
    background_queued: AtomicBool,
    checkpoint_wanted: AtomicBool,
    poisoned: Mutex<Option<String>>,
    closed: AtomicBool,
    throttle: Throttle,
    on_event: Option<Box<dyn Fn(DeviceEvent) + Send + Sync>>,
    waits_for_network: AtomicBool,
    proof: Proof,
    counters: Counters,
    latencies: DeviceLatencies,
}

#[derive(Default)]
struct Counters {
    read_operations: AtomicU64,
    read_bytes: AtomicU64,
    write_operations: AtomicU64,
    write_bytes: AtomicU64,
    discard_operations: AtomicU64,
    flush_operations: AtomicU64,
    first_write_slots: AtomicU64,
    throttled_operations: AtomicU64,
    requests_waiting: AtomicU64,
    backend_reads_running: AtomicU64,
    backend_syncs_running: AtomicU64,
}

impl Device {
    /// Present size.
    pub fn size_bytes(&self) -> u64 {
        self.size_bytes.load(Ordering::SeqCst)
    }

    /// One of its layers is on other machines: a thread that has something else to do carries out no read or write of it.
    #[inline]
    pub fn waits_for_network(&self) -> bool {
        self.waits_for_network.load(Ordering::Relaxed)
    }

    /// No writes are possible.
    pub fn is_read_only(&self) -> bool {
        self.layers.load().active.is_none()
    }

    /// Waits as long as the throttle says; call before every data request that comes from a client, outside of any lock.
    pub fn throttle(&self, bytes: u64) {
        if self.throttle.acquire_unless(bytes, &|| self.gate.is_dead()) == Admission::AfterWait {
            self.counters.throttled_operations.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// As `throttle`, but says no instead of waiting (and charges nothing then).
    pub fn try_throttle(&self, bytes: u64) -> bool {
        self.throttle.try_acquire(bytes)
    }

    /// As `throttle`, but gives up (`Cancelled`, nothing is charged) soon after `cancelled` says so.
    pub fn throttle_unless(&self, bytes: u64, cancelled: &dyn Fn() -> bool) -> Admission {
        let admission = self.throttle.acquire_unless(bytes, &|| cancelled() || self.gate.is_dead());
        if admission == Admission::AfterWait {
            self.counters.throttled_operations.fetch_add(1, Ordering::Relaxed);
        }
        admission
    }

    /// Changes the rate limits.
    pub fn set_throttle(&self, limits: ThrottleLimits) {
        self.throttle.set_limits(limits);
    }

    /// Everything that completed before the call, on any thread, is durable on return.
    pub fn flush(&self) -> Result<()> {
        self.refuse_if_closed()?;
        self.counters.flush_operations.fetch_add(1, Ordering::Relaxed);
        self.flush_completed()
    }

    /// Waits until every request that was in flight at the call has finished; new ones are not held up (I5).
    pub fn read_barrier(&self) {
        self.gate.barrier();
    }

    /// Adds layers that a map may refer to from now on. One whose alias is known is read from its new place by whoever comes after;
    /// after a `read_barrier` nobody uses the handle that it had, which is closed then.
    pub fn add_layers(&self, specs: Vec<LayerSpec>) {
        let checkpoints = self.checkpoints.lock();
        if self.closed.load(Ordering::SeqCst) {
            return;
        }
        let mut table = LayerTable::clone(&self.layers.load());
        for spec in specs {
            // The active layer's handle is the one that writes; it is never replaced from outside.
            if table.active.as_ref().is_none_or(|active| active.alias() != spec.alias) {
                table.insert(ReadLayer::new(spec));
            }
        }
        self.set_layers(&checkpoints, table);
    }

    /// Replaces the table. Whoever changes it holds the lock from its look at the old one on, so that no change is lost.
    fn set_layers(&self, _changing: &MutexGuard<'_, Checkpoints>, table: LayerTable) {
        let waits_for_network = table.waits_for_network();
        // Never without the flag while there is such a layer: requests that are on their way would hold up who receives them.
        if waits_for_network {
            self.waits_for_network.store(true, Ordering::SeqCst);
        }
        self.layers.store(Arc::new(table));
        self.waits_for_network.store(waits_for_network, Ordering::SeqCst);
    }

    /// The layers whose bytes and frames are this device's to keep: the active one, those that are closing, and the one before it until
    /// the catalog knows that it is not the active one any more. They may lie in several stores.
    fn written_layers(&self) -> Vec<Arc<ActiveLayer>> {
        let predecessor = self.checkpoints.lock().swap.as_ref().map(|swap| swap.predecessor.clone());
        let closing = self.batch.lock().closing.clone();
        let mut layers: Vec<Arc<ActiveLayer>> = closing;
        for layer in predecessor.iter().chain(&self.layers.load().active) {
            if !layers.iter().any(|known| Arc::ptr_eq(known, layer)) {
                layers.push(layer.clone());
            }
        }
        layers
    }

    /// Asks the backends of these layers that `is_asked` whether they are still ours, each once. `known`: layers of those that have said so.
    fn prove_stores<'a>(
        layers: &'a [Arc<ActiveLayer>],
        mut known: Vec<&'a LayerSpec>,
        is_asked: impl Fn(&StoreCapabilities) -> bool,
    ) -> Result<()> {
        for layer in layers {
            let spec = &layer.spec;
            if is_asked(&spec.store.capabilities()) && !known.iter().any(|other| other.shares_store(spec)) {
                spec.store.prove_held()?;
                known.push(spec);
            }
        }
        Ok(())
    }

    /// Counters.
    pub fn stats(&self) -> DeviceStats {
        let counters = &self.counters;
        let get = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DeviceStats {
            read_operations: get(&counters.read_operations),
            read_bytes: get(&counters.read_bytes),
            write_operations: get(&counters.write_operations),
            write_bytes: get(&counters.write_bytes),
            discard_operations: get(&counters.discard_operations),
            flush_operations: get(&counters.flush_operations),
            first_write_slots: get(&counters.first_write_slots),
            throttled_operations: get(&counters.throttled_operations),
            dirty_leaves: self.map.dirty_leaf_count(),
            journal_bytes: get(&self.journal_bytes),
            lsn: self.batch.lock().last_lsn,
            poisoned: self.is_poisoned(),
            requests_waiting: get(&counters.requests_waiting),
            backend_reads_running: get(&counters.backend_reads_running),
            backend_syncs_running: get(&counters.backend_syncs_running),
        }
    }

    /// How long things took.
    pub fn latencies(&self) -> &DeviceLatencies {
        &self.latencies
    }

    /// A client's request was answered. Called by whoever serves it, who knows when it came.
    #[inline]
    pub fn note_served(&self, what: Served, took: Duration) {
        let latencies = &self.latencies;
        let latency = match what {
            Served::Read => &latencies.read,
            Served::Write => &latencies.write,
            Served::Discard => &latencies.discard,
            Served::Flush => &latencies.flush,
        };
        latency.record(took);
    }

    /// A client's request waits for a worker from now on, or was answered by one.
    pub fn note_waiting(&self, is_waiting: bool) {
        match is_waiting {
            true => self.counters.requests_waiting.fetch_add(1, Ordering::Relaxed),
            false => self.counters.requests_waiting.fetch_sub(1, Ordering::Relaxed),
        };
    }

    /// Whether a sync failed (I6).
    pub fn is_poisoned(&self) -> bool {
        self.poisoned.lock().is_some()
    }

    /// New requests fail with `DEVICE_CLOSED` (ESHUTDOWN), those in flight are waited for, then everything is flushed (not if
    /// poisoned: then the cached pages of the active layer are dropped, so that the next open sees what the backend has). Idempotent.
    pub fn close(&self) -> Result<()> {
        if self.closed.swap(true, Ordering::SeqCst) {
            return Ok(());
        }
        self.gate.kill();
        self.wake_waiting_writers();
        self.gate.drain();
        if let Some(log) = &self.batch_log {
            log.retire();
        }
        let result = self.end_layers();
        // Whoever still has this device (a handle that waits for its garbage collector) must not keep the files of layers
        // open: a layer that is removed gives its space back only when the last handle is gone.
        self.set_layers(&self.checkpoints.lock(), LayerTable::new(Vec::new(), None));
        result
    }

    fn end_layers(&self) -> Result<()> {
        if !self.is_poisoned() {
            // Nobody is answered by this: with nothing to write a backend that is away holds nothing up.
            if !self.is_flushed() {
                self.flush_completed()?;
            }
            return self.batch_log.as_ref().map_or(Ok(()), BatchLog::remove);
        }
        let closing = self.batch.lock().closing.clone();
        for layer in closing.iter().chain(self.layers.load().active.as_ref()) {
            layer.io.drop_cache()?;
        }
        Ok(())
    }

    fn refuse_if_closed(&self) -> Result<()> {
        if self.closed.load(Ordering::SeqCst) {
            return Err(EngineError::new("DEVICE_CLOSED", libc::ESHUTDOWN, "the device is closed"));
        }
        Ok(())
    }

    fn enter(&self) -> Result<Pass<'_>> {
        self.gate.enter().map_err(|_| self.dead_error())
    }

    /// Why the gate lets nobody in any more.
    fn dead_error(&self) -> EngineError {
        match self.poison_check() {
            Err(poisoned) => poisoned,
            Ok(()) => EngineError::new("DEVICE_CLOSED", libc::ESHUTDOWN, "the device is closed"),
        }
    }

    /// `OUT_OF_RANGE` unless the range lies within the device. Call inside the gate: a shrink changes the size with the gate closed.
    fn check_range(&self, offset_bytes: u64, length_bytes: u64, errno: i32) -> Result<()> {
        let size_bytes = self.size_bytes();
        match offset_bytes.checked_add(length_bytes) {
            Some(end) if end <= size_bytes => Ok(()),
            _ => Err(EngineError::new(
                "OUT_OF_RANGE",
                errno,
                format!("{length_bytes} bytes at {offset_bytes} do not lie within the device of {size_bytes} bytes"),
            )
            .with("offsetBytes", offset_bytes)
            .with("lengthBytes", length_bytes)
            .with("sizeBytes", size_bytes)),
        }
    }

    fn poison_check(&self) -> Result<()> {
        match &*self.poisoned.lock() {
            None => Ok(()),
            Some(reason) => Err(poisoned_error(reason)),
        }
    }

    /// I6: from now on every request fails until the device is closed and opened again from its journal.
    fn poison(&self, reason: &str) -> EngineError {
        let first = {
            let mut poisoned = self.poisoned.lock();
            let first = poisoned.is_none();
            poisoned.get_or_insert_with(|| reason.to_owned());
            first
        };
        if first {
            self.gate.kill();
            self.wake_waiting_writers();
            self.send_event(DeviceEvent::Poisoned(reason.to_owned()));
        }
        poisoned_error(reason)
    }

    /// Runs `body`; a panic in it poisons this device and is no panic any more.
    fn unwind_guard<T>(&self, operation: &'static str, body: impl FnOnce() -> Result<T>) -> Result<T> {
        match catch_unwind(AssertUnwindSafe(body)) {
            Ok(result) => result,
            Err(panic) => {
                let text = panic
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| panic.downcast_ref::<&str>().copied())
                    .unwrap_or("a panic without a message");
                Err(self.poison(&format!("the engine failed in {operation}: {text}")))
            }
        }
    }

    fn send_event(&self, event: DeviceEvent) {
        if let Some(on_event) = &self.on_event {
            on_event(event);
        }
    }
}

fn poisoned_error(reason: &str) -> EngineError {
    EngineError::new("DEVICE_POISONED", libc::EIO, format!("the device stopped and must be opened again: {reason}")).with("reason", reason)
}

impl Drop for Device {
    fn drop(&mut self) {
        // Without `close` nothing is flushed here: what was acknowledged as flushed is durable, the rest may be lost, as in a crash.
        self.gate.kill();
    }
}

/// Runs `body`, which waits for the backend: counted in `running` meanwhile, and in `latency` when it is done, however it ended.
fn timed<T>(running: &AtomicU64, latency: &Latency, body: impl FnOnce() -> T) -> T {
    running.fetch_add(1, Ordering::Relaxed);
    let started_at = Instant::now();
    let result = body();
    latency.record(started_at.elapsed());
    running.fetch_sub(1, Ordering::Relaxed);
    result
}

/// The slots that a byte range touches: first and one past the last.
#[inline]
fn slots_touched(offset_bytes: u64, length_bytes: u64) -> (u64, u64) {
    (offset_bytes / SLOT_BYTES, (offset_bytes + length_bytes).div_ceil(SLOT_BYTES))
}

/// The slots that lie wholly within a byte range: first and one past the last (equal: none).
#[inline]
fn slots_within(offset_bytes: u64, length_bytes: u64) -> (u64, u64) {
    let first = offset_bytes.div_ceil(SLOT_BYTES);
    (first, ((offset_bytes + length_bytes) / SLOT_BYTES).max(first))
}
