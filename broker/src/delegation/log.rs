//! Log of a topic in this broker's order: the Batchlog, or the broker's own order index.

use super::{FlushGroup, Landed, OrderedLocally, report_starved, report_trimmed};
use crate::order_time::{Ages, next_time_us};
use crate::reclaim::Reclaimer;
use crate::replica::completion::trimmable;
use crate::topics::{Topic, TopicTable};
use bytemuck::Zeroable;
use crossbeam_channel::Sender;
use embarcadero_cxl::batchlog::{BatchlogWriter, Written};
use embarcadero_cxl::broker_table::Pulse;
use embarcadero_cxl::layout::{BatchEntry, IndexEntry, LeaderArea};
use embarcadero_cxl::order_index::{IndexOptions, OrderIndexWriter, Retention, StreamId, lowest_pin};
use embarcadero_cxl::replication::read_completion;
use embarcadero_cxl::{Damage, Fabric, Region, Site};
use embarcadero_os::Times;
use embarcadero_wire::{BrokerId, Stream, Term};
use std::sync::Arc;

enum Log<F: Fabric> {
    /// List of batches that the sequencer reads, of a topic with a global order.
    Batchlog(BatchlogWriter<F>),
    /// Order index that this broker alone writes, of a topic without a global order.
    Own(OrderIndexWriter<F>),
}

/// Topic as the delegation orders it.
pub(super) struct LocalLog<F: Fabric> {
    region: Region<F>,
    broker: BrokerId,
    topic: Arc<Topic<F>>,
    log: Log<F>,
    /// Totals that the next publication of the Batchlog shows.
    written: Written,
    /// Number of batches that were appended since the last publication.
    unpublished: u64,
    unpublished_bytes: u64,
    /// Worker and ack of each batch of a broker's own order that is appended but not yet published.
    held_acks: Vec<(usize, OrderedLocally)>,
    /// Time of the newest entry of the broker's own order, microseconds since 1970. It never goes back.
    ordered_us: u64,
    /// Ages of the entries of the broker's own order.
    ages: Ages,
    /// The last batch found no room in the order index, and the log says so.
    starved: bool,
    reclaimer: Reclaimer<F>,
}

impl<F: Fabric> LocalLog<F> {
    /// Opens the log of a topic, where an earlier process of this broker may have left it. `dead` says that the broker
    /// has no process, and this is the leader's for a moment.
    ///
    /// # Errors
    /// [`Damage`] in the broker's own order index.
    pub(super) fn open(topics: &TopicTable<F>, topic: &Arc<Topic<F>>, dead: bool) -> Result<Self, Damage> {
        let (region, broker, config) = (topics.region().clone(), topics.broker(), &topic.config);
        let mut ordered_us = 0;
        let log = if config.order.is_global() {
            Log::Batchlog(BatchlogWriter::new(region.clone(), config.id, broker))
        } else {
            let own = IndexOptions {
                id: StreamId { topic: config.id, stream: Stream::of(broker) },
                incarnation: config.incarnation,
                writer: LeaderArea(broker),
                term: Term::NONE,
            };
            let index = OrderIndexWriter::open(region.clone(), own, Arc::clone(topics.pool()))?;
            if let Some(damage) = index.damage() {
                tracing::error!(topic = config.name, %damage, "a batch in the order cannot be read");
            }
            ordered_us = index.newest_us()?;
            Log::Own(index)
        };
        Ok(Self {
            reclaimer: Reclaimer::new(region.clone(), topic, broker),
            region,
            broker,
            topic: Arc::clone(topic),
            log,
            written: Written::default(),
            unpublished: 0,
            unpublished_bytes: 0,
            held_acks: Vec::with_capacity(64),
            ordered_us,
            ages: Ages::new(if dead { 0 } else { ordered_us }),
            starved: false,
        })
    }

    /// Topic that the log belongs to.
    pub(super) fn topic(&self) -> &Arc<Topic<F>> {
        &self.topic
    }

    /// Returns true when batches wait for their publication.
    pub(super) fn is_unpublished(&self) -> bool {
        self.unpublished > 0
    }

