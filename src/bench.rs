//! `embarcadero bench`: each figure beside the ceiling that the same run measured.

mod ceiling;
mod datapath;
mod deviations;
mod engine;
mod failover;
mod grid;
mod latency;
mod memif;
mod peers;
mod plot;
mod replication;
mod report;
mod scale;
mod sequencer;

use crate::cluster::{Cluster, ClusterArgs};
use crate::settings::TransportArg;
use anyhow::{Context, Result, bail};
use clap::{Args, Subcommand};
use datapath::DatapathArgs;
use deviations::DeviationArgs;
use embarcadero_client::{Client, ClientConfig, Order, Publisher, Start, TopicOptions};
use embarcadero_datapath::cxl::layout::MAX_BROKERS;
use embarcadero_datapath::transport::prepare_polling_thread;
use grid::GridArgs;
use latency::{LatencyArgs, LoadArgs};
use peers::PeerArgs;
use plot::PlotArgs;
use report::{Format, Report, Row};
use scale::ScaleArgs;
use serde_json::json;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

#[derive(Args, Clone)]
pub struct BenchArgs {
    /// Broker processes.
    #[arg(long, default_value_t = 1)]
    brokers: u32,
    /// Publishers (sessions) in this process, one thread each.
    #[arg(long, default_value_t = 1)]
    publishers: u32,
    /// Bytes of a message.
    #[arg(long, default_value_t = 1024)]
    message_bytes: usize,
    /// Bytes of a batch; by default the client's adaptive sizes.
    #[arg(long)]
    batch_size: Option<usize>,
    /// Bytes that a publisher holds at most; by default 16 batches, with level 2 128.
    #[arg(long)]
    buffer_bytes: Option<usize>,
    /// How bytes travel.
    #[arg(long, default_value = "tcp")]
    transport: TransportArg,
    /// Order of the topic.
    #[arg(long, default_value = "strong")]
    order: Order,
    /// Acknowledgement level.
    #[arg(long, default_value_t = 1)]
    ack: u8,
    /// Copies of each batch, the one in CXL memory included.
    #[arg(long, default_value_t = 1)]
    replication_factor: u8,
    /// Directory in which brokers keep replicas, on the disk to be measured.
    #[arg(long)]
    replicas: Option<PathBuf>,
    /// Seconds a run.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Runs; the median is reported.
    #[arg(long, default_value_t = 5)]
    runs: usize,
    /// Give batches a body checksum (the client's default; off here, as peers do not).
    #[arg(long)]
    checksum: bool,
    /// Leave threads to the scheduler. By default publishers and the ceilings' senders run on core 0, brokers and the
    /// ceilings' receivers on the others.
    #[arg(long)]
    no_pin: bool,
    /// Bytes of the region, where a bench needs more.
    #[arg(skip)]
    region_bytes: Option<u64>,
    /// An open loop publishes so many messages together, when the last of them is due; 0 and 1 are the same.
    #[arg(skip)]
    messages_at_once: u64,
    /// Over DPDK: devices that reach each other, for the transport alone.
    #[arg(skip)]
    devices: Option<memif::Devices>,
    /// Settings of the brokers that a comparison varies.
    #[arg(skip)]
    environment: Vec<(String, String)>,
    /// One JSON object a line.
    #[arg(long, conflicts_with = "csv")]
    json: bool,
    /// Comma-separated values.
    #[arg(long)]
    csv: bool,
}

