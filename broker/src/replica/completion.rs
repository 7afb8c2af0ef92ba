//! Completion vector: the leader counts the disks that have each batch, and shows which batches are durable.

use super::replicator::possible_replicas;
use embarcadero_cxl::broker_table::last_incarnation;
use embarcadero_cxl::layout::LeaderArea;
use embarcadero_cxl::order_index::{Extent, StreamId, read_extent_at};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::replication::{Completion, Replication, publish_completion, read_completion_at, read_replicated};
use embarcadero_cxl::topic_table::{TopicConfig, TopicRows};
use embarcadero_cxl::{Fabric, Guard};
use embarcadero_wire::{BrokerId, Incarnation, Stream};

/// Time between two counts, microseconds: far less than an `fdatasync` takes.
const PERIOD_US: u64 = 50;

/// Returns the position below which at least `copies` of the replicas have the batches of a source. `progress` has the
/// positions of the replicas.
fn copied(progress: &mut [u64], copies: usize) -> u64 {
    progress.sort_unstable_by(|a, b| b.cmp(a));
    copies.checked_sub(1).and_then(|last| progress.get(last)).copied().unwrap_or(0)
}

/// Stage of the leader that advances the completion vector. It runs on the sequencer's thread.
pub struct CompletionStage<F: Fabric> {
    region: Region<F>,
    area: LeaderArea,
    /// Topics that are replicated.
    topics: Vec<TopicConfig>,
    /// Brokers that ever ran, one bit each.
    known: u64,
    /// Time of the last count, microseconds.
    counted_us: u64,
    /// Topics with sessions that wait for durable batches, one bit each.
    awaited: u32,
    /// Topic slots with a damaged row that the log has named, one bit each.
    reported: u32,
    /// Topic slots with a replica beyond the tail that the log has named, one bit each.
    beyond: u32,
}

impl<F: Fabric> CompletionStage<F> {
    /// Continues from the vector in the leader's area.
    pub fn new(region: Region<F>, area: LeaderArea) -> Self {
        Self { region, area, topics: Vec::new(), known: 0, counted_us: 0, awaited: 0, reported: 0, beyond: 0 }
    }

    /// Looks which topics are replicated. `awaited` has the topics with sessions that wait for durable batches, one bit
    /// each. Call it every few milliseconds.
    pub fn maintain(&mut self, awaited: u32) {
        self.awaited = awaited;
        let TopicRows { live, damaged } = TopicRows::read(&self.region, self.area);
        for (slot, damage) in damaged {
            if self.reported & 1 << slot.0 == 0 {
                self.reported |= 1 << slot.0;
                tracing::error!(%slot, %damage, "no batch of the topic is counted as durable");
            }
        }
        self.topics = live;
        self.topics.retain(|topic| topic.replication_factor > 1);
    }

    /// Counts the disks, if it is time. Returns the number of streams whose completion changed.
    pub fn poll(&mut self, now_us: u64) -> usize {
        if self.topics.is_empty() || now_us.saturating_sub(self.counted_us) < PERIOD_US {
            return 0;
        }
        self.counted_us = now_us;
        let mut advanced = 0;
        for index in 0..self.topics.len() {
            let (id, copies) = (self.topics[index].id, usize::from(self.topics[index].replication_factor) - 1);
            let incarnation = self.topics[index].incarnation;
            let of = |stream| StreamId { topic: id, stream };
            if self.topics[index].order.is_global() {
                advanced += usize::from(self.count(of(Stream::GLOBAL), incarnation, copies));
            } else {
                for broker in self.region.geometry().brokers() {
                    advanced += usize::from(self.count(of(Stream::of(broker)), incarnation, copies));
                }
            }
        }
        advanced
    }

