//! Order index: one 64-byte entry per batch, in the order that subscribers read.
//!
//! A topic with a global order has one, the global order index (GOI), written by the sequencer. With orders `none` and
//! `broker` each broker writes its own. Entries live in segments of the pool; a directory finds them.

// [[DEVIATION_007]] The paper gives every message a 64-byte header that the sequencer touches.

mod pin;
mod reader;
mod trim;
mod writer;
mod written;

pub use pin::{Pin, lowest_pin};
pub use reader::{OrderIndexReader, ReadError};
pub use trim::Retention;
pub use writer::{IndexOptions, OrderIndexWriter};

use crate::fabric::{Fabric, RegionOffset};
use crate::layout::{LeaderArea, TailLine, commit_key, directory_entry};
use crate::leadership::{NoLeader, with_leader};
use crate::region::Region;
use crate::row::Damage;
use crate::site::Site;
use embarcadero_wire::{Incarnation, Stream, TopicId};
use serde::Serialize;
use std::mem::offset_of;
use std::ops::Range;

/// Stream of a topic, which has an order index of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StreamId {
    /// Topic slot.
    pub topic: TopicId,
    /// Stream of the topic.
    pub stream: Stream,
}

impl StreamId {
    /// Position of the stream's tail: in the leader area `area`, for a global order.
    fn tail<F: Fabric>(self, region: &Region<F>, area: LeaderArea) -> RegionOffset {
        match self.stream.broker() {
            None => region.layout().global_tail(area, self.topic),
            Some(broker) => region.layout().broker_tail(self.topic, broker),
        }
    }

    /// Position of the directory word of segment `ordinal` of the index.
    fn directory_word<F: Fabric>(self, region: &Region<F>, area: LeaderArea, ordinal: u64) -> RegionOffset {
        match self.stream.broker() {
            None => region.layout().global_directory(area, self.topic, ordinal),
            Some(broker) => region.layout().broker_directory(self.topic, broker, ordinal),
        }
    }

    /// Number that tells the stream's entries from all others.
    fn commit_key<F: Fabric>(self, region: &Region<F>) -> u64 {
        commit_key(region.uuid(), self.topic, region.geometry().stream_number(self.stream))
    }

    /// Reads from the stream: through the leader for a global order, directly for a broker's own.
    #[inline]
    fn observe<F: Fabric, R>(self, region: &Region<F>, mut read: impl FnMut(LeaderArea) -> R) -> Result<R, NoLeader> {
        match self.stream.broker() {
            None => with_leader(region, read),
            Some(broker) => Ok(read(LeaderArea(broker))),
        }
    }
}

const COMMITTED: u64 = offset_of!(TailLine, committed) as u64;
const NEXT_OFFSET: u64 = offset_of!(TailLine, next_offset) as u64;
const BASE: u64 = offset_of!(TailLine, base) as u64;
const TRIMMED: u64 = offset_of!(TailLine, trimmed) as u64;
const TRIMMED_OFFSET: u64 = offset_of!(TailLine, trimmed_offset) as u64;
const TERM: u64 = offset_of!(TailLine, term) as u64;
const BYTES: u64 = offset_of!(TailLine, bytes) as u64;
const INCARNATION: u64 = offset_of!(TailLine, incarnation) as u64;

/// Incarnation in the extent of a tail whose incarnation is damaged. No topic has it.
const DAMAGED: Incarnation = Incarnation(u32::MAX);

/// Extent of a stream, as its tail shows it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Extent {
    /// Incarnation of the topic to which the rest belongs.
    pub incarnation: Incarnation,
    /// First position of the incarnation.
    pub base: u64,
    /// First position that is kept.
    pub trimmed: u64,
    /// One past the last position.
    pub committed: u64,
    /// Offset of the first message that is kept.
    pub earliest_offset: u64,
    /// Offset after the last message.
    pub next_offset: u64,
    /// Bytes of all batches that were ever indexed.
    pub bytes: u64,
    /// Position of the tail in the region.
    #[serde(skip)]
    at: RegionOffset,
}

