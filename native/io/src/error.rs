//! Typed errors of stores and journals.
use crate::LayerId;
use std::fmt;

/// What kind of failure it was; the caller acts on this, never on the message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum IoErrorCode {
    /// The backend is full (ENOSPC, EDQUOT). Not poison: space may come back.
    NoSpace,
    /// The backend failed (EIO and everything unexpected).
    Io,
    /// The backend cannot be reached, or did not answer in time.
    Unavailable,
    /// The backend does not let this user in, or not do this.
    Denied,
    /// The layer, segment or record does not exist.
    NotFound,
    /// The layer, segment or record exists already.
    Exists,
    /// Write, punch or zero on a layer opened read-only.
    ReadOnly,
    /// Somebody else holds the lock; `message` names the owner.
    Locked,
    /// Bytes that are not what the format says (magic, version, crc, bounds); names the object and the offset.
    Corrupt,
    /// The format is of a version this build does not know.
    Version,
    /// A journal whose frames do not connect to the catalog's lsn: the catalog is older than the journal.
    CatalogBehind,
    /// The bytes after a failed append could not be taken back: the journal must not be used until it is opened again.
    Broken,
}

/// A failure of a store or a journal.
#[derive(Debug, Clone)]
pub struct IoError {
    /// The kind.
    pub code: IoErrorCode,
    /// The operation: "write", "sync", "append", …
    pub operation: &'static str,
    /// The object: the path of a file, or `layer <uuid>`, `journal <uuid> <lsn>`.
    pub object: String,
    /// Where in the object; 0 where it has no meaning.
    pub offset_bytes: u64,
    /// The errno, 0 if it did not come from the system.
    pub errno: i32,
    /// A sentence for people.
    pub message: String,
}

impl fmt::Display for IoError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {} at {}: {}", self.operation, self.object, self.offset_bytes, self.message)
    }
}
impl std::error::Error for IoError {}

impl IoError {
    /// A failure that did not come from the system.
    pub fn new(
        code: IoErrorCode,
        operation: &'static str,
        object: impl Into<String>,
        offset_bytes: u64,
        message: impl Into<String>,
    ) -> IoError {
        IoError { code, operation, object: object.into(), offset_bytes, errno: 0, message: message.into() }
    }

    /// A failure the system answered with `errno`.
    pub fn from_errno(operation: &'static str, object: impl Into<String>, offset_bytes: u64, errno: i32) -> IoError {
        let code = match errno {
            libc::ENOSPC | libc::EDQUOT => IoErrorCode::NoSpace,
            libc::ENOENT => IoErrorCode::NotFound,
            libc::EEXIST => IoErrorCode::Exists,
            libc::EROFS => IoErrorCode::ReadOnly,
            _ => IoErrorCode::Io,
        };
        let mut message = std::io::Error::from_raw_os_error(errno).to_string();
        if errno == libc::EFBIG {
            // Identity addressing makes a layer as long as its volume, whatever it holds; ext4 ends at 16 TiB.
            message.push_str("; the file system does not take a file of this length (ext4: 16 TiB), use one that does (XFS)");
        }
        IoError { code, operation, object: object.into(), offset_bytes, errno, message }
    }

    /// A failure as the standard library reports it; one without an errno counts as EIO.
    pub(crate) fn from_system(operation: &'static str, object: impl Into<String>, offset_bytes: u64, error: &std::io::Error) -> IoError {
        IoError::from_errno(operation, object, offset_bytes, error.raw_os_error().unwrap_or(libc::EIO))
    }
}

/// How errors name a layer of a store that has no paths.
pub(crate) fn layer_object(id: LayerId) -> String {
    format!("layer {id}")
}

/// How errors name a journal segment; the base lsn is written as in the file kind's names, so that the file is easily found.
pub(crate) fn segment_object(layer: LayerId, base_lsn: u64) -> String {
    format!("journal {layer} {base_lsn:016x}")
}

/// Result of a store or journal call.
pub type Result<T> = std::result::Result<T, IoError>;
