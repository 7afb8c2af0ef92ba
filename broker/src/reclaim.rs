//! Reclaim: a segment returns to the pool when nobody reads it and retention does not keep it.

use crate::topics::{Topic, TopicTable};
use embarcadero_cxl::layout::TopicState;
use embarcadero_cxl::leadership::{NoLeader, leader_version, with_leader};
use embarcadero_cxl::order_index::{
    OrderIndexReader, ReadError, StreamId, lowest_pin, read_directory, read_extent, read_extent_at,
};
use embarcadero_cxl::owner::{SegmentUse, publish_owner, read_owner};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::segment::{SegmentAllocator, flush_left_behind};
use embarcadero_cxl::sequencer_half::read_consumed_at;
use embarcadero_cxl::topic_table::read_topic_at;
use embarcadero_cxl::{Damage, Fabric, Guard, RegionOffset, Row, Site};
use embarcadero_wire::{BrokerId, Incarnation, Stream};
use std::collections::BTreeMap;
use std::sync::Arc;

/// Largest number of index entries that one round scans.
const SCAN_ENTRIES: u64 = 4096;

/// Finds out which segments of a broker's Blog are not needed any more, and gives them back.
///
/// It scans the order index to learn the highest position of each segment's batches. A segment returns to the pool when
/// all of this holds:
///
/// - It receives no more batches.
/// - All its batches are decided: they are committed, or never will be.
/// - Its committed batches are trimmed.
/// - No broker pins them. A broker's own stream has readers at that broker only.
pub(crate) struct Reclaimer<F: Fabric> {
    region: Region<F>,
    broker: BrokerId,
    stream: StreamId,
    reader: OrderIndexReader<F>,
    /// Number of the scan's own pin on the topic's board.
    pin: usize,
    /// Position below which the index is scanned.
    scanned: u64,
    /// Position below which entries were trimmed before they could be scanned. The segments of their batches are
    /// unknown.
    skipped: u64,
    /// Highest position in the order among the batches of each segment.
    highest: BTreeMap<u32, u64>,
    /// Position of the damaged entry at which the scan stands, once the log names it.
    stopped_at: Option<u64>,
}

impl<F: Fabric> Reclaimer<F> {
    /// Returns a reclaimer that has scanned nothing.
    pub(crate) fn new(region: Region<F>, topic: &Topic<F>, broker: BrokerId) -> Self {
        let stream = topic.stream(broker);
        let reader = OrderIndexReader::new(region.clone(), stream);
        Self {
            region,
            broker,
            stream,
            reader,
            pin: topic.pins.register(),
            scanned: 0,
            skipped: 0,
            highest: BTreeMap::new(),
            stopped_at: None,
        }
    }

    /// Runs one bounded round. Returns the number of segments given back.
    ///
    /// `head` is the position of the next batch in this broker's Batchlog (or own index). `brokers` are those whose
    /// pins count.
    pub(crate) fn poll(&mut self, topic: &Topic<F>, head: u64, brokers: impl Iterator<Item = BrokerId>) -> usize {
        let retired = topic.blog.retired();
        // The decided position is read before the index, so that the scan sees every commit below that position.
        let decided = if topic.config.order.is_global() {
            let StreamId { topic: id, .. } = self.stream;
            let half = with_leader(&self.region, |area| {
                let at = self.region.layout().sequencer_half(area, id, self.broker);
                (at, read_consumed_at(&self.region, area, id, self.broker).decided_through)
            });
            let Ok((at, decided)) = half else { return 0 };
            if decided > head {
                topic.mark_damaged(Damage { structure: "SequencerHalf", at, what: "decided_through", value: decided });
                return 0;
            }
            decided
        } else {
            head
        };
        let Ok(extent) = read_extent(&self.region, self.stream) else { return 0 };
        if extent.incarnation != topic.config.incarnation {
            return 0;
        }
        let Ok(committed) = self.reader.poll_beyond(&extent) else { return 0 };
        self.scan(topic, extent.trimmed, committed);
        let trimmed = extent.trimmed;
        let candidates: Vec<u32> = retired
            .iter()
            .filter(|retired| {
                let fabric = self.region.fabric();
                let is_decided = retired.batches_below <= decided || !fabric.keeps(Guard::DecidedBeforeReuse);
                is_decided && self.scanned >= committed
            })
            .filter(|retired| self.highest.get(&retired.segment).is_none_or(|highest| *highest < trimmed))
            .map(|retired| retired.segment)
            .collect();
        if candidates.is_empty() {
            return 0;
        }
        // SYNC: the trim point was read before the pins; see `order_index::Pin`.
        // Pins of other brokers on a topic without a global order are positions of their own streams.
        let own = self.stream.stream.broker();
        let readers = brokers.filter(|broker| own.is_none_or(|own| own == *broker));
        let mut pinned = lowest_pin(&self.region, self.stream.topic, readers);
        if !self.region.fabric().keeps(Guard::PinBeforeReuse) {
            pinned = u64::MAX;
        }
        if pinned < self.skipped {
            return 0;
        }
        let mut freed = 0;
        for segment in candidates {
            if self.highest.get(&segment).is_none_or(|highest| *highest < pinned) {
                self.highest.remove(&segment);
                topic.blog.release(segment);
                freed += 1;
            }
        }
        freed
    }

