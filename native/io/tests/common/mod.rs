//! What several tests need.
#![allow(dead_code)] // Each test is a program of its own and uses a part.
pub mod ceph;

use atoll_io::{Delta, Ending, LayerId, LayerIo, Result};
use std::io::{IoSlice, IoSliceMut};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, Sender, channel};

pub const LAYER: LayerId = LayerId([0x11; 16]);
pub const OTHER_LAYER: LayerId = LayerId([0x22; 16]);
pub const VOLUME: [u8; 16] = [0x33; 16];

/// A directory that goes with the test.
pub struct TemporaryFolder(PathBuf);

impl TemporaryFolder {
    pub fn new() -> TemporaryFolder {
        static COUNTER: AtomicU64 = AtomicU64::new(0);
        let number = COUNTER.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("atoll-io-test-{}-{number}", std::process::id()));
        std::fs::create_dir(&path).unwrap();
        TemporaryFolder(path)
    }
    pub fn path(&self) -> &Path {
        &self.0
    }
}

impl Drop for TemporaryFolder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub fn write(layer: &dyn LayerIo, offset_bytes: u64, data: &[u8]) -> Result<()> {
    layer.write(offset_bytes, &[IoSlice::new(data)])
}

pub fn read(layer: &dyn LayerIo, offset_bytes: u64, length_bytes: usize) -> Vec<u8> {
    let mut bytes = vec![0xee; length_bytes];
    layer.read(offset_bytes, &mut [IoSliceMut::new(&mut bytes)]).unwrap();
    bytes
}

/// Sends what came of a request, with what was read.
struct Told {
    room: Vec<u8>,
    sender: Sender<Result<Vec<u8>>>,
}

impl Ending for Told {
    fn room(&mut self) -> &mut [u8] {
        &mut self.room
    }
    fn ended(self: Box<Self>, result: Result<()>) {
        let Told { room, sender } = *self;
        let _ = sender.send(result.map(|()| room));
    }
}

/// A request that was begun: what it came to, once. `None`: it has to be waited for.
pub type BegunTest = Option<Receiver<Result<Vec<u8>>>>;

pub fn begin_write(layer: &dyn LayerIo, offset_bytes: u64, data: &[u8]) -> BegunTest {
    let (sender, told) = channel();
    layer.begin_write(offset_bytes, data, Box::new(Told { room: Vec::new(), sender })).is_ok().then_some(told)
}

pub fn begin_read(layer: &dyn LayerIo, offset_bytes: u64, length_bytes: usize) -> BegunTest {
    let (sender, told) = channel();
    layer.begin_read(offset_bytes, Box::new(Told { room: vec![0xee; length_bytes], sender })).is_ok().then_some(told)
}

pub fn delta(start_slot: u64) -> Delta {
    Delta { start_slot, slot_count: 1 + start_slot % 3, owner: 7 }
}

/// Deltas that differ from frame to frame in number and content.
pub fn deltas_of(lsn: u64) -> Vec<Delta> {
    (0..1 + lsn % 4).map(|index| delta(lsn * 100 + index)).collect()
}
