//! `bench datapath`: the transport alone and the whole publish path, by size, as perftest prints them.
//!
//! With `--perftest` the figures stand beside those of perftest's own tools.

use crate::args::BenchArgs;
use crate::ceiling;
use crate::latency::one_at_a_time;
use crate::publish::publish_goodput;
use crate::report::{Format, Report, Row};
use crate::{engine, memif};
use anyhow::{Context, Result, bail};
use clap::Args;
use embarcadero::settings::parse_bytes;
use embarcadero_client::TransportKind;
use serde_json::json;
use std::process::{Command, Stdio};
use std::time::Duration;

#[derive(Args)]
pub(crate) struct DatapathArgs {
    #[command(flatten)]
    bench: BenchArgs,
    /// Sizes of the transport's messages and of batches, bytes.
    #[arg(long, value_delimiter = ',', value_parser = parse_bytes,
        default_value = "64,256,1KiB,4KiB,16KiB,64KiB,256KiB,1MiB,4MiB")]
    sizes: Vec<u64>,
    /// Compare with perftest's tools on this device, instead of going through the sizes. Writes of 64 KiB and publishing
    /// stand beside ib_write_bw; one message at a time stands beside ib_write_lat and ib_send_lat.
    #[arg(long, value_name = "DEVICE")]
    perftest: Option<String>,
    /// Devices of DPDK that reach each other, named as for its --vdev, instead of ports that share memory. Only the
    /// transport between them is measured then.
    #[arg(long, num_args = 2, value_names = ["NEAR", "FAR"])]
    devices: Option<Vec<String>>,
    /// MTU of those devices, bytes (dpdk.mtu).
    #[arg(long, default_value_t = memif::MTU, requires = "devices")]
    mtu: u16,
}

/// Bytes of the smallest batch.
const LEAST_BATCH: u64 = 4 << 10;

pub(crate) fn run(args: &DatapathArgs) -> Result<()> {
    if let Some(device) = &args.perftest {
        return beside_perftest(&args.bench, device);
    }
    let mut bench = args.bench.clone();
    if let Some([near, far]) = args.devices.as_deref() {
        if bench.transport != TransportKind::Dpdk {
            bail!("--devices is of --transport dpdk");
        }
        bench.devices = Some(memif::Devices { near: near.clone(), far: far.clone(), mtu: args.mtu });
    }
    if bench.format() == Format::Text {
        println!(
            "{:>9} {:>14} {:>12} {:>12} {:>14} {:>12}",
            "#bytes", "BW [MB/s]", "rate [M/s]", "lat [us]", "publish [MB/s]", "ack [us]"
        );
    }
    for size in &args.sizes {
        one_size(&bench, *size)?;
    }
    if bench.transport == TransportKind::Roce {
        let rows = engine::rows(bench.runs, bench.seconds)?;
        return Report::new(bench.parameters(), bench.format()).print(&rows);
    }
    Ok(())
}

fn transport_alone(args: &BenchArgs, bytes: usize) -> Result<(f64, f64)> {
    let (cores, seconds) = (args.cores(), args.seconds);
    Ok(match args.transport {
        TransportKind::Tcp => (
            ceiling::tcp_receive_into_region(cores, bytes, seconds)?,
            ceiling::tcp_ping_pong(cores, bytes, seconds)? / 2.0,
        ),
        _ => (ceiling::verbs_write(args, bytes)?, ceiling::verbs_ping_pong(args, bytes)?),
    })
}

/// Arguments for batches of a size, filled with messages of at most a quarter of it.
fn with_batches_of(args: &BenchArgs, bytes: u64) -> BenchArgs {
    BenchArgs {
        batch_size: Some(bytes as usize),
        message_bytes: args.message_bytes.min(bytes as usize / 4),
        ..args.clone()
    }
}