    /// Counts the disks that have the batches of one stream. Returns true if the stream's completion changed.
    fn count(&mut self, id: StreamId, incarnation: Incarnation, copies: usize) -> bool {
        let region = &self.region;
        let StreamId { topic, stream } = id;
        let area = self.area;
        let extent = read_extent_at(region, area, id);
        if extent.incarnation != incarnation {
            return false;
        }
        let brokers = || region.geometry().brokers();
        let shown = read_completion_at(region, area, topic, stream.broker().unwrap_or(BrokerId(0)));
        let awaited = self.awaited & 1 << topic.0 != 0;
        // No count shows more than there is. A damaged line is written anew.
        let Completion { durable_through, lost_from, lost_through, .. } = shown;
        if durable_through.max(lost_through) > extent.committed {
            tracing::error!(slot = %topic, durable_through, lost_through, "a damaged completion is counted anew");
        }
        let [shown_through, lost_through] =
            [durable_through, lost_through].map(|position| if position > extent.committed { 0 } else { position });
        let lost_from = lost_from.min(lost_through);
        if shown_through >= extent.committed && shown.awaited == awaited {
            return false;
        }
        // SYNC: read after the tail, so that every broker that received a batch below it is known: its row came first.
        // The incarnation counts even where a broker died while it wrote its row.
        self.known = brokers()
            .filter(|broker| self.known & 1 << broker.0 != 0 || last_incarnation(region, *broker) > Incarnation::NONE)
            .fold(0, |mask, broker| mask | 1 << broker.0);
        let known = |broker: &BrokerId| self.known & 1 << broker.0 != 0;
        let sources = brokers().filter(known).filter(|source| stream.broker().is_none_or(|own| own == *source));
        let read = |source| {
            let of = |replica| Replication { topic, replica, source };
            brokers().filter(known).map(|replica| read_replicated(region, of(replica))).collect()
        };
        let progress: Vec<Vec<u64>> = sources.map(read).collect();
        // SYNC: read after the replicas' words, so that what a replica skipped as trimmed is seen as trimmed here too, and
        // no replica that follows this leader is beyond the tail.
        let Extent { committed, trimmed, .. } = read_extent_at(region, area, id);
        if let Some(position) = progress.iter().flatten().find(|position| **position > committed)
            && self.beyond & 1 << topic.0 == 0
        {
            self.beyond |= 1 << topic.0;
            tracing::error!(slot = %topic, position, committed, "a replica beyond the tail counts for no batch");
        }
        let through = progress
            .into_iter()
            .map(|mut positions| {
                positions.retain(|position| *position <= committed);
                copied(&mut positions, copies)
            })
            .min()
            .unwrap_or(0);
        let through = if region.fabric().keeps(Guard::DiskBeforeAck) { through } else { extent.committed };
        // What was shown as durable is on disks, whatever is trimmed now. Of two losses, all between them counts as lost.
        let (lost_from, lost_through) = match (trimmed > shown_through, lost_through) {
            (true, 0) => (shown_through, trimmed),
            (true, _) => (lost_from.min(shown_through), trimmed),
            (false, _) => (lost_from, lost_through),
        };
        let durable_through = through.min(extent.committed).max(shown_through);
        let now = Completion { durable_through, lost_from, lost_through, awaited };
        if now == shown {
            return false;
        }
        let shows = |broker: &BrokerId| match stream.broker() {
            None => *broker == BrokerId(0) || known(broker),
            Some(own) => *broker == own,
        };
        for broker in brokers().filter(shows) {
            publish_completion(region, area, topic, broker, now);
        }
        true
    }
}

