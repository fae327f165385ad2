//! Pages as an attacker or a rotten disk would have them, through the loader: an error naming the page, bounded memory, no panic.
mod common;

use atoll_map::{FrozenMap, LEAF_SLOTS, MAP_SLOTS, Map, MapCache, MapErrorCode, MapLoader, Reach, Result, RootRef};
use common::{Catalog, Numbers};
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;

/// Counts what this thread asks for.
struct Counting;

thread_local! {
    static REQUESTED_BYTES: Cell<usize> = const { Cell::new(0) };
}

// SAFETY: everything is handed to the system allocator as it came.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // A thread that is going away has no counter any more; nobody asks for it then.
        let _ = REQUESTED_BYTES.try_with(|bytes| bytes.set(bytes.get() + layout.size()));
        // SAFETY: the caller keeps the rules of `alloc`.
        unsafe { System.alloc(layout) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        // SAFETY: the pointer came from `alloc` above.
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

/// What reading one page may ask for, its error message included.
const READ_BYTES_MAX: usize = 1 << 20;

fn root_of(page_id: u64, bytes: &[u8]) -> RootRef {
    RootRef { word: (2 << 60) | page_id, crc: crc32c::crc32c(bytes) }
}

fn inner_page(level: u8, child: u64, child_bytes: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0x4d, 0x50, 1, 1, level, 0, 1, 0, 0, 0, 0, 0, 0, 0, 2];
    bytes.extend(child.to_le_bytes());
    bytes.extend(crc32c::crc32c(child_bytes).to_le_bytes());
    bytes
}

/// A tree whose pages 1 to 4 are root, level 2, level 1 and this leaf, with crcs that fit.
fn tree_over(leaf: &[u8]) -> (RootRef, BTreeMap<u64, Vec<u8>>) {
    let level_1 = inner_page(1, 4, leaf);
    let level_2 = inner_page(2, 3, &level_1);
    let root = inner_page(3, 2, &level_2);
    (root_of(1, &root), BTreeMap::from([(1, root), (2, level_2), (3, level_1), (4, leaf.to_vec())]))
}

fn load(root: RootRef, pages: &BTreeMap<u64, Vec<u8>>) -> Result<FrozenMap> {
    let catalog = Catalog { pages: pages.clone(), next_page_id: 0 };
    catalog.load(&MapCache::new(None, 0)?, root)
}

fn sample_leaf(owner_count: u64) -> Vec<u8> {
    let empty = FrozenMap::uniform(MapCache::new(None, 0).unwrap(), 0);
    let map = Map::from_frozen(&empty);
    (0..LEAF_SLOTS).for_each(|slot| map.set(slot, 1, (slot * 7 % owner_count) as u32).unwrap());
    map.set(5, 1, 9).unwrap();
    map.freeze().prepare(&empty, 1).unwrap().pages[0].bytes.clone()
}

#[test]
fn a_leaf_whose_bytes_changed_with_its_crc_costs_bounded_memory_and_no_panic() {
    for owner_count in [1, 2, 200, 8191] {
        let leaf = sample_leaf(owner_count);
        let (root, pages) = tree_over(&leaf);
        load(root, &pages).unwrap();
        for offset in (0..leaf.len()).filter(|offset| *offset < 64 || offset % 499 == 0) {
            for mask in [1, 0x80, 0xff] {
                let mut changed = leaf.clone();
                changed[offset] ^= mask;
                assert_bounded(&changed);
            }
        }
        for length in [0, 1, 7, 8, 11, 12, leaf.len() - 1] {
            assert_bounded(&leaf[..length]);
        }
    }
}

fn assert_bounded(leaf: &[u8]) {
    let (root, pages) = tree_over(leaf);
    let mut loader = MapLoader::new(MapCache::new(None, 0).unwrap(), root);
    let mut reach = Reach::default();
    reach.add_root(root, MAP_SLOTS).unwrap();
    for page_id in 1..=3 {
        loader.supply(page_id, &pages[&page_id]).unwrap();
        reach.supply(page_id, &pages[&page_id]).unwrap();
    }
    let before = REQUESTED_BYTES.get();
    let supplied = loader.supply(4, leaf);
    let requested = REQUESTED_BYTES.get() - before;
    assert!(requested < READ_BYTES_MAX, "{requested} bytes for a page of {}", leaf.len());
    assert_eq!(reach.supply(4, leaf).is_ok(), supplied.is_ok());
    match supplied {
        Err(error) => assert_eq!(error.page_id, 4),
        Ok(()) => {
            let frozen = loader.finish().unwrap();
            let counted: u64 = frozen.owner_counts(MAP_SLOTS).unwrap().iter().map(|(_, slot_count)| slot_count).sum();
            assert!(counted <= LEAF_SLOTS);
        }
    }
}

