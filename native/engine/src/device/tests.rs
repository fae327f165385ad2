//! The device against plain arrays: over memory, over every crash state the recorder can draw, under threads and faults.
use super::side_store::SideStore;
use super::*;
use crate::ThrottleLimits;
use atoll_io::{CrashOptions, FaultPlan, FaultRule, FaultStore, LayerId, MemoryStore, Store};
use atoll_map::{FrozenMap, HOLE, MapCache};
use std::sync::Arc;
use std::time::Duration;

const SLOT: usize = SLOT_BYTES as usize;
const VOLUME: [u8; 16] = [7; 16];

pub(super) struct Random(pub(super) u64);
impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^ (x >> 31)
    }
    pub(super) fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
}

pub(super) fn layer_id(alias: u32) -> LayerId {
    let mut bytes = [0u8; 16];
    bytes[12..].copy_from_slice(&alias.to_be_bytes());
    LayerId(bytes)
}

/// What the catalog would hold.
#[derive(Clone)]
pub(super) struct Catalog {
    map: FrozenMap,
    lsn: u64,
    size_bytes: u64,
    pub(super) active: u32,
    next: u32,
    last_alias: u32,
    next_page_id: u64,
    /// Of each alias from 1 on: the side on which its layer lies.
    sides: Vec<u8>,
}

impl Catalog {
    fn spec(&self, store: &Arc<dyn Store>, alias: u32) -> LayerSpec {
        LayerSpec { alias, id: layer_id(alias), store: side(store, self.sides[alias as usize - 1]) }
    }
}

pub(super) struct World {
    pub(super) store: Arc<dyn Store>,
    pub(super) catalog: Catalog,
    pub(super) device: Arc<Device>,
    /// Where the next layers are made.
    new_side: u8,
}

/// One of several stores in one recorder, so that a crash meets all of them at the same moment. 0: the recorder itself.
fn side(store: &Arc<dyn Store>, number: u8) -> Arc<dyn Store> {
    if number == 0 { store.clone() } else { Arc::new(SideStore { inner: store.clone(), number }) }
}

fn specs(store: &Arc<dyn Store>, catalog: &Catalog) -> Vec<LayerSpec> {
    (1..=catalog.last_alias).map(|alias| catalog.spec(store, alias)).collect()
}

pub(super) fn open(store: &Arc<dyn Store>, catalog: &Catalog) -> Result<(Arc<Device>, OpenReport)> {
    Device::open(DeviceSpec {
        volume: VOLUME,
        size_bytes: catalog.size_bytes,
        epoch: 1,
        map: catalog.map.clone(),
        map_lsn: catalog.lsn,
        layers: specs(store, catalog),
        active: Some(catalog.active),
        next: Some(catalog.next),
        throttle: ThrottleLimits::default(),
        limits: DeviceLimits { dirty_bytes_max: u64::MAX, ..DeviceLimits::default() },
        batch_log: None,
        batch_log_since_epoch: 0,
        on_event: None,
    })
}

/// A volume of `size_bytes` whose first half comes from a sealed layer full of 0xAA.
pub(super) fn clone_world(store: Arc<dyn Store>, size_bytes: u64) -> World {
    clone_world_on(store, size_bytes, [0; 3])
}

/// The same with the base, the active and the next layer on these sides.
fn clone_world_on(store: Arc<dyn Store>, size_bytes: u64, sides: [u8; 3]) -> World {
    let cache = MapCache::new(None, 1 << 30).unwrap();
    for alias in 1..=3 {
        side(&store, sides[alias as usize - 1]).create_layer(layer_id(alias)).unwrap();
    }
    let base = side(&store, sides[0]).open_layer(layer_id(1), atoll_io::OpenMode::ReadWrite).unwrap();
    base.write(0, &[std::io::IoSlice::new(&vec![0xAA; (size_bytes / 2) as usize])]).unwrap();
    base.sync().unwrap();
    let half = size_bytes / 2 / SLOT_BYTES;
    let map = FrozenMap::uniform(cache, HOLE).with_run(0, half, 1).unwrap();
    let catalog = Catalog { map, lsn: 0, size_bytes, active: 2, next: 3, last_alias: 3, next_page_id: 1, sides: sides.to_vec() };
    let (device, _) = open(&store, &catalog).unwrap();
    World { store, catalog, device, new_side: sides[2] }
}

impl World {
    fn checkpoint(&mut self) {
        self.checkpoint_with(|| {});
    }

    /// `committed` is called where the catalog's transaction ends.
    fn checkpoint_with(&mut self, committed: impl FnOnce()) {
        if let Some(checkpoint) = self.device.checkpoint(self.catalog.next_page_id).unwrap() {
            committed();
            self.catalog.next_page_id += checkpoint.pages.pages.len() as u64;
            self.catalog.map = checkpoint.frozen().clone();
            self.catalog.lsn = checkpoint.lsn;
            self.device.checkpoint_committed(checkpoint, true).unwrap();
        }
    }

    /// The transaction that ends a snapshot or a promotion.
    fn commit_swap(&mut self, checkpoint: Checkpoint) {
        self.catalog.map = checkpoint.frozen().clone();
        self.catalog.lsn = checkpoint.lsn;
        self.catalog.next_page_id += checkpoint.pages.pages.len() as u64;
        self.catalog.active = self.catalog.next;
        self.catalog.last_alias += 1;
        self.catalog.next = self.catalog.last_alias;
        self.catalog.sides.push(self.new_side);
        self.next_spec().store.create_layer(layer_id(self.catalog.next)).unwrap();
        self.device.add_layers(specs(&self.store, &self.catalog));
        self.device.checkpoint_committed(checkpoint, true).unwrap();
        self.device.swap_committed(true).unwrap();
    }

