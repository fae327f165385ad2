//! What the crash recorder may and may not show after a power cut.
mod common;

use atoll_io::{CrashOptions, FaultPlan, FaultRule, FaultStore, LayerId, MemoryStore, OpenMode, Store};
use common::{LAYER, OTHER_LAYER, read, write};
use proptest::prelude::*;
use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

const ALL: CrashOptions = CrashOptions { keep_of_256: 255, tear: false, reorder: false };
const NONE: CrashOptions = CrashOptions { keep_of_256: 0, tear: false, reorder: false };
const ANY: CrashOptions = CrashOptions { keep_of_256: 128, tear: true, reorder: true };

fn recording_with_layer() -> MemoryStore {
    let store = MemoryStore::new(1 << 30, true);
    store.create_layer(LAYER).unwrap();
    store
}

fn content(store: &MemoryStore, layer: LayerId, length: usize) -> Vec<u8> {
    read(&*store.open_layer(layer, OpenMode::ReadOnly).unwrap(), 0, length)
}

fn segment(store: &MemoryStore, base_lsn: u64) -> Option<Vec<u8>> {
    store.open_segment(LAYER, base_lsn).ok().map(|segment| segment.read_all().unwrap())
}

#[test]
fn an_unsynced_write_is_kept_lost_or_torn_at_sectors_and_a_synced_one_is_kept() {
    let store = recording_with_layer();
    let layer = store.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
    write(&*layer, 0, &[1; 8192]).unwrap();
    layer.sync().unwrap();
    write(&*layer, 100, &[2; 3000]).unwrap();
    let end = store.sequence();
    let mut seen = HashSet::new();
    for seed in 0..300 {
        let bytes = content(&store.crash_image(end, seed, ANY), LAYER, 8192);
        assert!(bytes[..100].iter().chain(&bytes[3100..]).all(|byte| *byte == 1));
        for start in (0..3100usize).step_by(512) {
            let sector = &bytes[start.max(100)..(start + 512).min(3100)];
            assert!(sector.iter().all(|byte| *byte == sector[0]), "a sector is old or new");
        }
        seen.insert(bytes);
    }
    assert!(seen.len() > 20, "{} different images", seen.len());
    assert!(seen.contains(&vec![1; 8192]), "one with the write lost");
    assert!(content(&store.crash_image(end, 1, NONE), LAYER, 8192) == vec![1; 8192]);
    assert!(content(&store.crash_image(end, 1, ALL), LAYER, 8192) == content(&store, LAYER, 8192));
}

#[test]
fn every_subset_of_unsynced_writes_can_survive() {
    let store = recording_with_layer();
    let layer = store.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
    for index in 0..3u8 {
        write(&*layer, u64::from(index) * 4096, &[index + 1; 4096]).unwrap();
    }
    let options = CrashOptions { tear: false, ..ANY };
    let images = (0..200).map(|seed| content(&store.crash_image(store.sequence(), seed, options), LAYER, 3 * 4096));
    let seen: HashSet<[u8; 3]> = images.map(|bytes| [bytes[0], bytes[4096], bytes[8192]]).collect();
    assert_eq!(seen.len(), 8);
}

#[test]
fn only_reordering_lets_an_older_write_win_over_a_newer_one() {
    let store = recording_with_layer();
    let layer = store.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
    write(&*layer, 0, &[1; 4096]).unwrap();
    layer.punch(0, 4096).unwrap();
    write(&*layer, 0, &[2; 4096]).unwrap();
    let values = |options| -> HashSet<u8> {
        (0..200).map(|seed| content(&store.crash_image(store.sequence(), seed, options), LAYER, 1)[0]).collect()
    };
    assert_eq!(values(ALL), HashSet::from([2]));
    assert_eq!(values(CrashOptions { reorder: true, ..ALL }), HashSet::from([0, 1, 2]));
}

#[test]
fn an_image_is_drawn_alike_from_the_same_seed_in_whatever_order_one_asks() {
    let store = recording_with_layer();
    let layer = store.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
    for round in 0..40u8 {
        write(&*layer, u64::from(round % 7) * 1000, &[round; 3000]).unwrap();
        if round % 5 == 4 {
            layer.sync().unwrap();
        }
    }
    let image = |sequence, seed| content(&store.crash_image(sequence, seed, ANY), LAYER, 10_000);
    let end = store.sequence();
    let forward: Vec<_> = (0..=end).filter(|sequence| *sequence > 0).map(|sequence| image(sequence, 5)).collect();
    for sequence in (1..=end).rev() {
        assert!(image(sequence, 5) == forward[sequence as usize - 1]);
    }
    store.forget_before(end / 2);
    for sequence in end / 2..=end {
        assert!(image(sequence, 5) == forward[sequence as usize - 1]);
    }
}