#[test]
fn every_changed_byte_of_every_page_of_a_tree_is_an_error_naming_the_page() {
    let mut catalog = Catalog::new();
    let empty = FrozenMap::uniform(MapCache::new(None, 0).unwrap(), 1);
    let map = Map::from_frozen(&empty);
    for slot in [3, 9000, 70_000, 300 * LEAF_SLOTS, 70_000 * LEAF_SLOTS] {
        map.set(slot, 17, 2).unwrap();
    }
    (0..500).for_each(|slot| map.set(slot * 2, 1, 3).unwrap());
    let root = catalog.checkpoint(&map.freeze(), &empty);
    let mut flips = 0;
    for (page_id, page) in catalog.pages.clone() {
        for offset in 0..page.len() {
            catalog.pages.get_mut(&page_id).unwrap()[offset] ^= 0x40;
            let error = catalog.load(&MapCache::new(None, 0).unwrap(), root).err().expect("a changed byte was accepted");
            assert_eq!((error.code, error.page_id), (MapErrorCode::PageCorrupt, page_id));
            catalog.pages.get_mut(&page_id).unwrap()[offset] ^= 0x40;
            flips += 1;
        }
        catalog.pages.insert(page_id, page[..page.len() - 1].to_vec());
        assert_eq!(catalog.load(&MapCache::new(None, 0).unwrap(), root).err().unwrap().page_id, page_id);
        catalog.pages.insert(page_id, page);
    }
    assert!(flips > 1000);
    catalog.load(&MapCache::new(None, 0).unwrap(), root).unwrap();
}

#[test]
fn a_page_that_is_its_own_descendant_is_refused() {
    let leaf = sample_leaf(2);
    let (_, mut pages) = tree_over(&leaf);
    // The level 1 page names page 2, which is of level 2: whatever its crc, it is no leaf.
    let level_2 = pages[&2].clone();
    pages.insert(3, inner_page(1, 2, &level_2));
    pages.insert(2, inner_page(2, 3, &pages[&3]));
    pages.insert(1, inner_page(3, 2, &pages[&2]));
    let error = load(root_of(1, &pages[&1]), &pages).err().unwrap();
    assert_eq!(error.code, MapErrorCode::PageCorrupt);
}

#[test]
fn parents_that_disagree_about_a_page_are_refused() {
    let leaf = sample_leaf(2);
    let mut level_1 = inner_page(1, 4, &leaf);
    // A second range: child 9 is the same page with another crc.
    level_1[6] = 2;
    level_1.extend([9, 9, 2]);
    level_1.extend(4_u64.to_le_bytes());
    level_1.extend([1, 2, 3, 4]);
    let level_2 = inner_page(2, 3, &level_1);
    let root = inner_page(3, 2, &level_2);
    let pages = BTreeMap::from([(1, root.clone()), (2, level_2), (3, level_1), (4, leaf)]);
    let error = load(root_of(1, &root), &pages).err().unwrap();
    assert_eq!((error.code, error.page_id), (MapErrorCode::PageCorrupt, 4));
}

#[test]
fn a_page_in_memory_is_not_taken_for_one_with_another_crc_or_level() {
    let leaf = sample_leaf(2);
    let (root, pages) = tree_over(&leaf);
    let cache = MapCache::new(None, 0).unwrap();
    let kept = Catalog { pages: pages.clone(), next_page_id: 0 }.load(&cache, root).unwrap();
    let forged = [RootRef { crc: root.crc ^ 1, ..root }, RootRef { word: (2 << 60) | 3, crc: crc32c::crc32c(&pages[&3]) }];
    for root in forged {
        let loader = MapLoader::new(cache.clone(), root);
        assert!(loader.missing(1).is_empty());
        assert_eq!(loader.finish().err().unwrap().code, MapErrorCode::PageCorrupt);
    }
    drop(kept);
}

#[test]
fn a_root_word_that_is_none_is_refused_and_a_missing_page_is_named() {
    let cache = MapCache::new(None, 0).unwrap();
    for word in [7, 3 << 60, 2 << 60, 1 << 60, (1 << 60) | (1 << 32)] {
        let loader = MapLoader::new(cache.clone(), RootRef { word, crc: 0 });
        assert!(loader.missing(10).is_empty());
        assert_eq!(loader.finish().err().unwrap().code, MapErrorCode::PageCorrupt);
    }
    let (root, mut pages) = tree_over(&sample_leaf(2));
    pages.remove(&3);
    let error = load(root, &pages).err().unwrap();
    assert_eq!((error.code, error.page_id), (MapErrorCode::PageMissing, 3));
}

#[test]
fn random_bytes_are_refused_at_every_level() {
    let mut numbers = Numbers(7);
    for _ in 0..2000 {
        let length = numbers.below(300) as usize;
        let mut bytes: Vec<u8> = (0..length).map(|_| numbers.next() as u8).collect();
        if length > 6 {
            bytes[..5].copy_from_slice(&[0x4d, 0x50, 1, 1, 3]);
            bytes[5] = 0;
        }
        let mut loader = MapLoader::new(MapCache::new(None, 0).unwrap(), root_of(1, &bytes));
        let before = REQUESTED_BYTES.get();
        let _ = loader.supply(1, &bytes);
        assert!(REQUESTED_BYTES.get() - before < READ_BYTES_MAX);
    }
}
