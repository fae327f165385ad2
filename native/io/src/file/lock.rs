//! The lock of a store: an OFD lock on `root/lock`, which the kernel gives back when the process dies, however it dies. The file
//! stays; its text says who holds the lock and means nothing while nobody does.
use super::system;
use crate::{IoError, IoErrorCode, Result, StoreLock};
use std::fs::{File, OpenOptions};
use std::io::Read;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;

/// More than any owner text; bounds what is read from a file that anybody may have written.
const OWNER_BYTES_MAX: u64 = 4096;

struct HeldLock {
    file: File,
}

impl Drop for HeldLock {
    fn drop(&mut self) {
        // The text first: who finds the file unlocked must not read an owner that has let go. The unlock is explicit, because
        // a child between fork and exec still has a copy of the descriptor. Neither can fail in a way that could be mended here.
        let _ = self.file.set_len(0);
        let _ = system::set_lock(&self.file, false);
    }
}

/// Takes the lock or answers `Locked` with the owner's text.
pub(super) fn take(path: &Path, owner: &str) -> Result<StoreLock> {
    let object = path.display().to_string();
    let fail = |error: &std::io::Error| IoError::from_system("lock", &object, 0, error);
    let mut options = OpenOptions::new();
    options.read(true).write(true).create(true).truncate(false).mode(0o600).custom_flags(libc::O_NOFOLLOW);
    let file = options.open(path).map_err(|error| fail(&error))?;
    if !system::set_lock(&file, true).map_err(|error| fail(&error))? {
        let mut bytes = Vec::new();
        file.take(OWNER_BYTES_MAX).read_to_end(&mut bytes).map_err(|error| fail(&error))?;
        let text = String::from_utf8_lossy(&bytes);
        let text = if text.is_empty() { "an owner that has not said its name yet" } else { &text };
        return Err(IoError::new(IoErrorCode::Locked, "lock", &object, 0, format!("locked by {text}")));
    }
    let lock = HeldLock { file };
    lock.file.set_len(0).map_err(|error| fail(&error))?;
    lock.file.write_all_at(owner.as_bytes(), 0).map_err(|error| fail(&error))?;
    Ok(StoreLock { guard: Box::new(lock) })
}
