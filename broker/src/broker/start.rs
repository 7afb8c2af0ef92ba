//! Start of a broker, step by step.

use super::acceptor::{Acceptor, connection_limit};
use super::threads::{self, Serving};
use super::{Broker, BrokerError, Exit, Prepared, device, identity, io_error};
use crate::archive::{Archive, Catalog};
use crate::caller::Caller;
use crate::config::{BrokerConfig, Coherence, Role};
use crate::control::{ControlService, CurrentLeader};
use crate::leader::{Candidate, CoherenceScope, Election};
use crate::membership::Membership;
use crate::membership::etcd::Etcd;
use crate::mirror;
use crate::pool;
use crate::replica::replicator::disclaim;
use crate::sequencer::{GROUP_BATCHES, SequencerLimits};
use crate::topics::TopicTable;
use crate::worker::LeaderStages;
use crossbeam_channel::{Sender, bounded};
use embarcadero_cxl::broker_table::{BrokerInfo, last_incarnation, publish_broker};
use embarcadero_cxl::layout::RegionRole;
use embarcadero_cxl::leadership::latest_claim;
use embarcadero_cxl::region::{BrokerLock, RegionFile};
use embarcadero_cxl::segment::SegmentAllocator;
use embarcadero_cxl::{Native, Region, damaged_lines, refresh_own_lines};
use embarcadero_transport::tcp::listen;
use embarcadero_wire::OutOfBounds;
use std::net::TcpListener;
use std::sync::Arc;
use std::time::Duration;
use tokio::runtime::Runtime;

/// Heartbeats without a connection after which a session counts as abandoned. A client that goes to another broker is
/// there sooner.
const ABANDONED_HEARTBEATS: u64 = 20;

/// Checks that a region is the one that the configuration names.
fn check_region(config: &BrokerConfig, region: &Region<Native>) -> Result<(), BrokerError> {
    if let Some(text) = &config.cxl.uuid {
        let expected =
            text.parse().map_err(|_| OutOfBounds::new("cxl.uuid", text, "a UUID, as `region inspect` prints it"))?;
        region.require_uuid(expected)?;
    }
    if let Some(bytes) = config.cxl.segment_bytes {
        region.require_segment_bytes(bytes)?;
    }
    Ok(())
}

/// Opens the region's file, and prepares its memory as configured.
fn open_region(config: &BrokerConfig) -> Result<RegionFile, BrokerError> {
    let file = RegionFile::open(&config.cxl.path, config.cxl.flush_method()?)?;
    check_region(config, file.region())?;
    if let Some(node) = config.cxl.numa_node {
        file.bind(node)?;
    }
    if config.cxl.prefault {
        file.region().fabric().mapping().prefault().map_err(io_error("map the region's pages"))?;
    }
    Ok(file)
}

/// Opens the region's mirror, if one is configured.
///
/// # Errors
/// [`BrokerError`] when the mirror cannot be used. Every broker that may lead must name the mirror of a region that has
/// one.
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

impl Prepared {
    /// Opens the region, its mirror, the device and the sockets, and claims a broker id. Stores nothing in the region.
    pub(super) fn open(config: BrokerConfig) -> Result<(Self, BrokerLock), BrokerError> {
        let file = open_region(&config)?;
        let region = file.region().clone();
        let mirror = open_mirror(&config, &region)?;
        let device = device::open(&config, &file)?;
        // Only now, as registration pins pages, and the kernel may move them for that.
        if let Some(node) = config.cxl.numa_node {
            region.require_node(node)?;
        }
        for damage in damaged_lines(&region) {
            tracing::error!(%damage, "look at the region with `embarcadero region inspect`");
        }
        let (id, id_lock) = identity::claim_id(&file, config.id)?;
        let term_lines = region.geometry().max_leaders;
        if config.role == Role::Leader && id.0 >= term_lines {
            let bound = format!("0 to {}, the region's max_leaders - 1, for role leader", term_lines - 1);
            return Err(OutOfBounds::new("id", id, bound).into());
        }
        let socket = |address| listen(address).map_err(io_error(format!("listen on {address}")));
        let (data, control) = (socket(config.data_listen)?, socket(config.control_listen)?);
        let local = |socket: &TcpListener| socket.local_addr().map_err(io_error("read a socket's address"));
        let info = BrokerInfo {
            id,
            incarnation: last_incarnation(&region, id).next(),
            data: config.data_advertise.unwrap_or(local(&data)?),
            control: config.control_advertise.unwrap_or(local(&control)?),
            process_id: std::process::id(),
            running: true,
            lock_node: file.lock_node()?,
        };
        Ok((Self { config, file, mirror, info, device, data, control }, id_lock))
    }