    /// A whole snapshot, as the layer above makes it.
    pub(super) fn snapshot(&mut self) {
        Device::swap(&[(self.device.clone(), self.next_spec())], Duration::from_secs(300)).unwrap();
        let checkpoint = self.device.checkpoint(self.catalog.next_page_id).unwrap().unwrap();
        self.commit_swap(checkpoint);
    }

    fn next_spec(&self) -> LayerSpec {
        self.catalog.spec(&self.store, self.catalog.next)
    }

    /// Brings a sealed layer to another side, where it is read from then on. `committed` is called where the catalog's transaction ends.
    fn move_layer(&mut self, alias: u32, to: u8, committed: impl FnOnce()) {
        let source = self.catalog.spec(&self.store, alias);
        let target = LayerSpec { store: side(&self.store, to), ..source.clone() };
        target.store.create_layer(target.id).unwrap();
        let fill = crate::FillSpec {
            source: &source,
            target: &target,
            runs: &[atoll_map::Run { start_slot: 0, slot_count: self.catalog.size_bytes / SLOT_BYTES, owner: alias }],
            from_slot: 0,
            bytes_max: u64::MAX,
            time_max: Duration::MAX,
            may_offload: true,
            bytes_per_second: 0,
        };
        assert_eq!(crate::fill_piece(&fill, &|| false).unwrap().next_slot, None);
        committed();
        self.catalog.sides[alias as usize - 1] = to;
        self.device.add_layers(vec![target]);
        self.device.read_barrier();
        source.store.remove_layer(source.id).unwrap();
    }

    /// A layer that is sealed for good, if there is one that was not picked before.
    fn pick_sealed(&self, random: &mut Random) -> Option<u32> {
        let alias = 1 + random.below(u64::from(self.catalog.last_alias)) as u32;
        (alias != self.catalog.active && alias != self.catalog.next).then_some(alias)
    }
}

pub(super) fn read_all(device: &Device) -> Vec<u8> {
    let mut bytes = vec![0; device.size_bytes() as usize];
    device.read(0, &mut bytes).unwrap();
    bytes
}

fn half_filled(size_bytes: u64) -> Vec<u8> {
    let mut model = vec![0; size_bytes as usize];
    model[..(size_bytes / 2) as usize].fill(0xAA);
    model
}

/// One random mutation on device and model.
fn mutate(random: &mut Random, device: &Device, model: &mut [u8]) {
    let size = model.len() as u64;
    let offset = random.below(size);
    let length = (1 + random.below(3 * SLOT_BYTES)).min(size - offset) as usize;
    let (offset, length) = if random.below(2) == 0 {
        let start = offset / SLOT_BYTES * SLOT_BYTES;
        (start, (length.next_multiple_of(SLOT)).min((size - start) as usize))
    } else {
        (offset, length)
    };
    let range = offset as usize..offset as usize + length;
    match random.below(10) {
        0 => {
            device.discard(offset, length as u64).unwrap();
            let (first, last) = slots_within(offset, length as u64);
            model[first as usize * SLOT..last as usize * SLOT].fill(0);
        }
        1 => {
            device.write_zeroes(offset, length as u64, random.below(2) == 0).unwrap();
            model[range].fill(0);
        }
        _ => {
            let value = 1 + (random.next() % 255) as u8;
            device.write(offset, &vec![value; length]).unwrap();
            model[range].fill(value);
        }
    }
}

#[test]
fn a_clone_behaves_as_a_plain_array_through_writes_snapshots_checkpoints_and_reopening() {
    for seed in 0..100 {
        let mut random = Random(seed);
        let size_bytes = 32 * SLOT_BYTES;
        // Some have their layers in two stores, and move from one to the other.
        let is_split = seed % 5 >= 3;
        let sides = if is_split { [1, 2, 1 + (seed % 2) as u8] } else { [0; 3] };
        let mut world = clone_world_on(Arc::new(MemoryStore::new(u64::MAX, false)), size_bytes, sides);
        let mut model = half_filled(size_bytes);
        let mut snapshots: Vec<(FrozenMap, Vec<u8>)> = Vec::new();
        for _ in 0..120 {
            match random.below(20) {
                0 => {
                    let reports = Device::swap(&[(world.device.clone(), world.next_spec())], Duration::from_secs(300)).unwrap();
                    mutate(&mut random, &world.device, &mut model.clone());
                    // The write above came after the swap: take it from the device, the snapshot must not have it.
                    snapshots.push((reports[0].frozen.clone(), model.clone()));
                    model = read_all(&world.device);
                    let checkpoint = world.device.checkpoint(world.catalog.next_page_id).unwrap().unwrap();
                    assert_eq!(checkpoint.lsn, reports[0].lsn);
                    if is_split {
                        world.new_side = 1 + random.below(2) as u8;
                    }
                    world.commit_swap(checkpoint);
                    // Whatever has changed, it is known of what is written and what is read at present.
                    let is_distant = |alias: u32| world.catalog.sides[alias as usize - 1] == side_store::DISTANT;
                    assert_eq!(world.device.waits_for_network(), (1..=world.catalog.last_alias).any(is_distant), "seed {seed}");
                    assert_eq!(world.device.proof.is_needed(), is_distant(world.catalog.active), "seed {seed}");
                }
                5 if is_split => {
                    if let Some(alias) = world.pick_sealed(&mut random) {
                        let to = 3 - world.catalog.sides[alias as usize - 1];
                        world.move_layer(alias, to, || {});
                    }
                }
                1 => world.checkpoint(),
                2 => world.device.flush().unwrap(),
                3 => {
                    world.device.close().unwrap();
                    world.device = open(&world.store, &world.catalog).unwrap().0;
                }
                4 => {
                    assert_eq!(world.device.punch_orphans().unwrap(), 0, "nothing is orphaned without a crash");
                }
                _ => mutate(&mut random, &world.device, &mut model),
            }
            assert!(read_all(&world.device) == model, "seed {seed}");
        }
        for (map, content) in snapshots {
            let device = open_snapshot(&world, &map, size_bytes);
            assert!(read_all(&device) == content, "a snapshot changed, seed {seed}");
            assert_eq!(device.write(0, &[1]).unwrap_err().code, "READ_ONLY");
        }
    }
}

