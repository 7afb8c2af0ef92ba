//! Numbers that a region is made with, and their bounds.

use super::{
    AllocatorKind, DEFAULT_LEADERS, Layout, MAX_BROKERS, MAX_SEGMENTS, MAX_SESSIONS, MAX_TOPICS, MIRROR_SEGMENT_BYTES,
    RegionRole, SEGMENT_BYTES,
};
use embarcadero_wire::{BrokerId, OutOfBounds, SessionSlot, Stream, TopicId, within};
use serde::{Deserialize, Serialize};
use std::ops::Range;

/// Numbers from which every position of a region follows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Geometry {
    /// Broker slots, 1 to 32.
    pub max_brokers: u32,
    /// Brokers that can be the leader, 1 to `max_brokers`: those with ids below this.
    pub max_leaders: u32,
    /// Topic slots, 1 to 32.
    pub max_topics: u32,
    /// Session slots, 1 to 4096.
    pub max_sessions: u32,
    /// Batchlog entries of each (topic, broker), a power of two from 16.
    pub batchlog_slots: u32,
    /// Bytes of a segment, a power of two from 1 MiB to 16 GiB.
    pub segment_bytes: u64,
    /// Segments, 1 to 16384.
    pub segment_count: u32,
    /// Allocator of the segment pool.
    pub allocator: AllocatorKind,
    /// Role of the region.
    pub role: RegionRole,
}

impl Geometry {
    /// Returns default tables with one segment of `segment_bytes` bytes. [`Geometry::fit`] finds how many segments fit.
    #[must_use]
    pub const fn with_segments_of(segment_bytes: u64, allocator: AllocatorKind) -> Self {
        Self {
            max_brokers: MAX_BROKERS,
            max_leaders: DEFAULT_LEADERS,
            max_topics: MAX_TOPICS,
            max_sessions: 1024,
            batchlog_slots: 1024,
            segment_bytes,
            segment_count: 1,
            allocator,
            role: RegionRole::Single,
        }
    }

    /// Returns the geometry of this region's mirror, of at most `bytes` bytes. It has the tables of the leaders, and
    /// segments of 1 MiB for their order indexes, as many for each leader.
    ///
    /// # Errors
    /// [`OutOfBounds`] when not even one segment per leader fits.
    pub fn of_mirror(&self, bytes: u64) -> Result<Self, OutOfBounds> {
        let mirror = Self {
            max_brokers: self.max_leaders,
            max_leaders: self.max_leaders,
            max_topics: self.max_topics,
            max_sessions: self.max_sessions,
            batchlog_slots: 16,
            segment_bytes: MIRROR_SEGMENT_BYTES,
            segment_count: 1,
            allocator: AllocatorKind::Partitioned,
            role: RegionRole::Mirror,
        }
        .fit(bytes)?;
        if mirror.segment_count < self.max_leaders {
            let least = Self { segment_count: self.max_leaders, ..mirror };
            let bound = format!("at least {}", Layout::new(&least).region_bytes);
            return Err(OutOfBounds::new("mirror size", bytes, bound));
        }
        Ok(mirror)
    }

    /// Returns these tables with as many segments as a region of `region_bytes` bytes holds beside them.
    ///
    /// # Errors
    /// [`OutOfBounds`] when a number is out of bounds or not even one segment fits.
    pub fn fit(self, region_bytes: u64) -> Result<Self, OutOfBounds> {
        let mut geometry = Self { segment_count: 1, ..self };
        geometry.validate()?;
        // Tables grow with the segment count, so start from all of the space and come down.
        let mut count = (region_bytes / self.segment_bytes).min(u64::from(MAX_SEGMENTS));
        while count > 0 {
            geometry.segment_count = count as u32;
            let needed = Layout::new(&geometry).region_bytes;
            if needed <= region_bytes {
                return Ok(geometry);
            }
            count -= (needed - region_bytes).div_ceil(self.segment_bytes).min(count);
        }
        geometry.segment_count = 1;
        Err(OutOfBounds::new(
            "region size",
            region_bytes,
            format!("at least {} to hold the tables and one segment", Layout::new(&geometry).region_bytes),
        ))
    }