#[derive(Subcommand)]
pub enum BenchCommand {
    /// Acknowledged publish goodput, and what the machine can do.
    Publish(GridArgs),
    /// Publish to acknowledgement and delivery: one message at a time, or at fixed rates.
    Latency(LatencyArgs),
    /// The same at parts of the most that can be published, up to all of it.
    LatencyVsLoad(LoadArgs),
    /// Goodput from publish to subscriber.
    EndToEnd(GridArgs),
    /// Batches of --publishers sessions at --brokers brokers that one core orders a second, flushes on; and segment
    /// allocation.
    Sequencer(GridArgs),
    /// CPU of an idle broker.
    Idle(BenchArgs),
    /// Longest time without an acknowledgement when the head, or another broker, is killed.
    Failover(BenchArgs),
    /// Goodput with replication at levels 1 and 2, beside the disk's and that without.
    Replication(BenchArgs),
    /// Each entry of the deviation register beside the paper's way, in turn.
    Deviations(DeviationArgs),
    /// What publishing costs as the log grows, and with many topics and sessions.
    Scale(ScaleArgs),
    /// Acknowledged publishing beside NATS JetStream, Redis Streams, Kafka or Redpanda; see scripts/compare.
    Peers(PeerArgs),
    /// The transport alone and the whole publish path, by size.
    Datapath(DatapathArgs),
    /// Draws what benches printed with --json.
    Plot(PlotArgs),
}

pub fn run(command: BenchCommand) -> Result<()> {
    match command {
        BenchCommand::Publish(args) => publish(&args),
        BenchCommand::Latency(args) => latency::run(&args),
        BenchCommand::LatencyVsLoad(args) => latency::versus_load(&args),
        BenchCommand::EndToEnd(args) => end_to_end(&args),
        BenchCommand::Sequencer(args) => sequencer::run(&args),
        BenchCommand::Idle(args) => idle(&args),
        BenchCommand::Failover(args) => failover::run(&args),
        BenchCommand::Replication(args) => replication::run(&args),
        BenchCommand::Deviations(args) => deviations::run(&args),
        BenchCommand::Scale(args) => scale::run(&args),
        BenchCommand::Peers(args) => peers::run(&args),
        BenchCommand::Datapath(args) => datapath::run(&args),
        BenchCommand::Plot(args) => plot::run(&args),
    }
}

const REGION_BYTES: u64 = 2 << 30;
const SEGMENT_BYTES: u64 = 64 << 20;
const RETENTION_BYTES: u64 = 512 << 20;
/// With more brokers than this each must have several segments of a small region.
const FEW_BROKERS: u32 = 4;
const MANY_BROKERS_SEGMENT_BYTES: u64 = 8 << 20;
/// What all publishers hold together at most.
const ALL_BUFFERS_BYTES: usize = 1 << 30;
/// Over RDMA the whole region is pinned, and in the lab a guest has not much memory.
const SMALL_REGION_BYTES: u64 = 512 << 20;
const SMALL_SEGMENT_BYTES: u64 = 16 << 20;
const SMALL_RETENTION_BYTES: u64 = 192 << 20;

impl BenchArgs {
    fn parameters(&self) -> serde_json::Value {
        json!({
            "transport": self.transport.name(), "brokers": self.brokers, "publishers": self.publishers, "message_bytes": self.message_bytes,
            "batch_size": self.batch_size, "order": self.order, "ack": self.ack, "replication_factor": self.replication_factor, "seconds": self.seconds,
            "checksum": self.checksum, "pinned": self.near_core().is_some(),
        })
    }

    fn format(&self) -> Format {
        match (self.json, self.csv) {
            (true, _) => Format::Json,
            (_, true) => Format::Csv,
            _ => Format::Text,
        }
    }

    /// Core of the publishing side; `None` where nothing is pinned.
    fn near_core(&self) -> Option<usize> {
        (!self.no_pin && host_cores() > 1).then_some(0)
    }

    /// Cores of the brokers' side; empty where nothing is pinned.
    fn far_cores(&self) -> Vec<usize> {
        if self.near_core().is_some() { (1..host_cores()).collect() } else { Vec::new() }
    }

    fn pair(&self) -> ceiling::Pair {
        ceiling::Pair { near: self.near_core(), far: self.far_cores().first().copied() }
    }

