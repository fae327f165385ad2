//! The batch log: what was answered but not flushed outlives the process.
//!
//! A client that reconnects after the daemon was killed never learns that there was a crash, and its next flush vouches for
//! everything it was ever told is done. In-place writes survive in the kernel's page cache; the owner changes of the open
//! batch would be lost with the process. So each is also written, without a sync, to a local file before the answer.
//!
//! Rules
//! - An entry waits in memory from the moment its owner change can be seen until somebody is about to answer; then all that wait
//!   are written at once (`Device::settle`). No mutation is answered while any entry waits that was there when it looked: a write
//!   to a slot that another request has just made ours depends on that request's entry.
//! - The log is believed only under the boot of the kernel that it was written under: after a power cut the page cache is gone,
//!   and a delta without its data must not be found (I3). Then only what was flushed counts.
//! - Where several homes share a catalog, each has logs of its own: they are believed only from the epoch on since which no other home
//!   had the volume. What was answered there and not flushed is lost to the others, and must not come back later.
//! - Batches with even and odd lsn go to two files; a file is written from its beginning again when no batch in it waits to be
//!   durable. Entries carry their lsn and a crc: what is left of older batches is passed over.
//! - An open takes the batches that follow the last frame without a gap into the journal, durably, before it serves.
//! - One thread writes at a time, in the order of the entries' places: a late writer cannot overwrite a newer batch's entry.
//! - Where the log cannot be written, the change is flushed before it is answered. Where it cannot be flushed either, it is answered
//!   as failed, and so is every later write to these slots until a flush succeeds; writes to others go on. A closed device writes no log: the files may
//!   belong to its successor.
use super::Device;
use super::flush::Batch;
use crate::{EngineError, Result};
use atoll_io::{Delta, LayerId};
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::io::{ErrorKind, Read};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

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

/// Entries that wait to be written, and where: they join.
#[derive(Default)]
struct Waiting {
    offset_bytes: u64,
    bytes: Vec<u8>,
}

/// Where the next entries of a batch go, and those that are not written yet. Part of the batch, and under its lock.
#[derive(Default)]
pub(super) struct LogTail {
    lsns: [u64; 2],
    end_bytes: [u64; 2],
    waiting: [Waiting; 2],
}

impl LogTail {
    /// Adds an entry of batch `lsn`. `is_queued` tells whether a batch with this lsn is closed and not durable yet.
    fn push(&mut self, lsn: u64, entry: &[u8; ENTRY_BYTES], is_queued: impl Fn(u64) -> bool) {
        let parity = (lsn % 2) as usize;
        let waiting = &mut self.waiting[parity];
        if self.lsns[parity] != lsn {
            if !is_queued(self.lsns[parity]) {
                // What waits belongs to batches that are durable: nobody needs it any more.
                waiting.bytes.clear();
                self.end_bytes[parity] = HEADER_BYTES as u64;
            }
            self.lsns[parity] = lsn;
        }
        if waiting.bytes.is_empty() {
            waiting.offset_bytes = self.end_bytes[parity];
        }
        waiting.bytes.extend_from_slice(entry);
        self.end_bytes[parity] += ENTRY_BYTES as u64;
    }
}

/// What the thread that writes holds.
#[derive(Default)]
struct LogWriter {
    /// What it writes; keeps its memory for the next time.
    taken: [Waiting; 2],
    /// Entries could not be written: only a flush settles what comes next.
    must_flush: bool,
    /// Those that could not be settled either way, until a flush succeeds: after how many entries, up to how many, and why at last.
    failed: Option<(u64, u64, EngineError)>,
    /// The device is closed.
    is_retired: bool,
}

/// What had been settled before the first of some mutations that are answered together. Whatever of them is settled by the time
/// of the answer came after it, and it may have been given up.
#[derive(Debug, Default)]
pub struct SettleMark(Option<u64>);

impl SettleMark {
    /// Another mutation is answered together with these.
    pub(crate) fn join(&mut self, other: SettleMark) {
        self.0 = match (self.0, other.0) {
            (Some(mine), Some(its)) => Some(mine.min(its)),
            (mine, its) => mine.or(its),
        };
    }
}

