//! The file kind: a layer is a sparse file.
//!
//! | path under the root | is |
//! |---|---|
//! | `layers/<uuid>.layer` | a layer, sparse, mode 0600 |
//! | `journal/<uuid>.<base lsn, 16 hex digits>.journal` | a journal segment of that layer |
//! | `records/<name>` | a small record; `records/~<name>` is one on its way there |
//! | `lock` | the store's lock and the text of who holds it |
//! | `reserve` | space kept back for emergencies |
//!
//! Files of other names are left alone and not listed. The folders are not read again after the opening but for the list of
//! layers: an index of the journal segments is built when the store is opened, again when its lock is taken, and kept up to date
//! by every call. It is true because the holder of the lock is the only one who changes the folders; a store that was opened
//! without taking the lock may show segments that are gone.
//!
//! A layer's descriptor is open as long as its handle (I6). Names are durable when their folder is synced: for layers on return
//! from `create_layer` and `remove_layer` (I11), for segments on return from the first `sync`.
mod layer;
mod lock;
mod raw;
mod read_files;
mod segment;
mod system;

use crate::store::is_record_name;
use crate::{
    IoError, IoErrorCode, LayerEntry, LayerId, LayerIo, OpenMode, Result, SegmentIo, Store, StoreCapabilities, StoreLock, StoreUsage,
};
use layer::{FileLayer, LayerFile};
use parking_lot::Mutex;
pub use raw::RawFileStore;
use read_files::ReadFile;
use segment::FileSegment;
use std::collections::{BTreeSet, HashMap};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const PUNCH_UNIT_BYTES: u32 = 4096;

/// Over a thousand small flushes go into one growth of a segment: each of them saves a commit of the file system's own journal.
const SEGMENT_GROWTH_BYTES: u32 = 64 << 10;

/// A record is read into memory whole; none of ours comes near this.
const RECORD_BYTES_MAX: u64 = 64 << 20;

/// A directory of sparse files.
pub struct FileStore {
    root: PathBuf,
    layers: File,
    journal: Arc<File>,
    records: File,
    /// Changed by `set_reserve`.
    reserve_bytes: AtomicU64,
    can_punch: bool,
    can_clone: bool,
    segments: Mutex<HashMap<LayerId, BTreeSet<u64>>>,
    /// Held while a record is written: two writers of one record share its temporary file.
    record_writer: Mutex<()>,
}

impl FileStore {
    /// Opens the directory `root`, making it and its sub-folders if `create`. `reserve_bytes` is kept back (0: none): the space is
    /// taken when the store is locked and by `restore_reserve`, never here, where another process may be at work on the store.
    pub fn open(root: &Path, create: bool, reserve_bytes: u64) -> Result<FileStore> {
        let folders = [root.to_path_buf(), root.join("layers"), root.join("journal"), root.join("records")];
        if create {
            for folder in &folders {
                make_folder(folder)?;
            }
            open_folder(root)?.sync_all().map_err(|error| path_error("sync-directory", root, &error))?;
        }
        // Without `create`, a missing folder is an error and never an empty store: it may be a disk that is not mounted.
        let [_, layers, journal, records] = folders;
        let store = FileStore {
            layers: open_folder(&layers)?,
            journal: Arc::new(open_folder(&journal)?),
            records: open_folder(&records)?,
            reserve_bytes: AtomicU64::new(reserve_bytes),
            can_punch: can_punch(root)?,
            can_clone: can_clone(root)?,
            segments: Mutex::new(scan_segments(&journal)?),
            record_writer: Mutex::new(()),
            root: root.to_path_buf(),
        };
        Ok(store)
    }

    fn layer_path(&self, id: LayerId) -> PathBuf {
        self.root.join("layers").join(format!("{id}.layer"))
    }

    fn segment_path(&self, layer: LayerId, base_lsn: u64) -> PathBuf {
        self.root.join("journal").join(format!("{layer}.{base_lsn:016x}.journal"))
    }

