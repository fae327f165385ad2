//! The appending side of a journal.
use super::format::{FrameSeed, SEGMENT_BYTES_MAX, SEGMENT_HEADER_BYTES, encode_deltas, encode_epoch, encode_seal, encode_segment_header};
use super::{Delta, JournalIdentity, SealMark};
use crate::error::segment_object;
use crate::{IoError, IoErrorCode, Result, SegmentIo, Store};
use std::sync::Arc;

/// One segment on the backend; its header is valid.
pub(super) struct Segment {
    pub(super) base_lsn: u64,
    /// The lsn after the last frame in it; `base_lsn` if there is none.
    pub(super) next_lsn: u64,
    /// Where the next frame goes.
    pub(super) length_bytes: u64,
    /// Length on the backend: zeros follow after `length_bytes`.
    pub(super) padded_bytes: u64,
    /// Epoch of the last frame, or of the header.
    pub(super) epoch: u64,
    /// Content and name are known to be durable.
    pub(super) is_synced: bool,
}

pub(super) enum State {
    Usable,
    /// The seal is durable.
    Sealed(SealMark),
    /// What is on the backend is not known any more (I6).
    Broken(String),
}

/// Writer of one layer's journal. One caller at a time; at most one frame is in flight.
pub struct Journal {
    pub(super) store: Arc<dyn Store>,
    pub(super) identity: JournalIdentity,
    /// Ascending.
    pub(super) segments: Vec<Segment>,
    /// The last segment, if this journal appends to it.
    pub(super) open: Option<Arc<dyn SegmentIo>>,
    pub(super) state: State,
}

impl Journal {
    /// A journal without any segment; the first append makes one. Costs nothing on the backend.
    pub fn new(store: Arc<dyn Store>, identity: JournalIdentity) -> Journal {
        Journal { store, identity, segments: Vec::new(), open: None, state: State::Usable }
    }

    /// Appends one frame and syncs it. On `NoSpace` the append was taken back and may be tried again with the same lsn;
    /// on any other error, `Broken` or a failed sync among them, it must not be tried again (I6): every later append is `Broken`.
    /// A sealed journal answers `ReadOnly` (I2).
    ///
    /// # Panics
    /// If `lsn` is not the one after the last frame, or the deltas are more than a frame takes (1,048,576) or outside the address
    /// space.
    pub fn append(&mut self, lsn: u64, deltas: &[Delta]) -> Result<()> {
        self.check_usable("append")?;
        if let State::Sealed(mark) = &self.state {
            let message = format!("the layer was sealed at lsn {}", mark.final_lsn);
            return Err(IoError::new(IoErrorCode::ReadOnly, "append", self.object(lsn), 0, message));
        }
        if let Some(last) = self.segments.last() {
            assert_eq!(lsn, last.next_lsn, "lsns are contiguous");
        }
        let may_go_on = self.open.is_some() && self.segments.last().is_some_and(|last| last.length_bytes < SEGMENT_BYTES_MAX);
        self.put(lsn, may_go_on, |out, seed| encode_deltas(out, seed, lsn, deltas))?;
        if let Some(last) = self.segments.last_mut() {
            last.next_lsn = lsn + 1;
        }
        Ok(())
    }

    /// The next append begins a new segment.
    pub fn rotate(&mut self) {
        self.open = None;
    }

    /// Removes whole segments whose frames all have lsn <= `lsn`. A segment that starts at `lsn + 1` (made if there is no later
    /// frame) stays as a floor: a catalog restored from before `lsn` is then seen as `CatalogBehind`. A journal without segments
    /// stays without. On an error what was not removed yet is still part of the journal, and the call may be repeated but for
    /// `Broken`.
    pub fn remove_behind(&mut self, lsn: u64) -> Result<()> {
        self.check_usable("remove-behind")?;
        let Some(last) = self.segments.last() else { return Ok(()) };
        if matches!(self.state, State::Sealed(_)) || self.segments.iter().all(|segment| segment.base_lsn > lsn) {
            return Ok(());
        }
        if last.next_lsn <= lsn + 1 && last.base_lsn <= lsn {
            self.put(lsn + 1, false, |_, _| {})?;
        }
        // What stays must not depend on what goes: it may be from before a crash and never have been synced.
        self.sync_last()?;
        self.remove_segments(|segment| segment.next_lsn <= lsn + 1 && segment.base_lsn <= lsn)
    }

