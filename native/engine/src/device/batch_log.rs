//! The batch log: what was answered but not flushed outlives the process.
//!
//! A client that reconnects after the daemon was killed never learns that there was a crash, and its next flush vouches for
//! everything it was ever told is done. In-place writes survive in the kernel's page cache; the owner changes of the open
//! batch would be lost with the process. So each is also written, without a sync, to a local file before the answer.
//!
//! Rules
//! - The log is believed only under the boot of the kernel that it was written under: after a power cut the page cache is gone,
//!   and a delta without its data must not be found (I3). Then only what was flushed counts.
//! - Batches with even and odd lsn go to two files; a file is written from its beginning again when no batch in it waits to be
//!   durable. Entries carry their lsn and a crc: what is left of older batches is passed over.
//! - An open takes the batches that follow the last frame without a gap into the journal, durably, before it serves.
//! - Where the log cannot be written, the change is flushed before it is answered.
use crate::{EngineError, Result};
use atoll_io::{Delta, LayerId};
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

const MAGIC: [u8; 8] = *b"ATOLBLG1";
/// magic 8 | boot id 16 | volume 16 | epoch 8 | crc32c of all before 4.
const HEADER_BYTES: usize = 52;
/// crc32c of the rest 4 | owner 4 | lsn 8 | start slot 8 | slot count 8 | alias of the active layer 4.
const ENTRY_BYTES: usize = 36;
/// A log longer than this was not written by us.
const LOG_BYTES_MAX: u64 = 256 << 20;

/// Where and under which boot logs are kept.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BatchLogPlace {
    /// A local directory that survives the process.
    pub directory: PathBuf,
    /// The kernel's boot.
    pub boot_id: [u8; 16],
}

impl BatchLogPlace {
    /// The directory, under the present boot. `IO_ERROR` if the kernel does not tell its boot.
    pub fn here(directory: PathBuf) -> Result<BatchLogPlace> {
        const SOURCE: &str = "/proc/sys/kernel/random/boot_id";
        let text = std::fs::read_to_string(SOURCE).map_err(|error| io_error("read", Path::new(SOURCE), &error))?;
        let digits: String = text.chars().filter(char::is_ascii_hexdigit).collect();
        let value = u128::from_str_radix(&digits, 16)
            .map_err(|_| EngineError::new("IO_ERROR", libc::EIO, format!("{SOURCE} holds {text:?}, which is no boot id")))?;
        Ok(BatchLogPlace { directory, boot_id: value.to_be_bytes() })
    }

    fn path(&self, volume: [u8; 16], parity: usize) -> PathBuf {
        self.directory.join(format!("{}.batch-{parity}", LayerId(volume)))
    }
}

/// A batch that a log kept.
pub(super) struct RecalledBatch {
    pub(super) lsn: u64,
    /// Alias of the layer that was active.
    pub(super) active: u32,
    pub(super) deltas: Vec<Delta>,
}

/// Where the next entries of a batch go.
#[derive(Default)]
pub(super) struct LogPositions {
    lsns: [u64; 2],
    entry_counts: [u64; 2],
}

impl LogPositions {
    /// Takes the place of one entry of batch `lsn`. `is_waiting` tells whether a batch with this lsn is not durable yet.
    pub(super) fn take(&mut self, lsn: u64, is_waiting: impl Fn(u64) -> bool) -> LogSlot {
        let parity = (lsn % 2) as usize;
        if self.lsns[parity] != lsn {
            if !is_waiting(self.lsns[parity]) {
                self.entry_counts[parity] = 0;
            }
            self.lsns[parity] = lsn;
        }
        let index = self.entry_counts[parity];
        self.entry_counts[parity] += 1;
        LogSlot { lsn, parity, offset_bytes: (HEADER_BYTES + ENTRY_BYTES * index as usize) as u64 }
    }
}

/// The place of one entry.
#[derive(Debug, Clone, Copy)]
pub(super) struct LogSlot {
    lsn: u64,
    parity: usize,
    offset_bytes: u64,
}

/// The log of one open volume. The files are made at the first entry.
pub(super) struct BatchLog {
    place: BatchLogPlace,
    volume: [u8; 16],
    epoch: u64,
    files: OnceLock<Result<[File; 2]>>,
}

impl BatchLog {
    pub(super) fn new(place: BatchLogPlace, volume: [u8; 16], epoch: u64) -> BatchLog {
        BatchLog { place, volume, epoch, files: OnceLock::new() }
    }

    /// Writes an entry; it is there if the process ends after the return, but not after a power cut.
    pub(super) fn record(&self, slot: LogSlot, delta: Delta, active: u32) -> Result<()> {
        let files = self.files.get_or_init(|| self.create()).as_ref().map_err(Clone::clone)?;
        let entry = encode_entry(&self.place.boot_id, slot.lsn, delta, active);
        files[slot.parity]
            .write_all_at(&entry, slot.offset_bytes)
            .map_err(|error| io_error("write", &self.place.path(self.volume, slot.parity), &error))
    }

