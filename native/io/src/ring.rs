//! Reads that the kernel carries out while nobody waits for each of them: a safe queue over io_uring.
//!
//! Rules
//! - A buffer belongs to the ring from `push` until its read comes back from `wait`, and the ring outlives every read in flight:
//!   the kernel never writes into memory that somebody else has.
//! - One thread makes a ring and uses it. Any thread may wake it.
//! - A ring that the kernel refuses is no error of the caller's request: there is always another way to read.
use io_uring::{IoUring, Probe, opcode, squeue, types};
use std::fs::File;
use std::io;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::sync::Arc;

/// Marks the read of the wake-up among completions.
const WAKE: u64 = u64::MAX;

/// A read that is done.
pub struct RingRead<T> {
    /// What was handed in with it.
    pub tag: T,
    /// The buffer that was handed in.
    pub buffer: Vec<u8>,
    /// Bytes that were read; fewer than asked for at the end of a file, and whenever the kernel likes.
    pub result: io::Result<usize>,
}

struct InFlight<T> {
    tag: T,
    buffer: Vec<u8>,
    /// The kernel has its own hold of the file, but only once it has looked at the entry.
    _file: Arc<File>,
}

/// Wakes the thread that waits in a ring.
#[derive(Clone)]
pub struct RingWaker(Arc<OwnedFd>);

impl RingWaker {
    /// Makes one. It fits one ring.
    pub fn new() -> io::Result<RingWaker> {
        // SAFETY: no memory is passed.
        let raw = unsafe { libc::eventfd(0, libc::EFD_CLOEXEC) };
        if raw < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: eventfd gave us this descriptor; nobody else has it.
        Ok(RingWaker(Arc::new(unsafe { OwnedFd::from_raw_fd(raw) })))
    }

    /// The present or the next `wait` returns.
    pub fn wake(&self) {
        let one = 1u64;
        // SAFETY: eight bytes of `one` are read. The only failure is a counter that is full, and such a reader wakes anyway.
        unsafe { libc::write(self.0.as_raw_fd(), (&raw const one).cast(), 8) };
    }
}

impl RingWaker {
    /// Waits for `wake`, for a thread that has no ring.
    pub fn wait(&self) {
        let mut count = 0u64;
        // SAFETY: eight bytes are written to `count`. A failure is an interruption, and the caller looks again.
        unsafe { libc::read(self.0.as_raw_fd(), (&raw mut count).cast(), 8) };
    }
}

/// A queue of reads. Dropping it waits for those in flight.
pub struct ReadRing<T> {
    ring: IoUring,
    reads: Vec<Option<InFlight<T>>>,
    free: Vec<usize>,
    waker: RingWaker,
    /// The kernel writes what was in the waker here; it stays where it is.
    wake_count: Box<u64>,
    is_wake_armed: bool,
    /// The kernel may not be asked any more.
    is_broken: bool,
}

impl<T> ReadRing<T> {
    /// A ring for so many reads at a time. The error is the kernel's: ENOSYS, EPERM (a sysctl or a filter forbids it), ENOMEM.
    pub fn new(reads_max: u32, waker: RingWaker) -> io::Result<ReadRing<T>> {
        // One more for the wake-up. Newer kernels save work when they know that one thread asks.
        let entries = reads_max + 1;
        let ring = IoUring::builder().setup_single_issuer().setup_defer_taskrun().build(entries).or_else(|_| IoUring::new(entries))?;
        let count = reads_max as usize;
        Ok(ReadRing {
            ring,
            reads: (0..count).map(|_| None).collect(),
            free: (0..count).rev().collect(),
            waker,
            wake_count: Box::new(0),
            is_wake_armed: false,
            is_broken: false,
        })
    }

    /// Reads that were pushed and have not come back.
    pub fn in_flight(&self) -> usize {
        self.reads.len() - self.free.len()
    }

    /// Whether another read can be pushed.
    pub fn has_room(&self) -> bool {
        !self.free.is_empty()
    }

