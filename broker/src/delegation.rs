//! Local order: each broker has one delegation, which appends received batches to the Batchlog in arrival order.
//!
//! For a topic without a global order it writes the broker's own order index instead.

use crate::reclaim::{OrphanedSegments, Reclaimer};
use crate::replica::completion::trimmable;
use crate::topics::{Topic, TopicTable};
use bytemuck::Zeroable;
use crossbeam_channel::{Receiver, Sender};
use embarcadero_cxl::batchlog::{BatchlogWriter, Written};
use embarcadero_cxl::broker_table::{Pulse, last_incarnation};
use embarcadero_cxl::layout::{BatchEntry, IndexEntry, LeaderArea, TopicState};
use embarcadero_cxl::leadership::read_leader;
use embarcadero_cxl::order_index::{IndexOptions, OrderIndexWriter, Retention, StreamId, lowest_pin};
use embarcadero_cxl::replication::read_completion;
use embarcadero_cxl::segment::PartitionAllocator;
use embarcadero_cxl::topic_table::{publish_released, read_topic};
use embarcadero_cxl::{Fabric, Region, RegionOffset, Row, Site};
use embarcadero_wire::{BatchHeader, Incarnation, Stream, Term};
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

/// A batch that lies complete in the Blog.
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
    /// Number of batches that complete a group, at least 1.
    pub batches: u64,
    /// Number of bytes that complete a group, headers included, at least 1.
    pub bytes: u64,
}

impl Default for FlushGroup {
    fn default() -> Self {
        Self { batches: 8, bytes: 64 << 10 }
    }
}

enum Log<F: Fabric> {
    /// List of batches that the sequencer reads, of a topic with a global order.
    Batchlog(BatchlogWriter<F>),
    /// Order index that this broker alone writes, of a topic without a global order.
    Own(OrderIndexWriter<F>),
}

