//! What is known of one object of a layer: which of its slots hold data, and how far it was ever written. It stands in an attribute
//! of the object and changes in the same request as the data, but it is a hint all the same (I4): RADOS itself tells nobody which
//! parts of an object are holes.
//!
//! | offset | size | field | valid when |
//! |---|---|---|---|
//! | 0 | 1 | version, 1 | always |
//! | 1 | 1 | 1: all slots hold data; 0: as the bits say | always |
//! | 2 | 4 | length ever written, in bytes, little-endian | always |
//! | 6 | 128 | a bit per slot, the lowest of each byte first | the second field is 0 |
use std::ops::Range;

/// A layer is cut into objects of this size.
pub(super) const OBJECT_BYTES: u64 = 4 << 20;
pub(super) const SLOT_BYTES: u64 = 4096;
const SLOTS: usize = (OBJECT_BYTES / SLOT_BYTES) as usize;
const WORDS: usize = SLOTS / 64;
const VERSION: u8 = 1;
const SHORT_BYTES: usize = 6;
/// The longest form of the attribute.
pub(super) const ATTRIBUTE_BYTES_MAX: usize = SHORT_BYTES + WORDS * 8;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Slots {
    Empty,
    Some(Box<[u64; WORDS]>),
    Full,
}

/// See above.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Object {
    slots: Slots,
    length_bytes: u32,
    /// The attribute may not say what stands here: the next request has to set it.
    pub(super) is_untold: bool,
}

fn words_of(slots: Range<usize>) -> impl Iterator<Item = (usize, u64)> {
    let (start, end) = (slots.start, slots.end);
    (start / 64..end.div_ceil(64)).map(move |word| {
        let from = start.max(word * 64) - word * 64;
        let until = end.min(word * 64 + 64) - word * 64;
        (word, (u64::MAX >> (64 - (until - from))) << from)
    })
}

impl Object {
    pub(super) fn empty() -> Object {
        Object { slots: Slots::Empty, length_bytes: 0, is_untold: false }
    }

    /// What is believed of an object that does not say: everything may be there.
    pub(super) fn full() -> Object {
        Object { slots: Slots::Full, length_bytes: OBJECT_BYTES as u32, is_untold: false }
    }

    /// `None`: not an attribute of ours.
    pub(super) fn decode(bytes: &[u8]) -> Option<Object> {
        let (head, bits) = bytes.split_at_checked(SHORT_BYTES)?;
        let length_bytes = u32::from_le_bytes(head[2..].try_into().ok()?);
        if head[0] != VERSION || u64::from(length_bytes) > OBJECT_BYTES {
            return None;
        }
        let slots = match head[1] {
            1 if bits.is_empty() => Slots::Full,
            0 if bits.len() == WORDS * 8 => {
                let mut words = Box::new([0; WORDS]);
                for (word, bytes) in words.iter_mut().zip(bits.chunks_exact(8)) {
                    *word = u64::from_le_bytes(bytes.try_into().ok()?);
                }
                Slots::Some(words)
            }
            _ => return None,
        };
        Some(Object { slots, length_bytes, is_untold: false }.normal())
    }

