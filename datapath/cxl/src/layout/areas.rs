//! Areas of a region, and the position of everything in them.

use super::{
    AREA_ALIGN, AllocatorKind, BatchEntry, BrokerSlot, CommitRecord, CompletionLine, ControlBlock, Geometry,
    IndexEntry, LeaderTopic, OffsetEntry, OwnerLine, SESSION_WINDOW, SESSIONS_PER_WORD, SequencerHalf, SessionRow,
    Tinode,
};
use crate::fabric::{LINE_BYTES, RegionOffset, WORD_BYTES};
use crate::replication::Replication;
use embarcadero_wire::{BrokerId, SessionSlot, TopicId};
use serde::Serialize;
use std::mem::{offset_of, size_of};

/// Segments of one line of a bitmap.
const SEGMENTS_PER_LINE: u64 = LINE_BYTES * 8;
/// Alignment of the pool, bytes: a huge page, so that a mapping of the segments can use them.
const POOL_ALIGN: u64 = 2 << 20;

const fn bytes_of<T>() -> u64 {
    size_of::<T>() as u64
}

/// Start of each area, in bytes from the start of the region, computed from a [`Geometry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// [`ControlBlock`].
    pub control: u64,
    /// Broker table: a [`BrokerSlot`] per broker.
    pub brokers: u64,
    /// Connections of sessions: a run of words per broker, see [`crate::session_connections`].
    pub connections: u64,
    /// Segment bitmap: one run of words (allocators `bitmap` and `leader`), or one run of lines per broker
    /// (`partitioned`).
    pub bitmap: u64,
    /// An [`OwnerLine`] per segment.
    pub owners: u64,
    /// A [`Tinode`] per topic.
    pub tinodes: u64,
    /// Batchlog rings: `batchlog_slots` times a [`BatchEntry`] per topic and broker, topic-major.
    pub batchlogs: u64,
    /// Directories of the brokers' own order indexes, per topic and broker, topic-major.
    pub directories: u64,
    /// Areas of the leaders, one after another.
    pub leaders: u64,
    /// Parts of one leader's area.
    pub leader: LeaderAreaLayout,
    /// Segments.
    pub segments: u64,
    /// End of the region.
    pub region_bytes: u64,
    #[serde(skip)]
    geometry: Geometry,
}

/// Start of each part of a leader's area, in bytes from the start of that area. A [`LeaderTopic`] per topic lies at 0.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LeaderAreaLayout {
    /// A [`SequencerHalf`] per topic and broker, topic-major.
    pub halves: u64,
    /// Completion vector: a [`CompletionLine`] per topic and broker, topic-major.
    pub completion: u64,
    /// Session table: a [`SessionRow`] per session.
    pub sessions: u64,
    /// Directories of the global order indexes, one per topic.
    pub directories: u64,
    /// Bytes of the area.
    pub bytes: u64,
}

/// Number of a leader's area: the id of the broker that writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaderArea(pub BrokerId);

/// Place of a Batchlog: a ring of [`BatchEntry`]s.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchlogRing {
    /// Position of the first slot.
    at: RegionOffset,
    /// Number of slots.
    pub(crate) slots: u64,
}

impl BatchlogRing {
    /// Position of the slot of entry `index`.
    #[inline]
    pub(crate) const fn slot(&self, index: u64) -> RegionOffset {
        self.at.add(index % self.slots * bytes_of::<BatchEntry>())
    }
}

