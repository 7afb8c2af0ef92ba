//! `embarcadero topic`.

use crate::settings::{Connect, parse_bytes};
use anyhow::{Result, ensure};
use clap::{Args, Subcommand};
use embarcadero_client::{ClusterView, Order, TopicOptions};
use serde_json::json;

#[derive(Args)]
pub struct Name {
    /// Name of the topic.
    name: String,
    #[command(flatten)]
    connect: Connect,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Subcommand)]
pub enum TopicCommand {
    /// Create a topic.
    Create {
        #[command(flatten)]
        name: Name,
        /// Order: none, broker, total or strong.
        #[arg(long, default_value = "strong")]
        order: Order,
        /// Highest acknowledgement level: 0 none, 1 ordered and visible, 2 durable on replicas' disks.
        #[arg(long, default_value_t = 1)]
        ack: u8,
        /// Number of copies, including the one in CXL memory.
        #[arg(long, default_value_t = 1)]
        replication_factor: u8,
        /// Size of the newest messages that are kept, at least a segment; 0 keeps all.
        #[arg(long, value_parser = parse_bytes, default_value = "0")]
        retention_bytes: u64,
        /// Time for which messages are kept, in milliseconds, at least 10; 0 keeps all.
        #[arg(long, default_value_t = 0)]
        retention_ms: u64,
    },
    /// List topics.
    List {
        #[command(flatten)]
        connect: Connect,
        /// Print JSON.
        #[arg(long)]
        json: bool,
    },
    /// Show a topic and its streams.
    Describe(Name),
    /// Delete a topic and all its messages.
    Delete(Name),
}

pub fn run(command: TopicCommand) -> Result<()> {
    match command {
        TopicCommand::Create { name, order, ack, replication_factor, retention_bytes, retention_ms } => {
            let options = TopicOptions { order, ack_level: ack, replication_factor, retention_bytes, retention_ms };
            let topic = name.connect.client()?.create_topic(&name.name, options)?;
            if name.json {
                println!("{}", serde_json::to_string(&topic)?);
            } else {
                println!("created {} (order {})", topic.name, topic.order);
            }
        }
        TopicCommand::List { connect, json } => {
            let ClusterView { topics, damaged_topics, .. } = connect.client()?.cluster()?;
            if json {
                println!("{}", serde_json::to_string(&topics)?);
            } else {
                for topic in topics {
                    println!("{}\torder {}\tack {}", topic.name, topic.order, topic.ack_level);
                }
            }
            ensure!(damaged_topics.is_empty(), "the list may lack topics: {}", damaged_topics.join("; "));
        }
        TopicCommand::Describe(name) => {
            let (topic, streams) = name.connect.client()?.describe_topic(&name.name)?;
            if name.json {
                println!("{}", json!({ "topic": topic, "streams": streams }));
            } else {
                println!(
                    "{} order {} ack {} replication {}",
                    topic.name, topic.order, topic.ack_level, topic.replication_factor
                );
                for stream in streams {
                    let broker = stream.broker.map_or("global".to_owned(), |broker| format!("broker {broker}"));
                    println!(
                        "  {broker}: offsets {} to {}, {} batches",
                        stream.earliest_offset, stream.next_offset, stream.batches
                    );
                }
            }
        }
        TopicCommand::Delete(name) => {
            name.connect.client()?.delete_topic(&name.name)?;
            println!("deleted {}", name.name);
        }
    }
    Ok(())
}
