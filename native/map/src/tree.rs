//! The tree: a live map that readers look up without locks, and its frozen, shared forms.
//!
//! - Readers pin the epoch, walk from the root by Acquire loads and unpin. What they find stays in memory until they unpin.
//! - One writer at a time (a mutex says so; it is never contended where the rule of `Map` is kept).
//! - Freezing hands out a count of the root and gives the map a new generation: from then on no node below that root is the
//!   map's own, so none of them changes.
use crate::link::Link;
use crate::node::{Account, new_generation};
use crate::writer::Writer;
use crate::{MapCache, Result, RootRef, Run, checkpoint, diff, walk};
use parking_lot::Mutex;
use std::sync::Arc;
use std::sync::atomic::Ordering;

/// The live map of one open volume. `lookup*` may be called from any thread at any time, without locks and while a writer works;
/// `set` and `freeze` are called by one thread at a time (the device holds its batch lock).
pub struct Map {
    root: Link,
    /// Held by the writer: the generation of the nodes that are the map's own.
    generation: Mutex<u64>,
    account: Arc<Account>,
}

/// An immutable map; cloning shares the root.
pub struct FrozenMap {
    pub(crate) root: Link,
    pub(crate) cache: Arc<MapCache>,
}

impl Clone for FrozenMap {
    fn clone(&self) -> FrozenMap {
        let guard = crossbeam_epoch::pin();
        FrozenMap { root: Link::new(self.root.node(&guard)), cache: self.cache.clone() }
    }
}

impl Map {
    /// A live map that starts as `frozen`.
    pub fn from_frozen(frozen: &FrozenMap) -> Map {
        let FrozenMap { root, cache } = frozen;
        let guard = crossbeam_epoch::pin();
        let root = Link::new(root.node(&guard));
        Map { root, generation: Mutex::new(new_generation()), account: Account::new(cache.clone()) }
    }

    /// Owner of one slot. `PageFile` if its leaf was evicted and cannot be read back.
    pub fn lookup(&self, slot: u64) -> Result<u32> {
        walk::lookup(&self.root, slot, &crossbeam_epoch::pin())
    }

    /// Owners of `slot_count` slots from `start_slot` on: appends runs to `out` (not cleared), ascending, neighbours with
    /// the same owner merged, covering the range exactly. No allocation but the growth of `out`.
    pub fn lookup_runs(&self, start_slot: u64, slot_count: u64, out: &mut Vec<Run>) -> Result<()> {
        walk::lookup_runs(&self.root, walk::checked_range(start_slot, slot_count), out)
    }

    /// Whether every slot of the range has this owner (the fast path of a write).
    pub fn is_owned(&self, start_slot: u64, slot_count: u64, owner: u32) -> Result<bool> {
        walk::is_owned(&self.root, walk::checked_range(start_slot, slot_count), owner, &crossbeam_epoch::pin())
    }

    /// Sets the owner of a run of any length (whole subtrees become one word). One caller at a time.
    /// On an error (`PageFile`: an evicted leaf cannot be read back) nothing has changed.
    pub fn set(&self, start_slot: u64, slot_count: u64, owner: u32) -> Result<()> {
        let range = walk::checked_range(start_slot, slot_count);
        let generation = self.generation.lock();
        let guard = crossbeam_epoch::pin();
        Writer { account: &self.account, generation: *generation, guard: &guard }.set(&self.root, range, owner)
    }

    /// Freezes the present state, O(1). One caller at a time, the same as `set`'s.
    pub fn freeze(&self) -> FrozenMap {
        let mut generation = self.generation.lock();
        let guard = crossbeam_epoch::pin();
        let frozen = FrozenMap { root: Link::new(self.root.node(&guard)), cache: self.account.cache.clone() };
        *generation = new_generation();
        frozen
    }

    /// Leaves that no checkpoint has persisted yet (bounded by the device's background work): those that this map made, its
    /// present ones and those that frozen maps still hold.
    pub fn dirty_leaf_count(&self) -> u64 {
        self.account.dirty_leaf_count.load(Ordering::Relaxed)
    }
}

impl FrozenMap {
    /// A map in which every slot has one owner (HOLE or an alias): no pages at all.
    pub fn uniform(cache: Arc<MapCache>, owner: u32) -> FrozenMap {
        FrozenMap { root: Link::new(crate::link::Node::Uniform(owner)), cache }
    }

    /// As `Map::lookup_runs`.
    pub fn lookup_runs(&self, start_slot: u64, slot_count: u64, out: &mut Vec<Run>) -> Result<()> {
        walk::lookup_runs(&self.root, walk::checked_range(start_slot, slot_count), out)
    }

    /// Aliases of every layer that slots below `slot_limit` refer to, ascending.
    pub fn layers(&self, slot_limit: u64) -> Result<Vec<u32>> {
        Ok(walk::owners(&self.root, slot_limit, &crossbeam_epoch::pin())?.into_iter().collect())
    }

    /// The same map with a run set to one owner (resize and rollback of closed volumes). Path copy; `self` stays as it is.
    pub fn with_run(&self, start_slot: u64, slot_count: u64, owner: u32) -> Result<FrozenMap> {
        let map = Map::from_frozen(self);
        map.set(start_slot, slot_count, owner)?;
        Ok(map.freeze())
    }

    /// The root as stored, if every page of this map is persisted.
    pub fn root(&self) -> Option<RootRef> {
        checkpoint::persisted_root(&self.root, &crossbeam_epoch::pin())
    }

    /// Calls `emit` for runs below `slot_limit` whose owner differs, with this map's owner (`old` = the other's), ascending.
    /// Shared subtrees cost nothing.
    pub fn diff(&self, base: &FrozenMap, slot_limit: u64, emit: &mut dyn FnMut(Run, u32)) -> Result<()> {
        diff::diff(self, base, slot_limit, emit)
    }

    /// Slots below `slot_limit` by owner: (owner, slot count), HOLE left out, ascending by owner.
    pub fn owner_counts(&self, slot_limit: u64) -> Result<Vec<(u32, u64)>> {
        Ok(walk::owner_counts(&self.root, slot_limit, &crossbeam_epoch::pin())?.into_iter().collect())
    }

    /// Bytes of memory of the nodes reachable from this root; how many of them other maps share is not told.
    pub fn memory_bytes(&self) -> u64 {
        walk::memory_bytes(&self.root, &crossbeam_epoch::pin())
    }
}
