//! A layer as objects of 4 MiB.
//!
//! Rules
//! - An object stands in the layer's index before it is made, so that what is not in the index is not there: it reads as zeros
//!   without a request, and the removal of a layer finds everything.
//! - What is known of an object (`object.rs`) is never less than what is there: it changes in the order in which requests are handed
//!   to the library, which carries out those of one object in that order. A request that failed leaves the attribute to the next one.
//! - A write that timed out may be carried out later, as long as this client is let in. Its object is *doubtful* until a later change
//!   of it was answered: the cluster carries out what one client asks of one object in order, and what was given up here is not sent
//!   again. A layer is sealed only when none of its objects is (I2), and the lock is not given back while one of any layer is.
//! - A layer that was removed is `NotFound`, never zeros (I2): the flag is set before the first object goes, and looked at after
//!   every read that found nothing. An object of the index that is not there is a hole only if the layer's own object still is: with
//!   the RADOS pool deleted, everything would be holes.
use super::cluster::{Change, Cluster, Completion, Ended, Name};
use super::object::{ATTRIBUTE_BYTES_MAX, OBJECT_BYTES, Object};
use crate::error::layer_object;
use crate::split::split;
use crate::store::push_extent;
use crate::{Begun, Ending, Extent, IoError, IoErrorCode, LayerEntry, LayerId, LayerIo, Result};
use parking_lot::Mutex;
use std::collections::HashMap;
use std::ffi::{CStr, c_int};
use std::io::{IoSlice, IoSliceMut};
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

/// Attribute of a data object.
const SLOTS_ATTRIBUTE: &CStr = c"atoll.slots";
/// Attribute of the object that stands for the layer.
const STATE_ATTRIBUTE: &CStr = c"atoll.state";
const STATE_USED: &[u8] = b"1 used";
const STATE_GOING: &[u8] = b"1 going";

const SHARD_COUNT: usize = 8;

/// Objects that go into the index ahead of a layer that is written from its front: one request for all of them.
const INDEXED_AHEAD: u32 = 16;

/// Objects that are asked in one go: between two of these it may be said that nobody wants to know any more.
const ASKED_AT_ONCE: usize = 1024;

/// Zeros are written from here; pages that nobody writes take no memory.
static ZEROS: [u8; OBJECT_BYTES as usize] = [0; OBJECT_BYTES as usize];
const ZERO_STEP_BYTES: u64 = 16 << 20;

/// Offsets past this have no object; far behind the address space of a map.
const LAYER_BYTES_MAX: u64 = OBJECT_BYTES << 32;

/// What is known of the objects, by index; `None`: it may be there, nobody has asked.
type Shard = HashMap<u32, Option<Object>>;

/// A layer of a store, shared by its handles.
pub(super) struct Layer {
    pub(super) id: LayerId,
    cluster: Arc<Cluster>,
    shards: [Mutex<Shard>; SHARD_COUNT],
    /// Objects with a write that timed out, and how many did.
    doubtful: Mutex<HashMap<u32, u64>>,
    is_removed: AtomicBool,
}

pub(super) fn head_name(id: LayerId) -> Name {
    Name::new(format_args!("layer.{id}"))
}

fn index_key(index: u32) -> String {
    format!("{index:08x}")
}

/// The part of a range that lies in one object: which, and where in it.
fn objects_of(offset_bytes: u64, length_bytes: u64) -> impl Iterator<Item = (u32, Range<u64>)> {
    let end_bytes = offset_bytes + length_bytes;
    let mut at = offset_bytes;
    std::iter::from_fn(move || {
        if at >= end_bytes {
            return None;
        }
        let index = at / OBJECT_BYTES;
        let from = at % OBJECT_BYTES;
        let until = (from + end_bytes - at).min(OBJECT_BYTES);
        at += until - from;
        Some((index as u32, from..until))
    })
}

impl Layer {
    /// Makes the object that stands for the layer.
    pub(super) fn create(cluster: &Arc<Cluster>, id: LayerId) -> Result<Arc<Layer>> {
        let mut change = cluster.change();
        change.create(true);
        change.set_attribute(STATE_ATTRIBUTE, STATE_USED);
        change.even_if_full();
        cluster.apply("create", &head_name(id), change)?;
        Ok(Layer::new(cluster, id))
    }

