//! Flush: data before map, map before answer (I3).
//!
//! Rules
//! - `Batch::open` holds only deltas whose data write has completed; a delta and the owner in the live map change together
//!   under the batch lock, so a map frozen under that lock holds exactly the deltas of the batches closed so far.
//! - Closed batches wait in `Batch::queue`, in order of their lsn, until their frame is durable. One thread at a time runs a
//!   flush, so at most one frame is in flight, and batches of a closing layer go before those of its successor.
//! - A flush covers everything that completed before it *started*: who arrives while one runs waits for the next one. So no
//!   flush is answered while an earlier batch is neither durable nor failed.
//! - Two syncs, one after the other. Synced together, with a checksum of the data in the frame, they would take the time of one; but
//!   a write in place into slots of the last frame would then make its checksum wrong in a power cut, so every such write would
//!   first have to make that frame known to be durable.
//! - Where another process may shut this one out, a flush is a question to the backend even if there is nothing to write: an appended
//!   frame is its answer, and without one it is asked whether the pool is still ours. Whoever was shut out answers no flush. A swap
//!   onto a layer of another store leaves two backends to be asked until it is committed.
//! - After a failed sync the device is poisoned (I6). A frame that found no space was taken back and stays in the queue.
use super::batch_log::{BatchLog, LogTail};
use super::layers::ActiveLayer;
use super::{Device, DeviceEvent, timed};
use crate::{EngineError, Result};
use atoll_io::{Delta, IoError, IoErrorCode};
use atoll_map::FrozenMap;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A batch that got its lsn and waits to be durable.
pub(super) struct ClosedBatch {
    lsn: u64,
    deltas: Vec<Delta>,
    layer: Arc<ActiveLayer>,
}

/// Owner changes on their way to the journal.
#[derive(Default)]
pub(super) struct Batch {
    open: Vec<Delta>,
    queue: VecDeque<ClosedBatch>,
    pub(super) log_tail: LogTail,
    /// lsn of the last closed batch.
    pub(super) last_lsn: u64,
    /// Layers that a swap took out of writing and whose data and frames may not be durable yet.
    pub(super) closing: Vec<Arc<ActiveLayer>>,
}

impl Batch {
    pub(super) fn starting_after(last_lsn: u64) -> Batch {
        Batch { last_lsn, ..Batch::default() }
    }

    /// Appends a delta, merged with its predecessor where they join, and its entry to what waits for the log. `active`: alias of
    /// the layer that is written.
    pub(super) fn push(&mut self, delta: Delta, log: Option<&BatchLog>, active: u32) {
        let Batch { queue, log_tail, last_lsn, .. } = self;
        if let Some(log) = log {
            log.push(log_tail, *last_lsn + 1, delta, active, |lsn| queue.iter().any(|batch| batch.lsn == lsn));
        }
        if let Some(last) = self.open.last_mut()
            && last.owner == delta.owner
            && last.start_slot + last.slot_count == delta.start_slot
        {
            last.slot_count += delta.slot_count;
            return;
        }
        self.open.push(delta);
    }

    /// Whether an owner change in these slots is not durable yet; whenever it is not known, it is not.
    pub(super) fn touches(&self, start_slot: u64, end_slot: u64) -> bool {
        let meets = |delta: &Delta| delta.start_slot < end_slot && start_slot < delta.start_slot + delta.slot_count;
        // One whose deltas are not here is being appended right now.
        let is_queued = |batch: &ClosedBatch| batch.deltas.is_empty() || batch.deltas.iter().any(meets);
        self.open.iter().any(meets) || self.queue.iter().any(is_queued)
    }

    pub(super) fn open_delta_count(&self) -> usize {
        self.open.len()
    }

    /// Gives the open batch its lsn. `layer` is the active layer it was written under.
    pub(super) fn close(&mut self, layer: &Arc<ActiveLayer>) {
        if self.open.is_empty() {
            return;
        }
        self.last_lsn += 1;
        let deltas = std::mem::take(&mut self.open);
        self.queue.push_back(ClosedBatch { lsn: self.last_lsn, deltas, layer: layer.clone() });
    }

    fn is_idle(&self) -> bool {
        self.open.is_empty() && self.queue.is_empty() && self.closing.is_empty()
    }
}

/// Who runs a flush and who waits for one.
#[derive(Default)]
struct Turns {
    /// Number of the flush that runs, or of the last one that ran.
    started: u64,
    /// Number of the last flush that succeeded, and all before it.
    succeeded: u64,
    /// Number and failure of the last one that failed.
    failed: Option<(u64, EngineError)>,
    running: bool,
}

impl Turns {
    fn begin(&mut self) -> u64 {
        self.running = true;
        self.started += 1;
        self.started
    }
}

#[derive(Default)]
pub(super) struct FlushTurns {
    turns: Mutex<Turns>,
    turn_ended: Condvar,
}

/// A map frozen with the lsn of the flush that covered it.
pub(super) struct FrozenAt {
    pub(super) map: FrozenMap,
    pub(super) lsn: u64,
}

impl Device {
    /// Everything that completed before the call, on any thread and connection, is durable on return.
    pub(super) fn flush_completed(&self) -> Result<()> {
        self.poison_check()?;
        if self.is_flushed() && !self.is_fenceable() {
            return Ok(());
        }
        let mut turns = self.flush_turns.turns.lock();
        let mine = turns.started + 1;
        loop {
            if turns.succeeded >= mine {
                return Ok(());
            }
            if let Some((number, error)) = &turns.failed
                && *number >= mine
            {
                return Err(error.clone());
            }
            if !turns.running {
                let number = turns.begin();
                drop(turns);
                return self.run_turn(number, false).map(|_| ());
            }
            self.flush_turns.turn_ended.wait(&mut turns);
        }
    }

