//! The traits of a store. All methods may be called from any thread at any time unless said otherwise.
use crate::Result;
use std::fmt;
use std::fs::File;
use std::io::{IoSlice, IoSliceMut};
use std::sync::Arc;
use std::time::{Duration, Instant};

/// The UUID of a layer.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct LayerId(pub [u8; 16]);

impl LayerId {
    /// Reads the lower-case hyphenated form, `None` if it is not exactly that.
    pub fn parse(text: &str) -> Option<LayerId> {
        let mut bytes = [0u8; 16];
        let text = text.as_bytes();
        if text.len() != 36 {
            return None;
        }
        let mut position = 0;
        for (index, byte) in bytes.iter_mut().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                if text[position] != b'-' {
                    return None;
                }
                position += 1;
            }
            let digit = |at: usize| match text[at] {
                digit @ b'0'..=b'9' => Some(digit - b'0'),
                digit @ b'a'..=b'f' => Some(digit - b'a' + 10),
                _ => None,
            };
            *byte = digit(position)? << 4 | digit(position + 1)?;
            position += 2;
        }
        Some(LayerId(bytes))
    }
}

impl fmt::Display for LayerId {
    /// The lower-case hyphenated form.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}
impl fmt::Debug for LayerId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

/// How a layer is opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OpenMode {
    /// A sealed layer, or the source of a copy.
    ReadOnly,
    /// The active layer of the one volume that writes it (I1).
    ReadWrite,
}

/// What a store can do, as fields (never ask for its kind).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StoreCapabilities {
    /// The unit a first write copies up.
    pub copy_unit_bytes: u32,
    /// Ranges smaller than this cannot be punched; 0: no punching.
    pub punch_unit_bytes: u32,
    /// Layers can share blocks with those of another store of the same backend (`LayerIo::clone_range`), as far as can be told without
    /// the other one.
    pub can_clone: bool,
    /// A write that returned is durable, so `sync` costs nothing.
    pub ack_is_durable: bool,
    /// Survives the end of the process.
    pub persistent: bool,
    /// A journal segment grows by at least this, with zeros in place of the frames to come: a sync of bytes inside a file is
    /// cheaper than one that makes the file longer. 0: a segment is as long as its frames.
    pub segment_growth_bytes: u32,
    /// Reads and writes wait for other machines: no thread that has something else to do carries them out.
    pub waits_for_network: bool,
    /// Another process may shut this one out while it works: before a flush is answered, something was asked of the backend
    /// (`prove_held`).
    pub is_fenceable: bool,
    /// No answer goes out without a proof (`prove_held`) that is younger than `PROOF_TIME_MAX`.
    pub answers_need_proof: bool,
}

/// Bytes of a store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StoreUsage {
    /// Size of the backend.
    pub total_bytes: u64,
    /// Free for new data.
    pub free_bytes: u64,
    /// Allocated by this store.
    pub stored_bytes: u64,
    /// Kept back at present for emergencies; 0: given up, or the store keeps none.
    pub reserve_bytes: u64,
}

/// How the backend of a store is, as it was found when it was looked at last.
#[derive(Debug, Clone)]
pub struct StoreHealth {
    /// When that was.
    pub observed_at: Instant,
    /// How long a small read took; what came instead of its answer.
    pub answer: Result<Duration>,
    /// Since when reads have not been answered: calls that manage are refused meanwhile. `None`: the last one was.
    pub silent_since: Option<Instant>,
    /// What the backend says of itself, in its own form; what came instead. `None`: it was not asked yet.
    pub report: Option<Result<String>>,
    /// False: what the store holds is being counted, and `StoreUsage::stored_bytes` is less than that.
    pub is_counted: bool,
}

/// One layer as the backend shows it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerEntry {
    /// The layer.
    pub id: LayerId,
    /// Bytes allocated on the backend.
    pub allocated_bytes: u64,
    /// Offset after the last byte ever written.
    pub length_bytes: u64,
}

/// A stretch of a layer: allocated (`data`) or a hole. A hint for speed and status, never for meaning (I4).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// Start.
    pub offset_bytes: u64,
    /// Length, never 0.
    pub length_bytes: u64,
    /// False: a hole.
    pub data: bool,
}

/// Who writes the journal of a layer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct JournalWriter {
    /// Epoch of the lease of the volume.
    pub epoch: u64,
    /// The text of who had the lock of the store.
    pub owner: String,
}

