//! Writes.
//!
//! Rules
//! - Every slot of the range owned by the active layer: write in place, no lock, no map work.
//! - Otherwise the range is locked and looked up again; slots that only partly lie in the write and that the active layer
//!   does not own are completed from their owner (zeros for a hole: never from what an earlier crash left in the active
//!   layer), the bytes are written, and only then the owner changes in the map and in the open batch, together (I3).
use super::batch_log::SettleMark;
use super::layers::ActiveLayer;
use super::read::with_runs;
use super::{Device, slots_touched};
use crate::{EngineError, Result};
use atoll_io::Delta;
use atoll_map::{Run, SLOT_BYTES};
use std::io::IoSlice;
use std::sync::Arc;
use std::sync::atomic::Ordering;

const SLOT: usize = SLOT_BYTES as usize;

impl Device {
    /// Writes; durable after the next `flush` that starts afterwards. Any alignment. `OUT_OF_RANGE`, `READ_ONLY`, `NO_SPACE`.
    pub fn write(&self, offset_bytes: u64, data: &[u8]) -> Result<()> {
        let mut mark = SettleMark::default();
        self.write_unsettled(offset_bytes, data, &mut mark)?;
        self.settle(mark)
    }

    /// As `write`, but not to be answered before `settle` of the mark, which many may share.
    pub fn write_unsettled(&self, offset_bytes: u64, data: &[u8], mark: &mut SettleMark) -> Result<()> {
        self.note_unsettled(mark);
        self.write_part(offset_bytes, data, 1)
    }

    /// The next part of a write whose first part `write_unsettled` took: no operation of its own in the counters.
    pub fn write_rest_unsettled(&self, offset_bytes: u64, data: &[u8], mark: &mut SettleMark) -> Result<()> {
        self.note_unsettled(mark);
        self.write_part(offset_bytes, data, 0)
    }

    #[inline]
    pub(super) fn note_unsettled(&self, mark: &mut SettleMark) {
        if let Some(log) = &self.batch_log {
            log.mark(mark);
        }
    }

    /// Slots that are ours already were written.
    #[inline]
    pub(super) fn note_in_place(&self, start_slot: u64, end_slot: u64) {
        if let Some(log) = &self.batch_log {
            log.note_in_place(&self.batch, start_slot, end_slot);
        }
    }

    /// `operations`: how many the counters get.
    fn write_part(&self, offset_bytes: u64, data: &[u8], operations: u64) -> Result<()> {
        self.unwind_guard("write", || {
            self.wait_for_room()?;
            let _pass = self.enter()?;
            self.check_range(offset_bytes, data.len() as u64, libc::ENOSPC)?;
            self.counters.write_operations.fetch_add(operations, Ordering::Relaxed);
            self.counters.write_bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
            self.write_inside(offset_bytes, data)
        })
    }

    pub(super) fn write_inside(&self, offset_bytes: u64, data: &[u8]) -> Result<()> {
        let layers = self.layers.load();
        let active = layers.active.as_ref().ok_or_else(read_only_error)?;
        if data.is_empty() {
            return Ok(());
        }
        let (start_slot, end_slot) = slots_touched(offset_bytes, data.len() as u64);
        if self.map.is_owned(start_slot, end_slot - start_slot, active.alias())? {
            active.writer()?.write(offset_bytes, &[IoSlice::new(data)])?;
            self.note_in_place(start_slot, end_slot);
        } else {
            self.write_and_own(active, offset_bytes, data)?;
        }
        self.note_change(data.len() as u64);
        Ok(())
    }

