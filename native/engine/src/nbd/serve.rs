//! The loop of a serving connection. See the rules in mod.rs.
use super::begun::{BegunRequests, CloseBegunOnDrop};
use super::receive::{INLINE_PAYLOAD_BYTES_MAX, ReceiveBuffer};
use super::reply::{ReplyBuffer, refusal_of, shutting_down, success_bytes};
use super::request::{
    COMPACT_HEADER_BYTES, Command, EXTENDED_HEADER_BYTES, FLAG_DF, FLAG_FAST_ZERO, FLAG_FUA, FLAG_NO_HOLE, FLAG_PAYLOAD_LEN, FLAG_REQ_ONE,
    NbdErrno, Permissions, Refusal, Request,
};
use super::ring_reads::{CloseReadsOnDrop, RING_READ_BYTES_MAX, RingReads};
use super::workers::{CloseOnDrop, Job, NETWORK_WORKER_COUNT_MAX, WORKER_COUNT_MAX, WorkQueue};
use super::{MetaContextKind, NbdOptions, ReadPath, ReplyForm, ServeEnd, ServeEndReason};
use crate::device::{PREFETCH_BYTES_MAX, SettleMark};
use crate::net::Socket;
use crate::{Admission, Device, EngineError, Result, Served, StatusExtent};
use atoll_map::SLOT_BYTES;
use parking_lot::{Mutex, MutexGuard};
use std::io;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Weak};
use std::thread::Scope;
use std::time::{Duration, Instant};

/// Trims, zeroes and prefetches of longer ranges go to a worker.
const SLOW_RANGE_BYTES: u64 = 1 << 20;

/// WRITE_ZEROES that must allocate writes; longer ones go to a worker.
const SLOW_ALLOCATE_BYTES: u64 = 64 << 10;

/// A status over a longer range walks much of the map; it goes to a worker.
const SLOW_STATUS_BYTES: u64 = 64 << 20;

/// Extents of each context in the reply to one BLOCK_STATUS (I8). A client asks again from where the reply ends.
const STATUS_EXTENT_COUNT_MAX: usize = 1024;

/// Replies are sent when this much is gathered…
const BATCH_BYTES_MAX: usize = 512 << 10;

/// … or when the first of them has waited this long behind requests that turned out slow (a disk that seeks).
const BATCH_DELAY_MAX: Duration = Duration::from_micros(500);

/// A draining connection ends when nothing was asked for this long: who is busy sees ESHUTDOWN and not a broken connection.
const DRAIN_QUIET_TIME: Duration = Duration::from_millis(100);

/// How long a client that goes on asking is answered once what was in flight is finished.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(1);

/// How often a drain looks whether it is over.
const DRAIN_STEP: Duration = Duration::from_millis(5);

/// How whoever owns a connection ends its serving.
#[derive(Default)]
pub(crate) struct ServeControl {
    draining: AtomicBool,
    closed: AtomicBool,
    /// Between the beginning and the end of `serve`.
    serving: AtomicBool,
    /// The connection's thread waits for the client, and is not in the middle of a request.
    receiving: AtomicBool,
    /// Requests that workers have.
    in_flight: AtomicUsize,
    /// When a request was last answered ESHUTDOWN.
    refused_at: Mutex<Option<Instant>>,
}

impl ServeControl {
    /// No request is taken any more. The caller also ends the receiving direction of the socket, after `wait_quiet` if the
    /// connection serves. False: it drains already.
    pub(crate) fn drain(&self) -> bool {
        !self.draining.swap(true, Ordering::SeqCst)
    }
    /// As `drain`, and answers do not matter any more. The caller also shuts the socket down.
    pub(crate) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.drain();
    }
    pub(crate) fn is_serving(&self) -> bool {
        self.serving.load(Ordering::SeqCst)
    }
    fn is_draining(&self) -> bool {
        self.draining.load(Ordering::Acquire)
    }
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Blocks while the client of a draining connection may still ask and be answered.
    pub(crate) fn wait_quiet(&self) {
        let started_at = Instant::now();
        let mut idle_at = None;
        while self.is_serving() && !self.is_closed() {
            if self.in_flight.load(Ordering::Acquire) == 0 {
                let idle_time = idle_at.get_or_insert_with(Instant::now).elapsed();
                let asked_at = self.refused_at.lock().unwrap_or(started_at);
                let is_quiet = self.receiving.load(Ordering::Acquire) && asked_at.elapsed() >= DRAIN_QUIET_TIME;
                if is_quiet || idle_time >= DRAIN_TIME_MAX {
                    return;
                }
            }
            std::thread::sleep(DRAIN_STEP);
        }
    }

    #[cold]
    fn note_refused(&self) {
        *self.refused_at.lock() = Some(Instant::now());
    }
}