/// The native half of a pool.
pub trait Store: Send + Sync + 'static {
    /// What it can do. Constant.
    fn capabilities(&self) -> StoreCapabilities;
    /// Makes an empty layer; it and its directory entry are durable on return (I11). `Exists` if it is there already.
    fn create_layer(&self, id: LayerId) -> Result<()>;
    /// Opens a layer. `NotFound` names the file that is missing. After `remove_layer` a handle
    /// reads what was there, or fails with `NotFound`; never zeros.
    fn open_layer(&self, id: LayerId, mode: OpenMode) -> Result<Arc<dyn LayerIo>>;
    /// Removes the layer and every journal segment of it; durable on return. Removing what is not there is no error.
    fn remove_layer(&self, id: LayerId) -> Result<()>;
    /// Every layer of the store, in any order.
    fn list_layers(&self) -> Result<Vec<LayerEntry>>;
    /// The same without their sizes, which may be much to ask for.
    fn list_layer_ids(&self) -> Result<Vec<LayerId>> {
        Ok(self.list_layers()?.into_iter().map(|entry| entry.id).collect())
    }
    /// One layer; `None` if it is not there.
    fn layer_entry(&self, id: LayerId) -> Result<Option<LayerEntry>> {
        match self.open_layer(id, OpenMode::ReadOnly) {
            Ok(layer) => Ok(Some(LayerEntry { id, allocated_bytes: layer.allocated_bytes()?, length_bytes: layer.length_bytes()? })),
            Err(error) if error.code == crate::IoErrorCode::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }
    /// Bytes in use and free. A backend that has to be asked for them was, not long ago.
    fn usage(&self) -> Result<StoreUsage>;
    /// How the backend is; waits for nothing. `None` where there is nothing to say beyond what calls answer.
    fn health(&self) -> Option<StoreHealth> {
        None
    }
    /// Base lsns of the journal segments of a layer, ascending.
    fn list_segments(&self, layer: LayerId) -> Result<Vec<u64>>;
    /// Notes beside the layer who writes its journal from now on, and under which epoch of the volume's lease: segments that are made
    /// under an older one are refused from then on. After it `list_segments` shows all that were made before. `CatalogBehind` if a newer
    /// epoch is there. Nothing by default: where nobody else can have the store open, nobody has to be refused.
    fn claim_journal(&self, _layer: LayerId, _epoch: u64) -> Result<()> {
        Ok(())
    }
    /// Who claimed the journal of a layer last; `None`: nobody, or the store keeps no note of it.
    fn journal_writer(&self, _layer: LayerId) -> Result<Option<JournalWriter>> {
        Ok(None)
    }
    /// Makes an empty segment; `Exists` if there is one, `CatalogBehind` if its journal was claimed under a newer epoch. Its name is
    /// durable only after `SegmentIo::sync` of it.
    fn create_segment(&self, layer: LayerId, base_lsn: u64, epoch: u64) -> Result<Arc<dyn SegmentIo>>;
    /// Opens a segment for reading, and for changing it after `SegmentIo::claim`.
    fn open_segment(&self, layer: LayerId, base_lsn: u64) -> Result<Arc<dyn SegmentIo>>;
    /// Removes a segment; one that is not there is no error. Need not be durable: a segment that comes back after a crash holds
    /// only frames the catalog knows, or nothing that was ever acknowledged.
    fn remove_segment(&self, layer: LayerId, base_lsn: u64) -> Result<()>;
    /// Reads a small named record (owner, export), `None` if there is none. Names: `[a-z0-9.-]{1,64}`, neither `.` nor `..`.
    fn read_record(&self, name: &str) -> Result<Option<Vec<u8>>>;
    /// Replaces a record atomically; durable on return.
    fn write_record(&self, name: &str, bytes: &[u8]) -> Result<()>;
    /// These records will be written soon: what the first writing of each needs beside the bytes may be done now.
    fn expect_records(&self, _names: &[String]) -> Result<()> {
        Ok(())
    }
    /// Names of the records that begin with `prefix`, ascending. Whole records only: one whose writing a crash interrupted has no name.
    fn list_records(&self, prefix: &str) -> Result<Vec<String>>;
    /// Removes a record; one that is not there is no error. Need not be durable: what comes back after a crash is whole.
    fn remove_record(&self, name: &str) -> Result<()>;
    /// Takes the store's exclusive lock for this process; `Locked` with the owner's text if somebody has it.
    /// `owner` is what the other side will read (pid, catalog id). Dropping the lock releases it.
    fn lock(&self, owner: &str) -> Result<StoreLock>;
    /// As `lock`, and whoever has it is shut out of the backend first, so that nothing of it lands any more. If that one may live, this
    /// returns when its last proof (`PROOF_TIME_MAX`) has run out. Where the backend cannot do that, as `lock`.
    fn lock_shutting_out(&self, owner: &str) -> Result<StoreLock> {
        self.lock(owner)
    }

    /// Asks the backend whether this process still has what `lock` took: `Ok` only if nobody had taken it over when the call
    /// began. Costs little. Stores that nobody can take away from a living process answer at once.
    fn prove_held(&self) -> Result<()> {
        Ok(())
    }
    /// Frees the space kept back for emergencies (deletes on a full disk). Idempotent.
    fn release_reserve(&self) -> Result<()>;
    /// Makes the reserve whole again if there is space; returns its bytes.
    fn restore_reserve(&self) -> Result<u64>;
    /// Keeps back this much from now on and returns the bytes that there are: 0 from a store that keeps no reserve. `NoSpace` if
    /// it does not fit; what was kept before stays then.
    fn set_reserve(&self, bytes: u64) -> Result<u64>;
}

