//! What each of many resources takes: the slots that only it refers to, and those that others refer to as well.
//!
//! A slot lies at the same offset in every map and layer, so two roots share one exactly if at its position both say the same
//! layer. The table knows the tree of all roots at once: for each position (level and first slot) the pages that stand there in
//! any of them, and how many refer to each. A page with two references is shared with everything below it. What stands in a
//! page that has one is compared with all that stands at its position, and with the uniform words above and below.
//!
//! Rules
//! - Nothing here is stored: it is built from the pages, and a root that changes costs the pages that are new in it.
//! - The pages of a position are kept as what changed from each to the next (`line`), by lineage: `set_roots` is told which
//!   resources come from one volume.
//! - Only allocated slots count, because a fresh volume's map gives all of its slots to one layer. The allocation of a sealed layer
//!   is asked for once: of what anybody refers to nothing is ever punched. That of an active layer changes all the time, and
//!   only its volume refers to it: it counts as nothing here, and the caller adds it whole.
//! - Sizes are not asked for: beyond the end of a resource its map says HOLE, or a layer in which nothing is allocated there.
mod allocated;
mod line;

use crate::checkpoint::parse_root;
use crate::codec::{Page, PageWord, check_crc, decode};
use crate::node::{FANOUT, ROOT_LEVEL, span};
use crate::{HOLE, LEAF_SLOTS, MAP_SLOTS, MapError, MapErrorCode, Result, RootRef};
use allocated::Allocated;
use line::{Line, Word, page_of, page_word};
use std::collections::hash_map::Entry as MapEntry;
use std::collections::{BTreeMap, HashMap, HashSet};

/// Layers that are remembered beyond twice those that the pages named when that was looked at last.
const REMEMBERED_SLACK: usize = 1024;

/// What one resource takes, in slots; its volume's active layer is not in it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Taken {
    /// Only this resource refers to them.
    pub used_slots: u64,
    /// Others do, too.
    pub shared_slots: u64,
}

/// A root as the table is told of it.
#[derive(Debug, Clone, Copy)]
pub struct UsageRoot {
    /// Names the resource; any number that no other has.
    pub key: u64,
    /// The same for resources that come from one volume: their maps are alike.
    pub lineage: u64,
    /// Its root.
    pub root: RootRef,
}

/// Level of a page and its first slot.
type Place = (u8, u64);
const ROOT_PLACE: Place = (ROOT_LEVEL, 0);

/// Which version of which line a page is.
#[derive(Clone, Copy)]
struct Where {
    lineage: u64,
    version: u32,
}

#[derive(Default)]
struct Position {
    lines: HashMap<u64, Line>,
    pages: HashMap<u64, Where>,
}

/// A page that somebody refers to and that was not read yet.
struct Wanted {
    place: Place,
    lineage: u64,
    crc: u32,
    refs: u32,
    /// Why it could not be read.
    failure: Option<MapError>,
}

/// See the head of the file. Calls that do much are `set_roots`, `settle`, `taken`.
#[derive(Default)]
pub struct Usage {
    roots: HashMap<u64, PageWord>,
    /// Roots that are gone, until the pages that took their place are here: what both have is not read again.
    released: Vec<PageWord>,
    /// Resources that have one owner everywhere.
    uniform_roots: HashMap<u32, u32>,
    positions: BTreeMap<Place, Position>,
    /// By page; one page stands at one place unless somebody forged it.
    wanted: BTreeMap<u64, Vec<Wanted>>,
    supplied: Vec<(u64, Option<Vec<u8>>)>,
    layers: HashSet<u32>,
    layers_at_prune: usize,
    allocated: HashMap<u32, Allocated>,
    active: HashSet<u32>,
    entry_count: usize,
}

