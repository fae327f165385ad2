//! The rados kind over a cluster that is stopped in the middle of things (SIGSTOP), or full.
mod common;

use atoll_io::{Delta, IoErrorCode, Journal, JournalIdentity, LayerIo, OpenMode, RadosOptions, RadosStore, Store};
use common::{LAYER, write};
use parking_lot::{Mutex, MutexGuard};
use std::io::IoSliceMut;
use std::path::PathBuf;
use std::process::Command;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

const SLOT: u64 = 4096;
/// Only for what hangs.
const PATIENCE: Duration = Duration::from_secs(300);

struct Trouble {
    conf: PathBuf,
    folder: PathBuf,
    /// One test at a time.
    _alone: MutexGuard<'static, ()>,
}

/// `None`: there is no Ceph on this machine.
fn cluster() -> Option<Trouble> {
    static ALONE: Mutex<()> = Mutex::new(());
    static CLUSTER: OnceLock<Option<(PathBuf, PathBuf)>> = OnceLock::new();
    let alone = ALONE.lock();
    let (conf, folder) = CLUSTER.get_or_init(|| common::ceph::own_cluster("-troubles")).clone()?;
    Some(Trouble { conf, folder, _alone: alone })
}

impl Trouble {
    fn options(&self) -> RadosOptions {
        let options = common::ceph::options_in(self.conf.clone());
        RadosOptions { request_timeout: Duration::from_secs(3), ..options }
    }

    fn signal(&self, signal: i32) {
        let pid: i32 = std::fs::read_to_string(self.folder.join("run/osd.0.pid")).unwrap().trim().parse().unwrap();
        // SAFETY: a process of the cluster of this program.
        assert_eq!(unsafe { libc::kill(pid, signal) }, 0);
    }

    /// Runs `body` while no OSD runs.
    fn while_stopped<T>(&self, body: impl FnOnce() -> T) -> T {
        struct Goes<'a>(&'a Trouble);
        impl Drop for Goes<'_> {
            fn drop(&mut self) {
                self.0.signal(libc::SIGCONT);
            }
        }
        self.signal(libc::SIGSTOP);
        let _goes = Goes(self);
        body()
    }

    fn ceph(&self, arguments: &[&str]) {
        let output = Command::new("ceph").arg("-c").arg(&self.conf).args(arguments).output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}

/// Tries again until it succeeds: a cluster that goes on needs a moment.
fn soon<T>(mut body: impl FnMut() -> atoll_io::Result<T>) -> T {
    let started_at = Instant::now();
    loop {
        match body() {
            Ok(value) => return value,
            Err(error) => assert!(started_at.elapsed() < PATIENCE, "{error}"),
        }
    }
}

fn read_soon(layer: &dyn LayerIo, offset_bytes: u64, length: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; length];
    soon(|| layer.read(offset_bytes, &mut [IoSliceMut::new(&mut bytes)]));
    bytes
}

fn layer_of(store: &RadosStore) -> Arc<dyn LayerIo> {
    soon(|| match store.create_layer(LAYER) {
        Err(error) if error.code != IoErrorCode::Exists => Err(error),
        _ => store.open_layer(LAYER, OpenMode::ReadWrite),
    })
}

#[test]
fn a_layer_is_unsettled_while_a_write_that_timed_out_may_land() {
    let Some(trouble) = cluster() else { return };
    let store = soon(|| RadosStore::open(trouble.options()));
    let layer = layer_of(&store);
    soon(|| write(&*layer, 0, &[1; 4096]));
    assert!(layer.is_settled());
    trouble.while_stopped(|| {
        assert_eq!(write(&*layer, 0, &[2; 4096]).unwrap_err().code, IoErrorCode::Unavailable);
        assert!(!layer.is_settled());
        assert!(layer.settle().is_err());
        let again = store.open_layer(LAYER, OpenMode::ReadOnly).unwrap();
        assert!(!again.is_settled(), "whoever opens it knows");
    });
    soon(|| layer.settle());
    assert!(layer.is_settled());
    // It has landed, or never will.
    let there = read_soon(&*layer, 0, 4096);
    assert!(there == [1; 4096] || there == [2; 4096]);
}

#[test]
fn who_has_a_write_that_may_land_yet_does_not_give_the_lock_back_and_is_shut_out_by_the_next() {
    let Some(trouble) = cluster() else { return };
    let options = trouble.options();
    let first = soon(|| RadosStore::open(options.clone()));
    let lock = soon(|| first.lock("the first"));
    let layer = layer_of(&first);
    soon(|| write(&*layer, 0, &[1; 4096]));
    trouble.while_stopped(|| {
        assert!(write(&*layer, 0, &[2; 4096]).is_err());
        drop(lock);
    });
    let second = soon(|| RadosStore::open(options.clone()));
    let _lock = soon(|| second.lock("the second"));
    let started_at = Instant::now();
    while !write(&*layer, 0, &[3; 4096]).unwrap_err().message.contains("blocklist") {
        assert!(started_at.elapsed() < PATIENCE, "it is not told why");
    }
    let there = read_soon(&*soon(|| second.open_layer(LAYER, OpenMode::ReadOnly)), 0, 4096);
    assert!(there == [1; 4096] || there == [2; 4096]);
}

