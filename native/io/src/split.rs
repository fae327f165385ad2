//! One request in parts that end each on their own: the whole ends with the last of them.
use crate::{Ending, IoError, Result};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

struct Whole {
    left: AtomicUsize,
    outcome: Mutex<Outcome>,
}

struct Outcome {
    ending: Option<Box<dyn Ending>>,
    /// The first failure.
    failed: Option<IoError>,
}

struct Part {
    whole: Arc<Whole>,
    start: *mut u8,
    length: usize,
}

// SAFETY: each part has the bytes it points to for itself, see `split`.
unsafe impl Send for Part {}

impl Ending for Part {
    fn room(&mut self) -> &mut [u8] {
        // SAFETY: a stretch of the whole's room that no other part has; the whole is there until all of its parts have ended.
        unsafe { std::slice::from_raw_parts_mut(self.start, self.length) }
    }

    fn ended(self: Box<Self>, result: Result<()>) {
        if let Err(error) = result {
            self.whole.outcome.lock().failed.get_or_insert(error);
        }
        if self.whole.left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let (ending, failed) = {
            let mut outcome = self.whole.outcome.lock();
            (outcome.ending.take(), outcome.failed.take())
        };
        if let Some(ending) = ending {
            ending.ended(failed.map_or(Ok(()), Err));
        }
    }
}

/// Makes parts of a request, which all have to end. `lengths`: of the room of each, one behind the other, as long as the room
/// together (zeros for a write, which has none).
///
/// # Panics
/// If there is no part, or the lengths are more than the room.
pub fn split(mut ending: Box<dyn Ending>, lengths: &[usize]) -> Vec<Box<dyn Ending>> {
    assert!(!lengths.is_empty(), "a request without parts would never end");
    let room = ending.room();
    assert!(lengths.iter().sum::<usize>() <= room.len(), "the parts lie in the room");
    let mut start = room.as_mut_ptr();
    let outcome = Mutex::new(Outcome { ending: Some(ending), failed: None });
    let whole = Arc::new(Whole { left: AtomicUsize::new(lengths.len()), outcome });
    let mut parts: Vec<Box<dyn Ending>> = Vec::with_capacity(lengths.len());
    for &length in lengths {
        parts.push(Box::new(Part { whole: whole.clone(), start, length }));
        // SAFETY: the sum of the lengths was checked.
        start = unsafe { start.add(length) };
    }
    parts
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::IoErrorCode;
    use std::sync::mpsc::{Sender, channel};

    struct Told(Vec<u8>, Sender<(Vec<u8>, Result<()>)>);

    impl Ending for Told {
        fn room(&mut self) -> &mut [u8] {
            &mut self.0
        }
        fn ended(self: Box<Self>, result: Result<()>) {
            let Told(bytes, sender) = *self;
            sender.send((bytes, result)).unwrap();
        }
    }

    #[test]
    fn the_whole_ends_once_with_the_last_part_and_has_the_bytes_of_all() {
        let (sender, told) = channel();
        let mut parts = split(Box::new(Told(vec![0; 60], sender)), &[10, 20, 30]);
        for (value, index) in [2, 0, 0].into_iter().enumerate() {
            assert!(told.try_recv().is_err());
            let mut part = parts.remove(index);
            std::thread::spawn(move || {
                let length = part.room().len() as u8;
                part.room().fill(length + value as u8);
                part.ended(Ok(()));
            })
            .join()
            .unwrap();
        }
        let (bytes, result) = told.recv().unwrap();
        assert!(result.is_ok() && told.recv().is_err());
        assert!(bytes == [vec![11; 10], vec![22; 20], vec![30; 30]].concat());
    }

    #[test]
    fn a_part_that_failed_is_what_the_whole_says_when_all_have_ended() {
        let (sender, told) = channel();
        let mut parts = split(Box::new(Told(Vec::new(), sender)), &[0, 0, 0]).into_iter();
        parts.next().unwrap().ended(Ok(()));
        parts.next().unwrap().ended(Err(IoError::from_errno("write", "first", 0, libc::ENOSPC)));
        assert!(told.try_recv().is_err());
        parts.next().unwrap().ended(Err(IoError::from_errno("write", "second", 0, libc::EIO)));
        assert_eq!(told.recv().unwrap().1.unwrap_err().code, IoErrorCode::NoSpace);
    }
}
