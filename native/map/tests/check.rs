//! A walk over damaged maps: everything that is wrong is found, and who names it.
mod common;

use atoll_map::{FrozenMap, LEAF_SLOTS, Map, MapCache, MapCheck, MapErrorCode, Referrer, RootRef};
use common::Catalog;

/// Two maps that share a leaf: the first has three more of its own.
fn maps(catalog: &mut Catalog) -> (RootRef, RootRef) {
    let empty = FrozenMap::uniform(MapCache::new(None, 0).unwrap(), 0);
    let shared = Map::from_frozen(&empty);
    shared.set(5, 2, 7).unwrap();
    let shared = shared.freeze();
    let second = catalog.checkpoint(&shared, &empty);
    let first = Map::from_frozen(&shared);
    for leaf in [1, 2, 300] {
        first.set(leaf * LEAF_SLOTS + 9, 1, 8).unwrap();
    }
    let set = first.freeze().prepare(&shared, catalog.next_page_id).unwrap();
    catalog.insert(&set);
    let root = set.root;
    set.commit();
    (root, second)
}

fn walk(catalog: &Catalog, roots: &[RootRef], mut check: MapCheck) -> MapCheck {
    for root in roots {
        check.add_root(*root).unwrap();
    }
    loop {
        let ids = check.pending(3);
        if ids.is_empty() {
            return check;
        }
        for id in ids {
            check.supply(id, catalog.pages.get(&id).map(Vec::as_slice));
        }
    }
}

/// Roots' pages among those that lead to a page.
fn leading_to(catalog: &Catalog, roots: &[RootRef], page_id: u64) -> Vec<u64> {
    let mut watched = vec![page_id];
    for _ in 0..4 {
        let check = walk(catalog, roots, MapCheck::watching(watched.clone(), []));
        watched.extend(check.referrers().map(|referrer| match referrer {
            Referrer::OfPage(from, _) => from,
            Referrer::OfLayer(..) => unreachable!("no layer is watched"),
        }));
    }
    watched.retain(|id| roots.iter().any(|root| root.word == 2 << 60 | id));
    watched.sort();
    watched.dedup();
    watched
}

#[test]
fn a_parent_that_wants_another_checksum_is_found_whoever_was_there_before() {
    let mut catalog = Catalog::new();
    let (_, whole) = maps(&mut catalog);
    let damaged = RootRef { crc: whole.crc ^ 1, ..whole };
    let page_id = whole.word & ((1 << 60) - 1);
    for roots in [[whole, damaged], [damaged, whole]] {
        let together = walk(&catalog, &roots, MapCheck::default());
        let mut one_by_one = MapCheck::default();
        for root in roots {
            one_by_one = walk(&catalog, &[root], one_by_one);
        }
        for check in [together, one_by_one] {
            let faults: Vec<_> = check.faults().iter().map(|fault| (fault.page_id, fault.code)).collect();
            assert_eq!(faults, [(page_id, MapErrorCode::PageCorrupt)]);
        }
    }
}

#[test]
fn nothing_is_found_in_whole_maps() {
    let mut catalog = Catalog::new();
    let (first, second) = maps(&mut catalog);
    let check = walk(&catalog, &[first, second], MapCheck::default());
    assert_eq!((check.fault_count(), check.reach().layers()), (0, vec![7, 8]));
    assert!(catalog.pages.keys().all(|&page_id| check.reach().has_page(page_id)));
}

#[test]
fn each_damaged_page_is_found_and_the_rest_is_looked_at_all_the_same() {
    let mut catalog = Catalog::new();
    let (first, second) = maps(&mut catalog);
    let leaves: Vec<u64> = catalog.pages.iter().filter(|(_, bytes)| bytes[4] == 0).map(|(&page_id, _)| page_id).collect();
    assert_eq!(leaves.len(), 4);
    let pages = catalog.pages.clone();
    for &id in pages.keys() {
        for damage in 0..3 {
            catalog.pages = pages.clone();
            let expected = match damage {
                0 => {
                    catalog.pages.remove(&id);
                    MapErrorCode::PageMissing
                }
                1 => {
                    *catalog.pages.get_mut(&id).unwrap().last_mut().unwrap() ^= 1;
                    MapErrorCode::PageCorrupt
                }
                _ => {
                    catalog.pages.get_mut(&id).unwrap().pop();
                    MapErrorCode::PageCorrupt
                }
            };
            let check = walk(&catalog, &[first, second], MapCheck::default());
            let faults: Vec<_> = check.faults().iter().map(|fault| (fault.page_id, fault.code)).collect();
            assert_eq!(faults, [(id, expected)]);
        }
    }
    // Two at once.
    catalog.pages = pages;
    catalog.pages.remove(&leaves[0]);
    catalog.pages.remove(&leaves[3]);
    let check = walk(&catalog, &[first, second], MapCheck::default());
    assert_eq!(check.fault_count(), 2);
    assert!(leaves.iter().all(|&leaf| check.reach().has_page(leaf)));
}

#[test]
fn every_root_that_leads_to_a_page_or_a_layer_is_told() {
    let mut catalog = Catalog::new();
    let (first, second) = maps(&mut catalog);
    let roots = [first, second];
    let root_pages: Vec<u64> = roots.iter().map(|root| root.word & ((1 << 60) - 1)).collect();
    let shared_leaf = *catalog.pages.iter().find(|(_, bytes)| bytes[4] == 0 && bytes[bytes.len() - 4] == 7).unwrap().0;
    let mut both = root_pages.clone();
    both.sort();
    assert_eq!(leading_to(&catalog, &roots, shared_leaf), both);
    let own_leaf = *catalog.pages.iter().find(|(_, bytes)| bytes[4] == 0 && bytes[bytes.len() - 4] == 8).unwrap().0;
    assert_eq!(leading_to(&catalog, &roots, own_leaf), root_pages[..1]);
    let check = walk(&catalog, &roots, MapCheck::watching([], [7]));
    assert_eq!(check.referrers().collect::<Vec<_>>(), [Referrer::OfLayer(shared_leaf, 7)]);
}
