//! Devices and checkpoints.
use crate::convert::{JsRootRef, from_ids, from_root, from_runs, guard, invalid, to_u64, to_usize};
use crate::map::{JsFrozenMap, JsPageBatch, ended, page_batch};
use crate::promise::{rejected, run_on};
use crate::store::JsStore;
use atoll_engine::{
    Checkpoint, ControlPool, Device, DeviceLimits, Engine, Lanes, Latency, LatencyCounts, LayerSpec, Result, ThrottleLimits, copy_in,
    copy_out,
};
use napi::bindgen_prelude::{ClassInstance, Env, Float64Array, Object, ToNapiValue, Uint8Array};
use napi_derive::napi;
use parking_lot::Mutex;
use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

/// Longest single read and write from above (I8).
const REQUEST_BYTES_MAX: u64 = 64 << 20;

#[napi(object)]
pub struct JsThrottleLimits {
    pub operations_per_second: Option<f64>,
    pub bytes_per_second: Option<f64>,
    pub burst_operations: Option<f64>,
    pub burst_bytes: Option<f64>,
}

#[napi(object)]
pub struct JsDeviceLimits {
    pub dirty_bytes_max: Option<f64>,
    pub batch_deltas_max: Option<f64>,
    pub dirty_leaves_soft: Option<f64>,
    pub dirty_leaves_hard: Option<f64>,
    pub journal_bytes_soft: Option<f64>,
}

#[napi(object)]
pub struct JsBlockStatus {
    pub length_bytes: f64,
    pub hole: bool,
    pub zero: bool,
}

#[napi(object)]
pub struct JsCopyReport {
    pub data_bytes: f64,
    pub zero_bytes: f64,
}

#[napi(object)]
pub struct JsDeviceStats {
    pub read_operations: f64,
    pub read_bytes: f64,
    pub write_operations: f64,
    pub write_bytes: f64,
    pub discard_operations: f64,
    pub flush_operations: f64,
    pub first_write_slots: f64,
    pub throttled_operations: f64,
    pub dirty_leaves: f64,
    pub journal_bytes: f64,
    pub lsn: f64,
    pub poisoned: bool,
    pub requests_waiting: f64,
    pub backend_reads_running: f64,
    pub backend_syncs_running: f64,
}

#[napi(object)]
pub struct JsLatency {
    /// By bucket, without the empty ones at the end.
    pub counts: Vec<f64>,
    pub sum_seconds: f64,
}

#[napi(object)]
pub struct JsDeviceLatencies {
    pub read: JsLatency,
    pub write: JsLatency,
    pub discard: JsLatency,
    pub flush: JsLatency,
    pub backend_read: JsLatency,
    pub backend_sync: JsLatency,
}

fn from_latency(latency: &Latency) -> JsLatency {
    let LatencyCounts { counts, sum_nanoseconds } = latency.counts();
    JsLatency { counts: counts.into_iter().map(|count| count as f64).collect(), sum_seconds: sum_nanoseconds as f64 / 1e9 }
}

pub fn to_throttle_limits(limits: Option<JsThrottleLimits>) -> Result<ThrottleLimits> {
    let Some(limits) = limits else {
        return Ok(ThrottleLimits::default());
    };
    let field = |name, value: Option<f64>| value.map_or(Ok(0), |value| to_u64(name, value));
    Ok(ThrottleLimits {
        operations_per_second: field("operationsPerSecond", limits.operations_per_second)?,
        bytes_per_second: field("bytesPerSecond", limits.bytes_per_second)?,
        burst_operations: field("burstOperations", limits.burst_operations)?,
        burst_bytes: field("burstBytes", limits.burst_bytes)?,
    })
}

pub fn to_device_limits(limits: Option<JsDeviceLimits>) -> Result<DeviceLimits> {
    let defaults = DeviceLimits::default();
    let Some(limits) = limits else {
        return Ok(defaults);
    };
    let field = |name, value: Option<f64>, default: u64| value.map_or(Ok(default), |value| to_u64(name, value));
    Ok(DeviceLimits {
        dirty_bytes_max: field("dirtyBytesMax", limits.dirty_bytes_max, defaults.dirty_bytes_max)?,
        batch_deltas_max: match limits.batch_deltas_max {
            None => defaults.batch_deltas_max,
            Some(count) => to_usize("batchDeltasMax", count)?,
        },
        dirty_leaves_soft: field("dirtyLeavesSoft", limits.dirty_leaves_soft, defaults.dirty_leaves_soft)?,
        dirty_leaves_hard: field("dirtyLeavesHard", limits.dirty_leaves_hard, defaults.dirty_leaves_hard)?,
        journal_bytes_soft: field("journalBytesSoft", limits.journal_bytes_soft, defaults.journal_bytes_soft)?,
    })
}