    /// Starts the threads and takes part in the election.
    pub(super) fn run(mut self, id_lock: BrokerLock) -> Result<Broker, BrokerError> {
        let region = self.file.region().clone();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        let runtime = Arc::new(runtime.map_err(io_error("start the control service"))?);
        // Before the first store in the region: a broker of another host may have the id, and must not notice.
        let etcd = runtime.block_on(self.join_etcd())?;
        let mut broker = self.begin(etcd.clone().map(|etcd| (Arc::clone(&runtime), etcd)), id_lock);
        let caller = Caller::draw(&region, self.info.id);
        let pool = pool::allocator(&region, &self.info, caller).map_err(io_error("start the allocator"))?;
        let topics = Arc::new(TopicTable::new(region.clone(), self.info.id, Arc::clone(&pool)));
        let (stages, promoted) = bounded(1);
        let catalog = if let Some(base) = self.config.replica.path.clone() {
            let (replica, catalog) = threads::spawn_replica(&self, base, &topics, &broker.exit.stop)?;
            broker.threads.push(replica);
            catalog
        } else {
            disclaim(&region, self.info.id);
            Arc::new(Catalog::new(false))
        };
        let (archive, reader) = Archive::new(region.clone(), caller, Arc::clone(&catalog));
        let serving = Serving { start: &self, topics: &topics, exit: &broker.exit, archive };
        let accepted = serving.spawn_workers(promoted, &mut broker.threads)?;
        let service = ControlService {
            region: region.clone(),
            max_batch_bytes: self.config.max_batch_bytes,
            leader: Arc::clone(&broker.leader),
            catalog,
            etcd: etcd.clone(),
        };
        let Self { config, file, mirror, info, data, control, .. } = self;
        let most = connection_limit(config.max_connections);
        let acceptor = Acceptor::new(data, accepted, Arc::clone(&broker.exit.connections), most)?;
        broker.threads.push(acceptor.spawn(Arc::clone(&broker.exit.stop))?);
        let election = etcd.map_or(Election::Region, |etcd| Election::Etcd(Box::new(etcd)));
        let leader = Arc::clone(&broker.leader);
        let parts = CandidateParts { file, mirror, info: info.clone(), election, pool, stages, control: leader };
        let candidate = parts.into_candidate(&config);
        let leadership = runtime.block_on(candidate.take_over_if_gone());
        if config.role == Role::Leader && leadership.is_none() {
            return Err(BrokerError::LeaderTaken);
        }
        publish_broker(&region, &info);
        let (control_stop, stop) = tokio::sync::oneshot::channel();
        let exit = broker.exit.clone();
        let plane = threads::ControlPlane { service, archive: reader, candidate, leadership, exit, stop };
        broker.threads.push(plane.spawn(runtime, control)?);
        broker.control_stop = Some(control_stop);
        tracing::info!(
            broker = %info.id, data = %info.data, control = %info.control, leader = broker.is_leader(), "serving"
        );
        Ok(broker)
    }

    /// Takes this broker's row. Returns the broker, which ends in order from here on, whatever fails.
    fn begin(&self, etcd: Option<(Arc<Runtime>, Etcd)>, id_lock: BrokerLock) -> Broker {
        let region = self.file.region().clone();
        // An earlier process of this broker that only stood still stops writing when it sees this. So it comes before
        // any read of what that process wrote.
        publish_broker(&region, &BrokerInfo { running: false, ..self.info.clone() });
        for region in std::iter::once(&region).chain(self.mirror.as_ref().map(RegionFile::region)) {
            refresh_own_lines(region, self.info.id);
        }
        Broker {
            info: self.info.clone(),
            region,
            leader: Arc::default(),
            exit: Exit::default(),
            control_stop: None,
            threads: Vec::new(),
            etcd,
            stopped: false,
            _id_lock: id_lock,
        }
    }

    /// Joins etcd, if that is where membership is kept.
    async fn join_etcd(&mut self) -> Result<Option<Etcd>, BrokerError> {
        if self.config.membership == Membership::Embedded {
            return Ok(None);
        }
        let region = self.file.region();
        loop {
            let claims = region.clone();
            let etcd =
                Etcd::join(self.config.etcd.clone(), region.uuid(), &self.info, move || latest_claim(&claims)).await?;
            // From now on nobody else has the id. Another may have had it, and left, since the incarnation was read.
            let incarnation = last_incarnation(region, self.info.id).next();
            if incarnation == self.info.incarnation {
                return Ok(Some(etcd));
            }
            etcd.leave().await;
            self.info.incarnation = incarnation;
        }
    }
}

/// Parts of a candidate that do not come from the configuration.
struct CandidateParts {
    file: RegionFile,
    mirror: Option<RegionFile>,
    info: BrokerInfo,
    election: Election,
    /// Allocator for the order indexes of a leader.
    pool: Arc<dyn SegmentAllocator>,
    /// Channel to the worker that runs the stages of a leader.
    stages: Sender<LeaderStages<Native>>,
    /// State that the control service of a leader uses.
    control: Arc<CurrentLeader>,
}

impl CandidateParts {
    /// Returns this broker as a candidate.
    fn into_candidate(self, config: &BrokerConfig) -> Candidate {
        let Self { file, mirror, info, election, pool, stages, control } = self;
        Candidate {
            eligible: config.role != Role::Follower && info.id.0 < file.region().geometry().max_leaders,
            file,
            info,
            pool,
            mirror,
            limits: SequencerLimits {
                group_batches: GROUP_BATCHES,
                gap_us: config.gap_lease_ms * 1000,
                excuse_us: config.exhausted_wait_ms * 1000,
                abandoned_us: config.heartbeat_ms * ABANDONED_HEARTBEATS * 1000,
                idle_us: config.session_idle_ms * 1000,
            },
            broker_lease: Duration::from_millis(config.broker_lease_ms),
            leader_lease: Duration::from_millis(config.leader_lease_ms),
            scope: match config.cxl.coherence {
                Coherence::Host => CoherenceScope::Host,
                Coherence::Fabric => CoherenceScope::Fabric,
                Coherence::None => CoherenceScope::None,
            },
            election,
            stages,
            control,
            in_use: Arc::default(),
        }
    }
}
