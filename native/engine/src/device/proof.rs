//! Proofs that nobody has taken the volume over: what is answered is still ours.
//!
//! A process may be stopped for any time between the moment at which a backend has carried out a request and the one at which the
//! answer goes out. If somebody shuts it out of the backend meanwhile and goes on with the volume, that answer must not go out any
//! more: its client would believe what the new owner never saw.
//!
//! Rules
//! - An answer goes out only if the backend was asked less than `PROOF_TIME_MAX` ago whether this process still has the lock, and said
//!   that it has. Who finds that it was longer ago asks first.
//! - Whoever shuts a living process out waits longer than that before he goes on: until then every older proof has run out.
//! - The time is one that goes on while the machine is suspended.
use super::Device;
use crate::Result;
use atoll_io::PROOF_TIME_MAX;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

/// When a device that others may take over was last proven to be ours.
#[derive(Default)]
pub(super) struct Proof {
    /// Others may take it over. It stays when the device is closed and has no layers any more: answers may be under way.
    is_needed: AtomicBool,
    /// When the question was asked, of which the answer is known; 0: never.
    asked_at_ms: AtomicU64,
}

impl Proof {
    pub(super) fn new(is_needed: bool) -> Proof {
        Proof { is_needed: AtomicBool::new(is_needed), ..Proof::default() }
    }

    /// Before the first write to a layer on which others may take the volume over.
    pub(super) fn require(&self) {
        self.is_needed.store(true, Ordering::Release);
    }

    #[cfg(test)]
    pub(super) fn is_needed(&self) -> bool {
        self.is_needed.load(Ordering::Acquire)
    }

    /// No layer is written any more on which others may take it over, and what was written to such a one is durable.
    pub(super) fn release(&self) {
        self.is_needed.store(false, Ordering::Release);
    }
}

/// Milliseconds since the machine was started.
fn now_ms() -> u64 {
    let mut time = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: the struct lives as long as the call; this clock is there on every kernel we run on.
    unsafe { libc::clock_gettime(libc::CLOCK_BOOTTIME, &raw mut time) };
    time.tv_sec as u64 * 1000 + time.tv_nsec as u64 / 1_000_000
}

impl Device {
    /// Whether answers may go out without `prove`. Costs a look at the clock where the backend may shut this process out.
    #[inline]
    pub(crate) fn is_proven(&self) -> bool {
        !self.proof.is_needed.load(Ordering::Acquire) || {
            let asked_at_ms = self.proof.asked_at_ms.load(Ordering::Acquire);
            asked_at_ms != 0 && now_ms().saturating_sub(asked_at_ms) < PROOF_TIME_MAX.as_millis() as u64
        }
    }

    /// Asks the backends of all layers that are written. After an error nothing may be answered; it is one if the device was closed,
    /// because nobody can be asked then.
    pub(crate) fn prove(&self) -> Result<()> {
        let asked_at_ms = now_ms();
        if self.layers.load().active.is_none() && self.proof.is_needed.load(Ordering::Acquire) {
            return Err(self.dead_error());
        }
        Device::prove_stores(&self.written_layers(), Vec::new(), |store| store.answers_need_proof)?;
        self.proof.asked_at_ms.fetch_max(asked_at_ms, Ordering::AcqRel);
        Ok(())
    }
}