/// Values each slot may have after a crash: what the last flush covered, or anything written since.
struct Possible(Vec<Vec<Vec<u8>>>);

impl Possible {
    fn flushed(content: &[u8]) -> Possible {
        Possible(content.chunks(SLOT).map(|slot| vec![slot.to_vec()]).collect())
    }
    fn wrote(&mut self, content: &[u8]) {
        for (values, slot) in self.0.iter_mut().zip(content.chunks(SLOT)) {
            if values.last().is_some_and(|last| last != slot) {
                values.push(slot.to_vec());
            }
        }
    }
    /// Two unsynced writes to parts of one sector survive independently, so each byte stands for itself.
    fn check(&self, content: &[u8], context: &str) {
        for (index, (values, slot)) in self.0.iter().zip(content.chunks(SLOT)).enumerate() {
            if values.iter().any(|value| value == slot) {
                continue;
            }
            for (at, byte) in slot.iter().enumerate() {
                assert!(
                    values.iter().any(|value| value[at] == *byte),
                    "{context}: slot {index} byte {at} is {byte:#x}, which was neither flushed nor written since (possible {:?})",
                    values.iter().map(|value| value[at]).collect::<Vec<_>>()
                );
            }
        }
    }
}

#[test]
fn no_crash_state_loses_a_flushed_write_or_shows_a_value_that_was_never_possible() {
    let mut states = 0;
    for seed in 0..16 {
        let mut random = Random(1000 + seed);
        let size_bytes = 16 * SLOT_BYTES;
        let store = Arc::new(MemoryStore::new(u64::MAX, true));
        // Some have their layers in two stores, and move from one to the other.
        let is_split = seed % 4 >= 2;
        let sides = if is_split { [1, 2, 1 + (seed % 2) as u8] } else { [0; 3] };
        let mut world = clone_world_on(store.clone(), size_bytes, sides);
        let mut model = half_filled(size_bytes);
        let mut possible = Possible::flushed(&model);
        let mut seen = store.sequence();
        for step in 0..200 {
            let catalog_before = world.catalog.clone();
            let before = model.clone();
            let what = random.below(16);
            match what {
                0 | 1 => world.device.flush().unwrap(),
                2 => world.checkpoint_with(|| {
                    states += check_boundaries(&store, seen, &catalog_before, &possible, seed, step);
                    seen = store.sequence();
                }),
                3 => {
                    // A snapshot whose transaction comes after a flushed write to the new layer: crash states lie on both sides.
                    Device::swap(&[(world.device.clone(), world.next_spec())], Duration::from_secs(300)).unwrap();
                    mutate(&mut random, &world.device, &mut model);
                    possible.wrote(&model);
                    if random.below(2) == 0 {
                        world.device.flush().unwrap();
                    }
                    let checkpoint = world.device.checkpoint(world.catalog.next_page_id).unwrap().unwrap();
                    // Up to here the catalog is the old one.
                    states += check_boundaries(&store, seen, &catalog_before, &possible, seed, step);
                    seen = store.sequence();
                    if is_split {
                        world.new_side = 1 + random.below(2) as u8;
                    }
                    world.commit_swap(checkpoint);
                }
                4 if is_split => {
                    if let Some(alias) = world.pick_sealed(&mut random) {
                        let to = 3 - world.catalog.sides[alias as usize - 1];
                        world.move_layer(alias, to, || {
                            states += check_boundaries(&store, seen, &catalog_before, &possible, seed, step);
                            seen = store.sequence();
                        });
                    }
                }
                _ => {
                    mutate(&mut random, &world.device, &mut model);
                    possible.wrote(&model);
                }
            }
            states += check_boundaries(&store, seen, &world.catalog, &possible, seed, step);
            seen = store.sequence();
            store.forget_before(seen);
            if what <= 1 {
                assert_eq!(before, model);
                possible = Possible::flushed(&model);
            }
        }
    }
    assert!(states > 2_000, "{states} crash states were looked at");
}