    /// Scans the entries from where the last round ended, or from the trim point if that is higher, up to `committed`.
    /// Stops at a damaged entry until retention has trimmed it: its batch may be in any segment.
    fn scan(&mut self, topic: &Topic<F>, trimmed: u64, committed: u64) {
        let from = self.scanned.max(trimmed);
        if from > self.scanned {
            self.skipped = from;
        }
        let to = committed.min(from + SCAN_ENTRIES);
        if from >= to {
            self.scanned = self.scanned.max(from.min(committed));
            return;
        }
        let kept = topic.pins.set(self.pin, from);
        self.scanned = from;
        if kept.is_ok_and(|kept| kept <= from) {
            while self.scanned < to {
                match self.segment_of_own(topic, self.scanned) {
                    Ok(Some(segment)) => drop(self.highest.insert(segment, self.scanned)),
                    Ok(None) => {}
                    Err(error @ ReadError::Corrupt { position, .. }) => {
                        if self.stopped_at.replace(position) != Some(position) {
                            let topic = &topic.config.name;
                            tracing::error!(topic, %error, "no segment is given back until retention trims the entry");
                        }
                        break;
                    }
                    Err(ReadError::NoLeader(_) | ReadError::Trimmed { .. }) => break,
                }
                self.scanned += 1;
            }
        }
        topic.pins.clear(self.pin);
    }

    /// Reads an entry, and returns the segment of its batch if this broker received the batch.
    fn segment_of_own(&mut self, topic: &Topic<F>, position: u64) -> Result<Option<u32>, ReadError> {
        let entry = self.reader.read(position)?;
        if u32::from(entry.broker) >= self.region.geometry().max_brokers {
            return Err(self.reader.corrupt(position, "broker", entry.broker.into()));
        }
        if BrokerId::from(entry.broker) != self.broker {
            return Ok(None);
        }
        let segment = topic.blog.segment_at(RegionOffset(entry.location));
        segment.map(Some).ok_or_else(|| self.reader.corrupt(position, "location", entry.location))
    }
}

/// Segment that this broker took from the pool, and that nothing in this process may know of.
struct OrphanedSegment {
    segment: u32,
    /// Owner entry as found. The segment is given back only while the entry is unchanged.
    owner: SegmentUse,
    /// Stream of the index that the segment is part of. A segment with batches counts as one of the broker's own stream.
    id: StreamId,
    incarnation: Incarnation,
    /// Place of the segment in its index, counted from 0.
    ordinal: u64,
    /// End of the order, as a position, when the leader's index was first seen to use another segment at this place.
    replaced_at: Option<u64>,
    /// True once the log says that the directory of the index is damaged.
    is_reported: bool,
}

/// Segments that this broker took from the pool in an earlier term, or in an earlier incarnation:
///
/// - those of global order indexes, which it took as the leader;
/// - those with its batches and its own order, of topics that were deleted while it was gone.
///
/// Only this broker may give them back to its allocator, or the leader if it is dead. It does so once nobody reads them
/// any more.
pub(crate) struct OrphanedSegments<F: Fabric> {
    region: Region<F>,
    broker: BrokerId,
    pool: Arc<dyn SegmentAllocator>,
    /// Version of the leadership under which the segments were looked for; `None` before the first look.
    searched_at: Option<u64>,
    found: Vec<OrphanedSegment>,
}

impl<F: Fabric> OrphanedSegments<F> {
    /// Returns a collection that has not looked for segments yet. They go back to `pool`.
    pub(crate) fn new(region: Region<F>, broker: BrokerId, pool: Arc<dyn SegmentAllocator>) -> Self {
        Self { region, broker, pool, searched_at: None, found: Vec::new() }
    }

