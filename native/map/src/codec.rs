//! Pages: the form in which nodes lie in the catalog and in the page file. All numbers are little endian.
//!
//! Every page:
//!
//! | offset | bytes | field | valid when |
//! |---|---|---|---|
//! | 0 | 2 | magic `0x504d` ("MP") | always; first, so that what is no page is told at once |
//! | 2 | 1 | version | always; 1 |
//! | 3 | 1 | form: 1 inner, 2 runs, 3 palette | always |
//! | 4 | 1 | level: 0 leaf, 1..=3 inner | always |
//! | 5 | 1 | bits of an index: 1, 2, 4, 8, 16 | palette; else 0 |
//! | 6 | 2 | number of ranges, runs or owners, never 0 | always |
//!
//! then, by form (n is the number above):
//!
//! | form | offset | bytes | field |
//! |---|---|---|---|
//! | inner | 8 | 4 | default owner: of every child that no range holds |
//! | inner | 12 | … | n ranges of children, ascending, each `first u8, last u8, kind u8` and then: kind 1 uniform: `owner u32`; kind 2 pages: `{page id u64, crc32c u32}` for each child |
//! | runs | 8 | 4 | base owner: of every slot that no run holds |
//! | runs | 12 | 8 n | runs, ascending: `start u16, count u16, owner u32` |
//! | palette | 8 | 4 n | owners, in the order in which slots have them |
//! | palette | 8 + 4 n | 1024 width | index of each slot, the first in the lowest bits of the first byte |
//!
//! A page's checksum is not in it but in its parent, next to its id: so a page that is whole but not the one meant is found too.
//! The same content always gives the same bytes: ranges and runs are as long as possible, the default is the uniform owner of
//! most children, the base the owner with most runs, the smallest of equals; a leaf takes the shorter form, runs if equal.
//! A change of these choices is a new version, because evicted leaves are checked against the crc of the catalog's page.
//!
//! Versions: 1 is the first. A build reads its own version and older ones; a newer one is `PageVersion`.
use crate::cover::Cover;
use crate::leaf_body::{Body, LeafRun, Palette, Runs, SLOTS, index_width};
use crate::node::FANOUT;
use crate::{MapError, MapErrorCode, Result};
use std::collections::{BTreeMap, HashSet};

const MAGIC: u16 = 0x504d;
const VERSION: u8 = 1;
const FORM_INNER: u8 = 1;
const FORM_RUNS: u8 = 2;
const FORM_PALETTE: u8 = 3;
const RANGE_UNIFORM: u8 = 1;
const RANGE_PAGES: u8 = 2;

const VERSION_OFFSET: usize = size_of::<u16>();
const FORM_OFFSET: usize = VERSION_OFFSET + size_of::<u8>();
const LEVEL_OFFSET: usize = FORM_OFFSET + size_of::<u8>();
const WIDTH_OFFSET: usize = LEVEL_OFFSET + size_of::<u8>();
const COUNT_OFFSET: usize = WIDTH_OFFSET + size_of::<u8>();
const HEADER_BYTES: usize = COUNT_OFFSET + size_of::<u16>();
const OWNER_BYTES: usize = size_of::<u32>();
const RUN_BYTES: usize = 2 * size_of::<u16>() + OWNER_BYTES;

/// No page is longer: a palette of as many owners as slots.
pub(crate) const PAGE_BYTES_MAX: usize = HEADER_BYTES + SLOTS * OWNER_BYTES + SLOTS * size_of::<u16>();
/// Page ids are below this: a root word carries one beside its tag.
pub(crate) const PAGE_ID_LIMIT: u64 = 1 << 60;

const _: () = assert!(HEADER_BYTES == 8, "the table above says so");
const _: () = assert!(FANOUT == 256, "the number of a child is one byte");

/// A child as its parent's page has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PageWord {
    Uniform(u32),
    Page { id: u64, crc: u32 },
}

/// What a page holds.
pub(crate) enum Page {
    Inner(Box<[PageWord; FANOUT]>),
    Leaf(Body),
}