    /// Checks every bound.
    ///
    /// # Errors
    /// [`OutOfBounds`] with the first number that is out of bounds.
    pub fn validate(&self) -> Result<(), OutOfBounds> {
        within("max_brokers", self.max_brokers, 1, MAX_BROKERS)?;
        within("max_leaders", self.max_leaders, 1, self.max_brokers)?;
        within("max_topics", self.max_topics, 1, MAX_TOPICS)?;
        within("max_sessions", self.max_sessions, 1, MAX_SESSIONS)?;
        within("batchlog_slots", self.batchlog_slots, 16, 1 << 20)?;
        within("segment_bytes", self.segment_bytes, *SEGMENT_BYTES.start(), *SEGMENT_BYTES.end())?;
        within("segment_count", self.segment_count, 1, MAX_SEGMENTS)?;
        for (key, value) in [("batchlog_slots", u64::from(self.batchlog_slots)), ("segment_bytes", self.segment_bytes)]
        {
            if !value.is_power_of_two() {
                return Err(OutOfBounds::new(key, value, "a power of two"));
            }
        }
        Ok(())
    }

    /// Iterates over every broker slot.
    pub fn brokers(&self) -> impl DoubleEndedIterator<Item = BrokerId> + Clone + use<> {
        (0..self.max_brokers).map(BrokerId)
    }

    /// Returns all broker slots as a mask, one bit each.
    #[must_use]
    pub fn broker_mask(&self) -> u64 {
        self.brokers().fold(0, |mask, broker| mask | 1 << broker.0)
    }

    /// Iterates over every topic slot.
    pub fn topics(&self) -> impl DoubleEndedIterator<Item = TopicId> + Clone + use<> {
        (0..self.max_topics).map(TopicId)
    }

    /// Iterates over every row of the session table.
    pub fn sessions(&self) -> impl DoubleEndedIterator<Item = SessionSlot> + Clone + use<> {
        (0..self.max_sessions).map(SessionSlot)
    }

    /// Slots of an order index's directory: a power of two that no index outgrows.
    #[must_use]
    pub(crate) const fn directory_slots(&self) -> u64 {
        (self.segment_count as u64).next_power_of_two()
    }

    /// Segments of one broker's partition of the bitmap.
    #[must_use]
    pub(crate) const fn partition_segments(&self) -> u32 {
        self.segment_count.div_ceil(self.max_brokers)
    }

    /// Segments of a broker's partition of the bitmap, by number. The last partitions may be shorter, or empty.
    #[must_use]
    pub(crate) const fn partition(&self, broker: BrokerId) -> Range<u32> {
        const fn at_most(number: u32, most: u32) -> u32 {
            if number < most { number } else { most }
        }
        let first = broker.0 * self.partition_segments();
        let end = at_most(first + self.partition_segments(), self.segment_count);
        at_most(first, self.segment_count)..end
    }

    /// Number of a stream in an [`super::OwnerLine`]: a broker's id, or one past the last broker's for the global order.
    #[must_use]
    pub(crate) const fn stream_number(&self, stream: Stream) -> u32 {
        match stream.broker() {
            None => self.max_brokers,
            Some(broker) => broker.0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_named() {
        let error = Geometry::with_segments_of(3 << 20, AllocatorKind::Bitmap).fit(1 << 30).unwrap_err();
        assert_eq!(error.to_string(), "segment_bytes is 3145728; it must be a power of two");
        let error = Geometry::with_segments_of(2048, AllocatorKind::Bitmap).fit(1 << 30).unwrap_err();
        assert_eq!(error.key, "segment_bytes");
        assert!(Geometry::with_segments_of(1 << 20, AllocatorKind::Bitmap).fit(1 << 20).is_err());
    }
}
