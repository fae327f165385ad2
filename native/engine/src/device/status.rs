//! What is known of a range without reading it: allocated or not, where, and changed or not. No lock is taken, as for reads.
//!
//! Rules
//! - HOLE in the map, and a hole of the owning layer, read as zeros; everything else is called data (I4: a hint).
//! - *Changed since a map* compares owners: equal owners mean equal bytes, because sealed layers never change and the active
//!   layer is named by no map but its own volume's. So it is exact to the slot for what was written or discarded since, and
//!   never too little. HOLE on both sides is unchanged; a discard of what was never written is a change all the same, because
//!   what a layer's file holds decides nothing (reclaim may have punched what the base had there).
//! - An answer covers its range from the beginning without a gap, and may end early, never before its first extent.
use super::read::with_runs;
use super::{BlockStatus, Device, StatusExtent, slots_touched};
use crate::Result;
use atoll_io::Extent;
use atoll_map::{FrozenMap, HOLE, Run, SLOT_BYTES};

/// Looked up at once, so that a status of a whole device does not list every run of it first.
const WINDOW_BYTES: u64 = 256 << 20;

/// `base:allocation`: not allocated.
const ALLOCATION_HOLE: u32 = 1;
/// `base:allocation`: reads as zeros.
const ALLOCATION_ZERO: u32 = 2;

/// `qemu:allocation-depth` of what the volume's own layer holds.
const DEPTH_OWN: u32 = 1;
/// The same of what it shares with snapshots, images and clones: layers lie side by side, so there is no third depth.
const DEPTH_SHARED: u32 = 2;

/// `qemu:dirty-bitmap:…`.
const CHANGED: u32 = 1;

impl Device {
    /// `allocation` for those who want names. Appends at most `extent_count_max` entries to `out`.
    pub fn block_status(&self, offset_bytes: u64, length_bytes: u64, extent_count_max: usize, out: &mut Vec<BlockStatus>) -> Result<()> {
        let mut extents = Vec::new();
        self.allocation(offset_bytes, length_bytes, extent_count_max, &mut extents)?;
        out.extend(extents.iter().map(|extent| BlockStatus {
            length_bytes: extent.length_bytes,
            hole: extent.flags & ALLOCATION_HOLE != 0,
            zero: extent.flags & ALLOCATION_ZERO != 0,
        }));
        Ok(())
    }

    /// Appends the range's flags of `base:allocation` to `out`, at most `extent_count_max` entries.
    pub fn allocation(&self, offset_bytes: u64, length_bytes: u64, extent_count_max: usize, out: &mut Vec<StatusExtent>) -> Result<()> {
        let classify = |_owner, is_data: bool| if is_data { 0 } else { ALLOCATION_HOLE | ALLOCATION_ZERO };
        self.layer_status(offset_bytes, length_bytes, extent_count_max, out, classify)
    }

    /// As `allocation`: 0 nowhere (reads as zeros), 1 in the layer that the volume writes, 2 in one that it shares. A read-only
    /// device has no layer of its own to tell from others: its data is 1.
    pub fn allocation_depth(
        &self,
        offset_bytes: u64,
        length_bytes: u64,
        extent_count_max: usize,
        out: &mut Vec<StatusExtent>,
    ) -> Result<()> {
        let active = self.layers.load().active.as_ref().map(|active| active.alias());
        let classify = |owner, is_data: bool| match active {
            _ if !is_data => 0,
            Some(active) if active != owner => DEPTH_SHARED,
            _ => DEPTH_OWN,
        };
        self.layer_status(offset_bytes, length_bytes, extent_count_max, out, classify)
    }

    /// As `allocation`: 1 for slots whose owner is another than in `base`, 0 for the others.
    pub fn changed_since(
        &self,
        base: &FrozenMap,
        offset_bytes: u64,
        length_bytes: u64,
        extent_count_max: usize,
        out: &mut Vec<StatusExtent>,
    ) -> Result<()> {
        let mut base_runs: Vec<Run> = Vec::new();
        self.status_in_windows(offset_bytes, length_bytes, extent_count_max, out, |start_slot, slot_count, list| {
            base_runs.clear();
            base.lookup_runs(start_slot, slot_count, &mut base_runs)?;
            with_runs(|runs| {
                self.map.lookup_runs(start_slot, slot_count, runs)?;
                Ok(compare(runs, &base_runs, list))
            })
        })
    }

