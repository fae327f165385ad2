//! A sparse address space of copy-on-write pages. A clone shares every page, so that a crash image of a store of any size costs
//! a few reference counts and the pages it changes.
use crate::Extent;
use crate::store::push_extent;
use std::collections::BTreeMap;
use std::sync::{Arc, LazyLock};

/// Bytes of a page: the unit of allocation.
pub(super) const PAGE_BYTES: u64 = 4096;
const CHUNK_PAGES: u64 = 64;

type Page = Arc<[u8; PAGE_BYTES as usize]>;

/// The page that every page of zeros starts as.
static ZERO_PAGE: LazyLock<Page> = LazyLock::new(|| Arc::new([0; PAGE_BYTES as usize]));

#[derive(Clone)]
struct Chunk {
    pages: [Option<Page>; CHUNK_PAGES as usize],
    /// Pages that are there; a chunk without any is dropped.
    count: u64,
}

impl Default for Chunk {
    fn default() -> Chunk {
        Chunk { pages: [const { None }; CHUNK_PAGES as usize], count: 0 }
    }
}

/// The content of a layer.
#[derive(Clone, Default)]
pub(super) struct Sparse {
    chunks: BTreeMap<u64, Arc<Chunk>>,
    page_count: u64,
    length_bytes: u64,
}

/// A part of a range that lies in one page.
struct Piece {
    page: u64,
    /// Where in the page.
    start: usize,
    /// Where in the range.
    position: usize,
    length: usize,
}

impl Piece {
    fn is_whole_page(&self) -> bool {
        self.length == PAGE_BYTES as usize
    }
}

fn pieces(offset_bytes: u64, length_bytes: usize) -> impl Iterator<Item = Piece> {
    let mut position = 0;
    std::iter::from_fn(move || {
        if position == length_bytes {
            return None;
        }
        let offset = offset_bytes + position as u64;
        let start = (offset % PAGE_BYTES) as usize;
        let length = (PAGE_BYTES as usize - start).min(length_bytes - position);
        let piece = Piece { page: offset / PAGE_BYTES, start, position, length };
        position += length;
        Some(piece)
    })
}

impl Sparse {
    /// Bytes of all pages that are there.
    pub(super) fn allocated_bytes(&self) -> u64 {
        self.page_count * PAGE_BYTES
    }

    /// Offset after the last byte ever written.
    pub(super) fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    fn page(&self, page: u64) -> Option<&Page> {
        self.chunks.get(&(page / CHUNK_PAGES))?.pages[(page % CHUNK_PAGES) as usize].as_ref()
    }

    /// The page's place, its chunk made if need be. `count` and `page_count` are right if the caller fills an empty place.
    fn place(&mut self, page: u64) -> &mut Option<Page> {
        let chunk = Arc::make_mut(self.chunks.entry(page / CHUNK_PAGES).or_default());
        let place = &mut chunk.pages[(page % CHUNK_PAGES) as usize];
        if place.is_none() {
            chunk.count += 1;
            self.page_count += 1;
        }
        place
    }

    /// Fills `out` from `offset_bytes` on.
    pub(super) fn read(&self, offset_bytes: u64, out: &mut [u8]) {
        for piece in pieces(offset_bytes, out.len()) {
            let target = &mut out[piece.position..piece.position + piece.length];
            match self.page(piece.page) {
                Some(page) => target.copy_from_slice(&page[piece.start..piece.start + piece.length]),
                None => target.fill(0),
            }
        }
    }

    /// Writes `data` at `offset_bytes`.
    pub(super) fn write(&mut self, offset_bytes: u64, data: &[u8]) {
        for piece in pieces(offset_bytes, data.len()) {
            let source = &data[piece.position..piece.position + piece.length];
            let place = self.place(piece.page);
            if let (true, Ok(whole)) = (piece.is_whole_page(), source.try_into()) {
                *place = Some(Arc::new(whole));
            } else {
                let page = Arc::make_mut(place.get_or_insert_with(|| Arc::clone(&ZERO_PAGE)));
                page[piece.start..piece.start + piece.length].copy_from_slice(source);
            }
        }
        if !data.is_empty() {
            self.length_bytes = self.length_bytes.max(offset_bytes + data.len() as u64);
        }
    }

