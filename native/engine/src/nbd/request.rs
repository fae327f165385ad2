//! Requests as they stand on the wire, and the checks that come before any of them is executed.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic 0x25609513, extended 0x21e41c71 |
//! | 4 | 2 | command flags |
//! | 6 | 2 | command |
//! | 8 | 8 | cookie, opaque |
//! | 16 | 8 | offset, bytes |
//! | 24 | 4, extended 8 | length, bytes: the payload's for WRITE, and in extended form where PAYLOAD_LEN is set |
use super::MetaContext;

/// Bytes of a request without its payload.
pub(super) const COMPACT_HEADER_BYTES: usize = 28;
/// The same once extended headers were negotiated.
pub(super) const EXTENDED_HEADER_BYTES: usize = 32;

const COMPACT_MAGIC: u32 = 0x2560_9513;
const EXTENDED_MAGIC: u32 = 0x21e4_1c71;

/// Reply is sent when the effect is durable.
pub(super) const FLAG_FUA: u16 = 1 << 0;
/// WRITE_ZEROES: keep the range allocated.
pub(super) const FLAG_NO_HOLE: u16 = 1 << 1;
/// READ: answer in one chunk.
pub(super) const FLAG_DF: u16 = 1 << 2;
/// BLOCK_STATUS: one extent is enough.
pub(super) const FLAG_REQ_ONE: u16 = 1 << 3;
/// WRITE_ZEROES: only if it is faster than writing zeros.
pub(super) const FLAG_FAST_ZERO: u16 = 1 << 4;
/// Extended headers: the length is that of a payload which follows.
pub(super) const FLAG_PAYLOAD_LEN: u16 = 1 << 5;

/// `Request::contexts` of a request that asks about every context.
pub(super) const ALL_CONTEXTS: u32 = u32::MAX;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    Cache,
    WriteZeroes,
    BlockStatus,
    /// RESIZE, or a number that means nothing.
    Unknown,
}

/// A request without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) command: Command,
    pub(super) cookie: u64,
    pub(super) offset_bytes: u64,
    /// What the command is about: data of a READ or WRITE, the range of the others.
    pub(super) length_bytes: u64,
    /// What follows the header.
    pub(super) payload_bytes: u64,
    /// BLOCK_STATUS: which contexts are asked about, a bit for each in the order of the negotiation.
    pub(super) contexts: u32,
}

/// Errors of the protocol; never a local errno.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(super) enum NbdErrno {
    NotPermitted = 1,
    Io = 5,
    Invalid = 22,
    NoSpace = 28,
    Overflow = 75,
    /// Only for a FAST_ZERO that would not be fast.
    NotSupported = 95,
    Shutdown = 108,
}

/// A request that is answered with an error and not executed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Refusal {
    pub(super) errno: NbdErrno,
    pub(super) message: String,
}

impl Refusal {
    pub(super) fn new(errno: NbdErrno, message: impl Into<String>) -> Refusal {
        Refusal { errno, message: message.into() }
    }
}

/// What a connection may ask, for the checks.
#[derive(Debug, Clone, Copy)]
pub(super) struct Permissions {
    pub(super) size_bytes: u64,
    pub(super) read_only: bool,
    /// Replies come in chunks: DF has a meaning.
    pub(super) chunked_replies: bool,
    pub(super) extended_headers: bool,
    pub(super) has_contexts: bool,
    pub(super) request_bytes_max: u32,
}

impl Request {
    /// Reads a header, of the one length or the other. `None`: not a request, the two sides are out of step.
    #[inline]
    pub(super) fn parse(header: &[u8]) -> Option<Request> {
        if let Ok(header) = <&[u8; COMPACT_HEADER_BYTES]>::try_from(header) {
            let (fixed, length) = header.split_first_chunk::<24>()?;
            let length_bytes = u64::from(u32::from_be_bytes(length.try_into().ok()?));
            let request = Request::parse_fixed(fixed, COMPACT_MAGIC, length_bytes)?;
            let payload_bytes = if request.command == Command::Write { length_bytes } else { 0 };
            return Some(Request { payload_bytes, ..request });
        }
        let (fixed, length) = header.split_first_chunk::<24>()?;
        let length_bytes = u64::from_be_bytes(length.try_into().ok()?);
        let request = Request::parse_fixed(fixed, EXTENDED_MAGIC, length_bytes)?;
        // A WRITE must have the flag, and QEMU's client (10.0) sends its payload without it; QEMU's server takes that, too.
        let has_payload = request.has(FLAG_PAYLOAD_LEN) || request.command == Command::Write;
        let payload_bytes = if has_payload { length_bytes } else { 0 };
        Some(Request { payload_bytes, ..request })
    }

