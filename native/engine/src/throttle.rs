//! Rate limits of one device: operations and bytes a second, with a burst.
//!
//! Rules: a request is admitted when both buckets hold what it costs (or are full, where it costs more than a full
//! bucket: the rest is debt that later requests wait for, so the average rate holds and no request is too large).
//! Waiting requests are admitted in the order they came. While no limit is set a request costs one relaxed load.
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::collections::VecDeque;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

/// Limits; 0 = unlimited.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ThrottleLimits {
    /// Operations a second.
    pub operations_per_second: u64,
    /// Bytes a second.
    pub bytes_per_second: u64,
    /// Operations that may be done at once after a pause (0: a tenth of a second's worth).
    pub burst_operations: u64,
    /// Bytes that may be moved at once after a pause (0: a tenth of a second's worth).
    pub burst_bytes: u64,
}

/// How a request got past the throttle.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admission {
    /// Without waiting.
    AtOnce,
    /// After a wait.
    AfterWait,
    /// Not at all: the caller's condition ended the wait; nothing was charged.
    Cancelled,
}

/// How often a waiting request looks at its caller's condition; bounds how late a cancellation is seen.
const CANCEL_CHECK_INTERVAL: Duration = Duration::from_millis(50);

/// Longest single wait, so that absurdly small rates cannot overflow the arithmetic; the request then waits again.
const WAIT_MAX: Duration = Duration::from_secs(3600);

/// Where time comes from. Tests hand in one that they move themselves.
trait Clock: Send + Sync {
    /// Time since a fixed point.
    fn now(&self) -> Duration;
    /// Waits for a notification, at most `timeout`.
    fn wait(&self, condition: &Condvar, state: &mut MutexGuard<'_, State>, timeout: Duration);
}

struct MonotonicClock {
    start: Instant,
}

impl Clock for MonotonicClock {
    fn now(&self) -> Duration {
        self.start.elapsed()
    }
    fn wait(&self, condition: &Condvar, state: &mut MutexGuard<'_, State>, timeout: Duration) {
        condition.wait_for(state, timeout);
    }
}

/// One token bucket. A rate of 0 admits everything.
#[derive(Debug, Clone, Copy)]
struct Bucket {
    per_second: f64,
    capacity: f64,
    level: f64,
}

impl Bucket {
    fn full(per_second: u64, burst: u64) -> Bucket {
        let capacity = if burst == 0 { (per_second as f64 / 10.0).max(1.0) } else { burst as f64 };
        Bucket { per_second: per_second as f64, capacity, level: capacity }
    }
    fn is_unlimited(&self) -> bool {
        self.per_second == 0.0
    }
    fn refill(&mut self, elapsed: Duration) {
        self.level = (self.level + self.per_second * elapsed.as_secs_f64()).min(self.capacity);
    }
    /// How long until a request of this cost is admitted; zero: now.
    fn wait_for(&self, cost: f64) -> Duration {
        let missing = cost.min(self.capacity) - self.level;
        // A remainder below a thousandth of a token is rounding, not debt: waiting for it would spin.
        if self.is_unlimited() || missing <= 1e-3 {
            return Duration::ZERO;
        }
        Duration::from_secs_f64((missing / self.per_second).min(WAIT_MAX.as_secs_f64())).max(Duration::from_micros(1))
    }
    fn charge(&mut self, cost: f64) {
        if !self.is_unlimited() {
            self.level -= cost;
        }
    }
}

struct State {
    limits: ThrottleLimits,
    operations: Bucket,
    bytes: Bucket,
    refilled_at: Duration,
    /// Tickets of the waiting requests, oldest first. Bounded by the number of threads that may call.
    waiting: VecDeque<u64>,
    next_ticket: u64,
}

impl State {
    fn is_unlimited(&self) -> bool {
        self.operations.is_unlimited() && self.bytes.is_unlimited()
    }
    fn refill(&mut self, now: Duration) {
        let elapsed = now.saturating_sub(self.refilled_at);
        self.refilled_at = now;
        self.operations.refill(elapsed);
        self.bytes.refill(elapsed);
    }
    /// Charges the request and returns zero, or returns how long it has to wait.
    fn admit(&mut self, now: Duration, bytes: u64) -> Duration {
        self.refill(now);
        let wait = self.operations.wait_for(1.0).max(self.bytes.wait_for(bytes as f64));
        if wait.is_zero() {
            self.operations.charge(1.0);
            self.bytes.charge(bytes as f64);
        }
        wait
    }
    fn leave(&mut self, ticket: u64) {
        self.waiting.retain(|other| *other != ticket);
    }
}

/// Token buckets; free of cost while unlimited. Any thread may call any method.
pub struct Throttle {
    /// Mirrors `State::is_unlimited`, so that an unlimited device takes no lock.
    unlimited: AtomicBool,
    state: Mutex<State>,
    changed: Condvar,
    clock: Box<dyn Clock>,
}

impl Throttle {
    /// A throttle with full buckets.
    pub fn new(limits: ThrottleLimits) -> Throttle {
        Throttle::with_clock(limits, Box::new(MonotonicClock { start: Instant::now() }))
    }

