//! The rados kind: a layer is objects of 4 MiB in a namespace of a RADOS pool.
//!
//! | object | is |
//! |---|---|
//! | `head` | says that a pool of ours is here, and of which version |
//! | `lock` | carries the lock |
//! | `index.layers`, `index.segments`, `index.records` | names of what there is, as omap keys |
//! | `layer.<uuid>` | stands for a layer; its omap keys are the indexes of its objects, 8 hex digits; who writes its journal (`claim.rs`) |
//! | `<uuid>.<index, 8 hex digits>` | 4 MiB of a layer, or as much as was written of them |
//! | `journal.<uuid>.<base lsn, 16 hex digits>` | a journal segment of that layer |
//! | `record.<name>` | a small record |
//!
//! A name stands in its index before the object is made and goes after it: an index may name what is not there, and never lacks what
//! is. So nothing is ever looked for by listing the objects of the RADOS pool, which may be shared with others.
//!
//! A request that was answered is durable, so that syncs cost nothing. Indexes that are kept in memory are true because the holder of
//! the lock is the only one who changes them; they are read again when the lock is taken. One connection serves one store and is what
//! a fence shuts out: all volumes of a pool at once, as its lock is one.
mod claim;
mod cluster;
mod layer;
mod layers;
mod library;
mod lock;
mod object;
mod segment;
mod watch;

use crate::error::{layer_object, segment_object};
use crate::store::is_record_name;
use crate::{
    IoError, IoErrorCode, JournalWriter, LayerEntry, LayerId, LayerIo, OpenMode, Result, SegmentIo, Store, StoreCapabilities, StoreHealth,
    StoreLock, StoreUsage,
};
pub use cluster::RadosOptions;
use cluster::{Cluster, Name};
use layer::{Layer, RadosLayer};
use layers::{Layers, layers_index};
use parking_lot::Mutex;
use segment::RadosSegment;
use std::collections::{BTreeSet, HashMap};
use std::ffi::CString;
use std::sync::Arc;
use std::time::Instant;
use watch::{PoolFigures, Watch};

const HEAD: &[u8] = b"atoll pool, version 1\n";

/// A record is written in one request; the cluster takes up to 90 MiB.
const RECORD_BYTES_MAX: u64 = 64 << 20;

/// A namespace of a RADOS pool.
pub struct RadosStore {
    cluster: Arc<Cluster>,
    layers: Arc<Layers>,
    segments: Mutex<HashMap<LayerId, BTreeSet<u64>>>,
    /// Names of records that stand in the index for the next writing of each.
    expected: Mutex<BTreeSet<String>>,
    watch: Watch,
    /// Cookie of the lock that was taken last.
    cookie: Mutex<Option<CString>>,
    /// The text that it was taken with.
    owner: Mutex<String>,
}

impl Drop for RadosStore {
    fn drop(&mut self) {
        self.layers.end();
    }
}

fn head() -> Name {
    Name::new(format_args!("head"))
}

fn segments_index() -> Name {
    Name::new(format_args!("index.segments"))
}

fn records_index() -> Name {
    Name::new(format_args!("index.records"))
}

fn segment_key(layer: LayerId, base_lsn: u64) -> String {
    format!("{layer}.{base_lsn:016x}")
}

fn parse_segment_key(key: &str) -> Option<(LayerId, u64)> {
    let (layer, lsn) = key.split_once('.')?;
    let is_lsn = lsn.len() == 16 && lsn.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'));
    Some((LayerId::parse(layer)?, is_lsn.then(|| u64::from_str_radix(lsn, 16).ok())??))
}

fn segment_name(layer: LayerId, base_lsn: u64) -> Name {
    Name::new(format_args!("journal.{layer}.{base_lsn:016x}"))
}

fn record_name(name: &str) -> Result<Name> {
    if !is_record_name(name) {
        return Err(IoError::from_errno("record", format!("record {name}"), 0, libc::EINVAL));
    }
    Ok(Name::new(format_args!("record.{name}")))
}

