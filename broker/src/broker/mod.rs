//! Broker process: its start, its threads and its end.

mod acceptor;
mod device;
mod identity;
mod start;
mod threads;

use crate::config::BrokerConfig;
use crate::control::CurrentLeader;
use crate::membership::etcd::{Etcd, EtcdError};
use embarcadero_cxl::broker_table::{BrokerInfo, publish_broker};
use embarcadero_cxl::region::{BrokerLock, RegionError, RegionFile};
use embarcadero_cxl::{Native, Region};
use embarcadero_transport::TransportKind;
use embarcadero_transport::rdma::RdmaDevice;
use embarcadero_verbs::VerbsError;
use embarcadero_wire::OutOfBounds;
use std::io;
use std::net::TcpListener;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};
use tokio::runtime::Runtime;

/// Broker that has everything it needs to run.
struct Prepared {
    config: BrokerConfig,
    file: RegionFile,
    mirror: Option<RegionFile>,
    info: BrokerInfo,
    device: Option<Arc<RdmaDevice>>,
    data: TcpListener,
    control: TcpListener,
}

/// Reason why a broker does not start.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// A value of the configuration is out of bounds.
    #[error(transparent)]
    Config(#[from] OutOfBounds),
    /// The region cannot be used.
    #[error(transparent)]
    Region(#[from] RegionError),
    /// The system refused a thread, a socket or a file.
    #[error("cannot {action}: {source}")]
    Io {
        /// Action that was tried, as a verb phrase.
        action: String,
        /// Error of the system.
        source: io::Error,
    },
    /// The RDMA device cannot be used.
    #[error("transport is {}, but {source}", .transport.name())]
    Device {
        /// Transport that was configured.
        transport: TransportKind,
        /// Error of the device.
        source: VerbsError,
    },
    /// The broker cannot join etcd.
    #[error("membership is etcd, but {0}")]
    Etcd(#[from] EtcdError),
    /// Every broker id of the region is taken. Holds their number.
    #[error("all {0} broker ids of the region are taken")]
    NoFreeId(u32),
    /// The broker is to be the leader, but another one leads.
    #[error("role is leader, but another live broker is the leader of this region")]
    LeaderTaken,
}

/// Returns a function that wraps an error of the system. `action` is a verb phrase.
fn io_error(action: impl Into<String>) -> impl FnOnce(io::Error) -> BrokerError {
    let action = action.into();
    move |source| BrokerError::Io { action, source }
}

/// Waits for a thread of the broker to end.
fn join(thread: JoinHandle<()>) {
    let name = thread.thread().name().unwrap_or("unnamed").to_owned();
    if thread.join().is_err() {
        tracing::error!(thread = name, "a thread of the broker ended with a panic");
    }
}

/// Running broker. It stops when dropped, also in the middle of its start.
pub struct Broker {
    info: BrokerInfo,
    region: Region<Native>,
    leader: Arc<CurrentLeader>,
    exit: Exit,
    control_stop: Option<tokio::sync::oneshot::Sender<()>>,
    threads: Vec<JoinHandle<()>>,
    /// Membership by etcd, and the runtime that its connections live on.
    etcd: Option<(Arc<Runtime>, Etcd)>,
    stopped: bool,
    // The last field is dropped last: another process can have the id once all else is gone.
    _id_lock: BrokerLock,
}

/// Flags with which a broker and its threads come to an end.
#[derive(Clone, Default)]
struct Exit {
    /// Set to send clients to other brokers.
    draining: Arc<AtomicBool>,
    /// Number of connections that are still open.
    connections: Arc<AtomicUsize>,
    /// Set to stop all threads.
    stop: Arc<AtomicBool>,
    /// Set once another process has this broker's id.
    superseded: Arc<AtomicBool>,
}

impl Exit {
    /// Stops all threads: another process has this broker's id.
    fn supersede(&self) {
        self.superseded.store(true, Ordering::Relaxed);
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// Time between two looks at whether all clients are gone.
const DRAIN_POLL: Duration = Duration::from_millis(5);

impl Broker {
    /// Joins the region and starts serving.
    ///
    /// # Errors
    /// [`BrokerError`]; nothing is left running when it fails.
    pub fn start(config: BrokerConfig) -> Result<Self, BrokerError> {
        config.validate()?;
        let (prepared, id_lock) = Prepared::open(config)?;
        prepared.run(id_lock)
    }

    /// Id, incarnation and addresses of the broker.
    pub fn info(&self) -> &BrokerInfo {
        &self.info
    }

    /// Returns true while this broker leads.
    pub fn is_leader(&self) -> bool {
        self.leader.read().unwrap_or_else(PoisonError::into_inner).is_some()
    }

    /// Returns true once another process has this broker's id. This broker has then stopped.
    ///
    /// That happens when it stood still for so long that other hosts took it for dead.
    pub fn is_superseded(&self) -> bool {
        self.exit.superseded.load(Ordering::Relaxed)
    }

    /// Takes no more batches, acknowledges those it has, and sends clients to other brokers. Call [`Broker::stop`]
    /// next.
    ///
    /// Waits for at most `patience`, and no longer once `hurry` returns true. Returns false when clients were still
    /// connected.
    pub fn drain(&self, patience: Duration, mut hurry: impl FnMut() -> bool) -> bool {
        self.exit.draining.store(true, Ordering::Relaxed);
        let begun = Instant::now();
        let left = || self.exit.connections.load(Ordering::Relaxed);
        while left() > 0 && begun.elapsed() < patience && !hurry() {
            std::thread::sleep(DRAIN_POLL);
        }
        let left = left();
        tracing::info!(broker = %self.info.id, connections = left, "drained");
        left == 0
    }

    /// Stops all threads, marks the broker as stopped in the broker table, and leaves etcd.
    pub fn stop(&mut self) {
        if std::mem::replace(&mut self.stopped, true) {
            return;
        }
        self.exit.stop.store(true, Ordering::Relaxed);
        if let Some(stop) = self.control_stop.take() {
            let _ = stop.send(());
        }
        for thread in self.threads.drain(..) {
            join(thread);
        }
        if !self.is_superseded() {
            publish_broker(&self.region, &BrokerInfo { running: false, ..self.info.clone() });
        }
        // Last: from then on a broker of another host may have the id, and write the row.
        if let Some((runtime, etcd)) = self.etcd.take() {
            runtime.block_on(etcd.leave());
        }
    }
}

impl Drop for Broker {
    fn drop(&mut self) {
        self.stop();
    }
}
