//! What a leaf holds: the owner of each of its 8192 slots, in the smaller of two forms.
//!
//! - *Runs*: an owner for all slots but those of a short sorted list of runs. Never changes; a new list replaces it.
//! - *Palette*: a list of owners and, per slot, an index of 1, 2, 4, 8 or 16 bits into it. The one writer of a map changes it
//!   in place while readers look: an index is one aligned 32-bit word's bits, stored whole, and an owner is in the list before
//!   an index that names it (Release on the index, Acquire by the reader) and never changes afterwards. So a reader finds an
//!   owner that the slot had at some time, whenever it looks.
use crate::cover::{Cover, CoverBuilder};
use std::sync::atomic::{AtomicU16, AtomicU32, Ordering};

/// Slots of a leaf.
pub(crate) const SLOTS: usize = crate::LEAF_SLOTS as usize;
/// Longest run list that a change makes; more becomes a palette, because every change writes the list anew.
pub(crate) const RUNS_MAX: usize = 24;
/// Bits of the word that holds indices.
const WORD_BITS: usize = 32;
/// Room for owners that a 16-bit palette starts with.
const WIDE_CAPACITY_MIN: usize = 512;

const _: () = assert!(SLOTS <= u16::MAX as usize, "slot numbers and counts of a leaf are u16");

/// A run of slots within a leaf.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LeafRun {
    /// First slot within the leaf.
    pub(crate) start: u16,
    /// Number of slots, never 0.
    pub(crate) count: u16,
    /// HOLE or a layer alias.
    pub(crate) owner: u32,
}

/// The owners of a leaf's slots.
pub(crate) enum Body {
    Runs(Runs),
    Palette(Palette),
}

/// One owner, and the runs that have another. Runs are ascending, do not overlap, none has the base owner, and runs that touch
/// have different owners.
pub(crate) struct Runs {
    base: u32,
    runs: Box<[LeafRun]>,
}

/// Owners and indices into them, in one allocation: `capacity` owners, then `SLOTS * width / 32` words of indices.
pub(crate) struct Palette {
    width: u8,
    capacity: u16,
    /// Owners listed; used by the writer and by whoever holds a frozen leaf.
    len: AtomicU16,
    cells: Box<[AtomicU32]>,
}

/// What a leaf comes to: a body, or one owner that its parent keeps as a word.
pub(crate) enum Content {
    Uniform(u32),
    Body(Body),
}

/// What `Body::set` did or wants done.
pub(crate) enum Change {
    /// The slots had the owner already.
    Nothing,
    /// The body was changed in place.
    InPlace,
    /// The body must be replaced by this.
    Replace(Content),
}

impl Content {
    /// The form that holds this cover in memory.
    pub(crate) fn from_cover(cover: &Cover) -> Content {
        if let [owner] = cover.owners[..] {
            return Content::Uniform(owner);
        }
        // Neighbours differ, so the base has at most half of the runs: no need to count the base's when there are too many.
        if cover.runs.len() <= 2 * RUNS_MAX + 1 {
            let runs = Runs::from_cover(cover);
            if runs.runs.len() <= RUNS_MAX {
                return Content::Body(Body::Runs(runs));
            }
        }
        Content::Body(Body::Palette(Palette::from_cover(cover)))
    }

    /// All slots have `base` but `start..end`, which have `owner`.
    pub(crate) fn one_run(base: u32, start: usize, end: usize, owner: u32) -> Content {
        if start == 0 && end == SLOTS {
            return Content::Uniform(owner);
        }
        let run = LeafRun { start: start as u16, count: (end - start) as u16, owner };
        Content::Body(Body::Runs(Runs { base, runs: Box::new([run]) }))
    }
}

impl Body {
    /// The owner of one slot.
    pub(crate) fn owner_at(&self, slot: usize) -> u32 {
        match self {
            Body::Runs(runs) => runs.run_at(slot, slot + 1).0,
            Body::Palette(palette) => palette.owner(palette.index_at(slot)),
        }
    }