    fn record_path(&self, name: &str, prefix: &str) -> Result<PathBuf> {
        if !is_record_name(name) {
            return Err(IoError::from_errno("record", format!("record {name}"), 0, libc::EINVAL));
        }
        Ok(self.root.join("records").join(format!("{prefix}{name}")))
    }

    fn sync_layers_folder(&self) -> Result<()> {
        self.layers.sync_all().map_err(|error| path_error("sync-directory", &self.root.join("layers"), &error))
    }

    fn segment_handle(&self, file: File, path: &Path) -> Arc<dyn SegmentIo> {
        Arc::new(FileSegment::new(file, path.display().to_string(), Arc::clone(&self.journal)))
    }
}

impl Store for FileStore {
    fn capabilities(&self) -> StoreCapabilities {
        StoreCapabilities {
            copy_unit_bytes: 4096,
            punch_unit_bytes: if self.can_punch { PUNCH_UNIT_BYTES } else { 0 },
            can_clone: self.can_clone,
            ack_is_durable: false,
            persistent: true,
            segment_growth_bytes: SEGMENT_GROWTH_BYTES,
            waits_for_network: false,
            is_fenceable: false,
            answers_need_proof: false,
        }
    }

    fn create_layer(&self, id: LayerId) -> Result<()> {
        let path = self.layer_path(id);
        let file = new_file(&path)?;
        let made = file.sync_all().map_err(|error| path_error("create", &path, &error)).and_then(|()| self.sync_layers_folder());
        if made.is_err() {
            // Nothing was written to it; a file nobody was promised would only be reported as unknown for ever.
            let _ = fs::remove_file(&path);
        }
        made
    }

    fn open_layer(&self, id: LayerId, mode: OpenMode) -> Result<Arc<dyn LayerIo>> {
        let path = self.layer_path(id);
        let opened = match mode {
            OpenMode::ReadOnly => ReadFile::open(&path).map(LayerFile::Read),
            OpenMode::ReadWrite => OpenOptions::new()
                .read(true)
                .write(true)
                .custom_flags(libc::O_NOFOLLOW)
                .open(&path)
                .map(|file| LayerFile::Held(Arc::new(file))),
        };
        let file = opened.map_err(|error| path_error("open", &path, &error))?;
        Ok(Arc::new(FileLayer::new(file, path.display().to_string(), mode == OpenMode::ReadWrite, self.can_punch)))
    }

    fn remove_layer(&self, id: LayerId) -> Result<()> {
        let segments = self.list_segments(id)?;
        for base_lsn in &segments {
            self.remove_segment(id, *base_lsn)?;
        }
        if !segments.is_empty() {
            self.journal.sync_all().map_err(|error| path_error("sync-directory", &self.root.join("journal"), &error))?;
        }
        remove_file(&self.layer_path(id))?;
        // Also if there was no file: an earlier removal may have failed between the two steps.
        self.sync_layers_folder()
    }

    fn list_layers(&self) -> Result<Vec<LayerEntry>> {
        let folder = self.root.join("layers");
        let mut entries = Vec::new();
        for entry in fs::read_dir(&folder).map_err(|error| path_error("list", &folder, &error))? {
            let entry = entry.map_err(|error| path_error("list", &folder, &error))?;
            let name = entry.file_name();
            let Some(id) = name.to_str().and_then(|name| name.strip_suffix(".layer")).and_then(LayerId::parse) else { continue };
            match entry.metadata() {
                Ok(metadata) => {
                    entries.push(LayerEntry { id, allocated_bytes: metadata.blocks() * 512, length_bytes: metadata.len() });
                }
                // Removed since the folder was read.
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(path_error("stat", &entry.path(), &error)),
            }
        }
        Ok(entries)
    }

    /// Without opening it: many are asked for at once.
    fn layer_entry(&self, id: LayerId) -> Result<Option<LayerEntry>> {
        let path = self.layer_path(id);
        match fs::symlink_metadata(&path) {
            Ok(metadata) if metadata.is_file() => {
                Ok(Some(LayerEntry { id, allocated_bytes: metadata.blocks() * 512, length_bytes: metadata.len() }))
            }
            Ok(_) => Ok(None),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(path_error("stat", &path, &error)),
        }
    }

