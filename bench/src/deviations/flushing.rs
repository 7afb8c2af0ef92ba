//! DEV-002: write-backs in groups, beside the paper's after every write.
//!
//! DEV-004: one metadata line, beside the paper's two. DEV-007: the order written per batch, beside the paper's in the
//! header of every message.

use super::args::DeviationArgs;
use super::comparison::{Better, Comparison};
use crate::sequencer::order;
use anyhow::{Context, Result};
use embarcadero_cxl::batchlog::{BatchlogWriter, Written};
use embarcadero_cxl::cache::{FlushMethod, FlushSupport};
use embarcadero_cxl::layout::{AllocatorKind, BatchEntry};
use embarcadero_cxl::{Fabric, Native, RegionOffset, Site};
use embarcadero_sim::testbed::{TOPIC, region};
use embarcadero_wire::BrokerId;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// Number of messages of 1 KiB in a batch of the paper's size.
const MESSAGES: u64 = 512;

/// Region memory that may be slow to write, and that counts the lines written back.
#[derive(Clone)]
struct Device {
    native: Native,
    /// Time that each written line takes.
    line: Duration,
    /// True for the paper's way: every write is written back at once.
    after_every_write: bool,
    /// Number of lines written back.
    flushes: Arc<AtomicU64>,
}

impl Device {
    fn write_back(&self, at: RegionOffset, len: u64, site: Site) {
        self.native.flush(at, len, site);
        let lines = (at.0 + len).div_ceil(64) - at.0 / 64;
        self.flushes.fetch_add(lines, Ordering::Relaxed);
        if !self.line.is_zero() {
            let begun = Instant::now();
            while begun.elapsed() < self.line * lines as u32 {
                std::hint::spin_loop();
            }
        }
    }
}

impl Fabric for Device {
    fn bytes(&self) -> u64 {
        self.native.bytes()
    }

    fn load(&self, at: RegionOffset) -> u64 {
        self.native.load(at)
    }

    fn store(&self, at: RegionOffset, value: u64) {
        self.native.store(at, value);
        if self.after_every_write {
            self.write_back(at, 8, Site::BatchEntryFlush);
            self.native.fence(Site::BatchEntryFence);
        }
    }

    fn flush(&self, at: RegionOffset, len: u64, site: Site) {
        if !self.after_every_write {
            self.write_back(at, len, site);
        }
    }

    fn fence(&self, site: Site) {
        if !self.after_every_write {
            self.native.fence(site);
        }
    }

    fn full_fence(&self, site: Site) {
        self.native.full_fence(site);
    }

    fn invalidate(&self, at: RegionOffset, len: u64, site: Site) {
        self.native.invalidate(at, len, site);
    }

    fn read_bytes(&self, at: RegionOffset, into: &mut [u8]) {
        self.native.read_bytes(at, into);
    }

    fn write_bytes(&self, at: RegionOffset, from: &[u8]) {
        self.native.write_bytes(at, from);
    }

    fn is_coherent(&self) -> bool {
        self.native.is_coherent()
    }
}

fn method() -> Result<FlushMethod> {
    FlushSupport::detect().best().context("this CPU has no flush instruction")
}

/// Batches per second through Batchlog and sequencer on one core, and lines written back per batch.
fn through_log(after_every_write: bool, line: Duration, seconds: f64) -> Result<(f64, f64)> {
    let flushes = Arc::new(AtomicU64::new(0));
    let device = |native| Device { native, line, after_every_write, flushes: Arc::clone(&flushes) };
    let region = region(AllocatorKind::Partitioned, method()?, device)?;
    let before = flushes.load(Ordering::Relaxed);
    let ordered = order(region, seconds)?;
    let lines = (flushes.load(Ordering::Relaxed) - before) as f64 / ordered.batches as f64;
    Ok((ordered.batches as f64 / (ordered.appending + ordered.ordering).as_secs_f64(), lines))
}

