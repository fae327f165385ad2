//! The napi-rs binding: converts and forwards, decides nothing. Its public form is native/*.ts.
//!
//! Rules:
//! - Nothing here blocks the event loop: what may take time runs on the engine's control threads and settles a promise.
//! - Numbers cross as f64 and are checked to be integers below 2^53; only the root word of a map is a BigInt.
//! - Bytes that come in are copied before the call returns, so JavaScript may change or drop its buffer at once. Bytes that
//!   go out are moved into a buffer that belongs to JavaScript and is freed with it.
//! - A handle keeps the native thing alive; the engine itself lives until its environment ends.
//! - Failures cross as data (see convert.rs); a panic is caught at every entry and becomes `ENGINE_PANIC`.
//!
//! Types are not generated: native/addon.ts declares what is exported here, and native.test.ts calls all of it.
#![allow(missing_docs)]
mod connection;
mod convert;
mod device;
mod engine;
mod map;
mod promise;
mod store;
mod usage;

use napi_derive::napi;

/// Runs once, when the addon is loaded.
#[napi_derive::module_init]
fn prepare_process() {
    atoll_engine::give_freed_memory_back();
}

/// What both sides must agree about.
#[napi(object)]
pub struct Constants {
    pub slot_bytes: f64,
    pub leaf_bytes: f64,
    pub map_bytes_max: f64,
    /// In nanoseconds; see `atoll_engine::latency_bucket_end`.
    pub latency_bucket_ends: Vec<f64>,
}

/// The constants this addon was built with.
#[napi]
pub fn constants() -> Constants {
    use atoll_engine::{LATENCY_BUCKET_COUNT, latency_bucket_end};
    use atoll_map::{LEAF_SLOTS, MAP_SLOTS, SLOT_BYTES};
    Constants {
        slot_bytes: SLOT_BYTES as f64,
        leaf_bytes: (LEAF_SLOTS * SLOT_BYTES) as f64,
        map_bytes_max: (MAP_SLOTS * SLOT_BYTES) as f64,
        latency_bucket_ends: (0..LATENCY_BUCKET_COUNT).map(|index| latency_bucket_end(index) as f64).collect(),
    }
}
