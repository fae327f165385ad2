//! Reads and block status. No lock is taken: the gate pass keeps what was looked up from being punched (I5).
use super::{BlockStatus, Device, slots_touched};
use crate::Result;
use atoll_io::Extent;
use atoll_map::{HOLE, Run, SLOT_BYTES};
use std::cell::RefCell;
use std::io::IoSliceMut;
use std::sync::atomic::Ordering;

thread_local! {
    /// Reused by every request of a thread, so that a lookup does not allocate.
    static RUNS: RefCell<Vec<Run>> = const { RefCell::new(Vec::new()) };
}

/// Runs `body` with an empty list of runs that keeps its memory for the next call.
pub(super) fn with_runs<T>(body: impl FnOnce(&mut Vec<Run>) -> T) -> T {
    RUNS.with(|cell| match cell.try_borrow_mut() {
        Ok(mut runs) => {
            runs.clear();
            body(&mut runs)
        }
        Err(_) => body(&mut Vec::new()),
    })
}

impl Device {
    /// Fills `buffer`. Any alignment. `OUT_OF_RANGE` past the end. A read that races with a write returns old or new bytes.
    pub fn read(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<()> {
        self.unwind_guard("read", || {
            let _pass = self.enter()?;
            self.check_range(offset_bytes, buffer.len() as u64, libc::EINVAL)?;
            self.counters.read_operations.fetch_add(1, Ordering::Relaxed);
            self.counters.read_bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
            self.read_inside(offset_bytes, buffer)
        })
    }

    /// Reads without asking the gate: the caller is inside, or nobody else is.
    pub(super) fn read_inside(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<()> {
        if buffer.is_empty() {
            return Ok(());
        }
        let (start_slot, end_slot) = slots_touched(offset_bytes, buffer.len() as u64);
        let owner = self.map.lookup(start_slot)?;
        if end_slot - start_slot == 1 || self.map.is_owned(start_slot, end_slot - start_slot, owner)? {
            return self.read_from(owner, offset_bytes, buffer);
        }
        with_runs(|runs| {
            self.map.lookup_runs(start_slot, end_slot - start_slot, runs)?;
            let mut rest = buffer;
            let mut at = offset_bytes;
            for run in runs.iter() {
                let run_end = (run.start_slot + run.slot_count) * SLOT_BYTES;
                let length = (run_end - at).min(rest.len() as u64) as usize;
                let (part, tail) = rest.split_at_mut(length);
                self.read_from(run.owner, at, part)?;
                at += length as u64;
                rest = tail;
            }
            debug_assert!(rest.is_empty(), "lookup_runs covers the range exactly");
            Ok(())
        })
    }

    #[inline]
    pub(super) fn read_from(&self, owner: u32, offset_bytes: u64, buffer: &mut [u8]) -> Result<()> {
        if owner == HOLE {
            buffer.fill(0);
            return Ok(());
        }
        let layers = self.layers.load();
        layers.reader(owner)?.read(offset_bytes, &mut [IoSliceMut::new(buffer)])?;
        Ok(())
    }

    /// Appends the status of the range to `out`, at most `extent_count_max` entries, so it may end early (never empty for a
    /// range that is not). HOLE in the map and a hole of the owning layer read as zero; everything else is data (I4: a hint).
    pub fn block_status(&self, offset_bytes: u64, length_bytes: u64, extent_count_max: usize, out: &mut Vec<BlockStatus>) -> Result<()> {
        self.unwind_guard("block status", || {
            let _pass = self.enter()?;
            self.check_range(offset_bytes, length_bytes, libc::EINVAL)?;
            let end_bytes = offset_bytes + length_bytes;
            let mut statuses = StatusList { out, limit: extent_count_max.max(1) };
            // In windows, so that a status of the whole device does not list every run of it first.
            const WINDOW_BYTES: u64 = 256 << 20;
            let mut at = offset_bytes;
            while at < end_bytes {
                let window = (end_bytes - at).min(WINDOW_BYTES);
                if !self.status_of_window(at, window, &mut statuses)? {
                    break;
                }
                at += window;
            }
            Ok(())
        })
    }

    /// False: the list is full.
    fn status_of_window(&self, offset_bytes: u64, length_bytes: u64, statuses: &mut StatusList<'_>) -> Result<bool> {
        let (start_slot, end_slot) = slots_touched(offset_bytes, length_bytes);
        with_runs(|runs| {
            self.map.lookup_runs(start_slot, end_slot - start_slot, runs)?;
            let layers = self.layers.load();
            let mut extents: Vec<Extent> = Vec::new();
            for run in runs.iter() {
                let from = (run.start_slot * SLOT_BYTES).max(offset_bytes);
                let until = ((run.start_slot + run.slot_count) * SLOT_BYTES).min(offset_bytes + length_bytes);
                if run.owner == HOLE {
                    if !statuses.push(until - from, false) {
                        return Ok(false);
                    }
                    continue;
                }
                extents.clear();
                layers.reader(run.owner)?.extents(from, until - from, &mut extents)?;
                for extent in &extents {
                    if !statuses.push(extent.length_bytes, extent.data) {
                        return Ok(false);
                    }
                }
            }
            Ok(true)
        })
    }
}

struct StatusList<'a> {
    out: &'a mut Vec<BlockStatus>,
    limit: usize,
}

impl StatusList<'_> {
    /// Appends, merged with the last entry where alike. False: full.
    fn push(&mut self, length_bytes: u64, data: bool) -> bool {
        if let Some(last) = self.out.last_mut()
            && last.zero != data
        {
            last.length_bytes += length_bytes;
            return true;
        }
        if self.out.len() == self.limit {
            return false;
        }
        self.out.push(BlockStatus { length_bytes, hole: !data, zero: !data });
        true
    }
}