    fn write_and_own(&self, active: &Arc<ActiveLayer>, offset_bytes: u64, data: &[u8]) -> Result<()> {
        let end_bytes = offset_bytes + data.len() as u64;
        let (start_slot, end_slot) = slots_touched(offset_bytes, data.len() as u64);
        let _lock = self.ranges.lock(start_slot, end_slot);
        with_runs(|runs| {
            self.map.lookup_runs(start_slot, end_slot - start_slot, runs)?;
            let alias = active.alias();
            if offset_bytes.is_multiple_of(SLOT_BYTES) && end_bytes.is_multiple_of(SLOT_BYTES) {
                active.writer()?.write(offset_bytes, &[IoSlice::new(data)])?;
            } else {
                self.write_completed(active, offset_bytes, data, runs)?;
            }
            self.change_owner(active, runs, alias)
        })
    }

    /// Writes together with what completes the first and the last slot. Apart from the whole slots, which need no room for that.
    #[inline(never)]
    fn write_completed(&self, active: &ActiveLayer, offset_bytes: u64, data: &[u8], runs: &[Run]) -> Result<()> {
        let end_bytes = offset_bytes + data.len() as u64;
        let (start_slot, end_slot) = slots_touched(offset_bytes, data.len() as u64);
        let first_owner = runs[0].owner;
        let last_owner = runs[runs.len() - 1].owner;
        let alias = active.alias();

        let mut head = [0u8; SLOT];
        let head_length = (offset_bytes % SLOT_BYTES) as usize;
        let complete_head = head_length > 0 && first_owner != alias;
        if complete_head {
            self.read_from(first_owner, start_slot * SLOT_BYTES, &mut head[..head_length])?;
        }
        let mut tail = [0u8; SLOT];
        let tail_length = (end_slot * SLOT_BYTES - end_bytes) as usize;
        let complete_tail = tail_length > 0 && last_owner != alias;
        if complete_tail {
            self.read_from(last_owner, end_bytes, &mut tail[..tail_length])?;
        }
        let head_part = if complete_head { &head[..head_length] } else { &[] };
        let tail_part = if complete_tail { &tail[..tail_length] } else { &[] };
        active
            .writer()?
            .write(offset_bytes - head_part.len() as u64, &[IoSlice::new(head_part), IoSlice::new(data), IoSlice::new(tail_part)])?;
        Ok(())
    }

    /// Gives the runs that `owner` does not have yet to it: in the live map, in the open batch and among what waits for the batch
    /// log, as one step. The caller holds the range lock, looked `runs` up under it, has completed the data write, and settles
    /// before it answers.
    pub(super) fn change_owner(&self, active: &ActiveLayer, runs: &[Run], owner: u32) -> Result<()> {
        let mut changed_slots = 0;
        for run in runs.iter().filter(|run| run.owner != owner) {
            let delta = Delta { start_slot: run.start_slot, slot_count: run.slot_count, owner };
            let mut batch = self.batch.lock();
            batch.push(delta, self.batch_log.as_ref(), active.alias());
            if let Err(error) = self.map.set(run.start_slot, run.slot_count, owner) {
                drop(batch);
                return Err(self.poison(&format!("the map could not be changed: {error}")));
            }
            self.open_delta_count.store(batch.open_delta_count() as u64, Ordering::Relaxed);
            changed_slots += run.slot_count;
        }
        self.counters.first_write_slots.fetch_add(changed_slots, Ordering::Relaxed);
        Ok(())
    }

    /// A mutation completed: a flush that starts from now on must cover it.
    pub(super) fn note_change(&self, length_bytes: u64) {
        self.changes.fetch_add(1, Ordering::SeqCst);
        let dirty_bytes = self.dirty_bytes.fetch_add(length_bytes, Ordering::Relaxed) + length_bytes;
        if dirty_bytes >= self.limits.dirty_bytes_max
            || self.open_delta_count.load(Ordering::Relaxed) >= self.limits.batch_deltas_max as u64
        {
            self.queue_background_flush();
        }
        if self.map.dirty_leaf_count() >= self.limits.dirty_leaves_soft {
            self.want_checkpoint();
        }
    }
}

pub(super) fn read_only_error() -> EngineError {
    EngineError::new("READ_ONLY", libc::EPERM, "the device is read-only")
}
