//! The gate every request passes: counts who is inside, can be closed and drained for a swap, and can wait for
//! everybody who was inside without holding up anybody new.
//!
//! Rules
//! - A request is inside from `enter` until its `Pass` is dropped. Everything it looks up in the map, and every byte it
//!   moves because of it, happens inside.
//! - While the gate is closed nobody is let in; who waits, waits outside and holds nothing.
//! - `barrier` returns only when everyone who was inside at the call has left (I5). Requests are counted under one of two
//!   parities; a barrier flips the parity and waits for the old one. A request that counted itself under a parity that
//!   had been flipped meanwhile takes itself back, so nobody is ever counted under a parity that is not current. One that gave up
//!   leaves its rest to the next one, which waits for that first: those whom it counted under the other parity are inside, too.
//! - Lock order: `serial` (one closer or barrier at a time) before `sleepers`.
use parking_lot::{Condvar, Mutex, MutexGuard};
use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
use std::time::Instant;

const PARITY: u64 = 1;
const CLOSED: u64 = 2;
/// Nobody is let in any more: the device is poisoned or shut.
const DEAD: u64 = 4;
/// Somebody waits for a count to reach zero.
const WATCHED: u64 = 8;

#[repr(align(64))]
#[derive(Default)]
struct Count(AtomicU64);

#[derive(Default)]
pub(super) struct Gate {
    state: AtomicU64,
    inside: [Count; 2],
    serial: Mutex<()>,
    sleepers: Mutex<()>,
    /// Signalled when the gate opens or dies, and when a watched count reaches zero.
    wake: Condvar,
}

/// The proof of being inside.
pub(super) struct Pass<'a> {
    gate: &'a Gate,
    parity: usize,
}

impl Pass<'_> {
    /// Stays inside without the pass: who has the token says when it leaves.
    pub(super) fn keep(self) -> Inside {
        let parity = self.parity;
        std::mem::forget(self);
        Inside { parity }
    }
}

/// Somebody is inside until this is given back to the gate, from whatever thread.
pub(super) struct Inside {
    parity: usize,
}

/// The gate is dead.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Dead;

impl Gate {
    /// Lets the caller in; waits outside while the gate is closed.
    #[inline]
    pub(super) fn enter(&self) -> Result<Pass<'_>, Dead> {
        loop {
            match self.try_enter()? {
                Some(pass) => return Ok(pass),
                None => self.wait_outside()?,
            }
        }
    }

    /// As `enter`, but `None` instead of a wait. For who is inside already, on behalf of another request: whoever closed the gate
    /// waits for that one.
    #[inline]
    pub(super) fn try_enter(&self) -> Result<Option<Pass<'_>>, Dead> {
        loop {
            let state = self.state.load(SeqCst);
            if state & DEAD != 0 {
                return Err(Dead);
            }
            if state & CLOSED != 0 {
                return Ok(None);
            }
            let parity = (state & PARITY) as usize;
            self.inside[parity].0.fetch_add(1, SeqCst);
            let pass = Pass { gate: self, parity };
            if (self.state.load(SeqCst) ^ state) & (PARITY | CLOSED | DEAD) == 0 {
                return Ok(Some(pass));
            }
            drop(pass);
        }
    }

    #[cold]
    fn wait_outside(&self) -> Result<(), Dead> {
        let mut guard = self.sleepers.lock();
        loop {
            let state = self.state.load(SeqCst);
            if state & DEAD != 0 {
                return Err(Dead);
            }
            if state & CLOSED == 0 {
                return Ok(());
            }
            self.wake.wait(&mut guard);
        }
    }

    /// Ends what `Pass::keep` began. Once for each, by the contract of `Inside`, which cannot be copied.
    #[inline]
    pub(super) fn leave(&self, inside: Inside) {
        drop(Pass { gate: self, parity: inside.parity });
    }

    fn set(&self, bits: u64) {
        self.state.fetch_or(bits, SeqCst);
    }

    fn clear(&self, bits: u64) {
        self.state.fetch_and(!bits, SeqCst);
        let _guard = self.sleepers.lock();
        self.wake.notify_all();
    }

    /// Waits until `done`; every leaving request that brings a count to zero wakes it. False: the deadline passed first.
    fn watch(&self, deadline: Option<Instant>, done: impl Fn() -> bool) -> bool {
        let mut guard = self.sleepers.lock();
        self.set(WATCHED);
        let mut in_time = true;
        while !done() {
            match deadline {
                None => self.wake.wait(&mut guard),
                Some(deadline) => {
                    if self.wake.wait_until(&mut guard, deadline).timed_out() {
                        in_time = done();
                        break;
                    }
                }
            }
        }
        self.state.fetch_and(!WATCHED, SeqCst);
        in_time
    }

    fn is_empty(&self) -> bool {
        self.inside.iter().all(|count| count.0.load(SeqCst) == 0)
    }

    /// Lets nobody new in; the caller is the only closer until the returned value is dropped, which opens the gate again.
    pub(super) fn close(&self) -> Closed<'_> {
        let serial = self.serial.lock();
        self.set(CLOSED);
        Closed { gate: self, _serial: serial }
    }

    /// From now on `enter` fails; those inside go on. Returns at once.
    pub(super) fn kill(&self) {
        self.set(DEAD);
        let _guard = self.sleepers.lock();
        self.wake.notify_all();
    }

    /// Whether `kill` was called.
    pub(super) fn is_dead(&self) -> bool {
        self.state.load(SeqCst) & DEAD != 0
    }

    /// Waits until nobody is inside (after `kill`).
    pub(super) fn drain(&self) {
        let _serial = self.serial.lock();
        self.watch(None, || self.is_empty());
    }

    /// Waits until everybody who is inside now has left; holds nobody up. False: the deadline passed first.
    pub(super) fn barrier(&self, deadline: Instant) -> bool {
        let Some(_serial) = self.serial.try_lock_until(deadline) else { return false };
        let left = 1 - (self.state.load(SeqCst) & PARITY) as usize;
        if !self.watch(Some(deadline), || self.inside[left].0.load(SeqCst) == 0) {
            return false;
        }
        let old = (self.state.fetch_xor(PARITY, SeqCst) & PARITY) as usize;
        self.watch(Some(deadline), || self.inside[old].0.load(SeqCst) == 0)
    }
}

