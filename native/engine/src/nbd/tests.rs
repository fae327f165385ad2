//! The transmission phase against scripted clients, over a real device on the memory store.
mod begun;
mod drain;
mod moving;
mod postponed_store;

use super::test_harness::*;
use crate::{
    BatchLogPlace, Device, LayerSpec, MetaContext, MetaContextKind, NBD_REQUEST_BYTES_MAX, ReplyForm, ServeEndReason, ThrottleLimits,
};
use atoll_io::{FaultPlan, LayerId, Store};
use std::io::{Read, Write};
use std::sync::Arc;
use std::sync::mpsc::channel;
use std::time::{Duration, Instant};

#[test]
fn what_is_written_is_read_back_at_any_alignment_with_every_kind_of_reply() {
    for (world, form) in worlds().iter().flat_map(|world| FORMS.map(|form| (world, form))) {
        let mut client = world.connect(|options| options.replies = form);
        for (index, length) in [1usize, 512, 4096, 5000, 65_536, 262_144, 262_145, 1 << 20, 32 << 20].into_iter().enumerate() {
            let payload: Vec<u8> = (0..length).map(|at| (at * 7 + index + 1) as u8).collect();
            client.write(333, &payload);
            assert_eq!(client.read(333, length as u64), payload);
            let large = client.call(READ, if form == ReplyForm::Simple { 0 } else { DF }, 333, length as u64, &[]);
            assert_eq!(large.data, payload);
            assert!(large.chunks.len() <= 1, "DF gets one chunk");
        }
        client.send(DISC, 0, 0, 0, &[]);
        assert_eq!(client.expect_closed().reason, ServeEndReason::Disconnect);
    }
}

#[test]
fn many_requests_in_one_packet_are_all_answered() {
    let world = world();
    let mut client = world.connect(|_| {});
    let mut bytes = Vec::new();
    for index in 0..200u64 {
        bytes.extend(request_bytes(WRITE, 0, index, index * 4096, 4096));
        bytes.extend([index as u8 + 1; 4096]);
    }
    for index in 200..300u64 {
        bytes.extend(request_bytes(FLUSH, FUA, index, 0, 0));
    }
    let mut writer = client.stream.try_clone().unwrap();
    let sender = std::thread::spawn(move || writer.write_all(&bytes).unwrap());
    let mut cookies: Vec<u64> =
        (0..300).map(|_| client.answer(None)).map(|answer| (answer.error == 0).then_some(answer.cookie).unwrap()).collect();
    sender.join().unwrap();
    cookies.sort_unstable();
    assert_eq!(cookies, (0..300).collect::<Vec<_>>());
    for index in 0..200u64 {
        assert_eq!(client.read(index * 4096, 4096), [index as u8 + 1; 4096]);
    }
}

#[test]
fn writes_that_can_be_kept_neither_by_the_log_nor_by_a_flush_fail_each_on_its_own_among_replies_that_stand() {
    let nowhere = BatchLogPlace { directory: "/nonexistent/atoll".into(), boot_id: [1; 16] };
    for form in [ReplyForm::Simple, ReplyForm::Structured, ReplyForm::Extended] {
        let world = world_of(ThrottleLimits::default(), Some(nowhere.clone()), None);
        let mut client = world.connect(|options| options.replies = form);
        client.write(0, &[1; 4096]);
        world.fail("append", libc::ENOSPC);
        // One packet, so that the replies are gathered; at the end a write that needs no owner change, but may overwrite one that
        // is not kept.
        let (data, mut bytes) = ([2; 4096], Vec::new());
        let mut add = |command: u16, cookie: u64, offset: u64, payload: &[u8]| {
            if form == ReplyForm::Extended {
                bytes.extend(extended_bytes(command, if command == WRITE { PAYLOAD_LEN } else { 0 }, cookie, offset, 4096));
            } else {
                bytes.extend(request_bytes(command, 0, cookie, offset, 4096));
            }
            bytes.extend_from_slice(payload);
        };
        add(READ, 1, 0, &[]);
        add(WRITE, 2, 8192, &data);
        add(READ, 3, 0, &[]);
        add(WRITE, 4, 16384, &data);
        add(WRITE, 5, 8192, &data);
        add(READ, 6, 8192, &[]);
        client.stream.write_all(&bytes).unwrap();
        for (cookie, offset, is_read) in
            [(1, 0, true), (2, 8192, false), (3, 0, true), (4, 16384, false), (5, 8192, false), (6, 8192, true)]
        {
            let answer = client.answer_to(offset, is_read.then_some(4096));
            assert_eq!((answer.cookie, answer.error), (cookie, if is_read { 0 } else { ENOSPC }), "{form:?}");
        }
        // What failed is not forgotten, and nobody else suffers from it.
        assert_eq!(client.call(WRITE, 0, 16384, 4096, &data).error, ENOSPC);
        client.write(0, &[3; 4096]);
        assert_eq!(client.call(WRITE, 0, 32768, 4096, &data).error, ENOSPC);
        client.write(0, &[4; 4096]);
        world.faults.set_plan(FaultPlan::default());
        client.write(16384, &data);
        client.write(32768, &data);
    }
}

