//! Pools of control threads: they run what callers wait for through a promise (open, checkpoint, swap, copies).
//!
//! Rules: a job never waits for a job of the same pool (that is why data calls, which may wait for a checkpoint, have a
//! pool of their own); threads are started when there is work for them and live until the pool is closed; a job that
//! panics ends alone. The queue is bounded (I8).
use crate::thread::spawn_named;
use crate::{EngineError, Result};
use parking_lot::{Condvar, Mutex};
use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;
use std::thread::JoinHandle;

/// Jobs that may wait in one pool; more are refused with `ENGINE_BUSY`.
pub const CONTROL_QUEUE_MAX: usize = 65_536;

type Job = Box<dyn FnOnce() + Send>;

struct State {
    queue: VecDeque<Job>,
    threads: Vec<JoinHandle<()>>,
    idle_count: usize,
    closed: bool,
}

struct Shared {
    state: Mutex<State>,
    work: Condvar,
}

/// A bounded pool of threads with one queue.
pub struct ControlPool {
    name: &'static str,
    thread_count_max: usize,
    shared: Arc<Shared>,
}

impl ControlPool {
    /// A pool that starts up to `thread_count_max` threads as work comes.
    pub fn new(name: &'static str, thread_count_max: usize) -> ControlPool {
        let state = State { queue: VecDeque::new(), threads: Vec::new(), idle_count: 0, closed: false };
        ControlPool { name, thread_count_max, shared: Arc::new(Shared { state: Mutex::new(state), work: Condvar::new() }) }
    }

    /// Queues a job. `ENGINE_CLOSED` after `close`, `ENGINE_BUSY` when the queue is full, `THREAD_LIMIT` when not even
    /// one thread can be started; the job is dropped then.
    pub fn submit(&self, job: impl FnOnce() + Send + 'static) -> Result<()> {
        let mut state = self.shared.state.lock();
        if state.closed {
            return Err(EngineError::new("ENGINE_CLOSED", libc::ESHUTDOWN, "the engine is closed"));
        }
        if state.queue.len() >= CONTROL_QUEUE_MAX {
            let message = format!("{CONTROL_QUEUE_MAX} jobs are waiting for the {} threads already", self.name);
            return Err(EngineError::new("ENGINE_BUSY", libc::EBUSY, message).with("queueLengthMax", CONTROL_QUEUE_MAX));
        }
        if state.queue.len() >= state.idle_count && state.threads.len() < self.thread_count_max {
            let shared = self.shared.clone();
            match spawn_named(self.name, move || run(&shared)) {
                Ok(thread) => state.threads.push(thread),
                // Those that run will get to it.
                Err(error) if state.threads.is_empty() => return Err(error),
                Err(_) => {}
            }
        }
        state.queue.push_back(Box::new(job));
        drop(state);
        self.shared.work.notify_one();
        Ok(())
    }

    /// As `close`, and waits for nobody: the threads end when what is queued is done.
    fn retire(&self) {
        let mut state = self.shared.state.lock();
        state.closed = true;
        state.threads.clear();
        drop(state);
        self.shared.work.notify_all();
    }

    /// Refuses new jobs, waits until those queued are done, ends the threads. Never call it from a job of this pool.
    pub fn close(&self) {
        let threads = {
            let mut state = self.shared.state.lock();
            state.closed = true;
            std::mem::take(&mut state.threads)
        };
        self.shared.work.notify_all();
        for thread in threads {
            // A thread ends in order only; its jobs are guarded.
            let _ = thread.join();
        }
    }
}

impl Drop for ControlPool {
    fn drop(&mut self) {
        self.close();
    }
}

/// Pools of threads for one backend that may hang, so that what waits for it keeps nothing else waiting. They run what the engine's
/// own pools of the same names run. Dropped, they are waited for by nobody.
pub struct Lanes {
    /// For what changes the state of devices, and short calls to the store. Never wait for data calls here.
    pub control: ControlPool,
    /// For data calls to devices.
    pub data: ControlPool,
    /// For what may take long.
    pub bulk: ControlPool,
}