    fn new(cluster: &Arc<Cluster>, id: LayerId) -> Arc<Layer> {
        let shards = std::array::from_fn(|_| Mutex::default());
        let doubtful = Mutex::default();
        Arc::new(Layer { id, cluster: Arc::clone(cluster), shards, doubtful, is_removed: AtomicBool::new(false) })
    }

    /// Reads the index. `NotFound` if there is no such layer, or its removal has begun and `going_too` is not asked for.
    pub(super) fn load(cluster: &Arc<Cluster>, id: LayerId, going_too: bool) -> Result<Arc<Layer>> {
        let head = head_name(id);
        let not_found = || IoError::new(IoErrorCode::NotFound, "open", layer_object(id), 0, "there is no such layer");
        let is_going = match cluster.attribute(&head, STATE_ATTRIBUTE) {
            Ok(state) if state == STATE_USED => false,
            Ok(state) if state == STATE_GOING => true,
            Ok(_) => {
                let message = "the object of the layer is not one that this version knows";
                return Err(IoError::new(IoErrorCode::Version, "open", layer_object(id), 0, message));
            }
            Err(libc::ENOENT) => return Err(not_found()),
            Err(errno) => return Err(cluster.error("open", layer_object(id), 0, errno)),
        };
        if is_going && !going_too {
            return Err(not_found());
        }
        let layer = Layer::new(cluster, id);
        for key in cluster.index_keys(&head)? {
            // What is no index was not put there by us.
            if let Ok(index) = u32::from_str_radix(&key, 16) {
                layer.shard(index).lock().insert(index, None);
            }
        }
        layer.is_removed.store(is_going, Ordering::SeqCst);
        Ok(layer)
    }

