//! What is special about the rados kind, over a real cluster; what every kind promises is in `store_contract.rs`.
mod common;

use atoll_io::{Delta, Extent, IoErrorCode, Journal, JournalIdentity, OpenMode, RadosOptions, RadosStore, Store};
use common::{LAYER, begin_read, begin_write, read, write};
use std::sync::Arc;

const MIB: u64 = 1 << 20;

/// Two connections to one pool, as two daemons have them; `None`: there is no Ceph on this machine.
fn two_stores() -> Option<(RadosStore, RadosStore)> {
    let options = common::ceph::options()?;
    let first = RadosStore::open(options.clone()).unwrap();
    let second = RadosStore::open(RadosOptions { create: false, ..options }).unwrap();
    Some((first, second))
}

#[test]
fn what_one_connection_wrote_another_one_knows_slot_by_slot() {
    let Some((first, second)) = two_stores() else { return };
    first.create_layer(LAYER).unwrap();
    let layer = first.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
    write(&*layer, 4 * MIB - 4096, &[1; 8192]).unwrap();
    write(&*layer, 100 * MIB + 5000, &[2; 10]).unwrap();
    write(&*layer, 40 * MIB, &vec![3; 4 << 20]).unwrap();
    layer.punch(41 * MIB, MIB).unwrap();
    layer.punch(4 * MIB, 4 * MIB).unwrap();

    let layer = second.open_layer(LAYER, OpenMode::ReadOnly).unwrap();
    assert_eq!(layer.allocated_bytes().unwrap(), 4096 + 3 * MIB + 4096);
    assert_eq!(layer.length_bytes().unwrap(), 100 * MIB + 5010);
    let mut extents = Vec::new();
    layer.extents(0, 101 * MIB, &mut extents).unwrap();
    let data: Vec<(u64, u64)> = extents
        .iter()
        .filter(|extent| extent.data)
        .map(|Extent { offset_bytes, length_bytes, .. }| (*offset_bytes, *length_bytes))
        .collect();
    assert_eq!(data, [(4 * MIB - 4096, 4096), (40 * MIB, MIB), (42 * MIB, 2 * MIB), (100 * MIB + 4096, 4096)]);
    assert!(read(&*layer, 4 * MIB - 4096, 8192) == [vec![1; 4096], vec![0; 4096]].concat());
    assert!(read(&*layer, 40 * MIB, 2 << 20) == [vec![3; 1 << 20], vec![0; 1 << 20]].concat());
}

#[test]
fn the_last_object_says_how_long_a_layer_is_also_when_nothing_is_left_of_it() {
    let Some((first, second)) = two_stores() else { return };
    first.create_layer(LAYER).unwrap();
    let layer = first.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
    for index in 0..40 {
        write(&*layer, index * 4 * MIB, &[7; 4096]).unwrap();
    }
    layer.punch(0, 1 << 40).unwrap();
    let layer = second.open_layer(LAYER, OpenMode::ReadOnly).unwrap();
    assert_eq!((layer.allocated_bytes().unwrap(), layer.length_bytes().unwrap()), (0, 39 * 4 * MIB + 4096));
    assert!(read(&*layer, 39 * 4 * MIB, 8192).iter().all(|byte| *byte == 0));
}

#[test]
fn a_layer_that_another_connection_removed_is_not_found_and_never_zeros() {
    let Some((first, second)) = two_stores() else { return };
    first.create_layer(LAYER).unwrap();
    write(&*first.open_layer(LAYER, OpenMode::ReadWrite).unwrap(), 0, &[7; 8192]).unwrap();
    let layer = second.open_layer(LAYER, OpenMode::ReadOnly).unwrap();
    assert!(read(&*layer, 0, 8192) == [7; 8192]);
    first.remove_layer(LAYER).unwrap();
    let error = layer.read(0, &mut [std::io::IoSliceMut::new(&mut [0; 8192])]).unwrap_err();
    assert_eq!(error.code, IoErrorCode::NotFound);
}

#[test]
fn a_journal_that_another_connection_writes_is_refused_to_the_first() {
    let Some((first, second)) = two_stores() else { return };
    let mine = first.create_segment(LAYER, 1).unwrap();
    mine.append(0, b"mine").unwrap();
    let theirs = second.open_segment(LAYER, 1).unwrap();
    assert_eq!(theirs.read_all().unwrap(), b"mine");
    mine.append(4, b", still").unwrap();
    theirs.append(11, b", theirs").unwrap();
    let error = mine.append(11, b", no more").unwrap_err();
    assert_eq!(error.code, IoErrorCode::Io);
    assert!(error.message.contains("another daemon writes this journal"), "{error}");
    assert!(mine.truncate(0).is_err());
    assert_eq!(theirs.read_all().unwrap(), b"mine, still, theirs");
}

#[test]
fn who_takes_the_lock_sees_what_the_one_before_has_done() {
    let Some((first, second)) = two_stores() else { return };
    let lock = first.lock("the first").unwrap();
    let error = second.lock("the second").err().unwrap();
    assert!(error.code == IoErrorCode::Locked && error.message.contains("the first"), "{error}");
    first.create_segment(LAYER, 1).unwrap();
    first.create_layer(LAYER).unwrap();
    assert_eq!(second.list_layers().unwrap().len(), 1);
    first.remove_layer(LAYER).unwrap();
    first.create_segment(LAYER, 2).unwrap();
    drop(lock);
    let _lock = second.lock("the second").unwrap();
    assert_eq!(second.list_segments(LAYER).unwrap(), [2]);
    assert!(second.list_layers().unwrap().is_empty());
}

