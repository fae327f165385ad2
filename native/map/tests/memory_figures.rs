//! What maps cost in memory, in the shapes that volumes take. Printed; run with `--nocapture` to see.
mod common;

use atoll_map::{FrozenMap, LEAF_SLOTS, MAP_SLOTS, Map, MapCache, SLOT_BYTES};
use common::{Catalog, Numbers};
use std::time::Instant;

const GIB: u64 = 1 << 30;
const MIB: u64 = 1 << 20;
const TIB_SLOTS: u64 = (1 << 40) / SLOT_BYTES;
/// Every slot of a TiB takes long to set: these shapes are built on a part of it and their figure multiplied.
const PART: u64 = 32;

fn print(shape: &str, bytes: u64) {
    println!("{shape:<60} {bytes:>12} bytes ({:.2} MiB)", bytes as f64 / MIB as f64);
}

#[test]
fn a_fresh_volume_costs_nothing() {
    let cache = MapCache::new(None, 0).unwrap();
    let map = Map::from_frozen(&FrozenMap::uniform(cache.clone(), 1));
    map.set(0, TIB_SLOTS, 1).unwrap();
    print("1 TiB, fresh", cache.used_bytes());
    assert_eq!(cache.used_bytes(), 0);
}

#[test]
fn a_clone_with_a_gib_of_sequential_writes_stays_below_a_mib() {
    let cache = MapCache::new(None, 0).unwrap();
    let map = Map::from_frozen(&FrozenMap::uniform(cache.clone(), 1));
    let mut most = 0;
    for slot in 0..GIB / SLOT_BYTES {
        map.set(1_000_000 + slot, 1, 2).unwrap();
        if slot % 1000 == 0 {
            most = most.max(map.freeze().memory_bytes());
        }
    }
    let bytes = map.freeze().memory_bytes();
    print("1 TiB clone, 1 GiB of sequential 4 KiB writes", bytes);
    print("    at most while it was written", most);
    assert!(most <= MIB);
    assert!(bytes < 8 * 1024, "three inner nodes and two leaves are left");
}

#[test]
fn a_clone_with_200_mib_of_random_writes_stays_below_32_mib() {
    let cache = MapCache::new(None, 0).unwrap();
    let base = FrozenMap::uniform(cache.clone(), 1);
    let map = Map::from_frozen(&base);
    let mut numbers = Numbers(42);
    for _ in 0..51_200 {
        map.set(numbers.below(TIB_SLOTS), 1, 2).unwrap();
    }
    let frozen = map.freeze();
    let leaf_count = map.dirty_leaf_count();
    print(&format!("1 TiB clone, 51,200 random 4 KiB writes ({leaf_count} leaves)"), frozen.memory_bytes());
    assert!(frozen.memory_bytes() <= 32 * MIB);
    assert!(frozen.memory_bytes() / leaf_count <= 180, "{} bytes a leaf", frozen.memory_bytes() / leaf_count);
    let mut catalog = Catalog::new();
    let started = Instant::now();
    catalog.checkpoint(&frozen, &base);
    println!("    its checkpoint: {} pages in {:?}", catalog.pages.len(), started.elapsed());
    print("    persisted, with the table of pages", cache.used_bytes());
    assert!(cache.used_bytes() <= 32 * MIB);
}

/// A part of a TiB in which slots alternate between so many owners, in order or scattered.
fn alternating(cache: &std::sync::Arc<MapCache>, owner_count: u64, scattered: bool) -> (Map, FrozenMap) {
    let base = FrozenMap::uniform(cache.clone(), 1);
    let map = Map::from_frozen(&base);
    let mut numbers = Numbers(9);
    for slot in 0..TIB_SLOTS / PART {
        let choice = if scattered { numbers.below(owner_count) } else { slot % owner_count };
        if choice > 0 {
            map.set(slot, 1, 1 + choice as u32).unwrap();
        }
    }
    let frozen = map.freeze();
    frozen.prepare(&base, 1).unwrap().commit();
    (map, frozen)
}

#[test]
fn slots_alternating_between_two_owners_cost_a_bit_each() {
    let cache = MapCache::new(None, 0).unwrap();
    let (_map, frozen) = alternating(&cache, 2, false);
    let bytes = frozen.memory_bytes() * PART;
    print("1 TiB, slots alternating between 2 owners", bytes);
    print("    with the table of pages", cache.used_bytes() * PART);
    assert!(bytes <= 37 * MIB, "a bit a slot is 32 MiB");
    let (_map, frozen) = alternating(&cache, 2, true);
    print("1 TiB, each slot one of 2 owners by chance", frozen.memory_bytes() * PART);
    assert!(frozen.memory_bytes() * PART <= 37 * MIB);
}

#[test]
fn slots_alternating_between_sixteen_owners_are_kept_within_the_bound() {
    let directory = tempfile::tempdir().unwrap();
    let bound_bytes = 128 * MIB / PART;
    let cache = MapCache::new(Some(&directory.path().join("pages")), bound_bytes).unwrap();
    let (_map, frozen) = alternating(&cache, 16, false);
    print("1 TiB, slots alternating between 16 owners, all in memory", cache.used_bytes() * PART);
    cache.evict().unwrap();
    print("    with a bound of 128 MiB", cache.used_bytes() * PART);
    assert!(cache.used_bytes() <= bound_bytes);
    cache.set_bound(0);
    cache.evict().unwrap();
    print("    with every leaf evicted", cache.used_bytes() * PART);
    assert_eq!(frozen.owner_counts(MAP_SLOTS).unwrap().len(), 16);
    let leaf_count = TIB_SLOTS / PART / LEAF_SLOTS;
    assert!(cache.used_bytes() / leaf_count < 200, "headers, inner nodes and table only");
}
