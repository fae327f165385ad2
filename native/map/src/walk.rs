//! Looking: the walks that lookups and scans share. They run while a writer works and take no locks.
use crate::link::{Child, Link};
use crate::node::{FANOUT, ROOT_LEVEL, span};
use crate::{HOLE, LEAF_SLOTS, MAP_SLOTS, Result, Run};
use crossbeam_epoch::Guard;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

/// Panics unless the run lies in the address space: the engine has checked it against the size of the resource.
pub(crate) fn checked_range(start_slot: u64, slot_count: u64) -> Range<u64> {
    let end = start_slot.checked_add(slot_count).filter(|&end| end <= MAP_SLOTS);
    start_slot..end.unwrap_or_else(|| panic!("{slot_count} slots from {start_slot} on are not within a map's {MAP_SLOTS}"))
}

/// The children of a node at `base` that hold part of `range`.
pub(crate) fn child_indices(level: u8, base: u64, range: &Range<u64>) -> Range<usize> {
    let child_span = span(level - 1);
    let first = range.start.saturating_sub(base) / child_span;
    let end = range.end.saturating_sub(base).div_ceil(child_span);
    first as usize..(end as usize).min(FANOUT)
}

/// Which child of a node of this level holds a slot.
pub(crate) fn child_index(level: u8, slot: u64) -> usize {
    (slot / span(level - 1)) as usize % FANOUT
}

/// Owner of one slot.
pub(crate) fn lookup(root: &Link, slot: u64, guard: &Guard) -> Result<u32> {
    assert!(slot < MAP_SLOTS, "slot {slot} is not within a map's {MAP_SLOTS}");
    let mut link = root;
    loop {
        match link.load(guard) {
            Child::Uniform(owner) => return Ok(owner),
            Child::Inner(inner) => link = &inner.children[child_index(inner.level, slot)],
            Child::Leaf(leaf) => return Ok(leaf.body(guard)?.owner_at((slot % LEAF_SLOTS) as usize)),
        }
    }
}

/// Calls `visit(start, end, owner)` for runs that cover `range` in order; neighbours may have the same owner.
/// Stops when `visit` says false; returns whether it never did.
pub(crate) fn visit_runs(root: &Link, range: Range<u64>, guard: &Guard, visit: &mut impl FnMut(u64, u64, u32) -> bool) -> Result<bool> {
    if range.is_empty() {
        return Ok(true);
    }
    visit_child_runs(root.load(guard), ROOT_LEVEL, 0, &range, guard, visit)
}

fn visit_child_runs(
    child: Child<'_>,
    level: u8,
    base: u64,
    range: &Range<u64>,
    guard: &Guard,
    visit: &mut impl FnMut(u64, u64, u32) -> bool,
) -> Result<bool> {
    let start = range.start.max(base);
    let end = range.end.min(base + span(level));
    match child {
        Child::Uniform(owner) => Ok(visit(start, end, owner)),
        Child::Inner(inner) => {
            for index in child_indices(level, base, range) {
                let child_base = base + index as u64 * span(level - 1);
                if !visit_child_runs(inner.children[index].load(guard), level - 1, child_base, range, guard, visit)? {
                    return Ok(false);
                }
            }
            Ok(true)
        }
        Child::Leaf(leaf) => {
            let body = leaf.body(guard)?;
            let (mut slot, end) = ((start - base) as usize, (end - base) as usize);
            while slot < end {
                let (owner, run_end) = body.run_at(slot, end);
                if !visit(base + slot as u64, base + run_end as u64, owner) {
                    return Ok(false);
                }
                slot = run_end;
            }
            Ok(true)
        }
    }
}

/// Appends merged runs that cover `range` exactly.
pub(crate) fn lookup_runs(root: &Link, range: Range<u64>, out: &mut Vec<Run>) -> Result<()> {
    let guard = crossbeam_epoch::pin();
    let earlier_count = out.len();
    visit_runs(root, range, &guard, &mut |start, end, owner| {
        match out[earlier_count..].last_mut() {
            Some(last) if last.owner == owner => last.slot_count += end - start,
            _ => out.push(Run { start_slot: start, slot_count: end - start, owner }),
        }
        true
    })
    .map(drop)
}

/// Whether every slot of `range` has this owner.
pub(crate) fn is_owned(root: &Link, range: Range<u64>, owner: u32, guard: &Guard) -> Result<bool> {
    visit_runs(root, range, guard, &mut |_, _, found| found == owner)
}

/// The owners of slots below `slot_limit`, HOLE left out.
pub(crate) fn owners(root: &Link, slot_limit: u64, guard: &Guard) -> Result<BTreeSet<u32>> {
    let mut owners = BTreeSet::new();
    scan(root, slot_limit, guard, &mut |part| match part {
        Part::Uniform { owner, .. } => owners.extend([owner]),
        Part::Leaf { body, slot_count } => body.owners(0, slot_count, &mut |owner| owners.extend([owner])),
    })?;
    owners.remove(&HOLE);
    Ok(owners)
}

/// Number of slots below `slot_limit` of each owner, HOLE left out.
pub(crate) fn owner_counts(root: &Link, slot_limit: u64, guard: &Guard) -> Result<BTreeMap<u32, u64>> {
    let mut counts = BTreeMap::<u32, u64>::new();
    scan(root, slot_limit, guard, &mut |part| {
        let mut count = |owner, slot_count| *counts.entry(owner).or_default() += slot_count;
        match part {
            Part::Uniform { owner, slot_count } => count(owner, slot_count),
            Part::Leaf { body, slot_count } => body.count_owners(0, slot_count, &mut count),
        }
    })?;
    counts.remove(&HOLE);
    Ok(counts)
}

/// Bytes of all nodes of a tree.
pub(crate) fn memory_bytes(root: &Link, guard: &Guard) -> u64 {
    match root.load(guard) {
        Child::Uniform(_) => 0,
        Child::Leaf(leaf) => leaf.memory_bytes(guard),
        Child::Inner(inner) => {
            let below: u64 = inner.children.iter().map(|link| memory_bytes(link, guard)).sum();
            crate::node::Inner::memory_bytes() + below
        }
    }
}

enum Part<'a> {
    Uniform {
        owner: u32,
        slot_count: u64,
    },
    /// The first `slot_count` slots of a leaf.
    Leaf {
        body: &'a crate::leaf_body::Body,
        slot_count: usize,
    },
}

/// Visits all below `slot_limit` without filling the cache.
fn scan(root: &Link, slot_limit: u64, guard: &Guard, visit: &mut dyn FnMut(Part<'_>)) -> Result<()> {
    let slot_limit = slot_limit.min(MAP_SLOTS);
    if slot_limit == 0 {
        return Ok(());
    }
    scan_child(root, ROOT_LEVEL, 0, slot_limit, guard, visit)
}

fn scan_child(link: &Link, level: u8, base: u64, slot_limit: u64, guard: &Guard, visit: &mut dyn FnMut(Part<'_>)) -> Result<()> {
    let slot_count = span(level).min(slot_limit - base);
    match link.load(guard) {
        Child::Uniform(owner) => visit(Part::Uniform { owner, slot_count }),
        Child::Leaf(leaf) => visit(Part::Leaf { body: &*leaf.view(guard)?, slot_count: slot_count as usize }),
        Child::Inner(inner) => {
            for index in child_indices(level, base, &(base..slot_limit)) {
                let child_base = base + index as u64 * span(level - 1);
                scan_child(&inner.children[index], level - 1, child_base, slot_limit, guard, visit)?;
            }
        }
    }
    Ok(())
}
