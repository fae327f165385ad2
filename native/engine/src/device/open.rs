//! Opening: the durable map of the catalog plus the journal of the active layer, and of the next one.
//!
//! Rules
//! - lsns are contiguous over both journals; a gap is `CATALOG_BEHIND` and nothing is opened.
//! - Each journal is read in the store of its layer: the two may lie in different ones.
//! - A seal mark on the layer that the catalog calls active means that the catalog is older than the pool.
//! - Frames in the next layer mean that a swap happened whose transaction was lost: it becomes the active one, and the map as
//!   replayed becomes the uncommitted swap that the layer above must commit before it serves.
//! - Bytes in the active layer that no slot refers to (a crash dropped their frame) are never read: the map is the only truth (I4).
use super::batch_log::{BatchLog, RecalledBatch};
use super::checkpoint::{Checkpoints, UncommittedSwap};
use super::layers::{ActiveLayer, LayerTable, clear_journal};
use super::proof::Proof;
use super::{Counters, Device, DeviceLatencies, DeviceSpec, LayerSpec, OpenReport};
use crate::{EngineError, Result, Throttle};
use arc_swap::ArcSwap;
use atoll_io::{Frame, Journal, JournalIdentity, JournalReplay, LayerIo, OpenMode};
use atoll_map::{HOLE, MAP_SLOTS, Map};
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64};

impl Device {
    /// Opens: replays the journal of the active layer and then of the next one. Errors: `CATALOG_BEHIND`,
    /// `JOURNAL_CORRUPT`, `LAYER_MISSING`, `FORMAT_VERSION`, `PAGE_*`; nothing was changed then but a torn tail that was cut.
    pub fn open(spec: DeviceSpec) -> Result<(Arc<Device>, OpenReport)> {
        let map = Map::from_frozen(&spec.map);
        let mut report = OpenReport { last_lsn: spec.map_lsn, ..OpenReport::default() };
        let mut swap = None;
        let mut active = None;
        let batch_log = spec.batch_log.clone().filter(|_| spec.active.is_some()).map(|place| BatchLog::new(place, spec.volume, spec.epoch));
        let mut recalled = batch_log.as_ref().map_or(Ok(Vec::new()), |log| log.recall(spec.batch_log_since_epoch))?;
        if let Some(alias) = spec.active {
            let current = find_layer(&spec, alias)?;
            let io = current.store.open_layer(current.id, OpenMode::ReadWrite)?;
            let mut replay = replay_journal(&spec, current, report.last_lsn)?;
            if replay.seal.is_some() {
                return Err(sealed_error(current));
            }
            apply(&map, current, &replay.frames, &mut report)?;
            report.torn_tail_bytes += replay.torn_tail_bytes;
            adopt_recalled(&map, current, &*io, &mut replay.journal, &mut recalled, &mut report)?;
            let current = Arc::new(ActiveLayer::new(current.clone(), io, replay.journal));
            let promoted = match spec.next {
                Some(next) => replay_next(&spec, &map, find_layer(&spec, next)?, &mut recalled, &mut report)?,
                None => None,
            };
            if let Some(log) = &batch_log {
                // Everything in it is in the journals now, or was no part of an unbroken sequence.
                log.remove()?;
            }
            active = Some(match promoted {
                None => current,
                Some(next) => {
                    current.refuse_writes();
                    report.promoted_next = true;
                    swap =
                        Some(UncommittedSwap { frozen: map.freeze(), lsn: report.last_lsn, predecessor: current, successor: next.spec.id });
                    next
                }
            });
        }
        let journal_bytes = active.as_ref().map_or(0, |active| active.journal.lock().length_bytes());
        let written = swap.as_ref().map(|swap: &UncommittedSwap| &swap.predecessor).into_iter().chain(&active);
        let needs_proof = written.into_iter().any(|layer| layer.spec.store.capabilities().answers_need_proof);
        let layers = LayerTable::new(spec.layers, active);
        let device = Arc::new_cyclic(|myself| Device {
            myself: myself.clone(),
            volume: spec.volume,
            epoch: spec.epoch,
            size_bytes: AtomicU64::new(spec.size_bytes),
            limits: spec.limits,
            gate: Default::default(),
            map,
            waits_for_network: AtomicBool::new(layers.waits_for_network()),
            layers: ArcSwap::from_pointee(layers),
            ranges: Default::default(),
            batch: Mutex::new(super::Batch::starting_after(report.last_lsn)),
            batch_log,
            flush_turns: Default::default(),
            checkpoints: Mutex::new(Checkpoints { busy: false, durable: spec.map, durable_lsn: spec.map_lsn, swap }),
            shrink: Mutex::new(None),
            room: Condvar::new(),
            room_lock: Mutex::new(()),
            changes: AtomicU64::new(0),
            changes_durable: AtomicU64::new(0),
            dirty_bytes: AtomicU64::new(0),
            open_delta_count: AtomicU64::new(0),
            journal_bytes: AtomicU64::new(journal_bytes),
            background_queued: AtomicBool::new(false),
            checkpoint_wanted: AtomicBool::new(false),
            poisoned: Mutex::new(None),
            closed: AtomicBool::new(false),
            throttle: Throttle::new(spec.throttle),
            on_event: spec.on_event,
            proof: Proof::new(needs_proof),
            counters: Counters::default(),
            latencies: DeviceLatencies::default(),
        });
        Ok((device, report))
    }
}

