//! The versions of one position of the tree, in the order in which they came: what stands in each of them is kept once for as
//! long as it stays the same, so many versions that differ in little take little.

/// An owner (HOLE too), or the id of a page under this bit.
pub(super) type Word = u64;
const PAGE_BIT: Word = 1 << 63;
/// `last` of what the newest version still has.
const OPEN: u32 = u32::MAX;
/// Dead versions that are left lying, beyond as many as live.
const DEAD_MAX: usize = 32;

pub(super) const fn page_word(page_id: u64) -> Word {
    PAGE_BIT | page_id
}

pub(super) const fn page_of(word: Word) -> Option<u64> {
    if word & PAGE_BIT == 0 { None } else { Some(word & !PAGE_BIT) }
}

/// Indices `start..end` have `word` in the versions `first..=last`. Indices are slots in a leaf, children in an inner page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Entry {
    pub(super) start: u16,
    pub(super) end: u16,
    first: u32,
    last: u32,
    pub(super) word: Word,
}

impl Entry {
    pub(super) fn is_in(&self, version: u32) -> bool {
        self.first <= version && version <= self.last
    }
}

/// One page that stands, or stood, here.
pub(super) struct Version {
    pub(super) page_id: u64,
    /// Pages, or resources if this is the root, that refer to it. 0: it is dead.
    pub(super) refs: u32,
    /// Slots below it that sealed layers hold and have allocated, once that is known and cannot change.
    pub(super) slots: Option<u64>,
}

/// Versions of one lineage. Every index is in exactly one entry per version, and for each version there are such entries.
#[derive(Default)]
pub(super) struct Line {
    /// What the newest version has, by index.
    open: Vec<Entry>,
    closed: Vec<Entry>,
    pub(super) versions: Vec<Version>,
    dead_count: usize,
    /// Versions before this one have their `slots`, if those can be told once and for all.
    counted_count: usize,
}

impl Line {
    /// Adds the newest version: `runs` (end of each, ascending, and its word) cover all indices. Returns its number.
    pub(super) fn push(&mut self, page_id: u64, refs: u32, runs: &[(u16, Word)]) -> u32 {
        let version = self.versions.len() as u32;
        self.versions.push(Version { page_id, refs, slots: None });
        let mut open = Vec::with_capacity(runs.len());
        let mut old_entries = self.open.iter();
        let mut old = old_entries.next();
        let mut at = 0;
        for &(run_end, word) in runs {
            while at < run_end {
                let end = old.map_or(run_end, |old| old.end.min(run_end));
                let first = match old {
                    Some(old) if old.word == word => old.first,
                    Some(old) => {
                        append(&mut self.closed, Entry { start: at, end, first: old.first, last: version - 1, word: old.word });
                        version
                    }
                    None => version,
                };
                append(&mut open, Entry { start: at, end, first, last: OPEN, word });
                at = end;
                if old.is_some_and(|old| old.end == at) {
                    old = old_entries.next();
                }
            }
        }
        open.shrink_to_fit();
        self.open = open;
        version
    }

    /// Nobody refers to the version any more. True: `compact` is due.
    pub(super) fn died(&mut self) -> bool {
        self.dead_count += 1;
        self.is_empty() || self.dead_count > self.versions.len() - self.dead_count + DEAD_MAX
    }

    pub(super) fn is_counted(&self, version: u32) -> bool {
        (version as usize) < self.counted_count
    }

    /// Counts what lies below every version that is not counted yet, looking at each entry once. `count` says what lies below an
    /// entry; None if that can change or is not known: then the versions that have the entry stay without.
    pub(super) fn counts(&self, mut count: impl FnMut(&Entry) -> Option<u64>) -> Vec<Option<u64>> {
        let weights = self.weights();
        let mut changes = vec![(0_i64, 0_i32); self.versions.len() + 1];
        for entry in self.entries() {
            let end = (entry.last as usize).min(self.versions.len() - 1) + 1;
            if end <= self.counted_count || weights.of(entry) == 0 {
                continue;
            }
            let (slots, unknown) = count(entry).map_or((0, 1), |slots| (slots as i64, 0));
            let (first, end) = (&mut changes[entry.first as usize], end);
            (first.0, first.1) = (first.0 + slots, first.1 + unknown);
            (changes[end].0, changes[end].1) = (changes[end].0 - slots, changes[end].1 - unknown);
        }
        let mut sum = (0, 0);
        let versions = changes[..self.versions.len()].iter().map(|change| {
            sum = (sum.0 + change.0, sum.1 + change.1);
            (sum.1 == 0).then_some(sum.0 as u64)
        });
        versions.collect()
    }

    /// Keeps what `counts` gave for the versions that had none.
    pub(super) fn keep_counts(&mut self, counts: &[Option<u64>]) {
        for (version, slots) in self.versions.iter_mut().zip(counts).skip(self.counted_count) {
            version.slots = *slots;
        }
        self.counted_count = self.versions.len();
    }

    pub(super) fn is_empty(&self) -> bool {
        self.dead_count == self.versions.len()
    }

    pub(super) fn entry_count(&self) -> usize {
        self.open.len() + self.closed.len()
    }

