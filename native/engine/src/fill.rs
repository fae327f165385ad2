//! Pieces of a sealed layer into a replica of it in another store.
//!
//! Rules
//! - The source does not change meanwhile, and nobody reads what is filled of the target; the target has zeros there, or the right
//!   bytes already. So what reads as zeros is not written, and a piece that a crash interrupted is simply filled again.
//! - Between its read and its write every 64 KiB gets a hash. When it is durable it is read back, past the caches of this machine, and
//!   compared: what a call reports as copied is in the target, and right.
//! - What can be shared with the source instead (`LayerIo::clone_range`) is neither read nor compared: no byte of it is moved. The
//!   first range that cannot ends that for the call.
//! - Pieces are taken in order and each that was taken is finished, or the call fails: so one slot says how far it came.
//! - Everything is bounded (I8): the threads, a buffer for each of them, and hashes of what a call may copy.
use crate::copy::{is_zero, write_data_runs};
use crate::{CopyReport, EngineError, LayerSpec, Result};
use atoll_io::{Extent, LayerIo, OpenMode};
use atoll_map::{Run, SLOT_BYTES};
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::time::{Duration, Instant};
use twox_hash::XxHash3_128;

/// Bytes that a thread moves at a time; a divisor of what backends keep together (an object of a cluster has 4 MiB).
const PIECE_BYTES: u64 = 1 << 20;
/// The same where a rate is to be held that is lower than a few of those in a second.
const PIECE_BYTES_MIN: u64 = 64 << 10;
/// Stretches in one piece: of a layer of which single slots are referred to.
const PIECE_RANGES_MAX: usize = 256;
/// Bytes under one hash.
const HASHED_BYTES: usize = 64 << 10;
/// What is written is synced and compared in steps of this, while the rest is being copied.
const SYNC_BYTES: u64 = 32 << 20;
/// Extents are asked for in steps of this.
const WINDOW_BYTES: u64 = 1 << 30;
/// Bytes shared with the source in one request.
const CLONE_BYTES: u64 = 1 << 30;
/// Bytes that one call copies at most, whatever it is asked for: bounds the hashes.
const CALL_BYTES_MAX: u64 = 4 << 30;

/// Threads that keep disks of this machine busy, and that keep a network busy.
const LOCAL_THREAD_COUNT: usize = 3;
const NETWORK_THREAD_COUNT: usize = 16;

/// How soon a cancellation is seen by who waits.
const CANCEL_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// What is filled, and how much of it by one call.
pub struct FillSpec<'a> {
    /// The layer, sealed, in the store that has it.
    pub source: &'a LayerSpec,
    /// The replica; no device writes it.
    pub target: &'a LayerSpec,
    /// The slots that the replica is to have: ascending, not overlapping. Who owns them does not matter.
    pub runs: &'a [Run],
    /// Those before it are there.
    pub from_slot: u64,
    /// No further piece is begun when this much was copied. What is shared instead does not count.
    pub bytes_max: u64,
    /// No further piece is begun after this time.
    pub time_max: Duration,
    /// Blocks are shared where both stores can do that.
    pub may_offload: bool,
    /// Bytes copied in a second, on the average of the call; 0: unlimited.
    pub bytes_per_second: u64,
}

/// What a call did. The first three together are the slots from `from_slot` to `next_slot`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct FillReport {
    /// Where the next call goes on; `None`: everything is there.
    pub next_slot: Option<u64>,
    /// Bytes written.
    pub copied_bytes: u64,
    /// Bytes that share their blocks with the source.
    pub offloaded_bytes: u64,
    /// Bytes that are zero, and were not written.
    pub zero_bytes: u64,
    /// Bytes read back and compared: those copied, and zeros between them.
    pub verified_bytes: u64,
}

