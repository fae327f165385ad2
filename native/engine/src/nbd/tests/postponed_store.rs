//! A store whose requests that were begun end when the test says so, in the order that it says, as those of a cluster do.
use atoll_io::{
    Begun, Ending, Extent, IoError, IoErrorCode, LayerEntry, LayerId, LayerIo, OpenMode, Result, SegmentIo, Store, StoreCapabilities,
    StoreLock, StoreUsage,
};
use parking_lot::{Condvar, Mutex};
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

struct Waiting {
    layer: Arc<dyn LayerIo>,
    offset_bytes: u64,
    /// `None`: a read.
    data: Option<Vec<u8>>,
    ending: Box<dyn Ending>,
}

struct LateWrite {
    layer: Arc<dyn LayerIo>,
    offset_bytes: u64,
    data: Vec<u8>,
}

#[derive(Default)]
struct Shared {
    waiting: Mutex<Vec<Waiting>>,
    changed: Condvar,
    /// Writes that were answered as failed, and are carried out all the same.
    late: Mutex<Vec<LateWrite>>,
    is_silent: AtomicBool,
    is_abandoned: AtomicBool,
    is_fenced: AtomicBool,
    /// As much is under way as there should be.
    is_full: AtomicBool,
    answers_need_proof: AtomicBool,
    /// The next proof comes too late.
    is_proof_late: AtomicBool,
    proof_count: AtomicUsize,
}

/// See above. What is not begun goes to the store inside at once.
pub(super) struct PostponedStore {
    inner: Arc<dyn Store>,
    shared: Arc<Shared>,
}

fn lost(operation: &'static str) -> IoError {
    IoError::new(IoErrorCode::Unavailable, operation, "the cluster", 0, "nobody answered")
}

impl PostponedStore {
    pub(super) fn new(inner: Arc<dyn Store>) -> PostponedStore {
        PostponedStore { inner, shared: Arc::default() }
    }

    /// Waits until so many requests are under way.
    pub(super) fn wait_begun(&self, count: usize) {
        let mut waiting = self.shared.waiting.lock();
        while waiting.len() < count {
            self.shared.changed.wait(&mut waiting);
        }
        assert_eq!(waiting.len(), count);
    }

    fn take(&self, offset_bytes: u64) -> Waiting {
        let mut waiting = self.shared.waiting.lock();
        let index = waiting.iter().position(|one| one.offset_bytes == offset_bytes).unwrap();
        waiting.remove(index)
    }

    /// The first of those under way that began at this offset ends well.
    pub(super) fn end_at(&self, offset_bytes: u64) {
        end(self.take(offset_bytes));
    }

    /// It ends without having been carried out.
    pub(super) fn lose_at(&self, offset_bytes: u64) {
        self.take(offset_bytes).ending.ended(Err(lost("lose")));
    }

    /// A write is answered as failed, and may be carried out later: from now on the cluster is silent.
    pub(super) fn time_out_at(&self, offset_bytes: u64) {
        let Waiting { layer, offset_bytes, data, ending } = self.take(offset_bytes);
        self.shared.late.lock().push(LateWrite { layer, offset_bytes, data: data.expect("it is a write") });
        self.shared.is_silent.store(true, Ordering::SeqCst);
        ending.ended(Err(lost("write")));
    }

    /// The cluster answers again who asks for what is late; that is carried out before.
    pub(super) fn speak(&self) {
        self.shared.is_silent.store(false, Ordering::SeqCst);
    }

    /// Whatever is late is carried out, whoever may see it.
    pub(super) fn land_late(&self) {
        self.shared.land_late();
    }

    /// Any request ends well, soon. False: `is_over`, and there is none.
    pub(super) fn end_some(&self, choose: impl FnOnce(usize) -> usize, is_over: &AtomicBool) -> bool {
        let mut waiting = self.shared.waiting.lock();
        while waiting.is_empty() {
            if is_over.load(Ordering::SeqCst) {
                return false;
            }
            self.shared.changed.wait_for(&mut waiting, std::time::Duration::from_millis(1));
        }
        let index = choose(waiting.len());
        let one = waiting.remove(index);
        drop(waiting);
        end(one);
        true
    }

    /// Whatever is under way is lost, and nothing is begun any more.
    pub(super) fn abandon(&self) {
        self.shared.is_abandoned.store(true, Ordering::SeqCst);
        let waiting = std::mem::take(&mut *self.shared.waiting.lock());
        waiting.into_iter().for_each(|one| one.ending.ended(Err(lost("abandon"))));
    }

    /// Somebody else has the pool from now on, or not any more.
    pub(super) fn set_fenced(&self, is_fenced: bool) {
        self.shared.is_fenced.store(is_fenced, Ordering::SeqCst);
    }

    /// From now on nothing more is begun.
    pub(super) fn fill_up(&self) {
        self.shared.is_full.store(true, Ordering::SeqCst);
    }

    /// No answer of a device that is opened from now on goes out without a proof.
    pub(super) fn want_proofs(&self) {
        self.shared.answers_need_proof.store(true, Ordering::SeqCst);
    }

    /// The next proof is answered when it proves nothing any more.
    pub(super) fn delay_proof(&self) {
        self.shared.is_proof_late.store(true, Ordering::SeqCst);
    }

    pub(super) fn proof_count(&self) -> usize {
        self.shared.proof_count.load(Ordering::SeqCst)
    }
}

impl Shared {
    fn land_late(&self) {
        for LateWrite { layer, offset_bytes, data } in self.late.lock().drain(..) {
            layer.write(offset_bytes, &[IoSlice::new(&data)]).unwrap();
        }
    }
}

