//! Requests that a backend carries out while nobody waits: their ends come in any order, late, or not well.
use super::postponed_store::PostponedStore;
use super::*;
use std::net::Shutdown;
use std::sync::atomic::{AtomicBool, Ordering};

const SLOT: u64 = 4096;
const EIO: u32 = 5;
const LONG: Duration = Duration::from_secs(300);

/// A test that fails leaves nothing under way, which the end of the world would wait for.
struct Postponed(Arc<PostponedStore>);

impl std::ops::Deref for Postponed {
    type Target = Arc<PostponedStore>;
    fn deref(&self) -> &Arc<PostponedStore> {
        &self.0
    }
}

impl Drop for Postponed {
    fn drop(&mut self) {
        self.0.abandon();
    }
}

/// The store is to go before the world.
fn postponed_world(batch_log: Option<BatchLogPlace>) -> (World, Postponed) {
    postponed_world_over(batch_log, PostponedStore::new)
}

/// As above, where no answer goes out without a proof.
fn proving_world() -> (World, Postponed) {
    postponed_world_over(None, |inner| {
        let store = PostponedStore::new(inner);
        store.want_proofs();
        store
    })
}

fn postponed_world_over(batch_log: Option<BatchLogPlace>, make: impl FnOnce(Arc<dyn Store>) -> PostponedStore) -> (World, Postponed) {
    let mut made = None;
    let world = world_over(ThrottleLimits::default(), batch_log, None, |inner| {
        let store = Arc::new(make(inner));
        made = Some(store.clone());
        store
    });
    (world, Postponed(made.unwrap()))
}

fn block(byte: u8) -> Vec<u8> {
    vec![byte; SLOT as usize]
}

fn send_write(client: &mut Client, slot: u64, byte: u8) -> u64 {
    client.send(WRITE, 0, slot * SLOT, SLOT, &block(byte))
}

/// A write whose end comes at once.
fn write_now(client: &mut Client, store: &PostponedStore, slot: u64, byte: u8) {
    let cookie = send_write(client, slot, byte);
    store.wait_begun(1);
    store.end_at(slot * SLOT);
    let answer = client.answer(None);
    assert_eq!((answer.cookie, answer.error), (cookie, 0), "{}", answer.message);
}

fn on_device(world: &World, slot: u64) -> Vec<u8> {
    let mut bytes = block(0xee);
    world.device.read(slot * SLOT, &mut bytes).unwrap();
    bytes
}

/// Runs `body` on a thread, and checks that it comes to its end only after `then`, as far as a moment tells.
fn comes_after<T: Send>(body: impl FnOnce() -> T + Send, then: impl FnOnce()) -> T {
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        let waiting = scope.spawn(|| {
            let result = body();
            is_over.store(true, Ordering::SeqCst);
            result
        });
        // Gives it the time to be wrong.
        (0..1000).for_each(|_| std::thread::yield_now());
        assert!(!is_over.load(Ordering::SeqCst), "a request is under way");
        then();
        waiting.join().unwrap()
    })
}

#[test]
fn answers_come_in_the_order_of_the_ends_each_with_its_own_bytes() {
    for form in FORMS {
        let (world, store) = postponed_world(None);
        let mut client = world.connect(|options| options.replies = form);
        let cookies: Vec<u64> = (0..20).map(|slot| send_write(&mut client, slot, slot as u8 + 1)).collect();
        store.wait_begun(20);
        // From the last to the first: many are under way, then few.
        for (slot, cookie) in cookies.iter().enumerate().rev() {
            store.end_at(slot as u64 * SLOT);
            let answer = client.answer_to(slot as u64 * SLOT, None);
            assert_eq!((answer.cookie, answer.error), (*cookie, 0));
        }
        // Short and long ones.
        let reads = [(0, 20), (1, 1), (2, 17), (3, 1), (4, 2)].map(|(slot, count)| {
            let (offset, length) = (slot * SLOT, count * SLOT);
            (client.send(READ, 0, offset, length, &[]), offset, length)
        });
        store.wait_begun(reads.len());
        for (cookie, offset, length) in [2, 4, 0, 3, 1].map(|index| reads[index]) {
            store.end_at(offset);
            let answer = client.answer(Some((offset, length as usize)));
            let expected: Vec<u8> = (offset / SLOT..(offset + length) / SLOT).flat_map(|slot| block(slot as u8 + 1)).collect();
            assert!(answer.error == 0 && answer.cookie == cookie && answer.data == expected, "{cookie}");
        }
    }
}

