//! `[[DEVIATION_005]]` The pool of segments that logs and order indexes share.
//!
//! The paper gives each broker one contiguous log. Here a log is a chain of segments from one pool, and
//! three allocators stand behind [`SegmentAllocator`]: one atomic bitmap (coherent fabrics), a bitmap partition for
//! each broker (no coherence needed), and the leader by RPC (the broker crate implements the caller's side).

use crate::fabric::{CoherentFabric, Fabric, RegionOffset, Site};
use crate::layout::{AllocatorKind, Layout, OwnerLine};
use crate::region::Region;
use bytemuck::Zeroable;
use embarcadero_wire::{BrokerId, Incarnation, Stream, TopicId};
use serde::Serialize;
use std::cell::Cell;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Why no segment was had.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PoolError {
    /// All segments that this broker may take are in use.
    #[error(
        "segment pool exhausted: all {segments} segments are in use; let retention trim, delete a topic, or create a larger region"
    )]
    Exhausted {
        /// Segments that the allocator looks after.
        segments: u32,
    },
    /// The segment was not allocated, or belongs to another.
    #[error("segment {segment} is not this allocator's to release")]
    NotAllocated {
        /// Which.
        segment: u32,
    },
    /// The leader did not answer.
    #[error("the leader allocator did not answer: {0}")]
    Unreachable(String),
}

/// Hands out segments of a region. Slow path: called once a segment.
pub trait SegmentAllocator: Send + Sync {
    /// Takes a free segment.
    ///
    /// # Errors
    /// [`PoolError::Exhausted`] when there is none.
    fn allocate(&self) -> Result<u32, PoolError>;

    /// Gives one back.
    ///
    /// # Errors
    /// [`PoolError::NotAllocated`] when it was not out.
    fn release(&self, segment: u32) -> Result<(), PoolError>;
}

/// One bitmap for all brokers, on a coherent fabric.
///
/// A thread starts looking at the word where it last found something, so threads drift apart.
pub struct BitmapAllocator<F> {
    region: Region<F>,
}

thread_local! {
    static HINT: Cell<u32> = const { Cell::new(0) };
}

impl<F: CoherentFabric> BitmapAllocator<F> {
    /// The allocator over a region's bitmap.
    pub fn new(region: Region<F>) -> Self {
        Self { region }
    }

    fn words(&self) -> u32 {
        self.region.geometry().segment_count.div_ceil(64)
    }

    fn valid_bits(&self, word: u32) -> u64 {
        valid_bits(self.region.geometry().segment_count, word)
    }

    fn at(&self, word: u32) -> RegionOffset {
        RegionOffset(self.region.layout().bitmap + u64::from(word) * 8)
    }
}

/// Bits of a bitmap word that stand for segments.
const fn valid_bits(segments: u32, word: u32) -> u64 {
    let left = segments - word * 64;
    if left >= 64 { u64::MAX } else { (1 << left) - 1 }
}

impl<F: CoherentFabric> SegmentAllocator for BitmapAllocator<F> {
    fn allocate(&self) -> Result<u32, PoolError> {
        let fabric = self.region.fabric();
        let words = self.words();
        let hint = HINT.get() % words;
        for step in 0..words {
            let word = (hint + step) % words;
            let valid = self.valid_bits(word);
            let mut free = !fabric.load(self.at(word)) & valid;
            while free != 0 {
                let bit = free & free.wrapping_neg();
                // SYNC: acquires what `release` ordered before the bit went to zero.
                let before = fabric.fetch_or(self.at(word), bit);
                if before & bit == 0 {
                    HINT.set(word);
                    return Ok(word * 64 + bit.trailing_zeros());
                }
                free = !before & valid & !bit;
            }
        }
        Err(PoolError::Exhausted { segments: self.region.geometry().segment_count })
    }

    fn release(&self, segment: u32) -> Result<(), PoolError> {
        if segment >= self.region.geometry().segment_count {
            return Err(PoolError::NotAllocated { segment });
        }
        let bit = 1u64 << (segment % 64);
        // SYNC: releases the last use of the segment to whoever allocates it next.
        let before = self.region.fabric().fetch_and(self.at(segment / 64), !bit);
        if before & bit == 0 { Err(PoolError::NotAllocated { segment }) } else { Ok(()) }
    }
}

