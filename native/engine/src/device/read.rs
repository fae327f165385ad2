//! Reads. No lock is taken: the gate pass keeps what was looked up from being punched (I5).
use super::gate::Pass;
use super::{Device, slots_touched, timed};
use crate::Result;
use atoll_io::LayerIo;
use atoll_map::{HOLE, Run, SLOT_BYTES};
use std::cell::RefCell;
use std::fs::File;
use std::io::IoSliceMut;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

/// Data that one call of `prefetch` asks for (I8).
pub(crate) const PREFETCH_BYTES_MAX: u64 = 64 << 20;

thread_local! {
    /// Reused by every request of a thread, so that a lookup does not allocate.
    static RUNS: RefCell<Vec<Run>> = const { RefCell::new(Vec::new()) };
}

/// Runs `body` with an empty list of runs that keeps its memory for the next call.
pub(super) fn with_runs<T>(body: impl FnOnce(&mut Vec<Run>) -> T) -> T {
    RUNS.with(|cell| match cell.try_borrow_mut() {
        Ok(mut runs) => {
            runs.clear();
            body(&mut runs)
        }
        Err(_) => body(&mut Vec::new()),
    })
}

/// How a read that has to wait for a backend can go on.
pub(crate) enum ReadPlan<'a> {
    /// All of it is one stretch of one file.
    File(Arc<File>, StartedRead<'a>),
    /// It has several parts, or its layer is no file: `Device::read` is the way.
    Otherwise,
    /// The gate is closed: to be asked again when nothing that this thread started is inside any more.
    GateClosed,
}

/// A read that the caller carries out, at the read's own offset of the file that came with it. It is inside the gate until it is dropped, and holds
/// up a snapshot until then: nothing may be waited for meanwhile but its bytes.
pub(crate) struct StartedRead<'a> {
    device: &'a Device,
    layer: Arc<dyn LayerIo>,
    started_at: Instant,
    _pass: Pass<'a>,
}

