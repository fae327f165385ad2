//! Nodes of a tree and who accounts for them.
//!
//! - A node carries the generation of the map that made it. A live map changes a node in place only while the node's generation
//!   is its own present one; any other node is shared or frozen and is copied first. Generations are never used twice.
//! - `page_id` is 0 until the catalog has the node's page; then it and `crc` never change, and everything below is persisted too.
//! - A persisted leaf may lose its body (the cache evicts it to the page file) and gets it back when somebody looks.
use crate::leaf_body::Body;
use crate::link::{Link, Node};
use crate::{INNER_FANOUT, LEAF_SLOTS, MapCache, MapError, MapErrorCode, Result, codec};
use crossbeam_epoch::{Atomic, Guard, Owned, Shared};
use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};

/// Level of the root when it is a node; leaves are level 0.
pub(crate) const ROOT_LEVEL: u8 = 3;
/// Children of an inner node, as an array length.
pub(crate) const FANOUT: usize = INNER_FANOUT as usize;
/// The generation of nodes loaded from pages: no map's own.
pub(crate) const LOADED_GENERATION: u64 = 0;

static NEXT_GENERATION: AtomicU64 = AtomicU64::new(LOADED_GENERATION + 1);

/// A generation that nobody had before.
pub(crate) fn new_generation() -> u64 {
    NEXT_GENERATION.fetch_add(1, Ordering::Relaxed)
}

/// Slots below a node of this level.
pub(crate) const fn span(level: u8) -> u64 {
    LEAF_SLOTS << (INNER_FANOUT.trailing_zeros() * level as u32)
}

const _: () = assert!(INNER_FANOUT.is_power_of_two() && LEAF_SLOTS.is_power_of_two(), "positions are taken apart by shifts");
const _: () = assert!(span(ROOT_LEVEL) == crate::MAP_SLOTS, "the root spans the address space");

/// Bytes that the allocator takes for a block of `size`: a word of its own, multiples of 16, at least 32 (glibc's malloc).
const fn allocation_bytes(size: usize) -> u64 {
    let rounded = (size + 8).next_multiple_of(16);
    (if rounded < 32 { 32 } else { rounded }) as u64
}

/// Counters of an `Arc` before its value.
const ARC_HEADER_BYTES: usize = 16;

/// Whose leaves they are: the cache that counts their bytes, and how many of them no checkpoint has persisted.
pub(crate) struct Account {
    pub(crate) cache: Arc<MapCache>,
    pub(crate) dirty_leaf_count: AtomicU64,
}

impl Account {
    pub(crate) fn new(cache: Arc<MapCache>) -> Arc<Account> {
        Arc::new(Account { cache, dirty_leaf_count: AtomicU64::new(0) })
    }
}

/// 256 children.
pub(crate) struct Inner {
    pub(crate) generation: u64,
    page_id: AtomicU64,
    account: Arc<Account>,
    crc: AtomicU32,
    pub(crate) level: u8,
    pub(crate) children: [Link; FANOUT],
}

impl Inner {
    /// A node of children made by `child`, called with each index. `page_id` 0: not persisted.
    pub(crate) fn new(
        account: &Arc<Account>,
        generation: u64,
        level: u8,
        page_id: u64,
        crc: u32,
        mut child: impl FnMut(usize) -> Node,
    ) -> Arc<Inner> {
        account.cache.add_bytes(Inner::memory_bytes());
        Arc::new(Inner {
            generation,
            page_id: AtomicU64::new(page_id),
            account: account.clone(),
            crc: AtomicU32::new(crc),
            level,
            children: std::array::from_fn(|index| Link::new(child(index))),
        })
    }

    /// A node that shares all children, for the map of this account and generation.
    pub(crate) fn copy(&self, account: &Arc<Account>, generation: u64, guard: &Guard) -> Arc<Inner> {
        Inner::new(account, generation, self.level, 0, 0, |index| self.children[index].node(guard))
    }

    /// Page id and crc; `None` until the catalog has the page.
    pub(crate) fn page(&self) -> Option<(u64, u32)> {
        load_page(&self.page_id, &self.crc)
    }

    /// The catalog has the page. False if it was persisted before (nothing is changed then).
    pub(crate) fn persist(&self, page_id: u64, crc: u32) -> bool {
        store_page(&self.page_id, &self.crc, page_id, crc)
    }

    /// Bytes of memory of one node.
    pub(crate) fn memory_bytes() -> u64 {
        allocation_bytes(ARC_HEADER_BYTES + size_of::<Inner>())
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        self.account.cache.forget_inner(*self.page_id.get_mut(), self);
        self.account.cache.remove_bytes(Inner::memory_bytes());
    }
}

