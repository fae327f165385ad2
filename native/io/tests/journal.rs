//! The journal: what is appended comes back, and every kind of damage is told apart.
mod common;

use atoll_io::{
    Delta, FaultPlan, FaultRule, FaultStore, FileStore, Frame, IoErrorCode, Journal, JournalIdentity, JournalReplay, LayerId, MemoryStore,
    Result, SealMark, Store,
};
use common::{LAYER, OTHER_LAYER, TemporaryFolder, VOLUME, deltas_of};
use std::sync::Arc;

const NO_LAYER: LayerId = LayerId([0; 16]);

fn identity(epoch: u64) -> JournalIdentity {
    JournalIdentity { volume: VOLUME, layer: LAYER, epoch }
}

fn memory() -> Arc<dyn Store> {
    Arc::new(MemoryStore::new(1 << 30, false))
}

/// A journal whose segments begin at `bases` and which goes to `last_lsn`.
fn journal_with(store: &Arc<dyn Store>, bases: &[u64], last_lsn: u64) -> Journal {
    let mut journal = Journal::new(Arc::clone(store), identity(1));
    for lsn in bases[0]..=last_lsn {
        if bases.contains(&lsn) {
            journal.rotate();
        }
        journal.append(lsn, &deltas_of(lsn)).unwrap();
    }
    assert_eq!(store.list_segments(LAYER).unwrap(), bases);
    journal
}

/// Replays, and sees that an inspection has found the same and changed nothing.
fn replay(store: &Arc<dyn Store>, after_lsn: u64) -> Result<JournalReplay> {
    let lengths = |store: &Arc<dyn Store>| -> Vec<_> {
        let length = |base_lsn| store.open_segment(LAYER, base_lsn).unwrap().length_bytes().unwrap();
        store.list_segments(LAYER).unwrap().into_iter().map(|base_lsn| (base_lsn, length(base_lsn))).collect()
    };
    let before = lengths(store);
    let inspected = Journal::inspect(&**store, LAYER, Some(VOLUME), 2, after_lsn);
    assert_eq!(lengths(store), before);
    let replayed = Journal::replay(Arc::clone(store), identity(2), after_lsn);
    match (&inspected, &replayed) {
        (Ok(found), Ok(replay)) => {
            let journal_bytes = replay.journal.length_bytes();
            assert_eq!((&found.frames, found.torn_tail_bytes, found.seal), (&replay.frames, replay.torn_tail_bytes, replay.seal));
            assert_eq!(found.length_bytes, journal_bytes);
        }
        (Err(found), Err(error)) => {
            assert_eq!((found.code, &found.object, found.offset_bytes), (error.code, &error.object, error.offset_bytes));
        }
        _ => panic!("inspected {:?}, replayed {:?}", inspected.err(), replayed.err()),
    }
    replayed
}

fn code(answer: Result<JournalReplay>) -> IoErrorCode {
    answer.err().expect("an error").code
}

/// Asserts that the replay holds the frames after `after_lsn` up to `last_lsn`, each as it was appended.
fn assert_frames(frames: &[Frame], after_lsn: u64, last_lsn: u64) {
    let expected: Vec<Frame> = (after_lsn + 1..=last_lsn).map(|lsn| Frame { lsn, deltas: deltas_of(lsn) }).collect();
    assert_eq!(frames, expected);
}

fn bytes_of(store: &Arc<dyn Store>, base_lsn: u64) -> Vec<u8> {
    store.open_segment(LAYER, base_lsn).unwrap().read_all().unwrap()
}

fn put_bytes(store: &Arc<dyn Store>, base_lsn: u64, bytes: &[u8]) {
    store.remove_segment(LAYER, base_lsn).unwrap();
    let segment = store.create_segment(LAYER, base_lsn, 1).unwrap();
    segment.append(0, bytes).unwrap();
    segment.sync().unwrap();
}