#[test]
fn a_lock_whose_taking_or_giving_back_timed_out_is_had_by_who_asks_again() {
    let Some(trouble) = cluster() else { return };
    let store = soon(|| RadosStore::open(trouble.options()));
    trouble.while_stopped(|| assert_eq!(store.lock("me").err().unwrap().code, IoErrorCode::Unavailable));
    let lock = soon(|| store.lock("me"));
    soon(|| store.prove_held());
    trouble.while_stopped(|| drop(lock));
    let _lock = soon(|| store.lock("me again"));
    soon(|| store.prove_held());
}

#[test]
fn a_punch_that_timed_out_takes_nothing_that_is_written_later_and_may_be_done_again() {
    let Some(trouble) = cluster() else { return };
    let options = trouble.options();
    let store = soon(|| RadosStore::open(options.clone()));
    let layer = layer_of(&store);
    soon(|| write(&*layer, 0, &[1; 8 * 4096]));
    trouble.while_stopped(|| assert!(layer.punch(SLOT, 7 * SLOT).is_err()));
    soon(|| write(&*layer, 3 * SLOT, &[9; 4096]));
    assert!(read_soon(&*layer, 0, 4096) == [1; 4096], "it was not to be punched");
    assert!(read_soon(&*layer, 3 * SLOT, 4096) == [9; 4096]);
    for slot in [1, 2, 4, 5, 6, 7] {
        let there = read_soon(&*layer, slot * SLOT, 4096);
        assert!(there == [0; 4096] || there == [1; 4096], "slot {slot}");
    }
    assert!(soon(|| layer.allocated_bytes()) >= 2 * SLOT, "never less than what is there");
    soon(|| layer.punch(4 * SLOT, 4 * SLOT));
    soon(|| layer.punch(SLOT, 2 * SLOT));
    let expected = [vec![1; 4096], vec![0; 2 * 4096], vec![9; 4096], vec![0; 4 * 4096]].concat();
    assert!(read_soon(&*layer, 0, 8 * 4096) == expected);
    drop((layer, store));
    let again = soon(|| RadosStore::open(options.clone()));
    assert!(read_soon(&*soon(|| again.open_layer(LAYER, OpenMode::ReadOnly)), 0, 8 * 4096) == expected);
}

#[test]
fn on_a_full_pool_a_frame_finds_no_space_a_punch_frees_some_and_then_the_frame_goes_in() {
    let Some(trouble) = cluster() else { return };
    let store = Arc::new(RadosStore::open(RadosOptions { request_timeout: PATIENCE, ..trouble.options() }).unwrap());
    let layer = layer_of(&store);
    write(&*layer, 0, &[1; 4 * 4096]).unwrap();
    let identity = JournalIdentity { volume: [1; 16], layer: LAYER, epoch: 1 };
    let mut journal = Journal::replay(store.clone(), identity, 0).unwrap().journal;
    let deltas = [Delta { start_slot: 0, slot_count: 1, owner: 1 }];
    let mut lsn = 0;
    let mut append = |journal: &mut Journal| journal.append(lsn + 1, &deltas).map(|()| lsn += 1);
    append(&mut journal).unwrap();
    let set_full_ratio = |ratio| {
        for which in ["set-nearfull-ratio", "set-backfillfull-ratio", "set-full-ratio"] {
            trouble.ceph(&["osd", which, ratio]);
        }
    };
    set_full_ratio("0.00001");
    let started_at = Instant::now();
    let refusal = loop {
        match append(&mut journal) {
            // The OSD has not looked yet.
            Ok(()) => assert!(started_at.elapsed() < PATIENCE, "the pool is never full"),
            Err(error) => break error,
        }
    };
    let punched = layer.punch(SLOT, SLOT);
    let refused_again = append(&mut journal);
    for (which, ratio) in [("set-full-ratio", "0.95"), ("set-backfillfull-ratio", "0.9"), ("set-nearfull-ratio", "0.85")] {
        trouble.ceph(&["osd", which, ratio]);
    }
    assert_eq!(refusal.code, IoErrorCode::NoSpace, "{refusal}");
    assert_eq!(refused_again.unwrap_err().code, IoErrorCode::NoSpace);
    punched.unwrap();
    soon(|| append(&mut journal));
    assert!(read_soon(&*layer, 0, 3 * 4096) == [vec![1; 4096], vec![0; 4096], vec![1; 4096]].concat());
    let frames = Journal::replay(store, identity, 0).unwrap().frames;
    assert_eq!(frames.len() as u64, lsn, "every one that was answered, and none twice");
}
