//! Maps, their pages, and what roots reach.
use crate::convert::{JsRootRef, from_ids, from_root, from_runs, guard, invalid, to_ids, to_root, to_slot_limit, to_u32, to_u64, to_usize};
use crate::promise::{rejected, run_on};
use atoll_engine::{Engine, EngineError, Result};
use atoll_map::{FrozenMap, MapCheck, MapLoader, NewPage, PageSet, Reach, Referrer};
use napi::bindgen_prelude::{Env, Float64Array, Object, ToNapiValue, Uint8Array, Uint32Array};
use napi_derive::napi;
use parking_lot::Mutex;
use std::sync::Arc;

#[napi(object)]
pub struct JsPageBatch {
    pub ids: Float64Array,
    pub bodies: Vec<Uint8Array>,
}

#[napi(object)]
pub struct JsOwnerCount {
    pub owner: u32,
    pub slot_count: f64,
}

#[napi(js_name = "FrozenMap")]
pub struct JsFrozenMap {
    pub(crate) engine: Arc<Engine>,
    pub(crate) map: FrozenMap,
}

#[napi]
impl JsFrozenMap {
    #[napi]
    pub fn root(&self) -> napi::Result<Option<JsRootRef>> {
        guard(|| Ok(self.map.root().map(from_root)))
    }

    #[napi]
    pub fn layers(&self, size_bytes: f64) -> napi::Result<Uint32Array> {
        guard(|| Ok(Uint32Array::new(self.map.layers(to_slot_limit(size_bytes)?)?)))
    }

    #[napi]
    pub fn with_run(&self, start_slot: f64, slot_count: f64, owner: f64) -> napi::Result<JsFrozenMap> {
        guard(|| {
            let (start, count) = (to_u64("startSlot", start_slot)?, to_u64("slotCount", slot_count)?);
            if start + count > atoll_map::MAP_SLOTS {
                return Err(invalid("run", format!("{start}+{count}"), "within the map"));
            }
            let map = if count == 0 { self.map.clone() } else { self.map.with_run(start, count, to_u32("owner", owner)?)? };
            Ok(JsFrozenMap { engine: self.engine.clone(), map })
        })
    }

    #[napi]
    pub fn prepare<'env>(&self, env: &'env Env, durable: &JsFrozenMap, first_page_id: f64) -> napi::Result<Object<'env>> {
        let first_page_id = guard(|| to_u64("firstPageId", first_page_id))?;
        let (map, durable) = (self.map.clone(), durable.map.clone());
        run_on(env, self.engine.control(), move || Ok(JsPageSet { pages: Mutex::new(Some(map.prepare(&durable, first_page_id)?)) }))
    }

    /// Long: two maps may differ everywhere.
    #[napi]
    pub fn diff<'env>(&self, env: &'env Env, base: &JsFrozenMap, size_bytes: f64) -> napi::Result<Object<'env>> {
        let limit = guard(|| to_slot_limit(size_bytes))?;
        let (map, base) = (self.map.clone(), base.map.clone());
        run_on(env, self.engine.bulk(), move || {
            let mut quads = Vec::new();
            map.diff(&base, limit, &mut |run, old_owner| {
                quads.extend([run.start_slot as f64, run.slot_count as f64, f64::from(run.owner), f64::from(old_owner)]);
            })?;
            Ok(Float64Array::new(quads))
        })
    }

    /// Long: it visits the whole map.
    #[napi]
    pub fn owner_counts<'env>(&self, env: &'env Env, size_bytes: f64) -> napi::Result<Object<'env>> {
        let limit = guard(|| to_slot_limit(size_bytes))?;
        let map = self.map.clone();
        run_on(env, self.engine.bulk(), move || {
            let counts = map.owner_counts(limit)?.into_iter();
            Ok(counts.map(|(owner, count)| JsOwnerCount { owner, slot_count: count as f64 }).collect::<Vec<_>>())
        })
    }

    #[napi]
    pub fn memory_bytes(&self) -> napi::Result<f64> {
        guard(|| Ok(self.map.memory_bytes() as f64))
    }
}

