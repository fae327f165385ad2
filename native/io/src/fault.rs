//! A store around a store that fails on purpose, from a seed.
//!
//! - A failed call never reaches the inner store, but for a torn write or append, of which a part does.
//! - A failed sync makes nothing durable. What became of the unsynced bytes is unknown then, as it is with the kernel: over the
//!   memory kind they stay doubtful, so that crash images show them kept, lost and torn.
//! - A delay comes before the operation, so that it takes effect late; the delay of a sync comes after it, so that a write which
//!   completes while the sync is under way is not made durable by it.
//! - A write that is lost is no failure to whoever wrote: only reading it back shows it.
//! - Nothing goes round the rules: a layer opened through this store gives no file away, but for reads that a rule makes wait and
//!   none can hit.
use crate::error::{layer_object, segment_object};
use crate::random::Random;
use crate::{
    Extent, IoError, JournalWriter, LayerEntry, LayerId, LayerIo, OpenMode, Result, SegmentIo, Store, StoreCapabilities, StoreHealth,
    StoreLock, StoreUsage,
};
use parking_lot::{Condvar, Mutex};
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

const SECTOR_BYTES: u64 = 512;

/// One way to fail.
#[derive(Debug, Clone)]
pub struct FaultRule {
    /// "read" (layers and segments), "write", "punch", "zero", "sync", "append", "truncate", "segment-sync", "create" and "remove"
    /// (layers and segments), "open" (layers and segments), "record-read", "record-write", "record-list", "record-remove". A rule
    /// for "read-now" makes every read of a layer one that has to wait, and nothing else. What a rule for "lose-write" hits is
    /// answered as done and was not.
    pub operation: String,
    /// Only for this layer (or its journal), if given.
    pub layer: Option<crate::LayerId>,
    /// Skip this many matching calls first.
    pub skip_count: u64,
    /// Then apply to this many (u64::MAX: for ever).
    pub apply_count: u64,
    /// Out of 256 matching calls, about how many are hit (256: all).
    pub probability_of_256: u16,
    /// The errno to answer with; 0: no failure (delay only).
    pub errno: i32,
    /// Wait before answering, but not past the plan's end: who sets another one lets go all that waits.
    pub delay_ms: u32,
    /// A failed write leaves a part of its bytes behind, cut at a sector; a failed append some of its first bytes.
    pub tear: bool,
}

/// The rules in force; may be changed while the store is in use.
#[derive(Debug, Clone, Default)]
pub struct FaultPlan {
    /// Seed of every random decision.
    pub seed: u64,
    /// They are asked in this order; the first that hits decides, and the ones after it do not count the call.
    pub rules: Vec<FaultRule>,
}

/// The wrapper.
pub struct FaultStore {
    inner: Arc<dyn Store>,
    faults: Arc<Faults>,
}

#[derive(Default)]
struct Faults {
    state: Mutex<State>,
    /// The plan was replaced.
    replaced: Condvar,
}

#[derive(Default)]
struct State {
    plan: FaultPlan,
    /// Which plan it is: how many came before it.
    plan_number: u64,
    counters: Vec<Counter>,
    injected_count: u64,
}

#[derive(Clone, Default)]
struct Counter {
    matched: u64,
    applied: u64,
}

/// What a rule wants done to one call.
struct Hit {
    errno: i32,
    delay: Duration,
    /// Of the plan whose rule it is.
    plan_number: u64,
    /// Where a torn write is cut; `None`: nothing of it lands.
    tear: Option<Random>,
}

impl Faults {
    fn decide(&self, operation: &str, layer: Option<LayerId>) -> Option<Hit> {
        let mut state = self.state.lock();
        let State { plan, plan_number, counters, injected_count } = &mut *state;
        for (index, (rule, counter)) in plan.rules.iter().zip(counters).enumerate() {
            if rule.operation != operation || (rule.layer.is_some() && rule.layer != layer) {
                continue;
            }
            counter.matched += 1;
            if counter.matched <= rule.skip_count || counter.applied >= rule.apply_count {
                continue;
            }
            // Every call of every rule has its own dice: how calls of other rules interleave does not change them.
            let mut random = Random::new(plan.seed ^ ((index as u64) << 48), counter.matched);
            if !random.chance(rule.probability_of_256) {
                continue;
            }
            counter.applied += 1;
            *injected_count += 1;
            let delay = Duration::from_millis(u64::from(rule.delay_ms));
            return Some(Hit { errno: rule.errno, delay, plan_number: *plan_number, tear: rule.tear.then_some(random) });
        }
        None
    }