/// Lengths of a segment of one frame each time another was appended, the header first.
fn frame_ends(base_lsn: u64, last_lsn: u64) -> Vec<usize> {
    let store = memory();
    let mut journal = Journal::new(Arc::clone(&store), identity(1));
    let mut ends = vec![64];
    for lsn in base_lsn..=last_lsn {
        journal.append(lsn, &deltas_of(lsn)).unwrap();
        ends.push(journal.length_bytes() as usize);
    }
    ends
}

fn rule(operation: &str, errno: i32) -> FaultRule {
    FaultRule {
        operation: operation.to_owned(),
        layer: None,
        skip_count: 0,
        apply_count: u64::MAX,
        probability_of_256: 256,
        errno,
        delay_ms: 0,
        tear: false,
    }
}

#[test]
fn what_was_appended_comes_back_from_memory_and_from_files() {
    let folder = TemporaryFolder::new();
    let file: Arc<dyn Store> = Arc::new(FileStore::open(folder.path(), true, 0).unwrap());
    for store in [memory(), file] {
        let journal = journal_with(&store, &[1, 4, 9], 12);
        let replayed = replay(&store, 0).unwrap();
        assert_frames(&replayed.frames, 0, 12);
        assert_eq!((replayed.torn_tail_bytes, replayed.seal), (0, None));
        assert_eq!(replayed.journal.length_bytes(), journal.length_bytes());
        for after_lsn in 0..15 {
            assert_frames(&replay(&store, after_lsn).unwrap().frames, after_lsn, 12);
        }
    }
}

#[test]
fn a_journal_without_frames_costs_nothing() {
    let store = memory();
    let mut journal = Journal::new(Arc::clone(&store), identity(1));
    journal.rotate();
    journal.remove_behind(100).unwrap();
    assert_eq!(journal.length_bytes(), 0);
    let replayed = replay(&store, 100).unwrap();
    assert!(replayed.frames.is_empty() && replayed.seal.is_none());
    assert!(store.list_segments(LAYER).unwrap().is_empty());
    // The first frame may have any lsn: the volume had other layers before.
    let mut journal = replayed.journal;
    journal.append(101, &deltas_of(101)).unwrap();
    assert_eq!(store.list_segments(LAYER).unwrap(), [101]);
}

#[test]
fn a_replayed_journal_goes_on_in_a_new_segment_under_its_own_epoch() {
    let store = memory();
    journal_with(&store, &[1], 5);
    let mut journal = replay(&store, 2).unwrap().journal;
    for lsn in 6..9 {
        journal.append(lsn, &deltas_of(lsn)).unwrap();
    }
    assert_eq!(store.list_segments(LAYER).unwrap(), [1, 6]);
    assert_frames(&replay(&store, 0).unwrap().frames, 0, 8);
    let error = Journal::replay(Arc::clone(&store), identity(1), 0).err().unwrap();
    assert_eq!(error.code, IoErrorCode::CatalogBehind);
    assert!(error.message.contains("epoch 2"), "{error}");
}

#[test]
#[should_panic(expected = "lsns are contiguous")]
fn a_gap_in_the_lsns_is_a_mistake_of_the_caller() {
    let mut journal = journal_with(&memory(), &[1], 5);
    let _ = journal.append(7, &deltas_of(7));
}

#[test]
fn a_frame_takes_a_million_deltas() {
    let store = memory();
    let deltas: Vec<Delta> = (0..1 << 20).map(|slot| Delta { start_slot: slot * 3, slot_count: 2, owner: slot as u32 }).collect();
    Journal::new(Arc::clone(&store), identity(1)).append(1, &deltas).unwrap();
    assert!(replay(&store, 0).unwrap().frames[0].deltas == deltas);
}

#[test]
#[should_panic(expected = "more than a frame takes")]
fn more_deltas_than_a_frame_takes_are_a_mistake_of_the_caller() {
    let deltas = vec![Delta { start_slot: 0, slot_count: 1, owner: 1 }; (1 << 20) + 1];
    let _ = Journal::new(memory(), identity(1)).append(1, &deltas);
}