#[test]
fn a_request_may_arrive_in_pieces() {
    let world = world();
    let mut client = world.connect(|_| {});
    let mut bytes = request_bytes(WRITE, 0, 5, 8192, 3000);
    bytes.extend([7; 3000]);
    bytes.extend(request_bytes(READ, 0, 6, 8192, 3000));
    for piece in bytes.chunks(11) {
        client.stream.write_all(piece).unwrap();
    }
    assert_eq!(client.answer(None).cookie, 5);
    assert_eq!(client.answer(Some((8192, 3000))).data, [7; 3000]);
}

#[test]
fn a_long_write_is_one_request_however_it_arrives_and_fails_as_one() {
    let world = world();
    let mut client = world.connect(|_| {});
    let length = (1 << 20) + 777;
    for (round, piece_bytes) in [7_001usize, 131_085, 300_000, 4 << 20].into_iter().enumerate() {
        let payload: Vec<u8> = (0..length).map(|at| (at * 13 + round) as u8).collect();
        let operations = world.device.stats().write_operations;
        let mut bytes = request_bytes(WRITE, 0, 1, 12_291, length as u32);
        bytes.extend(&payload);
        bytes.extend(request_bytes(READ, 0, 2, 12_291, length as u32));
        let mut writer = client.stream.try_clone().unwrap();
        let sender = std::thread::spawn(move || bytes.chunks(piece_bytes).for_each(|piece| writer.write_all(piece).unwrap()));
        assert_eq!((client.answer(None).cookie, world.device.stats().write_operations), (1, operations + 1));
        let read = client.answer(Some((12_291, length)));
        assert!(read.data == payload, "pieces of {piece_bytes}");
        sender.join().unwrap();
    }
    world.fail_after(2, "write", libc::ENOSPC);
    assert_eq!(client.call(WRITE, 0, 0, 2 << 20, &vec![1; 2 << 20]).error, ENOSPC);
    world.faults.set_plan(FaultPlan::default());
    client.write(0, &vec![2; 2 << 20]);
    assert!(client.read(0, 2 << 20) == vec![2; 2 << 20]);
}

#[test]
fn errors_are_those_of_the_protocol_and_the_connection_stays_in_step() {
    let world = world();
    let mut client = world.connect(|_| {});
    let page = [1u8; 4096];
    let end = SIZE_BYTES;
    let cases = [
        (WRITE, 0, end, 4096, &page[..], ENOSPC),
        (WRITE, 0, end - 4095, 4096, &page, ENOSPC),
        (WRITE, 0, u64::MAX - 511, 4096, &page, ENOSPC),
        (WRITE_ZEROES, 0, end - 1, 2, &[], ENOSPC),
        (READ, 0, end - 1, 2, &[], EINVAL),
        (READ, 0, u64::MAX - 511, 512, &[], EINVAL),
        (READ, 0, 0, u64::from(NBD_REQUEST_BYTES_MAX) + 1, &[], EOVERFLOW),
        (TRIM, 0, end, 1, &[], EINVAL),
        (BLOCK_STATUS, 0, end, 1, &[], EINVAL),
        (BLOCK_STATUS, 0, 0, 0, &[], EINVAL),
        (CACHE, 0, end, 1, &[], EINVAL),
        (CACHE, REQ_ONE, 0, 4096, &[], EINVAL),
        (8, 0, 0, 4096, &[], EINVAL),
        (999, 0, 0, 4096, &[], EINVAL),
        (WRITE_ZEROES, FAST_ZERO, end, 4096, &[], ENOSPC),
        (WRITE, FAST_ZERO, 0, 4096, &page, EINVAL),
        (WRITE, DF, 0, 4096, &page, EINVAL),
        (WRITE, 1 << 5, 0, 4096, &page, EINVAL),
        (READ, NO_HOLE, 0, 4096, &[], EINVAL),
        (FLUSH, REQ_ONE, 0, 0, &[], EINVAL),
        (TRIM, 1 << 15, 0, 4096, &[], EINVAL),
    ];
    for (command, flags, offset, length, payload, expected) in cases {
        let answer = client.call(command, flags, offset, length, payload);
        assert_eq!(answer.error, expected, "command {command} flags {flags:#x} at {offset}+{length}: {}", answer.message);
        assert!(!answer.message.is_empty());
    }
    assert_eq!(client.read(0, 4096), [0; 4096], "nothing of the refused writes is there");
    for (command, offset) in [(READ, 0), (WRITE, 0), (TRIM, end), (WRITE_ZEROES, end), (FLUSH, 0)] {
        assert_eq!(client.call(command, FUA, offset, 0, &[]).error, 0, "a length of zero is no error");
    }
    client.send(DISC, 0, 0, 0, &[]);
    assert_eq!(client.expect_closed().reason, ServeEndReason::Disconnect);
}