    /// Waits as long as a rule wants, or until the rules are others.
    fn wait(&self, hit: &Hit) {
        if hit.delay.is_zero() {
            return;
        }
        let deadline = Instant::now() + hit.delay;
        let mut state = self.state.lock();
        while state.plan_number == hit.plan_number {
            if self.replaced.wait_until(&mut state, deadline).timed_out() {
                return;
            }
        }
    }

    fn has_rule(&self, operation: &str) -> bool {
        self.state.lock().plan.rules.iter().any(|rule| rule.operation == operation)
    }

    /// Asks the rules about a call of which nothing may be left behind, and waits as they say.
    fn check(&self, operation: &'static str, layer: Option<LayerId>, object: impl FnOnce() -> String) -> Result<()> {
        match self.decide(operation, layer) {
            None => Ok(()),
            Some(hit) => {
                self.wait(&hit);
                if hit.errno == 0 { Ok(()) } else { Err(IoError::from_errno(operation, object(), 0, hit.errno)) }
            }
        }
    }

    /// The same for a sync, which is done before the wait.
    fn check_sync(
        &self,
        operation: &'static str,
        layer: LayerId,
        object: impl FnOnce() -> String,
        sync: impl FnOnce() -> Result<()>,
    ) -> Result<()> {
        let Some(hit) = self.decide(operation, Some(layer)) else { return sync() };
        let answer = if hit.errno == 0 { sync() } else { Err(IoError::from_errno(operation, object(), 0, hit.errno)) };
        self.wait(&hit);
        answer
    }
}

impl FaultStore {
    /// Wraps `inner` with no faults.
    pub fn new(inner: Arc<dyn Store>) -> FaultStore {
        FaultStore { inner, faults: Arc::default() }
    }

    /// Replaces the rules; counters start again, and delays of the old rules are over. Layers and segments that are open already obey them too.
    pub fn set_plan(&self, plan: FaultPlan) {
        let counters = vec![Counter::default(); plan.rules.len()];
        let mut state = self.faults.state.lock();
        *state = State { plan, plan_number: state.plan_number + 1, counters, injected_count: 0 };
        self.faults.replaced.notify_all();
    }

    /// How often a fault was injected since the plan was set; a mere delay counts too.
    pub fn injected_count(&self) -> u64 {
        self.faults.state.lock().injected_count
    }

    fn segment(&self, inner: Arc<dyn SegmentIo>, layer: LayerId, base_lsn: u64) -> Arc<dyn SegmentIo> {
        Arc::new(FaultSegment { inner, layer, base_lsn, faults: Arc::clone(&self.faults) })
    }
}

impl Store for FaultStore {
    fn capabilities(&self) -> StoreCapabilities {
        self.inner.capabilities()
    }

    fn create_layer(&self, id: LayerId) -> Result<()> {
        self.faults.check("create", Some(id), || layer_object(id))?;
        self.inner.create_layer(id)
    }

    fn open_layer(&self, id: LayerId, mode: OpenMode) -> Result<Arc<dyn LayerIo>> {
        self.faults.check("open", Some(id), || layer_object(id))?;
        let inner = self.inner.open_layer(id, mode)?;
        Ok(Arc::new(FaultLayer { inner, id, mode, faults: Arc::clone(&self.faults) }))
    }

    fn remove_layer(&self, id: LayerId) -> Result<()> {
        self.faults.check("remove", Some(id), || layer_object(id))?;
        self.inner.remove_layer(id)
    }

    fn list_layers(&self) -> Result<Vec<LayerEntry>> {
        self.inner.list_layers()
    }