#[test]
fn a_last_frame_torn_at_any_byte_is_cut_and_the_journal_goes_on() {
    let ends = frame_ends(1, 5);
    let (start, end) = (ends[4], ends[5]);
    for length in start..end {
        // The rest is missing, zeros, or garbage up to the frame's end and beyond.
        for rest in [vec![], vec![0; end - length], vec![0xa5; 5000]] {
            let store = memory();
            journal_with(&store, &[1], 5);
            let whole = bytes_of(&store, 1);
            let bytes = [&whole[..length], &rest].concat();
            if bytes == whole {
                continue; // The frame ends in zeros of its own.
            }
            put_bytes(&store, 1, &bytes);
            let replayed = replay(&store, 0).unwrap();
            assert_frames(&replayed.frames, 0, 4);
            if bytes[start..].iter().all(|byte| *byte == 0) {
                assert_eq!(replayed.torn_tail_bytes, 0, "zeros are room for frames");
            } else {
                assert_eq!(replayed.torn_tail_bytes, (bytes.len() - start) as u64);
                assert_eq!(bytes_of(&store, 1).len(), start, "the tail is cut");
            }
            let mut journal = replayed.journal;
            journal.append(5, &deltas_of(5)).unwrap();
            assert_frames(&replay(&store, 0).unwrap().frames, 0, 5);
        }
    }
}

#[test]
fn a_last_segment_torn_in_its_header_is_removed() {
    for length in 0..64 {
        for rest in [0, 1, 300] {
            let store = memory();
            journal_with(&store, &[1, 4], 4);
            let bytes = [&bytes_of(&store, 4)[..length], &vec![0; rest]].concat();
            put_bytes(&store, 4, &bytes);
            let replayed = replay(&store, 1).unwrap();
            assert_frames(&replayed.frames, 1, 3);
            assert_eq!(replayed.torn_tail_bytes, bytes.len() as u64);
            assert_eq!(store.list_segments(LAYER).unwrap(), [1]);
            let mut journal = replayed.journal;
            journal.append(4, &deltas_of(4)).unwrap();
            assert_frames(&replay(&store, 0).unwrap().frames, 0, 4);
        }
    }
}

#[test]
fn a_flipped_byte_with_a_valid_frame_after_it_is_corruption_named_by_segment_and_offset() {
    let ends = frame_ends(1, 5);
    for bases in [&[1][..], &[1, 5]] {
        for at in 0..ends[4] {
            let store = memory();
            journal_with(&store, bases, 5);
            let mut bytes = bytes_of(&store, 1);
            bytes[at] ^= 0x10;
            put_bytes(&store, 1, &bytes);
            let error = replay(&store, 0).err().unwrap_or_else(|| panic!("byte {at} was taken"));
            assert_eq!(error.code, IoErrorCode::Corrupt, "byte {at}: {error}");
            assert!(error.object.contains("0000000000000001"), "{error}");
            let start = if at < 64 { 0 } else { *ends.iter().rfind(|end| **end <= at).unwrap() };
            assert_eq!(error.offset_bytes, start as u64, "byte {at}");
            assert_eq!(bytes_of(&store, 1), bytes, "nothing was changed");
        }
    }
}

#[test]
fn a_flipped_byte_in_the_last_frame_is_a_torn_tail() {
    let ends = frame_ends(1, 5);
    for at in ends[4]..ends[5] {
        let store = memory();
        journal_with(&store, &[1], 5);
        let mut bytes = bytes_of(&store, 1);
        bytes[at] ^= 0x10;
        put_bytes(&store, 1, &bytes);
        assert_frames(&replay(&store, 0).unwrap().frames, 0, 4);
    }
}

#[test]
fn stale_bytes_after_a_torn_tail_are_no_frames() {
    let ends = frame_ends(1, 5);
    let store = memory();
    journal_with(&store, &[1], 5);
    let bytes = bytes_of(&store, 1);
    let older = &bytes[ends[1]..ends[3]];
    // A frame of another segment with a higher lsn, as a file system may show it after a crash.
    let foreign = {
        let store = memory();
        journal_with(&store, &[6], 6);
        bytes_of(&store, 6)[64..].to_vec()
    };
    for tail in [&bytes[ends[4]..ends[4] + 16], &[0; 32], &[]] {
        let damaged = [&bytes[..ends[4]], tail, older, &foreign].concat();
        put_bytes(&store, 1, &damaged);
        let replayed = replay(&store, 0).unwrap();
        assert_frames(&replayed.frames, 0, 4);
        assert_eq!(replayed.torn_tail_bytes, (damaged.len() - ends[4]) as u64);
    }
}

