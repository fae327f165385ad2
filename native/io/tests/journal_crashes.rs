//! A journal over the crash recorder: whatever a power cut leaves behind, a replay finds a beginning of what was appended that
//! holds every synced frame, also when the power is cut again while the journal is recovering.
mod common;

use atoll_io::{CrashOptions, FaultPlan, FaultRule, FaultStore, IoErrorCode, Journal, JournalIdentity, MemoryStore, SealMark, Store};
use common::{LAYER, VOLUME, deltas_of};
use proptest::prelude::*;
use std::sync::Arc;

const ANY: CrashOptions = CrashOptions { keep_of_256: 128, tear: true, reorder: true };

#[derive(Debug, Clone)]
enum Step {
    Append,
    Rotate,
    /// The catalog commits the lsn this many frames back, and the journal lets go of what is behind it.
    Checkpoint(u64),
    /// The process is killed and opens the journal again; nothing is lost but what it did not know of.
    Kill,
    /// Appends, first without space.
    AppendWithoutSpace,
    /// An append whose sync fails, and the reopening that must follow.
    FailedSync,
    /// The disk has no space for a floor.
    CheckpointWithoutSpace,
    /// The sync of the floor fails, and the reopening that must follow.
    CheckpointWithFailedSync,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        8 => Just(Step::Append),
        2 => Just(Step::Rotate),
        2 => (0u64..4).prop_map(Step::Checkpoint),
        1 => Just(Step::Kill),
        1 => Just(Step::AppendWithoutSpace),
        1 => Just(Step::FailedSync),
        1 => Just(Step::CheckpointWithoutSpace),
        1 => Just(Step::CheckpointWithFailedSync),
    ]
}

/// What the world outside knows at a point of the history.
#[derive(Debug, Clone, Copy)]
struct Known {
    sequence: u64,
    /// lsn in the catalog, which is durable by itself.
    catalog_lsn: u64,
    /// Last frame whose append was acknowledged, or that a replay handed out.
    synced_lsn: u64,
    /// Last frame that was ever appended.
    appended_lsn: u64,
    epoch: u64,
    sealed: Option<SealMark>,
}

struct Run {
    memory: Arc<MemoryStore>,
    faults: Arc<FaultStore>,
    journal: Journal,
    now: Known,
    known: Vec<Known>,
}

fn identity(epoch: u64) -> JournalIdentity {
    JournalIdentity { volume: VOLUME, layer: LAYER, epoch }
}

fn rule(operation: &str, errno: i32) -> FaultRule {
    FaultRule {
        operation: operation.to_owned(),
        layer: None,
        skip_count: 0,
        apply_count: 1,
        probability_of_256: 256,
        errno,
        delay_ms: 0,
        tear: true,
    }
}

impl Run {
    fn new(memory: Arc<MemoryStore>, now: Known) -> Run {
        let faults = Arc::new(FaultStore::new(Arc::clone(&memory) as Arc<dyn Store>));
        let journal = Journal::new(Arc::clone(&faults) as Arc<dyn Store>, identity(now.epoch));
        let mut run = Run { memory, faults, journal, now, known: Vec::new() };
        run.note();
        run
    }

    /// Remembers what is known from the present event on.
    fn note(&mut self) {
        self.now.sequence = self.memory.sequence();
        self.known.push(self.now);
    }

    /// What was known just after event `sequence`. What an event in the middle of a step made certain is noted at the step's end.
    fn known_at(&self, sequence: u64) -> Known {
        *self.known.iter().rfind(|known| known.sequence <= sequence).expect("the first note is at the start")
    }

    /// Frames that may exist at `sequence`: a step in the middle of its work has appended one more than it has noted.
    fn appended_at(&self, sequence: u64) -> u64 {
        let later = self.known.iter().find(|known| known.sequence >= sequence);
        later.or(self.known.last()).map_or(0, |known| known.appended_lsn)
    }