    /// Returns true when the batches that wait for their publication complete a group.
    pub(super) fn completes(&self, group: FlushGroup) -> bool {
        self.unpublished >= group.batches || self.unpublished_bytes >= group.bytes
    }

    /// Appends a batch of the topic. Returns false, and changes nothing, when there is no room for it now.
    pub(super) fn append(&mut self, landed: &Landed<F>, now_us: u64) -> bool {
        let header = &landed.header;
        let bytes = header.batch_bytes();
        let position = match &mut self.log {
            Log::Batchlog(writer) => {
                match writer.has_room() {
                    Ok(true) => {}
                    Ok(false) => return false,
                    Err(damage) => {
                        self.topic.mark_damaged(damage);
                        return false;
                    }
                }
                landed.flush(self.region.fabric());
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
                let made = index.make_room();
                report_starved(&self.topic.config.name, &made, &mut self.starved);
                if made.is_err() {
                    return false;
                }
                if self.unpublished == 0 {
                    self.ordered_us = next_time_us(self.ordered_us, now_us);
                }
                landed.flush(self.region.fabric());
                let position = index.next();
                let first_offset = index.append(IndexEntry {
                    location: landed.at.0,
                    client_id: header.client_id,
                    sequence: header.sequence,
                    ordered_us: self.ordered_us,
                    bytes: bytes as u32,
                    message_count: header.message_count,
                    session_epoch: header.session_epoch,
                    broker: self.broker.byte(),
                    replicas: 1,
                    ..IndexEntry::zeroed()
                });
                let ack =
                    OrderedLocally { token: landed.origin.token, sequence: header.sequence, first_offset, position };
                self.held_acks.push((landed.origin.worker, ack));
                position
            }
        };
        let blog = &self.topic.blog;
        blog.published(landed.at, position);
        self.written.log_offset = blog.reserved_bytes();
        self.written.messages += u64::from(header.message_count);
        self.written.end = landed.at.0 + bytes;
        self.unpublished += 1;
        self.unpublished_bytes += bytes;
        true
    }

    /// Publishes the batches that were appended, and sends their acks if this broker alone orders them.
    pub(super) fn publish(&mut self, pulse: &mut Pulse<F>, acks: &[Sender<OrderedLocally>]) {
        match &mut self.log {
            Log::Batchlog(writer) => {
                writer.publish(self.written);
                pulse.announce(self.unpublished);
            }
            Log::Own(index) => {
                index.write_back_entries();
                index.publish_tail(Term::NONE);
                self.region.fabric().fence(Site::TailFlush);
                for (worker, ack) in self.held_acks.drain(..) {
                    // A channel is full or closed only when its worker died, and the connections with it.
                    let _ = acks[worker].try_send(ack);
                }
            }
        }
        self.unpublished = 0;
        self.unpublished_bytes = 0;
    }

    /// Applies retention to the broker's own order, and gives back segments that nobody needs. `brokers` are those whose
    /// pins count.
    pub(super) fn maintain(&mut self, now: Times, brokers: impl Iterator<Item = BrokerId>) {
        let config = &self.topic.config;
        let head = match &mut self.log {
            Log::Batchlog(writer) => writer.head(),
            Log::Own(index) => {
                if let Ok(completion) = read_completion(&self.region, config.id, self.broker) {
                    let old = self.ages.look(index.next(), config.retention_ms, now);
                    let damage = index.enforce_retention(Retention {
                        bytes: config.retention_bytes,
                        since_us: old.since_us,
                        below: old.below,
                        limit: trimmable(&self.region, config, completion),
                    });
                    report_trimmed(&config.name, damage);
                }
                index.reclaim(lowest_pin(&self.region, config.id, std::iter::once(self.broker)));
                index.next()
            }
        };
        self.reclaimer.poll(&self.topic, head, brokers);
    }

    /// Gives everything back after the topic was deleted. Returns false while connections still hold the topic; call it
    /// again then.
    pub(super) fn abandon(&mut self) -> bool {
        // This log and the topic table hold the topic. Whoever else does may still receive into it.
        if Arc::strong_count(&self.topic) > 2 || !self.topic.blog.abandon() {
            return false;
        }
        if let Log::Own(index) = &mut self.log {
            index.abandon();
        }
        true
    }
}
