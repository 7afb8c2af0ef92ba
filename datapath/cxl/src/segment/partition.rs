//! One bitmap per writer, for memory without coherence.

use super::{PoolError, SegmentAllocator, SegmentCount, valid_bits};
use crate::fabric::{Fabric, RegionOffset, WORD_BYTES};
use crate::layout::SEGMENTS_PER_WORD;
use crate::region::Region;
use crate::site::Site;
use embarcadero_wire::BrokerId;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

/// Allocator over a bitmap that one broker writes: its partition of the segments, or (the leader allocator) all.
pub struct PartitionAllocator<F> {
    region: Region<F>,
    segments: Range<u32>,
    at: RegionOffset,
    /// This broker's copy of the bitmap. Threads of the broker take turns.
    bits: Mutex<Vec<u64>>,
}

impl<F: Fabric> PartitionAllocator<F> {
    /// Returns the allocator over a broker's partition.
    pub fn of_broker(region: Region<F>, broker: BrokerId) -> Self {
        let (at, segments) = (region.layout().partition_word(broker, 0), region.geometry().partition(broker));
        Self::new(region, segments, at)
    }

    /// Returns the allocator over all segments: the leader's side of the leader allocator.
    pub fn of_leader(region: Region<F>) -> Self {
        let at = region.layout().bitmap_word(0);
        let segments = 0..region.geometry().segment_count;
        Self::new(region, segments, at)
    }

    fn new(region: Region<F>, segments: Range<u32>, at: RegionOffset) -> Self {
        let words = (segments.end - segments.start).div_ceil(SEGMENTS_PER_WORD);
        // SYNC: an earlier process under this broker id flushed what it had allocated.
        let word = |word| region.fabric().observe(at.add(u64::from(word) * WORD_BYTES), Site::BitmapRead);
        let bits = (0..words).map(word).collect();
        Self { region, segments, at, bits: Mutex::new(bits) }
    }

    fn write(&self, word: usize, bits: u64) {
        let at = self.at.add(word as u64 * WORD_BYTES);
        self.region.fabric().store(at, bits);
        self.region.fabric().flush(at, WORD_BYTES, Site::BitmapFlush);
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
                return Ok(self.segments.start + word as u32 * SEGMENTS_PER_WORD + bit);
            }
        }
        Err(PoolError::Exhausted { segments: count })
    }

    fn release(&self, segment: u32) -> Result<(), PoolError> {
        let mut bits = self.bits.lock().unwrap_or_else(PoisonError::into_inner);
        let index = segment.wrapping_sub(self.segments.start);
        let bit = 1u64 << (index % SEGMENTS_PER_WORD);
        match bits.get_mut((index / SEGMENTS_PER_WORD) as usize) {
            Some(value) if self.segments.contains(&segment) && *value & bit != 0 => {
                *value &= !bit;
                self.write((index / SEGMENTS_PER_WORD) as usize, *value);
                Ok(())
            }
            _ => Err(PoolError::NotAllocated { segment }),
        }
    }

    fn count(&self) -> SegmentCount {
        let bits = self.bits.lock().unwrap_or_else(PoisonError::into_inner);
        let all = self.segments.len() as u32;
        let free = |(word, value): (usize, &u64)| (!*value & valid_bits(all, word as u32)).count_ones();
        SegmentCount { free: bits.iter().enumerate().map(free).sum(), all }
    }
}
