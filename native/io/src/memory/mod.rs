//! The memory kind, and the crash recorder: it can show every state a power cut could have left behind (see `history.rs` for what
//! survives one).
//!
//! Locks are taken in this order: the names, a layer's or segment's content, the history. An operation is applied and recorded
//! under its object's content lock, so that the history of an object is in the order in which its content changed.
mod history;
mod sparse;

use crate::error::{layer_object, segment_object};
use crate::store::is_record_name;
use crate::{
    Extent, IoError, IoErrorCode, LayerEntry, LayerId, LayerIo, OpenMode, Result, SegmentIo, Store, StoreCapabilities, StoreLock,
    StoreUsage,
};
pub use history::tick;
use history::{Event, History, Image, LayerOperation, ObjectNumber, SegmentOperation};
use parking_lot::{Mutex, RwLock};
use sparse::{PAGE_BYTES, Sparse};
use std::collections::BTreeMap;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// How a crash image is drawn.
#[derive(Debug, Clone, Copy)]
pub struct CrashOptions {
    /// Unsynced operations survive each with this probability, in 1/256; 255: all of them.
    pub keep_of_256: u8,
    /// Whether a surviving write may be torn at 512-byte sectors.
    pub tear: bool,
    /// Whether surviving operations on the same object may be applied in another order.
    pub reorder: bool,
}

/// Layers as pages in memory. The lock is the store's own: nobody outside the process can see it.
pub struct MemoryStore {
    shared: Arc<Shared>,
}

/// What is left of the capacity. Layers and segments count until their last handle is gone, like files.
struct Account {
    capacity_bytes: u64,
    used_bytes: AtomicU64,
}

impl Account {
    /// Takes the bytes, or nothing if there is not as much left.
    fn take(&self, bytes: u64) -> bool {
        let fits = |used: u64| used.checked_add(bytes).filter(|sum| *sum <= self.capacity_bytes);
        bytes == 0 || self.used_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, fits).is_ok()
    }

    fn give_back(&self, bytes: u64) {
        self.used_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }
}

struct Shared {
    account: Account,
    names: Mutex<Names>,
    history: Option<Mutex<History>>,
    owner: Mutex<Option<String>>,
}

#[derive(Default)]
struct Names {
    next_object: ObjectNumber,
    layers: BTreeMap<LayerId, Arc<Layer>>,
    segments: BTreeMap<(LayerId, u64), Arc<Segment>>,
    records: BTreeMap<String, Arc<[u8]>>,
}

struct Layer {
    object: ObjectNumber,
    id: LayerId,
    content: RwLock<Sparse>,
    shared: Arc<Shared>,
}

impl Drop for Layer {
    fn drop(&mut self) {
        self.shared.account.give_back(self.content.get_mut().allocated_bytes());
    }
}

struct Segment {
    object: ObjectNumber,
    layer: LayerId,
    base_lsn: u64,
    content: RwLock<Arc<Vec<u8>>>,
    shared: Arc<Shared>,
}

impl Drop for Segment {
    fn drop(&mut self) {
        self.shared.account.give_back(self.content.get_mut().len() as u64);
    }
}

impl Shared {
    fn record(&self, event: impl FnOnce() -> Event) {
        if let Some(history) = &self.history {
            history.lock().push(event());
        }
    }
}

impl Names {
    fn number_object(&mut self) -> ObjectNumber {
        self.next_object += 1;
        self.next_object
    }
}

impl MemoryStore {
    /// `capacity_bytes`: writes beyond it fail with NoSpace. `record`: keep the history for crash images.
    pub fn new(capacity_bytes: u64, record: bool) -> MemoryStore {
        let account = Account { capacity_bytes, used_bytes: AtomicU64::new(0) };
        let history = record.then(|| Mutex::new(History::default()));
        MemoryStore { shared: Arc::new(Shared { account, names: Mutex::default(), history, owner: Mutex::new(None) }) }
    }

    /// The layers there are, ascending.
    pub fn layer_ids(&self) -> Vec<LayerId> {
        self.shared.names.lock().layers.keys().copied().collect()
    }

    /// Number of the last event (write, punch, append, truncate, sync, create, remove, record write) so far. Always 0 if the
    /// store does not record.
    pub fn sequence(&self) -> u64 {
        self.shared.history.as_ref().map_or(0, |history| history.lock().sequence())
    }

