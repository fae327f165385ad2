//! Locks on runs of slots: held while an owner changes, during read-modify-write, and while a hole is punched.
//!
//! A request takes its whole run at once or waits, so no order of taking is needed and no deadlock is possible. After
//! taking it the request looks the map up again: the owner may have changed while it waited. In-place writes to slots
//! that the active layer owns already take no lock.
use parking_lot::{Condvar, Mutex};

#[derive(Default)]
struct Held {
    runs: Vec<(u64, u64)>,
    waiting_count: usize,
}

#[derive(Default)]
pub(super) struct RangeLocks {
    held: Mutex<Held>,
    released: Condvar,
}

/// A held run; released on drop.
pub(super) struct RangeLock<'a> {
    locks: &'a RangeLocks,
    start_slot: u64,
    end_slot: u64,
}

impl RangeLocks {
    /// Takes `start_slot..end_slot`; waits while any part of it is held.
    pub(super) fn lock(&self, start_slot: u64, end_slot: u64) -> RangeLock<'_> {
        let mut held = self.held.lock();
        while held.runs.iter().any(|&(start, end)| start < end_slot && start_slot < end) {
            held.waiting_count += 1;
            self.released.wait(&mut held);
            held.waiting_count -= 1;
        }
        held.runs.push((start_slot, end_slot));
        RangeLock { locks: self, start_slot, end_slot }
    }

    /// As `lock`, but `None` instead of a wait.
    pub(super) fn try_lock(&self, start_slot: u64, end_slot: u64) -> Option<RangeLock<'_>> {
        let mut held = self.held.lock();
        if held.runs.iter().any(|&(start, end)| start < end_slot && start_slot < end) {
            return None;
        }
        held.runs.push((start_slot, end_slot));
        Some(RangeLock { locks: self, start_slot, end_slot })
    }

    /// Ends what `RangeLock::keep` began.
    pub(super) fn unlock(&self, LockedRange { start_slot, end_slot }: LockedRange) {
        let mut held = self.held.lock();
        if let Some(index) = held.runs.iter().position(|&run| run == (start_slot, end_slot)) {
            held.runs.swap_remove(index);
        }
        if held.waiting_count > 0 {
            self.released.notify_all();
        }
    }
}

impl RangeLock<'_> {
    /// Goes on holding the run without the guard: who has the token says when it is released.
    pub(super) fn keep(self) -> LockedRange {
        let kept = LockedRange { start_slot: self.start_slot, end_slot: self.end_slot };
        std::mem::forget(self);
        kept
    }
}

/// A run that is held until this is given back to `unlock`, from whatever thread.
pub(super) struct LockedRange {
    start_slot: u64,
    end_slot: u64,
}

impl Drop for RangeLock<'_> {
    fn drop(&mut self) {
        self.locks.unlock(LockedRange { start_slot: self.start_slot, end_slot: self.end_slot });
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering::SeqCst};
    use std::thread;

    #[test]
    fn overlapping_runs_exclude_each_other_and_disjoint_ones_do_not() {
        let locks = Arc::new(RangeLocks::default());
        let a = locks.lock(0, 10);
        let b = locks.lock(10, 20);
        assert!(locks.try_lock(5, 11).is_none());
        let c = locks.try_lock(20, 21).unwrap().keep();
        drop((a, b));
        assert!(locks.try_lock(20, 21).is_none(), "it is held without its guard");
        locks.unlock(c);
        drop(locks.try_lock(0, 21).unwrap());
        let counters: Arc<Vec<AtomicU64>> = Arc::new((0..16).map(|_| AtomicU64::new(0)).collect());
        let workers: Vec<_> = (0..4u64)
            .map(|seed| {
                let (locks, counters) = (locks.clone(), counters.clone());
                thread::spawn(move || {
                    let mut x = seed + 1;
                    for _ in 0..5_000 {
                        x = x.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
                        let start = (x >> 33) % 16;
                        let end = (start + 1 + (x >> 50) % 4).min(16);
                        let _lock = locks.lock(start, end);
                        for slot in start..end {
                            assert_eq!(counters[slot as usize].fetch_add(1, SeqCst), 0, "slot {slot} is held twice");
                        }
                        for slot in start..end {
                            counters[slot as usize].fetch_sub(1, SeqCst);
                        }
                    }
                })
            })
            .collect();
        for worker in workers {
            worker.join().unwrap();
        }
    }
}
