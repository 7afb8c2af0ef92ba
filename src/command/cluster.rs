//! `embarcadero cluster`.

use crate::cluster::{Cluster, ClusterArgs};
use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGCHLD, SIGINT, SIGTERM};
use signal_hook::iterator::Signals;

pub fn run(args: &ClusterArgs) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGCHLD]).context("cannot watch for signals")?;
    let mut stopped = || signals.pending().any(|signal| signal != SIGCHLD);
    let mut cluster = Cluster::start_unless(args, &mut stopped)?;
    for (index, broker) in cluster.brokers.iter().enumerate() {
        println!("broker {index}: pid {}, control {}", broker.id(), broker.control);
    }
    if let Some(file) = &args.ready_file {
        std::fs::write(file, cluster.control()).with_context(|| format!("cannot write {}", file.display()))?;
    }
    // A broker may have ended meanwhile, and its signal was taken above.
    report_ended(&mut cluster)?;
    for signal in signals.forever() {
        if signal != SIGCHLD {
            break;
        }
        report_ended(&mut cluster)?;
    }
    Ok(())
}

/// Says which brokers have ended since the last call.
fn report_ended(cluster: &mut Cluster) -> Result<()> {
    for (pid, status) in cluster.take_ended() {
        eprintln!("broker with pid {pid} ended: {status}; {} left", cluster.brokers.len());
    }
    if !cluster.brokers.is_empty() {
        return Ok(());
    }
    // What is in the region may be nowhere else.
    if let Some(region) = cluster.keep_region() {
        let path = region.display();
        eprintln!("the region is kept: `embarcadero cluster --region {path}` goes on with it");
        eprintln!("`embarcadero region destroy --path {path}` gives its memory back");
    }
    bail!("all brokers ended")
}
