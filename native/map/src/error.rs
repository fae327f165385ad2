//! Typed errors of maps.
use std::fmt;

/// What kind of failure it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum MapErrorCode {
    /// A page's bytes are not what its parent says (crc), or not a page (magic, version, bounds, order).
    PageCorrupt,
    /// A page of a version this build does not know.
    PageVersion,
    /// A page that was asked for was not supplied.
    PageMissing,
    /// The local page file could not be read or written.
    PageFile,
}

/// A failure of a map.
#[derive(Debug, Clone)]
pub struct MapError {
    /// The kind.
    pub code: MapErrorCode,
    /// The page, 0 if it has no id.
    pub page_id: u64,
    /// A sentence for people.
    pub message: String,
}
impl fmt::Display for MapError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "map page {}: {}", self.page_id, self.message)
    }
}
impl std::error::Error for MapError {}

/// Result of a map call.
pub type Result<T> = std::result::Result<T, MapError>;
