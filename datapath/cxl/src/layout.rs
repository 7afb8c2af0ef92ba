//! What lies where in the region. Every size and offset is asserted at compile time; `docs/memory-layout.md` draws it.
//!
//! All integers are little-endian (the only byte order of the platforms that have CXL), reserved bytes are zero.

use crate::fabric::{Line, RegionOffset};
use crate::replication::Replication;
use bytemuck::{Pod, Zeroable};
use embarcadero_wire::{BrokerId, ClientId, Epoch, Incarnation, OutOfBounds, SessionSlot, Term, TopicId, within};
use serde::{Deserialize, Serialize};
use std::mem::{offset_of, size_of};

/// First eight bytes of a region.
pub const MAGIC: u64 = u64::from_le_bytes(*b"EMBARCDR");
/// Version of this layout. Changes whenever a structure below does, independent of the crate's version.
pub const LAYOUT_VERSION: u32 = 3;
/// Most brokers a region can hold.
pub const MAX_BROKERS: u32 = 32;
/// Brokers that can be the leader, where nothing else is asked for: those with the lowest ids.
pub const DEFAULT_LEADERS: u32 = 4;
/// Most topics a region can hold.
pub const MAX_TOPICS: u32 = 32;
/// Most sessions a region can hold.
pub const MAX_SESSIONS: u32 = 4096;
/// Most segments a region can hold.
pub const MAX_SEGMENTS: u32 = 16384;
/// Batches of one session that may be in flight; also the commit records that a session keeps.
pub const SESSION_WINDOW: u64 = 128;
/// Smallest and largest segment.
pub const SEGMENT_BYTES: std::ops::RangeInclusive<u64> = 1 << 20..=16 << 30;
/// Bytes of a topic name.
pub const TOPIC_NAME_BYTES: usize = 64;
/// Areas start at multiples of this.
pub const AREA_ALIGN: u64 = 4096;

