//! The bytes of a journal. All numbers are little-endian.
//!
//! A segment is a header and then frames without gaps:
//!
//! | offset | bytes | segment header | |
//! |---|---|---|---|
//! | 0 | 4 | magic | `ATJS` |
//! | 4 | 2 | version | 1 |
//! | 6 | 2 | flags | 0 |
//! | 8 | 16 | layer uuid | the layer the journal lies beside |
//! | 24 | 16 | volume uuid | |
//! | 40 | 8 | epoch | of the lease under which the segment was begun |
//! | 48 | 8 | base lsn | of the first frame; also in the segment's name |
//! | 56 | 4 | reserved | 0 |
//! | 60 | 4 | crc32c | over bytes 0 to 59 |
//!
//! | offset | bytes | frame header | |
//! |---|---|---|---|
//! | 0 | 4 | magic | `ATJF` |
//! | 4 | 4 | payload length | bytes, a multiple of 16, at most 16 MiB |
//! | 8 | 8 | lsn | |
//! | 16 | 4 | delta count | 0 if it is not a frame of deltas |
//! | 20 | 1 | kind | 1 deltas, 2 seal, 3 epoch |
//! | 21 | 7 | reserved | 0 |
//! | 28 | 4 | crc32c | over layer uuid, base lsn, bytes 0 to 27, payload |
//! | 32 | … | payload | |
//!
//! The crc is seeded with the layer and the base lsn, so that bytes of another journal that a file system shows after a crash
//! never pass for a frame. Header and payloads are multiples of 16 bytes, so frames always begin at one.
//!
//! | offset | bytes | delta | |
//! |---|---|---|---|
//! | 0 | 5 | start slot | start + count <= 2^37 (512 TiB) |
//! | 5 | 5 | slot count | not 0 |
//! | 10 | 2 | reserved | 0 |
//! | 12 | 4 | owner | 0: hole, else the layer's alias |
//!
//! Kind 2, seal, the last frame there ever is: final lsn (8), reserved 0 (8), successor's uuid (16, zeros: none). Its own lsn is
//! final lsn + 1. Kind 3, epoch: the frames after it were written under this epoch (8), reserved 0 (8); its lsn is that of the next
//! frame, and it uses none up.
//!
//! Versions: 1 is the first. A newer one keeps magic, version and the header's crc in their places, so that an older build can
//! tell "newer" from "rotten" and refuse it; older ones are read for ever and written no more: new segments have the new version.
use super::{Delta, JournalIdentity, SealMark};
use crate::LayerId;

pub(super) const VERSION: u16 = 1;
const SEGMENT_MAGIC: [u8; 4] = *b"ATJS";
const FRAME_MAGIC: [u8; 4] = *b"ATJF";
pub(super) const SEGMENT_HEADER_BYTES: usize = 64;
const SEGMENT_CRC_AT: usize = SEGMENT_HEADER_BYTES - 4;
pub(super) const FRAME_HEADER_BYTES: usize = 32;
const FRAME_CRC_AT: usize = FRAME_HEADER_BYTES - 4;
pub(super) const DELTA_BYTES: usize = 16;
const SEAL_BYTES: usize = 32;
const EPOCH_BYTES: usize = 16;
/// Frames begin at multiples of this.
pub(super) const FRAME_ALIGNMENT: usize = 16;
/// No payload is longer; a device closes its batches far below.
pub(super) const PAYLOAD_BYTES_MAX: usize = 16 << 20;
/// A segment that grew this long is followed by a new one, whether or not the caller rotates: a replay reads segments whole.
pub(super) const SEGMENT_BYTES_MAX: u64 = 64 << 20;
/// A replay refuses to read a segment into memory that is longer than the writer can have made it.
pub(super) const SEGMENT_READ_BYTES_MAX: u64 = 128 << 20;
/// Slots of the largest volume (512 TiB of 4 KiB).
const SLOT_LIMIT: u64 = 1 << 37;

const _: () = assert!(SEGMENT_HEADER_BYTES.is_multiple_of(FRAME_ALIGNMENT), "the first frame is found by its alignment");
const _: () = assert!(FRAME_HEADER_BYTES.is_multiple_of(FRAME_ALIGNMENT), "as is every next one");
const _: () = assert!(DELTA_BYTES.is_multiple_of(FRAME_ALIGNMENT) && SEAL_BYTES.is_multiple_of(FRAME_ALIGNMENT));
const _: () = assert!(SLOT_LIMIT < 1 << 40, "a slot number and a count have 5 bytes each");