/// A bitmap that one broker writes: its partition of the segments, or (at the leader, for the leader allocator) all.
pub struct PartitionAllocator<F> {
    region: Region<F>,
    segments: Range<u32>,
    at: RegionOffset,
    /// This broker's copy of its bitmap; threads of the broker take turns.
    bits: Mutex<Vec<u64>>,
}

impl<F: Fabric> PartitionAllocator<F> {
    /// The partition of `broker`.
    pub fn of_broker(region: Region<F>, broker: BrokerId) -> Self {
        let geometry = *region.geometry();
        let size = geometry.partition_segments();
        let first = (broker.0 * size).min(geometry.segment_count);
        let at = RegionOffset(region.layout().bitmap + u64::from(broker.0) * Layout::partition_bytes(&geometry));
        Self::new(region, first..(first + size).min(geometry.segment_count), at)
    }

    /// All segments: the leader's own side.
    pub fn of_leader(region: Region<F>) -> Self {
        let at = RegionOffset(region.layout().bitmap);
        let segments = 0..region.geometry().segment_count;
        Self::new(region, segments, at)
    }

    fn new(region: Region<F>, segments: Range<u32>, at: RegionOffset) -> Self {
        let words = u64::from(segments.len() as u32).div_ceil(64);
        // SYNC: an earlier process under this broker id flushed what it had allocated.
        let bits = (0..words).map(|word| region.fabric().observe(at.add(word * 8), Site::BitmapRead)).collect();
        Self { region, segments, at, bits: Mutex::new(bits) }
    }

    fn write(&self, word: usize, bits: u64) {
        let at = self.at.add(word as u64 * 8);
        self.region.fabric().store(at, bits);
        self.region.fabric().flush(at, 8, Site::BitmapFlush);
        self.region.fabric().fence(Site::BitmapFlush);
    }
}

impl<F: Fabric> SegmentAllocator for PartitionAllocator<F> {
    fn allocate(&self) -> Result<u32, PoolError> {
        let mut bits = self.bits.lock().unwrap_or_else(PoisonError::into_inner);
        let count = self.segments.len() as u32;
        for (word, value) in bits.iter_mut().enumerate() {
            let free = !*value & valid_bits(count, word as u32);
            if free != 0 {
                let bit = free.trailing_zeros();
                *value |= 1 << bit;
                self.write(word, *value);
                return Ok(self.segments.start + word as u32 * 64 + bit);
            }
        }
        Err(PoolError::Exhausted { segments: count })
    }

    fn release(&self, segment: u32) -> Result<(), PoolError> {
        let mut bits = self.bits.lock().unwrap_or_else(PoisonError::into_inner);
        let index = segment.wrapping_sub(self.segments.start);
        let bit = 1u64 << (index % 64);
        match bits.get_mut(index as usize / 64) {
            Some(value) if self.segments.contains(&segment) && *value & bit != 0 => {
                *value &= !bit;
                self.write(index as usize / 64, *value);
                Ok(())
            }
            _ => Err(PoolError::NotAllocated { segment }),
        }
    }
}

/// What a segment is used for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(tag = "use", rename_all = "lowercase")]
pub enum SegmentUse {
    /// In the pool.
    Free,
    /// Batches that a broker received.
    Blog {
        /// Topic slot.
        topic: TopicId,
        /// Incarnation of the topic.
        incarnation: Incarnation,
        /// Receiving broker.
        broker: BrokerId,
        /// Position in the chain.
        ordinal: u64,
    },
    /// Entries of an order index.
    Index {
        /// Topic slot.
        topic: TopicId,
        /// Incarnation of the topic.
        incarnation: Incarnation,
        /// Stream.
        stream: Stream,
        /// Position in the index.
        ordinal: u64,
        /// Broker that took it from the pool, and alone may give it back.
        holder: BrokerId,
    },
}

/// The number of a stream in an owner line: that of its broker, or one past the last broker's for the global one.
fn stream_number<F: Fabric>(region: &Region<F>, stream: Stream) -> u32 {
    stream.broker().map_or(region.geometry().max_brokers, |broker| broker.0)
}

