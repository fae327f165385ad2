//! One engine: the memory of its maps, its threads, and everything that is open in it, so that it can be closed as a whole.
//!
//! Rules: the engine holds devices, listeners and connections weakly (who opened them owns them); closing ends them in
//! the order in which requests flow, so that nothing new arrives where something has ended.
use crate::net::ConnectionCount;
use crate::thread::spawn_named;
use crate::{
    BatchLogPlace, Connection, ControlPool, Device, DeviceLimits, DeviceSpec, EngineError, Lanes, LayerSpec, Listener, OpenReport,
    ReadPath, Result, ThrottleLimits,
};
use atoll_io::{RawFileStore, probe_ring};
use atoll_map::{FrozenMap, MapCache};
use parking_lot::{Condvar, Mutex};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Threads for what changes the state of devices (open, checkpoint, swap, close) and for short calls to stores.
const CONTROL_THREAD_COUNT: usize = 8;
/// Threads for data calls made from above. They may wait for a checkpoint, which the control threads make.
const DATA_THREAD_COUNT: usize = 8;
/// Threads for what may take long: copies, punching, differences of whole maps.
const BULK_THREAD_COUNT: usize = 4;

/// Memory for maps: at least this, and this much for each TiB that is open.
const CACHE_BYTES_PER_TIB: u64 = 128 << 20;

/// The least that a barrier waits for each device.
const BARRIER_STEP: Duration = Duration::from_millis(200);

/// How often the cache of maps is compared with its bound.
const EVICT_INTERVAL: Duration = Duration::from_millis(250);
/// Pause after an eviction that failed (the page file's disk is full): the maps stay in memory meanwhile.
const EVICT_RETRY_INTERVAL: Duration = Duration::from_secs(5);

/// How an engine is set up.
#[derive(Debug, Clone, Default)]
pub struct EngineOptions {
    /// The local file that clean leaves of maps are evicted to; `None`: maps stay in memory.
    pub page_file: Option<PathBuf>,
    /// Memory for maps; `None`: 128 MiB for each TiB open, at least 128 MiB.
    pub cache_bound_bytes: Option<u64>,
    /// A local directory in which open batches outlive the process; `None`: after a kill only what was flushed is there.
    pub batch_log_directory: Option<PathBuf>,
    /// Reads wait on threads even where the kernel would do it.
    pub without_io_uring: bool,
}

/// Gauges of an engine.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EngineStats {
    /// Bytes of map nodes in memory.
    pub map_bytes: u64,
    /// The bound that eviction keeps.
    pub map_bound_bytes: u64,
    /// Devices that are open.
    pub open_devices: usize,
    /// Connections that live.
    pub connections: usize,
    /// Why the last eviction failed, if it did.
    pub eviction_error: Option<String>,
    /// Why reads wait on workers, if they do.
    pub ring_refused: Option<String>,
}

#[derive(Default)]
struct Registry {
    devices: Vec<Weak<Device>>,
    listeners: Vec<Weak<Listener>>,
    connections: Vec<Weak<Connection>>,
    cache_bound_bytes: u64,
    eviction_error: Option<String>,
}

/// What the evictor needs; it must not keep the engine alive.
struct Shared {
    cache: Arc<MapCache>,
    fixed_bound_bytes: Option<u64>,
    registry: Mutex<Registry>,
    is_closing: AtomicBool,
    /// Set to end the evictor.
    stop: Mutex<bool>,
    stop_changed: Condvar,
}

/// An engine. Several may live in one process; they share nothing.
pub struct Engine {
    shared: Arc<Shared>,
    control: ControlPool,
    data: ControlPool,
    bulk: ControlPool,
    /// Of backends that may hang; who uses them owns them.
    lanes: Mutex<Vec<Weak<Lanes>>>,
    connection_count: ConnectionCount,
    batch_log: Option<BatchLogPlace>,
    /// Why reads wait on workers; `None`: they wait in rings. Found out once.
    ring_refused: Option<String>,
    evictor: Mutex<Option<JoinHandle<()>>>,
    /// Held while the engine is closed, so that a second caller waits for the first.
    closing: Mutex<bool>,
}

impl Engine {
    /// Starts an engine. `PAGE_FILE_ERROR` if the page file cannot be made.
    pub fn new(options: EngineOptions) -> Result<Arc<Engine>> {
        let bound_bytes = options.cache_bound_bytes.unwrap_or(CACHE_BYTES_PER_TIB);
        let shared = Arc::new(Shared {
            cache: MapCache::new(options.page_file.as_deref(), bound_bytes)?,
            fixed_bound_bytes: options.cache_bound_bytes,
            registry: Mutex::new(Registry { cache_bound_bytes: bound_bytes, ..Registry::default() }),
            is_closing: AtomicBool::new(false),
            stop: Mutex::new(false),
            stop_changed: Condvar::new(),
        });
        let on_thread = shared.clone();
        let evictor = spawn_named("atoll-evict", move || on_thread.evict_until_stopped())?;
        Ok(Arc::new(Engine {
            shared,
            control: ControlPool::new("atoll-control", CONTROL_THREAD_COUNT),
            data: ControlPool::new("atoll-data", DATA_THREAD_COUNT),
            bulk: ControlPool::new("atoll-bulk", BULK_THREAD_COUNT),
            lanes: Mutex::default(),
            connection_count: ConnectionCount::default(),
            batch_log: options.batch_log_directory.map(BatchLogPlace::here).transpose()?,
            ring_refused: if options.without_io_uring {
                Some("it is switched off".to_owned())
            } else {
                probe_ring().err().map(|error| format!("the kernel refuses io_uring: {error}"))
            },
            evictor: Mutex::new(Some(evictor)),
            closing: Mutex::new(false),
        }))
    }

