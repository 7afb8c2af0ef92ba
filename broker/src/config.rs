//! Configuration of a broker: parsed once, checked once.

use crate::delegation::FlushGroup;
use crate::ingest::MAX_WORKERS;
use crate::membership::Membership;
use crate::replica::format::GROUP_BYTES;
use embarcadero_cxl::LINE_BYTES;
use embarcadero_cxl::cache::{FlushMethod, FlushSupport};
use embarcadero_cxl::layout::MAX_BROKERS;
use embarcadero_os::idle::PollPolicy;
use embarcadero_transport::{Isolation, TransportKind};
use embarcadero_verbs::{DpdkConfig, RoceConfig};
use embarcadero_wire::batch::MAX_BATCH_BYTES;
use embarcadero_wire::{BrokerId, OutOfBounds, within};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};
use std::net::SocketAddr;
use std::path::PathBuf;

/// Fewest heartbeats that fit into a lease, so that one that is late ends no lease.
const HEARTBEATS_PER_LEASE: u64 = 5;

/// Coherence of the region's memory among hosts, as the platform gives it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Coherence {
    /// All brokers run on one host.
    Host,
    /// Hardware keeps the caches of all hosts coherent.
    Fabric,
    /// Software flushes and invalidates cache lines.
    None,
}

/// Instruction by which cache lines are written back.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum FlushChoice {
    /// Best instruction that this CPU has.
    Auto,
    /// `clwb`.
    Clwb,
    /// `clflushopt`.
    Clflushopt,
    /// `clflush`.
    Clflush,
    /// `movdir64b` for whole lines.
    Movdir64b,
}

/// Region of CXL memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct CxlConfig {
    /// File on tmpfs or hugetlbfs, or a device-dax node. `device` is another name for this key.
    #[serde(alias = "device")]
    pub path: PathBuf,
    /// Mirror of the region, on another unit of memory, as `region create --mirror` made it. If the region has a
    /// mirror, every broker that may be the leader names it.
    pub mirror: Option<PathBuf>,
    /// Coherence of the memory among hosts.
    pub coherence: Coherence,
    /// Flush instruction; `auto` unless coherence is `none`.
    pub flush: FlushChoice,
    /// UUID that the region must have; unset accepts any region.
    pub uuid: Option<String>,
    /// Bytes that the region's segments must have; unset accepts any size.
    pub segment_bytes: Option<u64>,
    /// True maps all pages at start.
    pub prefault: bool,
    /// NUMA node on which all pages of a region in a file must lie, for CXL memory that is online as system-ram. Unset
    /// accepts any node.
    pub numa_node: Option<u32>,
}

impl Default for CxlConfig {
    fn default() -> Self {
        Self {
            path: PathBuf::from("/dev/shm/embarcadero"),
            mirror: None,
            coherence: Coherence::Host,
            flush: FlushChoice::Auto,
            uuid: None,
            segment_bytes: None,
            prefault: true,
            numa_node: None,
        }
    }
}

impl CxlConfig {
    /// Returns the flush method that follows from the coherence and the chosen instruction.
    ///
    /// # Errors
    /// [`OutOfBounds`] when this CPU lacks the instruction.
    pub(crate) fn flush_method(&self) -> Result<FlushMethod, OutOfBounds> {
        if self.coherence != Coherence::None {
            return Ok(FlushMethod::None);
        }
        let support = FlushSupport::detect();
        let error =
            |value: String| OutOfBounds::new("cxl.flush", value, format!("one that this CPU has: {}", support.names()));
        let method = match self.flush {
            FlushChoice::Auto => support.best().ok_or_else(|| error("auto".to_owned()))?,
            FlushChoice::Clwb => FlushMethod::Clwb,
            FlushChoice::Clflushopt => FlushMethod::Clflushopt,
            FlushChoice::Clflush => FlushMethod::Clflush,
            FlushChoice::Movdir64b => FlushMethod::Movdir64b,
        };
        support.check(method).map_err(|unsupported| error(unsupported.wanted.to_string()))?;
        Ok(method)
    }
}

