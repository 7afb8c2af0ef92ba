//! Local order: each broker has one delegation, which appends received batches to the Batchlog in arrival order.
//!
//! For a topic without a global order it writes the broker's own order index instead.

mod log;

use crate::reclaim::OrphanedSegments;
use crate::topics::{Topic, TopicTable};
use crossbeam_channel::{Receiver, Sender};
use embarcadero_cxl::broker_table::{Pulse, last_incarnation};
use embarcadero_cxl::layout::TopicState;
use embarcadero_cxl::leadership::read_leader;
use embarcadero_cxl::segment::{PartitionAllocator, PoolError};
use embarcadero_cxl::session_connections::ConnectionsWriter;
use embarcadero_cxl::topic_table::{publish_released, read_topic};
use embarcadero_cxl::{Damage, Fabric, Region, RegionOffset, Row, Site};
use embarcadero_os::Times;
use embarcadero_wire::{BatchHeader, Incarnation};
use log::LocalLog;
use serde::{Deserialize, Serialize};
use std::sync::Arc;

/// Connection that a batch came on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Index of the I/O worker that serves the connection.
    pub worker: usize,
    /// Token of the connection within its worker.
    pub token: u64,
}

/// Batch that lies complete in the Blog.
pub struct Landed<F: Fabric> {
    /// Topic of the batch.
    pub topic: Arc<Topic<F>>,
    /// Header of the batch.
    pub header: BatchHeader,
    /// Position of the batch in the region, where its header begins.
    pub at: RegionOffset,
    /// True when the batch's bytes are in memory already, so that no cache has to be flushed.
    pub in_memory: bool,
    /// Connection that the batch came on.
    pub origin: Origin,
}

impl<F: Fabric> Landed<F> {
    /// Writes the batch's bytes back from the CPU cache, unless they are in memory already.
    fn flush(&self, fabric: &F) {
        if !self.in_memory {
            fabric.flush(self.at, self.header.batch_bytes(), Site::PayloadFlush);
        }
    }
}

/// Place of a batch in this broker's own order, for a topic without a global order.
#[derive(Clone, Copy, Debug)]
pub struct OrderedLocally {
    /// Token of the connection to acknowledge on.
    pub token: u64,
    /// Sequence number of the batch in its session.
    pub sequence: u64,
    /// Offset of the batch's first message.
    pub first_offset: u64,
    /// Position of the batch in this broker's order index.
    pub position: u64,
}

// [[DEVIATION_002]] The paper flushes and fences every write: `{ batches: 1, bytes: 1 }` comes closest.
/// Size at which the delegation writes back and publishes a group of batches. An incomplete group is published as soon
/// as no more batches wait.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FlushGroup {
    /// Number of batches that complete a group, 1 to 1024.
    pub batches: u64,
    /// Number of bytes that complete a group, headers included, 1 to 1 GiB.
    pub bytes: u64,
}

impl Default for FlushGroup {
    fn default() -> Self {
        Self { batches: 8, bytes: 64 << 10 }
    }
}

/// Stage that puts received batches into local order.
pub struct Delegation<F: Fabric> {
    topics: Arc<TopicTable<F>>,
    logs: Vec<Option<LocalLog<F>>>,
    landed: Receiver<Landed<F>>,
    /// Batch for which there was no room, to be tried again first.
    stalled: Option<Landed<F>>,
    acks: Vec<Sender<OrderedLocally>>,
    pulse: Pulse<F>,
    connections: ConnectionsWriter<F>,
    group: FlushGroup,
    /// Incarnation of this process; `None` where no other process can have this broker's id.
    incarnation: Option<Incarnation>,
    /// True once a later process has this broker's id.
    superseded: bool,
    /// True where the broker is dead, and another stands in for it for a moment.
    dead: bool,
    /// Orphaned segments of the region and, where the broker may lead, of the region's mirror.
    orphaned: Vec<OrphanedSegments<F>>,
}

