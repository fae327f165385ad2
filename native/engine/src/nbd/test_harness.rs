//! What the tests of the transmission phase share: a device that fails when told to, and a scripted client.
use crate::net::Connection;
use crate::{
    BatchLogPlace, Device, DeviceLimits, DeviceSpec, Engine, EngineOptions, LayerSpec, MetaContext, MetaContextKind, NBD_REQUEST_BYTES_MAX,
    NbdOptions, ReadPath, ReplyForm, ServeEnd, ThrottleLimits,
};
use atoll_io::{FaultPlan, FaultRule, FaultStore, FileStore, LayerId, MemoryStore, Store};
use atoll_map::{FrozenMap, HOLE};
use std::io::{Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, channel};

pub(super) const READ: u16 = 0;
pub(super) const WRITE: u16 = 1;
pub(super) const DISC: u16 = 2;
pub(super) const FLUSH: u16 = 3;
pub(super) const TRIM: u16 = 4;
pub(super) const CACHE: u16 = 5;
pub(super) const WRITE_ZEROES: u16 = 6;
pub(super) const BLOCK_STATUS: u16 = 7;

pub(super) const FUA: u16 = 1;
pub(super) const NO_HOLE: u16 = 2;
pub(super) const DF: u16 = 4;
pub(super) const REQ_ONE: u16 = 8;
pub(super) const FAST_ZERO: u16 = 16;
pub(super) const PAYLOAD_LEN: u16 = 32;

pub(super) const EPERM: u32 = 1;
pub(super) const EINVAL: u32 = 22;
pub(super) const ENOSPC: u32 = 28;
pub(super) const EOVERFLOW: u32 = 75;
pub(super) const ENOTSUP: u32 = 95;
pub(super) const ESHUTDOWN: u32 = 108;

pub(super) const SIZE_BYTES: u64 = 64 << 20;

pub(super) const FORMS: [ReplyForm; 3] = [ReplyForm::Simple, ReplyForm::Structured, ReplyForm::Extended];

/// An engine with one device of 64 MiB on a store that fails when told to, and a listener.
pub(super) struct World {
    pub(super) engine: Arc<Engine>,
    pub(super) faults: Arc<FaultStore>,
    pub(super) device: Arc<Device>,
    pub(super) read_path: ReadPath,
    pub(super) listener: Arc<crate::Listener>,
    pub(super) directory: std::path::PathBuf,
}

