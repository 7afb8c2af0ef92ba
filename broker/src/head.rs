//! Who is the head: one broker of a host holds the head's lock, the others wait for it and take over when it is free.
//!
//! The kernel gives the lock up when the last thread of a process is gone, however it ended; so an old head never writes
//! beside a new one, and nothing of it needs to be refused. A head that is stopped (SIGSTOP) keeps it: ordering stands
//! still until it goes on, or is killed.

use crate::control::HeadControl;
use crate::membership::Liveness;
use crate::replica::completion::CompletionStage;
use crate::sequencer::{Leases, Sequencer};
use crate::worker::{HeadStages, now_us};
use crossbeam_channel::{Sender, unbounded};
use embarcadero_datapath::cxl::region::{RegionFile, RoleLock};
use embarcadero_datapath::cxl::segment::SegmentAllocator;
use embarcadero_datapath::cxl::tables::{BrokerInfo, Headship, publish_headship, read_headship};
use embarcadero_datapath::cxl::{Native, Region};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

/// Time between two looks at the lock, or at the other brokers' heartbeats.
const PERIOD: Duration = Duration::from_millis(20);

/// A broker as head, or as the one that takes over.
pub struct Candidate {
    /// The region's file, which has the lock.
    pub file: RegionFile,
    /// This broker.
    pub info: BrokerInfo,
    /// Allocator for the order indexes.
    pub pool: Arc<dyn SegmentAllocator>,
    /// Times that the sequencer goes by.
    pub leases: Leases,
    /// After what silence another broker is dead.
    pub broker_lease: Duration,
    /// Takes the lock when it is free.
    pub takes_over: bool,
    /// To the worker that runs the head's stages.
    pub stages: Sender<HeadStages>,
    /// What the control service can do once this is the head.
    pub control: Arc<OnceLock<HeadControl>>,
    /// Kept until all threads have ended.
    pub lock: Arc<Mutex<Option<RoleLock>>>,
}

impl Candidate {
    fn region(&self) -> &Region<Native> {
        self.file.region()
    }

    /// Becomes the head, under the next epoch, with everything that is in the region.
    pub fn lead(&self, lock: RoleLock) {
        *self.lock.lock().unwrap_or_else(PoisonError::into_inner) = Some(lock);
        let region = self.region();
        let before = read_headship(region);
        let epoch = before.map_or(0, |before| before.epoch) + 1;
        // The one before is gone; of the others it said that they live.
        let live = before.map_or(0, |before| before.broker_mask & !(1 << before.broker)) | 1 << self.info.id;
        self.publish(epoch, live);
        let (commands, queue) = unbounded();
        let pool = Arc::clone(&self.pool);
        let sequencer = Sequencer::recover(region.clone(), pool, epoch, self.leases, queue, now_us());
        let topics = tokio::sync::Mutex::new(());
        if self.control.set(HeadControl { commands, topics }).is_ok() {
            // The channel has room for the only stages that there ever are.
            let _ = self.stages.try_send((sequencer, CompletionStage::new(region.clone())));
        }
        tracing::info!(broker = self.info.id, epoch, "head");
    }

    fn publish(&self, epoch: u64, broker_mask: u64) {
        let BrokerInfo { id: broker, incarnation, .. } = self.info;
        publish_headship(self.region(), &Headship { epoch, broker, incarnation, broker_mask });
    }

    /// Waits until this broker is the head, then watches the others.
    pub async fn run(self) {
        let mut ticks = tokio::time::interval(PERIOD);
        while self.control.get().is_none() {
            ticks.tick().await;
            if !self.takes_over {
                continue;
            }
            match self.file.claim_head() {
                Ok(Some(lock)) => {
                    tracing::warn!("the region has no head any more: taking over");
                    self.lead(lock);
                }
                Ok(None) => {}
                Err(error) => tracing::error!(%error, "cannot look whether there is a head"),
            }
        }
        let Some(Headship { epoch, broker_mask, .. }) = read_headship(self.region()) else { return };
        let mut liveness = Liveness::new(self.region(), self.broker_lease, broker_mask);
        let mut shown = broker_mask;
        loop {
            ticks.tick().await;
            let mask = liveness.poll(self.region(), Instant::now()) | 1 << self.info.id;
            if mask != shown {
                shown = mask;
                tracing::info!(mask = format!("{mask:#b}"), "membership changed");
                self.publish(epoch, mask);
            }
        }
    }
}
