//! Memory of all maps of an engine: nodes shared by page id, a bound, and the local page file that clean leaves are evicted to.
//!
//! Locks: a shard of the table is locked for a moment and nothing else is called meanwhile; in particular no node is dropped (its
//! drop locks the shard of its page) and no epoch is pinned (that may run drops). Lookups take none of these locks unless they
//! find an evicted leaf.
use crate::link::Node;
use crate::node::{Inner, Leaf};
use crate::page_file::PageFile;
use parking_lot::Mutex;
use std::collections::HashMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Weak};

/// Parts of the table, so that checkpoints, loads and drops of several volumes do not wait for each other.
const SHARD_COUNT: usize = 64;
/// Bytes that the table takes for a page, about.
const TABLE_ENTRY_BYTES: u64 = 40;

/// One per engine. Nodes of persisted pages are shared between all maps that reach them (weakly, by page id).
pub struct MapCache {
    bound_bytes: AtomicU64,
    used_bytes: AtomicU64,
    shards: Box<[Mutex<HashMap<u64, WeakNode>>]>,
    /// One of these is held while an evicted body is read back, so that it is read once.
    load_locks: Box<[Mutex<()>]>,
    /// The shard that the clock visits next; held by the one evictor.
    clock_hand: Mutex<usize>,
    page_file: Option<PageFile>,
}

enum WeakNode {
    Inner(Weak<Inner>),
    Leaf(Weak<Leaf>),
}

impl WeakNode {
    fn upgrade(&self) -> Option<Node> {
        match self {
            WeakNode::Inner(inner) => inner.upgrade().map(Node::Inner),
            WeakNode::Leaf(leaf) => leaf.upgrade().map(Node::Leaf),
        }
    }
}

impl MapCache {
    /// `page_file`: made anew (its content means nothing after a restart); `None`: never evict.
    pub fn new(page_file: Option<&Path>, bound_bytes: u64) -> crate::Result<Arc<MapCache>> {
        Ok(Arc::new(MapCache {
            bound_bytes: AtomicU64::new(bound_bytes),
            used_bytes: AtomicU64::new(0),
            shards: (0..SHARD_COUNT).map(|_| Mutex::default()).collect(),
            load_locks: (0..SHARD_COUNT).map(|_| Mutex::default()).collect(),
            clock_hand: Mutex::new(0),
            page_file: page_file.map(PageFile::create).transpose()?,
        }))
    }

    /// Changes the bound (128 MiB per TiB open by default; the engine sets it as devices come and go).
    pub fn set_bound(&self, bound_bytes: u64) {
        self.bound_bytes.store(bound_bytes, Ordering::Relaxed);
    }

    /// Bytes of leaves and inner nodes in memory, with what the allocator and the table of pages add.
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Evicts clean leaves not used lately until the bound holds; called by a background thread, never by a request. Returns bytes freed.
    /// The bound may stay broken when what is left is dirty, in use all the time, or inner nodes. An error (`PageFile`) leaves
    /// every leaf readable.
    pub fn evict(&self) -> crate::Result<u64> {
        let mut clock_hand = self.clock_hand.lock();
        let mut freed_bytes = 0;
        // The first round takes the marks of use away, the second evicts what was not used meanwhile.
        for _ in 0..2 * SHARD_COUNT {
            if self.page_file.is_none() || self.is_within_bound() {
                break;
            }
            let leaves: Vec<Weak<Leaf>> = {
                let shard = self.shards[*clock_hand].lock();
                let leaves = shard.values().filter_map(|node| match node {
                    WeakNode::Leaf(leaf) => Some(leaf.clone()),
                    WeakNode::Inner(_) => None,
                });
                leaves.collect()
            };
            *clock_hand = (*clock_hand + 1) % SHARD_COUNT;
            let guard = crossbeam_epoch::pin();
            for leaf in leaves.iter().filter_map(Weak::upgrade) {
                if self.is_within_bound() {
                    break;
                }
                freed_bytes += leaf.evict(&guard)?;
            }
            guard.flush();
        }
        Ok(freed_bytes)
    }

    fn is_within_bound(&self) -> bool {
        self.used_bytes() <= self.bound_bytes.load(Ordering::Relaxed)
    }