/// The page of a leaf.
pub(crate) fn encode_leaf(cover: &Cover) -> Vec<u8> {
    let base_index = cover.base_index();
    let listed_count = cover.runs.iter().filter(|run| run.index != base_index).count();
    let width = index_width(cover.owners.len());
    let runs_bytes = OWNER_BYTES + listed_count * RUN_BYTES;
    let palette_bytes = cover.owners.len() * OWNER_BYTES + SLOTS * width / 8;
    debug_assert!(cover.owners.len() > 1, "a uniform leaf is a word in its parent");
    if runs_bytes <= palette_bytes {
        let mut bytes = header(FORM_RUNS, 0, 0, listed_count, runs_bytes);
        bytes.extend(cover.owners[usize::from(base_index)].to_le_bytes());
        for run in cover.runs.iter().filter(|run| run.index != base_index) {
            bytes.extend(run.start.to_le_bytes());
            bytes.extend(run.count.to_le_bytes());
            bytes.extend(cover.owner(run).to_le_bytes());
        }
        return bytes;
    }
    let mut bytes = header(FORM_PALETTE, 0, width as u8, cover.owners.len(), palette_bytes);
    bytes.extend(cover.owners.iter().flat_map(|owner| owner.to_le_bytes()));
    let mut packed = 0_u64;
    let mut packed_bits = 0;
    for run in &cover.runs {
        for _ in 0..run.count {
            packed |= u64::from(run.index) << packed_bits;
            packed_bits += width;
            if packed_bits == u64::BITS as usize {
                bytes.extend(packed.to_le_bytes());
                (packed, packed_bits) = (0, 0);
            }
        }
    }
    bytes
}

/// The page of an inner node.
pub(crate) fn encode_inner(level: u8, words: &[PageWord; FANOUT]) -> Vec<u8> {
    let default_owner = default_owner(words);
    let mut bytes = header(FORM_INNER, level, 0, 0, 0);
    bytes.extend(default_owner.to_le_bytes());
    let mut range_count = 0_u16;
    let mut first = 0;
    while first < FANOUT {
        let length = words[first..].iter().take_while(|word| continues(&words[first], word)).count();
        let last = first + length - 1;
        match words[first] {
            PageWord::Uniform(owner) if owner == default_owner => {}
            PageWord::Uniform(owner) => {
                bytes.extend([first as u8, last as u8, RANGE_UNIFORM]);
                bytes.extend(owner.to_le_bytes());
                range_count += 1;
            }
            PageWord::Page { .. } => {
                bytes.extend([first as u8, last as u8, RANGE_PAGES]);
                for word in &words[first..=last] {
                    let PageWord::Page { id, crc } = word else { unreachable!("a range of pages holds pages") };
                    bytes.extend(id.to_le_bytes());
                    bytes.extend(crc.to_le_bytes());
                }
                range_count += 1;
            }
        }
        first = last + 1;
    }
    bytes[COUNT_OFFSET..HEADER_BYTES].copy_from_slice(&range_count.to_le_bytes());
    bytes
}

/// Reads a page that should be of this level. The caller has compared its crc with the parent's; the bytes are hostile all the same (I7).
/// Nothing is allocated before the page's length was found to be what its numbers say.
pub(crate) fn decode(page_id: u64, level: u8, bytes: &[u8]) -> Result<Page> {
    let decoder = Decoder { page_id, bytes };
    let header = decoder.header()?;
    if header.level != level {
        return Err(decoder.corrupt(format!("it is of level {}, its parent wants level {level}", header.level)));
    }
    match (header.form, level) {
        (FORM_INNER, 1..) => decoder.inner(&header).map(Page::Inner),
        (FORM_RUNS, 0) => decoder.runs(&header).map(|runs| Page::Leaf(Body::Runs(runs))),
        (FORM_PALETTE, 0) => decoder.palette(&header).map(|palette| Page::Leaf(Body::Palette(palette))),
        (form, level) => Err(decoder.corrupt(format!("form {form} at level {level}"))),
    }
}

/// As `decode`, for a page that must be a leaf.
pub(crate) fn decode_leaf(page_id: u64, bytes: &[u8]) -> Result<Body> {
    match decode(page_id, 0, bytes)? {
        Page::Leaf(body) => Ok(body),
        Page::Inner(_) => unreachable!("decode gives leaves at level 0"),
    }
}

/// A page whose bytes have another crc than its parent says is `PageCorrupt`.
pub(crate) fn check_crc(page_id: u64, bytes: &[u8], wanted_crc: u32) -> Result<()> {
    let crc = crc32c::crc32c(bytes);
    if crc != wanted_crc {
        let message = format!("its crc32c is {crc:08x}, its parent says {wanted_crc:08x}");
        return Err(MapError { code: MapErrorCode::PageCorrupt, page_id, message });
    }
    Ok(())
}