#[test]
fn a_missing_first_segment_means_that_the_catalog_is_behind() {
    let store = memory();
    journal_with(&store, &[1, 4, 9], 12);
    store.remove_segment(LAYER, 1).unwrap();
    for after_lsn in 0..3 {
        assert_eq!(code(replay(&store, after_lsn)), IoErrorCode::CatalogBehind);
    }
    assert_frames(&replay(&store, 3).unwrap().frames, 3, 12);
    store.remove_segment(LAYER, 4).unwrap();
    assert_eq!(code(replay(&store, 7)), IoErrorCode::CatalogBehind);
    assert_frames(&replay(&store, 8).unwrap().frames, 8, 12);
}

#[test]
fn a_missing_segment_in_the_middle_is_only_fine_where_the_catalog_has_its_frames() {
    let store = memory();
    journal_with(&store, &[1, 4, 9], 12);
    store.remove_segment(LAYER, 4).unwrap();
    for after_lsn in 0..8 {
        assert_eq!(code(replay(&store, after_lsn)), IoErrorCode::CatalogBehind, "{after_lsn}");
    }
    assert_frames(&replay(&store, 8).unwrap().frames, 8, 12);
}

#[test]
fn a_rotten_last_frame_of_a_middle_segment_is_corruption() {
    let store = memory();
    journal_with(&store, &[1, 4], 5);
    let bytes = bytes_of(&store, 1);
    put_bytes(&store, 1, &bytes[..bytes.len() - 1]);
    for after_lsn in 0..3 {
        let error = replay(&store, after_lsn).err().unwrap();
        assert_eq!((error.code, error.offset_bytes), (IoErrorCode::Corrupt, frame_ends(1, 3)[2] as u64));
    }
    assert_frames(&replay(&store, 3).unwrap().frames, 3, 5);
}

#[test]
fn a_segment_of_another_layer_or_volume_is_refused() {
    let store = memory();
    journal_with(&store, &[1], 3);
    let bytes = bytes_of(&store, 1);
    let other = JournalIdentity { volume: [9; 16], ..identity(1) };
    assert_eq!(code(Journal::replay(Arc::clone(&store), other, 0)), IoErrorCode::Corrupt);
    let segment = store.create_segment(OTHER_LAYER, 1, 1).unwrap();
    segment.append(0, &bytes).unwrap();
    let other = JournalIdentity { layer: OTHER_LAYER, ..identity(1) };
    assert_eq!(code(Journal::replay(Arc::clone(&store), other, 0)), IoErrorCode::Corrupt);
    // Under another base lsn's name.
    put_bytes(&store, 2, &bytes);
    store.remove_segment(LAYER, 1).unwrap();
    assert_eq!(code(replay(&store, 5)), IoErrorCode::Corrupt);
}

#[test]
fn a_newer_format_is_refused_with_both_versions() {
    let store = memory();
    journal_with(&store, &[1], 3);
    let mut bytes = bytes_of(&store, 1);
    bytes[4] = 2;
    let crc = crc32c::crc32c(&bytes[..60]);
    bytes[60..64].copy_from_slice(&crc.to_le_bytes());
    put_bytes(&store, 1, &bytes);
    let error = replay(&store, 0).err().unwrap();
    assert_eq!(error.code, IoErrorCode::Version);
    assert!(error.message.contains("version 2") && error.message.contains("knows 1"), "{error}");
}