/// Pages from an index on: as many as fit, at least one.
pub fn page_batch(pages: &[NewPage], start_index: f64, max_bytes: f64) -> Result<JsPageBatch> {
    let start = to_usize("startIndex", start_index)?.min(pages.len());
    let max_bytes = to_usize("maxBytes", max_bytes)?;
    let mut batch_bytes = 0;
    let fitting = pages[start..].iter().take_while(|page| {
        let is_first = batch_bytes == 0;
        batch_bytes += page.bytes.len();
        is_first || batch_bytes <= max_bytes
    });
    let count = fitting.count();
    let taken = &pages[start..start + count];
    Ok(JsPageBatch {
        ids: from_ids(taken.iter().map(|page| page.id)),
        bodies: taken.iter().map(|page| Uint8Array::new(page.bytes.clone())).collect(),
    })
}

/// What is asked after the end of a page set or a checkpoint.
pub fn ended(what: &'static str) -> EngineError {
    EngineError::new("CHECKPOINT_ENDED", libc::EINVAL, format!("the {what} was committed or aborted already"))
}

#[napi(js_name = "PageSet")]
pub struct JsPageSet {
    pages: Mutex<Option<PageSet>>,
}

impl JsPageSet {
    fn with<T>(&self, body: impl FnOnce(&PageSet) -> Result<T>) -> napi::Result<T> {
        guard(|| body(self.pages.lock().as_ref().ok_or_else(|| ended("page set"))?))
    }
}

#[napi]
impl JsPageSet {
    #[napi]
    pub fn page_count(&self) -> napi::Result<u32> {
        self.with(|set| Ok(set.pages.len() as u32))
    }

    #[napi]
    pub fn root(&self) -> napi::Result<JsRootRef> {
        self.with(|set| Ok(from_root(set.root)))
    }

    #[napi]
    pub fn replaced(&self) -> napi::Result<Float64Array> {
        self.with(|set| Ok(from_ids(set.replaced.iter().copied())))
    }

    #[napi]
    pub fn displaced(&self) -> napi::Result<Float64Array> {
        self.with(|set| Ok(from_runs(&set.displaced)))
    }

    #[napi]
    pub fn pages(&self, start_index: f64, max_bytes: f64) -> napi::Result<JsPageBatch> {
        self.with(|set| page_batch(&set.pages, start_index, max_bytes))
    }

    #[napi]
    pub fn commit(&self) -> napi::Result<()> {
        guard(|| {
            self.pages.lock().take().ok_or_else(|| ended("page set"))?.commit();
            Ok(())
        })
    }
}

/// Ids and bodies that belong together.
fn supply(ids: &[f64], bodies: &[Uint8Array], mut take: impl FnMut(u64, &[u8]) -> Result<()>) -> Result<()> {
    if ids.len() != bodies.len() {
        return Err(invalid("bodies", bodies.len(), "as many as ids"));
    }
    for (id, body) in to_ids("page id", ids)?.into_iter().zip(bodies) {
        take(id, body)?;
    }
    Ok(())
}

#[napi(js_name = "MapLoader")]
pub struct JsMapLoader {
    pub(crate) engine: Arc<Engine>,
    pub(crate) loader: Mutex<Option<MapLoader>>,
}

#[napi]
impl JsMapLoader {
    #[napi]
    pub fn missing(&self, limit: f64) -> napi::Result<Float64Array> {
        guard(|| {
            let limit = to_usize("limit", limit)?;
            Ok(from_ids(self.loader.lock().as_ref().ok_or_else(used_up)?.missing(limit)))
        })
    }

    #[napi]
    pub fn supply(&self, ids: &[f64], bodies: Vec<Uint8Array>) -> napi::Result<()> {
        guard(|| {
            let mut loader = self.loader.lock();
            let loader = loader.as_mut().ok_or_else(used_up)?;
            supply(ids, &bodies, |id, body| Ok(loader.supply(id, body)?))
        })
    }

    #[napi]
    pub fn finish(&self) -> napi::Result<JsFrozenMap> {
        guard(|| {
            let loader = self.loader.lock().take().ok_or_else(used_up)?;
            Ok(JsFrozenMap { engine: self.engine.clone(), map: loader.finish()? })
        })
    }
}

fn used_up() -> EngineError {
    invalid("map loader", "finished", "one that is not")
}