#[test]
fn a_flag_that_was_not_advertised_does_not_stop_anybody() {
    // nbdkit 1.32.5 and 1.42.3 with the file plugin abort on WRITE_ZEROES with FAST_ZERO.
    let world = world();
    for form in [ReplyForm::Simple, ReplyForm::Structured, ReplyForm::Extended] {
        let mut client = world.connect(|options| {
            options.read_only = true;
            options.replies = form;
        });
        assert_eq!(client.call(WRITE_ZEROES, FAST_ZERO, 0, 4096, &[]).error, EINVAL);
        assert_eq!(client.call(WRITE_ZEROES, FAST_ZERO | NO_HOLE, 0, 4096, &[]).error, EINVAL);
        assert_eq!(client.read(0, 4096), [0; 4096]);
    }
    let mut client = world.connect(|_| {});
    client.write(0, &[1; 4096]);
}

#[test]
fn fast_zeroes_zero_whole_slots_and_are_refused_where_they_would_write() {
    let world = world();
    let mut client = world.connect(|_| {});
    client.write(0, &vec![7; 1 << 20]);
    for (flags, offset, length) in [
        (FAST_ZERO | NO_HOLE, 0, 65_536),
        (FAST_ZERO, 1, 4095),
        (FAST_ZERO, 4096, 8191),
        (FAST_ZERO, 100, 10),
        (FAST_ZERO | FUA, 512, 65_536),
    ] {
        let answer = client.call(WRITE_ZEROES, flags, offset, length, &[]);
        assert_eq!(answer.error, ENOTSUP, "{flags:#x} at {offset}+{length}");
    }
    assert_eq!(client.read(0, 1 << 20), vec![7; 1 << 20], "nothing was changed by what was refused");
    assert_eq!(client.call(WRITE_ZEROES, FAST_ZERO, 4096, 8192, &[]).error, 0);
    assert_eq!(client.call(WRITE_ZEROES, FAST_ZERO | FUA, 32 << 20, 32 << 20, &[]).error, 0);
    let content = client.read(0, 16_384);
    assert!(content[..4096].iter().chain(&content[12_288..]).all(|byte| *byte == 7));
    assert!(content[4096..12_288].iter().all(|byte| *byte == 0));
    // Without the flag nothing is ever refused for being slow.
    for (flags, offset, length) in [(0, 1, 4095), (NO_HOLE, 100, 10), (NO_HOLE, 0, 65_536), (0, 4096, 8191)] {
        assert_eq!(client.call(WRITE_ZEROES, flags, offset, length, &[]).error, 0);
    }
}

#[test]
fn a_prefetch_changes_nothing_and_knows_its_flags_and_bounds() {
    let world = world();
    for form in [ReplyForm::Simple, ReplyForm::Structured, ReplyForm::Extended] {
        let mut client = world.connect(|options| options.replies = form);
        client.write(5000, &[3; 9000]);
        for (offset, length) in [(0, 4096), (5001, 77), (0, SIZE_BYTES), (SIZE_BYTES, 0), (SIZE_BYTES - 1, 1)] {
            assert_eq!(client.call(CACHE, 0, offset, length, &[]).error, 0);
            assert_eq!(client.call(CACHE, FUA, offset, length, &[]).error, 0);
        }
        for flag in [NO_HOLE, DF, REQ_ONE, FAST_ZERO, 1 << 6, 1 << 15] {
            assert_eq!(client.call(CACHE, flag, 0, 4096, &[]).error, EINVAL);
        }
        assert_eq!(client.call(CACHE, 0, SIZE_BYTES - 1, 2, &[]).error, EINVAL);
        assert_eq!(client.read(5000, 9000), [3; 9000]);
    }
    assert_eq!(world.connect(|options| options.read_only = true).call(CACHE, 0, 0, 4096, &[]).error, 0);
}