    /// Ends the journal: a small segment with the mark replaces all others; durable on return. The catalog must have
    /// `mark.final_lsn` before: what is replaced could not be replayed any more. Sealing again with the same mark
    /// does nothing, with another one it is `Exists`. On `NoSpace` it was taken back and may be tried again.
    ///
    /// # Panics
    /// If the journal has frames after `mark.final_lsn`.
    pub fn seal(&mut self, mark: SealMark) -> Result<()> {
        self.check_usable("seal")?;
        let base_lsn = mark.final_lsn + 1;
        if let State::Sealed(present) = &self.state {
            if *present != mark {
                let message = format!("the layer is sealed already, at lsn {}", present.final_lsn);
                return Err(IoError::new(IoErrorCode::Exists, "seal", self.object(base_lsn), 0, message));
            }
        } else {
            if let Some(last) = self.segments.last() {
                assert!(last.next_lsn <= base_lsn, "the journal goes to lsn {}, past its seal", last.next_lsn - 1);
            }
            self.put(base_lsn, false, |out, seed| encode_seal(out, seed, mark))?;
            self.state = State::Sealed(mark);
        }
        self.open = None;
        self.sync_last()?;
        self.remove_segments(|segment| segment.base_lsn < base_lsn)
    }

    /// Bytes in all segments: what a replay would read.
    pub fn length_bytes(&self) -> u64 {
        self.segments.iter().map(|segment| segment.length_bytes).sum()
    }

    pub(super) fn object(&self, base_lsn: u64) -> String {
        segment_object(self.identity.layer, base_lsn)
    }

    fn check_usable(&self, operation: &'static str) -> Result<()> {
        let State::Broken(reason) = &self.state else { return Ok(()) };
        let object = self.object(self.segments.last().map_or(0, |last| last.base_lsn));
        Err(IoError::new(IoErrorCode::Broken, operation, object, 0, format!("the journal was given up: {reason}")))
    }

    /// From here on the journal answers `Broken`.
    fn give_up(&mut self, error: IoError) -> IoError {
        self.state = State::Broken(error.to_string());
        self.open = None;
        error
    }

    /// Appends what `encode` makes to the last segment if `may_go_on`, or if that one is empty and begins at `lsn`; otherwise to a
    /// new segment that begins at `lsn`. Syncs it. On `NoSpace` everything is as before.
    fn put(&mut self, lsn: u64, may_go_on: bool, encode: impl FnOnce(&mut Vec<u8>, FrameSeed)) -> Result<()> {
        let goes_into_last = |last: &&Segment| may_go_on || (last.base_lsn == lsn && last.next_lsn == lsn);
        if self.segments.last().filter(goes_into_last).is_some() {
            // A floor that a replay found may never have been synced; a crash could then keep the frame and lose the header.
            self.sync_last()?;
        }
        let mut bytes = Vec::new();
        let Some(last) = self.segments.last().filter(goes_into_last) else {
            bytes.extend_from_slice(&encode_segment_header(&self.identity, lsn));
            encode(&mut bytes, FrameSeed::new(self.identity.layer, lsn));
            return self.put_new(lsn, &bytes);
        };
        let seed = FrameSeed::new(self.identity.layer, last.base_lsn);
        if last.epoch != self.identity.epoch {
            encode_epoch(&mut bytes, seed, lsn, self.identity.epoch);
        }
        encode(&mut bytes, seed);
        let segment = match &self.open {
            Some(segment) => Arc::clone(segment),
            None => {
                let segment = self.store.open_segment(self.identity.layer, last.base_lsn)?;
                segment.claim(self.identity.epoch)?;
                segment
            }
        };
        self.put_last(segment, bytes)
    }

    fn put_new(&mut self, base_lsn: u64, bytes: &[u8]) -> Result<()> {
        assert!(bytes.len() >= SEGMENT_HEADER_BYTES, "a segment begins with its header");
        let segment = self.store.create_segment(self.identity.layer, base_lsn, self.identity.epoch)?;
        if let Err(error) = segment.append(0, bytes) {
            if error.code == IoErrorCode::NoSpace {
                // The removal need not be durable: what may come back is a beginning, which a replay cuts.
                return match self.store.remove_segment(self.identity.layer, base_lsn) {
                    Ok(()) => Err(error),
                    Err(removal) => Err(self.not_taken_back(base_lsn, &removal)),
                };
            }
            return Err(self.give_up(error));
        }
        if let Err(error) = segment.sync() {
            return Err(self.give_up(failed_sync(error)));
        }
        self.segments.push(Segment {
            base_lsn,
            next_lsn: base_lsn,
            length_bytes: bytes.len() as u64,
            padded_bytes: bytes.len() as u64,
            epoch: self.identity.epoch,
            is_synced: true,
        });
        self.open = Some(segment);
        Ok(())
    }

