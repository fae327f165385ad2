//! A leaf's content written out: runs over all its slots, neighbours differing, each pointing into the list of owners.
use crate::leaf_body::SLOTS;
use std::collections::HashMap;

/// Up to this many owners are found by a linear search; more go into a hash table.
const LINEAR_SEARCH_MAX: usize = 16;

/// A run of slots of one leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CoverRun {
    /// First slot within the leaf.
    pub(crate) start: u16,
    /// Number of slots, never 0.
    pub(crate) count: u16,
    /// Position of the owner in `Cover::owners`.
    pub(crate) index: u16,
}

/// Runs over all slots of a leaf, ascending; no two neighbours have the same owner, no owner is listed twice or unused,
/// and owners stand in the order in which they first appear. The same content always has the same cover.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Cover {
    pub(crate) owners: Vec<u32>,
    pub(crate) runs: Vec<CoverRun>,
}

impl Cover {
    /// The owner of a run.
    pub(crate) fn owner(&self, run: &CoverRun) -> u32 {
        self.owners[usize::from(run.index)]
    }

    /// Index of the owner with the most runs (the smallest such owner): leaving it out makes the shortest run list.
    pub(crate) fn base_index(&self) -> u16 {
        let mut run_counts = vec![0_u32; self.owners.len()];
        for run in &self.runs {
            run_counts[usize::from(run.index)] += 1;
        }
        let best = (0..self.owners.len()).max_by_key(|&index| (run_counts[index], std::cmp::Reverse(self.owners[index])));
        best.expect("a cover has at least one owner") as u16
    }

    /// The same content but for slots `start..end`, which get `owner`.
    pub(crate) fn with_run(&self, start: usize, end: usize, owner: u32) -> Cover {
        let mut builder = CoverBuilder::default();
        for run in &self.runs {
            let run_start = usize::from(run.start);
            let run_end = run_start + usize::from(run.count);
            if run_start < start {
                builder.push(run_end.min(start) - run_start, self.owner(run));
            }
            // The new run goes in where the old run holding its first slot stood.
            if (run_start..run_end).contains(&start) {
                builder.push(end - start, owner);
            }
            if run_end > end {
                builder.push(run_end - run_start.max(end), self.owner(run));
            }
        }
        builder.finish()
    }
}

/// Builds a cover from runs given in order.
#[derive(Default)]
pub(crate) struct CoverBuilder {
    owners: Vec<u32>,
    indices: HashMap<u32, u16>,
    runs: Vec<CoverRun>,
    next_slot: usize,
}

impl CoverBuilder {
    /// Appends `count` slots; nothing if 0.
    pub(crate) fn push(&mut self, count: usize, owner: u32) {
        if count == 0 {
            return;
        }
        let start = self.next_slot;
        self.next_slot += count;
        if let Some(last) = self.runs.last_mut()
            && self.owners[usize::from(last.index)] == owner
        {
            last.count += count as u16;
            return;
        }
        let index = self.index_of(owner);
        self.runs.push(CoverRun { start: start as u16, count: count as u16, index });
    }

    /// The cover. Panics unless exactly all slots of a leaf were given.
    pub(crate) fn finish(self) -> Cover {
        assert_eq!(self.next_slot, SLOTS, "a cover is of a whole leaf");
        Cover { owners: self.owners, runs: self.runs }
    }

    fn index_of(&mut self, owner: u32) -> u16 {
        if self.owners.len() <= LINEAR_SEARCH_MAX {
            if let Some(index) = self.owners.iter().position(|&known| known == owner) {
                return index as u16;
            }
        } else if let Some(&index) = self.indices.get(&owner) {
            return index;
        }
        let index = self.owners.len() as u16;
        self.owners.push(owner);
        if self.owners.len() == LINEAR_SEARCH_MAX + 1 {
            self.indices.extend(self.owners.iter().zip(0..).map(|(&known, position)| (known, position)));
        } else if self.owners.len() > LINEAR_SEARCH_MAX {
            self.indices.insert(owner, index);
        }
        index
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn cover_of(owners: &[u32]) -> Cover {
        let mut builder = CoverBuilder::default();
        for &owner in owners {
            builder.push(1, owner);
        }
        builder.finish()
    }

    #[test]
    fn overriding_a_run_gives_the_cover_of_the_overridden_slots() {
        let mut slots: Vec<u32> = (0..SLOTS as u32).map(|slot| slot / 7 % 5).collect();
        for (start, end, owner) in [(0, 1, 9), (0, 8192, 3), (5, 6, 3), (8191, 8192, 77), (100, 4000, 1), (99, 100, 1), (7, 14, 2)] {
            let changed = cover_of(&slots).with_run(start, end, owner);
            slots[start..end].fill(owner);
            assert_eq!(changed, cover_of(&slots));
        }
    }

    #[test]
    fn every_owner_is_listed_once_however_many_there_are() {
        let slots: Vec<u32> = (0..SLOTS as u32).map(|slot| slot % 4096 + 1).collect();
        let cover = cover_of(&slots);
        assert_eq!(cover.owners, (1..=4096).collect::<Vec<u32>>());
        assert_eq!(cover.runs.len(), SLOTS);
    }

    #[test]
    fn the_base_is_the_owner_with_most_runs_and_the_smallest_of_equals() {
        let mut slots = vec![7; SLOTS];
        slots[10] = 3;
        assert_eq!(cover_of(&slots).base_index(), 0);
        slots[8191] = 3;
        let cover = cover_of(&slots);
        assert_eq!(cover.owners[usize::from(cover.base_index())], 3);
    }
}
