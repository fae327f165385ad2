//! Replies, built one after the other in a buffer that is sent as a whole. Data is read straight into its place in it.
//!
//! Simple reply: magic u32, error u32, cookie u64, then the data of a successful READ.
//! Chunk: magic u32, flags u16, type u16, cookie u64, payload length u32, then the payload.
//! Extended chunk: magic u32, flags u16, type u16, cookie u64, the request's offset u64, payload length u64, then the payload.
//! Big-endian throughout.
use super::ReplyForm;
use super::request::{NbdErrno, Refusal, Request};
use crate::StatusExtent;

const SIMPLE_MAGIC: u32 = 0x6744_6698;
const CHUNK_MAGIC: u32 = 0x668e_33ef;
const EXTENDED_MAGIC: u32 = 0x6e8a_278c;
const CHUNK_DONE: u16 = 1;
const TYPE_NONE: u16 = 0;
const TYPE_OFFSET_DATA: u16 = 1;
const TYPE_OFFSET_HOLE: u16 = 2;
const TYPE_BLOCK_STATUS: u16 = 5;
const TYPE_BLOCK_STATUS_EXT: u16 = 6;
const TYPE_ERROR: u16 = (1 << 15) + 1;

const SIMPLE_HEADER_BYTES: usize = 16;
const CHUNK_HEADER_BYTES: usize = 20;
const EXTENDED_HEADER_BYTES: usize = 32;
const OFFSET_BYTES: usize = 8;
/// Offset and length of a hole.
const HOLE_PAYLOAD_BYTES: usize = OFFSET_BYTES + 4;

/// Shortest run of zeros that is answered as a hole, and the unit in which zeros are looked for.
const HOLE_BYTES_MIN: usize = 4096;

// Cutting holes out in place writes at most one hole chunk and one data header before the next run's data.
const _: () = assert!(EXTENDED_HEADER_BYTES + HOLE_PAYLOAD_BYTES + EXTENDED_HEADER_BYTES + OFFSET_BYTES <= HOLE_BYTES_MIN);

/// Longest message in an error chunk (the protocol allows 4096).
const ERROR_MESSAGE_BYTES_MAX: usize = 1024;