#[test]
fn without_chunks_errors_are_numbers_and_df_is_unknown() {
    let world = world();
    let mut client = world.connect(|options| {
        options.replies = ReplyForm::Simple;
        options.contexts.clear();
    });
    assert_eq!(client.call(READ, DF, 0, 4096, &[]).error, EINVAL);
    assert_eq!(client.call(BLOCK_STATUS, 0, 0, 4096, &[]).error, EINVAL);
    assert_eq!(client.call(WRITE, 0, SIZE_BYTES, 512, &[0; 512]).error, ENOSPC);
    client.write(0, &[3; 512]);
}

#[test]
fn extended_requests_say_what_their_length_is() {
    let world = world();
    let mut client = world.connect(|options| options.replies = ReplyForm::Extended);
    client.write(4096, &[5; 8192]);
    assert_eq!(client.read(4000, 300), [&[0; 96][..], &[5; 204]].concat());
    // A write without the flag has its payload all the same (QEMU's client); others with it have one, which is consumed.
    let cookie = client.send_as_is(WRITE, 0, 0, 4096, &[6; 4096]);
    let answer = client.answer_to(0, None);
    assert_eq!((answer.cookie, answer.error), (cookie, 0));
    assert_eq!(client.read(0, 4096), [6; 4096]);
    for command in [READ, FLUSH, TRIM, CACHE, WRITE_ZEROES, 8, 999] {
        for length in [1usize, 100, 300_000] {
            client.send_as_is(command, PAYLOAD_LEN, 0, length as u64, &vec![9; length]);
            let answer = client.answer_to(0, None);
            assert_eq!(answer.error, EINVAL, "command {command} with {length} bytes");
        }
    }
    // Lengths beyond 32 bits are compared, not cut.
    for (command, error) in [(READ, EINVAL), (TRIM, EINVAL), (CACHE, EINVAL), (BLOCK_STATUS, EINVAL), (WRITE_ZEROES, ENOSPC)] {
        for length in [(1 << 32) + 4096, 1 << 63, u64::MAX] {
            client.send_as_is(command, 0, 4096, length, &[]);
            assert_eq!(client.answer_to(4096, None).error, error, "command {command} of {length}");
        }
    }
    assert_eq!(client.call(FLUSH, FUA, 0, 0, &[]).chunks, [0]);
    assert_eq!(client.read(4096, 8192), [5; 8192]);
    // More than may be sent: the connection ends, and no other.
    client.send_as_is(TRIM, PAYLOAD_LEN, 0, 1 << 40, &[]);
    assert_eq!(client.answer_to(0, None).error, EINVAL);
    assert_eq!(client.expect_closed().reason, ServeEndReason::Error);
    let mut other = world.connect(|options| options.replies = ReplyForm::Extended);
    other.stream.write_all(&request_bytes(READ, 0, 1, 0, 512)).unwrap();
    other.stream.write_all(&[0; 4]).unwrap();
    assert_eq!(other.expect_closed().reason, ServeEndReason::Error, "a compact request is out of step there");
}

