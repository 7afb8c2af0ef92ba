//! The topics that this broker serves, opened when first asked for.

use crate::blog::{Blog, BlogId};
use crate::pins::PinBoard;
use crate::session_board::SessionBoard;
use embarcadero_cxl::batchlog::BatchlogWriter;
use embarcadero_cxl::layout::TopicState;
use embarcadero_cxl::leadership::NoLeader;
use embarcadero_cxl::order_index::{StreamId, read_extent};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::segment::SegmentAllocator;
use embarcadero_cxl::topic_table::{TopicConfig, read_topic};
use embarcadero_cxl::{Damage, Fabric, Row};
use embarcadero_transport::TransportError;
use embarcadero_wire::{BrokerId, ErrorCode, Incarnation, Stream, TopicId};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

/// Topic as this broker serves it. Connections share it; it is dropped with the last of them.
pub struct Topic<F: Fabric> {
    /// Configuration of the topic, as read from its TInode.
    pub config: TopicConfig,
    /// Log that this broker receives batches into.
    pub blog: Blog<F>,
    /// Pins of the readers within this broker.
    pub pins: PinBoard<F>,
    deleted: AtomicBool,
    damage: OnceLock<Damage>,
}

impl<F: Fabric> Topic<F> {
    /// Checks that the topic can be used.
    ///
    /// # Errors
    /// A refusal when the topic is deleted, or its memory is damaged.
    pub(crate) fn check(&self) -> Result<(), TransportError> {
        if self.is_deleted() {
            return Err(self.deletion());
        }
        let name = &self.config.name;
        match self.damage.get() {
            Some(damage) => Err(TransportError::refused(ErrorCode::Corrupt, format!("topic {name}: {damage}"))),
            None => Ok(()),
        }
    }

    /// Returns the refusal of those who use a deleted topic.
    fn deletion(&self) -> TransportError {
        TransportError::refused(ErrorCode::TopicDeleted, format!("topic {} is deleted", self.config.name))
    }

    /// Marks the topic as unusable at this broker, because its memory is damaged.
    pub(crate) fn mark_damaged(&self, damage: Damage) {
        if self.damage.set(damage).is_ok() {
            tracing::error!(topic = self.config.name, %damage, "the topic cannot be used at this broker");
        }
    }

    /// Returns true once the topic's memory was found damaged.
    pub(crate) fn is_damaged(&self) -> bool {
        self.damage.get().is_some()
    }

    /// Returns true once the topic is being deleted. Nothing may be received or delivered any more.
    #[inline]
    pub(crate) fn is_deleted(&self) -> bool {
        // SYNC: pairs with `TopicTable::mark_deleted`.
        self.deleted.load(Ordering::Acquire)
    }

    /// Returns the stream that subscribers of `broker` read: the global one, or the broker's own.
    pub(crate) fn stream(&self, broker: BrokerId) -> StreamId {
        let stream = if self.config.order.is_global() { Stream::GLOBAL } else { Stream::of(broker) };
        StreamId { topic: self.config.id, stream }
    }
}

/// Reason why a topic cannot be opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum TopicError {
    /// No broker leads, so nobody can say what the topic is.
    #[error(transparent)]
    NoLeader(#[from] NoLeader),
    /// The topic's row is damaged: nobody knows which topic is in the slot.
    #[error("topic slot {slot} cannot be read: {damage}")]
    Damaged {
        /// Topic slot.
        slot: TopicId,
        /// Damage of the row.
        #[source]
        damage: Damage,
    },
}

impl From<TopicError> for TransportError {
    fn from(error: TopicError) -> Self {
        let code = match error {
            TopicError::NoLeader(_) => ErrorCode::Unavailable,
            TopicError::Damaged { .. } => ErrorCode::Corrupt,
        };
        Self::refused(code, error.to_string())
    }
}

/// Topics that a broker has open, by topic slot.
pub struct TopicTable<F: Fabric> {
    region: Region<F>,
    broker: BrokerId,
    pool: Arc<dyn SegmentAllocator>,
    open: Mutex<Vec<Option<Arc<Topic<F>>>>>,
    sessions: Arc<SessionBoard>,
}

impl<F: Fabric> TopicTable<F> {
    /// Returns a table in which no topic is open. Topics that open later take their segments from `pool`.
    pub fn new(region: Region<F>, broker: BrokerId, pool: Arc<dyn SegmentAllocator>) -> Self {
        let slots = region.geometry().max_topics as usize;
        let sessions = Arc::new(SessionBoard::new(region.geometry().max_sessions));
        Self { region, broker, pool, open: Mutex::new(vec![None; slots]), sessions }
    }