const _: () = assert!(
    SEGMENT_BYTES_MAX + (2 * FRAME_HEADER_BYTES + EPOCH_BYTES + PAYLOAD_BYTES_MAX) as u64 <= SEGMENT_READ_BYTES_MAX,
    "what was written can be read"
);

const KIND_DELTAS: u8 = 1;
const KIND_SEAL: u8 = 2;
const KIND_EPOCH: u8 = 3;

/// What a segment's header says, once its magic, crc and version are right.
pub(super) struct SegmentHeader {
    pub(super) layer: LayerId,
    pub(super) volume: [u8; 16],
    pub(super) epoch: u64,
    pub(super) base_lsn: u64,
}

/// Why bytes are not a segment header.
pub(super) enum HeaderFault {
    /// Too short, or not the bytes that were written.
    Torn,
    /// Whole, and of this other version.
    Version(u16),
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes(array_at(bytes, at))
}
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes(array_at(bytes, at))
}
fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(array_at(bytes, at))
}
fn u40_at(bytes: &[u8], at: usize) -> u64 {
    let mut wide = [0; 8];
    wide[..5].copy_from_slice(&bytes[at..at + 5]);
    u64::from_le_bytes(wide)
}
fn array_at<const N: usize>(bytes: &[u8], at: usize) -> [u8; N] {
    let mut array = [0; N];
    array.copy_from_slice(&bytes[at..at + N]);
    array
}