impl Usage {
    /// Tells which roots there are now, and which layers are active. The order of new roots of one lineage is best that of time.
    /// `PageCorrupt` if a word is no root's; the table is of no use then.
    pub fn set_roots(&mut self, roots: &[UsageRoot], active: &[u32]) -> Result<()> {
        self.active = active.iter().copied().collect();
        for wanted in self.wanted.values_mut().flatten() {
            // It may have been repaired since.
            wanted.failure = None;
        }
        let mut gone = std::mem::take(&mut self.roots);
        let mut now = HashMap::with_capacity(roots.len());
        for UsageRoot { key, lineage, root } in roots {
            let word = parse_root(*root)?;
            match gone.get(key) {
                Some(&old) if same(old, word) => {
                    gone.remove(key);
                }
                _ => self.refer(word, ROOT_PLACE, *lineage),
            }
            now.insert(*key, word);
        }
        self.released.extend(gone.into_values());
        self.roots = now;
        Ok(())
    }

    /// Page ids to fetch next, ascending, at most `limit`; empty when all are here or have failed.
    pub fn pending(&self, limit: usize) -> Vec<u64> {
        let is_pending = |(_, wanted): &(&u64, &Vec<Wanted>)| wanted.iter().any(|wanted| wanted.failure.is_none());
        self.wanted.iter().filter(is_pending).take(limit).map(|(&page_id, _)| page_id).collect()
    }

    /// Takes one page, None if the catalog does not have it; `settle` reads what was taken.
    pub fn supply(&mut self, page_id: u64, bytes: Option<Vec<u8>>) {
        self.supplied.push((page_id, bytes));
    }

    /// Reads the pages that were supplied; to be called until none is pending, and once at least after `set_roots`. A page that is
    /// missing or wrong is an error of the resources that reach it, and of no other.
    pub fn settle(&mut self) {
        for (page_id, bytes) in std::mem::take(&mut self.supplied) {
            let Some(places) = self.wanted.remove(&page_id) else { continue };
            for mut wanted in places {
                match read(page_id, &wanted, bytes.as_deref()) {
                    Ok(page) => self.add(page_id, &wanted, page),
                    Err(error) => {
                        wanted.failure = Some(error);
                        self.wanted.entry(page_id).or_default().push(wanted);
                    }
                }
            }
        }
        if self.pending(1).is_empty() {
            for word in std::mem::take(&mut self.released) {
                self.release_root(word);
            }
        }
    }

    /// Layers whose allocation has to be told before anything is asked.
    pub fn unknown_layers(&mut self) -> Vec<u32> {
        if self.layers.len() > 2 * self.layers_at_prune + REMEMBERED_SLACK {
            self.prune_layers();
        }
        let is_unknown = |alias: &&u32| !self.active.contains(alias) && !self.allocated.contains_key(alias);
        self.layers.iter().filter(is_unknown).copied().collect()
    }

    /// What of a layer is allocated: start and end in slots, ascending.
    pub fn set_allocated(&mut self, alias: u32, runs: impl IntoIterator<Item = (u64, u64)>) {
        self.allocated.insert(alias, Allocated::new(runs));
    }

    /// What of another place of the layer's bytes is allocated: a slot counts if it is in one of them.
    pub fn add_allocated(&mut self, alias: u32, runs: impl IntoIterator<Item = (u64, u64)>) {
        let sum = self.allocated.get(&alias).unwrap_or(&Allocated::default()).with(runs);
        self.allocated.insert(alias, sum);
    }

    /// What a resource takes; nothing for one that is not known. The error of the page that it reaches and that cannot be read.
    pub fn taken(&mut self, key: u64) -> Result<Taken> {
        let Some(&word) = self.roots.get(&key) else { return Ok(Taken::default()) };
        let all_slots = self.slots(word, ROOT_PLACE)?.0;
        let used_slots = self.only(word);
        Ok(Taken { used_slots, shared_slots: all_slots - used_slots })
    }

    /// The slots that a resource refers to, used or shared.
    pub fn slots_of(&mut self, key: u64) -> Result<u64> {
        let Some(&word) = self.roots.get(&key) else { return Ok(0) };
        Ok(self.slots(word, ROOT_PLACE)?.0)
    }

