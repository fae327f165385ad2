//! The transmission phase of NBD (newstyle, with compact or extended headers), from the moment the negotiation is over.
//!
//! States of a connection: *serving* (requests are taken), *draining* (what is in flight is finished, what comes is answered
//! ESHUTDOWN, until it is quiet or `DRAIN_TIME_MAX` is over), *ending* (nothing is taken any more: the client said DISC or went
//! away, the device was closed, or the drain is over; what is in flight is finished and answered), *over*.
//!
//! Rules:
//! - One thread reads: a large receive, then every complete request in the buffer, then one send with all replies.
//!   Requests that may be slow (flush, FUA, long trims and zeroes, whatever the throttle holds back) go to workers of the
//!   connection, so that nothing waits behind somebody's fsync or disk. Reads of what is not at hand go to the ring of the
//!   connection where the kernel lets us have one, and to the workers where not. Reads and writes of a cluster are begun and answered
//!   when their end is told (`begun.rs`). Replies go out in any order, each as one piece.
//! - A long write goes to the device in pieces while the rest of it still arrives; it is answered once, when all of it is done.
//! - A reply is sent only when what it says is true: a write when the device has it and has settled it (once for all writes whose
//!   replies go out together), a flush or FUA when it is durable.
//! - Everything a client can make us keep is bounded: requests and bytes in flight, request size, extents of a reply.
//! - Once a reply's first byte is sent the rest follows, or the connection ends; nothing is padded.
//!
//! Deliberately absent: negotiation (TypeScript) and policy.
mod begun;
#[cfg(test)]
mod fuzz_tests;
mod receive;
mod reply;
mod request;
mod ring_reads;
mod serve;
#[cfg(test)]
mod test_harness;
#[cfg(test)]
mod tests;
mod workers;

pub(crate) use serve::{ServeControl, serve};

use atoll_map::FrozenMap;

/// Longest READ and longest WRITE payload: what the negotiation announces as the largest block size.
pub const NBD_REQUEST_BYTES_MAX: u32 = 32 << 20;

/// Contexts of one connection (I8); what a request asks about is a bit set of them.
pub const META_CONTEXT_COUNT_MAX: usize = 32;

/// How replies look, and requests with them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReplyForm {
    /// A number, and data behind it.
    Simple,
    /// Reads, statuses and errors come in chunks, and DF is a known flag; success without data stays simple.
    Structured,
    /// Requests have 32 bytes with a length of 64 bits, and every reply is a chunk with as long a header.
    Extended,
}

/// What a metadata context tells of a stretch.
#[derive(Clone)]
pub enum MetaContextKind {
    /// `base:allocation`: 1 hole, 2 zero.
    Allocation,
    /// `qemu:allocation-depth`: 0 nowhere, 1 in the layer that the volume writes, 2 in one that it shares.
    Depth,
    /// `qemu:dirty-bitmap:…`: 1 where the device's map no longer is this one.
    ChangedSince(FrozenMap),
}

/// A context that the client selected.
#[derive(Clone)]
pub struct MetaContext {
    /// What the client knows it by; no two of a connection are the same.
    pub id: u32,
    /// What it tells.
    pub kind: MetaContextKind,
}

/// Who waits for reads of what is not at hand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadPath {
    /// The kernel, many at a time, in an io_uring of the connection.
    Ring,
    /// A thread for each.
    Workers,
}

/// What the negotiation settled, and how reads wait.
#[derive(Clone)]
pub struct NbdOptions {
    /// How replies look. Contexts need chunks.
    pub replies: ReplyForm,
    /// Contexts that the client selected, at most `META_CONTEXT_COUNT_MAX`.
    pub contexts: Vec<MetaContext>,
    /// The export is read-only, whatever the device is.
    pub read_only: bool,
    /// Longest READ and longest payload; `NBD_REQUEST_BYTES_MAX` unless something smaller was announced.
    pub request_bytes_max: u32,
    /// Who waits for reads of what is not at hand: `Engine::read_path`.
    pub read_path: ReadPath,
}

/// Why a connection stopped serving.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ServeEndReason {
    /// The client said DISC.
    Disconnect,
    /// The client closed its end without DISC.
    Eof,
    /// The client broke the protocol or the connection broke; the message says how.
    Error,
    /// We ended it: drained, closed, or the device was closed.
    Closed,
}

/// How serving ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ServeEnd {
    /// Why.
    pub reason: ServeEndReason,
    /// For the log.
    pub message: String,
}
