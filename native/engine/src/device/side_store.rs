//! Several stores in one: the layers of each have ids of their own in the store inside, so that one recorder has the history of all of
//! them in its order, and none of them knows what another one has.
use atoll_io::{LayerEntry, LayerId, LayerIo, OpenMode, Result, SegmentIo, Store, StoreCapabilities, StoreLock, StoreUsage};
use std::sync::Arc;

/// The side that says of itself what a cluster does.
pub(super) const DISTANT: u8 = 2;

pub(super) struct SideStore {
    pub(super) inner: Arc<dyn Store>,
    pub(super) number: u8,
}

impl SideStore {
    fn inner_id(&self, id: LayerId) -> LayerId {
        let mut bytes = id.0;
        bytes[0] = self.number;
        LayerId(bytes)
    }
}

impl Store for SideStore {
    fn capabilities(&self) -> StoreCapabilities {
        let is_distant = self.number == DISTANT;
        StoreCapabilities {
            waits_for_network: is_distant,
            is_fenceable: is_distant,
            answers_need_proof: is_distant,
            ..self.inner.capabilities()
        }
    }
    fn create_layer(&self, id: LayerId) -> Result<()> {
        self.inner.create_layer(self.inner_id(id))
    }
    fn open_layer(&self, id: LayerId, mode: OpenMode) -> Result<Arc<dyn LayerIo>> {
        self.inner.open_layer(self.inner_id(id), mode)
    }
    fn remove_layer(&self, id: LayerId) -> Result<()> {
        self.inner.remove_layer(self.inner_id(id))
    }
    fn list_layers(&self) -> Result<Vec<LayerEntry>> {
        let mut entries = self.inner.list_layers()?;
        entries.retain(|entry| entry.id.0[0] == self.number);
        Ok(entries)
    }
    fn usage(&self) -> Result<StoreUsage> {
        self.inner.usage()
    }
    fn list_segments(&self, layer: LayerId) -> Result<Vec<u64>> {
        self.inner.list_segments(self.inner_id(layer))
    }
    fn create_segment(&self, layer: LayerId, base_lsn: u64) -> Result<Arc<dyn SegmentIo>> {
        self.inner.create_segment(self.inner_id(layer), base_lsn)
    }
    fn open_segment(&self, layer: LayerId, base_lsn: u64) -> Result<Arc<dyn SegmentIo>> {
        self.inner.open_segment(self.inner_id(layer), base_lsn)
    }
    fn remove_segment(&self, layer: LayerId, base_lsn: u64) -> Result<()> {
        self.inner.remove_segment(self.inner_id(layer), base_lsn)
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