#[test]
#[should_panic(expected = "was forgotten")]
fn an_image_from_before_what_is_remembered_is_refused() {
    let store = recording_with_layer();
    store.create_layer(OTHER_LAYER).unwrap();
    store.forget_before(2);
    store.crash_image(1, 0, ALL);
}

#[test]
fn layers_and_records_are_there_or_gone_at_once() {
    let store = recording_with_layer();
    store.write_record("owner", b"first").unwrap();
    store.create_layer(OTHER_LAYER).unwrap();
    store.write_record("owner", b"second").unwrap();
    store.remove_layer(LAYER).unwrap();
    let seen: Vec<_> = (0..=store.sequence())
        .map(|sequence| {
            let image = store.crash_image(sequence, 1, NONE);
            (image.layer_ids(), image.read_record("owner").unwrap())
        })
        .collect();
    let (first, second) = (Some(b"first".to_vec()), Some(b"second".to_vec()));
    let expected = [
        (vec![], None),
        (vec![LAYER], None),
        (vec![LAYER], first.clone()),
        (vec![LAYER, OTHER_LAYER], first),
        (vec![LAYER, OTHER_LAYER], second.clone()),
        (vec![OTHER_LAYER], second),
    ];
    assert_eq!(seen, expected);
}

#[test]
fn a_new_segment_may_be_missing_until_it_is_synced() {
    let store = recording_with_layer();
    let handle = store.create_segment(LAYER, 1, 1).unwrap();
    handle.append(0, &[7; 2000]).unwrap();
    let unsynced = store.sequence();
    handle.sync().unwrap();
    handle.append(2000, &[8; 2000]).unwrap();
    let images: HashSet<_> = (0..500).map(|seed| segment(&store.crash_image(unsynced, seed, ANY), 1)).collect();
    assert!(images.contains(&None) && images.contains(&Some(vec![])) && images.contains(&Some(vec![7; 2000])));
    let lengths: HashSet<usize> = images.iter().flatten().map(Vec::len).collect();
    assert!(lengths.len() > 20, "prefixes of any length");
    assert!(images.iter().flatten().any(|bytes| bytes.contains(&0)), "zeros where a sector did not arrive");
    assert!(images.iter().flatten().any(|bytes| bytes.iter().any(|byte| !matches!(byte, 0 | 7))), "or garbage");
    for seed in 0..200 {
        let bytes = segment(&store.crash_image(store.sequence(), seed, ANY), 1).expect("synced, so its name is durable");
        assert!(bytes.len() >= 2000 && bytes[..2000] == [7; 2000]);
    }
}

#[test]
fn a_removed_segment_may_come_back_until_it_is_forgotten_replaced_or_its_layer_removed() {
    let store = recording_with_layer();
    for base_lsn in [1, 2] {
        let handle = store.create_segment(LAYER, base_lsn, 1).unwrap();
        handle.append(0, &[base_lsn as u8; 100]).unwrap();
        handle.sync().unwrap();
    }
    store.remove_segment(LAYER, 1).unwrap();
    let removed = store.sequence();
    store.open_segment(LAYER, 2).unwrap().sync().unwrap();
    let after_other_sync = store.sequence();
    for sequence in [removed, after_other_sync] {
        let images: HashSet<_> = (0..50).map(|seed| segment(&store.crash_image(sequence, seed, ANY), 1)).collect();
        assert_eq!(images, HashSet::from([None, Some(vec![1; 100])]));
    }
    let again = store.create_segment(LAYER, 1, 1).unwrap();
    again.append(0, &[9; 10]).unwrap();
    let recreated = store.sequence();
    again.sync().unwrap();
    let replaced = store.sequence();
    let options = CrashOptions { tear: false, ..ANY };
    let images: HashSet<_> = (0..100).map(|seed| segment(&store.crash_image(recreated, seed, options), 1)).collect();
    assert_eq!(images, HashSet::from([None, Some(vec![]), Some(vec![9; 10]), Some(vec![1; 100])]));
    for seed in 0..50 {
        assert_eq!(segment(&store.crash_image(replaced, seed, ANY), 1), Some(vec![9; 10]));
    }
    store.remove_segment(LAYER, 1).unwrap();
    let end = store.sequence();
    store.forget_before(end);
    assert!((0..50).all(|seed| segment(&store.crash_image(end, seed, ANY), 1).is_none()));
    store.remove_segment(LAYER, 2).unwrap();
    store.remove_layer(LAYER).unwrap();
    assert!((0..50).all(|seed| segment(&store.crash_image(store.sequence(), seed, ANY), 2).is_none()));
}