fn find_layer(spec: &DeviceSpec, alias: u32) -> Result<&LayerSpec> {
    spec.layers.iter().find(|layer| layer.alias == alias).ok_or_else(|| {
        EngineError::new("LAYER_UNKNOWN", libc::EINVAL, format!("layer alias {alias} is named but not given")).with("alias", alias)
    })
}

fn replay_journal(spec: &DeviceSpec, layer: &LayerSpec, after_lsn: u64) -> Result<JournalReplay> {
    let identity = JournalIdentity { volume: spec.volume, layer: layer.id, epoch: spec.epoch };
    Ok(Journal::replay(layer.store.clone(), identity, after_lsn)?)
}

fn replay_next(
    spec: &DeviceSpec,
    map: &Map,
    next: &LayerSpec,
    recalled: &mut Vec<RecalledBatch>,
    report: &mut OpenReport,
) -> Result<Option<Arc<ActiveLayer>>> {
    let mut replay = replay_journal(spec, next, report.last_lsn)?;
    report.torn_tail_bytes += replay.torn_tail_bytes;
    if replay.seal.is_some() {
        return Err(sealed_error(next));
    }
    let follows = |batch: &RecalledBatch| batch.lsn == report.last_lsn + 1 && batch.active == next.alias;
    if replay.frames.is_empty() && !recalled.iter().any(follows) {
        return Ok(None);
    }
    apply(map, next, &replay.frames, report)?;
    let io = next.store.open_layer(next.id, OpenMode::ReadWrite)?;
    if replay.frames.is_empty() {
        // Leftovers of a torn frame may begin at a lower lsn than the first batch.
        replay.journal = clear_journal(next, spec.volume, spec.epoch)?;
    }
    adopt_recalled(map, next, &*io, &mut replay.journal, recalled, report)?;
    Ok(Some(Arc::new(ActiveLayer::new(next.clone(), io, replay.journal))))
}

/// Takes the batches that follow the last frame without a gap, and that were written under this layer, into its journal: data
/// first (I3), then the frame.
fn adopt_recalled(
    map: &Map,
    layer: &LayerSpec,
    io: &dyn LayerIo,
    journal: &mut Journal,
    recalled: &mut Vec<RecalledBatch>,
    report: &mut OpenReport,
) -> Result<()> {
    recalled.retain(|batch| batch.lsn > report.last_lsn);
    while recalled.first().is_some_and(|batch| batch.lsn == report.last_lsn + 1 && batch.active == layer.alias) {
        let RecalledBatch { lsn, deltas, .. } = recalled.remove(0);
        io.sync()?;
        let frames = [Frame { lsn, deltas }];
        apply(map, layer, &frames, report)?;
        journal.append(lsn, &frames[0].deltas)?;
        report.frames_replayed -= 1;
        report.batches_recalled += 1;
    }
    Ok(())
}

fn apply(map: &Map, layer: &LayerSpec, frames: &[Frame], report: &mut OpenReport) -> Result<()> {
    for frame in frames {
        for delta in &frame.deltas {
            let in_bounds = delta.start_slot.checked_add(delta.slot_count).is_some_and(|end| end <= MAP_SLOTS) && delta.slot_count > 0;
            if !in_bounds || (delta.owner != HOLE && delta.owner != layer.alias) {
                return Err(EngineError::new(
                    "JOURNAL_CORRUPT",
                    libc::EIO,
                    format!(
                        "frame {} of layer {}'s journal gives slots {}+{} to owner {}, which cannot be",
                        frame.lsn, layer.id, delta.start_slot, delta.slot_count, delta.owner
                    ),
                )
                .with("layerId", layer.id)
                .with("lsn", frame.lsn));
            }
            map.set(delta.start_slot, delta.slot_count, delta.owner)?;
        }
        report.last_lsn = frame.lsn;
        report.frames_replayed += 1;
    }
    Ok(())
}

fn sealed_error(layer: &LayerSpec) -> EngineError {
    EngineError::new(
        "CATALOG_BEHIND",
        libc::EIO,
        format!(
            "layer {} is sealed in its pool but active in the catalog: the catalog is older than the pool; restore a newer one",
            layer.id
        ),
    )
    .with("layerId", layer.id)
}