    /// Events after `from` up to now that are sync boundaries (sync of a layer or segment, create_layer, remove, write_record).
    pub fn boundaries(&self, from: u64) -> Vec<u64> {
        self.shared.history.as_ref().map_or_else(Vec::new, |history| history.lock().boundaries(from))
    }

    /// What could be found after a power cut just after event `sequence`: everything synced, and a random subset of the
    /// rest as `seed` and `options` decide. The new store does not record and starts all synced.
    ///
    /// # Panics
    /// If the store does not record, or `sequence` is not in what is remembered.
    pub fn crash_image(&self, sequence: u64, seed: u64, options: CrashOptions) -> MemoryStore {
        let image = self.history().lock().crash_image(sequence, seed, options);
        MemoryStore::from_image(image, self.shared.account.capacity_bytes, false)
    }

    /// A store with the same content, all synced, that records from here on: for crashes while the recovery from a crash is under
    /// way. Handles of this store stay with this one.
    pub fn to_recording(&self) -> MemoryStore {
        let names = self.shared.names.lock();
        let image = Image {
            layers: names.layers.values().map(|layer| (layer.id, layer.content.read().clone())).collect(),
            segments: names.segments.iter().map(|(name, segment)| (*name, Arc::clone(&segment.content.read()))).collect(),
            records: names.records.clone(),
        };
        drop(names);
        MemoryStore::from_image(image, self.shared.account.capacity_bytes, true)
    }

    fn from_image(image: Image, capacity_bytes: u64, record: bool) -> MemoryStore {
        let mut history = History::default();
        let mut used_bytes: u64 = image.records.values().map(|bytes| bytes.len() as u64).sum();
        let store = MemoryStore::new(capacity_bytes, record);
        let mut names = Names::default();
        for (id, content) in image.layers {
            used_bytes += content.allocated_bytes();
            let object = names.number_object();
            if record {
                history.start_with_layer(object, id, content.clone());
            }
            let layer = Layer { object, id, content: RwLock::new(content), shared: Arc::clone(&store.shared) };
            names.layers.insert(id, Arc::new(layer));
        }
        for ((layer, base_lsn), content) in image.segments {
            used_bytes += content.len() as u64;
            let object = names.number_object();
            if record {
                history.start_with_segment(object, layer, base_lsn, Arc::clone(&content));
            }
            let segment = Segment { object, layer, base_lsn, content: RwLock::new(content), shared: Arc::clone(&store.shared) };
            names.segments.insert((layer, base_lsn), Arc::new(segment));
        }
        history.start_with_records(image.records.clone());
        names.records = image.records;
        store.shared.account.used_bytes.store(used_bytes, Ordering::Relaxed);
        *store.shared.names.lock() = names;
        if let Some(started) = &store.shared.history {
            *started.lock() = history;
        }
        store
    }

    /// As `boundaries`, by ticks (`tick`), which order the events of several stores: the boundaries after a tick.
    pub fn boundary_ticks(&self, from: u64) -> Vec<u64> {
        self.shared.history.as_ref().map_or_else(Vec::new, |history| history.lock().boundary_ticks(from))
    }

    /// Number of the last event of this store up to a tick.
    pub fn sequence_at(&self, tick: u64) -> u64 {
        self.shared.history.as_ref().map_or(0, |history| history.lock().sequence_at(tick))
    }

    /// Forgets the history before `sequence`: no crash image before it can be asked for any more.
    ///
    /// # Panics
    /// If the store does not record, or there is no event `sequence` yet.
    pub fn forget_before(&self, sequence: u64) {
        self.history().lock().forget_before(sequence);
    }

    fn history(&self) -> &Mutex<History> {
        self.shared.history.as_ref().expect("this store was made without record")
    }
}

impl Drop for MemoryStore {
    fn drop(&mut self) {
        // Layers and segments hold `shared`, which holds the names: without this the two would keep each other for ever. A store
        // is gone with its last owner; handles that are still open stay usable.
        let names = std::mem::take(&mut *self.shared.names.lock());
        drop(names);
    }
}