    /// Zeros the bytes of one page that is there; absent pages are zero already.
    fn zero_in_page(&mut self, page: u64, start: u64, end: u64) {
        if start < end && self.page(page).is_some() {
            let place = self.place(page);
            let page = Arc::make_mut(place.get_or_insert_with(|| Arc::clone(&ZERO_PAGE)));
            page[start as usize..end as usize].fill(0);
        }
    }

    /// Frees the whole pages of the range and zeros the ragged ends.
    pub(super) fn punch(&mut self, offset_bytes: u64, length_bytes: u64) {
        let end = offset_bytes + length_bytes;
        let first = offset_bytes.div_ceil(PAGE_BYTES);
        let last = end / PAGE_BYTES;
        if first > last {
            self.zero_in_page(last, offset_bytes % PAGE_BYTES, end % PAGE_BYTES);
            return;
        }
        if !offset_bytes.is_multiple_of(PAGE_BYTES) {
            self.zero_in_page(first - 1, offset_bytes % PAGE_BYTES, PAGE_BYTES);
        }
        self.zero_in_page(last, 0, end % PAGE_BYTES);
        if first == last {
            return;
        }
        // The range may be the whole address space: only chunks that are there are looked at.
        let touched: Vec<u64> = self.chunks.range(first / CHUNK_PAGES..=(last - 1) / CHUNK_PAGES).map(|(index, _)| *index).collect();
        for index in touched {
            let from = first.max(index * CHUNK_PAGES) % CHUNK_PAGES;
            let to = last.min((index + 1) * CHUNK_PAGES) - index * CHUNK_PAGES;
            let Some(chunk) = self.chunks.get_mut(&index) else { continue };
            let present = chunk.pages[from as usize..to as usize].iter().flatten().count() as u64;
            if present == 0 {
                continue;
            }
            self.page_count -= present;
            if present == chunk.count {
                self.chunks.remove(&index);
            } else {
                let chunk = Arc::make_mut(chunk);
                chunk.count -= present;
                chunk.pages[from as usize..to as usize].fill(None);
            }
        }
    }

    /// Makes the range read as zeros, every page of it allocated.
    pub(super) fn zero_allocated(&mut self, offset_bytes: u64, length_bytes: u64) {
        let end = offset_bytes + length_bytes;
        let mut offset = offset_bytes;
        while offset < end {
            let page = offset / PAGE_BYTES;
            let page_end = ((page + 1) * PAGE_BYTES).min(end);
            if page_end - offset == PAGE_BYTES || self.page(page).is_none() {
                *self.place(page) = Some(Arc::clone(&ZERO_PAGE));
            } else {
                self.zero_in_page(page, offset % PAGE_BYTES, page_end - page * PAGE_BYTES);
            }
            offset = page_end;
        }
        if length_bytes > 0 {
            self.length_bytes = self.length_bytes.max(end);
        }
    }

    /// Bytes that a write of the range would allocate.
    pub(super) fn missing_bytes(&self, offset_bytes: u64, length_bytes: u64) -> u64 {
        if length_bytes == 0 {
            return 0;
        }
        let first = offset_bytes / PAGE_BYTES;
        let last = (offset_bytes + length_bytes - 1) / PAGE_BYTES;
        let chunks = self.chunks.range(first / CHUNK_PAGES..=last / CHUNK_PAGES);
        let present = chunks.map(|(index, chunk)| {
            let from = first.max(index * CHUNK_PAGES) % CHUNK_PAGES;
            let to = (last + 1).min((index + 1) * CHUNK_PAGES) - index * CHUNK_PAGES;
            chunk.pages[from as usize..to as usize].iter().flatten().count() as u64
        });
        (last + 1 - first - present.sum::<u64>()) * PAGE_BYTES
    }

