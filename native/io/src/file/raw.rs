//! One regular file as a store with one sealed layer: how a file that nobody of ours wrote (the source of a conversion)
//! becomes a device. It is only ever read.
use super::layer::{FileLayer, LayerFile};
use super::{path_error, system};
use crate::{
    IoError, IoErrorCode, LayerEntry, LayerId, LayerIo, OpenMode, Result, SegmentIo, Store, StoreCapabilities, StoreLock, StoreUsage,
};
use std::fs::{File, OpenOptions};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::Path;
use std::sync::Arc;

/// A file, opened once: what is put under its path later is not read.
pub struct RawFileStore {
    file: File,
    path: String,
    length_bytes: u64,
    allocated_bytes: u64,
}

impl RawFileStore {
    /// The id of the one layer.
    pub const LAYER: LayerId = LayerId([0; 16]);

    /// Opens a regular file for reading.
    pub fn open(path: &Path) -> Result<RawFileStore> {
        // Not blocking: a pipe without a writer would hold up the open for ever.
        let file = OpenOptions::new().read(true).custom_flags(libc::O_NONBLOCK).open(path);
        let file = file.map_err(|error| path_error("open", path, &error))?;
        let metadata = file.metadata().map_err(|error| path_error("stat", path, &error))?;
        if !metadata.is_file() {
            return Err(IoError::from_errno("open", path.display().to_string(), 0, libc::EINVAL));
        }
        let allocated_bytes = metadata.blocks() * 512;
        Ok(RawFileStore { file, path: path.display().to_string(), length_bytes: metadata.len(), allocated_bytes })
    }

    /// The length that the file had when it was opened.
    pub fn length_bytes(&self) -> u64 {
        self.length_bytes
    }

    fn read_only<T>(&self, operation: &'static str) -> Result<T> {
        Err(IoError::new(IoErrorCode::ReadOnly, operation, &self.path, 0, "a raw file is only read"))
    }
}

impl Store for RawFileStore {
    fn capabilities(&self) -> StoreCapabilities {
        StoreCapabilities {
            copy_unit_bytes: 4096,
            punch_unit_bytes: 0,
            can_clone: false,
            ack_is_durable: false,
            persistent: true,
            segment_growth_bytes: 0,
            waits_for_network: false,
            is_fenceable: false,
            answers_need_proof: false,
        }
    }

    fn create_layer(&self, _id: LayerId) -> Result<()> {
        self.read_only("create")
    }

    fn open_layer(&self, id: LayerId, mode: OpenMode) -> Result<Arc<dyn LayerIo>> {
        if mode == OpenMode::ReadWrite {
            return self.read_only("open");
        }
        if id != RawFileStore::LAYER {
            return Err(IoError::from_errno("open", &self.path, 0, libc::ENOENT));
        }
        let file = self.file.try_clone().map_err(|error| IoError::from_system("open", &self.path, 0, &error))?;
        Ok(Arc::new(FileLayer::new(LayerFile::Held(Arc::new(file)), self.path.clone(), false, false)))
    }

    fn remove_layer(&self, _id: LayerId) -> Result<()> {
        self.read_only("remove")
    }

    fn list_layers(&self) -> Result<Vec<LayerEntry>> {
        let Self { length_bytes, allocated_bytes, .. } = *self;
        Ok(vec![LayerEntry { id: RawFileStore::LAYER, allocated_bytes, length_bytes }])
    }

    fn usage(&self) -> Result<StoreUsage> {
        let (total_bytes, free_bytes) =
            system::file_system_bytes(Path::new(&self.path)).map_err(|error| IoError::from_system("statvfs", &self.path, 0, &error))?;
        Ok(StoreUsage { total_bytes, free_bytes, stored_bytes: self.allocated_bytes, reserve_bytes: 0 })
    }

    fn list_segments(&self, _layer: LayerId) -> Result<Vec<u64>> {
        Ok(Vec::new())
    }

    fn create_segment(&self, _layer: LayerId, _base_lsn: u64, _epoch: u64) -> Result<Arc<dyn SegmentIo>> {
        self.read_only("create")
    }

    fn open_segment(&self, _layer: LayerId, _base_lsn: u64) -> Result<Arc<dyn SegmentIo>> {
        Err(IoError::from_errno("open", &self.path, 0, libc::ENOENT))
    }

    fn remove_segment(&self, _layer: LayerId, _base_lsn: u64) -> Result<()> {
        self.read_only("remove")
    }

    fn read_record(&self, _name: &str) -> Result<Option<Vec<u8>>> {
        Ok(None)
    }

    fn write_record(&self, _name: &str, _bytes: &[u8]) -> Result<()> {
        self.read_only("write-record")
    }

    fn list_records(&self, _prefix: &str) -> Result<Vec<String>> {
        Ok(Vec::new())
    }

    fn remove_record(&self, _name: &str) -> Result<()> {
        self.read_only("remove-record")
    }

    fn lock(&self, _owner: &str) -> Result<StoreLock> {
        self.read_only("lock")
    }

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
