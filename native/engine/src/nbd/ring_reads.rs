//! Reads that have to wait for a disk, all those of a connection on one thread: the kernel carries them out, many at a time, and
//! what is done together is answered together.
//!
//! Rules
//! - A read is inside the device's gate while the kernel has it, and a snapshot waits for it. So this thread waits for nothing but
//!   reads (and to be woken) while it has any: not for the gate, not for a client that takes its answers slowly.
//! - What cannot go this way (parts of several layers, a layer that is no file, a ring that the kernel refused) goes to the workers.
use super::reply::{ReplyBuffer, read_header_bytes};
use super::request::{FLAG_DF, Request};
use super::serve::Session;
use crate::device::{ReadPlan, StartedRead};
use atoll_io::{ReadRing, RingRead, RingWaker};
use parking_lot::{Mutex, MutexGuard};
use std::collections::VecDeque;
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::Scope;
use std::time::Instant;

/// Longer reads go to the workers: they wait for bandwidth, and their answers would be copied once more.
pub(super) const RING_READ_BYTES_MAX: u64 = 256 << 10;

/// Reads that the kernel has at a time.
const RING_READS_MAX: u32 = 64;

/// A buffer longer than this is not kept for the next read (I8).
const SPARE_BYTES_MAX: usize = 64 << 10;

/// What the reading thread hands to the thread of the ring.
#[derive(Default)]
pub(super) struct RingReads {
    waiting: Mutex<VecDeque<(Request, Instant)>>,
    is_closed: AtomicBool,
    /// The thread of the ring sleeps, or is about to look once more and then sleep.
    is_asleep: AtomicBool,
    /// False: it could not be started. Set by the reading thread, at the first read.
    pub(super) is_started: OnceLock<bool>,
    waker: OnceLock<RingWaker>,
}

impl RingReads {
    /// Hands over reads that room was taken for, and leaves `requests` empty.
    pub(super) fn submit(&self, requests: &mut Vec<(Request, Instant)>) {
        self.waiting.lock().extend(requests.drain(..));
        self.wake();
    }

    /// Nothing more is handed over.
    pub(super) fn close(&self) {
        self.is_closed.store(true, Ordering::SeqCst);
        self.wake();
    }

    fn wake(&self) {
        if self.is_asleep.swap(false, Ordering::SeqCst)
            && let Some(waker) = self.waker.get()
        {
            waker.wake();
        }
    }

    /// Moves what was handed over to `pending`.
    fn take(&self, pending: &mut VecDeque<(Request, Instant)>) {
        self.is_asleep.store(false, Ordering::SeqCst);
        pending.append(&mut self.waiting.lock());
    }

    /// Whether the thread may sleep now: whoever comes from now on wakes it.
    fn fall_asleep(&self) -> bool {
        self.is_asleep.store(true, Ordering::SeqCst);
        self.waiting.lock().is_empty() && !self.is_closed.load(Ordering::SeqCst)
    }

    fn is_over(&self) -> bool {
        self.is_closed.load(Ordering::SeqCst) && self.waiting.lock().is_empty()
    }
}

/// Closes the queue however its owner leaves.
pub(super) struct CloseReadsOnDrop<'a>(pub(super) &'a RingReads);

impl Drop for CloseReadsOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

type Tag<'a> = (Request, Instant, StartedRead<'a>);

/// Answers that are on their way out.
#[derive(Default)]
struct Outbox<'a> {
    replies: ReplyBuffer,
    sent_bytes: usize,
    /// Bytes that each of the answered requests holds.
    held: Vec<usize>,
    /// From the first byte to the last.
    sending: Option<MutexGuard<'a, Vec<u8>>>,
}

