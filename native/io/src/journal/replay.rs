//! The reading side of a journal: every byte is checked (I7), a torn tail is cut (zeros are none), anything else that does not fit is an error.
use super::format::{
    FRAME_ALIGNMENT, FrameSeed, HeaderFault, Record, SEGMENT_HEADER_BYTES, SEGMENT_READ_BYTES_MAX, VERSION, decode_segment_header, frame_at,
};
use super::writer::{Segment, State};
use super::{Frame, Journal, JournalIdentity, JournalReplay, JournalSummary, SealMark};
use crate::error::segment_object;
use crate::{IoError, IoErrorCode, LayerId, Result, SegmentIo, Store};
use std::sync::Arc;

/// What one segment holds.
struct Scan {
    base_lsn: u64,
    /// The lsn after its last good frame.
    next_lsn: u64,
    /// Frames with an lsn that was asked for.
    frames: Vec<Frame>,
    seal: Option<SealMark>,
    epoch: u64,
    /// Where its good bytes end; 0: not even the header is good.
    good_bytes: u64,
    length_bytes: u64,
    /// Only zeros follow the good bytes: room for the frames to come.
    is_tail_zero: bool,
    /// Its place is taken by the frames of an earlier segment, and it has none: a floor that was given up for want of space and
    /// whose removal a crash has undone.
    is_leftover: bool,
}

impl Scan {
    /// The whole segment goes.
    fn is_removed(&self) -> bool {
        self.good_bytes == 0 || self.is_leftover
    }

    /// Bytes follow that are no frame, or all of them are none.
    fn has_tail(&self) -> bool {
        self.good_bytes < self.length_bytes || self.is_removed()
    }

    /// Something has to be cut off before frames can follow.
    fn is_torn(&self) -> bool {
        self.is_removed() || (self.good_bytes < self.length_bytes && !self.is_tail_zero)
    }

    fn is_empty(&self) -> bool {
        self.next_lsn == self.base_lsn && self.seal.is_none()
    }
}

impl Journal {
    /// Reads the journal of `identity.layer` (its epoch may be newer than the segments': they may be of older epochs, never
    /// of newer ones, which is `CatalogBehind` too). A torn tail is cut and the cut synced. A bad frame with a valid one after it is
    /// `Corrupt`, naming the segment and the offset; a first frame beyond `after_lsn + 1`, a segment base beyond it, or a seal mark
    /// with `final_lsn > after_lsn` that the frames do not reach is `CatalogBehind`. A segment of another layer or volume is
    /// `Corrupt`, one of a format this build does not know `Version`. No segments at all is an empty replay.
    ///
    /// The frames handed out are durable: the segment that may hold an unsynced one is synced first. On an error nothing was
    /// changed, or only a torn tail cut.
    pub fn replay(store: Arc<dyn Store>, identity: JournalIdentity, after_lsn: u64) -> Result<JournalReplay> {
        let scans = scan_journal(&*store, &identity, after_lsn, true)?;
        let torn_tail_bytes = cut_tails(&*store, &identity, &scans)?;

        let mut journal = Journal::new(Arc::clone(&store), identity);
        let mut frames = Vec::new();
        for scan in scans.into_iter().filter(|scan| !scan.is_removed()) {
            if let Some(mark) = scan.seal {
                journal.state = State::Sealed(mark);
            }
            journal.segments.push(Segment {
                base_lsn: scan.base_lsn,
                next_lsn: scan.next_lsn,
                length_bytes: scan.good_bytes,
                padded_bytes: if scan.is_torn() { scan.good_bytes } else { scan.length_bytes },
                epoch: scan.epoch,
                is_synced: false,
            });
            frames.extend(scan.frames);
        }
        if let Some(last) = journal.segments.last_mut()
            && (!frames.is_empty() || matches!(journal.state, State::Sealed(_)))
        {
            // Each earlier segment was synced before a later one was begun.
            store.open_segment(identity.layer, last.base_lsn)?.sync()?;
            last.is_synced = true;
        }
        let seal = if let State::Sealed(mark) = journal.state { Some(mark) } else { None };
        Ok(JournalReplay { frames, torn_tail_bytes, seal, journal })
    }
}