#[test]
fn a_floor_stays_when_everything_is_behind_the_catalog() {
    let store = memory();
    let mut journal = journal_with(&store, &[1, 4, 9], 12);
    journal.remove_behind(5).unwrap();
    assert_eq!(store.list_segments(LAYER).unwrap(), [4, 9], "a segment with a later frame stays whole");
    journal.remove_behind(8).unwrap();
    assert_eq!(store.list_segments(LAYER).unwrap(), [9]);
    journal.remove_behind(12).unwrap();
    assert_eq!(store.list_segments(LAYER).unwrap(), [13]);
    assert_eq!(journal.length_bytes(), 64);
    journal.remove_behind(12).unwrap();
    journal.remove_behind(3).unwrap();
    assert_eq!(store.list_segments(LAYER).unwrap(), [13]);
    for after_lsn in 0..12 {
        assert_eq!(code(replay(&store, after_lsn)), IoErrorCode::CatalogBehind);
    }
    assert!(replay(&store, 12).unwrap().frames.is_empty());
    journal.append(13, &deltas_of(13)).unwrap();
    journal.rotate();
    journal.append(14, &deltas_of(14)).unwrap();
    assert_eq!(store.list_segments(LAYER).unwrap(), [13, 14], "the first frame goes into the floor");
    assert_frames(&replay(&store, 12).unwrap().frames, 12, 14);
}

#[test]
fn a_floor_of_an_older_epoch_takes_the_next_frame_and_the_new_epoch_with_it() {
    let store = memory();
    journal_with(&store, &[1], 3).remove_behind(3).unwrap();
    let mut journal = replay(&store, 3).unwrap().journal;
    journal.append(4, &deltas_of(4)).unwrap();
    journal.append(5, &deltas_of(5)).unwrap();
    assert_eq!(store.list_segments(LAYER).unwrap(), [4]);
    assert_frames(&replay(&store, 3).unwrap().frames, 3, 5);
    let older = Journal::replay(Arc::clone(&store), identity(1), 3);
    assert_eq!(code(older), IoErrorCode::CatalogBehind, "a catalog of the older epoch does not know the frame's layers");
    // Torn anywhere, the floor is what is left.
    let bytes = bytes_of(&store, 4);
    for length in 64..64 + 48 + 32 {
        put_bytes(&store, 4, &bytes[..length]);
        assert!(replay(&store, 3).unwrap().frames.is_empty());
        assert_eq!(bytes_of(&store, 4).len(), 64, "the header alone; a change of epoch without its frame goes too");
        assert_eq!(code(replay(&store, 2)), IoErrorCode::CatalogBehind);
    }
}

#[test]
fn a_sealed_journal_is_one_small_segment_and_takes_nothing_more() {
    let store = memory();
    let mark = SealMark { final_lsn: 5, successor: OTHER_LAYER };
    let mut journal = journal_with(&store, &[1, 4], 5);
    journal.seal(mark).unwrap();
    assert_eq!(store.list_segments(LAYER).unwrap(), [6]);
    assert!(journal.length_bytes() < 200);
    let replayed = replay(&store, 5).unwrap();
    assert_eq!(replayed.seal, Some(mark));
    assert!(replayed.frames.is_empty());
    for after_lsn in 0..5 {
        assert_eq!(code(replay(&store, after_lsn)), IoErrorCode::CatalogBehind);
    }
    assert_eq!(replay(&store, 9).unwrap().seal, Some(mark));
    for mut journal in [journal, replayed.journal] {
        assert_eq!(journal.append(6, &deltas_of(6)).unwrap_err().code, IoErrorCode::ReadOnly);
        journal.seal(mark).unwrap();
        journal.remove_behind(100).unwrap();
        let error = journal.seal(SealMark { final_lsn: 5, successor: NO_LAYER }).unwrap_err();
        assert_eq!(error.code, IoErrorCode::Exists);
        assert_eq!(store.list_segments(LAYER).unwrap(), [6]);
    }
}

#[test]
fn a_journal_without_frames_and_one_with_only_a_floor_can_be_sealed() {
    let mark = SealMark { final_lsn: 5, successor: NO_LAYER };
    let store = memory();
    Journal::new(Arc::clone(&store), identity(1)).seal(mark).unwrap();
    assert_eq!(replay(&store, 5).unwrap().seal, Some(mark));
    let store = memory();
    journal_with(&store, &[1], 5).remove_behind(5).unwrap();
    replay(&store, 5).unwrap().journal.seal(mark).unwrap();
    assert_eq!(store.list_segments(LAYER).unwrap(), [6]);
    assert_eq!(replay(&store, 5).unwrap().seal, Some(mark));
}