/// Part that a broker takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// Leads if there is no leader, follows otherwise.
    Auto,
    /// Leads, or does not start.
    Leader,
    /// Never leads.
    Follower,
}

/// Polling threads.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ThreadConfig {
    /// Threads that serve connections, at most 64; 0 chooses by the number of cores.
    pub workers: usize,
    /// Cores for these threads, in turn; empty leaves the threads to the scheduler.
    pub cores: Vec<usize>,
    /// Action after a poll that found nothing.
    pub poll: PollPolicy,
    /// Time to spin before yielding or sleeping, microseconds, at most 1,000,000; unset chooses by the number of cores.
    pub spin_us: Option<u64>,
    /// Longest sleep of the adaptive policy, microseconds, 20 to 1,000,000.
    pub sleep_max_us: u64,
    /// Polling threads of all processes on this host, by which the spin is chosen; 0 counts this broker's alone.
    pub pollers_on_host: usize,
}

impl Default for ThreadConfig {
    fn default() -> Self {
        Self {
            workers: 0,
            cores: Vec::new(),
            poll: PollPolicy::Adaptive,
            spin_us: None,
            sleep_max_us: 1000,
            pollers_on_host: 0,
        }
    }
}

/// RDMA verbs.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct RdmaConfig {
    /// Device, as in /sys/class/infiniband; unset takes the first with an active port.
    pub device: Option<String>,
    /// Mechanism that keeps a session inside its landing windows.
    pub isolation: Isolation,
    /// Bytes of a landing window, a multiple of 64, 4096 to 1 GiB. An active publisher holds two windows. A window takes
    /// at most a quarter of a segment. A publisher whose batches need larger ones holds one at a time.
    pub window_bytes: u64,
    /// Silence of a publisher after which its landing windows are taken back if they keep memory from being reused,
    /// milliseconds, 10 to 3,600,000.
    pub window_idle_ms: u64,
}

impl Default for RdmaConfig {
    fn default() -> Self {
        Self { device: None, isolation: Isolation::Auto, window_bytes: 2 << 20, window_idle_ms: 2000 }
    }
}

/// System calls by which a replica writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum ReplicaIo {
    /// `pwrite`, then `fdatasync`.
    Pwrite,
    /// io_uring: a write and its `fdatasync` are one system call. Without io_uring the broker does not start. The
    /// kernel runs the `fdatasync` in a thread of its own, which costs more than it saves where cores are few.
    Uring,
}

/// Replication of batches, this broker's own and others', to this broker's disk.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ReplicaConfig {
    /// Directory in which each broker has a directory of its own; unset, this broker replicates nothing.
    pub path: Option<PathBuf>,
    /// True writes past the page cache (O_DIRECT), which is much cheaper. Not every file system can.
    pub direct: bool,
    /// System calls to write with.
    pub io: ReplicaIo,
    /// Most bytes that one `fdatasync` makes durable, 4096 to 128 MiB. A batch that is larger is written alone.
    pub group_bytes: u64,
    /// Bytes of a file after which the next file begins, 1 MiB to 1 TiB.
    pub file_bytes: u64,
    /// Bytes that are kept of each stream of a topic; 0 keeps everything until the topic is deleted.
    pub retention_bytes: u64,
    /// Time without progress after which another broker takes over from a replica, milliseconds, 100 to 3,600,000.
    pub patience_ms: u64,
}

impl Default for ReplicaConfig {
    fn default() -> Self {
        Self {
            path: None,
            direct: true,
            io: ReplicaIo::Pwrite,
            group_bytes: 4 << 20,
            file_bytes: 256 << 20,
            retention_bytes: 0,
            patience_ms: 2000,
        }
    }
}

/// Membership by etcd.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EtcdConfig {
    /// Addresses of etcd's members: http://HOST:PORT.
    pub endpoints: Vec<String>,
    /// Prefix of all keys.
    pub prefix: String,
    /// Silence after which etcd takes a broker for gone, seconds, 2 to 3600. A leader that is silent in the region is
    /// replaced sooner, after `leader_lease_ms`.
    pub lease_s: u32,
}