impl Drop for World {
    fn drop(&mut self) {
        let _ = self.engine.close();
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

pub(super) fn world() -> World {
    world_with(ThrottleLimits::default())
}

pub(super) fn world_with(throttle: ThrottleLimits) -> World {
    world_of(throttle, None, None)
}

/// One world of each kind: in memory, where every read is answered at once; and on files, where every read has to wait, for a
/// worker or for the kernel.
pub(super) fn worlds() -> Vec<World> {
    let mut worlds = vec![world()];
    for read_path in [ReadPath::Workers, ReadPath::Ring] {
        if let (ReadPath::Ring, Err(error)) = (read_path, atoll_io::probe_ring()) {
            println!("without a ring: this kernel has no io_uring for us: {error}");
            continue;
        }
        let world = world_of(ThrottleLimits::default(), None, Some(read_path));
        world.inject(rule("read-now"));
        worlds.push(world);
    }
    worlds
}

/// `files`: how reads wait on a store of files; `None`: in memory.
pub(super) fn world_of(throttle: ThrottleLimits, batch_log: Option<BatchLogPlace>, files: Option<ReadPath>) -> World {
    world_over(throttle, batch_log, files, |store| store)
}

/// `wrap`: makes the store that the device has of the one that fails when told to.
pub(super) fn world_over(
    throttle: ThrottleLimits,
    batch_log: Option<BatchLogPlace>,
    files: Option<ReadPath>,
    wrap: impl FnOnce(Arc<dyn Store>) -> Arc<dyn Store>,
) -> World {
    let mut template = std::env::temp_dir().join("atoll-nbd-XXXXXX").into_os_string().into_encoded_bytes();
    template.push(0);
    // SAFETY: the template is writable, ends with a zero byte and outlives the call.
    assert!(!unsafe { libc::mkdtemp(template.as_mut_ptr().cast()) }.is_null());
    template.pop();
    let directory = std::path::PathBuf::from(String::from_utf8(template).unwrap());
    let inner: Arc<dyn Store> = match files {
        None => Arc::new(MemoryStore::new(u64::MAX, false)),
        Some(_) => Arc::new(FileStore::open(&directory.join("pool"), true, 0).unwrap()),
    };
    let engine = Engine::new(EngineOptions::default()).unwrap();
    let faults = Arc::new(FaultStore::new(inner));
    let store = wrap(faults.clone());
    let layer = |alias: u8| LayerId([alias; 16]);
    store.create_layer(layer(1)).unwrap();
    let (device, _) = engine
        .open_device(DeviceSpec {
            volume: [9; 16],
            size_bytes: SIZE_BYTES,
            epoch: 1,
            map: FrozenMap::uniform(engine.cache(), HOLE),
            map_lsn: 0,
            layers: vec![LayerSpec { alias: 1, id: layer(1), store: store.clone() }],
            active: Some(1),
            next: None,
            throttle,
            limits: DeviceLimits::default(),
            batch_log,
            batch_log_since_epoch: 0,
            on_event: None,
        })
        .unwrap();
    let listener = engine.listen_unix(&directory.join("nbd.sock"), 0o600, None, None).unwrap();
    World { engine, faults, device, read_path: files.unwrap_or(ReadPath::Workers), listener, directory }
}

impl World {
    pub(super) fn connect(&self, change: impl FnOnce(&mut NbdOptions)) -> Client {
        let mut options = NbdOptions {
            replies: ReplyForm::Structured,
            contexts: vec![MetaContext { id: 1, kind: MetaContextKind::Allocation }],
            read_only: false,
            request_bytes_max: NBD_REQUEST_BYTES_MAX,
            read_path: self.read_path,
        };
        change(&mut options);
        let stream = UnixStream::connect(self.directory.join("nbd.sock")).unwrap();
        let connection = self.engine.accept(&self.listener).unwrap().unwrap();
        let (sender, end) = channel();
        let form = options.replies;
        connection.serve_nbd(self.device.clone(), options, move |result| {
            let _ = sender.send(result.unwrap());
        });
        Client { stream, connection, end, form, next_cookie: 0xc00c_1e00_0000_0000 }
    }

    /// The device's map as it is now.
    pub(super) fn freeze(&self) -> FrozenMap {
        let checkpoint = self.device.checkpoint(1 << 30).unwrap().unwrap();
        let frozen = checkpoint.frozen().clone();
        self.device.checkpoint_aborted(checkpoint);
        frozen
    }

    pub(super) fn fail(&self, operation: &str, errno: i32) {
        self.fail_after(0, operation, errno);
    }

    pub(super) fn fail_after(&self, skip_count: u64, operation: &str, errno: i32) {
        self.inject(FaultRule { skip_count, errno, ..rule(operation) });
    }

    /// The next calls answer when they are let go.
    pub(super) fn hold(&self, operation: &str, apply_count: u64) {
        self.inject(FaultRule { apply_count, delay_ms: u32::MAX, ..rule(operation) });
    }

    /// Whatever is held goes on, and nothing fails any more.
    pub(super) fn let_go(&self) {
        self.faults.set_plan(FaultPlan::default());
    }

    pub(super) fn inject(&self, rule: FaultRule) {
        self.faults.set_plan(FaultPlan { seed: 1, rules: vec![rule] });
    }

    pub(super) fn wait_injected(&self, count: u64) {
        while self.faults.injected_count() < count {
            std::thread::yield_now();
        }
    }
}

/// Every call of an operation succeeds, and at once.
pub(super) fn rule(operation: &str) -> FaultRule {
    FaultRule {
        operation: operation.to_owned(),
        layer: None,
        skip_count: 0,
        apply_count: u64::MAX,
        probability_of_256: 256,
        errno: 0,
        delay_ms: 0,
        tear: false,
    }
}

pub(super) struct Client {
    pub(super) stream: UnixStream,
    pub(super) connection: Arc<Connection>,
    pub(super) end: Receiver<ServeEnd>,
    pub(super) form: ReplyForm,
    next_cookie: u64,
}

/// What came back for one request.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Answer {
    pub(super) cookie: u64,
    pub(super) error: u32,
    pub(super) message: String,
    pub(super) data: Vec<u8>,
    pub(super) chunks: Vec<u16>,
    /// Of the first context that was answered.
    pub(super) extents: Vec<(u64, u64)>,
    /// Of every context, by id.
    pub(super) statuses: Vec<(u32, Vec<(u64, u64)>)>,
}

/// A request with a header of 32 bytes.
pub(super) fn extended_bytes(command: u16, flags: u16, cookie: u64, offset: u64, length: u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(32);
    bytes.extend(0x21e4_1c71u32.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

pub(super) fn request_bytes(command: u16, flags: u16, cookie: u64, offset: u64, length: u32) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(28);
    bytes.extend(0x2560_9513u32.to_be_bytes());
    bytes.extend(flags.to_be_bytes());
    bytes.extend(command.to_be_bytes());
    bytes.extend(cookie.to_be_bytes());
    bytes.extend(offset.to_be_bytes());
    bytes.extend(length.to_be_bytes());
    bytes
}

impl Client {
    /// With extended headers a WRITE gets the flag that it needs.
    pub(super) fn send(&mut self, command: u16, flags: u16, offset: u64, length: u64, payload: &[u8]) -> u64 {
        let is_extended = self.form == ReplyForm::Extended;
        let flags = if is_extended && command == WRITE { flags | PAYLOAD_LEN } else { flags };
        self.send_as_is(command, flags, offset, length, payload)
    }

    pub(super) fn send_as_is(&mut self, command: u16, flags: u16, offset: u64, length: u64, payload: &[u8]) -> u64 {
        self.next_cookie += 1;
        let mut bytes = match self.form {
            ReplyForm::Extended => extended_bytes(command, flags, self.next_cookie, offset, length),
            _ => request_bytes(command, flags, self.next_cookie, offset, u32::try_from(length).unwrap()),
        };
        bytes.extend_from_slice(payload);
        self.stream.write_all(&bytes).unwrap();
        self.next_cookie
    }

    pub(super) fn take(&mut self, count: usize) -> Vec<u8> {
        let mut bytes = vec![0; count];
        self.stream.read_exact(&mut bytes).unwrap();
        bytes
    }

    pub(super) fn take_u16(&mut self) -> u16 {
        u16::from_be_bytes(self.take(2).try_into().unwrap())
    }
    pub(super) fn take_u32(&mut self) -> u32 {
        u32::from_be_bytes(self.take(4).try_into().unwrap())
    }
    pub(super) fn take_u64(&mut self) -> u64 {
        u64::from_be_bytes(self.take(8).try_into().unwrap())
    }

    /// Reads one reply in the form that was negotiated; `offset` is the request's, `read` its length if it is a READ.
    pub(super) fn answer_to(&mut self, offset: u64, read: Option<usize>) -> Answer {
        let mut answer = Answer::default();
        let mut data = read.map(|length| vec![0xee; length]);
        let mut covered = 0;
        loop {
            let magic = self.take_u32();
            if magic == 0x6744_6698 {
                assert!(self.form == ReplyForm::Simple || (self.form == ReplyForm::Structured && read.is_none()), "a simple reply");
                answer.error = self.take_u32();
                answer.cookie = self.take_u64();
                if let (Some(length), 0) = (read, answer.error) {
                    answer.data = self.take(length);
                }
                return answer;
            }
            let expected = if self.form == ReplyForm::Extended { 0x6e8a_278c } else { 0x668e_33ef };
            assert!(self.form != ReplyForm::Simple && magic == expected, "magic {magic:#x}");
            let (flags, kind) = (self.take_u16(), self.take_u16());
            answer.cookie = self.take_u64();
            let length = if self.form == ReplyForm::Extended {
                assert_eq!(self.take_u64(), offset, "the request's offset comes back");
                self.take_u64() as usize
            } else {
                self.take_u32() as usize
            };
            answer.chunks.push(kind);
            match kind {
                0 => assert_eq!(length, 0),
                1 | 2 => {
                    let at = (self.take_u64() - offset) as usize;
                    let hole = (kind == 2).then(|| self.take_u32() as usize);
                    let bytes = hole.map_or_else(|| self.take(length - 8), |hole| vec![0; hole]);
                    assert_eq!(at, covered, "chunks are in order and do not overlap");
                    covered += bytes.len();
                    data.as_mut().unwrap()[at..at + bytes.len()].copy_from_slice(&bytes);
                }
                5 | 6 => {
                    assert_eq!(kind == 6, self.form == ReplyForm::Extended);
                    let id = self.take_u32();
                    let extents = if kind == 6 {
                        let count = self.take_u32() as usize;
                        assert_eq!(length, 8 + 16 * count);
                        (0..count).map(|_| (self.take_u64(), self.take_u64())).collect::<Vec<_>>()
                    } else {
                        (0..(length - 4) / 8).map(|_| (u64::from(self.take_u32()), u64::from(self.take_u32()))).collect()
                    };
                    assert!(!extents.is_empty() && extents.iter().all(|extent| extent.0 > 0));
                    assert!(answer.statuses.iter().all(|(other, _)| *other != id), "a context is answered once");
                    if answer.statuses.is_empty() {
                        answer.extents = extents.clone();
                    }
                    answer.statuses.push((id, extents));
                }
                0x8001 => {
                    answer.error = self.take_u32();
                    let text = self.take_u16() as usize;
                    assert_eq!(length, 6 + text);
                    answer.message = String::from_utf8(self.take(text)).unwrap();
                }
                other => panic!("chunk type {other:#x}"),
            }
            if flags & 1 != 0 {
                if let (Some(data), 0) = (data, answer.error) {
                    assert_eq!(covered, data.len(), "a successful read is covered whole");
                    answer.data = data;
                }
                return answer;
            }
        }
    }

    /// Reads one reply to a READ with DF, whichever read of this length it answers.
    pub(super) fn answer_to_any(&mut self, length: usize) -> Answer {
        assert_eq!((self.take_u32(), self.take_u16(), self.take_u16()), (0x668e_33ef, 1, 1));
        let cookie = self.take_u64();
        assert_eq!(self.take_u32() as usize, length + 8);
        self.take_u64();
        Answer { cookie, data: self.take(length), ..Answer::default() }
    }

    /// Reads one reply; `read` is (offset, length) if it answers a READ.
    pub(super) fn answer(&mut self, read: Option<(u64, usize)>) -> Answer {
        self.answer_to(read.map_or(0, |(offset, _)| offset), read.map(|(_, length)| length))
    }

    pub(super) fn call(&mut self, command: u16, flags: u16, offset: u64, length: u64, payload: &[u8]) -> Answer {
        let cookie = self.send(command, flags, offset, length, payload);
        let answer = self.answer_to(offset, (command == READ).then_some(length as usize));
        assert_eq!(answer.cookie, cookie);
        answer
    }

    pub(super) fn write(&mut self, offset: u64, payload: &[u8]) {
        assert_eq!(self.call(WRITE, 0, offset, payload.len() as u64, payload).error, 0);
    }

    pub(super) fn read(&mut self, offset: u64, length: u64) -> Vec<u8> {
        let answer = self.call(READ, 0, offset, length, &[]);
        assert_eq!(answer.error, 0, "{}", answer.message);
        answer.data
    }

    /// Waits until something has come, and takes nothing of it.
    pub(super) fn wait_readable(&self) {
        let mut poll = libc::pollfd { fd: self.stream.as_raw_fd(), events: libc::POLLIN, revents: 0 };
        // SAFETY: one pollfd, exclusively borrowed.
        while unsafe { libc::poll(&raw mut poll, 1, -1) } != 1 {}
    }

    /// Nothing more comes, not even half a reply.
    pub(super) fn expect_closed(mut self) -> ServeEnd {
        let mut rest = Vec::new();
        // A reset instead of an orderly end is as good: unread bytes of ours make the kernel send one.
        let _ = self.stream.read_to_end(&mut rest);
        assert_eq!(rest, [] as [u8; 0]);
        self.end.recv().unwrap()
    }
}
