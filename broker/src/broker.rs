//! Puts a broker together and takes it apart.

use crate::archive::{Archive, ArchiveReader, Catalog};
use crate::config::{BrokerConfig, Coherence, ConfigError, ReplicaIo, Role};
use crate::control::{ControlService, HeadSlot};
use crate::delegation::{Delegation, Landed};
use crate::head::{Candidate, Election, Reach, Reign};
use crate::ingest::IngestLimits;
use crate::membership::Membership;
#[cfg(feature = "etcd")]
use crate::membership::etcd::{Etcd, EtcdError};
use crate::mirror;
use crate::pool;
use crate::replica::format::Identity;
use crate::replica::medium::{Directory, Medium};
use crate::replica::replicator::{ReplicaOptions, Replicator, disclaim};
use crate::replica::store::StoreOptions;
use crate::sequencer::Leases;
use crate::topics::TopicTable;
use crate::worker::{HeadStages, Shared, Worker, WorkerSetup, now_us};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use embarcadero_control::v1::control_server::ControlServer;
#[cfg(feature = "etcd")]
use embarcadero_datapath::cxl::headship::latest_claim;
use embarcadero_datapath::cxl::layout::{RegionRole, SESSION_WINDOW};
use embarcadero_datapath::cxl::order_index::StreamId;
use embarcadero_datapath::cxl::region::{BrokerLock, RegionError, RegionFile};
use embarcadero_datapath::cxl::tables::{BrokerInfo, last_incarnation, publish_broker};
use embarcadero_datapath::cxl::{Native, Region};
use embarcadero_datapath::poll::{Idle, PollBounds, Step};
use embarcadero_datapath::transport::Transport;
use embarcadero_datapath::transport::tcp::{SocketOptions, listen};
use embarcadero_datapath::transport::verbs::VerbsHost;
use embarcadero_datapath::uring::Uring;
use embarcadero_datapath::verbs::{Context, VerbsError};
use std::io;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Why a broker does not start.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Its region.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// Its threads or sockets.
    #[error("cannot {action}: {source}")]
    Io {
        /// What was tried.
        action: String,
        /// What the system said.
        source: io::Error,
    },
    /// Its RDMA device.
    #[error("transport is {}, but {source}", .transport.name())]
    Verbs {
        /// What was asked for.
        transport: Transport,
        /// What is missing.
        source: VerbsError,
    },
    /// Its membership.
    #[cfg(feature = "etcd")]
    #[error("membership is etcd, but {0}")]
    Etcd(#[from] EtcdError),
    /// No id is left.
    #[error("all {0} broker ids of the region are taken")]
    NoFreeId(u32),
    /// Another is the head.
    #[error("role is head, but another live broker is the head of this region")]
    HeadTaken,
}

fn io_error(action: impl Into<String>) -> impl FnOnce(io::Error) -> BrokerError {
    let action = action.into();
    move |source| BrokerError::Io { action, source }
}

/// A running broker; stops when dropped.
pub struct Broker {
    info: BrokerInfo,
    region: Region<Native>,
    head: Arc<HeadSlot>,
    exit: Exit,
    control_stop: Option<tokio::sync::oneshot::Sender<()>>,
    threads: Vec<JoinHandle<()>>,
    // Given up last.
    _id_lock: BrokerLock,
}

/// How a broker's threads are told to come to an end.
#[derive(Clone, Default)]
struct Exit {
    /// Clients are sent to other brokers.
    draining: Arc<AtomicBool>,
    /// Those that are here still.
    connections: Arc<AtomicUsize>,
    /// Everything stops.
    stop: Arc<AtomicBool>,
    /// A later process has this broker's place.
    superseded: Arc<AtomicBool>,
}

/// Time between two looks at whether all clients are gone.
const DRAIN_POLL: Duration = Duration::from_millis(5);

struct Start {
    config: BrokerConfig,
    file: RegionFile,
    mirror: Option<RegionFile>,
    info: BrokerInfo,
    id_lock: BrokerLock,
    verbs: Option<Arc<VerbsHost>>,
}