/// Looks for the pool, and makes it if there is none and that is wanted.
fn find_head(cluster: &Cluster, create: bool) -> Result<()> {
    let mut found = vec![0; HEAD.len() + 1];
    // SAFETY: the buffer lives until the wait is over.
    let reading = unsafe { cluster.start_read(&head(), 0, found.as_mut_ptr(), found.len()) };
    match cluster.wait_shortly(reading) {
        length if length >= 0 => {
            if &found[..length as usize] == HEAD {
                return Ok(());
            }
            let text = String::from_utf8_lossy(&found[..length as usize]).trim().to_owned();
            let message = format!("the pool is of another version ({text:?}): open it with the Atoll that made it, or a newer one");
            Err(IoError::new(IoErrorCode::Version, "open", head().to_string(), 0, message))
        }
        code if code != -libc::ENOENT => Err(cluster.error("open", head(), 0, -code)),
        _ if !create => {
            let message = "there is no pool of Atoll in this namespace";
            Err(IoError::new(IoErrorCode::NotFound, "open", head().to_string(), 0, message))
        }
        _ => {
            cluster.check_may_fence()?;
            // The indexes first: where they cannot be (erasure-coded pools) nothing is made.
            for index in [layers_index(), segments_index(), records_index()] {
                cluster.add_to_index_now(&index, &["~".to_owned()])?;
                cluster.remove_from_index(&index, &["~".to_owned()])?;
            }
            let mut change = cluster.change();
            change.write_full(HEAD);
            change.even_if_full();
            cluster.apply("create", &head(), change)
        }
    }
}

impl RadosStore {
    /// Connects and looks for the pool, which is made if there is none and the options say so. Waits for the cluster no longer than
    /// they say. `Unavailable`, `Denied`; `NotFound`: the RADOS pool is not there, or no pool of ours is in it; `Version`.
    pub fn open(options: RadosOptions) -> Result<RadosStore> {
        let create = options.create;
        let cluster = Cluster::connect(options)?;
        let started_at = Instant::now();
        find_head(&cluster, create)?;
        let watch = Watch::start(&cluster, head(), started_at.elapsed())?;
        let layers = Layers::new(&cluster);
        let store = RadosStore {
            cluster,
            layers,
            segments: Mutex::default(),
            expected: Mutex::default(),
            watch,
            cookie: Mutex::default(),
            owner: Mutex::default(),
        };
        store.read_segments()?;
        Ok(store)
    }

    /// The segments that are there, of all layers.
    fn read_segments(&self) -> Result<()> {
        let keys = self.cluster.index_keys(&segments_index())?;
        let mut segments: HashMap<LayerId, BTreeSet<u64>> = HashMap::new();
        for (layer, base_lsn) in keys.iter().filter_map(|key| parse_segment_key(key)) {
            segments.entry(layer).or_default().insert(base_lsn);
        }
        *self.segments.lock() = segments;
        Ok(())
    }
}

impl Store for RadosStore {
    fn capabilities(&self) -> StoreCapabilities {
        StoreCapabilities {
            copy_unit_bytes: 4096,
            punch_unit_bytes: object::SLOT_BYTES as u32,
            can_clone: false,
            ack_is_durable: true,
            persistent: true,
            segment_growth_bytes: 0,
            waits_for_network: true,
            is_fenceable: true,
            answers_need_proof: true,
        }
    }

    fn create_layer(&self, id: LayerId) -> Result<()> {
        let _managing = self.watch.manage("create")?;
        self.cluster.add_to_index_now(&layers_index(), &[id.to_string()])?;
        let layer = Layer::create(&self.cluster, id)?;
        self.layers.add(id, layer);
        Ok(())
    }

    fn open_layer(&self, id: LayerId, mode: OpenMode) -> Result<Arc<dyn LayerIo>> {
        Ok(Arc::new(RadosLayer { layer: self.layers.get(id, false)?, is_writable: mode == OpenMode::ReadWrite }))
    }

    fn remove_layer(&self, id: LayerId) -> Result<()> {
        let _managing = self.watch.manage("remove")?;
        match self.layers.get(id, true) {
            Ok(layer) => match layer.remove() {
                Err(error) if error.code != IoErrorCode::NotFound => return Err(error),
                _ => {}
            },
            Err(error) if error.code == IoErrorCode::NotFound => {}
            Err(error) => return Err(error),
        }
        for base_lsn in self.list_segments(id)? {
            self.remove_segment(id, base_lsn)?;
        }
        self.cluster.remove_from_index(&layers_index(), &[id.to_string()])?;
        self.layers.forget(id);
        Ok(())
    }

