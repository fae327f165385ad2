//! Raw files into devices and devices into raw files, without moving what is zero.
use crate::{BlockStatus, Device, EngineError, Result};
use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::Path;

/// Bytes moved at a time.
const COPY_BUFFER_BYTES: u64 = 1 << 20;

/// The unit in which zeros are looked for; the slot of the map, so that a skipped block costs no slot.
const ZERO_BLOCK_BYTES: u64 = 4096;

/// Extents asked for at a time.
const STATUS_EXTENT_COUNT_MAX: usize = 1024;

/// What a copy moved and what it could leave out.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CopyReport {
    /// Bytes written to the target.
    pub data_bytes: u64,
    /// Bytes that are zero and were not written.
    pub zero_bytes: u64,
}

/// Whether every byte is zero.
pub(crate) fn is_zero(bytes: &[u8]) -> bool {
    // The first word decides for most data; the rest is compared in pieces that the compiler turns into vectors.
    let (head, rest) = bytes.split_at(bytes.len().min(16));
    if head.iter().any(|byte| *byte != 0) {
        return false;
    }
    let (pieces, tail) = rest.as_chunks::<64>();
    pieces.iter().all(|piece| piece.iter().fold(0, |seen, byte| seen | byte) == 0) && tail.iter().all(|byte| *byte == 0)
}

/// Copies `length_bytes` of the file from `source_offset_bytes` on to `offset_bytes` of the device. Holes and zero blocks
/// of 4 KiB are skipped, so the range of the device must be fresh (read as zeros). Not durable before a flush.
///
/// `FILE_ERROR` if the file cannot be opened or read, `SOURCE_CHANGED` if it is shorter than asked for or was written to
/// meanwhile, `ENGINE_CLOSED` if `cancelled` says so; whatever the device answers otherwise. Part of the range may be
/// written then.
pub fn copy_in(
    device: &Device,
    source: &Path,
    source_offset_bytes: u64,
    offset_bytes: u64,
    length_bytes: u64,
    cancelled: &dyn Fn() -> bool,
) -> Result<CopyReport> {
    let file = File::open(source).map_err(|error| file_error("open", source, &error))?;
    let mut sink = |at: u64, data: &[u8]| device.write(at, data);
    copy_file_in(&file, source, source_offset_bytes, offset_bytes, length_bytes, cancelled, &mut sink)
}

/// The part of `copy_in` that does not need a device: `sink` gets every run of blocks that holds data.
fn copy_file_in(
    file: &File,
    source: &Path,
    source_offset_bytes: u64,
    offset_bytes: u64,
    length_bytes: u64,
    cancelled: &dyn Fn() -> bool,
    sink: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
) -> Result<CopyReport> {
    let before = Fingerprint::of(file, source)?;
    let source_end = source_offset_bytes.checked_add(length_bytes).filter(|end| *end <= before.size_bytes).ok_or_else(|| {
        let message = format!("the source has {} bytes, too few for the range asked for", before.size_bytes);
        source_changed(source, message).with("sizeBytes", before.size_bytes)
    })?;
    let mut report = CopyReport::default();
    let mut buffer = vec![0; COPY_BUFFER_BYTES.min(length_bytes) as usize];
    let mut at = source_offset_bytes;
    while at < source_end {
        let (data_start, data_end) = next_data(file, source, at, source_end)?;
        report.zero_bytes += data_start - at;
        at = data_start;
        while at < data_end {
            if cancelled() {
                return Err(EngineError::new("ENGINE_CLOSED", libc::ESHUTDOWN, "the copy was stopped: the engine is closing"));
            }
            let target = offset_bytes + (at - source_offset_bytes);
            // Pieces end at a multiple of the buffer in the target, so that blocks stay whole.
            let piece_bytes = (COPY_BUFFER_BYTES - target % COPY_BUFFER_BYTES).min(data_end - at).min(buffer.len() as u64);
            let piece = &mut buffer[..piece_bytes as usize];
            file.read_exact_at(piece, at).map_err(|error| match error.kind() {
                io::ErrorKind::UnexpectedEof => source_changed(source, "the source became shorter while it was read"),
                _ => file_error("read", source, &error),
            })?;
            write_data_runs(target, piece, &mut report, sink)?;
            at += piece_bytes;
        }
    }
    let after = Fingerprint::of(file, source)?;
    if after != before {
        return Err(source_changed(source, "the source was written to while it was read"));
    }
    Ok(report)
}

