//! When a segment may return to the pool: nobody reads it, and retention does not want it.

use crate::topics::Topic;
use embarcadero_cxl::layout::TopicState;
use embarcadero_cxl::leadership::{NoLeader, leader_version, with_leader};
use embarcadero_cxl::order_index::{
    OrderIndexReader, Pin, StreamId, lowest_pin, read_directory, read_extent, read_extent_at,
};
use embarcadero_cxl::owner::{SegmentUse, publish_owner, read_owner};
use embarcadero_cxl::region::Region;
use embarcadero_cxl::segment::SegmentAllocator;
use embarcadero_cxl::sequencer_half::read_consumed;
use embarcadero_cxl::topic_table::read_topic_at;
use embarcadero_cxl::{Fabric, Guard, RegionOffset, Row};
use embarcadero_wire::{BrokerId, Incarnation, Order, Stream, TopicId};
use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

/// The pins of one broker on a topic: one a reader within the broker, of which the lowest shows in the region.
pub struct PinBoard<F: Fabric> {
    inner: Mutex<(Vec<Option<u64>>, Pin<F>)>,
}

impl<F: Fabric> PinBoard<F> {
    /// A board on which nothing is pinned.
    pub fn new(region: &Region<F>, topic: TopicId, order: Order, broker: BrokerId) -> Self {
        let stream = if order.is_global() { Stream::GLOBAL } else { Stream::of(broker) };
        Self { inner: Mutex::new((Vec::new(), Pin::new(region.clone(), StreamId { topic, stream }, broker))) }
    }

    /// Adds a reader, which pins nothing yet; its number serves [`PinBoard::set`] until [`PinBoard::unregister`].
    pub fn register(&self) -> usize {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        let pins = &mut inner.0;
        let free = pins.iter().position(Option::is_none).unwrap_or(pins.len());
        if free == pins.len() {
            pins.push(None);
        }
        if let Some(pin) = pins.get_mut(free) {
            *pin = Some(u64::MAX);
        }
        free
    }

    /// Removes a reader and its pin.
    pub fn unregister(&self, reader: usize) {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pin) = inner.0.get_mut(reader) {
            *pin = None;
        }
        // Whether or not there is a leader.
        let _ = Self::show(&mut inner);
    }

    /// Lets go of what a reader pinned.
    pub fn clear(&self, reader: usize) {
        // Whether or not there is a leader.
        let _ = self.set(reader, u64::MAX);
    }

    /// Pins everything from `position` on for a reader (`u64::MAX`: nothing), and returns the trim point: what is at
    /// or above both stays.
    ///
    /// # Errors
    /// [`NoLeader`]: nobody can say what is trimmed.
    #[inline]
    pub fn set(&self, reader: usize, position: u64) -> Result<u64, NoLeader> {
        let mut inner = self.inner.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(pin) = inner.0.get_mut(reader) {
            *pin = Some(position);
        }
        Self::show(&mut inner)
    }

    fn show((pins, pin): &mut (Vec<Option<u64>>, Pin<F>)) -> Result<u64, NoLeader> {
        pin.set(pins.iter().flatten().copied().min().unwrap_or(u64::MAX))
    }
}

/// Index entries that one round looks at.
const SCAN_ENTRIES: u64 = 4096;

/// Finds out which of this broker's segments of a topic are not needed any more.
///
/// It reads the order index to learn how high each segment's batches are in the order; a segment returns to the pool
/// when it receives no more, all its batches are decided, all that committed are trimmed, and no broker pins them.
pub struct Reclaimer<F: Fabric> {
    region: Region<F>,
    broker: BrokerId,
    stream: StreamId,
    reader: OrderIndexReader<F>,
    pin: usize,
    scanned: u64,
    /// Positions below this were trimmed before they could be scanned; what of them lies where is not known.
    skipped: u64,
    /// Highest position in the order of a batch in each segment.
    highest: BTreeMap<u32, u64>,
}

