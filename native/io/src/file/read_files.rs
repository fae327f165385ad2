//! Descriptors of layers that are only read. A volume with a long history refers to thousands of layers, and each may be read at any
//! moment; so a bounded number of them is open in a process. One that is closed is opened again by its next read.
//!
//! Rules
//! - Only files that are read: closing one that was written would lose a write-back error (I6).
//! - A layer that was removed meanwhile is `NotFound`, never zeros.
//! - Finding an open descriptor takes no lock and writes nothing that others read all the time.
use super::system::{descriptor_limit, open_for_reading};
use arc_swap::ArcSwapOption;
use parking_lot::Mutex;
use std::fs::File;
use std::io::Result;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, LazyLock, Weak};

/// Open at once, beside those that requests in flight still use, whatever the process may have: each costs the kernel about a KiB.
const OPEN_MAX: u64 = 16_384;
const OPEN_MIN: u64 = 64;

/// Half of what the process may have when the first layer is opened: 512 where the limit is the usual 1024.
static OPEN: LazyLock<Ring> = LazyLock::new(|| Ring::new((descriptor_limit() / 2).clamp(OPEN_MIN, OPEN_MAX) as usize));

/// A file that is open now, or will be when it is read.
pub(super) struct ReadFile {
    path: PathBuf,
    file: ArcSwapOption<File>,
    /// Since the ring looked at it last.
    is_used: AtomicBool,
}

impl ReadFile {
    /// Opens it, so that a missing one is noticed now.
    pub(super) fn open(path: &Path) -> Result<Arc<ReadFile>> {
        OPEN.open(path)
    }

    /// The open file, which stays open until the last of its owners is gone.
    pub(super) fn shared(self: &Arc<Self>) -> Result<Arc<File>> {
        if let Some(file) = self.file.load_full() {
            self.is_used.store(true, Ordering::Relaxed);
            return Ok(file);
        }
        OPEN.reopen(self)
    }

    /// Runs `operation` on the open file.
    #[inline]
    pub(super) fn with<T>(self: &Arc<Self>, operation: impl FnOnce(&File) -> Result<T>) -> Result<T> {
        if let Some(file) = &*self.file.load() {
            if !self.is_used.load(Ordering::Relaxed) {
                self.is_used.store(true, Ordering::Relaxed);
            }
            return operation(file);
        }
        operation(&*OPEN.reopen(self)?)
    }
}

/// The files that are open, and whose turn it is to be closed: the next one that was not used since the hand came by.
struct Ring {
    bound: usize,
    state: Mutex<State>,
}

struct State {
    files: Vec<Weak<ReadFile>>,
    hand: usize,
}

impl Ring {
    fn new(bound: usize) -> Ring {
        Ring { bound, state: Mutex::new(State { files: Vec::new(), hand: 0 }) }
    }

    fn open(&self, path: &Path) -> Result<Arc<ReadFile>> {
        let read_file = Arc::new(ReadFile { path: path.to_path_buf(), file: ArcSwapOption::empty(), is_used: AtomicBool::new(false) });
        self.reopen(&read_file)?;
        Ok(read_file)
    }

    fn reopen(&self, read_file: &Arc<ReadFile>) -> Result<Arc<File>> {
        let opened = Arc::new(open_for_reading(&read_file.path)?);
        let mut state = self.state.lock();
        if let Some(file) = read_file.file.load_full() {
            // Another thread was faster.
            return Ok(file);
        }
        let closed = state.make_room(self.bound);
        state.files.push(Arc::downgrade(read_file));
        read_file.is_used.store(true, Ordering::Relaxed);
        read_file.file.store(Some(opened.clone()));
        drop(state);
        // A close may take a moment: not under the lock.
        drop(closed);
        Ok(opened)
    }
}

