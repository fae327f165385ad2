//! Stores.
use crate::convert::{from_ids, guard, invalid, to_layer_id, to_runs, to_u64, to_uuid};
use crate::promise::{Settler, run_on};
use atoll_engine::{ControlPool, Engine, EngineError, Lanes, Result};
use atoll_io::{
    CrashOptions, FaultPlan, FaultRule, FaultStore, FileStore, IoError, IoErrorCode, Journal, JournalIdentity, JournalWriter, LayerId,
    LayerIo, MemoryStore, OpenMode, RadosOptions, RadosStore, SealMark, Store, StoreHealth, StoreLock, memory_tick,
};
use atoll_map::{Run, SLOT_BYTES};
use napi::bindgen_prelude::{Env, Float64Array, Object, Uint8Array};
use napi_derive::napi;
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

#[napi(object)]
pub struct JsCapabilities {
    pub copy_unit_bytes: u32,
    pub punch_unit_bytes: u32,
    pub can_clone: bool,
    pub ack_is_durable: bool,
    pub persistent: bool,
}

/// Lists of one length: an object for each layer would be made on the event loop, of which a pool may have a hundred thousand.
#[napi(object)]
pub struct JsLayerList {
    /// 36 characters each.
    pub ids: Uint8Array,
    pub allocated_bytes: Float64Array,
    pub length_bytes: Float64Array,
}

#[napi(object)]
pub struct JsUsage {
    pub total_bytes: f64,
    pub free_bytes: f64,
    pub stored_bytes: f64,
    pub reserve_bytes: f64,
}

#[napi(object)]
pub struct JsFailure {
    pub code: String,
    pub message: String,
}

#[napi(object)]
pub struct JsStoreHealth {
    pub observed_ago_ms: f64,
    pub answer_ms: Option<f64>,
    pub failure: Option<JsFailure>,
    pub silent_ms: Option<f64>,
    pub report: Option<String>,
    pub report_failure: Option<JsFailure>,
    pub is_counted: bool,
}

#[napi(object)]
pub struct JsExtent {
    pub offset_bytes: f64,
    pub length_bytes: f64,
    pub data: bool,
}

#[napi(object)]
pub struct JsFaultRule {
    pub operation: String,
    pub layer: Option<String>,
    pub skip_count: Option<f64>,
    pub apply_count: Option<f64>,
    #[napi(js_name = "probabilityOf256")]
    pub probability_of_256: Option<u32>,
    pub errno: Option<i32>,
    pub delay_ms: Option<u32>,
    pub tear: Option<bool>,
}

#[napi(object)]
pub struct JsFaultPlan {
    pub seed: f64,
    pub rules: Vec<JsFaultRule>,
}

#[napi(object)]
pub struct JsCrashOptions {
    #[napi(js_name = "keepOf256")]
    pub keep_of_256: u32,
    pub tear: bool,
    pub reorder: bool,
}

#[napi(object)]
pub struct JsSeal {
    pub final_lsn: f64,
    /// Nothing: none.
    pub successor: Option<String>,
}

#[napi(object)]
pub struct JsJournalWriter {
    pub epoch: f64,
    pub owner: String,
}

#[napi(object)]
pub struct JsJournalSummary {
    pub segment_count: f64,
    pub length_bytes: f64,
    pub torn_tail_bytes: f64,
    pub frame_count: f64,
    pub last_lsn: f64,
    pub epoch: f64,
    pub owners: Vec<u32>,
    pub writer: Option<JsJournalWriter>,
    pub seal: Option<JsSeal>,
}

/// What only some kinds can do.
#[derive(Clone)]
enum Kind {
    File,
    Memory(Arc<MemoryStore>),
    Rados,
    Fault(Arc<FaultStore>),
}

#[napi(js_name = "Store")]
pub struct JsStore {
    engine: Arc<Engine>,
    pub(crate) store: Arc<dyn Store>,
    kind: Kind,
    /// Its own threads, if its backend may hang.
    pub(crate) lanes: Option<Arc<Lanes>>,
}

impl JsStore {
    fn control(&self) -> &ControlPool {
        self.lanes.as_ref().map_or_else(|| self.engine.control(), |lanes| &lanes.control)
    }

    fn bulk(&self) -> &ControlPool {
        self.lanes.as_ref().map_or_else(|| self.engine.bulk(), |lanes| &lanes.bulk)
    }