    fn ceiling_name(&self, tcp: &'static str) -> &'static str {
        match (self.transport, tcp) {
            (TransportArg::Tcp, name) => name,
            (TransportArg::Verbs, "tcp_recv_into_region") => "verbs_write_with_imm",
            (TransportArg::Verbs, _) => "verbs_ping_pong.round_trip_p50",
            (TransportArg::Roce, "tcp_recv_into_region") => "roce_write_with_imm",
            (TransportArg::Roce, _) => "roce_ping_pong.round_trip_p50",
            (TransportArg::Dpdk, "tcp_recv_into_region") => "dpdk_write_with_imm",
            (TransportArg::Dpdk, _) => "dpdk_ping_pong.round_trip_p50",
        }
    }

    /// Bytes that the ceilings move at a time.
    fn write_bytes(&self) -> usize {
        self.batch_size.unwrap_or(512 << 10)
    }

    fn region() -> PathBuf {
        PathBuf::from(format!("/dev/shm/embarcadero-bench-{}", std::process::id()))
    }

    fn check(&self) -> Result<()> {
        if self.message_bytes == 0 || self.publishers == 0 || self.runs == 0 {
            bail!("--message-bytes, --publishers and --runs must be at least 1");
        }
        if self.transport == TransportArg::Dpdk && self.brokers > 1 {
            bail!("over DPDK the bench's port has one peer: --brokers must be 1");
        }
        if !(1..=MAX_BROKERS).contains(&self.brokers) {
            bail!("--brokers must be 1 to {MAX_BROKERS}");
        }
        Ok(())
    }

    fn cluster(&self) -> Result<Cluster> {
        self.check()?;
        let mut environment = self.environment.clone();
        if self.transport == TransportArg::Dpdk {
            environment.extend(memif::broker());
        }
        let small = self.transport != TransportArg::Tcp;
        Cluster::start(&ClusterArgs {
            brokers: self.brokers,
            region: Self::region(),
            size: self.region_bytes.unwrap_or(if small { SMALL_REGION_BYTES } else { REGION_BYTES }),
            segment_size: match self.brokers {
                _ if small => SMALL_SEGMENT_BYTES,
                0..=FEW_BROKERS => SEGMENT_BYTES,
                _ => MANY_BROKERS_SEGMENT_BYTES,
            },
            port: 0,
            config: None,
            transport: Some(self.transport),
            cores: self.far_cores(),
            replicas: self.replicas.clone(),
            environment,
            ready_file: None,
        })
    }

    fn client(&self, cluster: &Cluster) -> Result<Client> {
        // A disk takes longer to answer: as much is under way as a session may have.
        let batches = if self.ack > 1 { 128 } else { 16 };
        let bytes = batches * self.batch_size.unwrap_or(1 << 20);
        let share = ALL_BUFFERS_BYTES / self.publishers as usize;
        let defaults = ClientConfig::default();
        // Many publishers have little each.
        let batch_size_max = defaults.batch_size_max.min(share / 2).max(defaults.batch_size_min);
        let least = 2 * self.batch_size.unwrap_or(batch_size_max);
        let config = ClientConfig {
            ack_level: self.ack,
            batch_size: self.batch_size,
            batch_size_max,
            buffer_bytes: self.buffer_bytes.unwrap_or_else(|| bytes.max(1 << 20).min(share).max(least)),
            batch_checksum: self.checksum,
            transport: self.transport.into(),
            dpdk: if self.transport == TransportArg::Dpdk { memif::client() } else { defaults.dpdk },
            ..ClientConfig::at(cluster.control())
        };
        Ok(Client::connect(config)?)
    }

    fn topic(&self, client: &Client, name: &str) -> Result<()> {
        let options = TopicOptions {
            order: self.order,
            ack_level: if self.replication_factor > 1 { 2 } else { 1 },
            replication_factor: self.replication_factor,
            retention_bytes: match self.transport {
                TransportArg::Tcp => RETENTION_BYTES,
                _ => SMALL_RETENTION_BYTES,
            },
            ..TopicOptions::default()
        };
        client.create_topic(name, options)?;
        Ok(())
    }
}

fn host_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Puts the calling thread on a core, if one is given.
fn pin(core: Option<usize>) -> Result<()> {
    prepare_polling_thread(core).context("cannot put a thread on its core; try --no-pin")
}

/// How far publishers are ahead of a subscriber, bytes of messages.
#[derive(Default)]
struct Lead {
    published: AtomicU64,
    delivered: AtomicU64,
}

impl Lead {
    /// A quarter of the retention: beyond it publishers wait, so that nothing is trimmed before it is read.
    fn is_long(&self) -> bool {
        let delivered = self.delivered.load(Ordering::Relaxed);
        self.published.load(Ordering::Relaxed).saturating_sub(delivered) > RETENTION_BYTES / 4
    }
}

/// Publishes for `time`; bytes of messages that were acknowledged.
fn publish_for(publisher: &Publisher, message: &[u8], time: Duration, lead: Option<&Lead>) -> Result<u64> {
    const AT_A_TIME: u64 = 256;
    let begun = Instant::now();
    let mut bytes = 0;
    while begun.elapsed() < time {
        if lead.is_some_and(Lead::is_long) {
            publisher.wait(Duration::from_millis(1))?;
            continue;
        }
        for _ in 0..AT_A_TIME {
            publisher.publish_wait(message)?;
        }
        let more = AT_A_TIME * message.len() as u64;
        bytes += more;
        if let Some(lead) = lead {
            lead.published.fetch_add(more, Ordering::Relaxed);
        }
    }
    publisher.flush()?;
    Ok(bytes)
}

/// One run with every publisher on a thread of its own: bytes a second.
fn goodput(args: &BenchArgs, client: &Client, topic: &str, lead: Option<&Lead>) -> Result<f64> {
    let time = Duration::from_secs_f64(args.seconds);
    let publishers = (0..args.publishers).map(|_| client.publisher(topic)).collect::<Result<Vec<_>, _>>()?;
    let message = vec![b'm'; args.message_bytes];
    let publish = |publisher| {
        pin(args.near_core())?;
        publish_for(publisher, &message, time, lead)
    };
    let publish = &publish;
    let begun = Instant::now();
    let bytes = std::thread::scope(|scope| {
        let threads: Vec<_> = publishers.iter().map(|publisher| scope.spawn(move || publish(publisher))).collect();
        let mut sum = 0;
        for thread in threads {
            sum += thread.join().map_err(|_| anyhow::anyhow!("a publisher thread died"))??;
        }
        Ok::<u64, anyhow::Error>(sum)
    })?;
    let rate = bytes as f64 / begun.elapsed().as_secs_f64();
    for publisher in publishers {
        publisher.close()?;
    }
    Ok(rate)
}

/// One run on a cluster of its own.
fn publish_goodput(args: &BenchArgs) -> Result<f64> {
    let cluster = args.cluster()?;
    let client = args.client(&cluster)?;
    args.topic(&client, "bench")?;
    // The first pass touches memory.
    let warm = BenchArgs { seconds: args.seconds / 4.0, ..args.clone() };
    goodput(&warm, &client, "bench", None)?;
    goodput(args, &client, "bench", None)
}

fn publish(args: &GridArgs) -> Result<()> {
    for point in args.points()? {
        let bench = &point.bench;
        let (mut ceilings, mut rates) = (Vec::new(), Vec::new());
        for _ in 0..bench.runs {
            ceilings.push(match bench.transport {
                TransportArg::Tcp => {
                    ceiling::tcp_receive_into_region(bench.pair(), bench.write_bytes(), bench.seconds)?
                }
                _ => ceiling::verbs_write(bench, bench.write_bytes())?,
            });
            rates.push(publish_goodput(bench)?);
        }
        let name = bench.ceiling_name("tcp_recv_into_region");
        let goodput = Row::new("publish.goodput", "B/s", &rates).with_ceiling(name, &ceilings);
        let messages: Vec<f64> = rates.iter().map(|rate| rate / bench.message_bytes as f64).collect();
        point.print(bench.parameters(), &[goodput, Row::new("publish.messages", "1/s", &messages)])?;
    }
    let bench = &args.bench;
    Report::new(bench.parameters(), bench.format()).print(&ceiling::of_the_machine(bench)?)
}

/// Publishes and subscribes at once; (publish alone, publish while subscribed to, delivered).
fn publish_and_subscribe(args: &BenchArgs) -> Result<(f64, f64, f64)> {
    let cluster = args.cluster()?;
    let client = args.client(&cluster)?;
    args.topic(&client, "alone")?;
    goodput(&BenchArgs { seconds: args.seconds / 4.0, ..args.clone() }, &client, "alone", None)?;
    let alone = goodput(args, &client, "alone", None)?;
    client.delete_topic("alone")?;
    args.topic(&client, "both")?;
    let mut subscriber = client.subscriber("both", Start::Earliest)?;
    let lead = Lead::default();
    let begun = Instant::now();
    let (published, delivered) = std::thread::scope(|scope| {
        let reader = scope.spawn(|| -> Result<(u64, Instant)> {
            let (mut bytes, mut last) = (0u64, Instant::now());
            loop {
                // Two seconds of silence end the run; they are not counted.
                match subscriber.next_batch(Duration::from_secs(2))? {
                    Some(batch) => {
                        bytes += u64::from(batch.header.payload_bytes);
                        lead.delivered.store(bytes, Ordering::Relaxed);
                        last = Instant::now();
                    }
                    None => return Ok((bytes, last)),
                }
            }
        });
        let published = goodput(args, &client, "both", Some(&lead))?;
        let (bytes, last) = reader.join().map_err(|_| anyhow::anyhow!("the subscriber thread died"))??;
        Ok::<_, anyhow::Error>((published, bytes as f64 / last.duration_since(begun).as_secs_f64()))
    })?;
    Ok((alone, published, delivered))
}

fn end_to_end(args: &GridArgs) -> Result<()> {
    for point in args.points()? {
        let bench = &point.bench;
        let (mut alone, mut published, mut delivered) = (Vec::new(), Vec::new(), Vec::new());
        for _ in 0..bench.runs {
            let (a, p, d) = publish_and_subscribe(bench)?;
            alone.push(a);
            published.push(p);
            delivered.push(d);
        }
        let rows = [
            Row::new("end_to_end.goodput", "B/s", &delivered).with_ceiling("publish_in_the_same_run", &published),
            Row::new("end_to_end.goodput_vs_publish_alone", "B/s", &delivered).with_ceiling("publish_alone", &alone),
        ];
        point.print(bench.parameters(), &rows)?;
    }
    Ok(())
}

fn cpu_seconds(pid: u32) -> Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: f64 = fields.iter().skip(11).take(2).filter_map(|field| field.parse::<f64>().ok()).sum();
    // USER_HZ is 100 on every Linux platform that we run on (proc(5)).
    Ok(ticks / 100.0)
}

/// Processors that the first of idle brokers takes.
fn idle_cpu(args: &BenchArgs, seconds: f64) -> Result<f64> {
    let cluster = args.cluster()?;
    let client = args.client(&cluster)?;
    args.topic(&client, "bench")?;
    std::thread::sleep(Duration::from_millis(500));
    let pid = cluster.brokers.first().map_or(0, crate::cluster::BrokerProcess::id);
    let before = cpu_seconds(pid)?;
    std::thread::sleep(Duration::from_secs_f64(seconds));
    Ok((cpu_seconds(pid)? - before) / seconds)
}

fn idle(args: &BenchArgs) -> Result<()> {
    let shares = (0..args.runs).map(|_| idle_cpu(args, 5.0)).collect::<Result<Vec<_>>>()?;
    Report::new(args.parameters(), args.format()).print(&[Row::new("idle.broker_cpu", "cores", &shares)])
}
