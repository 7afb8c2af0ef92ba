//! `embarcadero bench`: runs `embarcadero-bench`, a program that lies in the same directory as this one.

use anyhow::{Context, Result, bail};
use clap::Args;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

#[derive(Args)]
#[command(disable_help_flag = true)]
pub struct BenchArgs {
    /// Arguments for `embarcadero-bench`; see `embarcadero bench --help`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Replaces this process with `embarcadero-bench`; returns only if that fails.
///
/// # Errors
/// The program does not exist or cannot be run.
pub fn run(args: &BenchArgs) -> Result<()> {
    let program = std::env::current_exe().context("cannot find this program")?.with_file_name("embarcadero-bench");
    if !program.exists() {
        bail!("{} does not exist; build it with: cargo build --release --workspace", program.display());
    }
    let error = Command::new(&program).args(&args.arguments).exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}