    /// How connections of this engine wait for reads.
    pub fn read_path(&self) -> ReadPath {
        if self.ring_refused.is_none() { ReadPath::Ring } else { ReadPath::Workers }
    }
    /// The memory of maps.
    pub fn cache(&self) -> Arc<MapCache> {
        self.shared.cache.clone()
    }
    /// For what changes the state of devices, and short calls to stores. Never wait for data calls here.
    pub fn control(&self) -> &ControlPool {
        &self.control
    }
    /// For data calls to devices.
    pub fn data(&self) -> &ControlPool {
        &self.data
    }
    /// For what may take long.
    pub fn bulk(&self) -> &ControlPool {
        &self.bulk
    }
    /// Threads for a backend that may hang, which is to keep nobody else waiting. They are closed with the engine at the latest.
    pub fn new_lanes(&self) -> Result<Arc<Lanes>> {
        let lanes = Arc::new(Lanes::new(CONTROL_THREAD_COUNT, DATA_THREAD_COUNT, BULK_THREAD_COUNT));
        let mut known = self.lanes.lock();
        // `close` takes the list under the same lock, after it has said so.
        self.refuse_if_closing()?;
        known.retain(|lanes| lanes.strong_count() > 0);
        known.push(Arc::downgrade(&lanes));
        Ok(lanes)
    }
    /// Long work looks at this between its steps.
    pub fn is_closing(&self) -> bool {
        self.shared.is_closing.load(Ordering::Acquire)
    }

    fn refuse_if_closing(&self) -> Result<()> {
        if self.is_closing() {
            return Err(EngineError::new("ENGINE_CLOSED", libc::ESHUTDOWN, "the engine is closed"));
        }
        Ok(())
    }

    /// Opens a device (see `Device::open`) that is closed with the engine at the latest.
    pub fn open_device(&self, mut spec: DeviceSpec) -> Result<(Arc<Device>, OpenReport)> {
        self.refuse_if_closing()?;
        spec.batch_log = spec.batch_log.or_else(|| self.batch_log.clone());
        let (device, report) = Device::open(spec)?;
        self.shared.registry.lock().devices.push(Arc::downgrade(&device));
        self.shared.update_cache_bound();
        if self.is_closing() {
            // `close` may have looked at the registry before the device was in it.
            device.close()?;
            self.refuse_if_closing()?;
        }
        Ok((device, report))
    }

    /// Opens a regular file as a read-only device: bytes that nobody of ours wrote, as a source. Changes nothing of the file.
    pub fn open_file_device(&self, path: &Path) -> Result<Arc<Device>> {
        let store = RawFileStore::open(path)?;
        // The one layer of the file owns every slot.
        let alias = 1;
        let spec = DeviceSpec {
            volume: [0; 16],
            size_bytes: store.length_bytes(),
            epoch: 0,
            map: FrozenMap::uniform(self.cache(), alias),
            map_lsn: 0,
            layers: vec![LayerSpec { alias, id: RawFileStore::LAYER, store: Arc::new(store) }],
            active: None,
            next: None,
            throttle: ThrottleLimits::default(),
            limits: DeviceLimits::default(),
            batch_log: None,
            batch_log_since_epoch: 0,
            on_event: None,
        };
        Ok(self.open_device(spec)?.0)
    }

    /// Closes a device and forgets it.
    pub fn close_device(&self, device: &Arc<Device>) -> Result<()> {
        let result = device.close();
        self.shared.registry.lock().devices.retain(|known| known.as_ptr() != Arc::as_ptr(device));
        self.shared.update_cache_bound();
        result
    }

    /// Waits until every request that was in flight on any open device has finished (I5), for this time at most. Returns what is open
    /// and has requests that have not.
    pub fn read_barrier(&self, wait_max: Duration) -> Vec<[u8; 16]> {
        let started_at = Instant::now();
        let mut hung: Vec<_> = self.shared.devices();
        // Those that hang have the time together; the others are not held up by them.
        hung.retain(|device| !device.read_barrier(wait_max.min(BARRIER_STEP)));
        hung.retain(|device| !device.read_barrier(wait_max.saturating_sub(started_at.elapsed()).max(BARRIER_STEP.min(wait_max))));
        hung.iter().map(|device| device.volume()).collect()
    }

    /// Listens on a Unix socket; see `Listener`.
    pub fn listen_unix(&self, path: &Path, mode: u32, group_id: Option<u32>, backlog: Option<u32>) -> Result<Arc<Listener>> {
        self.refuse_if_closing()?;
        self.keep_listener(Listener::unix(path, mode, group_id, backlog, self.connection_count.clone())?)
    }