    /// Bytes of memory that this takes, about.
    pub fn memory_bytes(&self) -> usize {
        let runs: usize = self.allocated.values().map(Allocated::run_count).sum();
        self.entry_count * size_of::<line::Entry>() + runs * 24 + (self.allocated.len() + self.roots.len()) * 64
    }

    /// One more reference to what a word names.
    fn refer(&mut self, word: PageWord, place: Place, lineage: u64) {
        let (page_id, crc) = match word {
            PageWord::Page { id, crc } => (id, crc),
            PageWord::Uniform(owner) => {
                self.layers.extend((owner != HOLE).then_some(owner));
                if place == ROOT_PLACE {
                    *self.uniform_roots.entry(owner).or_default() += 1;
                }
                return;
            }
        };
        if let Some(position) = self.positions.get_mut(&place)
            && let Some(at) = position.pages.get(&page_id)
        {
            position.lines.get_mut(&at.lineage).expect("a page is in a line").versions[at.version as usize].refs += 1;
            return;
        }
        let wanted = self.wanted.entry(page_id).or_default();
        match wanted.iter_mut().find(|wanted| (wanted.place, wanted.crc) == (place, crc)) {
            Some(wanted) => wanted.refs += 1,
            None => wanted.push(Wanted { place, lineage, crc, refs: 1, failure: None }),
        }
    }

    fn release_root(&mut self, word: PageWord) {
        match word {
            PageWord::Page { id, .. } => self.release(id, ROOT_PLACE),
            PageWord::Uniform(owner) => {
                if let MapEntry::Occupied(mut count) = self.uniform_roots.entry(owner) {
                    *count.get_mut() -= 1;
                    if *count.get() == 0 {
                        count.remove();
                    }
                }
            }
        }
    }

    /// One reference less; a page without any lets go of what it refers to.
    fn release(&mut self, page_id: u64, place: Place) {
        let mut rest = vec![(page_id, place)];
        while let Some((page_id, place)) = rest.pop() {
            let Some(position) = self.positions.get_mut(&place) else { continue };
            let Some(&at) = position.pages.get(&page_id) else {
                self.release_wanted(page_id, place);
                continue;
            };
            let line = position.lines.get_mut(&at.lineage).expect("a page is in a line");
            let version = &mut line.versions[at.version as usize];
            version.refs -= 1;
            if version.refs > 0 {
                continue;
            }
            if place.0 > 0 {
                let entries = line.entries_of(at.version);
                rest.extend(entries.flat_map(|entry| {
                    let child = page_of(entry.word);
                    (entry.start..entry.end).filter_map(move |index| Some((child?, child_place(place, index))))
                }));
            }
            position.pages.remove(&page_id);
            if !line.died() {
                continue;
            }
            let before = line.entry_count();
            if line.is_empty() {
                position.lines.remove(&at.lineage);
                self.entry_count -= before;
            } else {
                line.compact(|page_id, version| {
                    position.pages.insert(page_id, Where { lineage: at.lineage, version });
                });
                self.entry_count -= before - line.entry_count();
            }
            if position.lines.is_empty() {
                self.positions.remove(&place);
            }
        }
    }

    fn release_wanted(&mut self, page_id: u64, place: Place) {
        let Some(places) = self.wanted.get_mut(&page_id) else { return };
        if let Some(index) = places.iter().position(|wanted| wanted.place == place) {
            places[index].refs -= 1;
            if places[index].refs == 0 {
                places.swap_remove(index);
            }
        }
        if places.is_empty() {
            self.wanted.remove(&page_id);
        }
    }