    pub(crate) fn open_file(engine: Arc<Engine>, path: &str, create: bool, reserve_bytes: u64) -> Result<JsStore> {
        let store = Arc::new(FileStore::open(Path::new(path), create, reserve_bytes)?);
        Ok(JsStore { engine, store, kind: Kind::File, lanes: None })
    }

    /// On a thread of `lanes`.
    pub(crate) fn open_rados(engine: Arc<Engine>, options: RadosOptions, lanes: Arc<Lanes>) -> Result<JsStore> {
        let store = Arc::new(RadosStore::open(options)?);
        Ok(JsStore { engine, store, kind: Kind::Rados, lanes: Some(lanes) })
    }

    pub(crate) fn memory(engine: Arc<Engine>, store: MemoryStore) -> JsStore {
        let store = Arc::new(store);
        JsStore { engine, store: store.clone(), kind: Kind::Memory(store), lanes: None }
    }

    pub(crate) fn fault(engine: Arc<Engine>, inner: &JsStore) -> JsStore {
        let store = Arc::new(FaultStore::new(inner.store.clone()));
        JsStore { engine, store: store.clone(), kind: Kind::Fault(store), lanes: inner.lanes.clone() }
    }

    fn as_memory(&self) -> Result<&Arc<MemoryStore>> {
        match &self.kind {
            Kind::Memory(store) => Ok(store),
            _ => Err(invalid("store", self.kind_name(), "of the memory kind")),
        }
    }

    fn as_fault(&self) -> Result<&Arc<FaultStore>> {
        match &self.kind {
            Kind::Fault(store) => Ok(store),
            _ => Err(invalid("store", self.kind_name(), "of the fault kind")),
        }
    }

    fn kind_name(&self) -> &'static str {
        match self.kind {
            Kind::File => "file",
            Kind::Memory(_) => "memory",
            Kind::Rados => "rados",
            Kind::Fault(_) => "fault",
        }
    }

    /// Runs a call that may take a moment.
    fn run<'env, T: napi::bindgen_prelude::ToNapiValue + Send + 'static>(
        &self,
        env: &'env Env,
        job: impl FnOnce(&dyn Store) -> Result<T> + Send + 'static,
    ) -> napi::Result<Object<'env>> {
        let store = self.store.clone();
        run_on(env, self.control(), move || job(&*store))
    }
}