#[test]
fn a_slot_changes_its_owner_when_its_data_is_there_and_a_flush_covers_what_was_answered() {
    let (world, store) = postponed_world(None);
    let mut client = world.connect(|_| {});
    let write = send_write(&mut client, 0, 1);
    store.wait_begun(1);
    assert_eq!(on_device(&world, 0), block(0));
    // A flush that comes meanwhile waits for nothing, and its frame holds nothing of the write.
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).error, 0);
    assert_eq!(world.device.stats().lsn, 0);
    store.end_at(0);
    assert_eq!(client.answer(None).cookie, write);
    assert_eq!(on_device(&world, 0), block(1));
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).error, 0);
    assert_eq!(world.device.stats().lsn, 1);
    // What is ours already is written in place: no owner changes, no frame follows.
    write_now(&mut client, &store, 0, 2);
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).error, 0);
    assert_eq!((on_device(&world, 0), world.device.stats().lsn), (block(2), 1));
}

#[test]
fn a_request_that_ends_badly_is_answered_so_and_changes_no_owner() {
    let (world, store) = postponed_world(None);
    let mut client = world.connect(|_| {});
    let write = send_write(&mut client, 3, 1);
    store.wait_begun(1);
    store.lose_at(3 * SLOT);
    let answer = client.answer(None);
    assert_eq!((answer.cookie, answer.error), (write, EIO));
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).error, 0);
    assert_eq!((on_device(&world, 3), world.device.stats().lsn), (block(0), 0));
    write_now(&mut client, &store, 3, 2);
    let read = client.send(READ, 0, 3 * SLOT, SLOT, &[]);
    store.wait_begun(1);
    store.lose_at(3 * SLOT);
    let answer = client.answer(Some((3 * SLOT, SLOT as usize)));
    assert_eq!((answer.cookie, answer.error), (read, EIO));
    assert!(!world.device.is_poisoned());
    assert_eq!(on_device(&world, 3), block(2));
}

#[test]
fn of_two_first_writes_to_a_slot_the_second_waits_for_the_first() {
    let (world, store) = postponed_world(None);
    let mut client = world.connect(|_| {});
    let first = send_write(&mut client, 0, 1);
    store.wait_begun(1);
    let second = client.send(WRITE, 0, 100, 100, &[2; 100]);
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).error, 0);
    assert_eq!(on_device(&world, 0), block(0), "neither is done");
    store.end_at(0);
    // The second is waited for by a thread: it was not begun.
    let mut answered = [client.answer(None).cookie, client.answer(None).cookie];
    answered.sort_unstable();
    assert_eq!(answered, [first, second]);
    let mut expected = block(1);
    expected[100..200].fill(2);
    assert_eq!(on_device(&world, 0), expected);
}

#[test]
fn a_swap_waits_for_what_is_under_way_and_fails_past_its_deadline() {
    let (world, store) = postponed_world(None);
    let mut client = world.connect(|_| {});
    write_now(&mut client, &store, 0, 1);
    let next = |alias: u8| {
        let id = LayerId([alias; 16]);
        store.create_layer(id).unwrap();
        LayerSpec { alias: u32::from(alias), id, store: store.0.clone() }
    };
    let write = send_write(&mut client, 1, 2);
    let read = client.send(READ, 0, 0, SLOT, &[]);
    store.wait_begun(2);
    let error = Device::swap(&[(world.device.clone(), next(2))], Duration::from_millis(5)).err().unwrap();
    assert_eq!(error.code, "DEVICE_BUSY");
    store.end_at(0);
    assert_eq!(client.answer(Some((0, SLOT as usize))).cookie, read);
    let reports = comes_after(|| Device::swap(&[(world.device.clone(), next(3))], LONG).unwrap(), || store.end_at(SLOT));
    assert_eq!(client.answer(None).cookie, write);
    // The write was of the layer that was active at its beginning, and the snapshot has it.
    assert_eq!(reports[0].lsn, 1);
    assert_eq!(on_device(&world, 1), block(2));
    write_now(&mut client, &store, 1, 3);
    assert_eq!(on_device(&world, 1), block(3));
}