    fn slots(&self) -> MutexGuard<'_, Vec<Option<Arc<Topic<F>>>>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Region that the topics lie in.
    pub(crate) fn region(&self) -> &Region<F> {
        &self.region
    }

    /// Id of this broker.
    pub(crate) fn broker(&self) -> BrokerId {
        self.broker
    }

    /// Allocator that gives this broker its segments.
    pub fn pool(&self) -> &Arc<dyn SegmentAllocator> {
        &self.pool
    }

    /// Connections that this broker has of each session.
    pub fn sessions(&self) -> &Arc<SessionBoard> {
        &self.sessions
    }

    /// Returns the topic in slot `id` if it is live and of this incarnation. Opens it first if need be.
    ///
    /// # Errors
    /// [`TopicError`] when the topic is not open yet and nobody can say what it is.
    pub fn get(&self, id: TopicId, incarnation: Incarnation) -> Result<Option<Arc<Topic<F>>>, TopicError> {
        let mut open = self.slots();
        // A client may ask for any number.
        let Some(slot) = open.get_mut(id.index()) else { return Ok(None) };
        if let Some(topic) = slot {
            let same = topic.config.incarnation == incarnation && !topic.is_deleted();
            return Ok(same.then(|| Arc::clone(topic)));
        }
        let config = match read_topic(&self.region, id)? {
            Row::Used(config) if config.state == TopicState::Live && config.incarnation == incarnation => config,
            Row::Damaged(damage) => return Err(TopicError::Damaged { slot: id, damage }),
            Row::Used(_) | Row::Unused | Row::Unsettled => return Ok(None),
        };
        let batches = if config.order.is_global() {
            BatchlogWriter::new(self.region.clone(), id, self.broker).head()
        } else {
            read_extent(&self.region, StreamId { topic: id, stream: Stream::of(self.broker) })?.committed
        };
        let log = BlogId { topic: id, incarnation, broker: self.broker };
        let blog = Blog::new(self.region.clone(), log, batches, Arc::clone(&self.pool));
        let pins = PinBoard::new(&self.region, id, config.order, self.broker);
        let topic = Arc::new(Topic { config, blog, pins, deleted: AtomicBool::new(false), damage: OnceLock::new() });
        *slot = Some(Arc::clone(&topic));
        Ok(Some(topic))
    }

    /// Checks in the region that a topic which is open here is still live. The leader shows there that a topic is deleted
    /// before it ends the topic's sessions.
    ///
    /// # Errors
    /// A refusal when the topic is deleted.
    pub(crate) fn check_live(&self, topic: &Topic<F>) -> Result<(), TransportError> {
        let TopicConfig { id, incarnation, .. } = topic.config;
        match read_topic(&self.region, id) {
            Ok(Row::Used(row)) if row.state != TopicState::Live || row.incarnation != incarnation => {
                Err(topic.deletion())
            }
            _ => Ok(()),
        }
    }

    /// Returns the topics that are open.
    pub(crate) fn opened(&self) -> Vec<Arc<Topic<F>>> {
        self.slots().iter().flatten().cloned().collect()
    }

    /// Returns true while a topic in slot `id` is open, live or deleted.
    pub(crate) fn is_open(&self, id: TopicId) -> bool {
        self.slots()[id.index()].is_some()
    }

    /// Returns true while this incarnation of the topic in slot `id` is open, live or deleted.
    pub(crate) fn serves(&self, id: TopicId, incarnation: Incarnation) -> bool {
        self.slots()[id.index()].as_ref().is_some_and(|topic| topic.config.incarnation == incarnation)
    }

    /// Marks a topic as deleted, for all who share it.
    pub(crate) fn mark_deleted(&self, topic: &Topic<F>) {
        // SYNC: pairs with `Topic::is_deleted`.
        topic.deleted.store(true, Ordering::Release);
    }

