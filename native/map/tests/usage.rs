//! What each of many resources takes, against a count slot by slot.
mod common;

use atoll_map::{FrozenMap, HOLE, LEAF_SLOTS, MAP_SLOTS, Map, MapCache, MapErrorCode, RootRef, Taken, Usage, UsageRoot};
use common::{Catalog, Numbers};
use std::collections::{BTreeMap, BTreeSet, HashMap};

/// Where slots are written: around borders of leaves and of the pages above them.
fn interesting_slots() -> Vec<u64> {
    let borders = [0, LEAF_SLOTS, 2 * LEAF_SLOTS, 256 * LEAF_SLOTS, 65_536 * LEAF_SLOTS];
    borders.iter().flat_map(|border| border.saturating_sub(4)..border + 4).collect()
}

fn owner_at(map: &FrozenMap, slot: u64) -> u32 {
    let mut runs = Vec::new();
    map.lookup_runs(slot, 1, &mut runs).unwrap();
    runs[0].owner
}

struct Resource {
    lineage: u64,
    root: RootRef,
    frozen: FrozenMap,
    /// A volume: its map, and the layer that it writes.
    open: Option<(Map, u32)>,
}

struct World {
    numbers: Numbers,
    cache: std::sync::Arc<MapCache>,
    catalog: Catalog,
    resources: BTreeMap<u64, Resource>,
    allocated: HashMap<u32, BTreeSet<u64>>,
    next_key: u64,
    next_alias: u32,
    slots: Vec<u64>,
}

impl World {
    fn new(seed: u64) -> World {
        World {
            numbers: Numbers(seed),
            cache: MapCache::new(None, 0).unwrap(),
            catalog: Catalog::new(),
            resources: BTreeMap::new(),
            allocated: HashMap::new(),
            next_key: 1,
            next_alias: 1,
            slots: interesting_slots(),
        }
    }

    fn below(&mut self, limit: usize) -> usize {
        self.numbers.below(limit as u64) as usize
    }

    fn alias(&mut self) -> u32 {
        self.next_alias += 1;
        self.next_alias - 1
    }

    fn add(&mut self, lineage: Option<u64>, frozen: FrozenMap, active: Option<u32>) {
        let key = self.next_key;
        self.next_key += 1;
        let open = active.map(|alias| (Map::from_frozen(&frozen), alias));
        let root = frozen.root().unwrap();
        self.resources.insert(key, Resource { lineage: lineage.unwrap_or(key), root, frozen, open });
    }

    fn pick(&mut self, volumes_only: bool) -> Option<u64> {
        let keys: Vec<u64> =
            self.resources.iter().filter(|(_, resource)| !volumes_only || resource.open.is_some()).map(|(&key, _)| key).collect();
        if keys.is_empty() { None } else { Some(keys[self.below(keys.len())]) }
    }

    fn checkpoint(&mut self, key: u64) {
        let resource = self.resources.get_mut(&key).unwrap();
        let (map, _) = resource.open.as_ref().unwrap();
        let frozen = map.freeze();
        let set = frozen.prepare(&resource.frozen, self.catalog.next_page_id).unwrap();
        self.catalog.insert(&set);
        resource.root = set.root;
        set.commit();
        resource.frozen = frozen;
    }