/// Hands runs of non-zero blocks (aligned in the target) to `sink`.
pub(crate) fn write_data_runs(
    target: u64,
    piece: &[u8],
    report: &mut CopyReport,
    sink: &mut dyn FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let block_end = |from: usize| {
        let left_in_block = ZERO_BLOCK_BYTES - (target + from as u64) % ZERO_BLOCK_BYTES;
        piece.len().min(from + left_in_block as usize)
    };
    let mut from = 0;
    while from < piece.len() {
        let mut to = block_end(from);
        let zero = is_zero(&piece[from..to]);
        while to < piece.len() {
            let next = block_end(to);
            if is_zero(&piece[to..next]) != zero {
                break;
            }
            to = next;
        }
        if zero {
            report.zero_bytes += (to - from) as u64;
        } else {
            sink(target + from as u64, &piece[from..to])?;
            report.data_bytes += (to - from) as u64;
        }
        from = to;
    }
    Ok(())
}

/// Copies `length_bytes` of the device from `offset_bytes` on to the same offset of an existing file, which is made
/// longer if it must be. What reads as zeros is not written: the file has or gets a hole there. Durable on return.
///
/// `FILE_ERROR` if the file cannot be opened or written, `ENGINE_CLOSED` if `cancelled` says so; whatever the device
/// answers otherwise.
pub fn copy_out(device: &Device, target: &Path, offset_bytes: u64, length_bytes: u64, cancelled: &dyn Fn() -> bool) -> Result<CopyReport> {
    let file = OpenOptions::new().write(true).open(target).map_err(|error| file_error("open", target, &error))?;
    let end = offset_bytes + length_bytes;
    let size_bytes = file.metadata().map_err(|error| file_error("stat", target, &error))?.size();
    if size_bytes < end {
        file.set_len(end).map_err(|error| file_error("extend", target, &error))?;
    }
    let mut writer = ZeroAwareWriter { file: &file, path: target, report: CopyReport::default() };
    let mut buffer = vec![0; COPY_BUFFER_BYTES.min(length_bytes) as usize];
    let mut extents: Vec<BlockStatus> = Vec::new();
    let mut at = offset_bytes;
    while at < end {
        extents.clear();
        device.block_status(at, end - at, STATUS_EXTENT_COUNT_MAX, &mut extents)?;
        for extent in &extents {
            let extent_end = (at + extent.length_bytes).min(end);
            if extent.zero {
                writer.zero(at, extent_end - at)?;
                at = extent_end;
            }
            while at < extent_end {
                if cancelled() {
                    let message = "the copy was stopped: the engine is closing";
                    return Err(EngineError::new("ENGINE_CLOSED", libc::ESHUTDOWN, message));
                }
                let piece_bytes = (COPY_BUFFER_BYTES - at % COPY_BUFFER_BYTES).min(extent_end - at).min(buffer.len() as u64);
                let piece = &mut buffer[..piece_bytes as usize];
                device.read(at, piece)?;
                writer.data(at, piece)?;
                at += piece_bytes;
            }
        }
    }
    file.sync_data().map_err(|error| file_error("sync", target, &error))?;
    Ok(writer.report)
}

/// Writes a raw file and keeps it sparse.
struct ZeroAwareWriter<'a> {
    file: &'a File,
    path: &'a Path,
    report: CopyReport,
}