#[test]
fn a_read_of_what_several_layers_have_is_under_way_in_all_of_them_at_once() {
    let (world, store) = postponed_world(None);
    let mut client = world.connect(|_| {});
    let mut expected = vec![0; 12 * SLOT as usize];
    for alias in 2..4u8 {
        for slot in (0..12).filter(|slot| slot % 3 == u64::from(alias) - 2) {
            write_now(&mut client, &store, slot, alias + slot as u8);
            expected[(slot * SLOT) as usize..((slot + 1) * SLOT) as usize].fill(alias + slot as u8);
        }
        let id = LayerId([alias; 16]);
        store.create_layer(id).unwrap();
        let next = LayerSpec { alias: u32::from(alias), id, store: store.0.clone() };
        Device::swap(&[(world.device.clone(), next)], LONG).unwrap();
        let checkpoint = world.device.checkpoint(u64::from(alias) << 20).unwrap().unwrap();
        world.device.checkpoint_committed(checkpoint, true).unwrap();
        world.device.swap_committed(true).unwrap();
    }
    // Layers that were swapped out are opened by the first read, which a thread waits for.
    let mut whole = vec![0xee; 12 * SLOT as usize];
    world.device.read(0, &mut whole).unwrap();
    assert!(whole == expected);
    // Not in whole slots; every third slot is a hole.
    let (offset, length) = (100, 12 * SLOT - 300);
    let parts: Vec<u64> = (0..12).filter(|slot| slot % 3 != 2).map(|slot| (slot * SLOT).max(offset)).collect();
    let read = client.send(READ, 0, offset, length, &[]);
    store.wait_begun(parts.len());
    parts.iter().rev().for_each(|offset| store.end_at(*offset));
    let answer = client.answer(Some((offset, length as usize)));
    assert!(answer.cookie == read && answer.data == expected[100..][..length as usize]);
    client.send(READ, 0, offset, length, &[]);
    store.wait_begun(parts.len());
    parts[1..].iter().for_each(|offset| store.end_at(*offset));
    store.lose_at(parts[0]);
    assert_eq!(client.answer(Some((offset, length as usize))).error, EIO);
    assert!(world.device.read_barrier(Duration::from_secs(300)));
}

#[test]
fn a_layer_with_a_write_that_timed_out_and_may_land_yet_is_not_swapped_out_before_that_is_over() {
    let (world, store) = postponed_world(None);
    let mut client = world.connect(|_| {});
    write_now(&mut client, &store, 0, 1);
    send_write(&mut client, 0, 2);
    store.wait_begun(1);
    store.time_out_at(0);
    assert_eq!(client.answer(None).error, EIO);
    let id = LayerId([2; 16]);
    store.create_layer(id).unwrap();
    let next = LayerSpec { alias: 2, id, store: store.0.clone() };
    let error = Device::swap(&[(world.device.clone(), next.clone())], LONG).err().unwrap();
    assert_eq!(error.code, "DEVICE_BUSY");
    assert!(error.message.contains("may still be carried out"), "{error}");
    write_now(&mut client, &store, 1, 1);
    store.speak();
    let lsn = Device::swap(&[(world.device.clone(), next)], LONG).unwrap()[0].lsn;
    world.device.flush().unwrap();
    assert!(lsn > 0);
    let sealed = on_device(&world, 0);
    store.land_late();
    assert_eq!(on_device(&world, 0), sealed, "nothing lands in a layer that a snapshot has");
}

#[test]
fn a_barrier_past_its_deadline_says_so_and_a_swap_comes_all_the_same_when_all_have_ended() {
    let (world, store) = postponed_world(None);
    let mut client = world.connect(|_| {});
    write_now(&mut client, &store, 0, 1);
    client.send(READ, 0, 0, SLOT, &[]);
    store.wait_begun(1);
    assert!(!world.device.read_barrier(Duration::from_millis(5)));
    assert!(!world.device.read_barrier(Duration::from_millis(5)), "it is under way still");
    assert_eq!(world.engine.read_barrier(Duration::from_millis(5)), [world.device.volume()]);
    store.end_at(0);
    client.answer(Some((0, SLOT as usize)));
    assert!(world.device.read_barrier(LONG));
    assert!(world.engine.read_barrier(LONG).is_empty());
}

