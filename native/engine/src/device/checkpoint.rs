//! Checkpoints: a flush plus the map frozen at its lsn, on its way to the catalog.
//!
//! Rules
//! - `durable` is the map that the catalog has, `durable_lsn` its lsn; both change only when the layer above says that the
//!   transaction is committed.
//! - No page ever holds a delta later than the lsn it is committed with: the map is frozen under the batch lock.
//! - While a swap is uncommitted, a checkpoint is the one of the swap: the root of the snapshot.
use super::layers::ActiveLayer;
use super::{Checkpoint, Device};
use crate::{EngineError, Result};
use atoll_map::FrozenMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// A swap that the catalog does not have yet.
pub(super) struct UncommittedSwap {
    pub(super) frozen: FrozenMap,
    pub(super) lsn: u64,
    /// The layer that was active before.
    pub(super) predecessor: Arc<ActiveLayer>,
    pub(super) successor: atoll_io::LayerId,
}

pub(super) struct Checkpoints {
    pub(super) busy: bool,
    pub(super) durable: FrozenMap,
    pub(super) durable_lsn: u64,
    pub(super) swap: Option<UncommittedSwap>,
}

impl Device {
    /// A flush whose lsn is frozen with the map, and the pages that the catalog lacks. `None` if nothing changed since the last
    /// committed one. While a swap is uncommitted: the map at the swap, after the closing layer was made durable.
    /// One at a time: `CHECKPOINT_BUSY`. Ends with `checkpoint_committed` or `checkpoint_aborted`.
    pub fn checkpoint(&self, first_page_id: u64) -> Result<Option<Checkpoint>> {
        self.poison_check()?;
        let (durable, swap) = {
            let mut checkpoints = self.checkpoints.lock();
            if checkpoints.busy {
                return Err(busy_error());
            }
            let swap = checkpoints.swap.as_ref().map(|swap| (swap.frozen.clone(), swap.lsn));
            if swap.is_none() && self.is_checkpointed(&checkpoints) {
                return Ok(None);
            }
            checkpoints.busy = true;
            (checkpoints.durable.clone(), swap)
        };
        self.checkpoint_wanted.store(false, Ordering::SeqCst);
        let result = self.unwind_guard("checkpoint", || {
            let (frozen, lsn) = match swap {
                Some((frozen, lsn)) => {
                    self.flush_completed()?;
                    (frozen, lsn)
                }
                None => {
                    let frozen = self.flush_and_freeze()?;
                    (frozen.map, frozen.lsn)
                }
            };
            let pages = frozen.prepare(&durable, first_page_id)?;
            Ok(Checkpoint { lsn, pages, frozen })
        });
        if result.is_err() {
            self.checkpoints.lock().busy = false;
        }
        result.map(Some)
    }

    /// Nothing in the live map that the catalog's map lacks.
    fn is_checkpointed(&self, checkpoints: &Checkpoints) -> bool {
        let batch = self.batch.lock();
        batch.open_delta_count() == 0 && batch.last_lsn == checkpoints.durable_lsn && self.shrink.lock().is_none()
    }

    /// The catalog has pages, root and lsn: nodes are marked persisted. `trim_journal`: so has whatever else a lost catalog would
    /// be made anew from, and journal segments behind the checkpoint are removed; otherwise they stay for a later checkpoint to
    /// remove. An error here concerns only the removal; the checkpoint stands.
    pub fn checkpoint_committed(&self, checkpoint: Checkpoint, trim_journal: bool) -> Result<()> {
        let Checkpoint { lsn, pages, frozen } = checkpoint;
        pages.commit();
        {
            let mut checkpoints = self.checkpoints.lock();
            checkpoints.durable = frozen;
            checkpoints.durable_lsn = lsn;
            checkpoints.busy = false;
        }
        if let Some(shrink) = self.shrink.lock().as_mut() {
            shrink.committed = true;
        }
        self.wake_waiting_writers();
        let Some(active) = self.layers.load().active.clone() else { return Ok(()) };
        let mut journal = active.journal.lock();
        // A volume whose map never changed has no journal and needs no floor.
        if journal.length_bytes() > 0 && trim_journal {
            journal.remove_behind(lsn)?;
        }
        // What stays for another reason than this device's own asks for no checkpoint: none would make it go.
        self.journal_bytes.store(if trim_journal { journal.length_bytes() } else { 0 }, Ordering::Relaxed);
        Ok(())
    }

    /// The catalog has not: nothing is marked, the next checkpoint tries again. A shrink that was prepared is taken back.
    pub fn checkpoint_aborted(&self, checkpoint: Checkpoint) {
        drop(checkpoint);
        self.checkpoints.lock().busy = false;
        self.undo_shrink();
    }
}

pub(super) fn busy_error() -> EngineError {
    EngineError::new("CHECKPOINT_BUSY", libc::EBUSY, "a checkpoint of this device is under way; try again when it has ended")
}
