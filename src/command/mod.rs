//! Commands, one file each; logging and exit codes of all of them.

#![allow(missing_docs)] // clap uses these comments as help; each `run` runs its command

pub mod bench;
pub mod broker;
pub mod brokers;
pub mod cluster;
pub mod consume;
pub mod doctor;
mod inspect;
pub mod produce;
pub mod region;
pub mod topic;
pub mod verify;

use std::process::ExitCode;

/// Starts logging to standard error at level info, or debug if `verbose`. `RUST_LOG` overrides the level.
pub fn log(verbose: bool) {
    let level = if verbose { "debug" } else { "info" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| format!("warn,embarcadero={level},embarcadero_broker={level}").into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .init();
}

/// Exit code for the result of a command. Prints an error to standard error.
pub fn exit_code(result: anyhow::Result<()>) -> ExitCode {
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            // The text of many errors already ends with their cause.
            for cause in error.chain().skip(1).map(ToString::to_string) {
                if !text.contains(&cause) {
                    text = format!("{text}: {cause}");
                }
            }
            eprintln!("error: {text}");
            ExitCode::FAILURE
        }
    }
}