/// Fills a piece of a replica; durable on return. At least one piece is done however small the limits are.
///
/// Errors: `NO_SPACE`, `IO_ERROR`, … of the stores (`side` says whose), `VERIFY_FAILED` if the target does not have what was written,
/// `ENGINE_CLOSED` if `cancelled` says so. Any part of the slots from `from_slot` on may have been filled then.
pub fn fill_piece(spec: &FillSpec<'_>, cancelled: &(dyn Fn() -> bool + Sync)) -> Result<FillReport> {
    let open = |layer: &LayerSpec, mode, side| layer.store.open_layer(layer.id, mode).map_err(|error| of_side(error, spec, side));
    let source = open(spec.source, OpenMode::ReadOnly, "source")?;
    let target = open(spec.target, OpenMode::ReadWrite, "target")?;
    let mut data = DataOf::new(spec, source)?;
    let started_at = Instant::now();
    let mut report = FillReport::default();
    if spec.may_offload {
        share(spec, &mut data, &*target, started_at, cancelled, &mut report)?;
    }
    let is_network = [spec.source, spec.target].iter().any(|layer| layer.store.capabilities().waits_for_network);
    let thread_count = if is_network { NETWORK_THREAD_COUNT } else { LOCAL_THREAD_COUNT };
    Copy {
        spec,
        source: data.source.clone(),
        target,
        started_at,
        piece_bytes: piece_bytes(spec.bytes_per_second),
        cancelled,
        state: Mutex::new(State::after_sharing(data, report)),
        changed: Condvar::new(),
    }
    .run(thread_count)
}

/// The first part of a call: what both sides can have without moving it.
fn share(
    spec: &FillSpec<'_>,
    data: &mut DataOf,
    target: &dyn LayerIo,
    started_at: Instant,
    cancelled: &dyn Fn() -> bool,
    report: &mut FillReport,
) -> Result<()> {
    let source = data.source.clone();
    // A file ends inside a block, and only whole ones can be shared.
    let whole_end = data.length_bytes / SLOT_BYTES * SLOT_BYTES;
    loop {
        if cancelled() {
            return Err(cancelled_error());
        }
        if report.offloaded_bytes > 0 && started_at.elapsed() >= spec.time_max {
            return Ok(());
        }
        match data.step(CLONE_BYTES, CLONE_BYTES).map_err(|error| of_side(error, spec, "source"))? {
            Step::Passed => {}
            Step::End => return Ok(()),
            Step::Data(from, until) => {
                let end = until.min(whole_end).max(from);
                let is_shared =
                    end > from && target.clone_range(&*source, from, end - from).map_err(|error| of_side(error, spec, "target"))?;
                let rest_from = if is_shared { end } else { from };
                report.offloaded_bytes += rest_from - from;
                if rest_from < until {
                    data.give_back(rest_from, until);
                    return Ok(());
                }
            }
        }
    }
}

fn piece_bytes(bytes_per_second: u64) -> u64 {
    if bytes_per_second == 0 { PIECE_BYTES } else { (bytes_per_second / 8).next_power_of_two().clamp(PIECE_BYTES_MIN, PIECE_BYTES) }
}

/// What is left to be filled, and which of it is data in the source.
struct DataOf {
    source: Arc<dyn LayerIo>,
    /// Of the source.
    length_bytes: u64,
    /// In bytes; neighbours are one.
    ranges: VecDeque<(u64, u64)>,
    /// Everything before it was handed out or is zero.
    at: u64,
    /// Of the first range, up to `window_end`, in whole slots.
    extents: VecDeque<(u64, u64)>,
    window_end: u64,
    zero_bytes: u64,
}

enum Step {
    /// From here to there: data.
    Data(u64, u64),
    /// Nothing there; there may be more.
    Passed,
    End,
}

impl DataOf {
    fn new(spec: &FillSpec<'_>, source: Arc<dyn LayerIo>) -> Result<DataOf> {
        let length_bytes = source.length_bytes().map_err(|error| of_side(error, spec, "source"))?;
        let mut ranges: VecDeque<(u64, u64)> = VecDeque::new();
        for run in spec.runs {
            let (from, until) = (run.start_slot.max(spec.from_slot) * SLOT_BYTES, (run.start_slot + run.slot_count) * SLOT_BYTES);
            match ranges.back_mut() {
                _ if until <= from => {}
                Some(last) if last.1 == from => last.1 = until,
                _ => ranges.push_back((from, until)),
            }
        }
        let at = ranges.front().map_or(0, |first| first.0);
        Ok(DataOf { source, length_bytes, ranges, at, extents: VecDeque::new(), window_end: at, zero_bytes: 0 })
    }

