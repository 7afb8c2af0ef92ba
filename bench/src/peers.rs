//! `bench peers`: acknowledged publishing to other systems, by clients as lean as their protocols allow.
//! `scripts/compare` starts the servers.

mod kafka;
mod nats;
mod peer;
mod redis;

use crate::args::BenchArgs;
use crate::cores::pin;
use crate::histogram;
use crate::latency::one_at_a_time;
use crate::publish::publish_goodput;
use crate::report::{Report, Row};
use anyhow::{Context, Result, bail};
use clap::Args;
use kafka::Kafka;
use nats::Nats;
use peer::Peer;
use redis::Redis;
use std::io::{BufReader, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

#[derive(Args, Clone)]
pub(crate) struct PeerArgs {
    #[command(flatten)]
    bench: BenchArgs,
    /// NATS with JetStream, HOST:PORT. Messages go to a stream in its memory.
    #[arg(long)]
    nats: Option<String>,
    /// Redis, HOST:PORT. Messages go to a stream (XADD).
    #[arg(long)]
    redis: Option<String>,
    /// Apache Kafka or Redpanda, HOST:PORT. Messages go to a topic of one partition, which the server creates.
    #[arg(long)]
    kafka: Option<String>,
    /// Most messages that a connection to a peer has under way.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u64).range(1..=65536))]
    window: u64,
}

struct Connection {
    writer: TcpStream,
    reader: BufReader<TcpStream>,
}

impl Connection {
    fn open(peer: &dyn Peer, number: u32) -> Result<Self> {
        let stream =
            TcpStream::connect(peer.address()).with_context(|| format!("cannot connect to {}", peer.address()))?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(Duration::from_secs(10)))?;
        let reader = BufReader::with_capacity(64 << 10, stream.try_clone()?);
        let mut connection = Self { writer: stream, reader };
        peer.open(number, &mut connection.writer, &mut connection.reader)?;
        Ok(connection)
    }
}

/// Publishes over one connection for a while. Returns the number of acknowledged messages.
fn stream(peer: &dyn Peer, number: u32, args: &PeerArgs, message: &[u8]) -> Result<u64> {
    let mut connection = Connection::open(peer, number)?;
    // A quarter of the window in one write.
    let group = (args.window / 4).max(1);
    let requests = peer.requests(number, message, group as usize);
    let (mut sent, mut acked) = (0, 0);
    let begun = Instant::now();
    while begun.elapsed().as_secs_f64() < args.bench.seconds {
        connection.writer.write_all(&requests)?;
        sent += group;
        while sent - acked > args.window - group {
            acked += peer.acknowledgement(&mut connection.writer, &mut connection.reader, group)?;
        }
    }
    while acked < sent {
        acked += peer.acknowledgement(&mut connection.writer, &mut connection.reader, group)?;
    }
    Ok(acked)
}

fn goodput(peer: &dyn Peer, args: &PeerArgs) -> Result<f64> {
    let message = vec![b'm'; args.bench.message_bytes];
    let begun = Instant::now();
    let publish = |number| {
        pin(args.bench.near_core())?;
        stream(peer, number, args, &message)
    };
    let publish = &publish;
    let messages = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..args.bench.publishers).map(|number| scope.spawn(move || publish(number))).collect();
        let mut sum = 0;
        for thread in threads {
            sum += thread.join().map_err(|_| anyhow::anyhow!("a publisher thread died"))??;
        }
        Ok::<u64, anyhow::Error>(sum)
    })?;
    Ok((messages * args.bench.message_bytes as u64) as f64 / begun.elapsed().as_secs_f64())
}

/// Median latency from publish to acknowledgement, one message at a time, seconds.
fn latency(peer: &dyn Peer, args: &BenchArgs) -> Result<f64> {
    let request = peer.requests(0, &vec![b'm'; args.message_bytes], 1);
    let mut histogram = histogram::of_nanoseconds()?;
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| -> Result<f64> {
            pin(args.near_core())?;
            let mut connection = Connection::open(peer, 0)?;
            let begun = Instant::now();
            while begun.elapsed().as_secs_f64() < args.seconds {
                let sent = Instant::now();
                connection.writer.write_all(&request)?;
                peer.acknowledgement(&mut connection.writer, &mut connection.reader, 1)?;
                histogram.record(sent.elapsed().as_nanos() as u64)?;
            }
            Ok(histogram.value_at_quantile(0.5) as f64 / 1e9)
        });
        thread.join().map_err(|_| anyhow::anyhow!("the publisher thread died"))?
    })
}

/// Peer, the names of its rows, and its runs.
struct Measured<'a> {
    peer: &'a dyn Peer,
    goodput_name: &'static str,
    latency_name: &'static str,
    goodput: Vec<f64>,
    latency: Vec<f64>,
}

pub(crate) fn run(args: &PeerArgs) -> Result<()> {
    let bench = &args.bench;
    let nats = args.nats.clone().map(|address| Nats { address });
    let redis = args.redis.clone().map(|address| Redis { address });
    let kafka = args.kafka.clone().map(|address| Kafka { address });
    let mut peers = Vec::new();
    let mut add = |peer, goodput_name, latency_name| {
        peers.push(Measured { peer, goodput_name, latency_name, goodput: Vec::new(), latency: Vec::new() });
    };
    if let Some(nats) = &nats {
        add(nats, "nats_jetstream.goodput", "nats_jetstream.publish_to_ack.p50");
    }
    if let Some(redis) = &redis {
        add(redis, "redis_streams.goodput", "redis_streams.publish_to_ack.p50");
    }
    if let Some(kafka) = &kafka {
        add(kafka, "kafka.goodput", "kafka.publish_to_ack.p50");
    }
    if peers.is_empty() {
        bail!("name a peer: --nats, --redis or --kafka");
    }
    let (mut ours, mut our_latency) = (Vec::new(), Vec::new());
    for _ in 0..bench.runs {
        ours.push(publish_goodput(bench)?);
        our_latency.push(one_at_a_time(bench)?.value_at_quantile(0.5) as f64 / 1e9);
        for measured in &mut peers {
            measured.goodput.push(goodput(measured.peer, args)?);
            measured.latency.push(latency(measured.peer, bench)?);
        }
    }
    let mut rows = Vec::new();
    for measured in &peers {
        rows.push(Row::new("publish.goodput", "B/s", &ours).with_ceiling(measured.goodput_name, &measured.goodput));
    }
    for measured in &peers {
        let row = Row::new("latency.publish_to_ack.p50", "s", &our_latency);
        rows.push(row.with_ceiling(measured.latency_name, &measured.latency));
    }
    Report::new(bench.parameters(), bench.format()).print(&rows)
}
