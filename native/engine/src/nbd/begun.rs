//! Requests that a backend carries out while nobody waits for them: begun by the reading thread, answered when their end is told.
//!
//! Rules
//! - What is to be done at the end of a request (owner, gate, locks) is done by whoever tells it, before the answer is even queued. So
//!   nobody who waits for the device waits for a client that takes its answers slowly, nor for the batch log.
//! - Whoever tells an end waits for nothing. It sends the answer itself if few requests are under way, nothing has to be settled and
//!   the socket takes it; otherwise the answering thread of the connection does, and sends together what has come together.
//! - One of them answers at a time, and looks again before it stops: an answer that is queued is sent by whoever answers, or by who
//!   queued it.
use super::reply::{ReplyBuffer, complete_read, read_header_bytes};
use super::request::{Command, FLAG_DF, Request};
use super::serve::Session;
use crate::Result;
use crate::device::{BegunRead, BegunWrite, SettleMark};
use atoll_io::Ending;
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, OnceLock};
use std::thread::Scope;
use std::time::Instant;

/// With more requests under way than this the answering thread answers, many at once: a wake-up costs less than as many sends.
const TELLER_ANSWERS_MAX: usize = 2;

/// A longer read is sent out of the buffer that it was read into, and by a thread that may wait for the client.
const COPIED_BYTES_MAX: usize = 64 << 10;

/// Memory of buffers that wait to be used again (I8).
const SPARE_BYTES_MAX: usize = 16 << 20;
const SPARE_COUNT_MAX: usize = 64;

/// A request whose end was told.
struct Ended {
    request: Request,
    outcome: Result<SettleMark>,
    /// Of a read: room for a header, and the data behind it.
    buffer: Vec<u8>,
    held_bytes: usize,
}

#[derive(Default)]
struct State {
    ended: Vec<Ended>,
    /// Requests under way.
    begun_count: usize,
    /// Somebody answers, or is about to.
    is_answering: bool,
    /// That somebody is the thread, which may be on its way.
    is_threads_turn: bool,
    /// Nothing more is begun.
    is_closed: bool,
    /// An answer will never come: nobody waits for it.
    is_lost: bool,
    spare: Vec<Vec<u8>>,
    spare_bytes: usize,
}

/// Requests under way of one connection, and answers that wait.
#[derive(Default)]
pub(super) struct BegunRequests {
    state: Mutex<State>,
    /// The thread has its turn, or nothing more will come.
    turn: Condvar,
    /// False: it could not be started. Set by the reading thread, at the first request.
    is_started: OnceLock<bool>,
}

impl BegunRequests {
    /// Nothing more is begun; the answering thread ends when all has been answered.
    fn close(&self) {
        self.state.lock().is_closed = true;
        self.turn.notify_one();
    }

    fn take_buffer(&self, length: usize) -> Vec<u8> {
        let mut state = self.state.lock();
        let mut buffer = state.spare.pop().unwrap_or_default();
        state.spare_bytes -= buffer.capacity();
        drop(state);
        buffer.resize(length, 0);
        buffer
    }
}

/// Closes the queue however its owner leaves.
pub(super) struct CloseBegunOnDrop<'a>(pub(super) &'a BegunRequests);

impl Drop for CloseBegunOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

/// What the end of a request is told to.
struct Teller<T> {
    session: Arc<Session>,
    request: Request,
    arrived_at: Instant,
    buffer: Vec<u8>,
    begun: Option<T>,
}

impl<T> Teller<T> {
    fn tell(self, finish: impl FnOnce(T, &Request) -> Result<SettleMark>) {
        let Teller { session, request, arrived_at, buffer, begun } = self;
        let held_bytes = request.length_bytes as usize;
        // No panic may get into a thread of a backend.
        let told = catch_unwind(AssertUnwindSafe(|| {
            let outcome = begun.map_or_else(|| Ok(SettleMark::default()), |begun| finish(begun, &request));
            session.note_served(&request, arrived_at.elapsed());
            session.answer(Ended { request, outcome, buffer, held_bytes });
        }));
        if told.is_err() {
            session.fail();
            session.queue.give_up();
            session.begun.state.lock().is_lost = true;
            session.begun.turn.notify_one();
        }
    }
}

