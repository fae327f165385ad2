//! Maps against a plain array, with everything a volume does to them in any order.
mod common;

use atoll_map::{FrozenMap, HOLE, LEAF_SLOTS, MAP_SLOTS, Map, MapCache, RootRef, Run};
use common::Catalog;
use proptest::prelude::*;
use std::collections::BTreeMap;
use std::sync::Arc;

/// The parts of the address space that the array stands for: its start, the first border of each level, its end.
const WINDOWS: [(u64, u64); 4] = [
    (0, 2 * LEAF_SLOTS),
    (255 * LEAF_SLOTS, 257 * LEAF_SLOTS),
    (65_535 * LEAF_SLOTS, 65_537 * LEAF_SLOTS),
    (MAP_SLOTS - LEAF_SLOTS, MAP_SLOTS),
];
/// Frozen maps kept at once.
const FROZEN_MAX: usize = 3;

/// The owners of all slots of the windows, one after the other.
#[derive(Clone, PartialEq)]
struct Model(Vec<u32>);

impl Model {
    fn new(owner: u32) -> Model {
        Model(vec![owner; WINDOWS.iter().map(|(start, end)| (end - start) as usize).sum()])
    }

    /// Where the part of a run that lies in windows stands in the array.
    fn parts(start: u64, end: u64) -> impl Iterator<Item = (u64, std::ops::Range<usize>)> {
        let mut offset = 0;
        WINDOWS.into_iter().filter_map(move |(window_start, window_end)| {
            let base = offset;
            offset += (window_end - window_start) as usize;
            let (start, end) = (start.max(window_start), end.min(window_end));
            (start < end).then(|| (start, base + (start - window_start) as usize..base + (end - window_start) as usize))
        })
    }

    fn set(&mut self, start: u64, end: u64, owner: u32) {
        Model::parts(start, end).for_each(|(_, range)| self.0[range].fill(owner));
    }

    fn check_run(&self, run: &Run) {
        for (slot, range) in Model::parts(run.start_slot, run.start_slot + run.slot_count) {
            if let Some(wrong) = self.0[range].iter().position(|&owner| owner != run.owner) {
                panic!("slot {} has owner {}", slot + wrong as u64, run.owner);
            }
        }
    }

    fn check_cover(&self, start: u64, end: u64, runs: &[Run]) {
        let mut next = start;
        for (index, run) in runs.iter().enumerate() {
            assert_eq!(run.start_slot, next);
            assert!(run.slot_count > 0);
            assert!(index == 0 || runs[index - 1].owner != run.owner, "neighbours are merged");
            next += run.slot_count;
            self.check_run(run);
        }
        assert_eq!(next, end);
    }

    fn check_frozen(&self, frozen: &FrozenMap) {
        for (start, end) in WINDOWS {
            let mut runs = Vec::new();
            frozen.lookup_runs(start, end - start, &mut runs).unwrap();
            self.check_cover(start, end, &runs);
        }
    }
}

#[derive(Debug, Clone)]
enum Step {
    /// Sets a run in a window.
    Set {
        slot: u64,
        slot_count: u64,
        owner: u32,
    },
    /// Sets many single slots, so that leaves get palettes.
    Scatter {
        slot: u64,
        stride: u64,
        count: u64,
        owner_count: u32,
    },
    /// Sets slot by slot, so that leaves become uniform.
    Fill {
        slot: u64,
        count: u64,
        owner: u32,
    },
    /// Sets a run that reaches over several windows.
    SetFar {
        from: u64,
        to: u64,
        owner: u32,
    },
    Lookup {
        slot: u64,
        slot_count: u64,
    },
    Freeze,
    WithRun {
        which: usize,
        slot: u64,
        slot_count: u64,
        owner: u32,
    },
    /// A checkpoint; `false`: the catalog refused it.
    Checkpoint {
        committed: bool,
    },
    /// A snapshot of the durable map: the catalog keeps its root.
    Snapshot,
    Diff {
        newer: usize,
        older: usize,
    },
    Evict,
    /// Everything is loaded again; `true`: by another process.
    Reload {
        new_cache: bool,
    },
    Count {
        slot_limit: u64,
    },
}

fn slot() -> impl Strategy<Value = u64> {
    (0..WINDOWS.len(), 0..2 * LEAF_SLOTS).prop_map(|(window, offset)| {
        let (start, end) = WINDOWS[window];
        start + offset % (end - start)
    })
}

fn owner() -> impl Strategy<Value = u32> {
    prop_oneof![2 => Just(HOLE), 6 => 1..5_u32, 1 => Just(u32::MAX)]
}

