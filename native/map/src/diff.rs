//! The difference of two maps: one walk over both, which skips what they share.
use crate::link::{Child, Link};
use crate::node::{ROOT_LEVEL, span};
use crate::walk::child_indices;
use crate::{FrozenMap, MAP_SLOTS, Result, Run};
use crossbeam_epoch::Guard;

/// See `FrozenMap::diff`.
pub(crate) fn diff(new: &FrozenMap, old: &FrozenMap, slot_limit: u64, emit: &mut dyn FnMut(Run, u32)) -> Result<()> {
    // Parts of one run come out of several leaves; they are put together before they are handed on.
    let mut pending: Option<(Run, u32)> = None;
    compare(&new.root, &old.root, slot_limit, &mut |difference| {
        let Difference::Owner { start_slot, slot_count, new_owner, old_owner } = difference else { return };
        match &mut pending {
            Some((run, pending_old_owner))
                if run.start_slot + run.slot_count == start_slot && run.owner == new_owner && *pending_old_owner == old_owner =>
            {
                run.slot_count += slot_count;
            }
            _ => {
                if let Some((run, old_owner)) = pending.replace((Run { start_slot, slot_count, owner: new_owner }, old_owner)) {
                    emit(run, old_owner);
                }
            }
        }
    })?;
    if let Some((run, old_owner)) = pending {
        emit(run, old_owner);
    }
    Ok(())
}

/// What `compare` finds.
pub(crate) enum Difference {
    /// Slots whose owner differs, ascending.
    Owner { start_slot: u64, slot_count: u64, new_owner: u32, old_owner: u32 },
    /// A persisted page that the old tree has and the new one does not.
    OldPage { page_id: u64 },
}

/// Compares two trees below `slot_limit`. A subtree that is the same node, or the same page, in both is skipped.
pub(crate) fn compare(new: &Link, old: &Link, slot_limit: u64, report: &mut dyn FnMut(Difference)) -> Result<()> {
    let slot_limit = slot_limit.min(MAP_SLOTS);
    if slot_limit == 0 {
        return Ok(());
    }
    let guard = crossbeam_epoch::pin();
    Comparison { slot_limit, guard: &guard }.children(new.load(&guard), old.load(&guard), ROOT_LEVEL, 0, report)
}

struct Comparison<'g> {
    slot_limit: u64,
    guard: &'g Guard,
}

impl Comparison<'_> {
    fn children(&self, new: Child<'_>, old: Child<'_>, level: u8, base: u64, report: &mut dyn FnMut(Difference)) -> Result<()> {
        if is_same(new, old) {
            return Ok(());
        }
        if let Some((page_id, _)) = page(old) {
            report(Difference::OldPage { page_id });
        }
        if matches!(new, Child::Inner(_)) || matches!(old, Child::Inner(_)) {
            for index in child_indices(level, base, &(base..self.slot_limit)) {
                let child_base = base + index as u64 * span(level - 1);
                self.children(self.child(new, index), self.child(old, index), level - 1, child_base, report)?;
            }
            return Ok(());
        }
        self.slots(new, old, base, span(level).min(self.slot_limit - base), report)
    }

    fn child<'a>(&'a self, parent: Child<'a>, index: usize) -> Child<'a> {
        match parent {
            Child::Inner(inner) => inner.children[index].load(self.guard),
            // A uniform subtree: what it stands for has the same owner at every level.
            other => other,
        }
    }

    /// Compares leaves and uniform stretches; at most one stretch is longer than a leaf, and then both are uniform.
    fn slots(&self, new: Child<'_>, old: Child<'_>, base: u64, slot_count: u64, report: &mut dyn FnMut(Difference)) -> Result<()> {
        let new = Stretch::of(new, self.guard)?;
        let old = Stretch::of(old, self.guard)?;
        let mut slot = 0;
        while slot < slot_count {
            let (new_owner, new_end) = new.run_at(slot, slot_count);
            let (old_owner, old_end) = old.run_at(slot, slot_count);
            let end = new_end.min(old_end);
            if new_owner != old_owner {
                report(Difference::Owner { start_slot: base + slot, slot_count: end - slot, new_owner, old_owner });
            }
            slot = end;
        }
        Ok(())
    }
}

enum Stretch<'g> {
    Uniform(u32),
    Leaf(crate::node::BodyView<'g>),
}

impl<'g> Stretch<'g> {
    fn of(child: Child<'g>, guard: &'g Guard) -> Result<Stretch<'g>> {
        match child {
            Child::Uniform(owner) => Ok(Stretch::Uniform(owner)),
            Child::Leaf(leaf) => leaf.view(guard).map(Stretch::Leaf),
            Child::Inner(_) => unreachable!("inner nodes are compared child by child"),
        }
    }

    fn run_at(&self, slot: u64, end: u64) -> (u32, u64) {
        match self {
            Stretch::Uniform(owner) => (*owner, end),
            Stretch::Leaf(body) => {
                let (owner, run_end) = body.run_at(slot as usize, end as usize);
                (owner, run_end as u64)
            }
        }
    }
}

fn page(child: Child<'_>) -> Option<(u64, u32)> {
    match child {
        Child::Uniform(_) => None,
        Child::Inner(inner) => inner.page(),
        Child::Leaf(leaf) => leaf.page(),
    }
}

fn is_same(new: Child<'_>, old: Child<'_>) -> bool {
    match (new, old) {
        (Child::Uniform(new), Child::Uniform(old)) => new == old,
        (Child::Inner(new), Child::Inner(old)) => std::ptr::eq(new, old) || (new.page().is_some() && new.page() == old.page()),
        (Child::Leaf(new), Child::Leaf(old)) => std::ptr::eq(new, old) || (new.page().is_some() && new.page() == old.page()),
        _ => false,
    }
}
