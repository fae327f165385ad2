//! Discard and write-zeroes.
//!
//! A whole slot that the active layer owns is punched there; one that another layer owns becomes a HOLE in the map; both
//! under the range lock, so that no first write of the same slot is between its data and its owner change (F19 of every
//! identity-addressed design: a late punch must not hit a slot written anew).
use super::batch_log::SettleMark;
use super::layers::ActiveLayer;
use super::read::with_runs;
use super::write::read_only_error;
use super::{Device, slots_within};
use crate::Result;
use atoll_map::{HOLE, Run, SLOT_BYTES};
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// Slots locked and looked up at once (256 MiB): bounds the list of runs and how long others wait.
const CHUNK_SLOTS: u64 = 65_536;
const ZEROS: [u8; SLOT_BYTES as usize] = [0; SLOT_BYTES as usize];

impl Device {
    /// Advisory: whole slots of the range read as zeros afterwards, the rest is untouched.
    pub fn discard(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        let mut mark = SettleMark::default();
        self.note_unsettled(&mut mark);
        self.unwind_guard("discard", || {
            self.wait_for_room()?;
            let _pass = self.enter()?;
            self.check_range(offset_bytes, length_bytes, libc::EINVAL)?;
            self.counters.discard_operations.fetch_add(1, Ordering::Relaxed);
            let (start_slot, end_slot) = slots_within(offset_bytes, length_bytes);
            self.clear_slots(start_slot, end_slot, false)
        })?;
        self.settle(mark)
    }

    /// The range reads as zeros, exactly. `allocate` (NO_HOLE): space is kept for it.
    pub fn write_zeroes(&self, offset_bytes: u64, length_bytes: u64, allocate: bool) -> Result<()> {
        let mut mark = SettleMark::default();
        self.note_unsettled(&mut mark);
        self.unwind_guard("write zeroes", || {
            self.wait_for_room()?;
            let _pass = self.enter()?;
            self.check_range(offset_bytes, length_bytes, libc::ENOSPC)?;
            self.counters.discard_operations.fetch_add(1, Ordering::Relaxed);
            let end_bytes = offset_bytes + length_bytes;
            let (start_slot, end_slot) = slots_within(offset_bytes, length_bytes);
            if start_slot == end_slot {
                // No whole slot: one or two ragged pieces, each less than a slot.
                let middle = (start_slot * SLOT_BYTES).clamp(offset_bytes, end_bytes);
                self.write_inside(offset_bytes, &ZEROS[..(middle - offset_bytes) as usize])?;
                return self.write_inside(middle, &ZEROS[..(end_bytes - middle) as usize]);
            }
            self.write_inside(offset_bytes, &ZEROS[..(start_slot * SLOT_BYTES - offset_bytes) as usize])?;
            self.clear_slots(start_slot, end_slot, allocate)?;
            self.write_inside(end_slot * SLOT_BYTES, &ZEROS[..(end_bytes - end_slot * SLOT_BYTES) as usize])
        })?;
        self.settle(mark)
    }

    /// Whether `write_zeroes` of the range (without `allocate`) only changes the map and frees space: whole slots, on a backend
    /// that punches. A piece of a slot is written, and so is what a backend frees in larger units only.
    pub fn zeroes_fast(&self, offset_bytes: u64, length_bytes: u64) -> bool {
        let layers = self.layers.load();
        let Some(active) = layers.active.as_ref() else { return false };
        let punch_unit_bytes = active.spec.store.capabilities().punch_unit_bytes;
        let unit_bytes = SLOT_BYTES.max(u64::from(punch_unit_bytes));
        punch_unit_bytes > 0 && offset_bytes.is_multiple_of(unit_bytes) && length_bytes.is_multiple_of(unit_bytes)
    }

    fn clear_slots(&self, start_slot: u64, end_slot: u64, allocate: bool) -> Result<()> {
        let layers = self.layers.load();
        let active = layers.active.as_ref().ok_or_else(read_only_error)?;
        let mut at = start_slot;
        while at < end_slot {
            let until = end_slot.min(at + CHUNK_SLOTS);
            let _lock = self.ranges.lock(at, until);
            with_runs(|runs| {
                self.map.lookup_runs(at, until - at, runs)?;
                if allocate { self.zero_allocated(active, runs) } else { self.clear_runs(active, runs) }
            })?;
            self.note_change(0);
            at = until;
        }
        Ok(())
    }

    fn clear_runs(&self, active: &Arc<ActiveLayer>, runs: &mut Vec<Run>) -> Result<()> {
        for run in runs.iter().filter(|run| run.owner == active.alias()) {
            active.writer()?.punch(run.start_slot * SLOT_BYTES, run.slot_count * SLOT_BYTES)?;
        }
        runs.retain(|run| run.owner != active.alias());
        self.change_owner(active, runs, HOLE)
    }

    fn zero_allocated(&self, active: &Arc<ActiveLayer>, runs: &[Run]) -> Result<()> {
        let (Some(first), Some(last)) = (runs.first(), runs.last()) else { return Ok(()) };
        let from = first.start_slot * SLOT_BYTES;
        let until = (last.start_slot + last.slot_count) * SLOT_BYTES;
        active.writer()?.zero_allocated(from, until - from)?;
        self.change_owner(active, runs, active.alias())
    }
}