#[test]
fn a_barrier_and_the_end_of_a_device_wait_for_what_is_under_way() {
    let (world, store) = postponed_world(None);
    let mut client = world.connect(|_| {});
    write_now(&mut client, &store, 0, 1);
    let read = client.send(READ, 0, 0, SLOT, &[]);
    store.wait_begun(1);
    comes_after(|| assert!(world.device.read_barrier(Duration::from_secs(300))), || store.end_at(0));
    assert_eq!(client.answer(Some((0, SLOT as usize))).cookie, read);
    let write = send_write(&mut client, 0, 2);
    store.wait_begun(1);
    comes_after(|| world.device.close().unwrap(), || store.end_at(0));
    let answer = client.answer(None);
    assert_eq!((answer.cookie, answer.error), (write, 0), "it was there before the end");
    assert_eq!(client.call(READ, 0, 0, SLOT, &[]).error, ESHUTDOWN);
}

#[test]
fn a_connection_that_drains_answers_what_is_under_way_first() {
    let (world, store) = postponed_world(None);
    let mut client = world.connect(|_| {});
    let write = send_write(&mut client, 0, 1);
    store.wait_begun(1);
    client.connection.drain();
    assert_eq!(client.call(READ, 0, 0, SLOT, &[]).error, ESHUTDOWN);
    store.end_at(0);
    let answer = client.answer(None);
    assert_eq!((answer.cookie, answer.error), (write, 0));
    assert_eq!(client.expect_closed().reason, ServeEndReason::Closed);
    assert_eq!(on_device(&world, 0), block(1));
}

#[test]
fn a_connection_is_over_when_the_last_request_under_way_has_ended() {
    for count in [1, 20] {
        let (world, store) = postponed_world(None);
        let mut client = world.connect(|_| {});
        let _: Vec<u64> = (0..count).map(|slot| send_write(&mut client, slot, 7)).collect();
        store.wait_begun(count as usize);
        let connection = client.connection.clone();
        // It takes answers on: whether the end is seen before one of them fails does not matter.
        client.stream.shutdown(Shutdown::Write).unwrap();
        comes_after(|| connection.wait_ended(), || (0..count).for_each(|slot| store.end_at(slot * SLOT)));
        assert_eq!(client.end.recv().unwrap().reason, ServeEndReason::Eof);
        assert_eq!(Arc::strong_count(&world.device), 1 + engine_holds(), "nobody has the device any more");
        assert_eq!(on_device(&world, count - 1), block(7));
    }
}

/// Handles of a device that its engine keeps.
fn engine_holds() -> usize {
    let (world, _) = postponed_world(None);
    Arc::strong_count(&world.device) - 1
}

#[test]
fn a_client_that_takes_no_answers_holds_nobody_up_but_itself() {
    let (world, store) = postponed_world(None);
    let mut client = world.connect(|_| {});
    let length = 1 << 20;
    let payload: Vec<u8> = (0..length).map(|at| (at / 4096 + 1) as u8).collect();
    let write = client.send(WRITE, 0, 0, length, &payload);
    store.wait_begun(1);
    store.end_at(0);
    assert_eq!(client.answer(None).cookie, write);
    // More than any socket takes.
    let cookies: Vec<u64> = (0..60).map(|_| client.send(READ, DF, 0, length, &[])).collect();
    store.wait_begun(60);
    (0..60).for_each(|_| store.end_at(0));
    assert!(world.device.read_barrier(Duration::from_secs(300)));
    let mut other = world.connect(|_| {});
    write_now(&mut other, &store, 0, 9);
    let mut seen: Vec<u64> = (0..60)
        .map(|_| {
            let answer = client.answer(Some((0, length as usize)));
            assert!(answer.data == payload);
            answer.cookie
        })
        .collect();
    seen.sort_unstable();
    assert_eq!(seen, cookies);
}