    /// Removes a deleted topic from the table, so that its slot can serve the next incarnation.
    pub(crate) fn forget(&self, id: TopicId) {
        self.slots()[id.index()] = None;
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use embarcadero_cxl::cache::FlushMethod;
    use embarcadero_cxl::layout::{AllocatorKind, Geometry, Layout, LeaderArea, RegionRole, TopicLine};
    use embarcadero_cxl::leadership::{activate_term, claim_term};
    use embarcadero_cxl::segment::PartitionAllocator;
    use embarcadero_cxl::topic_table::{TopicRows, publish_topic};
    use embarcadero_cxl::{Mapping, Native, RegionOffset};
    use embarcadero_wire::{Order, Term};
    use std::mem::offset_of;
    use uuid::Uuid;

    const LEADER: LeaderArea = LeaderArea(BrokerId(0));

    /// Region for two brokers and two topics.
    pub(crate) fn region() -> Region<Native> {
        region_with(AllocatorKind::Partitioned)
    }

    /// Region for two brokers, which can both lead, and two topics, with two segments of an allocator.
    pub(crate) fn region_with(allocator: AllocatorKind) -> Region<Native> {
        let geometry = Geometry {
            max_brokers: 2,
            max_leaders: 2,
            max_topics: 2,
            max_sessions: 1,
            batchlog_slots: 16,
            segment_bytes: 1 << 20,
            segment_count: 2,
            allocator,
            role: RegionRole::Single,
        };
        let bytes = Layout::new(&geometry).region_bytes;
        let native = Native::new(Mapping::anonymous(bytes).unwrap(), FlushMethod::None).unwrap();
        Region::format(native, &geometry, Uuid::new_v4(), 0).unwrap()
    }

    /// Live topic of strong order.
    pub(crate) fn topic(id: u32) -> TopicConfig {
        TopicConfig {
            id: TopicId(id),
            incarnation: Incarnation(1),
            state: TopicState::Live,
            name: format!("topic-{id}"),
            order: Order::Strong,
            ack_level: 1,
            replication_factor: 1,
            retention_bytes: 0,
            retention_ms: 0,
            created_ms: 0,
        }
    }

    #[test]
    fn a_damaged_row_is_refused_as_corrupt_and_others_are_served() {
        let region = region();
        claim_term(&region, LEADER, Term(1));
        for id in 0..2 {
            publish_topic(&region, LEADER, &topic(id));
        }
        activate_term(&region, LEADER, Term(1));
        // No name is that long.
        let at = region.layout().topic(LEADER, TopicId(0)).add(offset_of!(TopicLine, name_bytes) as u64);
        region.fabric().store(at, u32::MAX.into());
        let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), BrokerId(0)));
        let topics = TopicTable::new(region.clone(), BrokerId(0), pool);
        let Err(error) = topics.get(TopicId(0), Incarnation(1)) else { panic!("a damaged row was read") };
        assert!(matches!(error, TopicError::Damaged { slot: TopicId(0), .. }), "{error}");
        let refusal = TransportError::from(error);
        assert!(matches!(refusal, TransportError::Refused { code: ErrorCode::Corrupt, .. }), "{refusal}");
        assert!(topics.get(TopicId(1), Incarnation(1)).is_ok_and(|topic| topic.is_some()));
        let TopicRows { live, damaged } = TopicRows::read(&region, LEADER);
        assert_eq!((live.len(), damaged.len()), (1, 1));
    }

    #[test]
    fn a_topic_is_found_deleted_before_this_broker_has_marked_it() {
        let region = region();
        claim_term(&region, LEADER, Term(1));
        publish_topic(&region, LEADER, &topic(0));
        activate_term(&region, LEADER, Term(1));
        let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), BrokerId(0)));
        let topics = TopicTable::new(region.clone(), BrokerId(0), pool);
        let open = topics.get(TopicId(0), Incarnation(1)).unwrap().unwrap();
        assert!(topics.check_live(&open).is_ok());
        let deleting = TopicConfig { state: TopicState::Deleting, ..topic(0) };
        let another = TopicConfig { incarnation: Incarnation(2), ..topic(0) };
        for row in [deleting, another] {
            publish_topic(&region, LEADER, &row);
            let refusal = topics.check_live(&open).unwrap_err();
            assert!(matches!(refusal, TransportError::Refused { code: ErrorCode::TopicDeleted, .. }), "{refusal}");
            assert!(!open.is_deleted());
        }
    }

    #[test]
    fn a_position_outside_the_pool_is_in_no_segment() {
        let region = region();
        let id = BlogId { topic: TopicId(0), incarnation: Incarnation(1), broker: BrokerId(0) };
        let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), BrokerId(0)));
        let blog = Blog::new(region.clone(), id, 0, pool);
        let first = region.layout().segment(0);
        assert_eq!(blog.segment_at(first.add((1 << 20) - 1)), Some(0));
        assert_eq!(blog.segment_at(first.add(1 << 20)), Some(1));
        assert_eq!(blog.segment_at(first.add(2 << 20)), None);
        assert_eq!(blog.segment_at(RegionOffset(first.0 - 1)), None);
        assert_eq!(blog.segment_at(RegionOffset(u64::MAX)), None);
    }
}
