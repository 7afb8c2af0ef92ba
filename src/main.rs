//! The `embarcadero` command.
#![forbid(unsafe_code)]

mod bench;
mod broker;
mod brokers;
mod cluster;
mod consume;
mod doctor;
mod produce;
mod region;
mod settings;
mod topic;
mod verify;

use clap::{Parser, Subcommand};
use std::process::ExitCode;

/// A totally ordered publish/subscribe log over shared CXL memory.
#[derive(Parser)]
#[command(name = "embarcadero", disable_version_flag = true, arg_required_else_help = true)]
struct Cli {
    /// Print the version (with --verbose: commit, target and native libraries).
    #[arg(long)]
    version: bool,
    /// More log lines (debug level).
    #[arg(long, global = true)]
    verbose: bool,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Subcommand)]
enum Command {
    /// Create, inspect or destroy a shared region.
    #[command(subcommand)]
    Region(region::RegionCommand),
    /// Run one broker in the foreground.
    Broker(broker::BrokerArgs),
    /// List the brokers that are alive, and say who elects their head.
    Brokers(brokers::BrokersArgs),
    /// Start, watch and stop a local cluster of broker processes on one region.
    Cluster(cluster::ClusterArgs),
    /// Create, list, describe or delete topics.
    #[command(subcommand)]
    Topic(topic::TopicCommand),
    /// Publish lines or records from a file or standard input.
    Produce(produce::ProduceArgs),
    /// Write a topic's messages to standard output.
    Consume(consume::ConsumeArgs),
    /// Check a topic's order, gaps, duplicates and checksums.
    Verify(verify::VerifyArgs),
    /// Measure; each result is printed beside the ceiling measured in the same run.
    #[command(subcommand)]
    Bench(bench::BenchCommand),
    /// Say what this host offers and what it lacks.
    Doctor(doctor::DoctorArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.version {
        print_version(cli.verbose);
        return ExitCode::SUCCESS;
    }
    let level = if cli.verbose { "debug" } else { "info" };
    let filter = tracing_subscriber::EnvFilter::try_from_default_env()
        .unwrap_or_else(|_| format!("warn,embarcadero={level},embarcadero_broker={level}").into());
    tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::IsTerminal::is_terminal(&std::io::stderr()))
        .with_target(false)
        .init();
    let Some(command) = cli.command else {
        eprintln!("no command; try --help");
        return ExitCode::from(2);
    };
    let result = match command {
        Command::Region(command) => region::run(command),
        Command::Broker(args) => broker::run(args),
        Command::Brokers(args) => brokers::run(&args),
        Command::Cluster(args) => cluster::run(&args),
        Command::Topic(command) => topic::run(command),
        Command::Produce(args) => produce::run(&args),
        Command::Consume(args) => consume::run(&args),
        Command::Verify(args) => verify::run(&args),
        Command::Bench(command) => bench::run(command),
        Command::Doctor(args) => doctor::run(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let mut text = error.to_string();
            // Many an error's own text ends with its cause.
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

fn print_version(verbose: bool) {
    println!("embarcadero {}", env!("CARGO_PKG_VERSION"));
    if verbose {
        println!("commit {}", env!("EMBARCADERO_COMMIT"));
        println!("target {} ({})", env!("EMBARCADERO_TARGET"), env!("EMBARCADERO_PROFILE"));
        println!("native libraries at build time: {}", env!("EMBARCADERO_LIBRARIES"));
        println!(
            "transports: {}",
            if cfg!(feature = "rdma") { "tcp, verbs, roce" } else { "tcp, roce (built without feature rdma)" }
        );
    }
}
