//! Arguments of `bench deviations`.

use crate::args::BenchArgs;
use clap::Args;
use std::path::PathBuf;

#[derive(Args, Clone)]
pub(crate) struct DeviationArgs {
    #[command(flatten)]
    pub(super) bench: BenchArgs,
    /// Measure only these entries, such as DEV-001.
    #[arg(long, value_delimiter = ',')]
    pub(super) only: Vec<String>,
    /// Time that a simulated slow device takes per line that is written back, nanoseconds.
    #[arg(long, default_value_t = 200)]
    pub(super) line_ns: u64,
    /// Rewrite the table of this register.
    #[arg(long, conflicts_with = "only")]
    pub(super) write: Option<PathBuf>,
}