fn end(Waiting { layer, offset_bytes, data, mut ending }: Waiting) {
    let result = match data {
        Some(data) => layer.write(offset_bytes, &[IoSlice::new(&data)]),
        None => layer.read(offset_bytes, &mut [IoSliceMut::new(ending.room())]),
    };
    ending.ended(result);
}

struct PostponedLayer {
    inner: Arc<dyn LayerIo>,
    shared: Arc<Shared>,
}

impl PostponedLayer {
    fn begin(&self, offset_bytes: u64, data: Option<Vec<u8>>, ending: Box<dyn Ending>) -> Begun {
        let mut waiting = self.shared.waiting.lock();
        if self.shared.is_abandoned.load(Ordering::SeqCst) {
            return Err(ending);
        }
        waiting.push(Waiting { layer: self.inner.clone(), offset_bytes, data, ending });
        drop(waiting);
        self.shared.changed.notify_all();
        Ok(())
    }
}

impl LayerIo for PostponedLayer {
    fn read(&self, offset_bytes: u64, buffers: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.inner.read(offset_bytes, buffers)
    }
    fn is_settled(&self) -> bool {
        self.shared.late.lock().is_empty()
    }
    fn settle(&self) -> Result<()> {
        if self.is_settled() {
            return Ok(());
        }
        if self.shared.is_silent.load(Ordering::SeqCst) {
            return Err(lost("settle"));
        }
        self.shared.land_late();
        Ok(())
    }
    fn read_now(&self, _offset_bytes: u64, _buffer: &mut [u8]) -> Result<bool> {
        Ok(false)
    }
    fn write(&self, offset_bytes: u64, buffers: &[IoSlice<'_>]) -> Result<()> {
        self.inner.write(offset_bytes, buffers)
    }
    fn may_begin(&self, _length_bytes: u64) -> bool {
        !self.shared.is_full.load(Ordering::SeqCst)
    }
    fn begin_read(&self, offset_bytes: u64, ending: Box<dyn Ending>) -> Begun {
        self.begin(offset_bytes, None, ending)
    }
    fn begin_write(&self, offset_bytes: u64, data: &[u8], ending: Box<dyn Ending>) -> Begun {
        self.begin(offset_bytes, Some(data.to_vec()), ending)
    }
    fn punch(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        self.inner.punch(offset_bytes, length_bytes)
    }
    fn zero_allocated(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        self.inner.zero_allocated(offset_bytes, length_bytes)
    }
    fn sync(&self) -> Result<()> {
        self.inner.sync()
    }
    fn extents(&self, offset_bytes: u64, length_bytes: u64, out: &mut Vec<Extent>) -> Result<()> {
        self.inner.extents(offset_bytes, length_bytes, out)
    }
    fn length_bytes(&self) -> Result<u64> {
        self.inner.length_bytes()
    }
    fn allocated_bytes(&self) -> Result<u64> {
        self.inner.allocated_bytes()
    }
    fn drop_cache(&self) -> Result<()> {
        self.inner.drop_cache()
    }
}

impl Store for PostponedStore {
    fn capabilities(&self) -> StoreCapabilities {
        let answers_need_proof = self.shared.answers_need_proof.load(Ordering::SeqCst);
        StoreCapabilities { waits_for_network: true, is_fenceable: true, answers_need_proof, ..self.inner.capabilities() }
    }
    fn create_layer(&self, id: LayerId) -> Result<()> {
        self.inner.create_layer(id)
    }
    fn open_layer(&self, id: LayerId, mode: OpenMode) -> Result<Arc<dyn LayerIo>> {
        Ok(Arc::new(PostponedLayer { inner: self.inner.open_layer(id, mode)?, shared: self.shared.clone() }))
    }
    fn remove_layer(&self, id: LayerId) -> Result<()> {
        self.inner.remove_layer(id)
    }
    fn list_layers(&self) -> Result<Vec<LayerEntry>> {
        self.inner.list_layers()
    }
    fn usage(&self) -> Result<StoreUsage> {
        self.inner.usage()
    }
    fn list_segments(&self, layer: LayerId) -> Result<Vec<u64>> {
        self.inner.list_segments(layer)
    }
    fn create_segment(&self, layer: LayerId, base_lsn: u64, epoch: u64) -> Result<Arc<dyn SegmentIo>> {
        self.inner.create_segment(layer, base_lsn, epoch)
    }
    fn open_segment(&self, layer: LayerId, base_lsn: u64) -> Result<Arc<dyn SegmentIo>> {
        self.inner.open_segment(layer, base_lsn)
    }
    fn remove_segment(&self, layer: LayerId, base_lsn: u64) -> Result<()> {
        self.inner.remove_segment(layer, base_lsn)
    }
    fn read_record(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.inner.read_record(name)
    }
    fn write_record(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.inner.write_record(name, bytes)
    }
    fn list_records(&self, prefix: &str) -> Result<Vec<String>> {
        self.inner.list_records(prefix)
    }
    fn remove_record(&self, name: &str) -> Result<()> {
        self.inner.remove_record(name)
    }
    fn lock(&self, owner: &str) -> Result<StoreLock> {
        self.inner.lock(owner)
    }
    fn prove_held(&self) -> Result<()> {
        self.shared.proof_count.fetch_add(1, Ordering::SeqCst);
        if self.shared.is_proof_late.swap(false, Ordering::SeqCst) {
            std::thread::sleep(atoll_io::PROOF_TIME_MAX);
        }
        if self.shared.is_fenced.load(Ordering::SeqCst) { Err(lost("prove")) } else { Ok(()) }
    }
    fn release_reserve(&self) -> Result<()> {
        self.inner.release_reserve()
    }
    fn restore_reserve(&self) -> Result<u64> {
        self.inner.restore_reserve()
    }
    fn set_reserve(&self, bytes: u64) -> Result<u64> {
        self.inner.set_reserve(bytes)
    }
}
