//! Stores and journals: where the bytes of layers live, and the log that says which slots changed owner.
//!
//! A [`Store`] is the native half of a pool: a namespace of layers, of journal segments that belong to layers, and
//! of small named records. Kinds: [`FileStore`], [`MemoryStore`] (with the crash recorder), [`RadosStore`] and the wrapper
//! [`FaultStore`]. Everything above works through the traits and never asks which kind it has.
mod error;
mod fault;
mod file;
mod journal;
mod memory;
mod rados;
mod random;
mod ring;
mod split;
mod store;

pub use error::{IoError, IoErrorCode, Result};
pub use fault::{FaultPlan, FaultRule, FaultStore};
pub use file::{FileStore, RawFileStore};
pub use journal::{Delta, Frame, Journal, JournalIdentity, JournalReplay, JournalSummary, SealMark};
pub use memory::{CrashOptions, MemoryStore, tick as memory_tick};
pub use rados::{RadosOptions, RadosStore};
pub use ring::{ReadRing, RingRead, RingWaker, probe_ring};
pub use split::split;
pub use store::{
    Begun, Ending, Extent, JournalWriter, LayerEntry, LayerId, LayerIo, OpenMode, PROOF_TIME_MAX, SegmentIo, Store, StoreCapabilities,
    StoreHealth, StoreLock, StoreUsage,
};