    /// Asks whether there is a layer: the answer is `ENOENT` if not.
    ///
    /// # Safety
    /// The buffer is the caller's until the completion was waited for or dropped.
    pub(super) unsafe fn start_asking<'a>(cluster: &'a Cluster, id: LayerId, buffer: &mut [u8; 16]) -> Completion<'a> {
        // SAFETY: the caller's promise.
        unsafe { cluster.start_attribute(&head_name(id), STATE_ATTRIBUTE, buffer.as_mut_ptr(), buffer.len()) }
    }

    fn shard(&self, index: u32) -> &Mutex<Shard> {
        &self.shards[index as usize % SHARD_COUNT]
    }

    fn name(&self, index: u32) -> Name {
        Name::new(format_args!("{}.{index:08x}", self.id))
    }

    fn error(&self, operation: &'static str, index: u32, errno: i32) -> IoError {
        self.cluster.error(operation, layer_object(self.id), u64::from(index) * OBJECT_BYTES, errno)
    }

    pub(super) fn is_removed(&self) -> bool {
        self.is_removed.load(Ordering::SeqCst)
    }

    fn check_range(&self, operation: &'static str, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        match offset_bytes.checked_add(length_bytes) {
            Some(end) if end <= LAYER_BYTES_MAX => Ok(()),
            _ => Err(IoError::new(
                IoErrorCode::Io,
                operation,
                layer_object(self.id),
                offset_bytes,
                format!("a layer ends at {LAYER_BYTES_MAX} bytes"),
            )),
        }
    }

    /// Objects of the index in a range of objects, ascending.
    fn indexed(&self, objects: Range<u64>) -> Vec<u32> {
        let mut found = Vec::new();
        for shard in &self.shards {
            found.extend(shard.lock().keys().filter(|index| objects.contains(&u64::from(**index))));
        }
        found.sort_unstable();
        found
    }

    /// Makes sure that something is known of each of these objects, which are in the index.
    fn ask(&self, objects: &[u32]) -> Result<()> {
        let unknown = objects.iter().filter(|index| matches!(self.shard(**index).lock().get(index), Some(None)));
        self.cluster.run_all(
            unknown.map(|index| (*index, Box::new([0u8; ATTRIBUTE_BYTES_MAX + 1]))),
            |(index, buffer)| {
                let name = self.name(*index);
                // SAFETY: the buffer has a place of its own, which goes after the completion.
                Ok(unsafe { self.cluster.start_attribute(&name, SLOTS_ATTRIBUTE, buffer.as_mut_ptr(), buffer.len()) })
            },
            |(index, buffer), code| {
                let object = match code {
                    length if length >= 0 => Object::decode(&buffer[..length as usize]).unwrap_or_else(Object::full),
                    code if code == -libc::ENOENT => Object::empty(),
                    code if code == -libc::ENODATA || code == -libc::ERANGE => Object::full(),
                    code => return Err(self.error("stat", index, -code)),
                };
                // Somebody else may have been faster, and have changed it since.
                let mut shard = self.shard(index).lock();
                let known = shard.entry(index).or_insert(None);
                if known.is_none() {
                    *known = Some(object);
                }
                Ok(())
            },
        )
    }

    /// Puts an object into the index, and some that follow if the one in front of it is there.
    fn add_to_index(&self, index: u32) -> Result<()> {
        let is_sequential = index > 0 && self.shard(index - 1).lock().contains_key(&(index - 1));
        let until = if is_sequential { index.saturating_add(INDEXED_AHEAD) } else { index + 1 };
        let added: Vec<u32> = (index..until.max(index + 1)).filter(|index| !self.shard(*index).lock().contains_key(index)).collect();
        let keys: Vec<String> = added.iter().map(|index| index_key(*index)).collect();
        if !keys.is_empty() {
            self.cluster.add_to_index(&head_name(self.id), &keys)?;
        }
        for index in added {
            // Not in the index until now: nothing is there.
            self.shard(index).lock().entry(index).or_insert_with(|| Some(Object::empty()));
        }
        Ok(())
    }

    /// Hands a change of one object to the library. `build` is called under the lock that keeps what is known in the order of the
    /// requests; the flag that comes back says whether the request carries the attribute.
    fn start_known<'a>(
        &'a self,
        index: u32,
        mut build: impl FnMut(&mut Object, &Name) -> (Completion<'a>, bool),
    ) -> Result<(Completion<'a>, bool)> {
        let name = self.name(index);
        loop {
            let is_indexed = {
                let mut shard = self.shard(index).lock();
                match shard.get_mut(&index) {
                    Some(Some(object)) => {
                        let started = build(object, &name);
                        if started.1 {
                            object.is_untold = false;
                        }
                        return Ok(started);
                    }
                    Some(None) => true,
                    None => false,
                }
            };
            if is_indexed { self.ask(&[index])? } else { self.add_to_index(index)? }
        }
    }

    /// The outcome of such a change.
    fn finish(&self, operation: &'static str, index: u32, tells: bool, code: c_int) -> Result<()> {
        if code >= 0 {
            return Ok(());
        }
        if tells && let Some(Some(object)) = self.shard(index).lock().get_mut(&index) {
            object.is_untold = true;
        }
        if code == -libc::ETIMEDOUT {
            self.note_doubtful(index);
        }
        Err(self.error(operation, index, -code))
    }

    fn note_doubtful(&self, index: u32) {
        let mut doubtful = self.doubtful.lock();
        let count = doubtful.entry(index).or_insert_with(|| {
            self.cluster.doubtful_count.fetch_add(1, Ordering::SeqCst);
            0
        });
        *count += 1;
    }

    fn is_settled(&self) -> bool {
        self.doubtful.lock().is_empty()
    }

    /// Changes each doubtful object, without a difference, and waits for the answers.
    fn settle(&self) -> Result<()> {
        let doubtful: Vec<(u32, u64)> = self.doubtful.lock().iter().map(|(index, count)| (*index, *count)).collect();
        self.cluster.run_all(
            doubtful,
            |(index, _)| {
                let (completion, _) = self.start_known(*index, |object, name| {
                    let mut change = self.cluster.change();
                    change.assert_exists();
                    Layer::tell(&mut change, object);
                    change.even_if_full();
                    (self.cluster.start_change(name, change), true)
                })?;
                Ok(completion)
            },
            |(index, count), code| {
                // An object that is not there was not made by the write, and is not made by it any more.
                if code != -libc::ENOENT {
                    self.finish("settle", index, true, code)?;
                }
                let mut doubtful = self.doubtful.lock();
                if doubtful.get(&index) == Some(&count) {
                    doubtful.remove(&index);
                    self.cluster.doubtful_count.fetch_sub(1, Ordering::SeqCst);
                }
                Ok(())
            },
        )
    }

    fn tell(change: &mut Change, object: &Object) {
        change.set_attribute(SLOTS_ATTRIBUTE, object.encode(&mut [0; ATTRIBUTE_BYTES_MAX]));
    }

    fn start_write(&self, index: u32, bytes: &Range<u64>, parts: &[&[u8]]) -> Result<(Completion<'_>, bool)> {
        self.start_known(index, |object, name| {
            let tells = object.add(bytes.clone()) || object.is_untold;
            if let [part] = parts
                && !tells
            {
                return (self.cluster.start_write(name, bytes.start, part), false);
            }
            let mut change = self.cluster.change();
            let mut at = bytes.start;
            for part in parts {
                change.write(at, part);
                at += part.len() as u64;
            }
            if tells {
                Layer::tell(&mut change, object);
            }
            (self.cluster.start_change(name, change), tells)
        })
    }

    fn write(&self, operation: &'static str, offset_bytes: u64, buffers: &[IoSlice<'_>]) -> Result<()> {
        let length_bytes = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        self.check_range(operation, offset_bytes, length_bytes)?;
        if let [buffer] = buffers
            && offset_bytes % OBJECT_BYTES + length_bytes <= OBJECT_BYTES
            && length_bytes > 0
        {
            // The common case, without a list of anything.
            let (index, from) = ((offset_bytes / OBJECT_BYTES) as u32, offset_bytes % OBJECT_BYTES);
            let (completion, tells) = self.start_write(index, &(from..from + length_bytes), &[buffer])?;
            return self.finish(operation, index, tells, completion.wait());
        }
        let mut rest = buffers.iter().map(|buffer| &**buffer).filter(|buffer| !buffer.is_empty());
        let mut left: &[u8] = &[];
        let mut pieces = Vec::new();
        for (index, bytes) in objects_of(offset_bytes, length_bytes) {
            let mut parts = Vec::new();
            let mut missing = (bytes.end - bytes.start) as usize;
            while missing > 0 {
                if left.is_empty() {
                    left = rest.next().unwrap_or_else(|| unreachable!("the pieces are as long as the buffers"));
                }
                let (part, tail) = left.split_at(missing.min(left.len()));
                parts.push(part);
                missing -= part.len();
                left = tail;
            }
            pieces.push((index, bytes, parts, false));
        }
        self.cluster.run_all(
            pieces,
            |(index, bytes, parts, tells)| {
                let (completion, told) = self.start_write(*index, bytes, parts)?;
                *tells = told;
                Ok(completion)
            },
            |(index, _, _, tells), code| self.finish(operation, index, tells, code),
        )
    }

    fn read(&self, offset_bytes: u64, buffers: &mut [IoSliceMut<'_>]) -> Result<()> {
        let length_bytes = buffers.iter().map(|buffer| buffer.len() as u64).sum();
        self.check_range("read", offset_bytes, length_bytes)?;
        let mut found_nothing = false;
        let mut lacks_object = false;
        let mut pieces = Vec::new();
        let mut at = offset_bytes;
        for buffer in buffers {
            let mut rest: &mut [u8] = buffer;
            for (index, bytes) in objects_of(at, rest.len() as u64) {
                let (piece, tail) = rest.split_at_mut((bytes.end - bytes.start) as usize);
                rest = tail;
                at += piece.len() as u64;
                if self.shard(index).lock().contains_key(&index) {
                    pieces.push((index, bytes.start, piece));
                } else {
                    piece.fill(0);
                    found_nothing = true;
                }
            }
        }
        self.cluster.run_all(
            pieces,
            |(index, from, piece)| {
                // SAFETY: the piece is borrowed until all completions are done; no other piece overlaps with it.
                Ok(unsafe { self.cluster.start_read(&self.name(*index), *from, piece.as_mut_ptr(), piece.len()) })
            },
            |(index, _, piece), code| {
                let count = match code {
                    count if count >= 0 => (count as usize).min(piece.len()),
                    code if code == -libc::ENOENT => {
                        lacks_object = true;
                        0
                    }
                    code => return Err(self.error("read", index, -code)),
                };
                found_nothing |= count == 0;
                piece[count..].fill(0);
                Ok(())
            },
        )?;
        if (lacks_object && self.cluster.stat(&head_name(self.id))?.is_none()) || (found_nothing && self.is_removed()) {
            return Err(IoError::new(IoErrorCode::NotFound, "read", layer_object(self.id), offset_bytes, "the layer was removed"));
        }
        Ok(())
    }

    fn begin_read(self: &Arc<Layer>, offset_bytes: u64, mut ending: Box<dyn Ending>) -> Begun {
        let length_bytes = ending.room().len() as u64;
        if length_bytes == 0 || self.check_range("read", offset_bytes, length_bytes).is_err() {
            return Err(ending);
        }
        let mut objects = objects_of(offset_bytes, length_bytes);
        let first = objects.next();
        if let (Some((index, bytes)), None) = (first, objects.next()) {
            // The common case, without a list of anything.
            self.begin_object_read(index, bytes.start, ending);
            return Ok(());
        }
        let lengths: Vec<usize> = objects_of(offset_bytes, length_bytes).map(|(_, bytes)| (bytes.end - bytes.start) as usize).collect();
        let parts = split(ending, &lengths);
        for (part, (index, bytes)) in parts.into_iter().zip(objects_of(offset_bytes, length_bytes)) {
            self.begin_object_read(index, bytes.start, part);
        }
        Ok(())
    }

    fn begin_object_read(self: &Arc<Layer>, index: u32, offset_bytes: u64, mut ending: Box<dyn Ending>) {
        if !self.shard(index).lock().contains_key(&index) {
            ending.room().fill(0);
            let result = if self.is_removed() { Err(self.removed_error("read", index)) } else { Ok(()) };
            return ending.ended(result);
        }
        let read = Box::new(BegunRead { layer: Arc::clone(self), index, lacks_object: false, ending });
        if let Err((errno, read)) = self.cluster.begin_read(&self.name(index), offset_bytes, read, |read| read.ending.room()) {
            read.ended(-errno);
        }
    }

    fn removed_error(&self, operation: &'static str, index: u32) -> IoError {
        let offset_bytes = u64::from(index) * OBJECT_BYTES;
        IoError::new(IoErrorCode::NotFound, operation, layer_object(self.id), offset_bytes, "the layer was removed")
    }

    fn begin_write(self: &Arc<Layer>, offset_bytes: u64, data: &[u8], ending: Box<dyn Ending>) -> Begun {
        let length_bytes = data.len() as u64;
        // What has to go into the index first, or to be asked, is waited for.
        let is_known = |(index, _)| matches!(self.shard(index).lock().get(&index), Some(Some(_)));
        if data.is_empty()
            || self.check_range("write", offset_bytes, length_bytes).is_err()
            || !objects_of(offset_bytes, length_bytes).all(is_known)
        {
            return Err(ending);
        }
        let count = objects_of(offset_bytes, length_bytes).count();
        if count == 1 {
            let (index, from) = ((offset_bytes / OBJECT_BYTES) as u32, offset_bytes % OBJECT_BYTES);
            return self.begin_object_write(index, from..from + length_bytes, data, ending);
        }
        let mut rest = data;
        for (part, (index, bytes)) in split(ending, &vec![0; count]).into_iter().zip(objects_of(offset_bytes, length_bytes)) {
            let (piece, tail) = rest.split_at((bytes.end - bytes.start) as usize);
            rest = tail;
            let from = bytes.start;
            if let Err(part) = self.begin_object_write(index, bytes, piece, part) {
                // Not known after all; others of this write are under way.
                part.ended(self.write("write", u64::from(index) * OBJECT_BYTES + from, &[IoSlice::new(piece)]));
            }
        }
        Ok(())
    }

    fn begin_object_write(self: &Arc<Layer>, index: u32, bytes: Range<u64>, data: &[u8], ending: Box<dyn Ending>) -> Begun {
        let name = self.name(index);
        let mut shard = self.shard(index).lock();
        let Some(Some(object)) = shard.get_mut(&index) else { return Err(ending) };
        let tells = object.add(bytes.clone()) || object.is_untold;
        let write = Box::new(BegunWrite { layer: Arc::clone(self), index, tells, ending });
        let begun = if tells {
            let mut change = self.cluster.change();
            change.write(bytes.start, data);
            Layer::tell(&mut change, object);
            object.is_untold = false;
            self.cluster.begin_change(&name, change, data.len(), write)
        } else {
            self.cluster.begin_write(&name, bytes.start, data, write)
        };
        drop(shard);
        if let Err((errno, write)) = begun {
            write.ended(-errno);
        }
        Ok(())
    }

    /// The last object of which anything was ever written.
    fn last_object(&self) -> Result<Option<(u32, u64)>> {
        let indexed = self.indexed(0..u64::from(u32::MAX) + 1);
        for some in indexed.rchunks(INDEXED_AHEAD as usize) {
            self.ask(some)?;
            for index in some.iter().rev() {
                if let Some(Some(object)) = self.shard(*index).lock().get(index)
                    && object.length_bytes() > 0
                {
                    return Ok(Some((*index, object.length_bytes())));
                }
            }
        }
        Ok(None)
    }

    pub(super) fn length_bytes(&self) -> Result<u64> {
        Ok(self.last_object()?.map_or(0, |(index, length_bytes)| u64::from(index) * OBJECT_BYTES + length_bytes))
    }

    pub(super) fn allocated_bytes(&self) -> Result<u64> {
        self.ask_all(&|| false)?;
        Ok(self.known_bytes())
    }

    /// Makes sure that something is known of every object, unless `is_ended` says so before.
    pub(super) fn ask_all(&self, is_ended: &dyn Fn() -> bool) -> Result<()> {
        for objects in self.indexed(0..u64::from(u32::MAX) + 1).chunks(ASKED_AT_ONCE) {
            if is_ended() {
                return Ok(());
            }
            self.ask(objects)?;
        }
        Ok(())
    }

    /// What is allocated as far as it is known.
    pub(super) fn known_bytes(&self) -> u64 {
        let known = self.shards.iter().map(|shard| {
            let shard = shard.lock();
            shard.values().flatten().map(Object::allocated_bytes).sum::<u64>()
        });
        known.sum()
    }

    pub(super) fn entry(&self) -> Result<LayerEntry> {
        Ok(LayerEntry { id: self.id, allocated_bytes: self.allocated_bytes()?, length_bytes: self.length_bytes()? })
    }

    /// Every indexed object of the range is zeroed, whatever is known of it.
    fn punch(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        let Some(end_bytes) = offset_bytes.checked_add(length_bytes) else {
            return Err(IoError::from_errno("punch", layer_object(self.id), offset_bytes, libc::EINVAL));
        };
        let end_bytes = end_bytes.min(LAYER_BYTES_MAX);
        if offset_bytes >= end_bytes {
            return Ok(());
        }
        // The last one stays, empty, because it says how long the layer is.
        let Some((last, _)) = self.last_object()? else { return Ok(()) };
        let objects = self.indexed(offset_bytes / OBJECT_BYTES..end_bytes.div_ceil(OBJECT_BYTES));
        self.ask(&objects)?;
        let range_in = |index: u32| {
            let start = u64::from(index) * OBJECT_BYTES;
            offset_bytes.max(start) - start..(end_bytes - start).min(OBJECT_BYTES)
        };
        self.cluster.run_all(
            objects,
            |index| {
                let bytes = range_in(*index);
                let (completion, _) = self.start_known(*index, |object, name| {
                    let is_changed = object.remove(bytes.clone()) || object.is_untold;
                    if bytes == (0..OBJECT_BYTES) || (is_changed && object.is_empty()) {
                        if *index != last {
                            *object = Object::empty();
                            return (self.cluster.start_remove(name), false);
                        }
                        let mut change = self.cluster.change();
                        change.assert_exists();
                        change.truncate(0);
                        change.even_if_full();
                        Layer::tell(&mut change, object);
                        return (self.cluster.start_change(name, change), true);
                    }
                    let mut change = self.cluster.change();
                    change.assert_exists();
                    if is_changed {
                        Layer::tell(&mut change, object);
                    }
                    change.zero(bytes.start, bytes.end - bytes.start);
                    change.even_if_full();
                    (self.cluster.start_change(name, change), is_changed)
                })?;
                Ok(completion)
            },
            |index, code| match code {
                code if code >= 0 || code == -libc::ENOENT => Ok(()),
                code => {
                    // Nobody knows whether it happened, nor in which order with what was begun since: everything may be there. To ask
                    // again is no way: the answer may be older than a write that is known by then.
                    let mut object = Object::full();
                    object.is_untold = true;
                    self.shard(index).lock().insert(index, Some(object));
                    Err(self.error("punch", index, -code))
                }
            },
        )
    }

    fn extents(&self, offset_bytes: u64, length_bytes: u64, out: &mut Vec<Extent>) -> Result<()> {
        self.check_range("extents", offset_bytes, length_bytes)?;
        let first = out.len();
        let end_bytes = offset_bytes + length_bytes;
        let objects = self.indexed(offset_bytes / OBJECT_BYTES..end_bytes.div_ceil(OBJECT_BYTES));
        self.ask(&objects)?;
        let mut at = offset_bytes;
        for index in objects {
            let start = u64::from(index) * OBJECT_BYTES;
            let Some(Some(object)) = self.shard(index).lock().get(&index).cloned() else { continue };
            push_extent(out, first, at, start.saturating_sub(at), false);
            at = at.max(start);
            object.visit(at - start..(end_bytes - start).min(OBJECT_BYTES), |bytes, data| {
                push_extent(out, first, start + bytes.start, bytes.end - bytes.start, data);
                at = start + bytes.end;
            });
        }
        push_extent(out, first, at, end_bytes - at, false);
        Ok(())
    }

    /// Removes the objects, and last the one that stands for the layer: until then the layer is listed, and a removal that a crash
    /// ended half-way can be done again.
    pub(super) fn remove(&self) -> Result<()> {
        self.is_removed.store(true, Ordering::SeqCst);
        let head = head_name(self.id);
        let mut change = self.cluster.change();
        change.assert_exists();
        change.set_attribute(STATE_ATTRIBUTE, STATE_GOING);
        change.even_if_full();
        self.cluster.apply("remove", &head, change)?;
        self.cluster.run_all(
            self.indexed(0..u64::from(u32::MAX) + 1),
            |index| Ok(self.cluster.start_remove(&self.name(*index))),
            |index, code| match code {
                code if code < 0 && code != -libc::ENOENT => Err(self.error("remove", index, -code)),
                _ => Ok(()),
            },
        )?;
        match self.cluster.start_remove(&head).wait() {
            code if code < 0 && code != -libc::ENOENT => Err(self.error("remove", 0, -code)),
            _ => Ok(()),
        }
    }
}