impl ZeroAwareWriter<'_> {
    /// The range must read as zeros: nothing to do in a hole, else one is punched, else zeros are written.
    fn zero(&mut self, at: u64, length_bytes: u64) -> Result<()> {
        self.report.zero_bytes += length_bytes;
        if seek(self.file, at, libc::SEEK_DATA).is_ok_and(|data| data.is_none_or(|data| data >= at + length_bytes)) {
            return Ok(());
        }
        let mode = libc::FALLOC_FL_PUNCH_HOLE | libc::FALLOC_FL_KEEP_SIZE;
        // SAFETY: a plain call on a descriptor that we own.
        let result = unsafe { libc::fallocate(self.file.as_raw_fd(), mode, at as libc::off_t, length_bytes as libc::off_t) };
        if result == 0 {
            return Ok(());
        }
        let zeros = vec![0; COPY_BUFFER_BYTES.min(length_bytes) as usize];
        let mut done = 0;
        while done < length_bytes {
            let piece = (length_bytes - done).min(zeros.len() as u64);
            self.write(at + done, &zeros[..piece as usize])?;
            done += piece;
        }
        Ok(())
    }

    fn data(&mut self, at: u64, piece: &[u8]) -> Result<()> {
        let mut runs = CopyReport::default();
        let mut zero_from = at;
        let (file, path) = (self.file, self.path);
        let mut zeros: Vec<(u64, u64)> = Vec::new();
        write_data_runs(at, piece, &mut runs, &mut |run_at, run| {
            if run_at > zero_from {
                zeros.push((zero_from, run_at - zero_from));
            }
            zero_from = run_at + run.len() as u64;
            file.write_all_at(run, run_at).map_err(|error| file_error("write", path, &error))
        })?;
        let end = at + piece.len() as u64;
        if zero_from < end {
            zeros.push((zero_from, end - zero_from));
        }
        self.report.data_bytes += runs.data_bytes;
        for (zero_at, zero_bytes) in zeros {
            self.zero(zero_at, zero_bytes)?;
        }
        Ok(())
    }

    fn write(&self, at: u64, bytes: &[u8]) -> Result<()> {
        self.file.write_all_at(bytes, at).map_err(|error| file_error("write", self.path, &error))
    }
}

/// What must not change while a source is read.
#[derive(Debug, PartialEq, Eq)]
struct Fingerprint {
    size_bytes: u64,
    modified: (i64, i64),
}

impl Fingerprint {
    fn of(file: &File, path: &Path) -> Result<Fingerprint> {
        let metadata = file.metadata().map_err(|error| file_error("stat", path, &error))?;
        let mut size_bytes = metadata.size();
        if !metadata.is_file() {
            // A block device has its size at its end only.
            size_bytes = seek(file, 0, libc::SEEK_END).map_err(|error| file_error("seek", path, &error))?.unwrap_or(0);
        }
        Ok(Fingerprint { size_bytes, modified: (metadata.mtime(), metadata.mtime_nsec()) })
    }
}

/// The next stretch of data at or after `at`, cut at `end`; `(end, end)` if there is none.
fn next_data(file: &File, path: &Path, at: u64, end: u64) -> Result<(u64, u64)> {
    let data = match seek(file, at, libc::SEEK_DATA) {
        Ok(None) => return Ok((end, end)),
        Ok(Some(data)) if data >= end => return Ok((end, end)),
        Ok(Some(data)) => data,
        // A file system (or a device) that knows no holes.
        Err(error) if matches!(error.raw_os_error(), Some(libc::EINVAL | libc::EOPNOTSUPP)) => return Ok((at, end)),
        Err(error) => return Err(file_error("seek", path, &error)),
    };
    let hole = seek(file, data, libc::SEEK_HOLE).map_err(|error| file_error("seek", path, &error))?;
    // Never backwards and never empty, whatever another writer does to the file.
    Ok((data.max(at), hole.unwrap_or(end).clamp(data.max(at) + 1, end)))
}

/// `lseek`; `None` for ENXIO (nothing of that kind from there on).
fn seek(file: &File, at: u64, whence: libc::c_int) -> io::Result<Option<u64>> {
    // SAFETY: a plain call on a descriptor that we own; only positioned reads and writes are used besides.
    let found = unsafe { libc::lseek(file.as_raw_fd(), at as libc::off_t, whence) };
    if found >= 0 {
        return Ok(Some(found as u64));
    }
    let error = io::Error::last_os_error();
    if error.raw_os_error() == Some(libc::ENXIO) { Ok(None) } else { Err(error) }
}