impl Ending for Teller<BegunRead> {
    fn room(&mut self) -> &mut [u8] {
        &mut self.buffer[read_header_bytes(self.session.options.replies)..]
    }
    fn ended(self: Box<Self>, result: atoll_io::Result<()>) {
        self.tell(|read, request| read.finish(result, request.length_bytes).map(|()| SettleMark::default()));
    }
}

impl Ending for Teller<BegunWrite> {
    fn room(&mut self) -> &mut [u8] {
        &mut []
    }
    fn ended(self: Box<Self>, result: atoll_io::Result<()>) {
        self.tell(|write, _| write.finish(result));
    }
}

impl Session {
    /// Begins a read or a write that room was taken for. False: it has to be waited for.
    pub(super) fn begin<'scope>(
        &'scope self,
        scope: &'scope Scope<'scope, '_>,
        request: &Request,
        payload: &[u8],
        arrived_at: Instant,
    ) -> bool {
        let (Some(session), true) = (self.myself.upgrade(), self.has_answering_thread(scope)) else { return false };
        let request = *request;
        let Request { offset_bytes, length_bytes, .. } = request;
        self.begun.state.lock().begun_count += 1;
        let is_begun = if request.command == Command::Read {
            let buffer = self.begun.take_buffer(read_header_bytes(self.options.replies) + length_bytes as usize);
            self.device.begin_read(offset_bytes, length_bytes, |begun| {
                Box::new(Teller { session, request, arrived_at, buffer, begun: Some(begun) })
            })
        } else {
            self.device.begin_write(offset_bytes, payload, |begun| {
                Box::new(Teller { session, request, arrived_at, buffer: Vec::new(), begun: Some(begun) })
            })
        };
        if !is_begun {
            self.begun.state.lock().begun_count -= 1;
        }
        is_begun
    }

    fn has_answering_thread<'scope>(&'scope self, scope: &'scope Scope<'scope, '_>) -> bool {
        *self.begun.is_started.get_or_init(|| {
            let body = move || {
                if catch_unwind(AssertUnwindSafe(|| self.answer_until_closed())).is_err() {
                    self.fail();
                    self.queue.give_up();
                }
            };
            std::thread::Builder::new().name("atoll-nbd-reply".to_owned()).spawn_scoped(scope, body).is_ok()
        })
    }

    /// Queues an answer, and sees to it that somebody sends it. Waits for nothing.
    fn answer(&self, ended: Ended) {
        let mut state = self.begun.state.lock();
        let is_for_thread = state.begun_count > TELLER_ANSWERS_MAX
            || ended.buffer.len() > COPIED_BYTES_MAX
            || ended.outcome.as_ref().is_ok_and(|mark| !self.device.is_settled(mark));
        state.begun_count -= 1;
        state.ended.push(ended);
        if state.is_answering {
            return;
        }
        state.is_answering = true;
        let sending = if is_for_thread { None } else { self.lock_sending(false) };
        let Some(mut unsent) = sending else { return self.give_turn(state) };
        let mut ended = std::mem::take(&mut state.ended);
        drop(state);
        for ended in &mut ended {
            self.send_at_once(ended, &mut unsent);
        }
        let is_sent = unsent.is_empty();
        drop(unsent);
        self.give_back(&mut ended);
        let mut state = self.begun.state.lock();
        if is_sent && state.ended.is_empty() {
            state.is_answering = false;
            // The thread may wait for this one to be the last.
            if state.is_closed {
                self.begun.turn.notify_one();
            }
        } else {
            self.give_turn(state);
        }
    }

    fn give_turn(&self, mut state: MutexGuard<'_, State>) {
        state.is_threads_turn = true;
        drop(state);
        self.begun.turn.notify_one();
    }

    /// Sends an answer as far as it goes without a wait, and adds the rest to what is not sent.
    fn send_at_once(&self, ended: &mut Ended, unsent: &mut Vec<u8>) {
        let form = self.options.replies;
        let mut replies = ReplyBuffer::default();
        let bytes = if ended.outcome.is_ok() && !ended.buffer.is_empty() {
            let used = complete_read(&mut ended.buffer, &ended.request, form, !ended.request.has(FLAG_DF));
            &ended.buffer[..used]
        } else {
            self.push_ended(ended, &mut replies);
            replies.bytes()
        };
        // After a failure nobody waits for the rest.
        let sent_bytes = if unsent.is_empty() { self.send_part(bytes, false).unwrap_or(bytes.len()) } else { 0 };
        unsent.extend_from_slice(&bytes[sent_bytes..]);
    }

    /// The life of the answering thread.
    fn answer_until_closed(&self) {
        let mut replies = ReplyBuffer::default();
        let mut ended = Vec::new();
        let mut state = self.begun.state.lock();
        loop {
            while !state.is_threads_turn {
                if state.is_lost || (state.is_closed && state.begun_count == 0 && !state.is_answering) {
                    return;
                }
                self.begun.turn.wait(&mut state);
            }
            std::mem::swap(&mut state.ended, &mut ended);
            drop(state);
            self.answer_all(&mut ended, &mut replies);
            self.give_back(&mut ended);
            state = self.begun.state.lock();
            if state.ended.is_empty() {
                state.is_threads_turn = false;
                state.is_answering = false;
            }
        }
    }

    /// Settles and sends, however long that takes. A failure is remembered; the reading thread ends the connection.
    fn answer_all(&self, ended: &mut [Ended], replies: &mut ReplyBuffer) {
        let mut mark = SettleMark::default();
        for ended in ended.iter_mut() {
            if let Ok(its) = &mut ended.outcome {
                mark.join(std::mem::take(its));
            }
        }
        if let Err(error) = self.device.settle(mark) {
            for ended in ended.iter_mut().filter(|ended| ended.buffer.is_empty() && ended.outcome.is_ok()) {
                ended.outcome = Err(error.clone());
            }
        }
        for ended in ended.iter_mut() {
            if ended.buffer.len() > COPIED_BYTES_MAX && ended.outcome.is_ok() {
                let _ = self.send(replies.bytes());
                replies.clear();
                let may_have_holes = !ended.request.has(FLAG_DF);
                let used = complete_read(&mut ended.buffer, &ended.request, self.options.replies, may_have_holes);
                let _ = self.send(&ended.buffer[..used]);
            } else {
                self.push_ended(ended, replies);
            }
        }
        // Also what somebody has left half-way.
        let _ = self.send(replies.bytes());
        replies.clear();
    }

    fn push_ended(&self, ended: &mut Ended, replies: &mut ReplyBuffer) {
        let Ended { request, outcome, buffer, .. } = ended;
        let form = self.options.replies;
        match outcome {
            Err(error) => self.push_failure(request, error, replies),
            Ok(_) if buffer.is_empty() => replies.push_success(request, form),
            Ok(_) => replies.push_prepared_read(buffer, request, form, !request.has(FLAG_DF)),
        }
    }

    /// Answered: what each held is free again.
    fn give_back(&self, ended: &mut Vec<Ended>) {
        ended.iter().for_each(|ended| self.finished(ended.held_bytes));
        let mut state = self.begun.state.lock();
        for Ended { buffer, .. } in ended.drain(..) {
            let bytes = buffer.capacity();
            if bytes > 0 && state.spare.len() < SPARE_COUNT_MAX && state.spare_bytes + bytes <= SPARE_BYTES_MAX {
                state.spare_bytes += bytes;
                state.spare.push(buffer);
            }
        }
    }
}