impl Layout {
    /// Lays the areas out one after another.
    #[must_use]
    pub const fn new(geometry: &Geometry) -> Self {
        const fn up(value: u64) -> u64 {
            value.next_multiple_of(AREA_ALIGN)
        }
        let topics = geometry.max_topics as u64;
        let brokers = geometry.max_brokers as u64;
        let segments = geometry.segment_count as u64;
        let pairs = topics * brokers;
        let control = AREA_ALIGN;
        let broker_table = up(control + bytes_of::<ControlBlock>());
        let connections = up(broker_table + brokers * bytes_of::<BrokerSlot>());
        let bitmap = up(connections + brokers * Self::connections_bytes(geometry));
        let shared = segments.div_ceil(SEGMENTS_PER_LINE) * LINE_BYTES;
        let partitions = brokers * Self::partition_bytes(geometry);
        let owners = up(bitmap + if partitions > shared { partitions } else { shared });
        let tinodes = up(owners + segments * bytes_of::<OwnerLine>());
        let batchlogs = up(tinodes + topics * bytes_of::<Tinode>());
        let own_directories = up(batchlogs + pairs * geometry.batchlog_slots as u64 * bytes_of::<BatchEntry>());
        let leaders = up(own_directories + pairs * Self::directory_bytes(geometry));
        let halves = topics * bytes_of::<LeaderTopic>();
        let completion = halves + pairs * bytes_of::<SequencerHalf>();
        let sessions = completion + pairs * bytes_of::<CompletionLine>();
        let directories = sessions + geometry.max_sessions as u64 * bytes_of::<SessionRow>();
        let bytes = up(directories + topics * Self::directory_bytes(geometry));
        let pool_align = if geometry.segment_bytes < POOL_ALIGN { geometry.segment_bytes } else { POOL_ALIGN };
        let pool = (leaders + geometry.max_leaders as u64 * bytes).next_multiple_of(pool_align);
        Self {
            control,
            brokers: broker_table,
            connections,
            bitmap,
            owners,
            tinodes,
            batchlogs,
            directories: own_directories,
            leaders,
            leader: LeaderAreaLayout { halves, completion, sessions, directories, bytes },
            segments: pool,
            region_bytes: pool + segments * geometry.segment_bytes,
            geometry: *geometry,
        }
    }

    /// Bytes of one broker's connections of sessions: whole pairs of lines, which CPUs prefetch together.
    #[must_use]
    pub(crate) const fn connections_bytes(geometry: &Geometry) -> u64 {
        (geometry.max_sessions.div_ceil(SESSIONS_PER_WORD) as u64 * WORD_BYTES).next_multiple_of(2 * LINE_BYTES)
    }

    /// Bytes of one broker's partition of the bitmap: whole lines, so that no two brokers share one.
    #[must_use]
    pub(crate) const fn partition_bytes(geometry: &Geometry) -> u64 {
        (geometry.partition_segments() as u64).div_ceil(SEGMENTS_PER_LINE) * LINE_BYTES
    }

    /// Bytes of one order index's directory: whole lines of words.
    #[must_use]
    pub(crate) const fn directory_bytes(geometry: &Geometry) -> u64 {
        (geometry.directory_slots() * WORD_BYTES).next_multiple_of(LINE_BYTES)
    }

    /// Position of the [`super::ElectionLine`].
    #[must_use]
    pub(crate) const fn election(&self) -> RegionOffset {
        RegionOffset(self.control + offset_of!(ControlBlock, election) as u64)
    }

    /// Position of a leader area's [`super::TermLine`]. The lines of all areas lie one after another.
    #[must_use]
    pub const fn terms(&self, area: LeaderArea) -> RegionOffset {
        RegionOffset(self.control + offset_of!(ControlBlock, terms) as u64 + area.0.0 as u64 * LINE_BYTES)
    }

    /// Position of a leader's [`super::ControlLine`].
    #[must_use]
    pub const fn control_line(&self, area: LeaderArea) -> RegionOffset {
        RegionOffset(self.control + offset_of!(ControlBlock, statements) as u64 + area.0.0 as u64 * LINE_BYTES)
    }

    /// Position of a broker's [`super::BrokerLine`].
    #[must_use]
    pub const fn broker(&self, broker: BrokerId) -> RegionOffset {
        RegionOffset(self.brokers + broker.0 as u64 * bytes_of::<BrokerSlot>())
    }

    /// Position of a broker's [`super::PulseLine`].
    #[must_use]
    pub(crate) const fn pulse(&self, broker: BrokerId) -> RegionOffset {
        self.broker(broker).add(offset_of!(BrokerSlot, pulse) as u64)
    }

