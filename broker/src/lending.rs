//! Loans: the segments that the leader, by the leader allocator, has given to other brokers.
//!
//! A broker writes the owner entry of a segment after it got the segment, and empties the entry before it gives the
//! segment back. So a segment that stays in use and without an owner is lost: an answer did not arrive, or its broker
//! died in between.

use embarcadero_cxl::owner::{SegmentUse, read_owner};
use embarcadero_cxl::segment::{PoolError, SegmentAllocator, taken_segments};
use embarcadero_cxl::{Native, Region, Row};
use embarcadero_wire::BrokerId;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

/// Rounds of [`Lending::collect`] after which a segment without an owner is lost. A call and what follows it take much
/// less, while no process stands still.
const LOST_AFTER: u32 = 10;

/// Reason why a segment is not taken back.
#[derive(Debug, thiserror::Error)]
pub(crate) enum LendingError {
    /// The region has no such segment.
    #[error("segment is {segment}; the region has {segments}")]
    NoSuchSegment {
        /// Number of the segment.
        segment: u32,
        /// Segments of the region.
        segments: u32,
    },
    /// The owner entry says that the segment is in use, or cannot be read.
    #[error("segment {0} has an owner")]
    Owned(u32),
    /// This leader did not lend the segment to the broker.
    #[error("segment {segment} was not lent to broker {broker}")]
    NotLent {
        /// Number of the segment.
        segment: u32,
        /// Broker that wants to give it back.
        broker: BrokerId,
    },
    /// The allocator does not take it back.
    #[error(transparent)]
    Pool(#[from] PoolError),
}

/// Segments of a leader's pool that others have.
pub(crate) struct Lending {
    region: Region<Native>,
    pool: Arc<dyn SegmentAllocator>,
    notes: Mutex<Notes>,
}

/// Notes of a leader about segments in use.
#[derive(Default)]
struct Notes {
    /// Segments that were in use when this leader began: it does not know who has them.
    before: BTreeSet<u32>,
    /// Segments that this leader lent, and to whom.
    lent: BTreeMap<u32, BrokerId>,
    /// Rounds in which each segment was found in use and without an owner.
    unowned: BTreeMap<u32, u32>,
}

impl Notes {
    /// Returns true if `broker` may have the segment.
    fn may_have(&self, segment: u32, broker: BrokerId) -> bool {
        self.lent.get(&segment).map_or(self.before.contains(&segment), |borrower| *borrower == broker)
    }

    /// Counts a round in which the segments `unowned` were found. Returns those that are lost.
    fn count(&mut self, unowned: impl Iterator<Item = u32>) -> Vec<u32> {
        let before = std::mem::take(&mut self.unowned);
        self.unowned = unowned.map(|segment| (segment, before.get(&segment).map_or(1, |rounds| rounds + 1))).collect();
        self.unowned.iter().filter(|(_, rounds)| **rounds > LOST_AFTER).map(|(segment, _)| *segment).collect()
    }

    fn forget(&mut self, segment: u32) {
        self.before.remove(&segment);
        self.lent.remove(&segment);
        self.unowned.remove(&segment);
    }
}

/// Returns true if an owner entry says that nobody uses the segment. One that is half written is being changed.
fn is_unowned(owner: &Row<SegmentUse>) -> bool {
    matches!(owner, Row::Unused | Row::Used(SegmentUse::Free))
}

impl Lending {
    /// Returns the notes of a leader that begins to lead. Its segments come from `pool`.
    pub(crate) fn new(region: Region<Native>, pool: Arc<dyn SegmentAllocator>) -> Self {
        let notes = Mutex::new(Notes { before: taken_segments(&region), ..Notes::default() });
        Self { region, pool, notes }
    }

    fn notes(&self) -> MutexGuard<'_, Notes> {
        self.notes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a segment from the pool for a broker.
    ///
    /// # Errors
    /// Those of [`SegmentAllocator::allocate`].
    pub(crate) fn lend(&self, broker: BrokerId) -> Result<u32, PoolError> {
        let mut notes = self.notes();
        let segment = self.pool.allocate()?;
        notes.forget(segment);
        notes.lent.insert(segment, broker);
        Ok(segment)
    }