#[test]
fn writes_that_the_batch_log_cannot_keep_are_answered_as_failed_and_reads_among_them_are_not() {
    let nowhere = BatchLogPlace { directory: "/nonexistent/atoll".into(), boot_id: [1; 16] };
    let (world, store) = postponed_world(Some(nowhere));
    let mut client = world.connect(|_| {});
    write_now(&mut client, &store, 0, 1);
    world.fail("append", libc::ENOSPC);
    let write = send_write(&mut client, 1, 2);
    let read = client.send(READ, 0, 0, SLOT, &[]);
    store.wait_begun(2);
    store.end_at(SLOT);
    let answer = client.answer(None);
    assert_eq!((answer.cookie, answer.error), (write, ENOSPC));
    store.end_at(0);
    let answer = client.answer(Some((0, SLOT as usize)));
    assert!(answer.cookie == read && answer.data == block(1));
    world.let_go();
    write_now(&mut client, &store, 1, 3);
}

#[test]
fn a_flush_asks_whether_the_pool_is_ours_unless_a_frame_was_taken_and_fails_when_it_is_not() {
    let (world, store) = postponed_world(None);
    let mut client = world.connect(|_| {});
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).error, 0);
    assert_eq!(store.proof_count(), 1, "there is nothing to write");
    write_now(&mut client, &store, 0, 1);
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).error, 0);
    assert_eq!(store.proof_count(), 1, "the frame was taken by the backend");
    write_now(&mut client, &store, 0, 2);
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).error, 0);
    assert_eq!(store.proof_count(), 2, "there is no frame");
    store.set_fenced(true);
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).error, EIO);
    assert_eq!(client.call(WRITE, FUA, 0, SLOT, &block(3)).error, EIO);
    store.set_fenced(false);
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).error, 0, "nothing was lost");
    assert!(!world.device.is_poisoned());
    // The end of a device that has nothing to write asks nobody.
    store.set_fenced(true);
    world.device.close().unwrap();
}

#[test]
fn what_a_backend_that_has_much_to_do_does_not_begin_is_waited_for_elsewhere() {
    let (world, store) = postponed_world(None);
    let mut client = world.connect(|_| {});
    write_now(&mut client, &store, 0, 1);
    let under_way = send_write(&mut client, 0, 2);
    store.wait_begun(1);
    store.fill_up();
    client.write(SLOT, &block(3));
    client.write(2 * SLOT, &block(4));
    // Of one layer, and of one and a hole.
    assert!(client.read(SLOT, 2 * SLOT) == [block(3), block(4)].concat());
    assert!(client.read(2 * SLOT, 2 * SLOT) == [block(4), block(0)].concat());
    store.end_at(0);
    assert_eq!(client.answer(None).cookie, under_way);
}

#[test]
fn an_answer_that_was_on_its_way_when_the_pool_was_taken_over_does_not_go_out() {
    for is_taken_over in [false, true] {
        let (world, store) = proving_world();
        let mut client = world.connect(|_| {});
        let cookie = send_write(&mut client, 0, 1);
        store.wait_begun(1);
        // Nothing was proven yet, as after a long stop.
        store.set_fenced(is_taken_over);
        store.end_at(0);
        if is_taken_over {
            client.expect_closed();
        } else {
            let answer = client.answer(None);
            assert_eq!((answer.cookie, answer.error), (cookie, 0), "{}", answer.message);
            assert_eq!(store.proof_count(), 1);
        }
    }
}

#[test]
fn a_proof_that_comes_too_late_is_asked_for_again() {
    let (world, store) = proving_world();
    let mut client = world.connect(|_| {});
    store.delay_proof();
    let cookie = send_write(&mut client, 0, 1);
    store.wait_begun(1);
    store.end_at(0);
    let answer = client.answer(None);
    assert_eq!((answer.cookie, answer.error), (cookie, 0), "{}", answer.message);
    assert_eq!(store.proof_count(), 2);
}

#[test]
fn what_a_slow_client_takes_when_the_proof_has_run_out_is_proven_again_or_does_not_go_out() {
    for is_taken_over in [false, true] {
        let (world, store) = proving_world();
        let mut client = world.connect(|_| {});
        // More than a socket holds: some of it waits for the client.
        let length = 16 << 20;
        let cookie = client.send(READ, DF, 0, length as u64, &[]);
        client.wait_readable();
        store.set_fenced(is_taken_over);
        world.device.outdate_proof();
        if is_taken_over {
            let mut taken = Vec::new();
            let _ = client.stream.read_to_end(&mut taken);
            assert!(taken.len() < length, "all of it went out");
        } else {
            let answer = client.answer(Some((0, length)));
            assert_eq!((answer.cookie, answer.error), (cookie, 0), "{}", answer.message);
            assert!(store.proof_count() >= 2, "the rest was not proven again");
        }
    }
}