    /// Position of a word of a broker's connections of sessions.
    #[must_use]
    pub(crate) const fn connections_word(&self, broker: BrokerId, word: u32) -> RegionOffset {
        let own = self.connections + broker.0 as u64 * Self::connections_bytes(&self.geometry);
        RegionOffset(own + word as u64 * WORD_BYTES)
    }

    /// Position of the [`super::BrokerHalf`] of a broker in a topic.
    #[must_use]
    pub const fn broker_half(&self, topic: TopicId, broker: BrokerId) -> RegionOffset {
        self.offset_entry(topic, broker).add(offset_of!(OffsetEntry, half) as u64)
    }

    /// Position of the [`super::PinLine`] of a broker in a topic.
    #[must_use]
    pub const fn pin(&self, topic: TopicId, broker: BrokerId) -> RegionOffset {
        self.offset_entry(topic, broker).add(offset_of!(OffsetEntry, pin) as u64)
    }

    /// Position of the [`super::TailLine`] of a broker's own order.
    #[must_use]
    pub(crate) const fn broker_tail(&self, topic: TopicId, broker: BrokerId) -> RegionOffset {
        self.offset_entry(topic, broker).add(offset_of!(OffsetEntry, tail) as u64)
    }

    /// Position of the word in which a replica says how far it has the batches of a source.
    #[must_use]
    pub(crate) const fn replicated(&self, of: Replication) -> RegionOffset {
        let words = self.offset_entry(of.topic, of.replica).add(offset_of!(OffsetEntry, replicated) as u64);
        words.add(of.source.0 as u64 * WORD_BYTES)
    }

    /// Batchlog of a broker in a topic.
    #[must_use]
    pub(crate) const fn batchlog(&self, topic: TopicId, broker: BrokerId) -> BatchlogRing {
        let slots = self.geometry.batchlog_slots as u64;
        let at = RegionOffset(self.batchlogs + self.pair(topic, broker) * slots * bytes_of::<BatchEntry>());
        BatchlogRing { at, slots }
    }

    /// Position of the directory word of segment `ordinal` of a broker's own order index.
    #[must_use]
    pub(crate) const fn broker_directory(&self, topic: TopicId, broker: BrokerId, ordinal: u64) -> RegionOffset {
        let directory = self.directories + self.pair(topic, broker) * Self::directory_bytes(&self.geometry);
        RegionOffset(directory).add(self.directory_slot(ordinal))
    }

    /// Position of a leader's area.
    #[must_use]
    pub const fn leader_area(&self, area: LeaderArea) -> RegionOffset {
        RegionOffset(self.leaders + area.0.0 as u64 * self.leader.bytes)
    }

    /// Position of a topic's [`super::TopicLine`] in a leader's area.
    #[must_use]
    pub const fn topic(&self, area: LeaderArea, topic: TopicId) -> RegionOffset {
        self.leader_topic(area, topic).add(offset_of!(LeaderTopic, topic) as u64)
    }

    /// Position of a topic's [`super::NameLine`] in a leader's area.
    #[must_use]
    pub const fn topic_name(&self, area: LeaderArea, topic: TopicId) -> RegionOffset {
        self.leader_topic(area, topic).add(offset_of!(LeaderTopic, name) as u64)
    }

    /// Position of the [`super::TailLine`] of a topic's global order in a leader's area.
    #[must_use]
    pub(crate) const fn global_tail(&self, area: LeaderArea, topic: TopicId) -> RegionOffset {
        self.leader_topic(area, topic).add(offset_of!(LeaderTopic, tail) as u64)
    }

    /// Position of the directory word of segment `ordinal` of a topic's global order index in a leader's area.
    #[must_use]
    pub(crate) const fn global_directory(&self, area: LeaderArea, topic: TopicId, ordinal: u64) -> RegionOffset {
        let directory = self.leader.directories + topic.0 as u64 * Self::directory_bytes(&self.geometry);
        self.leader_area(area).add(directory).add(self.directory_slot(ordinal))
    }