/// A process that was shut out answers nobody any more when it was that long ago that the backend said the opposite (`prove_held`):
/// `lock_shutting_out` waits longer before it returns.
pub const PROOF_TIME_MAX: Duration = Duration::from_secs(2);

/// A held lock; released on drop.
pub struct StoreLock {
    /// Whatever must live for the lock to be held.
    pub guard: Box<dyn std::any::Any + Send + Sync>,
}

/// A request that a backend carries out while nobody waits, and who is told when it is over.
pub trait Ending: Send {
    /// Where a read puts its bytes; as long as the read. Its place in memory is the same whenever it is asked for, and nobody else
    /// touches it until the end is told.
    fn room(&mut self) -> &mut [u8];
    /// It is over. Called once, on any thread, maybe before `begin_read` or `begin_write` has returned. Neither waits for anything
    /// that another request has to bring about, nor panics.
    fn ended(self: Box<Self>, result: Result<()>);
}

/// A request that was not begun comes back: it has to be waited for.
pub type Begun = std::result::Result<(), Box<dyn Ending>>;

/// The bytes of one layer. Offsets and lengths are in bytes, any alignment. Calls may overlap in time; two calls that
/// touch the same bytes at once leave any mixture of the two.
pub trait LayerIo: Send + Sync + 'static {
    /// Whether nothing is under way of a write that failed here: one that timed out may be carried out later.
    fn is_settled(&self) -> bool {
        true
    }
    /// Makes sure of it, however long that takes the backend, and fails if it does not answer. For who is about to let nobody write any
    /// more. Waits for nothing where a call is over when it returns.
    fn settle(&self) -> Result<()> {
        Ok(())
    }
    /// Fills all buffers from `offset_bytes` on; holes and everything past the end read as zeros.
    fn read(&self, offset_bytes: u64, buffers: &mut [IoSliceMut<'_>]) -> Result<()>;
    /// As `read` of one buffer, but only if nobody has to be waited for: false, with anything in the buffer, if a disk or a
    /// network would. A kind that cannot tell reads.
    fn read_now(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<bool> {
        self.read(offset_bytes, &mut [IoSliceMut::new(buffer)]).map(|()| true)
    }
    /// Writes all buffers from `offset_bytes` on, all or an error (what landed before the error is unknown). Not durable before `sync`.
    fn write(&self, offset_bytes: u64, buffers: &[IoSlice<'_>]) -> Result<()>;
    /// Whether a request of so many bytes may be begun now: not while the backend has as much under way as it should. Asked once for a
    /// request, before its first part is begun; false: the waiting form is the way.
    fn may_begin(&self, _length_bytes: u64) -> bool {
        true
    }
    /// Begins a read of as many bytes as the ending has room for, and returns at once. It comes back untouched if it cannot be begun
    /// without a wait, or not at all: `read` is the way then, and says what is wrong.
    fn begin_read(&self, _offset_bytes: u64, ending: Box<dyn Ending>) -> Begun {
        Err(ending)
    }
    /// As `begin_read`, of a write: the data may be used otherwise when the call has returned. Not durable before `sync`.
    fn begin_write(&self, _offset_bytes: u64, _data: &[u8], ending: Box<dyn Ending>) -> Begun {
        Err(ending)
    }
    /// Frees the range; it reads as zeros. Not durable before `sync`. Whole punch units are freed, the rest is zeroed.
    fn punch(&self, offset_bytes: u64, length_bytes: u64) -> Result<()>;
    /// Makes the range read as zeros and keeps (or makes) it allocated, so that a later write cannot run out of space.
    fn zero_allocated(&self, offset_bytes: u64, length_bytes: u64) -> Result<()>;
    /// Makes everything that completed before the call durable.
    fn sync(&self) -> Result<()>;
    /// Appends the extents of the range to `out`, ascending, neighbours of one kind merged, covering it exactly.
    fn extents(&self, offset_bytes: u64, length_bytes: u64, out: &mut Vec<Extent>) -> Result<()>;
    /// Offset after the last byte ever written.
    fn length_bytes(&self) -> Result<u64>;
    /// Bytes allocated on the backend.
    fn allocated_bytes(&self) -> Result<u64>;
    /// Forgets cached pages, so that the next read comes from the backend (I6: the page cache lies after a failed sync).
    fn drop_cache(&self) -> Result<()>;
    /// Asks for the range to be at hand soon; it need not be on return, and nothing depends on it. Nothing by default.
    fn prefetch(&self, _offset_bytes: u64, _length_bytes: u64) -> Result<()> {
        Ok(())
    }
    /// Makes a range of this layer the same as in `source` without moving its bytes: both have the same blocks on the backend from
    /// then on, and a write to one of them is not seen in the other. False: that cannot be done here, and nothing was changed. The
    /// range lies within the source's length, in whole blocks of 4096 bytes. Not durable before `sync`.
    fn clone_range(&self, _source: &dyn LayerIo, _offset_bytes: u64, _length_bytes: u64) -> Result<bool> {
        Ok(false)
    }
    /// The file, if the layer is one, for reads of a `ReadRing` at the layer's own offsets.
    fn ring_file(&self) -> Result<Option<Arc<File>>> {
        Ok(None)
    }
}

/// One journal segment: a byte string that is written from the front to the back. One caller at a time.
pub trait SegmentIo: Send + Sync + 'static {
    /// After it nothing that was begun through another handle changes the segment any more: it has done so, or is refused. For who
    /// is about to read what he goes on with. `CatalogBehind` if it was claimed under a newer epoch. Nothing by default: where a call is
    /// over when it returns, nothing is under way.
    fn claim(&self, _epoch: u64) -> Result<()> {
        Ok(())
    }
    /// The whole content.
    fn read_all(&self) -> Result<Vec<u8>>;
    /// Writes at `offset_bytes`, at most the present length, and makes the segment longer where it has to; not durable before
    /// `sync`. On an error the content from the offset on is unknown.
    fn append(&self, offset_bytes: u64, bytes: &[u8]) -> Result<()>;
    /// Cuts to `length_bytes`.
    fn truncate(&self, length_bytes: u64) -> Result<()>;
    /// Makes content and name durable.
    fn sync(&self) -> Result<()>;
    /// Current length, zeros at the end included.
    fn length_bytes(&self) -> Result<u64>;
}

/// Whether `name` may name a record.
pub(crate) fn is_record_name(name: &str) -> bool {
    let characters_fit = name.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'.' | b'-'));
    characters_fit && (1..=64).contains(&name.len()) && name != "." && name != ".."
}

/// Adds an extent to a list that is ascending and merged.
pub(crate) fn push_extent(out: &mut Vec<Extent>, first: usize, offset_bytes: u64, length_bytes: u64, data: bool) {
    if length_bytes == 0 {
        return;
    }
    // Only extents of the same answer are merged; what the caller had in `out` before stays as it is.
    if out.len() > first
        && let Some(last) = out.last_mut()
        && last.data == data
    {
        last.length_bytes += length_bytes;
        return;
    }
    out.push(Extent { offset_bytes, length_bytes, data });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_id_reads_back_from_its_text_and_nothing_else_does() {
        let id = LayerId([0x00, 0x11, 0x22, 0x33, 0x44, 0x55, 0x66, 0x77, 0x88, 0x99, 0xaa, 0xbb, 0xcc, 0xdd, 0xee, 0xff]);
        let text = id.to_string();
        assert_eq!(text, "00112233-4455-6677-8899-aabbccddeeff");
        assert_eq!(LayerId::parse(&text), Some(id));
        for wrong in ["", &text[1..], &text.to_uppercase(), &text.replace('-', "0"), "00112233-4455-6677-8899-aabbccddeefg"] {
            assert_eq!(LayerId::parse(wrong), None, "{wrong}");
        }
    }

    #[test]
    fn record_names_cannot_leave_their_folder() {
        for good in ["owner", "export.1", "a-b", "..."] {
            assert!(is_record_name(good), "{good}");
        }
        for bad in ["", ".", "..", "a/b", "Owner", "~owner", &"a".repeat(65)] {
            assert!(!is_record_name(bad), "{bad}");
        }
    }
}