    /// The next stretch of data: at most `bytes_max`, and not across a multiple of `unit_bytes`.
    fn step(&mut self, unit_bytes: u64, bytes_max: u64) -> atoll_io::Result<Step> {
        let Some(&(_, end)) = self.ranges.front() else { return Ok(Step::End) };
        if self.extents.is_empty() && self.at == self.window_end && self.at < end {
            self.ask(end)?;
        }
        if let Some((from, until)) = self.extents.pop_front() {
            let cut = until.min(from + bytes_max).min((from / unit_bytes + 1) * unit_bytes);
            if cut < until {
                self.extents.push_front((cut, until));
            }
            self.zero_bytes += from - self.at;
            self.at = cut;
            return Ok(Step::Data(from, cut));
        }
        self.zero_bytes += self.window_end - self.at;
        self.at = self.window_end;
        if self.at == end {
            self.ranges.pop_front();
            self.at = self.ranges.front().map_or(end, |next| next.0);
            self.window_end = self.at;
        }
        Ok(Step::Passed)
    }

    /// Learns what is data in the next window.
    fn ask(&mut self, end: u64) -> atoll_io::Result<()> {
        if self.at >= self.length_bytes {
            self.window_end = end;
            return Ok(());
        }
        self.window_end = end.min(self.at + WINDOW_BYTES);
        let mut found: Vec<Extent> = Vec::new();
        self.source.extents(self.at, self.window_end - self.at, &mut found)?;
        let mut from_min = self.at;
        for extent in found.iter().filter(|extent| extent.data) {
            let from = (extent.offset_bytes / SLOT_BYTES * SLOT_BYTES).max(from_min);
            let until = (extent.offset_bytes + extent.length_bytes).next_multiple_of(SLOT_BYTES).min(self.window_end);
            if from < until {
                self.extents.push_back((from, until));
                from_min = until;
            }
        }
        Ok(())
    }

    /// The end of what `step` returned last was not used.
    fn give_back(&mut self, from: u64, until: u64) {
        self.extents.push_front((from, until));
        self.at = from;
    }

    /// Stretches that are moved together; empty: there may be more. `None`: that was all.
    fn next_piece(&mut self, piece_bytes: u64) -> atoll_io::Result<Option<Vec<(u64, u64)>>> {
        let mut piece = Vec::new();
        let mut left_bytes = piece_bytes;
        // Also bounds how long others wait for theirs.
        for _ in 0..PIECE_RANGES_MAX {
            match self.step(piece_bytes, left_bytes)? {
                Step::Passed => {}
                Step::End if piece.is_empty() => return Ok(None),
                Step::End => break,
                Step::Data(from, until) => {
                    piece.push((from, until));
                    left_bytes -= until - from;
                    if left_bytes == 0 {
                        break;
                    }
                }
            }
        }
        Ok(Some(piece))
    }

    fn next_slot(&self) -> Option<u64> {
        (!self.ranges.is_empty()).then_some(self.at / SLOT_BYTES)
    }
}

/// What some bytes of the source were when they were read.
struct Check {
    offset_bytes: u64,
    length: usize,
    hash: u128,
}

enum Job {
    Copy(Vec<(u64, u64)>),
    /// Makes durable what was written, so that the list can be compared.
    Sync(Vec<Check>),
    Verify(Vec<Check>),
}

/// Who does what, and what came of it.
struct State {
    data: DataOf,
    report: FillReport,
    /// No further piece is begun.
    is_over: bool,
    has_progress: bool,
    taken_bytes: u64,
    copying_count: usize,
    /// The target has something that was not synced.
    is_dirty: bool,
    is_syncing: bool,
    unsynced: Vec<Check>,
    unsynced_bytes: u64,
    unverified: VecDeque<Vec<Check>>,
    verifying_count: usize,
    /// The first failure.
    failed: Option<EngineError>,
}

impl State {
    fn after_sharing(data: DataOf, report: FillReport) -> State {
        State {
            data,
            report,
            is_over: false,
            has_progress: report.offloaded_bytes > 0,
            taken_bytes: 0,
            copying_count: 0,
            is_dirty: report.offloaded_bytes > 0,
            is_syncing: false,
            unsynced: Vec::new(),
            unsynced_bytes: 0,
            unverified: VecDeque::new(),
            verifying_count: 0,
            failed: None,
        }
    }

