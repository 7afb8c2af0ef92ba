//! One bitmap for all brokers, on a coherent fabric.

use super::{PoolError, SegmentAllocator, SegmentCount, segments_of, valid_bits};
use crate::fabric::CoherentFabric;
use crate::layout::SEGMENTS_PER_WORD;
use crate::region::Region;
use embarcadero_wire::BrokerId;
use std::cell::Cell;

/// Allocator over one bitmap that every broker changes atomically.
///
/// A thread begins its search at the word where it last found a segment, so threads drift apart.
pub struct BitmapAllocator<F> {
    region: Region<F>,
}

thread_local! {
    static HINT: Cell<u32> = const { Cell::new(0) };
}

impl<F: CoherentFabric> BitmapAllocator<F> {
    /// Returns the allocator over a region's bitmap.
    pub fn new(region: Region<F>) -> Self {
        Self { region }
    }

    fn segments(&self) -> u32 {
        self.region.geometry().segment_count
    }
}

impl<F: CoherentFabric> SegmentAllocator for BitmapAllocator<F> {
    fn allocate(&self) -> Result<u32, PoolError> {
        let fabric = self.region.fabric();
        let words = self.segments().div_ceil(SEGMENTS_PER_WORD);
        let hint = HINT.get() % words;
        for step in 0..words {
            let word = (hint + step) % words;
            let valid = valid_bits(self.segments(), word);
            let mut free = !fabric.load(self.region.layout().bitmap_word(word)) & valid;
            while free != 0 {
                let bit = free & free.wrapping_neg();
                // SYNC: acquires what `release` ordered before the bit went to zero.
                let before = fabric.fetch_or(self.region.layout().bitmap_word(word), bit);
                if before & bit == 0 {
                    HINT.set(word);
                    return Ok(word * SEGMENTS_PER_WORD + bit.trailing_zeros());
                }
                free = !before & valid & !bit;
            }
        }
        Err(PoolError::Exhausted { segments: self.segments() })
    }

    fn release(&self, segment: u32) -> Result<(), PoolError> {
        if segment >= self.segments() {
            return Err(PoolError::NotAllocated { segment });
        }
        let bit = 1u64 << (segment % SEGMENTS_PER_WORD);
        // SYNC: releases the last use of the segment to whoever allocates it next.
        let before =
            self.region.fabric().fetch_and(self.region.layout().bitmap_word(segment / SEGMENTS_PER_WORD), !bit);
        if before & bit == 0 { Err(PoolError::NotAllocated { segment }) } else { Ok(()) }
    }

    fn count(&self) -> SegmentCount {
        segments_of(&self.region, BrokerId(0))
    }
}
