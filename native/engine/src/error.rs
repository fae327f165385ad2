//! The one error of the engine: a stable code, values, a sentence. It crosses to TypeScript as data.
use atoll_io::{IoError, IoErrorCode};
use atoll_map::{MapError, MapErrorCode};
use std::fmt;

/// A failure. `code` is stable; callers match it and never the message.
#[derive(Debug, Clone)]
pub struct EngineError {
    /// SCREAMING_SNAKE_CASE.
    pub code: &'static str,
    /// For people.
    pub message: String,
    /// Named values: what was wrong, the limit it broke.
    pub values: Vec<(&'static str, String)>,
    /// The errno an NBD client should see (Linux numbers).
    pub errno: i32,
}

/// Result of an engine call.
pub type Result<T> = std::result::Result<T, EngineError>;

impl EngineError {
    /// A failure without values.
    pub fn new(code: &'static str, errno: i32, message: impl Into<String>) -> EngineError {
        EngineError { code, message: message.into(), values: Vec::new(), errno }
    }
    /// Adds a named value.
    #[must_use]
    pub fn with(mut self, name: &'static str, value: impl fmt::Display) -> EngineError {
        self.values.push((name, value.to_string()));
        self
    }
}

impl fmt::Display for EngineError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.code, self.message)
    }
}
impl std::error::Error for EngineError {}

impl From<IoError> for EngineError {
    fn from(error: IoError) -> EngineError {
        let (code, errno) = match error.code {
            IoErrorCode::NoSpace => ("NO_SPACE", libc::ENOSPC),
            IoErrorCode::Io => ("IO_ERROR", libc::EIO),
            IoErrorCode::Unavailable => ("POOL_UNAVAILABLE", libc::EIO),
            IoErrorCode::Denied => ("POOL_ACCESS_DENIED", libc::EIO),
            IoErrorCode::NotFound => ("LAYER_MISSING", libc::EIO),
            IoErrorCode::Exists => ("LAYER_EXISTS", libc::EIO),
            IoErrorCode::ReadOnly => ("LAYER_READ_ONLY", libc::EIO),
            IoErrorCode::Locked => ("STORE_LOCKED", libc::EBUSY),
            IoErrorCode::Corrupt => ("JOURNAL_CORRUPT", libc::EIO),
            IoErrorCode::Version => ("FORMAT_VERSION", libc::EIO),
            IoErrorCode::CatalogBehind => ("CATALOG_BEHIND", libc::EIO),
            IoErrorCode::Broken => ("JOURNAL_BROKEN", libc::EIO),
        };
        EngineError::new(code, errno, error.to_string())
            .with("operation", error.operation)
            .with("object", &error.object)
            .with("offsetBytes", error.offset_bytes)
            .with("errno", error.errno)
    }
}

impl From<MapError> for EngineError {
    fn from(error: MapError) -> EngineError {
        let code = match error.code {
            MapErrorCode::PageCorrupt => "PAGE_CORRUPT",
            MapErrorCode::PageVersion => "FORMAT_VERSION",
            MapErrorCode::PageMissing => "PAGE_MISSING",
            MapErrorCode::PageFile => "PAGE_FILE_ERROR",
        };
        EngineError::new(code, libc::EIO, error.to_string()).with("pageId", error.page_id)
    }
}
