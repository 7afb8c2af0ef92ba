//! Threads of a broker.

use super::{BrokerError, Exit, Prepared, io_error};
use crate::archive::{Archive, ArchiveReader, Catalog};
use crate::config::{BrokerConfig, Coherence, ReplicaIo};
use crate::control::ControlService;
use crate::delegation::{Delegation, Landed};
use crate::ingest::IngestLimits;
use crate::leader::{Candidate, Leadership};
use crate::membership::etcd::Etcd;
use crate::replica::format::Identity;
use crate::replica::medium::{Directory, Medium};
use crate::replica::replicator::{ReplicaOptions, Replicator};
use crate::replica::store::StoreOptions;
use crate::topics::TopicTable;
use crate::worker::{LeaderStages, Shared, Stages, Worker, WorkerSetup};
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use embarcadero_control::v1::control_server::ControlServer;
use embarcadero_cxl::Native;
use embarcadero_cxl::layout::SESSION_WINDOW;
use embarcadero_os::idle::{Idle, PollBounds, Step};
use embarcadero_os::uring::Uring;
use embarcadero_os::{Clock, SystemClock};
use embarcadero_transport::SocketEndpoint;
use embarcadero_transport::tcp::{KEEPALIVE_INTERVAL, KEEPALIVE_PROBES, KEEPALIVE_TIME, SocketOptions};
use embarcadero_wire::BrokerId;
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;
use tokio::task::JoinSet;
use tonic::transport::server::TcpIncoming;

/// Largest number of batches that wait between the workers and the delegation.
const LANDED_BATCHES: usize = 4096;
/// Largest number of acks of locally ordered batches that wait for a worker.
const LOCAL_ACKS: usize = 1 << 17;

/// Starts a thread.
pub(super) fn spawn(name: String, run: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>, BrokerError> {
    std::thread::Builder::new().name(name).spawn(run).map_err(io_error("start a thread"))
}

/// Number of threads that serve connections on a host of `cores` cores.
///
/// Unless it is configured, it is a quarter of the cores: at least 1, which then runs all stages, and at most 4.
fn worker_count(config: &BrokerConfig, cores: usize) -> usize {
    if config.threads.workers > 0 { config.threads.workers } else { (cores / 4).clamp(1, 4) }
}

/// Bounds of how the polling threads wait on a host of `cores` cores.
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

/// Objects that the workers of a broker serve.
pub(super) struct Serving<'a> {
    pub(super) start: &'a Prepared,
    pub(super) topics: &'a Arc<TopicTable<Native>>,
    pub(super) exit: &'a Exit,
    pub(super) archive: Archive,
}