    /// Removes the files: everything is in the journal or in the catalog.
    pub(super) fn remove(&self) -> Result<()> {
        for parity in 0..2 {
            let path = self.place.path(self.volume, parity);
            match std::fs::remove_file(&path) {
                Ok(()) => {}
                Err(error) if error.kind() == ErrorKind::NotFound => {}
                Err(error) => return Err(io_error("remove", &path, &error)),
            }
        }
        Ok(())
    }

    /// The batches of an earlier process of this boot, ascending by lsn; what is damaged or of another boot is not believed.
    pub(super) fn recall(&self) -> Result<Vec<RecalledBatch>> {
        let mut batches = BTreeMap::<u64, RecalledBatch>::new();
        for parity in 0..2 {
            let path = self.place.path(self.volume, parity);
            let file = match File::open(&path) {
                Ok(file) => file,
                Err(error) if error.kind() == ErrorKind::NotFound => continue,
                Err(error) => return Err(io_error("open", &path, &error)),
            };
            let mut bytes = Vec::new();
            file.take(LOG_BYTES_MAX).read_to_end(&mut bytes).map_err(|error| io_error("read", &path, &error))?;
            if !self.is_ours(&bytes) {
                continue;
            }
            for entry in bytes[HEADER_BYTES..].chunks_exact(ENTRY_BYTES) {
                let Some((lsn, delta, active)) = decode_entry(&self.place.boot_id, entry) else { continue };
                let batch = batches.entry(lsn).or_insert(RecalledBatch { lsn, active, deltas: Vec::new() });
                if batch.active == active {
                    batch.deltas.push(delta);
                }
            }
        }
        Ok(batches.into_values().collect())
    }

    fn create(&self) -> Result<[File; 2]> {
        let one = |parity| -> Result<File> {
            let path = self.place.path(self.volume, parity);
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(true)
                .mode(0o600)
                .open(&path)
                .map_err(|error| io_error("create", &path, &error))?;
            file.write_all_at(&self.header(), 0).map_err(|error| io_error("write", &path, &error))?;
            Ok(file)
        };
        Ok([one(0)?, one(1)?])
    }

    fn header(&self) -> [u8; HEADER_BYTES] {
        let mut header = [0; HEADER_BYTES];
        header[..8].copy_from_slice(&MAGIC);
        header[8..24].copy_from_slice(&self.place.boot_id);
        header[24..40].copy_from_slice(&self.volume);
        header[40..48].copy_from_slice(&self.epoch.to_le_bytes());
        let crc = crc32c::crc32c(&header[..48]);
        header[48..].copy_from_slice(&crc.to_le_bytes());
        header
    }

    fn is_ours(&self, bytes: &[u8]) -> bool {
        bytes.len() >= HEADER_BYTES
            && bytes[..8] == MAGIC
            && bytes[8..24] == self.place.boot_id
            && bytes[24..40] == self.volume
            && u64_at(bytes, 40) < self.epoch
            && bytes[48..HEADER_BYTES] == crc32c::crc32c(&bytes[..48]).to_le_bytes()
    }
}

fn encode_entry(boot_id: &[u8; 16], lsn: u64, delta: Delta, active: u32) -> [u8; ENTRY_BYTES] {
    let mut entry = [0; ENTRY_BYTES];
    entry[4..8].copy_from_slice(&delta.owner.to_le_bytes());
    entry[8..16].copy_from_slice(&lsn.to_le_bytes());
    entry[16..24].copy_from_slice(&delta.start_slot.to_le_bytes());
    entry[24..32].copy_from_slice(&delta.slot_count.to_le_bytes());
    entry[32..36].copy_from_slice(&active.to_le_bytes());
    let crc = entry_crc(boot_id, &entry);
    entry[..4].copy_from_slice(&crc.to_le_bytes());
    entry
}

fn decode_entry(boot_id: &[u8; 16], entry: &[u8]) -> Option<(u64, Delta, u32)> {
    if entry[..4] != entry_crc(boot_id, entry).to_le_bytes() {
        return None;
    }
    let delta = Delta { start_slot: u64_at(entry, 16), slot_count: u64_at(entry, 24), owner: u32_at(entry, 4) };
    Some((u64_at(entry, 8), delta, u32_at(entry, 32)))
}

fn entry_crc(boot_id: &[u8; 16], entry: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c(boot_id), &entry[4..])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes[at..at + 4].iter().rev().fold(0, |value, &byte| value << 8 | u32::from(byte))
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes[at..at + 8].iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
}

fn io_error(operation: &'static str, path: &Path, error: &std::io::Error) -> EngineError {
    let errno = error.raw_os_error().unwrap_or(libc::EIO);
    let code = if matches!(errno, libc::ENOSPC | libc::EDQUOT) { "NO_SPACE" } else { "IO_ERROR" };
    EngineError::new(code, errno, format!("{operation} {}: {error}", path.display()))
        .with("operation", operation)
        .with("object", path.display())
        .with("errno", errno)
}
