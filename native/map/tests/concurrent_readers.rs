//! Readers beside a writer, checkpoints and evictions: whatever a lookup returns, the slot had it at some time during the lookup.
mod common;

use atoll_map::{FrozenMap, INNER_FANOUT, LEAF_SLOTS, MAP_SLOTS, Map, MapCache};
use common::{Catalog, Numbers, let_epoch_pass_until};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::mpsc;

/// Four leaves around the first border of a level 1 node.
const BASE: u64 = (INNER_FANOUT - 2) * LEAF_SLOTS;
const SPAN: u64 = 4 * LEAF_SLOTS;
const WRITE_COUNT: u64 = 60_000;

/// Owners only grow, so a slot's owner lies between what was last known to be set and what was last about to be set.
struct Bounds {
    set: Vec<AtomicU32>,
    about_to_be_set: Vec<AtomicU32>,
}

impl Bounds {
    fn new() -> Bounds {
        let all = || (0..SPAN).map(|_| AtomicU32::new(1)).collect();
        Bounds { set: all(), about_to_be_set: all() }
    }
}

#[test]
fn every_lookup_is_an_owner_that_the_slot_had_while_it_was_looked_up() {
    let seed = 0x5eed_2024;
    println!("seed {seed}");
    let directory = tempfile::tempdir().unwrap();
    let cache = MapCache::new(Some(&directory.path().join("pages")), 0).unwrap();
    let base = FrozenMap::uniform(cache.clone(), 1);
    let map = Map::from_frozen(&base);
    let bounds = Bounds::new();
    let done = AtomicBool::new(false);
    let lookup_count = AtomicU64::new(0);
    let evicted_bytes = AtomicU64::new(0);
    let (frozen_out, frozen_in) = mpsc::sync_channel::<(FrozenMap, Vec<u32>)>(4);
    std::thread::scope(|scope| {
        // Ends the readers even if the writer panics: the panic is told, not waited for.
        let end = EndOnDrop(&done);
        for reader in 0..2 {
            let (map, bounds, done, lookup_count) = (&map, &bounds, &done, &lookup_count);
            scope.spawn(move || read(map, bounds, done, lookup_count, seed + 1 + reader));
        }
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                evicted_bytes.fetch_add(cache.evict().unwrap(), Ordering::Relaxed);
                std::thread::yield_now();
            }
        });
        scope.spawn(move || {
            for (frozen, model) in frozen_in {
                check_frozen(&frozen, &model);
            }
        });
        write(&map, base.clone(), &bounds, seed, &frozen_out);
        drop((end, frozen_out));
    });
    println!("{} lookups, {} bytes evicted", lookup_count.into_inner(), evicted_bytes.load(Ordering::Relaxed));
    assert!(evicted_bytes.into_inner() > 0);
    drop((map, base));
    let_epoch_pass_until("all memory is given back", || cache.used_bytes() == 0);
}

struct EndOnDrop<'a>(&'a AtomicBool);

impl Drop for EndOnDrop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

fn write(map: &Map, mut durable: FrozenMap, bounds: &Bounds, seed: u64, frozen_out: &mpsc::SyncSender<(FrozenMap, Vec<u32>)>) {
    let mut numbers = Numbers(seed);
    let mut catalog = Catalog::new();
    let mut model = vec![1_u32; SPAN as usize];
    let mut owner = 1;
    for write in 0..WRITE_COUNT {
        // New owners come seldom, often and always by turns, so that leaves take every form.
        if write % [3000, 200, 1][(write / 5000 % 3) as usize] == 0 {
            owner += 1;
        }
        let start = numbers.below(SPAN);
        let longest = match numbers.below(200) {
            0 => SPAN,
            1..10 => 3000,
            _ => 3,
        };
        let (start, end) = if numbers.below(400) == 0 { (0, SPAN) } else { (start, (start + 1 + numbers.below(longest)).min(SPAN)) };
        let slots = start as usize..end as usize;
        bounds.about_to_be_set[slots.clone()].iter().for_each(|bound| bound.store(owner, Ordering::SeqCst));
        map.set(BASE + start, end - start, owner).unwrap();
        bounds.set[slots.clone()].iter().for_each(|bound| bound.store(owner, Ordering::SeqCst));
        model[slots].fill(owner);
        if write % 500 == 499 {
            let frozen = map.freeze();
            catalog.checkpoint(&frozen, &durable);
            durable = frozen.clone();
            frozen_out.send((frozen, model.clone())).unwrap();
        }
    }
}