    /// What is not known yet of a layer's objects is asked of each of them: the first call after a start takes as long as that.
    fn list_layers(&self) -> Result<Vec<LayerEntry>> {
        let _managing = self.watch.manage("list")?;
        let mut entries = Vec::new();
        for id in self.cluster.index_keys(&layers_index())?.iter().filter_map(|key| LayerId::parse(key)) {
            match self.layers.get(id, true).and_then(|layer| layer.entry()) {
                Ok(entry) => entries.push(entry),
                // Its making or its removal ended half-way, or it goes just now.
                Err(error) if error.code == IoErrorCode::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        Ok(entries)
    }

    fn list_layer_ids(&self) -> Result<Vec<LayerId>> {
        let _managing = self.watch.manage("list")?;
        let mut ids: Vec<LayerId> = self.cluster.index_keys(&layers_index())?.iter().filter_map(|key| LayerId::parse(key)).collect();
        let mut gone = BTreeSet::new();
        self.cluster.run_all(
            ids.iter().map(|id| (*id, Box::new([0u8; 16]))),
            // SAFETY: the buffer has a place of its own, which goes after the completion.
            |(id, buffer)| Ok(unsafe { Layer::start_asking(&self.cluster, *id, buffer) }),
            |(id, _), code| match -code {
                errno if errno <= 0 || errno == libc::ERANGE => Ok(()),
                // Its making or its removal ended half-way.
                libc::ENOENT => {
                    gone.insert(id);
                    Ok(())
                }
                errno => Err(self.cluster.error("list", layer_object(id), 0, errno)),
            },
        )?;
        ids.retain(|id| !gone.contains(id));
        Ok(ids)
    }

    /// Free is what the cluster says that the RADOS pool can take, replicas counted; total is that and what the pool holds. Both are
    /// 0 if the cluster does not know (no manager runs), or does not tell this user. After a start, what is stored is counted in the
    /// background; that is waited for as long as for a connection.
    fn usage(&self) -> Result<StoreUsage> {
        let _managing = self.watch.manage("usage")?;
        let PoolFigures { stored_bytes: held_bytes, free_bytes } = self.watch.figures()?;
        self.layers.wait_counted(self.cluster.options.connect_timeout);
        let (stored_bytes, _) = self.layers.stored_bytes();
        let total_bytes = if free_bytes == 0 && held_bytes == 0 { 0 } else { free_bytes + held_bytes };
        Ok(StoreUsage { total_bytes, free_bytes, stored_bytes, reserve_bytes: 0 })
    }

    fn health(&self) -> Option<StoreHealth> {
        Some(self.watch.health(self.layers.is_counted()))
    }

    fn list_segments(&self, layer: LayerId) -> Result<Vec<u64>> {
        Ok(self.segments.lock().get(&layer).map(|bases| bases.iter().copied().collect()).unwrap_or_default())
    }

    /// Two requests: the claim, and which segments there are. The lock makes what is in memory true; this does not rely on it.
    fn claim_journal(&self, layer: LayerId, epoch: u64) -> Result<()> {
        claim::claim(&self.cluster, layer, epoch, &self.owner.lock().clone())?;
        let keys = self.cluster.index_keys_from(&segments_index(), &format!("{layer}."))?;
        let found: BTreeSet<u64> = keys.iter().filter_map(|key| parse_segment_key(key)).map(|(_, base_lsn)| base_lsn).collect();
        let added: Vec<u64> = {
            let segments = self.segments.lock();
            let known = segments.get(&layer);
            found.into_iter().filter(|base_lsn| !known.is_some_and(|bases| bases.contains(base_lsn))).collect()
        };
        for base_lsn in added {
            // One that is not there was not made before the claim, and is never written.
            if self.cluster.stat(&segment_name(layer, base_lsn))?.is_some() {
                self.segments.lock().entry(layer).or_default().insert(base_lsn);
            }
        }
        Ok(())
    }

    fn journal_writer(&self, layer: LayerId) -> Result<Option<JournalWriter>> {
        claim::writer(&self.cluster, layer)
    }

    fn create_segment(&self, layer: LayerId, base_lsn: u64, epoch: u64) -> Result<Arc<dyn SegmentIo>> {
        let exists = || IoError::new(IoErrorCode::Exists, "create", segment_object(layer, base_lsn), 0, "the segment is there already");
        if self.segments.lock().get(&layer).is_some_and(|bases| bases.contains(&base_lsn)) {
            return Err(exists());
        }
        self.cluster.add_to_index_now(&segments_index(), &[segment_key(layer, base_lsn)])?;
        let name = segment_name(layer, base_lsn);
        let segment = RadosSegment::create(&self.cluster, name, epoch)?;
        let owner = self.owner.lock().clone();
        // If not, it stays, empty: whoever has the newer epoch may read it just now, and cuts it off.
        claim::claim(&self.cluster, layer, epoch, &owner)?;
        self.segments.lock().entry(layer).or_default().insert(base_lsn);
        Ok(Arc::new(segment))
    }

    fn open_segment(&self, layer: LayerId, base_lsn: u64) -> Result<Arc<dyn SegmentIo>> {
        let name = segment_name(layer, base_lsn);
        if self.cluster.stat(&name)?.is_none() {
            let object = segment_object(layer, base_lsn);
            return Err(IoError::new(IoErrorCode::NotFound, "open", object, 0, "there is no such segment"));
        }
        Ok(Arc::new(RadosSegment::open(&self.cluster, name)))
    }

    fn remove_segment(&self, layer: LayerId, base_lsn: u64) -> Result<()> {
        let name = segment_name(layer, base_lsn);
        match self.cluster.start_remove(&name).wait() {
            code if code < 0 && code != -libc::ENOENT => return Err(self.cluster.error("remove", name, 0, -code)),
            _ => {}
        }
        self.cluster.remove_from_index(&segments_index(), &[segment_key(layer, base_lsn)])?;
        let mut segments = self.segments.lock();
        if let Some(bases) = segments.get_mut(&layer) {
            bases.remove(&base_lsn);
            if bases.is_empty() {
                segments.remove(&layer);
            }
        }
        Ok(())
    }

    fn read_record(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let _managing = self.watch.manage("read")?;
        self.cluster.read_whole(&record_name(name)?, RECORD_BYTES_MAX)
    }

    fn write_record(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let object = record_name(name)?;
        if bytes.len() as u64 > RECORD_BYTES_MAX {
            return Err(IoError::from_errno("write", object.to_string(), RECORD_BYTES_MAX, libc::EFBIG));
        }
        let _managing = self.watch.manage("write")?;
        if !self.expected.lock().remove(name) {
            self.cluster.add_to_index_now(&records_index(), &[name.to_owned()])?;
        }
        let mut change = self.cluster.change();
        change.write_full(bytes);
        // Nothing is deleted before the records say so.
        change.beyond_full();
        self.cluster.apply("write", &object, change)
    }

    /// A name that nobody comes to write stays in the index, as one whose writing a crash interrupted.
    fn expect_records(&self, names: &[String]) -> Result<()> {
        for name in names {
            record_name(name)?;
        }
        let _managing = self.watch.manage("index")?;
        self.cluster.add_to_index_now(&records_index(), names)?;
        self.expected.lock().extend(names.iter().cloned());
        Ok(())
    }

    fn list_records(&self, prefix: &str) -> Result<Vec<String>> {
        let _managing = self.watch.manage("list")?;
        let mut names = self.cluster.index_keys(&records_index())?;
        names.retain(|name| name.starts_with(prefix) && is_record_name(name));
        let mut buffers = vec![[0u8; 1]; names.len()];
        let mut found = Vec::new();
        self.cluster.run_all(
            names.into_iter().zip(&mut buffers),
            |(name, buffer)| {
                // SAFETY: each has a buffer of its own, which lives until all are done.
                Ok(unsafe { self.cluster.start_read(&record_name(name)?, 0, buffer.as_mut_ptr(), 1) })
            },
            |(name, _), code| match -code {
                errno if errno <= 0 => {
                    found.push(name);
                    Ok(())
                }
                // It is only expected, or a crash interrupted its first writing: it stands in the index alone.
                libc::ENOENT => Ok(()),
                errno => Err(self.cluster.error("list", format!("record {name}"), 0, errno)),
            },
        )?;
        found.sort_unstable();
        Ok(found)
    }

    fn remove_record(&self, name: &str) -> Result<()> {
        let object = record_name(name)?;
        let _managing = self.watch.manage("remove")?;
        self.expected.lock().remove(name);
        match self.cluster.start_remove(&object).wait() {
            code if code < 0 && code != -libc::ENOENT => return Err(self.cluster.error("remove", object, 0, -code)),
            _ => {}
        }
        self.cluster.remove_from_index(&records_index(), &[name.to_owned()])
    }

    fn lock(&self, owner: &str) -> Result<StoreLock> {
        self.locked(lock::take(&self.cluster, owner, false)?, owner)
    }

    fn lock_shutting_out(&self, owner: &str) -> Result<StoreLock> {
        self.locked(lock::take(&self.cluster, owner, true)?, owner)
    }

    /// One request to the object that carries the lock. Of a store that never took it, only whether the cluster still answers us.
    fn prove_held(&self) -> Result<()> {
        let cookie = self.cookie.lock().clone();
        match cookie {
            Some(cookie) => lock::prove(&self.cluster, &cookie),
            None => self.cluster.stat(&head()).map(|_| ()),
        }
    }

    /// The cluster keeps something back itself (`full_ratio`).
    fn release_reserve(&self) -> Result<()> {
        Ok(())
    }

    fn restore_reserve(&self) -> Result<u64> {
        Ok(0)
    }

    fn set_reserve(&self, _bytes: u64) -> Result<u64> {
        Ok(0)
    }
}

impl RadosStore {
    /// Whoever held the lock before may have changed everything since.
    fn locked(&self, lock: lock::HeldLock, owner: &str) -> Result<StoreLock> {
        *self.cookie.lock() = Some(lock.cookie().to_owned());
        owner.clone_into(&mut self.owner.lock());
        // Whoever held the lock before may have changed everything since.
        self.expected.lock().clear();
        self.read_segments()?;
        self.drop_missing_segments()?;
        self.layers.start_anew()?;
        Ok(StoreLock { guard: Box::new(lock) })
    }

    /// Forgets segments that stand in the index alone: their making or removal ended half-way.
    fn drop_missing_segments(&self) -> Result<()> {
        let known: Vec<(LayerId, u64)> =
            self.segments.lock().iter().flat_map(|(layer, bases)| bases.iter().map(|base_lsn| (*layer, *base_lsn))).collect();
        let mut buffers = vec![[0u8; 1]; known.len()];
        let mut missing = Vec::new();
        self.cluster.run_all(
            known.into_iter().zip(&mut buffers),
            |((layer, base_lsn), buffer)| {
                // SAFETY: each has a buffer of its own, which lives until all are done.
                Ok(unsafe { self.cluster.start_read(&segment_name(*layer, *base_lsn), 0, buffer.as_mut_ptr(), 1) })
            },
            |((layer, base_lsn), _), code| match -code {
                errno if errno <= 0 => Ok(()),
                libc::ENOENT => {
                    missing.push((layer, base_lsn));
                    Ok(())
                }
                errno => Err(self.cluster.error("read", segment_name(layer, base_lsn), 0, errno)),
            },
        )?;
        missing.into_iter().try_for_each(|(layer, base_lsn)| self.remove_segment(layer, base_lsn))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_of_segments_are_read_back_and_others_passed_over() {
        let id = LayerId([0x12; 16]);
        assert_eq!(parse_segment_key(&segment_key(id, 0xabc)), Some((id, 0xabc)));
        assert_eq!(parse_segment_key(&segment_key(id, u64::MAX)), Some((id, u64::MAX)));
        for strange in ["~", "", &id.to_string(), &format!("{id}.abc"), &segment_key(id, 0xabc).to_uppercase()] {
            assert_eq!(parse_segment_key(strange), None, "{strange}");
        }
    }
}
