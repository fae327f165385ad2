//! The crash recorder: the ordered history of every mutating operation, and the states a power cut could leave behind.
//!
//! What survives a power cut:
//! - `create_layer`, `remove_layer`, `write_record` and (here, if nowhere else) `remove_record` are durable when they return.
//! - An operation on a layer survives for certain once a later sync of that layer has returned. Until then it may survive or not,
//!   whole or torn, whatever happens to its neighbours.
//! - A write to a segment or a cut of it survives for certain once the segment was synced. Until then the segment may end
//!   anywhere in the written bytes, or be longer with zeros or garbage in sectors that did not arrive; sectors inside the old
//!   length that did not arrive are as they were.
//! - The name of a new segment survives for certain once the segment was synced.
//! - The removal of a segment is never certain while it is remembered: the segment may be back after the cut, as it was. A newer
//!   segment of the same name that was synced takes its place for good; `forget_before` and the removal of the layer end the doubt.
//!
//! A [`Moment`] is the store at one sequence number, durable content and doubtful operations apart. Two are kept: the oldest that
//! may be asked for and the one asked for last, so that going through the boundaries of a long run applies each event twice and
//! not once per image.
use super::CrashOptions;
use super::sparse::{PAGE_BYTES, Sparse};
use crate::LayerId;
use crate::random::Random;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// What disks write whole.
const SECTOR_BYTES: u64 = 512;

/// Of two surviving operations about one is torn, and of two lists about one reordered, where the options allow it.
const HALF_OF_256: u16 = 128;

/// Number of a layer or segment, never used twice: a name may be.
pub(super) type ObjectNumber = u64;

/// An operation on a layer that a sync makes durable.
pub(super) enum LayerOperation {
    Write { offset_bytes: u64, data: Arc<[u8]> },
    Punch { offset_bytes: u64, length_bytes: u64 },
    Zero { offset_bytes: u64, length_bytes: u64 },
}

/// An operation on a segment that a sync makes durable. Appends carry the place they went to.
pub(super) enum SegmentOperation {
    Append { offset_bytes: u64, data: Arc<[u8]> },
    Truncate { length_bytes: u64 },
}

/// One entry of the history.
pub(super) enum Event {
    CreateLayer { object: ObjectNumber, id: LayerId },
    RemoveLayer { id: LayerId },
    Layer { object: ObjectNumber, operation: Arc<LayerOperation> },
    SyncLayer { object: ObjectNumber },
    CreateSegment { object: ObjectNumber, layer: LayerId, base_lsn: u64 },
    RemoveSegment { object: ObjectNumber },
    Segment { object: ObjectNumber, operation: Arc<SegmentOperation> },
    SyncSegment { object: ObjectNumber },
    WriteRecord { name: String, bytes: Arc<[u8]> },
    RemoveRecord { name: String },
}

impl Event {
    /// Whether what a crash may leave behind shrinks or changes for certain here.
    fn is_boundary(&self) -> bool {
        // The removal of a record waits for the next one: by then whatever counted on it is there.
        !matches!(self, Event::Layer { .. } | Event::Segment { .. } | Event::CreateSegment { .. } | Event::RemoveRecord { .. })
    }
}

#[derive(Clone)]
struct LayerMoment {
    id: LayerId,
    durable: Sparse,
    doubtful: Vec<Arc<LayerOperation>>,
}

#[derive(Clone)]
struct SegmentMoment {
    layer: LayerId,
    base_lsn: u64,
    is_name_durable: bool,
    is_removed: bool,
    durable: Arc<Vec<u8>>,
    doubtful: Vec<Arc<SegmentOperation>>,
}

/// The store just after one event. Ordered maps, so that a seed draws the same image in every process.
#[derive(Clone, Default)]
struct Moment {
    sequence: u64,
    layers: BTreeMap<ObjectNumber, LayerMoment>,
    layer_objects: HashMap<LayerId, ObjectNumber>,
    segments: BTreeMap<ObjectNumber, SegmentMoment>,
    records: BTreeMap<String, Arc<[u8]>>,
}

/// What was found after a power cut.
pub(super) struct Image {
    pub(super) layers: Vec<(LayerId, Sparse)>,
    pub(super) segments: BTreeMap<(LayerId, u64), Arc<Vec<u8>>>,
    pub(super) records: BTreeMap<String, Arc<[u8]>>,
}

