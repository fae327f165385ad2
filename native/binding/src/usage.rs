//! What resources take. Everything but the fetching of pages runs on the engine's threads; one call after the other.
use crate::convert::{from_ids, guard, to_ids, to_layer_id, to_u64, to_usize};
use crate::map::Bulky;
use crate::promise::{rejected, run_on};
use crate::store::JsStore;
use atoll_engine::{EngineError, Result};
use atoll_io::{IoErrorCode, LayerIo, OpenMode, Store};
use atoll_map::{RootRef, SLOT_BYTES, Usage, UsageRoot};
use napi::bindgen_prelude::{BigUint64Array, Either, Env, Float64Array, Null, Object, Uint8Array, Uint32Array};
use napi_derive::napi;
use std::sync::Arc;

#[napi(js_name = "Usage")]
pub struct JsUsage {
    pub(crate) usage: Bulky<Usage>,
}

#[napi]
impl JsUsage {
    #[napi]
    pub fn set_roots<'env>(
        &self,
        env: &'env Env,
        keys: &[f64],
        lineages: &[f64],
        words: BigUint64Array,
        crcs: Uint32Array,
        active: Uint32Array,
    ) -> napi::Result<Object<'env>> {
        let roots = match to_usage_roots(keys, lineages, &words, &crcs) {
            Ok(roots) => roots,
            Err(error) => return rejected::<()>(env, error),
        };
        let active = active.to_vec();
        self.usage.run(env, move |usage| Ok(usage.set_roots(&roots, &active)?))
    }

    #[napi]
    pub fn pending<'env>(&self, env: &'env Env, limit: f64) -> napi::Result<Object<'env>> {
        let limit = guard(|| to_usize("limit", limit))?;
        self.usage.run(env, move |usage| Ok(from_ids(usage.pending(limit))))
    }

    /// Reads pages; null for one that the catalog does not have.
    #[napi]
    pub fn settle<'env>(&self, env: &'env Env, ids: &[f64], bodies: Vec<Either<Uint8Array, Null>>) -> napi::Result<Object<'env>> {
        let pages = to_ids("page id", ids).map(|ids| {
            let bodies = bodies.into_iter().map(|body| match body {
                Either::A(bytes) => Some(bytes.to_vec()),
                Either::B(_) => None,
            });
            ids.into_iter().zip(bodies).collect::<Vec<_>>()
        });
        let pages = match pages {
            Ok(pages) => pages,
            Err(error) => return rejected::<()>(env, error),
        };
        self.usage.run(env, move |usage| {
            for (id, bytes) in pages {
                usage.supply(id, bytes);
            }
            usage.settle();
            Ok(())
        })
    }

    #[napi]
    pub fn unknown_layers<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.usage.run(env, |usage| Ok(Uint32Array::new(usage.unknown_layers())))
    }

    /// Looks at what sealed layers have allocated in one place, beside what was found in others, without holding the table meanwhile;
    /// returns those that could not be looked at.
    #[napi]
    pub fn scan<'env>(&self, env: &'env Env, store: &JsStore, aliases: &[u32], ids: Vec<String>) -> napi::Result<Object<'env>> {
        let layers: Result<Vec<_>> = aliases.iter().zip(&ids).map(|(alias, id)| Ok((*alias, to_layer_id(id)?))).collect();
        let layers = match layers {
            Ok(layers) => layers,
            Err(error) => return rejected::<Uint32Array>(env, error),
        };
        let (store, usage) = (store.store.clone(), self.usage.inner.clone());
        run_on(env, self.usage.engine.control(), move || {
            let mut failed = Vec::new();
            for (alias, id) in layers {
                let runs = allocated_runs(&*store, id).unwrap_or_else(|_| {
                    failed.push(alias);
                    Vec::new()
                });
                usage.lock().add_allocated(alias, runs);
            }
            Ok(Uint32Array::new(failed))
        })
    }

    #[napi]
    pub fn set_empty(&self, aliases: &[u32]) -> napi::Result<()> {
        guard(|| {
            let mut usage = self.usage.inner.lock();
            aliases.iter().for_each(|&alias| usage.set_allocated(alias, []));
            Ok(())
        })
    }

    /// Used and shared bytes.
    #[napi]
    pub fn taken<'env>(&self, env: &'env Env, key: f64) -> napi::Result<Object<'env>> {
        let key = guard(|| to_u64("key", key))?;
        self.usage.run(env, move |usage| {
            let taken = usage.taken(key)?;
            Ok(from_ids([taken.used_slots * SLOT_BYTES, taken.shared_slots * SLOT_BYTES]))
        })
    }

    /// Bytes that each refers to; -1 where a page cannot be read.
    #[napi]
    pub fn totals<'env>(&self, env: &'env Env, keys: &[f64]) -> napi::Result<Object<'env>> {
        let keys = guard(|| to_ids("key", keys))?;
        self.usage.run(env, move |usage| {
            let totals = keys.into_iter().map(|key| usage.slots_of(key).map_or(-1.0, |slots| (slots * SLOT_BYTES) as f64));
            Ok(Float64Array::new(totals.collect()))
        })
    }

    #[napi]
    pub fn memory_bytes<'env>(&self, env: &'env Env) -> napi::Result<Object<'env>> {
        self.usage.run(env, |usage| Ok(usage.memory_bytes() as f64))
    }

    #[napi]
    pub fn clear(&self) {
        self.usage.clear();
    }
}

fn to_usage_roots(keys: &[f64], lineages: &[f64], words: &[u64], crcs: &[u32]) -> Result<Vec<UsageRoot>> {
    if keys.len() != lineages.len() || keys.len() != words.len() || keys.len() != crcs.len() {
        return Err(crate::convert::invalid("roots", keys.len(), "lists of one length"));
    }
    let names = keys.iter().zip(lineages).zip(words.iter().zip(crcs));
    names
        .map(|((key, lineage), (word, crc))| {
            let (key, lineage) = (to_u64("key", *key)?, to_u64("lineage", *lineage)?);
            Ok(UsageRoot { key, lineage, root: RootRef { word: *word, crc: *crc } })
        })
        .collect()
}

/// Slots in which a layer has anything allocated; none if the layer is not there.
fn allocated_runs(store: &dyn Store, id: atoll_io::LayerId) -> Result<Vec<(u64, u64)>> {
    let layer: Arc<dyn LayerIo> = match store.open_layer(id, OpenMode::ReadOnly) {
        Ok(layer) => layer,
        Err(error) if error.code == IoErrorCode::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(EngineError::from(error)),
    };
    let mut extents = Vec::new();
    layer.extents(0, layer.length_bytes()?.next_multiple_of(SLOT_BYTES), &mut extents)?;
    let data = extents.iter().filter(|extent| extent.data);
    let to_run =
        |extent: &atoll_io::Extent| (extent.offset_bytes / SLOT_BYTES, (extent.offset_bytes + extent.length_bytes).div_ceil(SLOT_BYTES));
    Ok(data.map(to_run).collect())
}
