//! The layers a device may meet: an immutable table, replaced as a whole, looked up without locks.
use super::LayerSpec;
use crate::{EngineError, Result};
use atoll_io::{Journal, JournalIdentity, LayerIo, OpenMode};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

/// A layer that is only read; opened at its first read.
pub(super) struct ReadLayer {
    pub(super) spec: LayerSpec,
    io: OnceLock<Arc<dyn LayerIo>>,
}

impl ReadLayer {
    pub(super) fn new(spec: LayerSpec) -> ReadLayer {
        ReadLayer { spec, io: OnceLock::new() }
    }

    pub(super) fn opened(spec: LayerSpec, io: Arc<dyn LayerIo>) -> ReadLayer {
        ReadLayer { spec, io: OnceLock::from(io) }
    }

    pub(super) fn io(&self) -> Result<&Arc<dyn LayerIo>> {
        if let Some(io) = self.io.get() {
            return Ok(io);
        }
        let opened = self
            .spec
            .store
            .open_layer(self.spec.id, OpenMode::ReadOnly)
            .map_err(|error| EngineError::from(error).with("layerId", self.spec.id))?;
        // Two threads may open it at once; one handle wins, the other is dropped.
        Ok(self.io.get_or_init(|| opened))
    }
}

/// The layer that the volume writes (I1), with its journal.
pub(super) struct ActiveLayer {
    pub(super) spec: LayerSpec,
    pub(super) io: Arc<dyn LayerIo>,
    /// Only the thread that runs the flush, or a checkpoint's end, holds it.
    pub(super) journal: Mutex<Journal>,
    /// False once a swap took its place: nothing may be written to it any more (I2).
    writable: AtomicBool,
}

impl ActiveLayer {
    pub(super) fn new(spec: LayerSpec, io: Arc<dyn LayerIo>, journal: Journal) -> ActiveLayer {
        ActiveLayer { spec, io, journal: Mutex::new(journal), writable: AtomicBool::new(true) }
    }

    /// Opens a prepared layer. Its journal holds at most the leftovers of a frame that a crash tore (a whole frame would have
    /// made it the active layer when the volume was opened). `LAYER_IN_USE` if it holds frames all the same.
    pub(super) fn open_prepared(spec: &LayerSpec, volume: [u8; 16], epoch: u64, last_lsn: u64) -> Result<ActiveLayer> {
        let io = spec.store.open_layer(spec.id, OpenMode::ReadWrite)?;
        let identity = JournalIdentity { volume, layer: spec.id, epoch };
        let replay = Journal::replay(spec.store.clone(), identity, last_lsn)?;
        if !replay.frames.is_empty() || replay.seal.is_some() {
            return Err(EngineError::new(
                "LAYER_IN_USE",
                libc::EBUSY,
                format!("layer {} was to become active but its journal is in use", spec.id),
            )
            .with("layerId", spec.id));
        }
        Ok(ActiveLayer::new(spec.clone(), io, clear_journal(spec, volume, epoch)?))
    }

    pub(super) fn alias(&self) -> u32 {
        self.spec.alias
    }

    pub(super) fn refuse_writes(&self) {
        self.writable.store(false, Ordering::SeqCst);
    }

    /// The handle for writing, if the layer is still the active one.
    #[inline]
    pub(super) fn writer(&self) -> Result<&dyn LayerIo> {
        if self.writable.load(Ordering::Relaxed) {
            Ok(&*self.io)
        } else {
            Err(EngineError::new("LAYER_SEALED", libc::EIO, format!("layer {} is no longer active: it must not be written", self.spec.id))
                .with("layerId", self.spec.id))
        }
    }
}

/// What requests see: the table of layers and the active one. Replaced whole; a swap does it with the gate closed.
#[derive(Clone)]
pub(super) struct LayerTable {
    /// Sorted by alias.
    entries: Vec<(u32, Arc<ReadLayer>)>,
    pub(super) active: Option<Arc<ActiveLayer>>,
}

impl LayerTable {
    pub(super) fn new(specs: Vec<LayerSpec>, active: Option<Arc<ActiveLayer>>) -> LayerTable {
        let mut table = LayerTable { entries: Vec::with_capacity(specs.len()), active: None };
        for spec in specs {
            table.insert(ReadLayer::new(spec));
        }
        match active {
            Some(active) => table.with_active(active),
            None => table,
        }
    }

    /// Adds a layer, or replaces the handle of a known alias.
    pub(super) fn insert(&mut self, layer: ReadLayer) {
        let alias = layer.spec.alias;
        match self.entries.binary_search_by_key(&alias, |entry| entry.0) {
            Ok(index) => self.entries[index].1 = Arc::new(layer),
            Err(index) => self.entries.insert(index, (alias, Arc::new(layer))),
        }
    }

    /// The table with another active layer; reads of it go through the handle that writes it.
    pub(super) fn with_active(&self, active: Arc<ActiveLayer>) -> LayerTable {
        let mut table = self.clone();
        table.insert(ReadLayer::opened(active.spec.clone(), active.io.clone()));
        table.active = Some(active);
        table
    }

    /// Whether the layer is still read through this handle.
    pub(super) fn is_read_through(&self, alias: u32, io: &Arc<dyn LayerIo>) -> bool {
        let index = self.entries.binary_search_by_key(&alias, |entry| entry.0);
        index.is_ok_and(|index| self.entries[index].1.io.get().is_some_and(|found| Arc::ptr_eq(found, io)))
    }

    /// One of the layers is on other machines.
    pub(super) fn waits_for_network(&self) -> bool {
        self.entries.iter().any(|entry| entry.1.spec.store.capabilities().waits_for_network)
    }

    /// The handle to read a layer with, if nobody has to be waited for to have one.
    #[inline]
    pub(super) fn reader_at_hand(&self, alias: u32) -> Option<&Arc<dyn LayerIo>> {
        let index = self.entries.binary_search_by_key(&alias, |entry| entry.0).ok()?;
        let layer = &self.entries[index].1;
        layer.io.get().or_else(|| if layer.spec.store.capabilities().waits_for_network { None } else { layer.io().ok() })
    }

    /// The same, of a layer on other machines.
    #[inline]
    pub(super) fn distant_reader_at_hand(&self, alias: u32) -> Option<&Arc<dyn LayerIo>> {
        let index = self.entries.binary_search_by_key(&alias, |entry| entry.0).ok()?;
        let layer = &self.entries[index].1;
        layer.io.get().filter(|_| layer.spec.store.capabilities().waits_for_network)
    }

    /// The handle to read a layer with. `LAYER_UNKNOWN`: the map names an alias that the catalog did not give us.
    #[inline]
    pub(super) fn reader(&self, alias: u32) -> Result<&Arc<dyn LayerIo>> {
        match self.entries.binary_search_by_key(&alias, |entry| entry.0) {
            Ok(index) => self.entries[index].1.io(),
            Err(_) => Err(EngineError::new(
                "LAYER_UNKNOWN",
                libc::EIO,
                format!("the map refers to layer alias {alias}, which is not a layer of this volume"),
            )
            .with("alias", alias)),
        }
    }
}

/// An empty journal of a layer whose segments hold no frames. A leftover that comes back after a crash is an empty segment
/// below the first frame, which a replay passes over.
pub(super) fn clear_journal(spec: &LayerSpec, volume: [u8; 16], epoch: u64) -> Result<Journal> {
    for base_lsn in spec.store.list_segments(spec.id)? {
        spec.store.remove_segment(spec.id, base_lsn)?;
    }
    Ok(Journal::new(spec.store.clone(), JournalIdentity { volume, layer: spec.id, epoch }))
}
