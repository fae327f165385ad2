//! How long a reader looks for the next bytes before it sleeps.
//!
//! Waking a sleeping thread costs several times what a small request does, most of all in a virtual machine whose processor went
//! idle. So a reader whose peer answers at once keeps looking for a moment. It learns from each wait: one that a longer look would
//! have spared makes it more patient, one that it would not makes it less, down to sleeping at once. It gives its processor away
//! between two looks, and no more readers look at a time than there are processors besides one.
use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

/// Longest look: about what two sleeps and wakes cost.
const LOOK_MAX: Duration = Duration::from_micros(50);

/// First look after a wait that a look would have spared.
const LOOK_MIN: Duration = Duration::from_micros(10);

/// Readers that look right now, of all connections.
static LOOKING: AtomicUsize = AtomicUsize::new(0);

/// What one reader has learnt.
#[derive(Default)]
pub(crate) struct Patience {
    look: Duration,
}

impl Patience {
    /// Calls `receive` with false (it may not sleep, and answers `WouldBlock` when there is nothing) for as long as the patience
    /// lasts, then with true.
    pub(super) fn receive<T>(&mut self, mut receive: impl FnMut(bool) -> io::Result<T>) -> io::Result<T> {
        let first = receive(false);
        if !is_nothing(&first) {
            return first;
        }
        let started = Instant::now();
        if !self.look.is_zero()
            && let Some(_place) = Place::take()
        {
            while started.elapsed() < self.look {
                std::thread::yield_now();
                let found = receive(false);
                if !is_nothing(&found) {
                    return found;
                }
            }
        }
        let found = receive(true);
        self.learn(started.elapsed());
        found
    }

    /// `waited`: how long a wait took that ended in a sleep.
    fn learn(&mut self, waited: Duration) {
        if waited <= LOOK_MAX {
            self.look = (self.look * 2).clamp(LOOK_MIN, LOOK_MAX);
        } else {
            self.look /= 2;
            if self.look < LOOK_MIN {
                self.look = Duration::ZERO;
            }
        }
    }
}

fn is_nothing<T>(answer: &io::Result<T>) -> bool {
    answer.as_ref().is_err_and(|error| error.kind() == io::ErrorKind::WouldBlock)
}

/// One of the looking readers.
struct Place;

impl Place {
    fn take() -> Option<Place> {
        static COUNT_MAX: OnceLock<usize> = OnceLock::new();
        let count_max = *COUNT_MAX.get_or_init(|| std::thread::available_parallelism().map_or(0, |count| count.get() - 1));
        if LOOKING.fetch_add(1, Ordering::Relaxed) < count_max {
            return Some(Place);
        }
        LOOKING.fetch_sub(1, Ordering::Relaxed);
        None
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        LOOKING.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_there_is_taken_without_a_look_or_a_sleep() {
        let mut patience = Patience::default();
        let answers = |error: Option<io::ErrorKind>| {
            move |may_sleep: bool| {
                assert!(!may_sleep, "nothing to sleep for");
                error.map_or(Ok(7), |kind| Err(io::Error::from(kind)))
            }
        };
        assert_eq!(patience.receive(answers(None)).unwrap(), 7);
        let broken = patience.receive(answers(Some(io::ErrorKind::BrokenPipe)));
        assert_eq!(broken.unwrap_err().kind(), io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn short_waits_make_it_look_and_long_ones_make_it_sleep_at_once_again() {
        let mut patience = Patience::default();
        assert_eq!(patience.look, Duration::ZERO);
        patience.learn(Duration::from_micros(30));
        assert_eq!(patience.look, LOOK_MIN);
        for _ in 0..10 {
            patience.learn(Duration::from_micros(5));
        }
        assert_eq!(patience.look, LOOK_MAX);
        for _ in 0..3 {
            patience.learn(Duration::from_millis(2));
        }
        assert_eq!(patience.look, Duration::ZERO);
    }

    #[test]
    fn a_look_ends_in_a_sleep() {
        let mut patience = Patience { look: LOOK_MAX };
        let late = |may_sleep: bool| if may_sleep { Ok(9) } else { Err(io::Error::from(io::ErrorKind::WouldBlock)) };
        assert_eq!(patience.receive(late).unwrap(), 9);
    }
}