/// A read that was begun.
struct BegunRead {
    layer: Arc<Layer>,
    index: u32,
    /// The object is not there, and the one that stands for the layer is asked for now.
    lacks_object: bool,
    ending: Box<dyn Ending>,
}

impl Ended for BegunRead {
    fn ended(mut self: Box<Self>, code: c_int) {
        let layer = Arc::clone(&self.layer);
        let removed = || layer.removed_error("read", self.index);
        if code == -libc::ENOENT && !self.lacks_object {
            self.lacks_object = true;
            if let Err((errno, read)) = layer.cluster.begin_stat(&head_name(layer.id), self) {
                read.ending.ended(Err(layer.error("read", read.index, errno)));
            }
            return;
        }
        if code < 0 {
            let error = if code == -libc::ENOENT { removed() } else { layer.error("read", self.index, -code) };
            return self.ending.ended(Err(error));
        }
        let room = self.ending.room();
        let count = if self.lacks_object { 0 } else { (code as usize).min(room.len()) };
        room[count..].fill(0);
        let result = if count == 0 && layer.is_removed() { Err(removed()) } else { Ok(()) };
        self.ending.ended(result);
    }
}

/// A write that was begun.
struct BegunWrite {
    layer: Arc<Layer>,
    index: u32,
    /// The request carries the attribute.
    tells: bool,
    ending: Box<dyn Ending>,
}