    /// What was begun is over, and nothing else is to be.
    fn is_done(&self) -> bool {
        self.failed.is_some()
            || (self.is_over
                && self.copying_count == 0
                && !self.is_dirty
                && !self.is_syncing
                && self.unverified.is_empty()
                && self.verifying_count == 0)
    }
}

/// The second part of a call: several threads read, write, sync and compare.
struct Copy<'a> {
    spec: &'a FillSpec<'a>,
    source: Arc<dyn LayerIo>,
    target: Arc<dyn LayerIo>,
    started_at: Instant,
    piece_bytes: u64,
    cancelled: &'a (dyn Fn() -> bool + Sync),
    state: Mutex<State>,
    changed: Condvar,
}

/// A thread that ends without having said how is a failure that the others must see, or they would wait for it for ever.
struct Working<'a, 'b>(&'b Copy<'a>);

impl Drop for Working<'_, '_> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.fail(EngineError::new("ENGINE_PANIC", libc::EIO, "the engine failed while it filled a layer"));
        }
    }
}

impl Copy<'_> {
    fn run(self, thread_count: usize) -> Result<FillReport> {
        std::thread::scope(|scope| {
            // This one works, too: without any other it takes longer.
            for _ in 1..thread_count {
                let started = std::thread::Builder::new().name("atoll-fill".to_owned()).spawn_scoped(scope, || self.work());
                if started.is_err() {
                    break;
                }
            }
            self.work();
        });
        let Copy { state, spec, started_at, cancelled, .. } = self;
        let State { data, mut report, taken_bytes, failed, .. } = state.into_inner();
        if let Some(error) = failed {
            return Err(error);
        }
        // The rate holds from call to call.
        let due = started_at + due_after(taken_bytes, spec.bytes_per_second);
        while let Some(left) = due.checked_duration_since(Instant::now()).filter(|left| !left.is_zero()) {
            if cancelled() {
                return Err(cancelled_error());
            }
            std::thread::sleep(left.min(CANCEL_CHECK_INTERVAL));
        }
        report.next_slot = data.next_slot();
        report.zero_bytes += data.zero_bytes;
        Ok(report)
    }

    fn work(&self) {
        let _working = Working(self);
        let mut buffer = Vec::new();
        while let Some(job) = self.next_job() {
            let result = match job {
                Job::Copy(piece) => self.copy(&piece, &mut buffer),
                Job::Sync(checks) => self.sync(checks),
                Job::Verify(checks) => self.verify(&checks, &mut buffer),
            };
            if let Err(error) = result {
                self.fail(error);
            }
        }
    }

    fn fail(&self, error: EngineError) {
        self.state.lock().failed.get_or_insert(error);
        self.changed.notify_all();
    }

    /// What is to be done next; waits where others have to be done first. `None`: nothing any more.
    fn next_job(&self) -> Option<Job> {
        let mut state = self.state.lock();
        loop {
            if state.is_done() {
                self.changed.notify_all();
                return None;
            }
            if (self.cancelled)() {
                state.failed = Some(cancelled_error());
                continue;
            }
            if let Some(checks) = state.unverified.pop_front() {
                state.verifying_count += 1;
                return Some(Job::Verify(checks));
            }
            let is_last = state.is_over && state.copying_count == 0;
            if state.is_dirty && !state.is_syncing && (is_last || state.unsynced_bytes >= SYNC_BYTES) {
                (state.is_syncing, state.is_dirty, state.unsynced_bytes) = (true, false, 0);
                return Some(Job::Sync(std::mem::take(&mut state.unsynced)));
            }
            let due = due_after(state.taken_bytes, self.spec.bytes_per_second);
            if !state.is_over && self.started_at.elapsed() >= due {
                match self.next_piece(&mut state) {
                    Ok(Some(piece)) => return Some(Job::Copy(piece)),
                    Ok(None) => {}
                    Err(error) => state.failed = Some(of_side(error, self.spec, "source")),
                }
                continue;
            }
            let until_due = due.saturating_sub(self.started_at.elapsed()).max(Duration::from_millis(1));
            let wait = if state.is_over { CANCEL_CHECK_INTERVAL } else { until_due.min(CANCEL_CHECK_INTERVAL) };
            self.changed.wait_for(&mut state, wait);
        }
    }

    /// `None`: ask again, or it is over.
    fn next_piece(&self, state: &mut State) -> atoll_io::Result<Option<Vec<(u64, u64)>>> {
        let bytes_max = self.spec.bytes_max.min(CALL_BYTES_MAX);
        let is_enough = state.taken_bytes >= bytes_max || self.started_at.elapsed() >= self.spec.time_max;
        if state.has_progress && is_enough {
            state.is_over = true;
            return Ok(None);
        }
        match state.data.next_piece(self.piece_bytes)? {
            None => state.is_over = true,
            Some(piece) if piece.is_empty() => state.has_progress = true,
            Some(piece) => {
                state.has_progress = true;
                state.taken_bytes += piece.iter().map(|(from, until)| until - from).sum::<u64>();
                state.copying_count += 1;
                return Ok(Some(piece));
            }
        }
        Ok(None)
    }

    fn copy(&self, piece: &[(u64, u64)], buffer: &mut Vec<u8>) -> Result<()> {
        let mut checks = Vec::new();
        let mut moved = CopyReport::default();
        for &(from, until) in piece {
            buffer.resize((until - from) as usize, 0);
            self.source.read(from, &mut [IoSliceMut::new(buffer)]).map_err(|error| of_side(error, self.spec, "source"))?;
            for (index, bytes) in buffer.chunks(HASHED_BYTES).enumerate() {
                let offset_bytes = from + (index * HASHED_BYTES) as u64;
                checks.push(Check { offset_bytes, length: bytes.len(), hash: XxHash3_128::oneshot(bytes) });
            }
            if is_zero(buffer) {
                moved.zero_bytes += until - from;
                continue;
            }
            write_data_runs(from, buffer, &mut moved, &mut |at, bytes| {
                self.target.write(at, &[IoSlice::new(bytes)]).map_err(|error| of_side(error, self.spec, "target"))
            })?;
        }
        let mut state = self.state.lock();
        state.report.copied_bytes += moved.data_bytes;
        state.report.zero_bytes += moved.zero_bytes;
        state.unsynced_bytes += moved.data_bytes + moved.zero_bytes;
        state.unsynced.extend(checks);
        state.is_dirty = true;
        state.copying_count -= 1;
        self.changed.notify_all();
        Ok(())
    }

    fn sync(&self, checks: Vec<Check>) -> Result<()> {
        let synced = self.target.sync().and_then(|()| {
            // What is read back is what the backend has, also where a sync before this call has failed (I6).
            self.target.drop_cache()
        });
        synced.map_err(|error| of_side(error, self.spec, "target"))?;
        let mut checks = checks.into_iter().peekable();
        let mut state = self.state.lock();
        while checks.peek().is_some() {
            state.unverified.push_back(checks.by_ref().take(PIECE_BYTES as usize / HASHED_BYTES).collect());
        }
        state.is_syncing = false;
        self.changed.notify_all();
        Ok(())
    }

    fn verify(&self, checks: &[Check], buffer: &mut Vec<u8>) -> Result<()> {
        let mut rest = checks;
        while let Some(first) = rest.first() {
            // What lies together is read together.
            let mut end_bytes = first.offset_bytes;
            let together = rest.iter().take_while(|check| {
                let follows = check.offset_bytes == end_bytes;
                end_bytes += if follows { check.length as u64 } else { 0 };
                follows
            });
            let (stretch, others) = rest.split_at(together.count());
            buffer.resize((end_bytes - first.offset_bytes) as usize, 0);
            self.target.read(first.offset_bytes, &mut [IoSliceMut::new(buffer)]).map_err(|error| of_side(error, self.spec, "target"))?;
            let mut bytes = &buffer[..];
            for check in stretch {
                let (own, behind) = bytes.split_at(check.length);
                if XxHash3_128::oneshot(own) != check.hash {
                    return Err(self.verify_error(check));
                }
                bytes = behind;
            }
            rest = others;
        }
        let mut state = self.state.lock();
        state.report.verified_bytes += checks.iter().map(|check| check.length as u64).sum::<u64>();
        state.verifying_count -= 1;
        self.changed.notify_all();
        Ok(())
    }

    fn verify_error(&self, check: &Check) -> EngineError {
        let (id, offset_bytes, length) = (self.spec.source.id, check.offset_bytes, check.length);
        let message = format!(
            "layer {id}: the {length} bytes at {offset_bytes} that were copied are not what the target returns when they are read back"
        );
        EngineError::new("VERIFY_FAILED", libc::EIO, message)
            .with("layerId", id)
            .with("offsetBytes", offset_bytes)
            .with("lengthBytes", length)
            .with("side", "target")
    }
}