/// A closed gate; dropping it opens the gate.
pub(super) struct Closed<'a> {
    gate: &'a Gate,
    _serial: MutexGuard<'a, ()>,
}

impl Closed<'_> {
    /// Waits until nobody is inside. False: the deadline passed first.
    pub(super) fn drain(&self, deadline: Instant) -> bool {
        self.gate.watch(Some(deadline), || self.gate.is_empty())
    }
}

impl Drop for Closed<'_> {
    fn drop(&mut self) {
        self.gate.clear(CLOSED);
    }
}

impl Drop for Pass<'_> {
    #[inline]
    fn drop(&mut self) {
        let before = self.gate.inside[self.parity].0.fetch_sub(1, SeqCst);
        if before == 1 && self.gate.state.load(SeqCst) & WATCHED != 0 {
            let _guard = self.gate.sleepers.lock();
            self.gate.wake.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::AtomicBool;
    use std::thread;
    use std::time::Duration;

    #[test]
    fn a_closed_gate_is_empty_after_its_drain_and_lets_waiters_in_again() {
        let gate = Arc::new(Gate::default());
        let stop = Arc::new(AtomicBool::new(false));
        let inside = Arc::new(AtomicU64::new(0));
        let workers: Vec<_> = (0..4)
            .map(|_| {
                let (gate, stop, inside) = (gate.clone(), stop.clone(), inside.clone());
                thread::spawn(move || {
                    let mut count = 0u64;
                    while !stop.load(SeqCst) || count == 0 {
                        let _pass = gate.enter().unwrap();
                        inside.fetch_add(1, SeqCst);
                        inside.fetch_sub(1, SeqCst);
                        count += 1;
                    }
                    count
                })
            })
            .collect();
        for _ in 0..200 {
            let closed = gate.close();
            assert!(closed.drain(Instant::now() + Duration::from_secs(300)));
            assert_eq!(inside.load(SeqCst), 0);
            drop(closed);
            assert!(gate.barrier(Instant::now() + Duration::from_secs(300)));
        }
        stop.store(true, SeqCst);
        for worker in workers {
            assert!(worker.join().unwrap() > 0);
        }
    }

    #[test]
    fn a_drain_past_its_deadline_says_so_and_the_gate_opens_again() {
        let gate = Gate::default();
        let pass = gate.enter().unwrap();
        let closed = gate.close();
        assert!(!closed.drain(Instant::now() + Duration::from_millis(5)));
        drop(closed);
        drop(pass);
        assert!(gate.enter().is_ok());
    }

    #[test]
    fn who_stays_inside_without_a_pass_is_waited_for_until_it_leaves_from_any_thread() {
        let gate = Arc::new(Gate::default());
        let inside = gate.enter().unwrap().keep();
        assert!(!gate.close().drain(Instant::now() + Duration::from_millis(5)));
        let leaving = gate.clone();
        thread::spawn(move || leaving.leave(inside)).join().unwrap();
        assert!(gate.close().drain(Instant::now() + Duration::from_secs(60)));
    }

    #[test]
    fn a_barrier_waits_for_those_inside_and_holds_nobody_up() {
        let gate = Arc::new(Gate::default());
        let pass = gate.enter().unwrap();
        let done = Arc::new(AtomicBool::new(false));
        let waiter = {
            let (gate, done) = (gate.clone(), done.clone());
            thread::spawn(move || {
                assert!(gate.barrier(Instant::now() + Duration::from_secs(300)));
                done.store(true, SeqCst);
            })
        };
        while gate.state.load(SeqCst) & WATCHED == 0 {
            thread::yield_now();
        }
        drop(gate.enter().unwrap());
        assert!(!done.load(SeqCst));
        drop(pass);
        waiter.join().unwrap();
        assert!(done.load(SeqCst));
    }

    #[test]
    fn a_barrier_past_its_deadline_says_so_and_no_later_one_forgets_whom_it_waited_for() {
        let gate = Gate::default();
        let soon = || Instant::now() + Duration::from_millis(5);
        let first = gate.enter().unwrap();
        assert!(!gate.barrier(soon()));
        let second = gate.enter().unwrap();
        for _ in 0..3 {
            assert!(!gate.barrier(soon()), "the first is inside");
        }
        drop(first);
        assert!(!gate.barrier(soon()), "the second is inside");
        drop(second);
        assert!(gate.barrier(Instant::now() + Duration::from_secs(300)));
    }

    #[test]
    fn a_dead_gate_refuses_and_wakes_those_who_wait_outside() {
        let gate = Arc::new(Gate::default());
        let closed = gate.close();
        let waiter = {
            let gate = gate.clone();
            thread::spawn(move || gate.enter().err())
        };
        gate.kill();
        assert_eq!(waiter.join().unwrap(), Some(Dead));
        drop(closed);
        assert!(gate.enter().is_err());
    }
}