impl Drop for StartedRead<'_> {
    fn drop(&mut self) {
        self.device.latencies.backend_read.record(self.started_at.elapsed());
        self.device.counters.backend_reads_running.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Device {
    /// Begins a read that somebody else carries out. `may_wait`: for the gate; only for a thread that has no read inside.
    pub(crate) fn plan_read(&self, offset_bytes: u64, length_bytes: u64, may_wait: bool) -> Result<ReadPlan<'_>> {
        self.unwind_guard("read", || {
            let pass = if may_wait { Some(self.enter()?) } else { self.gate.try_enter().map_err(|_| self.dead_error())? };
            let Some(pass) = pass else { return Ok(ReadPlan::GateClosed) };
            self.check_range(offset_bytes, length_bytes, libc::EINVAL)?;
            let (start_slot, end_slot) = slots_touched(offset_bytes, length_bytes);
            let owner = self.map.lookup(start_slot)?;
            if owner == HOLE || !self.map.is_owned(start_slot, end_slot - start_slot, owner)? {
                return Ok(ReadPlan::Otherwise);
            }
            // One that has to be opened over a network first is nothing for a thread that others wait for.
            let Some(layer) = self.layers.load().reader_at_hand(owner).cloned() else { return Ok(ReadPlan::Otherwise) };
            let Some(file) = layer.ring_file()? else { return Ok(ReadPlan::Otherwise) };
            self.counters.backend_reads_running.fetch_add(1, Ordering::Relaxed);
            Ok(ReadPlan::File(file, StartedRead { device: self, layer, started_at: Instant::now(), _pass: pass }))
        })
    }

    /// Ends a read of which `done_bytes` are in `buffer`; `None`: it failed. What is missing (the file ends inside, or the kernel
    /// stopped half-way) is read here, and so is the error found.
    pub(crate) fn finish_read(&self, read: StartedRead<'_>, offset_bytes: u64, done_bytes: Option<usize>, buffer: &mut [u8]) -> Result<()> {
        self.unwind_guard("read", || {
            if done_bytes != Some(buffer.len()) {
                read.layer.read(offset_bytes, &mut [IoSliceMut::new(buffer)])?;
            }
            self.counters.read_operations.fetch_add(1, Ordering::Relaxed);
            self.counters.read_bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
            Ok(())
        })
    }

    /// Fills `buffer`. Any alignment. `OUT_OF_RANGE` past the end. A read that races with a write returns old or new bytes.
    pub fn read(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<()> {
        self.unwind_guard("read", || {
            let _pass = self.enter()?;
            self.check_range(offset_bytes, buffer.len() as u64, libc::EINVAL)?;
            self.counters.read_operations.fetch_add(1, Ordering::Relaxed);
            self.counters.read_bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
            timed(&self.counters.backend_reads_running, &self.latencies.backend_read, || self.read_inside(offset_bytes, buffer))
        })
    }

    /// As `read`, but only from what is at hand: false, with anything in the buffer and nothing counted, if a backend would have to
    /// be waited for.
    pub fn read_now(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<bool> {
        self.unwind_guard("read", || {
            let _pass = self.enter()?;
            self.check_range(offset_bytes, buffer.len() as u64, libc::EINVAL)?;
            if !self.read_parts(offset_bytes, buffer, |owner, at, part| self.read_now_from(owner, at, part))? {
                return Ok(false);
            }
            self.counters.read_operations.fetch_add(1, Ordering::Relaxed);
            self.counters.read_bytes.fetch_add(buffer.len() as u64, Ordering::Relaxed);
            Ok(true)
        })
    }

    /// Reads without asking the gate: the caller is inside, or nobody else is.
    pub(super) fn read_inside(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<()> {
        self.read_parts(offset_bytes, buffer, |owner, at, part| self.read_from(owner, at, part).map(|()| true)).map(|_| ())
    }

    /// Calls `read` for each run of one owner, until one is not read (false).
    #[inline]
    fn read_parts(&self, offset_bytes: u64, buffer: &mut [u8], read: impl Fn(u32, u64, &mut [u8]) -> Result<bool>) -> Result<bool> {
        if buffer.is_empty() {
            return Ok(true);
        }
        let (start_slot, end_slot) = slots_touched(offset_bytes, buffer.len() as u64);
        let owner = self.map.lookup(start_slot)?;
        if end_slot - start_slot == 1 || self.map.is_owned(start_slot, end_slot - start_slot, owner)? {
            return read(owner, offset_bytes, buffer);
        }
        with_runs(|runs| {
            self.map.lookup_runs(start_slot, end_slot - start_slot, runs)?;
            let mut rest = buffer;
            let mut at = offset_bytes;
            for run in runs.iter() {
                let run_end = (run.start_slot + run.slot_count) * SLOT_BYTES;
                let length = (run_end - at).min(rest.len() as u64) as usize;
                let (part, tail) = rest.split_at_mut(length);
                if !read(run.owner, at, part)? {
                    return Ok(false);
                }
                at += length as u64;
                rest = tail;
            }
            debug_assert!(rest.is_empty(), "lookup_runs covers the range exactly");
            Ok(true)
        })
    }

    #[inline]
    pub(super) fn read_from(&self, owner: u32, offset_bytes: u64, buffer: &mut [u8]) -> Result<()> {
        if owner == HOLE {
            buffer.fill(0);
            return Ok(());
        }
        let layers = self.layers.load();
        layers.reader(owner)?.read(offset_bytes, &mut [IoSliceMut::new(buffer)])?;
        Ok(())
    }

    #[inline]
    fn read_now_from(&self, owner: u32, offset_bytes: u64, buffer: &mut [u8]) -> Result<bool> {
        if owner == HOLE {
            buffer.fill(0);
            return Ok(true);
        }
        let layers = self.layers.load();
        match layers.reader_at_hand(owner) {
            Some(layer) => Ok(layer.read_now(offset_bytes, buffer)?),
            // To be opened, or unknown: whoever may wait finds out.
            None => Ok(false),
        }
    }

    /// Asks the backend to have the range's data at hand soon, `PREFETCH_BYTES_MAX` of it at most. A hint: nothing depends on it.
    pub fn prefetch(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        self.unwind_guard("prefetch", || {
            let _pass = self.enter()?;
            self.check_range(offset_bytes, length_bytes, libc::EINVAL)?;
            let end_bytes = offset_bytes + length_bytes;
            let mut left_bytes = PREFETCH_BYTES_MAX;
            let mut at = offset_bytes;
            // In windows, so that the list of runs stays short.
            while at < end_bytes && left_bytes > 0 {
                let until = end_bytes.min(at + PREFETCH_BYTES_MAX);
                let (start_slot, end_slot) = slots_touched(at, until - at);
                with_runs(|runs| {
                    self.map.lookup_runs(start_slot, end_slot - start_slot, runs)?;
                    let layers = self.layers.load();
                    for run in runs.iter().filter(|run| run.owner != HOLE) {
                        let from = (run.start_slot * SLOT_BYTES).max(at);
                        let length = (((run.start_slot + run.slot_count) * SLOT_BYTES).min(until) - from).min(left_bytes);
                        if length > 0 {
                            layers.reader(run.owner)?.prefetch(from, length)?;
                        }
                        left_bytes -= length;
                    }
                    Ok::<(), crate::EngineError>(())
                })?;
                at = until;
            }
            Ok(())
        })
    }
}
