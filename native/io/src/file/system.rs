//! The system calls of the file kind that the standard library does not have, as safe functions over [`File`].
use std::ffi::CString;
use std::fs::{File, OpenOptions};
use std::io::{Error, ErrorKind, IoSlice, IoSliceMut, Result};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

/// Opens a file for reading; a symbolic link is none of ours. Reads leave no time of access where that may be asked for: it would
/// be a change of metadata at the first read of each of the thousands of layers of a long history.
pub(super) fn open_for_reading(path: &Path) -> Result<File> {
    let open = |flags| OpenOptions::new().read(true).custom_flags(libc::O_NOFOLLOW | flags).open(path);
    match open(libc::O_NOATIME) {
        // The file is somebody else's.
        Err(error) if error.raw_os_error() == Some(libc::EPERM) => open(0),
        answer => answer,
    }
}

/// How many descriptors this process may have open.
pub(super) fn descriptor_limit() -> u64 {
    let mut limit = libc::rlimit { rlim_cur: 0, rlim_max: 0 };
    // SAFETY: the pointer is to a local of the type that the call fills.
    match unsafe { libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit) } {
        0 => limit.rlim_cur,
        _ => 0,
    }
}

/// Buffers handed to the kernel in one call; below every system's IOV_MAX, and small enough to lie on the stack.
const VECTORS_MAX: usize = 64;

/// Where a transfer stands: `skip` bytes into buffer `index`.
struct Position {
    index: usize,
    skip: usize,
}

/// Calls `transfer(vectors, count, offset)` until all bytes have moved or it returns 0; `buffer(i)` is the i-th of `count` buffers.
/// Returns where it stopped. Interrupted calls are repeated, partial ones continued.
fn transfer_all(
    count: usize,
    offset_bytes: u64,
    mut buffer: impl FnMut(usize) -> (*mut u8, usize),
    transfer: impl Fn(*const libc::iovec, libc::c_int, libc::off_t) -> libc::ssize_t,
) -> Result<Position> {
    let mut position = Position { index: 0, skip: 0 };
    let mut offset = libc::off_t::try_from(offset_bytes).map_err(|_| Error::from_raw_os_error(libc::EFBIG))?;
    loop {
        let mut vectors = [libc::iovec { iov_base: std::ptr::null_mut(), iov_len: 0 }; VECTORS_MAX];
        let mut vector_count = 0;
        let mut skip = position.skip;
        for index in position.index..count {
            if vector_count == VECTORS_MAX {
                break;
            }
            let (start, length) = buffer(index);
            if length > skip {
                vectors[vector_count] = libc::iovec { iov_base: start.wrapping_add(skip).cast(), iov_len: length - skip };
                vector_count += 1;
            }
            skip = 0;
        }
        if vector_count == 0 {
            return Ok(Position { index: count, skip: 0 });
        }
        let moved = transfer(vectors.as_ptr(), vector_count as libc::c_int, offset);
        if moved < 0 {
            let error = Error::last_os_error();
            if error.kind() == ErrorKind::Interrupted {
                continue;
            }
            return Err(error);
        }
        if moved == 0 {
            return Ok(position);
        }
        offset += moved as libc::off_t;
        let mut rest = moved as usize;
        while rest > 0 {
            let (_, length) = buffer(position.index);
            let step = rest.min(length - position.skip);
            rest -= step;
            position.skip += step;
            if position.skip == length {
                position = Position { index: position.index + 1, skip: 0 };
            }
        }
    }
}