impl Journal {
    /// Reads the journal of a layer as `replay` does, with the same errors, and changes nothing: neither a torn tail nor a leftover
    /// goes, and nothing is synced. Beside a writer the last frame may be on its way: it then counts as a torn tail. `volume` `None`:
    /// any, as long as all segments are of one.
    pub fn inspect(store: &dyn Store, layer: LayerId, volume: Option<[u8; 16]>, epoch: u64, after_lsn: u64) -> Result<JournalSummary> {
        let volume = match volume {
            Some(volume) => volume,
            None => first_volume(store, layer)?.unwrap_or_default(),
        };
        let scans = scan_journal(store, &JournalIdentity { volume, layer, epoch }, after_lsn, false)?;
        let torn = scans.iter().filter(|scan| scan.is_torn());
        let torn_tail_bytes = torn.map(|scan| scan.length_bytes - if scan.is_removed() { 0 } else { scan.good_bytes }).sum();
        let kept = || scans.iter().filter(|scan| !scan.is_removed());
        Ok(JournalSummary {
            segment_count: kept().count() as u64,
            length_bytes: kept().map(|scan| scan.good_bytes).sum(),
            torn_tail_bytes,
            last_lsn: kept().map(|scan| scan.next_lsn.saturating_sub(1)).max().unwrap_or(0),
            epoch: kept().map(|scan| scan.epoch).max().unwrap_or(0),
            seal: kept().find_map(|scan| scan.seal),
            frames: scans.into_iter().filter(|scan| !scan.is_removed()).flat_map(|scan| scan.frames).collect(),
        })
    }
}

/// The volume that the first segment with a good header names.
fn first_volume(store: &dyn Store, layer: LayerId) -> Result<Option<[u8; 16]>> {
    for base_lsn in store.list_segments(layer)? {
        if let Ok(header) = decode_segment_header(&read_segment(&*store.open_segment(layer, base_lsn)?, layer, base_lsn)?) {
            return Ok(Some(header.volume));
        }
    }
    Ok(None)
}

fn read_segment(segment: &dyn SegmentIo, layer: LayerId, base_lsn: u64) -> Result<Vec<u8>> {
    let length_bytes = segment.length_bytes()?;
    if length_bytes > SEGMENT_READ_BYTES_MAX {
        let message = format!("{length_bytes} bytes, no segment is longer than {SEGMENT_READ_BYTES_MAX}");
        return Err(IoError::new(IoErrorCode::Corrupt, "replay", segment_object(layer, base_lsn), SEGMENT_READ_BYTES_MAX, message));
    }
    segment.read_all()
}

/// Every segment of a journal, found to belong together. `claims`: for who writes it from now on.
fn scan_journal(store: &dyn Store, identity: &JournalIdentity, after_lsn: u64, claims: bool) -> Result<Vec<Scan>> {
    let mut scans = Vec::new();
    if claims {
        store.claim_journal(identity.layer, identity.epoch)?;
    }
    for base_lsn in store.list_segments(identity.layer)? {
        let segment = store.open_segment(identity.layer, base_lsn)?;
        if claims {
            // An append that failed may still be on its way: behind what is read here it would lie where the next frame goes.
            segment.claim(identity.epoch)?;
        }
        let bytes = read_segment(&*segment, identity.layer, base_lsn)?;
        scans.push(scan_segment(&bytes, identity, base_lsn, after_lsn)?);
    }
    check_connected(&mut scans, identity, after_lsn)?;
    Ok(scans)
}

fn corrupt(identity: &JournalIdentity, base_lsn: u64, offset_bytes: u64, message: impl Into<String>) -> IoError {
    IoError::new(IoErrorCode::Corrupt, "replay", segment_object(identity.layer, base_lsn), offset_bytes, message)
}