#[test]
fn a_status_tells_each_context_once_or_those_that_were_chosen() {
    let world = world();
    world.device.write(0, &[1; 16_384]).unwrap();
    let before = world.freeze();
    world.device.write(8192, &[2; 4096]).unwrap();
    world.device.discard(12_288, 4096).unwrap();
    let contexts = || {
        vec![
            MetaContext { id: 5, kind: MetaContextKind::Allocation },
            MetaContext { id: 9, kind: MetaContextKind::Depth },
            MetaContext { id: 2, kind: MetaContextKind::ChangedSince(before.clone()) },
        ]
    };
    for form in [ReplyForm::Structured, ReplyForm::Extended] {
        let mut client = world.connect(|options| {
            options.replies = form;
            options.contexts = contexts();
        });
        let answer = client.call(BLOCK_STATUS, 0, 0, 65_536, &[]);
        let expected = [
            (5, vec![(12_288, 0), (53_248, 3)]),
            (9, vec![(12_288, 1), (53_248, 0)]),
            // The layer is still the same: writes in place are no change of owner, so nothing has changed since that map.
            (2, vec![(65_536, 0)]),
        ];
        assert_eq!(answer.statuses, expected);
        let one = client.call(BLOCK_STATUS, REQ_ONE, 4096, 65_536, &[]);
        assert!(one.statuses.iter().all(|(_, extents)| extents.len() == 1 && extents[0].0 <= 65_536));
    }
    let mut client = world.connect(|options| {
        options.replies = ReplyForm::Extended;
        options.contexts = contexts();
    });
    let filter = |length: u64, ids: &[u32]| {
        let mut payload = length.to_be_bytes().to_vec();
        ids.iter().for_each(|id| payload.extend(id.to_be_bytes()));
        payload
    };
    let mut ask = |payload: &[u8]| {
        client.send_as_is(BLOCK_STATUS, PAYLOAD_LEN, 0, payload.len() as u64, payload);
        client.answer_to(0, None)
    };
    assert_eq!(ask(&filter(65_536, &[9])).statuses, [(9, vec![(12_288, 1), (53_248, 0)])]);
    assert_eq!(ask(&filter(4096, &[2, 5])).statuses.iter().map(|status| status.0).collect::<Vec<_>>(), [5, 2]);
    for bad in [filter(4096, &[9, 9]), filter(4096, &[7]), filter(4096, &[]), filter(1 << 40, &[9]), vec![1; 13], vec![], vec![0; 300_000]]
    {
        assert_eq!(ask(&bad).error, EINVAL, "{} bytes", bad.len());
    }
    assert_eq!(ask(&filter(SIZE_BYTES, &[5])).error, 0);
}

#[test]
fn a_read_only_export_refuses_changes_and_consumes_their_payload() {
    let world = world();
    let mut client = world.connect(|options| options.read_only = true);
    assert_eq!(client.call(WRITE, FUA, 0, 4096, &[1; 4096]).error, EPERM);
    assert_eq!(client.call(WRITE, 0, 0, 1 << 20, &vec![1; 1 << 20]).error, EPERM);
    assert_eq!(client.call(TRIM, 0, 0, 4096, &[]).error, EPERM);
    assert_eq!(client.call(WRITE_ZEROES, NO_HOLE, 0, 4096, &[]).error, EPERM);
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).error, 0);
    assert_eq!(client.read(0, 4096), [0; 4096]);
}

#[test]
fn zeros_trims_and_status_agree_with_what_is_read() {
    let world = world();
    let mut client = world.connect(|_| {});
    client.write(0, &vec![5; 1 << 20]);
    assert_eq!(client.call(WRITE_ZEROES, 0, 100, 5000, &[]).error, 0);
    assert_eq!(client.call(TRIM, FUA, 65_536, 65_536, &[]).error, 0);
    assert_eq!(client.call(WRITE_ZEROES, NO_HOLE | FUA, 8 << 20, 2 << 20, &[]).error, 0);
    assert_eq!(client.call(WRITE_ZEROES, 0, 16 << 20, 48 << 20, &[]).error, 0);
    let content = client.read(0, 1 << 20);
    for (at, byte) in content.iter().enumerate() {
        let zero = (100..5100).contains(&at) || (65_536..131_072).contains(&at);
        assert_eq!(*byte, if zero { 0 } else { 5 }, "at {at}");
    }
    let answer = client.call(BLOCK_STATUS, FUA, 0, SIZE_BYTES, &[]);
    assert_eq!(answer.chunks, [5]);
    let mut at = 0u64;
    for (length, state) in &answer.extents {
        assert!(*length > 0);
        if state & 2 != 0 {
            let step = (*length).min(1 << 20);
            assert!(client.read(at, step).iter().all(|byte| *byte == 0), "{at} is said to be zero");
        }
        at += *length;
    }
    assert_eq!(at, SIZE_BYTES);
    let one = client.call(BLOCK_STATUS, REQ_ONE, 4096, 1 << 20, &[]);
    assert_eq!(one.extents.len(), 1);
    assert!(one.extents[0].0 <= 1 << 20);
}

#[test]
fn holes_come_back_as_holes_unless_one_chunk_is_asked_for() {
    let world = world();
    let mut client = world.connect(|_| {});
    client.write(1 << 20, &[9; 4096]);
    let answer = client.call(READ, 0, 0, 2 << 20, &[]);
    assert_eq!(answer.chunks, [2, 1, 2]);
    let whole = client.call(READ, DF, 0, 2 << 20, &[]);
    assert_eq!(whole.chunks, [1]);
    assert_eq!(answer.data, whole.data);
}

