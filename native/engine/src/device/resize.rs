//! Grow and shrink, and the freeing of what the active layer holds for nobody.
//!
//! A shrink must not be half durable: what lies beyond the new size becomes HOLE in the live map without a delta in the
//! journal, and only the transaction that commits the checkpoint and the size makes it so. If that fails, the owners are put back.
use super::read::with_runs;
use super::write::read_only_error;
use super::{Device, slots_touched};
use crate::{EngineError, Result};
use atoll_io::Extent;
use atoll_map::{FrozenMap, HOLE, MAP_SLOTS, Run, SLOT_BYTES};
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Slots locked at once while orphans are looked for (32 MiB).
const ORPHAN_CHUNK_SLOTS: u64 = 8192;

/// Requests that were let in under the old size are waited for this long.
const SHRINK_WAIT_MAX: Duration = Duration::from_secs(60);

/// A shrink under way.
pub(super) struct Shrink {
    old_size_bytes: u64,
    old_map: FrozenMap,
    pub(super) committed: bool,
}

impl Device {
    /// Grows: the new space reads as zeros. `SIZE_INVALID` if smaller than now or beyond the address space.
    pub fn grow(&self, size_bytes: u64) -> Result<()> {
        let present = self.size_bytes();
        if size_bytes < present || size_bytes > MAP_SLOTS * SLOT_BYTES {
            return Err(size_error(size_bytes, present, MAP_SLOTS * SLOT_BYTES));
        }
        self.size_bytes.store(size_bytes, Ordering::SeqCst);
        Ok(())
    }

    /// Shrink, phase 1: requests beyond `size_bytes` are refused from now on, the tail of the last partial slot is zeroed and
    /// synced, what lies beyond becomes HOLE in the live map. Then commit a `checkpoint` and the size in one transaction
    /// (`checkpoint_aborted` takes all of it back), then call `shrink_punch`.
    pub fn shrink_prepare(&self, size_bytes: u64) -> Result<()> {
        self.unwind_guard("shrink", || {
            let old_size_bytes = self.size_bytes();
            if size_bytes > old_size_bytes {
                return Err(size_error(size_bytes, 0, old_size_bytes));
            }
            if self.layers.load().active.is_none() {
                return Err(read_only_error());
            }
            if self.shrink.lock().is_some() || self.checkpoints.lock().swap.is_some() {
                return Err(super::checkpoint::busy_error());
            }
            let tail_end = size_bytes.div_ceil(SLOT_BYTES) * SLOT_BYTES;
            let tail = vec![0u8; (tail_end.min(old_size_bytes) - size_bytes) as usize];
            if !tail.is_empty() {
                let _pass = self.enter()?;
                self.write_inside(size_bytes, &tail)?;
            }
            // Everything up to here is in the journal before the map is frozen without a delta.
            self.flush_completed()?;
            self.size_bytes.store(size_bytes, Ordering::SeqCst);
            // Who checked the old size is inside now; who comes later sees the new one.
            let flushed = match self.gate.barrier(Instant::now() + SHRINK_WAIT_MAX) {
                true => self.flush_completed(),
                false => {
                    Err(EngineError::new("DEVICE_BUSY", libc::EBUSY, "requests in flight did not end; nothing was changed, try again"))
                }
            };
            if let Err(error) = flushed {
                self.size_bytes.store(old_size_bytes, Ordering::SeqCst);
                return Err(error);
            }
            let first_slot = size_bytes.div_ceil(SLOT_BYTES);
            let _lock = self.ranges.lock(first_slot, MAP_SLOTS);
            let batch = self.batch.lock();
            let old_map = self.map.freeze();
            if first_slot < MAP_SLOTS
                && let Err(error) = self.map.set(first_slot, MAP_SLOTS - first_slot, HOLE)
            {
                drop(batch);
                return Err(self.poison(&format!("the map could not be changed: {error}")));
            }
            *self.shrink.lock() = Some(Shrink { old_size_bytes, old_map, committed: false });
            Ok(())
        })
    }