#[test]
fn what_was_written_without_a_wait_another_connection_knows_slot_by_slot() {
    let Some((first, second)) = two_stores() else { return };
    first.create_layer(LAYER).unwrap();
    let layer = first.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
    assert!(begin_write(&*layer, 0, &[1; 4096]).is_none(), "its object has to go into the index first");
    write(&*layer, 0, &[1; 4096]).unwrap();
    let begun: Vec<_> = (1..200).map(|slot| begin_write(&*layer, slot * 8192, &[slot as u8; 4096]).unwrap()).collect();
    for told in begun {
        told.recv().unwrap().unwrap();
    }
    let other = second.open_layer(LAYER, OpenMode::ReadOnly).unwrap();
    assert_eq!((other.allocated_bytes().unwrap(), other.length_bytes().unwrap()), (200 * 4096, 199 * 8192 + 4096));
    assert!(read(&*other, 150 * 8192, 4096) == [150; 4096]);
}

#[test]
fn an_object_that_is_not_there_is_a_hole_for_reads_that_nobody_waits_for_unless_the_layer_is_gone() {
    let Some((first, second)) = two_stores() else { return };
    first.create_layer(LAYER).unwrap();
    let layer = first.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
    write(&*layer, 0, &[1; 4096]).unwrap();
    write(&*layer, 4 * MIB, &[2; 4096]).unwrap();
    layer.punch(0, 4 * MIB).unwrap();
    assert!(begin_read(&*layer, 0, 4096).unwrap().recv().unwrap().unwrap() == [0; 4096]);
    assert!(begin_read(&*layer, 4 * MIB + 2048, 4096).unwrap().recv().unwrap().unwrap() == [[2; 2048], [0; 2048]].concat());
    second.remove_layer(LAYER).unwrap();
    let error = begin_read(&*layer, 0, 4096).unwrap().recv().unwrap().unwrap_err();
    assert_eq!(error.code, IoErrorCode::NotFound);
}

#[test]
fn who_lost_the_lock_of_a_pool_cannot_prove_that_it_is_his() {
    let Some((first, second)) = two_stores() else { return };
    let lock = first.lock("the first").unwrap();
    first.prove_held().unwrap();
    drop(lock);
    assert_eq!(first.prove_held().unwrap_err().code, IoErrorCode::Unavailable);
    let _lock = second.lock("the second").unwrap();
    assert_eq!(first.prove_held().unwrap_err().code, IoErrorCode::Unavailable);
    second.prove_held().unwrap();
}

#[test]
fn a_segment_that_was_made_although_the_making_failed_is_made_anew_by_who_has_the_lock() {
    let Some((first, second)) = two_stores() else { return };
    let lock = first.lock("the first").unwrap();
    // As one of ours that timed out and came to pass: `first` does not list it.
    second.create_segment(LAYER, 7).unwrap().append(0, b"left").unwrap();
    let segment = first.create_segment(LAYER, 7).unwrap();
    assert!(segment.read_all().unwrap().is_empty());
    segment.append(0, b"new").unwrap();
    assert_eq!(first.list_segments(LAYER).unwrap(), [7]);
    drop(lock);
    first.create_segment(LAYER, 8).unwrap();
    assert_eq!(second.create_segment(LAYER, 8).err().unwrap().code, IoErrorCode::Exists, "whoever has no lock takes nothing away");
}

#[test]
fn what_an_older_handle_has_under_way_does_not_come_behind_a_claim() {
    let Some((store, _)) = two_stores() else { return };
    let old = store.create_segment(LAYER, 1).unwrap();
    old.append(0, b"old").unwrap();
    let new = store.open_segment(LAYER, 1).unwrap();
    assert_eq!(new.read_all().unwrap(), b"old");
    old.append(3, b", still").unwrap();
    new.claim().unwrap();
    assert_eq!(old.append(10, b", no more").unwrap_err().code, IoErrorCode::Io);
    assert!(old.truncate(0).is_err());
    assert_eq!(new.read_all().unwrap(), b"old, still");
    new.append(10, b", new").unwrap();
    assert_eq!(new.read_all().unwrap(), b"old, still, new");
}

#[test]
fn who_replays_a_journal_ends_the_writing_of_who_had_it_before_and_who_inspects_it_does_not() {
    let Some((store, _)) = two_stores() else { return };
    let store: Arc<dyn Store> = Arc::new(store);
    let identity = JournalIdentity { volume: [1; 16], layer: LAYER, epoch: 1 };
    let mut before = Journal::new(Arc::clone(&store), identity);
    let deltas = [Delta { start_slot: 0, slot_count: 1, owner: 1 }];
    before.append(1, &deltas).unwrap();
    assert_eq!(Journal::inspect(&*store, LAYER, None, 1, 0).unwrap().last_lsn, 1);
    before.append(2, &deltas).unwrap();
    let mut replay = Journal::replay(Arc::clone(&store), identity, 0).unwrap();
    assert_eq!(replay.frames.len(), 2);
    assert!(before.append(3, &deltas).is_err());
    replay.journal.append(3, &deltas).unwrap();
    assert_eq!(Journal::replay(store, identity, 0).unwrap().frames.len(), 3);
}