impl Default for EtcdConfig {
    fn default() -> Self {
        Self { endpoints: Vec::new(), prefix: "/embarcadero".to_owned(), lease_s: 5 }
    }
}

/// Configuration of a broker.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct BrokerConfig {
    /// Broker id, 0 to 31; unset takes the first that is free.
    pub id: Option<BrokerId>,
    /// Part to take.
    pub role: Role,
    /// Election of the leader.
    pub membership: Membership,
    /// Membership by etcd, where `membership` is `etcd`.
    pub etcd: EtcdConfig,
    /// Region of CXL memory.
    pub cxl: CxlConfig,
    /// Transport that clients may use beside TCP.
    pub transport: TransportKind,
    /// RDMA verbs, where `transport` is `verbs`. Isolation and windows hold for `roce` and `dpdk` too.
    pub rdma: RdmaConfig,
    /// NIC in software, where `transport` is `roce`.
    pub roce: RoceConfig,
    /// DPDK, where `transport` is `dpdk`.
    pub dpdk: DpdkConfig,
    /// Replication of batches to this broker's disk.
    pub replica: ReplicaConfig,
    /// Address that publishers and subscribers connect to; port 0 takes a free one.
    pub data_listen: SocketAddr,
    /// Address of the control service; port 0 takes a free one.
    pub control_listen: SocketAddr,
    /// Data address that clients are told, if another than the one listened on.
    pub data_advertise: Option<SocketAddr>,
    /// Control address that clients and brokers are told, if another than the one listened on.
    pub control_advertise: Option<SocketAddr>,
    /// Threads that serve connections, and what they do when there is nothing to do.
    pub threads: ThreadConfig,
    /// Bytes of the largest batch, header and body, 4096 to 64 MiB. A segment may allow less.
    pub max_batch_bytes: u64,
    /// Time that a publisher waits for memory before it gets an error, milliseconds, 0 to 3,600,000.
    pub exhausted_wait_ms: u64,
    /// Longest time that a batch of which nothing comes may keep memory from being reused, milliseconds, 100 to 3,600,000.
    /// Its publisher is then sent away, and sends it again.
    pub receive_patience_ms: u64,
    /// True checks the checksums of bodies on arrival.
    pub verify_body: bool,
    /// Batches and bytes after which received batches are written back to the region.
    pub flush_group: FlushGroup,
    /// Longest time that a gap in a session may last before the session is fenced, milliseconds, 10 to 3,600,000. While
    /// a batch of the session waits for room, the gap may last up to `exhausted_wait_ms` longer.
    pub gap_lease_ms: u64,
    /// Time without batches after which a session's slot may go to another client, milliseconds, 100 to 86,400,000. If
    /// the client never committed a batch, `gap_lease_ms` are enough.
    pub session_idle_ms: u64,
    /// Time between heartbeats, milliseconds, 1 to 1000. Retention, reclaim and topic discovery run as often.
    pub heartbeat_ms: u64,
    /// Silence after which the leader takes a broker for dead, milliseconds, five heartbeats to 600,000.
    pub broker_lease_ms: u64,
    /// Silence after which the leader is replaced, milliseconds, five heartbeats to 600,000. A leader whose process is
    /// gone is replaced at once.
    pub leader_lease_ms: u64,
    /// Longest time that batches which a NIC is sending may hold what retention wants to trim, milliseconds, 1 to 3,600,000.
    /// A subscriber over TCP holds nothing.
    pub delivery_patience_ms: u64,
    /// Longest time that a broker which is told to stop (SIGTERM) waits for its clients to be served and gone,
    /// milliseconds, 0 to 3,600,000.
    pub drain_ms: u64,
    /// Time in which a client must send its opening frame once it is connected, milliseconds, 10 to 3,600,000.
    pub opening_ms: u64,
    /// Most data connections, 0 to 1,000,000; a client beyond them is refused. 0 takes the limit of open files, less an
    /// eighth of it (at least 64 files) for all else that the broker opens.
    pub max_connections: u64,
    /// Bytes of SO_SNDBUF and of SO_RCVBUF of data sockets, 4096 to 1 GiB. Unset takes 512 KiB on loopback, and leaves
    /// the choice to the kernel elsewhere.
    pub socket_buffer_bytes: Option<usize>,
}

