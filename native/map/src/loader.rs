//! Builds a map from the pages of a catalog, asking only for pages that no open map has in memory.
use crate::checkpoint::parse_root;
use crate::codec::{Page, PageWord, check_crc, decode};
use crate::link::{Link, Node};
use crate::node::{Account, Inner, LOADED_GENERATION, Leaf, ROOT_LEVEL};
use crate::{FrozenMap, MapCache, MapError, MapErrorCode, Result, RootRef};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Loads one tree, level by level: `missing` -> fetch -> `supply`, until `missing` is empty; then `finish`.
pub struct MapLoader {
    cache: Arc<MapCache>,
    account: Arc<Account>,
    root: Arc<Link>,
    wanted: BTreeMap<u64, Wanted>,
    /// Inner nodes that this loader made. They become findable by others only when all below them is there.
    made: Vec<(u64, Arc<Inner>)>,
    /// What is wrong with the root itself.
    refused: Option<MapError>,
}

/// A page that was named and is not here yet.
struct Wanted {
    level: u8,
    crc: u32,
    places: Vec<Place>,
}

/// Where a node goes once it is here.
enum Place {
    Root,
    Child(Arc<Inner>, usize),
}

impl MapLoader {
    /// Starts at a root. A root word that is none is refused by `finish`.
    pub fn new(cache: Arc<MapCache>, root: RootRef) -> MapLoader {
        let mut loader = MapLoader {
            account: Account::new(cache.clone()),
            cache,
            root: Arc::new(Link::new(Node::Uniform(crate::HOLE))),
            wanted: BTreeMap::new(),
            made: Vec::new(),
            refused: None,
        };
        let placed = parse_root(root).and_then(|word| match word {
            PageWord::Uniform(owner) => {
                loader.place(&Place::Root, Node::Uniform(owner));
                Ok(())
            }
            PageWord::Page { id, crc } => loader.want(id, ROOT_LEVEL, crc, Place::Root),
        });
        loader.refused = placed.err();
        loader
    }

    /// Page ids needed next, ascending, at most `limit`; empty when the tree is complete.
    pub fn missing(&self, limit: usize) -> Vec<u64> {
        self.wanted.keys().take(limit).copied().collect()
    }

    /// Gives one page. Its crc must be what its parent says. The bytes are hostile (I7). A page that is not missing is ignored.
    /// After an error the page is still missing: another copy of it may be given.
    pub fn supply(&mut self, page_id: u64, bytes: &[u8]) -> Result<()> {
        let Some(wanted) = self.wanted.get(&page_id) else { return Ok(()) };
        let Wanted { level, crc, .. } = *wanted;
        check_crc(page_id, bytes, crc)?;
        let node = match decode(page_id, level, bytes)? {
            Page::Leaf(body) => self.leaf(page_id, crc, body),
            Page::Inner(words) => {
                let node = Inner::new(&self.account, LOADED_GENERATION, level, page_id, crc, |index| match words[index] {
                    PageWord::Uniform(owner) => Node::Uniform(owner),
                    PageWord::Page { .. } => Node::Uniform(crate::HOLE),
                });
                for (index, word) in words.iter().enumerate() {
                    if let PageWord::Page { id, crc } = *word {
                        self.want(id, level - 1, crc, Place::Child(node.clone(), index))?;
                    }
                }
                self.made.push((page_id, node.clone()));
                Node::Inner(node)
            }
        };
        let wanted = self.wanted.remove(&page_id).expect("it was wanted above; its children are of lower levels");
        for place in &wanted.places {
            self.place(place, node.clone());
        }
        Ok(())
    }

    /// The map. `PageMissing` if something is still missing.
    pub fn finish(self) -> Result<FrozenMap> {
        if let Some(error) = self.refused {
            return Err(error);
        }
        if let Some((&page_id, wanted)) = self.wanted.first_key_value() {
            let message = format!("the page (level {}) was not supplied; {} pages are missing", wanted.level, self.wanted.len());
            return Err(MapError { code: MapErrorCode::PageMissing, page_id, message });
        }
        for (page_id, node) in self.made {
            self.cache.register(page_id, &Node::Inner(node));
        }
        let root = Link::new(self.root.node(&crossbeam_epoch::pin()));
        Ok(FrozenMap { root, cache: self.cache })
    }

    /// A leaf is complete by itself: findable, and evictable, at once.
    fn leaf(&self, page_id: u64, crc: u32, body: crate::leaf_body::Body) -> Node {
        if let Some(Node::Leaf(leaf)) = self.cache.find(page_id)
            && leaf.page() == Some((page_id, crc))
        {
            // Another loader was faster.
            return Node::Leaf(leaf);
        }
        let leaf = Node::Leaf(Leaf::new(&self.account, LOADED_GENERATION, page_id, crc, body));
        self.cache.register(page_id, &leaf);
        leaf
    }

    /// Puts the node of a page in its place now if some map has it in memory, else when it is supplied.
    fn want(&mut self, page_id: u64, level: u8, crc: u32, place: Place) -> Result<()> {
        let corrupt = |message: String| MapError { code: MapErrorCode::PageCorrupt, page_id, message };
        if let Some(node) = self.cache.find(page_id) {
            let (found_level, page) = match &node {
                Node::Inner(inner) => (inner.level, inner.page()),
                Node::Leaf(leaf) => (0, leaf.page()),
                Node::Uniform(_) => unreachable!("only pages are findable"),
            };
            if (found_level, page) != (level, Some((page_id, crc))) {
                return Err(corrupt(format!(
                    "it is in memory with level {found_level} and {page:08x?}, a parent wants level {level} and crc {crc:08x}"
                )));
            }
            self.place(&place, node);
            return Ok(());
        }
        let wanted = self.wanted.entry(page_id).or_insert_with(|| Wanted { level, crc, places: Vec::new() });
        if (wanted.level, wanted.crc) != (level, crc) {
            return Err(corrupt(format!(
                "one parent wants level {} and crc {:08x}, another level {level} and crc {crc:08x}",
                wanted.level, wanted.crc
            )));
        }
        wanted.places.push(place);
        Ok(())
    }

    fn place(&self, place: &Place, node: Node) {
        let guard = crossbeam_epoch::pin();
        match place {
            Place::Root => self.root.replace(node, &guard),
            Place::Child(parent, index) => parent.children[*index].replace(node, &guard),
        }
    }
}