impl<F: Fabric> Reclaimer<F> {
    /// A reclaimer that has scanned nothing.
    pub fn new(region: Region<F>, topic: &Topic<F>, broker: BrokerId) -> Self {
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
        }
    }

    /// One bounded round. `head` is where this broker's Batchlog (or own index) stands, `brokers` those whose pins
    /// count. Returns the number of segments that came free.
    pub fn poll(&mut self, topic: &Topic<F>, head: u64, brokers: impl Iterator<Item = BrokerId>) -> usize {
        let retired = topic.blog.retired();
        // What is decided is read before the index, so that every commit it covers is in the index we scan.
        let decided = if topic.config.order.is_global() {
            let Ok(half) = read_consumed(&self.region, self.stream.topic, self.broker) else { return 0 };
            half.decided_through
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
        let mut pinned = lowest_pin(&self.region, self.stream.topic, brokers);
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
                let Ok(entry) = self.reader.read(self.scanned) else { break };
                if BrokerId::from(entry.broker) == self.broker {
                    let segment = topic.blog.segment_of(RegionOffset(entry.location));
                    self.highest.insert(segment, self.scanned);
                }
                self.scanned += 1;
            }
        }
        topic.pins.clear(self.pin);
    }
}

/// A segment of a global order index that this broker took as the leader.
struct Leftover {
    segment: u32,
    owner: SegmentUse,
    id: StreamId,
    incarnation: Incarnation,
    ordinal: u64,
    /// Where the order stood when the leader was seen to have another segment in its place.
    replaced_at: Option<u64>,
}

/// Index segments that this broker took as the leader before another took over, or in an earlier life. Only this broker may
/// give them back, so it does, once nobody reads them any more.
pub struct OrphanedSegments<F: Fabric> {
    region: Region<F>,
    broker: BrokerId,
    pool: Arc<dyn SegmentAllocator>,
    /// The leader under which they were looked for.
    mark: Option<u64>,
    found: Vec<Leftover>,
}

impl<F: Fabric> OrphanedSegments<F> {
    /// None found yet.
    pub fn new(region: Region<F>, broker: BrokerId, pool: Arc<dyn SegmentAllocator>) -> Self {
        Self { region, broker, pool, mark: None, found: Vec::new() }
    }

    /// Gives back what is not needed any more; the pins of `brokers` count. Only where the sequencer runs, if it does.
    pub fn poll(&mut self, brokers: impl Iterator<Item = BrokerId> + Clone) {
        let mark = leader_version(&self.region);
        if self.mark != Some(mark) {
            self.mark = Some(mark);
            self.find();
        }
        let Self { region, broker, pool, found, .. } = self;
        found.retain_mut(|left| match Self::is_needed(region, *broker, left, brokers.clone()) {
            Ok(false) if read_owner(region, left.segment) == Row::Used(left.owner) => {
                publish_owner(region, left.segment, SegmentUse::Free);
                let _ = pool.release(left.segment);
                false
            }
            // The sequencer gave it back.
            Ok(needed) => needed,
            Err(NoLeader) => true,
        });
    }

    fn find(&mut self) {
        self.found.clear();
        for segment in 0..self.region.geometry().segment_count {
            if let Row::Used(owner) = read_owner(&self.region, segment)
                && let SegmentUse::Index { topic, incarnation, stream, ordinal, holder } = owner
                && (stream, holder) == (Stream::GLOBAL, self.broker)
            {
                let id = StreamId { topic, stream };
                self.found.push(Leftover { segment, owner, id, incarnation, ordinal, replaced_at: None });
            }
        }
    }

    fn is_needed(
        region: &Region<F>,
        broker: BrokerId,
        left: &mut Leftover,
        brokers: impl Iterator<Item = BrokerId>,
    ) -> Result<bool, NoLeader> {
        let Leftover { segment, id, incarnation, ordinal, .. } = *left;
        let (own, config, extent, current) = with_leader(region, |area| {
            let current = read_directory(region, id, area, ordinal) == Ok(Some(segment));
            (area.0 == broker, read_topic_at(region, area, id.topic), read_extent_at(region, area, id), current)
        })?;
        let Row::Used(config) = config else { return Ok(true) };
        if config.incarnation != incarnation || config.state == TopicState::Free {
            return Ok(config.incarnation < incarnation);
        }
        if current && own {
            // The sequencer's.
            return Ok(true);
        }
        // SYNC: the trim point was read before the pins; see `order_index::Pin`.
        let pinned = lowest_pin(region, id.topic, brokers);
        Ok(if current {
            !extent.is_past(region, ordinal) || pinned < extent.trimmed
        } else {
            // Who reads on at or above what was there then has seen the other segment.
            pinned < *left.replaced_at.get_or_insert(extent.committed)
        })
    }
}