    /// Queues a read of `file` at `offset_bytes` into `buffer[from..]`; `wait` hands it to the kernel. There must be room.
    pub fn push(&mut self, file: Arc<File>, offset_bytes: u64, mut buffer: Vec<u8>, from: usize, tag: T) {
        let index = self.free.pop().expect("the caller asked for room");
        let room = &mut buffer[from..];
        let entry = opcode::Read::new(types::Fd(file.as_raw_fd()), room.as_mut_ptr(), room.len() as u32)
            .offset(offset_bytes)
            .build()
            .user_data(index as u64);
        self.reads[index] = Some(InFlight { tag, buffer, _file: file });
        self.submit_entry(&entry);
    }

    /// Hands what was pushed to the kernel. With `may_sleep` it returns when a read is done or somebody calls `wake`, otherwise at
    /// once. Appends what is done to `done`. After an error (none is known that could come) the ring is of no use, and what was in
    /// flight never comes back.
    pub fn wait(&mut self, may_sleep: bool, done: &mut Vec<RingRead<T>>) -> io::Result<()> {
        self.arm_wake();
        let entered = self.enter(usize::from(may_sleep));
        if entered.is_err() {
            self.is_broken = true;
        }
        self.reap(done);
        entered
    }

    fn arm_wake(&mut self) {
        if !self.is_wake_armed {
            let target: *mut u64 = &raw mut *self.wake_count;
            let entry = opcode::Read::new(types::Fd(self.waker.0.as_raw_fd()), target.cast(), 8).build().user_data(WAKE);
            self.submit_entry(&entry);
            self.is_wake_armed = true;
        }
    }

    fn submit_entry(&mut self, entry: &squeue::Entry) {
        // SAFETY: the entry points into a buffer that `self` owns until the entry's completion was reaped: `reads` holds those of
        // reads, `wake_count` that of the wake-up; the memory of neither moves, and a drop waits for all of them.
        let pushed = unsafe { self.ring.submission().push(entry) };
        pushed.expect("the queue has room for every read and the wake-up");
    }

