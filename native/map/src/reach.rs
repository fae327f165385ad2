//! What a set of roots refers to: the slots of each layer and the pages, each page visited once however many roots share it.
use crate::checkpoint::parse_root;
use crate::codec::{Page, PageWord, check_crc, decode};
use crate::leaf_body::{Body, SLOTS};
use crate::node::{ROOT_LEVEL, span};
use crate::slot_set::SlotSet;
use crate::{HOLE, LEAF_SLOTS, MAP_SLOTS, Result, RootRef, Run};
use std::collections::{BTreeMap, HashMap, btree_map::Entry};

/// Leaves of which the last page is remembered: 64 MiB.
const COUNTED_LEAVES_MAX: usize = 2048;

/// Accumulates reachability over many roots without building their trees. Page bytes are dropped once read.
///
/// Pages of a tree are reached wherever they lie (their parents name them); its slots only below the root's limit.
#[derive(Default)]
pub struct Reach {
    layers: BTreeMap<u32, SlotSet>,
    /// By leaf: the owner that each slot was counted for last. All of it is in `layers`, so of the next page, mostly of another
    /// version of the same map, only what differs is added.
    counted: HashMap<u64, Box<[u32; SLOTS]>>,
    /// How far into each page, at each place where it stands, slots were counted. A page stands at one place unless somebody
    /// forged it; counting by place keeps what it really refers to.
    visited: BTreeMap<(u64, u64), Visited>,
    /// Pages that must be read, or read again because a later root reaches further into them.
    pending: BTreeMap<u64, Vec<Visit>>,
}

/// A page that was reached, at one place.
struct Visited {
    /// What its first parent wants. One that wants another one is damaged, or the page is: it is read once more for that parent.
    crc: u32,
    slot_limit: u64,
}

/// A page still to be read, for one place where it stands.
#[derive(Clone, Copy)]
struct Visit {
    base: u64,
    level: u8,
    crc: u32,
    /// Slots of the page below this are counted, from its first.
    slot_limit: u64,
}

impl Reach {
    /// Adds a root; `slot_limit` cuts what lies beyond the resource's size (rounded up to a slot).
    /// Roots of different sizes may share pages: what any of them reaches is reached.
    /// `PageCorrupt` if the word is no root's; nothing may be reclaimed then, since what it referred to is not known.
    pub fn add_root(&mut self, root: RootRef, slot_limit: u64) -> Result<()> {
        self.reach(parse_root(root)?, ROOT_LEVEL, 0, slot_limit.min(MAP_SLOTS));
        Ok(())
    }

    /// Page ids to fetch next, ascending, at most `limit`; empty when done.
    pub fn pending(&self, limit: usize) -> Vec<u64> {
        self.pending.keys().take(limit).copied().collect()
    }

    /// Gives one page (same checks as `MapLoader::supply`).
    pub fn supply(&mut self, page_id: u64, bytes: &[u8]) -> Result<()> {
        let Some(visits) = self.pending.get(&page_id) else { return Ok(()) };
        for visit in visits.clone() {
            check_crc(page_id, bytes, visit.crc)?;
            match decode(page_id, visit.level, bytes)? {
                Page::Inner(words) => {
                    let child_span = span(visit.level - 1);
                    for (index, word) in words.iter().enumerate() {
                        let child_start = index as u64 * child_span;
                        let slot_limit = visit.slot_limit.saturating_sub(child_start).min(child_span);
                        self.reach(*word, visit.level - 1, visit.base + child_start, slot_limit);
                    }
                }
                Page::Leaf(body) => self.reach_leaf(&body, visit.base, visit.slot_limit as usize),
            }
        }
        self.pending.remove(&page_id);
        Ok(())
    }

    /// Gives a page up that cannot be read: what lies below it counts as not reached, so nothing may be reclaimed by this.
    pub(crate) fn skip(&mut self, page_id: u64) {
        self.pending.remove(&page_id);
    }

