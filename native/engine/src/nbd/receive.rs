//! The receiving side: one large buffer that requests are parsed from in place.
use super::request::EXTENDED_HEADER_BYTES;
use crate::net::{Patience, Socket};
use std::io;

/// Bytes of payload that are received together with their headers; longer payloads get a buffer of their own.
pub(super) const INLINE_PAYLOAD_BYTES_MAX: usize = 256 << 10;

/// A long payload is taken in pieces of at least this: small enough for a cache, and large against an alignment.
const PIECE_BYTES: usize = 128 << 10;

const _: () = assert!(PIECE_BYTES <= INLINE_PAYLOAD_BYTES_MAX, "a piece fits the buffer");

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

    /// Waits for more bytes. 0: end of file. Must not be called while the buffer is full: a request that fits is here as a whole.
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

    /// Consumes a request whose payload does not fit, and hands the payload to `take` piece by piece while it is fresh in the
    /// processor's cache. The pieces come in order and join; all but the last end at multiples of `alignment_bytes` counted from
    /// `payload_offset_bytes` before the payload. False: end of file in the middle.
    pub(super) fn receive_in_pieces(
        &mut self,
        socket: &Socket,
        payload_bytes: u64,
        payload_offset_bytes: u64,
        alignment_bytes: u64,
        mut take: impl FnMut(u64, &[u8]),
    ) -> io::Result<bool> {
        self.start += self.header_bytes;
        let mut at = 0;
        while at < payload_bytes {
            let left_bytes = payload_bytes - at;
            let wanted_bytes = left_bytes.min(PIECE_BYTES as u64) as usize;
            while self.available_bytes() < wanted_bytes {
                if self.fill(socket)? == 0 {
                    return Ok(false);
                }
            }
            let here = (self.available_bytes() as u64).min(left_bytes);
            let piece_bytes = if here == left_bytes {
                here
            } else {
                let end = payload_offset_bytes + at + here;
                here - end % alignment_bytes
            };
            take(at, &self.bytes[self.start..self.start + piece_bytes as usize]);
            self.start += piece_bytes as usize;
            at += piece_bytes;
        }
        Ok(true)
    }

    /// Gives a large payload buffer back.
    pub(super) fn trim(&mut self) {
        if self.payload.capacity() > PAYLOAD_KEEP_BYTES_MAX {
            self.payload = Vec::new();
        }
    }
}