    fn reopen(&mut self) {
        self.faults.set_plan(FaultPlan::default());
        self.now.epoch += 1;
        // The lease is taken, durably, before the journal is touched.
        self.note();
        let replayed = Journal::replay(Arc::clone(&self.faults) as Arc<dyn Store>, identity(self.now.epoch), self.now.catalog_lsn).unwrap();
        self.now.synced_lsn = replayed.frames.last().map_or(self.now.catalog_lsn, |frame| frame.lsn);
        self.journal = replayed.journal;
        self.note();
    }

    fn append(&mut self) {
        let lsn = self.now.synced_lsn + 1;
        self.now.appended_lsn = self.now.appended_lsn.max(lsn);
        self.journal.append(lsn, &deltas_of(lsn)).unwrap();
        self.now.synced_lsn = lsn;
        self.note();
    }

    fn step(&mut self, step: &Step, seed: u64) {
        let lsn = self.now.synced_lsn + 1;
        match step {
            Step::Append => self.append(),
            Step::Rotate => self.journal.rotate(),
            Step::Checkpoint(back) => {
                self.now.catalog_lsn = self.now.catalog_lsn.max(self.now.synced_lsn.saturating_sub(*back));
                self.note();
                self.journal.remove_behind(self.now.catalog_lsn).unwrap();
                self.note();
            }
            Step::CheckpointWithoutSpace => {
                self.now.catalog_lsn = self.now.synced_lsn;
                self.note();
                self.faults.set_plan(FaultPlan { seed, rules: vec![rule("append", libc::ENOSPC)] });
                if let Err(error) = self.journal.remove_behind(self.now.catalog_lsn) {
                    assert_eq!(error.code, IoErrorCode::NoSpace);
                }
                self.faults.set_plan(FaultPlan::default());
                self.note();
            }
            Step::CheckpointWithFailedSync => {
                self.now.catalog_lsn = self.now.synced_lsn;
                self.note();
                self.faults.set_plan(FaultPlan { seed, rules: vec![rule("segment-sync", libc::EIO)] });
                let answer = self.journal.remove_behind(self.now.catalog_lsn);
                assert_eq!(answer.is_err(), self.faults.injected_count() > 0);
                self.reopen();
            }
            Step::Kill => self.reopen(),
            Step::AppendWithoutSpace => {
                // One that grows ahead is tried again without the room: of two failures at least one is met by the frame itself.
                let apply_count = 1 + seed % 2;
                self.faults.set_plan(FaultPlan { seed, rules: vec![FaultRule { apply_count, ..rule("append", libc::ENOSPC) }] });
                self.now.appended_lsn = self.now.appended_lsn.max(lsn);
                let answer = self.journal.append(lsn, &deltas_of(lsn));
                self.faults.set_plan(FaultPlan::default());
                match answer {
                    Ok(()) => {
                        assert_eq!(apply_count, 1);
                        self.now.synced_lsn = lsn;
                        self.note();
                    }
                    Err(error) => {
                        assert_eq!(error.code, IoErrorCode::NoSpace);
                        self.append();
                    }
                }
            }
            Step::FailedSync => {
                self.faults.set_plan(FaultPlan { seed, rules: vec![rule("segment-sync", libc::EIO)] });
                self.now.appended_lsn = self.now.appended_lsn.max(lsn);
                self.journal.append(lsn, &deltas_of(lsn)).unwrap_err();
                assert_eq!(self.journal.append(lsn, &deltas_of(lsn)).unwrap_err().code, IoErrorCode::Broken);
                self.note();
                self.reopen();
            }
        }
    }