impl Store for MemoryStore {
    fn capabilities(&self) -> StoreCapabilities {
        StoreCapabilities {
            copy_unit_bytes: 4096,
            punch_unit_bytes: PAGE_BYTES as u32,
            can_clone: false,
            ack_is_durable: false,
            persistent: false,
            // What is recorded is there to be broken, so it grows ahead as files do.
            segment_growth_bytes: if self.shared.history.is_some() { PAGE_BYTES as u32 } else { 0 },
            waits_for_network: false,
            is_fenceable: false,
            answers_need_proof: false,
        }
    }

    fn create_layer(&self, id: LayerId) -> Result<()> {
        let mut names = self.shared.names.lock();
        if names.layers.contains_key(&id) {
            return Err(IoError::new(IoErrorCode::Exists, "create", layer_object(id), 0, "the layer is there already"));
        }
        let object = names.number_object();
        let layer = Layer { object, id, content: RwLock::default(), shared: Arc::clone(&self.shared) };
        names.layers.insert(id, Arc::new(layer));
        self.shared.record(|| Event::CreateLayer { object, id });
        Ok(())
    }

    fn open_layer(&self, id: LayerId, mode: OpenMode) -> Result<Arc<dyn LayerIo>> {
        let layer = self.shared.names.lock().layers.get(&id).cloned();
        let layer = layer.ok_or_else(|| IoError::new(IoErrorCode::NotFound, "open", layer_object(id), 0, "there is no such layer"))?;
        Ok(Arc::new(MemoryLayer { layer, is_writable: mode == OpenMode::ReadWrite }))
    }

    fn remove_layer(&self, id: LayerId) -> Result<()> {
        let mut names = self.shared.names.lock();
        let bases: Vec<u64> = names.segments.range((id, 0)..=(id, u64::MAX)).map(|((_, base_lsn), _)| *base_lsn).collect();
        for base_lsn in bases {
            if let Some(segment) = names.segments.remove(&(id, base_lsn)) {
                self.shared.record(|| Event::RemoveSegment { object: segment.object });
            }
        }
        names.layers.remove(&id);
        self.shared.record(|| Event::RemoveLayer { id });
        Ok(())
    }

    fn list_layers(&self) -> Result<Vec<LayerEntry>> {
        let names = self.shared.names.lock();
        let entries = names.layers.values().map(|layer| {
            let content = layer.content.read();
            LayerEntry { id: layer.id, allocated_bytes: content.allocated_bytes(), length_bytes: content.length_bytes() }
        });
        Ok(entries.collect())
    }

    /// Total is the capacity; journal, records and removed layers that are still open use of it, stored are the layers alone.
    fn usage(&self) -> Result<StoreUsage> {
        let total_bytes = self.shared.account.capacity_bytes;
        let free_bytes = total_bytes.saturating_sub(self.shared.account.used_bytes.load(Ordering::Relaxed));
        let stored_bytes = self.list_layers()?.iter().map(|entry| entry.allocated_bytes).sum();
        Ok(StoreUsage { total_bytes, free_bytes, stored_bytes, reserve_bytes: 0 })
    }

    fn list_segments(&self, layer: LayerId) -> Result<Vec<u64>> {
        let names = self.shared.names.lock();
        Ok(names.segments.range((layer, 0)..=(layer, u64::MAX)).map(|((_, base_lsn), _)| *base_lsn).collect())
    }

    fn create_segment(&self, layer: LayerId, base_lsn: u64, _epoch: u64) -> Result<Arc<dyn SegmentIo>> {
        let mut names = self.shared.names.lock();
        if names.segments.contains_key(&(layer, base_lsn)) {
            let object = segment_object(layer, base_lsn);
            return Err(IoError::new(IoErrorCode::Exists, "create", object, 0, "the segment is there already"));
        }
        let object = names.number_object();
        let segment = Segment { object, layer, base_lsn, content: RwLock::default(), shared: Arc::clone(&self.shared) };
        let segment = Arc::new(segment);
        names.segments.insert((layer, base_lsn), Arc::clone(&segment));
        self.shared.record(|| Event::CreateSegment { object, layer, base_lsn });
        Ok(Arc::new(MemorySegment { segment }))
    }

    fn open_segment(&self, layer: LayerId, base_lsn: u64) -> Result<Arc<dyn SegmentIo>> {
        let segment = self.shared.names.lock().segments.get(&(layer, base_lsn)).cloned();
        let missing = || IoError::new(IoErrorCode::NotFound, "open", segment_object(layer, base_lsn), 0, "there is no such segment");
        Ok(Arc::new(MemorySegment { segment: segment.ok_or_else(missing)? }))
    }