impl Serving<'_> {
    /// Starts the polling threads. Returns the channel of each for new connections.
    ///
    /// The first thread also orders; `promoted` gives it the leader's stages when this broker becomes the leader.
    pub(super) fn spawn_workers(
        self,
        promoted: Receiver<LeaderStages<Native>>,
        threads: &mut Vec<JoinHandle<()>>,
    ) -> Result<Vec<Sender<TcpStream>>, BrokerError> {
        let config = &self.start.config;
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        let workers = worker_count(config, cores);
        let bounds = poll_bounds(config, cores);
        let (landed, landed_queue) = bounded(LANDED_BATCHES);
        // Every batch in flight can have an ack waiting here.
        let sessions = self.topics.region().geometry().max_sessions as usize;
        let ack_slots = (sessions * SESSION_WINDOW as usize).min(LOCAL_ACKS);
        let (acks, ordered): (Vec<_>, Vec<_>) = (0..workers).map(|_| bounded(ack_slots)).unzip();
        let mut delegation = Delegation::new(Arc::clone(self.topics), landed_queue, acks, config.flush_group)
            .of_incarnation(self.start.info.incarnation);
        let may_lead = self.start.info.id.0 < self.topics.region().geometry().max_leaders;
        if let Some(mirror) = self.start.mirror.as_ref().filter(|_| may_lead) {
            delegation.reclaim_mirror(mirror.region().clone());
        }
        let mut stages = Some(Stages::new(delegation, promoted));
        let sockets = SocketOptions {
            send_buffer_bytes: config.socket_buffer_bytes,
            receive_buffer_bytes: config.socket_buffer_bytes,
        };
        let device = self.start.device.as_ref();
        let shared = self.shared(landed);
        let mut accepted = Vec::new();
        for (index, ordered) in ordered.into_iter().enumerate() {
            let (sender, receiver) = unbounded();
            accepted.push(sender);
            let endpoint = SocketEndpoint::new(move || receiver.try_recv().ok(), sockets, device)
                .map_err(io_error("make a completion queue"))?;
            let setup = WorkerSetup {
                index,
                endpoint,
                ordered,
                idle: Idle::new(config.threads.poll, bounds),
                core: config.threads.cores.iter().cycle().nth(index).copied(),
                stages: stages.take().unwrap_or_else(Stages::none),
            };
            let worker = Worker::new(shared.clone(), setup, SystemClock).map_err(io_error("watch sockets"))?;
            threads.push(spawn(format!("worker-{index}"), move || worker.run())?);
        }
        Ok(accepted)
    }

    /// Returns the data that all workers share.
    fn shared(self, landed: Sender<Landed<Native>>) -> Shared<Native> {
        let (config, exit) = (&self.start.config, self.exit);
        Shared {
            topics: Arc::clone(self.topics),
            landed,
            limits: IngestLimits {
                max_batch_bytes: config.max_batch_bytes,
                exhausted_wait: Duration::from_millis(config.exhausted_wait_ms),
                receive_patience: Duration::from_millis(config.receive_patience_ms),
                verify_body: config.verify_body,
            },
            delivery_patience: Duration::from_millis(config.delivery_patience_ms),
            opening: Duration::from_millis(config.opening_ms),
            window_idle: Duration::from_millis(config.rdma.window_idle_ms),
            archive: self.archive,
            draining: Arc::clone(&exit.draining),
            connections: Arc::clone(&exit.connections),
            stop: Arc::clone(&exit.stop),
            superseded: Arc::clone(&exit.superseded),
            lease: match config.cxl.coherence {
                // The leader sees that this process exists, and honours its pins for as long.
                Coherence::Host => Duration::MAX,
                Coherence::Fabric | Coherence::None => Duration::from_millis(config.broker_lease_ms),
            },
            heartbeat: Duration::from_millis(config.heartbeat_ms),
        }
    }
}

/// Nice value of the thread that replicates.
const REPLICA_NICE: i32 = 10;

/// Returns the directory of a stream's files below the directory `base` of all replicas.
fn stream_directory(base: &Path, broker: BrokerId, identity: &Identity) -> PathBuf {
    let region = uuid::Uuid::from_bytes(identity.region).simple().to_string();
    let stream = match identity.stream.broker() {
        None => "global".to_owned(),
        Some(broker) => format!("broker-{broker}"),
    };
    let topic = format!("topic-{}-{}", identity.topic.id, identity.topic.incarnation);
    base.join(region).join(format!("replica-{broker}")).join(topic).join(stream)
}

/// Opens the io_uring that a replica writes through, if one is configured.
fn open_ring(io: ReplicaIo) -> Result<Option<Arc<Mutex<Uring>>>, BrokerError> {
    match io {
        ReplicaIo::Pwrite => Ok(None),
        ReplicaIo::Uring => {
            let ring = Uring::new().map_err(io_error("replicate through io_uring (replica.io)"))?;
            Ok(Some(Arc::new(Mutex::new(ring))))
        }
    }
}