    /// Total and free are the file system's; stored is the sum of the blocks of the layers (journal and reserve not counted),
    /// at the price of one stat per layer.
    fn usage(&self) -> Result<StoreUsage> {
        let (total_bytes, free_bytes) = system::file_system_bytes(&self.root).map_err(|error| path_error("statvfs", &self.root, &error))?;
        let stored_bytes = self.list_layers()?.iter().map(|entry| entry.allocated_bytes).sum();
        // What it has allocated: one that was cut short is none.
        let reserve_bytes = fs::metadata(self.root.join("reserve")).map_or(0, |found| found.len().min(found.blocks() * 512));
        Ok(StoreUsage { total_bytes, free_bytes, stored_bytes, reserve_bytes })
    }

    fn list_segments(&self, layer: LayerId) -> Result<Vec<u64>> {
        Ok(self.segments.lock().get(&layer).map(|bases| bases.iter().copied().collect()).unwrap_or_default())
    }

    fn create_segment(&self, layer: LayerId, base_lsn: u64, _epoch: u64) -> Result<Arc<dyn SegmentIo>> {
        let path = self.segment_path(layer, base_lsn);
        let file = new_file(&path)?;
        self.segments.lock().entry(layer).or_default().insert(base_lsn);
        Ok(self.segment_handle(file, &path))
    }

    fn open_segment(&self, layer: LayerId, base_lsn: u64) -> Result<Arc<dyn SegmentIo>> {
        let path = self.segment_path(layer, base_lsn);
        let file = OpenOptions::new().read(true).write(true).custom_flags(libc::O_NOFOLLOW).open(&path);
        let file = file.map_err(|error| path_error("open", &path, &error))?;
        // After a failed sync the cache shows bytes that never reached the disk, and a second sync says nothing of it (I6). Without
        // them in the way, a replay reads what is there. Bytes that are still to be written stay.
        system::drop_cache(&file).map_err(|error| path_error("open", &path, &error))?;
        Ok(self.segment_handle(file, &path))
    }

    fn remove_segment(&self, layer: LayerId, base_lsn: u64) -> Result<()> {
        remove_file(&self.segment_path(layer, base_lsn))?;
        let mut segments = self.segments.lock();
        if let Some(bases) = segments.get_mut(&layer) {
            bases.remove(&base_lsn);
            if bases.is_empty() {
                segments.remove(&layer);
            }
        }
        Ok(())
    }