/// Says that the serving is over however it ends.
struct Serving<'a>(&'a ServeControl);

impl Drop for Serving<'_> {
    fn drop(&mut self) {
        self.0.serving.store(false, Ordering::SeqCst);
    }
}

/// Serves `device` on `socket` until the connection ends; every request is finished and every worker gone on return.
pub(crate) fn serve(socket: &Arc<Socket>, device: &Arc<Device>, options: NbdOptions, control: &Arc<ServeControl>) -> ServeEnd {
    control.serving.store(true, Ordering::SeqCst);
    let _serving = Serving(control);
    if control.is_draining() {
        // Whoever drained may have looked before: nobody waits for this one to be quiet.
        socket.shutdown_receive();
    }
    let session = Arc::new_cyclic(|myself| Session {
        myself: Weak::clone(myself),
        socket: Arc::clone(socket),
        device: Arc::clone(device),
        options,
        control: Arc::clone(control),
        queue: WorkQueue::default(),
        ring_reads: RingReads::default(),
        begun: BegunRequests::default(),
        sending: Mutex::default(),
        send_failed: AtomicBool::new(false),
        device_is_gone: AtomicBool::new(false),
        client_is_gone: AtomicBool::new(false),
    });
    // Workers inherit the blocked signals of this thread and are joined at the end of the scope.
    let end = std::thread::scope(|scope| {
        let _close = CloseOnDrop(&session.queue);
        let _close_reads = CloseReadsOnDrop(&session.ring_reads);
        let _close_begun = CloseBegunOnDrop(&session.begun);
        let end = session.run(scope);
        if end.reason != ServeEndReason::Disconnect {
            session.client_is_gone.store(true, Ordering::Release);
        }
        end
    });
    // Whoever told the last end is about to let go.
    while Arc::strong_count(&session) > 1 {
        std::thread::yield_now();
    }
    end
}

pub(super) struct Session {
    pub(super) myself: Weak<Session>,
    socket: Arc<Socket>,
    pub(super) device: Arc<Device>,
    pub(super) options: NbdOptions,
    control: Arc<ServeControl>,
    pub(super) queue: WorkQueue,
    pub(super) ring_reads: RingReads,
    pub(super) begun: BegunRequests,
    /// Held while a batch or a single reply is sent: each goes out as one piece. In it: the rest of a piece that somebody who may not
    /// wait has begun, which goes before everything else.
    pub(super) sending: Mutex<Vec<u8>>,
    send_failed: AtomicBool,
    /// The device answered that it is closed: nothing more is read.
    device_is_gone: AtomicBool,
    /// Nobody waits for answers any more, so nobody waits for the throttle.
    client_is_gone: AtomicBool,
}

/// What the loop does after a request.
enum Next {
    Continue,
    Disconnect,
}

/// A payload as it lies: in the receive buffer, or in a buffer of its own that a worker may have.
enum Payload<'a> {
    Borrowed(&'a [u8]),
    Owned(&'a mut Vec<u8>),
}

impl Payload<'_> {
    fn bytes(&self) -> &[u8] {
        match self {
            Payload::Borrowed(bytes) => bytes,
            Payload::Owned(bytes) => bytes,
        }
    }
    fn into_vec(self) -> Vec<u8> {
        match self {
            Payload::Borrowed(bytes) => bytes.to_vec(),
            Payload::Owned(bytes) => std::mem::take(bytes),
        }
    }
}

