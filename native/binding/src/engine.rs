//! The engine's handle.
use crate::connection::{JsListener, JsTlsConfig};
use crate::convert::{JsRootRef, guard, invalid, to_layer_id, to_root, to_runs, to_u32, to_u64, to_uuid};
use crate::device::{DeviceLanes, JsDevice, JsDeviceLimits, JsThrottleLimits, to_device_limits, to_layers, to_throttle_limits};
use crate::map::{Bulky, JsFrozenMap, JsMapCheck, JsMapLoader, JsReach};
use crate::promise::{Settler, rejected, run_on};
use crate::store::JsStore;
use crate::usage::JsUsage;
use atoll_engine::{
    Device, DeviceEvent, DeviceSpec, Engine, EngineOptions, FillSpec, LayerSpec, OpenReport, Result, TlsConfig, fill_piece, spawn_named,
};
use atoll_io::{MemoryStore, RadosOptions};
use atoll_map::{FrozenMap, MapLoader, Reach, Usage};
use napi::bindgen_prelude::{ClassInstance, Env, FnArgs, Function, Object};
use napi::threadsafe_function::ThreadsafeFunctionCallMode;
use napi_derive::napi;
use parking_lot::Mutex;
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

/// Events of one device that may wait for the event loop (I8). Later ones are dropped: each only asks to look.
const WAITING_EVENTS_MAX: usize = 1024;

#[napi(object)]
pub struct JsDeviceSpec {
    pub volume_id: String,
    pub size_bytes: f64,
    pub epoch: f64,
    pub batch_log_since_epoch: f64,
    pub map_lsn: f64,
    pub active: Option<f64>,
    pub next: Option<f64>,
    pub throttle: Option<JsThrottleLimits>,
    pub limits: Option<JsDeviceLimits>,
    pub aliases: Vec<u32>,
    pub ids: Vec<String>,
}

#[napi(object)]
pub struct JsRadosOptions {
    pub conf: Option<String>,
    pub keyring: Option<String>,
    pub user: String,
    pub pool: String,
    pub namespace: String,
    pub request_timeout_ms: f64,
    pub connect_timeout_ms: f64,
    pub create: bool,
}

#[napi(object)]
pub struct JsOpenReport {
    pub last_lsn: f64,
    pub frames_replayed: f64,
    pub batches_recalled: f64,
    pub torn_tail_bytes: f64,
    pub promoted_next: bool,
}

#[napi(object)]
pub struct JsFillSpec {
    pub source_id: String,
    pub target_id: String,
    pub from_slot: f64,
    pub max_bytes: f64,
    pub max_milliseconds: f64,
    pub offload: bool,
    /// 0: none.
    pub throttle: f64,
}

#[napi(object)]
pub struct JsFillReport {
    /// Nothing: all is there.
    pub next_slot: Option<f64>,
    pub copied_bytes: f64,
    pub offloaded_bytes: f64,
    pub zero_bytes: f64,
    pub verified_bytes: f64,
}

#[napi(object)]
pub struct JsEngineStats {
    pub map_bytes: f64,
    pub map_bound_bytes: f64,
    pub open_devices: u32,
    pub connections: u32,
    pub eviction_error: Option<String>,
    pub ring_refused: Option<String>,
}

/// A device that was opened, and what opening found.
#[napi(js_name = "OpenedDevice")]
pub struct JsOpenedDevice {
    engine: Arc<Engine>,
    device: Arc<Device>,
    lanes: DeviceLanes,
    report: OpenReport,
}

#[napi]
impl JsOpenedDevice {
    #[napi]
    pub fn device(&self) -> JsDevice {
        JsDevice { engine: self.engine.clone(), device: self.device.clone(), lanes: self.lanes.clone() }
    }

    #[napi]
    pub fn report(&self) -> JsOpenReport {
        JsOpenReport {
            last_lsn: self.report.last_lsn as f64,
            frames_replayed: self.report.frames_replayed as f64,
            batches_recalled: self.report.batches_recalled as f64,
            torn_tail_bytes: self.report.torn_tail_bytes as f64,
            promoted_next: self.report.promoted_next,
        }
    }
}

/// What a swap left behind for one device.
#[napi(js_name = "SwapReport")]
pub struct JsSwapReport {
    engine: Arc<Engine>,
    frozen: FrozenMap,
    lsn: u64,
    pause: Duration,
}

#[napi]
impl JsSwapReport {
    #[napi]
    pub fn frozen(&self) -> JsFrozenMap {
        JsFrozenMap { engine: self.engine.clone(), map: self.frozen.clone() }
    }

    #[napi]
    pub fn lsn(&self) -> f64 {
        self.lsn as f64
    }

    #[napi]
    pub fn pause_ms(&self) -> f64 {
        self.pause.as_secs_f64() * 1000.0
    }
}