/// The recorder.
#[derive(Default)]
pub(super) struct History {
    oldest: Moment,
    latest_asked: Moment,
    /// The events after `oldest`.
    events: VecDeque<Event>,
    /// When each of them was: a number that rises over all recorders of the process.
    ticks: VecDeque<u64>,
}

static TICKS: AtomicU64 = AtomicU64::new(0);

/// A number above that of everything that any recorder of this process has recorded so far, and below that of all that comes.
pub fn tick() -> u64 {
    TICKS.fetch_add(1, Ordering::SeqCst) + 1
}

impl History {
    /// The store holds this layer before the first event.
    pub(super) fn start_with_layer(&mut self, object: ObjectNumber, id: LayerId, durable: Sparse) {
        self.oldest.layer_objects.insert(id, object);
        self.oldest.layers.insert(object, LayerMoment { id, durable, doubtful: Vec::new() });
        self.latest_asked = self.oldest.clone();
    }

    /// The store holds this segment before the first event.
    pub(super) fn start_with_segment(&mut self, object: ObjectNumber, layer: LayerId, base_lsn: u64, durable: Arc<Vec<u8>>) {
        let segment = SegmentMoment { layer, base_lsn, is_name_durable: true, is_removed: false, durable, doubtful: Vec::new() };
        self.oldest.segments.insert(object, segment);
        self.latest_asked = self.oldest.clone();
    }

    /// The store holds these records before the first event.
    pub(super) fn start_with_records(&mut self, records: BTreeMap<String, Arc<[u8]>>) {
        self.oldest.records = records;
        self.latest_asked = self.oldest.clone();
    }

    /// Number of the last event.
    pub(super) fn sequence(&self) -> u64 {
        self.oldest.sequence + self.events.len() as u64
    }

    /// Adds an event. The caller holds whatever makes events of one object come in the order in which they took effect.
    pub(super) fn push(&mut self, event: Event) {
        self.events.push_back(event);
        self.ticks.push_back(tick());
    }

    /// Ticks of the boundaries after `from`.
    pub(super) fn boundary_ticks(&self, from: u64) -> Vec<u64> {
        let ticked = self.events.iter().zip(&self.ticks);
        ticked.filter(|(event, tick)| **tick > from && event.is_boundary()).map(|(_, tick)| *tick).collect()
    }

    /// Number of the last event up to a tick, or of the oldest one that is remembered.
    pub(super) fn sequence_at(&self, tick: u64) -> u64 {
        self.oldest.sequence + self.ticks.partition_point(|each| *each <= tick) as u64
    }

    /// The boundaries after `from`.
    pub(super) fn boundaries(&self, from: u64) -> Vec<u64> {
        let numbered = self.events.iter().zip(self.oldest.sequence + 1..);
        numbered.filter(|(event, number)| *number > from && event.is_boundary()).map(|(_, number)| number).collect()
    }

    /// Forgets what was before `sequence`.
    pub(super) fn forget_before(&mut self, sequence: u64) {
        assert!(sequence <= self.sequence(), "the history ends at {}, before {sequence}", self.sequence());
        while self.oldest.sequence < sequence {
            let Some(event) = self.events.pop_front() else { break };
            self.ticks.pop_front();
            self.oldest.apply(&event);
        }
        self.oldest.segments.retain(|_, segment| !segment.is_removed);
        self.latest_asked = self.oldest.clone();
    }

    /// Draws what a power cut just after `sequence` could have left.
    pub(super) fn crash_image(&mut self, sequence: u64, seed: u64, options: CrashOptions) -> Image {
        assert!(sequence <= self.sequence(), "the history ends at {}, before {sequence}", self.sequence());
        assert!(sequence >= self.oldest.sequence, "the history before {} was forgotten, {sequence} is gone", self.oldest.sequence);
        if sequence < self.latest_asked.sequence {
            self.latest_asked = self.oldest.clone();
        }
        let skip = self.latest_asked.sequence - self.oldest.sequence;
        let count = sequence - self.latest_asked.sequence;
        for event in self.events.range(skip as usize..(skip + count) as usize) {
            self.latest_asked.apply(event);
        }
        self.latest_asked.draw(Random::new(seed, sequence), options)
    }
}