impl Session {
    fn run<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) -> ServeEnd {
        let is_extended = self.options.replies == ReplyForm::Extended;
        let mut received = ReceiveBuffer::new(if is_extended { EXTENDED_HEADER_BYTES } else { COMPACT_HEADER_BYTES });
        let mut batch = Batch::new();
        loop {
            match self.run_received(scope, &mut received, &mut batch) {
                Ok(Next::Continue) => {}
                Ok(Next::Disconnect) => {
                    return match self.send_batch(&mut batch) {
                        Ok(()) => ended(ServeEndReason::Disconnect, "the client said goodbye"),
                        Err(end) => end,
                    };
                }
                Err(end) => {
                    // What was done is answered if it can be; how the connection ended is known already.
                    let _ = self.send_batch(&mut batch);
                    return end;
                }
            }
            if let Err(end) = self.send_batch(&mut batch) {
                return end;
            }
            if self.device_is_gone.load(Ordering::Acquire) {
                return ended(ServeEndReason::Closed, "the device was closed");
            }
            self.control.receiving.store(true, Ordering::Release);
            let filled = received.fill(&self.socket);
            self.control.receiving.store(false, Ordering::Release);
            batch.arrived_at = Instant::now();
            match filled {
                Ok(0) => return self.end_of_file(received.available_bytes()),
                Ok(_) => {}
                Err(error) => return self.broken(&error),
            }
        }
    }

    /// Runs every request that has been received as a whole.
    fn run_received<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        received: &mut ReceiveBuffer,
        batch: &mut Batch,
    ) -> std::result::Result<Next, ServeEnd> {
        while let Some(header) = received.header() {
            let Some(request) = Request::parse(header) else {
                return Err(ended(ServeEndReason::Error, "the client sent something that is not a request"));
            };
            if request.payload_bytes > u64::from(self.options.request_bytes_max) {
                let (limit, payload_bytes) = (self.options.request_bytes_max, request.payload_bytes);
                let message = format!("a payload may have {limit} bytes, not {payload_bytes}; the connection is closed");
                self.refuse(&request, &Refusal::new(NbdErrno::Invalid, message.clone()), batch);
                return Err(ended(ServeEndReason::Error, message));
            }
            let payload_bytes = request.payload_bytes as usize;
            let next = if payload_bytes > INLINE_PAYLOAD_BYTES_MAX && self.may_write_in_pieces(&request) {
                self.send_batch(batch)?;
                self.write_in_pieces(&request, received, batch)?;
                Next::Continue
            } else if payload_bytes > INLINE_PAYLOAD_BYTES_MAX {
                // The rest of the payload may be long in coming: nobody waits for it.
                self.send_batch(batch)?;
                let payload = match received.receive_large(&self.socket, payload_bytes) {
                    Ok(Some(payload)) => payload,
                    Ok(None) => return Err(self.end_of_file(payload_bytes)),
                    Err(error) => return Err(self.broken(&error)),
                };
                batch.arrived_at = Instant::now();
                let next = self.dispatch(scope, &request, Payload::Owned(payload), batch)?;
                received.trim();
                next
            } else if !received.has_whole(payload_bytes) {
                return Ok(Next::Continue);
            } else {
                self.dispatch(scope, &request, Payload::Borrowed(received.consume(payload_bytes)), batch)?
            };
            if let Next::Disconnect = next {
                return Ok(next);
            }
            if batch.is_due() {
                self.send_batch(batch)?;
            }
        }
        Ok(Next::Continue)
    }

    /// Answers a request, executes it here, or hands it to a worker.
    fn dispatch<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        request: &Request,
        payload: Payload<'_>,
        batch: &mut Batch,
    ) -> std::result::Result<Next, ServeEnd> {
        if request.command == Command::Disconnect {
            return Ok(Next::Disconnect);
        }
        if self.control.is_draining() {
            self.control.note_refused();
            self.refuse(request, &shutting_down(), batch);
            return Ok(Next::Continue);
        }
        let filtered;
        let request = if self.has_status_filter(request) {
            match request.with_status_filter(payload.bytes(), &self.options.contexts) {
                Ok(found) => filtered = found,
                Err(refusal) => {
                    self.refuse(request, &refusal, batch);
                    return Ok(Next::Continue);
                }
            }
            &filtered
        } else {
            request
        };
        if let Err(refusal) = request.check(&self.permissions()).and_then(|()| self.check_fast_zero(request)) {
            self.refuse(request, &refusal, batch);
            return Ok(Next::Continue);
        }
        let is_throttled = throttle_bytes(request).is_some_and(|bytes| !self.device.try_throttle(bytes));
        if !is_throttled && !self.is_slow(request) {
            let is_done = match request.command {
                Command::Read => self.read_now(request, &mut batch.replies),
                Command::Write if request.length_bytes > 0 => {
                    let result = self.device.write_unsettled(request.offset_bytes, payload.bytes(), &mut batch.mark);
                    self.note_write(request, result, batch);
                    true
                }
                _ => {
                    self.execute(request, payload.bytes(), &mut batch.replies);
                    true
                }
            };
            if is_done {
                let took = batch.note();
                self.note_served(request, took);
                return Ok(Next::Continue);
            }
        }
        let held_bytes = if request.command == Command::Read { request.length_bytes as usize } else { payload.bytes().len() };
        if !self.queue.has_room(held_bytes) {
            self.send_batch(batch)?;
        }
        self.queue.take_room(held_bytes);
        self.control.in_flight.fetch_add(1, Ordering::AcqRel);
        self.device.note_waiting(true);
        if !is_throttled && self.goes_to_ring(scope, request) {
            // Handed over with all others of the batch.
            batch.ring_reads.push((*request, batch.arrived_at));
        } else if !is_throttled && self.may_begin(request) && self.begin(scope, request, payload.bytes(), batch.arrived_at) {
            // Answered when its end is told.
        } else {
            let job = Job { request: *request, payload: payload.into_vec(), held_bytes, is_throttled, arrived_at: batch.arrived_at };
            self.submit(scope, job);
        }
        Ok(Next::Continue)
    }

    /// Whether this is a read for the ring; starts its thread at the first one.
    fn goes_to_ring<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, request: &Request) -> bool {
        if self.options.read_path != ReadPath::Ring || request.command != Command::Read || request.length_bytes > RING_READ_BYTES_MAX {
            return false;
        }
        if self.device.waits_for_network() {
            // None of its layers is a file.
            return false;
        }
        *self.ring_reads.is_started.get_or_init(|| {
            let body = move || {
                // Without a descriptor, after a broken ring or a panic: the connection cannot go on.
                if !matches!(catch_unwind(AssertUnwindSafe(|| self.serve_reads(scope))), Ok(Ok(()))) {
                    self.fail();
                    self.queue.give_up();
                }
            };
            std::thread::Builder::new().name("atoll-nbd-ring".to_owned()).spawn_scoped(scope, body).is_ok()
        })
    }

    /// Whether this is a request that a backend may carry out while nobody waits.
    fn may_begin(&self, request: &Request) -> bool {
        self.device.waits_for_network()
            && request.length_bytes > 0
            && (request.command == Command::Read || (request.command == Command::Write && !request.has(FLAG_FUA)))
    }

    /// A read that the ring cannot do, and when it was received.
    pub(super) fn pass_on<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, (request, arrived_at): (Request, Instant)) {
        let held_bytes = request.length_bytes as usize;
        self.submit(scope, Job { request, payload: Vec::new(), held_bytes, is_throttled: false, arrived_at });
    }

    /// Gives a worker a job that room was taken for.
    fn submit<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, job: Job) {
        // A volume may come to a cluster, or leave it, while it is served.
        let worker_count_max = if self.device.waits_for_network() { NETWORK_WORKER_COUNT_MAX } else { WORKER_COUNT_MAX };
        if self.queue.submit(job, worker_count_max) {
            let started = std::thread::Builder::new().name("atoll-nbd-work".to_owned()).spawn_scoped(scope, || self.work());
            // Without any thread to be had the request is done here: slower, but done.
            if started.is_err()
                && let Some(job) = self.queue.worker_missing()
            {
                let mut replies = ReplyBuffer::default();
                self.perform(&job, &mut replies);
                self.finished(job.held_bytes);
            }
        }
    }

    /// A request that room was taken for is answered.
    pub(super) fn finished(&self, held_bytes: usize) {
        self.queue.finished(held_bytes);
        self.device.note_waiting(false);
        self.control.in_flight.fetch_sub(1, Ordering::AcqRel);
    }

    /// Whether the payload says which contexts a status is asked of. Where none was negotiated the flag is refused as unknown.
    fn has_status_filter(&self, request: &Request) -> bool {
        request.command == Command::BlockStatus
            && request.has(FLAG_PAYLOAD_LEN)
            && self.options.replies == ReplyForm::Extended
            && !self.options.contexts.is_empty()
    }

    /// A FAST_ZERO that would have to write is refused before anything has changed. Whether space that must be kept
    /// (NO_HOLE) is there without writing is for the file system to know, so that is never called fast.
    fn check_fast_zero(&self, request: &Request) -> std::result::Result<(), Refusal> {
        if request.command != Command::WriteZeroes || !request.has(FLAG_FAST_ZERO) {
            return Ok(());
        }
        if !request.has(FLAG_NO_HOLE) && self.device.zeroes_fast(request.offset_bytes, request.length_bytes) {
            return Ok(());
        }
        Err(Refusal::new(NbdErrno::NotSupported, "zeroing this range would be no faster than writing zeros"))
    }

    fn permissions(&self) -> Permissions {
        Permissions {
            size_bytes: self.device.size_bytes(),
            read_only: self.options.read_only || self.device.is_read_only(),
            chunked_replies: self.options.replies != ReplyForm::Simple,
            extended_headers: self.options.replies == ReplyForm::Extended,
            has_contexts: !self.options.contexts.is_empty(),
            request_bytes_max: self.options.request_bytes_max,
        }
    }

    /// Whether a request may take long for reasons of its own (not because the disk is slow), or waits for other machines in any case.
    fn is_slow(&self, request: &Request) -> bool {
        match request.command {
            Command::Write | Command::Trim | Command::WriteZeroes if self.device.waits_for_network() => true,
            Command::Flush => true,
            Command::Write => request.has(FLAG_FUA),
            Command::Trim => request.has(FLAG_FUA) || request.length_bytes > SLOW_RANGE_BYTES,
            Command::Cache => request.length_bytes > SLOW_RANGE_BYTES,
            Command::WriteZeroes => {
                let limit = if request.has(FLAG_NO_HOLE) { SLOW_ALLOCATE_BYTES } else { SLOW_RANGE_BYTES };
                request.has(FLAG_FUA) || request.length_bytes > limit
            }
            Command::BlockStatus => request.length_bytes > SLOW_STATUS_BYTES,
            Command::Read | Command::Disconnect | Command::Unknown => false,
        }
    }

    fn refuse(&self, request: &Request, refusal: &Refusal, batch: &mut Batch) {
        batch.replies.push_error(request, self.options.replies, refusal);
        batch.note();
    }

    /// Executes a checked request and appends its reply.
    fn execute(&self, request: &Request, payload: &[u8], replies: &mut ReplyBuffer) {
        let Request { offset_bytes, length_bytes, .. } = *request;
        let form = self.options.replies;
        let changed = |result: Result<()>| match result {
            Ok(()) if request.has(FLAG_FUA) => self.device.flush(),
            other => other,
        };
        let result = match request.command {
            Command::Read => {
                let may_have_holes = !request.has(FLAG_DF);
                replies.push_read(request, form, may_have_holes, |room| match length_bytes {
                    0 => Ok(()),
                    _ => self.device.read(offset_bytes, room),
                })
            }
            Command::Flush => self.device.flush().map(|()| replies.push_success(request, form)),
            Command::BlockStatus => self.block_status(request, replies),
            Command::Write | Command::Trim | Command::WriteZeroes | Command::Cache if length_bytes == 0 => {
                replies.push_success(request, form);
                Ok(())
            }
            Command::Cache => self.device.prefetch(offset_bytes, length_bytes).map(|()| replies.push_success(request, form)),
            Command::Write => changed(self.device.write(offset_bytes, payload)).map(|()| replies.push_success(request, form)),
            Command::Trim => changed(self.device.discard(offset_bytes, length_bytes)).map(|()| replies.push_success(request, form)),
            Command::WriteZeroes => changed(self.device.write_zeroes(offset_bytes, length_bytes, request.has(FLAG_NO_HOLE)))
                .map(|()| replies.push_success(request, form)),
            Command::Disconnect | Command::Unknown => unreachable!("refused or handled before execution"),
        };
        if let Err(error) = result {
            self.push_failure(request, &error, replies);
        }
    }

    #[inline]
    pub(super) fn note_served(&self, request: &Request, took: Duration) {
        let what = match request.command {
            Command::Read => Served::Read,
            Command::Write => Served::Write,
            Command::Trim | Command::WriteZeroes => Served::Discard,
            Command::Flush => Served::Flush,
            _ => return,
        };
        self.device.note_served(what, took);
    }

    /// Answers a read from what is at hand. False: somebody has to wait for a backend, and nothing was answered.
    fn read_now(&self, request: &Request, replies: &mut ReplyBuffer) -> bool {
        let Request { offset_bytes, length_bytes, .. } = *request;
        let may_have_holes = !request.has(FLAG_DF);
        let read = replies.push_read(request, self.options.replies, may_have_holes, |room| match length_bytes {
            0 => Ok(()),
            _ => match self.device.read_now(offset_bytes, room) {
                Ok(true) => Ok(()),
                Ok(false) => Err(None),
                Err(error) => Err(Some(error)),
            },
        });
        match read {
            Ok(()) => true,
            Err(None) => false,
            Err(Some(error)) => {
                self.push_failure(request, &error, replies);
                true
            }
        }
    }

    pub(super) fn push_failure(&self, request: &Request, error: &EngineError, replies: &mut ReplyBuffer) {
        if error.errno == libc::ESHUTDOWN {
            self.device_is_gone.store(true, Ordering::Release);
            // Wakes the reading thread; the answer still goes out.
            self.socket.shutdown_receive();
        }
        replies.push_error(request, self.options.replies, &refusal_of(error));
    }

    /// Whether a long write can go to the device while the rest of it is still on its way. Nobody was told that it is done, so a
    /// snapshot in between, or a client that leaves, may find a part of it, as a power cut may. What is refused or held back is
    /// received as a whole.
    fn may_write_in_pieces(&self, request: &Request) -> bool {
        request.command == Command::Write
            && !request.has(FLAG_FUA)
            && !self.device.waits_for_network()
            && !self.control.is_draining()
            && request.check(&self.permissions()).is_ok()
            && self.device.try_throttle(request.length_bytes)
    }

    fn write_in_pieces(&self, request: &Request, received: &mut ReceiveBuffer, batch: &mut Batch) -> std::result::Result<(), ServeEnd> {
        let Request { offset_bytes, length_bytes, .. } = *request;
        let mut result = Ok(());
        // The time in the device: how fast a client sends is not ours.
        let mut took = Duration::ZERO;
        let whole = received.receive_in_pieces(&self.socket, length_bytes, offset_bytes, SLOT_BYTES, |at, piece| {
            // After a failure the rest is only consumed.
            if result.is_ok() {
                let started_at = Instant::now();
                result = match at {
                    0 => self.device.write_unsettled(offset_bytes, piece, &mut batch.mark),
                    _ => self.device.write_rest_unsettled(offset_bytes + at, piece, &mut batch.mark),
                };
                took += started_at.elapsed();
            }
        });
        match whole {
            Ok(true) => {}
            Ok(false) => return Err(self.end_of_file(received.available_bytes())),
            Err(error) => return Err(self.broken(&error)),
        }
        self.note_write(request, result, batch);
        batch.note();
        // What follows in the buffer came with the end of this one.
        batch.arrived_at = batch.last_at;
        self.note_served(request, took);
        Ok(())
    }

    /// Answers a write that the device has taken unsettled: the batch is settled before it is sent.
    fn note_write(&self, request: &Request, result: Result<()>, batch: &mut Batch) {
        match result {
            Ok(()) => {
                batch.unsettled.push((batch.replies.bytes().len(), *request));
                batch.replies.push_success(request, self.options.replies);
            }
            Err(error) => self.push_failure(request, &error, &mut batch.replies),
        }
    }

    /// Makes what the batch says true, or makes it say something else.
    fn settle(&self, batch: &mut Batch) {
        let mark = std::mem::take(&mut batch.mark);
        if !batch.unsettled.is_empty()
            && let Err(error) = self.device.settle(mark)
        {
            let said = std::mem::take(&mut batch.replies);
            let mut from = 0;
            for (at, request) in &batch.unsettled {
                batch.replies.push(&said.bytes()[from..*at]);
                self.push_failure(request, &error, &mut batch.replies);
                from = at + success_bytes(self.options.replies);
            }
            batch.replies.push(&said.bytes()[from..]);
        }
        batch.unsettled.clear();
    }

    /// A chunk for each context asked about, all or none of them.
    fn block_status(&self, request: &Request, replies: &mut ReplyBuffer) -> Result<()> {
        let count_max = if request.has(FLAG_REQ_ONE) { 1 } else { STATUS_EXTENT_COUNT_MAX };
        let Request { offset_bytes, length_bytes, .. } = *request;
        let asked = self.options.contexts.iter().enumerate().filter(|(index, _)| request.contexts & (1 << index) != 0);
        let mut statuses: Vec<(u32, Vec<StatusExtent>)> = Vec::new();
        for (_, context) in asked {
            let mut extents = Vec::new();
            match &context.kind {
                MetaContextKind::Allocation => self.device.allocation(offset_bytes, length_bytes, count_max, &mut extents)?,
                MetaContextKind::Depth => self.device.allocation_depth(offset_bytes, length_bytes, count_max, &mut extents)?,
                MetaContextKind::ChangedSince(base) => {
                    self.device.changed_since(base, offset_bytes, length_bytes, count_max, &mut extents)?;
                }
            }
            // The reply must fit the request whatever the device knows about its surroundings.
            let mut left = length_bytes;
            extents.retain_mut(|extent| {
                extent.length_bytes = extent.length_bytes.min(left);
                left -= extent.length_bytes;
                extent.length_bytes > 0
            });
            if extents.is_empty() {
                return Err(EngineError::new("IO_ERROR", libc::EIO, "the device has no status for this range"));
            }
            statuses.push((context.id, extents));
        }
        for (index, (id, extents)) in statuses.iter().enumerate() {
            replies.push_block_status(request, self.options.replies, index + 1 == statuses.len(), *id, extents);
        }
        Ok(())
    }

    /// The life of a worker. A panic ends the connection and nothing else.
    fn work(&self) {
        let mut replies = ReplyBuffer::default();
        while let Some(job) = self.queue.next() {
            if catch_unwind(AssertUnwindSafe(|| self.perform(&job, &mut replies))).is_err() {
                self.fail();
                replies = ReplyBuffer::default();
            }
            self.finished(job.held_bytes);
        }
    }

    /// One request on a worker: throttled if it has to be, executed, answered on its own.
    fn perform(&self, job: &Job, replies: &mut ReplyBuffer) {
        let gives_up = || self.client_is_gone.load(Ordering::Acquire) || self.control.is_draining();
        let bytes = throttle_bytes(&job.request).unwrap_or_default();
        if job.is_throttled && self.device.throttle_unless(bytes, &gives_up) == Admission::Cancelled {
            self.control.note_refused();
            replies.push_error(&job.request, self.options.replies, &shutting_down());
        } else {
            self.execute(&job.request, &job.payload, replies);
            self.note_served(&job.request, job.arrived_at.elapsed());
        }
        // A failure is remembered; the reading thread ends the connection.
        let _ = self.send(replies.bytes());
        replies.clear();
    }

    fn send_batch(&self, batch: &mut Batch) -> std::result::Result<(), ServeEnd> {
        if !batch.ring_reads.is_empty() {
            self.ring_reads.submit(&mut batch.ring_reads);
        }
        if batch.replies.is_empty() {
            return Ok(());
        }
        self.settle(batch);
        let sent = self.send(batch.replies.bytes());
        batch.replies.clear();
        batch.first_at = None;
        sent.map_err(|error| self.broken(&error))
    }

    pub(super) fn send(&self, bytes: &[u8]) -> io::Result<()> {
        let _one_piece = self.lock_sending(true);
        if self.send_failed.load(Ordering::Acquire) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        self.socket.send_all(bytes).inspect_err(|_| self.fail())
    }

    /// The right to send. `None` only for who may not wait: somebody has it, or has left a piece that must be waited for, or the
    /// backend has to be asked first whether the volume is still ours. If it is not, the connection is over.
    pub(super) fn lock_sending(&self, may_wait: bool) -> Option<MutexGuard<'_, Vec<u8>>> {
        let mut unsent = if may_wait { self.sending.lock() } else { self.sending.try_lock()? };
        loop {
            // An answer that took too long proves nothing any more, and what was sent meanwhile takes its time.
            while !self.send_failed.load(Ordering::Acquire) && !self.device.is_proven() {
                if !may_wait {
                    return None;
                }
                if self.device.prove().is_err() {
                    self.fail();
                }
            }
            if unsent.is_empty() {
                return Some(unsent);
            }
            if !may_wait {
                return None;
            }
            let rest = std::mem::take(&mut *unsent);
            // Whoever sends next sees the failure.
            let _ = self.send_part(&rest, true);
        }
    }

    /// Sends a part of a piece, the caller holds `sending`: what goes without a wait, or all of it.
    pub(super) fn send_part(&self, bytes: &[u8], may_wait: bool) -> io::Result<usize> {
        if self.send_failed.load(Ordering::Acquire) {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let sent = if may_wait { self.socket.send_all(bytes).map(|()| bytes.len()) } else { self.socket.send_without_wait(bytes) };
        sent.inspect_err(|_| self.fail())
    }

    /// Half a reply may be out, or one will never come: only the end of the connection is honest now.
    pub(super) fn fail(&self) {
        self.send_failed.store(true, Ordering::Release);
        self.socket.shutdown();
    }

    fn broken(&self, error: &io::Error) -> ServeEnd {
        // With TLS the end of a drain looks like a stream that was cut.
        if self.control.is_draining() {
            return ended(ServeEndReason::Closed, "the connection was closed");
        }
        ended(ServeEndReason::Error, format!("the connection broke: {error}"))
    }

    fn end_of_file(&self, unfinished_bytes: usize) -> ServeEnd {
        if self.control.is_draining() {
            ended(ServeEndReason::Closed, "the connection was closed")
        } else if self.device_is_gone.load(Ordering::Acquire) {
            ended(ServeEndReason::Closed, "the device was closed")
        } else if self.send_failed.load(Ordering::Acquire) {
            ended(ServeEndReason::Error, "a reply could not be sent")
        } else if unfinished_bytes > 0 {
            ended(ServeEndReason::Error, "the client went away in the middle of a request")
        } else {
            ended(ServeEndReason::Eof, "the client went away without saying goodbye")
        }
    }
}