#[test]
fn a_write_that_is_too_large_ends_its_connection_and_no_other() {
    let world = world();
    let mut other = world.connect(|_| {});
    let mut client = world.connect(|_| {});
    client.send(WRITE, 0, 0, u64::from(u32::MAX), &[]);
    assert_eq!(client.answer(None).error, EINVAL);
    assert_eq!(client.expect_closed().reason, ServeEndReason::Error);
    other.write(0, &[1; 512]);
}

#[test]
fn garbage_ends_the_connection() {
    let world = world();
    let mut client = world.connect(|_| {});
    client.stream.write_all(&[0x55; 28]).unwrap();
    assert_eq!(client.expect_closed().reason, ServeEndReason::Error);
}

#[test]
fn a_client_that_vanishes_is_told_apart_from_one_that_says_goodbye() {
    let world = world();
    let client = world.connect(|_| {});
    drop(client.stream);
    assert_eq!(client.end.recv().unwrap().reason, ServeEndReason::Eof);
    let mut client = world.connect(|_| {});
    client.stream.write_all(&request_bytes(WRITE, 0, 1, 0, 4096)).unwrap();
    drop(client.stream);
    let end = client.end.recv().unwrap();
    assert_eq!((end.reason, end.message.as_str()), (ServeEndReason::Error, "the client went away in the middle of a request"));
}

#[test]
fn requests_before_a_goodbye_are_finished_and_answered() {
    let world = world();
    let mut client = world.connect(|_| {});
    let mut bytes = Vec::new();
    for index in 0..20u64 {
        bytes.extend(request_bytes(WRITE, FUA, index, index * 4096, 4096));
        bytes.extend([1; 4096]);
    }
    bytes.extend(request_bytes(DISC, 0, 99, 0, 0));
    client.stream.write_all(&bytes).unwrap();
    for _ in 0..20 {
        assert_eq!(client.answer(None).error, 0);
    }
    assert_eq!(client.expect_closed().reason, ServeEndReason::Disconnect);
}

#[test]
fn a_read_that_waits_for_its_disk_does_not_hold_up_others_and_reads_wait_side_by_side() {
    let world = world();
    let mut client = world.connect(|options| options.replies = ReplyForm::Simple);
    for index in 0..4u64 {
        client.write(index * 8192, &[index as u8 + 1; 8192]);
    }
    // Two reads meet their disk, and it takes its time; everything after them is at hand.
    world.hold("read", 2);
    let mut bytes = request_bytes(READ, 0, 1, 0, 8192);
    bytes.extend(request_bytes(READ, 0, 2, 8192, 8192));
    client.stream.write_all(&bytes).unwrap();
    world.wait_injected(2);
    // Its answer is the first: both of the others wait, and neither for the other.
    assert_eq!(client.read(16_384, 8192), [3; 8192]);
    world.let_go();
    let mut late: Vec<(u64, Vec<u8>)> = (0..2).map(|_| client.answer(Some((0, 8192)))).map(|answer| (answer.cookie, answer.data)).collect();
    late.sort();
    assert_eq!(late, [(1, vec![1; 8192]), (2, vec![2; 8192])]);
}

/// The ring's thread must not wait for the client while the kernel has reads of it: a snapshot waits for those.
#[test]
fn a_client_that_takes_no_answers_holds_up_no_snapshot() {
    for world in worlds() {
        let mut client = world.connect(|_| {});
        let data = vec![5; 8 << 20];
        client.write(0, &data);
        // Far more than the sockets hold.
        let bytes: Vec<u8> = (0..120u64).flat_map(|index| request_bytes(READ, DF, index, index * 65_536, 262_144)).collect();
        client.stream.write_all(&bytes).unwrap();
        let mut other = world.connect(|_| {});
        for index in 0..50 {
            // What a snapshot does first.
            world.device.read_barrier();
            other.write((index % 3) * 4096, &[5; 4096]);
        }
        let mut cookies: Vec<u64> = (0..120)
            .map(|_| {
                // The cookie comes before the data: which read it answers is found out from it.
                let answer = client.answer_to_any(262_144);
                assert!(answer.data == data[..262_144]);
                answer.cookie
            })
            .collect();
        cookies.sort_unstable();
        assert_eq!(cookies, (0..120).collect::<Vec<_>>());
    }
}

