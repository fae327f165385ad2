//! Checkpoints: the pages that make a frozen map durable, and what they replace.
//!
//! A node is persisted only with everything below it (`PageSet::commit` marks them together, a loader completes a tree before
//! anybody sees it), so a walk for what is new stops at the first persisted node.
use crate::codec::{PAGE_ID_LIMIT, PageWord, encode_inner, encode_leaf};
use crate::diff::{Difference, compare};
use crate::link::{Child, Link, Node};
use crate::node::FANOUT;
use crate::{FrozenMap, HOLE, MAP_SLOTS, MapCache, Result, RootRef, Run};
use crossbeam_epoch::Guard;
use std::sync::Arc;

/// A page that a checkpoint makes.
#[derive(Debug, Clone)]
pub struct NewPage {
    /// Given by `prepare`, ascending; children come before their parents.
    pub id: u64,
    /// 0 leaf, 1..=3 inner.
    pub level: u8,
    /// The encoded page.
    pub bytes: Vec<u8>,
}

/// The difference between a durable map and the one that replaces it, ready for the catalog.
pub struct PageSet {
    /// Pages to insert.
    pub pages: Vec<NewPage>,
    /// Ids of pages of the old map that the new one no longer has.
    pub replaced: Vec<u64>,
    /// Runs that had another owner in the old map (`owner` is the OLD owner, never HOLE): space that may become free.
    pub displaced: Vec<Run>,
    /// The new root.
    pub root: RootRef,
    cache: Arc<MapCache>,
    nodes: Vec<NewNode>,
}

/// A node that `commit` marks as persisted.
struct NewNode {
    node: Node,
    page_id: u64,
    crc: u32,
}

impl FrozenMap {
    /// Numbers and encodes the pages of this map that are not persisted, ids from `first_page_id` (at least 1) on, and compares
    /// with `durable` (pruned by identity). Changes nothing until `PageSet::commit`; one PageSet of a device at a time.
    /// `PageFile` if an evicted leaf of `durable` cannot be read back.
    pub fn prepare(&self, durable: &FrozenMap, first_page_id: u64) -> Result<PageSet> {
        assert!((1..PAGE_ID_LIMIT).contains(&first_page_id), "page ids start at 1, not {first_page_id}");
        let mut numbering = Numbering { next_page_id: first_page_id, pages: Vec::new(), nodes: Vec::new() };
        let root = root_ref(numbering.number(&self.root, &crossbeam_epoch::pin())?);
        let mut replaced = Vec::new();
        let mut displaced = Vec::<Run>::new();
        compare(&self.root, &durable.root, MAP_SLOTS, &mut |difference| match difference {
            Difference::OldPage { page_id } => replaced.push(page_id),
            Difference::Owner { old_owner: HOLE, .. } => {}
            Difference::Owner { start_slot, slot_count, old_owner, .. } => match displaced.last_mut() {
                Some(last) if last.start_slot + last.slot_count == start_slot && last.owner == old_owner => {
                    last.slot_count += slot_count;
                }
                _ => displaced.push(Run { start_slot, slot_count, owner: old_owner }),
            },
        })?;
        Ok(PageSet { pages: numbering.pages, replaced, displaced, root, cache: self.cache.clone(), nodes: numbering.nodes })
    }
}

impl PageSet {
    /// The catalog has them: marks the nodes as persisted under their ids. Dropping a PageSet without this is the abort.
    pub fn commit(self) {
        for NewNode { node, page_id, crc } in &self.nodes {
            let is_first = match node {
                Node::Uniform(_) => false,
                Node::Inner(inner) => inner.persist(*page_id, *crc),
                Node::Leaf(leaf) => leaf.persist(*page_id, *crc),
            };
            debug_assert!(is_first, "page {page_id}: two sets of one device persist the same node");
            if is_first {
                self.cache.register(*page_id, node);
            }
        }
    }
}

/// The root as the catalog stores it; `None` while its page is not persisted.
pub(crate) fn persisted_root(root: &Link, guard: &Guard) -> Option<RootRef> {
    let page = match root.load(guard) {
        Child::Uniform(owner) => return Some(root_ref(PageWord::Uniform(owner))),
        Child::Inner(inner) => inner.page(),
        Child::Leaf(leaf) => leaf.page(),
    };
    page.map(|(id, crc)| root_ref(PageWord::Page { id, crc }))
}

const ROOT_TAG_SHIFT: u32 = 60;
const ROOT_TAG_UNIFORM: u64 = 1;
const ROOT_TAG_PAGE: u64 = 2;

const _: () = assert!(PAGE_ID_LIMIT == 1 << ROOT_TAG_SHIFT, "a page id and the tag share the root word");

fn root_ref(word: PageWord) -> RootRef {
    match word {
        PageWord::Uniform(HOLE) => RootRef::default(),
        PageWord::Uniform(owner) => RootRef { word: (ROOT_TAG_UNIFORM << ROOT_TAG_SHIFT) | u64::from(owner), crc: 0 },
        PageWord::Page { id, crc } => RootRef { word: (ROOT_TAG_PAGE << ROOT_TAG_SHIFT) | id, crc },
    }
}

/// Takes a root of the catalog apart; `PageCorrupt` if it is none. The word is hostile (I7).
pub(crate) fn parse_root(root: RootRef) -> Result<PageWord> {
    let value = root.word & (PAGE_ID_LIMIT - 1);
    let word = match root.word >> ROOT_TAG_SHIFT {
        0 if value == 0 => Some(PageWord::Uniform(HOLE)),
        ROOT_TAG_UNIFORM => u32::try_from(value).ok().filter(|&owner| owner != HOLE).map(PageWord::Uniform),
        ROOT_TAG_PAGE if value != 0 => Some(PageWord::Page { id: value, crc: root.crc }),
        _ => None,
    };
    word.ok_or_else(|| crate::MapError {
        code: crate::MapErrorCode::PageCorrupt,
        page_id: 0,
        message: format!("{:016x} is not the root of a map", root.word),
    })
}

struct Numbering {
    next_page_id: u64,
    pages: Vec<NewPage>,
    nodes: Vec<NewNode>,
}

impl Numbering {
    /// The word of a child in its parent's page; children before parents.
    fn number(&mut self, link: &Link, guard: &Guard) -> Result<PageWord> {
        let (level, bytes) = match link.load(guard) {
            Child::Uniform(owner) => return Ok(PageWord::Uniform(owner)),
            Child::Inner(inner) => {
                if let Some((id, crc)) = inner.page() {
                    return Ok(PageWord::Page { id, crc });
                }
                let mut words = [PageWord::Uniform(HOLE); FANOUT];
                for (word, child) in words.iter_mut().zip(&inner.children) {
                    *word = self.number(child, guard)?;
                }
                (inner.level, encode_inner(inner.level, &words))
            }
            Child::Leaf(leaf) => {
                if let Some((id, crc)) = leaf.page() {
                    return Ok(PageWord::Page { id, crc });
                }
                (0, encode_leaf(&leaf.view(guard)?.cover()))
            }
        };
        let id = self.next_page_id;
        self.next_page_id += 1;
        let crc = crc32c::crc32c(&bytes);
        self.nodes.push(NewNode { node: link.node(guard), page_id: id, crc });
        self.pages.push(NewPage { id, level, bytes });
        Ok(PageWord::Page { id, crc })
    }
}
