//! The lock of a pool: an exclusive lock of RADOS on one object, without an end, whose cookie says who has it. A daemon that was
//! killed leaves it behind. Whoever wants it then may break it, if the holder is known to be gone: a process of this machine that is
//! no more, or if it is told to shut out whoever has it. Whether the holder lives does not matter for the data: the client is shut out
//! of the cluster first, and no OSD takes anything of it from then on. Who has a write that timed out and may land yet does not give
//! the lock back: he is shut out by the next one, as if he had been killed.
use super::cluster::{Cluster, Name, c_string};
use crate::store::PROOF_TIME_MAX;
use crate::{IoError, IoErrorCode, Result};
use parking_lot::Mutex;
use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::fs;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const LOCK: &CStr = c"atoll";

/// The holder may change while it is looked at; this often at most.
const ATTEMPT_COUNT_MAX: usize = 5;

/// For clocks that do not agree to the millisecond.
const PROOF_TIME_SPARE: Duration = Duration::from_millis(250);

/// How long who is gone is shut out: longer than anything of it can be on its way.
const GONE_SECONDS: u32 = 3600;

/// How long who may live is: a process that is stopped, or whose machine sleeps, may go on at any time, and sends again what it had
/// under way. Five years.
const LIVING_SECONDS: u32 = 5 * 365 * 24 * 3600;

/// The text of the owner in the cookie.
const OWNER_BYTES_MAX: usize = 1024;

fn lock_object() -> Name {
    Name::new(format_args!("lock"))
}

pub(super) struct HeldLock {
    cluster: Arc<Cluster>,
    cookie: CString,
}

impl HeldLock {
    pub(super) fn cookie(&self) -> &CStr {
        &self.cookie
    }
}

/// Whether the lock is held with this cookie; the error says what became of it.
pub(super) fn prove(cluster: &Cluster, cookie: &CStr) -> Result<()> {
    let object = lock_object();
    match cluster.assert_locked(&object, LOCK, cookie) {
        Ok(()) => Ok(()),
        Err(libc::EBUSY | libc::ENOENT) => {
            let message = "the lock of the pool was broken: another daemon has taken the pool over";
            Err(IoError::new(IoErrorCode::Unavailable, "lock", object.to_string(), 0, message))
        }
        Err(errno) => Err(cluster.error("lock", object, 0, errno)),
    }
}

impl Drop for HeldLock {
    fn drop(&mut self) {
        if self.cluster.doubtful_count.load(Ordering::SeqCst) > 0 || self.cluster.is_silent.load(Ordering::Relaxed) {
            // Something of ours may land yet, unless whoever comes next shuts us out; or nobody would take the lock from us now.
            return abandon(&self.cookie);
        }
        match self.cluster.unlock(&lock_object(), LOCK, &self.cookie) {
            Ok(()) | Err(libc::ENOENT) => {}
            Err(_) => abandon(&self.cookie),
        }
    }
}

/// Cookies of this process that may stand at the object of a lock although nobody here has it: the request that was to take the lock
/// or to give it back failed, and nobody knows whether it happened.
static ABANDONED: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());

fn abandon(cookie: &CStr) {
    ABANDONED.lock().insert(cookie.to_string_lossy().into_owned());
}

fn is_abandoned(cookie: &str) -> bool {
    ABANDONED.lock().contains(cookie)
}

/// What tells one process of this machine from another: the boot, the space of pids, the pid, and when the process began.
struct Process {
    place: String,
    pid: u32,
    started_at: String,
}

impl Process {
    fn here() -> Option<Process> {
        let boot_id = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
        let space = fs::read_link("/proc/self/ns/pid").ok()?;
        let pid = std::process::id();
        Some(Process { place: format!("{}/{}", boot_id.trim(), space.display()), pid, started_at: start_of(pid)? })
    }
}

/// Field 22 of the process's state; `None` if there is no such process, or it is dead and only not waited for.
fn start_of(pid: u32) -> Option<String> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name in the second field may hold anything.
    let mut fields = text.rsplit_once(')')?.1.split_whitespace();
    let state = fields.next()?;
    let started_at = fields.nth(18)?;
    (!matches!(state, "Z" | "X")).then(|| started_at.to_owned())
}

/// `<place> <pid> <start> <number> <owner's text>`; a dash stands for what is not known.
fn make_cookie(process: Option<&Process>, owner: &str) -> String {
    static NUMBER: AtomicU64 = AtomicU64::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let mut owner: String = owner.chars().filter(|character| *character != '\0').collect();
    while owner.len() > OWNER_BYTES_MAX {
        owner.pop();
    }
    match process {
        Some(Process { place, pid, started_at }) => format!("{place} {pid} {started_at} {number} {owner}"),
        None => format!("- 0 - {number} {owner}"),
    }
}