macro_rules! lines {
    ($($(#[$meta:meta])* pub struct $name:ident { $($(#[$fmeta:meta])* pub $field:ident: $ty:ty = $offset:expr),* $(,)? })*) => {
        $(
            $(#[$meta])*
            #[allow(missing_docs)] // the names of the fields say it; the lines say who writes them
            #[repr(C, align(64))]
            #[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
            pub struct $name { $($(#[$fmeta])* pub $field: $ty),* }
            impl Line for $name {}
            const _: () = {
                assert!(size_of::<$name>() == 64);
                $(assert!(offset_of!($name, $field) == $offset);)*
            };
        )*
        /// A digest of every field's name and offset, so that two builds which disagree refuse each other.
        pub const LAYOUT_HASH: u64 = {
            let mut hash = 0xcbf2_9ce4_8422_2325_u64;
            $(
                hash = fnv(hash, stringify!($name).as_bytes(), 64);
                $(hash = fnv(hash, stringify!($field).as_bytes(), offset_of!($name, $field));)*
            )*
            hash = fnv(hash, b"tinode", TINODE_BYTES as usize);
            hash = fnv(hash, b"leader topic", LEADER_TOPIC_BYTES as usize);
            hash = fnv(hash, b"session", SESSION_BYTES as usize);
            hash
        };
    };
}

/// FNV-1a (Fowler, Noll, Vo), over a name and a number.
const fn fnv(mut hash: u64, name: &[u8], number: usize) -> u64 {
    let mut index = 0;
    while index < name.len() {
        hash = (hash ^ name[index] as u64).wrapping_mul(0x0100_0000_01b3);
        index += 1;
    }
    (hash ^ number as u64).wrapping_mul(0x0100_0000_01b3)
}

lines! {
    /// First line of the superblock. Written last, so a region whose creation was cut short has no magic.
    pub struct SuperblockHead {
        pub magic: u64 = 0,
        pub layout_version: u32 = 8,
        pub superblock_bytes: u32 = 12,
        pub layout_hash: u64 = 16,
        pub region_bytes: u64 = 24,
        pub uuid: [u8; 16] = 32,
        pub created_ms: u64 = 48,
        pub reserved: u64 = 56,
    }

    /// Second line of the superblock: the geometry, and a CRC32C over both lines up to itself.
    pub struct SuperblockGeometry {
        pub max_brokers: u32 = 0,
        pub max_topics: u32 = 4,
        pub max_sessions: u32 = 8,
        pub batchlog_slots: u32 = 12,
        pub segment_bytes: u64 = 16,
        pub segment_count: u32 = 24,
        pub allocator: u32 = 28,
        pub max_leaders: u32 = 32,
        pub role: u32 = 36,
        pub reserved: [u64; 2] = 40,
        pub reserved_high: u32 = 56,
        pub checksum: u32 = 60,
    }

    /// The highest term that anyone campaigned for, where hosts share one coherence domain: compare-and-swap by all.
    pub struct ElectionLine {
        pub term: Term = 0,
        pub reserved: [u64; 7] = 8,
    }

    /// A broker that can be the leader: words, written by that broker. The broker with the highest `claimed` is the leader, or
    /// will be; it is once its `active` is the same.
    pub struct TermLine {
        /// Term under which it last began to take over.
        pub claimed: Term = 0,
        /// Term under which it last led: everything up to then is in its area.
        pub active: Term = 8,
        pub reserved: [u64; 6] = 16,
    }

    /// What a leader says of the brokers. Written by that leader. Versioned.
    pub struct ControlLine {
        pub term: Term = 0,
        pub incarnation: Incarnation = 8,
        pub reserved_low: u32 = 12,
        /// Brokers that live.
        pub broker_mask: u64 = 16,
        /// Brokers whose pins count: those, and others that may still go on.
        pub pinning_mask: u64 = 24,
        pub reserved: [u64; 3] = 32,
        pub version: u64 = 56,
    }

    /// Where a broker is. Written by that broker. Versioned.
    pub struct BrokerLine {
        pub data_address: [u8; 16] = 0,
        pub control_address: [u8; 16] = 16,
        pub data_port: u16 = 32,
        pub control_port: u16 = 34,
        pub incarnation: Incarnation = 36,
        pub process_id: u32 = 40,
        pub state: u32 = 44,
        pub reserved: u64 = 48,
        pub version: u64 = 56,
    }

    /// Counters of a broker, each a word of its own. Written by that broker.
    pub struct PulseLine {
        pub heartbeat: u64 = 0,
        pub batches_published: u64 = 8,
        /// Grows while the broker leaves batches unread for want of room.
        pub stalls: u64 = 16,
        /// What the broker's replica does: 0 none, 1 replicates, 2 failed.
        pub replica: u64 = 24,
        pub reserved: [u64; 4] = 32,
    }

    /// What a topic is. Written by a leader. Versioned; the version also guards the name line behind it.
    pub struct TopicLine {
        pub incarnation: Incarnation = 0,
        pub state: u8 = 4,
        pub order: u8 = 5,
        pub ack_level: u8 = 6,
        pub replication_factor: u8 = 7,
        pub retention_bytes: u64 = 8,
        pub retention_ms: u64 = 16,
        pub created_ms: u64 = 24,
        pub name_bytes: u32 = 32,
        pub reserved_low: u32 = 36,
        pub reserved: [u64; 2] = 40,
        pub version: u64 = 56,
    }

    /// The name, UTF-8, zero padded.
    pub struct NameLine {
        pub name: [u8; TOPIC_NAME_BYTES] = 0,
    }

    /// Tail and trim point of an order index: words, each growing on its own.
    pub struct TailLine {
        /// Entries below this are complete.
        pub committed: u64 = 0,
        /// Message offset that the next entry will get.
        pub next_offset: u64 = 8,
        /// First entry of the topic's present incarnation.
        pub base: u64 = 16,
        /// Entries below this are gone.
        pub trimmed: u64 = 24,
        /// Message offset of the first entry that is kept.
        pub trimmed_offset: u64 = 32,
        /// Epoch of the writer.
        pub term: Term = 40,
        /// Batch bytes ever indexed.
        pub bytes: u64 = 48,
        /// Incarnation of the topic that the other words speak of.
        pub incarnation: u64 = 56,
    }

    /// Broker half of an offset entry: words, written by the broker.
    pub struct BrokerHalf {
        /// Bytes ever reserved in the Blog (the paper's log_ptr).
        pub log_offset: u64 = 0,
        /// Batchlog entries below this are complete.
        pub batchlog_head: u64 = 8,
        /// Messages published to the Batchlog.
        pub written: u64 = 16,
        /// End of the newest published batch (the paper's processed_ptr).
        pub written_addr: u64 = 24,
        pub reserved: [u64; 4] = 32,
    }

    /// What the broker still uses: words, written by the broker.
    pub struct PinLine {
        /// Lowest index entry that a sender of this broker is reading; all ones when none.
        pub delivering_from: u64 = 0,
        /// Highest topic incarnation of which this broker holds nothing any more.
        pub released: u64 = 8,
        pub reserved: [u64; 6] = 16,
    }

    /// How far a leader is with a broker's Batchlog: words, written by that leader (the paper's sequencer half).
    pub struct SequencerHalf {
        /// Batches of this broker that are ordered (the paper's ordered_seq).
        pub ordered: u64 = 0,
        /// Message offset after the newest of them (the paper's ordered_ptr).
        pub ordered_offset: u64 = 8,
        /// Batchlog slots below this may be reused.
        pub consumed_through: u64 = 16,
        /// Batchlog entries below this are committed or dropped: none of them is held back any more.
        pub decided_through: u64 = 24,
        pub reserved: [u64; 4] = 32,
    }

    /// One batch, in the order in which its broker received it. `lap` is the commit word.
    pub struct BatchEntry {
        pub location: u64 = 0,
        pub client_id: ClientId = 8,
        pub sequence: u64 = 16,
        pub session_epoch: Epoch = 24,
        pub bytes: u32 = 28,
        pub message_count: u32 = 32,
        pub session_slot: SessionSlot = 36,
        pub topic_incarnation: Incarnation = 40,
        pub reserved_low: u32 = 44,
        pub reserved: u64 = 48,
        pub lap: u64 = 56,
    }

    /// One batch, in the order that all subscribers read.
    pub struct IndexEntry {
        pub first_offset: u64 = 0,
        pub location: u64 = 8,
        pub client_id: ClientId = 16,
        pub sequence: u64 = 24,
        /// Sequencer's wall clock, microseconds since 1970, never going back within an index.
        pub ordered_us: u64 = 32,
        pub bytes: u32 = 40,
        pub message_count: u32 = 44,
        pub session_epoch: Epoch = 48,
        pub term: u32 = 52,
        pub broker: u8 = 56,
        pub replicas: u8 = 57,
        pub reserved: u16 = 58,
        /// Low half of the entry's position plus one: a torn or foreign line does not match.
        pub commit: u32 = 60,
    }

    /// How far the stream that a broker acknowledges from is replicated: words, written by a leader.
    pub struct CompletionLine {
        /// Entries below this are on as many disks as the topic asks for, unless they are lost.
        pub durable_through: u64 = 0,
        /// Entries below this that were not durable by then went by retention: no disk has them.
        pub lost_through: u64 = 8,
        /// 1 while sessions wait for batches to be durable: then retention waits too.
        pub awaited: u64 = 16,
        pub reserved: [u64; 5] = 24,
    }

    /// Who a session belongs to and what became of it. Written by a leader. Versioned.
    pub struct SessionLine {
        pub client_id: ClientId = 0,
        pub epoch: Epoch = 8,
        pub state: u32 = 12,
        pub topic: TopicId = 16,
        pub topic_incarnation: Incarnation = 20,
        /// Sequences below this are committed (strong order), or were when the session ended.
        pub committed: u64 = 24,
        pub ack_level: u32 = 32,
        pub reserved_low: u32 = 36,
        pub reserved: [u64; 2] = 40,
        pub version: u64 = 56,
    }

    /// Progress of a session: words, written by a leader.
    pub struct SessionProgressLine {
        /// Sequences below this are committed.
        pub expected: u64 = 0,
        pub reserved: [u64; 7] = 8,
    }

    /// Two commit records.
    pub struct RecordPair {
        pub records: [CommitRecord; 2] = 0,
    }

    /// Who holds a segment. Written by the holder. Versioned.
    pub struct OwnerLine {
        pub kind: u32 = 0,
        pub topic: TopicId = 4,
        /// Broker that received what is in it; of an index, its stream: a broker id, or `max_brokers` for the global one.
        pub broker: u32 = 8,
        pub topic_incarnation: Incarnation = 12,
        pub ordinal: u64 = 16,
        /// Who took it from the pool, and alone may give it back.
        pub holder: BrokerId = 24,
        pub reserved_low: u32 = 28,
        pub reserved: [u64; 3] = 32,
        pub version: u64 = 56,
    }
}

/// Where a session's batch went in the order. `tag` is the batch sequence plus one, and the commit word.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub struct CommitRecord {
    /// Global offset of its first message.
    pub first_offset: u64,
    /// Position of its entry in the order index.
    pub position: u64,
    /// Broker that received it.
    pub broker: BrokerId,
    /// Epoch of the session under which it committed.
    pub session_epoch: Epoch,
    /// Batch sequence + 1.
    pub tag: u64,
}
const _: () = {
    assert!(size_of::<CommitRecord>() == 32);
    assert!(offset_of!(CommitRecord, position) == 8);
    assert!(offset_of!(CommitRecord, broker) == 16);
    assert!(offset_of!(CommitRecord, session_epoch) == 20);
    assert!(offset_of!(CommitRecord, tag) == 24);
};

/// Bytes of the superblock.
pub const SUPERBLOCK_BYTES: u64 = 128;
/// Bytes of an offset entry: broker half, pins, own tail, replication_done of 32 sources.
pub const OFFSET_ENTRY_BYTES: u64 = 512;
/// Position of the words in an offset entry that say how far the broker, as a replica, is with each source broker.
pub const REPLICATION_DONE_AT: u64 = 192;
/// `[[DEVIATION_004]]` Bytes of a TInode: what brokers say of a topic. It stands in for a separate broker metadata region.
pub const TINODE_BYTES: u64 = MAX_BROKERS as u64 * OFFSET_ENTRY_BYTES;
/// `[[DEVIATION_011]]` Bytes of what a leader says of a topic, in its own area: configuration, name, tail of the global
/// order, one reserved line.
pub const LEADER_TOPIC_BYTES: u64 = 256;
/// Bytes of a row of the session table: identity, progress, commit records.
pub const SESSION_BYTES: u64 = 128 + SESSION_WINDOW * size_of::<CommitRecord>() as u64;
const _: () = {
    // Halves that different hosts write must not share a line, nor the pair of lines that CPUs prefetch together.
    assert!(OFFSET_ENTRY_BYTES.is_multiple_of(256) && LEADER_TOPIC_BYTES.is_multiple_of(256));
    assert!(REPLICATION_DONE_AT + MAX_BROKERS as u64 * 8 <= OFFSET_ENTRY_BYTES);
    assert!(SESSION_BYTES.is_multiple_of(64));
};

/// Which segment allocator the region uses (DEV-005).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AllocatorKind {
    /// One bitmap, `fetch_or` by everyone. Needs a coherent fabric.
    Bitmap,
    /// One bitmap a broker, each written by its owner.
    Partitioned,
    /// The leader allocates, by RPC.
    Leader,
}

impl AllocatorKind {
    /// The number that the superblock holds.
    #[must_use]
    pub const fn code(self) -> u32 {
        match self {
            Self::Bitmap => 1,
            Self::Partitioned => 2,
            Self::Leader => 3,
        }
    }

    /// The kind of a superblock's number.
    #[must_use]
    pub const fn from_code(code: u32) -> Option<Self> {
        match code {
            1 => Some(Self::Bitmap),
            2 => Some(Self::Partitioned),
            3 => Some(Self::Leader),
            _ => None,
        }
    }
}

/// What a region is to the brokers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RegionRole {
    /// All there is.
    #[default]
    Single,
    /// It holds everything; its leaders keep a copy of what they write in another, on a second unit of memory.
    Mirrored,
    /// That other.
    Mirror,
}

impl RegionRole {
    /// The number that the superblock holds.
    #[must_use]
    pub const fn code(self) -> u32 {
        match self {
            Self::Single => 0,
            Self::Mirrored => 1,
            Self::Mirror => 2,
        }
    }

    /// The role of a superblock's number.
    #[must_use]
    pub const fn from_code(code: u32) -> Option<Self> {
        match code {
            0 => Some(Self::Single),
            1 => Some(Self::Mirrored),
            2 => Some(Self::Mirror),
            _ => None,
        }
    }
}

/// The numbers from which every position follows.
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
    /// What it is to the brokers.
    pub role: RegionRole,
}

impl Geometry {
    /// Default tables, with one segment of `segment_bytes`; [`Geometry::fit`] finds how many segments fit.
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

    /// Of a mirror of a region of this geometry, of at most `bytes`: the tables of its leaders, and room for their order
    /// indexes in segments of 1 MiB, of which each leader has as many.
    ///
    /// # Errors
    /// [`OutOfBounds`] when not even one segment a leader fits.
    pub fn of_mirror(&self, bytes: u64) -> Result<Self, OutOfBounds> {
        let mirror = Self {
            max_brokers: self.max_leaders,
            max_leaders: self.max_leaders,
            max_topics: self.max_topics,
            max_sessions: self.max_sessions,
            batchlog_slots: 16,
            segment_bytes: *SEGMENT_BYTES.start(),
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

    /// These tables, and as many segments as a region of `region_bytes` holds beside them.
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
    /// The first number that is out of bounds.
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

    /// Every broker slot.
    pub fn brokers(&self) -> impl DoubleEndedIterator<Item = BrokerId> + Clone + use<> {
        (0..self.max_brokers).map(BrokerId)
    }

    /// Every topic slot.
    pub fn topics(&self) -> impl DoubleEndedIterator<Item = TopicId> + Clone + use<> {
        (0..self.max_topics).map(TopicId)
    }

    /// Every row of the session table.
    pub fn sessions(&self) -> impl DoubleEndedIterator<Item = SessionSlot> + Clone + use<> {
        (0..self.max_sessions).map(SessionSlot)
    }

    /// Slots of an order index's directory: a power of two that no index can outgrow.
    #[must_use]
    pub const fn directory_slots(&self) -> u64 {
        (self.segment_count as u64).next_power_of_two()
    }

    /// Segments of one broker's partition of the bitmap.
    #[must_use]
    pub const fn partition_segments(&self) -> u32 {
        self.segment_count.div_ceil(self.max_brokers)
    }
}

/// Start of each area, computed from a [`Geometry`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct Layout {
    /// Control block: the [`ElectionLine`], a [`TermLine`] for each broker, a [`ControlLine`] for each broker.
    pub control: u64,
    /// Broker table: 128 bytes a broker.
    pub brokers: u64,
    /// Segment bitmap, as one run of words (bitmap) or one run of lines a broker (partitioned, leader).
    pub bitmap: u64,
    /// Owner lines, one a segment.
    pub owners: u64,
    /// TInodes.
    pub tinodes: u64,
    /// Batchlog rings, topic-major.
    pub batchlogs: u64,
    /// Directories of the brokers' own order indexes, topic-major, then broker.
    pub directories: u64,
    /// Areas of the leaders, one after another.
    pub leaders: u64,
    /// What is where in the area of a leader.
    pub leader: LeaderAreaLayout,
    /// The pool.
    pub segments: u64,
    /// End of the pool.
    pub region_bytes: u64,
}

/// Start of each part of a leader's area, from the start of that area. At 0: [`LEADER_TOPIC_BYTES`] a topic.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
pub struct LeaderAreaLayout {
    /// A [`SequencerHalf`] for each topic and broker, topic-major.
    pub halves: u64,
    /// Completion vector: a [`CompletionLine`] for each topic and broker, topic-major.
    pub completion: u64,
    /// Session table.
    pub sessions: u64,
    /// Directories of the global order indexes, one a topic.
    pub directories: u64,
    /// Bytes of the area.
    pub bytes: u64,
}

/// Number of a leader's area: the id of the broker that writes it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaderArea(pub BrokerId);

impl Layout {
    /// Lays the areas out one after another.
    #[must_use]
    pub const fn new(geometry: &Geometry) -> Self {
        const fn up(value: u64) -> u64 {
            value.next_multiple_of(AREA_ALIGN)
        }
        let brokers = geometry.max_brokers as u64;
        let topics = geometry.max_topics as u64;
        let segments = geometry.segment_count as u64;
        let control_at = AREA_ALIGN;
        let brokers_at = up(control_at + (1 + 2 * MAX_BROKERS as u64) * 64);
        let bitmap_at = up(brokers_at + brokers * 128);
        let shared_bitmap = segments.div_ceil(512) * 64;
        let partitions = brokers * Self::partition_bytes(geometry);
        let owners_at = up(bitmap_at + if partitions > shared_bitmap { partitions } else { shared_bitmap });
        let tinodes_at = up(owners_at + segments * 64);
        let batchlogs_at = up(tinodes_at + topics * TINODE_BYTES);
        let directories_at = up(batchlogs_at + topics * brokers * geometry.batchlog_slots as u64 * 64);
        let heads_at = up(directories_at + topics * brokers * Self::directory_bytes(geometry));
        let halves = topics * LEADER_TOPIC_BYTES;
        let completion = halves + topics * brokers * 64;
        let sessions = completion + topics * brokers * 64;
        let directories = sessions + geometry.max_sessions as u64 * SESSION_BYTES;
        let bytes = up(directories + topics * Self::directory_bytes(geometry));
        let tables_end = heads_at + geometry.max_leaders as u64 * bytes;
        let segments_at = tables_end.next_multiple_of(if geometry.segment_bytes < 2 << 20 { 1 << 20 } else { 2 << 20 });
        Self {
            control: control_at,
            brokers: brokers_at,
            bitmap: bitmap_at,
            owners: owners_at,
            tinodes: tinodes_at,
            batchlogs: batchlogs_at,
            directories: directories_at,
            leaders: heads_at,
            leader: LeaderAreaLayout { halves, completion, sessions, directories, bytes },
            segments: segments_at,
            region_bytes: segments_at + segments * geometry.segment_bytes,
        }
    }

    /// Bytes of one broker's partition of the bitmap: whole lines, so that no two brokers share one.
    #[must_use]
    pub const fn partition_bytes(geometry: &Geometry) -> u64 {
        (geometry.partition_segments() as u64).div_ceil(512) * 64
    }

    /// Bytes of one order index's directory.
    #[must_use]
    pub const fn directory_bytes(geometry: &Geometry) -> u64 {
        (geometry.directory_slots() * 8).next_multiple_of(64)
    }

    /// The [`ElectionLine`].
    #[must_use]
    pub const fn election(&self) -> RegionOffset {
        RegionOffset(self.control)
    }

    /// The [`TermLine`] of a broker that can be the leader. They lie one after another.
    #[must_use]
    pub const fn terms(&self, area: LeaderArea) -> RegionOffset {
        RegionOffset(self.control + 64 + area.0.0 as u64 * 64)
    }

    /// The [`ControlLine`] of a broker that can be the leader.
    #[must_use]
    pub const fn control_line(&self, area: LeaderArea) -> RegionOffset {
        RegionOffset(self.control + (1 + MAX_BROKERS as u64 + area.0.0 as u64) * 64)
    }

    /// A broker's slot: its [`BrokerLine`], then its [`PulseLine`].
    #[must_use]
    pub const fn broker(&self, broker: BrokerId) -> RegionOffset {
        RegionOffset(self.brokers + broker.0 as u64 * 128)
    }

    /// The offset entry of a broker in a topic: its broker half starts here.
    #[must_use]
    pub const fn offset_entry(&self, topic: TopicId, broker: BrokerId) -> RegionOffset {
        RegionOffset(self.tinodes + topic.0 as u64 * TINODE_BYTES + broker.0 as u64 * OFFSET_ENTRY_BYTES)
    }

    /// The area of a leader.
    #[must_use]
    pub const fn leader_area(&self, area: LeaderArea) -> RegionOffset {
        RegionOffset(self.leaders + area.0.0 as u64 * self.leader.bytes)
    }

    /// What a leader says of a topic: its [`TopicLine`] starts here, then [`NameLine`] and [`TailLine`].
    #[must_use]
    pub const fn leader_topic(&self, area: LeaderArea, topic: TopicId) -> RegionOffset {
        self.leader_area(area).add(topic.0 as u64 * LEADER_TOPIC_BYTES)
    }

    /// A leader's [`SequencerHalf`] of a broker in a topic.
    #[must_use]
    pub const fn sequencer_half(
        &self,
        geometry: &Geometry,
        area: LeaderArea,
        topic: TopicId,
        broker: BrokerId,
    ) -> RegionOffset {
        let index = topic.0 as u64 * geometry.max_brokers as u64 + broker.0 as u64;
        self.leader_area(area).add(self.leader.halves + index * 64)
    }

    /// The [`PinLine`] of a broker in a topic.
    #[must_use]
    pub const fn pin(&self, topic: TopicId, broker: BrokerId) -> RegionOffset {
        self.offset_entry(topic, broker).add(64)
    }

    /// The word in which a replica says how far it is with the batches of a source.
    #[must_use]
    pub const fn replication_done(&self, of: Replication) -> RegionOffset {
        self.offset_entry(of.topic, of.replica).add(REPLICATION_DONE_AT + of.source.0 as u64 * 8)
    }

    /// A leader's [`CompletionLine`] that `broker` acknowledges by.
    #[must_use]
    pub const fn completion(
        &self,
        geometry: &Geometry,
        area: LeaderArea,
        topic: TopicId,
        broker: BrokerId,
    ) -> RegionOffset {
        let index = topic.0 as u64 * geometry.max_brokers as u64 + broker.0 as u64;
        self.leader_area(area).add(self.leader.completion + index * 64)
    }

    /// A segment's owner line.
    #[must_use]
    pub const fn owner(&self, segment: u32) -> RegionOffset {
        RegionOffset(self.owners + segment as u64 * 64)
    }

    /// A session's row at a leader.
    #[must_use]
    pub const fn session(&self, area: LeaderArea, slot: SessionSlot) -> RegionOffset {
        self.leader_area(area).add(self.leader.sessions + slot.0 as u64 * SESSION_BYTES)
    }

    /// The first byte of a segment.
    #[must_use]
    pub const fn segment(&self, geometry: &Geometry, segment: u32) -> RegionOffset {
        RegionOffset(self.segments + segment as u64 * geometry.segment_bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

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
                    SUPERBLOCK_BYTES, layout.control, layout.brokers, layout.bitmap, layout.owners, layout.tinodes,
                    layout.batchlogs, layout.directories, layout.leaders, layout.segments,
                ];
                prop_assert!(areas.windows(2).all(|pair| pair[0] < pair[1]));
                prop_assert!(geometry.directory_slots() >= u64::from(geometry.segment_count));
            }
        }
    }

    #[test]
    fn bounds_are_named() {
        let error = Geometry::with_segments_of(3 << 20, AllocatorKind::Bitmap).fit(1 << 30).unwrap_err();
        assert_eq!(error.to_string(), "segment_bytes is 3145728; it must be a power of two");
        let error = Geometry::with_segments_of(4096, AllocatorKind::Bitmap).fit(1 << 30).unwrap_err();
        assert_eq!(error.key, "segment_bytes");
        assert!(Geometry::with_segments_of(1 << 20, AllocatorKind::Bitmap).fit(1 << 20).is_err());
    }
}