/// The owners of 8192 slots.
pub(crate) struct Leaf {
    pub(crate) generation: u64,
    page_id: AtomicU64,
    /// Where the page file has the encoded page; 0: nowhere.
    page_file_position: AtomicU64,
    /// Null while evicted.
    body: Atomic<Body>,
    account: Arc<Account>,
    crc: AtomicU32,
    /// Somebody looked since the clock of the cache came by.
    accessed: AtomicBool,
}

/// A leaf's body: the one in memory, or one read back for this caller alone.
pub(crate) enum BodyView<'g> {
    Cached(&'g Body),
    ReadBack(Box<Body>),
}

impl Deref for BodyView<'_> {
    type Target = Body;
    fn deref(&self) -> &Body {
        match self {
            BodyView::Cached(body) => body,
            BodyView::ReadBack(body) => body,
        }
    }
}

impl Leaf {
    /// `page_id` 0: not persisted, and counted as dirty until it is or is dropped.
    pub(crate) fn new(account: &Arc<Account>, generation: u64, page_id: u64, crc: u32, body: Body) -> Arc<Leaf> {
        account.cache.add_bytes(Leaf::header_bytes() + body_bytes(&body));
        if page_id == 0 {
            account.dirty_leaf_count.fetch_add(1, Ordering::Relaxed);
        }
        Arc::new(Leaf {
            generation,
            page_id: AtomicU64::new(page_id),
            page_file_position: AtomicU64::new(0),
            body: Atomic::new(body),
            account: account.clone(),
            crc: AtomicU32::new(crc),
            // A leaf starts as looked at: the clock leaves it a round.
            accessed: AtomicBool::new(true),
        })
    }

    /// The body for a lookup; read back from the page file and kept if it was evicted.
    pub(crate) fn body<'g>(&'g self, guard: &'g Guard) -> Result<&'g Body> {
        // Looked at before it is stored, so that readers of a hot leaf share its cache line.
        if !self.accessed.load(Ordering::Relaxed) {
            self.accessed.store(true, Ordering::Relaxed);
        }
        match self.cached_body(guard) {
            Some(body) => Ok(body),
            None => self.load_body(guard),
        }
    }

    /// The body for a walk over many leaves: an evicted one is read back but not kept, so that a walk does not fill the cache.
    pub(crate) fn view<'g>(&'g self, guard: &'g Guard) -> Result<BodyView<'g>> {
        loop {
            if let Some(body) = self.cached_body(guard) {
                return Ok(BodyView::Cached(body));
            }
            if let Some(body) = self.read_back()? {
                return Ok(BodyView::ReadBack(Box::new(body)));
            }
        }
    }

    /// Puts another body in. Only for the writer whose generation the leaf has.
    pub(crate) fn replace_body(&self, body: Body, guard: &Guard) {
        debug_assert!(self.page().is_none(), "a persisted leaf never changes");
        self.account.cache.add_bytes(body_bytes(&body));
        let old = self.body.swap(Owned::new(body), Ordering::AcqRel, guard);
        self.give_up_body(old, guard);
    }

    /// Takes the body out of memory if nobody looked at it since the last call; returns the bytes this frees.
    /// Called by the cache's one evictor, for persisted leaves.
    pub(crate) fn evict(&self, guard: &Guard) -> Result<u64> {
        if self.accessed.swap(false, Ordering::Relaxed) {
            return Ok(0);
        }
        let (Some((_, crc)), Some(body), Some(file)) = (self.page(), self.cached_body(guard), self.account.cache.page_file()) else {
            return Ok(0);
        };
        if self.page_file_position.load(Ordering::Acquire) == 0 {
            let bytes = codec::encode_leaf(&body.cover());
            // A page that this build would write otherwise is kept in memory: nothing could check it on the way back.
            if crc32c::crc32c(&bytes) != crc {
                return Ok(0);
            }
            self.page_file_position.store(file.write(&bytes)?, Ordering::Release);
        }
        let old = self.body.swap(Shared::null(), Ordering::AcqRel, guard);
        Ok(self.give_up_body(old, guard))
    }

    /// Page id and crc; `None` until the catalog has the page.
    pub(crate) fn page(&self) -> Option<(u64, u32)> {
        load_page(&self.page_id, &self.crc)
    }

    /// The catalog has the page. False if it was persisted before (nothing is changed then).
    pub(crate) fn persist(&self, page_id: u64, crc: u32) -> bool {
        let first = store_page(&self.page_id, &self.crc, page_id, crc);
        if first {
            self.account.dirty_leaf_count.fetch_sub(1, Ordering::Relaxed);
        }
        first
    }

