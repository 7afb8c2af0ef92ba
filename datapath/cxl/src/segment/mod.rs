//! Segment pool, which logs and order indexes share.
//!
//! A log is a chain of segments from the pool. Three allocators implement [`SegmentAllocator`]:
//!
//! - one atomic bitmap, for coherent fabrics;
//! - a bitmap partition per broker, for memory without coherence;
//! - the leader by RPC, whose caller's side is in the broker crate.

// [[DEVIATION_005]] The paper gives each broker one contiguous log.

mod bitmap;
mod partition;

pub use bitmap::BitmapAllocator;
pub use partition::PartitionAllocator;

use crate::fabric::{Fabric, RegionOffset};
use crate::layout::{AllocatorKind, SEGMENTS_PER_WORD};
use crate::leadership::NoLeader;
use crate::region::Region;
use crate::row::Damage;
use crate::site::Site;
use embarcadero_wire::BrokerId;
use std::collections::BTreeSet;
use std::error::Error;

/// Reason why an allocator gave no segment, or took none back.
#[derive(Debug, thiserror::Error)]
pub enum PoolError {
    /// All segments that this broker may take are in use.
    #[error(
        "segment pool exhausted: all {segments} segments are in use; let retention trim, delete a topic, or create a larger region"
    )]
    Exhausted {
        /// Segments that the allocator hands out.
        segments: u32,
    },
    /// The segment was not allocated, or belongs to another allocator.
    #[error("segment {segment} is not this allocator's to release")]
    NotAllocated {
        /// Number of the segment.
        segment: u32,
    },
    /// Nobody leads, so nobody gives out segments.
    #[error("the leader allocator cannot be asked: {0}")]
    NoLeader(#[from] NoLeader),
    /// The region does not tell yet who the leader is, or where.
    #[error("the leader allocator cannot be asked: the leader has not written its address yet")]
    UnknownLeader,
    /// The row that tells who the leader is, or where, is damaged.
    #[error("the leader allocator cannot be asked: {0}")]
    Damaged(#[source] Box<Damage>),
    /// The leader did not answer.
    #[error("the leader allocator did not answer: {0}")]
    Unreachable(#[source] Box<dyn Error + Send + Sync>),
    /// The leader answered with an error.
    #[error("the leader allocator refused: {0}")]
    Refused(#[source] Box<dyn Error + Send + Sync>),
    /// The leader answered with a segment that the region does not have.
    #[error("the leader allocator gave segment {segment}, and the region has {segments}")]
    NoSuchSegment {
        /// Number in the answer.
        segment: u32,
        /// Segments of the region.
        segments: u32,
    },
}

/// Segments of an allocator, as one process sees them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SegmentCount {
    /// Number of segments that are free.
    pub free: u32,
    /// Number of all segments.
    pub all: u32,
}

impl SegmentCount {
    /// Number of segments that batches leave free.
    ///
    /// An order index needs one when it has filled its last, and one after a takeover. It must not wait for memory that
    /// batches hold: none of these is given back before the index has them and goes on.
    #[must_use]
    pub const fn index_reserve(self) -> u32 {
        let share = self.all / 4;
        if share < 2 { share } else { 2 }
    }

    /// Returns true when batches get no more segments.
    #[must_use]
    pub const fn is_short(self) -> bool {
        self.free <= self.index_reserve()
    }
}

/// Allocator of a region's segments. It is called once per segment, not per batch.
pub trait SegmentAllocator: Send + Sync {
    /// Takes a free segment.
    ///
    /// # Errors
    /// [`PoolError::Exhausted`] when there is none. Other errors when the leader gives out segments, and cannot be asked or
    /// does not answer.
    fn allocate(&self) -> Result<u32, PoolError>;

    /// Gives a segment back.
    ///
    /// # Errors
    /// [`PoolError::NotAllocated`] when it was not taken from this allocator. Other errors when the leader gives out
    /// segments, and cannot be asked or does not answer.
    fn release(&self, segment: u32) -> Result<(), PoolError>;

    /// Counts the segments that this allocator gives out.
    fn count(&self) -> SegmentCount;
}

/// Bits of a bitmap word that stand for segments.
const fn valid_bits(segments: u32, word: u32) -> u64 {
    let left = segments - word * SEGMENTS_PER_WORD;
    if left >= SEGMENTS_PER_WORD { u64::MAX } else { (1 << left) - 1 }
}

/// Writes back what an earlier process of this host may have left of a segment in the host's caches when it was killed.
/// Call it before the segment is given back, where another host can get it: with [`AllocatorKind::Leader`].
pub fn flush_left_behind<F: Fabric>(region: &Region<F>, segment: u32) {
    let (geometry, fabric) = (region.geometry(), region.fabric());
    if geometry.allocator == AllocatorKind::Leader && !fabric.is_coherent() {
        fabric.flush(region.layout().segment(segment), geometry.segment_bytes, Site::PayloadFlush);
        // SYNC: before the segment can have another holder; pairs with that holder's first store.
        fabric.fence(Site::PayloadFlush);
    }
}

/// Counts the segments that are free.
pub fn free_segments<F: Fabric>(region: &Region<F>) -> u32 {
    let geometry = region.geometry();
    match geometry.allocator {
        AllocatorKind::Bitmap | AllocatorKind::Leader => segments_of(region, BrokerId(0)).free,
        AllocatorKind::Partitioned => geometry.brokers().map(|broker| segments_of(region, broker).free).sum(),
    }
}

/// Counts the segments that a broker may take.
pub fn segments_of<F: Fabric>(region: &Region<F>, broker: BrokerId) -> SegmentCount {
    let (geometry, layout) = (region.geometry(), region.layout());
    let count = |all: u32, word_at: &dyn Fn(u32) -> RegionOffset| {
        let words = 0..all.div_ceil(SEGMENTS_PER_WORD);
        let zeros = |word| !region.fabric().observe(word_at(word), Site::BitmapRead) & valid_bits(all, word);
        SegmentCount { free: words.map(|word| zeros(word).count_ones()).sum(), all }
    };
    match geometry.allocator {
        AllocatorKind::Bitmap | AllocatorKind::Leader => {
            count(geometry.segment_count, &|word| layout.bitmap_word(word))
        }
        AllocatorKind::Partitioned => {
            count(geometry.partition(broker).len() as u32, &|word| layout.partition_word(broker, word))
        }
    }
}

/// Returns the segments that are in use, where one bitmap has all of them: not with
/// [`AllocatorKind::Partitioned`].
pub fn taken_segments<F: Fabric>(region: &Region<F>) -> BTreeSet<u32> {
    let (segments, layout) = (region.geometry().segment_count, region.layout());
    let words = (0..segments.div_ceil(SEGMENTS_PER_WORD)).flat_map(|word| {
        let bits = region.fabric().observe(layout.bitmap_word(word), Site::BitmapRead) & valid_bits(segments, word);
        let taken = (0..SEGMENTS_PER_WORD).filter(move |bit| bits & 1 << bit != 0);
        taken.map(move |bit| word * SEGMENTS_PER_WORD + bit)
    });
    words.collect()
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::cache::FlushMethod;
    use crate::layout::{Geometry, Layout, RegionRole};
    use crate::{Mapping, Native};
    use uuid::Uuid;

    pub(crate) fn region(segments: u32, allocator: AllocatorKind) -> Region<Native> {
        let geometry = Geometry {
            max_brokers: 4,
            max_leaders: 1,
            max_topics: 1,
            max_sessions: 1,
            batchlog_slots: 16,
            segment_bytes: 1 << 20,
            segment_count: segments,
            allocator,
            role: RegionRole::Single,
        };
        let bytes = Layout::new(&geometry).region_bytes;
        let native = Native::new(Mapping::anonymous(bytes).unwrap(), FlushMethod::None).unwrap();
        Region::format(native, &geometry, Uuid::new_v4(), 0).unwrap()
    }

    /// Checks the behaviour that every allocator must have.
    fn conformance(allocator: &dyn SegmentAllocator, mine: &BTreeSet<u32>) {
        let mut taken = BTreeSet::new();
        for _ in mine {
            assert!(taken.insert(allocator.allocate().unwrap()), "a segment was handed out twice");
        }
        assert_eq!(&taken, mine);
        assert!(matches!(allocator.allocate(), Err(PoolError::Exhausted { .. })));
        let one = *taken.first().unwrap();
        allocator.release(one).unwrap();
        assert!(matches!(allocator.release(one), Err(PoolError::NotAllocated { segment }) if segment == one));
        assert_eq!(allocator.allocate().unwrap(), one);
        assert!(allocator.release(u32::MAX).is_err());
        for segment in taken {
            allocator.release(segment).unwrap();
        }
    }

    #[test]
    fn all_allocators_conform() {
        for segments in [1, 63, 64, 65, 130] {
            let shared = region(segments, AllocatorKind::Bitmap);
            conformance(&BitmapAllocator::new(shared.clone()), &(0..segments).collect());
            assert_eq!(free_segments(&shared), segments);

            let leader = region(segments, AllocatorKind::Leader);
            let pool = PartitionAllocator::of_leader(leader.clone());
            conformance(&pool, &(0..segments).collect());
            let taken: BTreeSet<u32> = (0..segments.min(2)).map(|_| pool.allocate().unwrap()).collect();
            assert_eq!(taken_segments(&leader), taken);

            let split = region(segments, AllocatorKind::Partitioned);
            let size = split.geometry().partition_segments();
            for broker in 0..4 {
                let mine: BTreeSet<u32> =
                    (broker * size..(broker + 1) * size).filter(|segment| *segment < segments).collect();
                if !mine.is_empty() {
                    conformance(&PartitionAllocator::of_broker(split.clone(), BrokerId(broker)), &mine);
                }
            }
            assert_eq!(free_segments(&split), segments);
        }
    }

    #[test]
    fn a_partition_survives_its_process() {
        let shared = region(16, AllocatorKind::Partitioned);
        let first = PartitionAllocator::of_broker(shared.clone(), BrokerId(2));
        let taken = first.allocate().unwrap();
        drop(first);
        let second = PartitionAllocator::of_broker(shared, BrokerId(2));
        assert_ne!(second.allocate().unwrap(), taken);
    }

    #[test]
    fn threads_never_share_a_segment() {
        let shared = region(256, AllocatorKind::Bitmap);
        let taken: Vec<u32> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4)
                .map(|_| {
                    let allocator = BitmapAllocator::new(shared.clone());
                    scope.spawn(move || (0..64).map(|_| allocator.allocate().unwrap()).collect::<Vec<_>>())
                })
                .collect();
            threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
        });
        assert_eq!(taken.iter().collect::<BTreeSet<_>>().len(), 256);
    }
}
