//! Which slots of a layer are allocated: runs, ascending, with a sum beside each so that a range is counted by two searches.

#[derive(Default)]
pub(super) struct Allocated {
    runs: Vec<Run>,
}

struct Run {
    start: u64,
    end: u64,
    /// Slots of all runs before this one.
    before: u64,
}

impl Allocated {
    /// `runs`: start and end, in slots, ascending; they may touch or overlap.
    pub(super) fn new(runs: impl IntoIterator<Item = (u64, u64)>) -> Allocated {
        let mut made = Vec::<Run>::new();
        for (start, end) in runs {
            match made.last_mut() {
                Some(last) if start <= last.end => last.end = last.end.max(end),
                last => {
                    let before = last.map_or(0, |last| last.before + last.end - last.start);
                    made.push(Run { start, end, before });
                }
            }
        }
        made.shrink_to_fit();
        Allocated { runs: made }
    }

    /// With more runs, of the same form.
    pub(super) fn with(&self, more: impl IntoIterator<Item = (u64, u64)>) -> Allocated {
        let mut runs: Vec<_> = self.runs.iter().map(|run| (run.start, run.end)).chain(more).collect();
        runs.sort_unstable();
        Allocated::new(runs)
    }

    /// Allocated slots in `start..end`.
    pub(super) fn count(&self, start: u64, end: u64) -> u64 {
        self.below(end).saturating_sub(self.below(start))
    }

    pub(super) fn run_count(&self) -> usize {
        self.runs.len()
    }

    fn below(&self, slot: u64) -> u64 {
        match self.runs.partition_point(|run| run.start < slot) {
            0 => 0,
            count => {
                let run = &self.runs[count - 1];
                run.before + run.end.min(slot) - run.start
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_allocated_in_either_place_counts_once() {
        let both = Allocated::new([(3, 5), (20, 30)]).with([(0, 4), (22, 25), (30, 31)]);
        assert_eq!((both.run_count(), both.count(0, 100)), (2, 16));
    }

    #[test]
    fn ranges_are_counted_whatever_of_a_run_they_cut_off() {
        let allocated = Allocated::new([(3, 5), (5, 9), (8, 10), (20, 21), (30, 40)]);
        assert_eq!(allocated.run_count(), 3);
        let has = |slot: u64| (3..10).contains(&slot) || slot == 20 || (30..40).contains(&slot);
        for start in 0..45 {
            for end in start..45 {
                assert_eq!(allocated.count(start, end), (start..end).filter(|&slot| has(slot)).count() as u64, "{start}..{end}");
            }
        }
    }
}