    /// At which level a pending page is wanted.
    pub(crate) fn pending_level(&self, page_id: u64) -> Option<u8> {
        self.pending.get(&page_id).and_then(|visits| visits.first()).map(|visit| visit.level)
    }

    /// Layers that anything refers to, ascending.
    pub fn layers(&self) -> Vec<u32> {
        self.layers.keys().copied().collect()
    }

    /// Slots of one layer that are referred to: merged runs, ascending (`owner` is the layer).
    pub fn runs(&self, layer: u32) -> Vec<Run> {
        let mut runs = Vec::new();
        if let Some(slots) = self.layers.get(&layer) {
            slots.visit(&mut |start_slot, end| runs.push(Run { start_slot, slot_count: end - start_slot, owner: layer }));
        }
        runs
    }

    /// Number of slots of one layer that are referred to.
    pub fn slot_count(&self, layer: u32) -> u64 {
        let mut slot_count = 0;
        if let Some(slots) = self.layers.get(&layer) {
            slots.visit(&mut |start, end| slot_count += end - start);
        }
        slot_count
    }

    /// Whether a page is reachable.
    pub fn has_page(&self, page_id: u64) -> bool {
        self.visited.range((page_id, 0)..=(page_id, u64::MAX)).next().is_some()
    }

    fn reach(&mut self, word: PageWord, level: u8, base: u64, slot_limit: u64) {
        match word {
            PageWord::Uniform(HOLE) => {}
            PageWord::Uniform(_) if slot_limit == 0 => {}
            PageWord::Uniform(owner) => self.layers.entry(owner).or_default().insert_range(base, base + slot_limit),
            PageWord::Page { id, crc } => {
                match self.visited.entry((id, base)) {
                    Entry::Vacant(entry) => {
                        entry.insert(Visited { crc, slot_limit });
                        // A leaf that lies beyond the limit is reached and need not be read.
                        if level == 0 && slot_limit == 0 {
                            return;
                        }
                    }
                    Entry::Occupied(entry) if entry.get().crc == crc && entry.get().slot_limit >= slot_limit => return,
                    Entry::Occupied(mut entry) => entry.get_mut().slot_limit = slot_limit.max(entry.get().slot_limit),
                }
                let visits = self.pending.entry(id).or_default();
                match visits.iter_mut().find(|visit| (visit.base, visit.level, visit.crc) == (base, level, crc)) {
                    Some(visit) => visit.slot_limit = visit.slot_limit.max(slot_limit),
                    None => visits.push(Visit { base, level, crc, slot_limit }),
                }
            }
        }
    }

    fn reach_leaf(&mut self, body: &Body, base: u64, slot_limit: usize) {
        debug_assert!(base.is_multiple_of(LEAF_SLOTS));
        let cover = body.cover();
        if self.counted.len() >= COUNTED_LEAVES_MAX && !self.counted.contains_key(&base) {
            self.counted.clear();
        }
        let counted = self.counted.entry(base).or_insert_with(|| Box::new([HOLE; SLOTS]));
        let mut runs_by_owner = vec![Vec::new(); cover.owners.len()];
        for run in &cover.runs {
            let owner = cover.owner(run);
            let end = usize::from(run.start + run.count).min(slot_limit);
            let mut start = usize::from(run.start);
            while start < end {
                if counted[start] == owner {
                    start += 1;
                    continue;
                }
                let length = counted[start..end].iter().take_while(|&&before| before != owner).count();
                counted[start..start + length].fill(owner);
                runs_by_owner[usize::from(run.index)].push((start as u16, (start + length) as u16));
                start += length;
            }
        }
        for (owner, runs) in cover.owners.iter().zip(runs_by_owner) {
            if *owner != HOLE && !runs.is_empty() {
                self.layers.entry(*owner).or_default().insert_in_leaf(base / LEAF_SLOTS, &runs);
            }
        }
    }
}
