//! A layer as a sparse file. The descriptor of one that is written stays open from the opening to the last clone of the handle
//! (I6): closing it in between would lose a write-back error that only this descriptor gets to see.
use super::read_files::ReadFile;
use super::system::{self, Seek};
use crate::store::push_extent;
use crate::{Extent, IoError, IoErrorCode, LayerIo, Result};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::MetadataExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Zeros are written from here, 64 KiB at a time.
static ZEROS: [u8; 1 << 16] = [0; 1 << 16];

/// Zero buffers in one call: 1 MiB.
const ZERO_BUFFERS: usize = 16;

/// What a punch frees at least, and the step by which `extents` goes on where the file system contradicts itself.
const BLOCK_BYTES: u64 = 4096;

/// What a layer is read and written through.
pub(super) enum LayerFile {
    /// Open as long as the layer is.
    Held(Arc<File>),
    /// Open when it is used.
    Read(Arc<ReadFile>),
}

/// An open layer.
pub(super) struct FileLayer {
    file: LayerFile,
    path: String,
    writable: bool,
    can_punch: bool,
    /// The file system can say whether a read would have to wait; unknown until it was asked.
    can_read_now: AtomicBool,
}

impl FileLayer {
    pub(super) fn new(file: LayerFile, path: String, writable: bool, can_punch: bool) -> FileLayer {
        FileLayer { file, path, writable, can_punch, can_read_now: AtomicBool::new(true) }
    }

    #[inline]
    fn with<T>(&self, operation: impl FnOnce(&File) -> std::io::Result<T>) -> std::io::Result<T> {
        match &self.file {
            LayerFile::Held(file) => operation(file),
            LayerFile::Read(file) => file.with(operation),
        }
    }

    fn error(&self, operation: &'static str, offset_bytes: u64, error: &std::io::Error) -> IoError {
        IoError::from_system(operation, &self.path, offset_bytes, error)
    }

    fn check_writable(&self, operation: &'static str, offset_bytes: u64) -> Result<()> {
        if self.writable {
            return Ok(());
        }
        Err(IoError::new(IoErrorCode::ReadOnly, operation, &self.path, offset_bytes, "the layer was opened read-only"))
    }

    /// The end of the range, or the error for one that wraps.
    fn end(&self, operation: &'static str, offset_bytes: u64, length_bytes: u64) -> Result<u64> {
        let end = offset_bytes.checked_add(length_bytes);
        end.ok_or_else(|| IoError::from_errno(operation, &self.path, offset_bytes, libc::EINVAL))
    }

    fn write_zeros(&self, operation: &'static str, start: u64, end: u64) -> Result<()> {
        let mut offset = start;
        while offset < end {
            let mut buffers = [IoSlice::new(&[]); ZERO_BUFFERS];
            let first = offset;
            for buffer in &mut buffers {
                let length = (end - offset).min(ZEROS.len() as u64);
                *buffer = IoSlice::new(&ZEROS[..length as usize]);
                offset += length;
            }
            self.with(|file| system::write_all_at(file, first, &buffers)).map_err(|error| self.error(operation, first, &error))?;
        }
        Ok(())
    }

    /// Zeros what is allocated inside the file's length: a punch where the file system has none.
    fn zero_data(&self, start: u64, end: u64) -> Result<()> {
        let end = end.min(self.length_bytes()?);
        if start >= end {
            return Ok(());
        }
        let mut extents = Vec::new();
        self.extents(start, end - start, &mut extents)?;
        for extent in extents.iter().filter(|extent| extent.data) {
            self.write_zeros("punch", extent.offset_bytes, extent.offset_bytes + extent.length_bytes)?;
        }
        Ok(())
    }
}

impl LayerIo for FileLayer {
    fn read(&self, offset_bytes: u64, buffers: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.with(|file| system::read_all_at(file, offset_bytes, buffers)).map_err(|error| self.error("read", offset_bytes, &error))
    }

