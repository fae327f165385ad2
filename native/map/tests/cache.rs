//! Memory: nodes shared by page, eviction to the page file, what is counted.
mod common;

use atoll_map::{FrozenMap, LEAF_SLOTS, MAP_SLOTS, Map, MapCache, MapErrorCode, MapLoader, RootRef, Run};
use common::{Catalog, let_epoch_pass_until};
use std::sync::Arc;

/// A checkpointed map of `leaf_count` leaves with alternating owners.
fn alternating(cache: &Arc<MapCache>, leaf_count: u64) -> (Catalog, RootRef, FrozenMap) {
    let mut catalog = Catalog::new();
    let base = FrozenMap::uniform(cache.clone(), 1);
    let map = Map::from_frozen(&base);
    for slot in (0..leaf_count * LEAF_SLOTS).step_by(2) {
        map.set(slot, 1, 2).unwrap();
    }
    let frozen = map.freeze();
    let root = catalog.checkpoint(&frozen, &base);
    (catalog, root, frozen)
}

fn assert_alternating(frozen: &FrozenMap, leaf_count: u64) {
    let mut runs = Vec::new();
    frozen.lookup_runs(0, leaf_count * LEAF_SLOTS, &mut runs).unwrap();
    assert_eq!(runs.len() as u64, leaf_count * LEAF_SLOTS);
    assert!(runs.iter().zip(0..).all(|(run, slot)| *run == Run { start_slot: slot, slot_count: 1, owner: 2 - slot as u32 % 2 }));
}

#[test]
fn clean_leaves_are_evicted_until_the_bound_holds_and_come_back_when_looked_up() {
    let directory = tempfile::tempdir().unwrap();
    let cache = MapCache::new(Some(&directory.path().join("pages")), u64::MAX).unwrap();
    let (_, _, frozen) = alternating(&cache, 40);
    let all_bytes = cache.used_bytes();
    assert_eq!(cache.evict().unwrap(), 0, "below the bound nothing is evicted");
    cache.set_bound(all_bytes / 2);
    let freed_bytes = cache.evict().unwrap();
    assert_eq!(cache.used_bytes(), all_bytes - freed_bytes);
    assert!(cache.used_bytes() <= all_bytes / 2 && cache.used_bytes() > all_bytes / 2 - 4096, "evicts no more than it must");
    cache.set_bound(0);
    cache.evict().unwrap();
    assert!(frozen.memory_bytes() < all_bytes / 3);
    assert_alternating(&frozen, 40);
    assert_eq!(cache.used_bytes(), all_bytes, "what was looked up is in memory again");
    assert!(std::fs::read_dir(directory.path()).unwrap().next().is_none(), "the page file has no name");
}

#[test]
fn a_leaf_looked_up_between_two_rounds_of_the_clock_stays() {
    let directory = tempfile::tempdir().unwrap();
    let cache = MapCache::new(Some(&directory.path().join("pages")), 0).unwrap();
    let (_, _, frozen) = alternating(&cache, 8);
    cache.evict().unwrap();
    let evicted_bytes = cache.used_bytes();
    let mut runs = Vec::new();
    frozen.lookup_runs(0, 1, &mut runs).unwrap();
    let one_leaf_bytes = cache.used_bytes() - evicted_bytes;
    assert!(one_leaf_bytes >= 1024);
    // A bound that one more leaf breaks: of the two in memory the one not looked up again goes.
    frozen.lookup_runs(5 * LEAF_SLOTS, 1, &mut runs).unwrap();
    cache.set_bound(evicted_bytes + one_leaf_bytes);
    assert_eq!(cache.evict().unwrap(), one_leaf_bytes);
}

#[test]
fn a_walk_over_evicted_leaves_does_not_fill_the_cache() {
    let directory = tempfile::tempdir().unwrap();
    let cache = MapCache::new(Some(&directory.path().join("pages")), 0).unwrap();
    let (_, _, frozen) = alternating(&cache, 8);
    cache.evict().unwrap();
    let evicted_bytes = cache.used_bytes();
    assert_eq!(frozen.layers(8 * LEAF_SLOTS).unwrap(), [1, 2]);
    assert_eq!(frozen.owner_counts(8 * LEAF_SLOTS).unwrap(), [(1, 4 * LEAF_SLOTS), (2, 4 * LEAF_SLOTS)]);
    let mut run_count = 0;
    frozen.diff(&FrozenMap::uniform(cache.clone(), 1), MAP_SLOTS, &mut |_, _| run_count += 1).unwrap();
    assert_eq!(run_count, 8 * LEAF_SLOTS / 2);
    assert_eq!(cache.used_bytes(), evicted_bytes);
}

#[test]
fn dirty_leaves_are_never_evicted() {
    let directory = tempfile::tempdir().unwrap();
    let cache = MapCache::new(Some(&directory.path().join("pages")), 0).unwrap();
    let map = Map::from_frozen(&FrozenMap::uniform(cache.clone(), 1));
    (0..100).for_each(|leaf| map.set(leaf * LEAF_SLOTS + 5, 1, 2).unwrap());
    let frozen = map.freeze();
    assert_eq!(cache.evict().unwrap(), 0);
    assert_eq!(map.dirty_leaf_count(), 100);
    assert_eq!(frozen.owner_counts(100 * LEAF_SLOTS).unwrap()[1], (2, 100));
}