fn behind(identity: &JournalIdentity, base_lsn: u64, message: impl Into<String>) -> IoError {
    IoError::new(IoErrorCode::CatalogBehind, "replay", segment_object(identity.layer, base_lsn), 0, message)
}

/// Reads one segment to the end of its good bytes.
fn scan_segment(bytes: &[u8], identity: &JournalIdentity, base_lsn: u64, after_lsn: u64) -> Result<Scan> {
    let seed = FrameSeed::new(identity.layer, base_lsn);
    let mut scan = Scan {
        base_lsn,
        next_lsn: base_lsn,
        frames: Vec::new(),
        seal: None,
        epoch: 0,
        good_bytes: 0,
        length_bytes: bytes.len() as u64,
        is_tail_zero: false,
        is_leftover: false,
    };
    let header = match decode_segment_header(bytes) {
        Ok(header) => header,
        Err(HeaderFault::Version(version)) => {
            let message = format!("format version {version}, this build knows {VERSION}: use the build that wrote it, or a newer one");
            return Err(IoError::new(IoErrorCode::Version, "replay", segment_object(identity.layer, base_lsn), 4, message));
        }
        Err(HeaderFault::Torn) => {
            if let Some((at, lsn)) = find_frame(bytes, SEGMENT_HEADER_BYTES.min(bytes.len()), seed, base_lsn) {
                let message = format!("a bad segment header, but frame {lsn} at {at} is valid");
                return Err(corrupt(identity, base_lsn, 0, message));
            }
            return Ok(scan);
        }
    };
    if (header.layer, header.volume, header.base_lsn) != (identity.layer, identity.volume, base_lsn) {
        let message = format!(
            "the segment is of layer {}, volume {}, base lsn {}; expected volume {}",
            header.layer,
            LayerId(header.volume),
            header.base_lsn,
            LayerId(identity.volume)
        );
        return Err(corrupt(identity, base_lsn, 8, message));
    }
    check_epoch(identity, base_lsn, header.epoch)?;
    scan.epoch = header.epoch;

    let mut epoch = header.epoch;
    let mut at = SEGMENT_HEADER_BYTES;
    scan.good_bytes = at as u64;
    while at < bytes.len() {
        let expected = scan.next_lsn;
        let Some(frame) = frame_at(bytes, at, seed).filter(|frame| frame.lsn == expected && scan.seal.is_none()) else {
            // After the seal nothing is a frame, whatever its lsn.
            let least_lsn = if scan.seal.is_some() { 0 } else { expected };
            if let Some((good_at, lsn)) = find_frame(bytes, at, seed, least_lsn) {
                let message = format!("frame {expected} is bad or missing, but frame {lsn} at {good_at} is valid");
                return Err(corrupt(identity, base_lsn, at as u64, message));
            }
            break;
        };
        let record = frame.decode().map_err(|reason| corrupt(identity, base_lsn, at as u64, reason))?;
        match record {
            Record::Deltas(deltas) if frame.lsn > after_lsn => scan.frames.push(Frame { lsn: frame.lsn, deltas }),
            Record::Deltas(_) => {}
            Record::Seal(mark) => scan.seal = Some(mark),
            Record::Epoch(changed) => {
                check_epoch(identity, base_lsn, changed)?;
                epoch = changed;
            }
        }
        at += frame.length;
        if frame.uses_lsn() || scan.seal.is_some() {
            scan.next_lsn += u64::from(frame.uses_lsn());
            // A change of epoch counts with the frame after it. Alone it is the rest of a torn append, and kept it would move the
            // next one from the header's sector to another, which a crash may keep without this one.
            scan.good_bytes = at as u64;
            scan.epoch = epoch;
        }
    }
    scan.is_tail_zero = bytes[scan.good_bytes as usize..].iter().all(|byte| *byte == 0);
    Ok(scan)
}