fn check_boundaries(store: &MemoryStore, from: u64, catalog: &Catalog, possible: &Possible, seed: u64, step: u64) -> u64 {
    let mut boundaries = store.boundaries(from);
    boundaries.push(store.sequence());
    let mut states = 0;
    for boundary in boundaries {
        for draw in 0..6u64 {
            let options = CrashOptions { keep_of_256: [0, 64, 128, 200, 255, 128][draw as usize], tear: draw != 4, reorder: true };
            let image: Arc<dyn Store> = Arc::new(store.crash_image(boundary, seed * 1_000_003 + step * 31 + draw, options));
            let context = format!("seed {seed} step {step} boundary {boundary} draw {draw}");
            let (device, report) = open(&image, catalog).unwrap_or_else(|error| panic!("{context}: {error}"));
            possible.check(&read_all(&device), &context);
            let new_side = catalog.sides[0];
            let mut world = World { store: image, catalog: catalog.clone(), device: device.clone(), new_side };
            if report.promoted_next {
                let checkpoint = device.checkpoint(catalog.next_page_id).unwrap().unwrap();
                world.commit_swap(checkpoint);
            }
            // After recovery a partial write must find its neighbours' bytes, not what the crash left in the active layer.
            let content = read_all(&device);
            // Half of the states keep what the crash left in the active layer.
            if draw % 2 == 0 {
                device.punch_orphans().unwrap();
                assert!(read_all(&device) == content, "{context}: freeing orphans changed bytes");
            }
            for slot in 0..content.len() / SLOT {
                device.write((slot * SLOT + 100) as u64, &[0x55]).unwrap();
            }
            let mut expected = content;
            for slot in expected.chunks_mut(SLOT) {
                slot[100] = 0x55;
            }
            assert!(read_all(&device) == expected, "{context}: a partial write merged with stale bytes");
            // Life goes on: a snapshot into whatever the crash left of the next layer, a flush, a crash of the process.
            Device::swap(&[(device.clone(), world.next_spec())], Duration::from_secs(300)).unwrap();
            device.write(0, &[0x66; 7]).unwrap();
            expected[..7].fill(0x66);
            device.flush().unwrap();
            let (reopened, _) = open(&world.store, &world.catalog).unwrap_or_else(|error| panic!("{context}, reopened: {error}"));
            assert!(read_all(&reopened) == expected, "{context}: the second life lost a flushed write");
            states += 1;
        }
    }
    states
}

#[test]
fn four_threads_snapshots_and_flushes_at_once_leave_every_thread_its_own_bytes_and_snapshots_unchanged() {
    let size_bytes = 4 * 64 * SLOT_BYTES;
    let mut world = clone_world(Arc::new(MemoryStore::new(u64::MAX, false)), size_bytes);
    let stop = Arc::new(AtomicBool::new(false));
    let workers: Vec<_> = (0..4u64)
        .map(|index| {
            let (device, stop) = (world.device.clone(), stop.clone());
            std::thread::spawn(move || {
                let mut random = Random(index);
                let base = (index * 64 * SLOT_BYTES) as usize;
                let mut model = vec![0u8; 64 * SLOT];
                device.read(base as u64, &mut model).unwrap();
                let mut count = 0u64;
                while !stop.load(Ordering::SeqCst) || count < 200 {
                    let offset = random.below(model.len() as u64 - 1) as usize;
                    let length = (1 + random.below(9_000) as usize).min(model.len() - offset);
                    let value = random.next() as u8;
                    device.write((base + offset) as u64, &vec![value; length]).unwrap();
                    model[offset..offset + length].fill(value);
                    if random.below(16) == 0 {
                        device.flush().unwrap();
                    }
                    let mut seen = vec![0; length];
                    device.read((base + offset) as u64, &mut seen).unwrap();
                    assert!(seen == model[offset..offset + length]);
                    count += 1;
                }
                (base, model)
            })
        })
        .collect();
    let mut snapshots = Vec::new();
    for round in 0..40 {
        let reports = Device::swap(&[(world.device.clone(), world.next_spec())], Duration::from_secs(300)).unwrap();
        let checkpoint = world.device.checkpoint(world.catalog.next_page_id).unwrap().unwrap();
        world.commit_swap(checkpoint);
        let frozen = reports[0].frozen.clone();
        snapshots.push((frozen.clone(), snapshot_content(&world, &frozen, size_bytes)));
        if round % 5 == 0 {
            world.checkpoint();
            world.device.read_barrier();
        }
    }
    stop.store(true, Ordering::SeqCst);
    for worker in workers {
        let (base, model) = worker.join().unwrap();
        let mut seen = vec![0; model.len()];
        world.device.read(base as u64, &mut seen).unwrap();
        assert!(seen == model);
    }
    for (frozen, content) in snapshots {
        assert!(snapshot_content(&world, &frozen, size_bytes) == content, "a snapshot changed");
    }
    world.device.close().unwrap();
    assert_eq!(world.device.read(0, &mut [0]).unwrap_err().code, "DEVICE_CLOSED");
}

fn snapshot_content(world: &World, map: &FrozenMap, size_bytes: u64) -> Vec<u8> {
    read_all(&open_snapshot(world, map, size_bytes))
}

fn open_snapshot(world: &World, map: &FrozenMap, size_bytes: u64) -> Arc<Device> {
    let (device, _) = Device::open(DeviceSpec {
        volume: VOLUME,
        size_bytes,
        epoch: 1,
        map: map.clone(),
        map_lsn: 0,
        layers: specs(&world.store, &world.catalog),
        active: None,
        next: None,
        throttle: ThrottleLimits::default(),
        limits: DeviceLimits::default(),
        batch_log: None,
        batch_log_since_epoch: 0,
        on_event: None,
    })
    .unwrap();
    device
}

fn faulty_world() -> (World, Arc<FaultStore>) {
    let fault = Arc::new(FaultStore::new(Arc::new(MemoryStore::new(u64::MAX, false))));
    (clone_world(fault.clone(), 16 * SLOT_BYTES), fault)
}