    /// Bytes of memory of this leaf now.
    pub(crate) fn memory_bytes(&self, guard: &Guard) -> u64 {
        Leaf::header_bytes() + self.cached_body(guard).map_or(0, body_bytes)
    }

    fn header_bytes() -> u64 {
        allocation_bytes(ARC_HEADER_BYTES + size_of::<Leaf>())
    }

    fn cached_body<'g>(&'g self, guard: &'g Guard) -> Option<&'g Body> {
        let body = self.body.load(Ordering::Acquire, guard);
        // SAFETY: a body that is taken out is freed through the epoch (`give_up_body`), so it lives while the thread is pinned.
        unsafe { body.as_ref() }
    }

    #[cold]
    fn load_body<'g>(&'g self, guard: &'g Guard) -> Result<&'g Body> {
        let page_id = self.page_id.load(Ordering::Acquire);
        let _one_loader = self.account.cache.load_lock(page_id).lock();
        if let Some(body) = self.cached_body(guard) {
            return Ok(body);
        }
        let body = self.read_back()?.ok_or_else(|| self.page_file_error("an evicted page has no place in the page file"))?;
        self.account.cache.add_bytes(body_bytes(&body));
        let body = Owned::new(body).into_shared(guard);
        self.body.store(body, Ordering::Release);
        // SAFETY: as in `cached_body`; it lives while the thread is pinned even if the evictor took it out again meanwhile.
        Ok(unsafe { body.deref() })
    }

    /// The body from the page file; `None` if it was never put there.
    fn read_back(&self) -> Result<Option<Body>> {
        let position = self.page_file_position.load(Ordering::Acquire);
        let (Some((page_id, crc)), Some(file)) = (self.page(), self.account.cache.page_file()) else { return Ok(None) };
        if position == 0 {
            return Ok(None);
        }
        let bytes = file.read(position).map_err(|error| MapError { page_id, ..error })?;
        if crc32c::crc32c(&bytes) != crc {
            return Err(self.page_file_error("the page file gave back other bytes than were written to it"));
        }
        codec::decode_leaf(page_id, &bytes).map(Some)
    }

    fn page_file_error(&self, message: &str) -> MapError {
        MapError { code: MapErrorCode::PageFile, page_id: self.page_id.load(Ordering::Relaxed), message: message.to_owned() }
    }

    /// Frees a body that was swapped out, once no pinned thread can have it; returns its bytes.
    fn give_up_body(&self, body: Shared<'_, Body>, guard: &Guard) -> u64 {
        // SAFETY: it was in `body` until the caller swapped it out; nothing frees it but the line below.
        let Some(bytes) = (unsafe { body.as_ref() }).map(body_bytes) else { return 0 };
        self.account.cache.remove_bytes(bytes);
        // SAFETY: it is no longer reachable, and only one caller swapped it out.
        unsafe { guard.defer_destroy(body) };
        bytes
    }
}

impl Drop for Leaf {
    fn drop(&mut self) {
        let cache = &self.account.cache;
        let page_id = *self.page_id.get_mut();
        if page_id == 0 {
            self.account.dirty_leaf_count.fetch_sub(1, Ordering::Relaxed);
        }
        cache.forget_leaf(page_id, self);
        let position = *self.page_file_position.get_mut();
        if let (true, Some(file)) = (position != 0, cache.page_file()) {
            file.release(position);
        }
        let mut bytes = Leaf::header_bytes();
        // SAFETY: nobody reaches the leaf any more, so its body is ours alone.
        if let Some(body) = unsafe { std::mem::replace(&mut self.body, Atomic::null()).try_into_owned() } {
            bytes += body_bytes(&body);
        }
        cache.remove_bytes(bytes);
    }
}

fn body_bytes(body: &Body) -> u64 {
    allocation_bytes(size_of::<Body>()) + allocation_bytes(body.heap_bytes())
}

fn load_page(page_id: &AtomicU64, crc: &AtomicU32) -> Option<(u64, u32)> {
    match page_id.load(Ordering::Acquire) {
        0 => None,
        page_id => Some((page_id, crc.load(Ordering::Relaxed))),
    }
}

fn store_page(stored_page_id: &AtomicU64, stored_crc: &AtomicU32, page_id: u64, crc: u32) -> bool {
    // One commit of a map at a time, so nothing comes between the check and the stores; the crc is there before the id says so.
    if stored_page_id.load(Ordering::Acquire) != 0 {
        return false;
    }
    stored_crc.store(crc, Ordering::Relaxed);
    stored_page_id.store(page_id, Ordering::Release);
    true
}