#[test]
fn frames_before_a_seal_whose_removal_was_undone_are_still_replayed() {
    let store = memory();
    let mut journal = journal_with(&store, &[1, 4], 5);
    let (first, second) = (bytes_of(&store, 1), bytes_of(&store, 4));
    let mark = SealMark { final_lsn: 5, successor: NO_LAYER };
    journal.seal(mark).unwrap();
    put_bytes(&store, 4, &second);
    let replayed = replay(&store, 3).unwrap();
    assert_frames(&replayed.frames, 3, 5);
    assert_eq!(replayed.seal, Some(mark));
    put_bytes(&store, 1, &first);
    assert_frames(&replay(&store, 0).unwrap().frames, 0, 5);
    let mut journal = replay(&store, 0).unwrap().journal;
    journal.seal(mark).unwrap();
    assert_eq!(store.list_segments(LAYER).unwrap(), [6], "sealing again removes them again");
}

#[test]
fn a_torn_seal_is_no_seal() {
    let whole = memory();
    journal_with(&whole, &[1], 5).seal(SealMark { final_lsn: 5, successor: OTHER_LAYER }).unwrap();
    let seal = bytes_of(&whole, 6);
    for length in 0..seal.len() {
        let store = memory();
        journal_with(&store, &[1], 5);
        put_bytes(&store, 6, &seal[..length]);
        let replayed = replay(&store, 2).unwrap();
        assert_eq!(replayed.seal, None, "{length}");
        assert_frames(&replayed.frames, 2, 5);
        let mut journal = replayed.journal;
        journal.append(6, &deltas_of(6)).unwrap();
        assert_frames(&replay(&store, 2).unwrap().frames, 2, 6);
    }
}

#[test]
fn a_frame_after_the_seal_is_corruption() {
    let store = memory();
    journal_with(&store, &[1], 5).seal(SealMark { final_lsn: 5, successor: NO_LAYER }).unwrap();
    let mut stray = Journal::new(Arc::clone(&store), identity(1));
    stray.append(7, &deltas_of(7)).unwrap();
    for after_lsn in [5, 6, 100] {
        assert_eq!(code(replay(&store, after_lsn)), IoErrorCode::Corrupt);
    }
    store.remove_segment(LAYER, 7).unwrap();
    let sealed = bytes_of(&store, 6);
    let frame = {
        let store = memory();
        journal_with(&store, &[6], 6);
        bytes_of(&store, 6)[64..].to_vec()
    };
    put_bytes(&store, 6, &[&sealed[..], &frame].concat());
    assert_eq!(code(replay(&store, 5)), IoErrorCode::Corrupt);
    put_bytes(&store, 6, &[&sealed[..], &[0; 100]].concat());
    assert!(replay(&store, 5).unwrap().seal.is_some());
}

#[test]
fn an_append_without_space_is_taken_back_and_may_be_tried_again() {
    let memory = memory();
    let store = Arc::new(FaultStore::new(Arc::clone(&memory)));
    let mut journal = Journal::new(Arc::clone(&store) as Arc<dyn Store>, identity(1));
    for lsn in 1..30 {
        if lsn % 3 == 0 {
            journal.rotate();
        }
        let length = journal.length_bytes();
        let segments = memory.list_segments(LAYER).unwrap();
        for (operation, tear) in [("append", false), ("append", true), ("create", false)] {
            let rule = FaultRule { tear, ..rule(operation, libc::ENOSPC) };
            store.set_plan(FaultPlan { seed: lsn, rules: vec![rule] });
            let needs_segment = lsn == 1 || lsn % 3 == 0;
            if operation == "append" || needs_segment {
                let error = journal.append(lsn, &deltas_of(lsn)).unwrap_err();
                assert_eq!(error.code, IoErrorCode::NoSpace, "{error}");
            }
            assert_eq!(journal.length_bytes(), length);
            assert_eq!(memory.list_segments(LAYER).unwrap(), segments);
            assert_frames(&replay(&memory, 0).unwrap().frames, 0, lsn - 1);
        }
        store.set_plan(FaultPlan::default());
        journal.append(lsn, &deltas_of(lsn)).unwrap();
    }
    assert_frames(&replay(&memory, 0).unwrap().frames, 0, 29);
    // The capacity of the store itself.
    let small: Arc<dyn Store> = Arc::new(MemoryStore::new(1000, false));
    let mut journal = Journal::new(Arc::clone(&small), identity(1));
    let full_at = (1..).find(|lsn| journal.append(*lsn, &deltas_of(*lsn)).is_err()).unwrap();
    assert_eq!(journal.append(full_at, &deltas_of(full_at)).unwrap_err().code, IoErrorCode::NoSpace);
    assert_frames(&replay(&small, 0).unwrap().frames, 0, full_at - 1);
}

