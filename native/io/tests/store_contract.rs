//! What every kind of store promises, checked against each of them.
mod common;

use atoll_io::{Extent, FaultStore, FileStore, IoErrorCode, LayerId, LayerIo, MemoryStore, OpenMode, RadosStore, Store, StoreUsage};
use common::{LAYER, OTHER_LAYER, TemporaryFolder, begin_read, begin_write, read, write};
use std::any::Any;
use std::io::{IoSlice, IoSliceMut};
use std::os::unix::fs::PermissionsExt;
use std::sync::Arc;

/// A store and what must live as long.
type Opened = (Arc<dyn Store>, Box<dyn Any>);

fn file_store() -> Opened {
    let folder = TemporaryFolder::new();
    let store = FileStore::open(&folder.path().join("pool"), true, 0).unwrap();
    (Arc::new(store), Box::new(folder))
}

fn memory_store() -> Opened {
    (Arc::new(MemoryStore::new(1 << 40, false)), Box::new(()))
}

fn recording_store() -> Opened {
    (Arc::new(MemoryStore::new(1 << 40, true)), Box::new(()))
}

fn fault_store() -> Opened {
    (Arc::new(FaultStore::new(Arc::new(MemoryStore::new(1 << 40, false)))), Box::new(()))
}

/// `None`: there is no Ceph on this machine.
fn rados_store() -> Option<Opened> {
    let store = RadosStore::open(common::ceph::options()?).unwrap();
    Some((Arc::new(store), Box::new(())))
}