impl Lanes {
    /// Pools without threads, each with as many as is said as work comes.
    pub fn new(control_thread_count: usize, data_thread_count: usize, bulk_thread_count: usize) -> Lanes {
        Lanes {
            control: ControlPool::new("atoll-net-ctl", control_thread_count),
            data: ControlPool::new("atoll-net-data", data_thread_count),
            bulk: ControlPool::new("atoll-net-bulk", bulk_thread_count),
        }
    }

    /// Refuses new jobs, waits until those queued are done, ends the threads. Never call it from a job of these pools.
    pub fn close(&self) {
        self.data.close();
        self.bulk.close();
        self.control.close();
    }
}

impl Drop for Lanes {
    fn drop(&mut self) {
        for pool in [&self.control, &self.data, &self.bulk] {
            pool.retire();
        }
    }
}

fn run(shared: &Shared) {
    let mut state = shared.state.lock();
    loop {
        if let Some(job) = state.queue.pop_front() {
            drop(state);
            // Whoever waits for the job learns of the panic from the job's own guard; here only the thread is saved.
            let _ = catch_unwind(AssertUnwindSafe(job));
            state = shared.state.lock();
        } else if state.closed {
            return;
        } else {
            state.idle_count += 1;
            shared.work.wait(&mut state);
            state.idle_count -= 1;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};
    use std::sync::{Barrier, mpsc};

    #[test]
    fn jobs_run_side_by_side_up_to_the_number_of_threads() {
        let pool = ControlPool::new("test", 3);
        let barrier = Arc::new(Barrier::new(4));
        for _ in 0..3 {
            let barrier = barrier.clone();
            pool.submit(move || {
                barrier.wait();
            })
            .unwrap();
        }
        barrier.wait();
        pool.close();
        assert_eq!(pool.submit(|| {}).unwrap_err().code, "ENGINE_CLOSED");
    }

    #[test]
    fn a_job_that_panics_does_not_take_its_thread_along() {
        let pool = ControlPool::new("test", 1);
        pool.submit(|| std::panic::resume_unwind(Box::new("on purpose"))).unwrap();
        let (sender, receiver) = mpsc::channel();
        pool.submit(move || sender.send(1).unwrap()).unwrap();
        assert_eq!(receiver.recv().unwrap(), 1);
    }

    #[test]
    fn lanes_that_are_dropped_finish_what_is_queued_and_keep_nobody_waiting() {
        let lanes = Lanes::new(1, 1, 1);
        let (release, released) = mpsc::channel::<()>();
        let (done, is_done) = mpsc::channel();
        let last = done.clone();
        lanes.control.submit(move || released.recv().unwrap()).unwrap();
        lanes.control.submit(move || last.send("control").unwrap()).unwrap();
        lanes.data.submit(move || done.send("data").unwrap()).unwrap();
        assert_eq!(is_done.recv(), Ok("data"), "another lane waits for nothing");
        // The first job hangs.
        drop(lanes);
        release.send(()).unwrap();
        assert_eq!(is_done.recv(), Ok("control"));
    }

    #[test]
    fn closing_runs_what_is_queued_and_a_full_queue_refuses() {
        let pool = ControlPool::new("test", 1);
        let (release, released) = mpsc::channel::<()>();
        let (started, is_running) = mpsc::channel();
        pool.submit(move || {
            started.send(()).unwrap();
            released.recv().unwrap();
        })
        .unwrap();
        // Only then the queue is empty.
        is_running.recv().unwrap();
        let done = Arc::new(AtomicUsize::new(0));
        let mut refused = None;
        for _ in 0..=CONTROL_QUEUE_MAX + 1 {
            let done = done.clone();
            if let Err(error) = pool.submit(move || {
                done.fetch_add(1, Ordering::Relaxed);
            }) {
                refused = Some(error.code);
                break;
            }
        }
        assert_eq!(refused, Some("ENGINE_BUSY"));
        release.send(()).unwrap();
        pool.close();
        assert_eq!(done.load(Ordering::Relaxed), CONTROL_QUEUE_MAX);
    }
}
