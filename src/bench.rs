//! wip
use clap::Subcommand;
#[derive(Subcommand)]
pub enum BenchCommand { /// x
 X }
pub fn run(_: BenchCommand) -> anyhow::Result<()> { Ok(()) }