/// The header of a new segment.
pub(super) fn encode_segment_header(identity: &JournalIdentity, base_lsn: u64) -> [u8; SEGMENT_HEADER_BYTES] {
    let mut bytes = [0; SEGMENT_HEADER_BYTES];
    bytes[0..4].copy_from_slice(&SEGMENT_MAGIC);
    bytes[4..6].copy_from_slice(&VERSION.to_le_bytes());
    bytes[8..24].copy_from_slice(&identity.layer.0);
    bytes[24..40].copy_from_slice(&identity.volume);
    bytes[40..48].copy_from_slice(&identity.epoch.to_le_bytes());
    bytes[48..56].copy_from_slice(&base_lsn.to_le_bytes());
    let crc = crc32c::crc32c(&bytes[..SEGMENT_CRC_AT]);
    bytes[SEGMENT_CRC_AT..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// Reads the header at the start of a segment.
pub(super) fn decode_segment_header(bytes: &[u8]) -> Result<SegmentHeader, HeaderFault> {
    let bytes = bytes.get(..SEGMENT_HEADER_BYTES).ok_or(HeaderFault::Torn)?;
    if bytes[0..4] != SEGMENT_MAGIC || crc32c::crc32c(&bytes[..SEGMENT_CRC_AT]) != u32_at(bytes, SEGMENT_CRC_AT) {
        return Err(HeaderFault::Torn);
    }
    match u16_at(bytes, 4) {
        VERSION => {}
        other => return Err(HeaderFault::Version(other)),
    }
    Ok(SegmentHeader {
        layer: LayerId(array_at(bytes, 8)),
        volume: array_at(bytes, 24),
        epoch: u64_at(bytes, 40),
        base_lsn: u64_at(bytes, 48),
    })
}

/// What binds frames to their segment.
#[derive(Clone, Copy)]
pub(super) struct FrameSeed(u32);

impl FrameSeed {
    pub(super) fn new(layer: LayerId, base_lsn: u64) -> FrameSeed {
        FrameSeed(crc32c::crc32c_append(crc32c::crc32c(&layer.0), &base_lsn.to_le_bytes()))
    }
}

fn encode_frame(
    out: &mut Vec<u8>,
    seed: FrameSeed,
    lsn: u64,
    kind: u8,
    delta_count: u32,
    payload_length: usize,
    payload: impl FnOnce(&mut Vec<u8>),
) {
    let start = out.len();
    out.reserve(FRAME_HEADER_BYTES + payload_length);
    out.extend_from_slice(&FRAME_MAGIC);
    out.extend_from_slice(&(payload_length as u32).to_le_bytes());
    out.extend_from_slice(&lsn.to_le_bytes());
    out.extend_from_slice(&delta_count.to_le_bytes());
    out.extend_from_slice(&[kind, 0, 0, 0, 0, 0, 0, 0]);
    out.extend_from_slice(&[0; 4]);
    payload(out);
    assert_eq!(out.len(), start + FRAME_HEADER_BYTES + payload_length, "a payload has the length its header says");
    let crc = frame_crc(seed, &out[start..]);
    out[start + FRAME_CRC_AT..start + FRAME_HEADER_BYTES].copy_from_slice(&crc.to_le_bytes());
}

fn frame_crc(seed: FrameSeed, frame: &[u8]) -> u32 {
    crc32c::crc32c_append(crc32c::crc32c_append(seed.0, &frame[..FRAME_CRC_AT]), &frame[FRAME_HEADER_BYTES..])
}

/// Appends a frame of deltas. More deltas than a frame takes, or ones outside the address space, are a mistake of the caller.
pub(super) fn encode_deltas(out: &mut Vec<u8>, seed: FrameSeed, lsn: u64, deltas: &[Delta]) {
    let length = deltas.len() * DELTA_BYTES;
    assert!(length <= PAYLOAD_BYTES_MAX, "{} deltas are more than a frame takes: the device bounds its batches", deltas.len());
    encode_frame(out, seed, lsn, KIND_DELTAS, deltas.len() as u32, length, |out| {
        for delta in deltas {
            assert!(is_delta(delta), "a delta outside the address space: {delta:?}");
            out.extend_from_slice(&delta.start_slot.to_le_bytes()[..5]);
            out.extend_from_slice(&delta.slot_count.to_le_bytes()[..5]);
            out.extend_from_slice(&[0; 2]);
            out.extend_from_slice(&delta.owner.to_le_bytes());
        }
    });
}

/// Appends the seal.
pub(super) fn encode_seal(out: &mut Vec<u8>, seed: FrameSeed, mark: SealMark) {
    encode_frame(out, seed, mark.final_lsn + 1, KIND_SEAL, 0, SEAL_BYTES, |out| {
        out.extend_from_slice(&mark.final_lsn.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
        out.extend_from_slice(&mark.successor.0);
    });
}

/// Appends a change of epoch before the frame `lsn`.
pub(super) fn encode_epoch(out: &mut Vec<u8>, seed: FrameSeed, lsn: u64, epoch: u64) {
    encode_frame(out, seed, lsn, KIND_EPOCH, 0, EPOCH_BYTES, |out| {
        out.extend_from_slice(&epoch.to_le_bytes());
        out.extend_from_slice(&[0; 8]);
    });
}

fn is_delta(delta: &Delta) -> bool {
    delta.slot_count > 0 && delta.start_slot.checked_add(delta.slot_count).is_some_and(|end| end <= SLOT_LIMIT)
}

/// A frame whose crc is right; its content is not looked at yet.
pub(super) struct RawFrame<'a> {
    pub(super) lsn: u64,
    pub(super) length: usize,
    kind: u8,
    delta_count: u32,
    payload: &'a [u8],
}

/// What a frame says.
pub(super) enum Record {
    Deltas(Vec<Delta>),
    Seal(SealMark),
    Epoch(u64),
}

/// The frame that begins at `at`, if magic, bounds and crc are right.
pub(super) fn frame_at(bytes: &[u8], at: usize, seed: FrameSeed) -> Option<RawFrame<'_>> {
    let header = bytes.get(at..at + FRAME_HEADER_BYTES)?;
    if header[0..4] != FRAME_MAGIC {
        return None;
    }
    let payload_length = u32_at(header, 4) as usize;
    if payload_length > PAYLOAD_BYTES_MAX || !payload_length.is_multiple_of(FRAME_ALIGNMENT) {
        return None;
    }
    let frame = bytes.get(at..at + FRAME_HEADER_BYTES + payload_length)?;
    if frame_crc(seed, frame) != u32_at(header, FRAME_CRC_AT) {
        return None;
    }
    Some(RawFrame {
        lsn: u64_at(header, 8),
        length: frame.len(),
        kind: header[20],
        delta_count: u32_at(header, 16),
        payload: &frame[FRAME_HEADER_BYTES..],
    })
}

impl RawFrame<'_> {
    /// Whether the frame uses up its lsn.
    pub(super) fn uses_lsn(&self) -> bool {
        self.kind == KIND_DELTAS
    }

    /// The content; the error says what about it cannot be.
    pub(super) fn decode(&self) -> Result<Record, &'static str> {
        match self.kind {
            KIND_DELTAS => self.decode_deltas(),
            KIND_SEAL if self.payload.len() == SEAL_BYTES => {
                let mark = SealMark { final_lsn: u64_at(self.payload, 0), successor: LayerId(array_at(self.payload, 16)) };
                if mark.final_lsn.checked_add(1) != Some(self.lsn) {
                    return Err("a seal whose lsn is not the one after its final lsn");
                }
                Ok(Record::Seal(mark))
            }
            KIND_EPOCH if self.payload.len() == EPOCH_BYTES => Ok(Record::Epoch(u64_at(self.payload, 0))),
            _ => Err("a frame of an unknown kind or of a wrong length"),
        }
    }

    fn decode_deltas(&self) -> Result<Record, &'static str> {
        if self.delta_count as usize * DELTA_BYTES != self.payload.len() {
            return Err("a frame whose delta count is not that of its payload");
        }
        let deltas = self.payload.chunks_exact(DELTA_BYTES).map(|bytes| {
            let delta = Delta { start_slot: u40_at(bytes, 0), slot_count: u40_at(bytes, 5), owner: u32_at(bytes, 12) };
            if is_delta(&delta) { Ok(delta) } else { Err("a delta outside the address space") }
        });
        Ok(Record::Deltas(deltas.collect::<Result<_, _>>()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LAYER: LayerId = LayerId([7; 16]);

    #[test]
    fn the_largest_and_the_smallest_delta_read_back() {
        let seed = FrameSeed::new(LAYER, 1);
        let deltas = [
            Delta { start_slot: 0, slot_count: SLOT_LIMIT, owner: 0 },
            Delta { start_slot: SLOT_LIMIT - 1, slot_count: 1, owner: u32::MAX },
        ];
        let mut bytes = Vec::new();
        encode_deltas(&mut bytes, seed, 42, &deltas);
        assert_eq!(bytes.len(), FRAME_HEADER_BYTES + 2 * DELTA_BYTES);
        let frame = frame_at(&bytes, 0, seed).unwrap();
        assert_eq!(frame.lsn, 42);
        let Ok(Record::Deltas(back)) = frame.decode() else { panic!("not deltas") };
        assert_eq!(back, deltas);
    }

    #[test]
    fn no_changed_bit_passes_and_no_frame_of_another_segment() {
        let seed = FrameSeed::new(LAYER, 1);
        let mut bytes = Vec::new();
        encode_deltas(&mut bytes, seed, 42, &[Delta { start_slot: 5, slot_count: 6, owner: 7 }]);
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(frame_at(&bytes, 0, seed).is_none(), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
        assert!(frame_at(&bytes, 0, FrameSeed::new(LAYER, 2)).is_none());
        assert!(frame_at(&bytes, 0, FrameSeed::new(LayerId([8; 16]), 1)).is_none());
        assert!(frame_at(&bytes, 0, seed).is_some());
    }

    #[test]
    fn a_header_reads_back_and_no_changed_bit_passes() {
        let identity = JournalIdentity { volume: [3; 16], layer: LAYER, epoch: 9 };
        let mut bytes = encode_segment_header(&identity, 11);
        let Ok(header) = decode_segment_header(&bytes) else { panic!("not a header") };
        assert_eq!((header.layer, header.volume, header.epoch, header.base_lsn), (LAYER, [3; 16], 9, 11));
        for bit in 0..bytes.len() * 8 {
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert!(matches!(decode_segment_header(&bytes), Err(HeaderFault::Torn)), "bit {bit}");
            bytes[bit / 8] ^= 1 << (bit % 8);
        }
    }

    #[test]
    fn a_frame_that_is_whole_but_says_what_cannot_be_is_told_apart() {
        let seed = FrameSeed::new(LAYER, 1);
        let mut bytes = Vec::new();
        encode_frame(&mut bytes, seed, 1, KIND_DELTAS, 1, DELTA_BYTES, |out| out.extend_from_slice(&[0; DELTA_BYTES]));
        assert!(frame_at(&bytes, 0, seed).unwrap().decode().is_err(), "a count of 0");
        bytes.clear();
        encode_frame(&mut bytes, seed, 1, 9, 0, 0, |_| {});
        assert!(frame_at(&bytes, 0, seed).unwrap().decode().is_err(), "an unknown kind");
        bytes.clear();
        encode_frame(&mut bytes, seed, 1, KIND_DELTAS, 2, DELTA_BYTES, |out| out.extend_from_slice(&[1; DELTA_BYTES]));
        assert!(frame_at(&bytes, 0, seed).unwrap().decode().is_err(), "a wrong count");
    }
}
