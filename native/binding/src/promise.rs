//! Promises that native threads settle.
use crate::convert::{caught, js_error};
use atoll_engine::{ControlPool, EngineError, Result};
use napi::JsDeferred;
use napi::bindgen_prelude::{Env, Object, ToNapiValue};
use parking_lot::Mutex;
use std::sync::Arc;

type Resolver<T> = Box<dyn FnOnce(Env) -> napi::Result<T> + Send>;

/// One side of a promise: settles it once, from any thread. Dropped without that, it rejects: nobody waits for ever.
pub struct Settler<T: ToNapiValue + Send + 'static>(Mutex<Option<JsDeferred<T, Resolver<T>>>>);

impl<T: ToNapiValue + Send + 'static> Settler<T> {
    /// A settler and its promise. While it is not settled the event loop stays alive.
    pub fn new<'env>(env: &'env Env) -> napi::Result<(Settler<T>, Object<'env>)> {
        let (deferred, promise) = env.create_deferred::<T, Resolver<T>>()?;
        Ok((Settler(Mutex::new(Some(deferred))), promise))
    }

    /// Settles the promise; later calls do nothing.
    pub fn settle(&self, result: Result<T>) {
        let Some(deferred) = self.0.lock().take() else {
            return;
        };
        match result {
            Ok(value) => deferred.resolve(Box::new(move |_| Ok(value))),
            Err(error) => deferred.reject(js_error(error)),
        }
    }
}

impl<T: ToNapiValue + Send + 'static> Drop for Settler<T> {
    fn drop(&mut self) {
        self.settle(Err(EngineError::new("ENGINE_CLOSED", libc::ESHUTDOWN, "the engine was closed before this was done")));
    }
}

/// Runs `job` on a pool; the promise gets its result.
pub fn run_on<'env, T: ToNapiValue + Send + 'static>(
    env: &'env Env,
    pool: &ControlPool,
    job: impl FnOnce() -> Result<T> + Send + 'static,
) -> napi::Result<Object<'env>> {
    let (settler, promise) = Settler::new(env)?;
    let settler = Arc::new(settler);
    let on_thread = settler.clone();
    if let Err(error) = pool.submit(move || on_thread.settle(caught(job))) {
        settler.settle(Err(error));
    }
    Ok(promise)
}

/// A promise that is rejected already: an argument was wrong.
pub fn rejected<'env, T: ToNapiValue + Send + 'static>(env: &'env Env, error: EngineError) -> napi::Result<Object<'env>> {
    let (settler, promise) = Settler::<T>::new(env)?;
    settler.settle(Err(error));
    Ok(promise)
}