    /// The first frame of a segment makes it as long as it is; with the second one it grows ahead, if the store wants that.
    fn put_last(&mut self, segment: Arc<dyn SegmentIo>, mut bytes: Vec<u8>) -> Result<()> {
        let Some(last) = self.segments.last() else { unreachable!("only called with a last segment") };
        let (base_lsn, length_bytes) = (last.base_lsn, last.length_bytes);
        let frame_bytes = bytes.len();
        let end_bytes = length_bytes + frame_bytes as u64;
        let mut padded_bytes = last.padded_bytes.max(end_bytes);
        let growth_bytes = u64::from(self.store.capabilities().segment_growth_bytes);
        if end_bytes > last.padded_bytes && growth_bytes > 0 {
            padded_bytes = (end_bytes + growth_bytes).next_multiple_of(growth_bytes);
            bytes.resize((padded_bytes - length_bytes) as usize, 0);
        }
        let mut appended = segment.append(length_bytes, &bytes);
        if bytes.len() > frame_bytes && appended.as_ref().is_err_and(|error| error.code == IoErrorCode::NoSpace) {
            // The zeros are a convenience. If bytes of this attempt come back in a crash they are those of the next one.
            padded_bytes = end_bytes;
            appended = segment.truncate(length_bytes).and_then(|()| segment.append(length_bytes, &bytes[..frame_bytes]));
        }
        if let Err(error) = appended {
            if error.code == IoErrorCode::NoSpace {
                // Synced, so that the next frame never lies over bytes of this one that come back in a crash.
                return match segment.truncate(length_bytes).and_then(|()| segment.sync()) {
                    Ok(()) => {
                        if let Some(last) = self.segments.last_mut() {
                            last.padded_bytes = length_bytes;
                        }
                        Err(error)
                    }
                    Err(removal) => Err(self.not_taken_back(base_lsn, &removal)),
                };
            }
            return Err(self.give_up(error));
        }
        if let Err(error) = segment.sync() {
            return Err(self.give_up(failed_sync(error)));
        }
        let epoch = self.identity.epoch;
        if let Some(last) = self.segments.last_mut() {
            last.length_bytes = end_bytes;
            last.padded_bytes = padded_bytes;
            last.epoch = epoch;
            last.is_synced = true;
        }
        self.open = Some(segment);
        Ok(())
    }

    fn not_taken_back(&mut self, base_lsn: u64, error: &IoError) -> IoError {
        let message = format!("no space, and what was appended could not be taken back: {error}");
        let error = IoError {
            errno: error.errno,
            ..IoError::new(IoErrorCode::Broken, "append", self.object(base_lsn), error.offset_bytes, message)
        };
        self.give_up(error)
    }

    /// Makes sure that the last segment is durable, name and content.
    fn sync_last(&mut self) -> Result<()> {
        let Some(last) = self.segments.last().filter(|last| !last.is_synced) else { return Ok(()) };
        let segment = self.store.open_segment(self.identity.layer, last.base_lsn)?;
        if let Err(error) = segment.sync() {
            return Err(self.give_up(failed_sync(error)));
        }
        if let Some(last) = self.segments.last_mut() {
            last.is_synced = true;
        }
        Ok(())
    }

    /// Removes the segments that `goes` picks, which are at the front, the oldest first.
    fn remove_segments(&mut self, goes: impl Fn(&Segment) -> bool) -> Result<()> {
        while let Some(first) = self.segments.first().filter(|first| goes(first)) {
            self.store.remove_segment(self.identity.layer, first.base_lsn)?;
            self.segments.remove(0);
        }
        Ok(())
    }
}

/// A sync that failed for want of space (delayed allocation, NFS) failed like any other: nobody knows what is durable, and nothing
/// may be tried again, which `NoSpace` would invite to.
fn failed_sync(error: IoError) -> IoError {
    if error.code == IoErrorCode::NoSpace { IoError { code: IoErrorCode::Io, ..error } } else { error }
}