fn file_error(operation: &'static str, path: &Path, error: &io::Error) -> EngineError {
    let code = match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT) => "NO_SPACE",
        _ => "FILE_ERROR",
    };
    EngineError::new(code, libc::EIO, format!("cannot {operation} {}: {error}", path.display()))
        .with("operation", operation)
        .with("path", path.display())
        .with("errno", error.raw_os_error().unwrap_or(0))
}

fn source_changed(path: &Path, message: impl Into<String>) -> EngineError {
    EngineError::new("SOURCE_CHANGED", libc::EIO, format!("{}: {}", path.display(), message.into())).with("path", path.display())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{DeviceLimits, DeviceSpec, LayerSpec, ThrottleLimits};
    use atoll_io::{LayerId, MemoryStore, Store};
    use atoll_map::{FrozenMap, HOLE, MapCache};
    use std::path::PathBuf;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    /// A file that is gone with its test.
    struct TestFile(PathBuf);
    impl TestFile {
        fn new(content: &[u8]) -> TestFile {
            static NEXT: AtomicU64 = AtomicU64::new(0);
            let name = format!("atoll-copy-{}-{}", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
            let file = TestFile(std::env::temp_dir().join(name));
            std::fs::write(&file.0, content).unwrap();
            file
        }
        fn allocated_bytes(&self) -> u64 {
            std::fs::metadata(&self.0).unwrap().blocks() * 512
        }
    }
    impl Drop for TestFile {
        fn drop(&mut self) {
            let _ = std::fs::remove_file(&self.0);
        }
    }

    fn device(size_bytes: u64) -> Arc<Device> {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new(u64::MAX, false));
        let id = LayerId([1; 16]);
        store.create_layer(id).unwrap();
        let spec = DeviceSpec {
            volume: [2; 16],
            size_bytes,
            epoch: 1,
            map: FrozenMap::uniform(MapCache::new(None, 1 << 30).unwrap(), HOLE),
            map_lsn: 0,
            layers: vec![LayerSpec { alias: 1, id, store }],
            active: Some(1),
            next: None,
            throttle: ThrottleLimits::default(),
            limits: DeviceLimits::default(),
            batch_log: None,
            batch_log_since_epoch: 0,
            on_event: None,
        };
        Device::open(spec).unwrap().0
    }

    fn read(device: &Device, offset_bytes: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; length];
        device.read(offset_bytes, &mut bytes).unwrap();
        bytes
    }

    const MIB: usize = 1 << 20;

    #[test]
    fn zero_is_zero_whatever_the_length_and_alignment() {
        let bytes = vec![0u8; 300];
        for start in 0..70 {
            for length in [0, 1, 15, 16, 17, 63, 64, 65, 200] {
                assert!(is_zero(&bytes[start..start + length]));
            }
        }
        for at in 0..300 {
            let mut bytes = bytes.clone();
            bytes[at] = 1;
            assert!(!is_zero(&bytes), "{at}");
        }
    }

    #[test]
    fn a_copy_in_moves_data_and_skips_zero_blocks_at_any_alignment() {
        let mut content = vec![0u8; 3 * MIB + 777];
        content[5000..6000].fill(1);
        content[MIB - 10..MIB + 10].fill(2);
        content[3 * MIB + 700..].fill(3);
        let file = TestFile::new(&content);
        for (source_offset, offset) in [(0u64, 0u64), (0, 4096), (100, 0), (4097, 513)] {
            let device = device(8 << 20);
            let length = content.len() as u64 - source_offset;
            let report = copy_in(&device, &file.0, source_offset, offset, length, &|| false).unwrap();
            assert_eq!(report.data_bytes + report.zero_bytes, length);
            assert!(report.data_bytes <= 8 * 4096, "{report:?}");
            assert_eq!(read(&device, offset, length as usize), content[source_offset as usize..]);
        }
    }

    #[test]
    fn holes_of_the_source_are_not_read() {
        let file = TestFile::new(b"");
        let handle = OpenOptions::new().write(true).open(&file.0).unwrap();
        handle.set_len(1 << 40).unwrap();
        handle.write_all_at(&[7; 4096], 1 << 39).unwrap();
        let device = device(1 << 40);
        let report = copy_in(&device, &file.0, 0, 0, 1 << 40, &|| false).unwrap();
        assert_eq!((report.data_bytes, report.data_bytes + report.zero_bytes), (4096, 1 << 40));
        assert_eq!(read(&device, 1 << 39, 4096), [7; 4096]);
    }

    #[test]
    fn a_source_that_is_too_short_or_changes_is_an_error() {
        let file = TestFile::new(&[1; 2 * MIB]);
        let target = device(8 << 20);
        let code = |result: Result<CopyReport>| result.err().map(|error| error.code);
        let full = 2 * MIB as u64;
        assert_eq!(code(copy_in(&target, &file.0, 0, 0, full + 1, &|| false)), Some("SOURCE_CHANGED"));
        assert_eq!(code(copy_in(&target, &file.0, u64::MAX, 0, 2, &|| false)), Some("SOURCE_CHANGED"));
        assert_eq!(code(copy_in(&target, Path::new("/nonexistent"), 0, 0, 1, &|| false)), Some("FILE_ERROR"));
        let source = File::open(&file.0).unwrap();
        let copy = |change: &dyn Fn()| {
            copy_file_in(&source, &file.0, 0, 0, full, &|| false, &mut |at, _| {
                if at == 0 {
                    change();
                }
                Ok(())
            })
        };
        assert_eq!(code(copy(&|| {})), None);
        let writer = OpenOptions::new().write(true).open(&file.0).unwrap();
        let touch = || {
            writer.write_all_at(&[9], 0).unwrap();
            // A clock of any grain shows it.
            writer.set_modified(std::time::UNIX_EPOCH).unwrap();
        };
        assert_eq!(code(copy(&touch)), Some("SOURCE_CHANGED"));
        assert_eq!(code(copy(&|| writer.set_len(MIB as u64).unwrap())), Some("SOURCE_CHANGED"));
    }

    #[test]
    fn a_cancelled_copy_stops() {
        let file = TestFile::new(&[1; MIB]);
        let target = device(8 << 20);
        assert_eq!(copy_in(&target, &file.0, 0, 0, MIB as u64, &|| true).unwrap_err().code, "ENGINE_CLOSED");
        copy_in(&target, &file.0, 0, 0, MIB as u64, &|| false).unwrap();
        assert_eq!(copy_out(&target, &file.0, 0, MIB as u64, &|| true).unwrap_err().code, "ENGINE_CLOSED");
    }

    #[test]
    fn a_copy_out_overwrites_what_was_there_and_leaves_holes() {
        let source = device(16 << 20);
        source.write(5 << 20, &[3; 100_000]).unwrap();
        source.write(MIB as u64 + 5, &[4; 10]).unwrap();
        // Zeros that are allocated: a hole in the copy all the same.
        source.write(10 << 20, &vec![0; 2 * MIB]).unwrap();
        let file = TestFile::new(&vec![0xff; 20 * MIB]);
        let report = copy_out(&source, &file.0, 0, 16 << 20, &|| false).unwrap();
        assert_eq!(report.data_bytes + report.zero_bytes, 16 << 20);
        let content = std::fs::read(&file.0).unwrap();
        assert!(content[..16 * MIB] == read(&source, 0, 16 * MIB));
        assert!(content[16 * MIB..].iter().all(|byte| *byte == 0xff));
        assert!(file.allocated_bytes() <= 5 << 20, "{} bytes are allocated", file.allocated_bytes());
    }

    #[test]
    fn a_copy_out_of_a_part_makes_the_file_long_enough() {
        let source = device(4 << 20);
        source.write(MIB as u64, &[8; 5000]).unwrap();
        let file = TestFile::new(b"");
        copy_out(&source, &file.0, MIB as u64 - 100, 6000, &|| false).unwrap();
        let content = std::fs::read(&file.0).unwrap();
        assert_eq!(content.len(), MIB + 5900);
        assert_eq!(content[MIB - 100..], read(&source, MIB as u64 - 100, 6000));
        assert_eq!(copy_out(&source, Path::new("/nonexistent"), 0, 1, &|| false).unwrap_err().code, "FILE_ERROR");
    }
}
