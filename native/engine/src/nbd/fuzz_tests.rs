//! Random requests in every form. ATOLL_FUZZ_SEED replays a run, ATOLL_FUZZ_ITERATIONS makes it longer (default 400 per form).
use super::test_harness::{
    BLOCK_STATUS, CACHE, Client, DF, DISC, FAST_ZERO, FLUSH, FORMS, FUA, NO_HOLE, PAYLOAD_LEN, READ, REQ_ONE, SIZE_BYTES, TRIM, WRITE,
    WRITE_ZEROES, World, extended_bytes, request_bytes, worlds,
};
use super::{MetaContext, MetaContextKind, ReplyForm};
use atoll_map::{FrozenMap, HOLE};
use std::io::{Read, Write};
use std::net::Shutdown;
use std::time::Duration;

/// What the model covers: small, so that requests meet.
const MODEL_BYTES: usize = 1 << 20;

/// splitmix64: small, and the same everywhere.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        mixed ^ (mixed >> 31)
    }
    fn below(&mut self, limit: u64) -> u64 {
        self.next() % limit
    }
    fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.below(of.len() as u64) as usize]
    }
}

fn seed() -> u64 {
    let chosen = std::env::var("ATOLL_FUZZ_SEED").ok().and_then(|text| text.parse().ok());
    let seed = chosen.unwrap_or(20_261_121);
    println!("ATOLL_FUZZ_SEED={seed}");
    seed
}

fn iterations() -> u64 {
    std::env::var("ATOLL_FUZZ_ITERATIONS").ok().and_then(|text| text.parse().ok()).unwrap_or(400)
}

fn connect(world: &World, form: ReplyForm) -> Client {
    let base = FrozenMap::uniform(world.engine.cache(), HOLE);
    let client = world.connect(|options| {
        options.replies = form;
        options.contexts = match form {
            ReplyForm::Simple => Vec::new(),
            _ => vec![
                MetaContext { id: 1, kind: MetaContextKind::Allocation },
                MetaContext { id: 2, kind: MetaContextKind::Depth },
                MetaContext { id: 3, kind: MetaContextKind::ChangedSince(base) },
            ],
        };
    });
    client.stream.set_read_timeout(Some(Duration::from_secs(300))).unwrap();
    client
}

/// A range inside the model, of any alignment, often at a border of slots.
fn range(random: &mut Random) -> (u64, u64) {
    let unit = random.pick(&[1, 512, 4096, 4096, 65_536]);
    let offset = random.below(MODEL_BYTES as u64 / unit) * unit;
    let limit = random.pick(&[4096, 20_000, 300_000]).min(MODEL_BYTES as u64 - offset);
    let length = random.below(limit + 1);
    (offset, if random.below(2) == 0 { length } else { length / unit * unit })
}

#[test]
fn random_requests_do_what_a_plain_array_does() {
    let seed = seed();
    for (form, world) in FORMS.into_iter().flat_map(|form| worlds().into_iter().map(move |world| (form, world))) {
        let mut random = Random(seed);
        let mut client = connect(&world, form);
        let mut model = vec![0u8; MODEL_BYTES];
        for step in 0..iterations() {
            let what = format!("seed {seed} {form:?} step {step}");
            let (offset, length) = range(&mut random);
            let part = offset as usize..(offset + length) as usize;
            let fua = if random.below(16) == 0 { FUA } else { 0 };
            match random.below(8) {
                0 | 1 => {
                    let fill = random.next() as u8;
                    let payload: Vec<u8> = (0..length).map(|at| fill.wrapping_add((at >> 9) as u8)).collect();
                    assert_eq!(client.call(WRITE, fua, offset, length, &payload).error, 0, "{what}");
                    model[part].copy_from_slice(&payload);
                }
                2 | 3 => {
                    let df = if form != ReplyForm::Simple && random.below(2) == 0 { DF } else { 0 };
                    let answer = client.call(READ, fua | df, offset, length, &[]);
                    assert_eq!(answer.error, 0, "{what}");
                    assert!(answer.data == model[part], "{what}: {length} bytes at {offset} differ");
                }
                4 => {
                    let flags = random.pick(&[0, NO_HOLE, FAST_ZERO, NO_HOLE | FAST_ZERO]) | fua;
                    match client.call(WRITE_ZEROES, flags, offset, length, &[]).error {
                        0 => model[part].fill(0),
                        95 => assert!(flags & FAST_ZERO != 0, "{what}"),
                        other => panic!("{what}: error {other}"),
                    }
                }
                5 => {
                    assert_eq!(client.call(TRIM, fua, offset, length, &[]).error, 0, "{what}");
                    let first = offset.next_multiple_of(4096);
                    let end = (offset + length) / 4096 * 4096;
                    if first < end {
                        model[first as usize..end as usize].fill(0);
                    }
                }
                6 if form != ReplyForm::Simple && length > 0 => {
                    let flags = random.pick(&[0, REQ_ONE]);
                    let answer = client.call(BLOCK_STATUS, flags | fua, offset, length, &[]);
                    assert_eq!((answer.error, answer.statuses.len()), (0, 3), "{what}");
                    let mut at = offset as usize;
                    for (extent, state) in &answer.extents {
                        let end = at + *extent as usize;
                        assert!(state & 2 == 0 || model[at..end].iter().all(|byte| *byte == 0), "{what}: {at}..{end} is not zero");
                        at = end;
                    }
                    assert!(answer.statuses.iter().all(|(_, extents)| extents.iter().map(|extent| extent.0).sum::<u64>() <= length));
                }
                _ => {
                    let command = random.pick(&[FLUSH, CACHE]);
                    let (offset, length) = if command == FLUSH { (0, 0) } else { (offset, length) };
                    assert_eq!(client.call(command, fua, offset, length, &[]).error, 0, "{what}");
                }
            }
        }
        assert!(client.read(0, MODEL_BYTES as u64) == model, "seed {seed} {form:?}: the whole differs");
    }
}