    /// Gives back the segments that are not needed any more. `topics` has the topics that this broker serves, and
    /// `brokers` are those whose pins count.
    ///
    /// Call it on the thread that runs the delegation, and the sequencer if this broker leads: none of them must give
    /// back the same segment.
    pub(crate) fn poll(&mut self, topics: &TopicTable<F>, brokers: impl Iterator<Item = BrokerId> + Clone) {
        // SYNC: a directory that this broker changed as the leader is in memory before the terms are read. So a successor
        // whose claim is not seen here copies the change, and goes on in no segment that is given back here. Pairs with
        // `claim_term`.
        self.region.fabric().full_fence(Site::TermRead);
        let version = leader_version(&self.region);
        if self.searched_at != Some(version) {
            self.searched_at = Some(version);
            self.find();
        }
        let Self { region, broker, pool, found, .. } = self;
        let (region, broker) = (&*region, *broker);
        let is_needed = |left: &mut OrphanedSegment| match left.id.stream.broker() {
            None => Self::is_index_needed(region, broker, left, brokers.clone()),
            Some(_) => Self::is_topic_there(region, topics, left),
        };
        found.retain_mut(|left| match is_needed(left) {
            Ok(false) if read_owner(region, left.segment) == Row::Used(left.owner) => {
                flush_left_behind(region, left.segment);
                publish_owner(region, left.segment, SegmentUse::Free);
                if let Err(error) = pool.release(left.segment) {
                    tracing::error!(segment = left.segment, %error, "an orphaned segment could not be returned");
                }
                false
            }
            // An owner that changed: the sequencer or the delegation gave the segment back.
            Ok(needed) => needed,
            Err(NoLeader) => true,
        });
    }

    /// Searches all segments for those that this broker took.
    fn find(&mut self) {
        self.found.clear();
        for segment in 0..self.region.geometry().segment_count {
            let Row::Used(owner) = read_owner(&self.region, segment) else { continue };
            let (holder, topic, incarnation, stream, ordinal) = match owner {
                SegmentUse::Free => continue,
                SegmentUse::Blog { topic, incarnation, broker, ordinal } => {
                    (broker, topic, incarnation, Stream::of(broker), ordinal)
                }
                SegmentUse::Index { topic, incarnation, stream, ordinal, holder } => {
                    (holder, topic, incarnation, stream, ordinal)
                }
            };
            if holder == self.broker {
                let id = StreamId { topic, stream };
                let (replaced_at, is_reported) = (None, false);
                self.found.push(OrphanedSegment { segment, owner, id, incarnation, ordinal, replaced_at, is_reported });
            }
        }
    }

    /// Returns true while the topic of a segment is there, or this broker still serves it. It then gives the segment back
    /// itself.
    fn is_topic_there(region: &Region<F>, topics: &TopicTable<F>, left: &OrphanedSegment) -> Result<bool, NoLeader> {
        let OrphanedSegment { id: StreamId { topic, .. }, incarnation, .. } = *left;
        if topics.serves(topic, incarnation) {
            return Ok(true);
        }
        let Row::Used(config) = with_leader(region, |area| read_topic_at(region, area, topic))? else {
            return Ok(true);
        };
        let is_gone =
            config.incarnation > incarnation || (config.incarnation == incarnation && config.state == TopicState::Free);
        // What is gone is opened by nobody any more, but may have been in between.
        Ok(!is_gone || topics.serves(topic, incarnation))
    }

    /// Returns true while a segment of a global order index may be read, or the sequencer of this broker writes it.
    fn is_index_needed(
        region: &Region<F>,
        broker: BrokerId,
        left: &mut OrphanedSegment,
        brokers: impl Iterator<Item = BrokerId>,
    ) -> Result<bool, NoLeader> {
        let OrphanedSegment { segment, id, incarnation, ordinal, .. } = *left;
        let (own, config, extent, current) = with_leader(region, |area| {
            let current = read_directory(region, id, area, ordinal);
            (area.0 == broker, read_topic_at(region, area, id.topic), read_extent_at(region, area, id), current)
        })?;
        let Row::Used(config) = config else { return Ok(true) };
        if config.incarnation != incarnation || config.state == TopicState::Free {
            return Ok(config.incarnation < incarnation);
        }
        let current = match current {
            Ok(current) => current == Some(segment),
            Err(damage) => {
                if !std::mem::replace(&mut left.is_reported, true) {
                    tracing::error!(segment, %damage, "a segment of an order index is kept: it may be in use");
                }
                return Ok(true);
            }
        };
        if current && own {
            // This broker leads, and its sequencer fills the segment.
            return Ok(true);
        }
        // SYNC: the trim point was read before the pins; see `order_index::Pin`.
        let pinned = lowest_pin(region, id.topic, brokers);
        Ok(if current {
            !extent.is_past(region, ordinal) || pinned < extent.trimmed
        } else {
            // A reader that pins no position below that end has seen the other segment.
            pinned < *left.replaced_at.get_or_insert(extent.committed)
        })
    }
}
