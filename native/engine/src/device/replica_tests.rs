//! A layer that gets another place while it is read, on real files: every byte is right, and nobody keeps the old file.
use super::tests::layer_id;
use super::*;
use crate::ThrottleLimits;
use atoll_io::{FileStore, LayerId, OpenMode, Store};
use atoll_map::{FrozenMap, MapCache, SLOT_BYTES};
use std::fs;
use std::io::IoSlice;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const SLOTS: u64 = 256;

/// Goes with its test.
struct Folder(PathBuf);

impl Folder {
    fn new() -> Folder {
        let path = std::env::temp_dir().join(format!("atoll-replicas-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Folder(path)
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

fn content() -> Vec<u8> {
    (0..SLOTS * SLOT_BYTES).map(|at| (at / SLOT_BYTES * 13 + at % 251 + 1) as u8).collect()
}

fn is_right(offset_bytes: u64, bytes: &[u8], wanted: &[u8]) -> bool {
    bytes == &wanted[offset_bytes as usize..offset_bytes as usize + bytes.len()]
}

fn write(store: &dyn Store, id: LayerId, bytes: &[u8]) {
    store.open_layer(id, OpenMode::ReadWrite).unwrap().write(0, &[IoSlice::new(bytes)]).unwrap();
}

/// Descriptors of this process that are of a file below this folder.
fn descriptors_below(folder: &Path) -> usize {
    let entries = fs::read_dir("/proc/self/fd").unwrap().filter_map(|entry| fs::read_link(entry.ok()?.path()).ok());
    entries.filter(|target| target.starts_with(folder)).count()
}

#[test]
fn readers_see_the_right_bytes_while_a_layer_changes_its_place_and_the_old_file_is_closed_after_the_barrier() {
    let folder = Folder::new();
    let wanted = content();
    let layers = ["a", "b"].map(|name| folder.0.join(name).join("layers"));
    let stores = ["a", "b"].map(|name| -> Arc<dyn Store> { Arc::new(FileStore::open(&folder.0.join(name), true, 0).unwrap()) });
    let id = layer_id(1);
    for store in &stores {
        store.create_layer(id).unwrap();
        write(&**store, id, &wanted);
    }
    let at = |place: usize| LayerSpec { alias: 1, id, store: stores[place].clone() };
    let (device, _) = Device::open(DeviceSpec {
        volume: [5; 16],
        size_bytes: SLOTS * SLOT_BYTES,
        epoch: 1,
        map: FrozenMap::uniform(MapCache::new(None, 1 << 30).unwrap(), 1),
        map_lsn: 0,
        layers: vec![at(0)],
        active: None,
        next: None,
        throttle: ThrottleLimits::default(),
        limits: DeviceLimits::default(),
        batch_log: None,
        batch_log_since_epoch: 0,
        on_event: None,
    })
    .unwrap();

    let is_over = AtomicBool::new(false);
    let read_count = AtomicU64::new(0);
    let read = |kind: u64| {
        let mut step = kind;
        let mut buffer = vec![0; 3 * SLOT_BYTES as usize];
        while !is_over.load(Ordering::Relaxed) {
            step += 7;
            let offset = step * 1000 % ((SLOTS - 3) * SLOT_BYTES);
            match kind {
                0 => device.read(offset, &mut buffer).unwrap(),
                1 if !device.read_now(offset, &mut buffer).unwrap() => continue,
                1 => {}
                // As the ring does: the file is read by somebody else, in his own time.
                2 => {
                    let ReadPlan::File(file, started) = device.plan_read(offset, buffer.len() as u64, true).unwrap() else {
                        panic!("all of it is one stretch of one file")
                    };
                    std::thread::yield_now();
                    file.read_exact_at(&mut buffer, offset).unwrap();
                    device.finish_read(started, offset, Some(buffer.len()), &mut buffer).unwrap();
                }
                _ => {
                    device.prefetch(offset, buffer.len() as u64).unwrap();
                    let mut found = Vec::new();
                    device.block_status(offset, buffer.len() as u64, 10, &mut found).unwrap();
                    assert!(found.iter().all(|extent| !extent.zero));
                    continue;
                }
            }
            assert!(is_right(offset, &buffer, &wanted), "wrong bytes at {offset}, read in way {kind}");
            read_count.fetch_add(1, Ordering::Relaxed);
        }
    };
    std::thread::scope(|scope| {
        let readers: Vec<_> = (0..4).map(|kind| scope.spawn(move || read(kind))).collect();
        let spoiled = vec![0xff; wanted.len()];
        for round in 1..=40 {
            let (old, new) = ((round + 1) % 2, round % 2);
            let seen = read_count.load(Ordering::Relaxed);
            while read_count.load(Ordering::Relaxed) < seen + 20 && !readers.iter().any(|reader| reader.is_finished()) {
                std::thread::yield_now();
            }
            device.add_layers(vec![at(new)]);
            device.read_barrier();
            // What is left of the old place is nothing to anybody: it is removed, and comes back as something else.
            // Who has left may be about to drop what he read from.
            let deadline = Instant::now() + Duration::from_secs(60);
            while descriptors_below(&layers[old]) > 1 {
                assert!(Instant::now() < deadline, "the store has its folder open, and somebody the old file");
                std::thread::yield_now();
            }
            fs::write(layers[old].join(format!("{id}.layer")), &spoiled).unwrap();
            let seen = read_count.load(Ordering::Relaxed);
            while read_count.load(Ordering::Relaxed) < seen + 20 && !readers.iter().any(|reader| reader.is_finished()) {
                std::thread::yield_now();
            }
            write(&*stores[old], id, &wanted);
        }
        is_over.store(true, Ordering::Relaxed);
    });
}

#[test]
fn a_layer_that_comes_while_the_active_one_is_swapped_is_not_forgotten() {
    let store: Arc<dyn Store> = Arc::new(atoll_io::MemoryStore::new(u64::MAX, false));
    let mut world = super::tests::clone_world(store, SLOTS * SLOT_BYTES);
    let is_over = AtomicBool::new(false);
    let device = world.device.clone();
    let added = AtomicU64::new(100);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            while !is_over.load(Ordering::Relaxed) {
                let alias = added.load(Ordering::Relaxed) as u32;
                let other: Arc<dyn Store> = Arc::new(atoll_io::MemoryStore::new(u64::MAX, false));
                other.create_layer(layer_id(alias)).unwrap();
                device.add_layers(vec![LayerSpec { alias, id: layer_id(alias), store: other }]);
                added.fetch_add(1, Ordering::Relaxed);
            }
        });
        for _ in 0..200 {
            world.snapshot();
        }
        is_over.store(true, Ordering::Relaxed);
    });
    let layers = device.layers.load();
    for alias in 100..added.load(Ordering::Relaxed) as u32 {
        assert!(layers.reader(alias).is_ok(), "layer {alias} was added and is gone");
    }
}