#[napi(js_name = "Engine")]
pub struct JsEngine {
    engine: Arc<Engine>,
}

#[napi]
impl JsEngine {
    #[napi(constructor)]
    pub fn new(
        env: Env,
        page_file: Option<String>,
        cache_bound_bytes: Option<f64>,
        batch_log_directory: Option<String>,
        without_io_uring: bool,
    ) -> napi::Result<JsEngine> {
        let engine = guard(|| {
            let cache_bound_bytes = cache_bound_bytes.map(|bytes| to_u64("cacheBoundBytes", bytes)).transpose()?;
            Engine::new(EngineOptions {
                page_file: page_file.map(Into::into),
                cache_bound_bytes,
                batch_log_directory: batch_log_directory.map(Into::into),
                without_io_uring,
            })
        })?;
        // The environment owns the engine until it ends, so that the last handle is never dropped by a thread of the engine,
        // which would have to wait for itself.
        env.add_env_cleanup_hook(engine.clone(), |engine| {
            // Nobody is left to hear of an error; what was acknowledged as flushed is durable in any case.
            let _ = engine.close();
        })?;
        Ok(JsEngine { engine })
    }

    #[napi]
    pub fn open_file_store<'env>(&self, env: &'env Env, path: String, create: bool, reserve_bytes: f64) -> napi::Result<Object<'env>> {
        let engine = self.engine.clone();
        run_on(env, self.engine.control(), move || JsStore::open_file(engine, &path, create, to_u64("reserveBytes", reserve_bytes)?))
    }

    #[napi]
    pub fn open_rados_store<'env>(&self, env: &'env Env, options: JsRadosOptions) -> napi::Result<Object<'env>> {
        let engine = self.engine.clone();
        let lanes = match self.engine.new_lanes() {
            Ok(lanes) => lanes,
            Err(error) => return rejected::<JsStore>(env, error),
        };
        let of_store = lanes.clone();
        run_on(env, &lanes.control, move || {
            let options = RadosOptions {
                conf: options.conf.map(Into::into),
                keyring: options.keyring.map(Into::into),
                user: options.user,
                pool: options.pool,
                namespace: options.namespace,
                request_timeout: Duration::from_millis(to_u64("requestTimeoutMs", options.request_timeout_ms)?),
                connect_timeout: Duration::from_millis(to_u64("connectTimeoutMs", options.connect_timeout_ms)?),
                create: options.create,
            };
            JsStore::open_rados(engine, options, of_store)
        })
    }

    #[napi]
    pub fn memory_store(&self, capacity_bytes: f64, record: bool) -> napi::Result<JsStore> {
        guard(|| {
            let store = MemoryStore::new(to_u64("capacityBytes", capacity_bytes)?, record);
            Ok(JsStore::memory(self.engine.clone(), store))
        })
    }

    #[napi]
    pub fn fault_store(&self, inner: &JsStore) -> napi::Result<JsStore> {
        guard(|| Ok(JsStore::fault(self.engine.clone(), inner)))
    }

    #[napi]
    pub fn map_loader(&self, root: JsRootRef) -> napi::Result<JsMapLoader> {
        guard(|| {
            let loader = MapLoader::new(self.engine.cache(), to_root(&root)?);
            Ok(JsMapLoader { engine: self.engine.clone(), loader: Mutex::new(Some(loader)) })
        })
    }

    #[napi]
    pub fn usage(&self) -> napi::Result<JsUsage> {
        guard(|| Ok(JsUsage { usage: Bulky::new(self.engine.clone(), Usage::default()) }))
    }

    #[napi]
    pub fn reach(&self) -> napi::Result<JsReach> {
        guard(|| Ok(JsReach { reach: Bulky::new(self.engine.clone(), Reach::default()) }))
    }

    #[napi]
    pub fn map_check(&self, watched_pages: &[f64], watched_layers: &[u32]) -> napi::Result<JsMapCheck> {
        guard(|| JsMapCheck::watching(self.engine.clone(), watched_pages, watched_layers))
    }

    #[napi]
    pub fn uniform_map(&self, owner: f64) -> napi::Result<JsFrozenMap> {
        guard(|| {
            let map = FrozenMap::uniform(self.engine.cache(), to_u32("owner", owner)?);
            Ok(JsFrozenMap { engine: self.engine.clone(), map })
        })
    }

    #[napi]
    pub fn open_device<'env>(
        &self,
        env: &'env Env,
        spec: JsDeviceSpec,
        map: &JsFrozenMap,
        stores: Vec<ClassInstance<'env, JsStore>>,
        on_event: Option<Function<'env, FnArgs<(String, String)>, ()>>,
    ) -> napi::Result<Object<'env>> {
        let on_event = on_event.map(event_sender).transpose()?;
        let spec = match to_spec(spec, map, &stores, on_event) {
            Ok(spec) => spec,
            Err(error) => return rejected::<JsOpenedDevice>(env, error),
        };
        let aliases: Vec<u32> = spec.layers.iter().map(|layer| layer.alias).collect();
        let lanes = DeviceLanes::of(&aliases, &stores, spec.active, spec.next);
        let control = lanes.control();
        let engine = self.engine.clone();
        run_on(env, control.as_ref().map_or_else(|| self.engine.control(), |lanes| &lanes.control), move || {
            let (device, report) = engine.open_device(spec)?;
            lanes.opened(report.promoted_next);
            Ok(JsOpenedDevice { engine, device, lanes, report })
        })
    }

    #[napi]
    pub fn open_file_device<'env>(&self, env: &'env Env, path: String) -> napi::Result<Object<'env>> {
        let engine = self.engine.clone();
        run_on(env, self.engine.control(), move || {
            let device = engine.open_file_device(Path::new(&path))?;
            Ok(JsDevice { engine, device, lanes: DeviceLanes::default() })
        })
    }

    #[napi]
    pub fn swap<'env>(
        &self,
        env: &'env Env,
        devices: Vec<ClassInstance<'env, JsDevice>>,
        aliases: Vec<u32>,
        ids: Vec<String>,
        stores: Vec<ClassInstance<'env, JsStore>>,
        deadline_ms: f64,
    ) -> napi::Result<Object<'env>> {
        let arguments = to_layers(&aliases, &ids, &stores).and_then(|layers| {
            if layers.len() != devices.len() {
                return Err(invalid("devices", devices.len(), "as many as next layers"));
            }
            let deadline = Duration::from_millis(to_u64("deadlineMs", deadline_ms)?);
            Ok((devices.iter().map(|device| device.device.clone()).zip(layers).collect::<Vec<_>>(), deadline))
        });
        let (pairs, deadline) = match arguments {
            Ok(arguments) => arguments,
            Err(error) => return rejected::<Vec<JsSwapReport>>(env, error),
        };
        let engine = self.engine.clone();
        let lanes = stores.iter().find_map(|store| store.lanes.clone());
        let of_devices: Vec<DeviceLanes> = devices.iter().map(|device| device.lanes.clone()).collect();
        let of_layers: Vec<_> = aliases.into_iter().zip(stores.iter().map(|store| store.lanes.clone())).collect();
        run_on(env, lanes.as_ref().map_or_else(|| self.engine.control(), |lanes| &lanes.control), move || {
            let reports = Device::swap(&pairs, deadline)?.into_iter();
            for (of_device, (alias, of_layer)) in of_devices.iter().zip(of_layers) {
                of_device.swapped(alias, of_layer);
            }
            Ok(reports
                .map(|report| JsSwapReport { engine: engine.clone(), frozen: report.frozen, lsn: report.lsn, pause: report.pause })
                .collect::<Vec<_>>())
        })
    }

    #[napi]
    pub fn fill_piece<'env>(
        &self,
        env: &'env Env,
        spec: JsFillSpec,
        source: &JsStore,
        target: &JsStore,
        runs: &[f64],
    ) -> napi::Result<Object<'env>> {
        let runs = match to_runs(runs) {
            Ok(runs) => runs,
            Err(error) => return rejected::<JsFillReport>(env, error),
        };
        let lanes = target.lanes.clone().or_else(|| source.lanes.clone());
        let (engine, source, target) = (self.engine.clone(), source.store.clone(), target.store.clone());
        run_on(env, lanes.as_ref().map_or_else(|| self.engine.bulk(), |lanes| &lanes.bulk), move || {
            // No map is asked: which alias it has does not matter.
            let layer = |id: &str, store| -> Result<LayerSpec> { Ok(LayerSpec { alias: 1, id: to_layer_id(id)?, store }) };
            let spec = FillSpec {
                source: &layer(&spec.source_id, source)?,
                target: &layer(&spec.target_id, target)?,
                runs: &runs,
                from_slot: to_u64("fromSlot", spec.from_slot)?,
                bytes_max: to_u64("maxBytes", spec.max_bytes)?,
                time_max: Duration::from_millis(to_u64("maxMilliseconds", spec.max_milliseconds)?),
                may_offload: spec.offload,
                bytes_per_second: to_u64("throttle", spec.throttle)?,
            };
            let report = fill_piece(&spec, &|| engine.is_closing())?;
            Ok(JsFillReport {
                next_slot: report.next_slot.map(|slot| slot as f64),
                copied_bytes: report.copied_bytes as f64,
                offloaded_bytes: report.offloaded_bytes as f64,
                zero_bytes: report.zero_bytes as f64,
                verified_bytes: report.verified_bytes as f64,
            })
        })
    }

    #[napi]
    pub fn read_barrier<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let engine = self.engine.clone();
        run_on(env, self.engine.control(), move || {
            engine.read_barrier();
            Ok(())
        })
    }

    #[napi]
    pub fn listen_unix<'env>(
        &self,
        env: &'env Env,
        path: String,
        mode: f64,
        group_id: Option<f64>,
        backlog: Option<f64>,
    ) -> napi::Result<Object<'env>> {
        let engine = self.engine.clone();
        run_on(env, self.engine.control(), move || {
            let group_id = group_id.map(|id| to_u32("groupId", id)).transpose()?;
            let backlog = backlog.map(|count| to_u32("backlog", count)).transpose()?;
            let listener = engine.listen_unix(Path::new(&path), to_u32("mode", mode)?, group_id, backlog)?;
            JsListener::start(engine, listener)
        })
    }

    #[napi]
    pub fn listen_tcp<'env>(&self, env: &'env Env, host: String, port: f64) -> napi::Result<Object<'env>> {
        let engine = self.engine.clone();
        run_on(env, self.engine.control(), move || {
            let port = u16::try_from(to_u64("port", port)?).map_err(|_| invalid("port", port, "at most 65535"))?;
            let listener = engine.listen_tcp(&host, port)?;
            JsListener::start(engine, listener)
        })
    }

    #[napi]
    pub fn load_tls<'env>(&self, env: &'env Env, directory: String, verify_clients: bool) -> napi::Result<Object<'env>> {
        run_on(env, self.engine.control(), move || {
            let config = TlsConfig::load(Path::new(&directory), verify_clients)?;
            Ok(JsTlsConfig { config: Arc::new(config) })
        })
    }

    #[napi]
    pub fn stats(&self) -> napi::Result<JsEngineStats> {
        guard(|| {
            let stats = self.engine.stats();
            Ok(JsEngineStats {
                map_bytes: stats.map_bytes as f64,
                map_bound_bytes: stats.map_bound_bytes as f64,
                open_devices: stats.open_devices as u32,
                connections: stats.connections as u32,
                eviction_error: stats.eviction_error,
                ring_refused: stats.ring_refused,
            })
        })
    }

    /// On a thread of its own: it waits for all the others.
    #[napi]
    pub fn close<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        let (settler, promise) = Settler::<()>::new(env)?;
        let settler = Arc::new(settler);
        let (engine, on_thread) = (self.engine.clone(), settler.clone());
        if let Err(error) = spawn_named("atoll-close", move || on_thread.settle(crate::convert::caught(|| engine.close()))) {
            settler.settle(Err(error));
        }
        Ok(promise)
    }
}