#[test]
fn what_is_left_to_answer_when_the_device_is_closed_goes_out_with_a_proof_or_not_at_all() {
    let (world, store) = proving_world();
    assert!(!world.device.is_proven());
    world.device.close().unwrap();
    assert!(!world.device.is_proven(), "it has no layers any more, and still had one that others may take over");
    assert_eq!(world.device.prove().unwrap_err().code, "DEVICE_CLOSED");
    assert!(!world.device.is_proven());
    drop(store);
}

#[test]
fn many_clients_whose_requests_end_in_any_order_read_what_they_wrote_through_swaps_and_flushes() {
    let seed: u64 = std::env::var("ATOLL_SEED").ok().and_then(|text| text.parse().ok()).unwrap_or(20_261_121);
    println!("seed {seed}");
    let (world, store) = postponed_world(None);
    let is_over = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for number in 0..2 {
            let (store, is_over) = (&store, &is_over);
            let mut random = random_from(seed + number);
            scope.spawn(move || while store.end_some(|count| random() as usize % count, is_over) {});
        }
        let clients: Vec<_> = (0..3u64)
            .map(|number| {
                let mut client = world.connect(|_| {});
                let mut random = random_from(seed + 10 + number);
                scope.spawn(move || {
                    let mut content = [0u8; 32];
                    for round in 0..60u8 {
                        // Each slot of this client is asked for once in a round, all of them at a time.
                        let wanted: Vec<(u64, bool)> = (0..32).map(|slot| (slot, random().is_multiple_of(2))).collect();
                        let mut asked = std::collections::HashMap::new();
                        for (slot, is_write) in wanted {
                            let at = number * 32 + slot;
                            let cookie = match is_write {
                                true => send_write(&mut client, at, round.wrapping_add(slot as u8) | 1),
                                false => client.send(READ, DF, at * SLOT, SLOT, &[]),
                            };
                            asked.insert(cookie, (slot, is_write));
                        }
                        while !asked.is_empty() {
                            let answer = take_any(&mut client);
                            let (slot, is_write) = asked.remove(&answer.cookie).unwrap();
                            assert_eq!(answer.error, 0);
                            match is_write {
                                true => content[slot as usize] = round.wrapping_add(slot as u8) | 1,
                                false => assert!(answer.data == block(content[slot as usize]), "slot {slot} of client {number}"),
                            }
                        }
                        if round.is_multiple_of(8) {
                            client.send(FLUSH, 0, 0, 0, &[]);
                            assert_eq!(take_any(&mut client).error, 0);
                        }
                    }
                })
            })
            .collect();
        for alias in 2..8u8 {
            let id = LayerId([alias; 16]);
            store.create_layer(id).unwrap();
            let next = LayerSpec { alias: u32::from(alias), id, store: store.0.clone() };
            Device::swap(&[(world.device.clone(), next)], LONG).unwrap();
            let checkpoint = world.device.checkpoint(u64::from(alias) << 20).unwrap().unwrap();
            world.device.checkpoint_committed(checkpoint, true).unwrap();
            world.device.swap_committed(true).unwrap();
        }
        clients.into_iter().for_each(|client| client.join().unwrap());
        is_over.store(true, Ordering::SeqCst);
    });
}

/// A reply to a write, a flush, or a read of one slot with DF.
fn take_any(client: &mut Client) -> Answer {
    match client.take_u32() {
        0x6744_6698 => Answer { error: client.take_u32(), cookie: client.take_u64(), ..Answer::default() },
        magic => {
            assert_eq!((magic, client.take_u16(), client.take_u16()), (0x668e_33ef, 1, 1));
            let cookie = client.take_u64();
            assert_eq!(client.take_u32() as u64, SLOT + 8);
            client.take_u64();
            Answer { cookie, data: client.take(SLOT as usize), ..Answer::default() }
        }
    }
}

fn random_from(seed: u64) -> impl FnMut() -> u64 {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    move || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        state >> 33
    }
}