    /// The attribute, in `buffer`.
    pub(super) fn encode<'a>(&self, buffer: &'a mut [u8; ATTRIBUTE_BYTES_MAX]) -> &'a [u8] {
        buffer.fill(0);
        buffer[0] = VERSION;
        buffer[2..SHORT_BYTES].copy_from_slice(&self.length_bytes.to_le_bytes());
        match &self.slots {
            Slots::Full => {
                buffer[1] = 1;
                return &buffer[..SHORT_BYTES];
            }
            Slots::Some(words) => {
                for (bytes, word) in buffer[SHORT_BYTES..].chunks_exact_mut(8).zip(words.iter()) {
                    bytes.copy_from_slice(&word.to_le_bytes());
                }
            }
            Slots::Empty => {}
        }
        &buffer[..]
    }

    fn normal(mut self) -> Object {
        if let Slots::Some(words) = &self.slots {
            if words.iter().all(|word| *word == 0) {
                self.slots = Slots::Empty;
            } else if words.iter().all(|word| *word == u64::MAX) {
                self.slots = Slots::Full;
            }
        }
        self
    }

    /// How far it was ever written.
    pub(super) fn length_bytes(&self) -> u64 {
        u64::from(self.length_bytes)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.slots == Slots::Empty
    }

    pub(super) fn allocated_bytes(&self) -> u64 {
        SLOT_BYTES
            * match &self.slots {
                Slots::Empty => 0,
                Slots::Some(words) => words.iter().map(|word| u64::from(word.count_ones())).sum(),
                Slots::Full => SLOTS as u64,
            }
    }

    /// Notes that the bytes are written. True: the attribute has to say so.
    pub(super) fn add(&mut self, bytes: Range<u64>) -> bool {
        let slots = (bytes.start / SLOT_BYTES) as usize..bytes.end.div_ceil(SLOT_BYTES) as usize;
        let is_longer = bytes.end > self.length_bytes();
        if is_longer {
            self.length_bytes = bytes.end as u32;
        }
        let has_all = match &self.slots {
            Slots::Full => true,
            Slots::Empty => false,
            Slots::Some(words) => words_of(slots.clone()).all(|(word, mask)| words[word] & mask == mask),
        };
        if has_all {
            return is_longer;
        }
        let mut words = self.take_words();
        words_of(slots).for_each(|(word, mask)| words[word] |= mask);
        self.put_words(words);
        true
    }

    /// Notes that the bytes are zeros; only whole slots are free then. True: the attribute has to say so.
    pub(super) fn remove(&mut self, bytes: Range<u64>) -> bool {
        let slots = bytes.start.div_ceil(SLOT_BYTES) as usize..(bytes.end / SLOT_BYTES) as usize;
        if slots.is_empty() || self.is_empty() {
            return false;
        }
        let mut words = self.take_words();
        let mut is_changed = false;
        words_of(slots).for_each(|(word, mask)| {
            is_changed |= words[word] & mask != 0;
            words[word] &= !mask;
        });
        self.put_words(words);
        is_changed
    }

    fn take_words(&mut self) -> Box<[u64; WORDS]> {
        match std::mem::replace(&mut self.slots, Slots::Empty) {
            Slots::Empty => Box::new([0; WORDS]),
            Slots::Some(words) => words,
            Slots::Full => Box::new([u64::MAX; WORDS]),
        }
    }

    fn put_words(&mut self, words: Box<[u64; WORDS]>) {
        self.slots = Slots::Some(words);
        *self = std::mem::replace(self, Object::empty()).normal();
    }

    /// Calls `visit` with each stretch of the bytes and whether it holds data.
    pub(super) fn visit(&self, bytes: Range<u64>, mut visit: impl FnMut(Range<u64>, bool)) {
        let mut at = bytes.start;
        while at < bytes.end {
            let slot = (at / SLOT_BYTES) as usize;
            let data = self.has(slot);
            let mut next = slot + 1;
            while next < SLOTS && self.has(next) == data {
                next += 1;
            }
            let until = (next as u64 * SLOT_BYTES).min(bytes.end);
            visit(at..until, data);
            at = until;
        }
    }

    fn has(&self, slot: usize) -> bool {
        match &self.slots {
            Slots::Empty => false,
            Slots::Some(words) => words[slot / 64] >> (slot % 64) & 1 == 1,
            Slots::Full => true,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stretches(object: &Object) -> Vec<(u64, u64, bool)> {
        let mut found = Vec::new();
        object.visit(0..OBJECT_BYTES, |bytes, data| found.push((bytes.start, bytes.end, data)));
        found
    }

    #[test]
    fn what_was_noted_comes_back_from_the_attribute() {
        let mut object = Object::empty();
        let mut buffer = [0; ATTRIBUTE_BYTES_MAX];
        assert_eq!(Object::decode(object.encode(&mut buffer)), Some(Object::empty()));
        assert!(object.add(5000..9000));
        assert!(!object.add(4096..9000), "nothing new");
        assert!(object.add(8192..9001), "it is longer");
        assert_eq!(object.allocated_bytes(), 8192);
        assert_eq!(Object::decode(object.encode(&mut buffer)).as_ref(), Some(&object));
        assert_eq!(stretches(&object), [(0, 4096, false), (4096, 12_288, true), (12_288, OBJECT_BYTES, false)]);
        assert!(object.add(0..OBJECT_BYTES));
        assert_eq!(object.encode(&mut buffer).len(), SHORT_BYTES);
        assert_eq!(Object::decode(object.encode(&mut buffer)).as_ref(), Some(&object));
        assert_eq!(object, Object::full());
    }

    #[test]
    fn a_punch_frees_whole_slots_and_keeps_the_length() {
        let mut object = Object::empty();
        object.add(0..OBJECT_BYTES);
        assert!(!object.remove(1..8191), "no whole slot");
        assert!(object.remove(1..12_288));
        assert!(!object.remove(4096..12_288), "nothing new");
        assert_eq!(stretches(&object), [(0, 4096, true), (4096, 12_288, false), (12_288, OBJECT_BYTES, true)]);
        assert!(object.remove(0..OBJECT_BYTES));
        assert!(object.is_empty());
        assert_eq!(object.length_bytes(), OBJECT_BYTES);
    }

    #[test]
    fn every_range_of_slots_is_the_bits_it_should_be() {
        for (start, end) in [(0, 1), (0, 64), (63, 65), (1, 1023), (64, 128), (1000, 1024), (0, 1024)] {
            let mut words = [0u64; WORDS];
            words_of(start..end).for_each(|(word, mask)| words[word] |= mask);
            for slot in 0..SLOTS {
                assert_eq!(words[slot / 64] >> (slot % 64) & 1 == 1, (start..end).contains(&slot), "{start}..{end} {slot}");
            }
        }
    }

    #[test]
    fn what_is_not_an_attribute_is_none() {
        let good = *Object::empty().encode(&mut [0; ATTRIBUTE_BYTES_MAX]).first_chunk::<ATTRIBUTE_BYTES_MAX>().unwrap();
        for (at, value) in [(0, 2), (1, 2), (1, 1), (5, 1)] {
            let mut bad = good;
            bad[at] = value;
            assert_eq!(Object::decode(&bad), None, "{at}");
        }
        for length in [0, 5, 6, 133] {
            assert_eq!(Object::decode(&good[..length]), None, "{length}");
        }
    }
}