impl Broker {
    /// Joins the region and starts serving.
    ///
    /// # Errors
    /// [`BrokerError`]; nothing is left running when it fails.
    pub fn start(config: BrokerConfig) -> Result<Self, BrokerError> {
        config.validate()?;
        let file = RegionFile::open(&config.cxl.path, config.cxl.flush_method()?)?;
        let region = file.region().clone();
        check_region(&config, &region)?;
        if let Some(node) = config.cxl.numa_node {
            file.bind(node)?;
        }
        if config.cxl.prefault {
            region.fabric().mapping().prefault().map_err(io_error("map the region's pages"))?;
        }
        let mirror = open_mirror(&config, &region)?;
        let verbs = (config.transport != Transport::Tcp).then(|| open_verbs(&config, &file)).transpose()?;
        // Now: registration pins pages, and the kernel may move them to do that.
        if let Some(node) = config.cxl.numa_node {
            region.require_node(node)?;
        }
        if config.membership == Membership::Etcd && !cfg!(feature = "etcd") {
            return Err(not_built("membership", "etcd", "embedded: this build has no etcd (cargo feature etcd)"));
        }
        let (id, id_lock) = claim_id(&file, config.id)?;
        let seats = region.geometry().max_heads;
        if config.role == Role::Head && id >= seats {
            let bound = format!("0 to {}, the region's max_heads - 1, for role head", seats - 1);
            return Err(ConfigError { key: "id", value: id.to_string(), bound }.into());
        }
        let data = listen(config.data_listen).map_err(io_error(format!("listen on {}", config.data_listen)))?;
        let control =
            listen(config.control_listen).map_err(io_error(format!("listen on {}", config.control_listen)))?;
        let local = |socket: &TcpListener| socket.local_addr().map_err(io_error("read a socket's address"));
        let info = BrokerInfo {
            id,
            incarnation: last_incarnation(&region, id) + 1,
            data: config.data_advertise.unwrap_or(local(&data)?),
            control: config.control_advertise.unwrap_or(local(&control)?),
            process_id: std::process::id(),
            running: true,
        };
        let start = Start { config, file, mirror, info, id_lock, verbs };
        start.run(data, control)
    }

    /// Address and id.
    pub fn info(&self) -> &BrokerInfo {
        &self.info
    }