fn owner_of(cookie: &str) -> &str {
    cookie.splitn(5, ' ').nth(4).unwrap_or("somebody who is not Atoll")
}

/// Whether the holder was a process of this machine that is no more.
fn is_gone(cookie: &str, here: Option<&Process>) -> bool {
    let mut fields = cookie.splitn(5, ' ');
    let (Some(place), Some(pid), Some(started_at), Some(here)) = (fields.next(), fields.next(), fields.next(), here) else { return false };
    let Ok(pid) = pid.parse() else { return false };
    place == here.place && start_of(pid).as_deref() != Some(started_at)
}

/// Whether the holder is this very process: another pool in the same place.
fn is_self(cookie: &str, here: Option<&Process>) -> bool {
    let mut fields = cookie.splitn(5, ' ');
    let (Some(place), Some(pid), Some(started_at), Some(here)) = (fields.next(), fields.next(), fields.next(), here) else { return false };
    place == here.place && pid.parse() == Ok(here.pid) && started_at == here.started_at
}

/// Takes the lock; `Locked` with the owner's text if somebody has it. `shut_out_holder`: whoever that is, unless it is this process.
pub(super) fn take(cluster: &Arc<Cluster>, owner: &str, shut_out_holder: bool) -> Result<HeldLock> {
    let here = Process::here();
    let cookie = c_string("owner", &make_cookie(here.as_ref(), owner))?;
    let object = lock_object();
    let mut has_shut_out = false;
    for _ in 0..ATTEMPT_COUNT_MAX {
        match cluster.lock(&object, LOCK, &cookie) {
            Ok(()) => {
                let held = HeldLock { cluster: Arc::clone(cluster), cookie };
                if has_shut_out {
                    // From the break of its lock on the other one proves nothing any more; what it proved before runs out now.
                    std::thread::sleep(PROOF_TIME_MAX + PROOF_TIME_SPARE);
                }
                return Ok(held);
            }
            Err(libc::EBUSY | libc::EEXIST) => {}
            Err(errno) => {
                abandon(&cookie);
                return Err(cluster.error("lock", object, 0, errno));
            }
        }
        let Some(locker) = cluster.locker(&object, LOCK)? else { continue };
        if is_abandoned(&locker.cookie) && cluster.is_holder(&locker) {
            // To shut it out would be to shut ourselves out.
            cluster.break_lock(&object, LOCK, &locker)?;
            continue;
        }
        let is_gone = is_abandoned(&locker.cookie) || is_gone(&locker.cookie, here.as_ref());
        if !is_gone && (!shut_out_holder || is_self(&locker.cookie, here.as_ref())) {
            let message = format!("locked by {}", owner_of(&locker.cookie));
            return Err(IoError::new(IoErrorCode::Locked, "lock", object.to_string(), 0, message));
        }
        cluster.fence(&object, LOCK, &locker, if is_gone { GONE_SECONDS } else { LIVING_SECONDS })?;
        has_shut_out |= !is_gone;
    }
    Err(IoError::new(IoErrorCode::Locked, "lock", object.to_string(), 0, "locked by others, one after the other"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_holder_is_gone_only_if_it_was_a_process_of_this_machine_that_is_no_more() {
        let here = Process::here().unwrap();
        let cookie = make_cookie(Some(&here), "pid 1 on a host\0, since then");
        assert_eq!(owner_of(&cookie), "pid 1 on a host, since then");
        assert!(!is_gone(&cookie, Some(&here)), "we are here");
        assert!(is_self(&cookie, Some(&here)));
        assert!(!is_gone(&cookie, None));
        let other_start = Process { started_at: "1".to_owned(), ..Process::here().unwrap() };
        assert!(is_gone(&make_cookie(Some(&other_start), ""), Some(&here)), "the pid is another process now");
        let nobody = Process { pid: u32::MAX, ..Process::here().unwrap() };
        assert!(is_gone(&make_cookie(Some(&nobody), ""), Some(&here)));
        let elsewhere = Process { place: "another/machine".to_owned(), ..nobody };
        assert!(!is_gone(&make_cookie(Some(&elsewhere), ""), Some(&here)));
        assert!(!is_self(&make_cookie(Some(&elsewhere), ""), Some(&here)));
        abandon(&c_string("owner", &cookie).unwrap());
        assert!(is_abandoned(&cookie) && !is_abandoned(&make_cookie(Some(&here), "")));
        for strange in ["", "x", "- 0 - 1 me", "auto 123"] {
            assert!(!is_gone(strange, Some(&here)), "{strange}");
        }
    }
}
