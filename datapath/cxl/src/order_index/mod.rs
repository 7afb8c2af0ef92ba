//! Order index: one 64-byte entry per batch, in the order that subscribers read.
//!
//! A topic with a global order has one, the global order index (GOI), written by the sequencer. With orders `none` and
//! `broker` each broker writes its own. Entries live in segments of the pool; a directory finds them.

// [[DEVIATION_007]] The paper gives every message a 64-byte header that the sequencer touches.

mod pin;
mod reader;
mod trim;
mod writer;

pub use pin::{Pin, lowest_pin};
pub use reader::{OrderIndexReader, ReadError};
pub use trim::Retention;
pub use writer::{IndexOptions, OrderIndexWriter};

use crate::fabric::{Fabric, RegionOffset};
use crate::layout::{LeaderArea, TailLine, directory_segment};
use crate::leadership::{NoLeader, with_leader};
use crate::region::Region;
use crate::row::Damage;
use crate::site::Site;
use embarcadero_wire::{Incarnation, Stream, TopicId};
use serde::Serialize;
use std::mem::offset_of;

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
        let directory = match self.stream.broker() {
            None => region.layout().global_directory(area, self.topic),
            Some(broker) => region.layout().broker_directory(self.topic, broker),
        };
        directory.add(ordinal % region.geometry().directory_slots() * size_of::<u64>() as u64)
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
}

impl Extent {
    /// Returns true when everything in segment `ordinal` of the index is trimmed.
    pub fn is_past<F: Fabric>(&self, region: &Region<F>, ordinal: u64) -> bool {
        self.trimmed >= (ordinal + 1) * region.layout().entries_per_segment()
    }
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
    let tail: TailLine = region.fabric().observe_words(id.tail(region, area), Site::TailRead);
    Extent {
        incarnation: Incarnation::from_word(tail.incarnation).unwrap_or(DAMAGED),
        base: tail.base,
        trimmed: tail.trimmed,
        committed: tail.committed,
        earliest_offset: tail.trimmed_offset,
        next_offset: tail.next_offset,
        bytes: tail.bytes,
    }
}

/// Reads the number of the pool's segment that is segment `ordinal` of an index, from one leader's area. `None` when
/// the index has no such segment, or not any more.
///
/// # Errors
/// [`Damage`] when the region has no such segment.
pub fn read_directory<F: Fabric>(
    region: &Region<F>,
    id: StreamId,
    area: LeaderArea,
    ordinal: u64,
) -> Result<Option<u32>, Damage> {
    let at = id.directory_word(region, area, ordinal);
    let value = region.fabric().observe(at, Site::DirectoryRead);
    match directory_segment(value, ordinal) {
        Some(segment) if segment >= region.geometry().segment_count => {
            Err(Damage { structure: "directory", at, what: "a segment", value })
        }
        segment => Ok(segment),
    }
}

/// Returns true when the leader of an area was filling a segment of a global order. A successor needs another segment
/// then, for [`OrderIndexWriter::replace_last`], unless that leader is gone.
pub fn is_open<F: Fabric>(region: &Region<F>, id: StreamId, area: LeaderArea) -> bool {
    let extent = read_extent_at(region, area, id);
    extent.committed > extent.base && !extent.committed.is_multiple_of(region.layout().entries_per_segment())
}