    /// True for the broker that orders.
    pub fn is_head(&self) -> bool {
        self.head.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// True once a later process, on another host, has this broker's place: it stood still for so long that it was taken for
    /// dead, and has stopped now.
    pub fn is_superseded(&self) -> bool {
        self.exit.superseded.load(Ordering::Relaxed)
    }

    /// Takes nothing more from clients, acknowledges what it has, and sends them to other brokers. False when some were still
    /// here after `patience`, or when `hurry` said to wait no longer. Then [`Broker::stop`].
    pub fn drain(&self, patience: Duration, mut hurry: impl FnMut() -> bool) -> bool {
        self.exit.draining.store(true, Ordering::Relaxed);
        let begun = Instant::now();
        let left = || self.exit.connections.load(Ordering::Relaxed);
        while left() > 0 && begun.elapsed() < patience && !hurry() {
            std::thread::sleep(DRAIN_POLL);
        }
        let left = left();
        tracing::info!(broker = self.info.id, connections = left, "drained");
        left == 0
    }

    /// Stops all threads and marks the slot as left.
    pub fn stop(&mut self) {
        self.exit.stop.store(true, Ordering::Relaxed);
        if let Some(stop) = self.control_stop.take() {
            let _ = stop.send(());
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
        if !self.is_superseded() {
            publish_broker(&self.region, &BrokerInfo { running: false, ..self.info.clone() });
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        if !self.threads.is_empty() {
            self.stop();
        }
    }
}

/// What was asked for needs a cargo feature that this build lacks.
fn not_built(key: &'static str, value: &str, bound: &str) -> BrokerError {
    ConfigError { key, value: value.to_owned(), bound: bound.to_owned() }.into()
}

fn check_region(config: &BrokerConfig, region: &Region<Native>) -> Result<(), BrokerError> {
    if let Some(text) = &config.cxl.uuid {
        let expected = text.parse().map_err(|_| ConfigError {
            key: "cxl.uuid",
            value: text.clone(),
            bound: "a UUID, as `region inspect` prints it".to_owned(),
        })?;
        region.require_uuid(expected)?;
    }
    if let Some(bytes) = config.cxl.segment_bytes {
        region.require_segment_bytes(bytes)?;
    }
    Ok(())
}

/// Opens the region's mirror. Of a region that has one, all that may be its head must know it.
fn open_mirror(config: &BrokerConfig, region: &Region<Native>) -> Result<Option<RegionFile>, BrokerError> {
    let Some(path) = &config.cxl.mirror else {
        if config.role != Role::Follower {
            region.require_role(RegionRole::Single)?;
        }
        return Ok(None);
    };
    let file = RegionFile::open(path, config.cxl.flush_method()?)?;
    mirror::check(region, file.region())?;
    if config.cxl.prefault {
        file.region().fabric().mapping().prefault().map_err(io_error("map the mirror's pages"))?;
    }
    Ok(Some(file))
}

/// How long the head may hold an id whose broker is gone, to see to what it left.
const CLAIM_PATIENCE: Duration = Duration::from_millis(500);

/// Claims an id, which the head may be holding for a moment.
fn claim(file: &RegionFile, id: u32) -> Result<BrokerLock, RegionError> {
    let begun = Instant::now();
    loop {
        match file.claim_broker(id) {
            Err(RegionError::BrokerIdTaken { .. }) if begun.elapsed() < CLAIM_PATIENCE => {
                std::thread::sleep(Duration::from_millis(5));
            }
            claimed => return claimed,
        }
    }
}

fn claim_id(file: &RegionFile, wanted: Option<u32>) -> Result<(u32, BrokerLock), BrokerError> {
    let max = file.region().geometry().max_brokers;
    if let Some(id) = wanted {
        if id >= max {
            let bound = format!("0 to {}, the region's max_brokers - 1", max - 1);
            return Err(ConfigError { key: "id", value: id.to_string(), bound }.into());
        }
        return Ok((id, claim(file, id)?));
    }
    for id in 0..max {
        match file.claim_broker(id) {
            Ok(lock) => return Ok((id, lock)),
            Err(RegionError::BrokerIdTaken { .. }) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Err(BrokerError::NoFreeId(max))
}

impl Start {
    fn run(self, data: TcpListener, control: TcpListener) -> Result<Broker, BrokerError> {
        let Self { config, info, .. } = &self;
        let region = self.file.region().clone();
        // Before anything is read that an earlier process of this broker wrote: one that only stood still writes no more.
        publish_broker(&region, &BrokerInfo { running: false, ..info.clone() });
        let pool = pool::allocator(&region, info).map_err(io_error("start the allocator"))?;
        let topics = Arc::new(TopicTable::new(region.clone(), info.id, Arc::clone(&pool)));
        let exit = Exit::default();
        let stop = Arc::clone(&exit.stop);
        let (stages, promoted) = bounded(1);
        let mut threads = Vec::new();
        let catalog = if config.replica.path.is_some() {
            let (replica, catalog) = spawn_replica(&self, &topics, &stop)?;
            threads.push(replica);
            catalog
        } else {
            disclaim(&region, info.id);
            Arc::new(Catalog::new(false))
        };
        let (archive, reader) = Archive::new(region.clone(), info.id, Arc::clone(&catalog));
        let accepted = spawn_workers(&self, &topics, &exit, promoted, archive, &mut threads)?;
        threads.push(spawn_acceptor(data, accepted, Arc::clone(&stop))?);
        let head: Arc<HeadSlot> = Arc::default();
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .map_err(io_error("start the control service"))?;
        #[cfg(feature = "etcd")]
        let etcd = match config.membership {
            Membership::Embedded => None,
            Membership::Etcd => {
                let claims = region.clone();
                let join = Etcd::join(config.etcd.clone(), region.uuid(), info, move || latest_claim(&claims));
                Some(runtime.block_on(join)?)
            }
        };
        let service = ControlService {
            region: region.clone(),
            max_batch_bytes: config.max_batch_bytes,
            head: Arc::clone(&head),
            pool: Arc::clone(&pool),
            catalog,
            #[cfg(feature = "etcd")]
            etcd: etcd.clone(),
        };
        let Self { config, file, mirror, info, id_lock, .. } = self;
        let candidate = Candidate {
            file,
            info: info.clone(),
            pool,
            mirror,
            leases: Leases { gap_us: config.gap_lease_ms * 1000, idle_us: config.session_idle_ms * 1000 },
            broker_lease: Duration::from_millis(config.broker_lease_ms),
            head_lease: Duration::from_millis(config.head_lease_ms),
            reach: match config.cxl.coherence {
                Coherence::Host => Reach::Host,
                Coherence::Fabric => Reach::Fabric,
                Coherence::None => Reach::None,
            },
            #[cfg(feature = "etcd")]
            election: etcd.map_or(Election::Region, |etcd| Election::Etcd(Box::new(etcd))),
            #[cfg(not(feature = "etcd"))]
            election: Election::Region,
            eligible: config.role != Role::Follower && info.id < region.geometry().max_heads,
            stages,
            control: Arc::clone(&head),
            in_use: Arc::default(),
        };
        let reign = runtime.block_on(candidate.take_over_if_gone());
        if config.role == Role::Head && reign.is_none() {
            stop.store(true, Ordering::Relaxed);
            for thread in threads {
                let _ = thread.join();
            }
            return Err(BrokerError::HeadTaken);
        }
        publish_broker(&region, &info);
        let (control_stop, stopped) = tokio::sync::oneshot::channel();
        threads.push(spawn_control(runtime, control, service, reader, candidate, reign, stopped)?);
        let leads = head.read().unwrap_or_else(PoisonError::into_inner).is_some();
        tracing::info!(broker = info.id, data = %info.data, control = %info.control, head = leads, "serving");
        Ok(Broker { info, region, head, exit, control_stop: Some(control_stop), threads, _id_lock: id_lock })
    }
}

fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, BrokerError> {
    std::thread::Builder::new().name(name).spawn(run).map_err(io_error("start a thread"))
}

/// Threads that serve connections, where the configuration leaves it open: one where cores are few (all stages then
/// run to completion in it), else up to four.
fn worker_count(config: &BrokerConfig, cores: usize) -> usize {
    if config.threads.workers > 0 { config.threads.workers } else { (cores / 4).clamp(1, 4) }
}

/// How the polling threads wait.
fn poll_bounds(config: &BrokerConfig, cores: usize) -> PollBounds {
    let pollers = match config.threads.pollers_on_host {
        0 => worker_count(config, cores) + usize::from(config.replica.path.is_some()),
        pollers => pollers,
    };
    let mut bounds = PollBounds::for_host(pollers, cores);
    bounds.spin_us = config.threads.spin_us.unwrap_or(bounds.spin_us);
    bounds.sleep_max_us = config.threads.sleep_max_us;
    bounds
}

/// Opens the RDMA device, which may be this process itself, and registers the region on it.
fn open_verbs(config: &BrokerConfig, file: &RegionFile) -> Result<Arc<VerbsHost>, BrokerError> {
    let unusable = |source| BrokerError::Verbs { transport: config.transport, source };
    let region = file.region();
    let nodes = || region.fabric().mapping().nodes();
    let before = nodes();
    let device = match config.transport {
        Transport::Roce => {
            let listen = config.data_listen.ip();
            Context::software(config.roce.address.or((!listen.is_unspecified()).then_some(listen)))
        }
        Transport::Dpdk => Context::dpdk(&config.dpdk),
        Transport::Tcp | Transport::Verbs => {
            file.require_registrable()?;
            Context::find(config.rdma.device.as_deref())
        }
    };
    let host = VerbsHost::open(
        region.fabric(),
        device.map_err(unusable)?,
        config.rdma.isolation,
        config.rdma.lease_bytes.min(region.geometry().segment_bytes / 4),
    )
    .map_err(unusable)?;
    if config.max_batch_bytes > host.max_message_bytes() {
        let bound = format!("at most {}, the largest message of {}", host.max_message_bytes(), host.device());
        let value = config.max_batch_bytes.to_string();
        return Err(ConfigError { key: "max_batch_bytes", value, bound }.into());
    }
    match (before, nodes()) {
        (Ok(before), Ok(after)) => {
            let pages = before.len();
            let moved =
                before.iter().zip(after).filter(|(before, after)| before.is_some() && **before != *after).count();
            if moved > 0 {
                tracing::warn!(
                    moved,
                    pages,
                    "the kernel moved the region to another NUMA node to pin it: see cxl.numa_node"
                );
            }
        }
        // Containers often may not ask.
        (Err(error), _) | (_, Err(error)) => {
            tracing::warn!(%error, "cannot see whether the kernel moved the region to pin it")
        }
    }
    tracing::info!(device = host.device(), isolation = host.isolation(), "verbs");
    Ok(host)
}

fn spawn_workers(
    start: &Start,
    topics: &Arc<TopicTable<Native>>,
    exit: &Exit,
    promoted: Receiver<HeadStages>,
    archive: Archive,
    threads: &mut Vec<JoinHandle<()>>,
) -> Result<Vec<Sender<std::net::TcpStream>>, BrokerError> {
    let config = &start.config;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let workers = worker_count(config, cores);
    let bounds = poll_bounds(config, cores);
    let (landed, landed_queue): (Sender<Landed<Native>>, Receiver<Landed<Native>>) = bounded(4096);
    let sessions = topics.region().geometry().max_sessions as usize;
    let shared = Shared {
        topics: Arc::clone(topics),
        landed,
        limits: IngestLimits {
            max_batch_bytes: config.max_batch_bytes,
            exhausted_wait: Duration::from_millis(config.exhausted_wait_ms),
            verify_body: config.verify_body,
        },
        delivery_patience: Duration::from_millis(config.delivery_patience_ms),
        archive,
        sockets: SocketOptions {
            send_buffer_bytes: config.socket_buffer_bytes,
            receive_buffer_bytes: config.socket_buffer_bytes,
        },
        verbs: start.verbs.clone(),
        draining: Arc::clone(&exit.draining),
        connections: Arc::clone(&exit.connections),
        stop: Arc::clone(&exit.stop),
        superseded: Arc::clone(&exit.superseded),
        lease: match config.cxl.coherence {
            // The head sees that a process is there, and keeps what it pinned.
            Coherence::Host => Duration::MAX,
            Coherence::Fabric | Coherence::None => Duration::from_millis(config.broker_lease_ms),
        },
    };
    // Every batch in flight can have an ack waiting here.
    let ack_slots = (sessions * SESSION_WINDOW as usize).min(1 << 17);
    let (acks, ordered): (Vec<_>, Vec<_>) = (0..workers).map(|_| bounded(ack_slots)).unzip();
    let mut delegation = Delegation::new(Arc::clone(topics), landed_queue, acks, config.flush_group)
        .of_incarnation(start.info.incarnation);
    if let Some(mirror) = start.mirror.as_ref().filter(|_| start.info.id < topics.region().geometry().max_heads) {
        delegation.tidy(mirror.region().clone());
    }
    let mut delegation = Some(delegation);
    let mut promoted = Some(promoted);
    let mut accepted = Vec::new();
    for (index, ordered) in ordered.into_iter().enumerate() {
        let (sender, receiver) = unbounded();
        accepted.push(sender);
        let setup = WorkerSetup {
            index,
            accepted: receiver,
            ordered,
            idle: Idle::new(config.threads.poll, bounds),
            core: config.threads.cores.get(index % config.threads.cores.len().max(1)).copied(),
            delegation: delegation.take(),
            promoted: promoted.take(),
            heartbeat: Duration::from_millis(config.heartbeat_ms),
        };
        let worker = Worker::new(shared.clone(), setup).map_err(io_error("watch sockets"))?;
        threads.push(spawn(format!("worker-{index}"), move || worker.run())?);
    }
    Ok(accepted)
}

/// Nice value of the thread that replicates.
const REPLICA_NICE: i32 = 10;

/// Where a stream's files lie below the directory of a broker's replicas.
fn stream_directory(base: &Path, broker: u32, identity: &Identity) -> PathBuf {
    let region = uuid::Uuid::from_bytes(identity.region).simple().to_string();
    let stream = match identity.stream {
        StreamId::GLOBAL => "global".to_owned(),
        broker => format!("broker-{broker}"),
    };
    let topic = format!("topic-{}-{}", identity.topic.id, identity.topic.incarnation);
    base.join(region).join(format!("replica-{broker}")).join(topic).join(stream)
}

/// What a replica writes through, if that is to be io_uring.
fn open_ring(io: ReplicaIo) -> Result<Option<Arc<Mutex<Uring>>>, BrokerError> {
    match io {
        ReplicaIo::Pwrite => Ok(None),
        ReplicaIo::Uring => {
            let ring = Uring::new().map_err(io_error("replicate through io_uring (replica.io)"))?;
            Ok(Some(Arc::new(Mutex::new(ring))))
        }
    }
}

fn spawn_replica(
    start: &Start,
    topics: &Arc<TopicTable<Native>>,
    stop: &Arc<AtomicBool>,
) -> Result<(JoinHandle<()>, Arc<Catalog>), BrokerError> {
    let config = &start.config.replica;
    let base = config.path.clone().unwrap_or_default();
    let with = if config.direct { "with replica.direct" } else { "without replica.direct" };
    let failed = |source| io_error(format!("keep replicas in {} {with}", base.display()))(source);
    // Now rather than at the first batch.
    Directory::new(base.clone(), config.direct).probe().map_err(failed)?;
    let (broker, direct, ring) = (start.info.id, config.direct, open_ring(config.io)?);
    let open = move |identity: &Identity| {
        let directory = Directory::new(stream_directory(&base, broker, identity), direct);
        Box::new(directory.through(ring.clone())) as Box<dyn Medium>
    };
    let options = ReplicaOptions {
        group_bytes: config.group_bytes,
        patience_us: config.patience_ms * 1000,
        store: StoreOptions { file_bytes: config.file_bytes, retention_bytes: config.retention_bytes },
    };
    let mut replicator =
        Replicator::new(Arc::clone(topics), Box::new(open), options).map_err(io_error("prepare the replica"))?;
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let mut idle = Idle::new(start.config.threads.poll, poll_bounds(&start.config, cores));
    let period = Duration::from_millis(start.config.heartbeat_ms);
    let stop = Arc::clone(stop);
    let catalog = Arc::clone(replicator.catalog());
    let thread = spawn("replica".to_owned(), move || {
        // Behind the polling threads, where cores are few: whoever waits for the disk leaves it the time anyway.
        if let Err(error) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), REPLICA_NICE) {
            tracing::warn!(%error, "the replica's priority stays as it is");
        }
        let mut maintained: Option<Instant> = None;
        while !stop.load(Ordering::Relaxed) && !replicator.has_failed() {
            if maintained.is_none_or(|maintained| maintained.elapsed() >= period) {
                maintained = Some(Instant::now());
                replicator.maintain(now_us());
            }
            if replicator.poll() > 0 {
                idle.worked();
            } else if let Step::Sleep(time) = idle.wait() {
                std::thread::sleep(time);
            }
        }
    })?;
    Ok((thread, catalog))
}

fn spawn_acceptor(
    listener: TcpListener,
    workers: Vec<Sender<std::net::TcpStream>>,
    stop: Arc<AtomicBool>,
) -> Result<JoinHandle<()>, BrokerError> {
    listener.set_nonblocking(true).map_err(io_error("prepare the data socket"))?;
    let mut poller = embarcadero_datapath::transport::Poller::new().map_err(io_error("watch the data socket"))?;
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&listener);
    poller.add(descriptor, 0, false).map_err(io_error("watch the data socket"))?;
    spawn("acceptor".to_owned(), move || {
        let mut ready = Vec::new();
        let mut next = 0;
        while !stop.load(Ordering::Relaxed) {
            let _ = poller.wait(Duration::from_millis(100), &mut ready);
            loop {
                match listener.accept() {
                    Ok((stream, _)) => {
                        if let Some(worker) = workers.get(next % workers.len().max(1)) {
                            let _ = worker.send(stream);
                        }
                        next += 1;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => break,
                    Err(error) => {
                        tracing::warn!(%error, "a connection could not be accepted");
                        // Out of descriptors, most likely: give others time to close.
                        std::thread::sleep(Duration::from_millis(10));
                        break;
                    }
                }
            }
        }
    })
}

fn spawn_control(
    runtime: tokio::runtime::Runtime,
    listener: TcpListener,
    service: ControlService,
    archive: ArchiveReader,
    candidate: Candidate,
    reign: Option<Reign>,
    stop: tokio::sync::oneshot::Receiver<()>,
) -> Result<JoinHandle<()>, BrokerError> {
    listener.set_nonblocking(true).map_err(io_error("prepare the control socket"))?;
    let incoming = {
        let _context = runtime.enter();
        let listener = tokio::net::TcpListener::from_std(listener).map_err(io_error("prepare the control socket"))?;
        // An answer is several small writes: without this the last would wait for a delayed acknowledgement, 40 ms.
        tonic::transport::server::TcpIncoming::from(listener).with_nodelay(Some(true))
    };
    spawn("control".to_owned(), move || {
        runtime.block_on(async move {
            #[cfg(feature = "etcd")]
            let etcd = service.etcd.clone();
            #[cfg(feature = "etcd")]
            if let Some(etcd) = &etcd {
                tokio::spawn(etcd.clone().run());
            }
            tokio::spawn(archive.run());
            tokio::spawn(candidate.run(reign));
            let served = tonic::transport::Server::builder()
                .add_service(ControlServer::new(service))
                .serve_with_incoming_shutdown(incoming, async {
                    let _ = stop.await;
                });
            if let Err(error) = served.await {
                tracing::error!(%error, "the control service failed");
            }
            #[cfg(feature = "etcd")]
            if let Some(etcd) = etcd {
                etcd.leave().await;
            }
        });
    })
}
