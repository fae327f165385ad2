//! Looks at every page of many roots and goes on after what is wrong, so that all of it can be told at once.
//!
//! Nothing is remembered of how pages hang together, which with thousands of snapshots would be more than the pages themselves.
//! Who wants to know which roots lead to a damaged page walks again, watching for what names it, and so on up to the roots: a
//! tree has four levels.
use crate::codec::{Page, PageWord, decode};
use crate::{MapError, MapErrorCode, Reach, Result, RootRef};
use std::collections::BTreeSet;

/// Faults kept; a catalog with more is not mended page by page.
const FAULTS_MAX: usize = 10_000;

/// A page that names something watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Referrer {
    /// This page names that page.
    OfPage(u64, u64),
    /// This page names that layer.
    OfLayer(u64, u32),
}

/// A walk over the pages of many roots that survives damaged ones.
#[derive(Default)]
pub struct MapCheck {
    reach: Reach,
    faults: Vec<MapError>,
    fault_count: u64,
    watched_pages: BTreeSet<u64>,
    watched_layers: BTreeSet<u32>,
    referrers: BTreeSet<Referrer>,
}

impl MapCheck {
    /// A walk that notes which pages name one of these.
    pub fn watching(pages: impl IntoIterator<Item = u64>, layers: impl IntoIterator<Item = u32>) -> MapCheck {
        MapCheck { watched_pages: pages.into_iter().collect(), watched_layers: layers.into_iter().collect(), ..MapCheck::default() }
    }

    /// Adds a root, over the whole address space. `PageCorrupt` if the word is no root's.
    pub fn add_root(&mut self, root: RootRef) -> Result<()> {
        self.reach.add_root(root, crate::MAP_SLOTS)
    }

    /// Page ids to fetch next, ascending, at most `limit`; empty when done.
    pub fn pending(&self, limit: usize) -> Vec<u64> {
        self.reach.pending(limit)
    }

    /// Gives a page that was pending, `None` if there is none. What is wrong with it becomes a fault.
    pub fn supply(&mut self, page_id: u64, bytes: Option<&[u8]>) {
        let Some(level) = self.reach.pending_level(page_id) else { return };
        let answer = match bytes {
            None => Err(MapError { code: MapErrorCode::PageMissing, page_id, message: "it is not in the catalog".into() }),
            Some(bytes) => self.reach.supply(page_id, bytes).and_then(|()| self.watch(page_id, level, bytes)),
        };
        if let Err(error) = answer {
            self.reach.skip(page_id);
            self.fault_count += 1;
            if self.faults.len() < FAULTS_MAX {
                self.faults.push(error);
            }
        }
    }

    fn watch(&mut self, page_id: u64, level: u8, bytes: &[u8]) -> Result<()> {
        if self.watched_layers.is_empty() && (self.watched_pages.is_empty() || level == 0) {
            return Ok(());
        }
        match decode(page_id, level, bytes)? {
            Page::Inner(words) => {
                for word in words.iter() {
                    match word {
                        PageWord::Page { id, .. } if self.watched_pages.contains(id) => {
                            self.referrers.insert(Referrer::OfPage(page_id, *id));
                        }
                        PageWord::Uniform(owner) if self.watched_layers.contains(owner) => {
                            self.referrers.insert(Referrer::OfLayer(page_id, *owner));
                        }
                        _ => {}
                    }
                }
            }
            Page::Leaf(body) => {
                for owner in body.cover().owners.iter().filter(|owner| self.watched_layers.contains(owner)) {
                    self.referrers.insert(Referrer::OfLayer(page_id, *owner));
                }
            }
        }
        Ok(())
    }

    /// What was wrong, in the order in which it was found; the first ten thousand.
    pub fn faults(&self) -> &[MapError] {
        &self.faults
    }

    /// How many pages were wrong.
    pub fn fault_count(&self) -> u64 {
        self.fault_count
    }

    /// Pages that name what is watched, ascending.
    pub fn referrers(&self) -> impl Iterator<Item = Referrer> + '_ {
        self.referrers.iter().copied()
    }

    /// The slot after the last one of a layer that is referred to, 0 if none is.
    pub fn slot_end(&self, layer: u32) -> u64 {
        self.reach.runs(layer).last().map_or(0, |run| run.start_slot + run.slot_count)
    }

    /// What was reached; not what lies below damaged pages.
    pub fn reach(&self) -> &Reach {
        &self.reach
    }
}
