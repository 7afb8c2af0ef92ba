//! The `embarcadero` command.
#![forbid(unsafe_code)]

use clap::{Parser, Subcommand};
use embarcadero::cluster::ClusterArgs;
use embarcadero::command::{self, bench, broker, brokers, cluster, consume, doctor, produce, region, topic, verify};
use embarcadero::version;
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
    /// List the brokers that are alive, and say who elects their leader.
    Brokers(brokers::BrokersArgs),
    /// Start, watch and stop a local cluster of broker processes on one region.
    Cluster(ClusterArgs),
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
    Bench(bench::BenchArgs),
    /// Say what this host offers and what it lacks.
    Doctor(doctor::DoctorArgs),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    if cli.version {
        version::print(cli.verbose);
        return ExitCode::SUCCESS;
    }
    command::log(cli.verbose);
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
        Command::Bench(args) => bench::run(&args),
        Command::Doctor(args) => doctor::run(&args),
    };
    command::exit_code(result)
}