fn rule(operation: &str, errno: i32, apply_count: u64) -> FaultRule {
    FaultRule {
        operation: operation.into(),
        layer: None,
        skip_count: 0,
        apply_count,
        probability_of_256: 256,
        errno,
        delay_ms: 0,
        tear: false,
    }
}

#[test]
fn a_failed_data_sync_poisons_the_device_until_it_is_opened_again() {
    let (world, fault) = faulty_world();
    world.device.write(0, &[1; SLOT]).unwrap();
    world.device.flush().unwrap();
    world.device.write(0, &[2; SLOT]).unwrap();
    fault.set_plan(FaultPlan { seed: 1, rules: vec![rule("sync", libc::EIO, 1)] });
    assert_eq!(world.device.flush().unwrap_err().code, "DEVICE_POISONED");
    assert_eq!(world.device.flush().unwrap_err().code, "DEVICE_POISONED", "a second flush must not succeed over lost data");
    assert_eq!(world.device.read(0, &mut [0; 1]).unwrap_err().code, "DEVICE_POISONED");
    world.device.close().unwrap();
    let (device, _) = open(&world.store, &world.catalog).unwrap();
    let mut byte = [0];
    device.read(0, &mut byte).unwrap();
    assert!(byte[0] == 1 || byte[0] == 2);
    device.write(0, &[3; SLOT]).unwrap();
    device.flush().unwrap();
}

#[test]
fn a_full_backend_fails_the_write_and_nothing_else() {
    let (world, fault) = faulty_world();
    fault.set_plan(FaultPlan { seed: 1, rules: vec![rule("write", libc::ENOSPC, 1)] });
    let error = world.device.write(0, &[2; SLOT]).unwrap_err();
    assert_eq!((error.code, error.errno), ("NO_SPACE", libc::ENOSPC));
    let mut bytes = [0; SLOT];
    world.device.read(0, &mut bytes).unwrap();
    assert_eq!(bytes, [0xAA; SLOT], "the owner did not change");
    world.device.write(0, &[2; SLOT]).unwrap();
    world.device.flush().unwrap();
}

#[test]
fn a_frame_that_finds_no_space_is_tried_again_by_the_next_flush() {
    let (world, fault) = faulty_world();
    world.device.write(0, &[2; SLOT]).unwrap();
    fault.set_plan(FaultPlan { seed: 1, rules: vec![rule("append", libc::ENOSPC, 1)] });
    assert_eq!(world.device.flush().unwrap_err().code, "NO_SPACE");
    assert!(!world.device.is_poisoned());
    world.device.flush().unwrap();
    let (device, report) = open(&world.store, &world.catalog).unwrap();
    assert_eq!(report.frames_replayed, 1);
    let mut byte = [0];
    device.read(0, &mut byte).unwrap();
    assert_eq!(byte, [2]);
}

#[test]
fn a_shrink_that_is_not_committed_is_taken_back_and_one_that_is_leaves_zeros_behind_when_grown_again() {
    let size_bytes = 32 * SLOT_BYTES;
    let mut world = clone_world(Arc::new(MemoryStore::new(u64::MAX, false)), size_bytes);
    let mut model = half_filled(size_bytes);
    world.device.write(20 * SLOT_BYTES, &[9; 4 * SLOT]).unwrap();
    model[20 * SLOT..24 * SLOT].fill(9);
    world.device.shrink_prepare(4 * SLOT_BYTES).unwrap();
    assert_eq!(world.device.read(4 * SLOT_BYTES, &mut [0]).unwrap_err().code, "OUT_OF_RANGE");
    let checkpoint = world.device.checkpoint(world.catalog.next_page_id).unwrap().unwrap();
    world.device.checkpoint_aborted(checkpoint);
    assert!(read_all(&world.device) == model);

    world.device.shrink_prepare(4 * SLOT_BYTES).unwrap();
    world.checkpoint();
    world.catalog.size_bytes = 4 * SLOT_BYTES;
    world.device.shrink_punch().unwrap();
    world.device.grow(size_bytes).unwrap();
    model[4 * SLOT..].fill(0);
    assert!(read_all(&world.device) == model);
    world.device.write(20 * SLOT_BYTES + 5, &[1]).unwrap();
    model[20 * SLOT + 5] = 1;
    assert!(read_all(&world.device) == model, "a partial write after growing must not see what was cut off");
}

#[test]
fn a_swap_past_its_deadline_changes_nothing() {
    let (world, fault) = faulty_world();
    fault.set_plan(FaultPlan { seed: 1, rules: vec![FaultRule { delay_ms: u32::MAX, ..rule("write", 0, 1) }] });
    let writer = {
        let device = world.device.clone();
        std::thread::spawn(move || device.write(0, &[5; SLOT]))
    };
    while fault.injected_count() == 0 {
        std::thread::yield_now();
    }
    let error = Device::swap(&[(world.device.clone(), world.next_spec())], Duration::from_millis(1)).err().unwrap();
    assert_eq!(error.code, "DEVICE_BUSY");
    fault.set_plan(FaultPlan::default());
    writer.join().unwrap().unwrap();
    assert_eq!(Device::swap(&[(world.device.clone(), world.next_spec())], Duration::from_secs(300)).unwrap().len(), 1);
    let error = Device::swap(&[(world.device.clone(), world.next_spec())], Duration::from_secs(300)).err().unwrap();
    assert_eq!(error.code, "SWAP_UNCOMMITTED");
}

