//! `embarcadero brokers`.

use crate::settings::Connect;
use anyhow::{Result, ensure};
use clap::Args;
use serde_json::json;

/// List the brokers that the leader considers live, and say how the leader is elected.
#[derive(Args)]
pub struct BrokersArgs {
    #[command(flatten)]
    connect: Connect,
    /// Print JSON.
    #[arg(long)]
    json: bool,
}

pub fn run(args: &BrokersArgs) -> Result<()> {
    let cluster = args.connect.client()?.cluster()?;
    if args.json {
        println!("{}", json!({ "brokers": cluster.brokers, "membership": cluster.membership }));
    } else {
        for broker in cluster.brokers {
            let leader = if broker.leader { "\tleader" } else { "" };
            println!("{}\tdata {}\tcontrol {}{leader}", broker.id, broker.data, broker.control);
        }
        println!("membership: {}", cluster.membership);
    }
    let damaged = cluster.damaged_brokers;
    ensure!(damaged.is_empty(), "the list may lack brokers: {}", damaged.join("; "));
    Ok(())
}