impl Session {
    /// The life of the ring's thread. After an error some of the reads that room was taken for are never answered.
    pub(super) fn serve_reads<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) -> io::Result<()> {
        let made = RingWaker::new().and_then(|waker| Ok((ReadRing::new(RING_READS_MAX, waker.clone())?, waker)));
        let Ok((ring, waker)) = made else { return self.pass_on_all(scope) };
        // Whoever handed something over before found nobody asleep, and it is looked for before the first sleep.
        let _ = self.ring_reads.waker.set(waker);
        self.read_until_closed(scope, ring)
    }

    /// Without a ring: everything goes to the workers, for as long as something comes.
    fn pass_on_all<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) -> io::Result<()> {
        let waker = RingWaker::new()?;
        let _ = self.ring_reads.waker.set(waker.clone());
        let mut pending = VecDeque::new();
        while !self.ring_reads.is_over() {
            if self.ring_reads.fall_asleep() {
                waker.wait();
            }
            self.ring_reads.take(&mut pending);
            pending.drain(..).for_each(|request| self.pass_on(scope, request));
        }
        Ok(())
    }

    fn read_until_closed<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>, mut ring: ReadRing<Tag<'scope>>) -> io::Result<()> {
        let mut pending = VecDeque::new();
        let mut done = Vec::new();
        let mut spare = Vec::new();
        let mut outbox = Outbox::default();
        loop {
            self.ring_reads.take(&mut pending);
            // With answers waiting for the client nothing new is begun, so that what is in flight comes to an end.
            if outbox.held.is_empty() {
                self.begin_reads(scope, &mut ring, &mut pending, &mut spare, &mut outbox);
            }
            if ring.in_flight() == 0 && outbox.held.is_empty() && pending.is_empty() && self.ring_reads.is_over() {
                return Ok(());
            }
            // What is to be answered without a read does not wait for one.
            let may_sleep = (outbox.held.is_empty() || ring.in_flight() > 0) && (ring.in_flight() > 0 || pending.is_empty());
            let may_sleep = may_sleep && self.ring_reads.fall_asleep();
            ring.wait(may_sleep, &mut done)?;
            for read in done.drain(..) {
                self.answer_read(read, &mut spare, &mut outbox);
            }
            if !outbox.held.is_empty() {
                self.send_outbox(&mut outbox, ring.in_flight() == 0);
            }
        }
    }

    fn begin_reads<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        ring: &mut ReadRing<Tag<'scope>>,
        pending: &mut VecDeque<(Request, Instant)>,
        spare: &mut Vec<Vec<u8>>,
        outbox: &mut Outbox<'_>,
    ) {
        while ring.has_room()
            && let Some((request, arrived_at)) = pending.pop_front()
        {
            match self.device.plan_read(request.offset_bytes, request.length_bytes, ring.in_flight() == 0) {
                Ok(ReadPlan::File(file, read)) => {
                    let from = read_header_bytes(self.options.replies);
                    let mut buffer = spare.pop().unwrap_or_default();
                    buffer.resize(from + request.length_bytes as usize, 0);
                    ring.push(file, request.offset_bytes, buffer, from, (request, arrived_at, read));
                }
                Ok(ReadPlan::Otherwise) => self.pass_on(scope, (request, arrived_at)),
                Ok(ReadPlan::GateClosed) => return pending.push_front((request, arrived_at)),
                Err(error) => {
                    self.push_failure(&request, &error, &mut outbox.replies);
                    self.note_served(&request, arrived_at.elapsed());
                    outbox.held.push(request.length_bytes as usize);
                }
            }
        }
    }

    fn answer_read(&self, read: RingRead<Tag<'_>>, spare: &mut Vec<Vec<u8>>, outbox: &mut Outbox<'_>) {
        let RingRead { tag: (request, arrived_at, started), mut buffer, result } = read;
        let form = self.options.replies;
        let room = &mut buffer[read_header_bytes(form)..];
        match self.device.finish_read(started, request.offset_bytes, result.ok(), room) {
            Ok(()) => outbox.replies.push_prepared_read(&mut buffer, &request, form, !request.has(FLAG_DF)),
            Err(error) => self.push_failure(&request, &error, &mut outbox.replies),
        }
        self.note_served(&request, arrived_at.elapsed());
        outbox.held.push(request.length_bytes as usize);
        if buffer.len() <= SPARE_BYTES_MAX && spare.len() < RING_READS_MAX as usize {
            spare.push(buffer);
        }
    }

    /// Sends as much as goes, and all of it if that `may_wait`.
    fn send_outbox<'scope>(&'scope self, outbox: &mut Outbox<'scope>, may_wait: bool) {
        if outbox.sending.is_none() {
            outbox.sending = self.lock_sending(may_wait);
        }
        if outbox.sending.is_some() {
            let rest = &outbox.replies.bytes()[outbox.sent_bytes..];
            match self.send_part(rest, may_wait) {
                Ok(count) => outbox.sent_bytes += count,
                // The connection is over: nobody waits for the rest.
                Err(_) => outbox.sent_bytes = outbox.replies.bytes().len(),
            }
            if outbox.sent_bytes == outbox.replies.bytes().len() {
                outbox.sending = None;
                outbox.sent_bytes = 0;
                outbox.replies.clear();
                outbox.held.drain(..).for_each(|held_bytes| self.finished(held_bytes));
            }
        }
    }
}
