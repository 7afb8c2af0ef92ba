//! Stages of a run: each has a name, is timed, and is reported as run or skipped.

use crate::budget::Budget;
use anyhow::{Context, Result, anyhow, bail};
use std::ffi::OsStr;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// Outcome of a stage that did not fail.
pub(crate) enum Outcome {
    /// The stage ran to its end.
    Ran,
    /// The stage could not run on this host; the text says why.
    Skipped(String),
}

/// Stages of one run so far, and the settings that they share.
pub(crate) struct Stages {
    pub budget: Budget,
    root: PathBuf,
    features: Vec<&'static str>,
    done: Vec<(String, Duration, Outcome)>,
}

impl Stages {
    /// Starts a run without stages, and makes the root of the checkout the working directory.
    ///
    /// # Errors
    /// The root cannot be entered.
    pub(crate) fn new(budget: Budget) -> Result<Self> {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().context("xtask has no parent")?.to_owned();
        std::env::set_current_dir(&root).with_context(|| format!("cannot enter {}", root.display()))?;
        // All builds of a run have the same features, so that nothing is built twice.
        let dpdk = succeeds("pkg-config", ["--atleast-version=22.11", "libdpdk"]);
        Ok(Self { budget, root, features: if dpdk { vec!["dpdk"] } else { Vec::new() }, done: Vec::new() })
    }

    /// Root of the checkout.
    pub(crate) fn root(&self) -> &Path {
        &self.root
    }

    /// Runs a stage and records its time.
    ///
    /// # Errors
    /// The stage failed; the times so far have been printed.
    pub(crate) fn run(&mut self, name: &str, stage: impl FnOnce(&Self) -> Result<Outcome>) -> Result<()> {
        eprintln!("== {name}");
        let begun = Instant::now();
        match stage(self) {
            Ok(outcome) => {
                if let Outcome::Skipped(why) = &outcome {
                    eprintln!("== SKIPPED: {name}: {why}");
                }
                self.done.push((name.to_owned(), begun.elapsed(), outcome));
                Ok(())
            }
            Err(error) => {
                self.summary();
                Err(error.context(format!("{name} failed after {} s", begun.elapsed().as_secs())))
            }
        }
    }

    /// Records a stage that is left out, and the reason.
    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        eprintln!("== SKIPPED: {name}: {why}");
        self.done.push((name.to_owned(), Duration::ZERO, Outcome::Skipped(why.to_owned())));
    }

    /// Prints the time of each stage, and which stages were skipped.
    pub(crate) fn summary(&self) {
        eprintln!("== times");
        for (name, time, outcome) in &self.done {
            match outcome {
                Outcome::Ran => eprintln!("{:7.1} s  {name}", time.as_secs_f64()),
                Outcome::Skipped(why) => eprintln!("  SKIPPED  {name}: {why}"),
            }
        }
        let total: Duration = self.done.iter().map(|(_, time, _)| *time).sum();
        eprintln!("{:7.1} s  in all", total.as_secs_f64());
    }

    /// Cargo command over the whole workspace, with the lock file, the release profile and the run's features. A command for a
    /// single package would build with other features, and so all again.
    pub(crate) fn cargo_workspace(&self, command: &str) -> Command {
        let mut cargo = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
        cargo.arg(command).args(["--locked", "--workspace"]);
        // `cargo bench` has no such option; its profile is the release profile.
        if command != "bench" {
            cargo.arg("--release");
        }
        if !self.features.is_empty() {
            cargo.arg("--features").arg(self.features.join(","));
        }
        cargo
    }

    /// Returns true if this run builds with DPDK.
    pub(crate) fn has_dpdk(&self) -> bool {
        self.features.contains(&"dpdk")
    }
}

/// Runs a command to its end.
///
/// # Errors
/// The command cannot be run, or fails.
pub(crate) fn execute(command: &mut Command) -> Result<()> {
    let status = command.status().with_context(|| format!("cannot run {}", program(command)))?;
    if !status.success() {
        bail!("`{}` ended with {status}", line(command));
    }
    Ok(())
}

/// Runs two commands at once, to the end of both. What the second prints comes at the end.
///
/// # Errors
/// One of them cannot be run, or fails.
pub(crate) fn execute_both(first: &mut Command, second: &mut Command) -> Result<()> {
    let (first, second) = std::thread::scope(|scope| {
        let second = scope.spawn(|| output(second));
        (execute(first), second.join())
    });
    match second.map_err(|_| anyhow!("a thread of this program panicked"))? {
        Ok(text) => {
            print!("{text}");
            first
        }
        Err(error) => match first {
            Ok(()) => Err(error),
            Err(other) => bail!("{other:#}; and {error:#}"),
        },
    }
}

/// Runs a command to its end and returns its standard output.
///
/// # Errors
/// The command cannot be run, or fails.
pub(crate) fn output(command: &mut Command) -> Result<String> {
    let output = command.stderr(Stdio::inherit()).output();
    let output = output.with_context(|| format!("cannot run {}", program(command)))?;
    if !output.status.success() {
        bail!("`{}` ended with {}:\n{}", line(command), output.status, String::from_utf8_lossy(&output.stdout));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Runs a command without output; true if it exists and succeeds.
pub(crate) fn succeeds<A: AsRef<OsStr>>(program: &str, arguments: impl IntoIterator<Item = A>) -> bool {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    command.status().is_ok_and(|status| status.success())
}

fn program(command: &Command) -> String {
    command.get_program().to_string_lossy().into_owned()
}

fn line(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    words.map(OsStr::to_string_lossy).collect::<Vec<_>>().join(" ")
}
