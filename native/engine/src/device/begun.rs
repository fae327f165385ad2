//! Requests that a backend carries out while no thread waits for them.
//!
//! Rules
//! - What is begun is inside the gate, and keeps its slots locked where their owner is to change, from its beginning until its end is
//!   told: a swap, a barrier or the end of the device wait for it as for a request on a thread.
//! - Nobody waits at the beginning: not for the gate, a lock, room, a layer to be opened or a backend that has much to do. What would have to is not begun, and so is
//!   what is wrong; the waiting form is the way then, and says it.
//! - The owner changes when the data is there, in whatever order the ends come (I3). Whoever answers settles before, elsewhere: a
//!   thread of the backend waits for nothing.
use super::batch_log::SettleMark;
use super::gate::{Inside, Pass};
use super::layers::ActiveLayer;
use super::range_locks::LockedRange;
use super::read::with_runs;
use super::{Device, slots_touched};
use crate::Result;
use atoll_io::{Begun, Ending, split};
use atoll_map::{HOLE, Run, SLOT_BYTES};
use std::io::IoSliceMut;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Parts of one read that are under way at a time (I8).
const READ_PARTS_MAX: usize = 512;

/// A read that was begun. Dropped without `finish`: it never was.
pub(crate) struct BegunRead {
    device: Arc<Device>,
    inside: Option<Inside>,
    started_at: Instant,
}

impl Drop for BegunRead {
    fn drop(&mut self) {
        self.device.counters.backend_reads_running.fetch_sub(1, Ordering::Relaxed);
        if let Some(inside) = self.inside.take() {
            self.device.gate.leave(inside);
        }
    }
}

impl BegunRead {
    /// The end of it, with what the backend said of so many bytes.
    pub(crate) fn finish(self, result: atoll_io::Result<()>, length_bytes: u64) -> Result<()> {
        let device = &self.device;
        device.latencies.backend_read.record(self.started_at.elapsed());
        device.counters.read_operations.fetch_add(1, Ordering::Relaxed);
        device.counters.read_bytes.fetch_add(length_bytes, Ordering::Relaxed);
        Ok(result?)
    }
}

/// A write that was begun. Dropped without `finish`: it never was.
pub(crate) struct BegunWrite {
    device: Arc<Device>,
    inside: Option<Inside>,
    locked: Option<LockedRange>,
    /// Whose the slots become, and who has them now; `None`: it has them already.
    owning: Option<(Arc<ActiveLayer>, Vec<Run>)>,
    offset_bytes: u64,
    length_bytes: u64,
    mark: SettleMark,
}

impl Drop for BegunWrite {
    fn drop(&mut self) {
        if let Some(locked) = self.locked.take() {
            self.device.ranges.unlock(locked);
        }
        if let Some(inside) = self.inside.take() {
            self.device.gate.leave(inside);
        }
    }
}

impl BegunWrite {
    /// The end of it, with what the backend said. The answer waits until the mark is settled.
    pub(crate) fn finish(mut self, result: atoll_io::Result<()>) -> Result<SettleMark> {
        let device = &self.device;
        let (offset_bytes, length_bytes) = (self.offset_bytes, self.length_bytes);
        device.counters.write_operations.fetch_add(1, Ordering::Relaxed);
        device.counters.write_bytes.fetch_add(length_bytes, Ordering::Relaxed);
        device.unwind_guard("write", || {
            result?;
            match &self.owning {
                Some((active, runs)) => device.change_owner(active, runs, active.alias())?,
                None => {
                    let (start_slot, end_slot) = slots_touched(offset_bytes, length_bytes);
                    device.note_in_place(start_slot, end_slot);
                }
            }
            device.note_change(length_bytes);
            Ok(())
        })?;
        Ok(std::mem::take(&mut self.mark))
    }
}

impl Device {
    /// Begins a read into the room of what `make` returns, which is told the end. False: nothing was begun, and `read` is the way.
    pub(crate) fn begin_read(&self, offset_bytes: u64, length_bytes: u64, make: impl FnOnce(BegunRead) -> Box<dyn Ending>) -> bool {
        let begun = self.unwind_guard("read", || {
            let (Some(device), Ok(Some(pass))) = (self.myself.upgrade(), self.gate.try_enter()) else { return Ok(false) };
            self.check_range(offset_bytes, length_bytes, libc::EINVAL)?;
            let (start_slot, end_slot) = slots_touched(offset_bytes, length_bytes);
            let owner = self.map.lookup(start_slot)?;
            if !self.map.is_owned(start_slot, end_slot - start_slot, owner)? {
                return self.begin_parts(device, pass, offset_bytes, length_bytes, make);
            }
            if owner == HOLE {
                return Ok(false);
            }
            let Some(layer) = self.layers.load().distant_reader_at_hand(owner).cloned() else { return Ok(false) };
            if !layer.may_begin(length_bytes) {
                return Ok(false);
            }
            self.counters.backend_reads_running.fetch_add(1, Ordering::Relaxed);
            let read = BegunRead { device, inside: Some(pass.keep()), started_at: Instant::now() };
            Ok(is_begun(layer.begin_read(offset_bytes, make(read))))
        });
        begun.unwrap_or(false)
    }