/// A buffer larger than this is given back after it was sent (I8).
const REPLY_KEEP_BYTES_MAX: usize = 2 << 20;

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

    /// Appends replies, or a part of one, as they are.
    pub(super) fn push(&mut self, bytes: &[u8]) {
        self.extend(bytes.len()).copy_from_slice(bytes);
    }

    /// Success without data, for everything but READ and BLOCK_STATUS.
    pub(super) fn push_success(&mut self, request: &Request, form: ReplyForm) {
        match form {
            ReplyForm::Simple | ReplyForm::Structured => self.push(&simple_header(0, request.cookie)),
            ReplyForm::Extended => self.push_chunk_header(request, form, CHUNK_DONE, TYPE_NONE, 0),
        }
    }

    /// An error: a chunk with a message where chunks were negotiated, a number where not.
    pub(super) fn push_error(&mut self, request: &Request, form: ReplyForm, refusal: &Refusal) {
        let errno = refusal.errno as u32;
        if form == ReplyForm::Simple {
            return self.push(&simple_header(errno, request.cookie));
        }
        let mut cut = refusal.message.len().min(ERROR_MESSAGE_BYTES_MAX);
        while !refusal.message.is_char_boundary(cut) {
            cut -= 1;
        }
        let message = &refusal.message.as_bytes()[..cut];
        self.push_chunk_header(request, form, CHUNK_DONE, TYPE_ERROR, 6 + cut);
        self.push(&errno.to_be_bytes());
        self.push(&(cut as u16).to_be_bytes());
        self.push(message);
    }

    /// The reply to a READ. `read` fills the data's place; if it fails, nothing of the reply is left.
    pub(super) fn push_read<E>(
        &mut self,
        request: &Request,
        form: ReplyForm,
        may_have_holes: bool,
        read: impl FnOnce(&mut [u8]) -> Result<(), E>,
    ) -> Result<(), E> {
        if form != ReplyForm::Simple && request.length_bytes == 0 {
            self.push_chunk_header(request, form, CHUNK_DONE, TYPE_NONE, 0);
            return Ok(());
        }
        let start = self.used;
        let header_bytes = read_header_bytes(form);
        let room = self.extend(header_bytes + request.length_bytes as usize);
        if let Err(error) = read(&mut room[header_bytes..]) {
            self.used = start;
            return Err(error);
        }
        self.used = start + complete_read(room, request, form, may_have_holes);
        Ok(())
    }

    /// As `push_read`, of a reply that was prepared elsewhere: room for `read_header_bytes`, and the data behind it.
    pub(super) fn push_prepared_read(&mut self, room: &mut [u8], request: &Request, form: ReplyForm, may_have_holes: bool) {
        let used = complete_read(room, request, form, may_have_holes);
        self.push(&room[..used]);
    }

    /// A chunk of the reply to a BLOCK_STATUS: the status of one context. The last context ends the reply.
    pub(super) fn push_block_status(
        &mut self,
        request: &Request,
        form: ReplyForm,
        is_last: bool,
        context_id: u32,
        extents: &[StatusExtent],
    ) {
        let flags = if is_last { CHUNK_DONE } else { 0 };
        if form == ReplyForm::Extended {
            self.push_chunk_header(request, form, flags, TYPE_BLOCK_STATUS_EXT, 8 + 16 * extents.len());
            self.push(&context_id.to_be_bytes());
            self.push(&(extents.len() as u32).to_be_bytes());
            for extent in extents {
                self.push(&extent.length_bytes.to_be_bytes());
                self.push(&u64::from(extent.flags).to_be_bytes());
            }
            return;
        }
        self.push_chunk_header(request, form, flags, TYPE_BLOCK_STATUS, 4 + 8 * extents.len());
        self.push(&context_id.to_be_bytes());
        for extent in extents {
            // No extent is longer than the request, whose length has 32 bits here.
            let length = u32::try_from(extent.length_bytes).unwrap_or(u32::MAX);
            self.push(&length.to_be_bytes());
            self.push(&extent.flags.to_be_bytes());
        }
    }

    fn push_chunk_header(&mut self, request: &Request, form: ReplyForm, flags: u16, kind: u16, payload_bytes: usize) {
        let room = self.extend(chunk_header_bytes(form));
        write_chunk_header(room, request, form, flags, kind, payload_bytes);
    }
}

fn simple_header(error: u32, cookie: u64) -> [u8; SIMPLE_HEADER_BYTES] {
    let mut header = [0; SIMPLE_HEADER_BYTES];
    header[0..4].copy_from_slice(&SIMPLE_MAGIC.to_be_bytes());
    header[4..8].copy_from_slice(&error.to_be_bytes());
    header[8..16].copy_from_slice(&cookie.to_be_bytes());
    header
}

#[inline]
fn chunk_header_bytes(form: ReplyForm) -> usize {
    if form == ReplyForm::Extended { EXTENDED_HEADER_BYTES } else { CHUNK_HEADER_BYTES }
}

/// Writes a chunk's header to the beginning of `room`.
#[inline]
fn write_chunk_header(room: &mut [u8], request: &Request, form: ReplyForm, flags: u16, kind: u16, payload_bytes: usize) {
    let header = &mut room[..chunk_header_bytes(form)];
    header[4..6].copy_from_slice(&flags.to_be_bytes());
    header[6..8].copy_from_slice(&kind.to_be_bytes());
    header[8..16].copy_from_slice(&request.cookie.to_be_bytes());
    if form == ReplyForm::Extended {
        header[0..4].copy_from_slice(&EXTENDED_MAGIC.to_be_bytes());
        header[16..24].copy_from_slice(&request.offset_bytes.to_be_bytes());
        header[24..32].copy_from_slice(&(payload_bytes as u64).to_be_bytes());
    } else {
        header[0..4].copy_from_slice(&CHUNK_MAGIC.to_be_bytes());
        header[16..20].copy_from_slice(&(payload_bytes as u32).to_be_bytes());
    }
}

fn write_data_header(room: &mut [u8], request: &Request, form: ReplyForm, flags: u16, offset_bytes: u64, data_bytes: usize) {
    let header_bytes = chunk_header_bytes(form);
    write_chunk_header(room, request, form, flags, TYPE_OFFSET_DATA, OFFSET_BYTES + data_bytes);
    room[header_bytes..header_bytes + OFFSET_BYTES].copy_from_slice(&offset_bytes.to_be_bytes());
}

