//! The receiving side: one large buffer that requests are parsed from in place.
use super::request::EXTENDED_HEADER_BYTES;
use crate::net::{Patience, Socket};
use std::io;

/// Bytes of payload that are received together with their headers; longer payloads get a buffer of their own.
pub(super) const INLINE_PAYLOAD_BYTES_MAX: usize = 256 << 10;

/// A payload buffer larger than this is given back after use: an idle connection keeps little memory (I8).
const PAYLOAD_KEEP_BYTES_MAX: usize = 4 << 20;

/// Received bytes that are not consumed yet.
pub(super) struct ReceiveBuffer {
    header_bytes: usize,
    bytes: Vec<u8>,
    start: usize,
    end: usize,
    payload: Vec<u8>,
    patience: Patience,
}

impl ReceiveBuffer {
    /// For requests whose headers have this many bytes.
    pub(super) fn new(header_bytes: usize) -> ReceiveBuffer {
        let bytes = vec![0; EXTENDED_HEADER_BYTES + INLINE_PAYLOAD_BYTES_MAX];
        ReceiveBuffer { header_bytes, bytes, start: 0, end: 0, payload: Vec::new(), patience: Patience::default() }
    }

    /// Bytes received and not consumed.
    pub(super) fn available_bytes(&self) -> usize {
        self.end - self.start
    }

    /// The next request's header, if all of it is here. It is not consumed.
    #[inline]
    pub(super) fn header(&self) -> Option<&[u8]> {
        self.bytes[self.start..self.end].get(..self.header_bytes)
    }

    /// Whether the next request is here as a whole.
    #[inline]
    pub(super) fn has_whole(&self, payload_bytes: usize) -> bool {
        self.available_bytes() >= self.header_bytes + payload_bytes
    }

    /// Consumes header and payload of a request that is here as a whole; returns the payload.
    pub(super) fn consume(&mut self, payload_bytes: usize) -> &[u8] {
        let payload_start = self.start + self.header_bytes;
        self.start = payload_start + payload_bytes;
        debug_assert!(self.start <= self.end);
        &self.bytes[payload_start..self.start]
    }

    /// Waits for more bytes. 0: end of file. Must not be called while a request that fits is here as a whole.
    pub(super) fn fill(&mut self, socket: &Socket) -> io::Result<usize> {
        if self.start == self.end {
            self.start = 0;
            self.end = 0;
        } else if self.start > 0 {
            // Less than one request is left over: a small move that leaves all the room to the receive.
            self.bytes.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let count = socket.receive_patiently(&mut self.bytes[self.end..], &mut self.patience)?;
        self.end += count;
        Ok(count)
    }

    /// Consumes a request whose payload does not fit: what is here of it is moved, the rest received, into a buffer of
    /// its own. `None`: end of file in the middle.
    pub(super) fn receive_large(&mut self, socket: &Socket, payload_bytes: usize) -> io::Result<Option<&mut Vec<u8>>> {
        let payload_start = self.start + self.header_bytes;
        let here = (self.end - payload_start).min(payload_bytes);
        self.payload.resize(payload_bytes, 0);
        self.payload[..here].copy_from_slice(&self.bytes[payload_start..payload_start + here]);
        self.start = payload_start + here;
        let rest = &mut self.payload[here..];
        let rest_bytes = rest.len();
        if socket.receive_all(rest)? < rest_bytes {
            return Ok(None);
        }
        Ok(Some(&mut self.payload))
    }

    /// Gives a large payload buffer back.
    pub(super) fn trim(&mut self) {
        if self.payload.capacity() > PAYLOAD_KEEP_BYTES_MAX {
            self.payload = Vec::new();
        }
    }
}