    #[inline]
    fn parse_fixed(header: &[u8; 24], magic: u32, length_bytes: u64) -> Option<Request> {
        let u16_at = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let u32_at = |at: usize| (u32::from(u16_at(at)) << 16) | u32::from(u16_at(at + 2));
        let u64_at = |at: usize| (u64::from(u32_at(at)) << 32) | u64::from(u32_at(at + 4));
        if u32_at(0) != magic {
            return None;
        }
        let command = match u16_at(6) {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            5 => Command::Cache,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            _ => Command::Unknown,
        };
        Some(Request {
            flags: u16_at(4),
            command,
            cookie: u64_at(8),
            offset_bytes: u64_at(16),
            length_bytes,
            payload_bytes: 0,
            contexts: ALL_CONTEXTS,
        })
    }

    /// The request that a BLOCK_STATUS with a payload means: the range's length (u64) and the ids (u32 each) that it is about.
    pub(super) fn with_status_filter(&self, payload: &[u8], contexts: &[MetaContext]) -> Result<Request, Refusal> {
        let invalid = |message: String| Refusal::new(NbdErrno::Invalid, message);
        let Some((length, ids)) = payload.split_first_chunk::<8>().filter(|(_, ids)| !ids.is_empty() && ids.len() % 4 == 0) else {
            return Err(invalid(format!("{} bytes are no length and list of contexts", payload.len())));
        };
        let mut chosen = 0u32;
        for id in ids.chunks_exact(4) {
            let id = u32::from_be_bytes([id[0], id[1], id[2], id[3]]);
            let Some(index) = contexts.iter().position(|context| context.id == id) else {
                return Err(invalid(format!("context {id} was not negotiated")));
            };
            if chosen & (1 << index) != 0 {
                return Err(invalid(format!("context {id} is there twice")));
            }
            chosen |= 1 << index;
        }
        Ok(Request { length_bytes: u64::from_be_bytes(*length), contexts: chosen, ..*self })
    }

    pub(super) fn has(&self, flag: u16) -> bool {
        self.flags & flag != 0
    }

    /// Changes data: refused on a read-only export.
    fn is_change(&self) -> bool {
        matches!(self.command, Command::Write | Command::Trim | Command::WriteZeroes)
    }