    /// Cuts the power just after `sequence` and opens what is left. Returns the image and the last lsn found.
    fn check_image(&self, sequence: u64, seed: u64) -> (Arc<MemoryStore>, Known) {
        let image = Arc::new(self.memory.crash_image(sequence, seed, ANY).to_recording());
        let mut known = self.known_at(sequence);
        known.epoch += 1;
        let replayed = Journal::replay(Arc::clone(&image) as Arc<dyn Store>, identity(known.epoch), known.catalog_lsn)
            .unwrap_or_else(|error| panic!("at {sequence}, seed {seed}, {known:?}: {error}"));
        let first = known.catalog_lsn + 1;
        for (frame, lsn) in replayed.frames.iter().zip(first..) {
            assert_eq!((frame.lsn, &frame.deltas), (lsn, &deltas_of(lsn)), "contiguous, and as they were appended");
        }
        let last = known.catalog_lsn + replayed.frames.len() as u64;
        assert!(last >= known.synced_lsn, "at {sequence}, seed {seed}: frames up to {last}, {known:?}");
        assert!(last <= self.appended_at(sequence), "at {sequence}, seed {seed}: frame {last} was never appended");
        if let Some(mark) = known.sealed {
            assert_eq!(replayed.seal, Some(mark));
        }
        // It goes on from there.
        if replayed.seal.is_none() {
            let mut journal = replayed.journal;
            journal.append(last + 1, &deltas_of(last + 1)).unwrap();
            known.appended_lsn = last + 1;
            known.synced_lsn = last + 1;
        } else {
            known.synced_lsn = last;
            known.appended_lsn = last;
        }
        (image, known)
    }

    /// A catalog restored from an older time is told so, or gets every frame it lacks; never some of them, or none.
    fn check_older_catalogs(&self, sequence: u64, seed: u64) {
        let known = self.known_at(sequence);
        for older_lsn in 0..known.catalog_lsn {
            let image: Arc<dyn Store> = Arc::new(self.memory.crash_image(sequence, seed, ANY));
            if let Ok(replayed) = Journal::replay(image, identity(known.epoch + 1), older_lsn) {
                let last = replayed.frames.last().map_or(older_lsn, |frame| frame.lsn);
                assert!(last >= known.synced_lsn, "at {sequence}, seed {seed}: a catalog of {older_lsn} got frames up to {last}");
            }
        }
    }

    fn check_all_images(&self, seed: u64, per_sequence: u64) {
        for sequence in 1..=self.memory.sequence() {
            for draw in 0..per_sequence {
                self.check_older_catalogs(sequence, seed.wrapping_add(draw));
                let (image, known) = self.check_image(sequence, seed.wrapping_add(draw));
                // A second cut, anywhere in the recovery and the append after it. The frame of the first cut that came back by
                // chance is certain only once the recovery was over.
                let end = image.sequence();
                let first_found = known.synced_lsn;
                for second in 0..=end {
                    let again: Arc<dyn Store> = Arc::new(image.crash_image(second, seed ^ second, ANY));
                    let replayed = Journal::replay(again, identity(known.epoch + 1), known.catalog_lsn)
                        .unwrap_or_else(|error| panic!("at {sequence}, then {second}, seed {seed}: {error}"));
                    let last = known.catalog_lsn + replayed.frames.len() as u64;
                    let least = self.known_at(sequence).synced_lsn;
                    assert!(last >= if second == end { first_found } else { least }, "at {sequence}, then {second}, seed {seed}");
                    assert!(last <= known.appended_lsn);
                }
            }
        }
    }
}

fn start() -> Run {
    let memory = Arc::new(MemoryStore::new(1 << 30, true));
    memory.create_layer(LAYER).unwrap();
    let now = Known { sequence: 0, catalog_lsn: 0, synced_lsn: 0, appended_lsn: 0, epoch: 1, sealed: None };
    Run::new(memory, now)
}

proptest! {
    #![proptest_config(ProptestConfig { max_shrink_iters: 2000, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn a_replay_finds_every_synced_frame_after_any_power_cut(
        steps in prop::collection::vec(step(), 1..25),
        seal: bool,
        seed: u64,
    ) {
        let mut run = start();
        for (index, step) in steps.iter().enumerate() {
            run.step(step, seed.wrapping_add(index as u64));
        }
        if seal {
            let mark = SealMark { final_lsn: run.now.synced_lsn, successor: common::OTHER_LAYER };
            run.now.catalog_lsn = run.now.synced_lsn;
            run.note();
            run.journal.seal(mark).unwrap();
            run.now.sealed = Some(mark);
            run.note();
        }
        run.check_all_images(seed, 3);
    }
}
