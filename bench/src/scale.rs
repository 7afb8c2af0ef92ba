//! `bench scale`: cost of publishing as the log grows, and with many topics and many sessions.

use crate::args::{BenchArgs, SEGMENT_BYTES};
use crate::cores::pin;
use crate::report::{Report, Row};
use anyhow::{Result, bail};
use clap::Args;
use embarcadero::cluster::Cluster;
use embarcadero_client::{Client, ClientConfig, ClientError, Publisher, TopicOptions};
use std::time::{Duration, Instant};

#[derive(Args, Clone)]
pub(crate) struct ScaleArgs {
    #[command(flatten)]
    bench: BenchArgs,
    /// Size to which the log grows, gigabytes; the region is 1 GiB larger.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u64).range(2..=1024))]
    log_gigabytes: u64,
    /// Number of topics; the region has 256 MiB for each.
    #[arg(long, default_value_t = 32, value_parser = clap::value_parser!(u32).range(2..=32))]
    topics: u32,
    /// Number of sessions.
    #[arg(long, default_value_t = 1000, value_parser = clap::value_parser!(u32).range(5..=1024))]
    sessions: u32,
}

const GIGABYTE: u64 = 1_000_000_000;
/// Number of sessions with which many are compared.
const FEW_SESSIONS: u32 = 4;
/// Number of messages that a publisher gets before the next has its turn.
const TURN: u32 = 64;
/// Bytes of a batch in the comparison of sessions: with many, each has little memory.
const SMALL_BATCH: usize = 64 << 10;

/// Publishes through all publishers in turn, in one thread, until `enough` holds for the bytes taken. Returns bytes per
/// second.
fn in_turn(args: &BenchArgs, publishers: &[Publisher], enough: impl Fn(u64) -> bool + Sync) -> Result<f64> {
    let message = vec![b'm'; args.message_bytes];
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| -> Result<f64> {
            pin(args.near_core())?;
            let (begun, mut bytes) = (Instant::now(), 0);
            while !enough(bytes) {
                let before = bytes;
                for publisher in publishers {
                    for _ in 0..TURN {
                        match publisher.publish(&message) {
                            Ok(_) => bytes += message.len() as u64,
                            Err(ClientError::BufferFull { .. }) => break,
                            Err(error) => return Err(error.into()),
                        }
                    }
                }
                if bytes == before {
                    publishers.iter().try_for_each(|publisher| publisher.wait(Duration::ZERO))?;
                }
            }
            publishers.iter().try_for_each(Publisher::flush)?;
            Ok(bytes as f64 / begun.elapsed().as_secs_f64())
        });
        thread.join().map_err(|_| anyhow::anyhow!("the publisher thread died"))?
    })
}

/// Publishes through all publishers in turn for the duration of a run. Returns bytes per second.
fn for_a_while(args: &BenchArgs, publishers: &[Publisher]) -> Result<f64> {
    let (begun, time) = (Instant::now(), Duration::from_secs_f64(args.seconds));
    in_turn(args, publishers, |_| begun.elapsed() >= time)
}

/// Seconds per gigabyte of a log: of the first gigabyte, and of all.
fn growing_log(args: &ScaleArgs) -> Result<(f64, f64)> {
    let bench = BenchArgs { region_bytes: Some((args.log_gigabytes * GIGABYTE) + (1 << 30)), ..args.bench.clone() };
    let cluster = bench.cluster()?;
    let client = bench.client(&cluster)?;
    // Nothing goes.
    client.create_topic("log", TopicOptions { order: bench.order, retention_bytes: 0, ..TopicOptions::default() })?;
    let publishers = [client.publisher("log")?];
    let first = 1.0 / in_turn(&bench, &publishers, |bytes| bytes >= GIGABYTE)?;
    let others = (args.log_gigabytes - 1) as f64;
    let rest = 1.0 / in_turn(&bench, &publishers, |bytes| bytes >= (args.log_gigabytes - 1) * GIGABYTE)?;
    let gigabyte = GIGABYTE as f64;
    Ok((first * gigabyte, (first + rest * others) * gigabyte / args.log_gigabytes as f64))
}

/// Goodput with one topic, and with many, in bytes per second. Each topic has a publisher.
fn many_topics(args: &ScaleArgs) -> Result<(f64, f64)> {
    // Each topic has segments for batches and for its index.
    let region_bytes = Some((1 << 30) + u64::from(args.topics) * 4 * SEGMENT_BYTES);
    let (bench, kept) = (&BenchArgs { region_bytes, ..args.bench.clone() }, 16 << 20);
    let cluster = bench.cluster()?;
    let client = bench.client(&cluster)?;
    let open = |topic: u32| -> Result<Publisher> {
        let name = format!("topic-{topic}");
        client.create_topic(
            &name,
            TopicOptions { order: bench.order, retention_bytes: kept, ..TopicOptions::default() },
        )?;
        Ok(client.publisher(&name)?)
    };
    let mut publishers = vec![open(0)?];
    for_a_while(&BenchArgs { seconds: bench.seconds / 4.0, ..bench.clone() }, &publishers)?;
    let one = for_a_while(bench, &publishers)?;
    for topic in 1..args.topics {
        publishers.push(open(topic)?);
    }
    Ok((one, for_a_while(bench, &publishers)?))
}

/// Goodput with four sessions, and with many, in bytes per second.
fn many_sessions(args: &ScaleArgs) -> Result<(f64, f64)> {
    let bench = &args.bench;
    let cluster: Cluster = bench.cluster()?;
    let config = ClientConfig {
        batch_size: Some(SMALL_BATCH),
        buffer_bytes: 4 * SMALL_BATCH,
        batch_checksum: bench.checksum,
        transport: bench.transport,
        ..ClientConfig::at(cluster.control())
    };
    let client = Client::connect(config)?;
    bench.topic(&client, "sessions")?;
    let mut publishers = (0..FEW_SESSIONS).map(|_| client.publisher("sessions")).collect::<Result<Vec<_>, _>>()?;
    for_a_while(&BenchArgs { seconds: bench.seconds / 4.0, ..bench.clone() }, &publishers)?;
    let few = for_a_while(bench, &publishers)?;
    for _ in FEW_SESSIONS..args.sessions {
        publishers.push(client.publisher("sessions")?);
    }
    Ok((few, for_a_while(bench, &publishers)?))
}

pub(crate) fn run(args: &ScaleArgs) -> Result<()> {
    let bench = &args.bench;
    if bench.runs == 0 {
        bail!("--runs must be at least 1");
    }
    let (mut log, mut topics, mut sessions) = ((vec![], vec![]), (vec![], vec![]), (vec![], vec![]));
    for _ in 0..bench.runs {
        for (runs, (base, scaled)) in
            [(&mut log, growing_log(args)?), (&mut topics, many_topics(args)?), (&mut sessions, many_sessions(args)?)]
        {
            runs.0.push(base);
            runs.1.push(scaled);
        }
    }
    let rows = [
        Row::new("scale.log.seconds_per_gb", "s", &log.1).with_ceiling("the first gigabyte", &log.0),
        Row::new("scale.topics.goodput", "B/s", &topics.1).with_ceiling("one topic", &topics.0),
        Row::new("scale.sessions.goodput", "B/s", &sessions.1).with_ceiling("four sessions", &sessions.0),
    ];
    Report::new(bench.parameters(), bench.format()).print(&rows)
}
