//! `bench idle`: processor time of a broker that has nothing to do.

use crate::args::BenchArgs;
use crate::report::{Report, Row};
use anyhow::Result;
use embarcadero::cluster::BrokerProcess;
use std::time::Duration;

pub(crate) fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: f64 = fields.iter().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    // USER_HZ is 100 on every Linux platform that we run on (proc(5)).
    Ok(ticks / 100.0)
}

/// Processors that an idle broker takes: processor seconds per second.
pub(crate) fn idle_cpu(args: &BenchArgs, seconds: f64) -> Result<f64> {
    let cluster = args.cluster()?;
    let client = args.client(&cluster)?;
    args.topic(&client, "bench")?;
    std::thread::sleep(Duration::from_millis(500));
    let pid = cluster.brokers.first().map_or(0, BrokerProcess::id);
    let before = cpu_seconds(pid)?;
    std::thread::sleep(Duration::from_secs_f64(seconds));
    Ok((cpu_seconds(pid)? - before) / seconds)
}

pub(crate) fn run(args: &BenchArgs) -> Result<()> {
    let shares = (0..args.runs).map(|_| idle_cpu(args, 5.0)).collect::<Result<Vec<_>>>()?;
    Report::new(args.parameters(), args.format()).print(&[Row::new("idle.broker_cpu", "cores", &shares)])
}