    /// Position of a leader's [`SequencerHalf`] of a broker in a topic.
    #[must_use]
    pub const fn sequencer_half(&self, area: LeaderArea, topic: TopicId, broker: BrokerId) -> RegionOffset {
        self.leader_area(area).add(self.leader.halves + self.pair(topic, broker) * LINE_BYTES)
    }

    /// Position of a leader's [`CompletionLine`] by which `broker` acknowledges.
    #[must_use]
    pub(crate) const fn completion(&self, area: LeaderArea, topic: TopicId, broker: BrokerId) -> RegionOffset {
        self.leader_area(area).add(self.leader.completion + self.pair(topic, broker) * LINE_BYTES)
    }

    /// Position of a session's [`super::SessionLine`] in a leader's area.
    #[must_use]
    pub const fn session(&self, area: LeaderArea, slot: SessionSlot) -> RegionOffset {
        self.session_row(area, slot).add(offset_of!(SessionRow, session) as u64)
    }

    /// Position of a session's [`super::SessionProgressLine`] in a leader's area.
    #[must_use]
    pub(crate) const fn session_progress(&self, area: LeaderArea, slot: SessionSlot) -> RegionOffset {
        self.session_row(area, slot).add(offset_of!(SessionRow, progress) as u64)
    }

    /// Position of the [`CommitRecord`] of a session's batch in a leader's area.
    #[inline]
    #[must_use]
    pub(crate) const fn commit_record(&self, area: LeaderArea, slot: SessionSlot, sequence: u64) -> RegionOffset {
        let records = self.session_row(area, slot).add(offset_of!(SessionRow, records) as u64);
        records.add(sequence % SESSION_WINDOW * bytes_of::<CommitRecord>())
    }

    /// Position of a word of the shared bitmap (allocators `bitmap` and `leader`).
    #[must_use]
    pub(crate) const fn bitmap_word(&self, word: u32) -> RegionOffset {
        RegionOffset(self.bitmap + word as u64 * WORD_BYTES)
    }

    /// Position of a word of a broker's partition of the bitmap (allocator `partitioned`).
    #[must_use]
    pub(crate) const fn partition_word(&self, broker: BrokerId, word: u32) -> RegionOffset {
        let partition = self.bitmap + broker.0 as u64 * Self::partition_bytes(&self.geometry);
        RegionOffset(partition + word as u64 * WORD_BYTES)
    }

    /// Position of a segment's [`OwnerLine`].
    #[must_use]
    pub const fn owner(&self, segment: u32) -> RegionOffset {
        RegionOffset(self.owners + segment as u64 * bytes_of::<OwnerLine>())
    }

    /// Position of a segment.
    #[inline]
    #[must_use]
    pub const fn segment(&self, segment: u32) -> RegionOffset {
        RegionOffset(self.segments + segment as u64 * self.geometry.segment_bytes)
    }

    /// Entries of an order index per segment.
    #[inline]
    #[must_use]
    pub(crate) const fn entries_per_segment(&self) -> u64 {
        self.geometry.segment_bytes / bytes_of::<IndexEntry>()
    }

    /// Position of the [`IndexEntry`] at `position` of an order index, which lies in `segment`.
    #[inline]
    #[must_use]
    pub(crate) const fn index_entry(&self, segment: u32, position: u64) -> RegionOffset {
        // A power of two: the geometry's bounds say so.
        let entry = position & (self.entries_per_segment() - 1);
        self.segment(segment).add(entry * bytes_of::<IndexEntry>())
    }

    /// Position of the reserved line of a broker's [`OffsetEntry`] in a topic.
    #[must_use]
    pub(crate) const fn offset_entry_reserved(&self, topic: TopicId, broker: BrokerId) -> RegionOffset {
        self.offset_entry(topic, broker).add(offset_of!(OffsetEntry, reserved) as u64)
    }

    /// Position of the reserved line of a [`LeaderTopic`] in a leader's area.
    #[must_use]
    pub(crate) const fn leader_topic_reserved(&self, area: LeaderArea, topic: TopicId) -> RegionOffset {
        self.leader_topic(area, topic).add(offset_of!(LeaderTopic, reserved) as u64)
    }

