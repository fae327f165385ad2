//! Maps: for each 4 KiB slot of a resource, which layer holds it (at the same offset), or HOLE.
//!
//! A map is a persistent, path-copied radix tree of fixed height: three levels of inner nodes with 256 children each over
//! leaves of 8192 slots (32 MiB), 512 TiB in all. A child is a word: HOLE, UNIFORM(layer), or a node. Sharing a root is
//! sharing everything below it.
mod cache;
mod check;
mod checkpoint;
mod codec;
mod cover;
mod diff;
mod error;
mod leaf_body;
mod link;
mod loader;
mod node;
mod page_file;
mod reach;
mod slot_set;
mod tree;
mod usage;
mod walk;
mod writer;

pub use cache::MapCache;
pub use check::{MapCheck, Referrer};
pub use checkpoint::{NewPage, PageSet};
pub use error::{MapError, MapErrorCode, Result};
pub use loader::MapLoader;
pub use reach::Reach;
pub use tree::{FrozenMap, Map};
pub use usage::{Taken, Usage, UsageRoot};

/// Bytes of a slot: the unit of the map. A constant of the format.
pub const SLOT_BYTES: u64 = 4096;
/// Slots of a leaf (32 MiB).
pub const LEAF_SLOTS: u64 = 8192;
/// Children of an inner node.
pub const INNER_FANOUT: u64 = 256;
/// Slots of the whole address space (512 TiB).
pub const MAP_SLOTS: u64 = LEAF_SLOTS * INNER_FANOUT * INNER_FANOUT * INNER_FANOUT;
/// The owner of a slot that nobody wrote.
pub const HOLE: u32 = 0;

/// Root of a map as the catalog stores it. `word`: 0 HOLE; `1<<60 | alias` UNIFORM; `2<<60 | page id` a page, whose crc32c is `crc`
/// (0 for the other two). Never negative as an i64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct RootRef {
    /// The tagged word.
    pub word: u64,
    /// crc32c of the root page.
    pub crc: u32,
}

/// A run of slots with one owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Run {
    /// First slot.
    pub start_slot: u64,
    /// Number of slots, never 0.
    pub slot_count: u64,
    /// `HOLE` or a layer alias.
    pub owner: u32,
}
