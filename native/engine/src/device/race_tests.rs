//! What goes wrong only when two threads meet: each test keeps one race window busy and looks at every outcome.
use super::tests::{Random, clone_world, open, read_all};
use super::*;
use atoll_io::{CrashOptions, MemoryStore, OpenMode, Store};
use std::io::IoSlice;
use std::sync::Arc;
use std::thread;

const SLOT: usize = SLOT_BYTES as usize;
const SLOTS: u64 = 512;

/// The recorder, with a pause inside every sync and write: what another thread does in that time falls between the steps
/// of the one that pauses.
struct Slow {
    inner: Arc<MemoryStore>,
}

struct SlowLayer(Arc<dyn atoll_io::LayerIo>);

fn pause() {
    for _ in 0..20 {
        thread::yield_now();
    }
}

impl atoll_io::LayerIo for SlowLayer {
    fn read(&self, offset_bytes: u64, buffers: &mut [std::io::IoSliceMut<'_>]) -> atoll_io::Result<()> {
        let result = self.0.read(offset_bytes, buffers);
        pause();
        result
    }
    fn write(&self, offset_bytes: u64, buffers: &[IoSlice<'_>]) -> atoll_io::Result<()> {
        pause();
        self.0.write(offset_bytes, buffers)
    }
    fn punch(&self, offset_bytes: u64, length_bytes: u64) -> atoll_io::Result<()> {
        pause();
        self.0.punch(offset_bytes, length_bytes)
    }
    fn zero_allocated(&self, offset_bytes: u64, length_bytes: u64) -> atoll_io::Result<()> {
        self.0.zero_allocated(offset_bytes, length_bytes)
    }
    fn sync(&self) -> atoll_io::Result<()> {
        let result = self.0.sync();
        pause();
        result
    }
    fn extents(&self, offset_bytes: u64, length_bytes: u64, out: &mut Vec<atoll_io::Extent>) -> atoll_io::Result<()> {
        self.0.extents(offset_bytes, length_bytes, out)
    }
    fn length_bytes(&self) -> atoll_io::Result<u64> {
        self.0.length_bytes()
    }
    fn allocated_bytes(&self) -> atoll_io::Result<u64> {
        self.0.allocated_bytes()
    }
    fn drop_cache(&self) -> atoll_io::Result<()> {
        self.0.drop_cache()
    }
}

impl Store for Slow {
    fn capabilities(&self) -> atoll_io::StoreCapabilities {
        self.inner.capabilities()
    }
    fn create_layer(&self, id: atoll_io::LayerId) -> atoll_io::Result<()> {
        self.inner.create_layer(id)
    }
    fn open_layer(&self, id: atoll_io::LayerId, mode: OpenMode) -> atoll_io::Result<Arc<dyn atoll_io::LayerIo>> {
        Ok(Arc::new(SlowLayer(self.inner.open_layer(id, mode)?)))
    }
    fn remove_layer(&self, id: atoll_io::LayerId) -> atoll_io::Result<()> {
        self.inner.remove_layer(id)
    }
    fn list_layers(&self) -> atoll_io::Result<Vec<atoll_io::LayerEntry>> {
        self.inner.list_layers()
    }
    fn usage(&self) -> atoll_io::Result<atoll_io::StoreUsage> {
        self.inner.usage()
    }
    fn list_segments(&self, layer: atoll_io::LayerId) -> atoll_io::Result<Vec<u64>> {
        self.inner.list_segments(layer)
    }
    fn create_segment(&self, layer: atoll_io::LayerId, base_lsn: u64, epoch: u64) -> atoll_io::Result<Arc<dyn atoll_io::SegmentIo>> {
        self.inner.create_segment(layer, base_lsn, epoch)
    }
    fn open_segment(&self, layer: atoll_io::LayerId, base_lsn: u64) -> atoll_io::Result<Arc<dyn atoll_io::SegmentIo>> {
        self.inner.open_segment(layer, base_lsn)
    }
    fn remove_segment(&self, layer: atoll_io::LayerId, base_lsn: u64) -> atoll_io::Result<()> {
        self.inner.remove_segment(layer, base_lsn)
    }
    fn read_record(&self, name: &str) -> atoll_io::Result<Option<Vec<u8>>> {
        self.inner.read_record(name)
    }
    fn write_record(&self, name: &str, bytes: &[u8]) -> atoll_io::Result<()> {
        self.inner.write_record(name, bytes)
    }
    fn list_records(&self, prefix: &str) -> atoll_io::Result<Vec<String>> {
        self.inner.list_records(prefix)
    }
    fn remove_record(&self, name: &str) -> atoll_io::Result<()> {
        self.inner.remove_record(name)
    }
    fn lock(&self, owner: &str) -> atoll_io::Result<atoll_io::StoreLock> {
        self.inner.lock(owner)
    }
    fn release_reserve(&self) -> atoll_io::Result<()> {
        self.inner.release_reserve()
    }
    fn restore_reserve(&self) -> atoll_io::Result<u64> {
        self.inner.restore_reserve()
    }
    fn set_reserve(&self, bytes: u64) -> atoll_io::Result<u64> {
        self.inner.set_reserve(bytes)
    }
}

fn slow_world(record: bool) -> (Arc<MemoryStore>, super::tests::World) {
    let memory = Arc::new(MemoryStore::new(u64::MAX, record));
    let world = clone_world(Arc::new(Slow { inner: memory.clone() }), SLOTS * SLOT_BYTES);
    (memory, world)
}

/// First writes by four threads that also flush: after each flush, a crash that keeps nothing unsynced must have what its
/// thread had written by then, and no slot may show bytes that were never in it.
#[test]
fn a_flush_answers_only_for_writes_whose_data_and_frames_are_both_durable() {
    const THREADS: u64 = 4;
    for round in 0..8u64 {
        let (memory, world) = slow_world(true);
        let threads: Vec<_> = (0..THREADS)
            .map(|index| {
                let (device, memory) = (world.device.clone(), memory.clone());
                thread::spawn(move || {
                    let mut claims = Vec::new();
                    for step in 0..40u64 {
                        device.write((index + THREADS * step) * SLOT_BYTES, &[(1 + index) as u8; SLOT]).unwrap();
                        if (step + index + round) % 3 == 0 {
                            device.flush().unwrap();
                            claims.push((memory.sequence(), step));
                        }
                    }
                    (index, claims)
                })
            })
            .collect();
        let claims: Vec<_> = threads.into_iter().map(|thread| thread.join().unwrap()).collect();
        for (index, claims) in claims {
            for (sequence, last_step) in claims.into_iter().step_by(3) {
                let options = CrashOptions { keep_of_256: 0, tear: false, reorder: false };
                let image: Arc<dyn Store> = Arc::new(memory.crash_image(sequence, round, options));
                let (device, _) = open(&image, &world.catalog).unwrap();
                let content = read_all(&device);
                for (slot, bytes) in content.chunks(SLOT).enumerate() {
                    let (owner, step) = (slot as u64 % THREADS, slot as u64 / THREADS);
                    let before = if slot < content.len() / SLOT / 2 { 0xAA } else { 0 };
                    let written = (1 + owner) as u8;
                    let flushed = owner == index && step <= last_step;
                    assert!(
                        bytes.iter().all(|&byte| byte == written) || (!flushed && bytes.iter().all(|&byte| byte == before)),
                        "round {round}: after a flush by thread {index}, slot {slot} of thread {owner} begins with {:#x}",
                        bytes[0]
                    );
                }
            }
        }
    }
}

#[test]
fn partial_first_writes_of_two_threads_to_one_slot_both_stay() {
    let (_, world) = slow_world(false);
    let threads: Vec<_> = (0..2usize)
        .map(|half| {
            let device = world.device.clone();
            thread::spawn(move || {
                for slot in 0..SLOTS {
                    device.write(slot * SLOT_BYTES + (half * SLOT / 2) as u64, &[1 + half as u8; SLOT / 2]).unwrap();
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    for (slot, bytes) in read_all(&world.device).chunks(SLOT).enumerate() {
        assert!(
            bytes[..SLOT / 2].iter().all(|&byte| byte == 1) && bytes[SLOT / 2..].iter().all(|&byte| byte == 2),
            "slot {slot} lost a half"
        );
    }
}

#[test]
fn freeing_orphans_never_takes_a_slot_that_is_being_written_for_the_first_time() {
    let (memory, world) = slow_world(false);
    // What an earlier crash left: bytes in the active layer that no slot refers to.
    let active = memory.open_layer(super::tests::layer_id(world.catalog.active), OpenMode::ReadWrite).unwrap();
    active.write(0, &[IoSlice::new(&vec![0xEE; (SLOTS * SLOT_BYTES) as usize])]).unwrap();
    let writer = {
        let device = world.device.clone();
        thread::spawn(move || {
            for slot in 0..SLOTS {
                device.write(slot * SLOT_BYTES, &[7; SLOT]).unwrap();
            }
        })
    };
    while !writer.is_finished() {
        world.device.punch_orphans().unwrap();
    }
    writer.join().unwrap();
    assert!(read_all(&world.device).iter().all(|&byte| byte == 7));
}

#[test]
fn a_discard_and_a_first_write_of_one_slot_leave_either_the_bytes_or_zeros() {
    let (_, world) = slow_world(false);
    let threads: Vec<_> = (0..2u64)
        .map(|which| {
            let device = world.device.clone();
            thread::spawn(move || {
                let mut random = Random(which);
                for slot in 0..SLOTS {
                    if which == 0 {
                        device.write(slot * SLOT_BYTES + 1000, &[9; 96]).unwrap();
                    } else {
                        device.discard(slot * SLOT_BYTES, SLOT_BYTES * (1 + random.below(3)).min(SLOTS - slot)).unwrap();
                    }
                }
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    for (slot, bytes) in read_all(&world.device).chunks(SLOT).enumerate() {
        let (middle, rest) = (&bytes[1000..1096], [&bytes[..1000], &bytes[1096..]].concat());
        assert!(middle.iter().all(|&byte| byte == 9) || middle.iter().all(|&byte| byte == 0), "slot {slot} has half of a write");
        assert!(rest.iter().all(|&byte| byte == 0), "slot {slot} was discarded, by this write or after it, and shows old bytes");
    }
}