    fn add(&mut self, page_id: u64, wanted: &Wanted, page: Page) {
        let Wanted { place, lineage, refs, .. } = *wanted;
        let mut runs: Vec<(u16, Word)> = Vec::new();
        match &page {
            Page::Leaf(body) => {
                let cover = body.cover();
                self.layers.extend(cover.owners.iter().filter(|&&owner| owner != HOLE));
                runs.extend(cover.runs.iter().map(|run| (run.start + run.count, Word::from(cover.owner(run)))));
            }
            Page::Inner(words) => {
                for (index, word) in words.iter().enumerate() {
                    self.refer(*word, child_place(place, index as u16), lineage);
                    let end = index as u16 + 1;
                    match (to_word(*word), runs.last_mut()) {
                        (word, Some(last)) if last.1 == word && page_of(word).is_none() => last.0 = end,
                        (word, _) => runs.push((end, word)),
                    }
                }
            }
        }
        let position = self.positions.entry(place).or_default();
        let line = position.lines.entry(lineage).or_default();
        let before = line.entry_count();
        let version = line.push(page_id, refs, &runs);
        self.entry_count = self.entry_count + line.entry_count() - before;
        position.pages.insert(page_id, Where { lineage, version });
    }

    fn prune_layers(&mut self) {
        let mut named: HashSet<u32> = self.uniform_roots.keys().copied().collect();
        for line in self.positions.values().flat_map(|position| position.lines.values()) {
            named.extend(line.entries().filter_map(|entry| u32::try_from(entry.word).ok()));
        }
        named.remove(&HOLE);
        self.allocated.retain(|alias, _| named.contains(alias));
        self.layers_at_prune = named.len();
        self.layers = named;
    }

    fn allocated(&self, owner: u32, start: u64, end: u64) -> u64 {
        self.allocated.get(&owner).map_or(0, |allocated| allocated.count(start, end))
    }

    /// Allocated slots of sealed layers below a word, and whether an active layer is there too.
    fn slots(&mut self, word: PageWord, place: Place) -> Result<(u64, bool)> {
        match word {
            PageWord::Uniform(owner) => Ok((self.allocated(owner, place.1, place.1 + span(place.0)), self.active.contains(&owner))),
            PageWord::Page { id, .. } => self.slots_below(id, place),
        }
    }

    fn slots_below(&mut self, page_id: u64, place: Place) -> Result<(u64, bool)> {
        let Some((line, at)) = self.find(page_id, place) else { return Err(self.failure_of(page_id)) };
        if !line.is_counted(at.version) {
            self.count_line(place, at.lineage);
        }
        let (line, at) = self.find(page_id, place).expect("it was found above");
        if let Some(slots) = line.versions[at.version as usize].slots {
            return Ok((slots, false));
        }
        // An active layer is there, or a page that cannot be read: few have that.
        let entries: Vec<_> = line.entries_of(at.version).copied().collect();
        let (mut sum, mut any_active) = (0, false);
        for entry in entries {
            if let Some(child) = page_of(entry.word) {
                for index in entry.start..entry.end {
                    let (slots, is_active) = self.slots_below(child, child_place(place, index))?;
                    sum += slots;
                    any_active |= is_active;
                }
            } else {
                let owner = entry.word as u32;
                let (start, end) = range(place, entry.start, entry.end);
                sum += self.allocated(owner, start, end);
                any_active |= self.active.contains(&owner);
            }
        }
        if !any_active {
            // What was active when the line was counted is sealed now.
            let position = self.positions.get_mut(&place).expect("it was found above");
            let line = position.lines.get_mut(&at.lineage).expect("it was found above");
            line.versions[at.version as usize].slots = Some(sum);
        }
        Ok((sum, any_active))
    }

    /// Counts all versions of a line at once: their differences are few.
    fn count_line(&mut self, place: Place, lineage: u64) {
        // Out of the table while what lies below is counted, which is never the same line.
        let position = self.positions.get_mut(&place).expect("the line was found");
        let mut line = std::mem::take(position.lines.get_mut(&lineage).expect("the line was found"));
        let counts = line.counts(|entry| {
            let Some(child) = page_of(entry.word) else {
                let owner = entry.word as u32;
                let (start, end) = range(place, entry.start, entry.end);
                return (!self.active.contains(&owner)).then(|| self.allocated(owner, start, end));
            };
            (entry.start..entry.end).try_fold(0, |sum, index| {
                let (slots, is_active) = self.slots_below(child, child_place(place, index)).ok()?;
                (!is_active).then_some(sum + slots)
            })
        });
        line.keep_counts(&counts);
        let position = self.positions.get_mut(&place).expect("the line was found");
        position.lines.insert(lineage, line);
    }