/// Ids and bodies that belong together, as a thread of the engine may have them. Short lists: it copies the bodies.
fn owned_pages<B>(ids: &[f64], bodies: Vec<B>, to_bytes: impl Fn(&B) -> Option<Vec<u8>>) -> Result<Vec<(u64, Option<Vec<u8>>)>> {
    if ids.len() != bodies.len() {
        return Err(invalid("bodies", bodies.len(), "as many as ids"));
    }
    Ok(to_ids("page id", ids)?.into_iter().zip(bodies.iter().map(to_bytes)).collect())
}

/// What grows with all maps of a catalog: shared with the threads that fill it, and let go by one of them, because that takes its
/// time as well.
pub(crate) struct Bulky<T: Send + 'static> {
    pub(crate) engine: Arc<Engine>,
    pub(crate) inner: Arc<Mutex<T>>,
}

impl<T: Send + 'static> Bulky<T> {
    pub(crate) fn new(engine: Arc<Engine>, inner: T) -> Bulky<T> {
        Bulky { engine, inner: Arc::new(Mutex::new(inner)) }
    }

    /// Runs `job` on a thread of those that never wait for a disk for long.
    pub(crate) fn run<'env, R: ToNapiValue + Send + 'static>(
        &self,
        env: &'env Env,
        job: impl FnOnce(&mut T) -> Result<R> + Send + 'static,
    ) -> napi::Result<Object<'env>> {
        let inner = self.inner.clone();
        run_on(env, self.engine.control(), move || job(&mut inner.lock()))
    }

    /// Gives the memory back soon: the collector sees only a small object and may come late. What is under way ends before.
    pub(crate) fn clear(&self)
    where
        T: Default,
    {
        let inner = self.inner.clone();
        // After the close of the engine the process ends.
        let _ = self.engine.bulk().submit(move || drop(std::mem::take(&mut *inner.lock())));
    }
}

impl<T: Send + 'static> Drop for Bulky<T> {
    fn drop(&mut self) {
        let inner = self.inner.clone();
        // After the close of the engine the process ends: then it goes here.
        let _ = self.engine.bulk().submit(move || drop(inner));
    }
}

#[napi(js_name = "Reach")]
pub struct JsReach {
    pub(crate) reach: Bulky<Reach>,
}

#[napi]
impl JsReach {
    #[napi]
    pub fn add_root(&self, root: JsRootRef, size_bytes: f64) -> napi::Result<()> {
        guard(|| Ok(self.reach.inner.lock().add_root(to_root(&root)?, to_slot_limit(size_bytes)?)?))
    }

    #[napi]
    pub fn pending(&self, limit: f64) -> napi::Result<Float64Array> {
        guard(|| Ok(from_ids(self.reach.inner.lock().pending(to_usize("limit", limit)?))))
    }

    #[napi]
    pub fn supply<'env>(&self, env: &'env Env, ids: &[f64], bodies: Vec<Uint8Array>) -> napi::Result<Object<'env>> {
        let pages = match owned_pages(ids, bodies, |body| Some(body.to_vec())) {
            Ok(pages) => pages,
            Err(error) => return rejected::<()>(env, error),
        };
        self.reach.run(env, move |reach| {
            for (id, body) in pages {
                reach.supply(id, &body.unwrap_or_default())?;
            }
            Ok(())
        })
    }

    #[napi]
    pub fn layers(&self) -> napi::Result<Uint32Array> {
        guard(|| Ok(Uint32Array::new(self.reach.inner.lock().layers())))
    }

    #[napi]
    pub fn runs<'env>(&self, env: &'env Env, layer: f64) -> napi::Result<Object<'env>> {
        let layer = guard(|| to_u32("layer", layer))?;
        self.reach.run(env, move |reach| Ok(from_runs(&reach.runs(layer))))
    }

    #[napi]
    pub fn slot_counts<'env>(&self, env: &'env Env, layers: Uint32Array) -> napi::Result<Object<'env>> {
        let layers = layers.to_vec();
        self.reach.run(env, move |reach| Ok(from_ids(layers.into_iter().map(|layer| reach.slot_count(layer)))))
    }

    #[napi]
    pub fn has_pages(&self, ids: &[f64]) -> napi::Result<Uint8Array> {
        guard(|| has_pages(&self.reach.inner.lock(), ids))
    }

    #[napi]
    pub fn clear(&self) {
        self.reach.clear();
    }
}

