//! Looks at the cluster from time to time, in a thread of its own: whether the pool answers, what a monitor says of the cluster, how
//! much space there is. Who asks gets what was found last; only for the first figures of space is waited, and for a bounded time.
//!
//! Rules
//! - The pool is *silent* from the moment that a small read was not answered within the connect timeout, until one is. Meanwhile calls
//!   that manage (records, making and removing layers, lists) are refused at once, and what they wait for is cancelled: each of them
//!   would hold up its caller for the request timeout, and whoever waits for that caller. Reads and writes of devices wait.
//! - Each step of a look ends within the connect timeout, and what it found is told at once.
use super::cluster::{Cluster, Managing, Name, silent_message};
use crate::{IoError, IoErrorCode, Result, StoreHealth};
use parking_lot::{Condvar, Mutex};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

/// Between two looks.
const LOOK_INTERVAL: Duration = Duration::from_secs(10);
/// The same while somebody asks for what was found.
const ASKED_INTERVAL: Duration = Duration::from_secs(1);
/// And while the pool is silent; a look that fails takes the connect timeout.
const SILENT_INTERVAL: Duration = Duration::from_secs(1);

/// What `ceph df` says about a pool.
#[derive(Default, Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct PoolFigures {
    pub(super) stored_bytes: u64,
    pub(super) free_bytes: u64,
}

struct Found {
    observed_at: Instant,
    answer: Result<Duration>,
    silent_since: Option<Instant>,
    report: Option<Result<String>>,
    /// All 0: the cluster does not know, or does not tell this user.
    figures: Option<PoolFigures>,
    is_asked: bool,
    is_ended: bool,
}

struct Shared {
    found: Mutex<Found>,
    changed: Condvar,
}

/// Ends its thread when it is dropped; nobody waits for that.
pub(super) struct Watch {
    shared: Arc<Shared>,
    cluster: Arc<Cluster>,
}

impl Watch {
    /// `head`: an object that is there, and was read in `answer` just now. `Io` if there is no thread left.
    pub(super) fn start(cluster: &Arc<Cluster>, head: Name, answer: Duration) -> Result<Watch> {
        let found = Found {
            observed_at: Instant::now(),
            answer: Ok(answer),
            silent_since: None,
            report: None,
            figures: None,
            is_asked: false,
            is_ended: false,
        };
        let shared = Arc::new(Shared { found: Mutex::new(found), changed: Condvar::new() });
        let (on_thread, of_thread) = (Arc::clone(&shared), Arc::clone(cluster));
        let body = move || look_until_ended(&of_thread, &head, &on_thread);
        std::thread::Builder::new()
            .name("atoll-rados-look".to_owned())
            .spawn(body)
            .map_err(|error| IoError::from_system("open", "a thread", 0, &error))?;
        Ok(Watch { shared, cluster: Arc::clone(cluster) })
    }

    /// A call that manages begins. `Unavailable` while the pool is silent.
    pub(super) fn manage(&self, operation: &'static str) -> Result<Managing> {
        if self.cluster.is_silent.load(Ordering::Relaxed) {
            let message = silent_message(&self.cluster.options.pool);
            return Err(IoError { errno: libc::ETIMEDOUT, ..IoError::new(IoErrorCode::Unavailable, operation, "the cluster", 0, message) });
        }
        Ok(Managing::begin())
    }

    /// `Unavailable` if there are none yet and that takes too long.
    pub(super) fn figures(&self) -> Result<PoolFigures> {
        let (started_at, wait_max) = (Instant::now(), self.cluster.options.connect_timeout);
        let mut found = self.shared.found.lock();
        self.be_asked(&mut found);
        loop {
            if let Some(figures) = found.figures {
                return Ok(figures);
            }
            let waited = started_at.elapsed();
            if waited >= wait_max {
                let message =
                    format!("the cluster did not say within {} s how full pool {} is", wait_max.as_secs(), self.cluster.options.pool);
                return Err(IoError::new(IoErrorCode::Unavailable, "ask", "the monitors", 0, message));
            }
            self.shared.changed.wait_for(&mut found, wait_max - waited);
        }
    }

    /// Waits for nothing.
    pub(super) fn health(&self, is_counted: bool) -> StoreHealth {
        let mut found = self.shared.found.lock();
        self.be_asked(&mut found);
        StoreHealth {
            observed_at: found.observed_at,
            answer: found.answer.clone(),
            silent_since: found.silent_since,
            report: found.report.clone(),
            is_counted,
        }
    }