fn to_spec(
    spec: JsDeviceSpec,
    map: &JsFrozenMap,
    stores: &[ClassInstance<'_, JsStore>],
    on_event: Option<EventSender>,
) -> Result<DeviceSpec> {
    Ok(DeviceSpec {
        volume: to_uuid("volumeId", &spec.volume_id)?,
        size_bytes: to_u64("sizeBytes", spec.size_bytes)?,
        epoch: to_u64("epoch", spec.epoch)?,
        map: map.map.clone(),
        map_lsn: to_u64("mapLsn", spec.map_lsn)?,
        layers: to_layers(&spec.aliases, &spec.ids, stores)?,
        active: spec.active.map(|alias| to_u32("active", alias)).transpose()?,
        next: spec.next.map(|alias| to_u32("next", alias)).transpose()?,
        throttle: to_throttle_limits(spec.throttle)?,
        limits: to_device_limits(spec.limits)?,
        batch_log: None,
        batch_log_since_epoch: to_u64("batchLogSinceEpoch", spec.batch_log_since_epoch)?,
        on_event,
    })
}

type EventSender = Box<dyn Fn(DeviceEvent) + Send + Sync>;

/// A function that calls `listener` on the event loop without keeping that alive, and never blocks the thread that has an event.
fn event_sender(listener: Function<'_, FnArgs<(String, String)>, ()>) -> napi::Result<EventSender> {
    let listener = listener
        .build_threadsafe_function::<FnArgs<(String, String)>>()
        .callee_handled::<false>()
        .weak::<true>()
        .max_queue_size::<WAITING_EVENTS_MAX>()
        .build()?;
    Ok(Box::new(move |event| {
        let (kind, message) = match event {
            DeviceEvent::CheckpointWanted => ("checkpoint-wanted", String::new()),
            DeviceEvent::Poisoned(message) => ("poisoned", message),
            DeviceEvent::FlushFailed(message) => ("flush-failed", message),
        };
        listener.call((kind.to_owned(), message).into(), ThreadsafeFunctionCallMode::NonBlocking);
    }))
}
