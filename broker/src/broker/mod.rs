//! Puts a broker together and takes it apart.

mod device;
mod identity;
mod start;
mod threads;

use crate::config::BrokerConfig;
use crate::control::CurrentLeader;
use crate::membership::etcd::EtcdError;
use embarcadero_cxl::broker_table::{BrokerInfo, publish_broker};
use embarcadero_cxl::region::{BrokerLock, RegionError};
use embarcadero_cxl::{Native, Region};
use embarcadero_transport::TransportKind;
use embarcadero_verbs::VerbsError;
use embarcadero_wire::OutOfBounds;
use start::Prepared;
use std::io;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// Why a broker does not start.
#[derive(Debug, thiserror::Error)]
pub enum BrokerError {
    /// Its configuration.
    #[error(transparent)]
    Config(#[from] OutOfBounds),
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
    Device {
        /// What was asked for.
        transport: TransportKind,
        /// What is missing.
        source: VerbsError,
    },
    /// Its membership.
    #[error("membership is etcd, but {0}")]
    Etcd(#[from] EtcdError),
    /// No id is left.
    #[error("all {0} broker ids of the region are taken")]
    NoFreeId(u32),
    /// Another is the leader.
    #[error("role is leader, but another live broker is the leader of this region")]
    LeaderTaken,
}

fn io_error(action: impl Into<String>) -> impl FnOnce(io::Error) -> BrokerError {
    let action = action.into();
    move |source| BrokerError::Io { action, source }
}

/// A running broker; stops when dropped.
pub struct Broker {
    info: BrokerInfo,
    region: Region<Native>,
    leader: Arc<CurrentLeader>,
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

impl Broker {
    /// Joins the region and starts serving.
    ///
    /// # Errors
    /// [`BrokerError`]; nothing is left running when it fails.
    pub fn start(config: BrokerConfig) -> Result<Self, BrokerError> {
        config.validate()?;
        Prepared::open(config)?.run()
    }

    /// Address and id.
    pub fn info(&self) -> &BrokerInfo {
        &self.info
    }

    /// True for the broker that orders.
    pub fn is_leader(&self) -> bool {
        self.leader.read().unwrap_or_else(PoisonError::into_inner).is_some()
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
        tracing::info!(broker = %self.info.id, connections = left, "drained");
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