    fn read_record(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let path = self.record_path(name, "")?;
        match fs::metadata(&path) {
            Ok(metadata) if metadata.len() > RECORD_BYTES_MAX => {
                Err(IoError::from_errno("read", path.display().to_string(), RECORD_BYTES_MAX, libc::EFBIG))
            }
            Ok(_) => fs::read(&path).map(Some).map_err(|error| path_error("read", &path, &error)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(path_error("read", &path, &error)),
        }
    }

    fn write_record(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.record_path(name, "")?;
        let temporary = self.record_path(name, "~")?;
        let _writer = self.record_writer.lock();
        let write = || {
            let mut options = OpenOptions::new();
            options.write(true).create(true).truncate(true).mode(0o600).custom_flags(libc::O_NOFOLLOW);
            let mut file = options.open(&temporary)?;
            file.write_all(bytes)?;
            file.sync_all()?;
            fs::rename(&temporary, &path)?;
            self.records.sync_all()
        };
        write().map_err(|error| {
            // On a full disk the half-written copy must not keep its space. After the rename there is none, which is fine.
            let _ = fs::remove_file(&temporary);
            path_error("write", &path, &error)
        })
    }

    fn list_records(&self, prefix: &str) -> Result<Vec<String>> {
        let folder = self.root.join("records");
        let failed = |error: std::io::Error| path_error("list", &folder, &error);
        let mut names = Vec::new();
        for entry in fs::read_dir(&folder).map_err(failed)? {
            // A copy on its way (`~name`) and what somebody else left there have no name of a record.
            let Ok(name) = entry.map_err(failed)?.file_name().into_string() else { continue };
            if name.starts_with(prefix) && is_record_name(&name) {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }

    fn remove_record(&self, name: &str) -> Result<()> {
        remove_file(&self.record_path(name, "")?)
    }

    fn lock(&self, owner: &str) -> Result<StoreLock> {
        let lock = lock::take(&self.root.join("lock"), owner)?;
        // Whoever held the lock before may have changed the folder since it was read.
        *self.segments.lock() = scan_segments(&self.root.join("journal"))?;
        self.restore_reserve()?;
        Ok(lock)
    }

    fn release_reserve(&self) -> Result<()> {
        remove_file(&self.root.join("reserve"))
    }

    /// A disk that is too full for the whole reserve gets none (0 is returned): half a reserve would only take the last space.
    fn restore_reserve(&self) -> Result<u64> {
        let reserve_bytes = self.reserve_bytes.load(Ordering::Relaxed);
        if reserve_bytes == 0 {
            self.release_reserve()?;
            return Ok(0);
        }
        let path = self.root.join("reserve");
        let fail = |error: &std::io::Error| path_error("reserve", &path, error);
        let mut options = OpenOptions::new();
        options.write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
        let file = match options.open(&path) {
            Ok(file) => file,
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) => return Ok(0),
            Err(error) => return Err(fail(&error)),
        };
        let metadata = file.metadata().map_err(|error| fail(&error))?;
        if metadata.len() == reserve_bytes && metadata.blocks() * 512 >= reserve_bytes {
            return Ok(reserve_bytes);
        }
        file.set_len(0).map_err(|error| fail(&error))?;
        // Asked first, because an allocation that fails has taken everything there is in the meantime.
        let (_, free_bytes) = system::file_system_bytes(&self.root).map_err(|error| path_error("statvfs", &self.root, &error))?;
        if free_bytes < reserve_bytes {
            return Ok(0);
        }
        let allocated = match system::allocate(&file, 0, 0, reserve_bytes) {
            Err(error) if system::is_unsupported(&error) => write_reserve(&file, reserve_bytes),
            answer => answer,
        };
        match allocated {
            Ok(()) => Ok(reserve_bytes),
            Err(error) => {
                file.set_len(0).map_err(|error| fail(&error))?;
                match error.raw_os_error() {
                    Some(libc::ENOSPC | libc::EDQUOT) => Ok(0),
                    _ => Err(fail(&error)),
                }
            }
        }
    }

    fn set_reserve(&self, bytes: u64) -> Result<u64> {
        let before = self.reserve_bytes.swap(bytes, Ordering::Relaxed);
        let result = match self.restore_reserve() {
            Ok(kept_bytes) if kept_bytes == bytes => return Ok(bytes),
            Ok(_) => {
                let message = format!("a reserve of {bytes} bytes does not fit on the file system");
                Err(IoError::new(IoErrorCode::NoSpace, "reserve", self.root.join("reserve").display().to_string(), 0, message))
            }
            Err(error) => Err(error),
        };
        self.reserve_bytes.store(before, Ordering::Relaxed);
        self.restore_reserve()?;
        result
    }
}

fn path_error(operation: &'static str, path: &Path, error: &std::io::Error) -> IoError {
    IoError::from_system(operation, path.display().to_string(), 0, error)
}

/// Makes a folder and what is missing above it, each name durable.
fn make_folder(path: &Path) -> Result<()> {
    if path.is_dir() {
        return Ok(());
    }
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        make_folder(parent)?;
    }
    match DirBuilder::new().mode(0o700).create(path) {
        Ok(()) => {}
        Err(error) if error.kind() == ErrorKind::AlreadyExists && path.is_dir() => return Ok(()),
        Err(error) => return Err(path_error("create", path, &error)),
    }
    let parent = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    open_folder(parent)?.sync_all().map_err(|error| path_error("sync-directory", parent, &error))
}

fn open_folder(path: &Path) -> Result<File> {
    let file = OpenOptions::new().read(true).custom_flags(libc::O_DIRECTORY).open(path);
    file.map_err(|error| path_error("open", path, &error))
}

fn new_file(path: &Path) -> Result<File> {
    let file = OpenOptions::new().read(true).write(true).create_new(true).mode(0o600).open(path);
    file.map_err(|error| path_error("create", path, &error))
}

/// Removes a file; one that is not there is no error.
fn remove_file(path: &Path) -> Result<()> {
    match fs::remove_file(path) {
        Ok(()) => Ok(()),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
        Err(error) => Err(path_error("remove", path, &error)),
    }
}

/// Every journal segment in the folder, by layer.
fn scan_segments(folder: &Path) -> Result<HashMap<LayerId, BTreeSet<u64>>> {
    let mut segments: HashMap<LayerId, BTreeSet<u64>> = HashMap::new();
    for entry in fs::read_dir(folder).map_err(|error| path_error("list", folder, &error))? {
        let entry = entry.map_err(|error| path_error("list", folder, &error))?;
        if let Some((layer, base_lsn)) = entry.file_name().to_str().and_then(parse_segment_name) {
            segments.entry(layer).or_default().insert(base_lsn);
        }
    }
    Ok(segments)
}

fn parse_segment_name(name: &str) -> Option<(LayerId, u64)> {
    let (layer, lsn) = name.strip_suffix(".journal")?.split_once('.')?;
    // from_str_radix also takes a sign and upper case, which are not names this store writes.
    if lsn.len() != 16 || !lsn.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f')) {
        return None;
    }
    Some((LayerId::parse(layer)?, u64::from_str_radix(lsn, 16).ok()?))
}

