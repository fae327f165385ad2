//! Replies, built one after the other in a buffer that is sent as a whole. Data is read straight into its place in it.
//!
//! Simple reply: magic u32, error u32, cookie u64, then the data of a successful READ.
//! Chunk: magic u32, flags u16, type u16, cookie u64, payload length u32, then the payload. Big-endian throughout.
use super::request::{NbdErrno, Refusal, Request};
use crate::BlockStatus;

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const CHUNK_DONE: u16 = 1;
const TYPE_NONE: u16 = 0;
const TYPE_OFFSET_DATA: u16 = 1;
const TYPE_OFFSET_HOLE: u16 = 2;
const TYPE_BLOCK_STATUS: u16 = 5;
const TYPE_ERROR: u16 = (1 << 15) + 1;

const SIMPLE_HEADER_BYTES: usize = 16;
const CHUNK_HEADER_BYTES: usize = 20;
const OFFSET_BYTES: usize = 8;
const HOLE_CHUNK_BYTES: usize = CHUNK_HEADER_BYTES + OFFSET_BYTES + 4;

const STATE_HOLE: u32 = 1;
const STATE_ZERO: u32 = 2;

/// Shortest run of zeros that is answered as a hole, and the unit in which zeros are looked for.
const HOLE_BYTES_MIN: usize = 4096;

// Cutting holes out in place writes at most one hole chunk and one data header before the next run's data.
const _: () = assert!(HOLE_CHUNK_BYTES + CHUNK_HEADER_BYTES + OFFSET_BYTES <= HOLE_BYTES_MIN);

/// Longest message in an error chunk (the protocol allows 4096).
const ERROR_MESSAGE_BYTES_MAX: usize = 1024;

/// A buffer larger than this is given back after it was sent (I8).
const REPLY_KEEP_BYTES_MAX: usize = 4 << 20;

/// Replies that wait to be sent. The bytes behind `used` are initialised but mean nothing, so reuse costs no clearing.
#[derive(Default)]
pub(super) struct ReplyBuffer {
    bytes: Vec<u8>,
    used: usize,
}

impl ReplyBuffer {
    /// What is to be sent.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.used]
    }

    pub(super) fn is_empty(&self) -> bool {
        self.used == 0
    }

    /// Forgets everything; a large buffer is given back.
    pub(super) fn clear(&mut self) {
        self.used = 0;
        if self.bytes.capacity() > REPLY_KEEP_BYTES_MAX {
            self.bytes = Vec::new();
        }
    }

    /// The next `length` bytes, which count as used from now on.
    fn extend(&mut self, length: usize) -> &mut [u8] {
        let start = self.used;
        self.used += length;
        if self.bytes.len() < self.used {
            self.bytes.resize(self.used, 0);
        }
        &mut self.bytes[start..self.used]
    }

    fn push(&mut self, bytes: &[u8]) {
        self.extend(bytes.len()).copy_from_slice(bytes);
    }

    /// Success without data, for everything but READ and BLOCK_STATUS.
    pub(super) fn push_success(&mut self, cookie: u64) {
        self.push(&simple_header(0, cookie));
    }

    /// An error: a chunk with a message where structured replies were negotiated, a number where not.
    pub(super) fn push_error(&mut self, request: &Request, structured: bool, refusal: &Refusal) {
        let errno = refusal.errno as u32;
        if !structured {
            return self.push(&simple_header(errno, request.cookie));
        }
        let mut cut = refusal.message.len().min(ERROR_MESSAGE_BYTES_MAX);
        while !refusal.message.is_char_boundary(cut) {
            cut -= 1;
        }
        let message = &refusal.message.as_bytes()[..cut];
        self.push(&chunk_header(CHUNK_DONE, TYPE_ERROR, request.cookie, 6 + cut));
        self.push(&errno.to_be_bytes());
        self.push(&(cut as u16).to_be_bytes());
        self.push(message);
    }

    /// The reply to a READ. `read` fills the data's place; if it fails, nothing of the reply is left.
    pub(super) fn push_read<E>(
        &mut self,
        request: &Request,
        structured: bool,
        may_have_holes: bool,
        read: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        let start = self.used;
        let length = request.length_bytes as usize;
        if structured && length == 0 {
            self.push(&chunk_header(CHUNK_DONE, TYPE_NONE, request.cookie, 0));
            return Ok(());
        }
        let header_bytes = if structured { CHUNK_HEADER_BYTES + OFFSET_BYTES } else { SIMPLE_HEADER_BYTES };
        let room = self.extend(header_bytes + length);
        if let Err(error) = read(&mut room[header_bytes..]) {
            self.used = start;
            return Err(error);
        }
        if !structured {
            room[..SIMPLE_HEADER_BYTES].copy_from_slice(&simple_header(0, request.cookie));
        } else if may_have_holes {
            self.used = start + cut_holes(room, request);
        } else {
            write_data_header(room, CHUNK_DONE, request.cookie, request.offset_bytes, length);
        }
        Ok(())
    }

    /// The reply to a BLOCK_STATUS: one chunk.
    pub(super) fn push_block_status(&mut self, request: &Request, context_id: u32, extents: &[BlockStatus]) {
        self.push(&chunk_header(CHUNK_DONE, TYPE_BLOCK_STATUS, request.cookie, 4 + 8 * extents.len()));
        self.push(&context_id.to_be_bytes());
        for extent in extents {
            let length = u32::try_from(extent.length_bytes).unwrap_or(u32::MAX);
            let state = if extent.hole { STATE_HOLE } else { 0 } | if extent.zero { STATE_ZERO } else { 0 };
            self.push(&length.to_be_bytes());
            self.push(&state.to_be_bytes());
        }
    }
}