#[test]
fn an_append_that_cannot_be_taken_back_breaks_the_journal() {
    for (taking_back, rotates) in [("truncate", false), ("segment-sync", false), ("remove", true)] {
        let memory = memory();
        let store = Arc::new(FaultStore::new(Arc::clone(&memory)));
        let mut journal = Journal::new(Arc::clone(&store) as Arc<dyn Store>, identity(1));
        journal.append(1, &deltas_of(1)).unwrap();
        if rotates {
            journal.rotate();
        }
        let append = FaultRule { tear: true, ..rule("append", libc::ENOSPC) };
        store.set_plan(FaultPlan { seed: 3, rules: vec![append, rule(taking_back, libc::EIO)] });
        assert_eq!(journal.append(2, &deltas_of(2)).unwrap_err().code, IoErrorCode::Broken, "{taking_back}");
        store.set_plan(FaultPlan::default());
        assert_eq!(journal.append(2, &deltas_of(2)).unwrap_err().code, IoErrorCode::Broken);
        assert_eq!(journal.remove_behind(1).unwrap_err().code, IoErrorCode::Broken);
        assert_eq!(journal.seal(SealMark { final_lsn: 1, successor: NO_LAYER }).unwrap_err().code, IoErrorCode::Broken);
        let mut journal = replay(&memory, 0).unwrap().journal;
        journal.append(2, &deltas_of(2)).unwrap();
        assert_frames(&replay(&memory, 0).unwrap().frames, 0, 2);
    }
}

#[test]
fn a_failed_sync_ends_the_journal_even_if_it_was_for_want_of_space() {
    for errno in [libc::EIO, libc::ENOSPC] {
        let store = Arc::new(FaultStore::new(memory()));
        let mut journal = Journal::new(Arc::clone(&store) as Arc<dyn Store>, identity(1));
        journal.append(1, &deltas_of(1)).unwrap();
        store.set_plan(FaultPlan { seed: 1, rules: vec![FaultRule { apply_count: 1, ..rule("segment-sync", errno) }] });
        let error = journal.append(2, &deltas_of(2)).unwrap_err();
        assert_eq!((error.code, error.errno), (IoErrorCode::Io, errno), "not NoSpace, which may be tried again");
        assert_eq!(journal.append(2, &deltas_of(2)).unwrap_err().code, IoErrorCode::Broken);
    }
}

#[test]
fn a_floor_that_found_no_space_leaves_everything_as_it_was() {
    let memory = memory();
    let store = Arc::new(FaultStore::new(Arc::clone(&memory)));
    let shared: Arc<dyn Store> = Arc::clone(&store) as Arc<dyn Store>;
    let mut journal = journal_with(&shared, &[1, 4], 5);
    store.set_plan(FaultPlan { seed: 1, rules: vec![FaultRule { tear: true, ..rule("append", libc::ENOSPC) }] });
    assert_eq!(journal.remove_behind(5).unwrap_err().code, IoErrorCode::NoSpace);
    store.set_plan(FaultPlan::default());
    assert_eq!(memory.list_segments(LAYER).unwrap(), [1, 4]);
    journal.append(6, &deltas_of(6)).unwrap();
    // The crash undid the removal of the half-written floor.
    put_bytes(&memory, 6, b"ATJ");
    let replayed = replay(&memory, 0).unwrap();
    assert_frames(&replayed.frames, 0, 6);
    let mut journal = replayed.journal;
    journal.append(7, &deltas_of(7)).unwrap();
    journal.remove_behind(7).unwrap();
    assert_eq!(memory.list_segments(LAYER).unwrap(), [8]);
}