    fn step(&mut self) {
        match self.below(20) {
            0 if self.resources.len() < 9 => {
                let alias = self.alias();
                let frozen = FrozenMap::uniform(self.cache.clone(), alias);
                self.add(None, frozen, Some(alias));
            }
            1 | 2 if self.resources.len() < 9 => {
                // A clone, of a volume through a snapshot's content.
                let Some(source) = self.pick(false) else { return };
                self.seal(source);
                let frozen = self.resources[&source].frozen.clone();
                let alias = self.alias();
                self.add(None, frozen, Some(alias));
            }
            3..=6 if self.resources.len() < 9 => {
                let Some(volume) = self.pick(true) else { return };
                self.seal(volume);
                let frozen = self.resources[&volume].frozen.clone();
                self.add(Some(self.resources[&volume].lineage), frozen, None);
            }
            7 | 8 => {
                let Some(key) = self.pick(false) else { return };
                self.resources.remove(&key);
            }
            9 => {
                // A rollback: to any resource that is not written.
                let (Some(volume), Some(source)) = (self.pick(true), self.pick(false)) else { return };
                if self.resources[&source].open.is_some() {
                    return;
                }
                let alias = self.alias();
                let source = &self.resources[&source];
                let (frozen, root) = (source.frozen.clone(), source.root);
                let resource = self.resources.get_mut(&volume).unwrap();
                resource.open = Some((Map::from_frozen(&frozen), alias));
                (resource.frozen, resource.root) = (frozen, root);
            }
            _ => {
                let Some(volume) = self.pick(true) else { return };
                for _ in 0..self.below(6) {
                    self.write(volume);
                }
                self.checkpoint(volume);
            }
        }
    }

    /// The active layer of a volume ends: what is there is shared.
    fn seal(&mut self, key: u64) {
        if self.resources[&key].open.is_none() {
            return;
        }
        self.checkpoint(key);
        let alias = self.alias();
        self.resources.get_mut(&key).unwrap().open.as_mut().unwrap().1 = alias;
    }

    fn write(&mut self, key: u64) {
        let at = self.below(self.slots.len());
        let start = self.slots[at];
        let count = match self.below(12) {
            0 => LEAF_SLOTS,
            1 => 257 * LEAF_SLOTS,
            _ => 1 + self.below(3) as u64,
        };
        let (discard, is_hole) = (self.below(6) == 0, self.below(2) == 0);
        let (map, active) = self.resources[&key].open.as_ref().unwrap();
        let active = *active;
        map.set(start, count, if discard && is_hole { HOLE } else { active }).unwrap();
        let layer = self.allocated.entry(active).or_default();
        for &slot in self.slots.iter().filter(|&&slot| start <= slot && slot < start + count) {
            // A slot that is owned may be a hole of its layer.
            if discard || count > 3 && slot % 2 == 0 {
                layer.remove(&slot);
            } else {
                layer.insert(slot);
            }
        }
    }

    fn active(&self) -> Vec<u32> {
        self.resources.values().filter_map(|resource| resource.open.as_ref().map(|open| open.1)).collect()
    }

    /// Brings the table up to now; returns how many pages were read.
    fn refresh(&mut self, usage: &mut Usage) -> usize {
        let roots: Vec<UsageRoot> =
            self.resources.iter().map(|(&key, resource)| UsageRoot { key, lineage: resource.lineage, root: resource.root }).collect();
        usage.set_roots(&roots, &self.active()).unwrap();
        let mut read_count = 0;
        loop {
            let pending = usage.pending(3);
            for &page_id in &pending {
                usage.supply(page_id, self.catalog.pages.get(&page_id).cloned());
                read_count += 1;
            }
            usage.settle();
            if pending.is_empty() {
                break;
            }
        }
        for alias in usage.unknown_layers() {
            let slots = self.allocated.get(&alias).cloned().unwrap_or_default();
            usage.set_allocated(alias, slots.into_iter().map(|slot| (slot, slot + 1)));
        }
        assert!(usage.unknown_layers().is_empty());
        read_count
    }

    fn count(&self, key: u64) -> Taken {
        let active = self.active();
        let mut taken = Taken::default();
        for &slot in &self.slots {
            let owner = owner_at(&self.resources[&key].frozen, slot);
            if owner == HOLE || active.contains(&owner) || !self.allocated.get(&owner).is_some_and(|layer| layer.contains(&slot)) {
                continue;
            }
            let referring = self.resources.values().filter(|other| owner_at(&other.frozen, slot) == owner).count();
            if referring == 1 {
                taken.used_slots += 1;
            } else {
                taken.shared_slots += 1;
            }
        }
        taken
    }
}

