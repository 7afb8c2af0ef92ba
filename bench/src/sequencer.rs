//! `bench sequencer`: the sequencer alone. Batchlogs are filled, then the time of ordering them is taken.

use crate::grid::GridArgs;
use crate::report::{Report, Row};
use anyhow::{Context, Result};
use embarcadero_cxl::cache::{FlushMethod, FlushSupport};
use embarcadero_cxl::layout::AllocatorKind;
use embarcadero_cxl::segment::{BitmapAllocator, SegmentAllocator};
use embarcadero_cxl::{Fabric, Region};
use embarcadero_sim::testbed::{Testbed, region, region_of};
use serde_json::json;
use std::time::{Duration, Instant};

const SESSIONS: u32 = 16;

/// Number of ordered batches, and the time that they took.
pub(crate) struct Ordered {
    pub batches: u64,
    /// Time spent in the brokers' part: entries of Batchlogs, published in groups.
    pub appending: Duration,
    /// Time spent in the sequencer.
    pub ordering: Duration,
}

impl Ordered {
    /// Batches per second of the sequencer alone.
    pub(crate) fn rate(&self) -> f64 {
        self.batches as f64 / self.ordering.as_secs_f64()
    }
}

/// Appends batches of 16 sessions at several brokers and orders them, in turn, until the sequencer has worked for
/// `seconds`.
pub(crate) fn order<F: Fabric>(region: Region<F>, seconds: f64) -> Result<Ordered> {
    order_of(region, SESSIONS, seconds)
}

/// Appends batches of `sessions` sessions at several brokers and orders them, in turn, until the sequencer has worked for
/// `seconds`.
fn order_of<F: Fabric>(region: Region<F>, sessions: u32, seconds: f64) -> Result<Ordered> {
    let mut testbed = Testbed::new(region, sessions)?;
    let mut ordered = Ordered { batches: 0, appending: Duration::ZERO, ordering: Duration::ZERO };
    while ordered.ordering.as_secs_f64() < seconds {
        let begun = Instant::now();
        let batches = testbed.append();
        ordered.appending += begun.elapsed();
        let begun = Instant::now();
        testbed.order(batches);
        ordered.ordering += begun.elapsed();
        ordered.batches += batches;
        testbed.sequencer().maintain(2);
    }
    anyhow::ensure!(testbed.sequencer().stats().ordered == ordered.batches, "not every batch was ordered");
    Ok(ordered)
}

/// Median time of allocating one segment, seconds.
pub(crate) fn allocation() -> Result<f64> {
    let allocator = BitmapAllocator::new(region(AllocatorKind::Bitmap, FlushMethod::None, |native| native)?);
    let mut times = Vec::new();
    for _ in 0..2000 {
        let begun = Instant::now();
        let taken: Vec<u32> = (0..32).map(|_| allocator.allocate()).collect::<Result<_, _>>()?;
        times.push(begun.elapsed().as_secs_f64() / 32.0);
        for segment in taken {
            allocator.release(segment)?;
        }
    }
    times.sort_by(f64::total_cmp);
    Ok(times[times.len() / 2])
}

pub(crate) fn run(args: &GridArgs) -> Result<()> {
    let method = FlushSupport::detect().best().context("this CPU has no flush instruction")?;
    for point in args.points()? {
        let bench = &point.bench;
        let rate = |method| -> Result<f64> {
            let region = region_of(bench.brokers, AllocatorKind::Partitioned, method, |native| native)?;
            Ok(order_of(region, bench.publishers, bench.seconds)?.rate())
        };
        let flushed = (0..bench.runs).map(|_| rate(method)).collect::<Result<Vec<_>>>()?;
        let coherent = (0..bench.runs).map(|_| rate(FlushMethod::None)).collect::<Result<Vec<_>>>()?;
        let rows =
            [Row::new("sequencer.batches", "1/s", &flushed).with_ceiling("sequencer.batches.coherent", &coherent)];
        let parameters = json!({
            "brokers": bench.brokers, "publishers": bench.publishers, "flush": method, "seconds": bench.seconds,
        });
        point.print(parameters, &rows)?;
    }
    let bench = &args.bench;
    let allocations = (0..bench.runs).map(|_| allocation()).collect::<Result<Vec<_>>>()?;
    Report::new(json!({}), bench.format()).print(&[Row::new("segment.allocate", "s", &allocations)])
}