    fn read_now(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<bool> {
        if self.can_read_now.load(Ordering::Relaxed) {
            match self.with(|file| system::read_cached_at(file, offset_bytes, buffer)) {
                Ok(is_read) => return Ok(is_read),
                Err(error) if system::is_unsupported(&error) => self.can_read_now.store(false, Ordering::Relaxed),
                Err(error) => return Err(self.error("read", offset_bytes, &error)),
            }
        }
        self.read(offset_bytes, &mut [IoSliceMut::new(buffer)]).map(|()| true)
    }

    fn write(&self, offset_bytes: u64, buffers: &[IoSlice<'_>]) -> Result<()> {
        self.check_writable("write", offset_bytes)?;
        self.with(|file| system::write_all_at(file, offset_bytes, buffers)).map_err(|error| self.error("write", offset_bytes, &error))
    }

    /// The kernel frees the whole blocks of the range and zeros the partial ones at its ends; nothing past the file's end
    /// changes, and the length stays (KEEP_SIZE).
    fn punch(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        self.check_writable("punch", offset_bytes)?;
        let end = self.end("punch", offset_bytes, length_bytes)?;
        // Past the end there is nothing to free, and a file system refuses offsets that its files cannot have (ext4: 16 TiB).
        let end = end.min(self.length_bytes()?.next_multiple_of(BLOCK_BYTES));
        if end <= offset_bytes {
            return Ok(());
        }
        if self.can_punch {
            let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
            return match self.with(|file| system::allocate(file, mode, offset_bytes, end - offset_bytes)) {
                Ok(()) => Ok(()),
                Err(error) if system::is_unsupported(&error) => self.zero_data(offset_bytes, end),
                Err(error) => Err(self.error("punch", offset_bytes, &error)),
            };
        }
        self.zero_data(offset_bytes, end)
    }

    /// ZERO_RANGE without KEEP_SIZE: a range past the end makes the file longer, as the fallback of written zeros does, so that
    /// the length means the same on every file system. A file system that never overwrites in place (btrfs, ZFS) cannot promise
    /// the space; there this is as good as written zeros.
    fn zero_allocated(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        self.check_writable("zero", offset_bytes)?;
        let end = self.end("zero", offset_bytes, length_bytes)?;
        if length_bytes == 0 {
            return Ok(());
        }
        match self.with(|file| system::allocate(file, libc::FALLOC_FL_ZERO_RANGE, offset_bytes, length_bytes)) {
            Ok(()) => Ok(()),
            Err(error) if system::is_unsupported(&error) => self.write_zeros("zero", offset_bytes, end),
            Err(error) => Err(self.error("zero", offset_bytes, &error)),
        }
    }

    fn sync(&self) -> Result<()> {
        self.with(File::sync_data).map_err(|error| self.error("sync", 0, &error))
    }

    fn extents(&self, offset_bytes: u64, length_bytes: u64, out: &mut Vec<Extent>) -> Result<()> {
        let end = self.end("extents", offset_bytes, length_bytes)?;
        let first = out.len();
        let mut offset = offset_bytes;
        while offset < end {
            let data = match self.with(|file| system::seek(file, offset, Seek::Data)) {
                Ok(found) => found.unwrap_or(end).min(end),
                // A file system that knows no holes has only data; what lies past the end is a hole all the same.
                Err(error) if error.raw_os_error() == Some(libc::EINVAL) || system::is_unsupported(&error) => {
                    let data_end = self.length_bytes()?.clamp(offset, end);
                    push_extent(out, first, offset, data_end - offset, true);
                    push_extent(out, first, data_end, end - data_end, false);
                    return Ok(());
                }
                Err(error) => return Err(self.error("extents", offset, &error)),
            };
            push_extent(out, first, offset, data - offset, false);
            if data == end {
                break;
            }
            let hole = self.with(|file| system::seek(file, data, Seek::Hole)).map_err(|error| self.error("extents", data, &error))?;
            // A punch between the two calls may make `data` itself a hole; call one step data, so that the loop moves on.
            let hole = hole.filter(|hole| *hole > data).unwrap_or_else(|| data.saturating_add(BLOCK_BYTES)).min(end);
            push_extent(out, first, data, hole - data, true);
            offset = hole;
        }
        Ok(())
    }

    fn length_bytes(&self) -> Result<u64> {
        let metadata = self.with(File::metadata).map_err(|error| self.error("stat", 0, &error))?;
        Ok(metadata.len())
    }

    fn allocated_bytes(&self) -> Result<u64> {
        let metadata = self.with(File::metadata).map_err(|error| self.error("stat", 0, &error))?;
        Ok(metadata.blocks() * 512)
    }

    fn drop_cache(&self) -> Result<()> {
        self.with(system::drop_cache).map_err(|error| self.error("drop-cache", 0, &error))
    }

    fn clone_range(&self, source: &dyn LayerIo, offset_bytes: u64, length_bytes: u64) -> Result<bool> {
        self.check_writable("clone", offset_bytes)?;
        let Some(source) = source.ring_file()? else { return Ok(false) };
        match self.with(|file| system::clone_range(file, &source, offset_bytes, length_bytes)) {
            Ok(()) => Ok(true),
            Err(error) if system::cannot_clone(&error) => Ok(false),
            Err(error) => Err(self.error("clone", offset_bytes, &error)),
        }
    }

    fn ring_file(&self) -> Result<Option<Arc<File>>> {
        match &self.file {
            LayerFile::Held(file) => Ok(Some(file.clone())),
            LayerFile::Read(file) => file.shared().map(Some).map_err(|error| self.error("open", 0, &error)),
        }
    }

    fn prefetch(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        let end = self.end("prefetch", offset_bytes, length_bytes)?.min(self.length_bytes()?);
        self.with(|file| system::prefetch(file, offset_bytes, end.saturating_sub(offset_bytes)))
            .map_err(|error| self.error("prefetch", offset_bytes, &error))
    }
}
