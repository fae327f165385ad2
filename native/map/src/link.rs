//! The reference to a child: one atomic word, replaced by the one writer of a map while readers follow it without locks.
//!
//! Rules (the unsafe code below relies on them, and nothing else in the crate touches the words):
//! - A link whose word is a pointer owns one strong count of the `Arc` the pointer came from, for as long as the word is in it.
//! - A word that is replaced while others may read is given up through the epoch: its count is dropped only when every thread
//!   that was pinned at the time has unpinned. So what a pinned thread found through a link stays until it unpins.
//! - A link is dropped only when nobody can reach it any more; then its count is dropped at once.
use crate::node::{Inner, Leaf};
use crossbeam_epoch::Guard;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

const _: () = assert!(usize::BITS == 64, "a link holds a pointer or a tagged u32 in 64 bits");
const _: () = assert!(align_of::<Inner>() >= 4 && align_of::<Leaf>() >= 4, "two low bits of a pointer are free for the tag");

const TAG_MASK: u64 = 3;
const TAG_INNER: u64 = 0;
const TAG_LEAF: u64 = 1;
const TAG_UNIFORM: u64 = 2;
const UNIFORM_SHIFT: u32 = 2;

/// A child, owned.
#[derive(Clone)]
pub(crate) enum Node {
    Uniform(u32),
    Inner(Arc<Inner>),
    Leaf(Arc<Leaf>),
}

/// A child, looked at.
#[derive(Clone, Copy)]
pub(crate) enum Child<'g> {
    Uniform(u32),
    Inner(&'g Inner),
    Leaf(&'g Leaf),
}

/// See the module's rules.
pub(crate) struct Link(AtomicU64);

impl Link {
    pub(crate) fn new(node: Node) -> Link {
        Link(AtomicU64::new(into_word(node)))
    }

    /// What the link holds now; the reference is good until the thread unpins.
    pub(crate) fn load<'g>(&'g self, _guard: &'g Guard) -> Child<'g> {
        let word = self.0.load(Ordering::Acquire);
        match word & TAG_MASK {
            TAG_UNIFORM => Child::Uniform((word >> UNIFORM_SHIFT) as u32),
            // SAFETY: the word owns a count of this Arc (rule 1), which outlives the guard even if the word is replaced (rule 2).
            TAG_LEAF => Child::Leaf(unsafe { &*leaf_pointer(word) }),
            // SAFETY: as above.
            _ => Child::Inner(unsafe { &*inner_pointer(word) }),
        }
    }

    /// A count of its own of what the link holds now.
    pub(crate) fn node(&self, _guard: &Guard) -> Node {
        let word = self.0.load(Ordering::Acquire);
        match word & TAG_MASK {
            TAG_UNIFORM => {}
            // SAFETY: the pointer came from Arc::into_raw and its count is at least one while the thread is pinned (rules 1, 2).
            TAG_LEAF => unsafe { Arc::increment_strong_count(leaf_pointer(word)) },
            // SAFETY: as above.
            _ => unsafe { Arc::increment_strong_count(inner_pointer(word)) },
        }
        // SAFETY: the count just taken belongs to the node returned.
        unsafe { from_word(word) }
    }

    /// Replaces what the link holds. Readers find the old or the new child.
    pub(crate) fn replace(&self, node: Node, guard: &Guard) {
        let old = self.0.swap(into_word(node), Ordering::AcqRel);
        if old & TAG_MASK == TAG_UNIFORM {
            return;
        }
        // SAFETY: the swap handed us the count that the old word owned; readers that found it are pinned, and the closure runs
        // after they unpinned (rule 2). It owns all it touches, and nodes are Send and Sync.
        unsafe { guard.defer_unchecked(move || drop(from_word(old))) };
        if old & TAG_MASK == TAG_INNER {
            // A whole subtree should not wait in this thread's bag for as long as the thread is idle.
            guard.flush();
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        // SAFETY: the word owns its count (rule 1), and nobody reaches the link any more (rule 3).
        drop(unsafe { from_word(*self.0.get_mut()) });
    }
}

fn into_word(node: Node) -> u64 {
    match node {
        Node::Uniform(owner) => (u64::from(owner) << UNIFORM_SHIFT) | TAG_UNIFORM,
        Node::Inner(inner) => Arc::into_raw(inner).expose_provenance() as u64 | TAG_INNER,
        Node::Leaf(leaf) => Arc::into_raw(leaf).expose_provenance() as u64 | TAG_LEAF,
    }
}

/// # Safety
/// The caller hands over the strong count that belongs to the word.
unsafe fn from_word(word: u64) -> Node {
    match word & TAG_MASK {
        TAG_UNIFORM => Node::Uniform((word >> UNIFORM_SHIFT) as u32),
        // SAFETY: made by Arc::into_raw in `into_word`; the caller owns a count.
        TAG_LEAF => Node::Leaf(unsafe { Arc::from_raw(leaf_pointer(word)) }),
        // SAFETY: as above.
        _ => Node::Inner(unsafe { Arc::from_raw(inner_pointer(word)) }),
    }
}

fn leaf_pointer(word: u64) -> *const Leaf {
    std::ptr::with_exposed_provenance((word & !TAG_MASK) as usize)
}

fn inner_pointer(word: u64) -> *const Inner {
    std::ptr::with_exposed_provenance((word & !TAG_MASK) as usize)
}
