//! Arguments of every bench, and the cluster, clients and topics that follow from them.

use crate::cores::{CorePair, host_cores};
use crate::memif;
use crate::report::Format;
use anyhow::{Result, bail};
use clap::Args;
use embarcadero::cluster::{Cluster, ClusterArgs};
use embarcadero_client::{Client, ClientConfig, Order, TopicOptions, TransportKind};
use embarcadero_cxl::layout::MAX_BROKERS;
use serde_json::json;
use std::path::PathBuf;

#[derive(Args, Clone)]
pub(crate) struct BenchArgs {
    /// Number of broker processes.
    #[arg(long, default_value_t = 1)]
    pub brokers: u32,
    /// Number of publishers (sessions) in this process, one thread each.
    #[arg(long, default_value_t = 1)]
    pub publishers: u32,
    /// Bytes of a message.
    #[arg(long, default_value_t = 1024)]
    pub message_bytes: usize,
    /// Bytes of a batch; by default the client's adaptive sizes.
    #[arg(long)]
    pub batch_size: Option<usize>,
    /// Most bytes that a publisher holds; by default those of 16 batches, at acknowledgement level 2 of 128.
    #[arg(long)]
    pub buffer_bytes: Option<usize>,
    /// Transport between clients and brokers.
    #[arg(long, default_value = "tcp")]
    pub transport: TransportKind,
    /// Order of the topic.
    #[arg(long, default_value = "strong")]
    pub order: Order,
    /// Acknowledgement level.
    #[arg(long, default_value_t = 1)]
    pub ack: u8,
    /// Number of copies of each batch, the one in CXL memory included.
    #[arg(long, default_value_t = 1)]
    pub replication_factor: u8,
    /// Directory in which brokers keep replicas, on the disk to be measured.
    #[arg(long)]
    pub replicas: Option<PathBuf>,
    /// Duration of a run, seconds.
    #[arg(long, default_value_t = 2.0)]
    pub seconds: f64,
    /// Number of runs; the median is reported.
    #[arg(long, default_value_t = 5)]
    pub runs: usize,
    /// Give batches a body checksum. This is the client's default; it is off here, as other systems have none.
    #[arg(long)]
    pub checksum: bool,
    /// Leave threads to the scheduler. By default publishers and the ceilings' senders run on core 0, brokers and the
    /// ceilings' receivers on the others.
    #[arg(long)]
    pub no_pin: bool,
    /// Bytes of the region, where a bench needs more than the default.
    #[arg(skip)]
    pub region_bytes: Option<u64>,
    /// Number of messages that an open loop publishes together, once the last of them is due; 0 counts as 1.
    #[arg(skip)]
    pub messages_at_once: u64,
    /// Devices of DPDK that reach each other, for measuring the transport alone.
    #[arg(skip)]
    pub devices: Option<memif::Devices>,
    /// Environment of the brokers: settings that a comparison varies.
    #[arg(skip)]
    pub environment: Vec<(String, String)>,
    /// Print one JSON object per line.
    #[arg(long, conflicts_with = "csv")]
    pub json: bool,
    /// Print comma-separated values.
    #[arg(long)]
    pub csv: bool,
}

pub(crate) const REGION_BYTES: u64 = 2 << 30;
pub(crate) const SEGMENT_BYTES: u64 = 64 << 20;
pub(crate) const RETENTION_BYTES: u64 = 512 << 20;
/// Largest number of brokers for which [`SEGMENT_BYTES`] leaves each several segments.
const FEW_BROKERS: u32 = 4;
/// Bytes of a segment with more brokers than [`FEW_BROKERS`].
const MANY_BROKERS_SEGMENT_BYTES: u64 = 8 << 20;
/// Most bytes that all publishers hold together.
const ALL_BUFFERS_BYTES: usize = 1 << 30;
/// Bytes of the region over RDMA: the whole region is pinned, and a guest of the lab has little memory.
const SMALL_REGION_BYTES: u64 = 512 << 20;
const SMALL_SEGMENT_BYTES: u64 = 16 << 20;
pub(crate) const SMALL_RETENTION_BYTES: u64 = 192 << 20;