    fn find(&self, page_id: u64, place: Place) -> Option<(&Line, Where)> {
        let position = self.positions.get(&place)?;
        let at = *position.pages.get(&page_id)?;
        Some((&position.lines[&at.lineage], at))
    }

    fn failure_of(&self, page_id: u64) -> MapError {
        let failure = self.wanted.get(&page_id).and_then(|places| places.iter().find_map(|wanted| wanted.failure.clone()));
        failure.unwrap_or_else(|| missing(page_id))
    }

    /// Slots that only the one resource with this root refers to.
    fn only(&self, root: PageWord) -> u64 {
        match root {
            PageWord::Uniform(HOLE) => 0,
            PageWord::Uniform(owner) if self.uniform_roots.get(&owner).is_some_and(|&count| count > 1) => 0,
            PageWord::Uniform(owner) => self.alone(owner, 0, MAP_SLOTS, ROOT_LEVEL + 1),
            PageWord::Page { id, .. } => self.only_below(id, ROOT_PLACE, &[]),
        }
    }

    /// As `only`, of a page that everything above refers to for one resource. `above`: owners that words of pages above give to all
    /// of this place; those of uniform roots are known.
    fn only_below(&self, page_id: u64, place: Place, above: &[u32]) -> u64 {
        let Some((line, at)) = self.find(page_id, place) else { return 0 };
        if line.versions[at.version as usize].refs > 1 {
            return 0;
        }
        if place.0 == 0 {
            return self.only_in_leaf(line, at, place, above);
        }
        let uniform = self.uniform_words(place);
        let mut sum = 0;
        for entry in line.entries_of(at.version) {
            if let Some(child) = page_of(entry.word) {
                for index in entry.start..entry.end {
                    let here = uniform.iter().filter(|word| word.start <= index && index < word.end);
                    let above = above.iter().copied().chain(here.map(|word| word.owner)).collect::<Vec<_>>();
                    sum += self.only_below(child, child_place(place, index), &above);
                }
                continue;
            }
            let owner = entry.word as u32;
            if !self.may_be_alone(owner, above) {
                continue;
            }
            for index in entry.start..entry.end {
                let here = uniform.iter().filter(|word| word.owner == owner && word.start <= index && index < word.end);
                if here.map(|word| word.weight).sum::<u64>() == 1 {
                    let (start, end) = range(place, index, index + 1);
                    sum += self.alone(owner, start, end, place.0);
                }
            }
        }
        sum
    }

    fn may_be_alone(&self, owner: u32, above: &[u32]) -> bool {
        owner != HOLE && !self.active.contains(&owner) && !self.uniform_roots.contains_key(&owner) && !above.contains(&owner)
    }

    fn only_in_leaf(&self, line: &Line, at: Where, place: Place, above: &[u32]) -> u64 {
        let weights = line.weights();
        let mut mine: HashMap<u32, Vec<(u64, u64)>> = HashMap::new();
        for entry in line.entries_of(at.version) {
            let owner = entry.word as u32;
            if weights.of(entry) == 1 && self.may_be_alone(owner, above) {
                mine.entry(owner).or_default().push(range(place, entry.start, entry.end));
            }
        }
        if mine.is_empty() {
            return 0;
        }
        let mut others: HashMap<u32, Vec<(u64, u64)>> = HashMap::new();
        for (lineage, line) in &self.positions[&place].lines {
            let weights = line.weights();
            for entry in line.entries() {
                let is_mine = *lineage == at.lineage && entry.is_in(at.version);
                if !is_mine && mine.contains_key(&(entry.word as u32)) && weights.of(entry) > 0 {
                    others.entry(entry.word as u32).or_default().push(range(place, entry.start, entry.end));
                }
            }
        }
        let count = |(owner, ranges): (&u32, &Vec<(u64, u64)>)| {
            let taken = merged(others.remove(owner).unwrap_or_default());
            ranges.iter().map(|&(start, end)| self.count_without(*owner, start, end, &taken)).sum::<u64>()
        };
        mine.iter().map(count).sum()
    }