    /// The owner of `slot`, and the end of the slots from there on, below `end`, that have it too.
    pub(crate) fn run_at(&self, slot: usize, end: usize) -> (u32, usize) {
        match self {
            Body::Runs(runs) => runs.run_at(slot, end),
            Body::Palette(palette) => {
                let index = palette.index_at(slot);
                (palette.owner(index), palette.index_run_end(slot, end, index))
            }
        }
    }

    /// Gives slots `start..end` an owner. Only for the body of a leaf that the calling writer alone may change.
    pub(crate) fn set(&self, start: usize, end: usize, owner: u32) -> Change {
        let (first_owner, same_until) = self.run_at(start, end);
        if first_owner == owner && same_until == end {
            return Change::Nothing;
        }
        match self {
            Body::Palette(palette) => match palette.set_in_place(start, end, owner) {
                SetInPlace::Done => Change::InPlace,
                SetInPlace::Uniform => Change::Replace(Content::Uniform(owner)),
                SetInPlace::Full => Change::Replace(Content::from_cover(&self.cover().with_run(start, end, owner))),
            },
            Body::Runs(_) => Change::Replace(Content::from_cover(&self.cover().with_run(start, end, owner))),
        }
    }

    /// What the leaf comes to when slots `start..end` get an owner, in new memory; `None` if they have it already.
    pub(crate) fn copy_with_run(&self, start: usize, end: usize, owner: u32) -> Option<Content> {
        let copy = self.copy();
        match copy.set(start, end, owner) {
            Change::Nothing => None,
            Change::InPlace => Some(Content::Body(copy)),
            Change::Replace(content) => Some(content),
        }
    }

    /// The same content in new memory.
    pub(crate) fn copy(&self) -> Body {
        match self {
            Body::Runs(runs) => Body::Runs(Runs { base: runs.base, runs: runs.runs.clone() }),
            Body::Palette(palette) => Body::Palette(Palette {
                width: palette.width,
                capacity: palette.capacity,
                len: AtomicU16::new(palette.len.load(Ordering::Relaxed)),
                cells: palette.cells.iter().map(|cell| AtomicU32::new(cell.load(Ordering::Relaxed))).collect(),
            }),
        }
    }

    /// The content written out. Not while a writer changes it.
    pub(crate) fn cover(&self) -> Cover {
        match self {
            Body::Runs(runs) => runs.cover(),
            Body::Palette(palette) => palette.cover(),
        }
    }

    /// Calls `visit` with each owner in slots `start..end` and its number of slots, in no order; an owner comes once or more often.
    pub(crate) fn count_owners(&self, start: usize, end: usize, visit: &mut dyn FnMut(u32, u64)) {
        match self {
            Body::Runs(_) => {
                let mut slot = start;
                while slot < end {
                    let (owner, run_end) = self.run_at(slot, end);
                    visit(owner, (run_end - slot) as u64);
                    slot = run_end;
                }
            }
            Body::Palette(palette) => {
                let mut slot_counts = vec![0_u64; usize::from(palette.len.load(Ordering::Acquire))];
                let mut slot = start;
                while slot < end {
                    let index = palette.index_at(slot);
                    let run_end = palette.index_run_end(slot, end, index);
                    slot_counts[index] += (run_end - slot) as u64;
                    slot = run_end;
                }
                for (index, &slot_count) in slot_counts.iter().enumerate().filter(|(_, slot_count)| **slot_count > 0) {
                    visit(palette.owner(index), slot_count);
                }
            }
        }
    }

    /// Calls `visit` with each owner in slots `start..end`; stops looking when all that are listed were seen.
    pub(crate) fn owners(&self, start: usize, end: usize, visit: &mut dyn FnMut(u32)) {
        match self {
            Body::Runs(_) => self.count_owners(start, end, &mut |owner, _| visit(owner)),
            Body::Palette(palette) => {
                let mut seen = vec![false; usize::from(palette.len.load(Ordering::Acquire))];
                let mut unseen_count = seen.len();
                let mut slot = start;
                while slot < end && unseen_count > 0 {
                    let index = palette.index_at(slot);
                    if !std::mem::replace(&mut seen[index], true) {
                        unseen_count -= 1;
                        visit(palette.owner(index));
                    }
                    slot = palette.index_run_end(slot, end, index);
                }
            }
        }
    }

