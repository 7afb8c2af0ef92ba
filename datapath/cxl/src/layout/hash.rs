//! Digest of everything that shapes memory, so that two builds which disagree refuse each other's regions.

use super::areas::Layout;
use super::codes::{AllocatorKind, RegionRole, ReplicaState, SegmentKind, SessionState, TopicState};
use super::geometry::Geometry;
use super::structures::STRUCTURES_DIGEST;
use super::{
    AREA_ALIGN, LAYOUT_VERSION, MAX_BROKERS, MAX_SEGMENTS, MAX_SESSIONS, MAX_TOPICS, SESSION_WINDOW, commit_word,
    directory_word, lap_of, pin_word,
};
use crate::fabric::{LINE_BYTES, Versioned};
use embarcadero_wire::batch::ALIGN_BYTES;
use embarcadero_wire::{DIGEST_SEED, FRAME_BYTES, Order, WIRE_VERSION, digest};

/// Digest of the structures, of the codes and words in them, of every constant, and of where the areas lie.
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
            LAYOUT_VERSION as u64,
            LINE_BYTES,
            <super::TopicLine as Versioned>::VERSION_AT,
            AREA_ALIGN,
            MAX_BROKERS as u64,
            MAX_TOPICS as u64,
            MAX_SESSIONS as u64,
            MAX_SEGMENTS as u64,
            SESSION_WINDOW,
        ],
    );
    // Batches lie in segments as they travel.
    hash = each(hash, "batches", &[WIRE_VERSION as u64, FRAME_BYTES as u64, ALIGN_BYTES]);
    hash = each(hash, "words", &[lap_of(1000, 16), commit_word(1000) as u64, directory_word(1000, 7), pin_word(1000)]);
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
        &[control, brokers, bitmap, owners, tinodes, batchlogs, directories, leaders, segments, region_bytes],
    );
    let parts = &[leader.halves, leader.completion, leader.sessions, leader.directories, leader.bytes];
    let sizes = &[Layout::partition_bytes(geometry), Layout::directory_bytes(geometry)];
    each(each(hash, "leader area", parts), "sizes", sizes)
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

    const EXPECTED: &str = "0xecd8f47ff43d1a16";
}