impl Ended for BegunWrite {
    fn ended(self: Box<Self>, code: c_int) {
        let result = self.layer.finish("write", self.index, self.tells, code);
        self.ending.ended(result);
    }
}

/// An open layer.
pub(super) struct RadosLayer {
    pub(super) layer: Arc<Layer>,
    pub(super) is_writable: bool,
}

impl RadosLayer {
    fn check_writable(&self, operation: &'static str, offset_bytes: u64) -> Result<()> {
        let object = || layer_object(self.layer.id);
        if !self.is_writable {
            return Err(IoError::new(IoErrorCode::ReadOnly, operation, object(), offset_bytes, "the layer was opened read-only"));
        }
        if self.layer.is_removed() {
            // An object made now would never be removed.
            return Err(IoError::new(IoErrorCode::NotFound, operation, object(), offset_bytes, "the layer was removed"));
        }
        Ok(())
    }
}

impl LayerIo for RadosLayer {
    fn is_settled(&self) -> bool {
        self.layer.is_settled()
    }

    fn settle(&self) -> Result<()> {
        self.layer.settle()
    }

    fn read(&self, offset_bytes: u64, buffers: &mut [IoSliceMut<'_>]) -> Result<()> {
        self.layer.read(offset_bytes, buffers)
    }

    /// Only what is not there is at hand.
    fn read_now(&self, offset_bytes: u64, buffer: &mut [u8]) -> Result<bool> {
        self.layer.check_range("read", offset_bytes, buffer.len() as u64)?;
        let is_hole = |(index, _)| !self.layer.shard(index).lock().contains_key(&index);
        if self.layer.is_removed() || !objects_of(offset_bytes, buffer.len() as u64).all(is_hole) {
            return Ok(false);
        }
        buffer.fill(0);
        Ok(!self.layer.is_removed())
    }

    fn write(&self, offset_bytes: u64, buffers: &[IoSlice<'_>]) -> Result<()> {
        self.check_writable("write", offset_bytes)?;
        self.layer.write("write", offset_bytes, buffers)
    }

    fn may_begin(&self, length_bytes: u64) -> bool {
        self.layer.cluster.may_begin(length_bytes)
    }

    fn begin_read(&self, offset_bytes: u64, ending: Box<dyn Ending>) -> Begun {
        if self.layer.is_removed() { Err(ending) } else { self.layer.begin_read(offset_bytes, ending) }
    }

    fn begin_write(&self, offset_bytes: u64, data: &[u8], ending: Box<dyn Ending>) -> Begun {
        match self.check_writable("write", offset_bytes) {
            Ok(()) => self.layer.begin_write(offset_bytes, data, ending),
            Err(_) => Err(ending),
        }
    }

    fn punch(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        self.check_writable("punch", offset_bytes)?;
        self.layer.punch(offset_bytes, length_bytes)
    }

    fn zero_allocated(&self, offset_bytes: u64, length_bytes: u64) -> Result<()> {
        self.check_writable("zero", offset_bytes)?;
        self.layer.check_range("zero", offset_bytes, length_bytes)?;
        let end_bytes = offset_bytes + length_bytes;
        let mut at = offset_bytes;
        while at < end_bytes {
            let step_bytes = (end_bytes - at).min(ZERO_STEP_BYTES);
            let buffers: Vec<IoSlice<'_>> =
                objects_of(0, step_bytes).map(|(_, bytes)| IoSlice::new(&ZEROS[..bytes.end as usize])).collect();
            self.layer.write("zero", at, &buffers)?;
            at += step_bytes;
        }
        Ok(())
    }

    /// What was answered is on the disks of all OSDs that hold it.
    fn sync(&self) -> Result<()> {
        Ok(())
    }

    fn extents(&self, offset_bytes: u64, length_bytes: u64, out: &mut Vec<Extent>) -> Result<()> {
        self.layer.extents(offset_bytes, length_bytes, out)
    }

    fn length_bytes(&self) -> Result<u64> {
        self.layer.length_bytes()
    }

    fn allocated_bytes(&self) -> Result<u64> {
        self.layer.allocated_bytes()
    }

    /// Nothing is cached.
    fn drop_cache(&self) -> Result<()> {
        Ok(())
    }
}