    fn remove_segment(&self, layer: LayerId, base_lsn: u64) -> Result<()> {
        let mut names = self.shared.names.lock();
        if let Some(segment) = names.segments.remove(&(layer, base_lsn)) {
            self.shared.record(|| Event::RemoveSegment { object: segment.object });
        }
        Ok(())
    }

    fn read_record(&self, name: &str) -> Result<Option<Vec<u8>>> {
        check_record_name(name)?;
        Ok(self.shared.names.lock().records.get(name).map(|bytes| bytes.to_vec()))
    }

    fn write_record(&self, name: &str, bytes: &[u8]) -> Result<()> {
        check_record_name(name)?;
        let mut names = self.shared.names.lock();
        // The old record counts until the new one is in its place, like a file that is renamed over it.
        if !self.shared.account.take(bytes.len() as u64) {
            return Err(no_space("write", format!("record {name}"), 0));
        }
        let bytes: Arc<[u8]> = bytes.into();
        if let Some(old) = names.records.insert(name.to_owned(), Arc::clone(&bytes)) {
            self.shared.account.give_back(old.len() as u64);
        }
        self.shared.record(|| Event::WriteRecord { name: name.to_owned(), bytes });
        Ok(())
    }

    fn list_records(&self, prefix: &str) -> Result<Vec<String>> {
        let names = self.shared.names.lock();
        Ok(names.records.keys().filter(|name| name.starts_with(prefix)).cloned().collect())
    }

    fn remove_record(&self, name: &str) -> Result<()> {
        check_record_name(name)?;
        let mut names = self.shared.names.lock();
        if let Some(old) = names.records.remove(name) {
            self.shared.account.give_back(old.len() as u64);
            self.shared.record(|| Event::RemoveRecord { name: name.to_owned() });
        }
        Ok(())
    }

    fn lock(&self, owner: &str) -> Result<StoreLock> {
        let mut held = self.shared.owner.lock();
        if let Some(owner) = &*held {
            return Err(IoError::new(IoErrorCode::Locked, "lock", "memory store", 0, format!("locked by {owner}")));
        }
        *held = Some(owner.to_owned());
        Ok(StoreLock { guard: Box::new(HeldLock { shared: Arc::clone(&self.shared) }) })
    }

    /// Memory has no reserve.
    fn release_reserve(&self) -> Result<()> {
        Ok(())
    }

    fn restore_reserve(&self) -> Result<u64> {
        Ok(0)
    }

    fn set_reserve(&self, _bytes: u64) -> Result<u64> {
        Ok(0)
    }
}

struct HeldLock {
    shared: Arc<Shared>,
}

impl Drop for HeldLock {
    fn drop(&mut self) {
        *self.shared.owner.lock() = None;
    }
}

fn check_record_name(name: &str) -> Result<()> {
    if is_record_name(name) {
        return Ok(());
    }
    Err(IoError::from_errno("record", format!("record {name}"), 0, libc::EINVAL))
}

fn no_space(operation: &'static str, object: String, offset_bytes: u64) -> IoError {
    IoError::from_errno(operation, object, offset_bytes, libc::ENOSPC)
}

struct MemoryLayer {
    layer: Arc<Layer>,
    is_writable: bool,
}

impl MemoryLayer {
    /// The range must lie in the address space of a file, as the other kinds demand it.
    fn check_range(&self, operation: &'static str, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        match offset_bytes.checked_add(length_bytes) {
            Some(end) if end <= i64::MAX as u64 => Ok(()),
            _ => Err(IoError::from_errno(operation, layer_object(self.layer.id), offset_bytes, libc::EFBIG)),
        }
    }

    /// Checks, takes the space, applies and records.
    fn mutate(&self, name: &'static str, offset_bytes: u64, length_bytes: u64, operation: LayerOperation) -> Result<()> {
        if !self.is_writable {
            let object = layer_object(self.layer.id);
            return Err(IoError::new(IoErrorCode::ReadOnly, name, object, offset_bytes, "the layer was opened read-only"));
        }
        self.check_range(name, offset_bytes, length_bytes)?;
        let account = &self.layer.shared.account;
        let mut content = self.layer.content.write();
        if !matches!(operation, LayerOperation::Punch { .. }) && !account.take(content.missing_bytes(offset_bytes, length_bytes)) {
            return Err(no_space(name, layer_object(self.layer.id), offset_bytes));
        }
        let before = content.allocated_bytes();
        operation.apply(&mut content);
        account.give_back(before.saturating_sub(content.allocated_bytes()));
        self.layer.shared.record(|| Event::Layer { object: self.layer.object, operation: Arc::new(operation) });
        Ok(())
    }
}