    /// Shrink, phase 2, after the commit: frees what lies beyond in the active layer.
    pub fn shrink_punch(&self) -> Result<()> {
        let Some(shrink) = self.shrink.lock().take_if(|shrink| shrink.committed) else {
            return Err(EngineError::new("SHRINK_UNCOMMITTED", libc::EINVAL, "no shrink of this device is committed"));
        };
        let (first_slot, _) = slots_touched(self.size_bytes().next_multiple_of(SLOT_BYTES), 0);
        // Past the end of what was ever written there is nothing to free, and a thin volume may be far larger than that.
        let Some(active) = self.layers.load().active.clone() else { return Err(read_only_error()) };
        let held_slots = active.io.length_bytes()?.div_ceil(SLOT_BYTES);
        self.punch_orphans_from(first_slot, held_slots.min(shrink.old_size_bytes.div_ceil(SLOT_BYTES))).map(|_| ())
    }

    pub(super) fn undo_shrink(&self) {
        let Some(shrink) = self.shrink.lock().take_if(|shrink| !shrink.committed) else { return };
        let first_slot = self.size_bytes().div_ceil(SLOT_BYTES);
        let undone = with_runs(|runs: &mut Vec<Run>| {
            let batch = self.batch.lock();
            // Runs of the whole address space: beyond the old size they are few and long.
            shrink.old_map.lookup_runs(first_slot, MAP_SLOTS - first_slot, runs)?;
            for run in runs.iter() {
                self.map.set(run.start_slot, run.slot_count, run.owner)?;
            }
            drop(batch);
            atoll_map::Result::Ok(())
        });
        match undone {
            Ok(()) => self.size_bytes.store(shrink.old_size_bytes, Ordering::SeqCst),
            Err(error) => {
                self.poison(&format!("a shrink could not be taken back: {error}"));
            }
        }
    }

    /// Frees what the active layer holds but the map does not give to it, under the slots' locks (an earlier crash or a failed
    /// write leaves such bytes). Returns the bytes freed.
    pub fn punch_orphans(&self) -> Result<u64> {
        self.unwind_guard("punch orphans", || {
            let Some(active) = self.layers.load().active.clone() else { return Ok(0) };
            let end_slot = active.io.length_bytes()?.div_ceil(SLOT_BYTES);
            self.punch_orphans_from(0, end_slot)
        })
    }

    fn punch_orphans_from(&self, start_slot: u64, end_slot: u64) -> Result<u64> {
        let mut freed_bytes = 0;
        let mut at = start_slot;
        let mut extents: Vec<Extent> = Vec::new();
        while at < end_slot {
            let until = end_slot.min(at + ORPHAN_CHUNK_SLOTS);
            // The pass keeps a swap away; the lock keeps first writes away.
            let _pass = self.enter()?;
            let layers = self.layers.load();
            let active = layers.active.as_ref().ok_or_else(read_only_error)?;
            extents.clear();
            active.io.extents(at * SLOT_BYTES, (until - at) * SLOT_BYTES, &mut extents)?;
            if extents.iter().any(|extent| extent.data) {
                let _lock = self.ranges.lock(at, until);
                let writer = active.writer()?;
                freed_bytes += with_runs(|runs| {
                    self.map.lookup_runs(at, until - at, runs)?;
                    let mut freed_bytes = 0;
                    for run in runs.iter().filter(|run| run.owner != active.alias()) {
                        let from = run.start_slot * SLOT_BYTES;
                        let to = from + run.slot_count * SLOT_BYTES;
                        let held: u64 = extents.iter().filter(|extent| extent.data).map(|extent| overlap(extent, from, to)).sum();
                        if held > 0 {
                            writer.punch(from, to - from)?;
                            freed_bytes += held;
                        }
                    }
                    Result::Ok(freed_bytes)
                })?;
                self.note_change(0);
            }
            at = until;
        }
        Ok(freed_bytes)
    }
}

fn overlap(extent: &Extent, from: u64, to: u64) -> u64 {
    let end = (extent.offset_bytes + extent.length_bytes).min(to);
    end.saturating_sub(extent.offset_bytes.max(from))
}

fn size_error(size_bytes: u64, min_bytes: u64, max_bytes: u64) -> EngineError {
    EngineError::new("SIZE_INVALID", libc::EINVAL, format!("a size of {size_bytes} bytes is not between {min_bytes} and {max_bytes}"))
        .with("sizeBytes", size_bytes)
        .with("minBytes", min_bytes)
        .with("maxBytes", max_bytes)
}