impl Extent {
    /// Returns the extent if it is that of a topic's incarnation; `None` if the stream of the incarnation is not there.
    ///
    /// # Errors
    /// [`Damage`] of the tail's incarnation.
    pub fn of(self, incarnation: Incarnation) -> Result<Option<Self>, Damage> {
        if self.incarnation == DAMAGED {
            return Err(Damage { structure: "TailLine", at: self.at, what: "incarnation", value: u64::MAX });
        }
        Ok((self.incarnation == incarnation).then_some(self))
    }

    /// Returns the number of batches that are kept.
    ///
    /// # Errors
    /// [`Damage`] when the tail contradicts itself. While its writer begins a new incarnation, it may do so too.
    pub fn batches<F: Fabric>(&self, region: &Region<F>) -> Result<u64, Damage> {
        self.of(self.incarnation)?;
        kept(region, self.at, self.base, self.trimmed..self.committed)
    }

    /// Returns true when everything in segment `ordinal` of the index is trimmed.
    pub fn is_past<F: Fabric>(&self, region: &Region<F>, ordinal: u64) -> bool {
        self.trimmed >= (ordinal + 1) * region.layout().entries_per_segment()
    }
}

/// Returns the number of positions that the tail at `at` keeps.
///
/// # Errors
/// [`Damage`] when they begin below `base`, end before they begin, or are more than the whole pool has room for.
fn kept<F: Fabric>(region: &Region<F>, at: RegionOffset, base: u64, positions: Range<u64>) -> Result<u64, Damage> {
    let room = u64::from(region.geometry().segment_count) * region.layout().entries_per_segment();
    let damage = |what, value| Damage { structure: "TailLine", at, what, value };
    if positions.start < base {
        return Err(damage("trimmed", positions.start));
    }
    let kept = positions.end.checked_sub(positions.start).filter(|kept| *kept <= room);
    // The positions that follow must be numbers too.
    kept.filter(|_| positions.end < u64::MAX / 2).ok_or_else(|| damage("committed", positions.end))
}

/// Reads the extent of a stream.
///
/// # Errors
/// [`NoLeader`], for a global order.
pub fn read_extent<F: Fabric>(region: &Region<F>, id: StreamId) -> Result<Extent, NoLeader> {
    id.observe(region, |area| read_extent_at(region, area, id))
}

/// Reads the extent of a stream from one leader's area.
pub fn read_extent_at<F: Fabric>(region: &Region<F>, area: LeaderArea, id: StreamId) -> Extent {
    let at = id.tail(region, area);
    let tail: TailLine = region.fabric().observe_words(at, Site::TailRead);
    region.fabric().ensure_in_memory(at, Site::TailFlush);
    Extent {
        incarnation: Incarnation::from_word(tail.incarnation).unwrap_or(DAMAGED),
        base: tail.base,
        trimmed: tail.trimmed,
        committed: tail.committed,
        earliest_offset: tail.trimmed_offset,
        next_offset: tail.next_offset,
        bytes: tail.bytes,
        at,
    }
}

/// Reads the number of the pool's segment that is segment `ordinal` of an index, from one leader's area. `None` when
/// the index has no such segment, or not any more.
///
/// # Errors
/// [`Damage`] when the region has no such segment, and when the word belongs elsewhere in the directory.
pub fn read_directory<F: Fabric>(
    region: &Region<F>,
    id: StreamId,
    area: LeaderArea,
    ordinal: u64,
) -> Result<Option<u32>, Damage> {
    let at = id.directory_word(region, area, ordinal);
    let value = region.fabric().observe(at, Site::DirectoryRead);
    region.fabric().ensure_in_memory(at, Site::DirectoryFlush);
    let damage = Damage { structure: "directory", at, what: "a segment", value };
    match directory_entry(value) {
        None if value == 0 => Ok(None),
        Some((found, segment))
            if segment < region.geometry().segment_count
                && found.abs_diff(ordinal).is_multiple_of(region.geometry().directory_slots()) =>
        {
            Ok((found == ordinal).then_some(segment))
        }
        _ => Err(damage),
    }
}