/// Starts the thread that replicates into the directory `base`. Returns it with the catalog of its files.
pub(super) fn spawn_replica(
    start: &Prepared,
    base: PathBuf,
    topics: &Arc<TopicTable<Native>>,
    stop: &Arc<AtomicBool>,
) -> Result<(JoinHandle<()>, Arc<Catalog>), BrokerError> {
    let config = &start.config.replica;
    let with = if config.direct { "with replica.direct" } else { "without replica.direct" };
    let failed = |source| io_error(format!("keep replicas in {} {with}", base.display()))(source);
    // A directory that cannot be used shows now rather than at the first batch.
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
    let (stop, catalog) = (Arc::clone(stop), Arc::clone(replicator.catalog()));
    let thread = spawn("replica".to_owned(), move || {
        // The polling threads come first where cores are few. Clients that wait for the disk leave this thread enough
        // time.
        if let Err(error) = rustix::process::setpriority_process(Some(rustix::thread::gettid()), REPLICA_NICE) {
            tracing::warn!(%error, "the replica's priority stays as it is");
        }
        let clock = SystemClock;
        let mut maintained: Option<Instant> = None;
        while !stop.load(Ordering::Relaxed) && !replicator.has_failed() {
            if maintained.is_none_or(|maintained| maintained.elapsed() >= period) {
                let now = clock.now();
                maintained = Some(now.instant);
                replicator.maintain(now.times().steady_us);
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

/// Tasks of the control thread.
pub(super) struct ControlPlane {
    pub(super) service: ControlService,
    pub(super) archive: ArchiveReader<Native>,
    pub(super) candidate: Candidate,
    pub(super) leadership: Option<Leadership>,
    pub(super) exit: Exit,
    /// Channel that ends the thread.
    pub(super) stop: tokio::sync::oneshot::Receiver<()>,
}

impl ControlPlane {
    /// Starts the thread, which serves gRPC on `listener`, watches the leader, speaks to etcd and reads from disks.
    pub(super) fn spawn(self, runtime: Arc<Runtime>, listener: TcpListener) -> Result<JoinHandle<()>, BrokerError> {
        listener.set_nonblocking(true).map_err(io_error("prepare the control socket"))?;
        let incoming = {
            let _context = runtime.enter();
            let listener =
                tokio::net::TcpListener::from_std(listener).map_err(io_error("prepare the control socket"))?;
            // An answer is several small writes: without this the last would wait for a delayed acknowledgement, 40 ms.
            TcpIncoming::from(listener)
                .with_nodelay(Some(true))
                // The sockets of hosts that are gone close. By TCP, as a client may not run between its calls.
                .with_keepalive(Some(KEEPALIVE_TIME))
                .with_keepalive_interval(Some(KEEPALIVE_INTERVAL))
                .with_keepalive_retries(Some(KEEPALIVE_PROBES))
        };
        spawn("control".to_owned(), move || runtime.block_on(self.serve(incoming)))
    }

    /// Serves until the broker stops. Nothing of it goes on then.
    async fn serve(self, incoming: TcpIncoming) {
        let Self { service, archive, candidate, leadership, exit, stop } = self;
        let mut tasks = JoinSet::new();
        if let Some(etcd) = service.etcd.clone() {
            tasks.spawn(stay_in_etcd(etcd, exit));
        }
        tasks.spawn(archive.run());
        tasks.spawn(candidate.run(leadership));
        let served = tonic::transport::Server::builder()
            .add_service(ControlServer::new(service))
            .serve_with_incoming_shutdown(incoming, async {
                let _ = stop.await;
            });
        if let Err(error) = served.await {
            tracing::error!(%error, "the control service failed");
        }
        // The broker leaves etcd next. A task that went on could put its entries back.
        tasks.shutdown().await;
    }
}

/// Keeps the broker in etcd, and stops it once another process has its id.
async fn stay_in_etcd(etcd: Etcd, exit: Exit) {
    let taken = etcd.run().await;
    tracing::error!(error = %taken, "another process has this broker's id: this one stops");
    exit.supersede();
}
