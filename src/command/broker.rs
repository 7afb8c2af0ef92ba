//! `embarcadero broker`.

use crate::settings::{load, located};
use anyhow::{Context, Result, bail};
use clap::Args;
use embarcadero_broker::{Broker, BrokerConfig};
use embarcadero_wire::BrokerId;
use serde_json::json;
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::iterator::Signals;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

/// Time between two checks for signals.
const SIGNAL_PERIOD: Duration = Duration::from_millis(20);

#[derive(Args)]
pub struct BrokerArgs {
    /// Broker configuration file (YAML).
    #[arg(long, short)]
    config: Option<PathBuf>,
    /// Path of the region (cxl.path).
    #[arg(long)]
    region: Option<PathBuf>,
    /// Broker id, 0 to 31; the first free one if not given.
    #[arg(long)]
    id: Option<u32>,
    /// Address of the data plane, host:port; port 0 takes a free one.
    #[arg(long)]
    data: Option<SocketAddr>,
    /// Address that clients connect to for the data plane, if it differs from --data.
    #[arg(long)]
    advertise: Option<SocketAddr>,
    /// Address of the control service, host:port; port 0 takes a free one.
    #[arg(long)]
    control: Option<SocketAddr>,
}

pub fn run(args: BrokerArgs) -> Result<()> {
    let mut config: BrokerConfig = load(args.config.as_deref(), "BROKER")?;
    config.id = args.id.map(BrokerId).or(config.id);
    config.cxl.path = args.region.unwrap_or(config.cxl.path);
    config.data_listen = args.data.unwrap_or(config.data_listen);
    config.data_advertise = args.advertise.or(config.data_advertise);
    config.control_listen = args.control.unwrap_or(config.control_listen);
    config.validate().map_err(|error| located(args.config.as_deref(), error))?;
    let mut signals = Signals::new([SIGINT, SIGTERM]).context("cannot watch for signals")?;
    let patience = Duration::from_millis(config.drain_ms);
    let mut broker = Broker::start(config)?;
    let info = broker.info();
    // One line on standard output tells a parent process where the broker is.
    println!(
        "{}",
        json!({ "broker": info.id, "leader": broker.is_leader(), "data": info.data, "control": info.control })
    );
    let signal = loop {
        if broker.is_superseded() {
            broker.stop();
            bail!("another process has broker id {}", broker.info().id);
        }
        if let Some(signal) = signals.pending().next() {
            break signal;
        }
        std::thread::sleep(SIGNAL_PERIOD);
    };
    if signal == SIGTERM {
        broker.drain(patience, || signals.pending().next().is_some());
    }
    broker.stop();
    Ok(())
}