/// How long so many bytes take at a rate.
fn due_after(bytes: u64, bytes_per_second: u64) -> Duration {
    if bytes_per_second == 0 { Duration::ZERO } else { Duration::from_secs_f64(bytes as f64 / bytes_per_second as f64) }
}

fn cancelled_error() -> EngineError {
    EngineError::new("ENGINE_CLOSED", libc::ESHUTDOWN, "the copy was stopped: the engine is closing")
}

fn of_side(error: atoll_io::IoError, spec: &FillSpec<'_>, side: &'static str) -> EngineError {
    EngineError::from(error).with("layerId", spec.source.id).with("side", side)
}

#[cfg(test)]
mod tests {
    use super::*;
    use atoll_io::{FaultPlan, FaultRule, FaultStore, LayerId, MemoryStore, Store};
    use std::sync::atomic::{AtomicBool, Ordering};

    const SLOT: u64 = SLOT_BYTES;
    const MIB: u64 = 1 << 20;
    const ID: LayerId = LayerId([7; 16]);

    fn layer(store: Arc<dyn Store>) -> LayerSpec {
        LayerSpec { alias: 1, id: ID, store }
    }

    fn memory_layer() -> LayerSpec {
        let store: Arc<dyn Store> = Arc::new(MemoryStore::new(1 << 30, false));
        store.create_layer(ID).unwrap();
        layer(store)
    }