#[napi]
impl JsStore {
    #[napi]
    pub fn kind(&self) -> &'static str {
        self.kind_name()
    }

    #[napi]
    pub fn capabilities(&self) -> napi::Result<JsCapabilities> {
        guard(|| {
            let found = self.store.capabilities();
            Ok(JsCapabilities {
                copy_unit_bytes: found.copy_unit_bytes,
                punch_unit_bytes: found.punch_unit_bytes,
                can_clone: found.can_clone,
                ack_is_durable: found.ack_is_durable,
                persistent: found.persistent,
            })
        })
    }

    #[napi]
    pub fn create_layer<'env>(&self, env: &'env Env, id: String) -> napi::Result<Object<'env>> {
        self.run(env, move |store| Ok(store.create_layer(to_layer_id(&id)?)?))
    }

    #[napi]
    pub fn remove_layer<'env>(&self, env: &'env Env, id: String) -> napi::Result<Object<'env>> {
        self.run(env, move |store| Ok(store.remove_layer(to_layer_id(&id)?)?))
    }

    #[napi]
    pub fn list_layers<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.run(env, |store| {
            let entries = store.list_layers()?;
            let mut ids = Vec::with_capacity(entries.len() * 36);
            entries.iter().for_each(|entry| ids.extend_from_slice(entry.id.to_string().as_bytes()));
            Ok(JsLayerList {
                ids: Uint8Array::new(ids),
                allocated_bytes: Float64Array::new(entries.iter().map(|entry| entry.allocated_bytes as f64).collect()),
                length_bytes: Float64Array::new(entries.iter().map(|entry| entry.length_bytes as f64).collect()),
            })
        })
    }

    #[napi]
    pub fn list_layer_ids<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.run(env, |store| {
            let ids: Vec<u8> = store.list_layer_ids()?.iter().flat_map(|id| id.to_string().into_bytes()).collect();
            Ok(Uint8Array::new(ids))
        })
    }

    #[napi]
    pub fn layer_exists<'env>(&self, env: &'env Env, id: String) -> napi::Result<Object<'env>> {
        self.run(env, move |store| match store.open_layer(to_layer_id(&id)?, OpenMode::ReadOnly) {
            Ok(_) => Ok(true),
            Err(error) if error.code == IoErrorCode::NotFound => Ok(false),
            Err(error) => Err(error.into()),
        })
    }

    #[napi]
    pub fn sync_layer<'env>(&self, env: &'env Env, id: String) -> napi::Result<Object<'env>> {
        self.run(env, move |store| Ok(store.open_layer(to_layer_id(&id)?, OpenMode::ReadWrite)?.sync()?))
    }

    #[napi]
    pub fn usage<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.run(env, |store| {
            let usage = store.usage()?;
            Ok(JsUsage {
                total_bytes: usage.total_bytes as f64,
                free_bytes: usage.free_bytes as f64,
                stored_bytes: usage.stored_bytes as f64,
                reserve_bytes: usage.reserve_bytes as f64,
            })
        })
    }

    #[napi]
    pub fn health(&self) -> napi::Result<Option<JsStoreHealth>> {
        guard(|| Ok(self.store.health().map(from_health)))
    }

    #[napi]
    pub fn read_record<'env>(&self, env: &'env Env, name: String) -> napi::Result<Object<'env>> {
        self.run(env, move |store| Ok(store.read_record(&name)?.map(Uint8Array::new)))
    }

    #[napi]
    pub fn write_record<'env>(&self, env: &'env Env, name: String, bytes: &[u8]) -> napi::Result<Object<'env>> {
        let bytes = bytes.to_vec();
        self.run(env, move |store| Ok(store.write_record(&name, &bytes)?))
    }

    #[napi]
    pub fn expect_records<'env>(&self, env: &'env Env, names: Vec<String>) -> napi::Result<Object<'env>> {
        self.run(env, move |store| Ok(store.expect_records(&names)?))
    }

    #[napi]
    pub fn list_records<'env>(&self, env: &'env Env, prefix: String) -> napi::Result<Object<'env>> {
        self.run(env, move |store| Ok(store.list_records(&prefix)?))
    }

    #[napi]
    pub fn remove_record<'env>(&self, env: &'env Env, name: String) -> napi::Result<Object<'env>> {
        self.run(env, move |store| Ok(store.remove_record(&name)?))
    }

    #[napi]
    pub fn lock<'env>(&self, env: &'env Env, owner: String, shut_out_holder: bool) -> napi::Result<Object<'env>> {
        let (engine, lanes) = (self.engine.clone(), self.lanes.clone());
        self.run(env, move |store| {
            let lock = if shut_out_holder { store.lock_shutting_out(&owner)? } else { store.lock(&owner)? };
            Ok(JsStoreLock { engine, lanes, lock: Arc::new(Mutex::new(Some(lock))) })
        })
    }

    #[napi]
    pub fn release_reserve<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.run(env, |store| Ok(store.release_reserve()?))
    }

    #[napi]
    pub fn restore_reserve<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.run(env, |store| Ok(store.restore_reserve()? as f64))
    }

    #[napi]
    pub fn set_reserve<'env>(&self, env: &'env Env, bytes: f64) -> napi::Result<Object<'env>> {
        self.run(env, move |store| Ok(store.set_reserve(to_u64("bytes", bytes)?)? as f64))
    }

    #[napi]
    pub fn seal_layer<'env>(
        &self,
        env: &'env Env,
        id: String,
        volume_id: String,
        epoch: f64,
        final_lsn: f64,
        successor: Option<String>,
    ) -> napi::Result<Object<'env>> {
        let store = self.store.clone();
        run_on(env, self.control(), move || {
            let successor = successor.map_or(Ok(LayerId([0; 16])), |id| to_layer_id(&id))?;
            let identity =
                JournalIdentity { volume: to_uuid("volumeId", &volume_id)?, layer: to_layer_id(&id)?, epoch: to_u64("epoch", epoch)? };
            seal_layer(store, identity, SealMark { final_lsn: to_u64("finalLsn", final_lsn)?, successor })
        })
    }

    /// Reads a journal and changes nothing.
    #[napi]
    pub fn inspect_journal<'env>(
        &self,
        env: &'env Env,
        id: String,
        volume_id: Option<String>,
        epoch: f64,
        after_lsn: f64,
    ) -> napi::Result<Object<'env>> {
        let store = self.store.clone();
        run_on(env, self.bulk(), move || {
            let volume = volume_id.map(|id| to_uuid("volumeId", &id)).transpose()?;
            let (epoch, after_lsn) = (to_u64("epoch", epoch)?, to_u64("afterLsn", after_lsn)?);
            let layer = to_layer_id(&id)?;
            let found = Journal::inspect(&*store, layer, volume, epoch, after_lsn)?;
            let owners: BTreeSet<u32> = found.frames.iter().flat_map(|frame| &frame.deltas).map(|delta| delta.owner).collect();
            Ok(JsJournalSummary {
                segment_count: found.segment_count as f64,
                length_bytes: found.length_bytes as f64,
                torn_tail_bytes: found.torn_tail_bytes as f64,
                frame_count: found.frames.len() as f64,
                last_lsn: found.last_lsn as f64,
                epoch: found.epoch as f64,
                owners: owners.into_iter().collect(),
                // Of a journal of nobody in particular nobody asks who has it.
                writer: volume
                    .map_or(Ok(None), |_| store.journal_writer(layer))?
                    .map(|JournalWriter { epoch, owner }| JsJournalWriter { epoch: epoch as f64, owner }),
                seal: found.seal.map(|mark| JsSeal {
                    final_lsn: mark.final_lsn as f64,
                    successor: (mark.successor.0 != [0; 16]).then(|| mark.successor.to_string()),
                }),
            })
        })
    }

    /// Long: it may punch very many holes.
    #[napi]
    pub fn punch_except<'env>(&self, env: &'env Env, id: String, keep_runs: &[f64]) -> napi::Result<Object<'env>> {
        let keep = guard(|| to_runs(keep_runs))?;
        let (store, engine) = (self.store.clone(), self.engine.clone());
        run_on(env, self.bulk(), move || Ok(punch_except(&*store, to_layer_id(&id)?, &keep, &|| engine.is_closing())? as f64))
    }

    /// Bytes that are allocated outside the runs.
    #[napi]
    pub fn allocated_except<'env>(&self, env: &'env Env, id: String, keep_runs: &[f64]) -> napi::Result<Object<'env>> {
        let keep = guard(|| to_runs(keep_runs))?;
        let (store, engine) = (self.store.clone(), self.engine.clone());
        run_on(env, self.bulk(), move || {
            let layer = store.open_layer(to_layer_id(&id)?, OpenMode::ReadOnly)?;
            let mut sum_bytes = 0;
            visit_gaps(&*layer, &keep, &|| engine.is_closing(), &mut |_, length_bytes| {
                sum_bytes += length_bytes;
                Ok(())
            })?;
            Ok(sum_bytes as f64)
        })
    }

    #[napi]
    pub fn extents<'env>(&self, env: &'env Env, id: String, offset_bytes: f64, length_bytes: f64) -> napi::Result<Object<'env>> {
        self.run(env, move |store| {
            let layer = store.open_layer(to_layer_id(&id)?, OpenMode::ReadOnly)?;
            let mut found = Vec::new();
            layer.extents(to_u64("offsetBytes", offset_bytes)?, to_u64("lengthBytes", length_bytes)?, &mut found)?;
            let extents = found.into_iter().map(|extent| JsExtent {
                offset_bytes: extent.offset_bytes as f64,
                length_bytes: extent.length_bytes as f64,
                data: extent.data,
            });
            Ok(extents.collect::<Vec<_>>())
        })
    }

    /// Offset after the last byte that was ever written to each layer; -1 for one that is not there.
    #[napi]
    pub fn length_bytes<'env>(&self, env: &'env Env, ids: Vec<String>) -> napi::Result<Object<'env>> {
        self.run(env, move |store| {
            let mut found = Vec::with_capacity(ids.len());
            for id in &ids {
                found.push(store.layer_entry(to_layer_id(id)?)?.map_or(-1.0, |entry| entry.length_bytes as f64));
            }
            Ok(Float64Array::new(found))
        })
    }

    /// Bytes that each layer has allocated; -1 for one that is not there.
    #[napi]
    pub fn allocated_bytes<'env>(&self, env: &'env Env, ids: Vec<String>) -> napi::Result<Object<'env>> {
        self.run(env, move |store| {
            let mut found = Vec::with_capacity(ids.len());
            for id in &ids {
                found.push(store.layer_entry(to_layer_id(id)?)?.map_or(-1.0, |entry| entry.allocated_bytes as f64));
            }
            Ok(Float64Array::new(found))
        })
    }

    #[napi]
    pub fn set_faults(&self, plan: JsFaultPlan) -> napi::Result<()> {
        guard(|| {
            let fault = self.as_fault()?;
            let seed = to_u64("seed", plan.seed)?;
            let rules = plan.rules.into_iter().map(to_fault_rule).collect::<Result<_>>()?;
            fault.set_plan(FaultPlan { seed, rules });
            Ok(())
        })
    }

    #[napi]
    pub fn injected_count(&self) -> napi::Result<f64> {
        guard(|| Ok(self.as_fault()?.injected_count() as f64))
    }

    #[napi]
    pub fn sequence(&self) -> napi::Result<f64> {
        guard(|| Ok(self.as_memory()?.sequence() as f64))
    }

    #[napi]
    pub fn boundaries(&self, from: f64) -> napi::Result<Float64Array> {
        guard(|| Ok(from_ids(self.as_memory()?.boundaries(to_u64("from", from)?))))
    }

    #[napi]
    pub fn tick(&self) -> napi::Result<f64> {
        guard(|| Ok(memory_tick() as f64))
    }

    #[napi]
    pub fn boundary_ticks(&self, from: f64) -> napi::Result<Float64Array> {
        guard(|| Ok(from_ids(self.as_memory()?.boundary_ticks(to_u64("from", from)?))))
    }

    #[napi]
    pub fn sequence_at(&self, tick: f64) -> napi::Result<f64> {
        guard(|| Ok(self.as_memory()?.sequence_at(to_u64("tick", tick)?) as f64))
    }

    #[napi]
    pub fn crash_image(&self, sequence: f64, seed: f64, options: JsCrashOptions) -> napi::Result<JsStore> {
        guard(|| {
            let keep_of_256 = u8::try_from(options.keep_of_256.min(255)).unwrap_or(u8::MAX);
            let options = CrashOptions { keep_of_256, tear: options.tear, reorder: options.reorder };
            let image = self.as_memory()?.crash_image(to_u64("sequence", sequence)?, to_u64("seed", seed)?, options);
            Ok(JsStore::memory(self.engine.clone(), image))
        })
    }

    #[napi]
    pub fn forget_before(&self, sequence: f64) -> napi::Result<()> {
        guard(|| {
            self.as_memory()?.forget_before(to_u64("sequence", sequence)?);
            Ok(())
        })
    }
}