    pub(crate) fn add_bytes(&self, bytes: u64) {
        self.used_bytes.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn remove_bytes(&self, bytes: u64) {
        self.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(crate) fn page_file(&self) -> Option<&PageFile> {
        self.page_file.as_ref()
    }

    pub(crate) fn load_lock(&self, page_id: u64) -> &Mutex<()> {
        &self.load_locks[shard_index(page_id)]
    }

    /// The node of a page, if some map has it in memory, with everything below it.
    pub(crate) fn find(&self, page_id: u64) -> Option<Node> {
        self.shards[shard_index(page_id)].lock().get(&page_id).and_then(WeakNode::upgrade)
    }

    /// Makes a persisted node findable, unless another node of the same page is. Everything below it must be complete.
    pub(crate) fn register(&self, page_id: u64, node: &Node) {
        let weak = match node {
            Node::Uniform(_) => return,
            Node::Inner(inner) => WeakNode::Inner(Arc::downgrade(inner)),
            Node::Leaf(leaf) => WeakNode::Leaf(Arc::downgrade(leaf)),
        };
        // Whatever is taken out or found is dropped after the shard is unlocked (see the head of this file).
        let (_found, _replaced) = {
            let mut shard = self.shards[shard_index(page_id)].lock();
            match shard.get(&page_id).and_then(WeakNode::upgrade) {
                Some(found) => (Some(found), None),
                None => {
                    let replaced = shard.insert(page_id, weak);
                    if replaced.is_none() {
                        self.add_bytes(TABLE_ENTRY_BYTES);
                    }
                    (None, replaced)
                }
            }
        };
    }

    /// The node is being dropped; 0: it never had a page.
    pub(crate) fn forget_inner(&self, page_id: u64, dropped: &Inner) {
        self.forget(page_id, |node| matches!(node, WeakNode::Inner(inner) if std::ptr::eq(inner.as_ptr(), dropped)));
    }

    /// The node is being dropped; 0: it never had a page.
    pub(crate) fn forget_leaf(&self, page_id: u64, dropped: &Leaf) {
        self.forget(page_id, |node| matches!(node, WeakNode::Leaf(leaf) if std::ptr::eq(leaf.as_ptr(), dropped)));
    }

    /// Takes the entry out if it is the dropped node's own: another node of the page may have taken its place.
    fn forget(&self, page_id: u64, is_own: impl Fn(&WeakNode) -> bool) {
        if page_id == 0 {
            return;
        }
        let mut shard = self.shards[shard_index(page_id)].lock();
        if shard.get(&page_id).is_some_and(is_own) {
            shard.remove(&page_id);
            self.remove_bytes(TABLE_ENTRY_BYTES);
        }
    }
}

fn shard_index(page_id: u64) -> usize {
    page_id as usize % SHARD_COUNT
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{FrozenMap, LEAF_SLOTS, Map, MapErrorCode};

    /// A durable map of `leaf_count` leaves, in each of which slots 5 and 6 have owner 2, the others 1.
    fn durable_map(cache: &Arc<MapCache>, leaf_count: u64) -> FrozenMap {
        let base = FrozenMap::uniform(cache.clone(), 1);
        let map = Map::from_frozen(&base);
        (0..leaf_count).for_each(|leaf| map.set(leaf * LEAF_SLOTS + 5, 2, 2).unwrap());
        let frozen = map.freeze();
        frozen.prepare(&base, 100).unwrap().commit();
        frozen
    }

    #[test]
    fn an_evicted_leaf_that_reads_back_wrong_is_an_error_naming_the_page_and_changes_nothing() {
        let directory = tempfile::tempdir().unwrap();
        let cache = MapCache::new(Some(&directory.path().join("pages")), 0).unwrap();
        let durable = durable_map(&cache, 4);
        let map = Map::from_frozen(&durable);
        // The first leaf becomes the map's own and stays in memory, the others go.
        map.set(9, 1, 3).unwrap();
        cache.evict().unwrap();
        cache.page_file().unwrap().damage();
        let before = map.freeze();
        let mut emitted_count = 0;
        for (start, end) in [(5, LEAF_SLOTS + 100), (LEAF_SLOTS + 5, 3 * LEAF_SLOTS), (5, 3 * LEAF_SLOTS + 2)] {
            // There and back, so that the path is the map's own again after the freeze and would be changed in place.
            map.set(10, 1, 3).unwrap();
            map.set(10, 1, 1).unwrap();
            let error = map.set(start, end - start, 7).unwrap_err();
            assert_eq!(error.code, MapErrorCode::PageFile);
            assert!((100..110).contains(&error.page_id), "{error}");
            map.freeze().diff(&before, crate::MAP_SLOTS, &mut |_, _| emitted_count += 1).unwrap();
        }
        assert_eq!(emitted_count, 0, "a set that failed changed something");
        assert_eq!(map.lookup(LEAF_SLOTS).unwrap_err().code, MapErrorCode::PageFile);
        assert_eq!(map.lookup(9).unwrap(), 3, "what is in memory is still there");
        assert!(map.freeze().layers(crate::MAP_SLOTS).is_err());
        map.set(0, 4 * LEAF_SLOTS, 7).unwrap();
        assert!(map.is_owned(0, 4 * LEAF_SLOTS, 7).unwrap(), "whole leaves need not be read");
    }

    #[test]
    fn a_leaf_evicted_again_is_not_written_again_and_its_place_is_used_again_when_it_is_gone() {
        let directory = tempfile::tempdir().unwrap();
        let cache = MapCache::new(Some(&directory.path().join("pages")), 0).unwrap();
        let file = cache.page_file().unwrap();
        let durable = durable_map(&cache, 50);
        cache.evict().unwrap();
        let end_bytes = file.end_bytes();
        assert!(end_bytes > 0);
        for _ in 0..3 {
            let mut runs = Vec::new();
            durable.lookup_runs(0, 50 * LEAF_SLOTS, &mut runs).unwrap();
            assert!(cache.evict().unwrap() > 0);
            assert_eq!(file.end_bytes(), end_bytes);
        }
        drop(durable);
        let durable = durable_map(&cache, 50);
        cache.evict().unwrap();
        assert_eq!(file.end_bytes(), end_bytes);
        drop(durable);
        assert!(cache.shards.iter().all(|shard| shard.lock().is_empty()), "pages of dropped nodes are forgotten");
    }
}
