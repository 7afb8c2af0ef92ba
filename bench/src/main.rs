//! `embarcadero bench`: each figure beside the ceiling that the same run measured.
#![forbid(unsafe_code)]

mod args;
mod ceiling;
mod cores;
mod datapath;
mod deviations;
mod engine;
mod failover;
mod grid;
mod histogram;
mod idle;
mod latency;
mod memif;
mod peers;
mod plot;
mod publish;
mod replication;
mod report;
mod scale;
mod sequencer;

use anyhow::Result;
use args::BenchArgs;
use clap::{Parser, Subcommand};
use datapath::DatapathArgs;
use deviations::DeviationArgs;
use embarcadero::command::{self, broker};
use grid::GridArgs;
use latency::{LatencyArgs, LoadArgs};
use peers::PeerArgs;
use plot::PlotArgs;
use scale::ScaleArgs;
use std::process::ExitCode;

/// Measures; each result is printed beside the ceiling measured in the same run.
#[derive(Parser)]
#[command(name = "embarcadero bench", bin_name = "embarcadero bench", arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    command: BenchCommand,
}

#[derive(Subcommand)]
enum BenchCommand {
    /// Acknowledged publish goodput, and what the machine can do.
    Publish(GridArgs),
    /// Publish to acknowledgement and delivery: one message at a time, or at fixed rates.
    Latency(LatencyArgs),
    /// Publish to acknowledgement and delivery, at parts of the highest load.
    LatencyVsLoad(LoadArgs),
    /// Goodput from publish to subscriber.
    EndToEnd(GridArgs),
    /// Batches per second that one core orders, of --publishers sessions at --brokers brokers, with write-backs; and
    /// segment allocation.
    Sequencer(GridArgs),
    /// CPU of an idle broker.
    Idle(BenchArgs),
    /// Longest time without an acknowledgement when the leader, or another broker, is killed.
    Failover(BenchArgs),
    /// Goodput with replication at acknowledgement levels 1 and 2, beside the disk's and that without replication.
    Replication(BenchArgs),
    /// Each entry of the deviation register beside the paper's design, in turn.
    Deviations(DeviationArgs),
    /// Cost of publishing as the log grows, and with many topics and sessions.
    Scale(ScaleArgs),
    /// Acknowledged publishing beside NATS JetStream, Redis Streams, Kafka or Redpanda; see scripts/compare.
    Peers(PeerArgs),
    /// The transport alone and the whole publish path, by size.
    Datapath(DatapathArgs),
    /// Draws what benches printed with --json.
    Plot(PlotArgs),
    /// Broker of the cluster that a bench starts, which runs this same program.
    #[command(hide = true)]
    Broker(broker::BrokerArgs),
}

fn main() -> ExitCode {
    command::log(false);
    command::exit_code(run(Cli::parse().command))
}

fn run(command: BenchCommand) -> Result<()> {
    match command {
        BenchCommand::Publish(args) => publish::run(&args),
        BenchCommand::Latency(args) => latency::run(&args),
        BenchCommand::LatencyVsLoad(args) => latency::versus_load(&args),
        BenchCommand::EndToEnd(args) => publish::end_to_end(&args),
        BenchCommand::Sequencer(args) => sequencer::run(&args),
        BenchCommand::Idle(args) => idle::run(&args),
        BenchCommand::Failover(args) => failover::run(&args),
        BenchCommand::Replication(args) => replication::run(&args),
        BenchCommand::Deviations(args) => deviations::run(&args),
        BenchCommand::Scale(args) => scale::run(&args),
        BenchCommand::Peers(args) => peers::run(&args),
        BenchCommand::Datapath(args) => datapath::run(&args),
        BenchCommand::Plot(args) => plot::run(&args),
        BenchCommand::Broker(args) => broker::run(args),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;
    use clap_markdown::MarkdownOptions;

    /// `docs/reference/bench.md` has every bench and flag: `EMBARCADERO_WRITE_DOCS=1` writes it.
    #[test]
    fn the_page_of_benches_is_fresh() {
        let options = MarkdownOptions::new().title("Benches".to_owned()).show_footer(false);
        let page = clap_markdown::help_markdown_command_custom(&Cli::command(), &options);
        let lines: Vec<&str> = page.lines().map(str::trim_end).collect();
        // The program's name has a space, which an anchor has not.
        let page = lines.join("\n").replace("(#embarcadero bench", "(#embarcadero-bench");
        let page = page.trim_end().to_owned() + "\n";
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reference/bench.md");
        if std::env::var_os("EMBARCADERO_WRITE_DOCS").is_some() {
            std::fs::write(path, &page).unwrap();
        }
        let found = std::fs::read_to_string(path).unwrap_or_default();
        assert!(found == page, "{path} is not up to date: `cargo xtask docs` writes it");
    }
}