#[test]
fn a_cut_of_a_segment_may_be_undone_until_it_is_synced() {
    let store = recording_with_layer();
    let handle = store.create_segment(LAYER, 1, 1).unwrap();
    handle.append(0, &[7; 100]).unwrap();
    handle.sync().unwrap();
    handle.truncate(40).unwrap();
    let cut = store.sequence();
    handle.sync().unwrap();
    let images: HashSet<_> = (0..50).map(|seed| segment(&store.crash_image(cut, seed, ANY), 1).unwrap().len()).collect();
    assert_eq!(images, HashSet::from([40, 100]));
    assert!((0..50).all(|seed| segment(&store.crash_image(store.sequence(), seed, ANY), 1) == Some(vec![7; 40])));
}

#[test]
fn a_failed_sync_makes_nothing_durable() {
    let memory = Arc::new(recording_with_layer());
    let store = FaultStore::new(Arc::clone(&memory) as Arc<dyn Store>);
    let layer = store.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
    write(&*layer, 0, &[1; 4096]).unwrap();
    let rule = FaultRule {
        operation: "sync".to_owned(),
        layer: None,
        skip_count: 0,
        apply_count: 1,
        probability_of_256: 256,
        errno: libc::EIO,
        delay_ms: 0,
        tear: false,
    };
    store.set_plan(FaultPlan { seed: 1, rules: vec![rule] });
    assert!(layer.sync().is_err());
    let end = memory.sequence();
    let seen: HashSet<u8> = (0..50).map(|seed| content(&memory.crash_image(end, seed, ANY), LAYER, 1)[0]).collect();
    assert_eq!(seen, HashSet::from([0, 1]));
}

#[test]
fn boundaries_are_the_events_after_which_something_is_certain() {
    let store = recording_with_layer(); // 1
    let layer = store.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
    write(&*layer, 0, &[1; 10]).unwrap(); // 2
    layer.sync().unwrap(); // 3
    let handle = store.create_segment(LAYER, 1, 1).unwrap(); // 4
    handle.append(0, &[1]).unwrap(); // 5
    handle.sync().unwrap(); // 6
    layer.punch(0, 4096).unwrap(); // 7
    store.write_record("a", b"b").unwrap(); // 8
    store.remove_segment(LAYER, 1).unwrap(); // 9
    store.remove_layer(LAYER).unwrap(); // 10
    assert_eq!(store.sequence(), 10);
    assert_eq!(store.boundaries(0), [1, 3, 6, 8, 9, 10]);
    assert_eq!(store.boundaries(6), [8, 9, 10]);
    store.forget_before(7);
    assert_eq!(store.boundaries(0), [8, 9, 10]);
    assert_eq!(store.sequence(), 10);
}

#[test]
fn an_image_is_a_store_of_its_own_and_can_record_in_turn() {
    let store = recording_with_layer();
    let layer = store.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
    write(&*layer, 0, &[1; 4096]).unwrap();
    store.create_segment(LAYER, 1, 1).unwrap().append(0, b"frame").unwrap();
    store.write_record("a", b"b").unwrap();
    let image = store.crash_image(store.sequence(), 1, ALL);
    assert_eq!(image.usage().unwrap().free_bytes, store.usage().unwrap().free_bytes);
    let second = image.to_recording();
    write(&*second.open_layer(LAYER, OpenMode::ReadWrite).unwrap(), 0, &[2; 4096]).unwrap();
    assert_eq!(second.sequence(), 1);
    let third = second.crash_image(1, 1, NONE);
    assert_eq!(content(&third, LAYER, 4096), vec![1; 4096], "what the image held counts as synced");
    assert_eq!(segment(&third, 1).unwrap(), b"frame");
    assert_eq!(third.read_record("a").unwrap().unwrap(), b"b");
    assert_eq!((content(&store, LAYER, 1)[0], content(&image, LAYER, 1)[0], content(&second, LAYER, 1)[0]), (1, 1, 2));
}