macro_rules! store_contract {
    ($($check:ident),* $(,)?) => {
        mod file { $(#[test] fn $check() { super::$check(super::file_store()); })* }
        mod memory { $(#[test] fn $check() { super::$check(super::memory_store()); })* }
        mod recording_memory { $(#[test] fn $check() { super::$check(super::recording_store()); })* }
        mod rados {
            $(#[test] fn $check() {
                if let Some(opened) = super::rados_store() {
                    super::$check(opened);
                }
            })*
        }
        mod fault_over_memory { $(#[test] fn $check() { super::$check(super::fault_store()); })* }
    };
}

store_contract!(
    a_layer_is_made_once_listed_opened_and_removed,
    a_missing_layer_is_not_found_and_named,
    removing_what_is_not_there_is_no_error,
    what_was_written_reads_back_and_the_rest_is_zeros,
    reads_past_the_end_are_zeros,
    what_is_read_at_once_is_what_a_read_gives_or_nothing,
    what_is_begun_ends_once_and_does_what_the_waiting_form_does,
    who_took_the_lock_and_has_it_can_prove_it,
    many_buffers_are_filled_and_written_in_order,
    a_read_only_layer_refuses_every_change,
    a_punched_range_reads_as_zeros_and_frees_whole_units,
    a_punch_past_the_end_changes_nothing,
    a_zeroed_range_reads_as_zeros_and_is_allocated,
    extents_cover_the_range_without_overlap,
    a_removed_layer_is_read_through_an_open_handle_as_it_was_or_not_at_all,
    ranges_outside_the_address_space_are_errors,
    segments_are_listed_in_order_by_layer,
    a_segment_holds_what_was_appended,
    removing_a_layer_removes_its_segments,
    records_are_replaced_whole,
    records_are_listed_by_prefix_and_removed,
    record_names_are_checked,
    the_lock_excludes_and_names_its_owner,
    usage_counts_what_layers_hold,
    calls_from_many_threads_do_not_disturb_each_other,
);

fn layer(store: &dyn Store) -> Arc<dyn LayerIo> {
    store.create_layer(LAYER).unwrap();
    store.open_layer(LAYER, OpenMode::ReadWrite).unwrap()
}

fn a_layer_is_made_once_listed_opened_and_removed((store, _guard): Opened) {
    assert!(store.list_layers().unwrap().is_empty());
    store.create_layer(LAYER).unwrap();
    assert_eq!(store.create_layer(LAYER).unwrap_err().code, IoErrorCode::Exists);
    store.create_layer(OTHER_LAYER).unwrap();
    let mut ids: Vec<LayerId> = store.list_layers().unwrap().iter().map(|entry| entry.id).collect();
    ids.sort();
    assert_eq!(ids, [LAYER, OTHER_LAYER]);
    let handle = store.open_layer(LAYER, OpenMode::ReadOnly).unwrap();
    assert_eq!(handle.length_bytes().unwrap(), 0);
    store.remove_layer(LAYER).unwrap();
    assert_eq!(store.list_layers().unwrap().iter().map(|entry| entry.id).collect::<Vec<_>>(), [OTHER_LAYER]);
    store.create_layer(LAYER).unwrap();
}

fn a_missing_layer_is_not_found_and_named((store, _guard): Opened) {
    let error = store.open_layer(LAYER, OpenMode::ReadWrite).err().unwrap();
    assert_eq!(error.code, IoErrorCode::NotFound);
    assert!(error.to_string().contains(&LAYER.to_string()), "{error}");
    let error = store.open_segment(LAYER, 5).err().unwrap();
    assert_eq!(error.code, IoErrorCode::NotFound);
    assert!(error.to_string().contains("0000000000000005"), "{error}");
}

fn removing_what_is_not_there_is_no_error((store, _guard): Opened) {
    store.remove_layer(LAYER).unwrap();
    store.remove_segment(LAYER, 1).unwrap();
}

fn what_was_written_reads_back_and_the_rest_is_zeros((store, _guard): Opened) {
    let layer = layer(&*store);
    write(&*layer, 5000, &[1; 9000]).unwrap();
    write(&*layer, 6000, &[2; 10]).unwrap();
    layer.sync().unwrap();
    layer.drop_cache().unwrap();
    let mut expected = vec![0; 20_000];
    expected[5000..14_000].fill(1);
    expected[6000..6010].fill(2);
    assert!(read(&*layer, 0, 20_000) == expected);
    assert_eq!(layer.length_bytes().unwrap(), 14_000);
    let second = store.open_layer(LAYER, OpenMode::ReadOnly).unwrap();
    assert!(read(&*second, 0, 20_000) == expected);
}

fn reads_past_the_end_are_zeros((store, _guard): Opened) {
    let layer = layer(&*store);
    assert!(read(&*layer, 0, 5000).iter().all(|byte| *byte == 0));
    write(&*layer, 0, &[1; 100]).unwrap();
    assert!(read(&*layer, 100, 5000).iter().all(|byte| *byte == 0));
    assert!(read(&*layer, (1 << 49) - 4096, 4096).iter().all(|byte| *byte == 0));
    assert_eq!(layer.length_bytes().unwrap(), 100);
}

fn what_is_begun_ends_once_and_does_what_the_waiting_form_does((store, _guard): Opened) {
    let layer = layer(&*store);
    write(&*layer, 0, &[0; 4096]).unwrap();
    write(&*layer, 64 << 20, &[1; 4096]).unwrap();
    let pieces: Vec<(u64, Vec<u8>)> = (0..60u64)
        .map(|index| (index * 5000, vec![index as u8 + 1; 5000]))
        // Another object of a cluster, the border between two, the same bytes twice.
        .chain([((64 << 20) + 100, vec![0xa1; 100_000]), ((4 << 20) - 10, vec![0xa2; 20]), (0, vec![1; 5000])])
        .collect();
    let begun: Vec<_> = pieces.iter().map(|(offset_bytes, data)| begin_write(&*layer, *offset_bytes, data)).collect();
    for (told, (offset_bytes, data)) in begun.into_iter().zip(&pieces) {
        match told {
            Some(told) => {
                assert_eq!(told.recv().unwrap().unwrap(), [], "at {offset_bytes}");
                assert!(told.recv().is_err(), "it ends once");
            }
            None => write(&*layer, *offset_bytes, data).unwrap(),
        }
    }
    for (offset_bytes, data) in &pieces {
        assert!(read(&*layer, *offset_bytes, data.len()) == *data, "at {offset_bytes}");
    }
    let ranges = [(0, 4096), (0, 300_000), (299_000, 5000), (64 << 20, 200_000), ((4 << 20) - 100, 300), (1 << 35, 4096), (100, 0)];
    let begun: Vec<_> = ranges.iter().map(|(offset_bytes, length)| begin_read(&*layer, *offset_bytes, *length)).collect();
    for (told, (offset_bytes, length)) in begun.into_iter().zip(ranges) {
        let Some(told) = told else { continue };
        assert!(told.recv().unwrap().unwrap() == read(&*layer, offset_bytes, length), "{length} at {offset_bytes}");
        assert!(told.recv().is_err(), "it ends once");
    }
    let sealed = store.open_layer(LAYER, OpenMode::ReadOnly).unwrap();
    if let Some(told) = begin_write(&*sealed, 0, &[9; 4096]) {
        assert_eq!(told.recv().unwrap().unwrap_err().code, IoErrorCode::ReadOnly);
    }
    store.remove_layer(LAYER).unwrap();
    if let Some(told) = begin_read(&*layer, 0, 5000) {
        match told.recv().unwrap() {
            Ok(bytes) => assert!(bytes == [1; 5000], "what was there, never zeros"),
            Err(error) => assert_eq!(error.code, IoErrorCode::NotFound),
        }
    }
}

fn who_took_the_lock_and_has_it_can_prove_it((store, _guard): Opened) {
    store.prove_held().unwrap();
    let lock = store.lock("the first").unwrap();
    for _ in 0..3 {
        store.prove_held().unwrap();
    }
    drop(lock);
    let _lock = store.lock("the second").unwrap();
    store.prove_held().unwrap();
}

fn what_is_read_at_once_is_what_a_read_gives_or_nothing((store, _guard): Opened) {
    let layer = layer(&*store);
    write(&*layer, 8192, &[7; 8192]).unwrap();
    for drop_cache in [false, true] {
        if drop_cache {
            layer.sync().unwrap();
            layer.drop_cache().unwrap();
        }
        for (offset_bytes, length) in [(8192, 8192), (9000, 10), (4096, 8192), (0, 4096), (12_288, 8192), (1 << 30, 4096)] {
            let mut bytes = vec![0xee; length];
            if layer.read_now(offset_bytes, &mut bytes).unwrap() {
                assert_eq!(bytes, read(&*layer, offset_bytes, length), "{length} bytes at {offset_bytes}");
            }
        }
    }
    if store.capabilities().waits_for_network {
        return;
    }
    // A read has brought it: now it is at hand, unless the file system cannot tell, or memory was so short that it is gone again.
    let mut bytes = [0; 4096];
    let is_at_hand = (0..1000).any(|_| {
        read(&*layer, 8192, 8192);
        layer.read_now(8192, &mut bytes).unwrap()
    });
    assert!(is_at_hand);
    assert_eq!(bytes, [7; 4096]);
}

fn many_buffers_are_filled_and_written_in_order((store, _guard): Opened) {
    let layer = layer(&*store);
    let pieces: Vec<Vec<u8>> = (0..150u8).map(|index| vec![index; usize::from(index) * 7]).collect();
    let slices: Vec<IoSlice<'_>> = pieces.iter().map(|piece| IoSlice::new(piece)).collect();
    layer.write(1234, &slices).unwrap();
    let flat = pieces.concat();
    assert!(read(&*layer, 1234, flat.len()) == flat);
    let mut back: Vec<Vec<u8>> = vec![vec![0xee; 501]; 200];
    let mut slices: Vec<IoSliceMut<'_>> = back.iter_mut().map(|piece| IoSliceMut::new(piece)).collect();
    layer.read(1234, &mut slices).unwrap();
    let back = back.concat();
    assert!(back[..flat.len()] == flat);
    assert!(back[flat.len()..].iter().all(|byte| *byte == 0));
    layer.read(0, &mut []).unwrap();
    layer.write(0, &[]).unwrap();
    layer.write(1 << 30, &[IoSlice::new(&[])]).unwrap();
    assert_eq!(layer.length_bytes().unwrap(), 1234 + flat.len() as u64, "a write of nothing leaves nothing");
}

fn a_read_only_layer_refuses_every_change((store, _guard): Opened) {
    write(&*layer(&*store), 0, &[1; 4096]).unwrap();
    let layer = store.open_layer(LAYER, OpenMode::ReadOnly).unwrap();
    let refused = [write(&*layer, 0, &[2]), layer.punch(0, 4096), layer.zero_allocated(0, 4096)];
    for answer in refused {
        let error = answer.unwrap_err();
        assert_eq!(error.code, IoErrorCode::ReadOnly);
        assert!(error.object.contains(&LAYER.to_string()));
    }
    assert!(read(&*layer, 0, 4096) == [1; 4096]);
    layer.sync().unwrap();
}

fn a_punched_range_reads_as_zeros_and_frees_whole_units((store, _guard): Opened) {
    let layer = layer(&*store);
    let unit = store.capabilities().punch_unit_bytes;
    write(&*layer, 0, &vec![1; 1 << 20]).unwrap();
    layer.sync().unwrap();
    let before = layer.allocated_bytes().unwrap();
    assert!(before >= 1 << 20);
    layer.punch(100_001, 300_000).unwrap();
    let mut expected = vec![1; 1 << 20];
    expected[100_001..400_001].fill(0);
    assert!(read(&*layer, 0, 1 << 20) == expected);
    layer.sync().unwrap();
    if unit > 0 {
        let whole_units = (400_001 / u64::from(unit) - 100_001_u64.div_ceil(u64::from(unit))) * u64::from(unit);
        assert!(layer.allocated_bytes().unwrap() <= before - whole_units);
    }
    // A range inside one unit.
    layer.punch(500_000, 10).unwrap();
    expected[500_000..500_010].fill(0);
    assert!(read(&*layer, 0, 1 << 20) == expected);
    assert_eq!(layer.length_bytes().unwrap(), 1 << 20);
}

fn a_punch_past_the_end_changes_nothing((store, _guard): Opened) {
    let layer = layer(&*store);
    layer.punch(0, 1 << 49).unwrap();
    write(&*layer, 0, &[1; 5000]).unwrap();
    layer.punch(8192, 1 << 49).unwrap();
    layer.punch(0, 0).unwrap();
    assert_eq!(layer.length_bytes().unwrap(), 5000);
    assert!(read(&*layer, 0, 5000) == [1; 5000]);
    layer.punch(4096, 1 << 49).unwrap();
    assert!(read(&*layer, 0, 5000) == [vec![1; 4096], vec![0; 904]].concat());
    assert_eq!(layer.length_bytes().unwrap(), 5000, "the length is that of what was ever written");
    assert!(layer.allocated_bytes().unwrap() <= 4096);
}

fn a_zeroed_range_reads_as_zeros_and_is_allocated((store, _guard): Opened) {
    let layer = layer(&*store);
    write(&*layer, 0, &[1; 100_000]).unwrap();
    layer.zero_allocated(50_000, 200_000).unwrap();
    layer.zero_allocated(10, 20).unwrap();
    layer.zero_allocated(1 << 30, 0).unwrap();
    let mut expected = vec![0; 250_000];
    expected[..50_000].fill(1);
    expected[10..30].fill(0);
    assert!(read(&*layer, 0, 250_000) == expected);
    assert_eq!(layer.length_bytes().unwrap(), 250_000);
    layer.sync().unwrap();
    assert!(layer.allocated_bytes().unwrap() >= 250_000);
}

fn extents_cover_the_range_without_overlap((store, _guard): Opened) {
    let layer = layer(&*store);
    let mib = 1 << 20;
    write(&*layer, mib, &vec![1; mib as usize]).unwrap();
    write(&*layer, 5 * mib, &vec![1; mib as usize]).unwrap();
    layer.sync().unwrap();
    let sentinel = Extent { offset_bytes: 0, length_bytes: 7, data: true };
    let mut extents = vec![sentinel];
    layer.extents(mib + 1, 10 * mib, &mut extents).unwrap();
    assert_eq!(extents.remove(0), sentinel, "what was in the list before stays");
    let mut offset = mib + 1;
    for (index, extent) in extents.iter().enumerate() {
        assert_eq!(extent.offset_bytes, offset);
        assert!(extent.length_bytes > 0);
        assert!(index == 0 || extents[index - 1].data != extent.data, "neighbours of one kind are merged");
        offset += extent.length_bytes;
    }
    assert_eq!(offset, 11 * mib + 1);
    // Data is never called a hole.
    let is_data = |at: u64| {
        let holder = extents.iter().find(|extent| at >= extent.offset_bytes && at < extent.offset_bytes + extent.length_bytes);
        holder.unwrap().data
    };
    assert!(is_data(mib + 1) && is_data(2 * mib - 1) && is_data(5 * mib) && is_data(6 * mib - 1));
    if store.capabilities().punch_unit_bytes > 0 {
        assert!(!is_data(3 * mib) && !is_data(10 * mib));
        layer.punch(0, 16 * mib).unwrap();
        extents.clear();
        layer.extents(0, 16 * mib, &mut extents).unwrap();
        assert_eq!(extents, [Extent { offset_bytes: 0, length_bytes: 16 * mib, data: false }]);
    }
    extents.clear();
    layer.extents(5, 0, &mut extents).unwrap();
    assert!(extents.is_empty());
}

fn a_removed_layer_is_read_through_an_open_handle_as_it_was_or_not_at_all((store, _guard): Opened) {
    let layer = layer(&*store);
    write(&*layer, 0, &[1; 4096]).unwrap();
    store.remove_layer(LAYER).unwrap();
    assert!(store.list_layers().unwrap().is_empty());
    let mut bytes = [0; 4096];
    match layer.read(0, &mut [IoSliceMut::new(&mut bytes)]) {
        Ok(()) => {
            assert!(bytes == [1; 4096]);
            write(&*layer, 4096, &[2; 4096]).unwrap();
            assert!(read(&*layer, 4096, 4096) == [2; 4096]);
            layer.sync().unwrap();
        }
        // Where an object is gone with its name.
        Err(error) => {
            assert_eq!(error.code, IoErrorCode::NotFound);
            assert_eq!(layer.read_now(1 << 30, &mut bytes).map_err(|error| error.code), Ok(false), "nor is a hole at hand");
            for answer in [layer.read(1 << 30, &mut [IoSliceMut::new(&mut bytes)]), write(&*layer, 0, &[2])] {
                assert_eq!(answer.unwrap_err().code, IoErrorCode::NotFound);
            }
        }
    }
}

fn ranges_outside_the_address_space_are_errors((store, _guard): Opened) {
    let layer = layer(&*store);
    let mut byte = [0];
    for offset in [u64::MAX, i64::MAX as u64 + 1] {
        assert!(write(&*layer, offset, &[1]).is_err());
        assert!(layer.read(offset, &mut [IoSliceMut::new(&mut byte)]).is_err());
        assert!(layer.zero_allocated(offset, 1).is_err());
    }
    assert!(layer.punch(u64::MAX, 2).is_err());
    assert_eq!(layer.allocated_bytes().unwrap(), 0);
}

fn segments_are_listed_in_order_by_layer((store, _guard): Opened) {
    store.create_layer(LAYER).unwrap();
    store.create_layer(OTHER_LAYER).unwrap();
    for base_lsn in [300, 2, u64::MAX, 10] {
        store.create_segment(LAYER, base_lsn, 1).unwrap();
    }
    store.create_segment(OTHER_LAYER, 5, 1).unwrap();
    assert_eq!(store.create_segment(LAYER, 10, 1).err().unwrap().code, IoErrorCode::Exists);
    assert_eq!(store.list_segments(LAYER).unwrap(), [2, 10, 300, u64::MAX]);
    assert_eq!(store.list_segments(OTHER_LAYER).unwrap(), [5]);
    store.remove_segment(LAYER, 10).unwrap();
    assert_eq!(store.list_segments(LAYER).unwrap(), [2, 300, u64::MAX]);
    store.remove_segment(OTHER_LAYER, 5).unwrap();
    assert!(store.list_segments(OTHER_LAYER).unwrap().is_empty());
    assert!(store.list_segments(LayerId([9; 16])).unwrap().is_empty());
}

fn a_segment_holds_what_was_appended((store, _guard): Opened) {
    store.create_layer(LAYER).unwrap();
    let segment = store.create_segment(LAYER, 1, 1).unwrap();
    assert!(segment.read_all().unwrap().is_empty());
    segment.append(0, b"hello ").unwrap();
    segment.append(6, b"").unwrap();
    segment.append(6, b"world").unwrap();
    segment.sync().unwrap();
    assert_eq!(segment.read_all().unwrap(), b"hello world");
    segment.truncate(7).unwrap();
    segment.truncate(100).unwrap();
    assert_eq!(segment.length_bytes().unwrap(), 7, "a cut never makes it longer");
    segment.append(7, b"ide").unwrap();
    let second = store.open_segment(LAYER, 1).unwrap();
    assert_eq!(second.read_all().unwrap(), b"hello wide");
    second.claim(1).unwrap();
    second.append(10, b"!").unwrap();
    second.sync().unwrap();
    assert_eq!(segment.length_bytes().unwrap(), 11);
    second.append(1, b"i").unwrap();
    assert_eq!(segment.read_all().unwrap(), b"hillo wide!", "inside it changes bytes and not the length");
}

fn removing_a_layer_removes_its_segments((store, _guard): Opened) {
    store.create_layer(LAYER).unwrap();
    store.create_layer(OTHER_LAYER).unwrap();
    for base_lsn in 1..5 {
        store.create_segment(LAYER, base_lsn, 1).unwrap();
    }
    store.create_segment(OTHER_LAYER, 1, 1).unwrap();
    store.remove_layer(LAYER).unwrap();
    assert!(store.list_segments(LAYER).unwrap().is_empty());
    assert_eq!(store.list_segments(OTHER_LAYER).unwrap(), [1]);
    assert_eq!(store.open_segment(LAYER, 1).err().unwrap().code, IoErrorCode::NotFound);
}

fn records_are_replaced_whole((store, _guard): Opened) {
    assert_eq!(store.read_record("owner").unwrap(), None);
    store.write_record("owner", b"a longer first text").unwrap();
    store.write_record("owner", b"second").unwrap();
    store.write_record("export.1", b"").unwrap();
    assert_eq!(store.read_record("owner").unwrap().as_deref(), Some(&b"second"[..]));
    assert_eq!(store.read_record("export.1").unwrap().as_deref(), Some(&b""[..]));
}

fn records_are_listed_by_prefix_and_removed((store, _guard): Opened) {
    for name in ["export.2", "owner", "export.10", "exp"] {
        store.write_record(name, b"x").unwrap();
    }
    assert_eq!(store.list_records("export.").unwrap(), ["export.10", "export.2"]);
    assert_eq!(store.list_records("").unwrap(), ["exp", "export.10", "export.2", "owner"]);
    store.remove_record("export.2").unwrap();
    store.remove_record("export.2").unwrap();
    assert_eq!(store.list_records("export.").unwrap(), ["export.10"]);
    assert_eq!(store.read_record("export.2").unwrap(), None);
    assert!(store.remove_record("../owner").is_err());
    assert_eq!(store.list_records("none").unwrap(), [""; 0]);
}

fn record_names_are_checked((store, _guard): Opened) {
    for name in ["", ".", "..", "../owner", "Owner", "a b", &"a".repeat(65)] {
        assert!(store.write_record(name, b"x").is_err(), "{name}");
        assert!(store.read_record(name).is_err(), "{name}");
    }
}

fn the_lock_excludes_and_names_its_owner((store, _guard): Opened) {
    let lock = store.lock("pid 17 of catalog c").unwrap();
    let error = store.lock("pid 18").err().unwrap();
    assert_eq!(error.code, IoErrorCode::Locked);
    assert!(error.message.contains("pid 17 of catalog c"), "{error}");
    drop(lock);
    let _lock = store.lock("pid 18").unwrap();
    assert!(store.lock("pid 19").err().unwrap().message.contains("pid 18"));
}

fn usage_counts_what_layers_hold((store, _guard): Opened) {
    let StoreUsage { total_bytes, free_bytes, stored_bytes, reserve_bytes } = store.usage().unwrap();
    assert_eq!(reserve_bytes, 0);
    assert!(total_bytes > 0 || store.capabilities().waits_for_network, "only a cluster may not know");
    assert!(free_bytes <= total_bytes);
    assert_eq!(stored_bytes, 0);
    let layer = layer(&*store);
    write(&*layer, 1 << 30, &vec![1; 1 << 20]).unwrap();
    layer.sync().unwrap();
    let stored_bytes = store.usage().unwrap().stored_bytes;
    assert!((1 << 20..2 << 20).contains(&stored_bytes), "sparse: {stored_bytes}");
    let entries = store.list_layers().unwrap();
    assert_eq!(entries[0].allocated_bytes, stored_bytes);
    assert_eq!(entries[0].length_bytes, (1 << 30) + (1 << 20));
    assert_eq!(store.release_reserve().map_err(|error| error.code), Ok(()));
    assert_eq!(store.restore_reserve().unwrap(), 0, "this store keeps no reserve");
    assert_eq!(store.set_reserve(0).unwrap(), 0);
}

fn calls_from_many_threads_do_not_disturb_each_other((store, _guard): Opened) {
    let layer = layer(&*store);
    let store = &*store;
    std::thread::scope(|scope| {
        for thread in 0..4u8 {
            let layer = Arc::clone(&layer);
            scope.spawn(move || {
                let segment = store.create_segment(LAYER, u64::from(thread) + 1, 1).unwrap();
                for round in 0..100u64 {
                    let offset = (round * 4 + u64::from(thread)) * 5000;
                    write(&*layer, offset, &[thread + 1; 5000]).unwrap();
                    assert!(read(&*layer, offset, 5000) == [thread + 1; 5000]);
                    segment.append(round, &[thread]).unwrap();
                }
                layer.sync().unwrap();
            });
        }
    });
    for index in 0..400u64 {
        assert!(read(&*layer, index * 5000, 5000) == [(index % 4) as u8 + 1; 5000]);
    }
    assert_eq!(store.list_segments(LAYER).unwrap(), [1, 2, 3, 4]);
}

#[test]
fn a_memory_store_is_full_at_its_capacity_and_free_again_after_a_punch() {
    let store = MemoryStore::new(10 * 4096, false);
    store.create_layer(LAYER).unwrap();
    let layer = store.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
    write(&*layer, 0, &[1; 8 * 4096]).unwrap();
    let error = write(&*layer, 1 << 20, &[1; 3 * 4096]).unwrap_err();
    assert_eq!((error.code, error.errno, error.offset_bytes), (IoErrorCode::NoSpace, libc::ENOSPC, 1 << 20));
    assert_eq!(layer.zero_allocated(1 << 20, 3 * 4096).unwrap_err().code, IoErrorCode::NoSpace);
    write(&*layer, 0, &[2; 8 * 4096]).unwrap();
    assert_eq!(store.usage().unwrap().free_bytes, 2 * 4096);
    let segment = store.create_segment(LAYER, 1, 1).unwrap();
    assert_eq!(segment.append(0, &[0; 2 * 4096 + 1]).unwrap_err().code, IoErrorCode::NoSpace);
    segment.append(0, &[0; 2 * 4096]).unwrap();
    assert_eq!(store.write_record("a", b"b").unwrap_err().code, IoErrorCode::NoSpace);
    layer.punch(0, 4096).unwrap();
    store.write_record("a", b"b").unwrap();
    segment.truncate(0).unwrap();
    write(&*layer, 1 << 20, &[1; 2 * 4096]).unwrap();
    store.remove_layer(LAYER).unwrap();
    assert!(store.usage().unwrap().free_bytes < 2 * 4096, "an open handle keeps the space of a removed layer, as with files");
    drop((layer, segment));
    assert_eq!(store.usage().unwrap().free_bytes, 10 * 4096 - 1);
}

#[test]
fn a_file_store_finds_again_what_it_held_and_ignores_other_files() {
    let folder = TemporaryFolder::new();
    let root = folder.path().join("a/b");
    {
        let store = FileStore::open(&root, true, 0).unwrap();
        write(&*layer(&store), 0, b"text").unwrap();
        store.create_segment(LAYER, 0x1f, 1).unwrap().sync().unwrap();
        store.write_record("owner", b"me").unwrap();
    }
    let segment_name = format!("{LAYER}.000000000000001f.journal");
    assert!(root.join("journal").join(&segment_name).exists());
    let layer_path = root.join("layers").join(format!("{LAYER}.layer"));
    assert_eq!(std::fs::metadata(&layer_path).unwrap().permissions().mode() & 0o777, 0o600);
    for stray in ["layers/lost+found.layer", "layers/README", "journal/x.journal", "records/~owner"] {
        std::fs::write(root.join(stray), b"?").unwrap();
    }
    std::fs::write(root.join("journal").join(segment_name.to_uppercase()), b"?").unwrap();
    let store = FileStore::open(&root, false, 0).unwrap();
    assert_eq!(store.list_layers().unwrap().len(), 1);
    assert_eq!(store.list_segments(LAYER).unwrap(), [0x1f]);
    assert_eq!(store.read_record("owner").unwrap().unwrap(), b"me");
    assert_eq!(read(&*store.open_layer(LAYER, OpenMode::ReadOnly).unwrap(), 0, 5), b"text\0");
    store.remove_layer(LAYER).unwrap();
    assert!(!layer_path.exists() && !root.join("journal").join(&segment_name).exists());
    assert!(root.join("layers/README").exists());
}

#[test]
fn a_folder_that_is_missing_is_an_error_and_not_an_empty_store() {
    let folder = TemporaryFolder::new();
    let root = folder.path().join("pool");
    let error = FileStore::open(&root, false, 0).err().unwrap();
    assert_eq!(error.code, IoErrorCode::NotFound);
    assert!(error.object.contains("pool"), "{error}");
    std::fs::create_dir(&root).unwrap();
    assert_eq!(FileStore::open(&root, false, 0).err().unwrap().code, IoErrorCode::NotFound, "as under a mount that is not there");
}

#[test]
fn a_second_opener_sees_the_first_ones_text_and_after_it_the_first_ones_segments() {
    let folder = TemporaryFolder::new();
    let first = FileStore::open(folder.path(), true, 0).unwrap();
    let second = FileStore::open(folder.path(), false, 0).unwrap();
    let lock = first.lock("pid 4711").unwrap();
    let error = second.lock("pid 4712").err().unwrap();
    assert_eq!(error.code, IoErrorCode::Locked);
    assert!(error.message.contains("pid 4711"), "{error}");
    first.create_segment(LAYER, 1, 1).unwrap();
    drop(lock);
    let _lock = second.lock("pid 4712").unwrap();
    assert_eq!(second.list_segments(LAYER).unwrap(), [1], "the index is read again when the lock is taken");
    assert_eq!(std::fs::read_to_string(folder.path().join("lock")).unwrap(), "pid 4712");
}

#[test]
fn the_reserve_is_taken_with_the_lock_and_given_up_and_restored_on_demand() {
    let folder = TemporaryFolder::new();
    let store = FileStore::open(folder.path(), true, 1 << 20).unwrap();
    let reserve = folder.path().join("reserve");
    assert!(!reserve.exists());
    let _lock = store.lock("me").unwrap();
    let allocated = || std::os::unix::fs::MetadataExt::blocks(&std::fs::metadata(&reserve).unwrap()) * 512;
    assert!(allocated() >= 1 << 20);
    store.release_reserve().unwrap();
    store.release_reserve().unwrap();
    assert!(!reserve.exists());
    assert_eq!(store.restore_reserve().unwrap(), 1 << 20);
    assert_eq!(store.restore_reserve().unwrap(), 1 << 20);
    assert!(allocated() >= 1 << 20);
    assert_eq!(store.set_reserve(3 << 20).unwrap(), 3 << 20);
    assert!(allocated() >= 3 << 20);
    assert_eq!(store.usage().unwrap().reserve_bytes, 3 << 20);
    let free = store.usage().unwrap().free_bytes;
    assert_eq!(store.set_reserve(free.saturating_mul(4)).unwrap_err().code, IoErrorCode::NoSpace);
    assert!(allocated() >= 3 << 20, "what was kept before stays");
    assert_eq!(store.restore_reserve().unwrap(), 3 << 20);
    assert_eq!(store.set_reserve(0).unwrap(), 0);
    assert!(!reserve.exists());
    let greedy = FileStore::open(folder.path(), false, free.saturating_mul(4)).unwrap();
    assert_eq!(greedy.restore_reserve().unwrap(), 0, "a reserve that does not fit is not taken at all");
    assert_eq!(allocated(), 0);
}

#[test]
fn a_failed_write_of_a_record_leaves_the_old_one() {
    let folder = TemporaryFolder::new();
    let store = FileStore::open(folder.path(), true, 0).unwrap();
    store.write_record("owner", b"old").unwrap();
    // The temporary file's name is taken by a folder, so that the write fails.
    let blocked = folder.path().join("records/~owner");
    std::fs::create_dir(&blocked).unwrap();
    assert!(store.write_record("owner", b"new").is_err());
    assert_eq!(store.read_record("owner").unwrap().unwrap(), b"old");
    std::fs::remove_dir(&blocked).unwrap();
    store.write_record("owner", b"new").unwrap();
    assert_eq!(store.read_record("owner").unwrap().unwrap(), b"new");
}

#[test]
fn where_the_file_system_has_no_zero_range_zeros_are_written() {
    // tmpfs punches, but does not zero ranges.
    let folder = std::path::Path::new("/dev/shm").join(format!("atoll-io-test-{}", std::process::id()));
    let Ok(store) = FileStore::open(&folder, true, 0) else { return };
    let layer = layer(&store);
    write(&*layer, 0, &[1; 100_000]).unwrap();
    layer.zero_allocated(10, 3_000_000).unwrap();
    assert!(layer.allocated_bytes().unwrap() >= 3_000_000);
    assert!(read(&*layer, 10, 3_000_001).iter().all(|byte| *byte == 0));
    assert_eq!(read(&*layer, 0, 10), [1; 10]);
    drop((layer, store));
    std::fs::remove_dir_all(&folder).unwrap();
}