    /// Appends the extents of the range.
    pub(super) fn extents(&self, offset_bytes: u64, length_bytes: u64, out: &mut Vec<Extent>) {
        let listed = out.len();
        let end = offset_bytes + length_bytes;
        let mut offset = offset_bytes;
        for (index, chunk) in self.chunks.range(offset_bytes / PAGE_BYTES / CHUNK_PAGES..) {
            for (position, _) in chunk.pages.iter().enumerate().filter(|(_, page)| page.is_some()) {
                let start = (index * CHUNK_PAGES + position as u64) * PAGE_BYTES;
                let data = start.max(offset).min(end);
                let data_end = (start + PAGE_BYTES).max(offset).min(end);
                push_extent(out, listed, offset, data - offset, false);
                push_extent(out, listed, data, data_end - data, true);
                offset = data_end;
            }
            if offset == end {
                return;
            }
        }
        push_extent(out, listed, offset, end - offset, false);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Three chunks and a bit.
    const SPACE: usize = (CHUNK_PAGES * PAGE_BYTES * 3 + 5000) as usize;

    #[derive(Debug, Clone)]
    enum Step {
        Write(usize, usize, u8),
        Punch(usize, usize),
        Zero(usize, usize),
    }

    fn step() -> impl Strategy<Value = Step> {
        let range = (0..SPACE, prop_oneof![0usize..3, 0usize..10_000, 0..SPACE])
            .prop_map(|(offset, length)| (offset, length.min(SPACE - offset)))
            .prop_flat_map(|(offset, length)| {
                let page = PAGE_BYTES as usize;
                prop_oneof![Just((offset, length)), Just((offset / page * page, length / page * page))]
            });
        (range, 0..3, any::<u8>()).prop_map(|((offset, length), kind, byte)| match kind {
            0 => Step::Write(offset, length, byte),
            1 => Step::Punch(offset, length),
            _ => Step::Zero(offset, length),
        })
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        #[test]
        fn it_reads_as_a_plain_array_and_counts_what_it_holds(steps in prop::collection::vec(step(), 1..30)) {
            let mut sparse = Sparse::default();
            let mut bytes = vec![0u8; SPACE];
            let mut pages = vec![false; SPACE.div_ceil(PAGE_BYTES as usize)];
            let mut length = 0;
            for step in steps {
                let before = sparse.clone();
                let mut content_before = vec![0; SPACE];
                before.read(0, &mut content_before);
                let (offset, count) = match step { Step::Write(o, l, _) | Step::Punch(o, l) | Step::Zero(o, l) => (o, l) };
                let missing = sparse.missing_bytes(offset as u64, count as u64);
                match step {
                    Step::Write(_, _, byte) => sparse.write(offset as u64, &vec![byte; count]),
                    Step::Punch(..) => sparse.punch(offset as u64, count as u64),
                    Step::Zero(..) => sparse.zero_allocated(offset as u64, count as u64),
                }
                bytes[offset..offset + count].fill(if let Step::Write(_, _, byte) = step { byte } else { 0 });
                for (index, page) in pages.iter_mut().enumerate() {
                    let (start, end) = (index * PAGE_BYTES as usize, (index + 1) * PAGE_BYTES as usize);
                    let touched = count > 0 && start < offset + count && offset < end;
                    match step {
                        Step::Punch(..) => *page &= !(start >= offset && end <= offset + count),
                        _ => *page |= touched,
                    }
                }
                if !matches!(step, Step::Punch(..)) {
                    prop_assert_eq!(before.allocated_bytes() + missing, sparse.allocated_bytes());
                    if count > 0 {
                        length = length.max(offset + count);
                    }
                }
                let mut content = vec![0xee; SPACE];
                sparse.read(0, &mut content);
                prop_assert!(content == bytes);
                prop_assert_eq!(sparse.allocated_bytes(), pages.iter().filter(|page| **page).count() as u64 * PAGE_BYTES);
                prop_assert_eq!(sparse.length_bytes(), length as u64);
                // The clone did not see the step.
                let mut clone = vec![0; SPACE];
                before.read(0, &mut clone);
                prop_assert!(clone == content_before);
            }
            let mut extents = Vec::new();
            sparse.extents(1000, SPACE as u64 - 1500, &mut extents);
            let mut offset = 1000;
            for (index, extent) in extents.iter().enumerate() {
                prop_assert_eq!(extent.offset_bytes, offset);
                prop_assert!(extent.length_bytes > 0);
                prop_assert!(index == 0 || extents[index - 1].data != extent.data);
                for byte in [extent.offset_bytes, extent.offset_bytes + extent.length_bytes - 1] {
                    prop_assert_eq!(pages[(byte / PAGE_BYTES) as usize], extent.data);
                }
                offset += extent.length_bytes;
            }
            prop_assert_eq!(offset, SPACE as u64 - 500);
        }
    }

    #[test]
    fn a_punch_of_the_whole_address_space_is_quick() {
        let mut sparse = Sparse::default();
        sparse.write((1 << 49) - 10, &[1; 10]);
        sparse.write(5, &[1; 10]);
        sparse.punch(0, 1 << 49);
        assert_eq!(sparse.allocated_bytes(), 0);
        assert!(sparse.chunks.is_empty());
    }
}
