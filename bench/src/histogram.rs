//! Histograms of latencies.

use anyhow::Result;
use hdrhistogram::Histogram;

/// Histogram of nanoseconds, 1 ns to 600 s, with three significant digits.
pub(crate) fn of_nanoseconds() -> Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 600_000_000_000, 3)?)
}