    /// Position and bytes of everything outside the segments that one broker alone writes. Owner entries are not among it:
    /// they go with their segment.
    #[must_use]
    pub(crate) fn written_by(&self, broker: BrokerId) -> Vec<(RegionOffset, u64)> {
        let geometry = &self.geometry;
        let mut own = vec![(self.broker(broker), bytes_of::<BrokerSlot>())];
        own.push((self.connections_word(broker, 0), Self::connections_bytes(geometry)));
        if geometry.allocator == AllocatorKind::Partitioned {
            own.push((self.partition_word(broker, 0), Self::partition_bytes(geometry)));
        }
        for topic in geometry.topics() {
            let ring = self.batchlog(topic, broker);
            own.push((self.offset_entry(topic, broker), bytes_of::<OffsetEntry>()));
            own.push((ring.slot(0), ring.slots * bytes_of::<BatchEntry>()));
            own.push((self.broker_directory(topic, broker, 0), Self::directory_bytes(geometry)));
        }
        if broker.0 < geometry.max_leaders {
            let area = LeaderArea(broker);
            own.extend([(self.terms(area), LINE_BYTES), (self.control_line(area), LINE_BYTES)]);
            own.push((self.leader_area(area), self.leader.bytes));
        }
        own
    }

    /// Distance of the word of segment `ordinal` from the start of its directory.
    const fn directory_slot(&self, ordinal: u64) -> u64 {
        ordinal % self.geometry.directory_slots() * WORD_BYTES
    }

    const fn offset_entry(&self, topic: TopicId, broker: BrokerId) -> RegionOffset {
        let tinode = self.tinodes + topic.0 as u64 * bytes_of::<Tinode>();
        RegionOffset(tinode + broker.0 as u64 * bytes_of::<OffsetEntry>())
    }

    const fn leader_topic(&self, area: LeaderArea, topic: TopicId) -> RegionOffset {
        self.leader_area(area).add(topic.0 as u64 * bytes_of::<LeaderTopic>())
    }

    const fn session_row(&self, area: LeaderArea, slot: SessionSlot) -> RegionOffset {
        self.leader_area(area).add(self.leader.sessions + slot.0 as u64 * bytes_of::<SessionRow>())
    }

    /// Index of a topic and broker in a topic-major table.
    const fn pair(&self, topic: TopicId, broker: BrokerId) -> u64 {
        topic.0 as u64 * self.geometry.max_brokers as u64 + broker.0 as u64
    }
}

#[cfg(test)]
mod tests {
    use super::super::Superblock;
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_commit_word_is_that_of_one_position_and_stream() {
        use super::super::{commit_key, commit_word};
        let region = uuid::Uuid::from_u128(7);
        let key = commit_key(region, TopicId(0), 1);
        assert_ne!(key, commit_key(region, TopicId(1), 0));
        assert_ne!(key, commit_key(uuid::Uuid::from_u128(7 << 64), TopicId(0), 1));
        let word = |position| commit_word(key, position);
        assert_ne!(word(5), word(5 + (1 << 32)));
        // Memory that was never written shows no entry.
        assert_ne!(commit_word(0, 0), 0);
    }

    proptest! {
        #[test]
        fn areas_follow_each_other_and_fit(
            region_mib in 64u64..8192, segment_shift in 20u32..28, kind in 1u32..=3,
        ) {
            let region = region_mib << 20;
            let kind = AllocatorKind::from_code(kind).unwrap();
            if let Ok(geometry) = Geometry::with_segments_of(1 << segment_shift, kind).fit(region) {
                let layout = Layout::new(&geometry);
                prop_assert!(layout.region_bytes <= region);
                let areas = [
                    bytes_of::<Superblock>(), layout.control, layout.brokers, layout.connections, layout.bitmap, layout.owners,
                    layout.tinodes, layout.batchlogs, layout.directories, layout.leaders, layout.segments,
                ];
                prop_assert!(areas.windows(2).all(|pair| pair[0] < pair[1]));
                prop_assert!(geometry.directory_slots() >= u64::from(geometry.segment_count));
            }
        }
    }
}