/// What this thread itself has worked: how busy the machine is does not count.
fn worked() -> Duration {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the call writes one timespec, and that is what it gets.
    assert_eq!(unsafe { libc::clock_gettime(libc::CLOCK_THREAD_CPUTIME_ID, &raw mut time) }, 0);
    Duration::new(time.tv_sec as u64, time.tv_nsec as u32)
}

#[test]
fn an_image_of_a_store_of_a_few_mebibytes_is_drawn_in_less_than_two_milliseconds() {
    let store = recording_with_layer();
    let layer = store.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
    write(&*layer, 0, &vec![1; 4 << 20]).unwrap();
    let mut drawn = 0u64;
    let start = worked();
    for round in 0..200u64 {
        for index in 0..10 {
            write(&*layer, (round * 37 + index * 11) % 1000 * 4096, &[round as u8; 4096]).unwrap();
        }
        layer.sync().unwrap();
        for sequence in store.boundaries(store.sequence() - 11) {
            for seed in 0..25 {
                assert!(store.crash_image(sequence - 1, seed, ANY).usage().unwrap().stored_bytes > 0);
                drawn += 1;
            }
        }
        store.forget_before(store.sequence());
    }
    let each = (worked() - start) / drawn as u32;
    // Ten times what it takes on a slow machine: it is the shape of the cost that must not change.
    assert!(each < Duration::from_millis(2), "{drawn} images, {each:?} each");
    println!("{drawn} images, {each:?} each");
}

#[derive(Debug, Clone)]
enum Step {
    Write(u64, usize),
    Punch(u64, usize),
    Zero(u64, usize),
    Sync,
}

fn step() -> impl Strategy<Value = Step> {
    (0u64..60_000, 1usize..20_000, 0..8).prop_map(|(offset, length, kind)| match kind {
        0 => Step::Punch(offset, length),
        1 => Step::Zero(offset, length),
        2 | 3 => Step::Sync,
        _ => Step::Write(offset, length),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    /// The rule of every crash test: a sector holds what the last sync left, or something written (or zeroed) after it.
    #[test]
    fn each_sector_is_the_last_synced_one_or_a_later_one(steps in prop::collection::vec(step(), 1..40), seed: u64, cut in 0.0..1.0f64) {
        const LENGTH: usize = 80_000;
        let store = recording_with_layer();
        let layer = store.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
        let cut = 1 + (steps.len() as f64 * cut) as u64;
        // Per byte: what it may be. Its sector is judged byte by byte, which is the weaker but sufficient half.
        let mut current = vec![0u8; LENGTH];
        let mut possible: Vec<Vec<u8>> = vec![vec![0]; LENGTH];
        for (index, step) in steps.iter().enumerate() {
            let byte = index as u8 + 1;
            let (range, value) = match step {
                Step::Write(offset, length) => {
                    write(&*layer, *offset, &vec![byte; *length]).unwrap();
                    (*offset as usize..*offset as usize + length, byte)
                }
                Step::Punch(offset, length) => {
                    layer.punch(*offset, *length as u64).unwrap();
                    (*offset as usize..*offset as usize + length, 0)
                }
                Step::Zero(offset, length) => {
                    layer.zero_allocated(*offset, *length as u64).unwrap();
                    (*offset as usize..*offset as usize + length, 0)
                }
                Step::Sync => {
                    layer.sync().unwrap();
                    (0..0, 0)
                }
            };
            if store.sequence() > cut {
                continue;
            }
            if matches!(step, Step::Sync) {
                for (values, byte) in possible.iter_mut().zip(&current) {
                    *values = vec![*byte];
                }
            }
            for at in range {
                current[at] = value;
                possible[at].push(value);
            }
        }
        let cut = cut.min(store.sequence());
        for seed in seed..seed.saturating_add(8) {
            let bytes = content(&store.crash_image(cut, seed, ANY), LAYER, LENGTH);
            for (at, byte) in bytes.iter().enumerate() {
                prop_assert!(possible[at].contains(byte), "byte {} is {}, possible {:?}", at, byte, possible[at]);
            }
        }
        prop_assert!(content(&store.crash_image(cut, seed, ALL), LAYER, LENGTH) == current);
    }
}
