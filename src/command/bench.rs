//! `embarcadero bench`: hands over to `embarcadero-bench`, a program of its own beside this one.

use anyhow::{Context, Result, bail};
use clap::Args;
use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

#[derive(Args)]
#[command(disable_help_flag = true)]
pub struct BenchArgs {
    /// What `embarcadero-bench` is to measure; see `embarcadero bench --help`.
    #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
    arguments: Vec<OsString>,
}

/// Becomes the other program.
///
/// # Errors
/// It is not there, or cannot be run.
pub fn run(args: &BenchArgs) -> Result<()> {
    let program = std::env::current_exe().context("cannot find this program")?.with_file_name("embarcadero-bench");
    if !program.exists() {
        bail!(
            "{} is not there: `cargo build --release -p embarcadero-bench` builds it beside this program",
            program.display()
        );
    }
    let error = Command::new(&program).args(&args.arguments).exec();
    Err(error).with_context(|| format!("cannot run {}", program.display()))
}
