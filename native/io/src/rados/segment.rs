//! A journal segment as one object. A write is at its own offset and so may be repeated by the library without harm; and it is
//! refused if somebody else has written or claimed the segment since: each handle puts its mark on the object with its first write,
//! and every later one checks for it in the same request. So what a handle of old has under way, of this process or another one, is
//! carried out before a claim that was answered, or never.
use super::cluster::{Change, Cluster, Name};
use crate::{IoError, IoErrorCode, Result, SegmentIo};
use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

const WRITER_ATTRIBUTE: &CStr = c"atoll.writer";

/// A journal is read into memory whole; the cluster's own bound for an object is this.
const SEGMENT_BYTES_MAX: u64 = 128 << 20;

pub(super) struct RadosSegment {
    cluster: Arc<Cluster>,
    name: Name,
    /// Who writes: the connection, and which of its handles.
    writer: [u8; 16],
    /// The object has our mark.
    is_marked: AtomicBool,
}

impl RadosSegment {
    /// Makes the object. `Exists` if it is there.
    pub(super) fn create(cluster: &Arc<Cluster>, name: Name) -> Result<RadosSegment> {
        let segment = RadosSegment::open(cluster, name);
        let mut change = cluster.change();
        change.create(true);
        change.set_attribute(WRITER_ATTRIBUTE, &segment.writer);
        change.even_if_full();
        cluster.apply("create", &name, change)?;
        segment.is_marked.store(true, Ordering::SeqCst);
        Ok(segment)
    }

    /// One that is there; nothing is asked.
    pub(super) fn open(cluster: &Arc<Cluster>, name: Name) -> RadosSegment {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let mut writer = [0; 16];
        writer[..8].copy_from_slice(&cluster.instance_id().to_le_bytes());
        writer[8..].copy_from_slice(&number.to_le_bytes());
        RadosSegment { cluster: Arc::clone(cluster), name, writer, is_marked: AtomicBool::new(false) }
    }

    fn change(&self, operation: &'static str, offset_bytes: u64, build: impl FnOnce(&mut Change)) -> Result<()> {
        let mut change = self.cluster.change();
        if self.is_marked.load(Ordering::SeqCst) {
            change.assert_attribute(WRITER_ATTRIBUTE, &self.writer);
        } else {
            change.assert_exists();
            change.set_attribute(WRITER_ATTRIBUTE, &self.writer);
        }
        build(&mut change);
        // On a full pool an error that is said at once: to the journal one that is cut off by the clock means that all is lost.
        change.even_if_full();
        match -self.cluster.start_change(&self.name, change).wait() {
            errno if errno <= 0 => {
                self.is_marked.store(true, Ordering::SeqCst);
                Ok(())
            }
            libc::ECANCELED => {
                let message = "another daemon writes this journal now, or this one since it opened it again";
                Err(IoError::new(IoErrorCode::Io, operation, self.name.to_string(), offset_bytes, message))
            }
            errno => Err(self.cluster.error(operation, self.name, offset_bytes, errno)),
        }
    }
}

impl SegmentIo for RadosSegment {
    fn read_all(&self) -> Result<Vec<u8>> {
        let bytes = self.cluster.read_whole(&self.name, SEGMENT_BYTES_MAX)?;
        bytes.ok_or_else(|| IoError::from_errno("read", self.name.to_string(), 0, libc::ENOENT))
    }

    /// Waits behind whatever this connection has under way for the object.
    fn claim(&self) -> Result<()> {
        self.is_marked.store(false, Ordering::SeqCst);
        self.change("claim", 0, |_| {})
    }

    fn append(&self, offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.change("append", offset_bytes, |change| change.write(offset_bytes, bytes))
    }

    fn truncate(&self, length_bytes: u64) -> Result<()> {
        if self.length_bytes()? <= length_bytes {
            return Ok(());
        }
        self.change("truncate", length_bytes, |change| change.truncate(length_bytes))
    }

    /// What was answered is durable, and so is the name.
    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn length_bytes(&self) -> Result<u64> {
        let length_bytes = self.cluster.stat(&self.name)?;
        length_bytes.ok_or_else(|| IoError::from_errno("stat", self.name.to_string(), 0, libc::ENOENT))
    }
}
