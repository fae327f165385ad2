//! Changing: path copy on the first touch of a node that is not the map's own, in place afterwards.
//!
//! A child becomes visible with one store, complete: readers find a slot's old or new owner, never anything else.
//! A node whose slots all have one owner is never left standing: its parent's word becomes that owner.
use crate::leaf_body::{Body, Change, Content};
use crate::link::{Child, Link, Node};
use crate::node::{Account, Inner, Leaf, ROOT_LEVEL, span};
use crate::walk::{child_index, child_indices, is_owned};
use crate::{LEAF_SLOTS, Result};
use crossbeam_epoch::Guard;
use std::ops::Range;
use std::sync::Arc;

/// The one writer of a map, for one call.
pub(crate) struct Writer<'a> {
    pub(crate) account: &'a Arc<Account>,
    pub(crate) generation: u64,
    pub(crate) guard: &'a Guard,
}

impl Writer<'_> {
    /// Sets the owner of a range. On an error (an evicted leaf that cannot be read back) nothing has changed.
    pub(crate) fn set(&self, root: &Link, range: Range<u64>, owner: u32) -> Result<()> {
        // Costs a lookup, saves the copies of a path (and the pages of a checkpoint) where nothing would change.
        if range.is_empty() || is_owned(root, range.clone(), owner, self.guard)? {
            return Ok(());
        }
        // Only leaves that keep some of their owners are looked into: the first and the last. The last is made our own before
        // anything changes, the first is the first thing to change; so whatever can fail fails before.
        if !range.end.is_multiple_of(LEAF_SLOTS) && range.start / LEAF_SLOTS != range.end / LEAF_SLOTS {
            self.own_leaf(root, range.end)?;
        }
        self.set_child(root, ROOT_LEVEL, 0, &range, owner)
    }

    fn set_child(&self, link: &Link, level: u8, base: u64, range: &Range<u64>, owner: u32) -> Result<()> {
        let end = base + span(level);
        if range.start <= base && end <= range.end {
            link.replace(Node::Uniform(owner), self.guard);
            return Ok(());
        }
        match link.load(self.guard) {
            Child::Uniform(present) if present == owner => {}
            Child::Uniform(present) if level == 0 => {
                let (start, end) = within_leaf(base, range);
                link.replace(self.node_of(Content::one_run(present, start, end, owner)), self.guard);
            }
            Child::Uniform(present) => {
                let inner = Inner::new(self.account, self.generation, level, 0, 0, |_| Node::Uniform(present));
                self.set_children(&inner, base, range, owner)?;
                link.replace(Node::Inner(inner), self.guard);
            }
            Child::Leaf(leaf) => self.set_in_leaf(link, leaf, within_leaf(base, range), owner)?,
            Child::Inner(inner) if inner.generation == self.generation => {
                self.set_children(inner, base, range, owner)?;
                if let Some(owner) = self.uniform_owner(inner) {
                    link.replace(Node::Uniform(owner), self.guard);
                }
            }
            Child::Inner(inner) => {
                let copy = inner.copy(self.account, self.generation, self.guard);
                self.set_children(&copy, base, range, owner)?;
                let node = self.uniform_owner(&copy).map_or(Node::Inner(copy), Node::Uniform);
                link.replace(node, self.guard);
            }
        }
        Ok(())
    }

    fn set_children(&self, inner: &Inner, base: u64, range: &Range<u64>, owner: u32) -> Result<()> {
        for index in child_indices(inner.level, base, range) {
            let child_base = base + index as u64 * span(inner.level - 1);
            self.set_child(&inner.children[index], inner.level - 1, child_base, range, owner)?;
        }
        Ok(())
    }

    fn set_in_leaf(&self, link: &Link, leaf: &Leaf, (start, end): (usize, usize), owner: u32) -> Result<()> {
        if leaf.generation != self.generation {
            if let Some(content) = leaf.body(self.guard)?.copy_with_run(start, end, owner) {
                link.replace(self.node_of(content), self.guard);
            }
            return Ok(());
        }
        match leaf.body(self.guard)?.set(start, end, owner) {
            Change::Nothing | Change::InPlace => {}
            Change::Replace(Content::Body(body)) => leaf.replace_body(body, self.guard),
            Change::Replace(Content::Uniform(owner)) => link.replace(Node::Uniform(owner), self.guard),
        }
        Ok(())
    }

    /// Copies the path to the leaf of a slot, so that the leaf is the map's own and stays in memory. Changes no owner.
    fn own_leaf(&self, link: &Link, slot: u64) -> Result<()> {
        match link.load(self.guard) {
            Child::Uniform(_) => Ok(()),
            Child::Leaf(leaf) => {
                if leaf.generation != self.generation {
                    let body = leaf.body(self.guard)?.copy();
                    link.replace(self.node_of(Content::Body(body)), self.guard);
                }
                Ok(())
            }
            Child::Inner(inner) => {
                let index = child_index(inner.level, slot);
                if inner.generation == self.generation {
                    return self.own_leaf(&inner.children[index], slot);
                }
                let copy = inner.copy(self.account, self.generation, self.guard);
                self.own_leaf(&copy.children[index], slot)?;
                link.replace(Node::Inner(copy), self.guard);
                Ok(())
            }
        }
    }

    fn node_of(&self, content: Content) -> Node {
        match content {
            Content::Uniform(owner) => Node::Uniform(owner),
            Content::Body(body) => self.leaf_node(body),
        }
    }

    fn leaf_node(&self, body: Body) -> Node {
        Node::Leaf(Leaf::new(self.account, self.generation, 0, 0, body))
    }

    /// The owner of all children, if they are one owner's.
    fn uniform_owner(&self, inner: &Inner) -> Option<u32> {
        let Child::Uniform(owner) = inner.children[0].load(self.guard) else { return None };
        let is_uniform = inner.children.iter().all(|link| matches!(link.load(self.guard), Child::Uniform(found) if found == owner));
        is_uniform.then_some(owner)
    }
}

/// The part of `range` that lies in the leaf at `base`, in slots of the leaf.
fn within_leaf(base: u64, range: &Range<u64>) -> (usize, usize) {
    let start = range.start.max(base) - base;
    let end = range.end.min(base + LEAF_SLOTS) - base;
    (start as usize, end as usize)
}