impl LayerIo for MemoryLayer {
    fn read(&self, offset_bytes: u64, buffers: &mut [IoSliceMut<'_>]) -> Result<()> {
        let length = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        self.check_range("read", offset_bytes, length)?;
        let content = self.layer.content.read();
        let mut offset = offset_bytes;
        for buffer in buffers {
            content.read(offset, buffer);
            offset += buffer.len() as u64;
        }
        Ok(())
    }

    fn write(&self, offset_bytes: u64, buffers: &[IoSlice<'_>]) -> Result<()> {
        let data: Arc<[u8]> = match buffers {
            [one] => Arc::from(&**one),
            several => several.iter().flat_map(|buffer| buffer.iter().copied()).collect::<Vec<u8>>().into(),
        };
        self.mutate("write", offset_bytes, data.len() as u64, LayerOperation::Write { offset_bytes, data })
    }

    fn punch(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        self.mutate("punch", offset_bytes, length_bytes, LayerOperation::Punch { offset_bytes, length_bytes })
    }

    fn zero_allocated(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        self.mutate("zero", offset_bytes, length_bytes, LayerOperation::Zero { offset_bytes, length_bytes })
    }

    fn sync(&self) -> Result<()> {
        self.layer.shared.record(|| Event::SyncLayer { object: self.layer.object });
        Ok(())
    }

    fn extents(&self, offset_bytes: u64, length_bytes: u64, out: &mut Vec<Extent>) -> Result<()> {
        self.check_range("extents", offset_bytes, length_bytes)?;
        self.layer.content.read().extents(offset_bytes, length_bytes, out);
        Ok(())
    }

    fn length_bytes(&self) -> Result<u64> {
        Ok(self.layer.content.read().length_bytes())
    }

    fn allocated_bytes(&self) -> Result<u64> {
        Ok(self.layer.content.read().allocated_bytes())
    }

    fn drop_cache(&self) -> Result<()> {
        Ok(())
    }
}

struct MemorySegment {
    segment: Arc<Segment>,
}

impl MemorySegment {
    fn record(&self, operation: SegmentOperation) {
        self.segment.shared.record(|| Event::Segment { object: self.segment.object, operation: Arc::new(operation) });
    }
}

impl SegmentIo for MemorySegment {
    fn read_all(&self) -> Result<Vec<u8>> {
        Ok(self.segment.content.read().to_vec())
    }

    fn append(&self, offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        let mut content = self.segment.content.write();
        let (start, end) = (offset_bytes as usize, offset_bytes as usize + bytes.len());
        assert!(start <= content.len(), "a segment is written without gaps");
        if !self.segment.shared.account.take(end.saturating_sub(content.len()) as u64) {
            return Err(no_space("append", segment_object(self.segment.layer, self.segment.base_lsn), offset_bytes));
        }
        let present = Arc::make_mut(&mut content);
        present.resize(end.max(present.len()), 0);
        present[start..end].copy_from_slice(bytes);
        self.record(SegmentOperation::Append { offset_bytes, data: bytes.into() });
        Ok(())
    }

    fn truncate(&self, length_bytes: u64) -> Result<()> {
        let mut content = self.segment.content.write();
        let length = (content.len() as u64).min(length_bytes) as usize;
        self.segment.shared.account.give_back((content.len() - length) as u64);
        Arc::make_mut(&mut content).truncate(length);
        self.record(SegmentOperation::Truncate { length_bytes });
        Ok(())
    }

    fn sync(&self) -> Result<()> {
        self.segment.shared.record(|| Event::SyncSegment { object: self.segment.object });
        Ok(())
    }

    fn length_bytes(&self) -> Result<u64> {
        Ok(self.segment.content.read().len() as u64)
    }
}