fn check_epoch(identity: &JournalIdentity, base_lsn: u64, epoch: u64) -> Result<()> {
    if epoch <= identity.epoch {
        return Ok(());
    }
    let message = format!("written under epoch {epoch}, the catalog is at {}: the catalog is older than the journal", identity.epoch);
    Err(behind(identity, base_lsn, message))
}

/// The first valid frame at or after `from` with an lsn of at least `least_lsn`: its place and its lsn.
fn find_frame(bytes: &[u8], from: usize, seed: FrameSeed, least_lsn: u64) -> Option<(usize, u64)> {
    let mut places = (from..bytes.len()).step_by(FRAME_ALIGNMENT);
    places.find_map(|at| frame_at(bytes, at, seed).filter(|frame| frame.lsn >= least_lsn).map(|frame| (at, frame.lsn)))
}

/// Checks that the segments follow one another without a gap from `after_lsn + 1` on, and that bytes which are no frames are not
/// where frames ought to be. Marks leftovers.
fn check_connected(scans: &mut [Scan], identity: &JournalIdentity, after_lsn: u64) -> Result<()> {
    // The lsn that should come next; `None` before the first segment.
    let mut expected: Option<u64> = None;
    // The segment and the offset where frames from `expected` on may have been.
    let mut doubtful: Option<(u64, u64)> = None;
    let mut sealed = false;
    for scan in scans {
        let base_lsn = scan.base_lsn;
        match expected {
            Some(lsn) if base_lsn < lsn && scan.is_empty() => {
                scan.is_leftover = true;
                continue;
            }
            Some(lsn) if base_lsn < lsn => {
                let message = format!("the segment begins at lsn {base_lsn}, but the one before it goes to {}", lsn - 1);
                return Err(corrupt(identity, base_lsn, 48, message));
            }
            _ if sealed => return Err(corrupt(identity, base_lsn, 0, "a segment after the one with the seal")),
            // Nothing is missing, or only what the catalog has: bytes before this are no frames that anybody needs.
            Some(lsn) if base_lsn == lsn => doubtful = None,
            _ if base_lsn <= after_lsn.saturating_add(1) => doubtful = None,
            _ => {
                let lsn = expected.unwrap_or(0).max(after_lsn + 1);
                return Err(match doubtful {
                    Some((bad_base_lsn, offset_bytes)) => {
                        let message = format!("frame {lsn} is bad, but the journal goes on at lsn {base_lsn}");
                        corrupt(identity, bad_base_lsn, offset_bytes, message)
                    }
                    None => {
                        let message = format!(
                            "the catalog has lsn {after_lsn}, the journal goes on at {base_lsn} without {lsn}: \
                             the catalog is older than the journal"
                        );
                        behind(identity, base_lsn, message)
                    }
                });
            }
        }
        if scan.has_tail() && doubtful.is_none() {
            doubtful = Some((base_lsn, scan.good_bytes));
        }
        sealed = scan.seal.is_some();
        expected = Some(scan.next_lsn);
    }
    Ok(())
}

/// Cuts what is no frame off the ends of the segments; a segment without a good header goes. Returns how many bytes that were.
fn cut_tails(store: &dyn Store, identity: &JournalIdentity, scans: &[Scan]) -> Result<u64> {
    let mut cut_bytes = 0;
    for scan in scans.iter().filter(|scan| scan.is_torn()) {
        if scan.is_removed() {
            // Not durable, and need not be: if it comes back, it is cut again.
            cut_bytes += scan.length_bytes;
            store.remove_segment(identity.layer, scan.base_lsn)?;
        } else {
            cut_bytes += scan.length_bytes - scan.good_bytes;
            let segment = store.open_segment(identity.layer, scan.base_lsn)?;
            segment.claim(identity.epoch)?;
            segment.truncate(scan.good_bytes)?;
            segment.sync()?;
        }
    }
    Ok(cut_bytes)
}
