//! `cargo xtask`: checks and tests the project, cheap stages first.
#![forbid(unsafe_code)]

mod budget;
mod stages;
mod steps;
mod style;

use anyhow::Result;
use budget::Budget;
use clap::{Parser, Subcommand};
use stages::Stages;
use std::process::ExitCode;

/// Check and test the project.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask")]
struct Cli {
    #[command(subcommand)]
    task: Task,
}

#[derive(Subcommand)]
enum Task {
    /// Check formatting, style, lints and documentation, and run unit tests: about a minute once all is built.
    Check,
    /// Run check and all tests but the lab's, with small budgets: about five minutes.
    Test,
    /// Run everything, cheap stages first, with the lab. scripts/test installs what is missing and runs this.
    All {
        /// Leave out the lab: the tests that need RDMA and CXL, which run in QEMU guests.
        #[arg(long)]
        no_lab: bool,
    },
    /// Run the tests that need RDMA and CXL, in QEMU guests. `scripts/lab prepare` comes first.
    Lab,
    /// Run for hours: chaos, 100,000 seeds and schedules, fuzzing.
    Long,
    /// Check the rules of docs/style.md that a program can check.
    Style,
    /// Write the generated documents: pages of docs/reference, and the schemas of the configuration.
    Docs,
}

fn run(task: &Task) -> Result<()> {
    let budget = match task {
        Task::Check | Task::Style | Task::Docs | Task::Test => Budget::SMALL,
        Task::All { .. } | Task::Lab => Budget::FULL,
        Task::Long => Budget::LONG,
    };
    let mut stages = Stages::new(budget)?;
    match task {
        Task::Style => stages.run("style", steps::style)?,
        Task::Docs => stages.run("generated documents", steps::write_docs)?,
        Task::Check => steps::check(&mut stages)?,
        Task::Test => {
            steps::prerequisites(&mut stages)?;
            steps::check(&mut stages)?;
            steps::test(&mut stages)?;
        }
        Task::All { no_lab } => {
            steps::prerequisites(&mut stages)?;
            steps::check(&mut stages)?;
            steps::before_tests(&mut stages)?;
            steps::test(&mut stages)?;
            steps::everything_else(&mut stages)?;
            if *no_lab {
                stages.skip("the lab", "by --no-lab");
            } else {
                steps::lab(&mut stages)?;
            }
        }
        Task::Lab => steps::lab(&mut stages)?,
        Task::Long => steps::long(&mut stages)?,
    }
    stages.summary();
    Ok(())
}

fn main() -> ExitCode {
    match run(&Cli::parse().task) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}
