//! The command line: every command with its arguments.

#![allow(missing_docs)] // clap takes documentation comments for help

use crate::cluster::ClusterArgs;
use crate::command::{bench, broker, brokers, consume, doctor, produce, region, topic, verify};
use clap::{Parser, Subcommand};

/// A totally ordered publish/subscribe log over shared CXL memory.
#[derive(Parser)]
#[command(name = "embarcadero", disable_version_flag = true, arg_required_else_help = true)]
pub struct Cli {
    /// Print the version (with --verbose: commit, target and native libraries).
    #[arg(long)]
    pub version: bool,
    /// More log lines (debug level).
    #[arg(long, global = true)]
    pub verbose: bool,
    #[command(subcommand)]
    pub command: Option<Command>,
}

#[derive(Subcommand)]
pub enum Command {
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