/// After kill -9 the page cache still has a frame that was never synced. A replay hands it out, so from then on it must be durable:
/// otherwise a power cut loses it from under the frames that come after it.
#[test]
fn a_frame_that_a_replay_handed_out_survives_a_later_power_cut() {
    let memory = Arc::new(MemoryStore::new(1 << 30, true));
    let store = Arc::new(FaultStore::new(Arc::clone(&memory) as Arc<dyn Store>));
    let mut journal = Journal::new(Arc::clone(&store) as Arc<dyn Store>, identity(1));
    journal.append(1, &deltas_of(1)).unwrap();
    store.set_plan(FaultPlan { seed: 1, rules: vec![rule("segment-sync", libc::EIO)] });
    assert!(journal.append(2, &deltas_of(2)).is_err());
    let killed: Arc<dyn Store> = Arc::clone(&memory) as Arc<dyn Store>;
    let replayed = replay(&killed, 0).unwrap();
    assert_frames(&replayed.frames, 0, 2);
    let mut journal = replayed.journal;
    journal.append(3, &deltas_of(3)).unwrap();
    let lost = atoll_io::CrashOptions { keep_of_256: 0, tear: false, reorder: false };
    let image: Arc<dyn Store> = Arc::new(memory.crash_image(memory.sequence(), 1, lost));
    assert_frames(&replay(&image, 0).unwrap().frames, 0, 3);
}

#[test]
fn a_segment_of_absurd_length_is_not_read_into_memory() {
    let folder = TemporaryFolder::new();
    let store: Arc<dyn Store> = Arc::new(FileStore::open(folder.path(), true, 0).unwrap());
    journal_with(&store, &[1], 1);
    let path = folder.path().join("journal").join(format!("{LAYER}.0000000000000001.journal"));
    std::fs::OpenOptions::new().write(true).open(path).unwrap().set_len(1 << 40).unwrap();
    assert_eq!(code(replay(&store, 0)), IoErrorCode::Corrupt);
}

#[test]
fn a_segment_that_grew_ahead_is_as_long_as_before_after_each_frame_and_its_zeros_are_no_torn_tail() {
    let folder = TemporaryFolder::new();
    let store: Arc<dyn Store> = Arc::new(FileStore::open(folder.path(), true, 0).unwrap());
    let mut journal = journal_with(&store, &[1], 2);
    let length = bytes_of(&store, 1).len();
    assert!(length > 64 << 10, "the second frame made room");
    for lsn in 3..=40 {
        journal.append(lsn, &deltas_of(lsn)).unwrap();
    }
    assert_eq!(bytes_of(&store, 1).len(), length);
    assert!(journal.length_bytes() < 64 << 10, "a replay's work is counted, not the room");
    drop(journal);

    // Sectors of a frame that was never whole, in the middle of the zeros.
    let JournalReplay { frames, torn_tail_bytes, .. } = replay(&store, 0).unwrap();
    assert_frames(&frames, 0, 40);
    assert_eq!(torn_tail_bytes, 0);
    let mut bytes = bytes_of(&store, 1);
    assert_eq!(bytes.len(), length, "nothing was cut");
    bytes[length - 600..length - 100].fill(0xa5);
    put_bytes(&store, 1, &bytes);
    let JournalReplay { frames, torn_tail_bytes, mut journal, .. } = replay(&store, 0).unwrap();
    assert_frames(&frames, 0, 40);
    assert!(torn_tail_bytes > 0);
    journal.append(41, &deltas_of(41)).unwrap();
    journal.append(42, &deltas_of(42)).unwrap();
    assert_frames(&replay(&store, 0).unwrap().frames, 0, 42);
}