    /// Checks command, flags, rights and range, in this order.
    pub(super) fn check(&self, permissions: &Permissions) -> Result<(), Refusal> {
        // FUA is accepted on every command, also where it means nothing.
        let known = FLAG_FUA
            | match self.command {
                Command::Read if permissions.chunked_replies => FLAG_DF,
                Command::Write if permissions.extended_headers => FLAG_PAYLOAD_LEN,
                // A read-only export does not advertise FAST_ZERO.
                Command::WriteZeroes if permissions.read_only => FLAG_NO_HOLE,
                Command::WriteZeroes => FLAG_NO_HOLE | FLAG_FAST_ZERO,
                Command::BlockStatus if permissions.extended_headers && permissions.has_contexts => FLAG_REQ_ONE | FLAG_PAYLOAD_LEN,
                Command::BlockStatus => FLAG_REQ_ONE,
                _ => 0,
            };
        if self.command == Command::Unknown {
            return Err(Refusal::new(NbdErrno::Invalid, "this command was not advertised"));
        }
        if self.flags & !known != 0 {
            let flags = self.flags & !known;
            return Err(Refusal::new(NbdErrno::Invalid, format!("flags {flags:#x} do not belong to this command")));
        }
        if self.is_change() && permissions.read_only {
            return Err(Refusal::new(NbdErrno::NotPermitted, "the export is read-only"));
        }
        if matches!(self.command, Command::Flush | Command::Disconnect) {
            return Ok(());
        }
        if self.command == Command::BlockStatus {
            if !permissions.has_contexts {
                return Err(Refusal::new(NbdErrno::Invalid, "no metadata context was negotiated"));
            }
            if self.length_bytes == 0 {
                return Err(Refusal::new(NbdErrno::Invalid, "a status of nothing was asked for"));
            }
        }
        let is_inside = self.offset_bytes.checked_add(self.length_bytes).is_some_and(|end| end <= permissions.size_bytes);
        if !is_inside {
            let errno = match self.command {
                Command::Write | Command::WriteZeroes => NbdErrno::NoSpace,
                _ => NbdErrno::Invalid,
            };
            let Request { offset_bytes, length_bytes, .. } = self;
            let size_bytes = permissions.size_bytes;
            let message = format!("{length_bytes} bytes at {offset_bytes} reach beyond the end at {size_bytes}");
            return Err(Refusal::new(errno, message));
        }
        if self.command == Command::Read && self.length_bytes > u64::from(permissions.request_bytes_max) {
            let message = format!("a read may have {} bytes, not {}", permissions.request_bytes_max, self.length_bytes);
            return Err(Refusal::new(NbdErrno::Overflow, message));
        }
        Ok(())
    }
}

/// The protocol's number for an errno of ours. What a client cannot act on is EIO.
pub(super) fn nbd_errno(errno: i32) -> NbdErrno {
    match errno {
        libc::EPERM | libc::EACCES | libc::EROFS => NbdErrno::NotPermitted,
        libc::EINVAL => NbdErrno::Invalid,
        libc::ENOSPC | libc::EDQUOT | libc::EFBIG => NbdErrno::NoSpace,
        libc::ESHUTDOWN => NbdErrno::Shutdown,
        _ => NbdErrno::Io,
    }
}

#[cfg(test)]
mod tests {
    use super::super::MetaContextKind;
    use super::*;

    const MIB: u64 = 1 << 20;

    fn permissions() -> Permissions {
        Permissions {
            size_bytes: 64 * MIB,
            read_only: false,
            chunked_replies: true,
            extended_headers: false,
            has_contexts: true,
            request_bytes_max: 32 << 20,
        }
    }

    fn request(command: Command, flags: u16, offset_bytes: u64, length_bytes: u64) -> Request {
        let payload_bytes = if command == Command::Write { length_bytes } else { 0 };
        Request { flags, command, cookie: 7, offset_bytes, length_bytes, payload_bytes, contexts: ALL_CONTEXTS }
    }

    fn errno(request: Request, permissions: &Permissions) -> Option<NbdErrno> {
        request.check(permissions).err().map(|refusal| refusal.errno)
    }

    #[test]
    fn a_header_is_read_field_by_field_and_a_wrong_magic_is_not_a_request() {
        let mut header = [0u8; COMPACT_HEADER_BYTES];
        header[0..4].copy_from_slice(&COMPACT_MAGIC.to_be_bytes());
        header[4..6].copy_from_slice(&3u16.to_be_bytes());
        header[6..8].copy_from_slice(&6u16.to_be_bytes());
        header[8..16].copy_from_slice(&0xfeed_face_cafe_beefu64.to_be_bytes());
        header[16..24].copy_from_slice(&0x0102_0304_0506_0708u64.to_be_bytes());
        header[24..28].copy_from_slice(&0xffff_fffeu32.to_be_bytes());
        let parsed = Request::parse(&header).unwrap();
        assert_eq!(parsed.flags, FLAG_FUA | FLAG_NO_HOLE);
        assert_eq!(parsed.command, Command::WriteZeroes);
        assert_eq!(parsed.cookie, 0xfeed_face_cafe_beef);
        assert_eq!(parsed.offset_bytes, 0x0102_0304_0506_0708);
        assert_eq!(parsed.length_bytes, 0xffff_fffe);
        assert_eq!(parsed.payload_bytes, 0);
        header[7] = 1;
        assert_eq!(Request::parse(&header).unwrap().payload_bytes, 0xffff_fffe);
        header[3] ^= 1;
        assert_eq!(Request::parse(&header), None);
    }