/// Returns the position below which retention may trim a stream of a topic. Batches that sessions wait for stay until
/// they are durable, as long as enough replicas run to make them so.
pub(crate) fn trimmable<F: Fabric>(region: &Region<F>, topic: &TopicConfig, completion: Completion) -> u64 {
    let copies = u32::from(topic.replication_factor.max(1)) - 1;
    if copies == 0 || !completion.awaited {
        return u64::MAX;
    }
    match possible_replicas(region) {
        Ok(possible) if possible.count_ones() < copies => u64::MAX,
        // Nobody knows which replicas run.
        Ok(_) | Err(_) => completion.durable_through,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::topics::tests::{region, topic};
    use bytemuck::Zeroable;
    use embarcadero_cxl::Native;
    use embarcadero_cxl::broker_table::{BrokerInfo, publish_broker};
    use embarcadero_cxl::layout::IndexEntry;
    use embarcadero_cxl::leadership::{activate_term, claim_term};
    use embarcadero_cxl::order_index::{IndexOptions, OrderIndexWriter};
    use embarcadero_cxl::replication::publish_replicated;
    use embarcadero_cxl::segment::PartitionAllocator;
    use embarcadero_cxl::topic_table::publish_topic;
    use embarcadero_wire::{Term, TopicId};
    use std::sync::Arc;

    #[test]
    fn as_many_replicas_as_asked_for_must_have_it() {
        assert_eq!(copied(&mut [5, 9, 0, 7], 1), 9);
        assert_eq!(copied(&mut [5, 9, 0, 7], 2), 7);
        assert_eq!(copied(&mut [5, 9, 0, 7], 3), 5);
        assert_eq!(copied(&mut [5, 9], 3), 0);
    }

    /// Topic with one copy on a disk, and three batches in its order.
    struct Bed {
        region: Region<Native>,
        index: OrderIndexWriter<Native>,
        stage: CompletionStage<Native>,
    }

    const AREA: LeaderArea = LeaderArea(BrokerId(0));
    const TERM: Term = Term(1);
    const ID: StreamId = StreamId { topic: TopicId(0), stream: Stream::GLOBAL };
    const OF: Replication = Replication { topic: TopicId(0), replica: BrokerId(0), source: BrokerId(0) };

    impl Bed {
        fn new() -> Self {
            let (region, incarnation) = (region(), Incarnation(1));
            claim_term(&region, AREA, TERM);
            publish_topic(&region, AREA, &TopicConfig { replication_factor: 2, ..topic(0) });
            activate_term(&region, AREA, TERM);
            let address = "127.0.0.1:1".parse().unwrap();
            let own = BrokerInfo {
                id: BrokerId(0),
                incarnation,
                data: address,
                control: address,
                process_id: 1,
                running: true,
                lock_node: 1,
            };
            publish_broker(&region, &own);
            let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), BrokerId(0)));
            let options = IndexOptions { id: ID, incarnation, writer: AREA, term: TERM };
            let index = OrderIndexWriter::open(region.clone(), options, pool).unwrap();
            let mut stage = CompletionStage::new(region.clone(), AREA);
            stage.maintain(1);
            let mut bed = Self { region, index, stage };
            bed.append_three();
            bed
        }

        fn append_three(&mut self) {
            for _ in 0..3 {
                self.index.make_room().unwrap();
                self.index.append(IndexEntry { message_count: 1, ..IndexEntry::zeroed() });
            }
            self.index.write_back_entries();
            self.index.publish_tail(TERM);
        }

        /// Counts for the `round`th time, from 1 on. Returns what is shown then.
        fn count(&mut self, round: u64) -> Completion {
            self.stage.poll(round * PERIOD_US);
            read_completion_at(&self.region, AREA, ID.topic, BrokerId(0))
        }
    }

    #[test]
    fn what_is_beyond_the_tail_counts_for_no_batch() {
        let mut bed = Bed::new();
        let region = bed.region.clone();
        for (round, (position, durable)) in [(4, 0), (u64::MAX, 0), (2, 2), (3, 3)].into_iter().enumerate() {
            publish_replicated(&region, OF, position);
            assert_eq!(bed.count(round as u64 + 1).durable_through, durable);
        }
        // A damaged line is counted anew.
        let shown = |completion: Completion| (completion.durable_through, completion.lost_through);
        for (round, damaged) in [(u64::MAX, 0), (3, u64::MAX)].into_iter().enumerate() {
            let (durable_through, lost_through) = damaged;
            let damaged = Completion { durable_through, lost_from: 0, lost_through, awaited: false };
            publish_completion(&region, AREA, ID.topic, BrokerId(0), damaged);
            assert_eq!(shown(bed.count(round as u64 + 9)), (3, 0));
        }
    }

    #[test]
    fn what_is_on_disks_stays_durable_when_retention_takes_what_is_not() {
        let mut bed = Bed::new();
        publish_replicated(&bed.region, OF, 3);
        let lost = |completion: Completion| [0, 2, 3, 4, 5].map(|position| completion.is_lost(position));
        assert_eq!(lost(bed.count(1)), [false; 5], "all is durable");
        bed.append_three();
        bed.index.trim_below(5);
        assert_eq!(lost(bed.count(2)), [false, false, true, true, false]);
        // A second loss: nobody knows any more what lay between the two.
        publish_replicated(&bed.region, OF, 6);
        assert_eq!(lost(bed.count(3)), [false, false, true, true, false]);
        bed.append_three();
        bed.index.trim_below(8);
        assert_eq!(lost(bed.count(4)), [false, false, true, true, true]);
    }
}