#[test]
fn a_snapshot_between_reads_that_wait_takes_its_turn() {
    for world in worlds() {
        let mut client = world.connect(|_| {});
        client.write(0, &[6; 1 << 20]);
        let store: Arc<dyn Store> = world.faults.clone();
        let next = LayerSpec { alias: 2, id: LayerId([2; 16]), store };
        next.store.create_layer(next.id).unwrap();
        let mut swapping = None;
        for round in 0..60u64 {
            let bytes: Vec<u8> = (0..64u64).flat_map(|index| request_bytes(READ, DF, index, (index + round) * 4096, 4096)).collect();
            client.stream.write_all(&bytes).unwrap();
            if round == 20 {
                let (device, next) = (world.device.clone(), next.clone());
                swapping = Some(std::thread::spawn(move || Device::swap(&[(device, next)], Duration::from_secs(300)).map(drop)));
            }
            for _ in 0..64 {
                assert_eq!(client.answer_to_any(4096).data, [6; 4096]);
            }
        }
        swapping.unwrap().join().unwrap().unwrap();
        // Parts of two layers.
        client.write(8192, &[7; 4096]);
        assert_eq!(client.read(4096, 12_288), [[6; 4096], [7; 4096], [6; 4096]].concat());
    }
}

#[test]
fn a_slow_flush_does_not_hold_up_other_requests_of_its_connection() {
    let world = world();
    let mut client = world.connect(|_| {});
    client.write(0, &[1; 4096]);
    // The read behind the sync must not wait for it.
    world.hold("sync", 1);
    let flush = client.send(FLUSH, 0, 0, 0, &[]);
    world.wait_injected(1);
    let read = client.send(READ, 0, 0, 4096, &[]);
    assert_eq!(client.answer(Some((0, 4096))).cookie, read);
    world.let_go();
    let answer = client.answer(None);
    assert_eq!((answer.cookie, answer.error), (flush, 0));
}

#[test]
fn latencies_count_every_request_once_and_hold_the_wait_for_a_slow_backend() {
    let world = world();
    let mut client = world.connect(|_| {});
    client.write(0, &[1; 8192]);
    client.write(8192, &vec![2; 1 << 20]);
    assert_eq!(client.read(0, 4096), [1; 4096]);
    assert_eq!(client.call(TRIM, 0, 4096, 4096, &[]).error, 0);
    assert_eq!(client.call(WRITE_ZEROES, 0, 0, 4096, &[]).error, 0);
    assert_eq!(client.call(FLUSH, 0, 0, 0, &[]).error, 0);
    assert_eq!(client.call(CACHE, 0, 0, 4096, &[]).error, 0);
    let counted = |latency: &crate::Latency| latency.counts().counts.iter().sum::<u64>();
    let latencies = world.device.latencies();
    let by_kind = [&latencies.read, &latencies.write, &latencies.discard, &latencies.flush, &latencies.backend_sync].map(counted);
    assert_eq!(by_kind, [1, 2, 2, 1, 1]);
    let quick_reads = latencies.backend_read.counts();

    // The threads of the requests before may still be putting things away.
    while world.device.stats().requests_waiting > 0 {
        std::thread::yield_now();
    }
    world.hold("read", 1);
    let read = client.send(READ, 0, 8192, 4096, &[]);
    world.wait_injected(1);
    let stats = world.device.stats();
    assert_eq!((stats.requests_waiting, stats.backend_reads_running, stats.backend_syncs_running), (1, 1, 0));
    let held_at = Instant::now();
    std::thread::sleep(Duration::from_millis(20));
    let held = held_at.elapsed();
    world.let_go();
    assert_eq!(client.answer(Some((8192, 4096))).cookie, read);
    assert_eq!(counted(&latencies.read), 2);
    for latency in [&latencies.read, &latencies.backend_read] {
        assert!(u128::from(latency.counts().sum_nanoseconds) >= held.as_nanos());
    }
    assert_eq!(counted(&latencies.backend_read), quick_reads.counts.iter().sum::<u64>() + 1);
    while world.device.stats().requests_waiting > 0 {
        std::thread::yield_now();
    }
}

