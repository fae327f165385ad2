//! The transmission phase of NBD (newstyle, 28-byte requests), from the moment the negotiation is over.
//!
//! States of a connection: *serving* (requests are taken), *ending* (no request is taken any more: the client said DISC
//! or went away, the device was closed, or a drain was asked for; what is in flight is finished and answered), *over*.
//!
//! Rules:
//! - One thread reads: a large receive, then every complete request in the buffer, then one send with all replies.
//!   Requests that may be slow (flush, FUA, long trims and zeroes, whatever the throttle holds back) go to workers of the
//!   connection, so that nothing waits behind somebody's fsync. Replies go out in any order, each as one piece.
//! - A reply is sent only when what it says is true: a write when the device has it, a flush or FUA when it is durable.
//! - Everything a client can make us keep is bounded: requests and bytes in flight, request size, extents of a reply.
//! - Once a reply's first byte is sent the rest follows, or the connection ends; nothing is padded.
//!
//! Deliberately absent: negotiation (TypeScript), policy, extended headers, `NBD_CMD_CACHE` (answered EINVAL: it is not advertised).
mod receive;
mod reply;
mod request;
mod serve;
#[cfg(test)]
mod tests;
mod workers;

pub(crate) use serve::{ServeControl, serve};

/// Longest READ and longest WRITE payload: what the negotiation announces as the largest block size.
pub const NBD_REQUEST_BYTES_MAX: u32 = 32 << 20;

/// What the negotiation settled.
#[derive(Debug, Clone, Copy)]
pub struct NbdOptions {
    /// Structured replies: reads are always answered in chunks, and DF is a known flag.
    pub structured_replies: bool,
    /// Context id of `base:allocation`, if the client selected it.
    pub allocation_context_id: Option<u32>,
    /// The export is read-only, whatever the device is.
    pub read_only: bool,
    /// Longest READ and longest WRITE payload; `NBD_REQUEST_BYTES_MAX` unless something smaller was announced.
    pub request_bytes_max: u32,
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