fn slot_count() -> impl Strategy<Value = u64> {
    prop_oneof![3 => 1..4_u64, 2 => 1..200_u64, 1 => 1..3 * LEAF_SLOTS, 1 => Just(LEAF_SLOTS)]
}

fn far_slot() -> impl Strategy<Value = u64> {
    prop_oneof![2 => slot(), 2 => 0..=MAP_SLOTS, 2 => (0..=MAP_SLOTS / LEAF_SLOTS).prop_map(|leaf| leaf * LEAF_SLOTS), 1 => Just(0), 1 => Just(MAP_SLOTS)]
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => (slot(), slot_count(), owner()).prop_map(|(slot, slot_count, owner)| Step::Set { slot, slot_count, owner }),
        4 => (slot(), 1..40_u64, 1..300_u64, prop_oneof![Just(2_u32), Just(4), Just(16), Just(60), Just(400)])
            .prop_map(|(slot, stride, count, owner_count)| Step::Scatter { slot, stride, count, owner_count }),
        1 => (slot(), 1..=LEAF_SLOTS, owner()).prop_map(|(slot, count, owner)| Step::Fill { slot, count, owner }),
        1 => (far_slot(), far_slot(), owner()).prop_map(|(from, to, owner)| Step::SetFar { from, to, owner }),
        4 => (slot(), slot_count()).prop_map(|(slot, slot_count)| Step::Lookup { slot, slot_count }),
        2 => Just(Step::Freeze),
        1 => (0..FROZEN_MAX, slot(), slot_count(), owner())
            .prop_map(|(which, slot, slot_count, owner)| Step::WithRun { which, slot, slot_count, owner }),
        4 => prop::bool::weighted(0.8).prop_map(|committed| Step::Checkpoint { committed }),
        1 => Just(Step::Snapshot),
        2 => (0..FROZEN_MAX + 2, 0..FROZEN_MAX + 2).prop_map(|(newer, older)| Step::Diff { newer, older }),
        3 => Just(Step::Evict),
        1 => any::<bool>().prop_map(|new_cache| Step::Reload { new_cache }),
        1 => (0..=2 * LEAF_SLOTS).prop_map(|slot_limit| Step::Count { slot_limit }),
    ]
}

/// A volume with its catalog, beside the arrays that say what it must hold.
struct Volume {
    directory: tempfile::TempDir,
    cache: Arc<MapCache>,
    catalog: Catalog,
    map: Map,
    model: Model,
    durable: FrozenMap,
    durable_model: Model,
    frozen: Vec<(FrozenMap, Model)>,
    snapshots: Vec<(RootRef, Model)>,
    /// Pages below this are shared with snapshots: a checkpoint leaves them.
    shared_below_page: u64,
}

fn new_cache(directory: &tempfile::TempDir) -> Arc<MapCache> {
    MapCache::new(Some(&directory.path().join("pages")), 0).unwrap()
}

impl Volume {
    fn new(owner: u32) -> Volume {
        let directory = tempfile::tempdir().unwrap();
        let cache = new_cache(&directory);
        let durable = FrozenMap::uniform(cache.clone(), owner);
        Volume {
            catalog: Catalog::new(),
            map: Map::from_frozen(&durable),
            model: Model::new(owner),
            durable,
            durable_model: Model::new(owner),
            frozen: Vec::new(),
            snapshots: Vec::new(),
            shared_below_page: 0,
            cache,
            directory,
        }
    }

    fn set(&mut self, start: u64, end: u64, owner: u32) {
        let end = end.min(MAP_SLOTS);
        self.map.set(start, end - start, owner).unwrap();
        self.model.set(start, end, owner);
    }