/// A held lock of a store.
#[napi(js_name = "StoreLock")]
pub struct JsStoreLock {
    engine: Arc<Engine>,
    lanes: Option<Arc<Lanes>>,
    lock: Arc<Mutex<Option<StoreLock>>>,
}

#[napi]
impl JsStoreLock {
    #[napi]
    pub fn release<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let (settler, promise) = Settler::new(env)?;
        let lock = self.lock.clone();
        // Held meanwhile, so that a second call waits for the first.
        let release = move || {
            let mut held = lock.lock();
            drop(held.take());
        };
        let (settler, late) = (Arc::new(settler), release.clone());
        let on_thread = settler.clone();
        let job = move || {
            release();
            on_thread.settle(Ok(()));
        };
        let control = self.lanes.as_ref().map_or_else(|| self.engine.control(), |lanes| &lanes.control);
        if control.submit(job).is_err() {
            // The engine is closed, and nobody else does it.
            late();
            settler.settle(Ok(()));
        }
        Ok(promise)
    }
}

fn from_health(health: StoreHealth) -> JsStoreHealth {
    let in_ms = |time: Duration| time.as_secs_f64() * 1000.0;
    let failure = |error: IoError| {
        let EngineError { code, message, .. } = error.into();
        JsFailure { code: code.to_owned(), message }
    };
    let (answer, error) = match health.answer {
        Ok(time) => (Some(in_ms(time)), None),
        Err(error) => (None, Some(failure(error))),
    };
    let (report, report_error) = match health.report {
        None => (None, None),
        Some(Ok(text)) => (Some(text), None),
        Some(Err(error)) => (None, Some(failure(error))),
    };
    JsStoreHealth {
        observed_ago_ms: in_ms(health.observed_at.elapsed()),
        answer_ms: answer,
        failure: error,
        silent_ms: health.silent_since.map(|since| in_ms(since.elapsed())),
        report,
        report_failure: report_error,
        is_counted: health.is_counted,
    }
}