/// Fills all buffers from `offset_bytes` on; what lies past the end of the file is zeros.
pub(super) fn read_all_at(file: &File, offset_bytes: u64, buffers: &mut [IoSliceMut<'_>]) -> Result<()> {
    let descriptor = file.as_raw_fd();
    let count = buffers.len();
    let end = transfer_all(
        count,
        offset_bytes,
        |index| (buffers[index].as_mut_ptr(), buffers[index].len()),
        // SAFETY: the vectors point into `buffers`, which is borrowed mutably until the call returns; each covers at most
        // the rest of its buffer.
        |vectors, vector_count, offset| unsafe { libc::preadv(descriptor, vectors, vector_count, offset) },
    )?;
    for (index, buffer) in buffers.iter_mut().enumerate().skip(end.index) {
        let from = if index == end.index { end.skip } else { 0 };
        buffer[from..].fill(0);
    }
    Ok(())
}

/// Fills the buffer from the page cache in one call: false if a part of it is not there, or the file ends inside. What lies past
/// the end is zeros. An error for which `is_unsupported` holds: this file system cannot tell.
pub(super) fn read_cached_at(file: &File, offset_bytes: u64, buffer: &mut [u8]) -> Result<bool> {
    let offset = libc::off_t::try_from(offset_bytes).map_err(|_| Error::from_raw_os_error(libc::EFBIG))?;
    let vector = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: one vector that covers exactly `buffer`, which is borrowed mutably until the call returns.
    let count = unsafe { libc::preadv2(file.as_raw_fd(), &raw const vector, 1, offset, libc::RWF_NOWAIT) };
    if count == 0 {
        buffer.fill(0);
        return Ok(true);
    }
    if count > 0 {
        return Ok(count as usize == buffer.len());
    }
    let error = Error::last_os_error();
    match error.kind() {
        ErrorKind::WouldBlock | ErrorKind::Interrupted => Ok(false),
        _ => Err(error),
    }
}

/// Writes all buffers from `offset_bytes` on.
pub(super) fn write_all_at(file: &File, offset_bytes: u64, buffers: &[IoSlice<'_>]) -> Result<()> {
    if let [buffer] = buffers {
        // The common case, without a list of buffers for the kernel to copy and check.
        libc::off_t::try_from(offset_bytes).map_err(|_| Error::from_raw_os_error(libc::EFBIG))?;
        let written = FileExt::write_all_at(file, buffer, offset_bytes);
        return written.map_err(|error| if error.raw_os_error().is_some() { error } else { Error::from_raw_os_error(libc::EIO) });
    }
    let descriptor = file.as_raw_fd();
    let end = transfer_all(
        buffers.len(),
        offset_bytes,
        |index| (buffers[index].as_ptr().cast_mut(), buffers[index].len()),
        // SAFETY: the vectors point into `buffers`, which lives until the call returns; pwritev only reads from them.
        |vectors, vector_count, offset| unsafe { libc::pwritev(descriptor, vectors, vector_count, offset) },
    )?;
    if end.index < buffers.len() {
        return Err(Error::from_raw_os_error(libc::EIO));
    }
    Ok(())
}

/// fallocate(2); interrupted calls are repeated.
pub(super) fn allocate(file: &File, mode: libc::c_int, offset_bytes: u64, length_bytes: u64) -> Result<()> {
    let too_large = |_| Error::from_raw_os_error(libc::EFBIG);
    let offset = libc::off_t::try_from(offset_bytes).map_err(too_large)?;
    let length = libc::off_t::try_from(length_bytes).map_err(too_large)?;
    loop {
        // SAFETY: no memory is passed; the descriptor is open for as long as `file` is borrowed.
        if unsafe { libc::fallocate(file.as_raw_fd(), mode, offset, length) } == 0 {
            return Ok(());
        }
        let error = Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Makes a range of `target` share its blocks with the same range of `source`, whole blocks of the file system of both.
pub(super) fn clone_range(target: &File, source: &File, offset_bytes: u64, length_bytes: u64) -> Result<()> {
    let range = libc::file_clone_range {
        src_fd: i64::from(source.as_raw_fd()),
        src_offset: offset_bytes,
        src_length: length_bytes,
        dest_offset: offset_bytes,
    };
    loop {
        // SAFETY: `range` lives until the call returns and has the type that FICLONERANGE reads; both descriptors are open as long.
        if unsafe { libc::ioctl(target.as_raw_fd(), libc::FICLONERANGE, &raw const range) } == 0 {
            return Ok(());
        }
        let error = Error::last_os_error();
        if error.kind() != ErrorKind::Interrupted {
            return Err(error);
        }
    }
}

/// Whether an error of `clone_range` says that these two files share nothing, or not these blocks, and that nothing was changed.
pub(super) fn cannot_clone(error: &Error) -> bool {
    is_unsupported(error) || matches!(error.raw_os_error(), Some(libc::EXDEV | libc::EINVAL | libc::ENOTTY | libc::EPERM | libc::ETXTBSY))
}

/// Whether an error says that the file system has no such operation (and not that it failed).
pub(super) fn is_unsupported(error: &Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV))
}

/// What lseek looks for.
#[derive(Clone, Copy)]
pub(super) enum Seek {
    /// The next allocated byte.
    Data,
    /// The next byte of a hole; the end of the file counts as one.
    Hole,
}

/// The next data or hole at or after `offset_bytes`; `None` past the end, or if only a hole follows.
pub(super) fn seek(file: &File, offset_bytes: u64, what: Seek) -> Result<Option<u64>> {
    let whence = match what {
        Seek::Data => libc::SEEK_DATA,
        Seek::Hole => libc::SEEK_HOLE,
    };
    let Ok(offset) = libc::off_t::try_from(offset_bytes) else { return Ok(None) };
    // SAFETY: no memory is passed. The file position changes, and nothing here uses it.
    let found = unsafe { libc::lseek(file.as_raw_fd(), offset, whence) };
    if found >= 0 {
        return Ok(Some(found as u64));
    }
    let error = Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(error) }
}

/// Asks the kernel to forget the clean cached pages of the file.
pub(super) fn drop_cache(file: &File) -> Result<()> {
    // SAFETY: no memory is passed.
    let errno = unsafe { libc::posix_fadvise(file.as_raw_fd(), 0, 0, libc::POSIX_FADV_DONTNEED) };
    // posix_fadvise returns the errno instead of setting it.
    if errno == 0 { Ok(()) } else { Err(Error::from_raw_os_error(errno)) }
}

/// Bytes of one piece of advice: the kernel starts to read no more than its read-ahead window at a time, and drops the rest.
const PREFETCH_STEP_BYTES: u64 = 128 << 10;

/// Asks the kernel to read the range into its cache, without waiting for it.
pub(super) fn prefetch(file: &File, offset_bytes: u64, length_bytes: u64) -> Result<()> {
    let mut done = 0;
    while done < length_bytes {
        let step = (length_bytes - done).min(PREFETCH_STEP_BYTES);
        let offset = libc::off_t::try_from(offset_bytes + done).map_err(|_| Error::from_raw_os_error(libc::EFBIG))?;
        // SAFETY: no memory is passed.
        let errno = unsafe { libc::posix_fadvise(file.as_raw_fd(), offset, step as libc::off_t, libc::POSIX_FADV_WILLNEED) };
        if errno != 0 {
            return Err(Error::from_raw_os_error(errno));
        }
        done += step;
    }
    Ok(())
}

/// Takes (`true`) or gives back (`false`) the exclusive lock of this open file description on the whole file; does not wait.
/// `Ok(false)`: somebody else has it.
pub(super) fn set_lock(file: &File, exclusive: bool) -> Result<bool> {
    // SAFETY: flock is a plain structure of integers, for which all zeros is a value. l_pid must be 0 for these commands.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = if exclusive { libc::F_WRLCK } else { libc::F_UNLCK } as libc::c_short;
    lock.l_whence = libc::SEEK_SET as libc::c_short;
    // SAFETY: `lock` lives until the call returns and has the type that F_OFD_SETLK reads.
    if unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &raw const lock) } == 0 {
        return Ok(true);
    }
    let error = Error::last_os_error();
    if matches!(error.raw_os_error(), Some(libc::EAGAIN | libc::EACCES)) { Ok(false) } else { Err(error) }
}