/// Reads the number of the pool's segment that has a position of an index which is kept, from one leader's area. `None`
/// when it was trimmed meanwhile.
///
/// # Errors
/// [`Damage`] as for [`read_directory`], and when a kept position has no segment.
fn read_kept_directory<F: Fabric>(
    region: &Region<F>,
    id: StreamId,
    area: LeaderArea,
    position: u64,
) -> Result<Option<u32>, Damage> {
    let ordinal = position / region.layout().entries_per_segment();
    let found = read_directory(region, id, area, ordinal);
    // SYNC: the trim point is in memory before the word of a trimmed segment is used again; it is read after the word.
    if found == Ok(None) && position >= read_extent_at(region, area, id).trimmed {
        let at = id.directory_word(region, area, ordinal);
        let value = region.fabric().observe(at, Site::DirectoryRead);
        return Err(Damage { structure: "directory", at, what: "the segment of a kept entry", value });
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Native;
    use crate::layout::{AllocatorKind, IndexEntry, directory_word};
    use crate::segment::PartitionAllocator;
    use crate::segment::tests::region;
    use bytemuck::Zeroable;
    use embarcadero_wire::{BrokerId, Term};
    use std::sync::Arc;

    fn open(region: &Region<Native>, id: StreamId) -> Result<OrderIndexWriter<Native>, Damage> {
        let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), BrokerId(0)));
        let writer = LeaderArea(BrokerId(0));
        let options = IndexOptions { id, incarnation: Incarnation(1), writer, term: Term::NONE };
        OrderIndexWriter::open(region.clone(), options, pool)
    }

    #[test]
    fn an_entry_that_points_outside_the_region_is_corrupt() {
        let region = region(2, AllocatorKind::Partitioned);
        let (location, end) = (region.layout().segments, region.layout().region_bytes);
        let id = StreamId { topic: TopicId(0), stream: Stream::of(BrokerId(0)) };
        let mut index = open(&region, id).unwrap();
        let whole = IndexEntry { location, bytes: 64, message_count: 1, broker: 3, ..IndexEntry::zeroed() };
        let below = location - 1;
        for entry in [
            whole,
            IndexEntry { broker: 4, ..whole },
            IndexEntry { location: below, ..whole },
            IndexEntry { location: end - 63, ..whole },
        ] {
            index.make_room().unwrap();
            index.append(entry);
        }
        index.write_back_entries();
        index.publish_tail(Term::NONE);
        index.fence();
        let mut reader = OrderIndexReader::new(region, id);
        assert_eq!(reader.poll(), 4);
        assert!(reader.read(0).is_ok());
        for (position, what) in [(1, "broker"), (2, "location"), (3, "location")] {
            let read = reader.read(position);
            assert!(matches!(read, Err(ReadError::Corrupt { damage, .. }) if damage.what == what), "{read:?}");
        }
    }

    /// A line that another stream, or another region in the same memory, left at the place of an entry.
    #[test]
    fn an_entry_of_another_stream_or_region_is_corrupt() {
        let (region, other) = (region(8, AllocatorKind::Partitioned), region(8, AllocatorKind::Partitioned));
        let ids = [0, 1].map(|broker| StreamId { topic: TopicId(0), stream: Stream::of(BrokerId(broker)) });
        let write = |region: &Region<Native>, id: StreamId| {
            let writer = LeaderArea(id.stream.broker().unwrap());
            let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), writer.0));
            let options = IndexOptions { id, incarnation: Incarnation(1), writer, term: Term::NONE };
            let mut index = OrderIndexWriter::open(region.clone(), options, pool).unwrap();
            index.make_room().unwrap();
            let location = region.layout().segments;
            index.append(IndexEntry { location, bytes: 64, message_count: 1, ..IndexEntry::zeroed() });
            index.write_back_entries();
            index.publish_tail(Term::NONE);
            index.entry_at(0).unwrap()
        };
        let (at, beside, elsewhere) = (write(&region, ids[0]), write(&region, ids[1]), write(&other, ids[0]));
        let mut reader = OrderIndexReader::new(region.clone(), ids[0]);
        reader.poll();
        assert!(reader.read(0).is_ok());
        for foreign in [region.fabric().load_words(beside), other.fabric().load_words(elsewhere)] {
            region.fabric().store_words(at, &foreign);
            let read = reader.read(0);
            assert!(matches!(read, Err(ReadError::Corrupt { damage, .. }) if damage.what == "commit"), "{read:?}");
        }
    }

    #[test]
    fn a_damaged_entry_is_trimmed_with_a_later_one_and_named() {
        let region = region(2, AllocatorKind::Partitioned);
        let location = region.layout().segments;
        let id = StreamId { topic: TopicId(0), stream: Stream::of(BrokerId(0)) };
        let mut index = open(&region, id).unwrap();
        for (reserved, ordered_us) in [(1, 10), (0, 20), (1, 30)] {
            index.make_room().unwrap();
            index.append(IndexEntry {
                location,
                bytes: 64,
                message_count: 1,
                reserved,
                ordered_us,
                ..IndexEntry::zeroed()
            });
        }
        index.write_back_entries();
        index.publish_tail(Term::NONE);
        let mut trim = |since_us| {
            let damage = index.enforce_retention(Retention { bytes: 0, since_us, below: 0, limit: u64::MAX });
            (index.trimmed(), damage.map(|damage| damage.what))
        };
        assert_eq!(trim(0), (0, None), "everything is kept");
        assert_eq!(trim(21), (2, Some("a reserved byte")));
        assert_eq!(trim(u64::MAX), (2, None), "nobody knows how old the last one is");
    }

    #[test]
    fn a_directory_without_the_segment_of_a_kept_entry_is_damage() {
        let region = region(5, AllocatorKind::Partitioned);
        let (id, area) = (StreamId { topic: TopicId(0), stream: Stream::of(BrokerId(0)) }, LeaderArea(BrokerId(0)));
        let location = region.layout().segments;
        let mut index = open(&region, id).unwrap();
        index.make_room().unwrap();
        index.append(IndexEntry { location, bytes: 64, message_count: 1, ..IndexEntry::zeroed() });
        index.write_back_entries();
        index.publish_tail(Term::NONE);
        let at = id.directory_word(&region, area, 0);
        let whole = region.fabric().load(at);
        let slots = region.geometry().directory_slots();
        let read = || {
            let mut reader = OrderIndexReader::new(region.clone(), id);
            reader.poll();
            reader.read(0)
        };
        assert!(read().is_ok());
        // Never written, of the place beside it, of a later round, and of a segment that the region does not have.
        for value in [0, directory_word(1, 0), directory_word(slots, 0), directory_word(0, 5)] {
            region.fabric().store(at, value);
            let found = read();
            let named = |damage: &Damage| (damage.structure, damage.value) == ("directory", value);
            assert!(matches!(&found, Err(ReadError::Corrupt { damage, .. }) if named(damage)), "{value:#x}: {found:?}");
            assert!(open(&region, id).is_err_and(|damage| named(&damage)));
        }
        // The place of a segment whose entries are trimmed may be used again.
        region.fabric().store(at, whole);
        index.enforce_retention(Retention { bytes: 0, since_us: u64::MAX, below: 0, limit: u64::MAX });
        region.fabric().store(at, directory_word(slots, 0));
        assert_eq!(read(), Err(ReadError::Trimmed { position: 0 }));
    }

    #[test]
    fn a_tail_that_contradicts_itself_is_damage() {
        let region = region(2, AllocatorKind::Partitioned);
        let (id, area) = (StreamId { topic: TopicId(0), stream: Stream::of(BrokerId(0)) }, LeaderArea(BrokerId(0)));
        let at = id.tail(&region, area);
        let whole = TailLine { committed: 30, base: 10, trimmed: 20, incarnation: 1, ..TailLine::zeroed() };
        region.fabric().store_line(at, &whole);
        let extent = read_extent_at(&region, area, id);
        assert_eq!(extent.batches(&region), Ok(10));
        assert_eq!([1, 2].map(|incarnation| extent.of(Incarnation(incarnation))), [Ok(Some(extent)), Ok(None)]);
        for (what, line) in [
            ("committed", TailLine { committed: 1 << 50, ..whole }),
            ("committed", TailLine { committed: 15, ..whole }),
            ("trimmed", TailLine { base: 25, ..whole }),
            ("incarnation", TailLine { incarnation: 1 << 32, ..whole }),
        ] {
            region.fabric().store_line(at, &line);
            let batches = read_extent_at(&region, area, id).batches(&region);
            assert_eq!(batches.map_err(|damage| damage.what), Err(what));
            assert_eq!(open(&region, id).err().map(|damage| damage.what), Some(what));
        }
    }
}