    fn with_clock(limits: ThrottleLimits, clock: Box<dyn Clock>) -> Throttle {
        let state = State {
            limits,
            operations: Bucket::full(limits.operations_per_second, limits.burst_operations),
            bytes: Bucket::full(limits.bytes_per_second, limits.burst_bytes),
            refilled_at: clock.now(),
            waiting: VecDeque::new(),
            next_ticket: 0,
        };
        Throttle { unlimited: AtomicBool::new(state.is_unlimited()), state: Mutex::new(state), changed: Condvar::new(), clock }
    }

    /// The limits in force.
    pub fn limits(&self) -> ThrottleLimits {
        self.state.lock().limits
    }

    /// Changes the limits. Waiting requests are looked at again at once; a lowered burst takes effect at once, a raised
    /// one fills up at the new rate, and a limit that was not there before starts with a full bucket.
    pub fn set_limits(&self, limits: ThrottleLimits) {
        let mut state = self.state.lock();
        state.refill(self.clock.now());
        let mut operations = Bucket::full(limits.operations_per_second, limits.burst_operations);
        if !state.operations.is_unlimited() {
            operations.level = state.operations.level.min(operations.capacity);
        }
        let mut bytes = Bucket::full(limits.bytes_per_second, limits.burst_bytes);
        if !state.bytes.is_unlimited() {
            bytes.level = state.bytes.level.min(bytes.capacity);
        }
        state.limits = limits;
        state.operations = operations;
        state.bytes = bytes;
        self.unlimited.store(state.is_unlimited(), Ordering::Release);
        drop(state);
        self.changed.notify_all();
    }

    /// Admits one request of `bytes` without waiting, or says no and charges nothing. No while others wait: nobody overtakes.
    pub fn try_acquire(&self, bytes: u64) -> bool {
        if self.unlimited.load(Ordering::Acquire) {
            return true;
        }
        let mut state = self.state.lock();
        state.waiting.is_empty() && state.admit(self.clock.now(), bytes).is_zero()
    }

    /// Blocks the calling thread until one request of `bytes` is admitted. True if it had to wait.
    pub fn acquire(&self, bytes: u64) -> bool {
        self.acquire_unless(bytes, &|| false) == Admission::AfterWait
    }

    /// As `acquire`, but gives up when `cancelled` says so (seen within 50 ms, at once after `set_limits`).
    pub fn acquire_unless(&self, bytes: u64, cancelled: &dyn Fn() -> bool) -> Admission {
        if self.unlimited.load(Ordering::Acquire) {
            return Admission::AtOnce;
        }
        let mut state = self.state.lock();
        if state.waiting.is_empty() && state.admit(self.clock.now(), bytes).is_zero() {
            return Admission::AtOnce;
        }
        let ticket = state.next_ticket;
        state.next_ticket += 1;
        state.waiting.push_back(ticket);
        loop {
            let mut wait = CANCEL_CHECK_INTERVAL;
            let admission = if cancelled() {
                Some(Admission::Cancelled)
            } else if state.is_unlimited() {
                Some(Admission::AfterWait)
            } else if state.waiting.front() == Some(&ticket) {
                wait = state.admit(self.clock.now(), bytes).min(CANCEL_CHECK_INTERVAL);
                wait.is_zero().then_some(Admission::AfterWait)
            } else {
                None
            };
            if let Some(admission) = admission {
                state.leave(ticket);
                drop(state);
                // The next in line may be admitted already.
                self.changed.notify_all();
                return admission;
            }
            self.clock.wait(&self.changed, &mut state, wait);
        }
    }