/// Layers from the three lists in which they cross.
pub fn to_layers(aliases: &[u32], ids: &[String], stores: &[ClassInstance<'_, JsStore>]) -> Result<Vec<LayerSpec>> {
    if aliases.len() != ids.len() || aliases.len() != stores.len() {
        return Err(invalid("layers", ids.len(), "lists of one length"));
    }
    let lists = aliases.iter().zip(ids).zip(stores);
    lists
        .map(|((alias, id), store)| {
            if *alias == atoll_map::HOLE {
                return Err(invalid("layer alias", alias, "a number from 1 on"));
            }
            Ok(LayerSpec { alias: *alias, id: crate::convert::to_layer_id(id)?, store: store.store.clone() })
        })
        .collect()
}

#[napi(js_name = "Checkpoint")]
pub struct JsCheckpoint {
    engine: Arc<Engine>,
    /// Which device it belongs to: another one must not be given it.
    device: Arc<Device>,
    lsn: u64,
    page_count: usize,
    checkpoint: Mutex<Option<Checkpoint>>,
}

impl JsCheckpoint {
    fn with<T>(&self, body: impl FnOnce(&Checkpoint) -> Result<T>) -> napi::Result<T> {
        guard(|| body(self.checkpoint.lock().as_ref().ok_or_else(|| ended("checkpoint"))?))
    }

    fn take(&self, device: &Arc<Device>) -> Result<Checkpoint> {
        if !Arc::ptr_eq(device, &self.device) {
            return Err(invalid("checkpoint", "of another device", "of this one"));
        }
        self.checkpoint.lock().take().ok_or_else(|| ended("checkpoint"))
    }
}

#[napi]
impl JsCheckpoint {
    #[napi]
    pub fn lsn(&self) -> f64 {
        self.lsn as f64
    }

    #[napi]
    pub fn page_count(&self) -> u32 {
        self.page_count as u32
    }

    #[napi]
    pub fn root(&self) -> napi::Result<JsRootRef> {
        self.with(|checkpoint| Ok(from_root(checkpoint.root())))
    }

    #[napi]
    pub fn replaced(&self) -> napi::Result<Float64Array> {
        self.with(|checkpoint| Ok(from_ids(checkpoint.pages.replaced.iter().copied())))
    }

    #[napi]
    pub fn displaced(&self) -> napi::Result<Float64Array> {
        self.with(|checkpoint| Ok(from_runs(&checkpoint.pages.displaced)))
    }

    #[napi]
    pub fn pages(&self, start_index: f64, max_bytes: f64) -> napi::Result<JsPageBatch> {
        self.with(|checkpoint| page_batch(&checkpoint.pages.pages, start_index, max_bytes))
    }

    #[napi]
    pub fn frozen(&self) -> napi::Result<JsFrozenMap> {
        self.with(|checkpoint| Ok(JsFrozenMap { engine: self.engine.clone(), map: checkpoint.frozen().clone() }))
    }
}

#[napi(js_name = "Device")]
pub struct JsDevice {
    pub(crate) engine: Arc<Engine>,
    pub(crate) device: Arc<Device>,
    pub(crate) lanes: DeviceLanes,
}

/// Whose threads carry out what is asked of a device: those of a backend of its layers that may hang, or else the engine's. Shared by
/// whoever has the device, because its layers change.
#[derive(Clone, Default)]
pub(crate) struct DeviceLanes(Arc<Mutex<LayerLanes>>);

#[derive(Default)]
struct LayerLanes {
    /// Of the layers whose backend has some, by alias.
    by_alias: BTreeMap<u32, Arc<Lanes>>,
    /// The layer that is written; `None`: none is.
    active: Option<u32>,
    /// The one that is to be the next, or was the last: of as much concern as the active one until what follows is committed.
    other: Option<u32>,
}

impl LayerLanes {
    fn set(&mut self, alias: u32, lanes: Option<Arc<Lanes>>) {
        match lanes {
            Some(lanes) => self.by_alias.insert(alias, lanes),
            None => self.by_alias.remove(&alias),
        };
    }
}

impl DeviceLanes {
    /// For the opening: both journals are read.
    pub(crate) fn of(aliases: &[u32], stores: &[ClassInstance<'_, JsStore>], active: Option<u32>, next: Option<u32>) -> DeviceLanes {
        let mut lanes = LayerLanes { by_alias: BTreeMap::new(), active, other: active.and(next) };
        for (alias, store) in aliases.iter().zip(stores) {
            lanes.set(*alias, store.lanes.clone());
        }
        DeviceLanes(Arc::new(Mutex::new(lanes)))
    }

    /// It is open now. `promoted`: the next layer is the active one.
    pub(crate) fn opened(&self, is_promoted: bool) {
        let mut lanes = self.0.lock();
        if is_promoted {
            let LayerLanes { active, other, .. } = &mut *lanes;
            std::mem::swap(active, other);
        } else {
            lanes.other = None;
        }
    }

    /// Another layer is written, and the one before it has to be made durable still.
    pub(crate) fn swapped(&self, alias: u32, of_layer: Option<Arc<Lanes>>) {
        let mut lanes = self.0.lock();
        lanes.set(alias, of_layer);
        lanes.other = lanes.active.replace(alias);
    }

    fn swap_committed(&self) {
        self.0.lock().other = None;
    }

    fn add(&self, layers: Vec<(u32, Option<Arc<Lanes>>)>) {
        let mut lanes = self.0.lock();
        for (alias, of_layer) in layers {
            // The handle of the layer that is written is not replaced.
            if lanes.active != Some(alias) {
                lanes.set(alias, of_layer);
            }
        }
    }

    /// Of the layers that are written, and of their journals.
    pub(crate) fn control(&self) -> Option<Arc<Lanes>> {
        let lanes = self.0.lock();
        match lanes.active {
            None => lanes.by_alias.values().next().cloned(),
            Some(active) => lanes.by_alias.get(&active).or_else(|| lanes.by_alias.get(&lanes.other?)).cloned(),
        }
    }

    /// Of any layer that is read.
    fn data(&self) -> Option<Arc<Lanes>> {
        self.0.lock().by_alias.values().next().cloned()
    }
}

/// Which threads.
#[derive(Clone, Copy)]
enum Threads {
    Control,
    Data,
    Bulk,
}

impl JsDevice {
    fn run<'env, T: ToNapiValue + Send + 'static>(
        &self,
        env: &'env Env,
        threads: Threads,
        job: impl FnOnce(&Arc<Device>) -> Result<T> + Send + 'static,
    ) -> napi::Result<Object<'env>> {
        let lanes = if matches!(threads, Threads::Control) { self.lanes.control() } else { self.lanes.data() };
        let pool: &ControlPool = match (threads, &lanes) {
            (Threads::Control, None) => self.engine.control(),
            (Threads::Control, Some(lanes)) => &lanes.control,
            (Threads::Data, None) => self.engine.data(),
            (Threads::Data, Some(lanes)) => &lanes.data,
            (Threads::Bulk, None) => self.engine.bulk(),
            (Threads::Bulk, Some(lanes)) => &lanes.bulk,
        };
        let device = self.device.clone();
        run_on(env, pool, move || job(&device))
    }
}

#[napi]
impl JsDevice {
    #[napi]
    pub fn size_bytes(&self) -> f64 {
        self.device.size_bytes() as f64
    }

    #[napi]
    pub fn read_only(&self) -> bool {
        self.device.is_read_only()
    }

    #[napi]
    pub fn is_poisoned(&self) -> bool {
        self.device.is_poisoned()
    }

    #[napi]
    pub fn stats(&self) -> napi::Result<JsDeviceStats> {
        guard(|| {
            let stats = self.device.stats();
            Ok(JsDeviceStats {
                read_operations: stats.read_operations as f64,
                read_bytes: stats.read_bytes as f64,
                write_operations: stats.write_operations as f64,
                write_bytes: stats.write_bytes as f64,
                discard_operations: stats.discard_operations as f64,
                flush_operations: stats.flush_operations as f64,
                first_write_slots: stats.first_write_slots as f64,
                throttled_operations: stats.throttled_operations as f64,
                dirty_leaves: stats.dirty_leaves as f64,
                journal_bytes: stats.journal_bytes as f64,
                lsn: stats.lsn as f64,
                poisoned: stats.poisoned,
                requests_waiting: stats.requests_waiting as f64,
                backend_reads_running: stats.backend_reads_running as f64,
                backend_syncs_running: stats.backend_syncs_running as f64,
            })
        })
    }

    #[napi]
    pub fn latencies(&self) -> napi::Result<JsDeviceLatencies> {
        guard(|| {
            let latencies = self.device.latencies();
            Ok(JsDeviceLatencies {
                read: from_latency(&latencies.read),
                write: from_latency(&latencies.write),
                discard: from_latency(&latencies.discard),
                flush: from_latency(&latencies.flush),
                backend_read: from_latency(&latencies.backend_read),
                backend_sync: from_latency(&latencies.backend_sync),
            })
        })
    }

    /// The bytes are moved into a buffer that JavaScript owns.
    #[napi]
    pub fn read<'env>(&self, env: &'env Env, offset_bytes: f64, length_bytes: f64) -> napi::Result<Object<'env>> {
        self.run(env, Threads::Data, move |device| {
            let length = to_u64("lengthBytes", length_bytes)?;
            if length > REQUEST_BYTES_MAX {
                return Err(invalid("lengthBytes", length, "at most 64 MiB"));
            }
            let mut bytes = vec![0; length as usize];
            device.read(to_u64("offsetBytes", offset_bytes)?, &mut bytes)?;
            Ok(Uint8Array::new(bytes))
        })
    }

    /// The bytes are copied before the call returns: the caller may change its buffer at once.
    #[napi]
    pub fn write<'env>(&self, env: &'env Env, offset_bytes: f64, data: &[u8]) -> napi::Result<Object<'env>> {
        if data.len() as u64 > REQUEST_BYTES_MAX {
            return rejected::<()>(env, invalid("data length", data.len(), "at most 64 MiB"));
        }
        let data = data.to_vec();
        self.run(env, Threads::Data, move |device| device.write(to_u64("offsetBytes", offset_bytes)?, &data))
    }

    #[napi]
    pub fn discard<'env>(&self, env: &'env Env, offset_bytes: f64, length_bytes: f64) -> napi::Result<Object<'env>> {
        self.run(env, Threads::Data, move |device| {
            device.discard(to_u64("offsetBytes", offset_bytes)?, to_u64("lengthBytes", length_bytes)?)
        })
    }

    #[napi]
    pub fn write_zeroes<'env>(&self, env: &'env Env, offset_bytes: f64, length_bytes: f64, allocate: bool) -> napi::Result<Object<'env>> {
        self.run(env, Threads::Data, move |device| {
            device.write_zeroes(to_u64("offsetBytes", offset_bytes)?, to_u64("lengthBytes", length_bytes)?, allocate)
        })
    }

    #[napi]
    pub fn flush<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.run(env, Threads::Data, |device| device.flush())
    }

    #[napi]
    pub fn block_status<'env>(
        &self,
        env: &'env Env,
        offset_bytes: f64,
        length_bytes: f64,
        extent_count_max: f64,
    ) -> napi::Result<Object<'env>> {
        self.run(env, Threads::Data, move |device| {
            let mut found = Vec::new();
            let count_max = to_usize("extentCountMax", extent_count_max)?;
            device.block_status(to_u64("offsetBytes", offset_bytes)?, to_u64("lengthBytes", length_bytes)?, count_max, &mut found)?;
            let statuses = found.into_iter();
            Ok(statuses
                .map(|status| JsBlockStatus { length_bytes: status.length_bytes as f64, hole: status.hole, zero: status.zero })
                .collect::<Vec<_>>())
        })
    }

    #[napi]
    pub fn copy_in<'env>(
        &self,
        env: &'env Env,
        path: String,
        source_offset_bytes: f64,
        offset_bytes: f64,
        length_bytes: f64,
    ) -> napi::Result<Object<'env>> {
        let engine = self.engine.clone();
        self.run(env, Threads::Bulk, move |device| {
            let source_offset = to_u64("sourceOffsetBytes", source_offset_bytes)?;
            let (offset, length) = (to_u64("offsetBytes", offset_bytes)?, to_u64("lengthBytes", length_bytes)?);
            let report = copy_in(device, Path::new(&path), source_offset, offset, length, &|| engine.is_closing())?;
            Ok(JsCopyReport { data_bytes: report.data_bytes as f64, zero_bytes: report.zero_bytes as f64 })
        })
    }

    #[napi]
    pub fn copy_out<'env>(&self, env: &'env Env, path: String, offset_bytes: f64, length_bytes: f64) -> napi::Result<Object<'env>> {
        let engine = self.engine.clone();
        self.run(env, Threads::Bulk, move |device| {
            let (offset, length) = (to_u64("offsetBytes", offset_bytes)?, to_u64("lengthBytes", length_bytes)?);
            let report = copy_out(device, Path::new(&path), offset, length, &|| engine.is_closing())?;
            Ok(JsCopyReport { data_bytes: report.data_bytes as f64, zero_bytes: report.zero_bytes as f64 })
        })
    }

    #[napi]
    pub fn checkpoint<'env>(&self, env: &'env Env, first_page_id: f64) -> napi::Result<Object<'env>> {
        let engine = self.engine.clone();
        self.run(env, Threads::Control, move |device| {
            let found = device.checkpoint(to_u64("firstPageId", first_page_id)?)?;
            Ok(found.map(|checkpoint| JsCheckpoint {
                engine,
                device: device.clone(),
                lsn: checkpoint.lsn,
                page_count: checkpoint.pages.pages.len(),
                checkpoint: Mutex::new(Some(checkpoint)),
            }))
        })
    }

    #[napi]
    pub fn checkpoint_committed<'env>(&self, env: &'env Env, checkpoint: &JsCheckpoint, trim_journal: bool) -> napi::Result<Object<'env>> {
        match checkpoint.take(&self.device) {
            Ok(checkpoint) => self.run(env, Threads::Control, move |device| device.checkpoint_committed(checkpoint, trim_journal)),
            Err(error) => rejected::<()>(env, error),
        }
    }

    #[napi]
    pub fn checkpoint_aborted(&self, checkpoint: &JsCheckpoint) -> napi::Result<()> {
        guard(|| {
            self.device.checkpoint_aborted(checkpoint.take(&self.device)?);
            Ok(())
        })
    }

    #[napi]
    pub fn sync_closing<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.run(env, Threads::Control, |device| device.sync_closing())
    }

    #[napi]
    pub fn swap_committed<'env>(&self, env: &'env Env, seal: bool) -> napi::Result<Object<'env>> {
        let lanes = self.lanes.clone();
        self.run(env, Threads::Control, move |device| {
            device.swap_committed(seal)?;
            lanes.swap_committed();
            Ok(())
        })
    }

    #[napi]
    pub fn grow<'env>(&self, env: &'env Env, size_bytes: f64) -> napi::Result<Object<'env>> {
        self.run(env, Threads::Control, move |device| device.grow(to_u64("sizeBytes", size_bytes)?))
    }

    #[napi]
    pub fn shrink_prepare<'env>(&self, env: &'env Env, size_bytes: f64) -> napi::Result<Object<'env>> {
        self.run(env, Threads::Control, move |device| device.shrink_prepare(to_u64("sizeBytes", size_bytes)?))
    }

    #[napi]
    pub fn shrink_punch<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.run(env, Threads::Bulk, |device| device.shrink_punch())
    }

    #[napi]
    pub fn punch_orphans<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.run(env, Threads::Bulk, |device| Ok(device.punch_orphans()? as f64))
    }

    #[napi]
    pub fn add_layers<'env>(
        &self,
        env: &'env Env,
        aliases: Vec<u32>,
        ids: Vec<String>,
        stores: Vec<ClassInstance<'env, JsStore>>,
    ) -> napi::Result<Object<'env>> {
        match to_layers(&aliases, &ids, &stores) {
            Ok(layers) => {
                self.lanes.add(aliases.into_iter().zip(stores.iter().map(|store| store.lanes.clone())).collect());
                self.run(env, Threads::Control, move |device| {
                    device.add_layers(layers);
                    Ok(())
                })
            }
            Err(error) => rejected::<()>(env, error),
        }
    }

    #[napi]
    pub fn set_throttle(&self, limits: JsThrottleLimits) -> napi::Result<()> {
        guard(|| {
            self.device.set_throttle(to_throttle_limits(Some(limits))?);
            Ok(())
        })
    }

    #[napi]
    pub fn read_barrier<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.run(env, Threads::Control, |device| {
            device.read_barrier();
            Ok(())
        })
    }

    #[napi]
    pub fn close<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let engine = self.engine.clone();
        self.run(env, Threads::Control, move |device| engine.close_device(device))
    }
}