/// The stream of a number in an owner line.
fn numbered_stream<F: Fabric>(region: &Region<F>, number: u32) -> Stream {
    if number == region.geometry().max_brokers { Stream::GLOBAL } else { Stream::of(BrokerId(number)) }
}

/// Says who holds a segment, for inspection and for the holder's next incarnation.
pub fn publish_owner<F: Fabric>(region: &Region<F>, segment: u32, owner: SegmentUse) {
    let line = match owner {
        SegmentUse::Free => OwnerLine::zeroed(),
        SegmentUse::Blog { topic, incarnation, broker, ordinal } => OwnerLine {
            kind: 1,
            topic,
            broker: broker.0,
            topic_incarnation: incarnation,
            ordinal,
            holder: broker,
            ..OwnerLine::zeroed()
        },
        SegmentUse::Index { topic, incarnation, stream, ordinal, holder } => {
            let (kind, broker, topic_incarnation) = (2, stream_number(region, stream), incarnation);
            OwnerLine { kind, topic, broker, topic_incarnation, ordinal, holder, ..OwnerLine::zeroed() }
        }
    };
    region.fabric().publish_versioned(region.layout().owner(segment), &line, Site::OwnerFlush);
}

/// Who holds a segment.
pub fn read_owner<F: Fabric>(region: &Region<F>, segment: u32) -> SegmentUse {
    let read =
        region.fabric().observe_versioned::<OwnerLine, ()>(region.layout().owner(segment), Site::OwnerRead, |_| ());
    match read {
        Some((line, ())) if line.kind == 1 => SegmentUse::Blog {
            topic: line.topic,
            incarnation: line.topic_incarnation,
            broker: BrokerId(line.broker),
            ordinal: line.ordinal,
        },
        Some((line, ())) if line.kind == 2 => SegmentUse::Index {
            topic: line.topic,
            incarnation: line.topic_incarnation,
            stream: numbered_stream(region, line.broker),
            ordinal: line.ordinal,
            holder: line.holder,
        },
        _ => SegmentUse::Free,
    }
}

/// Segments that are in nobody's hands.
pub fn free_segments<F: Fabric>(region: &Region<F>) -> u32 {
    let geometry = region.geometry();
    let words_of = |at: u64, count: u32| -> u32 {
        (0..count.div_ceil(64))
            .map(|word| {
                let bits = region.fabric().observe(RegionOffset(at + u64::from(word) * 8), Site::BitmapRead);
                (!bits & valid_bits(count, word)).count_ones()
            })
            .sum()
    };
    if geometry.allocator == AllocatorKind::Partitioned {
        let size = geometry.partition_segments();
        (0..geometry.max_brokers)
            .map(|broker| {
                let first = (broker * size).min(geometry.segment_count);
                let count = size.min(geometry.segment_count - first);
                words_of(region.layout().bitmap + u64::from(broker) * Layout::partition_bytes(geometry), count)
            })
            .sum()
    } else {
        words_of(region.layout().bitmap, geometry.segment_count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::FlushMethod;
    use crate::layout::{Geometry, RegionRole};
    use crate::{Mapping, Native};
    use std::collections::BTreeSet;
    use uuid::Uuid;

    fn region(segments: u32, allocator: AllocatorKind) -> Region<Native> {
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

    /// What every allocator must do.
    fn conformance(allocator: &dyn SegmentAllocator, mine: &BTreeSet<u32>) {
        let mut taken = BTreeSet::new();
        for _ in mine {
            assert!(taken.insert(allocator.allocate().unwrap()), "a segment was handed out twice");
        }
        assert_eq!(&taken, mine);
        assert!(matches!(allocator.allocate(), Err(PoolError::Exhausted { .. })));
        let one = *taken.first().unwrap();
        allocator.release(one).unwrap();
        assert_eq!(allocator.release(one), Err(PoolError::NotAllocated { segment: one }));
        assert_eq!(allocator.allocate(), Ok(one));
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
            conformance(&PartitionAllocator::of_leader(leader), &(0..segments).collect());

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