#[test]
fn a_catalog_that_is_older_than_the_pool_is_told_so() {
    let size_bytes = 16 * SLOT_BYTES;
    let mut world = clone_world(Arc::new(MemoryStore::new(u64::MAX, false)), size_bytes);
    let old = world.catalog.clone();
    world.device.write(0, &[1; SLOT]).unwrap();
    world.checkpoint();
    world.device.write(SLOT_BYTES, &[1; SLOT]).unwrap();
    world.checkpoint();
    assert_eq!(open(&world.store, &old).err().unwrap().code, "CATALOG_BEHIND");
    let before_snapshot = world.catalog.clone();
    Device::swap(&[(world.device.clone(), world.next_spec())], Duration::from_secs(300)).unwrap();
    let checkpoint = world.device.checkpoint(world.catalog.next_page_id).unwrap().unwrap();
    world.commit_swap(checkpoint);
    assert_eq!(open(&world.store, &before_snapshot).err().unwrap().code, "CATALOG_BEHIND");
    assert!(open(&world.store, &world.catalog).is_ok());
}

#[test]
fn block_status_tells_holes_from_data_and_covers_the_range() {
    let world = clone_world(Arc::new(MemoryStore::new(u64::MAX, false)), 32 * SLOT_BYTES);
    world.device.write(24 * SLOT_BYTES, &[1; SLOT]).unwrap();
    let mut statuses = Vec::new();
    world.device.block_status(0, 32 * SLOT_BYTES, 100, &mut statuses).unwrap();
    let shape: Vec<_> = statuses.iter().map(|status| (status.length_bytes / SLOT_BYTES, status.zero)).collect();
    assert_eq!(shape, [(16, false), (8, true), (1, false), (7, true)]);
    statuses.clear();
    world.device.block_status(SLOT_BYTES, 20 * SLOT_BYTES, 1, &mut statuses).unwrap();
    assert_eq!(statuses, [BlockStatus { length_bytes: 15 * SLOT_BYTES, hole: false, zero: false }]);
}

fn changed_slots(device: &Device, base: &FrozenMap, slot_count: u64) -> Vec<bool> {
    let mut extents = Vec::new();
    device.changed_since(base, 0, slot_count * SLOT_BYTES, usize::MAX, &mut extents).unwrap();
    extents.iter().flat_map(|extent| vec![extent.flags == 1; (extent.length_bytes / SLOT_BYTES) as usize]).collect()
}

#[test]
fn what_changed_since_a_snapshot_and_where_data_lies_is_told_to_the_slot() {
    let mut world = clone_world(Arc::new(MemoryStore::new(u64::MAX, false)), 32 * SLOT_BYTES);
    // The first half is the image's. Two slots are the volume's own before the snapshot.
    world.device.write(20 * SLOT_BYTES, &[1; 2 * SLOT]).unwrap();
    let reports = Device::swap(&[(world.device.clone(), world.next_spec())], Duration::from_secs(300)).unwrap();
    let base = reports[0].frozen.clone();
    assert!(changed_slots(&world.device, &base, 32).iter().all(|changed| !changed));
    world.device.write(3 * SLOT_BYTES + 100, &[2; 10]).unwrap();
    world.device.write(20 * SLOT_BYTES, &[1; SLOT]).unwrap();
    world.device.write(30 * SLOT_BYTES, &[4; SLOT]).unwrap();
    world.device.discard(5 * SLOT_BYTES, SLOT_BYTES).unwrap();
    world.device.discard(25 * SLOT_BYTES, 2 * SLOT_BYTES).unwrap();
    world.device.write_zeroes(8 * SLOT_BYTES, SLOT_BYTES, false).unwrap();
    world.device.write_zeroes(28 * SLOT_BYTES, SLOT_BYTES, true).unwrap();
    let expected: Vec<bool> = (0..32).map(|slot| [3, 5, 8, 20, 28, 30].contains(&slot)).collect();
    assert_eq!(changed_slots(&world.device, &base, 32), expected);
    let checkpoint = world.device.checkpoint(world.catalog.next_page_id).unwrap().unwrap();
    world.commit_swap(checkpoint);
    assert_eq!(changed_slots(&world.device, &base, 32), expected, "a checkpoint changes no content");

    let mut extents = Vec::new();
    world.device.allocation_depth(0, 32 * SLOT_BYTES, 100, &mut extents).unwrap();
    let depths: Vec<u32> = extents.iter().flat_map(|extent| vec![extent.flags; (extent.length_bytes / SLOT_BYTES) as usize]).collect();
    let expected: Vec<u32> = (0..32)
        .map(|slot| match slot {
            3 | 20 | 28 | 30 => 1,
            5 | 8 => 0,
            0..16 | 21 => 2,
            _ => 0,
        })
        .collect();
    assert_eq!(depths, expected);

    // Pieces of slots, and a list that is full.
    extents.clear();
    world.device.changed_since(&base, 3 * SLOT_BYTES - 1, 2 + SLOT_BYTES, 10, &mut extents).unwrap();
    assert_eq!(extents.iter().map(|extent| (extent.length_bytes, extent.flags)).collect::<Vec<_>>(), [(1, 0), (SLOT_BYTES, 1), (1, 0)]);
    extents.clear();
    world.device.changed_since(&base, 0, 32 * SLOT_BYTES, 1, &mut extents).unwrap();
    assert_eq!(extents.iter().map(|extent| (extent.length_bytes, extent.flags)).collect::<Vec<_>>(), [(3 * SLOT_BYTES, 0)]);
}

