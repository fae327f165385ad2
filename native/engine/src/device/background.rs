//! What a device does by itself: flush when a bound is passed, ask for a checkpoint, make writers wait when memory would
//! grow without one (I8). Two threads serve all devices of the process whose layers are on this machine, and two those that wait for
//! other machines, so that these keep nobody else waiting.
use super::{Device, DeviceEvent};
use crate::{EngineError, Result, spawn_named};
use parking_lot::Mutex;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

const THREADS: usize = 2;
/// How long a first write waits for a checkpoint before it fails.
const ROOM_WAIT_MAX: Duration = Duration::from_secs(30);
/// The open batch is flushed by the writer itself at this multiple of `batch_deltas_max`: a frame stays well below its limit.
const BATCH_HARD_FACTOR: u64 = 4;

type Queue = OnceLock<Option<Sender<Weak<Device>>>>;

/// `None` where no thread could be started: writers then flush by themselves at the hard bound.
fn queue(waits_for_network: bool) -> Option<&'static Sender<Weak<Device>>> {
    static LOCAL: Queue = OnceLock::new();
    static NETWORK: Queue = OnceLock::new();
    let queue = if waits_for_network { &NETWORK } else { &LOCAL };
    queue
        .get_or_init(|| {
            let (sender, receiver) = channel();
            let receiver = Arc::new(Mutex::new(receiver));
            let started = (0..THREADS)
                .filter(|index| {
                    let receiver = receiver.clone();
                    spawn_named(&format!("atoll-flush-{index}"), move || work(&receiver)).is_ok()
                })
                .count();
            (started > 0).then_some(sender)
        })
        .as_ref()
}

fn work(receiver: &Mutex<Receiver<Weak<Device>>>) {
    loop {
        let next = receiver.lock().recv();
        let Ok(device) = next else { return };
        if let Some(device) = device.upgrade() {
            device.background_flush();
        }
    }
}

impl Device {
    pub(super) fn queue_background_flush(&self) {
        if !self.background_queued.swap(true, Ordering::SeqCst) {
            let sent = queue(self.waits_for_network()).is_some_and(|queue| queue.send(self.myself.clone()).is_ok());
            self.background_queued.store(sent, Ordering::SeqCst);
        }
    }

    pub(super) fn want_checkpoint(&self) {
        if !self.checkpoint_wanted.swap(true, Ordering::SeqCst) {
            self.send_event(DeviceEvent::CheckpointWanted);
        }
    }

    pub(super) fn want_checkpoint_if_due(&self) {
        if self.map.dirty_leaf_count() >= self.limits.dirty_leaves_soft
            || self.journal_bytes.load(Ordering::Relaxed) >= self.limits.journal_bytes_soft
        {
            self.want_checkpoint();
        }
    }

    /// Before a mutation, outside of the gate: waits while the map has too many leaves that no checkpoint has persisted.
    #[inline]
    pub(super) fn wait_for_room(&self) -> Result<()> {
        if self.open_delta_count.load(Ordering::Relaxed) >= self.limits.batch_deltas_max as u64 * BATCH_HARD_FACTOR {
            self.flush_completed()?;
        }
        if self.map.dirty_leaf_count() < self.limits.dirty_leaves_hard {
            return Ok(());
        }
        self.wait_for_checkpoint()
    }

    /// Whether `wait_for_room` would not wait.
    #[inline]
    pub(super) fn has_room(&self) -> bool {
        self.open_delta_count.load(Ordering::Relaxed) < self.limits.batch_deltas_max as u64 * BATCH_HARD_FACTOR
            && self.map.dirty_leaf_count() < self.limits.dirty_leaves_hard
    }

    #[cold]
    fn wait_for_checkpoint(&self) -> Result<()> {
        let deadline = Instant::now() + ROOM_WAIT_MAX;
        self.want_checkpoint();
        let mut guard = self.room_lock.lock();
        while self.map.dirty_leaf_count() >= self.limits.dirty_leaves_hard {
            if self.gate.is_dead() {
                return Ok(());
            }
            if self.room.wait_until(&mut guard, deadline).timed_out() {
                return Err(EngineError::new(
                    "CHECKPOINT_OVERDUE",
                    libc::ENOSPC,
                    format!(
                        "{} map leaves wait to be written to the catalog and no checkpoint came for {} s; is the catalog's disk full?",
                        self.map.dirty_leaf_count(),
                        ROOM_WAIT_MAX.as_secs()
                    ),
                ));
            }
        }
        Ok(())
    }

    pub(super) fn wake_waiting_writers(&self) {
        let _guard = self.room_lock.lock();
        self.room.notify_all();
    }
}
