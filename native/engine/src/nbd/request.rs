//! Requests as they stand on the wire, and the checks that come before any of them is executed.
//!
//! | offset | size | field |
//! |---|---|---|
//! | 0 | 4 | magic 0x25609513 |
//! | 4 | 2 | command flags |
//! | 6 | 2 | command |
//! | 8 | 8 | cookie, opaque |
//! | 16 | 8 | offset, bytes |
//! | 24 | 4 | length, bytes (the payload's too, for WRITE) |

/// Bytes of a request without its payload.
pub(super) const REQUEST_HEADER_BYTES: usize = 28;

const REQUEST_MAGIC: u32 = 0x2560_9513;

/// Reply is sent when the effect is durable.
pub(super) const FLAG_FUA: u16 = 1 << 0;
/// WRITE_ZEROES: keep the range allocated.
pub(super) const FLAG_NO_HOLE: u16 = 1 << 1;
/// READ: answer in one chunk.
pub(super) const FLAG_DF: u16 = 1 << 2;
/// BLOCK_STATUS: one extent is enough.
pub(super) const FLAG_REQ_ONE: u16 = 1 << 3;

/// What a request asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Command {
    Read,
    Write,
    Disconnect,
    Flush,
    Trim,
    WriteZeroes,
    BlockStatus,
    /// CACHE (not advertised), RESIZE, or a number that means nothing.
    Unknown,
}

/// A request without its payload.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Request {
    pub(super) flags: u16,
    pub(super) command: Command,
    pub(super) cookie: u64,
    pub(super) offset_bytes: u64,
    pub(super) length_bytes: u32,
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
    pub(super) structured_replies: bool,
    pub(super) has_allocation_context: bool,
    pub(super) request_bytes_max: u32,
}

impl Request {
    /// Reads a header. `None`: not a request, the two sides are out of step.
    pub(super) fn parse(header: &[u8; REQUEST_HEADER_BYTES]) -> Option<Request> {
        let u16_at = |at: usize| u16::from_be_bytes([header[at], header[at + 1]]);
        let u32_at = |at: usize| (u32::from(u16_at(at)) << 16) | u32::from(u16_at(at + 2));
        let u64_at = |at: usize| (u64::from(u32_at(at)) << 32) | u64::from(u32_at(at + 4));
        if u32_at(0) != REQUEST_MAGIC {
            return None;
        }
        let command = match u16_at(6) {
            0 => Command::Read,
            1 => Command::Write,
            2 => Command::Disconnect,
            3 => Command::Flush,
            4 => Command::Trim,
            6 => Command::WriteZeroes,
            7 => Command::BlockStatus,
            _ => Command::Unknown,
        };
        Some(Request { flags: u16_at(4), command, cookie: u64_at(8), offset_bytes: u64_at(16), length_bytes: u32_at(24) })
    }

    /// Bytes that follow the header.
    pub(super) fn payload_bytes(&self) -> usize {
        if self.command == Command::Write { self.length_bytes as usize } else { 0 }
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
                Command::Read if permissions.structured_replies => FLAG_DF,
                Command::WriteZeroes => FLAG_NO_HOLE,
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
            if !permissions.has_allocation_context {
                return Err(Refusal::new(NbdErrno::Invalid, "no metadata context was negotiated"));
            }
            if self.length_bytes == 0 {
                return Err(Refusal::new(NbdErrno::Invalid, "a status of nothing was asked for"));
            }
        }
        let is_inside = self.offset_bytes.checked_add(u64::from(self.length_bytes)).is_some_and(|end| end <= permissions.size_bytes);
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
        if self.command == Command::Read && self.length_bytes > permissions.request_bytes_max {
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
    use super::*;

    const MIB: u64 = 1 << 20;

    fn permissions() -> Permissions {
        Permissions {
            size_bytes: 64 * MIB,
            read_only: false,
            structured_replies: true,
            has_allocation_context: true,
            request_bytes_max: 32 << 20,
        }
    }

    fn request(command: Command, flags: u16, offset_bytes: u64, length_bytes: u32) -> Request {
        Request { flags, command, cookie: 7, offset_bytes, length_bytes }
    }

    fn errno(request: Request, permissions: &Permissions) -> Option<NbdErrno> {
        request.check(permissions).err().map(|refusal| refusal.errno)
    }

    #[test]
    fn a_header_is_read_field_by_field_and_a_wrong_magic_is_not_a_request() {
        let mut header = [0u8; REQUEST_HEADER_BYTES];
        header[0..4].copy_from_slice(&REQUEST_MAGIC.to_be_bytes());
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
        assert_eq!(parsed.payload_bytes(), 0);
        header[3] ^= 1;
        assert_eq!(Request::parse(&header), None);
    }

    #[test]
    fn ranges_are_checked_to_the_byte_and_without_overflow() {
        use Command::{BlockStatus, Read, Trim, Write, WriteZeroes};
        let permissions = permissions();
        for command in [Read, Write, Trim, WriteZeroes, BlockStatus] {
            assert_eq!(errno(request(command, 0, 64 * MIB - 512, 512), &permissions), None);
        }
        for (offset_bytes, length_bytes) in [(64 * MIB - 511, 512), (u64::MAX - 511, 512), (u64::MAX, 1), (1 << 63, u32::MAX)] {
            for command in [Read, Trim, BlockStatus] {
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
        use Command::{BlockStatus, Flush, Read, Trim, Write, WriteZeroes};
        let permissions = permissions();
        let own = [(Read, FLAG_DF), (Write, 0), (Flush, 0), (Trim, 0), (WriteZeroes, FLAG_NO_HOLE), (BlockStatus, FLAG_REQ_ONE)];
        for (command, own_flags) in own {
            for bit in 0..16 {
                let flag = 1 << bit;
                let expected = (flag & (own_flags | FLAG_FUA) == 0).then_some(NbdErrno::Invalid);
                assert_eq!(errno(request(command, flag, 0, 4096), &permissions), expected, "{command:?} {flag:#x}");
            }
        }
        let simple = Permissions { structured_replies: false, ..permissions };
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
    }

    #[test]
    fn status_needs_a_context_and_a_length_and_unknown_commands_are_invalid() {
        let permissions = permissions();
        assert_eq!(errno(request(Command::BlockStatus, 0, 0, 0), &permissions), Some(NbdErrno::Invalid));
        let without = Permissions { has_allocation_context: false, ..permissions };
        assert_eq!(errno(request(Command::BlockStatus, 0, 0, 4096), &without), Some(NbdErrno::Invalid));
        assert_eq!(errno(request(Command::Unknown, 0, 0, 0), &permissions), Some(NbdErrno::Invalid));
        let large = Permissions { size_bytes: 1 << 40, ..permissions };
        assert_eq!(errno(request(Command::Read, 0, 0, (32 << 20) + 1), &large), Some(NbdErrno::Overflow));
        assert_eq!(errno(request(Command::WriteZeroes, 0, 0, u32::MAX), &large), None);
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