    /// Listens on a TCP address; port 0 picks a free one.
    pub fn listen_tcp(&self, host: &str, port: u16) -> Result<Arc<Listener>> {
        self.refuse_if_closing()?;
        self.keep_listener(Listener::tcp(host, port, self.connection_count.clone())?)
    }

    fn keep_listener(&self, listener: Listener) -> Result<Arc<Listener>> {
        let listener = Arc::new(listener);
        let mut registry = self.shared.registry.lock();
        registry.listeners.retain(|known| known.strong_count() > 0);
        registry.listeners.push(Arc::downgrade(&listener));
        drop(registry);
        if self.is_closing() {
            listener.close();
            self.refuse_if_closing()?;
        }
        Ok(listener)
    }

    /// Waits for the next connection of a listener of this engine; `None` once it is closed.
    pub fn accept(&self, listener: &Listener) -> Result<Option<Arc<Connection>>> {
        let Some(connection) = listener.accept()? else {
            return Ok(None);
        };
        let mut registry = self.shared.registry.lock();
        registry.connections.retain(|known| known.strong_count() > 0);
        registry.connections.push(Arc::downgrade(&connection));
        drop(registry);
        if self.is_closing() {
            connection.close();
            return Ok(None);
        }
        Ok(Some(connection))
    }

    /// Gauges.
    pub fn stats(&self) -> EngineStats {
        let open_devices = self.shared.devices().len();
        let registry = self.shared.registry.lock();
        EngineStats {
            map_bytes: self.shared.cache.used_bytes(),
            map_bound_bytes: registry.cache_bound_bytes,
            open_devices,
            connections: self.connection_count.get(),
            eviction_error: registry.eviction_error.clone(),
            ring_refused: self.ring_refused.clone(),
        }
    }

    /// Closes listeners, connections and devices, runs what is queued to its end, joins the threads. Returns the first
    /// error that closing a device gave; everything is closed in any case. Idempotent. Never call it from a thread of the engine.
    pub fn close(&self) -> Result<()> {
        let mut is_closed = self.closing.lock();
        if *is_closed {
            return Ok(());
        }
        self.shared.is_closing.store(true, Ordering::Release);
        let (listeners, connections) = {
            let mut registry = self.shared.registry.lock();
            (std::mem::take(&mut registry.listeners), std::mem::take(&mut registry.connections))
        };
        for listener in listeners.iter().filter_map(Weak::upgrade) {
            listener.close();
        }
        let connections: Vec<_> = connections.iter().filter_map(Weak::upgrade).collect();
        for connection in &connections {
            connection.close();
        }
        // Before the connections are waited for: a request of theirs may wait for something that only the end of its device gives.
        let mut result = Ok(());
        for device in self.shared.devices() {
            result = result.and(device.close());
        }
        for connection in connections {
            connection.wait_ended();
        }
        let lanes = std::mem::take(&mut *self.lanes.lock());
        for lanes in lanes.iter().filter_map(Weak::upgrade) {
            lanes.close();
        }
        self.data.close();
        self.bulk.close();
        self.control.close();
        *self.shared.stop.lock() = true;
        self.shared.stop_changed.notify_all();
        if let Some(evictor) = self.evictor.lock().take() {
            // It ends in order only.
            let _ = evictor.join();
        }
        *is_closed = true;
        result
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // Whoever wanted to know whether the last flush worked has called `close`.
        let _ = self.close();
    }
}

impl Shared {
    fn devices(&self) -> Vec<Arc<Device>> {
        let mut registry = self.registry.lock();
        registry.devices.retain(|device| device.strong_count() > 0);
        registry.devices.iter().filter_map(Weak::upgrade).collect()
    }

    fn update_cache_bound(&self) {
        let open_bytes: u64 = self.devices().iter().map(|device| device.size_bytes()).sum();
        let by_size = (u128::from(open_bytes) * u128::from(CACHE_BYTES_PER_TIB)) >> 40;
        let bound_bytes = self.fixed_bound_bytes.unwrap_or((by_size as u64).max(CACHE_BYTES_PER_TIB));
        let mut registry = self.registry.lock();
        if registry.cache_bound_bytes != bound_bytes {
            registry.cache_bound_bytes = bound_bytes;
            self.cache.set_bound(bound_bytes);
        }
    }

    /// The evictor's thread. Requests never evict.
    fn evict_until_stopped(&self) {
        let mut interval = EVICT_INTERVAL;
        loop {
            {
                let mut stop = self.stop.lock();
                if !*stop {
                    self.stop_changed.wait_for(&mut stop, interval);
                }
                if *stop {
                    return;
                }
            }
            self.update_cache_bound();
            let bound_bytes = self.registry.lock().cache_bound_bytes;
            if self.cache.used_bytes() <= bound_bytes {
                continue;
            }
            let error = self.cache.evict().err().map(|error| error.to_string());
            interval = if error.is_some() { EVICT_RETRY_INTERVAL } else { EVICT_INTERVAL };
            self.registry.lock().eviction_error = error;
        }
    }
}