/// For each page 1 if it is reached, else 0.
fn has_pages(reach: &Reach, ids: &[f64]) -> Result<Uint8Array> {
    let found = to_ids("page id", ids)?.into_iter().map(|id| u8::from(reach.has_page(id)));
    Ok(Uint8Array::new(found.collect()))
}

#[napi(object)]
pub struct JsPageFault {
    pub page_id: f64,
    pub code: String,
    pub message: String,
}

#[napi(js_name = "MapCheck")]
pub struct JsMapCheck {
    check: Bulky<MapCheck>,
}

impl JsMapCheck {
    pub(crate) fn watching(engine: Arc<Engine>, pages: &[f64], layers: &[u32]) -> Result<JsMapCheck> {
        let check = MapCheck::watching(to_ids("page id", pages)?, layers.iter().copied());
        Ok(JsMapCheck { check: Bulky::new(engine, check) })
    }
}

#[napi]
impl JsMapCheck {
    #[napi]
    pub fn add_root(&self, root: JsRootRef) -> napi::Result<()> {
        guard(|| Ok(self.check.inner.lock().add_root(to_root(&root)?)?))
    }

    #[napi]
    pub fn pending(&self, limit: f64) -> napi::Result<Float64Array> {
        guard(|| Ok(from_ids(self.check.inner.lock().pending(to_usize("limit", limit)?))))
    }

    #[napi]
    pub fn supply<'env>(&self, env: &'env Env, ids: &[f64], bodies: Vec<Option<Uint8Array>>) -> napi::Result<Object<'env>> {
        let pages = match owned_pages(ids, bodies, |body| body.as_ref().map(|body| body.to_vec())) {
            Ok(pages) => pages,
            Err(error) => return rejected::<()>(env, error),
        };
        self.check.run(env, move |check| {
            for (id, body) in pages {
                check.supply(id, body.as_deref());
            }
            Ok(())
        })
    }

    #[napi]
    pub fn faults(&self) -> napi::Result<Vec<JsPageFault>> {
        guard(|| {
            let check = self.check.inner.lock();
            let faults = check.faults().iter().map(|fault| {
                let EngineError { code, message, .. } = fault.clone().into();
                JsPageFault { page_id: fault.page_id as f64, code: code.to_owned(), message }
            });
            Ok(faults.collect())
        })
    }

    #[napi]
    pub fn fault_count(&self) -> napi::Result<f64> {
        guard(|| Ok(self.check.inner.lock().fault_count() as f64))
    }

    #[napi]
    pub fn page_referrers(&self) -> napi::Result<Float64Array> {
        guard(|| {
            let check = self.check.inner.lock();
            let pairs = check.referrers().filter_map(|referrer| match referrer {
                Referrer::OfPage(from, to) => Some([from as f64, to as f64]),
                Referrer::OfLayer(..) => None,
            });
            Ok(Float64Array::new(pairs.flatten().collect()))
        })
    }

    #[napi]
    pub fn layer_referrers(&self) -> napi::Result<Float64Array> {
        guard(|| {
            let check = self.check.inner.lock();
            let pairs = check.referrers().filter_map(|referrer| match referrer {
                Referrer::OfPage(..) => None,
                Referrer::OfLayer(from, to) => Some([from as f64, f64::from(to)]),
            });
            Ok(Float64Array::new(pairs.flatten().collect()))
        })
    }

    #[napi]
    pub fn slot_ends<'env>(&self, env: &'env Env, layers: Uint32Array) -> napi::Result<Object<'env>> {
        let layers = layers.to_vec();
        self.check.run(env, move |check| Ok(from_ids(layers.into_iter().map(|layer| check.slot_end(layer)))))
    }

    #[napi]
    pub fn layers(&self) -> napi::Result<Uint32Array> {
        guard(|| Ok(Uint32Array::new(self.check.inner.lock().reach().layers())))
    }

    #[napi]
    pub fn runs<'env>(&self, env: &'env Env, layer: f64) -> napi::Result<Object<'env>> {
        let layer = guard(|| to_u32("layer", layer))?;
        self.check.run(env, move |check| Ok(from_runs(&check.reach().runs(layer))))
    }

    #[napi]
    pub fn has_pages(&self, ids: &[f64]) -> napi::Result<Uint8Array> {
        guard(|| has_pages(self.check.inner.lock().reach(), ids))
    }

    #[napi]
    pub fn clear(&self) {
        self.check.clear();
    }
}