    fn list_layer_ids(&self) -> Result<Vec<LayerId>> {
        self.inner.list_layer_ids()
    }

    fn usage(&self) -> Result<StoreUsage> {
        self.inner.usage()
    }

    fn health(&self) -> Option<StoreHealth> {
        self.inner.health()
    }

    fn list_segments(&self, layer: LayerId) -> Result<Vec<u64>> {
        self.inner.list_segments(layer)
    }

    fn claim_journal(&self, layer: LayerId, epoch: u64) -> Result<()> {
        self.inner.claim_journal(layer, epoch)
    }

    fn journal_writer(&self, layer: LayerId) -> Result<Option<JournalWriter>> {
        self.inner.journal_writer(layer)
    }

    fn create_segment(&self, layer: LayerId, base_lsn: u64, epoch: u64) -> Result<Arc<dyn SegmentIo>> {
        self.faults.check("create", Some(layer), || segment_object(layer, base_lsn))?;
        Ok(self.segment(self.inner.create_segment(layer, base_lsn, epoch)?, layer, base_lsn))
    }

    fn open_segment(&self, layer: LayerId, base_lsn: u64) -> Result<Arc<dyn SegmentIo>> {
        self.faults.check("open", Some(layer), || segment_object(layer, base_lsn))?;
        Ok(self.segment(self.inner.open_segment(layer, base_lsn)?, layer, base_lsn))
    }

    fn remove_segment(&self, layer: LayerId, base_lsn: u64) -> Result<()> {
        self.faults.check("remove", Some(layer), || segment_object(layer, base_lsn))?;
        self.inner.remove_segment(layer, base_lsn)
    }

    fn read_record(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.faults.check("record-read", None, || format!("record {name}"))?;
        self.inner.read_record(name)
    }

    fn write_record(&self, name: &str, bytes: &[u8]) -> Result<()> {
        self.faults.check("record-write", None, || format!("record {name}"))?;
        self.inner.write_record(name, bytes)
    }

    fn expect_records(&self, names: &[String]) -> Result<()> {
        self.inner.expect_records(names)
    }

    fn list_records(&self, prefix: &str) -> Result<Vec<String>> {
        self.faults.check("record-list", None, || format!("records {prefix}*"))?;
        self.inner.list_records(prefix)
    }

    fn remove_record(&self, name: &str) -> Result<()> {
        self.faults.check("record-remove", None, || format!("record {name}"))?;
        self.inner.remove_record(name)
    }

    fn lock(&self, owner: &str) -> Result<StoreLock> {
        self.inner.lock(owner)
    }

    fn lock_shutting_out(&self, owner: &str) -> Result<StoreLock> {
        self.inner.lock_shutting_out(owner)
    }

    fn prove_held(&self) -> Result<()> {
        self.faults.check("prove-held", None, || "the pool".to_owned())?;
        self.inner.prove_held()
    }

    fn release_reserve(&self) -> Result<()> {
        self.inner.release_reserve()
    }

    fn restore_reserve(&self) -> Result<u64> {
        self.inner.restore_reserve()
    }

    fn set_reserve(&self, bytes: u64) -> Result<u64> {
        self.inner.set_reserve(bytes)
    }
}

struct FaultLayer {
    inner: Arc<dyn LayerIo>,
    id: LayerId,
    mode: OpenMode,
    faults: Arc<Faults>,
}

impl FaultLayer {
    fn check(&self, operation: &'static str) -> Result<()> {
        self.faults.check(operation, Some(self.id), || layer_object(self.id))
    }

    /// Writes what a torn write leaves: everything before a sector boundary, or everything after it.
    fn write_torn(&self, offset_bytes: u64, buffers: &[IoSlice<'_>], mut random: Random) {
        let data: Vec<u8> = buffers.iter().flat_map(|buffer| buffer.iter().copied()).collect();
        let end = offset_bytes + data.len() as u64;
        let first = offset_bytes / SECTOR_BYTES;
        let sectors = end.div_ceil(SECTOR_BYTES) - first;
        let cut = ((first + random.below(sectors + 1)) * SECTOR_BYTES).clamp(offset_bytes, end) - offset_bytes;
        let (part, start) = if random.chance(128) { (..cut as usize, 0) } else { (..data.len(), cut) };
        let part = &data[start as usize..part.end];
        if part.len() < data.len() {
            // The call fails anyway; whether this part could be written is not its answer.
            let _ = self.inner.write(offset_bytes + start, &[IoSlice::new(part)]);
        }
    }
}

impl LayerIo for FaultLayer {
    fn read(&self, offset_bytes: u64, buffers: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.check("read")?;
        self.inner.read(offset_bytes, buffers)
    }