    pub(super) fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.open.iter().chain(&self.closed)
    }

    /// What one version has, in no order.
    pub(super) fn entries_of(&self, version: u32) -> impl Iterator<Item = &Entry> {
        let is_newest = version as usize + 1 == self.versions.len();
        let closed = if is_newest { &[][..] } else { &self.closed[..] };
        self.open.iter().chain(closed).filter(move |entry| entry.is_in(version))
    }

    /// Sums over versions, to ask how often an entry is referred to.
    pub(super) fn weights(&self) -> Weights {
        let mut before = Vec::with_capacity(self.versions.len() + 1);
        let mut sum = 0;
        before.push(0);
        for version in &self.versions {
            sum += u64::from(version.refs);
            before.push(sum);
        }
        Weights { before }
    }

    /// Forgets dead versions; the others get new numbers, which `renumbered` is told by page.
    pub(super) fn compact(&mut self, mut renumbered: impl FnMut(u64, u32)) {
        let mut live_before = Vec::with_capacity(self.versions.len() + 1);
        let mut live_count = 0;
        live_before.push(0);
        for version in &self.versions {
            live_count += u32::from(version.refs > 0);
            live_before.push(live_count);
        }
        let last_version = self.versions.len() - 1;
        let mut open = Vec::new();
        let mut closed = Vec::new();
        for entry in self.open.iter().chain(&self.closed) {
            let first = live_before[entry.first as usize];
            let end = live_before[(entry.last as usize).min(last_version) + 1];
            if first == end {
                continue;
            }
            if end == live_count {
                open.push(Entry { first, last: OPEN, ..*entry });
            } else {
                closed.push(Entry { first, last: end - 1, ..*entry });
            }
        }
        open.sort_unstable_by_key(|entry| entry.start);
        closed.sort_unstable_by_key(|entry| (entry.first, entry.last, entry.start));
        self.open.clear();
        self.closed.clear();
        open.into_iter().for_each(|entry| append(&mut self.open, entry));
        closed.into_iter().for_each(|entry| append(&mut self.closed, entry));
        self.open.shrink_to_fit();
        self.closed.shrink_to_fit();
        self.versions.retain(|version| version.refs > 0);
        self.dead_count = 0;
        self.counted_count = 0;
        for (number, version) in self.versions.iter().enumerate() {
            renumbered(version.page_id, number as u32);
        }
    }
}

/// How often entries of one line are referred to, at one time.
pub(super) struct Weights {
    before: Vec<u64>,
}

impl Weights {
    pub(super) fn of(&self, entry: &Entry) -> u64 {
        let end = (entry.last as usize).min(self.before.len() - 2) + 1;
        self.before[end] - self.before[entry.first as usize]
    }
}

/// Appends, or makes the last entry longer.
fn append(entries: &mut Vec<Entry>, entry: Entry) {
    match entries.last_mut() {
        Some(last) if last.end == entry.start && (last.word, last.first, last.last) == (entry.word, entry.first, entry.last) => {
            last.end = entry.end;
        }
        _ => entries.push(entry),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const INDICES: u16 = 40;

    fn runs_of(content: &[Word]) -> Vec<(u16, Word)> {
        content.iter().enumerate().map(|(index, &word)| (index as u16 + 1, word)).collect()
    }

    fn content_of(line: &Line, version: u32) -> Vec<Option<Word>> {
        let mut content = vec![None; usize::from(INDICES)];
        for entry in line.entries_of(version) {
            for index in entry.start..entry.end {
                assert!(content[usize::from(index)].replace(entry.word).is_none(), "an index is in one entry");
            }
        }
        content
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn every_version_has_what_it_was_given_whatever_dies(
            steps in prop::collection::vec((0..INDICES, 1..INDICES, 0..4_u64, 0..6_usize), 1..120),
        ) {
            let mut line = Line::default();
            let mut content = vec![0; usize::from(INDICES)];
            let mut live: Vec<(u64, u32, Vec<Word>)> = Vec::new();
            for (number, (start, length, word, dies)) in steps.into_iter().enumerate() {
                content[usize::from(start)..usize::from((start + length).min(INDICES))].fill(word);
                let page_id = number as u64 + 1;
                let version = line.push(page_id, 1, &runs_of(&content));
                live.push((page_id, version, content.clone()));
                // More than half of them die, from the front or the back.
                if dies > 1 && live.len() > 1 {
                    let gone = if dies % 2 == 0 { live.len() - 1 } else { dies % live.len() };
                    let (_, version, _) = live.remove(gone);
                    line.versions[version as usize].refs = 0;
                    if line.died() {
                        let known = &mut live;
                        line.compact(|page_id, number| known.iter_mut().find(|version| version.0 == page_id).unwrap().1 = number);
                    }
                }
                for (_, version, content) in &live {
                    let wanted: Vec<Option<Word>> = content.iter().copied().map(Some).collect();
                    prop_assert_eq!(content_of(&line, *version), wanted);
                }
                let weights = line.weights();
                for entry in line.entries() {
                    let count = live.iter().filter(|(_, version, _)| entry.is_in(*version)).count();
                    prop_assert_eq!(weights.of(entry), count as u64);
                }
            }
        }
    }
}