impl Default for BrokerConfig {
    fn default() -> Self {
        let loopback = SocketAddr::from(([127, 0, 0, 1], 0));
        Self {
            id: None,
            role: Role::Auto,
            membership: Membership::Embedded,
            etcd: EtcdConfig::default(),
            cxl: CxlConfig::default(),
            transport: TransportKind::Tcp,
            rdma: RdmaConfig::default(),
            roce: RoceConfig::default(),
            dpdk: DpdkConfig::default(),
            replica: ReplicaConfig::default(),
            data_listen: loopback,
            control_listen: loopback,
            data_advertise: None,
            control_advertise: None,
            threads: ThreadConfig::default(),
            max_batch_bytes: 8 << 20,
            exhausted_wait_ms: 5000,
            receive_patience_ms: 10_000,
            verify_body: false,
            flush_group: FlushGroup::default(),
            gap_lease_ms: 10_000,
            session_idle_ms: 60_000,
            heartbeat_ms: 10,
            broker_lease_ms: 2000,
            leader_lease_ms: 100,
            delivery_patience_ms: 5000,
            drain_ms: 3000,
            opening_ms: 10_000,
            max_connections: 0,
            socket_buffer_bytes: None,
        }
    }
}

impl BrokerConfig {
    /// Checks every value.
    ///
    /// # Errors
    /// [`OutOfBounds`] with the first value that is out of bounds.
    pub fn validate(&self) -> Result<(), OutOfBounds> {
        self.dpdk.validate()?;
        self.check_ranges()?;
        if !self.rdma.window_bytes.is_multiple_of(LINE_BYTES) {
            let bound = format!("a multiple of {LINE_BYTES}");
            return Err(OutOfBounds::new("rdma.window_bytes", self.rdma.window_bytes, bound));
        }
        self.check_addresses()?;
        self.check_platform()
    }

    /// Checks that every number lies in its range. An optional number that is unset counts as the lowest one.
    fn check_ranges(&self) -> Result<(), OutOfBounds> {
        let Self { threads, replica, rdma, .. } = self;
        let lease_ms = self.heartbeat_ms.saturating_mul(HEARTBEATS_PER_LEASE)..=600_000;
        let ranges = [
            ("id", self.id.map_or(0, |id| id.0.into()), 0..=u64::from(MAX_BROKERS) - 1),
            ("threads.workers", threads.workers as u64, 0..=MAX_WORKERS as u64),
            ("threads.sleep_max_us", threads.sleep_max_us, 20..=1_000_000),
            ("threads.spin_us", threads.spin_us.unwrap_or(0), 0..=1_000_000),
            ("max_batch_bytes", self.max_batch_bytes, 4096..=MAX_BATCH_BYTES),
            ("exhausted_wait_ms", self.exhausted_wait_ms, 0..=3_600_000),
            ("receive_patience_ms", self.receive_patience_ms, 100..=3_600_000),
            ("flush_group.batches", self.flush_group.batches, 1..=1024),
            ("flush_group.bytes", self.flush_group.bytes, 1..=1 << 30),
            ("gap_lease_ms", self.gap_lease_ms, 10..=3_600_000),
            ("session_idle_ms", self.session_idle_ms, 100..=86_400_000),
            ("heartbeat_ms", self.heartbeat_ms, 1..=1000),
            ("broker_lease_ms", self.broker_lease_ms, lease_ms.clone()),
            ("leader_lease_ms", self.leader_lease_ms, lease_ms),
            ("delivery_patience_ms", self.delivery_patience_ms, 1..=3_600_000),
            ("drain_ms", self.drain_ms, 0..=3_600_000),
            ("opening_ms", self.opening_ms, 10..=3_600_000),
            ("max_connections", self.max_connections, 0..=1_000_000),
            ("replica.group_bytes", replica.group_bytes, 4096..=GROUP_BYTES),
            ("replica.file_bytes", replica.file_bytes, 1 << 20..=1 << 40),
            ("replica.patience_ms", replica.patience_ms, 100..=3_600_000),
            ("rdma.window_bytes", rdma.window_bytes, 4096..=1 << 30),
            ("rdma.window_idle_ms", rdma.window_idle_ms, 10..=3_600_000),
            ("etcd.lease_s", self.etcd.lease_s.into(), 2..=3600),
            ("socket_buffer_bytes", self.socket_buffer_bytes.unwrap_or(4096) as u64, 4096..=1 << 30),
        ];
        for (key, value, range) in ranges {
            within(key, value, *range.start(), *range.end())?;
        }
        Ok(())
    }

