//! The journal of an active layer: which slots changed owner since the map was last checkpointed.
//!
//! A journal is a row of segments, each named by the lsn of the first frame in it. Rules:
//! - lsns are volume-wide and contiguous, within a segment and from one to the next.
//! - At most one frame is not synced yet, and it is the last. So a bad frame with a valid one after it is corruption and never a
//!   torn tail.
//! - What a replay has handed out is synced before: a frame that only the page cache still held after a kill must not be lost by
//!   a power cut that comes later, when frames after it are durable.
//! - Removing a segment is not durable; one that comes back holds frames that the catalog has, or none. So gaps and leftovers are
//!   fine up to the catalog's lsn, and nowhere after it.
//! - A journal without a frame has no segment. Once it had one, it keeps at least one, whose base says how far the catalog must be.
//!
//! `format.rs` has the bytes, `writer.rs` the appending side, `replay.rs` the reading one.
mod format;
mod replay;
mod writer;

pub use writer::Journal;

use crate::LayerId;

/// A run of slots that got a new owner (0 = hole, otherwise a layer alias).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Delta {
    /// First slot.
    pub start_slot: u64,
    /// Number of slots, never 0.
    pub slot_count: u64,
    /// 0: hole. Otherwise the catalog's alias of the layer.
    pub owner: u32,
}

/// A batch of deltas that became durable together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Volume-wide, contiguous.
    pub lsn: u64,
    /// In the order they happened.
    pub deltas: Vec<Delta>,
}

/// Who writes this journal; stands in every segment's header and must match on replay.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct JournalIdentity {
    /// The volume.
    pub volume: [u8; 16],
    /// The layer the journal lies beside.
    pub layer: LayerId,
    /// Epoch of the lease under which it is written.
    pub epoch: u64,
}

/// The last record of a sealed layer's journal: no frame follows, ever.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SealMark {
    /// lsn of the volume when the layer was sealed.
    pub final_lsn: u64,
    /// The layer that became active instead (all zero: none).
    pub successor: LayerId,
}

/// What a journal held.
pub struct JournalReplay {
    /// Frames with lsn > `after_lsn`, contiguous, ascending.
    pub frames: Vec<Frame>,
    /// Bytes of a torn tail that were cut (0: none).
    pub torn_tail_bytes: u64,
    /// Set if the layer was sealed.
    pub seal: Option<SealMark>,
    /// The journal, ready for the next frame (in a new segment, under the new identity).
    pub journal: Journal,
}

/// What a journal holds, as `Journal::inspect` finds it without touching it.
pub struct JournalSummary {
    /// Segments with a good header.
    pub segment_count: u64,
    /// Bytes of the good part of them.
    pub length_bytes: u64,
    /// Bytes that a replay would cut (0: none).
    pub torn_tail_bytes: u64,
    /// lsn of the last frame, or the one before the first that is to come; 0 if there is no segment.
    pub last_lsn: u64,
    /// Newest epoch in it.
    pub epoch: u64,
    /// Set if the layer was sealed.
    pub seal: Option<SealMark>,
    /// Frames with lsn > `after_lsn`, contiguous, ascending.
    pub frames: Vec<Frame>,
}