fn one_size(args: &BenchArgs, bytes: u64) -> Result<()> {
    let (mut bandwidth, mut latency, mut publish, mut ack) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.runs {
        let (rate, time) = transport_alone(args, bytes as usize)?;
        bandwidth.push(rate);
        latency.push(time);
        if args.devices.is_some() {
            continue;
        }
        if bytes >= LEAST_BATCH {
            publish.push(publish_goodput(&with_batches_of(args, bytes))?);
        }
        let one = BenchArgs {
            message_bytes: bytes as usize,
            batch_size: Some((2 * bytes as usize).max(args.write_bytes())),
            ..args.clone()
        };
        ack.push(one_at_a_time(&one)?.value_at_quantile(0.5) as f64 / 1e9);
    }
    let rows = [
        Row::new("transport.bandwidth", "B/s", &bandwidth),
        Row::new("transport.latency.p50", "s", &latency),
        Row::new("publish.goodput", "B/s", &publish).with_ceiling("transport.bandwidth", &bandwidth),
        Row::new("publish_to_ack.p50", "s", &ack).with_ceiling("transport.latency.p50", &latency),
    ];
    if args.format() != Format::Text {
        let mut parameters = args.parameters();
        parameters["bytes"] = json!(bytes);
        let rows: Vec<_> = rows.into_iter().filter(|row| row.median().is_finite()).collect();
        return Report::new(parameters, args.format()).print(&rows);
    }
    let [bandwidth, latency, publish, ack] = rows.map(|row| row.median());
    let or_not = |figure: f64| if figure.is_finite() { format!("{figure:.1}") } else { "-".to_owned() };
    println!(
        "{bytes:>9} {:>14.1} {:>12.4} {:>12.1} {:>14} {:>12}",
        bandwidth / 1e6,
        bandwidth / bytes as f64 / 1e6,
        latency * 1e6,
        or_not(publish / 1e6),
        or_not(ack * 1e6)
    );
    Ok(())
}

/// Runs a tool of perftest against itself on `device`. Returns the number in `column` of the tool's last line of figures.
fn perftest(tool: &str, device: &str, bytes: u64, column: usize, seconds: f64) -> Result<f64> {
    let seconds = (seconds.ceil() as u64).max(2).to_string();
    let bytes = bytes.to_string();
    let mut arguments = vec!["-d", device, "-s", &bytes, "-F"];
    if tool.ends_with("_bw") {
        arguments.extend(["-D", &seconds]);
    } else {
        arguments.extend(["-n", "2000"]);
    }
    let mut server = Command::new(tool)
        .args(&arguments)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .with_context(|| format!("cannot run {tool}: install perftest"))?;
    // The server says nothing when it listens.
    let client = loop {
        let client = Command::new(tool).args(&arguments).arg("127.0.0.1").output();
        let refused =
            client.as_ref().is_ok_and(|client| String::from_utf8_lossy(&client.stderr).contains("Couldn't connect"));
        if !refused || server.try_wait()?.is_some() {
            break client;
        }
        std::thread::sleep(Duration::from_millis(100));
    };
    let _ = server.kill();
    let _ = server.wait();
    let client = client.with_context(|| format!("cannot run {tool}"))?;
    let (said, complaint) = (String::from_utf8_lossy(&client.stdout), String::from_utf8_lossy(&client.stderr));
    let figures = said.lines().rev().find(|line| line.trim_start().starts_with(&bytes));
    let figure = figures.and_then(|line| line.split_whitespace().nth(column)?.parse().ok());
    match figure {
        Some(figure) => Ok(figure),
        None => bail!("{tool} printed no figures: {said}{complaint}"),
    }
}

fn beside_perftest(args: &BenchArgs, device: &str) -> Result<()> {
    if args.transport != TransportKind::Verbs {
        bail!("--perftest is of --transport verbs");
    }
    const WRITE: u64 = 64 << 10;
    let (mut bandwidths, mut latencies) = (Vec::new(), Vec::new());
    let (mut alone, mut publish, mut ack) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..args.runs {
        // MiB/s and microseconds. In emulated guests perftest does not know how fast its clock counts, and prints `inf`.
        bandwidths.push(perftest("ib_write_bw", device, WRITE, 3, args.seconds)? * f64::from(1 << 20));
        alone.push(ceiling::verbs_write(args, WRITE as usize)?);
        publish.push(publish_goodput(args)?);
        let message = args.message_bytes as u64;
        let write = perftest("ib_write_lat", device, message, 4, args.seconds)?;
        latencies.push((write + perftest("ib_send_lat", device, message, 4, args.seconds)?) / 1e6);
        ack.push(one_at_a_time(args)?.value_at_quantile(0.5) as f64 / 1e9);
    }
    let ack = Row::new("publish_to_ack.p50", "s", &ack);
    let rows = [
        Row::new("transport.bandwidth", "B/s", &alone).with_ceiling("ib_write_bw", &bandwidths),
        Row::new("publish.goodput", "B/s", &publish).with_ceiling("ib_write_bw", &bandwidths),
        if latencies.iter().all(|latency: &f64| latency.is_finite()) {
            ack.with_ceiling("ib_write_lat + ib_send_lat", &latencies)
        } else {
            eprintln!(
                "ib_write_lat and ib_send_lat do not know the speed of this host's clock: no ceiling for latency"
            );
            ack
        },
    ];
    Report::new(args.parameters(), args.format()).print(&rows)
}
