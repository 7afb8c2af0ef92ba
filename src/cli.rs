//! The command line: every command with its arguments.

#![allow(missing_docs)] // clap takes documentation comments for help

use crate::cluster::ClusterArgs;
use crate::command::{bench, broker, brokers, consume, doctor, produce, region, topic, verify};
use clap::{Parser, Subcommand};

/// A totally ordered publish/subscribe log over shared CXL memory.
#[derive(Parser)]
#[command(name = "embarcadero", disable_version_flag = true, arg_required_else_help = true)]
pub struct Cli {
    /// Print the version; with --verbose also commit, target, native libraries and transports.
    #[arg(long)]
    pub version: bool,
    /// Log at debug level.
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