impl Moment {
    fn apply(&mut self, event: &Event) {
        self.sequence += 1;
        match event {
            Event::CreateLayer { object, id } => {
                self.layer_objects.insert(*id, *object);
                self.layers.insert(*object, LayerMoment { id: *id, durable: Sparse::default(), doubtful: Vec::new() });
            }
            Event::RemoveLayer { id } => {
                if let Some(object) = self.layer_objects.remove(id) {
                    self.layers.remove(&object);
                }
                self.segments.retain(|_, segment| segment.layer != *id);
            }
            // A handle may outlive its layer or segment; what is done through it then is lost in any case.
            Event::Layer { object, operation } => {
                if let Some(layer) = self.layers.get_mut(object) {
                    layer.doubtful.push(Arc::clone(operation));
                }
            }
            Event::SyncLayer { object } => {
                if let Some(layer) = self.layers.get_mut(object) {
                    for operation in layer.doubtful.drain(..) {
                        operation.apply(&mut layer.durable);
                    }
                }
            }
            Event::CreateSegment { object, layer, base_lsn } => {
                let segment = SegmentMoment {
                    layer: *layer,
                    base_lsn: *base_lsn,
                    is_name_durable: false,
                    is_removed: false,
                    durable: Arc::default(),
                    doubtful: Vec::new(),
                };
                self.segments.insert(*object, segment);
            }
            Event::RemoveSegment { object } => {
                if let Some(segment) = self.segments.get_mut(object) {
                    segment.is_removed = true;
                }
            }
            Event::Segment { object, operation } => {
                if let Some(segment) = self.segments.get_mut(object) {
                    segment.doubtful.push(Arc::clone(operation));
                }
            }
            Event::SyncSegment { object } => self.sync_segment(*object),
            Event::WriteRecord { name, bytes } => {
                self.records.insert(name.clone(), Arc::clone(bytes));
            }
            Event::RemoveRecord { name } => {
                self.records.remove(name);
            }
        }
    }

    fn sync_segment(&mut self, object: ObjectNumber) {
        let Some(segment) = self.segments.get_mut(&object) else { return };
        let durable = Arc::make_mut(&mut segment.durable);
        for operation in segment.doubtful.drain(..) {
            operation.apply(durable);
        }
        if segment.is_removed {
            return;
        }
        segment.is_name_durable = true;
        let name = (segment.layer, segment.base_lsn);
        self.segments.retain(|number, other| *number >= object || (other.layer, other.base_lsn) != name);
    }

    fn draw(&self, mut random: Random, options: CrashOptions) -> Image {
        let layers = self.layers.values().map(|layer| {
            let mut content = layer.durable.clone();
            for operation in survivors(&layer.doubtful, &mut random, options) {
                if options.tear && random.chance(HALF_OF_256) {
                    operation.apply_torn(&mut content, &mut random);
                } else {
                    operation.apply(&mut content);
                }
            }
            (layer.id, content)
        });
        let layers = layers.collect();
        let mut segments = BTreeMap::new();
        // Ascending numbers: of two segments of one name the newer is met later and takes the name.
        for segment in self.segments.values() {
            let is_named = segment.is_name_durable || survives(&mut random, options);
            let is_gone = segment.is_removed && survives(&mut random, options);
            if !is_named {
                continue;
            }
            let name = (segment.layer, segment.base_lsn);
            if is_gone {
                continue;
            }
            let mut content = Arc::clone(&segment.durable);
            for operation in survivors(&segment.doubtful, &mut random, options) {
                let content = Arc::make_mut(&mut content);
                if options.tear && random.chance(HALF_OF_256) {
                    operation.apply_torn(content, &mut random);
                } else {
                    operation.apply(content);
                }
            }
            segments.insert(name, content);
        }
        Image { layers, segments, records: self.records.clone() }
    }
}

/// Whether a doubtful operation survives. 255 is "all", so that both ends of the range are certain.
fn survives(random: &mut Random, options: CrashOptions) -> bool {
    options.keep_of_256 == u8::MAX || random.chance(u16::from(options.keep_of_256))
}

/// A random subset, in order or (where the options allow it) not.
fn survivors<'a, T>(doubtful: &'a [Arc<T>], random: &mut Random, options: CrashOptions) -> Vec<&'a Arc<T>> {
    let mut kept: Vec<&Arc<T>> = doubtful.iter().filter(|_| survives(random, options)).collect();
    if options.reorder && random.chance(HALF_OF_256) {
        for index in (1..kept.len()).rev() {
            kept.swap(index, random.below(index as u64 + 1) as usize);
        }
    }
    kept
}

impl LayerOperation {
    /// The whole operation.
    pub(super) fn apply(&self, content: &mut Sparse) {
        match self {
            LayerOperation::Write { offset_bytes, data } => content.write(*offset_bytes, data),
            LayerOperation::Punch { offset_bytes, length_bytes } => content.punch(*offset_bytes, *length_bytes),
            LayerOperation::Zero { offset_bytes, length_bytes } => content.zero_allocated(*offset_bytes, *length_bytes),
        }
    }

