//! A set of slots of the whole address space: long ranges as intervals, scattered slots per leaf as runs or a bitmap.
use crate::LEAF_SLOTS;
use crate::leaf_body::SLOTS;
use std::collections::BTreeMap;

/// Longest run list of a leaf; more become a bitmap of 1 KiB.
const LEAF_RUNS_MAX: usize = 128;
const WORD_BITS: usize = u64::BITS as usize;

/// Slots; grows only.
#[derive(Default)]
pub(crate) struct SlotSet {
    /// Start and end; they neither overlap nor touch.
    intervals: BTreeMap<u64, u64>,
    /// By leaf number: slots that may or may not be in an interval too. Never a whole leaf.
    leaves: BTreeMap<u64, LeafSlots>,
}

enum LeafSlots {
    /// Start and end, ascending; they neither overlap nor touch.
    Runs(Vec<(u16, u16)>),
    Bits(Box<[u64; SLOTS / WORD_BITS]>),
}

impl SlotSet {
    /// Adds slots `start..end`.
    pub(crate) fn insert_range(&mut self, start: u64, end: u64) {
        if start >= end {
            return;
        }
        let (mut start, mut end) = (start, end);
        // Take in every interval that overlaps or touches, from the last that starts at or before our end.
        while let Some((&other_start, &other_end)) = self.intervals.range(..=end).next_back() {
            if other_end < start {
                break;
            }
            self.intervals.remove(&other_start);
            (start, end) = (start.min(other_start), end.max(other_end));
        }
        self.intervals.insert(start, end);
        let whole_leaves = start.div_ceil(LEAF_SLOTS)..end / LEAF_SLOTS;
        if whole_leaves.start < whole_leaves.end {
            while let Some((&leaf, _)) = self.leaves.range(whole_leaves.clone()).next() {
                self.leaves.remove(&leaf);
            }
        }
    }

    /// Adds runs (start and end, ascending, not overlapping) within one leaf.
    pub(crate) fn insert_in_leaf(&mut self, leaf: u64, runs: &[(u16, u16)]) {
        let base = leaf * LEAF_SLOTS;
        if self.intervals.range(..=base).next_back().is_some_and(|(_, &end)| end >= base + LEAF_SLOTS) {
            return;
        }
        let slots = self.leaves.entry(leaf).or_insert_with(|| LeafSlots::Runs(Vec::new()));
        slots.insert(runs);
        if slots.is_full() {
            self.leaves.remove(&leaf);
            self.insert_range(base, base + LEAF_SLOTS);
        }
    }

    /// Calls `visit(start, end)` for all slots: merged, ascending.
    pub(crate) fn visit(&self, visit: &mut dyn FnMut(u64, u64)) {
        let mut intervals = self.intervals.iter().map(|(&start, &end)| (start, end)).peekable();
        let leaf_runs = self.leaves.iter().flat_map(|(&leaf, slots)| {
            let base = leaf * LEAF_SLOTS;
            slots.runs().into_iter().map(move |(start, end)| (base + u64::from(start), base + u64::from(end)))
        });
        let mut leaf_runs = leaf_runs.peekable();
        let mut merged: Option<(u64, u64)> = None;
        loop {
            let interval_first = match (intervals.peek(), leaf_runs.peek()) {
                (Some(interval), Some(run)) => interval <= run,
                (interval, _) => interval.is_some(),
            };
            let Some((start, end)) = (if interval_first { intervals.next() } else { leaf_runs.next() }) else { break };
            match &mut merged {
                Some((_, merged_end)) if start <= *merged_end => *merged_end = end.max(*merged_end),
                _ => {
                    if let Some((start, end)) = merged.replace((start, end)) {
                        visit(start, end);
                    }
                }
            }
        }
        if let Some((start, end)) = merged {
            visit(start, end);
        }
    }
}

impl LeafSlots {
    fn insert(&mut self, runs: &[(u16, u16)]) {
        match self {
            LeafSlots::Bits(bits) => runs.iter().for_each(|&(start, end)| set_bits(bits, start, end)),
            LeafSlots::Runs(present) => {
                let merged = merge(present, runs);
                if merged.len() <= LEAF_RUNS_MAX {
                    *present = merged;
                    return;
                }
                let mut bits = Box::new([0; SLOTS / WORD_BITS]);
                merged.iter().for_each(|&(start, end)| set_bits(&mut bits, start, end));
                *self = LeafSlots::Bits(bits);
            }
        }
    }

