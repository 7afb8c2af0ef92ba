//! The `embarcadero` command.
#![forbid(unsafe_code)]

use clap::Parser;
use embarcadero::cli::{Cli, Command};
use embarcadero::command::{self, bench, broker, brokers, cluster, consume, doctor, produce, region, topic, verify};
use embarcadero::version;
use std::process::ExitCode;

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
