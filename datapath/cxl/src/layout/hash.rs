//! Digest of everything that shapes memory, so that two builds which disagree refuse each other's regions.

use super::areas::{Layout, LeaderArea};
use super::codes::{AllocatorKind, RegionRole, ReplicaState, SegmentKind, SessionState, TopicState};
use super::geometry::Geometry;
use super::structures::STRUCTURES_DIGEST;
use super::{
    AREA_ALIGN, LAYOUT_VERSION, MAGIC, MAX_BROKERS, MAX_SEGMENTS, MAX_SESSIONS, MAX_TOPICS, SEGMENTS_PER_WORD,
    SESSION_WINDOW, SESSIONS_PER_WORD, commit_key, commit_word, directory_word, lap_of, pin_word,
};
use crate::fabric::{LINE_BYTES, RegionOffset, Versioned};
use crate::replication::Replication;
use crate::session_connections::Connected;
use embarcadero_wire::batch::ALIGN_BYTES;
use embarcadero_wire::{
    BatchHeader, BrokerId, DIGEST_SEED, FRAME_BYTES, FRAME_MAGIC, Order, SessionSlot, Stream, TopicId, WIRE_VERSION,
    digest,
};
use uuid::Uuid;

/// Digest of the structures, of the codes and words in them, of every constant, and of where everything lies.
pub const LAYOUT_HASH: u64 = {
    let mut hash = digest(DIGEST_SEED, "structures", STRUCTURES_DIGEST);
    hash = each(
        hash,
        "codes",
        &[
            AllocatorKind::DIGEST,
            RegionRole::DIGEST,
            TopicState::DIGEST,
            SessionState::DIGEST,
            SegmentKind::DIGEST,
            ReplicaState::DIGEST,
            Order::DIGEST,
        ],
    );
    hash = each(
        hash,
        "constants",
        &[
            MAGIC,
            LAYOUT_VERSION as u64,
            LINE_BYTES,
            <super::TopicLine as Versioned>::VERSION_AT,
            AREA_ALIGN,
            MAX_BROKERS as u64,
            MAX_TOPICS as u64,
            MAX_SESSIONS as u64,
            MAX_SEGMENTS as u64,
            SESSION_WINDOW,
            SEGMENTS_PER_WORD as u64,
            SESSIONS_PER_WORD as u64,
        ],
    );
    // Batches lie in segments as they travel.
    let batches = [WIRE_VERSION as u64, FRAME_MAGIC as u64, FRAME_BYTES as u64, ALIGN_BYTES, BatchHeader::DIGEST];
    hash = each(hash, "batches", &batches);
    let key = commit_key(Uuid::from_u64_pair(7, 11), TopicId(3), 2);
    let words = [lap_of(1000, 16), commit_word(key, 1000) as u64, directory_word(1000, 7), pin_word(1000)];
    let connected = [Connected::No.bits(), Connected::Open.bits(), Connected::Waiting.bits()];
    hash = each(hash, "connections", &connected);
    hash = each(hash, "words", &words);
    // Two geometries whose numbers all differ: one of whole gigabytes, one of odd counts.
    hash = areas(hash, &Geometry::with_segments_of(1 << 30, AllocatorKind::Bitmap));
    areas(
        hash,
        &Geometry {
            max_brokers: 5,
            max_leaders: 3,
            max_topics: 7,
            max_sessions: 11,
            batchlog_slots: 16,
            segment_bytes: 1 << 20,
            segment_count: 1301,
            allocator: AllocatorKind::Partitioned,
            role: RegionRole::Mirror,
        },
    )
};

const fn each(mut hash: u64, name: &str, numbers: &[u64]) -> u64 {
    let mut index = 0;
    while index < numbers.len() {
        hash = digest(hash, name, numbers[index]);
        index += 1;
    }
    hash
}

const fn areas(hash: u64, geometry: &Geometry) -> u64 {
    let Layout {
        control,
        brokers,
        connections,
        bitmap,
        owners,
        tinodes,
        batchlogs,
        directories,
        leaders,
        leader,
        segments,
        region_bytes,
        ..
    } = Layout::new(geometry);
    let hash = each(
        hash,
        "areas",
        &[
            control,
            brokers,
            connections,
            bitmap,
            owners,
            tinodes,
            batchlogs,
            directories,
            leaders,
            segments,
            region_bytes,
        ],
    );
    let parts = &[leader.halves, leader.completion, leader.sessions, leader.directories, leader.bytes];
    let sizes =
        &[Layout::connections_bytes(geometry), Layout::partition_bytes(geometry), Layout::directory_bytes(geometry)];
    places(each(each(hash, "leader area", parts), "sizes", sizes), geometry)
}

/// Adds the place of one thing of each kind, whose indexes all differ.
const fn places(hash: u64, geometry: &Geometry) -> u64 {
    let layout = Layout::new(geometry);
    let (topic, broker, area, slot) = (TopicId(3), BrokerId(2), LeaderArea(BrokerId(1)), SessionSlot(5));
    let of_broker = [
        layout.broker(broker),
        layout.pulse(broker),
        layout.connections_word(broker, 9),
        layout.broker_half(topic, broker),
        layout.pin(topic, broker),
        layout.broker_tail(topic, broker),
        layout.replicated(Replication { topic, replica: broker, source: BrokerId(1) }),
        layout.batchlog(topic, broker).slot(1000),
        layout.broker_directory(topic, broker, 1000),
    ];
    let of_leader = [
        layout.election(),
        layout.terms(area),
        layout.control_line(area),
        layout.topic(area, topic),
        layout.topic_name(area, topic),
        layout.global_tail(area, topic),
        layout.global_directory(area, topic, 1000),
        layout.sequencer_half(area, topic, broker),
        layout.completion(area, topic, broker),
        layout.session(area, slot),
        layout.session_progress(area, slot),
        layout.commit_record(area, slot, 1000),
    ];
    let of_pool = [
        layout.bitmap_word(9),
        layout.partition_word(broker, 1),
        layout.owner(17),
        layout.segment(17),
        layout.index_entry(17, 100_000),
    ];
    let mut hash = offsets(hash, "broker", &of_broker);
    hash = offsets(hash, "leader", &of_leader);
    hash = offsets(hash, "pool", &of_pool);
    let partition = geometry.partition(broker);
    let (own, global) = (geometry.stream_number(Stream::of(broker)), geometry.stream_number(Stream::GLOBAL));
    each(hash, "numbers", &[partition.start as u64, partition.end as u64, own as u64, global as u64])
}

const fn offsets(mut hash: u64, name: &str, offsets: &[RegionOffset]) -> u64 {
    let mut index = 0;
    while index < offsets.len() {
        hash = digest(hash, name, offsets[index].0);
        index += 1;
    }
    hash
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Checks that the layout did not change by accident. A change of the layout changes this number, and the line of
    /// [`LAYOUT_VERSION`] in CHANGELOG.md.
    #[test]
    fn the_layout_is_the_one_that_is_documented() {
        assert_eq!(format!("{LAYOUT_HASH:#018x}"), EXPECTED);
    }

    const EXPECTED: &str = "0x52a0e4d67edeb037";
}