#[test]
fn a_full_backend_is_enospc_and_a_failed_sync_is_eio_for_everybody() {
    let world = world();
    let mut first = world.connect(|_| {});
    let mut second = world.connect(|_| {});
    world.fail("write", libc::ENOSPC);
    assert_eq!(first.call(WRITE, 0, 0, 4096, &[1; 4096]).error, ENOSPC);
    world.faults.set_plan(FaultPlan::default());
    first.write(0, &[1; 4096]);
    world.fail("sync", libc::EIO);
    assert_eq!(first.call(FLUSH, 0, 0, 0, &[]).error, 5);
    world.faults.set_plan(FaultPlan::default());
    assert_eq!(second.call(READ, 0, 0, 4096, &[]).error, 5, "a poisoned device stops on every connection");
    assert_eq!(second.call(FLUSH, 0, 0, 0, &[]).error, 5);
}

#[test]
fn closing_the_device_answers_shutdown_and_ends_the_connection() {
    let world = world();
    let mut client = world.connect(|_| {});
    client.write(0, &[1; 4096]);
    world.device.close().unwrap();
    assert_eq!(client.call(READ, 0, 0, 4096, &[]).error, ESHUTDOWN);
    let end = client.expect_closed();
    assert_eq!((end.reason, end.message.as_str()), (ServeEndReason::Closed, "the device was closed"));
}

#[test]
fn closing_the_engine_ends_everything_also_in_the_middle_of_requests() {
    let world = world();
    let mut client = world.connect(|_| {});
    client.write(0, &[1; 4096]);
    // Half a large write: the connection's thread waits for the rest.
    client.stream.write_all(&request_bytes(WRITE, 0, 1, 0, 1 << 20)).unwrap();
    client.stream.write_all(&[1; 1000]).unwrap();
    world.engine.close().unwrap();
    assert_eq!(client.end.recv().unwrap().reason, ServeEndReason::Closed);
    assert!(world.engine.accept(&world.listener).unwrap().is_none());
    assert!(!world.directory.join("nbd.sock").exists());
    assert_eq!(world.engine.stats().connections, 0);
}

#[test]
fn a_listener_replaces_a_stale_socket_file_but_no_live_one_and_nothing_else() {
    let world = world();
    let path = world.directory.join("nbd.sock");
    assert_eq!(world.engine.listen_unix(&path, 0o600, None, None).err().unwrap().code, "ADDRESS_IN_USE");
    let stale = world.directory.join("stale.sock");
    drop(std::os::unix::net::UnixListener::bind(&stale).unwrap());
    let listener = world.engine.listen_unix(&stale, 0o640, None, None).unwrap();
    use std::os::unix::fs::PermissionsExt;
    assert_eq!(std::fs::metadata(&stale).unwrap().permissions().mode() & 0o777, 0o640);
    listener.close();
    assert!(!stale.exists());
    let file = world.directory.join("file");
    std::fs::write(&file, "kept").unwrap();
    assert!(world.engine.listen_unix(&file, 0o600, None, None).is_err());
    assert_eq!(std::fs::read_to_string(&file).unwrap(), "kept");
}

#[test]
fn connections_are_driven_by_commands_until_they_serve() {
    let world = world();
    let listener = world.engine.listen_tcp("127.0.0.1", 0).unwrap();
    let crate::Endpoint::Tcp(address) = listener.endpoint().clone() else { panic!("not a TCP endpoint") };
    let mut stream = std::net::TcpStream::connect(address).unwrap();
    let connection = world.engine.accept(&listener).unwrap().unwrap();
    assert!(connection.peer().starts_with("127.0.0.1:"));
    let (sender, results) = channel();
    let read = |length: usize, timeout_ms: Option<u64>| {
        let sender = sender.clone();
        connection.read(length, timeout_ms.map(std::time::Duration::from_millis), move |result| {
            sender.send(result.map_err(|error| error.code)).unwrap();
        });
        results.recv().unwrap()
    };
    stream.write_all(b"hello").unwrap();
    assert_eq!(read(5, None), Ok(Some(b"hello".to_vec())));
    assert_eq!(read(1, Some(20)), Err("READ_TIMEOUT"));
    assert_eq!(read(1 << 20, None), Err("ARGUMENT_INVALID"));
    let (done, written) = channel();
    connection.write(b"welcome".to_vec(), move |result| done.send(result.is_ok()).unwrap());
    let mut bytes = [0; 7];
    stream.read_exact(&mut bytes).unwrap();
    assert_eq!((&bytes, written.recv().unwrap()), (b"welcome", true));
    stream.write_all(b"x").unwrap();
    drop(stream);
    assert_eq!(read(2, None), Ok(None));
    connection.close();
    connection.wait_ended();
    assert_eq!(read(1, None), Err("CONNECTION_CLOSED"));
}
