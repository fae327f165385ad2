//! What the tests share: a catalog of pages in memory.
#![allow(dead_code, reason = "each test file takes its part")]
use atoll_map::{FrozenMap, MapCache, MapLoader, PageSet, Reach, Result, RootRef};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Pages as the catalog keeps them.
#[derive(Clone, Default)]
pub struct Catalog {
    pub pages: BTreeMap<u64, Vec<u8>>,
    pub next_page_id: u64,
}

impl Catalog {
    pub fn new() -> Catalog {
        Catalog { pages: BTreeMap::new(), next_page_id: 1 }
    }

    /// Puts the pages of a set in, without deleting what it replaces.
    pub fn insert(&mut self, set: &PageSet) {
        for page in &set.pages {
            assert!(page.id >= self.next_page_id, "page ids ascend");
            self.next_page_id = page.id + 1;
            assert!(self.pages.insert(page.id, page.bytes.clone()).is_none());
        }
    }

    /// Makes `frozen` durable in place of `durable` and deletes what it replaces.
    pub fn checkpoint(&mut self, frozen: &FrozenMap, durable: &FrozenMap) -> RootRef {
        let set = frozen.prepare(durable, self.next_page_id).unwrap();
        self.insert(&set);
        for page_id in &set.replaced {
            assert!(self.pages.remove(page_id).is_some(), "page {page_id} was not there to be replaced");
        }
        let root = set.root;
        set.commit();
        root
    }

    /// Builds the map of a root, a few pages at a time.
    pub fn load(&self, cache: &Arc<MapCache>, root: RootRef) -> Result<FrozenMap> {
        let mut loader = MapLoader::new(cache.clone(), root);
        loop {
            let missing = loader.missing(7);
            if missing.is_empty() {
                return loader.finish();
            }
            for page_id in missing {
                let Some(page) = self.pages.get(&page_id) else { return loader.finish() };
                loader.supply(page_id, page)?;
            }
        }
    }

    /// What some roots refer to; each with its size in slots. Returns how many pages were read too.
    pub fn reach(&self, roots: &[(RootRef, u64)]) -> (Reach, usize) {
        let mut reach = Reach::default();
        for &(root, slot_limit) in roots {
            reach.add_root(root, slot_limit).unwrap();
        }
        let read_count = self.supply_all(&mut reach);
        (reach, read_count)
    }

    /// Gives all pages that are asked for; returns how many.
    pub fn supply_all(&self, reach: &mut Reach) -> usize {
        let mut read_count = 0;
        loop {
            let pending = reach.pending(5);
            if pending.is_empty() {
                return read_count;
            }
            for page_id in pending {
                reach.supply(page_id, &self.pages[&page_id]).unwrap();
                read_count += 1;
            }
        }
    }
}

/// Lets the epoch pass until a condition holds: what was given up is dropped only when all threads have moved on.
pub fn let_epoch_pass_until(what: &str, mut holds: impl FnMut() -> bool) {
    let started = std::time::Instant::now();
    while !holds() {
        // Another test may be in the middle of a lookup for as long as the machine has no time for it.
        assert!(started.elapsed() < std::time::Duration::from_secs(300), "never came true: {what}");
        crossbeam_epoch::pin().flush();
        std::thread::yield_now();
    }
}

/// A small repeatable source of numbers (xorshift64*), so that a seed replays a run.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, limit: u64) -> u64 {
        (self.next() >> 11) % limit
    }
}