    fn enter(&self, want: usize) -> io::Result<()> {
        loop {
            match self.ring.submit_and_wait(want) {
                Ok(_) => return Ok(()),
                // Completions have to be taken first, or there is no memory just now: the caller comes again.
                Err(error) if matches!(error.raw_os_error(), Some(libc::EBUSY | libc::EAGAIN)) => return Ok(()),
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
    }

    fn reap(&mut self, done: &mut Vec<RingRead<T>>) {
        for completion in self.ring.completion() {
            if completion.user_data() == WAKE {
                self.is_wake_armed = false;
                continue;
            }
            let index = completion.user_data() as usize;
            let Some(InFlight { tag, buffer, .. }) = self.reads[index].take() else { continue };
            self.free.push(index);
            let result = match completion.result() {
                count if count >= 0 => Ok(count as usize),
                errno => Err(io::Error::from_raw_os_error(-errno)),
            };
            done.push(RingRead { tag, buffer, result });
        }
    }
}

impl<T> Drop for ReadRing<T> {
    fn drop(&mut self) {
        self.waker.wake();
        let mut done = Vec::new();
        while self.in_flight() > 0 || self.is_wake_armed {
            if self.is_broken || self.enter(1).is_err() {
                // Nobody can tell what the kernel still writes to: the memory is left to it.
                std::mem::forget(std::mem::take(&mut self.reads));
                std::mem::forget(std::mem::take(&mut self.wake_count));
                return;
            }
            self.reap(&mut done);
        }
    }
}

/// Whether this kernel lets this process read through a ring; the error says why not.
pub fn probe_ring() -> io::Result<()> {
    // On a thread that ends with it: the kernel takes a closed ring down later, and interrupts a wait of its thread for that.
    let probe = std::thread::Builder::new().name("atoll-probe".to_owned()).spawn(use_a_ring)?;
    probe.join().unwrap_or_else(|_| Err(io::Error::other("the probe failed")))
}

fn use_a_ring() -> io::Result<()> {
    let waker = RingWaker::new()?;
    let mut ring = ReadRing::<()>::new(1, waker.clone())?;
    let mut probe = Probe::new();
    ring.ring.submitter().register_probe(&mut probe)?;
    if !probe.is_supported(opcode::Read::CODE) {
        return Err(io::Error::from_raw_os_error(libc::EOPNOTSUPP));
    }
    // A filter may let rings be made and not be used.
    waker.wake();
    ring.wait(true, &mut Vec::new())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::FileExt;
    use std::sync::atomic::{AtomicBool, Ordering};

    fn ring(reads_max: u32) -> Option<(RingWaker, ReadRing<usize>)> {
        if let Err(error) = probe_ring() {
            println!("skipped: this kernel has no io_uring for us: {error}");
            return None;
        }
        let waker = RingWaker::new().unwrap();
        Some((waker.clone(), ReadRing::new(reads_max, waker).unwrap()))
    }

    #[test]
    fn many_reads_come_back_each_with_its_own_bytes() {
        let Some((_, mut ring)) = ring(8) else { return };
        let file = Arc::new(crate::file::unnamed_file(&std::env::temp_dir()).unwrap());
        let content: Vec<u8> = (0..100u8).flat_map(|block| [block; 512]).collect();
        file.write_all_at(&content, 0).unwrap();
        let (mut next, mut seen, mut done) = (0, Vec::new(), Vec::new());
        while seen.len() < 100 {
            while next < 100 && ring.has_room() {
                ring.push(file.clone(), next as u64 * 512, vec![0xee; 512 + next], next, next);
                next += 1;
            }
            ring.wait(true, &mut done).unwrap();
            for read in done.drain(..) {
                assert_eq!(read.result.unwrap(), 512);
                assert!(read.buffer[..read.tag].iter().all(|byte| *byte == 0xee));
                assert!(read.buffer[read.tag..].iter().all(|byte| *byte == read.tag as u8));
                seen.push(read.tag);
            }
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn ends_of_files_and_errors_are_told() {
        let Some((_, mut ring)) = ring(2) else { return };
        let file = Arc::new(crate::file::unnamed_file(&std::env::temp_dir()).unwrap());
        file.write_all_at(&[7; 100], 0).unwrap();
        ring.push(file, 60, vec![0; 512], 0, 0);
        ring.push(Arc::new(File::open(std::env::temp_dir()).unwrap()), 0, vec![0; 512], 0, 1);
        let mut done = Vec::new();
        while done.len() < 2 {
            ring.wait(true, &mut done).unwrap();
        }
        done.sort_by_key(|read| read.tag);
        assert_eq!(*done[0].result.as_ref().unwrap(), 40);
        assert_eq!(done[1].result.as_ref().unwrap_err().raw_os_error(), Some(libc::EISDIR));
    }

    #[test]
    fn a_waiting_thread_is_woken_again_and_again() {
        let Some((waker, mut ring)) = ring(1) else { return };
        for _ in 0..3 {
            let other = waker.clone();
            let thread = std::thread::spawn(move || other.wake());
            ring.wait(true, &mut Vec::new()).unwrap();
            thread.join().unwrap();
        }
    }

    #[test]
    fn a_ring_is_dropped_only_when_nothing_is_in_flight() {
        let Some((_, mut ring)) = ring(1) else { return };
        let mut pipe = [0; 2];
        // SAFETY: two descriptors fit the array.
        assert_eq!(unsafe { libc::pipe2(pipe.as_mut_ptr(), libc::O_CLOEXEC) }, 0);
        // SAFETY: pipe2 gave us these descriptors; nobody else has them.
        let (reader, writer) = unsafe { (OwnedFd::from_raw_fd(pipe[0]), OwnedFd::from_raw_fd(pipe[1])) };
        ring.push(Arc::new(File::from(reader)), 0, vec![0; 16], 0, 0);
        ring.wait(false, &mut Vec::new()).unwrap();
        let is_closed = Arc::new(AtomicBool::new(false));
        let seen = is_closed.clone();
        let closing = std::thread::spawn(move || {
            // Gives the drop the time to be wrong.
            (0..1000).for_each(|_| std::thread::yield_now());
            seen.store(true, Ordering::SeqCst);
            drop(writer);
        });
        drop(ring);
        assert!(is_closed.load(Ordering::SeqCst), "the kernel could still have written into the buffer");
        closing.join().unwrap();
    }
}