/// A file in the folder that no name leads to.
pub(crate) fn unnamed_file(folder: &Path) -> std::io::Result<File> {
    let unnamed = OpenOptions::new().read(true).write(true).mode(0o600).custom_flags(libc::O_TMPFILE).open(folder);
    match unnamed {
        Err(error) if system::is_unsupported(&error) || error.raw_os_error() == Some(libc::EISDIR) => {
            let path = folder.join(format!("probe.{}", std::process::id()));
            let file = OpenOptions::new().read(true).write(true).create(true).truncate(true).mode(0o600).open(&path)?;
            fs::remove_file(&path)?;
            Ok(file)
        }
        answer => answer,
    }
}

/// Whether the file system takes a punch. The probe is a file without data, so that it also works on a full disk.
fn can_punch(root: &Path) -> Result<bool> {
    let probe = || {
        let file = unnamed_file(root)?;
        file.set_len(4 * u64::from(PUNCH_UNIT_BYTES))?;
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        system::allocate(&file, mode, 0, u64::from(PUNCH_UNIT_BYTES))
    };
    match probe() {
        Ok(()) => Ok(true),
        Err(error) if system::is_unsupported(&error) => Ok(false),
        // No inode is left for the probe. A punch asks the file system again each time, so the optimistic answer is safe.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) => Ok(true),
        Err(error) => Err(path_error("probe", root, &error)),
    }
}

/// Whether files of the file system can share blocks. The probe has no data, as that of `can_punch`.
fn can_clone(root: &Path) -> Result<bool> {
    let probe = || {
        let (source, target) = (unnamed_file(root)?, unnamed_file(root)?);
        source.set_len(u64::from(PUNCH_UNIT_BYTES))?;
        system::clone_range(&target, &source, 0, u64::from(PUNCH_UNIT_BYTES))
    };
    match probe() {
        Ok(()) => Ok(true),
        Err(error) if system::cannot_clone(&error) => Ok(false),
        // Nothing is done because of the answer that is not asked of the file system again.
        Err(error) if matches!(error.raw_os_error(), Some(libc::ENOSPC | libc::EDQUOT)) => Ok(true),
        Err(error) => Err(path_error("probe", root, &error)),
    }
}

/// Writes the reserve where the file system cannot allocate without writing.
fn write_reserve(mut file: &File, length_bytes: u64) -> std::io::Result<()> {
    let block = [0u8; 1 << 16];
    let mut left = length_bytes;
    while left > 0 {
        let length = left.min(block.len() as u64) as usize;
        file.write_all(&block[..length])?;
        left -= length as u64;
    }
    file.sync_data()
}