    /// Bytes of memory behind this body, its own struct left out.
    pub(crate) fn heap_bytes(&self) -> usize {
        match self {
            Body::Runs(runs) => std::mem::size_of_val(&*runs.runs),
            Body::Palette(palette) => std::mem::size_of_val(&*palette.cells),
        }
    }
}

impl Runs {
    /// From a checked list (see the type's rules).
    pub(crate) fn new(base: u32, runs: Box<[LeafRun]>) -> Runs {
        Runs { base, runs }
    }

    fn from_cover(cover: &Cover) -> Runs {
        let base_index = cover.base_index();
        let listed = cover.runs.iter().filter(|run| run.index != base_index);
        let runs = listed.map(|run| LeafRun { start: run.start, count: run.count, owner: cover.owner(run) }).collect();
        Runs { base: cover.owners[usize::from(base_index)], runs }
    }

    fn run_at(&self, slot: usize, end: usize) -> (u32, usize) {
        let following = self.runs.partition_point(|run| usize::from(run.start) <= slot);
        if let Some(run) = self.runs[..following].last() {
            let run_end = usize::from(run.start) + usize::from(run.count);
            if slot < run_end {
                return (run.owner, run_end.min(end));
            }
        }
        let gap_end = self.runs.get(following).map_or(end, |run| usize::from(run.start).min(end));
        (self.base, gap_end)
    }

    fn cover(&self) -> Cover {
        let mut builder = CoverBuilder::default();
        let mut next_slot = 0;
        for run in &self.runs {
            let start = usize::from(run.start);
            builder.push(start - next_slot, self.base);
            builder.push(usize::from(run.count), run.owner);
            next_slot = start + usize::from(run.count);
        }
        builder.push(SLOTS - next_slot, self.base);
        builder.finish()
    }
}

enum SetInPlace {
    Done,
    /// The palette has no room for the owner.
    Full,
    /// Nothing was changed, or all was: every slot has the owner now.
    Uniform,
}

/// Bits of an index into so many owners.
pub(crate) fn index_width(owner_count: usize) -> usize {
    match owner_count {
        0..=2 => 1,
        3..=4 => 2,
        5..=16 => 4,
        17..=256 => 8,
        _ => 16,
    }
}

impl Palette {
    /// All slots get index 0; the caller sets the others before anybody else sees the palette.
    pub(crate) fn new(owners: &[u32]) -> Palette {
        debug_assert!((1..=SLOTS).contains(&owners.len()));
        let width = index_width(owners.len());
        let capacity = if width == 16 { owners.len().next_power_of_two().clamp(WIDE_CAPACITY_MIN, SLOTS) } else { 1 << width };
        let cell_count = capacity + SLOTS * width / WORD_BITS;
        let cells: Box<[AtomicU32]> = (0..cell_count).map(|cell| AtomicU32::new(owners.get(cell).copied().unwrap_or(0))).collect();
        Palette { width: width as u8, capacity: capacity as u16, len: AtomicU16::new(owners.len() as u16), cells }
    }

    fn from_cover(cover: &Cover) -> Palette {
        let palette = Palette::new(&cover.owners);
        for run in &cover.runs {
            palette.fill(usize::from(run.start), usize::from(run.start) + usize::from(run.count), u32::from(run.index));
        }
        palette
    }

    /// Index of a slot. Acquire: the owner it names is listed.
    pub(crate) fn index_at(&self, slot: usize) -> usize {
        let bit = slot * usize::from(self.width);
        let word = self.cells[usize::from(self.capacity) + bit / WORD_BITS].load(Ordering::Acquire);
        ((word >> (bit % WORD_BITS)) & self.index_mask()) as usize
    }

    /// Sets the index of slots `start..end`, whole words where possible.
    pub(crate) fn fill(&self, start: usize, end: usize, index: u32) {
        let width = usize::from(self.width);
        let (mut bit, end_bit) = (start * width, end * width);
        let pattern = self.pattern(index);
        while bit < end_bit {
            let shift = bit % WORD_BITS;
            let bit_count = (WORD_BITS - shift).min(end_bit - bit);
            let cell = &self.cells[usize::from(self.capacity) + bit / WORD_BITS];
            let mask = (u32::MAX >> (WORD_BITS - bit_count)) << shift;
            let word = (cell.load(Ordering::Relaxed) & !mask) | (pattern & mask);
            cell.store(word, Ordering::Release);
            bit += bit_count;
        }
    }