fn simple_header(error: u32, cookie: u64) -> [u8; SIMPLE_HEADER_BYTES] {
    let mut header = [0; SIMPLE_HEADER_BYTES];
    header[0..4].copy_from_slice(&SIMPLE_MAGIC.to_be_bytes());
    header[4..8].copy_from_slice(&error.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header
}

fn chunk_header(flags: u16, kind: u16, cookie: u64, payload_bytes: usize) -> [u8; CHUNK_HEADER_BYTES] {
    let mut header = [0; CHUNK_HEADER_BYTES];
    header[0..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
    header[4..6].copy_from_slice(&flags.to_be_bytes());
    header[6..8].copy_from_slice(&kind.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header[16..20].copy_from_slice(&(payload_bytes as u32).to_be_bytes());
    header
}

fn write_data_header(room: &mut [u8], flags: u16, cookie: u64, offset_bytes: u64, data_bytes: usize) {
    room[..CHUNK_HEADER_BYTES].copy_from_slice(&chunk_header(flags, TYPE_OFFSET_DATA, cookie, OFFSET_BYTES + data_bytes));
    room[CHUNK_HEADER_BYTES..CHUNK_HEADER_BYTES + OFFSET_BYTES].copy_from_slice(&offset_bytes.to_be_bytes());
}

fn write_hole_chunk(room: &mut [u8], flags: u16, cookie: u64, offset_bytes: u64, hole_bytes: usize) {
    room[..CHUNK_HEADER_BYTES].copy_from_slice(&chunk_header(flags, TYPE_OFFSET_HOLE, cookie, OFFSET_BYTES + 4));
    room[CHUNK_HEADER_BYTES..CHUNK_HEADER_BYTES + OFFSET_BYTES].copy_from_slice(&offset_bytes.to_be_bytes());
    room[CHUNK_HEADER_BYTES + OFFSET_BYTES..HOLE_CHUNK_BYTES].copy_from_slice(&(hole_bytes as u32).to_be_bytes());
}

/// Turns one chunk's room, with the data of the whole read in place, into data and hole chunks; returns the bytes used.
/// What the data says decides, not an allocation map: a hole in the reply is content that was read and is zero (I4).
/// Looking costs little: the first word of a block that holds data mostly tells.
fn cut_holes(room: &mut [u8], request: &Request) -> usize {
    let data_start = CHUNK_HEADER_BYTES + OFFSET_BYTES;
    let length = room.len() - data_start;
    let (cookie, offset_bytes) = (request.cookie, request.offset_bytes);
    let mut written = 0;
    let mut from = 0;
    while from < length {
        let is_hole = is_zero_block(&room[data_start + from..], length - from);
        let mut to = from;
        while to < length && is_zero_block(&room[data_start + to..], length - to) == is_hole {
            to += HOLE_BYTES_MIN.min(length - to);
        }
        let flags = if to == length { CHUNK_DONE } else { 0 };
        let at = offset_bytes + from as u64;
        if is_hole {
            write_hole_chunk(&mut room[written..], flags, cookie, at, to - from);
            written += HOLE_CHUNK_BYTES;
        } else {
            // Every hole before this run freed more than its chunk and this header take, so data moves down only.
            let target = written + data_start;
            if target != data_start + from {
                room.copy_within(data_start + from..data_start + to, target);
            }
            write_data_header(&mut room[written..], flags, cookie, at, to - from);
            written = target + (to - from);
        }
        from = to;
    }
    written
}

/// Whether the next block of `left` remaining bytes is a whole one and zero.
fn is_zero_block(bytes: &[u8], left: usize) -> bool {
    left >= HOLE_BYTES_MIN && crate::copy::is_zero(&bytes[..HOLE_BYTES_MIN])
}

/// An error that stands for a request whose execution failed.
pub(super) fn refusal_of(error: &crate::EngineError) -> Refusal {
    Refusal { errno: super::request::nbd_errno(error.errno), message: error.to_string() }
}

/// The answer to requests that come while the connection is ending.
pub(super) fn shutting_down() -> Refusal {
    Refusal::new(NbdErrno::Shutdown, "the export is shutting down")
}

#[cfg(test)]
mod tests {
    use super::super::request::Command;
    use super::*;

    fn read_request(offset_bytes: u64, length_bytes: u32) -> Request {
        Request { flags: 0, command: Command::Read, cookie: 0x1122_3344_5566_7788, offset_bytes, length_bytes }
    }

    /// (flags, type, payload) of every chunk.
    fn chunks(mut bytes: &[u8]) -> Vec<(u16, u16, Vec<u8>)> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            assert_eq!(bytes[0..4], CHUNK_MAGIC.to_be_bytes());
            assert_eq!(bytes[8..16], 0x1122_3344_5566_7788u64.to_be_bytes());
            let length = u32::from_be_bytes(bytes[16..20].try_into().unwrap()) as usize;
            let flags = u16::from_be_bytes(bytes[4..6].try_into().unwrap());
            let kind = u16::from_be_bytes(bytes[6..8].try_into().unwrap());
            found.push((flags, kind, bytes[20..20 + length].to_vec()));
            bytes = &bytes[20 + length..];
        }
        found
    }

    /// Puts chunks together again, and checks that they cover the request once, in order, with DONE on the last only.
    fn reassemble(bytes: &[u8], offset_bytes: u64, length: usize) -> Vec<u8> {
        let chunks = chunks(bytes);
        let mut content = Vec::new();
        for (index, (flags, kind, payload)) in chunks.iter().enumerate() {
            assert_eq!(*flags == CHUNK_DONE, index == chunks.len() - 1);
            let at = u64::from_be_bytes(payload[..8].try_into().unwrap());
            assert_eq!(at, offset_bytes + content.len() as u64);
            match *kind {
                TYPE_OFFSET_DATA => content.extend_from_slice(&payload[8..]),
                TYPE_OFFSET_HOLE => {
                    content.resize(content.len() + u32::from_be_bytes(payload[8..].try_into().unwrap()) as usize, 0);
                }
                other => panic!("chunk type {other}"),
            }
        }
        assert_eq!(content.len(), length);
        content
    }

    #[test]
    fn a_simple_read_is_a_header_and_the_data() {
        let mut replies = ReplyBuffer::default();
        replies.push_success(9);
        replies
            .push_read(&read_request(4096, 512), false, true, |room| {
                room.fill(7);
                Ok::<(), ()>(())
            })
            .unwrap();
        let bytes = replies.bytes();
        assert_eq!(bytes.len(), 16 + 16 + 512);
        assert_eq!(bytes[16..32], simple_header(0, 0x1122_3344_5566_7788));
        assert!(bytes[32..].iter().all(|byte| *byte == 7));
    }

    #[test]
    fn a_failed_read_leaves_nothing_behind() {
        let mut replies = ReplyBuffer::default();
        replies.push_success(9);
        assert_eq!(replies.push_read(&read_request(0, 4096), true, true, |_| Err("no")), Err("no"));
        assert_eq!(replies.bytes(), simple_header(0, 9));
    }

    #[test]
    fn zeros_come_back_as_holes_wherever_they_lie() {
        // One letter for each 4 KiB: d data, z zeros; a last block that is not whole is data in any case.
        for pattern in ["z", "d", "zd", "dz", "zdz", "dzd", "zzddzzd", "dddz", "zzzz", "zdzdzdzdzdzd"] {
            for tail in [0usize, 512] {
                let mut content: Vec<u8> = Vec::new();
                for letter in pattern.bytes() {
                    let fill = if letter == b'z' { 0 } else { 0xa5 };
                    content.resize(content.len() + HOLE_BYTES_MIN, fill);
                }
                content.resize(content.len() + tail, 0);
                let mut replies = ReplyBuffer::default();
                let request = read_request(1 << 40, content.len() as u32);
                replies
                    .push_read(&request, true, true, |room| {
                        room.copy_from_slice(&content);
                        Ok::<(), ()>(())
                    })
                    .unwrap();
                assert_eq!(reassemble(replies.bytes(), 1 << 40, content.len()), content, "{pattern} + {tail}");
                let holes = chunks(replies.bytes()).iter().filter(|chunk| chunk.1 == TYPE_OFFSET_HOLE).count();
                let runs = pattern.split('d').filter(|run| !run.is_empty()).count();
                assert_eq!(holes, runs, "{pattern} + {tail}");
            }
        }
    }

    #[test]
    fn a_read_that_must_not_be_fragmented_is_one_chunk() {
        let mut replies = ReplyBuffer::default();
        let request = read_request(8192, 1 << 20);
        replies
            .push_read(&request, true, false, |room| {
                room.fill(0);
                Ok::<(), ()>(())
            })
            .unwrap();
        let chunks = chunks(replies.bytes());
        assert_eq!(chunks.len(), 1);
        assert_eq!((chunks[0].0, chunks[0].1), (CHUNK_DONE, TYPE_OFFSET_DATA));
        assert_eq!(chunks[0].2.len(), 8 + (1 << 20));
    }

    #[test]
    fn an_empty_read_is_answered_without_touching_the_device() {
        let mut replies = ReplyBuffer::default();
        replies.push_read(&read_request(0, 0), true, true, |_| Err("touched")).unwrap();
        assert_eq!(chunks(replies.bytes()), [(CHUNK_DONE, TYPE_NONE, Vec::new())]);
    }

    #[test]
    fn errors_are_chunks_with_a_message_or_simple_numbers() {
        let request = read_request(0, 512);
        let refusal = Refusal::new(NbdErrno::Invalid, "é".repeat(2000));
        let mut replies = ReplyBuffer::default();
        replies.push_error(&request, true, &refusal);
        let chunk = &chunks(replies.bytes())[0];
        assert_eq!((chunk.0, chunk.1), (CHUNK_DONE, TYPE_ERROR));
        assert_eq!(chunk.2[..4], 22u32.to_be_bytes());
        let length = u16::from_be_bytes(chunk.2[4..6].try_into().unwrap()) as usize;
        assert_eq!(length, ERROR_MESSAGE_BYTES_MAX);
        assert!(std::str::from_utf8(&chunk.2[6..6 + length]).is_ok());
        replies.clear();
        replies.push_error(&request, false, &refusal);
        assert_eq!(replies.bytes(), simple_header(22, request.cookie));
    }

    #[test]
    fn status_is_one_chunk_with_its_context() {
        let mut replies = ReplyBuffer::default();
        let extents =
            [BlockStatus { length_bytes: 4096, hole: false, zero: false }, BlockStatus { length_bytes: 1 << 20, hole: true, zero: true }];
        replies.push_block_status(&read_request(0, 1 << 20), 42, &extents);
        let chunk = &chunks(replies.bytes())[0];
        assert_eq!((chunk.0, chunk.1), (CHUNK_DONE, TYPE_BLOCK_STATUS));
        let words: Vec<u32> = chunk.2.chunks(4).map(|word| u32::from_be_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, [42, 4096, 0, 1 << 20, STATE_HOLE | STATE_ZERO]);
    }
}