fn to_fault_rule(rule: JsFaultRule) -> Result<FaultRule> {
    Ok(FaultRule {
        operation: rule.operation,
        layer: rule.layer.map(|id| to_layer_id(&id)).transpose()?,
        skip_count: rule.skip_count.map_or(Ok(0), |count| to_u64("skipCount", count))?,
        apply_count: match rule.apply_count {
            None => u64::MAX,
            Some(count) if count == f64::INFINITY => u64::MAX,
            Some(count) => to_u64("applyCount", count)?,
        },
        probability_of_256: u16::try_from(rule.probability_of_256.unwrap_or(256).min(256)).unwrap_or(256),
        errno: rule.errno.unwrap_or(libc::EIO),
        delay_ms: rule.delay_ms.unwrap_or(0),
        tear: rule.tear.unwrap_or(false),
    })
}

/// Seals a layer of a closed volume, once: its journal must end where the catalog says.
fn seal_layer(store: Arc<dyn Store>, identity: JournalIdentity, mark: SealMark) -> Result<()> {
    match store.open_layer(identity.layer, OpenMode::ReadOnly) {
        // Nothing that failed is carried out any more after this.
        Ok(layer) => layer.settle()?,
        Err(error) if error.code == IoErrorCode::NotFound => {}
        Err(error) => return Err(error.into()),
    }
    let mut replay = Journal::replay(store, identity, mark.final_lsn)?;
    if let Some(found) = replay.seal {
        if found == mark {
            return Ok(());
        }
        let message = format!("layer {} is sealed already, at lsn {} and not {}", identity.layer, found.final_lsn, mark.final_lsn);
        return Err(EngineError::new("LAYER_READ_ONLY", libc::EIO, message).with("layerId", identity.layer));
    }
    if let Some(frame) = replay.frames.last() {
        let message = format!(
            "the journal of layer {} reaches lsn {}, the catalog only {}: restore a newer catalog",
            identity.layer, frame.lsn, mark.final_lsn
        );
        return Err(EngineError::new("CATALOG_BEHIND", libc::EIO, message).with("layerId", identity.layer).with("lsn", frame.lsn));
    }
    Ok(replay.journal.seal(mark)?)
}