    /// Sets the indices that 64 packed bits hold, the first slot's lowest. Before anybody else sees the palette.
    pub(crate) fn set_words(&self, word_index: usize, word: u64) {
        let cell = usize::from(self.capacity) + 2 * word_index;
        self.cells[cell].store(word as u32, Ordering::Relaxed);
        self.cells[cell + 1].store((word >> WORD_BITS) as u32, Ordering::Relaxed);
    }

    fn owner(&self, index: usize) -> u32 {
        debug_assert!(index < usize::from(self.capacity));
        self.cells[index].load(Ordering::Relaxed)
    }

    fn index_mask(&self) -> u32 {
        u32::MAX >> (WORD_BITS - usize::from(self.width))
    }

    /// The index in every place of a word.
    fn pattern(&self, index: u32) -> u32 {
        // All ones divided by the mask is a one in each place (the mask is one place full of ones).
        index * (u32::MAX / self.index_mask())
    }

    /// End of the slots from `slot` on, below `end`, that have this index.
    fn index_run_end(&self, slot: usize, end: usize, index: usize) -> usize {
        let width = usize::from(self.width);
        let pattern = self.pattern(index as u32);
        let (mut bit, end_bit) = (slot * width, end * width);
        while bit < end_bit {
            let shift = bit % WORD_BITS;
            let word = self.cells[usize::from(self.capacity) + bit / WORD_BITS].load(Ordering::Acquire);
            let different = (word ^ pattern) >> shift;
            if different != 0 {
                return ((bit + different.trailing_zeros() as usize) / width).min(end);
            }
            bit += WORD_BITS - shift;
        }
        end
    }

    fn set_in_place(&self, start: usize, end: usize, owner: u32) -> SetInPlace {
        let len = usize::from(self.len.load(Ordering::Relaxed));
        let known = self.cells[..len].iter().position(|cell| cell.load(Ordering::Relaxed) == owner);
        let index = match known {
            Some(index) => index,
            None if len < usize::from(self.capacity) => {
                self.cells[len].store(owner, Ordering::Relaxed);
                self.len.store(len as u16 + 1, Ordering::Release);
                len
            }
            None => return SetInPlace::Full,
        };
        self.fill(start, end, index as u32);
        if self.index_run_end(0, SLOTS, index) == SLOTS { SetInPlace::Uniform } else { SetInPlace::Done }
    }