impl State {
    /// Takes one out of a full ring, and those that nobody has any more where the hand meets them.
    fn make_room(&mut self, bound: usize) -> Option<Arc<File>> {
        let mut closed = None;
        // After one round nobody is marked as used any more, but for those that are read meanwhile.
        let mut looks_left = 2 * self.files.len();
        while self.files.len() >= bound {
            self.hand = if self.hand < self.files.len() { self.hand } else { 0 };
            let Some(file) = self.files[self.hand].upgrade() else {
                self.files.swap_remove(self.hand);
                continue;
            };
            if looks_left > 0 && file.is_used.swap(false, Ordering::Relaxed) {
                looks_left -= 1;
                self.hand += 1;
                continue;
            }
            closed = file.file.swap(None);
            self.files.swap_remove(self.hand);
        }
        closed
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;

    fn byte_of(ring: &Ring, read_file: &Arc<ReadFile>) -> Result<u8> {
        let mut byte = [0];
        let file = match read_file.file.load_full() {
            Some(file) => file,
            None => ring.reopen(read_file)?,
        };
        read_file.is_used.store(true, Ordering::Relaxed);
        file.read_exact_at(&mut byte, 0)?;
        Ok(byte[0])
    }

    #[test]
    fn few_are_open_however_many_are_read_and_those_in_use_stay_open() {
        let directory = std::env::temp_dir().join(format!("atoll-read-files-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let ring = Ring::new(8);
        let files: Vec<_> = (0..100_u8)
            .map(|number| {
                let path = directory.join(number.to_string());
                std::fs::write(&path, [number]).unwrap();
                ring.open(&path).unwrap()
            })
            .collect();
        let open_count = || files.iter().filter(|file| file.file.load().is_some()).count();
        assert_eq!(open_count(), 8);
        let mut reopened_count = 0;
        for round in 0..20_usize {
            for step in 0..100_usize {
                let number = step * 37 % 100;
                assert_eq!(byte_of(&ring, &files[number]).unwrap(), number as u8);
                assert!(open_count() <= 8);
                if files[5].file.load().is_none() {
                    reopened_count += 1;
                }
                assert_eq!(byte_of(&ring, &files[5]).unwrap(), 5, "round {round}");
            }
        }
        assert!(reopened_count < 20, "what is read all the time stays open: it was closed {reopened_count} times");
        std::fs::remove_file(directory.join("5")).unwrap();
        assert_eq!(byte_of(&ring, &files[5]).unwrap(), 5, "an open descriptor outlives its name");
        files[5].file.store(None);
        assert_eq!(byte_of(&ring, &files[5]).unwrap_err().kind(), std::io::ErrorKind::NotFound);
        drop(files);
        let path = directory.join("1");
        let again: Vec<_> = (0..20).map(|_| ring.open(&path).unwrap()).collect();
        assert_eq!(again.iter().filter(|file| file.file.load().is_some()).count(), 8);
        std::fs::remove_dir_all(&directory).unwrap();
    }

    #[test]
    fn reading_leaves_no_time_of_access() {
        let path = std::env::temp_dir().join(format!("atoll-read-times-{}", std::process::id()));
        std::fs::write(&path, [7]).unwrap();
        let long_ago = std::time::SystemTime::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        File::options().write(true).open(&path).unwrap().set_times(std::fs::FileTimes::new().set_accessed(long_ago)).unwrap();
        let ring = Ring::new(1);
        assert_eq!(byte_of(&ring, &ring.open(&path).unwrap()).unwrap(), 7);
        assert_eq!(std::fs::metadata(&path).unwrap().accessed().unwrap(), long_ago);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn many_threads_read_through_few_descriptors() {
        let directory = std::env::temp_dir().join(format!("atoll-read-threads-{}", std::process::id()));
        std::fs::create_dir_all(&directory).unwrap();
        let ring = Ring::new(3);
        let files: Vec<_> = (0..20_u8)
            .map(|number| {
                let path = directory.join(number.to_string());
                std::fs::write(&path, [number]).unwrap();
                ring.open(&path).unwrap()
            })
            .collect();
        std::thread::scope(|scope| {
            for thread in 0..4_usize {
                let (ring, files) = (&ring, &files);
                scope.spawn(move || {
                    for step in 0..2000 {
                        let number = (step * 7 + thread * 3) % 20;
                        assert_eq!(byte_of(ring, &files[number]).unwrap(), number as u8);
                    }
                });
            }
        });
        std::fs::remove_dir_all(&directory).unwrap();
    }
}
