//! DEV-005: a pool of segments, beside the paper's contiguous logs.

use super::args::DeviationArgs;
use super::comparison::{Better, Comparison};
use crate::sequencer::allocation;
use anyhow::Result;
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::AllocatorKind;
use embarcadero_cxl::segment::{BitmapAllocator, PoolError, SegmentAllocator};
use embarcadero_sim::testbed::region;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

/// Number of topics. The n-th gets 1/n of the bytes of the first.
const TOPICS: usize = 8;
const BATCH_BYTES: u64 = 512 << 10;

/// Seconds to claim space for a batch in a contiguous log.
fn bump() -> f64 {
    let next = AtomicU64::new(0);
    let begun = Instant::now();
    const CLAIMS: u64 = 1 << 20;
    for _ in 0..CLAIMS {
        std::hint::black_box(next.fetch_add(BATCH_BYTES, Ordering::Relaxed));
    }
    begun.elapsed().as_secs_f64() / CLAIMS as f64
}

/// Fills topics in proportion until one finds no room, and returns the part of the memory that is unused then, 0 to 1.
///
/// `claim` finds room for a batch of a topic, and returns false when there is none.
fn unusable(bytes: u64, mut claim: impl FnMut(usize) -> Result<bool, PoolError>) -> Result<f64, PoolError> {
    let mut due = [0.0; TOPICS];
    let mut used = 0;
    loop {
        for (topic, due) in due.iter_mut().enumerate() {
            *due += 1.0 / (topic + 1) as f64;
            while *due >= 1.0 {
                *due -= 1.0;
                if !claim(topic)? {
                    return Ok(1.0 - used as f64 / bytes as f64);
                }
                used += BATCH_BYTES;
            }
        }
    }
}

fn unusable_in_pool() -> Result<f64> {
    let region = region(AllocatorKind::Bitmap, FlushMethod::None, |native| native)?;
    let segment_bytes = region.geometry().segment_bytes;
    let bytes = segment_bytes * u64::from(region.geometry().segment_count);
    let pool = BitmapAllocator::new(region);
    let mut left = [0u64; TOPICS];
    Ok(unusable(bytes, |topic| {
        if left[topic] < BATCH_BYTES {
            match pool.allocate() {
                Ok(_) => left[topic] = segment_bytes,
                Err(PoolError::Exhausted { .. }) => return Ok(false),
                Err(error) => return Err(error),
            }
        }
        left[topic] -= BATCH_BYTES;
        Ok(true)
    })?)
}

fn unusable_in_logs() -> Result<f64> {
    let geometry = *region(AllocatorKind::Bitmap, FlushMethod::None, |native| native)?.geometry();
    let bytes = geometry.segment_bytes * u64::from(geometry.segment_count);
    let mut left = [bytes / TOPICS as u64; TOPICS];
    Ok(unusable(bytes, |topic| {
        let has_room = left[topic] >= BATCH_BYTES;
        left[topic] = left[topic].saturating_sub(BATCH_BYTES);
        Ok(has_room)
    })?)
}

pub(super) fn compare(args: &DeviationArgs) -> Result<Vec<Comparison>> {
    let what = "claiming space: a segment, beside adding to a contiguous log's end";
    // Once for 16 MiB and more: 100 ns are nothing beside filling it.
    let mut claim = Comparison::new("DEV-005", what, "s", (Better::Less, 100.0));
    let what = "memory unused when the first of 8 topics (sizes 1, 1/2, .. 1/8) finds no room";
    let mut unused = Comparison::new("DEV-005", what, "", (Better::Less, 0.7));
    for _ in 0..args.bench.runs {
        claim.add(bump(), allocation()?);
        unused.add(unusable_in_logs()?, unusable_in_pool()?);
    }
    Ok(vec![claim, unused])
}
