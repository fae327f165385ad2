//! The queue between a connection's thread and its workers: requests that must not hold up the others.
use super::request::Request;
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::time::Instant;

/// Requests that may wait or run on workers; then the connection stops reading until one is done (I8).
pub(super) const QUEUED_REQUESTS_MAX: usize = 128;

/// Bytes that requests on workers may hold, payloads and what is read; a single larger one may run alone (I8).
pub(super) const QUEUED_PAYLOAD_BYTES_MAX: usize = 64 << 20;

/// Worker threads of one connection, started as they are needed. (Syncs of one device mostly share each other's work; most reads
/// that wait for a disk are the ring's where there is one.)
pub(super) const WORKER_COUNT_MAX: usize = 16;

/// The same where requests wait for the network: so many of those that cannot be begun without a wait are in flight in the cluster.
pub(super) const NETWORK_WORKER_COUNT_MAX: usize = 64;

/// A request on its way to a worker.
pub(super) struct Job {
    pub(super) request: Request,
    /// A copy of its own: the receive buffer goes on.
    pub(super) payload: Vec<u8>,
    /// Bytes that it keeps in memory until it is answered: the payload, or what is read.
    pub(super) held_bytes: usize,
    /// The throttle has not admitted it yet.
    pub(super) is_throttled: bool,
    /// When it was received.
    pub(super) arrived_at: Instant,
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    /// Jobs queued or running, and their payload bytes.
    in_flight_count: usize,
    in_flight_bytes: usize,
    idle_count: usize,
    worker_count: usize,
    is_closed: bool,
    /// Requests will never be finished: nobody waits for them.
    is_given_up: bool,
}

impl State {
    fn has_room(&self, payload_bytes: usize) -> bool {
        self.in_flight_count == 0
            || self.is_given_up
            || (self.in_flight_count < QUEUED_REQUESTS_MAX && self.in_flight_bytes + payload_bytes <= QUEUED_PAYLOAD_BYTES_MAX)
    }
}

/// The queue. One thread submits, workers take.
#[derive(Default)]
pub(super) struct WorkQueue {
    state: Mutex<State>,
    work: Condvar,
    room: Condvar,
}

impl WorkQueue {
    /// Whether `submit` of a request with this payload would not wait.
    pub(super) fn has_room(&self, payload_bytes: usize) -> bool {
        self.state.lock().has_room(payload_bytes)
    }

    /// Takes room for a request that holds so many bytes, waiting for it; `finished` gives it back.
    pub(super) fn take_room(&self, held_bytes: usize) {
        let mut state = self.state.lock();
        while !state.has_room(held_bytes) {
            self.room.wait(&mut state);
        }
        state.in_flight_count += 1;
        state.in_flight_bytes += held_bytes;
    }

    /// Queues a job that room was taken for. True: nobody is free for it and another worker may be started, of which there are less than
    /// `worker_count_max`; call `worker_missing` if that fails.
    pub(super) fn submit(&self, job: Job, worker_count_max: usize) -> bool {
        let mut state = self.state.lock();
        state.jobs.push_back(job);
        let wants_worker = state.jobs.len() > state.idle_count && state.worker_count < worker_count_max;
        if wants_worker {
            state.worker_count += 1;
        }
        drop(state);
        self.work.notify_one();
        wants_worker
    }

    /// The worker that `submit` asked for could not be started. If there is none at all, the job comes back.
    pub(super) fn worker_missing(&self) -> Option<Job> {
        let mut state = self.state.lock();
        state.worker_count -= 1;
        if state.worker_count > 0 {
            return None;
        }
        state.jobs.pop_back()
    }

    /// The next job; `None` once the queue is closed and empty.
    pub(super) fn next(&self) -> Option<Job> {
        let mut state = self.state.lock();
        loop {
            if let Some(job) = state.jobs.pop_front() {
                return Some(job);
            }
            if state.is_closed {
                return None;
            }
            state.idle_count += 1;
            self.work.wait(&mut state);
            state.idle_count -= 1;
        }
    }

    /// A job with this payload is done.
    pub(super) fn finished(&self, payload_bytes: usize) {
        let mut state = self.state.lock();
        state.in_flight_count -= 1;
        state.in_flight_bytes -= payload_bytes;
        drop(state);
        self.room.notify_one();
    }

    /// The connection is broken, and some of what room was taken for is lost: nobody waits for room any more.
    pub(super) fn give_up(&self) {
        self.state.lock().is_given_up = true;
        self.room.notify_all();
    }

    /// Nothing more is submitted; workers end when the queue is empty.
    pub(super) fn close(&self) {
        self.state.lock().is_closed = true;
        self.work.notify_all();
    }
}

/// Closes the queue however its owner leaves, also by a panic: workers would wait for ever otherwise.
pub(super) struct CloseOnDrop<'a>(pub(super) &'a WorkQueue);

impl Drop for CloseOnDrop<'_> {
    fn drop(&mut self) {
        self.0.close();
    }
}

#[cfg(test)]
mod tests {
    use super::super::request::{ALL_CONTEXTS, Command};
    use super::*;

    fn job(payload_bytes: usize) -> Job {
        let request = Request {
            flags: 0,
            command: Command::Write,
            cookie: 0,
            offset_bytes: 0,
            length_bytes: 0,
            payload_bytes: 0,
            contexts: ALL_CONTEXTS,
        };
        Job { request, payload: vec![0; payload_bytes], held_bytes: payload_bytes, is_throttled: false, arrived_at: Instant::now() }
    }

    fn submit(queue: &WorkQueue, job: Job) -> bool {
        queue.take_room(job.held_bytes);
        queue.submit(job, WORKER_COUNT_MAX)
    }

    #[test]
    fn requests_and_payload_bytes_are_bounded_but_one_large_request_may_run_alone() {
        let queue = WorkQueue::default();
        assert!(queue.has_room(QUEUED_PAYLOAD_BYTES_MAX * 2));
        for _ in 0..QUEUED_REQUESTS_MAX {
            assert!(queue.has_room(0));
            submit(&queue, job(0));
        }
        assert!(!queue.has_room(0));
        queue.next().unwrap();
        queue.finished(0);
        assert!(queue.has_room(0));
        assert!(!queue.has_room(QUEUED_PAYLOAD_BYTES_MAX + 1));
        submit(&queue, job(100));
        queue.next().unwrap();
        assert!(!queue.has_room(0));
        queue.finished(0);
        assert!(!queue.has_room(QUEUED_PAYLOAD_BYTES_MAX - 99));
        assert!(queue.has_room(QUEUED_PAYLOAD_BYTES_MAX - 100));
    }

    #[test]
    fn workers_are_asked_for_up_to_the_bound_and_a_job_without_any_comes_back() {
        let queue = WorkQueue::default();
        assert!(submit(&queue, job(1)));
        assert_eq!(queue.worker_missing().map(|job| job.payload.len()), Some(1));
        queue.finished(1);
        for _ in 0..WORKER_COUNT_MAX {
            assert!(submit(&queue, job(0)));
        }
        assert!(!submit(&queue, job(0)));
        assert!(queue.worker_missing().is_none(), "others will get to it");
    }

    #[test]
    fn a_closed_queue_is_emptied_before_the_workers_end() {
        let queue = WorkQueue::default();
        submit(&queue, job(0));
        queue.close();
        assert!(queue.next().is_some());
        assert!(queue.next().is_none());
    }
}
