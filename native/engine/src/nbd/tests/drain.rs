//! Connections that are drained: what is in flight is finished, what comes is answered ESHUTDOWN, and it ends.
use super::*;

#[test]
fn requests_that_come_while_a_connection_drains_are_answered_shutdown_and_then_it_ends() {
    let world = world();
    let mut client = world.connect(|_| {});
    client.write(0, &[1; 4096]);
    // Something is in flight for as long as the test wants: a flush whose sync waits.
    world.hold("sync", 1);
    let flush = client.send(FLUSH, 0, 0, 0, &[]);
    world.wait_injected(1);
    client.connection.drain();
    for (command, length, payload) in
        [(READ, 4096, 0), (WRITE, 4096, 4096), (WRITE, 1 << 20, 1 << 20), (BLOCK_STATUS, 4096, 0), (TRIM, 4096, 0)]
    {
        assert_eq!(client.call(command, 0, 0, length, &vec![2; payload]).error, ESHUTDOWN);
    }
    world.let_go();
    let answer = client.answer(None);
    assert_eq!((answer.cookie, answer.error), (flush, 0), "what was in flight is finished");
    assert_eq!(client.expect_closed().reason, ServeEndReason::Closed);
    let mut again = world.connect(|_| {});
    assert_eq!(again.read(0, 4096), [1; 4096], "nothing of what was refused was done");
}

#[test]
fn a_client_that_never_stops_asking_does_not_keep_a_drain_from_its_end() {
    let world = world();
    let mut client = world.connect(|_| {});
    client.write(0, &[1; 4096]);
    // It cannot end before it was asked: a flush is in flight until then.
    world.hold("sync", 1);
    let flush = client.send(FLUSH, 0, 0, 0, &[]);
    world.wait_injected(1);
    client.connection.drain();
    client.connection.drain();
    assert_eq!(client.call(READ, 0, 0, 512, &[]).error, ESHUTDOWN);
    world.let_go();
    assert_eq!(client.answer(None).cookie, flush);
    let started_at = std::time::Instant::now();
    while client.stream.write_all(&request_bytes(READ, 0, 1, 0, 512)).is_ok() {
        let mut head = [0; 20];
        if client.stream.read_exact(&mut head).is_err() {
            break;
        }
        let length = u32::from_be_bytes(head[16..20].try_into().unwrap());
        let payload = client.take(length as usize);
        assert_eq!(payload[..4], ESHUTDOWN.to_be_bytes());
    }
    assert!(started_at.elapsed() < std::time::Duration::from_secs(300));
    client.connection.wait_ended();
}

#[test]
fn a_drained_connection_answers_what_it_has_and_ends() {
    let world = world();
    let mut client = world.connect(|_| {});
    client.write(0, &[1; 4096]);
    client.connection.drain();
    client.connection.wait_ended();
    let end = client.expect_closed();
    assert_eq!(end.reason, ServeEndReason::Closed);
}

#[test]
fn a_throttled_connection_is_slow_but_can_be_drained_at_once() {
    let world = world_with(ThrottleLimits { bytes_per_second: 1, burst_bytes: 4096, ..ThrottleLimits::default() });
    let mut client = world.connect(|_| {});
    client.write(0, &[1; 4096]);
    let write = client.send(WRITE, 0, 4096, 4096, &[2; 4096]);
    // A flush costs nothing at the throttle and passes the write that waits there.
    let flush = client.send(FLUSH, 0, 0, 0, &[]);
    assert_eq!(client.answer(None).cookie, flush);
    client.connection.drain();
    let answer = client.answer(None);
    assert_eq!((answer.cookie, answer.error), (write, ESHUTDOWN));
    assert_eq!(client.expect_closed().reason, ServeEndReason::Closed);
    let mut again = world.connect(|_| {});
    world.device.set_throttle(ThrottleLimits::default());
    assert_eq!(again.read(0, 8192)[4095..4097], [1, 0]);
}