    fn write(layer: &LayerSpec, at: u64, bytes: &[u8]) {
        layer.store.open_layer(ID, OpenMode::ReadWrite).unwrap().write(at, &[IoSlice::new(bytes)]).unwrap();
    }

    fn read(layer: &LayerSpec, at: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0xee; length];
        layer.store.open_layer(ID, OpenMode::ReadOnly).unwrap().read(at, &mut [IoSliceMut::new(&mut bytes)]).unwrap();
        bytes
    }

    /// Bytes that are nowhere zero, nor the same in two slots.
    fn pattern(length: u64, seed: u64) -> Vec<u8> {
        (0..length).map(|at| ((at / SLOT * 31 + at * 7 + seed) % 255) as u8 + 1).collect()
    }

    fn run(start_slot: u64, slot_count: u64) -> Run {
        Run { start_slot, slot_count, owner: 9 }
    }

    fn rule(operation: &str) -> FaultRule {
        FaultRule {
            operation: operation.to_owned(),
            layer: None,
            skip_count: 0,
            apply_count: u64::MAX,
            probability_of_256: 256,
            errno: libc::EIO,
            delay_ms: 0,
            tear: false,
        }
    }

    fn spec<'a>(source: &'a LayerSpec, target: &'a LayerSpec, runs: &'a [Run]) -> FillSpec<'a> {
        FillSpec {
            source,
            target,
            runs,
            from_slot: 0,
            bytes_max: u64::MAX,
            time_max: Duration::from_secs(3600),
            may_offload: true,
            bytes_per_second: 0,
        }
    }

    fn fill(spec: &FillSpec<'_>) -> Result<FillReport> {
        fill_piece(spec, &|| false)
    }

    /// Calls that go on where the last one ended, with what they did together.
    fn fill_all<'a>(mut next: FillSpec<'a>) -> (FillReport, usize) {
        let mut sum = FillReport::default();
        let mut call_count = 0;
        loop {
            let report = fill(&next).unwrap();
            call_count += 1;
            sum.copied_bytes += report.copied_bytes;
            sum.offloaded_bytes += report.offloaded_bytes;
            sum.zero_bytes += report.zero_bytes;
            sum.verified_bytes += report.verified_bytes;
            let Some(slot) = report.next_slot else { return (sum, call_count) };
            assert!(slot > next.from_slot, "every call gets further");
            next.from_slot = slot;
        }
    }

    #[test]
    fn what_is_referred_to_is_copied_and_nothing_else() {
        let (source, target) = (memory_layer(), memory_layer());
        let bytes = pattern(5 * MIB, 1);
        write(&source, 0, &bytes);
        let runs = [run(1, 2), run(3, 300), run(400, 1), run(1000, 280)];
        let (report, _) = fill_all(spec(&source, &target, &runs));
        let copied_bytes = runs.iter().map(|run| run.slot_count * SLOT).sum();
        assert_eq!(report, FillReport { copied_bytes, verified_bytes: copied_bytes, ..FillReport::default() });
        let mut wanted = vec![0; bytes.len()];
        for run in runs {
            let range = (run.start_slot * SLOT) as usize..((run.start_slot + run.slot_count) * SLOT) as usize;
            wanted[range.clone()].copy_from_slice(&bytes[range]);
        }
        assert!(read(&target, 0, bytes.len()) == wanted);
        assert_eq!(target.store.layer_entry(ID).unwrap().unwrap().allocated_bytes, copied_bytes);
    }

    #[test]
    fn holes_and_zero_blocks_take_nothing_and_are_counted() {
        let (source, target) = (memory_layer(), memory_layer());
        write(&source, 0, &pattern(MIB, 1));
        write(&source, MIB, &vec![0; MIB as usize]);
        write(&source, 2 * MIB + 3 * SLOT, &pattern(SLOT, 2));
        // The layer ends inside a slot.
        write(&source, 40 * MIB, &[5; 100]);
        let (report, _) = fill_all(spec(&source, &target, &[run(0, 100 * MIB / SLOT)]));
        assert_eq!(report.copied_bytes, MIB + 2 * SLOT);
        assert_eq!(report.copied_bytes + report.zero_bytes, 100 * MIB);
        assert_eq!(target.store.layer_entry(ID).unwrap().unwrap().allocated_bytes, MIB + 2 * SLOT);
        assert!(read(&target, 0, 41 << 20) == read(&source, 0, 41 << 20));
    }

    #[test]
    fn calls_end_where_they_are_told_and_the_next_goes_on_there() {
        let (source, target) = (memory_layer(), memory_layer());
        write(&source, 0, &pattern(20 * MIB, 3));
        let runs: Vec<Run> = (0..2000).map(|index| run(index * 2, 1)).chain([run(4000, 1120)]).collect();
        let (report, call_count) = fill_all(FillSpec { bytes_max: 2 * MIB, ..spec(&source, &target, &runs) });
        let wanted = runs.iter().map(|run| run.slot_count * SLOT).sum::<u64>();
        assert_eq!((report.copied_bytes, report.verified_bytes), (wanted, wanted));
        assert!((5..=7).contains(&call_count), "{call_count} calls for {wanted} bytes");
        for run in &runs {
            let (at, length) = (run.start_slot * SLOT, (run.slot_count * SLOT) as usize);
            assert!(read(&target, at, length) == read(&source, at, length));
        }
        // However short the time is, something is done.
        let again = memory_layer();
        let (report, _) = fill_all(FillSpec { time_max: Duration::ZERO, ..spec(&source, &again, &[run(0, 20 * MIB / SLOT)]) });
        assert_eq!(report.copied_bytes, 20 * MIB);
    }

    #[test]
    fn what_another_call_filled_already_may_be_filled_again() {
        let (source, target) = (memory_layer(), memory_layer());
        write(&source, 0, &pattern(3 * MIB, 3));
        for _ in 0..2 {
            assert_eq!(fill(&spec(&source, &target, &[run(0, 768)])).unwrap().copied_bytes, 3 * MIB);
        }
        assert!(read(&target, 0, 3 << 20) == pattern(3 * MIB, 3));
    }

    #[test]
    fn a_rate_is_held_over_the_whole_call() {
        let (source, target) = (memory_layer(), memory_layer());
        write(&source, 0, &pattern(2 * MIB, 4));
        let started_at = Instant::now();
        let report = fill(&FillSpec { bytes_per_second: 8 * MIB, ..spec(&source, &target, &[run(0, 512)]) }).unwrap();
        assert_eq!(report.copied_bytes, 2 * MIB);
        assert!(started_at.elapsed() >= Duration::from_millis(250));
    }

    #[test]
    fn a_target_that_returns_other_bytes_is_found_out() {
        let (source, target) = (memory_layer(), memory_layer());
        write(&source, 0, &pattern(4 * MIB, 5));
        let forgetful = Arc::new(FaultStore::new(target.store.clone()));
        forgetful.set_plan(FaultPlan { seed: 1, rules: vec![FaultRule { skip_count: 2, apply_count: 1, ..rule("lose-write") }] });
        let wrong = layer(forgetful);
        let error = fill(&spec(&source, &wrong, &[run(0, 1024)])).unwrap_err();
        assert_eq!(error.code, "VERIFY_FAILED");
        let value = |name| error.values.iter().find(|value| value.0 == name).unwrap().1.clone();
        assert_eq!((value("layerId"), value("side")), (ID.to_string(), "target".to_owned()));
        // Which of the four pieces was the third to be written is not known, but it is the beginning of one.
        assert_eq!(value("offsetBytes").parse::<u64>().unwrap() % MIB, 0);
        // Zeros between data are compared, too: bytes that somebody else left there are no zeros.
        let dirty = memory_layer();
        let sparse = memory_layer();
        write(&sparse, 0, &pattern(SLOT, 1));
        write(&sparse, SLOT, &[0; 4096]);
        write(&dirty, SLOT, &[1]);
        assert_eq!(fill(&spec(&sparse, &dirty, &[run(0, 2)])).unwrap_err().code, "VERIFY_FAILED");
    }

    #[test]
    fn a_failure_says_whose_it_is() {
        for (operation, of_source) in [("read", true), ("write", false), ("sync", false), ("open", false), ("read", false)] {
            let (source, target) = (memory_layer(), memory_layer());
            write(&source, 0, &pattern(40 * MIB, 5));
            let faulty = Arc::new(FaultStore::new(if of_source { source.store.clone() } else { target.store.clone() }));
            let (skip_count, errno) = if operation == "write" { (3, libc::ENOSPC) } else { (0, libc::EIO) };
            faulty.set_plan(FaultPlan { seed: 1, rules: vec![FaultRule { skip_count, errno, ..rule(operation) }] });
            let (from, to) = if of_source { (layer(faulty), target) } else { (source, layer(faulty)) };
            let error = fill(&spec(&from, &to, &[run(0, 40 * 256)])).unwrap_err();
            let side = &error.values.iter().find(|value| value.0 == "side").unwrap().1;
            assert_eq!(error.code, if operation == "write" { "NO_SPACE" } else { "IO_ERROR" }, "{operation}");
            assert_eq!(side, if of_source { "source" } else { "target" }, "{operation}");
        }
    }

    #[test]
    fn it_ends_soon_after_it_is_cancelled_also_where_it_waits_for_its_rate() {
        let (source, target) = (memory_layer(), memory_layer());
        write(&source, 0, &pattern(8 * MIB, 5));
        let is_cancelled = AtomicBool::new(false);
        let runs = [run(0, 2048)];
        let slow = FillSpec { bytes_per_second: 1 << 16, ..spec(&source, &target, &runs) };
        std::thread::scope(|scope| {
            let filling = scope.spawn(|| fill_piece(&slow, &|| is_cancelled.load(Ordering::Relaxed)));
            while read(&target, 0, 1) == [0] {
                std::thread::yield_now();
            }
            is_cancelled.store(true, Ordering::Relaxed);
            assert_eq!(filling.join().unwrap().unwrap_err().code, "ENGINE_CLOSED");
        });
    }

    #[test]
    fn what_is_copied_is_durable() {
        let recording = Arc::new(MemoryStore::new(1 << 30, true));
        recording.create_layer(ID).unwrap();
        let (source, target) = (memory_layer(), layer(recording.clone()));
        write(&source, 0, &pattern(3 * MIB, 6));
        fill(&spec(&source, &target, &[run(0, 768)])).unwrap();
        let options = atoll_io::CrashOptions { keep_of_256: 0, tear: false, reorder: false };
        let after = layer(Arc::new(recording.crash_image(recording.sequence(), 1, options)));
        assert!(read(&after, 0, 3 << 20) == pattern(3 * MIB, 6));
    }
}