    /// A part of it: of a write some sectors, of the others a piece cut at a page.
    fn apply_torn(&self, content: &mut Sparse, random: &mut Random) {
        match self {
            LayerOperation::Write { offset_bytes, data } => {
                for (start, end) in torn_sectors(*offset_bytes, data.len() as u64, random) {
                    content.write(offset_bytes + start, &data[start as usize..end as usize]);
                }
            }
            LayerOperation::Punch { offset_bytes, length_bytes } => {
                let (start, end) = torn_piece(*offset_bytes, *length_bytes, random);
                content.punch(start, end - start);
            }
            LayerOperation::Zero { offset_bytes, length_bytes } => {
                let (start, end) = torn_piece(*offset_bytes, *length_bytes, random);
                content.zero_allocated(start, end - start);
            }
        }
    }
}

impl SegmentOperation {
    /// The whole operation.
    pub(super) fn apply(&self, content: &mut Vec<u8>) {
        match self {
            SegmentOperation::Append { offset_bytes, data } => put(content, *offset_bytes, data),
            SegmentOperation::Truncate { length_bytes } => content.truncate(*length_bytes as usize),
        }
    }

    /// A part of it. A truncation is a change of one number and cannot be torn.
    fn apply_torn(&self, content: &mut Vec<u8>, random: &mut Random) {
        let SegmentOperation::Append { offset_bytes, data } = self else { return self.apply(content) };
        match random.below(3) {
            // The length did not arrive: any prefix.
            0 => put(content, *offset_bytes, &data[..random.below(data.len() as u64 + 1) as usize]),
            // The length did, some sectors did not: inside the old length they are as they were, beyond it they are zeros, or what
            // the disk held before.
            kind => {
                let start = (*offset_bytes as usize).min(content.len());
                let mut bytes = content[start..content.len().min(start + data.len())].to_vec();
                let old_length = bytes.len();
                bytes.resize(data.len(), 0);
                if kind == 2 {
                    bytes[old_length..].iter_mut().for_each(|byte| *byte = random.next() as u8);
                }
                for (start, end) in torn_sectors(*offset_bytes, data.len() as u64, random) {
                    bytes[start as usize..end as usize].copy_from_slice(&data[start as usize..end as usize]);
                }
                put(content, *offset_bytes, &bytes);
            }
        }
    }
}

/// Writes into a byte string, with zeros before `offset_bytes` if it is shorter.
fn put(content: &mut Vec<u8>, offset_bytes: u64, data: &[u8]) {
    let (start, end) = (offset_bytes as usize, offset_bytes as usize + data.len());
    if content.len() < end && !data.is_empty() {
        content.resize(end, 0);
    }
    if !data.is_empty() {
        content[start..end].copy_from_slice(data);
    }
}

/// The parts of a write that arrived, relative to its start: a prefix, a suffix or any set, cut at sectors of the object.
fn torn_sectors(offset_bytes: u64, length_bytes: u64, random: &mut Random) -> Vec<(u64, u64)> {
    if length_bytes == 0 {
        return Vec::new();
    }
    let first = offset_bytes / SECTOR_BYTES;
    let count = (offset_bytes + length_bytes).div_ceil(SECTOR_BYTES) - first;
    let at = |sector: u64| ((first + sector) * SECTOR_BYTES).clamp(offset_bytes, offset_bytes + length_bytes) - offset_bytes;
    match random.below(3) {
        0 => vec![(0, at(random.below(count + 1)))],
        1 => vec![(at(random.below(count + 1)), length_bytes)],
        _ => {
            let kept = (0..count).filter(|_| random.chance(HALF_OF_256));
            kept.map(|sector| (at(sector), at(sector + 1))).collect()
        }
    }
}

/// A prefix or a suffix of a range, cut at a page.
fn torn_piece(offset_bytes: u64, length_bytes: u64, random: &mut Random) -> (u64, u64) {
    let end = offset_bytes + length_bytes;
    let first = offset_bytes / PAGE_BYTES;
    let count = end.div_ceil(PAGE_BYTES) - first;
    let cut = ((first + random.below(count + 1)) * PAGE_BYTES).clamp(offset_bytes, end);
    if random.chance(HALF_OF_256) { (offset_bytes, cut) } else { (cut, end) }
}
