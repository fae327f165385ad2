//! Maps, their pages, and what roots reach.
use crate::convert::{JsRootRef, from_ids, from_root, from_runs, guard, invalid, to_ids, to_root, to_slot_limit, to_u32, to_u64, to_usize};
use crate::promise::run_on;
use atoll_engine::{Engine, EngineError, Result};
use atoll_map::{FrozenMap, MapCheck, MapLoader, NewPage, PageSet, Reach, Referrer};
use napi::bindgen_prelude::{Env, Float64Array, Object, Uint8Array, Uint32Array};
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

#[napi(js_name = "Reach")]
#[derive(Default)]
pub struct JsReach {
    reach: Mutex<Reach>,
}

#[napi]
impl JsReach {
    #[napi(constructor)]
    pub fn new() -> JsReach {
        JsReach::default()
    }

    #[napi]
    pub fn add_root(&self, root: JsRootRef, size_bytes: f64) -> napi::Result<()> {
        guard(|| Ok(self.reach.lock().add_root(to_root(&root)?, to_slot_limit(size_bytes)?)?))
    }

    #[napi]
    pub fn pending(&self, limit: f64) -> napi::Result<Float64Array> {
        guard(|| Ok(from_ids(self.reach.lock().pending(to_usize("limit", limit)?))))
    }

    #[napi]
    pub fn supply(&self, ids: &[f64], bodies: Vec<Uint8Array>) -> napi::Result<()> {
        guard(|| {
            let mut reach = self.reach.lock();
            supply(ids, &bodies, |id, body| Ok(reach.supply(id, body)?))
        })
    }

    #[napi]
    pub fn layers(&self) -> napi::Result<Uint32Array> {
        guard(|| Ok(Uint32Array::new(self.reach.lock().layers())))
    }

    #[napi]
    pub fn runs(&self, layer: f64) -> napi::Result<Float64Array> {
        guard(|| Ok(from_runs(&self.reach.lock().runs(to_u32("layer", layer)?))))
    }

    #[napi]
    pub fn slot_count(&self, layer: f64) -> napi::Result<f64> {
        guard(|| Ok(self.reach.lock().slot_count(to_u32("layer", layer)?) as f64))
    }

    #[napi]
    pub fn has_pages(&self, ids: &[f64]) -> napi::Result<Uint8Array> {
        guard(|| {
            let reach = self.reach.lock();
            let found = to_ids("page id", ids)?.into_iter().map(|id| u8::from(reach.has_page(id)));
            Ok(Uint8Array::new(found.collect()))
        })
    }
}

#[napi(object)]
pub struct JsPageFault {
    pub page_id: f64,
    pub code: String,
    pub message: String,
}

#[napi(js_name = "MapCheck")]
pub struct JsMapCheck {
    check: Mutex<MapCheck>,
}

#[napi]
impl JsMapCheck {
    #[napi(constructor)]
    pub fn new(watched_pages: &[f64], watched_layers: &[f64]) -> napi::Result<JsMapCheck> {
        guard(|| {
            let layers = watched_layers.iter().map(|layer| to_u32("layer", *layer)).collect::<Result<Vec<_>>>()?;
            Ok(JsMapCheck { check: Mutex::new(MapCheck::watching(to_ids("page id", watched_pages)?, layers)) })
        })
    }

    #[napi]
    pub fn add_root(&self, root: JsRootRef) -> napi::Result<()> {
        guard(|| Ok(self.check.lock().add_root(to_root(&root)?)?))
    }

    #[napi]
    pub fn pending(&self, limit: f64) -> napi::Result<Float64Array> {
        guard(|| Ok(from_ids(self.check.lock().pending(to_usize("limit", limit)?))))
    }

    #[napi]
    pub fn supply(&self, ids: &[f64], bodies: Vec<Option<Uint8Array>>) -> napi::Result<()> {
        guard(|| {
            if ids.len() != bodies.len() {
                return Err(invalid("bodies", bodies.len(), "as many as ids"));
            }
            let mut check = self.check.lock();
            for (id, body) in to_ids("page id", ids)?.into_iter().zip(&bodies) {
                check.supply(id, body.as_deref());
            }
            Ok(())
        })
    }

    #[napi]
    pub fn faults(&self) -> napi::Result<Vec<JsPageFault>> {
        guard(|| {
            let check = self.check.lock();
            let faults = check.faults().iter().map(|fault| {
                let EngineError { code, message, .. } = fault.clone().into();
                JsPageFault { page_id: fault.page_id as f64, code: code.to_owned(), message }
            });
            Ok(faults.collect())
        })
    }

    #[napi]
    pub fn fault_count(&self) -> napi::Result<f64> {
        guard(|| Ok(self.check.lock().fault_count() as f64))
    }

    #[napi]
    pub fn page_referrers(&self) -> napi::Result<Float64Array> {
        guard(|| {
            let check = self.check.lock();
            let pairs = check.referrers().filter_map(|referrer| match referrer {
                Referrer::OfPage(from, to) => Some([from as f64, to as f64]),
                Referrer::OfLayer(..) => None,
            });
            Ok(Float64Array::new(pairs.flatten().collect()))
        })
    }

    #[napi]
    pub fn slot_end(&self, layer: f64) -> napi::Result<f64> {
        guard(|| Ok(self.check.lock().slot_end(to_u32("layer", layer)?) as f64))
    }

    #[napi]
    pub fn layer_referrers(&self) -> napi::Result<Float64Array> {
        guard(|| {
            let check = self.check.lock();
            let pairs = check.referrers().filter_map(|referrer| match referrer {
                Referrer::OfPage(..) => None,
                Referrer::OfLayer(from, to) => Some([from as f64, f64::from(to)]),
            });
            Ok(Float64Array::new(pairs.flatten().collect()))
        })
    }

    #[napi]
    pub fn layers(&self) -> napi::Result<Uint32Array> {
        guard(|| Ok(Uint32Array::new(self.check.lock().reach().layers())))
    }

    #[napi]
    pub fn runs(&self, layer: f64) -> napi::Result<Float64Array> {
        guard(|| Ok(from_runs(&self.check.lock().reach().runs(to_u32("layer", layer)?))))
    }

    #[napi]
    pub fn has_pages(&self, ids: &[f64]) -> napi::Result<Uint8Array> {
        guard(|| {
            let check = self.check.lock();
            let found = to_ids("page id", ids)?.into_iter().map(|id| u8::from(check.reach().has_page(id)));
            Ok(Uint8Array::new(found.collect()))
        })
    }
}