    /// Checks that others can connect to the addresses that they are told.
    fn check_addresses(&self) -> Result<(), OutOfBounds> {
        let told = [
            ("data_listen", self.data_listen, self.data_advertise, "data_advertise"),
            ("control_listen", self.control_listen, self.control_advertise, "control_advertise"),
        ];
        for (key, listen, advertise, name) in told {
            if advertise.unwrap_or(listen).ip().is_unspecified() {
                let bound = format!("an address that others can connect to, unless {name} is");
                return Err(OutOfBounds::new(key, listen, bound));
            }
        }
        Ok(())
    }

    /// Checks that membership, role and flushes suit the platform.
    fn check_platform(&self) -> Result<(), OutOfBounds> {
        if self.membership == Membership::Etcd && self.etcd.endpoints.is_empty() {
            let bound = "one or more http://HOST:PORT, where membership is etcd";
            return Err(OutOfBounds::new("etcd.endpoints", "[]", bound));
        }
        if self.membership == Membership::Embedded && self.cxl.coherence == Coherence::None && self.role == Role::Auto {
            let bound =
                "leader or follower where cxl.coherence is none and membership is embedded (membership: etcd elects)";
            return Err(OutOfBounds::new("role", "auto", bound));
        }
        if self.cxl.coherence != Coherence::None && self.cxl.flush != FlushChoice::Auto {
            let bound = "auto, unless cxl.coherence is none (a coherent platform needs no flush)";
            return Err(OutOfBounds::new("cxl.flush", format!("{:?}", self.cxl.flush).to_lowercase(), bound));
        }
        self.cxl.flush_method().map(drop)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn defaults_are_valid_and_bounds_are_named() {
        BrokerConfig::default().validate().unwrap();
        let error = BrokerConfig { id: Some(BrokerId(32)), ..BrokerConfig::default() }.validate().unwrap_err();
        assert_eq!(error.to_string(), "id is 32; it must be 0 to 31");
        let error = BrokerConfig { max_batch_bytes: 1, ..BrokerConfig::default() }.validate().unwrap_err();
        assert_eq!(error.key, "max_batch_bytes");
        let everywhere = BrokerConfig { data_listen: ([0, 0, 0, 0], 7001).into(), ..BrokerConfig::default() };
        assert_eq!(everywhere.validate().unwrap_err().key, "data_listen");
        BrokerConfig { data_advertise: Some(([10, 0, 0, 1], 7001).into()), ..everywhere }.validate().unwrap();
        let cxl = CxlConfig { flush: FlushChoice::Clwb, ..CxlConfig::default() };
        assert_eq!(BrokerConfig { cxl, ..BrokerConfig::default() }.validate().unwrap_err().key, "cxl.flush");
    }

    #[test]
    fn unknown_keys_are_refused() {
        let error = serde_yaml::from_str::<BrokerConfig>("heartbeet_ms: 5").unwrap_err().to_string();
        assert!(error.contains("heartbeet_ms"), "{error}");
        let config: BrokerConfig = serde_yaml::from_str("cxl: { device: /dev/dax0.0 }").unwrap();
        assert_eq!(config.cxl.path, PathBuf::from("/dev/dax0.0"));
        let config: BrokerConfig = serde_yaml::from_str("cxl: { path: /tmp/x }\nheartbeat_ms: 5").unwrap();
        assert_eq!((config.heartbeat_ms, config.cxl.coherence), (5, Coherence::Host));
    }
}