    fn cover(&self) -> Cover {
        let mut cover = Cover { owners: Vec::new(), runs: Vec::new() };
        // Position in the cover of each owner of the palette; the palette may list owners that no slot has any more.
        let mut positions = vec![u16::MAX; usize::from(self.len.load(Ordering::Acquire))];
        let mut slot = 0;
        while slot < SLOTS {
            let index = self.index_at(slot);
            let end = self.index_run_end(slot, SLOTS, index);
            if positions[index] == u16::MAX {
                positions[index] = cover.owners.len() as u16;
                cover.owners.push(self.owner(index));
            }
            cover.runs.push(crate::cover::CoverRun { start: slot as u16, count: (end - slot) as u16, index: positions[index] });
            slot = end;
        }
        cover
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Applies changes as a writer does, following replacements.
    fn apply(content: &mut Content, start: usize, end: usize, owner: u32) {
        let change = match content {
            Content::Uniform(base) if *base == owner => Change::Nothing,
            Content::Uniform(base) => Change::Replace(Content::one_run(*base, start, end, owner)),
            Content::Body(body) => body.set(start, end, owner),
        };
        if let Change::Replace(replacement) = change {
            *content = replacement;
        }
    }

    fn assert_holds(content: &Content, slots: &[u32]) {
        match content {
            Content::Uniform(owner) => assert!(slots.iter().all(|slot| slot == owner)),
            Content::Body(body) => {
                assert!(slots.iter().any(|&slot| slot != slots[0]), "a leaf of one owner must be uniform");
                let mut slot = 0;
                while slot < SLOTS {
                    let (owner, end) = body.run_at(slot, SLOTS);
                    assert!(slots[slot..end].iter().all(|&wanted| wanted == owner));
                    assert!(end == SLOTS || slots[end] != owner, "runs are maximal");
                    assert_eq!(body.owner_at(slot), owner);
                    slot = end;
                }
                let mut counted = std::collections::HashMap::new();
                body.count_owners(0, SLOTS, &mut |owner, slot_count| *counted.entry(owner).or_insert(0) += slot_count);
                let mut wanted = std::collections::HashMap::new();
                slots.iter().for_each(|&owner| *wanted.entry(owner).or_insert(0) += 1);
                assert_eq!(counted, wanted);
                let mut owners = std::collections::BTreeSet::new();
                body.owners(0, SLOTS, &mut |owner| owners.extend([owner]));
                assert!(owners.iter().eq(wanted.keys().collect::<std::collections::BTreeSet<_>>()));
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(100))]
        #[test]
        fn a_leaf_holds_what_a_plain_array_holds(
            owner_count in prop_oneof![Just(2_u32), Just(4), Just(16), Just(40), Just(300), Just(9000)],
            steps in prop::collection::vec((0..SLOTS, prop_oneof![1..3_usize, 1..100_usize, 1..SLOTS], any::<u32>(), 1..40_usize), 1..60),
        ) {
            let mut content = Content::Uniform(0);
            let mut slots = vec![0_u32; SLOTS];
            for (start, count, owner, repeat) in steps {
                for round in 0..repeat {
                    let start = (start + round * 211) % SLOTS;
                    let end = (start + count).min(SLOTS);
                    let owner = owner.wrapping_add(round as u32) % owner_count;
                    apply(&mut content, start, end, owner);
                    slots[start..end].fill(owner);
                }
                assert_holds(&content, &slots);
                if let Content::Body(body) = &content {
                    assert_holds(&Content::Body(body.copy()), &slots);
                    assert_holds(&Content::from_cover(&body.cover()), &slots);
                }
            }
        }
    }

    #[test]
    fn filling_slot_by_slot_ends_as_uniform_from_runs_and_from_every_palette() {
        for owner_count in [1, 2, 3, 5, 17, 257, 8191] {
            let mut content = Content::Uniform(1);
            for slot in 0..SLOTS {
                apply(&mut content, slot, slot + 1, 2 + slot as u32 % owner_count);
            }
            for slot in 0..SLOTS {
                apply(&mut content, slot, slot + 1, 1_000_000);
            }
            assert!(matches!(content, Content::Uniform(1_000_000)), "{owner_count} owners");
        }
    }

    #[test]
    fn owners_that_no_slot_has_any_more_make_room_for_new_ones() {
        let mut content = Content::Uniform(0);
        // Alternate with ever new owners: three at a time are in use.
        for owner in 1..=1000_u32 {
            for slot in (0..200).step_by(2) {
                apply(&mut content, slot, slot + 1, owner);
            }
        }
        let Content::Body(Body::Palette(palette)) = &content else { panic!("a hundred runs are a palette") };
        assert!(palette.width <= 2, "the palette grew to {} bits for two owners", palette.width);
    }

    #[test]
    fn a_slot_changed_in_place_never_shows_a_third_owner() {
        // Index 0 is owner 1, which the slots between do not have after the first round.
        let mut content = Content::Uniform(1);
        (0..SLOTS).for_each(|slot| apply(&mut content, slot, slot + 1, 1 + slot as u32 % 4));
        let Content::Body(body) = &content else { panic!("four owners are no uniform leaf") };
        assert!(matches!(body.set(1, 3, 2), Change::InPlace));
        let done = std::sync::atomic::AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for round in 0..3_000_000_u32 {
                    body.set(1, 3, 2 + round % 3);
                }
                done.store(true, Ordering::Relaxed);
            });
            while !done.load(Ordering::Relaxed) {
                for slot in [1, 2] {
                    let owner = body.owner_at(slot);
                    if !(2..=4).contains(&owner) {
                        done.store(true, Ordering::Relaxed);
                        panic!("slot {slot} shows owner {owner}");
                    }
                }
                assert_eq!((body.owner_at(0), body.owner_at(4)), (1, 1));
            }
        });
    }
}