#[test]
fn what_is_not_called_changed_reads_as_it_did_at_the_snapshot() {
    for seed in 0..20 {
        let mut random = Random(7000 + seed);
        let size_bytes = 64 * SLOT_BYTES;
        let mut world = clone_world(Arc::new(MemoryStore::new(u64::MAX, false)), size_bytes);
        let mut model = half_filled(size_bytes);
        let mut snapshots: Vec<(FrozenMap, Vec<u8>)> = Vec::new();
        for _ in 0..4 {
            for _ in 0..random.below(20) {
                mutate(&mut random, &world.device, &mut model);
            }
            let reports = Device::swap(&[(world.device.clone(), world.next_spec())], Duration::from_secs(300)).unwrap();
            snapshots.push((reports[0].frozen.clone(), read_all(&world.device)));
            let checkpoint = world.device.checkpoint(world.catalog.next_page_id).unwrap().unwrap();
            world.commit_swap(checkpoint);
            let now = read_all(&world.device);
            for (base, then) in &snapshots {
                for (slot, changed) in changed_slots(&world.device, base, 64).into_iter().enumerate() {
                    let part = slot * SLOT..(slot + 1) * SLOT;
                    assert!(changed || now[part.clone()] == then[part], "seed {seed}: slot {slot} changed and nobody was told");
                }
            }
        }
    }
}

fn open_with_log(store: &Arc<dyn Store>, catalog: &Catalog, epoch: u64, place: &BatchLogPlace) -> (Arc<Device>, OpenReport) {
    open_with_log_since(store, catalog, epoch, place, 0)
}

fn open_with_log_since(
    store: &Arc<dyn Store>,
    catalog: &Catalog,
    epoch: u64,
    place: &BatchLogPlace,
    since_epoch: u64,
) -> (Arc<Device>, OpenReport) {
    Device::open(DeviceSpec {
        volume: VOLUME,
        size_bytes: catalog.size_bytes,
        epoch,
        map: catalog.map.clone(),
        map_lsn: catalog.lsn,
        layers: specs(store, catalog),
        active: Some(catalog.active),
        next: Some(catalog.next),
        throttle: ThrottleLimits::default(),
        limits: DeviceLimits { dirty_bytes_max: u64::MAX, ..DeviceLimits::default() },
        batch_log: Some(place.clone()),
        batch_log_since_epoch: since_epoch,
        on_event: None,
    })
    .unwrap()
}