impl<F: Fabric> Delegation<F> {
    /// Returns a delegation that is fed through `landed`. `acks` has one channel per worker, by worker index.
    pub fn new(
        topics: Arc<TopicTable<F>>,
        landed: Receiver<Landed<F>>,
        acks: Vec<Sender<OrderedLocally>>,
        group: FlushGroup,
    ) -> Self {
        let slots = topics.region().geometry().max_topics;
        let pulse = Pulse::new(topics.region().clone(), topics.broker());
        let connections = ConnectionsWriter::new(topics.region().clone(), topics.broker());
        let orphaned = OrphanedSegments::new(topics.region().clone(), topics.broker(), Arc::clone(topics.pool()));
        Self {
            logs: (0..slots).map(|_| None).collect(),
            topics,
            landed,
            stalled: None,
            acks,
            pulse,
            connections,
            group,
            incarnation: None,
            superseded: false,
            dead: false,
            orphaned: vec![orphaned],
        }
    }

    /// Sets the incarnation of this process. The delegation then stops writing once the broker table names a later one.
    ///
    /// Several hosts need this: a process that only stood still may have been taken for dead and replaced.
    #[must_use]
    pub fn of_incarnation(self, incarnation: Incarnation) -> Self {
        Self { incarnation: Some(incarnation), ..self }
    }

    /// Makes the delegation stand in for a broker that is dead. It is there for a moment only, so that batches are as old
    /// as the wall clock says.
    pub(crate) fn of_dead_broker(self) -> Self {
        Self { dead: true, ..self }
    }

    /// Returns true once a later process has this broker's id. This process then no longer counts and should end.
    pub fn is_superseded(&self) -> bool {
        self.superseded
    }

    /// Reads from the broker table whether a later process has this broker's id.
    fn look_for_successor(&mut self) -> bool {
        if let Some(own) = self.incarnation
            && !self.superseded
        {
            self.superseded = last_incarnation(self.topics.region(), self.topics.broker()) > own;
        }
        self.superseded
    }

    /// Makes the delegation also give back the orphaned index segments of the region's mirror.
    pub fn reclaim_mirror(&mut self, mirror: Region<F>) {
        let broker = self.topics.broker();
        let pool = Arc::new(PartitionAllocator::of_broker(mirror.clone(), broker));
        self.orphaned.push(OrphanedSegments::new(mirror, broker, pool));
    }

    /// Orders up to `budget` waiting batches and publishes them. The wall clock is at `now_us`, microseconds since 1970.
    /// Returns the number of batches ordered.
    pub fn poll(&mut self, now_us: u64, budget: usize) -> usize {
        let mut taken = 0;
        if self.superseded {
            return 0;
        }
        while taken < budget {
            let Some(landed) = self.stalled.take().or_else(|| self.landed.try_recv().ok()) else { break };
            if let Err(landed) = self.append(landed, now_us) {
                // The sequencer is behind or the pool is empty: keep it, and let the publishers wait.
                self.stalled = Some(landed);
                break;
            }
            taken += 1;
        }
        for slot in 0..self.logs.len() {
            self.publish(slot);
        }
        taken
    }

    /// Appends a batch to its topic's log, or gives it up if the topic is deleted or damaged. Returns the batch when there
    /// is no room for it now.
    fn append(&mut self, landed: Landed<F>, now_us: u64) -> Result<(), Landed<F>> {
        let group = self.group;
        let Some(local) = self.open(&landed.topic) else {
            landed.topic.blog.give_up(landed.at, landed.header.batch_bytes());
            return Ok(());
        };
        if !local.append(&landed, now_us) {
            return Err(landed);
        }
        if local.completes(group) {
            self.publish(landed.topic.config.id.index());
        }
        Ok(())
    }

    /// Returns the log of a topic, which it opens if need be; `None` when the topic is deleted or damaged.
    fn open(&mut self, topic: &Arc<Topic<F>>) -> Option<&mut LocalLog<F>> {
        if topic.is_deleted() {
            return None;
        }
        let log = &mut self.logs[topic.config.id.index()];
        if !log.as_ref().is_some_and(|log| Arc::ptr_eq(log.topic(), topic)) {
            match LocalLog::open(&self.topics, topic, self.dead) {
                Ok(opened) => *log = Some(opened),
                Err(damage) => topic.mark_damaged(damage),
            }
        }
        log.as_mut().filter(|_| !topic.is_damaged())
    }