    /// Allocated slots of a layer in the range that no page of a level below `level` refers to.
    fn alone(&self, owner: u32, start: u64, end: u64, level: u8) -> u64 {
        if self.active.contains(&owner) {
            return 0;
        }
        let mut taken = Vec::new();
        for level in 0..level {
            for (&place, position) in self.positions.range((level, start)..(level, end)) {
                for line in position.lines.values() {
                    let mut weights = None;
                    for entry in line.entries().filter(|entry| entry.word == Word::from(owner)) {
                        if weights.get_or_insert_with(|| line.weights()).of(entry) > 0 {
                            taken.push(range(place, entry.start, entry.end));
                        }
                    }
                }
            }
        }
        self.count_without(owner, start, end, &merged(taken))
    }

    /// Allocated slots of a layer in `start..end` that are in none of the ranges (ascending, not touching).
    fn count_without(&self, owner: u32, start: u64, end: u64, taken: &[(u64, u64)]) -> u64 {
        let overlapping = taken.iter().skip(taken.partition_point(|range| range.1 <= start)).take_while(|range| range.0 < end);
        let taken_count = overlapping.map(|range| self.allocated(owner, range.0.max(start), range.1.min(end))).sum::<u64>();
        self.allocated(owner, start, end) - taken_count
    }

    /// Uniform words of live pages at a place.
    fn uniform_words(&self, place: Place) -> Vec<UniformWord> {
        let mut words = Vec::new();
        for line in self.positions[&place].lines.values() {
            let weights = line.weights();
            for entry in line.entries().filter(|entry| page_of(entry.word).is_none() && entry.word != Word::from(HOLE)) {
                let weight = weights.of(entry);
                if weight > 0 {
                    words.push(UniformWord { start: entry.start, end: entry.end, owner: entry.word as u32, weight });
                }
            }
        }
        words
    }
}

struct UniformWord {
    start: u16,
    end: u16,
    owner: u32,
    weight: u64,
}

fn read(page_id: u64, wanted: &Wanted, bytes: Option<&[u8]>) -> Result<Page> {
    let bytes = bytes.ok_or_else(|| missing(page_id))?;
    check_crc(page_id, bytes, wanted.crc)?;
    decode(page_id, wanted.place.0, bytes)
}

fn missing(page_id: u64) -> MapError {
    MapError { code: MapErrorCode::PageMissing, page_id, message: "it is not in the catalog".into() }
}

fn same(one: PageWord, other: PageWord) -> bool {
    match (one, other) {
        (PageWord::Page { id, crc }, PageWord::Page { id: other_id, crc: other_crc }) => (id, crc) == (other_id, other_crc),
        (PageWord::Uniform(owner), PageWord::Uniform(other)) => owner == other,
        _ => false,
    }
}

fn to_word(word: PageWord) -> Word {
    match word {
        PageWord::Page { id, .. } => page_word(id),
        PageWord::Uniform(owner) => Word::from(owner),
    }
}

/// The place of a child.
fn child_place((level, base): Place, index: u16) -> Place {
    debug_assert!(level > 0 && usize::from(index) < FANOUT);
    (level - 1, base + u64::from(index) * span(level - 1))
}

/// Slots of indices of a page.
fn range((level, base): Place, start: u16, end: u16) -> (u64, u64) {
    let each = if level == 0 { 1 } else { span(level - 1) };
    debug_assert!(level > 0 || u64::from(end) <= LEAF_SLOTS);
    (base + u64::from(start) * each, base + u64::from(end) * each)
}

/// The union of ranges: ascending, not touching.
fn merged(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.sort_unstable();
    let mut merged = Vec::<(u64, u64)>::with_capacity(ranges.len());
    for (start, end) in ranges {
        match merged.last_mut() {
            Some(last) if start <= last.1 => last.1 = last.1.max(end),
            _ => merged.push((start, end)),
        }
    }
    merged
}