/// A directory that goes with the value.
struct ScratchDirectory(std::path::PathBuf);
impl ScratchDirectory {
    fn new(name: &str) -> ScratchDirectory {
        let path = std::env::temp_dir().join(format!("atoll-{name}-{}", std::process::id()));
        std::fs::create_dir_all(&path).unwrap();
        ScratchDirectory(path)
    }
}
impl Drop for ScratchDirectory {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

#[test]
fn what_was_answered_but_not_flushed_outlives_the_process_and_not_the_boot() {
    let directory = ScratchDirectory::new("recall");
    let place = BatchLogPlace { directory: directory.0.clone(), boot_id: [1; 16] };
    for seed in 0..40 {
        let mut random = Random(5000 + seed);
        let size_bytes = 32 * SLOT_BYTES;
        let mut world = clone_world(Arc::new(MemoryStore::new(u64::MAX, false)), size_bytes);
        world.device.close().unwrap();
        let mut model = half_filled(size_bytes);
        let mut epoch = 2;
        for life in 0..6 {
            let mut mark = SettleMark::default();
            let (device, report) = open_with_log(&world.store, &world.catalog, epoch, &place);
            epoch += 1;
            world.device = device;
            assert!(read_all(&world.device) == model, "seed {seed} life {life}: a killed process lost what it had answered");
            if report.promoted_next {
                let checkpoint = world.device.checkpoint(world.catalog.next_page_id).unwrap().unwrap();
                world.commit_swap(checkpoint);
            }
            let swap_at = random.below(30);
            for step in 0..30 {
                if step == swap_at && random.below(2) == 0 {
                    // Killed before the swap is committed.
                    Device::swap(&[(world.device.clone(), world.next_spec())], Duration::from_secs(300)).unwrap();
                }
                match random.below(16) {
                    0 => world.device.flush().unwrap(),
                    1 if step < swap_at => world.checkpoint(),
                    2..=5 => {
                        let slot = random.below(32);
                        let value = 1 + (random.next() % 255) as u8;
                        world.device.write_unsettled(slot * SLOT_BYTES, &[value; SLOT], &mut mark).unwrap();
                        model[slot as usize * SLOT..][..SLOT].fill(value);
                    }
                    _ => mutate(&mut random, &world.device, &mut model),
                }
            }
            world.device.settle(mark).unwrap();
            // Dropped, not closed: a kill.
        }
        let after_power_cut = BatchLogPlace { boot_id: [2; 16], ..place.clone() };
        let (device, report) = open_with_log(&world.store, &world.catalog, epoch, &after_power_cut);
        assert_eq!(report.batches_recalled, 0, "a log of another boot is not believed");
        device.close().unwrap();
        assert_eq!(std::fs::read_dir(&directory.0).unwrap().count(), 0, "a closed device leaves no log");
    }
}

/// A device with a log of its own, whose first eight slots nobody has written; the volume's next epoch is 3.
fn logged_world(name: &str) -> (ScratchDirectory, BatchLogPlace, World) {
    let directory = ScratchDirectory::new(name);
    let place = BatchLogPlace { directory: directory.0.clone(), boot_id: [1; 16] };
    let mut world = clone_world(Arc::new(MemoryStore::new(u64::MAX, false)), 8 * SLOT_BYTES);
    world.device.close().unwrap();
    world.device = open_with_log(&world.store, &world.catalog, 2, &place).0;
    (directory, place, world)
}

#[test]
fn a_write_into_a_slot_that_another_request_has_just_made_ours_is_answered_when_that_is_logged() {
    let (_directory, place, world) = logged_world("depends");
    world.device.write_unsettled(0, &[1; SLOT], &mut SettleMark::default()).unwrap();
    world.device.write(0, &[2; SLOT]).unwrap();
    // Killed before the first request was answered.
    let (again, _) = open_with_log(&world.store, &world.catalog, 3, &place);
    assert!(read_all(&again)[..SLOT] == [2; SLOT]);
}

#[test]
fn a_log_from_before_another_home_had_the_volume_is_not_believed() {
    for (since_epoch, expected) in [(2, 1), (3, 0)] {
        let (_directory, place, world) = logged_world(&format!("since-{since_epoch}"));
        world.device.write(0, &[1; SLOT]).unwrap();
        // Killed.
        let (again, report) = open_with_log_since(&world.store, &world.catalog, 3, &place, since_epoch);
        assert_eq!(report.batches_recalled, expected, "since epoch {since_epoch}");
        assert_eq!(read_all(&again)[..SLOT] == [1; SLOT], expected == 1, "since epoch {since_epoch}");
    }
}

#[test]
fn an_entry_that_is_written_late_takes_no_place_of_a_newer_batch() {
    let (_directory, place, world) = logged_world("late");
    let mut mark = SettleMark::default();
    let mut write_unsettled = |slot: u64| world.device.write_unsettled(slot * SLOT_BYTES, &[9; SLOT], &mut mark).unwrap();
    for batch in 0..4 {
        // Of the same batch: one that is logged, and two that wait while a flush makes all of them durable.
        world.device.write(batch * SLOT_BYTES, &[9; SLOT]).unwrap();
        write_unsettled(4 + batch % 2);
        write_unsettled(6 + batch % 2);
        world.device.flush().unwrap();
    }
    for slot in 0..8 {
        world.device.discard(slot * SLOT_BYTES, SLOT_BYTES).unwrap();
        write_unsettled(slot);
    }
    world.device.settle(mark).unwrap();
    let (again, _) = open_with_log(&world.store, &world.catalog, 3, &place);
    assert!(read_all(&again) == [9; 8 * SLOT]);
}

#[test]
fn what_waits_when_a_device_is_closed_is_durable_and_writes_no_log_afterwards() {
    let (directory, _, world) = logged_world("closed");
    let mut mark = SettleMark::default();
    world.device.write_unsettled(0, &[1; SLOT], &mut mark).unwrap();
    world.device.close().unwrap();
    world.device.settle(mark).unwrap();
    assert_eq!(std::fs::read_dir(&directory.0).unwrap().count(), 0);
}

#[test]
fn a_change_that_cannot_be_logged_is_flushed_before_it_is_answered() {
    let world = clone_world(Arc::new(MemoryStore::new(u64::MAX, true)), 16 * SLOT_BYTES);
    let place = BatchLogPlace { directory: "/nonexistent/atoll".into(), boot_id: [1; 16] };
    world.device.close().unwrap();
    let (device, _) = open_with_log(&world.store, &world.catalog, 2, &place);
    device.write(0, &[3; SLOT]).unwrap();
    let (again, report) = open_with_log(&world.store, &world.catalog, 3, &place);
    assert_eq!(report.frames_replayed, 1);
    let mut byte = [0];
    again.read(0, &mut byte).unwrap();
    assert_eq!(byte, [3]);
}

#[test]
fn what_another_request_failed_to_keep_is_not_answered_by_those_that_began_before() {
    let (world, fault) = faulty_world();
    let place = BatchLogPlace { directory: "/nonexistent/atoll".into(), boot_id: [1; 16] };
    world.device.close().unwrap();
    let (device, _) = open_with_log(&world.store, &world.catalog, 2, &place);
    let full = |times| FaultPlan { seed: 1, rules: vec![rule("append", libc::ENOSPC, times)] };
    let unsettled = |slot: u64| {
        let mut mark = SettleMark::default();
        device.write_unsettled(slot * SLOT_BYTES, &[7; SLOT], &mut mark).map(|()| mark).unwrap()
    };

    fault.set_plan(full(u64::MAX));
    let owned_by_it = unsettled(0);
    // In place: it stands or falls with the owner change above.
    let in_place = unsettled(0);
    assert_eq!(device.write(SLOT_BYTES, &[7; SLOT]).unwrap_err().code, "NO_SPACE");
    let later = unsettled(2);
    assert_eq!(device.write(3 * SLOT_BYTES, &[7; SLOT]).unwrap_err().code, "NO_SPACE");
    for mark in [owned_by_it, in_place, later] {
        assert_eq!(device.settle(mark).unwrap_err().code, "NO_SPACE");
    }

    let waits = unsettled(4);
    assert_eq!(device.write(5 * SLOT_BYTES, &[7; SLOT]).unwrap_err().code, "NO_SPACE");
    fault.set_plan(FaultPlan::default());
    device.write(6 * SLOT_BYTES, &[7; SLOT]).unwrap();
    device.settle(waits).expect("the flush of another kept it");
    let (again, _) = open_with_log(&world.store, &world.catalog, 3, &place);
    assert!(read_all(&again)[..7 * SLOT] == [7; 7 * SLOT]);
}