    #[test]
    fn an_extended_header_has_64_bits_of_length_and_a_flag_that_says_what_they_are() {
        let mut header = [0u8; EXTENDED_HEADER_BYTES];
        header[0..4].copy_from_slice(&EXTENDED_MAGIC.to_be_bytes());
        header[6..8].copy_from_slice(&4u16.to_be_bytes());
        header[24..32].copy_from_slice(&0x1_0000_0002u64.to_be_bytes());
        let trim = Request::parse(&header).unwrap();
        assert_eq!((trim.command, trim.length_bytes, trim.payload_bytes), (Command::Trim, 0x1_0000_0002, 0));
        header[5] = FLAG_PAYLOAD_LEN as u8;
        assert_eq!(Request::parse(&header).unwrap().payload_bytes, 0x1_0000_0002);
        (header[5], header[7]) = (0, 1);
        assert_eq!(Request::parse(&header).unwrap().payload_bytes, 0x1_0000_0002, "a write has its payload in any case");
        assert_eq!(Request::parse(&header[..COMPACT_HEADER_BYTES]), None, "the magic of one form is not the other's");
    }

    #[test]
    fn payloads_are_for_writes_and_for_the_status_of_chosen_contexts() {
        use Command::{BlockStatus, Cache, Flush, Read, Trim, Write, WriteZeroes};
        let permissions = Permissions { extended_headers: true, ..permissions() };
        for command in [Read, Flush, Trim, Cache, WriteZeroes] {
            assert_eq!(errno(request(command, FLAG_PAYLOAD_LEN, 0, 512), &permissions), Some(NbdErrno::Invalid));
        }
        assert_eq!(errno(request(Write, 0, 0, 512), &permissions), None);
        assert_eq!(errno(request(Write, FLAG_PAYLOAD_LEN, 0, 512), &permissions), None);
        assert_eq!(errno(request(BlockStatus, FLAG_PAYLOAD_LEN, 0, 512), &permissions), None);
        let without = Permissions { has_contexts: false, ..permissions };
        assert_eq!(errno(request(BlockStatus, FLAG_PAYLOAD_LEN, 0, 512), &without), Some(NbdErrno::Invalid));
    }

    #[test]
    fn a_status_filter_names_known_contexts_once_each() {
        let context = |id| MetaContext { id, kind: MetaContextKind::Allocation };
        let contexts = [context(1), context(7)];
        let status = request(Command::BlockStatus, FLAG_PAYLOAD_LEN, 0, 16);
        let filtered =
            |payload: &[u8]| status.with_status_filter(payload, &contexts).map(|request| (request.length_bytes, request.contexts));
        let payload = |ids: &[u32]| {
            let mut bytes = (1u64 << 40).to_be_bytes().to_vec();
            ids.iter().for_each(|id| bytes.extend(id.to_be_bytes()));
            bytes
        };
        assert_eq!(filtered(&payload(&[7])), Ok((1 << 40, 0b10)));
        assert_eq!(filtered(&payload(&[7, 1])), Ok((1 << 40, 0b11)));
        for bad in [payload(&[]), payload(&[7, 7]), payload(&[2]), payload(&[1])[..11].to_vec(), vec![], vec![0; 7]] {
            assert_eq!(filtered(&bad).unwrap_err().errno, NbdErrno::Invalid);
        }
    }

    #[test]
    fn ranges_are_checked_to_the_byte_and_without_overflow() {
        use Command::{BlockStatus, Cache, Read, Trim, Write, WriteZeroes};
        let permissions = permissions();
        for command in [Read, Write, Trim, Cache, WriteZeroes, BlockStatus] {
            assert_eq!(errno(request(command, 0, 64 * MIB - 512, 512), &permissions), None);
        }
        for (offset_bytes, length_bytes) in
            [(64 * MIB - 511, 512), (u64::MAX - 511, 512), (u64::MAX, 1), (1 << 63, 1 << 63), (512, u64::MAX)]
        {
            for command in [Read, Trim, Cache, BlockStatus] {
                assert_eq!(errno(request(command, 0, offset_bytes, length_bytes), &permissions), Some(NbdErrno::Invalid));
            }
            for command in [Write, WriteZeroes] {
                assert_eq!(errno(request(command, 0, offset_bytes, length_bytes), &permissions), Some(NbdErrno::NoSpace));
            }
        }
        for command in [Read, Write, Trim, WriteZeroes] {
            assert_eq!(errno(request(command, 0, 64 * MIB, 0), &permissions), None, "nothing at the very end is fine");
        }
    }

