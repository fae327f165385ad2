//! A journal segment as a file. Its name counts as durable only after the first sync of each handle: the process that made the
//! file may have died before it synced the directory.
use crate::{IoError, Result, SegmentIo};
use std::fs::File;
use std::io::ErrorKind;
use std::os::unix::fs::FileExt;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// An open segment.
pub(super) struct FileSegment {
    file: File,
    path: String,
    directory: Arc<File>,
    is_name_durable: AtomicBool,
}

impl FileSegment {
    pub(super) fn new(file: File, path: String, directory: Arc<File>) -> FileSegment {
        FileSegment { file, path, directory, is_name_durable: AtomicBool::new(false) }
    }

    fn error(&self, operation: &'static str, offset_bytes: u64, error: &std::io::Error) -> IoError {
        IoError::from_system(operation, &self.path, offset_bytes, error)
    }
}

impl SegmentIo for FileSegment {
    fn read_all(&self) -> Result<Vec<u8>> {
        let mut bytes = vec![0; self.length_bytes()? as usize];
        let mut filled = 0;
        while filled < bytes.len() {
            match self.file.read_at(&mut bytes[filled..], filled as u64) {
                Ok(0) => break,
                Ok(count) => filled += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.error("read", filled as u64, &error)),
            }
        }
        bytes.truncate(filled);
        Ok(bytes)
    }

    fn append(&self, offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, offset_bytes).map_err(|error| self.error("append", offset_bytes, &error))
    }

    fn truncate(&self, length_bytes: u64) -> Result<()> {
        if length_bytes >= self.length_bytes()? {
            return Ok(()); // set_len would make it longer.
        }
        self.file.set_len(length_bytes).map_err(|error| self.error("truncate", length_bytes, &error))
    }

    fn sync(&self) -> Result<()> {
        self.file.sync_data().map_err(|error| self.error("sync", 0, &error))?;
        if !self.is_name_durable.load(Ordering::Acquire) {
            self.directory.sync_all().map_err(|error| self.error("sync-directory", 0, &error))?;
            self.is_name_durable.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn length_bytes(&self) -> Result<u64> {
        let metadata = self.file.metadata().map_err(|error| self.error("stat", 0, &error))?;
        Ok(metadata.len())
    }
}