    /// Requests that wait at this moment.
    pub fn waiting_count(&self) -> usize {
        self.state.lock().waiting.len()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;

    /// Time that passes only when somebody waits, and then at once.
    #[derive(Clone, Default)]
    struct ManualClock {
        now: Arc<Mutex<Duration>>,
    }
    impl ManualClock {
        fn advance(&self, by: Duration) {
            *self.now.lock() += by;
        }
    }
    impl Clock for ManualClock {
        fn now(&self) -> Duration {
            *self.now.lock()
        }
        fn wait(&self, _: &Condvar, _: &mut MutexGuard<'_, State>, timeout: Duration) {
            self.advance(timeout);
        }
    }

    fn throttle(limits: ThrottleLimits) -> (Throttle, ManualClock) {
        let clock = ManualClock::default();
        (Throttle::with_clock(limits, Box::new(clock.clone())), clock)
    }

    #[test]
    fn without_limits_nothing_ever_waits() {
        let (throttle, clock) = throttle(ThrottleLimits::default());
        for _ in 0..1000 {
            assert!(!throttle.acquire(1 << 30));
        }
        assert_eq!(clock.now(), Duration::ZERO);
    }

    #[test]
    fn operations_pass_at_the_rate_once_the_burst_is_used_up() {
        let (throttle, clock) = throttle(ThrottleLimits { operations_per_second: 100, burst_operations: 20, ..Default::default() });
        for _ in 0..20 {
            assert!(!throttle.acquire(4096));
        }
        assert_eq!(clock.now(), Duration::ZERO);
        for _ in 0..200 {
            throttle.acquire(4096);
        }
        let seconds = clock.now().as_secs_f64();
        assert!((1.99..2.02).contains(&seconds), "200 operations at 100/s took {seconds} s");
    }

    #[test]
    fn bytes_pass_at_the_rate_and_a_request_larger_than_the_burst_leaves_a_debt() {
        let (throttle, clock) = throttle(ThrottleLimits { bytes_per_second: 1 << 20, burst_bytes: 1 << 20, ..Default::default() });
        assert!(!throttle.acquire(8 << 20), "a full bucket admits what is larger than itself");
        assert!(!throttle.try_acquire(1));
        throttle.acquire(1 << 20);
        let seconds = clock.now().as_secs_f64();
        assert!((7.99..8.02).contains(&seconds), "8 MiB of debt at 1 MiB/s took {seconds} s");
    }

    #[test]
    fn a_pause_fills_the_bucket_up_to_the_burst_and_no_further() {
        let (throttle, clock) = throttle(ThrottleLimits { operations_per_second: 10, burst_operations: 5, ..Default::default() });
        clock.advance(Duration::from_secs(1000));
        let admitted = (0..100).take_while(|_| throttle.try_acquire(0)).count();
        assert_eq!(admitted, 5);
    }

    #[test]
    fn a_new_limit_holds_for_requests_after_it_and_an_old_debt_is_kept() {
        let (throttle, clock) = throttle(ThrottleLimits { bytes_per_second: 1000, burst_bytes: 1000, ..Default::default() });
        throttle.acquire(3000);
        throttle.set_limits(ThrottleLimits { bytes_per_second: 2000, burst_bytes: 1000, ..Default::default() });
        throttle.acquire(1000);
        let seconds = clock.now().as_secs_f64();
        assert!((1.49..1.51).contains(&seconds), "2000 bytes of debt and 1000 more at 2000/s took {seconds} s");
        throttle.set_limits(ThrottleLimits::default());
        assert!(throttle.try_acquire(1 << 40));
    }

    #[test]
    fn a_cancelled_request_is_charged_nothing() {
        let (throttle, clock) = throttle(ThrottleLimits { operations_per_second: 1, burst_operations: 1, ..Default::default() });
        throttle.acquire(0);
        assert_eq!(throttle.acquire_unless(0, &|| true), Admission::Cancelled);
        assert_eq!(throttle.waiting_count(), 0);
        clock.advance(Duration::from_secs(1));
        assert!(throttle.try_acquire(0));
    }

    #[test]
    fn lifting_the_limits_wakes_everybody_who_waits() {
        let throttle = Arc::new(Throttle::new(ThrottleLimits { bytes_per_second: 1, burst_bytes: 1, ..Default::default() }));
        throttle.acquire(1 << 40);
        let waiters: Vec<_> = (0..4)
            .map(|_| {
                let throttle = throttle.clone();
                std::thread::spawn(move || throttle.acquire(1))
            })
            .collect();
        while throttle.waiting_count() < 4 {
            std::thread::yield_now();
        }
        assert!(!throttle.try_acquire(0), "nobody overtakes those who wait");
        throttle.set_limits(ThrottleLimits::default());
        for waiter in waiters {
            assert!(waiter.join().unwrap());
        }
    }
}