    /// What a rule may hit or delay has to be waited for; with a rule for `read-now` everything has to.
    fn read_now(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<bool> {
        if self.faults.has_rule("read") || self.faults.has_rule("read-now") {
            return Ok(false);
        }
        self.inner.read_now(offset_bytes, buffer)
    }

    /// What goes past the rules is handed out only where they ask for nothing but reads that wait.
    fn ring_file(&self) -> Result<Option<Arc<File>>> {
        let may_pass = self.faults.has_rule("read-now") && !self.faults.has_rule("read");
        if may_pass { self.inner.ring_file() } else { Ok(None) }
    }

    fn write(&self, offset_bytes: u64, buffers: &[IoSlice<'_>]) -> Result<()> {
        if self.faults.decide("lose-write", Some(self.id)).is_some() {
            return Ok(());
        }
        if let Some(hit) = self.faults.decide("write", Some(self.id)) {
            self.faults.wait(&hit);
            if hit.errno != 0 {
                if let (Some(random), OpenMode::ReadWrite) = (hit.tear, self.mode) {
                    self.write_torn(offset_bytes, buffers, random);
                }
                return Err(IoError::from_errno("write", layer_object(self.id), offset_bytes, hit.errno));
            }
        }
        self.inner.write(offset_bytes, buffers)
    }

    fn punch(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        self.check("punch")?;
        self.inner.punch(offset_bytes, length_bytes)
    }

    fn zero_allocated(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        self.check("zero")?;
        self.inner.zero_allocated(offset_bytes, length_bytes)
    }

    fn sync(&self) -> Result<()> {
        self.faults.check_sync("sync", self.id, || layer_object(self.id), || self.inner.sync())
    }

    fn extents(&self, offset_bytes: u64, length_bytes: u64, out: &mut Vec<Extent>) -> Result<()> {
        self.inner.extents(offset_bytes, length_bytes, out)
    }

    fn length_bytes(&self) -> Result<u64> {
        self.inner.length_bytes()
    }

    fn allocated_bytes(&self) -> Result<u64> {
        self.inner.allocated_bytes()
    }

    fn drop_cache(&self) -> Result<()> {
        self.inner.drop_cache()
    }

    fn is_settled(&self) -> bool {
        self.inner.is_settled()
    }

    fn settle(&self) -> Result<()> {
        self.inner.settle()
    }

    fn prefetch(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        self.inner.prefetch(offset_bytes, length_bytes)
    }
}

struct FaultSegment {
    inner: Arc<dyn SegmentIo>,
    layer: LayerId,
    base_lsn: u64,
    faults: Arc<Faults>,
}

impl FaultSegment {
    fn object(&self) -> String {
        segment_object(self.layer, self.base_lsn)
    }
}

impl SegmentIo for FaultSegment {
    fn claim(&self, epoch: u64) -> Result<()> {
        self.inner.claim(epoch)
    }

    fn read_all(&self) -> Result<Vec<u8>> {
        self.faults.check("read", Some(self.layer), || self.object())?;
        self.inner.read_all()
    }

    fn append(&self, offset_bytes: u64, bytes: &[u8]) -> Result<()> {
        if let Some(hit) = self.faults.decide("append", Some(self.layer)) {
            self.faults.wait(&hit);
            if hit.errno != 0 {
                if let (Some(mut random), false) = (hit.tear, bytes.is_empty()) {
                    // Always fewer than all. The call fails anyway; whether this part could be written is not its answer.
                    let _ = self.inner.append(offset_bytes, &bytes[..random.below(bytes.len() as u64) as usize]);
                }
                return Err(IoError::from_errno("append", self.object(), 0, hit.errno));
            }
        }
        self.inner.append(offset_bytes, bytes)
    }

    fn truncate(&self, length_bytes: u64) -> Result<()> {
        self.faults.check("truncate", Some(self.layer), || self.object())?;
        self.inner.truncate(length_bytes)
    }

    fn sync(&self) -> Result<()> {
        self.faults.check_sync("segment-sync", self.layer, || self.object(), || self.inner.sync())
    }

    fn length_bytes(&self) -> Result<u64> {
        self.inner.length_bytes()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{IoErrorCode, MemoryStore};

    const LAYER: LayerId = LayerId([1; 16]);
    const OTHER: LayerId = LayerId([2; 16]);

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

    fn store() -> (FaultStore, Arc<dyn LayerIo>) {
        let store = FaultStore::new(Arc::new(MemoryStore::new(1 << 30, false)));
        store.create_layer(LAYER).unwrap();
        store.create_layer(OTHER).unwrap();
        let layer = store.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
        (store, layer)
    }

    fn write(layer: &dyn LayerIo, offset_bytes: u64, data: &[u8]) -> Result<()> {
        layer.write(offset_bytes, &[IoSlice::new(data)])
    }

    fn read(layer: &dyn LayerIo, offset_bytes: u64, length: usize) -> Vec<u8> {
        let mut bytes = vec![0; length];
        layer.read(offset_bytes, &mut [IoSliceMut::new(&mut bytes)]).unwrap();
        bytes
    }

    #[test]
    fn a_rule_skips_then_applies_then_is_over() {
        let (store, layer) = store();
        store.set_plan(FaultPlan { seed: 1, rules: vec![FaultRule { skip_count: 2, apply_count: 3, ..rule("write") }] });
        let failed: Vec<bool> = (0..8).map(|_| write(&*layer, 0, &[1; 10]).is_err()).collect();
        assert_eq!(failed, [false, false, true, true, true, false, false, false]);
        assert_eq!(store.injected_count(), 3);
        assert_eq!(write(&*store.open_layer(OTHER, OpenMode::ReadWrite).unwrap(), 0, &[1]).map_err(|error| error.code), Ok(()));
    }

    #[test]
    fn a_rule_for_one_layer_leaves_the_others_alone() {
        let (store, layer) = store();
        store.set_plan(FaultPlan { seed: 1, rules: vec![FaultRule { layer: Some(OTHER), ..rule("write") }] });
        write(&*layer, 0, &[1]).unwrap();
        let other = store.open_layer(OTHER, OpenMode::ReadWrite).unwrap();
        let error = write(&*other, 7, &[1]).unwrap_err();
        assert_eq!((error.code, error.errno, error.offset_bytes), (IoErrorCode::Io, libc::EIO, 7));
        assert!(error.object.contains(&OTHER.to_string()));
    }

    #[test]
    fn the_second_rule_acts_when_the_first_is_over() {
        let (store, layer) = store();
        let first = FaultRule { apply_count: 1, errno: libc::ENOSPC, ..rule("sync") };
        store.set_plan(FaultPlan { seed: 1, rules: vec![first, FaultRule { apply_count: 1, ..rule("sync") }] });
        let codes: Vec<_> = (0..3).map(|_| layer.sync().map_err(|error| error.code)).collect();
        assert_eq!(codes, [Err(IoErrorCode::NoSpace), Err(IoErrorCode::Io), Ok(())]);
    }

    #[test]
    fn the_same_seed_hits_the_same_calls_and_about_as_many_as_asked() {
        let run = |seed| {
            let (store, layer) = store();
            store.set_plan(FaultPlan { seed, rules: vec![FaultRule { probability_of_256: 64, ..rule("write") }] });
            (0..1000).map(|_| write(&*layer, 0, &[1]).is_err()).collect::<Vec<bool>>()
        };
        assert_eq!(run(5), run(5));
        assert_ne!(run(5), run(6));
        let hits = run(5).iter().filter(|hit| **hit).count();
        assert!((150..350).contains(&hits), "{hits}");
    }

    #[test]
    fn a_torn_write_leaves_whole_sectors_from_one_end_and_never_all() {
        let (store, layer) = store();
        store.set_plan(FaultPlan { seed: 9, rules: vec![FaultRule { tear: true, ..rule("write") }] });
        let mut seen = std::collections::HashSet::new();
        for round in 0..200u64 {
            let offset = round * 8192 + 100;
            assert!(write(&*layer, offset, &[7; 3000]).is_err());
            let bytes = read(&*layer, offset, 3000);
            let landed = bytes.iter().filter(|byte| **byte == 7).count();
            assert!(landed < 3000);
            let changes: Vec<usize> = (1..3000).filter(|index| bytes[*index] != bytes[index - 1]).collect();
            assert!(changes.len() <= 1);
            assert!(changes.iter().all(|change| (offset as usize + change).is_multiple_of(512)));
            seen.insert((landed, bytes[0]));
        }
        assert!(seen.len() > 8, "prefixes and suffixes of many lengths");
    }

    #[test]
    fn a_torn_append_leaves_a_beginning_and_never_all() {
        let (store, _) = store();
        let segment = store.create_segment(LAYER, 1, 1).unwrap();
        store.set_plan(FaultPlan { seed: 9, rules: vec![FaultRule { tear: true, errno: libc::ENOSPC, ..rule("append") }] });
        for _ in 0..100 {
            assert_eq!(segment.append(0, &[7; 50]).unwrap_err().code, IoErrorCode::NoSpace);
            assert!(segment.length_bytes().unwrap() < 50);
            segment.truncate(0).unwrap();
        }
    }

    #[test]
    fn a_failed_call_does_not_reach_the_store() {
        let (store, layer) = store();
        write(&*layer, 0, &[1; 4096]).unwrap();
        let of_records = ["record-read", "record-write", "record-list", "record-remove"];
        for operation in ["read", "punch", "zero", "create", "open", "remove"].into_iter().chain(of_records) {
            store.set_plan(FaultPlan { seed: 1, rules: vec![rule(operation)] });
            let mut byte = [0];
            let failed = [
                layer.read(0, &mut [IoSliceMut::new(&mut byte)]).is_err(),
                layer.punch(0, 4096).is_err(),
                layer.zero_allocated(0, 4096).is_err(),
                store.create_layer(LayerId([3; 16])).is_err(),
                store.open_layer(LAYER, OpenMode::ReadOnly).is_err(),
                store.remove_layer(LayerId([3; 16])).is_err(),
                store.read_record("a").is_err(),
                store.write_record("a", b"b").is_err(),
                store.list_records("a").is_err(),
                store.remove_record("c").is_err(),
            ];
            assert_eq!(failed.iter().filter(|failed| **failed).count(), 1, "{operation}");
            assert_eq!(store.injected_count(), 1);
            store.set_plan(FaultPlan::default());
            store.remove_layer(LayerId([3; 16])).unwrap();
        }
    }

    #[test]
    fn a_delay_alone_is_no_failure() {
        let (store, layer) = store();
        store.set_plan(FaultPlan { seed: 1, rules: vec![FaultRule { errno: 0, delay_ms: 20, ..rule("sync") }] });
        let start = std::time::Instant::now();
        layer.sync().unwrap();
        assert!(start.elapsed() >= Duration::from_millis(20));
        assert_eq!(store.injected_count(), 1);
    }

    #[test]
    fn another_plan_lets_go_what_waits() {
        let (store, layer) = store();
        store.set_plan(FaultPlan { seed: 1, rules: vec![FaultRule { delay_ms: u32::MAX, ..rule("sync") }] });
        std::thread::scope(|scope| {
            let syncing = scope.spawn(|| layer.sync());
            while store.injected_count() == 0 {
                std::thread::yield_now();
            }
            assert!(!syncing.is_finished());
            store.set_plan(FaultPlan::default());
            assert!(syncing.join().unwrap().is_err(), "what the old plan decided stays so");
        });
    }
}