    fn run(&mut self, step: &Step) {
        match *step {
            Step::Set { slot, slot_count, owner } => self.set(slot, slot + slot_count, owner),
            Step::Scatter { slot, stride, count, owner_count } => {
                for round in 0..count {
                    let slot = (slot + round * stride).min(MAP_SLOTS - 1);
                    self.set(slot, slot + 1, (round * 7) as u32 % owner_count);
                }
            }
            Step::Fill { slot, count, owner } => {
                (slot..(slot + count).min(MAP_SLOTS)).for_each(|slot| self.set(slot, slot + 1, owner));
            }
            Step::SetFar { from, to, owner } => self.set(from.min(to), from.max(to), owner),
            Step::Lookup { slot, slot_count } => self.look_up(slot, slot_count),
            Step::Freeze => {
                self.frozen.truncate(FROZEN_MAX - 1);
                self.frozen.insert(0, (self.map.freeze(), self.model.clone()));
            }
            Step::WithRun { which, slot, slot_count, owner } => {
                if let Some((frozen, model)) = self.frozen.get_mut(which) {
                    let slot_count = slot_count.min(MAP_SLOTS - slot);
                    let changed = frozen.with_run(slot, slot_count, owner).unwrap();
                    model.check_frozen(frozen);
                    model.set(slot, slot + slot_count, owner);
                    *frozen = changed;
                }
            }
            Step::Checkpoint { committed } => self.checkpoint(committed),
            Step::Snapshot => {
                self.snapshots.push((self.durable.root().unwrap(), self.durable_model.clone()));
                self.shared_below_page = self.catalog.next_page_id;
            }
            Step::Diff { newer, older } => self.diff(newer, older),
            Step::Evict => {
                self.cache.evict().unwrap();
            }
            Step::Reload { new_cache: is_new } => {
                if is_new {
                    self.cache = new_cache(&self.directory);
                }
                self.durable = self.catalog.load(&self.cache, self.durable.root().unwrap()).unwrap();
                self.durable_model.check_frozen(&self.durable);
                self.map = Map::from_frozen(&self.durable);
                self.model = self.durable_model.clone();
                self.frozen.clear();
                assert_eq!(self.map.dirty_leaf_count(), 0);
            }
            Step::Count { slot_limit } => self.count(slot_limit),
        }
    }

    fn look_up(&self, slot: u64, slot_count: u64) {
        let slot_count = slot_count.min(MAP_SLOTS - slot);
        let earlier = Run { start_slot: 1, slot_count: 2, owner: 3 };
        let mut runs = vec![earlier];
        self.map.lookup_runs(slot, slot_count, &mut runs).unwrap();
        assert_eq!(runs[0], earlier);
        self.model.check_cover(slot, slot + slot_count, &runs[1..]);
        for run in &runs[1..] {
            assert_eq!(self.map.lookup(run.start_slot).unwrap(), run.owner);
            assert!(self.map.is_owned(run.start_slot, run.slot_count, run.owner).unwrap());
            assert!(!self.map.is_owned(run.start_slot, run.slot_count, run.owner ^ 1).unwrap());
        }
        assert_eq!(self.map.is_owned(slot, slot_count, runs[1].owner).unwrap(), runs.len() == 2);
    }

    fn checkpoint(&mut self, committed: bool) {
        let frozen = self.map.freeze();
        let set = frozen.prepare(&self.durable, self.catalog.next_page_id).unwrap();
        assert!(set.pages.iter().zip(self.catalog.next_page_id..).all(|(page, id)| page.id == id), "ids follow each other");
        let mut displaced_model = Model::new(HOLE);
        for run in &set.displaced {
            assert_ne!(run.owner, HOLE);
            self.durable_model.check_run(run);
            displaced_model.set(run.start_slot, run.start_slot + run.slot_count, run.owner);
        }
        for (index, &displaced) in displaced_model.0.iter().enumerate() {
            let (new, old) = (self.model.0[index], self.durable_model.0[index]);
            assert_eq!(displaced, if new == old { HOLE } else { old }, "position {index} of the array");
        }
        if !committed {
            return;
        }
        self.catalog.insert(&set);
        for page_id in set.replaced.iter().filter(|&&page_id| page_id >= self.shared_below_page) {
            assert!(self.catalog.pages.remove(page_id).is_some());
        }
        let root = set.root;
        set.commit();
        assert_eq!(frozen.root(), Some(root));
        self.durable = frozen;
        self.durable_model = self.model.clone();
    }

    fn diff(&mut self, newer: usize, older: usize) {
        let live = (self.map.freeze(), self.model.clone());
        let durable = (self.durable.clone(), self.durable_model.clone());
        let maps: Vec<&(FrozenMap, Model)> = [&live, &durable].into_iter().chain(&self.frozen).collect();
        let ((new, new_model), (old, old_model)) = (maps[newer % maps.len()], maps[older % maps.len()]);
        let mut changed = vec![false; new_model.0.len()];
        let mut previous: Option<(Run, u32)> = None;
        new.diff(old, MAP_SLOTS, &mut |run, old_owner| {
            assert_ne!(run.owner, old_owner);
            new_model.check_run(&run);
            old_model.check_run(&Run { owner: old_owner, ..run });
            if let Some((previous, previous_old_owner)) = previous {
                let end = previous.start_slot + previous.slot_count;
                assert!(end <= run.start_slot, "ascending");
                assert!(end < run.start_slot || (previous.owner, previous_old_owner) != (run.owner, old_owner), "merged");
            }
            previous = Some((run, old_owner));
            Model::parts(run.start_slot, run.start_slot + run.slot_count).for_each(|(_, range)| changed[range].fill(true));
        })
        .unwrap();
        for (index, &changed) in changed.iter().enumerate() {
            assert_eq!(changed, new_model.0[index] != old_model.0[index], "position {index} of the array");
        }
    }