/// Punches the gaps between the runs that are kept, as far as the layer reaches. Returns the bytes that became free.
fn punch_except(store: &dyn Store, id: LayerId, keep: &[Run], cancelled: &dyn Fn() -> bool) -> Result<u64> {
    let layer = store.open_layer(id, OpenMode::ReadWrite)?;
    let before_bytes = layer.allocated_bytes()?;
    let mut punched_any = false;
    visit_gaps(&*layer, keep, cancelled, &mut |offset_bytes, length_bytes| {
        layer.punch(offset_bytes, length_bytes)?;
        punched_any = true;
        Ok(())
    })?;
    if punched_any {
        layer.sync()?;
    }
    Ok(before_bytes.saturating_sub(layer.allocated_bytes()?))
}

/// Calls `visit` with every range that is allocated and lies in none of the runs.
fn visit_gaps(
    layer: &dyn LayerIo,
    keep: &[Run],
    cancelled: &dyn Fn() -> bool,
    visit: &mut dyn FnMut(u64, u64) -> Result<()>,
) -> Result<()> {
    let length_bytes = layer.length_bytes()?.next_multiple_of(SLOT_BYTES);
    let end = Run { start_slot: length_bytes / SLOT_BYTES, slot_count: 0, owner: 0 };
    let mut at_slot = 0;
    let mut extents = Vec::new();
    for run in keep.iter().chain([&end]) {
        let gap_end = run.start_slot.min(end.start_slot);
        if gap_end > at_slot {
            if cancelled() {
                return Err(EngineError::new("ENGINE_CLOSED", libc::ESHUTDOWN, "stopped, because the engine is closing"));
            }
            // Only where something is allocated: most gaps of a thin layer are holes already.
            extents.clear();
            layer.extents(at_slot * SLOT_BYTES, (gap_end - at_slot) * SLOT_BYTES, &mut extents)?;
            for extent in extents.iter().filter(|extent| extent.data) {
                // Whole slots: the extent of a file ends with the file, and a hole in a part of a block frees nothing.
                let until = (extent.offset_bytes + extent.length_bytes).next_multiple_of(SLOT_BYTES).min(gap_end * SLOT_BYTES);
                visit(extent.offset_bytes, until - extent.offset_bytes)?;
            }
        }
        at_slot = at_slot.max(run.start_slot + run.slot_count);
    }
    Ok(())
}