/// The log of one open volume. The files are made at the first entry.
pub(super) struct BatchLog {
    place: BatchLogPlace,
    volume: [u8; 16],
    epoch: u64,
    boot_crc: u32,
    files: OnceLock<Result<[File; 2]>>,
    /// Taken before the batch lock.
    writer: Mutex<LogWriter>,
    /// Entries that were ever made, and how many of them are written, or durable. Whoever sees an owner change sees its entry here.
    made_count: AtomicU64,
    settled_count: AtomicU64,
    /// Some of what counts as settled is not: it was answered as failed, though its data and its owner change can be seen.
    is_behind: AtomicBool,
}

impl BatchLog {
    pub(super) fn new(place: BatchLogPlace, volume: [u8; 16], epoch: u64) -> BatchLog {
        let boot_crc = crc32c::crc32c(&place.boot_id);
        BatchLog {
            place,
            volume,
            epoch,
            boot_crc,
            files: OnceLock::new(),
            writer: Mutex::default(),
            made_count: AtomicU64::new(0),
            settled_count: AtomicU64::new(0),
            is_behind: AtomicBool::new(false),
        }
    }

    /// Before a mutation.
    #[inline]
    pub(super) fn mark(&self, mark: &mut SettleMark) {
        mark.0.get_or_insert_with(|| self.settled_count.load(Ordering::SeqCst));
    }

    /// Adds an entry to those that wait. Before anybody can see the owner change.
    pub(super) fn push(&self, tail: &mut LogTail, lsn: u64, delta: Delta, active: u32, is_queued: impl Fn(u64) -> bool) {
        tail.push(lsn, &encode_entry(self.boot_crc, lsn, delta, active), is_queued);
        self.made_count.fetch_add(1, Ordering::SeqCst);
    }