#[test]
fn without_a_page_file_nothing_is_evicted() {
    let cache = MapCache::new(None, 0).unwrap();
    let (_, _, frozen) = alternating(&cache, 4);
    assert_eq!(cache.evict().unwrap(), 0);
    assert_alternating(&frozen, 4);
}

#[test]
fn a_page_file_that_cannot_be_made_is_a_typed_error() {
    let error = MapCache::new(Some(std::path::Path::new("/nonexistent-atoll/pages")), 0).err().unwrap();
    assert_eq!(error.code, MapErrorCode::PageFile);
}

#[test]
fn maps_of_one_cache_share_the_nodes_of_their_pages() {
    let cache = MapCache::new(None, 0).unwrap();
    let (mut catalog, root, frozen) = alternating(&cache, 20);
    let used_bytes = cache.used_bytes();
    let mut again = catalog.load(&cache, root).unwrap();
    assert_eq!(cache.used_bytes(), used_bytes, "nothing was loaded");
    let map = Map::from_frozen(&again);
    map.set(3 * LEAF_SLOTS, 1, 9).unwrap();
    let changed = map.freeze();
    let set = changed.prepare(&again, catalog.next_page_id).unwrap();
    assert_eq!(set.pages.len(), 4, "one leaf and its path");
    catalog.insert(&set);
    let new_root = set.root;
    set.commit();
    // Another process's memory, then both maps in it: only four pages more.
    let other = MapCache::new(None, 0).unwrap();
    let first = catalog.load(&other, root).unwrap();
    let first_bytes = other.used_bytes();
    let second = catalog.load(&other, new_root).unwrap();
    assert!(other.used_bytes() - first_bytes < 10_000);
    let mut differences = Vec::new();
    second.diff(&first, MAP_SLOTS, &mut |run, old_owner| differences.push((run, old_owner))).unwrap();
    assert_eq!(differences, [(Run { start_slot: 3 * LEAF_SLOTS, slot_count: 1, owner: 9 }, 2)]);
    again = changed;
    drop((again, frozen));
}

#[test]
fn a_second_copy_of_a_page_that_goes_leaves_the_first_findable() {
    let (catalog, root, _) = alternating(&MapCache::new(None, 0).unwrap(), 3);
    let cache = MapCache::new(None, 0).unwrap();
    // Two loaders at once: both make the inner nodes, the first to finish makes them findable.
    let mut loaders = [MapLoader::new(cache.clone(), root), MapLoader::new(cache.clone(), root)];
    while !loaders[0].missing(1).is_empty() {
        for loader in &mut loaders {
            for page_id in loader.missing(10) {
                loader.supply(page_id, &catalog.pages[&page_id]).unwrap();
            }
        }
    }
    let [first, second] = loaders.map(|loader| loader.finish().unwrap());
    assert_alternating(&second, 3);
    drop(second);
    assert!(MapLoader::new(cache, root).missing(1).is_empty(), "the first copy is not found any more");
    assert_alternating(&first, 3);
}

#[test]
fn all_memory_is_given_back_when_the_maps_are_gone() {
    let directory = tempfile::tempdir().unwrap();
    let cache = MapCache::new(Some(&directory.path().join("pages")), 0).unwrap();
    {
        let (catalog, root, frozen) = alternating(&cache, 10);
        let map = Map::from_frozen(&frozen);
        map.set(5, 3 * LEAF_SLOTS, 4).unwrap();
        let kept = map.freeze();
        map.set(0, MAP_SLOTS, 8).unwrap();
        cache.evict().unwrap();
        assert_alternating(&catalog.load(&cache, root).unwrap(), 10);
        assert_eq!(kept.layers(MAP_SLOTS).unwrap(), [1, 2, 4]);
    }
    let_epoch_pass_until("no bytes are counted", || cache.used_bytes() == 0);
}

#[test]
fn dirty_leaves_are_counted_until_they_are_persisted_or_gone() {
    let cache = MapCache::new(None, 0).unwrap();
    let mut catalog = Catalog::new();
    let base = FrozenMap::uniform(cache, 1);
    let map = Map::from_frozen(&base);
    assert_eq!(map.dirty_leaf_count(), 0);
    map.set(5, 1, 2).unwrap();
    map.set(6, 1, 3).unwrap();
    map.set(LEAF_SLOTS, 2, 2).unwrap();
    assert_eq!(map.dirty_leaf_count(), 2);
    let frozen = map.freeze();
    map.set(7, 1, 3).unwrap();
    assert_eq!(map.dirty_leaf_count(), 3, "the frozen leaf and its copy");
    catalog.checkpoint(&frozen, &base);
    assert_eq!(map.dirty_leaf_count(), 1, "the copy");
    map.set(0, LEAF_SLOTS, 3).unwrap();
    let_epoch_pass_until("a leaf that became uniform is dirty no more", || map.dirty_leaf_count() == 0);
    let dropped = map.freeze();
    map.set(9, 1, 1).unwrap();
    let with_run = dropped.with_run(20, 1, 5).unwrap();
    assert_eq!(map.dirty_leaf_count(), 1, "leaves of another map are not ours");
    drop((dropped, with_run));
}
