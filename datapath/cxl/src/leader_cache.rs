//! The leader that a process saw last, so that readers need not look for it before every read.

use crate::layout::LeaderArea;
use embarcadero_wire::{BrokerId, Term};
use std::sync::atomic::{AtomicU64, Ordering};

/// Term that is active: its number, and the area of the leader that writes under it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ActiveTerm {
    pub(crate) term: Term,
    pub(crate) area: LeaderArea,
}

/// Active term, as this process saw it last. Shared by all threads.
#[derive(Debug, Default)]
pub(crate) struct LeaderCache {
    /// Term, shifted left by 8, with the broker's id in the lowest byte; 0 for none.
    packed: AtomicU64,
}

impl LeaderCache {
    /// Returns the term that was seen last; `None` before the first.
    pub(crate) fn get(&self) -> Option<ActiveTerm> {
        let packed = self.packed.load(Ordering::Relaxed);
        let area = LeaderArea(BrokerId::from(packed as u8));
        (packed != 0).then_some(ActiveTerm { term: Term(packed >> 8), area })
    }

    /// Remembers the term that was seen now.
    pub(crate) fn set(&self, ActiveTerm { term, area }: ActiveTerm) {
        self.packed.store(term.0 << 8 | u64::from(area.0.byte()), Ordering::Relaxed);
    }

    /// Number that changes with the leader. Equal numbers mean the same leader.
    #[inline]
    pub(crate) fn version(&self) -> u64 {
        self.packed.load(Ordering::Relaxed)
    }
}