    /// Publishes the batches that were appended to the topic in `slot`, unless a later process has this broker's id.
    fn publish(&mut self, slot: usize) {
        if !self.logs[slot].as_ref().is_some_and(LocalLog::is_unpublished) || self.look_for_successor() {
            return;
        }
        if let Some(local) = &mut self.logs[slot] {
            local.publish(&mut self.pulse, &self.acks);
        }
    }

    /// Moves this broker's heartbeat. Call it every few milliseconds.
    pub fn beat(&mut self) {
        if !self.look_for_successor() {
            self.pulse.beat();
        }
    }

    /// Shows the connections of sessions, applies retention, gives segments back, and opens and closes topics. Call it
    /// every few milliseconds.
    pub fn maintain(&mut self, now: impl Into<Times>) {
        if self.superseded {
            return;
        }
        // What a dead broker showed does not count.
        if !self.dead {
            let sessions = self.topics.sessions();
            self.connections.publish(|slot| sessions.connected(slot));
        }
        let now = now.into();
        let region = self.topics.region().clone();
        let broker = self.topics.broker();
        let live = read_leader(&region).map_or(u64::MAX, |leader| leader.pinning_mask) | 1 << broker.0;
        let brokers = || region.geometry().brokers().filter(move |id| live & (1 << id.0) != 0);
        self.follow_topics();
        self.orphaned.iter_mut().for_each(|segments| segments.poll(&self.topics, brokers()));
        for slot in 0..self.logs.len() {
            match &mut self.logs[slot] {
                Some(local) if local.topic().is_deleted() => self.close(slot),
                Some(local) => local.maintain(now, brokers()),
                None => {}
            }
        }
        self.close_unlogged();
    }

    /// Closes deleted topics of which this delegation never had a log. Connections opened them, and they were deleted at
    /// once, or their order here is damaged.
    fn close_unlogged(&self) {
        for topic in self.topics.opened() {
            let id = topic.config.id;
            if !topic.is_deleted() || self.logs[id.index()].is_some() {
                continue;
            }
            // The topic table holds the topic, and so does this function.
            if Arc::strong_count(&topic) <= 2 && topic.blog.abandon() {
                self.forget(&topic);
            }
        }
    }

    /// Removes a deleted topic from the table, and announces that this broker holds nothing of it.
    fn forget(&self, topic: &Topic<F>) {
        self.topics.forget(topic.config.id);
        publish_released(self.topics.region(), topic.config.id, self.topics.broker(), topic.config.incarnation);
    }

    /// Opens new topics, and marks those that are being deleted.
    fn follow_topics(&mut self) {
        let region = self.topics.region().clone();
        for id in region.geometry().topics() {
            let Ok(Row::Used(config)) = read_topic(&region, id) else { continue };
            let live = config.state == TopicState::Live;
            for topic in self.topics.opened() {
                if topic.config.id == id && !(live && topic.config.incarnation == config.incarnation) {
                    self.topics.mark_deleted(&topic);
                }
            }
            if live && let Ok(Some(topic)) = self.topics.get(id, config.incarnation) {
                self.open(&topic);
            } else if config.state == TopicState::Deleting && !self.topics.is_open(id) {
                publish_released(&region, id, self.topics.broker(), config.incarnation);
            }
        }
    }

    /// Closes a deleted topic once no connection holds it, and announces that this broker holds nothing of it.
    fn close(&mut self, slot: usize) {
        let Some(local) = &mut self.logs[slot] else { return };
        if !local.abandon() {
            return;
        }
        let topic = Arc::clone(local.topic());
        self.logs[slot] = None;
        self.forget(&topic);
    }
}

/// Names the reason for which the order of a topic has no room, once until it has.
#[inline]
pub(crate) fn report_starved(topic: &str, made: &Result<(), PoolError>, starved: &mut bool) {
    if let Err(error) = made
        && !*starved
    {
        tracing::warn!(topic, %error, "batches wait: the order has no room");
    }
    *starved = made.is_err();
}

/// Names the damage of an entry that retention trimmed from the order of a topic.
pub(crate) fn report_trimmed(topic: &str, damage: Option<Damage>) {
    if let Some(damage) = damage {
        tracing::error!(topic, %damage, "a batch was trimmed that nobody could read");
    }
}