    fn is_full(&self) -> bool {
        match self {
            LeafSlots::Runs(runs) => runs[..] == [(0, SLOTS as u16)],
            LeafSlots::Bits(bits) => bits.iter().all(|&word| word == u64::MAX),
        }
    }

    fn runs(&self) -> Vec<(u16, u16)> {
        match self {
            LeafSlots::Runs(runs) => runs.clone(),
            LeafSlots::Bits(bits) => {
                let mut runs = Vec::new();
                let mut slot = 0;
                while slot < SLOTS {
                    let start = next_bit(bits, slot, true);
                    if start == SLOTS {
                        break;
                    }
                    slot = next_bit(bits, start, false);
                    runs.push((start as u16, slot as u16));
                }
                runs
            }
        }
    }
}

/// The union of two lists of runs.
fn merge(left: &[(u16, u16)], right: &[(u16, u16)]) -> Vec<(u16, u16)> {
    let mut all = [left, right].concat();
    all.sort_unstable();
    let mut merged = Vec::<(u16, u16)>::with_capacity(all.len());
    for (start, end) in all {
        match merged.last_mut() {
            Some((_, last_end)) if start <= *last_end => *last_end = end.max(*last_end),
            _ => merged.push((start, end)),
        }
    }
    merged.shrink_to_fit();
    merged
}

fn set_bits(bits: &mut [u64; SLOTS / WORD_BITS], start: u16, end: u16) {
    let (mut slot, end) = (usize::from(start), usize::from(end));
    while slot < end {
        let shift = slot % WORD_BITS;
        let count = (WORD_BITS - shift).min(end - slot);
        bits[slot / WORD_BITS] |= (u64::MAX >> (WORD_BITS - count)) << shift;
        slot += count;
    }
}

/// First slot from `slot` on whose bit is `wanted`; `SLOTS` if none.
fn next_bit(bits: &[u64; SLOTS / WORD_BITS], slot: usize, wanted: bool) -> usize {
    let mut slot = slot;
    while slot < SLOTS {
        let word = if wanted { bits[slot / WORD_BITS] } else { !bits[slot / WORD_BITS] };
        let rest = word >> (slot % WORD_BITS);
        if rest != 0 {
            return slot + rest.trailing_zeros() as usize;
        }
        slot = (slot / WORD_BITS + 1) * WORD_BITS;
    }
    SLOTS
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::collections::BTreeSet;

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn the_set_holds_what_was_put_in(
            parts in prop::collection::vec((0..4_u64, 0..8192_u64, prop_oneof![1..4_u64, 1..9000_u64], any::<bool>()), 0..200),
        ) {
            let mut set = SlotSet::default();
            let mut model = BTreeSet::new();
            for (leaf, start, length, as_range) in parts {
                let base = leaf * LEAF_SLOTS;
                if as_range {
                    set.insert_range(base + start, base + start + length);
                    model.extend(base + start..base + start + length);
                } else {
                    let end = (start + length).min(LEAF_SLOTS);
                    set.insert_in_leaf(leaf, &[(start as u16, end as u16)]);
                    model.extend(base + start..base + end);
                }
            }
            let mut slots = Vec::new();
            let mut previous_end = None;
            set.visit(&mut |start, end| {
                assert!(previous_end.is_none_or(|previous| previous < start), "runs are merged");
                previous_end = Some(end);
                slots.extend(start..end);
            });
            prop_assert!(slots.iter().eq(model.iter()));
        }
    }

    #[test]
    fn a_leaf_filled_slot_by_slot_becomes_an_interval() {
        let mut set = SlotSet::default();
        for slot in (0..8192_u16).step_by(2).chain((1..8192).step_by(2)) {
            set.insert_in_leaf(5, &[(slot, slot + 1)]);
        }
        assert!(set.leaves.is_empty());
        assert_eq!(set.intervals, BTreeMap::from([(5 * LEAF_SLOTS, 6 * LEAF_SLOTS)]));
    }
}