/// Size of the file system that holds `path`, and what an unprivileged user may still allocate there.
pub(super) fn file_system_bytes(path: &Path) -> Result<(u64, u64)> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Error::from_raw_os_error(libc::EINVAL))?;
    // SAFETY: statvfs is a plain structure of integers, for which all zeros is a value.
    let mut numbers: libc::statvfs = unsafe { std::mem::zeroed() };
    // SAFETY: `path` ends with a NUL byte; `numbers` lives until the call returns and has the type that statvfs fills.
    if unsafe { libc::statvfs(path.as_ptr(), &raw mut numbers) } != 0 {
        return Err(Error::last_os_error());
    }
    Ok((numbers.f_blocks.saturating_mul(numbers.f_frsize), numbers.f_bavail.saturating_mul(numbers.f_frsize)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn more_buffers_than_one_call_takes_are_moved_whole() {
        let file = crate::file::unnamed_file(&std::env::temp_dir()).unwrap();
        let pieces: Vec<Vec<u8>> = (0..200u8).map(|index| vec![index; usize::from(index) * 3]).collect();
        let slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
        write_all_at(&file, 100, &slices).unwrap();
        let mut back: Vec<Vec<u8>> = pieces.iter().map(|piece| vec![0xee; piece.len() + 1]).collect();
        let whole: usize = pieces.iter().map(Vec::len).sum();
        let mut slices: Vec<IoSliceMut<'_>> = back.iter_mut().map(|piece| IoSliceMut::new(piece)).collect();
        read_all_at(&file, 100, &mut slices).unwrap();
        let flat = back.concat();
        assert_eq!(&flat[..whole], pieces.concat().as_slice());
        assert!(flat[whole..].iter().all(|byte| *byte == 0), "what lies past the end is zeros");
    }
}