    /// A write in place depends on these slots' owner changes. Where one of them was given up, what settles it has to try again.
    #[inline]
    pub(super) fn note_in_place(&self, batch: &Mutex<Batch>, start_slot: u64, end_slot: u64) {
        if self.is_behind.load(Ordering::SeqCst) && batch.lock().touches(start_slot, end_slot) {
            self.made_count.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Writes entries; they are there if the process ends after the return, but not after a power cut.
    fn write(&self, taken: &[Waiting; 2]) -> Result<()> {
        let files = self.files.get_or_init(|| self.create()).as_ref().map_err(Clone::clone)?;
        for (parity, Waiting { offset_bytes, bytes }) in taken.iter().enumerate().filter(|(_, waiting)| !waiting.bytes.is_empty()) {
            let path = || self.place.path(self.volume, parity);
            if offset_bytes + bytes.len() as u64 > LOG_BYTES_MAX {
                return Err(io_error("write", &path(), &std::io::Error::from_raw_os_error(libc::EFBIG)));
            }
            files[parity].write_all_at(bytes, *offset_bytes).map_err(|error| io_error("write", &path(), &error))?;
        }
        Ok(())
    }

    /// Nothing is written any more: what is not settled by now needs a flush.
    pub(super) fn retire(&self) {
        self.writer.lock().is_retired = true;
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

    /// The batches of an earlier process of this boot, ascending by lsn; what is damaged, of another boot or of an epoch before
    /// `since_epoch` is not believed.
    pub(super) fn recall(&self, since_epoch: u64) -> Result<Vec<RecalledBatch>> {
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
            if !self.is_ours(&bytes, since_epoch) {
                continue;
            }
            for entry in bytes[HEADER_BYTES..].chunks_exact(ENTRY_BYTES) {
                let Some((lsn, delta, active)) = decode_entry(self.boot_crc, entry) else { continue };
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

    fn is_ours(&self, bytes: &[u8], since_epoch: u64) -> bool {
        bytes.len() >= HEADER_BYTES
            && bytes[..8] == MAGIC
            && bytes[8..24] == self.place.boot_id
            && bytes[24..40] == self.volume
            && (since_epoch..self.epoch).contains(&u64_at(bytes, 40))
            && bytes[48..HEADER_BYTES] == crc32c::crc32c(&bytes[..48]).to_le_bytes()
    }
}

impl Device {
    /// After this every mutation under the mark outlives the process and may be answered: the entries that wait are in the batch
    /// log or, where they cannot be, in the journal. Costs three loads where nothing waits.
    #[inline]
    pub fn settle(&self, mark: SettleMark) -> Result<()> {
        if self.is_settled(&mark) {
            return Ok(());
        }
        let (Some(log), SettleMark(Some(since))) = (&self.batch_log, mark) else { return Ok(()) };
        let mine = log.made_count.load(Ordering::SeqCst);
        self.unwind_guard("settle", || self.settle_waiting(log, since, mine))
    }

    /// Whether `settle` of the mark would find that nothing waits.
    #[inline]
    pub(crate) fn is_settled(&self, mark: &SettleMark) -> bool {
        let (Some(log), Some(since)) = (&self.batch_log, mark.0) else { return true };
        let mine = log.made_count.load(Ordering::SeqCst);
        // In this order: whoever gives entries up says so before they count as settled.
        log.settled_count.load(Ordering::SeqCst) >= mine && (since >= mine || !log.is_behind.load(Ordering::SeqCst))
    }

    /// The caller wants settled what was made after `since` and up to `mine`.
    fn settle_waiting(&self, log: &BatchLog, since: u64, mine: u64) -> Result<()> {
        let mut writer = log.writer.lock();
        let LogWriter { taken, must_flush, failed, is_retired } = &mut *writer;
        match failed {
            // Somebody else tried for this one.
            Some((after, up_to, error)) if *after < mine && since < *up_to && mine <= *up_to => return Err(error.clone()),
            _ => {}
        }
        let settled_count = log.settled_count.load(Ordering::SeqCst);
        if settled_count >= mine {
            return Ok(());
        }
        let made_count = {
            let mut batch = self.batch.lock();
            for (taken, waiting) in taken.iter_mut().zip(&mut batch.log_tail.waiting) {
                taken.bytes.clear();
                std::mem::swap(taken, waiting);
            }
            log.made_count.load(Ordering::SeqCst)
        };
        *must_flush |= *is_retired || log.write(taken).is_err();
        let result = if *must_flush { self.flush_completed() } else { Ok(()) };
        match &result {
            Ok(()) => {
                *must_flush = false;
                *failed = None;
            }
            // Who waits for these hears of it. Others go on: a full disk must not keep anybody from writing what is his already.
            Err(error) => {
                let after = failed.as_ref().map_or(settled_count, |(after, ..)| *after);
                *failed = Some((after, made_count, error.clone()));
            }
        }
        log.is_behind.store(result.is_err(), Ordering::SeqCst);
        log.settled_count.store(made_count, Ordering::SeqCst);
        result
    }
}

fn encode_entry(boot_crc: u32, lsn: u64, delta: Delta, active: u32) -> [u8; ENTRY_BYTES] {
    let mut entry = [0; ENTRY_BYTES];
    entry[4..8].copy_from_slice(&delta.owner.to_le_bytes());
    entry[8..16].copy_from_slice(&lsn.to_le_bytes());
    entry[16..24].copy_from_slice(&delta.start_slot.to_le_bytes());
    entry[24..32].copy_from_slice(&delta.slot_count.to_le_bytes());
    entry[32..36].copy_from_slice(&active.to_le_bytes());
    let crc = entry_crc(boot_crc, &entry);
    entry[..4].copy_from_slice(&crc.to_le_bytes());
    entry
}

fn decode_entry(boot_crc: u32, entry: &[u8]) -> Option<(u64, Delta, u32)> {
    if entry[..4] != entry_crc(boot_crc, entry).to_le_bytes() {
        return None;
    }
    let delta = Delta { start_slot: u64_at(entry, 16), slot_count: u64_at(entry, 24), owner: u32_at(entry, 4) };
    Some((u64_at(entry, 8), delta, u32_at(entry, 32)))
}

/// The boot is part of the sum: an entry of another one is no entry.
fn entry_crc(boot_crc: u32, entry: &[u8]) -> u32 {
    crc32c::crc32c_append(boot_crc, &entry[4..])
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