/// Topic as the delegation orders it.
struct LocalLog<F: Fabric> {
    topic: Arc<Topic<F>>,
    log: Log<F>,
    /// Totals that the next publication of the Batchlog shows.
    written: Written,
    /// Batches that were written since the last publication.
    unpublished: u64,
    unpublished_bytes: u64,
    /// Worker and ack of each batch that is written but not yet published.
    held_acks: Vec<(usize, OrderedLocally)>,
    reclaimer: Reclaimer<F>,
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
    group: FlushGroup,
    /// Incarnation of this process; `None` where no other process can have this broker's id.
    incarnation: Option<Incarnation>,
    /// True once a later process has this broker's id.
    superseded: bool,
    /// Orphaned index segments of the region and, where the broker may lead, of the region's mirror.
    leftovers: Vec<OrphanedSegments<F>>,
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
        let leftovers =
            vec![OrphanedSegments::new(topics.region().clone(), topics.broker(), Arc::clone(topics.pool()))];
        Self {
            logs: (0..slots).map(|_| None).collect(),
            topics,
            landed,
            stalled: None,
            acks,
            pulse,
            group,
            incarnation: None,
            superseded: false,
            leftovers,
        }
    }

    /// Sets the incarnation of this process. The delegation then stops writing once the broker table names a later one.
    ///
    /// Several hosts need this: a process that only stood still may have been taken for dead and replaced.
    #[must_use]
    pub fn of_incarnation(self, incarnation: Incarnation) -> Self {
        Self { incarnation: Some(incarnation), ..self }
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
    pub fn tidy(&mut self, mirror: Region<F>) {
        let broker = self.topics.broker();
        let pool = Arc::new(PartitionAllocator::of_broker(mirror.clone(), broker));
        self.leftovers.push(OrphanedSegments::new(mirror, broker, pool));
    }

    /// Orders up to `budget` waiting batches and publishes them. Returns the number of batches ordered.
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

    /// Appends a batch to its topic's log. Returns the batch when there is no room for it now.
    fn append(&mut self, landed: Landed<F>, now_us: u64) -> Result<(), Landed<F>> {
        let slot = landed.topic.config.id.index();
        if !landed.topic.is_deleted() {
            self.open(&landed.topic);
        }
        if landed.topic.is_deleted() || landed.topic.is_damaged() {
            landed.topic.blog.settle(landed.at);
            return Ok(());
        }
        let broker = self.topics.broker();
        let fabric = self.topics.region().fabric();
        let Some(Some(local)) = self.logs.get_mut(slot) else { return Ok(()) };
        let header = &landed.header;
        let bytes = header.batch_bytes();
        let index = match &mut local.log {
            Log::Batchlog(writer) => {
                if !writer.has_room() {
                    return Err(landed);
                }
                landed.flush(fabric);
                writer.append(BatchEntry {
                    location: landed.at.0,
                    client_id: header.client_id,
                    sequence: header.sequence,
                    session_epoch: header.session_epoch,
                    bytes: bytes as u32,
                    message_count: header.message_count,
                    session_slot: header.session_slot,
                    topic_incarnation: header.topic_incarnation,
                    ..BatchEntry::zeroed()
                })
            }
            Log::Own(index) => {
                if index.make_room().is_err() {
                    return Err(landed);
                }
                landed.flush(fabric);
                let position = index.next();
                let first_offset = index.append(IndexEntry {
                    location: landed.at.0,
                    client_id: header.client_id,
                    sequence: header.sequence,
                    ordered_us: now_us,
                    bytes: bytes as u32,
                    message_count: header.message_count,
                    session_epoch: header.session_epoch,
                    broker: broker.byte(),
                    replicas: 1,
                    ..IndexEntry::zeroed()
                });
                let Origin { worker, token } = landed.origin;
                local
                    .held_acks
                    .push((worker, OrderedLocally { token, sequence: header.sequence, first_offset, position }));
                position
            }
        };
        landed.topic.blog.published(landed.at, index);
        local.written.log_offset = landed.topic.blog.reserved_bytes();
        local.written.messages += u64::from(header.message_count);
        local.written.end = landed.at.0 + bytes;
        local.unpublished += 1;
        local.unpublished_bytes += bytes;
        if local.unpublished >= self.group.batches || local.unpublished_bytes >= self.group.bytes {
            self.publish(slot);
        }
        Ok(())
    }

    /// Opens the log of a topic unless it is open. Marks the topic as damaged when its order index cannot be opened.
    fn open(&mut self, topic: &Arc<Topic<F>>) {
        let region = self.topics.region();
        let broker = self.topics.broker();
        let config = &topic.config;
        let Some(slot) = self.logs.get_mut(config.id.index()) else { return };
        if slot.as_ref().is_some_and(|local| Arc::ptr_eq(&local.topic, topic)) {
            return;
        }
        let log = if config.order.is_global() {
            Log::Batchlog(BatchlogWriter::new(region.clone(), config.id, broker))
        } else {
            let own = IndexOptions {
                id: StreamId { topic: config.id, stream: Stream::of(broker) },
                incarnation: config.incarnation,
                writer: LeaderArea(broker),
                term: Term::NONE,
            };
            match OrderIndexWriter::open(region.clone(), own, Arc::clone(self.topics.pool())) {
                Ok(index) => Log::Own(index),
                Err(damage) => return topic.mark_damaged(damage),
            }
        };
        *slot = Some(LocalLog {
            topic: Arc::clone(topic),
            log,
            written: Written::default(),
            unpublished: 0,
            unpublished_bytes: 0,
            held_acks: Vec::with_capacity(64),
            reclaimer: Reclaimer::new(region.clone(), topic, broker),
        });
    }

    /// Publishes the batches that were written to the topic in `slot`, unless a later process has this broker's id.
    fn publish(&mut self, slot: usize) {
        let unpublished = |local: &LocalLog<F>| local.unpublished > 0;
        if !self.logs.get(slot).is_some_and(|log| log.as_ref().is_some_and(unpublished)) || self.look_for_successor() {
            return;
        }
        let Some(Some(local)) = self.logs.get_mut(slot) else { return };
        match &mut local.log {
            Log::Batchlog(writer) => {
                writer.publish(local.written);
                self.pulse.announce(local.unpublished);
            }
            Log::Own(index) => {
                index.write_back_entries();
                index.publish_tail(Term::NONE);
                self.topics.region().fabric().fence(Site::TailFlush);
                for (worker, ack) in local.held_acks.drain(..) {
                    // A full channel means that the worker died; its connections are gone with it.
                    let _ = self.acks.get(worker).map(|sender| sender.try_send(ack));
                }
            }
        }
        local.unpublished = 0;
        local.unpublished_bytes = 0;
    }

    /// Moves this broker's heartbeat. Call it every few milliseconds.
    pub fn beat(&mut self) {
        if !self.look_for_successor() {
            self.pulse.beat();
        }
    }

    /// Applies retention, gives segments back, and opens and closes topics. Call it every few milliseconds.
    pub fn maintain(&mut self, now_us: u64) {
        if self.superseded {
            return;
        }
        let region = self.topics.region().clone();
        let broker = self.topics.broker();
        let live = read_leader(&region).map_or(u64::MAX, |leader| leader.pinning_mask) | 1 << broker.0;
        let brokers = || region.geometry().brokers().filter(move |id| live & (1 << id.0) != 0);
        self.follow_topics();
        self.leftovers.iter_mut().for_each(|leftovers| leftovers.poll(brokers()));
        for slot in 0..self.logs.len() {
            let Some(Some(local)) = self.logs.get_mut(slot) else { continue };
            if local.topic.is_deleted() {
                self.let_go(slot);
                continue;
            }
            let config = &local.topic.config;
            let head = match &mut local.log {
                Log::Batchlog(writer) => writer.head(),
                Log::Own(index) => {
                    if let Ok(completion) = read_completion(&region, config.id, broker) {
                        index.enforce_retention(Retention {
                            bytes: config.retention_bytes,
                            since_us: since(config.retention_ms, now_us),
                            limit: trimmable(&region, config, completion),
                        });
                    }
                    index.reclaim(lowest_pin(&region, config.id, std::iter::once(broker)));
                    index.next()
                }
            };
            local.reclaimer.poll(&local.topic, head, brokers());
        }
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

    /// Announces that batches wait for room at this broker, so that the leader fences no session for a gap meanwhile.
    pub fn stalled(&mut self) {
        self.pulse.stall();
    }

    /// Closes a deleted topic once no connection holds it, and announces that this broker holds nothing of it.
    fn let_go(&mut self, slot: usize) {
        let Some(place) = self.logs.get_mut(slot) else { return };
        let Some(local) = place else { return };
        // Connections hold the topic as well; only when they are gone is nothing received into it.
        if Arc::strong_count(&local.topic) > 2 || !local.topic.blog.abandon() {
            return;
        }
        if let Log::Own(index) = &mut local.log {
            index.abandon();
        }
        let config = local.topic.config.clone();
        *place = None;
        self.topics.forget(config.id);
        publish_released(self.topics.region(), config.id, self.topics.broker(), config.incarnation);
    }
}

/// Returns the time, in microseconds since 1970, before which retention keeps nothing; 0 when `retention_ms` is 0,
/// which keeps everything.
#[must_use]
pub fn since(retention_ms: u64, now_us: u64) -> u64 {
    if retention_ms == 0 { 0 } else { now_us.saturating_sub(retention_ms.saturating_mul(1000)) }
}