    /// As `begin_read`, of what several layers have: all parts at the same time.
    #[inline(never)]
    fn begin_parts(
        &self,
        device: Arc<Device>,
        pass: Pass<'_>,
        offset_bytes: u64,
        length_bytes: u64,
        make: impl FnOnce(BegunRead) -> Box<dyn Ending>,
    ) -> Result<bool> {
        let (start_slot, end_slot) = slots_touched(offset_bytes, length_bytes);
        with_runs(|runs| {
            self.map.lookup_runs(start_slot, end_slot - start_slot, runs)?;
            let layers = self.layers.load();
            let is_at_hand = |run: &Run| {
                run.owner == HOLE || layers.distant_reader_at_hand(run.owner).is_some_and(|layer| layer.may_begin(length_bytes))
            };
            if runs.len() > READ_PARTS_MAX || !runs.iter().all(is_at_hand) {
                return Ok(false);
            }
            let range_of = |run: &Run| {
                let from = (run.start_slot * SLOT_BYTES).max(offset_bytes);
                from..((run.start_slot + run.slot_count) * SLOT_BYTES).min(offset_bytes + length_bytes)
            };
            let lengths: Vec<usize> = runs.iter().map(range_of).map(|range| (range.end - range.start) as usize).collect();
            self.counters.backend_reads_running.fetch_add(1, Ordering::Relaxed);
            let read = BegunRead { device, inside: Some(pass.keep()), started_at: Instant::now() };
            for (run, mut part) in runs.iter().zip(split(make(read), &lengths)) {
                let Some(layer) = (if run.owner == HOLE { None } else { layers.distant_reader_at_hand(run.owner) }) else {
                    part.room().fill(0);
                    part.ended(Ok(()));
                    continue;
                };
                let from = range_of(run).start;
                if let Err(mut part) = layer.begin_read(from, part) {
                    // Of a layer that was removed: others of this read are under way, so it is waited for here.
                    let result = layer.read(from, &mut [IoSliceMut::new(part.room())]);
                    part.ended(result);
                }
            }
            Ok(true)
        })
    }

    /// Begins a write; what `make` returns is told the end. The data may be used otherwise on return. False: nothing was begun, and
    /// `write` is the way.
    pub(crate) fn begin_write(&self, offset_bytes: u64, data: &[u8], make: impl FnOnce(BegunWrite) -> Box<dyn Ending>) -> bool {
        let begun = self.unwind_guard("write", || {
            if data.is_empty() || !self.has_room() {
                return Ok(false);
            }
            let mut mark = SettleMark::default();
            self.note_unsettled(&mut mark);
            let (Some(device), Ok(Some(pass))) = (self.myself.upgrade(), self.gate.try_enter()) else { return Ok(false) };
            let length_bytes = data.len() as u64;
            self.check_range(offset_bytes, length_bytes, libc::ENOSPC)?;
            let layers = self.layers.load();
            let Some(active) = layers.active.as_ref() else { return Ok(false) };
            let (start_slot, end_slot) = slots_touched(offset_bytes, length_bytes);
            let mut write = BegunWrite { device, inside: None, locked: None, owning: None, offset_bytes, length_bytes, mark };
            if !self.map.is_owned(start_slot, end_slot - start_slot, active.alias())? {
                if !offset_bytes.is_multiple_of(SLOT_BYTES) || !length_bytes.is_multiple_of(SLOT_BYTES) {
                    // The first and the last slot have to be completed from what others own.
                    return Ok(false);
                }
                let Some(lock) = self.ranges.try_lock(start_slot, end_slot) else { return Ok(false) };
                let mut runs = Vec::with_capacity(1);
                self.map.lookup_runs(start_slot, end_slot - start_slot, &mut runs)?;
                write.locked = Some(lock.keep());
                write.owning = Some((active.clone(), runs));
            }
            let writer = active.writer()?;
            if !writer.may_begin(length_bytes) {
                return Ok(false);
            }
            write.inside = Some(pass.keep());
            Ok(is_begun(writer.begin_write(offset_bytes, data, make(write))))
        });
        begun.unwrap_or(false)
    }
}

/// What was not begun is dropped, and has left the gate when this returns.
fn is_begun(begun: Begun) -> bool {
    begun.is_ok()
}