fn read(map: &Map, bounds: &Bounds, done: &AtomicBool, lookup_count: &AtomicU64, seed: u64) {
    let mut numbers = Numbers(seed);
    let mut runs = Vec::new();
    let mut lowest = Vec::new();
    while !done.load(Ordering::Relaxed) {
        let slot = numbers.below(SPAN - 100);
        let slot_count = if numbers.below(2) == 0 { 1 } else { 1 + numbers.below(100) };
        let slots = slot as usize..(slot + slot_count) as usize;
        lowest.clear();
        lowest.extend(bounds.set[slots.clone()].iter().map(|bound| bound.load(Ordering::SeqCst)));
        runs.clear();
        map.lookup_runs(BASE + slot, slot_count, &mut runs).unwrap();
        let mut owners = runs.iter().flat_map(|run| std::iter::repeat_n(run.owner, run.slot_count as usize));
        for (bound, &lowest) in bounds.about_to_be_set[slots].iter().zip(&lowest) {
            let (owner, highest) = (owners.next().unwrap(), bound.load(Ordering::SeqCst));
            assert!((lowest..=highest).contains(&owner), "owner {owner} is not within {lowest}..={highest}");
        }
        let lowest = bounds.set[slot as usize].load(Ordering::SeqCst);
        let owner = map.lookup(BASE + slot).unwrap();
        let highest = bounds.about_to_be_set[slot as usize].load(Ordering::SeqCst);
        assert!((lowest..=highest).contains(&owner), "owner {owner} is not within {lowest}..={highest}");
        lookup_count.fetch_add(2, Ordering::Relaxed);
    }
}

fn check_frozen(frozen: &FrozenMap, model: &[u32]) {
    let mut runs = Vec::new();
    frozen.lookup_runs(BASE, SPAN, &mut runs).unwrap();
    for run in &runs {
        let start = (run.start_slot - BASE) as usize;
        assert!(model[start..start + run.slot_count as usize].iter().all(|&owner| owner == run.owner));
    }
    let counted: u64 = frozen.owner_counts(MAP_SLOTS).unwrap().iter().map(|(_, slot_count)| slot_count).sum();
    assert_eq!(counted, MAP_SLOTS);
}

#[test]
fn maps_that_share_pages_are_written_by_several_threads_at_once() {
    let directory = tempfile::tempdir().unwrap();
    let cache = MapCache::new(Some(&directory.path().join("pages")), 0).unwrap();
    let mut catalog = Catalog::new();
    let empty = FrozenMap::uniform(cache.clone(), 1);
    let map = Map::from_frozen(&empty);
    (0..SPAN).step_by(3).for_each(|slot| map.set(BASE + slot, 1, 2).unwrap());
    let golden = map.freeze();
    let root = catalog.checkpoint(&golden, &empty);
    drop(map);
    let done = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let _end = EndOnDrop(&done);
        scope.spawn(|| {
            while !done.load(Ordering::Relaxed) {
                cache.evict().unwrap();
                std::thread::yield_now();
            }
        });
        let clones: Vec<_> = (0..3_u32)
            .map(|clone| {
                let (catalog, cache) = (&catalog, &cache);
                scope.spawn(move || {
                    for round in 0..30 {
                        let frozen = catalog.load(cache, root).unwrap();
                        let map = Map::from_frozen(&frozen);
                        let owner = 100 + clone;
                        (0..SPAN).step_by(97).for_each(|slot| map.set(BASE + slot, 1, owner).unwrap());
                        for slot in (0..SPAN).step_by(11) {
                            let wanted = if slot % 97 == 0 {
                                owner
                            } else if slot % 3 == 0 {
                                2
                            } else {
                                1
                            };
                            assert_eq!(map.lookup(BASE + slot).unwrap(), wanted);
                        }
                        let first_page_id = 1_000_000 + u64::from(clone) * 100_000 + round * 1000;
                        map.freeze().prepare(&frozen, first_page_id).unwrap().commit();
                    }
                })
            })
            .collect();
        clones.into_iter().for_each(|clone| clone.join().unwrap());
    });
    for slot in 0..SPAN {
        let mut runs = Vec::new();
        golden.lookup_runs(BASE + slot, 1, &mut runs).unwrap();
        assert_eq!(runs[0].owner, if slot % 3 == 0 { 2 } else { 1 });
    }
    drop((golden, empty));
    let_epoch_pass_until("all memory is given back", || cache.used_bytes() == 0);
}
