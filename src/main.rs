//! The `embarcadero` command.
#![forbid(unsafe_code)]

use clap::Parser;
use embarcadero::cli::{Cli, Command};
use embarcadero::command::{self, bench, broker, brokers, cluster, consume, doctor, produce, region, topic, verify};
use embarcadero::version;
use std::process::ExitCode;

<<<<<<< HEAD
=======
/// A totally ordered publish/subscribe log over shared CXL memory.
#[derive(Parser)]
#[command(name = "embarcadero", disable_version_flag = true, arg_required_else_help = true)]
struct Cli {
    /// Print the version; with --verbose also commit, target, native libraries and transports.
    #[arg(long)]
    version: bool,
    /// Log at debug level.
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
    /// List the live brokers, and say how their leader is elected.
    Brokers(brokers::BrokersArgs),
    /// Run a local cluster of broker processes on one region.
    Cluster(ClusterArgs),
    /// Create, list, describe or delete topics.
    #[command(subcommand)]
    Topic(topic::TopicCommand),
    /// Publish lines or records from a file or standard input.
    Produce(produce::ProduceArgs),
    /// Write a topic's messages to standard output.
    Consume(consume::ConsumeArgs),
    /// Read a topic and check it for wrong order, gaps, duplicates and damaged messages.
    Verify(verify::VerifyArgs),
    /// Measure throughput and latency. Each result is printed beside the limit measured in the same run.
    Bench(bench::BenchArgs),
    /// Report what this host has, what it lacks, and how to get it.
    Doctor(doctor::DoctorArgs),
}

>>>>>>> ops
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
