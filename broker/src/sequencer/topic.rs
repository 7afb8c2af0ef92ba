//! Order of one topic: its index, the copy in the mirror, and the progress in each broker's Batchlog.

use super::session::Arrival;
use crate::delegation::report_starved;
use crate::mirror::Mirror;
use crate::order_time::{Ages, next_time_us};
use embarcadero_cxl::batchlog::BatchlogReader;
use embarcadero_cxl::layout::{IndexEntry, LeaderArea};
use embarcadero_cxl::order_index::{IndexOptions, OrderIndexWriter, StreamId};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::segment::SegmentAllocator;
use embarcadero_cxl::sequencer_half::ConsumedWriter;
use embarcadero_cxl::topic_table::TopicConfig;
use embarcadero_cxl::{Damage, Fabric};
use embarcadero_wire::{BrokerId, Stream, Term};
use std::collections::VecDeque;
use std::sync::Arc;

/// Progress in one broker's Batchlog of a topic.
pub(super) struct BrokerOrder<F: Fabric> {
    pub(super) reader: BatchlogReader<F>,
    pub(super) consumed: ConsumedWriter<F>,
    /// True when batches were taken since the progress was shown.
    pub(super) dirty: bool,
    /// Damage of the Batchlog. What lies behind it is not ordered.
    pub(super) damage: Option<Damage>,
}

/// Order of one topic.
pub(super) struct TopicOrder<F: Fabric> {
    pub(super) config: TopicConfig,
    pub(super) index: OrderIndexWriter<F>,
    /// Copy of the index in the mirror, if the region has one.
    pub(super) mirror: Option<OrderIndexWriter<F>>,
    /// Progress in each broker's Batchlog, by broker id.
    pub(super) brokers: Vec<BrokerOrder<F>>,
    /// Batches that earlier leaders took and had not decided, and for which there was no room yet. They come before any
    /// other.
    pub(super) undecided: VecDeque<Arrival>,
    /// Time of the newest entry, microseconds since 1970. It never goes back.
    pub(super) last_ordered_us: u64,
    /// Ages of the entries.
    pub(super) ages: Ages,
    /// True while the order has no room.
    starved: bool,
}

impl<F: Fabric> TopicOrder<F> {
    /// Continues the order of a topic, or begins it.
    pub(super) fn open(
        region: &Region<F>,
        (area, term): (LeaderArea, Term),
        config: TopicConfig,
        pool: Arc<dyn SegmentAllocator>,
    ) -> Result<Self, Damage> {
        let options = IndexOptions {
            id: StreamId { topic: config.id, stream: Stream::GLOBAL },
            incarnation: config.incarnation,
            writer: area,
            term,
        };
        let index = OrderIndexWriter::open(region.clone(), options, pool)?;
        if let Some(damage) = index.damage() {
            tracing::error!(topic = config.name, %damage, "a batch in the order cannot be read");
        }
        let broker = |broker: BrokerId| {
            let consumed = ConsumedWriter::recover(region.clone(), area, config.id, broker);
            let from = consumed.consumed.consumed_through;
            let reader = BatchlogReader::new(region.clone(), config.id, broker, from);
            BrokerOrder { reader, consumed, dirty: false, damage: None }
        };
        let brokers = region.geometry().brokers().map(broker).collect();
        let last_ordered_us = index.newest_us()?;
        let ages = Ages::new(last_ordered_us);
        let undecided = VecDeque::new();
        Ok(Self { config, index, mirror: None, brokers, undecided, last_ordered_us, ages, starved: false })
    }

    /// Sets the time of the entries that follow, by a wall clock at `wall_us`. Returns the time of those before.
    #[inline]
    pub(super) fn set_time(&mut self, wall_us: u64) -> u64 {
        let next_us = next_time_us(self.last_ordered_us, wall_us);
        std::mem::replace(&mut self.last_ordered_us, next_us)
    }

    /// Takes back what [`TopicOrder::set_time`] did if no entry followed. The next entry was at position `next`, and the
    /// time was `newest_us`.
    #[inline]
    pub(super) fn reset_time_if_unused(&mut self, next: u64, newest_us: u64) {
        if self.index.next() == next {
            self.last_ordered_us = newest_us;
        }
    }

    /// Opens the copy of a new topic in the mirror.
    pub(super) fn open_mirror(&mut self, mirror: &Mirror<F>) -> Result<(), Damage> {
        self.mirror = Some(mirror.open(&self.config)?);
        Ok(())
    }

    /// Begins a leader's term. If the open segment `is_shared`, an earlier leader may go on and write into it, and this one
    /// leaves it. While there is no other segment, batches wait, and everything else goes on.
    pub(super) fn begin_term(&mut self, term: Term, is_shared: bool) {
        if is_shared
            && self.index.seal_last()
            && let Err(error) = self.index.make_room()
        {
            tracing::warn!(topic = self.config.name, %error, "the order goes on once there is another segment");
            return;
        }
        // A successor learns from the term that nobody else writes into the segment.
        self.index.publish_tail(term);
        self.index.fence();
    }

    /// Makes sure that one more entry fits, in both regions. Returns false, and logs why, when a pool gives no segment.
    #[inline]
    pub(super) fn make_room(&mut self) -> bool {
        let has_room = self.index.has_room() && self.mirror.as_ref().is_none_or(OrderIndexWriter::has_room);
        has_room || self.extend()
    }

    #[cold]
    fn extend(&mut self) -> bool {
        let mirror = self.mirror.as_mut().map_or(Ok(()), OrderIndexWriter::make_room);
        let made = mirror.and_then(|()| self.index.make_room());
        report_starved(&self.config.name, &made, &mut self.starved);
        made.is_ok()
    }

    /// Appends an entry, in both regions, and returns the offset of its first message.
    #[inline]
    pub(super) fn append(&mut self, entry: IndexEntry) -> u64 {
        if let Some(mirror) = &mut self.mirror {
            mirror.append(entry);
        }
        self.index.append(entry)
    }

    /// Publishes what was appended. Both regions have it before an acknowledgement can follow.
    pub(super) fn publish(&mut self, term: Term) {
        for index in [Some(&mut self.index), self.mirror.as_mut()].into_iter().flatten() {
            index.write_back_entries();
            index.publish_tail(term);
            // SYNC: the tail is in memory before any commit record; pairs with `read_commit` in the ack stage.
            index.fence();
        }
    }

    /// Shows brokers which Batchlog slots they may reuse. `decided` tells that no batch is held back. A fence must
    /// follow.
    pub(super) fn show_consumed(&mut self, decided: bool) {
        for state in self.brokers.iter_mut().filter(|state| state.dirty) {
            state.dirty = false;
            let next = state.reader.next();
            state.consumed.consumed.consumed_through = next;
            if decided {
                state.consumed.consumed.decided_through = next;
            }
            state.consumed.store();
        }
    }
}
