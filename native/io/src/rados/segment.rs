//! A journal segment as one object. A write is at its own offset and so may be repeated by the library without harm; and it is
//! refused if somebody else has claimed the segment since: each handle puts its mark on the object when it makes or claims it, and
//! every write checks for it in the same request. So what a handle of old has under way, of this process or another one, is
//! carried out before a claim that was answered, or never. A claim under an older epoch than the last one is refused.
use super::claim::{assert_older_epoch, raise_epoch, set_epoch};
use super::cluster::{Change, Cluster, Name};
use crate::{IoError, IoErrorCode, Result, SegmentIo};
use std::ffi::CStr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const WRITER_ATTRIBUTE: &CStr = c"atoll.writer";

/// A journal is read into memory whole; the cluster's own bound for an object is this.
const SEGMENT_BYTES_MAX: u64 = 128 << 20;

pub(super) struct RadosSegment {
    cluster: Arc<Cluster>,
    name: Name,
    /// Who writes: the connection, and which of its handles.
    writer: String,
}

impl RadosSegment {
    /// Makes the object. `Exists` if it is there, unless under an older epoch: what nobody listed when that was over is what a making
    /// that timed out, or that was refused then, has left, and was never written.
    pub(super) fn create(cluster: &Arc<Cluster>, name: Name, epoch: u64) -> Result<RadosSegment> {
        let segment = RadosSegment::open(cluster, name);
        let mut change = cluster.change();
        change.create(true);
        set_epoch(&mut change, epoch);
        change.set_attribute(WRITER_ATTRIBUTE, segment.writer.as_bytes());
        change.even_if_full();
        match cluster.apply("create", &name, change) {
            Err(error) if error.code == IoErrorCode::Exists => {
                let mut change = cluster.change();
                assert_older_epoch(&mut change, epoch);
                change.truncate(0);
                set_epoch(&mut change, epoch);
                change.set_attribute(WRITER_ATTRIBUTE, segment.writer.as_bytes());
                change.even_if_full();
                match -cluster.start_change(&name, change).wait() {
                    errno if errno <= 0 => Ok(segment),
                    libc::ECANCELED => Err(error),
                    errno => Err(cluster.error("create", name, 0, errno)),
                }
            }
            made => made.map(|()| segment),
        }
    }

    /// One that is there; nothing is asked.
    pub(super) fn open(cluster: &Arc<Cluster>, name: Name) -> RadosSegment {
        static NUMBER: AtomicU64 = AtomicU64::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        let writer = format!("client.{} {number}", cluster.instance_id());
        RadosSegment { cluster: Arc::clone(cluster), name, writer }
    }

    fn change(&self, operation: &'static str, offset_bytes: u64, build: impl FnOnce(&mut Change)) -> Result<()> {
        let mut change = self.cluster.change();
        change.assert_attribute(WRITER_ATTRIBUTE, self.writer.as_bytes());
        build(&mut change);
        // On a full pool an error that is said at once: to the journal one that is cut off by the clock means that all is lost.
        change.even_if_full();
        match -self.cluster.start_change(&self.name, change).wait() {
            errno if errno <= 0 => Ok(()),
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
    fn claim(&self, epoch: u64) -> Result<()> {
        let mut change = self.cluster.change();
        change.assert_exists();
        raise_epoch(&mut change, epoch);
        change.set_attribute(WRITER_ATTRIBUTE, self.writer.as_bytes());
        change.even_if_full();
        match -self.cluster.start_change(&self.name, change).wait() {
            errno if errno <= 0 => Ok(()),
            libc::ECANCELED => {
                let message = format!("this journal was claimed under a newer epoch than {epoch}: the volume was opened elsewhere since");
                Err(IoError::new(IoErrorCode::CatalogBehind, "claim", self.name.to_string(), 0, message))
            }
            errno => Err(self.cluster.error("claim", self.name, 0, errno)),
        }
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