    fn layer_status(
        &self,
        offset_bytes: u64,
        length_bytes: u64,
        extent_count_max: usize,
        out: &mut Vec<StatusExtent>,
        classify: impl Fn(u32, bool) -> u32,
    ) -> Result<()> {
        let mut extents: Vec<Extent> = Vec::new();
        self.status_in_windows(offset_bytes, length_bytes, extent_count_max, out, |start_slot, slot_count, list| {
            with_runs(|runs| {
                self.map.lookup_runs(start_slot, slot_count, runs)?;
                let layers = self.layers.load();
                for run in runs.iter() {
                    let (from, until) = list.clip(run.start_slot, run.start_slot + run.slot_count);
                    if run.owner == HOLE {
                        if !list.push(until - from, classify(HOLE, false)) {
                            return Ok(false);
                        }
                        continue;
                    }
                    extents.clear();
                    layers.reader(run.owner)?.extents(from, until - from, &mut extents)?;
                    for extent in &extents {
                        if !list.push(extent.length_bytes, classify(run.owner, extent.data)) {
                            return Ok(false);
                        }
                    }
                }
                Ok(true)
            })
        })
    }

    /// Calls `add` for one stretch of slots after the other; it says false when the list is full.
    fn status_in_windows(
        &self,
        offset_bytes: u64,
        length_bytes: u64,
        extent_count_max: usize,
        out: &mut Vec<StatusExtent>,
        mut add: impl FnMut(u64, u64, &mut StatusList<'_>) -> Result<bool>,
    ) -> Result<()> {
        self.unwind_guard("block status", || {
            let _pass = self.enter()?;
            self.check_range(offset_bytes, length_bytes, libc::EINVAL)?;
            let end_bytes = offset_bytes + length_bytes;
            let mut list = StatusList { first: out.len(), out, limit: extent_count_max.max(1), from_bytes: 0, until_bytes: 0 };
            let mut at = offset_bytes;
            while at < end_bytes {
                (list.from_bytes, list.until_bytes) = (at, end_bytes.min(at + WINDOW_BYTES));
                let (start_slot, end_slot) = slots_touched(at, list.until_bytes - at);
                if !add(start_slot, end_slot - start_slot, &mut list)? {
                    break;
                }
                at = list.until_bytes;
            }
            Ok(())
        })
    }
}

/// Pushes where two lists of runs over the same slots have other owners. False: the list is full.
fn compare(runs: &[Run], base_runs: &[Run], list: &mut StatusList<'_>) -> bool {
    let mut base = base_runs.iter().peekable();
    for run in runs {
        let run_end = run.start_slot + run.slot_count;
        let mut slot = run.start_slot;
        while slot < run_end {
            let Some(&&base_run) = base.peek() else {
                debug_assert!(false, "both lists cover the same slots");
                return true;
            };
            let base_end = base_run.start_slot + base_run.slot_count;
            let end = run_end.min(base_end);
            let (from, until) = list.clip(slot, end);
            if !list.push(until - from, if run.owner == base_run.owner { 0 } else { CHANGED }) {
                return false;
            }
            if end == base_end {
                base.next();
            }
            slot = end;
        }
    }
    true
}

struct StatusList<'a> {
    out: &'a mut Vec<StatusExtent>,
    /// Entries that were there before.
    first: usize,
    limit: usize,
    /// The bytes that are asked about, of the slots that are looked up.
    from_bytes: u64,
    until_bytes: u64,
}

impl StatusList<'_> {
    /// The part of some slots that is asked about, in bytes.
    fn clip(&self, start_slot: u64, end_slot: u64) -> (u64, u64) {
        ((start_slot * SLOT_BYTES).max(self.from_bytes), (end_slot * SLOT_BYTES).min(self.until_bytes))
    }

    /// Appends, merged with the last entry where alike. False: full.
    fn push(&mut self, length_bytes: u64, flags: u32) -> bool {
        if self.out.len() > self.first
            && let Some(last) = self.out.last_mut()
            && last.flags == flags
        {
            last.length_bytes += length_bytes;
            return true;
        }
        if self.out.len() - self.first == self.limit {
            return false;
        }
        self.out.push(StatusExtent { length_bytes, flags });
        true
    }
}