/// Replies of the reading thread that wait to be sent together. The clock is read once for each request, and once when something
/// was received.
struct Batch {
    replies: ReplyBuffer,
    /// Where in them a write is called done that the device has not settled yet, and which.
    unsettled: Vec<(usize, Request)>,
    /// Of the device, before the first of them.
    mark: SettleMark,
    /// Reads for the ring that are not handed over yet, and when they were received.
    ring_reads: Vec<(Request, Instant)>,
    /// When the requests that are looked at now were received.
    arrived_at: Instant,
    /// When the first and the last reply were added.
    first_at: Option<Instant>,
    last_at: Instant,
}

impl Batch {
    fn new() -> Batch {
        let now = Instant::now();
        Batch {
            replies: ReplyBuffer::default(),
            unsettled: Vec::new(),
            mark: SettleMark::default(),
            ring_reads: Vec::new(),
            arrived_at: now,
            first_at: None,
            last_at: now,
        }
    }
    /// A reply was added. Returns for how long its request had been there.
    #[inline]
    fn note(&mut self) -> Duration {
        self.last_at = Instant::now();
        self.first_at.get_or_insert(self.last_at);
        self.last_at - self.arrived_at
    }
    fn is_due(&self) -> bool {
        self.replies.bytes().len() >= BATCH_BYTES_MAX || self.first_at.is_some_and(|at| self.last_at - at >= BATCH_DELAY_MAX)
    }
}

/// What a request costs at the throttle; `None`: nothing (a flush moves no new bytes, a status none at all).
fn throttle_bytes(request: &Request) -> Option<u64> {
    match request.command {
        Command::Read | Command::Write => Some(request.length_bytes),
        Command::Cache => Some(request.length_bytes.min(PREFETCH_BYTES_MAX)),
        Command::Trim | Command::WriteZeroes => Some(0),
        _ => None,
    }
}

fn ended(reason: ServeEndReason, message: impl Into<String>) -> ServeEnd {
    ServeEnd { reason, message: message.into() }
}
