//! The layers of a store, as far as they were asked for, and what they hold together. RADOS knows the size of nothing but whole
//! pools, which may be shared; so after the store is locked a thread asks every object once, and until it is done the sum is too small.
use super::cluster::{Cluster, Name};
use super::layer::Layer;
use crate::error::layer_object;
use crate::{IoError, IoErrorCode, LayerId, Result};
use parking_lot::{Condvar, Mutex};
use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

/// Pause after a count that failed.
const RETRY_INTERVAL: Duration = Duration::from_secs(5);

pub(super) fn layers_index() -> Name {
    Name::new(format_args!("index.layers"))
}

#[derive(Default)]
struct State {
    known: HashMap<LayerId, Arc<Layer>>,
    /// Rises with each removal: what was loaded before one may be gone.
    removal_count: u64,
    /// Rises with each lock: a count that was begun before one is over.
    count_number: u64,
    is_counted: bool,
    /// When the present count was begun.
    counting_since: Option<Instant>,
    is_ended: bool,
}

pub(super) struct Layers {
    cluster: Arc<Cluster>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Layers {
    pub(super) fn new(cluster: &Arc<Cluster>) -> Arc<Layers> {
        Arc::new(Layers { cluster: Arc::clone(cluster), state: Mutex::default(), changed: Condvar::new() })
    }

    /// The layer as this store knows it; all handles share that. `NotFound`; `going_too`: unless its removal has only begun.
    pub(super) fn get(&self, id: LayerId, going_too: bool) -> Result<Arc<Layer>> {
        loop {
            let removal_count = {
                let state = self.state.lock();
                if let Some(layer) = state.known.get(&id) {
                    if layer.is_removed() && !going_too {
                        return Err(IoError::new(IoErrorCode::NotFound, "open", layer_object(id), 0, "there is no such layer"));
                    }
                    return Ok(Arc::clone(layer));
                }
                state.removal_count
            };
            let loaded = Layer::load(&self.cluster, id, going_too)?;
            let mut state = self.state.lock();
            if state.removal_count == removal_count {
                // The first to come wins.
                return Ok(Arc::clone(state.known.entry(id).or_insert(loaded)));
            }
        }
    }

    pub(super) fn add(&self, id: LayerId, layer: Arc<Layer>) {
        self.state.lock().known.insert(id, layer);
    }

    /// The layer is gone.
    pub(super) fn forget(&self, id: LayerId) {
        let mut state = self.state.lock();
        state.removal_count += 1;
        state.known.remove(&id);
    }

    /// What the layers hold, and whether that is all of it.
    pub(super) fn stored_bytes(&self) -> (u64, bool) {
        let (layers, is_counted) = {
            let state = self.state.lock();
            (state.known.values().cloned().collect::<Vec<_>>(), state.is_counted)
        };
        (layers.iter().map(|layer| layer.known_bytes()).sum(), is_counted)
    }

    pub(super) fn is_counted(&self) -> bool {
        self.state.lock().is_counted
    }

    /// Waits until all is counted; not if that has gone on for longer than `wait_max`.
    pub(super) fn wait_counted(&self, wait_max: Duration) {
        let mut state = self.state.lock();
        while let Some(since) = state.counting_since
            && !state.is_counted
            && !state.is_ended
            && since.elapsed() < wait_max
        {
            self.changed.wait_for(&mut state, wait_max.saturating_sub(since.elapsed()));
        }
    }

    /// Forgets everything, because others may have changed it, and counts anew.
    pub(super) fn start_anew(self: &Arc<Layers>) -> Result<()> {
        let number = {
            let mut state = self.state.lock();
            state.known.clear();
            state.removal_count += 1;
            state.count_number += 1;
            state.is_counted = false;
            state.counting_since = Some(Instant::now());
            state.count_number
        };
        let layers = Arc::clone(self);
        std::thread::Builder::new()
            .name("atoll-rados-sum".to_owned())
            .spawn(move || layers.count_until_done(number))
            .map(|_| ())
            .map_err(|error| IoError::from_system("open", "a thread", 0, &error))
    }

    /// No more counting; nobody waits for its end.
    pub(super) fn end(&self) {
        self.state.lock().is_ended = true;
        self.changed.notify_all();
    }

    fn is_over(&self, number: u64) -> bool {
        let state = self.state.lock();
        state.is_ended || state.count_number != number
    }

    fn count_until_done(&self, number: u64) {
        while !self.is_over(number) {
            if self.count(number).is_ok() {
                let mut state = self.state.lock();
                state.is_counted |= state.count_number == number;
                self.changed.notify_all();
                return;
            }
            let mut state = self.state.lock();
            let failed_at = Instant::now();
            while !state.is_ended && failed_at.elapsed() < RETRY_INTERVAL {
                self.changed.wait_for(&mut state, RETRY_INTERVAL.saturating_sub(failed_at.elapsed()));
            }
        }
    }

    /// A layer that is made meanwhile is known from its beginning.
    fn count(&self, number: u64) -> Result<()> {
        for id in self.cluster.index_keys(&layers_index())?.iter().filter_map(|key| LayerId::parse(key)) {
            if self.is_over(number) {
                return Ok(());
            }
            match self.get(id, true).and_then(|layer| layer.ask_all(&|| self.is_over(number))) {
                Err(error) if error.code != IoErrorCode::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    }
}