impl BenchArgs {
    pub(crate) fn parameters(&self) -> serde_json::Value {
        json!({
            "transport": self.transport.name(), "brokers": self.brokers, "publishers": self.publishers, "message_bytes": self.message_bytes,
            "batch_size": self.batch_size, "order": self.order, "ack": self.ack, "replication_factor": self.replication_factor, "seconds": self.seconds,
            "checksum": self.checksum, "pinned": self.near_core().is_some(),
        })
    }

    pub(crate) fn format(&self) -> Format {
        match (self.json, self.csv) {
            (true, _) => Format::Json,
            (_, true) => Format::Csv,
            _ => Format::Text,
        }
    }

    /// Core of the publishers; `None` where nothing is pinned.
    pub(crate) fn near_core(&self) -> Option<usize> {
        (!self.no_pin && host_cores() > 1).then_some(0)
    }

    /// Cores of the brokers; empty where nothing is pinned.
    pub(crate) fn far_cores(&self) -> Vec<usize> {
        if self.near_core().is_some() { (1..host_cores()).collect() } else { Vec::new() }
    }

    pub(crate) fn cores(&self) -> CorePair {
        CorePair { near: self.near_core(), far: self.far_cores().first().copied() }
    }

    pub(crate) fn ceiling_name(&self, tcp: &'static str) -> &'static str {
        match (self.transport, tcp) {
            (TransportKind::Tcp, name) => name,
            (TransportKind::Verbs, "tcp_recv_into_region") => "verbs_write_with_imm",
            (TransportKind::Verbs, _) => "verbs_ping_pong.round_trip_p50",
            (TransportKind::Roce, "tcp_recv_into_region") => "roce_write_with_imm",
            (TransportKind::Roce, _) => "roce_ping_pong.round_trip_p50",
            (TransportKind::Dpdk, "tcp_recv_into_region") => "dpdk_write_with_imm",
            (TransportKind::Dpdk, _) => "dpdk_ping_pong.round_trip_p50",
        }
    }

    /// Bytes that the ceilings move in one piece.
    pub(crate) fn write_bytes(&self) -> usize {
        self.batch_size.unwrap_or(512 << 10)
    }

    pub(crate) fn region() -> PathBuf {
        PathBuf::from(format!("/dev/shm/embarcadero-bench-{}", std::process::id()))
    }

    pub(crate) fn check(&self) -> Result<()> {
        if self.message_bytes == 0 || self.publishers == 0 || self.runs == 0 {
            bail!("--message-bytes, --publishers and --runs must be at least 1");
        }
        if self.transport == TransportKind::Dpdk && self.brokers > 1 {
            bail!("over DPDK the bench's port has one peer: --brokers must be 1");
        }
        if !(1..=MAX_BROKERS).contains(&self.brokers) {
            bail!("--brokers must be 1 to {MAX_BROKERS}");
        }
        Ok(())
    }

    pub(crate) fn cluster(&self) -> Result<Cluster> {
        self.check()?;
        let mut environment = self.environment.clone();
        if self.transport == TransportKind::Dpdk {
            environment.extend(memif::broker());
        }
        let small = self.transport != TransportKind::Tcp;
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

    pub(crate) fn client(&self, cluster: &Cluster) -> Result<Client> {
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
            transport: self.transport,
            dpdk: if self.transport == TransportKind::Dpdk { memif::client() } else { defaults.dpdk },
            ..ClientConfig::at(cluster.control())
        };
        Ok(Client::connect(config)?)
    }

    pub(crate) fn topic(&self, client: &Client, name: &str) -> Result<()> {
        let options = TopicOptions {
            order: self.order,
            ack_level: if self.replication_factor > 1 { 2 } else { 1 },
            replication_factor: self.replication_factor,
            retention_bytes: match self.transport {
                TransportKind::Tcp => RETENTION_BYTES,
                _ => SMALL_RETENTION_BYTES,
            },
            ..TopicOptions::default()
        };
        client.create_topic(name, options)?;
        Ok(())
    }
}