fn header(form: u8, level: u8, width: u8, count: usize, body_bytes: usize) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(HEADER_BYTES + body_bytes);
    bytes.extend(MAGIC.to_le_bytes());
    bytes.extend([VERSION, form, level, width]);
    bytes.extend((count as u16).to_le_bytes());
    bytes
}

fn continues(first: &PageWord, word: &PageWord) -> bool {
    match (first, word) {
        (PageWord::Uniform(first), PageWord::Uniform(owner)) => first == owner,
        (PageWord::Page { .. }, PageWord::Page { .. }) => true,
        _ => false,
    }
}

/// The uniform owner of most children, the smallest of equals; HOLE if none is uniform.
fn default_owner(words: &[PageWord; FANOUT]) -> u32 {
    let mut child_counts = BTreeMap::<u32, u32>::new();
    for word in words {
        if let PageWord::Uniform(owner) = word {
            *child_counts.entry(*owner).or_default() += 1;
        }
    }
    let most = child_counts.iter().max_by_key(|(owner, child_count)| (**child_count, std::cmp::Reverse(**owner)));
    most.map_or(crate::HOLE, |(owner, _)| *owner)
}

struct Header {
    form: u8,
    level: u8,
    width: u8,
    count: usize,
}

struct Decoder<'a> {
    page_id: u64,
    bytes: &'a [u8],
}