    /// The next look comes sooner.
    fn be_asked(&self, found: &mut Found) {
        if !found.is_asked {
            found.is_asked = true;
            self.shared.changed.notify_all();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.shared.found.lock().is_ended = true;
        self.shared.changed.notify_all();
    }
}

fn look_until_ended(cluster: &Cluster, head: &Name, shared: &Shared) {
    loop {
        let asked_at = Instant::now();
        let answer = read_head(cluster, head);
        let tell = |change: &dyn Fn(&mut Found)| {
            let mut found = shared.found.lock();
            change(&mut found);
            shared.changed.notify_all();
            found.is_ended
        };
        let is_silent = answer.as_ref().is_err_and(|error| error.errno == libc::ETIMEDOUT);
        cluster.is_silent.store(is_silent, Ordering::Relaxed);
        let is_ended = tell(&|found| {
            found.observed_at = Instant::now();
            found.silent_since = is_silent.then(|| found.silent_since.unwrap_or(asked_at));
            found.answer = answer.clone();
            found.is_asked = false;
        });
        if is_ended {
            return;
        }
        let report = ask(cluster, r#"{"prefix":"health","detail":"detail","format":"json"}"#);
        let monitors_answer = report.is_ok();
        if tell(&|found| found.report = Some(report.clone())) {
            return;
        }
        // Where no monitor answers, what was known stays.
        let figures = match monitors_answer.then(|| ask(cluster, r#"{"prefix":"df","format":"json"}"#)) {
            Some(Ok(text)) => Some(pool_figures(&text, &cluster.options.pool).unwrap_or_default()),
            _ => None,
        };
        if tell(&|found| found.figures = figures.or(found.figures).or(Some(PoolFigures::default()))) {
            return;
        }
        let pause = if is_silent { SILENT_INTERVAL } else { LOOK_INTERVAL };
        let looked_at = Instant::now();
        let mut found = shared.found.lock();
        while !found.is_ended {
            let pause = if found.is_asked { pause.min(ASKED_INTERVAL) } else { pause };
            let waited = looked_at.elapsed();
            if waited >= pause {
                break;
            }
            shared.changed.wait_for(&mut found, pause - waited);
        }
        if found.is_ended {
            return;
        }
    }
}

/// How long a read of a few bytes takes.
fn read_head(cluster: &Cluster, head: &Name) -> Result<Duration> {
    let started_at = Instant::now();
    let mut byte = [0u8; 1];
    // SAFETY: the buffer lives until the wait is over.
    let reading = unsafe { cluster.start_read(head, 0, byte.as_mut_ptr(), byte.len()) };
    match cluster.wait_shortly(reading) {
        code if code >= 0 => Ok(started_at.elapsed()),
        code if code == -libc::ETIMEDOUT => {
            let seconds = cluster.options.connect_timeout.as_secs().max(1);
            let message = format!("a read was not answered within {seconds} s: OSDs are away, or the network to them is");
            Err(IoError { errno: libc::ETIMEDOUT, ..IoError::new(IoErrorCode::Unavailable, "read", head.to_string(), 0, message) })
        }
        code => Err(cluster.error("read", head, 0, -code)),
    }
}

/// What this user may not know is empty.
fn ask(cluster: &Cluster, command: &str) -> Result<String> {
    Ok(cluster.ask_monitor(command)?.unwrap_or_default())
}

/// What `ceph df` says about a pool. The names of pools that we take need no escapes in JSON.
fn pool_figures(text: &str, pool: &str) -> Option<PoolFigures> {
    let of_pool = text.split_once(&format!("\"name\":\"{pool}\","))?.1;
    let of_pool = of_pool.split_once("\"name\":").map_or(of_pool, |(this, _)| this);
    let number = |name: &str| -> Option<u64> {
        let rest = of_pool.split_once(&format!("\"{name}\":"))?.1;
        let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
        digits.parse().ok()
    };
    Some(PoolFigures { stored_bytes: number("stored")?, free_bytes: number("max_avail")? })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn figures_of_a_pool_are_found_among_those_of_others() {
        let text = r#"{"stats":{"total_bytes":10},"pools":[{"name":"one","id":1,"stats":{"stored":5,"objects":1,"max_avail":900}},
            {"name":"two","id":2,"stats":{"stored":6,"stored_raw":7,"max_avail":901}}]}"#;
        assert_eq!(pool_figures(text, "two"), Some(PoolFigures { stored_bytes: 6, free_bytes: 901 }));
        assert_eq!(pool_figures(text, "one"), Some(PoolFigures { stored_bytes: 5, free_bytes: 900 }));
        assert_eq!(pool_figures(text, "on"), None);
        assert_eq!(pool_figures(r#"{"pools":[{"name":"one","id":1}]}"#, "one"), None);
    }
}
