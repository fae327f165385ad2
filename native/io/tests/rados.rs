//! What is special about the rados kind, over a real cluster; what every kind promises is in `store_contract.rs`.
mod common;

use atoll_io::{
    Delta, Extent, IoErrorCode, Journal, JournalIdentity, JournalWriter, LayerId, OpenMode, PROOF_TIME_MAX, RadosOptions, RadosStore,
    Result, Store,
};
use common::{LAYER, OTHER_LAYER, begin_read, begin_write, read, write};
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

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
    first.create_layer(LAYER).unwrap();
    let mine = first.create_segment(LAYER, 1, 1).unwrap();
    mine.append(0, b"mine").unwrap();
    let theirs = second.open_segment(LAYER, 1).unwrap();
    assert_eq!(theirs.read_all().unwrap(), b"mine");
    mine.append(4, b", still").unwrap();
    assert!(theirs.append(11, b", not yet").is_err(), "it was not claimed");
    theirs.claim(1).unwrap();
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
    first.create_layer(LAYER).unwrap();
    first.create_layer(OTHER_LAYER).unwrap();
    first.create_segment(LAYER, 1, 1).unwrap();
    first.create_segment(OTHER_LAYER, 1, 1).unwrap();
    assert_eq!(second.list_layers().unwrap().len(), 2);
    first.remove_layer(LAYER).unwrap();
    first.create_segment(OTHER_LAYER, 2, 1).unwrap();
    drop(lock);
    let _lock = second.lock("the second").unwrap();
    assert!(second.list_segments(LAYER).unwrap().is_empty());
    assert_eq!(second.list_segments(OTHER_LAYER).unwrap(), [1, 2]);
    assert_eq!(second.list_layers().unwrap().len(), 1);
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
fn a_segment_that_was_made_although_the_making_failed_is_made_anew_under_a_newer_epoch() {
    let Some((first, second)) = two_stores() else { return };
    first.create_layer(LAYER).unwrap();
    // As one of ours that timed out and came to pass: `first` does not list it.
    second.create_segment(LAYER, 7, 1).unwrap().append(0, b"left").unwrap();
    assert_eq!(first.create_segment(LAYER, 7, 1).err().unwrap().code, IoErrorCode::Exists, "it may be somebody's");
    let segment = first.create_segment(LAYER, 7, 2).unwrap();
    assert!(segment.read_all().unwrap().is_empty());
    segment.append(0, b"new").unwrap();
    assert_eq!(first.list_segments(LAYER).unwrap(), [7]);
    first.create_segment(LAYER, 8, 3).unwrap();
    assert_eq!(second.create_segment(LAYER, 8, 2).err().unwrap().code, IoErrorCode::Exists, "nothing newer is taken away");
}

#[test]
fn what_an_older_handle_has_under_way_does_not_come_behind_a_claim() {
    let Some((store, _)) = two_stores() else { return };
    store.create_layer(LAYER).unwrap();
    let old = store.create_segment(LAYER, 1, 1).unwrap();
    old.append(0, b"old").unwrap();
    let new = store.open_segment(LAYER, 1).unwrap();
    assert_eq!(new.read_all().unwrap(), b"old");
    old.append(3, b", still").unwrap();
    new.claim(1).unwrap();
    assert_eq!(old.append(10, b", no more").unwrap_err().code, IoErrorCode::Io);
    assert!(old.truncate(0).is_err());
    assert_eq!(new.read_all().unwrap(), b"old, still");
    new.append(10, b", new").unwrap();
    assert_eq!(new.read_all().unwrap(), b"old, still, new");
}

