//! Layout of the region: what lies where, and in which form.
//!
//! All integers are little-endian, and reserved bytes are zero. Three rules hold for every structure.
//!
//! - *One writer.* A line has one writing host at a time. A leader writes to its own area, a broker to its own rows.
//! - *Words only grow*, or a version tells that they change: a reader never has to guess how old a value is.
//! - *Data before the word that covers it.* Entries reach memory before a tail, records before a tag, everything before
//!   a version becomes even.
//!
//! `docs/reference/region-layout.md` draws the areas.

mod areas;
mod codes;
mod geometry;
mod hash;
mod structures;

pub(crate) use areas::BatchlogRing;
pub use areas::{Layout, LeaderArea, LeaderAreaLayout};
pub use codes::{AllocatorKind, RegionRole, ReplicaState, SegmentKind, SessionState, TopicState};
pub use geometry::Geometry;
pub use hash::LAYOUT_HASH;
pub use structures::{
    BatchEntry, BrokerHalf, BrokerLine, BrokerSlot, CommitRecord, CompletionLine, ControlBlock, ControlLine,
    ElectionLine, IndexEntry, LeaderTopic, NameLine, OffsetEntry, OwnerLine, PinLine, PulseLine, STRUCTURES,
    SequencerHalf, SessionLine, SessionProgressLine, SessionRow, Superblock, SuperblockGeometry, SuperblockHead,
    TailLine, TermLine, Tinode, TopicLine,
};

use embarcadero_wire::{DIGEST_SEED, TopicId, digest};
use uuid::Uuid;

/// First eight bytes of a region.
pub(crate) const MAGIC: u64 = u64::from_le_bytes(*b"EMBARCDR");
/// Version of the layout. It changes with every structure, independent of the crate's version.
pub const LAYOUT_VERSION: u32 = 6;
/// Most brokers of a region.
pub const MAX_BROKERS: u32 = 32;
/// Brokers that can be the leader, unless a region is made for more: those with the lowest ids.
pub const DEFAULT_LEADERS: u32 = 4;
/// Most topics of a region.
pub(crate) const MAX_TOPICS: u32 = 32;
/// Most sessions of a region.
pub(crate) const MAX_SESSIONS: u32 = 4096;
/// Most segments of a region.
pub(crate) const MAX_SEGMENTS: u32 = 16384;
/// Segments of one word of a bitmap: segment `n` is bit `n % 64` of word `n / 64`.
pub(crate) const SEGMENTS_PER_WORD: u32 = u64::BITS;
/// Session slots of one word of a broker's connections of sessions: slot `n` has bits `n % 32` and `32 + n % 32` of
/// word `n / 32`.
pub(crate) const SESSIONS_PER_WORD: u32 = u64::BITS / 2;
/// Batches of one session that may be in flight, and commit records that a session keeps.
pub const SESSION_WINDOW: u64 = 128;
/// Bytes of the smallest and of the largest segment. Small ones let a simulation use memory again and again.
pub const SEGMENT_BYTES: std::ops::RangeInclusive<u64> = AREA_ALIGN..=16 << 30;
/// Bytes of a segment of a mirror.
pub(crate) const MIRROR_SEGMENT_BYTES: u64 = 1 << 20;
/// Most bytes of a topic name.
pub const TOPIC_NAME_BYTES: usize = 64;
/// Alignment of areas, bytes: a page.
pub(crate) const AREA_ALIGN: u64 = 4096;

/// Word in an entry's `lap` when it is entry `index` of a ring of `slots` slots.
#[inline]
#[must_use]
pub(crate) const fn lap_of(index: u64, slots: u64) -> u64 {
    index / slots + 1
}

/// Number that tells the entries of one stream of one region from all others. `stream` is a
/// [`Geometry::stream_number`].
#[must_use]
pub(crate) const fn commit_key(region: Uuid, topic: TopicId, stream: u32) -> u64 {
    let (high, low) = region.as_u64_pair();
    let region = digest(digest(DIGEST_SEED, "region", high), "region", low);
    digest(digest(region, "topic", topic.0 as u64), "stream", stream as u64)
}

/// Word in [`IndexEntry::commit`] of the entry at `position` of the stream with this key. It is never 0.
///
/// Positions of a stream never repeat. Entries that others, or the stream itself, left in reused memory do not match,
/// except by a chance of 2^-32. Source of the mixing: Knuth, "The Art of Computer
/// Programming", volume 3, section 6.4, multiplicative hashing.
#[inline]
#[must_use]
pub(crate) const fn commit_word(key: u64, position: u64) -> u32 {
    const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;
    let word = ((key ^ position).wrapping_mul(GOLDEN) >> 32) as u32;
    if word == 0 { 1 } else { word }
}

/// Word of an order index's directory: the segment that holds the entries of `ordinal`.
#[inline]
#[must_use]
pub(crate) const fn directory_word(ordinal: u64, segment: u32) -> u64 {
    (ordinal + 1) << 32 | segment as u64
}

/// Ordinal and segment in a directory word; `None` in one that was never written.
#[inline]
#[must_use]
pub(crate) const fn directory_entry(word: u64) -> Option<(u64, u32)> {
    match word >> 32 {
        0 => None,
        after => Some((after - 1, word as u32)),
    }
}

/// Word in [`PinLine::delivering_from`] for a position; `u64::MAX` pins nothing.
#[inline]
#[must_use]
pub(crate) const fn pin_word(position: u64) -> u64 {
    position.saturating_add(1)
}

/// Lowest position that a pin's word protects; `u64::MAX` for none.
#[inline]
#[must_use]
pub const fn pinned_position(word: u64) -> u64 {
    match word {
        // A line that was never written, or one that pins nothing.
        0 | u64::MAX => u64::MAX,
        _ => word - 1,
    }
}