    fn count(&mut self, slot_limit: u64) {
        let mut counts = BTreeMap::<u32, u64>::new();
        for &owner in self.model.0[..slot_limit as usize].iter().filter(|&&owner| owner != HOLE) {
            *counts.entry(owner).or_default() += 1;
        }
        let frozen = self.map.freeze();
        assert_eq!(frozen.owner_counts(slot_limit).unwrap(), counts.clone().into_iter().collect::<Vec<_>>());
        assert_eq!(frozen.layers(slot_limit).unwrap(), counts.into_keys().collect::<Vec<_>>());
    }

    /// Everything holds what it must, now and after loading it again; the catalog has what the roots reach and nothing else.
    fn finish(mut self) {
        for (frozen, model) in &self.frozen {
            model.check_frozen(frozen);
        }
        self.model.check_frozen(&self.map.freeze());
        self.checkpoint(true);
        assert_eq!(self.catalog_of_content(), self.catalog_of_reloaded_content());
        let mut roots: Vec<(RootRef, u64)> = self.snapshots.iter().map(|(root, _)| (*root, MAP_SLOTS)).collect();
        roots.push((self.durable.root().unwrap(), MAP_SLOTS));
        let cache = new_cache(&self.directory);
        for (root, model) in self.snapshots.iter().chain([&(self.durable.root().unwrap(), self.durable_model.clone())]) {
            model.check_frozen(&self.catalog.load(&cache, *root).unwrap());
        }
        let (reach, read_count) = self.catalog.reach(&roots);
        let reached_count = self.catalog.pages.keys().filter(|&&page_id| reach.has_page(page_id)).count();
        assert_eq!(reached_count, read_count, "each page is read once");
        if self.snapshots.is_empty() {
            assert_eq!(reached_count, self.catalog.pages.len(), "checkpoints leave no garbage");
        }
        for layer in reach.layers() {
            let mut reached = vec![false; self.model.0.len()];
            let mut slot_count = 0;
            for run in reach.runs(layer) {
                slot_count += run.slot_count;
                Model::parts(run.start_slot, run.start_slot + run.slot_count).for_each(|(_, range)| reached[range].fill(true));
            }
            assert_eq!(reach.slot_count(layer), slot_count);
            for (index, &reached) in reached.iter().enumerate() {
                let wanted = self.durable_model.0[index] == layer || self.snapshots.iter().any(|(_, model)| model.0[index] == layer);
                assert_eq!(reached, wanted, "layer {layer}, position {index} of the array");
            }
        }
    }

    /// All pages that the present content makes, made anew.
    fn catalog_of_content(&self) -> BTreeMap<u64, Vec<u8>> {
        self.encode_anew(&self.map.freeze())
    }

    fn catalog_of_reloaded_content(&self) -> BTreeMap<u64, Vec<u8>> {
        let loaded = self.catalog.load(&new_cache(&self.directory), self.durable.root().unwrap()).unwrap();
        self.encode_anew(&loaded)
    }

    /// Copies a map owner by owner into a new one, so that how it came about does not show, and encodes that.
    fn encode_anew(&self, frozen: &FrozenMap) -> BTreeMap<u64, Vec<u8>> {
        let empty = FrozenMap::uniform(MapCache::new(None, 0).unwrap(), HOLE);
        let map = Map::from_frozen(&empty);
        let mut runs = Vec::new();
        frozen.lookup_runs(0, MAP_SLOTS, &mut runs).unwrap();
        runs.iter().for_each(|run| map.set(run.start_slot, run.slot_count, run.owner).unwrap());
        let set = map.freeze().prepare(&empty, 1).unwrap();
        set.pages.iter().map(|page| (page.id, page.bytes.clone())).collect()
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2000, max_shrink_iters: 20_000, ..ProptestConfig::default() })]
    #[test]
    fn a_map_holds_what_a_plain_array_holds(first_owner in 0..3_u32, steps in prop::collection::vec(step(), 1..40)) {
        let mut volume = Volume::new(first_owner);
        for step in &steps {
            volume.run(step);
        }
        volume.finish();
    }
}