    /// Runs a flush of its own, after the one that may be running, and freezes the map at its lsn.
    pub(super) fn flush_and_freeze(&self) -> Result<FrozenAt> {
        self.poison_check()?;
        let mut turns = self.flush_turns.turns.lock();
        while turns.running {
            self.flush_turns.turn_ended.wait(&mut turns);
        }
        let number = turns.begin();
        drop(turns);
        let frozen = self.run_turn(number, true)?;
        Ok(frozen.expect("a flush that was asked to freeze returns the frozen map"))
    }

    fn run_turn(&self, number: u64, freeze: bool) -> Result<Option<FrozenAt>> {
        // The turn must end whatever happens, or every later flush would wait for ever.
        let outcome = self.unwind_guard("flush", || self.flush_once(freeze));

        let mut turns = self.flush_turns.turns.lock();
        turns.running = false;
        match &outcome {
            Ok(_) => turns.succeeded = number,
            Err(error) => turns.failed = Some((number, error.clone())),
        }
        self.flush_turns.turn_ended.notify_all();
        outcome
    }

    /// One flush, by the thread whose turn it is.
    fn flush_once(&self, freeze: bool) -> Result<Option<FrozenAt>> {
        self.poison_check()?;
        let changes_before = self.changes.load(Ordering::SeqCst);
        self.dirty_bytes.store(0, Ordering::Relaxed);
        // (1) Close the batch: from here on its deltas and the frozen map are fixed, and so are the layers to sync.
        let (layers, closing_count, frozen) = {
            let mut batch = self.batch.lock();
            let table = self.layers.load();
            let active = table.active.clone();
            if let Some(active) = &active {
                batch.close(active);
            }
            let mut layers = batch.closing.clone();
            let closing_count = layers.len();
            layers.extend(active);
            let frozen = freeze.then(|| FrozenAt { map: self.map.freeze(), lsn: batch.last_lsn });
            (layers, closing_count, frozen)
        };
        let mut proved = Vec::new();
        for (index, layer) in layers.iter().enumerate() {
            // (2) Data.
            let synced = timed(&self.counters.backend_syncs_running, &self.latencies.backend_sync, || layer.io.sync());
            if let Err(error) = synced {
                return Err(self.poison(&format!("sync of layer {} failed: {error}", layer.spec.id)));
            }
            // (3) Frames.
            if self.append_frames(layer)? {
                proved.push(&layer.spec);
            }
            if freeze && index >= closing_count {
                // What comes after the checkpoint goes to a segment of its own, so that whole segments can be removed behind it.
                layer.journal.lock().rotate();
            }
        }
        let written = self.written_layers();
        if closing_count > 0 {
            self.batch.lock().closing.drain(..closing_count);
        }
        // Nothing is lost if it fails, and nothing is in doubt: whoever asks again may hear better.
        Device::prove_stores(&written, proved, |store| store.is_fenceable)?;
        self.changes_durable.fetch_max(changes_before, Ordering::SeqCst);
        self.want_checkpoint_if_due();
        Ok(frozen)
    }

    /// Whether a flush has nothing to write.
    pub(super) fn is_flushed(&self) -> bool {
        self.changes.load(Ordering::SeqCst) == self.changes_durable.load(Ordering::SeqCst) && self.batch.lock().is_idle()
    }

    /// Another process may take what this device writes away from it.
    fn is_fenceable(&self) -> bool {
        self.written_layers().iter().any(|layer| layer.spec.store.capabilities().is_fenceable)
    }

    /// Appends the closed batches that belong to `layer`, which stand at the head of the queue. True: there were some.
    fn append_frames(&self, layer: &Arc<ActiveLayer>) -> Result<bool> {
        let mut has_appended = false;
        loop {
            let (lsn, deltas) = {
                let mut batch = self.batch.lock();
                match batch.queue.front_mut() {
                    Some(front) if Arc::ptr_eq(&front.layer, layer) => (front.lsn, std::mem::take(&mut front.deltas)),
                    _ => return Ok(has_appended),
                }
            };
            has_appended = true;
            let (result, journal_bytes) = {
                let mut journal = layer.journal.lock();
                (journal.append(lsn, &deltas), journal.length_bytes())
            };
            match result {
                Ok(()) => {
                    self.batch.lock().queue.pop_front();
                    if self.layers.load().active.as_ref().is_some_and(|active| Arc::ptr_eq(active, layer)) {
                        self.journal_bytes.store(journal_bytes, Ordering::Relaxed);
                    }
                }
                Err(error) => {
                    if let Some(front) = self.batch.lock().queue.front_mut() {
                        front.deltas = deltas;
                    }
                    return Err(self.append_failed(layer, error));
                }
            }
        }
    }

    fn append_failed(&self, layer: &ActiveLayer, error: IoError) -> EngineError {
        match error.code {
            // Taken back: the batch stays queued and the next flush tries again.
            IoErrorCode::NoSpace => error.into(),
            _ => self.poison(&format!("journal of layer {} failed: {error}", layer.spec.id)),
        }
    }

    /// Runs in the background when a bound was passed.
    pub(super) fn background_flush(&self) {
        self.background_queued.store(false, Ordering::SeqCst);
        if let Err(error) = self.flush_completed()
            && !self.is_poisoned()
        {
            self.send_event(DeviceEvent::FlushFailed(error.to_string()));
        }
    }
}