    #[test]
    fn fua_is_accepted_everywhere_and_other_flags_only_where_they_belong() {
        use Command::{BlockStatus, Cache, Flush, Read, Trim, Write, WriteZeroes};
        let permissions = permissions();
        let own = [
            (Read, FLAG_DF),
            (Write, 0),
            (Flush, 0),
            (Trim, 0),
            (Cache, 0),
            (WriteZeroes, FLAG_NO_HOLE | FLAG_FAST_ZERO),
            (BlockStatus, FLAG_REQ_ONE),
        ];
        for (command, own_flags) in own {
            for bit in 0..16 {
                let flag = 1 << bit;
                let expected = (flag & (own_flags | FLAG_FUA) == 0).then_some(NbdErrno::Invalid);
                assert_eq!(errno(request(command, flag, 0, 4096), &permissions), expected, "{command:?} {flag:#x}");
            }
        }
        let simple = Permissions { chunked_replies: false, ..permissions };
        assert_eq!(errno(request(Read, FLAG_DF, 0, 4096), &simple), Some(NbdErrno::Invalid));
    }

    #[test]
    fn a_read_only_export_refuses_every_change_and_nothing_else() {
        use Command::{BlockStatus, Flush, Read, Trim, Write, WriteZeroes};
        let permissions = Permissions { read_only: true, ..permissions() };
        for command in [Write, Trim, WriteZeroes] {
            assert_eq!(errno(request(command, FLAG_FUA, 0, 4096), &permissions), Some(NbdErrno::NotPermitted));
        }
        for command in [Read, Flush, BlockStatus] {
            assert_eq!(errno(request(command, FLAG_FUA, 0, 4096), &permissions), None);
        }
        let fast = request(WriteZeroes, FLAG_FAST_ZERO, 0, 4096);
        assert_eq!(errno(fast, &permissions), Some(NbdErrno::Invalid), "the flag is not advertised there");
    }

    #[test]
    fn status_needs_a_context_and_a_length_and_unknown_commands_are_invalid() {
        let permissions = permissions();
        assert_eq!(errno(request(Command::BlockStatus, 0, 0, 0), &permissions), Some(NbdErrno::Invalid));
        let without = Permissions { has_contexts: false, ..permissions };
        assert_eq!(errno(request(Command::BlockStatus, 0, 0, 4096), &without), Some(NbdErrno::Invalid));
        assert_eq!(errno(request(Command::Unknown, 0, 0, 0), &permissions), Some(NbdErrno::Invalid));
        let large = Permissions { size_bytes: 1 << 40, ..permissions };
        assert_eq!(errno(request(Command::Read, 0, 0, (32 << 20) + 1), &large), Some(NbdErrno::Overflow));
        assert_eq!(errno(request(Command::WriteZeroes, 0, 0, 1 << 40), &large), None);
    }

    #[test]
    fn clients_see_only_errors_of_the_protocol() {
        assert_eq!(nbd_errno(libc::EDQUOT), NbdErrno::NoSpace);
        assert_eq!(nbd_errno(libc::EFBIG), NbdErrno::NoSpace);
        assert_eq!(nbd_errno(libc::EROFS), NbdErrno::NotPermitted);
        assert_eq!(nbd_errno(libc::ESHUTDOWN), NbdErrno::Shutdown);
        for other in [libc::ENOMEM, libc::EBUSY, libc::EPIPE, libc::ENOTSUP, libc::EOVERFLOW, 0, -1, 9999] {
            assert_eq!(nbd_errno(other), NbdErrno::Io);
        }
    }
}