    /// Gives a segment back to the pool for the broker that has it.
    ///
    /// # Errors
    /// [`LendingError`]. The segment stays in use then.
    pub(crate) fn take_back(&self, segment: u32, broker: BrokerId) -> Result<(), LendingError> {
        let segments = self.region.geometry().segment_count;
        if segment >= segments {
            return Err(LendingError::NoSuchSegment { segment, segments });
        }
        let mut notes = self.notes();
        if !notes.may_have(segment, broker) {
            return Err(LendingError::NotLent { segment, broker });
        }
        if !is_unowned(&read_owner(&self.region, segment)) {
            return Err(LendingError::Owned(segment));
        }
        self.pool.release(segment)?;
        notes.forget(segment);
        Ok(())
    }

    /// Gives back lost segments. Call it about once a second. `certain` tells that no broker stands still: one that does
    /// may be about to use a segment that it was given.
    pub(crate) fn collect(&self, certain: bool) {
        let mut notes = self.notes();
        if !certain {
            notes.unowned.clear();
            return;
        }
        let taken = taken_segments(&self.region).into_iter();
        let lost = notes.count(taken.filter(|segment| is_unowned(&read_owner(&self.region, *segment))));
        for segment in lost {
            match self.pool.release(segment) {
                Ok(()) => tracing::warn!(segment, "nobody has the segment: it goes back to the pool"),
                Err(error) => tracing::error!(segment, %error, "a lost segment could not be returned"),
            }
            notes.forget(segment);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topics::tests::region_with;
    use embarcadero_cxl::layout::AllocatorKind;
    use embarcadero_cxl::owner::publish_owner;
    use embarcadero_cxl::segment::{PartitionAllocator, free_segments};
    use embarcadero_wire::{Incarnation, TopicId};

    const OWNER: BrokerId = BrokerId(1);

    fn used() -> SegmentUse {
        SegmentUse::Blog { topic: TopicId(0), incarnation: Incarnation(1), broker: OWNER, ordinal: 0 }
    }

    /// Region of two segments, one of which was in use before the leader began.
    fn lending() -> (Region<Native>, Lending) {
        let region = region_with(AllocatorKind::Leader);
        let pool = Arc::new(PartitionAllocator::of_leader(region.clone()));
        assert_eq!(pool.allocate().unwrap(), 0);
        let lending = Lending::new(region.clone(), pool);
        (region, lending)
    }

    #[test]
    fn a_segment_is_taken_back_from_its_borrower_alone_and_without_an_owner() {
        let (region, lending) = lending();
        let other = BrokerId(0);
        assert_eq!(lending.lend(OWNER).unwrap(), 1);
        assert!(matches!(lending.take_back(2, OWNER), Err(LendingError::NoSuchSegment { segments: 2, .. })));
        assert!(matches!(lending.take_back(u32::MAX, OWNER), Err(LendingError::NoSuchSegment { .. })));
        for segment in [0, 1] {
            publish_owner(&region, segment, used());
            assert!(matches!(lending.take_back(segment, OWNER), Err(LendingError::Owned(_))));
            publish_owner(&region, segment, SegmentUse::Free);
        }
        assert!(matches!(lending.take_back(1, other), Err(LendingError::NotLent { segment: 1, .. })));
        assert_eq!(free_segments(&region), 0);
        lending.take_back(1, OWNER).unwrap();
        assert!(matches!(lending.take_back(1, OWNER), Err(LendingError::NotLent { .. })), "it was given back twice");
        // An earlier leader lent it, nobody knows to whom.
        lending.take_back(0, other).unwrap();
        assert_eq!(free_segments(&region), 2);
    }

    #[test]
    fn a_segment_that_stays_without_an_owner_goes_back_to_the_pool() {
        let (region, lending) = lending();
        // The answer with segment 1 was lost, and segment 0 is in use.
        assert_eq!(lending.lend(OWNER).unwrap(), 1);
        publish_owner(&region, 0, used());
        (0..LOST_AFTER).for_each(|_| lending.collect(true));
        assert_eq!(free_segments(&region), 0, "its broker may be about to use it");
        // A broker stands still: what was seen before it does says nothing.
        lending.collect(false);
        (0..LOST_AFTER).for_each(|_| lending.collect(true));
        assert_eq!(free_segments(&region), 0);
        lending.collect(true);
        assert_eq!(free_segments(&region), 1);
        assert_eq!(lending.lend(BrokerId(0)).unwrap(), 1);
        publish_owner(&region, 1, used());
        (0..2 * LOST_AFTER).for_each(|_| lending.collect(true));
        assert_eq!(free_segments(&region), 0);
    }
}