impl Decoder<'_> {
    fn corrupt(&self, message: impl Into<String>) -> MapError {
        MapError { code: MapErrorCode::PageCorrupt, page_id: self.page_id, message: message.into() }
    }

    fn take<const N: usize>(&self, offset: usize) -> Result<[u8; N]> {
        let field = self.bytes.get(offset..offset + N).and_then(|field| field.try_into().ok());
        field.ok_or_else(|| self.corrupt(format!("it ends at {} bytes, within a field at {offset}", self.bytes.len())))
    }

    fn u8(&self, offset: usize) -> Result<u8> {
        self.take::<1>(offset).map(|[byte]| byte)
    }

    fn u16(&self, offset: usize) -> Result<u16> {
        self.take(offset).map(u16::from_le_bytes)
    }

    fn u32(&self, offset: usize) -> Result<u32> {
        self.take(offset).map(u32::from_le_bytes)
    }

    fn header(&self) -> Result<Header> {
        if self.bytes.len() > PAGE_BYTES_MAX {
            return Err(self.corrupt(format!("{} bytes, more than the {PAGE_BYTES_MAX} of any page", self.bytes.len())));
        }
        let magic = self.u16(0)?;
        if magic != MAGIC {
            return Err(self.corrupt(format!("it starts with {magic:04x}, a page with {MAGIC:04x}")));
        }
        let version = self.u8(VERSION_OFFSET)?;
        if version > VERSION {
            let message =
                format!("it is of version {version}, this build knows up to {VERSION}: use the build that wrote it or a newer one");
            return Err(MapError { code: MapErrorCode::PageVersion, page_id: self.page_id, message });
        }
        if version == 0 {
            return Err(self.corrupt("version 0 does not exist"));
        }
        let header = Header {
            form: self.u8(FORM_OFFSET)?,
            level: self.u8(LEVEL_OFFSET)?,
            width: self.u8(WIDTH_OFFSET)?,
            count: usize::from(self.u16(COUNT_OFFSET)?),
        };
        if header.count == 0 {
            return Err(self.corrupt("it holds nothing"));
        }
        if header.form != FORM_PALETTE && header.width != 0 {
            return Err(self.corrupt(format!("an index width of {} where there are no indices", header.width)));
        }
        Ok(header)
    }

    fn expect_bytes(&self, wanted: usize) -> Result<()> {
        if self.bytes.len() != wanted {
            return Err(self.corrupt(format!("{} bytes where its numbers make {wanted}", self.bytes.len())));
        }
        Ok(())
    }

    fn inner(&self, header: &Header) -> Result<Box<[PageWord; FANOUT]>> {
        let default_owner = self.u32(HEADER_BYTES)?;
        let mut words = Box::new([PageWord::Uniform(default_owner); FANOUT]);
        let mut offset = HEADER_BYTES + OWNER_BYTES;
        let mut next_child = 0;
        for _ in 0..header.count {
            let [first, last, kind] = self.take(offset)?;
            let (first, last) = (usize::from(first), usize::from(last));
            offset += 3;
            if first < next_child || last < first {
                return Err(self.corrupt(format!("children {first}..={last} after {next_child}: not ascending")));
            }
            next_child = last + 1;
            match kind {
                RANGE_UNIFORM => {
                    words[first..=last].fill(PageWord::Uniform(self.u32(offset)?));
                    offset += OWNER_BYTES;
                }
                RANGE_PAGES => {
                    for word in &mut words[first..=last] {
                        let id = self.take(offset).map(u64::from_le_bytes)?;
                        let crc = self.u32(offset + size_of::<u64>())?;
                        if id == 0 || id >= PAGE_ID_LIMIT {
                            return Err(self.corrupt(format!("a child with the page id {id}")));
                        }
                        *word = PageWord::Page { id, crc };
                        offset += size_of::<u64>() + size_of::<u32>();
                    }
                }
                _ => return Err(self.corrupt(format!("a range of kind {kind}"))),
            }
        }
        self.expect_bytes(offset)?;
        let is_uniform = matches!(words[0], PageWord::Uniform(_)) && words.iter().all(|word| *word == words[0]);
        if is_uniform {
            return Err(self.corrupt("all children are one owner's: that is no page"));
        }
        Ok(words)
    }

    fn runs(&self, header: &Header) -> Result<Runs> {
        let runs_offset = HEADER_BYTES + OWNER_BYTES;
        self.expect_bytes(runs_offset + header.count * RUN_BYTES)?;
        let base = self.u32(HEADER_BYTES)?;
        let mut runs = Vec::with_capacity(header.count);
        let mut previous: Option<LeafRun> = None;
        for offset in (runs_offset..).step_by(RUN_BYTES).take(header.count) {
            let run = LeafRun {
                start: self.u16(offset)?,
                count: self.u16(offset + size_of::<u16>())?,
                owner: self.u32(offset + 2 * size_of::<u16>())?,
            };
            let end = usize::from(run.start) + usize::from(run.count);
            if run.count == 0 || end > SLOTS || usize::from(run.count) == SLOTS {
                return Err(self.corrupt(format!("a run of {} slots at {}", run.count, run.start)));
            }
            let previous_end = previous.map_or(0, |run| run.start + run.count);
            if run.start < previous_end {
                return Err(self.corrupt(format!("a run at {} after one up to {previous_end}: not ascending", run.start)));
            }
            let touches_its_like = previous.is_some_and(|previous| run.start == previous_end && run.owner == previous.owner);
            if run.owner == base || touches_its_like {
                return Err(self.corrupt(format!("the run at {} belongs to what lies beside it", run.start)));
            }
            previous = Some(run);
            runs.push(run);
        }
        Ok(Runs::new(base, runs.into_boxed_slice()))
    }

    fn palette(&self, header: &Header) -> Result<Palette> {
        let owner_count = header.count;
        let width = usize::from(header.width);
        if !(2..=SLOTS).contains(&owner_count) || width != index_width(owner_count) {
            return Err(self.corrupt(format!("{owner_count} owners with indices of {width} bits")));
        }
        let indices_offset = HEADER_BYTES + owner_count * OWNER_BYTES;
        self.expect_bytes(indices_offset + SLOTS * width / 8)?;
        let mut owners = Vec::with_capacity(owner_count);
        for offset in (HEADER_BYTES..indices_offset).step_by(OWNER_BYTES) {
            owners.push(self.u32(offset)?);
        }
        if owners.iter().collect::<HashSet<_>>().len() != owner_count {
            return Err(self.corrupt("an owner is listed twice"));
        }
        let palette = Palette::new(&owners);
        // Owners stand in the order in which slots have them: an index is at most one more than all before it.
        let mut seen_count = 0;
        let mask = (1_u64 << width) - 1;
        let slots_per_word = u64::BITS as usize / width;
        for (word_index, offset) in (indices_offset..self.bytes.len()).step_by(size_of::<u64>()).enumerate() {
            let word = self.take(offset).map(u64::from_le_bytes)?;
            let mut indices = (0..slots_per_word).map(|place| ((word >> (place * width)) & mask) as usize);
            if let Some(index) = indices.find(|&index| {
                let is_next = index == seen_count;
                seen_count += usize::from(is_next);
                index >= seen_count
            }) {
                return Err(self.corrupt(format!("index {index} where {seen_count} owners were seen")));
            }
            palette.set_words(word_index, word);
        }
        if seen_count != owner_count {
            return Err(self.corrupt(format!("{owner_count} owners are listed, slots have {seen_count}")));
        }
        Ok(palette)
    }
}

#[cfg(test)]
mod tests;