/// Requests that are right, nearly right, or noise, with good parts cut out, doubled or overwritten.
fn stream(random: &mut Random, form: ReplyForm) -> Vec<u8> {
    let interesting = [0, 1, 511, 512, 4095, 4096, 1 << 20, SIZE_BYTES - 1, SIZE_BYTES, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 63, u64::MAX];
    let mut bytes = Vec::new();
    for _ in 0..random.below(24) {
        let command = random.pick(&[READ, READ, WRITE, WRITE, FLUSH, TRIM, CACHE, WRITE_ZEROES, BLOCK_STATUS, DISC, 8, 0xffff]);
        let flags = if random.below(2) == 0 { random.below(64) as u16 } else { random.pick(&[0, PAYLOAD_LEN, 1 << 15]) };
        let offset = if random.below(3) == 0 { random.pick(&interesting) } else { random.below(SIZE_BYTES) };
        let length = if random.below(4) == 0 { random.pick(&interesting) } else { random.below(70_000) };
        let cookie = random.next();
        match form {
            ReplyForm::Extended => bytes.extend(extended_bytes(command, flags, cookie, offset, length)),
            _ => bytes.extend(request_bytes(command, flags, cookie, offset, length as u32)),
        }
        let has_payload = command == WRITE || (form == ReplyForm::Extended && flags & PAYLOAD_LEN != 0);
        if has_payload && length < 100_000 {
            let id = random.below(4) as u8;
            bytes.extend((0..length).map(|at| if at % 4 == 3 { id } else { 0 }));
        }
    }
    for _ in 0..random.below(4) {
        if bytes.len() > 4 {
            let at = random.below(bytes.len() as u64) as usize;
            match random.below(4) {
                0 => bytes[at] = random.next() as u8,
                1 => bytes.truncate(at),
                2 => drop(bytes.splice(at..at, [0xff; 7])),
                _ => bytes.extend_from_within(at.min(bytes.len() - 4)..),
            }
        }
    }
    bytes.truncate(1 << 20);
    bytes
}

#[test]
fn noise_ends_its_own_connection_and_nothing_else() {
    let seed = seed();
    for (form, world) in FORMS.into_iter().flat_map(|form| worlds().into_iter().map(move |world| (form, world))) {
        let mut steady = connect(&world, ReplyForm::Extended);
        let mut random = Random(seed ^ form as u64);
        for round in 0..iterations() / 4 {
            let bytes = stream(&mut random, form);
            let client = connect(&world, form);
            let mut writer = client.stream.try_clone().unwrap();
            let sender = std::thread::spawn(move || {
                // The server may have ended it already.
                let _ = writer.write_all(&bytes);
                let _ = writer.shutdown(Shutdown::Write);
            });
            let mut reader = &client.stream;
            let mut replies = vec![0; 1 << 20];
            loop {
                match reader.read(&mut replies) {
                    Ok(0) => break,
                    Ok(_) => {}
                    Err(error) if error.kind() == std::io::ErrorKind::ConnectionReset => break,
                    Err(error) => panic!("seed {seed} {form:?} round {round}: no end after 300 s: {error}"),
                }
            }
            sender.join().unwrap();
            client.end.recv_timeout(Duration::from_secs(300)).unwrap();
            if round % 16 == 0 {
                assert_eq!(steady.call(FLUSH, 0, 0, 0, &[]).error, 0);
                assert_eq!(steady.call(READ, 0, 0, 4096, &[]).error, 0);
            }
        }
    }
}