fn write_hole_chunk(room: &mut [u8], request: &Request, form: ReplyForm, flags: u16, offset_bytes: u64, hole_bytes: usize) {
    let header_bytes = chunk_header_bytes(form);
    write_chunk_header(room, request, form, flags, TYPE_OFFSET_HOLE, HOLE_PAYLOAD_BYTES);
    let payload = &mut room[header_bytes..header_bytes + HOLE_PAYLOAD_BYTES];
    payload[..OFFSET_BYTES].copy_from_slice(&offset_bytes.to_be_bytes());
    payload[OFFSET_BYTES..].copy_from_slice(&(hole_bytes as u32).to_be_bytes());
}

/// Turns one chunk's room, with the data of the whole read in place, into data and hole chunks; returns the bytes used.
/// What the data says decides, not an allocation map: a hole in the reply is content that was read and is zero (I4).
/// Looking costs little: the first word of a block that holds data mostly tells.
fn cut_holes(room: &mut [u8], request: &Request, form: ReplyForm) -> usize {
    let data_start = chunk_header_bytes(form) + OFFSET_BYTES;
    let hole_chunk_bytes = chunk_header_bytes(form) + HOLE_PAYLOAD_BYTES;
    let length = room.len() - data_start;
    let mut written = 0;
    let mut from = 0;
    while from < length {
        let is_hole = is_zero_block(&room[data_start + from..], length - from);
        let mut to = from;
        while to < length && is_zero_block(&room[data_start + to..], length - to) == is_hole {
            to += HOLE_BYTES_MIN.min(length - to);
        }
        let flags = if to == length { CHUNK_DONE } else { 0 };
        let at = request.offset_bytes + from as u64;
        if is_hole {
            write_hole_chunk(&mut room[written..], request, form, flags, at, to - from);
            written += hole_chunk_bytes;
        } else {
            // Every hole before this run freed more than its chunk and this header take, so data moves down only.
            let target = written + data_start;
            if target != data_start + from {
                room.copy_within(data_start + from..data_start + to, target);
            }
            write_data_header(&mut room[written..], request, form, flags, at, to - from);
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

/// Bytes in front of the data in the reply to a READ that is not empty.
pub(super) fn read_header_bytes(form: ReplyForm) -> usize {
    match form {
        ReplyForm::Simple => SIMPLE_HEADER_BYTES,
        ReplyForm::Structured | ReplyForm::Extended => chunk_header_bytes(form) + OFFSET_BYTES,
    }
}

/// Makes a reply of room for a header and the data behind it; returns the bytes used.
pub(super) fn complete_read(room: &mut [u8], request: &Request, form: ReplyForm, may_have_holes: bool) -> usize {
    if form == ReplyForm::Simple {
        room[..SIMPLE_HEADER_BYTES].copy_from_slice(&simple_header(0, request.cookie));
    } else if may_have_holes {
        return cut_holes(room, request, form);
    } else {
        write_data_header(room, request, form, CHUNK_DONE, request.offset_bytes, request.length_bytes as usize);
    }
    room.len()
}

/// Length of what `push_success` appends.
pub(super) fn success_bytes(form: ReplyForm) -> usize {
    if form == ReplyForm::Extended { EXTENDED_HEADER_BYTES } else { SIMPLE_HEADER_BYTES }
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
    use super::super::request::{ALL_CONTEXTS, Command};
    use super::*;

    const COOKIE: u64 = 0x1122_3344_5566_7788;

    fn read_request(offset_bytes: u64, length_bytes: u64) -> Request {
        Request { flags: 0, command: Command::Read, cookie: COOKIE, offset_bytes, length_bytes, payload_bytes: 0, contexts: ALL_CONTEXTS }
    }

    /// (flags, type, payload) of every chunk.
    fn chunks(mut bytes: &[u8], form: ReplyForm, request: &Request) -> Vec<(u16, u16, Vec<u8>)> {
        let mut found = Vec::new();
        while !bytes.is_empty() {
            assert_eq!(bytes[8..16], COOKIE.to_be_bytes());
            let flags = u16::from_be_bytes(bytes[4..6].try_into().unwrap());
            let kind = u16::from_be_bytes(bytes[6..8].try_into().unwrap());
            let (header_bytes, length) = if form == ReplyForm::Extended {
                assert_eq!(bytes[0..4], EXTENDED_MAGIC.to_be_bytes());
                assert_eq!(bytes[16..24], request.offset_bytes.to_be_bytes(), "the request's offset comes back in every chunk");
                (32, u64::from_be_bytes(bytes[24..32].try_into().unwrap()) as usize)
            } else {
                assert_eq!(bytes[0..4], CHUNK_MAGIC.to_be_bytes());
                (20, u32::from_be_bytes(bytes[16..20].try_into().unwrap()) as usize)
            };
            found.push((flags, kind, bytes[header_bytes..header_bytes + length].to_vec()));
            bytes = &bytes[header_bytes + length..];
        }
        found
    }

    /// Puts chunks together again, and checks that they cover the request once, in order, with DONE on the last only.
    fn reassemble(bytes: &[u8], form: ReplyForm, request: &Request) -> Vec<u8> {
        let chunks = chunks(bytes, form, request);
        let mut content = Vec::new();
        for (index, (flags, kind, payload)) in chunks.iter().enumerate() {
            assert_eq!(*flags == CHUNK_DONE, index == chunks.len() - 1);
            let at = u64::from_be_bytes(payload[..8].try_into().unwrap());
            assert_eq!(at, request.offset_bytes + content.len() as u64);
            match *kind {
                TYPE_OFFSET_DATA => content.extend_from_slice(&payload[8..]),
                TYPE_OFFSET_HOLE => {
                    content.resize(content.len() + u32::from_be_bytes(payload[8..].try_into().unwrap()) as usize, 0);
                }
                other => panic!("chunk type {other}"),
            }
        }
        assert_eq!(content.len() as u64, request.length_bytes);
        content
    }

    #[test]
    fn a_simple_read_is_a_header_and_the_data() {
        let mut replies = ReplyBuffer::default();
        replies.push_success(&read_request(0, 0), ReplyForm::Structured);
        replies
            .push_read(&read_request(4096, 512), ReplyForm::Simple, true, |room| {
                room.fill(7);
                Ok::<(), ()>(())
            })
            .unwrap();
        let bytes = replies.bytes();
        assert_eq!(bytes.len(), 16 + 16 + 512);
        assert_eq!(bytes[16..32], simple_header(0, COOKIE));
        assert!(bytes[32..].iter().all(|byte| *byte == 7));
    }

    #[test]
    fn a_failed_read_leaves_nothing_behind() {
        let mut replies = ReplyBuffer::default();
        replies.push_success(&read_request(0, 0), ReplyForm::Structured);
        assert_eq!(replies.push_read(&read_request(0, 4096), ReplyForm::Structured, true, |_| Err("no")), Err("no"));
        assert_eq!(replies.bytes(), simple_header(0, COOKIE));
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
                let request = read_request(1 << 40, content.len() as u64);
                for form in [ReplyForm::Structured, ReplyForm::Extended] {
                    let mut replies = ReplyBuffer::default();
                    replies
                        .push_read(&request, form, true, |room| {
                            room.copy_from_slice(&content);
                            Ok::<(), ()>(())
                        })
                        .unwrap();
                    assert_eq!(reassemble(replies.bytes(), form, &request), content, "{pattern} + {tail}");
                    let holes = chunks(replies.bytes(), form, &request).iter().filter(|chunk| chunk.1 == TYPE_OFFSET_HOLE).count();
                    let runs = pattern.split('d').filter(|run| !run.is_empty()).count();
                    assert_eq!(holes, runs, "{pattern} + {tail}");
                }
            }
        }
    }

    #[test]
    fn a_read_that_must_not_be_fragmented_is_one_chunk() {
        let mut replies = ReplyBuffer::default();
        let request = read_request(8192, 1 << 20);
        replies
            .push_read(&request, ReplyForm::Structured, false, |room| {
                room.fill(0);
                Ok::<(), ()>(())
            })
            .unwrap();
        let chunks = chunks(replies.bytes(), ReplyForm::Structured, &request);
        assert_eq!(chunks.len(), 1);
        assert_eq!((chunks[0].0, chunks[0].1), (CHUNK_DONE, TYPE_OFFSET_DATA));
        assert_eq!(chunks[0].2.len(), 8 + (1 << 20));
    }

    #[test]
    fn an_empty_read_is_answered_without_touching_the_device() {
        let mut replies = ReplyBuffer::default();
        let request = read_request(77, 0);
        for form in [ReplyForm::Structured, ReplyForm::Extended] {
            replies.clear();
            replies.push_read(&request, form, true, |_| Err("touched")).unwrap();
            assert_eq!(chunks(replies.bytes(), form, &request), [(CHUNK_DONE, TYPE_NONE, Vec::new())]);
        }
    }

    #[test]
    fn with_extended_headers_success_is_a_chunk_too() {
        let mut replies = ReplyBuffer::default();
        let request = read_request(0x0102_0304_0506_0708, 99);
        replies.push_success(&request, ReplyForm::Extended);
        assert_eq!(chunks(replies.bytes(), ReplyForm::Extended, &request), [(CHUNK_DONE, TYPE_NONE, Vec::new())]);
    }

    #[test]
    fn errors_are_chunks_with_a_message_or_simple_numbers() {
        let request = read_request(0, 512);
        let refusal = Refusal::new(NbdErrno::Invalid, "é".repeat(2000));
        let mut replies = ReplyBuffer::default();
        replies.push_error(&request, ReplyForm::Structured, &refusal);
        let chunk = &chunks(replies.bytes(), ReplyForm::Structured, &request)[0];
        assert_eq!((chunk.0, chunk.1), (CHUNK_DONE, TYPE_ERROR));
        assert_eq!(chunk.2[..4], 22u32.to_be_bytes());
        let length = u16::from_be_bytes(chunk.2[4..6].try_into().unwrap()) as usize;
        assert_eq!(length, ERROR_MESSAGE_BYTES_MAX);
        assert!(std::str::from_utf8(&chunk.2[6..6 + length]).is_ok());
        replies.clear();
        replies.push_error(&request, ReplyForm::Simple, &refusal);
        assert_eq!(replies.bytes(), simple_header(22, request.cookie));
    }

    #[test]
    fn status_is_one_chunk_for_each_context() {
        let extents = [StatusExtent { length_bytes: 4096, flags: 0 }, StatusExtent { length_bytes: 1 << 20, flags: 3 }];
        let request = read_request(0, 1 << 20);
        let mut replies = ReplyBuffer::default();
        replies.push_block_status(&request, ReplyForm::Structured, false, 42, &extents);
        replies.push_block_status(&request, ReplyForm::Structured, true, 43, &extents[..1]);
        let found = chunks(replies.bytes(), ReplyForm::Structured, &request);
        assert_eq!(
            found.iter().map(|chunk| (chunk.0, chunk.1)).collect::<Vec<_>>(),
            [(0, TYPE_BLOCK_STATUS), (CHUNK_DONE, TYPE_BLOCK_STATUS)]
        );
        let words: Vec<u32> = found[0].2.chunks(4).map(|word| u32::from_be_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, [42, 4096, 0, 1 << 20, 3]);
    }

    #[test]
    fn an_extended_status_has_a_count_and_64_bits_for_everything() {
        let extents = [StatusExtent { length_bytes: 1 << 40, flags: 3 }, StatusExtent { length_bytes: 4096, flags: 0 }];
        let request = read_request(512, 1 << 41);
        let mut replies = ReplyBuffer::default();
        replies.push_block_status(&request, ReplyForm::Extended, true, 7, &extents);
        let chunk = &chunks(replies.bytes(), ReplyForm::Extended, &request)[0];
        assert_eq!((chunk.0, chunk.1), (CHUNK_DONE, TYPE_BLOCK_STATUS_EXT));
        assert_eq!(chunk.2[..8], [0, 0, 0, 7, 0, 0, 0, 2]);
        let words: Vec<u64> = chunk.2[8..].chunks(8).map(|word| u64::from_be_bytes(word.try_into().unwrap())).collect();
        assert_eq!(words, [1 << 40, 3, 4096, 0]);
    }
}
