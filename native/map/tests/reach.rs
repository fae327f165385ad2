//! What roots refer to: layers, slots and pages, over several roots that share pages.
mod common;

use atoll_map::{FrozenMap, LEAF_SLOTS, MAP_SLOTS, Map, MapCache, MapErrorCode, Reach, RootRef, Run};
use common::{Catalog, Numbers};
use std::collections::BTreeSet;
use std::sync::Arc;

fn cache() -> Arc<MapCache> {
    MapCache::new(None, 0).unwrap()
}

fn runs(reach: &Reach, layer: u32) -> Vec<(u64, u64)> {
    reach.runs(layer).iter().map(|run| (run.start_slot, run.start_slot + run.slot_count)).collect()
}

#[test]
fn a_uniform_root_reaches_its_layer_up_to_the_size_of_the_resource() {
    let cache = cache();
    let uniform = |owner| FrozenMap::uniform(cache.clone(), owner).root().unwrap();
    let mut reach = Reach::default();
    reach.add_root(uniform(4), 1000).unwrap();
    reach.add_root(uniform(0), MAP_SLOTS).unwrap();
    reach.add_root(uniform(5), 0).unwrap();
    reach.add_root(uniform(4), 70_000).unwrap();
    reach.add_root(uniform(6), u64::MAX).unwrap();
    assert!(reach.pending(10).is_empty());
    assert_eq!(reach.layers(), [4, 6]);
    assert_eq!(reach.runs(4), [Run { start_slot: 0, slot_count: 70_000, owner: 4 }]);
    assert_eq!(reach.slot_count(6), MAP_SLOTS);
    assert_eq!((reach.slot_count(5), reach.runs(5)), (0, vec![]));
}

#[test]
fn a_page_that_a_later_root_reaches_further_into_is_asked_for_again() {
    let mut catalog = Catalog::new();
    let empty = FrozenMap::uniform(cache(), 0);
    let map = Map::from_frozen(&empty);
    for slot in [5, 100, 8000, LEAF_SLOTS + 3, 300 * LEAF_SLOTS + 9] {
        map.set(slot, 2, 7).unwrap();
    }
    let root = catalog.checkpoint(&map.freeze(), &empty);

    let mut reach = Reach::default();
    reach.add_root(root, 101).unwrap();
    let first_count = catalog.supply_all(&mut reach);
    assert_eq!(runs(&reach, 7), [(5, 7), (100, 101)]);
    assert!(catalog.pages.keys().all(|&page_id| reach.has_page(page_id)), "pages are reached beyond the limit too");
    assert!(first_count < catalog.pages.len(), "leaves beyond the limit are not read");

    reach.add_root(root, 50).unwrap();
    assert!(reach.pending(10).is_empty(), "a root that reaches less far asks for nothing");

    reach.add_root(root, LEAF_SLOTS + 4).unwrap();
    assert!(!reach.pending(10).is_empty());
    catalog.supply_all(&mut reach);
    assert_eq!(runs(&reach, 7), [(5, 7), (100, 102), (8000, 8002), (LEAF_SLOTS + 3, LEAF_SLOTS + 4)]);

    reach.add_root(root, MAP_SLOTS).unwrap();
    catalog.supply_all(&mut reach);
    assert_eq!(reach.slot_count(7), 10);
    reach.add_root(root, MAP_SLOTS - 1).unwrap();
    reach.add_root(root, MAP_SLOTS).unwrap();
    assert!(reach.pending(10).is_empty(), "what was read whole is not read again");
}

#[test]
fn many_roots_that_share_pages_reach_the_union_of_what_each_refers_to() {
    for seed in 1..=20 {
        println!("seed {seed}");
        let mut numbers = Numbers(seed);
        let mut catalog = Catalog::new();
        let span = 3 * LEAF_SLOTS;
        let mut durable = FrozenMap::uniform(cache(), 1);
        let map = Map::from_frozen(&durable);
        let mut model = vec![1_u32; span as usize];
        let mut roots = vec![];
        let mut reached = vec![BTreeSet::new(); 6];
        for _ in 0..8 {
            for _ in 0..numbers.below(500) {
                let start = numbers.below(span);
                let longest = if numbers.below(20) == 0 { 6000 } else { 3 };
                let end = (start + 1 + numbers.below(longest)).min(span);
                let owner = numbers.below(6) as u32;
                map.set(start, end - start, owner).unwrap();
                model[start as usize..end as usize].fill(owner);
            }
            let frozen = map.freeze();
            let set = frozen.prepare(&durable, catalog.next_page_id).unwrap();
            catalog.insert(&set);
            let slot_limit = numbers.below(span + 1);
            roots.push((set.root, slot_limit));
            set.commit();
            durable = frozen;
            for slot in 0..slot_limit {
                reached[model[slot as usize] as usize].insert(slot);
            }
        }
        let (reach, _) = catalog.reach(&roots);
        assert!(reach.layers().iter().all(|layer| (1..6).contains(layer)));
        for layer in 1..6 {
            let slots = runs(&reach, layer).into_iter().flat_map(|(start, end)| start..end);
            assert!(slots.eq(reached[layer as usize].iter().copied()), "layer {layer}");
            assert_eq!(reach.slot_count(layer), reached[layer as usize].len() as u64);
        }
        assert!(catalog.pages.keys().all(|&page_id| reach.has_page(page_id)));
        assert!(!reach.has_page(catalog.next_page_id) && !reach.has_page(0));
    }
}

#[test]
fn a_root_or_page_that_is_none_is_an_error_and_not_an_empty_set() {
    let mut reach = Reach::default();
    for word in [1, 5 << 60, 2 << 60, 1 << 60, (1 << 60) | (1 << 32), u64::MAX] {
        let error = reach.add_root(RootRef { word, crc: 0 }, 10).unwrap_err();
        assert_eq!(error.code, MapErrorCode::PageCorrupt);
    }
    let mut catalog = Catalog::new();
    let empty = FrozenMap::uniform(cache(), 0);
    let map = Map::from_frozen(&empty);
    map.set(5, 1, 3).unwrap();
    let root = catalog.checkpoint(&map.freeze(), &empty);
    reach.add_root(root, MAP_SLOTS).unwrap();
    let page_id = reach.pending(1)[0];
    let mut page = catalog.pages[&page_id].clone();
    page[9] ^= 1;
    let error = reach.supply(page_id, &page).unwrap_err();
    assert_eq!((error.code, error.page_id), (MapErrorCode::PageCorrupt, page_id));
    assert_eq!(reach.pending(1), [page_id], "the page is still wanted");
    catalog.supply_all(&mut reach);
    assert_eq!(reach.slot_count(3), 1);
}