#[test]
fn who_replays_a_journal_ends_the_writing_of_who_had_it_before_and_who_inspects_it_does_not() {
    let Some((store, _)) = two_stores() else { return };
    store.create_layer(LAYER).unwrap();
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

const VOLUME: [u8; 16] = [1; 16];

fn delta(owner: u32) -> [Delta; 1] {
    [Delta { start_slot: 0, slot_count: 1, owner }]
}

/// The journal of a layer under an epoch, and how many frames it had.
fn replay(store: &Arc<dyn Store>, layer: LayerId, epoch: u64) -> Result<(Journal, u64)> {
    let replay = Journal::replay(Arc::clone(store), JournalIdentity { volume: VOLUME, layer, epoch }, 0)?;
    Ok((replay.journal, replay.frames.len() as u64))
}

#[test]
fn who_claimed_a_journal_under_a_newer_epoch_is_the_only_one_who_writes_it_whatever_came_before() {
    let Some((first, second)) = two_stores() else { return };
    let (first, second): (Arc<dyn Store>, Arc<dyn Store>) = (Arc::new(first), Arc::new(second));
    for claimed_before in 0..5 {
        let layer = LayerId([claimed_before; 16]);
        first.create_layer(layer).unwrap();
        let mut new: Option<Journal> = None;
        let mut old: Option<Journal> = None;
        let mut landed = 0;
        for step in 0..5 {
            if step == claimed_before {
                let (journal, frame_count) = replay(&second, layer, 2).unwrap();
                assert_eq!(frame_count, landed, "claimed before step {claimed_before}");
                new = Some(journal);
            }
            let outcome = match (step, &mut old) {
                (0, _) => replay(&first, layer, 1).map(|(journal, _)| old = Some(journal)),
                // It was refused, and writes without having replayed.
                (_, None) => Journal::new(Arc::clone(&first), JournalIdentity { volume: VOLUME, layer, epoch: 1 }).append(1, &delta(1)),
                (_, Some(journal)) => {
                    if step == 3 {
                        journal.rotate();
                    }
                    journal.append(landed + 1, &delta(1)).inspect(|()| landed += 1)
                }
            };
            assert_eq!(outcome.is_ok(), new.is_none(), "step {step}, claimed before {claimed_before}: {outcome:?}");
            if let Err(error) = outcome
                && step == 0
            {
                assert_eq!(error.code, IoErrorCode::CatalogBehind);
            }
        }
        new.unwrap().append(landed + 1, &delta(2)).unwrap();
        assert_eq!(replay(&second, layer, 2).unwrap().1, landed + 1);
        assert_eq!(replay(&first, layer, 3).unwrap().1, landed + 1);
    }
}

#[test]
fn a_journal_says_who_claimed_it_and_under_which_epoch() {
    let Some((first, second)) = two_stores() else { return };
    first.create_layer(LAYER).unwrap();
    assert_eq!(first.journal_writer(LAYER).unwrap(), None);
    let lock = first.lock("pid 1 on a host").unwrap();
    first.claim_journal(LAYER, 9).unwrap();
    assert_eq!(second.journal_writer(LAYER).unwrap(), Some(JournalWriter { epoch: 9, owner: "pid 1 on a host".to_owned() }));
    drop(lock);
    let _lock = second.lock("pid 2 on another").unwrap();
    let error = second.claim_journal(LAYER, 8).unwrap_err();
    assert_eq!(error.code, IoErrorCode::CatalogBehind);
    assert!(error.message.contains("epoch 9 by pid 1 on a host"), "{error}");
    second.claim_journal(LAYER, 10).unwrap();
    assert_eq!(first.journal_writer(LAYER).unwrap(), Some(JournalWriter { epoch: 10, owner: "pid 2 on another".to_owned() }));
}

const WRITER_NAMESPACE: &str = "ATOLL_TEST_JOURNAL_NAMESPACE";

/// Writes frames until it is refused, and prints the number of each when it was answered.
fn write_until_refused(namespace: String) {
    let options = RadosOptions { namespace, create: false, ..common::ceph::options().unwrap() };
    let store: Arc<dyn Store> = Arc::new(RadosStore::open(options).unwrap());
    let (mut journal, _) = replay(&store, LAYER, 1).unwrap();
    for lsn in 1.. {
        if let Err(error) = journal.append(lsn, &delta(1)) {
            println!("\nrefused {error}");
            return;
        }
        println!("\n{lsn}");
        if lsn % 2 == 0 {
            journal.rotate();
        }
    }
}

/// This program again, with one test that finds the namespace in its environment.
fn other_process(name: &str, options: &RadosOptions) -> Child {
    Command::new(std::env::current_exe().unwrap())
        .args(["--exact", name, "--nocapture"])
        .env(WRITER_NAMESPACE, &options.namespace)
        .env("ATOLL_TEST_CEPH_CONF", common::ceph::conf().unwrap())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap()
}

#[test]
fn nothing_of_a_process_that_is_killed_stopped_or_goes_on_lands_behind_a_claim_under_a_newer_epoch() {
    if let Ok(namespace) = std::env::var(WRITER_NAMESPACE) {
        return write_until_refused(namespace);
    }
    const SIGNALS: [i32; 3] = [libc::SIGKILL, libc::SIGSTOP, 0];
    for round in 0..9u64 {
        let Some(options) = common::ceph::options() else { return };
        let store: Arc<dyn Store> = Arc::new(RadosStore::open(options.clone()).unwrap());
        store.create_layer(LAYER).unwrap();
        let name = "nothing_of_a_process_that_is_killed_stopped_or_goes_on_lands_behind_a_claim_under_a_newer_epoch";
        let mut child = other_process(name, &options);
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(|line| line.unwrap());
        let is_number = |line: &str| line.parse::<u64>().ok();
        let mut answered = lines.by_ref().filter_map(|line| is_number(&line)).nth(2 + round as usize).unwrap();
        // Somewhere between two requests; where does not matter.
        std::thread::sleep(Duration::from_micros(700 * round));
        let signal = SIGNALS[round as usize % 3];
        let send = |signal| {
            // SAFETY: a child that was not waited for.
            assert_eq!(unsafe { libc::kill(child.id() as i32, signal) }, 0);
        };
        if signal != 0 {
            send(signal);
        }
        let (mut journal, landed) = replay(&store, LAYER, 2).unwrap();
        journal.append(landed + 1, &delta(2)).unwrap();
        if signal == libc::SIGSTOP {
            send(libc::SIGCONT);
        }
        let mut is_refused = false;
        for line in lines {
            answered = is_number(&line).map_or(answered, |lsn| lsn.max(answered));
            if answered > landed {
                // It would go on for ever.
                child.kill().unwrap();
                break;
            }
            is_refused |= line.starts_with("refused");
        }
        child.wait().unwrap();
        assert!(answered <= landed, "round {round}: {answered} was answered, and {landed} had landed");
        assert_eq!(is_refused, signal != libc::SIGKILL, "round {round}");
        assert_eq!(replay(&store, LAYER, 3).unwrap().1, landed + 1, "round {round}");
    }
}

/// Has the lock and writes one slot again and again, each time with a higher number, and prints it when that was answered.
fn write_with_the_lock(namespace: String) {
    let options = RadosOptions { namespace, create: false, ..common::ceph::options().unwrap() };
    let store = RadosStore::open(options).unwrap();
    let _lock = store.lock("the first").unwrap();
    let layer = store.open_layer(LAYER, OpenMode::ReadWrite).unwrap();
    for number in 1u64.. {
        if let Err(error) = write(&*layer, 0, &number.to_le_bytes()) {
            println!("\nrefused {error}");
            return;
        }
        println!("\n{number}");
    }
}

#[test]
fn of_a_living_process_that_was_shut_out_nothing_lands_and_every_proof_that_it_had_has_run_out() {
    if let Ok(namespace) = std::env::var(WRITER_NAMESPACE) {
        return write_with_the_lock(namespace);
    }
    let Some(options) = common::ceph::options() else { return };
    let store = RadosStore::open(options.clone()).unwrap();
    store.create_layer(LAYER).unwrap();
    let mut child = other_process("of_a_living_process_that_was_shut_out_nothing_lands_and_every_proof_that_it_had_has_run_out", &options);
    let mut lines = BufReader::new(child.stdout.take().unwrap()).lines().map(|line| line.unwrap());
    lines.by_ref().filter_map(|line| line.parse::<u64>().ok()).nth(5).unwrap();
    assert_eq!(store.lock("the second").err().unwrap().code, IoErrorCode::Locked, "it lives");
    let started_at = Instant::now();
    let _lock = store.lock_shutting_out("the second").unwrap();
    assert!(started_at.elapsed() > PROOF_TIME_MAX);
    let number_there = || u64::from_le_bytes(read(&*store.open_layer(LAYER, OpenMode::ReadOnly).unwrap(), 0, 8).try_into().unwrap());
    let landed = number_there();
    let mut refusal = None;
    for line in lines {
        if let Ok(number) = line.parse::<u64>() {
            let has_landed = number <= landed;
            if !has_landed {
                child.kill().unwrap();
            }
            assert!(has_landed, "{number} was answered after {landed}, the last one that the new owner has seen");
        } else if line.starts_with("refused") {
            refusal = Some(line);
        }
    }
    child.wait().unwrap();
    assert!(refusal.unwrap().contains("blocklist"));
    assert_eq!(number_there(), landed);
}