#[test]
fn used_and_shared_are_what_a_count_slot_by_slot_says() {
    for seed in 1..=120 {
        let mut world = World::new(seed * 7919);
        let mut usage = Usage::default();
        for step in 0..60 {
            world.step();
            if world.below(3) == 0 {
                continue;
            }
            world.refresh(&mut usage);
            for key in world.resources.keys().copied().collect::<Vec<_>>() {
                assert_eq!(usage.taken(key).unwrap(), world.count(key), "seed {seed}, step {step}, resource {key}");
            }
        }
        world.refresh(&mut usage);
        let before = usage.memory_bytes();
        let any_page = world.resources.values().any(|resource| resource.root.word >> 60 == 2);
        world.resources.clear();
        world.refresh(&mut usage);
        assert!(!any_page || usage.memory_bytes() < before, "what is gone takes no memory");
        assert_eq!(usage.taken(1).unwrap(), Taken::default());
    }
}

#[test]
fn a_root_that_changes_costs_the_pages_that_are_new() {
    let mut world = World::new(3);
    let base = FrozenMap::uniform(world.cache.clone(), 1);
    world.next_alias = 2;
    world.add(None, base, Some(1));
    for round in 0..50_u64 {
        world.seal(1);
        let frozen = world.resources[&1].frozen.clone();
        world.add(Some(1), frozen, None);
        let (map, active) = world.resources[&1].open.as_ref().unwrap();
        map.set(round * LEAF_SLOTS, 1, *active).unwrap();
        world.checkpoint(1);
    }
    let mut usage = Usage::default();
    let first_count = world.refresh(&mut usage);
    assert!(first_count > 150, "{first_count}");
    assert_eq!(world.refresh(&mut usage), 0);
    let (map, active) = world.resources[&1].open.as_ref().unwrap();
    map.set(7, 1, *active).unwrap();
    world.checkpoint(1);
    assert_eq!(world.refresh(&mut usage), 4);
}

#[test]
fn a_page_that_cannot_be_read_is_an_error_of_those_that_reach_it_until_it_is_mended() {
    let mut world = World::new(5);
    let cache = world.cache.clone();
    for alias in [1, 2] {
        world.next_alias = 10 * alias;
        world.add(None, FrozenMap::uniform(cache.clone(), HOLE), Some(alias));
        let key = world.next_key - 1;
        world.resources[&key].open.as_ref().unwrap().0.set(5, 2, alias).unwrap();
        world.seal(key);
        world.allocated.insert(alias, BTreeSet::from([5, 6]));
    }
    let RootRef { word, .. } = world.resources[&2].root;
    let page_id = word & ((1 << 60) - 1);
    let bytes = world.catalog.pages.remove(&page_id).unwrap();
    let mut usage = Usage::default();
    world.refresh(&mut usage);
    assert_eq!(usage.taken(1).unwrap(), Taken { used_slots: 2, shared_slots: 0 });
    let error = usage.taken(2).unwrap_err();
    assert_eq!((error.code, error.page_id), (MapErrorCode::PageMissing, page_id));
    let mut damaged = bytes.clone();
    damaged[9] ^= 1;
    world.catalog.pages.insert(page_id, damaged);
    world.refresh(&mut usage);
    assert_eq!(usage.slots_of(2).unwrap_err().code, MapErrorCode::PageCorrupt);
    world.catalog.pages.insert(page_id, bytes);
    world.refresh(&mut usage);
    assert_eq!(usage.taken(2).unwrap(), Taken { used_slots: 2, shared_slots: 0 });
    let none = RootRef { word: 5 << 60, crc: 0 };
    assert!(usage.set_roots(&[UsageRoot { key: 1, lineage: 1, root: none }], &[]).is_err());
    assert_eq!(MAP_SLOTS, 1 << 37);
}
