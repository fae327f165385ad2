//! Threads of the engine: named, and deaf to signals, which belong to the process that hosts the engine.
use crate::{EngineError, Result};
use std::thread::JoinHandle;

/// Starts a thread. `name` is cut to the 15 bytes that the kernel keeps. `THREAD_LIMIT` if the system has none left.
pub fn spawn_named<F>(name: &str, body: F) -> Result<JoinHandle<()>>
where
    F: FnOnce() + Send + 'static,
{
    // A thread inherits the mask of its creator: blocking here leaves no moment in which it could take a signal.
    let mut all = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    let mut before = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
    // SAFETY: both sets are plain memory that the calls fill in; `before` is read only if the mask call filled it.
    let masked = unsafe {
        libc::sigfillset(all.as_mut_ptr());
        libc::pthread_sigmask(libc::SIG_SETMASK, all.as_ptr(), before.as_mut_ptr()) == 0
    };
    let name: String = name.chars().take(15).collect();
    let spawned = std::thread::Builder::new().name(name).spawn(body);
    if masked {
        // SAFETY: `before` was filled in by the successful call above.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, before.as_ptr(), std::ptr::null_mut()) };
    }
    spawned.map_err(|error| EngineError::new("THREAD_LIMIT", libc::EAGAIN, format!("the system could not start another thread: {error}")))
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;

    #[test]
    fn a_thread_of_the_engine_has_its_name_and_blocks_every_signal() {
        let (sender, receiver) = mpsc::channel();
        let thread = spawn_named("atoll-a-rather-long-name", move || {
            let mut mask = std::mem::MaybeUninit::<libc::sigset_t>::uninit();
            // SAFETY: with a null new set the call only fills in `mask`.
            let blocked = unsafe {
                libc::pthread_sigmask(libc::SIG_BLOCK, std::ptr::null(), mask.as_mut_ptr());
                libc::sigismember(mask.as_ptr(), libc::SIGTERM) == 1 && libc::sigismember(mask.as_ptr(), libc::SIGINT) == 1
            };
            sender.send((std::thread::current().name().map(str::to_owned), blocked)).unwrap();
        })
        .unwrap();
        assert_eq!(receiver.recv().unwrap(), (Some("atoll-a-rather-".to_owned()), true));
        thread.join().unwrap();
    }
}
