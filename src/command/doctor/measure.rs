//! Measures the speed of memory, and the cost of flushes, pauses and readings of the clock, on this host.

use anyhow::{Context, Result};
use embarcadero_cxl::cache::{FlushMethod, FlushSupport};
use embarcadero_cxl::region::RegionFile;
use embarcadero_cxl::{Fabric, LINE_BYTES, Mapping, Native, RegionOffset, Site};
use serde::Serialize;
use std::hint::{black_box, spin_loop};
use std::path::Path;
use std::time::Instant;

/// Result of a measurement.
#[derive(Serialize)]
pub(super) struct Measure {
    /// Name of the quantity.
    pub name: String,
    /// Size of the quantity, in `unit`.
    pub value: f64,
    /// Unit: `ns` or `MB/s`.
    pub unit: &'static str,
}

/// Bytes that are read in a measurement: more than caches hold.
const SPAN: u64 = 256 << 20;
/// Bytes that are read at a time.
const CHUNK: u64 = 1 << 20;
/// Number of loads, flushes, pauses or readings of the clock that are timed together.
const COUNT: u32 = 200_000;

/// Mean time of a call of `each` over `count` calls, in nanoseconds.
fn cost(name: impl Into<String>, count: u32, mut each: impl FnMut(u32)) -> Measure {
    let begun = Instant::now();
    (0..count).for_each(&mut each);
    Measure { name: name.into(), value: begun.elapsed().as_nanos() as f64 / f64::from(count), unit: "ns" }
}

/// Read bandwidth of memory, and the latency of a load at random addresses. Memory is not changed.
fn reading(name: &str, memory: &Native) -> [Measure; 2] {
    let span = memory.bytes().min(SPAN);
    let begun = Instant::now();
    let mut sum = 0u64;
    for at in (0..span).step_by(CHUNK as usize) {
        let len = CHUNK.min(span - at);
        sum = memory.with_bytes(RegionOffset(at), len, |bytes| {
            let words = bytes.chunks_exact(8).map(|word| u64::from_le_bytes(word.try_into().unwrap_or_default()));
            words.fold(sum, u64::wrapping_add)
        });
    }
    black_box(sum);
    let bandwidth = span as f64 / 1e6 / begun.elapsed().as_secs_f64();
    let mut random = 1u64;
    let latency = cost(format!("{name}: latency of a load"), COUNT, |_| {
        // xorshift64 (Marsaglia 2003). The next address depends on the loaded word, so that loads do not overlap.
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        random |= memory.load(RegionOffset(random % (span / LINE_BYTES) * LINE_BYTES)) & black_box(0);
    });
    [Measure { name: format!("{name}: read bandwidth, one core"), value: bandwidth, unit: "MB/s" }, latency]
}

/// Measures DRAM, the region at path `region` if given, and the cost of flushing and polling.
///
/// # Errors
/// The region cannot be opened, or memory cannot be mapped.
pub(super) fn measure(region: Option<&Path>) -> Result<Vec<Measure>> {
    let mapping = Mapping::anonymous(SPAN).context("cannot map memory")?;
    mapping.prefault().context("cannot map memory")?;
    let method = FlushSupport::detect().best().unwrap_or(FlushMethod::None);
    let dram = Native::new(mapping, method)?;
    let mut measures = Vec::from(reading("DRAM", &dram));
    if let Some(path) = region {
        let file = RegionFile::open(path, FlushMethod::None)?;
        measures.extend(reading("region", file.region().fabric()));
    }
    let lines = SPAN / LINE_BYTES;
    measures.push(cost(format!("DRAM: store, {method}, fence"), COUNT, |index| {
        let at = RegionOffset(u64::from(index) % lines * LINE_BYTES);
        dram.store(at, u64::from(index));
        dram.flush(at, LINE_BYTES, Site::SuperblockFlush);
        dram.fence(Site::SuperblockFlush);
    }));
    measures.push(cost("pause", COUNT, |_| spin_loop()));
    measures.push(cost("reading the clock", COUNT, |_| {
        black_box(Instant::now());
    }));
    Ok(measures)
}