pub(super) fn compare(args: &DeviationArgs) -> Result<Vec<Comparison>> {
    let seconds = args.bench.seconds;
    let what = "batches per second through Batchlog and sequencer";
    let mut plain = Comparison::new("DEV-002", what, "1/s", (Better::More, 1.05));
    let slow = format!("the same, a device that takes {} ns per line", args.line_ns);
    let mut slow = Comparison::new("DEV-002", slow, "1/s", (Better::More, 4.0));
    let mut lines = Comparison::new("DEV-002", "lines written back per batch", "", (Better::Less, 0.95));
    for _ in 0..args.bench.runs {
        let (paper, ours) = (through_log(true, Duration::ZERO, seconds)?, through_log(false, Duration::ZERO, seconds)?);
        plain.add(paper.0, ours.0);
        lines.add(paper.1, ours.1);
        let line = Duration::from_nanos(args.line_ns);
        slow.add(through_log(true, line, seconds)?.0, through_log(false, line, seconds)?.0);
    }
    Ok(vec![plain, slow, lines])
}

/// Seconds to append and publish one Batchlog entry. `second_line` adds the paper's second line of metadata.
fn publish_entry(second_line: bool, seconds: f64) -> Result<f64> {
    let region = region(AllocatorKind::Partitioned, method()?, |native| native)?;
    let fabric = region.fabric().clone();
    let metadata = RegionOffset(region.layout().segments);
    let mut log = BatchlogWriter::new(region.clone(), TOPIC.0, BrokerId(0));
    let (mut spent, mut entries) = (Duration::ZERO, 0u32);
    while spent.as_secs_f64() < seconds {
        log = BatchlogWriter::new(region.clone(), TOPIC.0, BrokerId(0));
        let begun = Instant::now();
        let mut of_log = 0;
        while log.has_room() == Ok(true) && of_log < 1024 {
            log.append(BatchEntry { bytes: 1, message_count: 1, ..bytemuck::Zeroable::zeroed() });
            log.publish(Written::default());
            if second_line {
                for word in 0..4 {
                    fabric.store(metadata.add(word * 8), u64::from(entries));
                }
                fabric.flush(metadata, 32, Site::BatchlogHeadFlush);
                fabric.fence(Site::BatchlogHeadFlush);
            }
            of_log += 1;
        }
        spent += begun.elapsed();
        entries += of_log;
        if of_log == 0 {
            break;
        }
    }
    drop(log);
    anyhow::ensure!(entries > 0, "the Batchlog has no room");
    Ok(spent.as_secs_f64() / f64::from(entries))
}

pub(super) fn compare_metadata(args: &DeviationArgs) -> Result<Vec<Comparison>> {
    let mut entry = Comparison::new("DEV-004", "publishing one Batchlog entry", "s", (Better::Less, 1.05));
    for _ in 0..args.bench.runs {
        entry.add(publish_entry(true, args.bench.seconds / 4.0)?, publish_entry(false, args.bench.seconds / 4.0)?);
    }
    Ok(vec![entry])
}

/// Messages per second into whose headers one core writes the order, one by one.
fn order_headers(seconds: f64) -> Result<f64> {
    let region = region(AllocatorKind::Partitioned, method()?, |native| native)?;
    let (fabric, start) = (region.fabric(), region.layout().segments);
    let window = region.layout().region_bytes - start - MESSAGES * 1024;
    let (begun, mut messages) = (Instant::now(), 0u64);
    while begun.elapsed().as_secs_f64() < seconds {
        let batch = start + messages * 1024 % window;
        for message in 0..MESSAGES {
            let header = RegionOffset(batch / 1024 * 1024 + message * 1024);
            fabric.store(header, messages + message);
            fabric.flush(header, 8, Site::IndexEntryFlush);
        }
        fabric.fence(Site::IndexEntryFence);
        messages += MESSAGES;
    }
    Ok(messages as f64 / begun.elapsed().as_secs_f64())
}

pub(super) fn compare_headers(args: &DeviationArgs) -> Result<Vec<Comparison>> {
    let what = "messages per second that get their place, in batches of 512";
    let mut messages = Comparison::new("DEV-007", what, "1/s", (Better::More, 1.05));
    for _ in 0..args.bench.runs {
        let seconds = args.bench.seconds / 2.0;
        let batches = order(region(AllocatorKind::Partitioned, method()?, |native| native)?, seconds)?;
        messages.add(order_headers(seconds)?, batches.rate() * MESSAGES as f64);
    }
    Ok(vec![messages])
}
