//! The swap: freezes the map and puts a prepared layer in the place of the active one, between two requests.
//!
//! Rules
//! - With the gate closed and drained nobody is between a lookup and its write (I2); the freeze, the closing of the batch and
//!   the change of the active layer happen under the batch lock, so a flush sees all of it or nothing.
//! - The closing layer is made durable before any frame of its successor (`flush`), and no second swap comes before the
//!   first is committed: an open never has to look further than the next layer.
//! - The next layer may lie in another store than the active one. Each has its journal in its own; until the swap is committed both
//!   are asked whether they are still ours where one is (`Device::written_layers`).
//! - Several devices: gates are closed in the order of their volume ids, so that two group swaps cannot wait for each other.
use super::checkpoint::{UncommittedSwap, busy_error};
use super::layers::{ActiveLayer, LayerTable, ReadLayer};
use super::write::read_only_error;
use super::{Device, LayerSpec, SwapReport};
use crate::{EngineError, Result};
use atoll_io::SealMark;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

impl Device {
    /// Freezes the maps and makes each `next` the active layer, at one point in time for all: gates closed, drained, swapped,
    /// opened. Past the deadline all gates reopen, nothing has changed and the error is `DEVICE_BUSY`. `SWAP_UNCOMMITTED` if a
    /// previous swap was not committed with `swap_committed`. Reports stand in the order of `devices`.
    pub fn swap(devices: &[(Arc<Device>, LayerSpec)], deadline: Duration) -> Result<Vec<SwapReport>> {
        let mut order: Vec<usize> = (0..devices.len()).collect();
        order.sort_by_key(|&index| devices[index].0.volume);
        if let Some(pair) = order.windows(2).find(|pair| devices[pair[0]].0.volume == devices[pair[1]].0.volume) {
            let id = atoll_io::LayerId(devices[pair[0]].0.volume);
            return Err(EngineError::new("SWAP_TWICE", libc::EINVAL, format!("volume {id} stands twice in one swap")).with("volumeId", id));
        }
        let mut prepared = Vec::with_capacity(devices.len());
        for (device, next) in devices {
            device.refuse_if_closed()?;
            device.check_can_swap()?;
            let last_lsn = device.batch.lock().last_lsn;
            prepared.push(Arc::new(ActiveLayer::open_prepared(next, device.volume, device.epoch, last_lsn)?));
        }

        let started = Instant::now();
        let mut closed = Vec::with_capacity(devices.len());
        for &index in &order {
            closed.push(devices[index].0.gate.close());
        }
        if !closed.iter().all(|closed| closed.drain(started + deadline)) {
            drop(closed);
            return Err(EngineError::new(
                "DEVICE_BUSY",
                libc::EBUSY,
                format!("requests in flight did not end within {} ms; nothing was changed, try again", deadline.as_millis()),
            )
            .with("deadlineMs", deadline.as_millis()));
        }
        // A device may have been poisoned or swapped by somebody else while the gates closed; after this nothing can fail.
        for (device, _) in devices {
            device.poison_check()?;
            device.check_can_swap()?;
        }
        let mut reports: Vec<SwapReport> =
            devices.iter().zip(prepared).map(|((device, _), next)| device.swap_drained(next)).collect::<Result<_>>()?;
        drop(closed);
        let pause = started.elapsed();
        for report in &mut reports {
            report.pause = pause;
        }
        Ok(reports)
    }

    fn check_can_swap(&self) -> Result<()> {
        let checkpoints = self.checkpoints.lock();
        if checkpoints.swap.is_some() {
            return Err(EngineError::new("SWAP_UNCOMMITTED", libc::EBUSY, "the previous swap of this device is not committed yet"));
        }
        if checkpoints.busy {
            return Err(busy_error());
        }
        if self.layers.load().active.is_none() {
            return Err(read_only_error());
        }
        Ok(())
    }

    fn swap_drained(&self, next: Arc<ActiveLayer>) -> Result<SwapReport> {
        let mut checkpoints = self.checkpoints.lock();
        let mut batch = self.batch.lock();
        let table = self.layers.load_full();
        let predecessor = table.active.clone().ok_or_else(read_only_error)?;
        batch.close(&predecessor);
        let frozen = self.map.freeze();
        let lsn = batch.last_lsn;
        predecessor.refuse_writes();
        batch.closing.push(predecessor.clone());
        let successor = next.spec.id;
        if next.spec.store.capabilities().answers_need_proof {
            self.proof.require();
        }
        self.set_layers(&checkpoints, table.with_active(next));
        self.open_delta_count.store(0, Ordering::Relaxed);
        self.journal_bytes.store(0, Ordering::Relaxed);
        checkpoints.swap = Some(UncommittedSwap { frozen: frozen.clone(), lsn, predecessor, successor });
        Ok(SwapReport { frozen, lsn, pause: Duration::ZERO })
    }

    /// Makes everything of the closing layer durable: its data, then its frames. Part of every flush, too.
    pub fn sync_closing(&self) -> Result<()> {
        self.flush_completed()
    }

    /// The catalog has the swap and the checkpoint that belongs to it: the next swap may come, and with `seal` the closing
    /// layer's journal is sealed, which drops its frames; otherwise it stays as it is, to be sealed through its store.
    /// `SWAP_NOT_CHECKPOINTED` if the swap's map is not committed. An error of the seal itself leaves the swap committed: the
    /// mark only helps to detect an older catalog.
    pub fn swap_committed(&self, seal: bool) -> Result<()> {
        let swap = {
            let mut checkpoints = self.checkpoints.lock();
            match &checkpoints.swap {
                None => return Ok(()),
                Some(swap) if checkpoints.durable_lsn < swap.lsn => {
                    return Err(EngineError::new(
                        "SWAP_NOT_CHECKPOINTED",
                        libc::EINVAL,
                        format!("the swap's map at lsn {} is not committed; the catalog has lsn {}", swap.lsn, checkpoints.durable_lsn),
                    ));
                }
                Some(_) => {}
            }
            let swap = checkpoints.swap.take();
            // Everything that was answered before the swap is durable, and the old store was ours when it became so: whoever takes it over
            // from now on has seen it.
            if !self.layers.load().active.as_ref().is_some_and(|active| active.spec.store.capabilities().answers_need_proof) {
                self.proof.release();
            }
            swap
        };
        let Some(swap) = swap else { return Ok(()) };
        self.read_through_own_handle(&swap.predecessor);
        if seal {
            let mark = SealMark { final_lsn: swap.lsn, successor: swap.successor };
            swap.predecessor.journal.lock().seal(mark)?;
        }
        Ok(())
    }

    /// The layer that was written is durable and only read from now on: its handle for writing, which keeps a descriptor, ends.
    fn read_through_own_handle(&self, sealed: &ActiveLayer) {
        let checkpoints = self.checkpoints.lock();
        let batch = self.batch.lock();
        if batch.closing.iter().any(|closing| closing.alias() == sealed.alias()) {
            // Not all of it is durable yet: the descriptor has to stay for the sync (I6).
            return;
        }
        let mut table = LayerTable::clone(&self.layers.load());
        if table.active.is_none() || !table.is_read_through(sealed.alias(), &sealed.io) {
            return;
        }
        table.insert(ReadLayer::new(sealed.spec.clone()));
        self.set_layers(&checkpoints, table);
    }
}
