//! Segments that batches leave for order indexes.

use embarcadero_broker::blog::{Blog, BlogId};
use embarcadero_cxl::layout::{AllocatorKind, Geometry, Layout, LeaderArea};
use embarcadero_cxl::order_index::{IndexOptions, OrderIndexWriter, StreamId};
use embarcadero_cxl::segment::PartitionAllocator;
use embarcadero_cxl::{Guard, Region};
use embarcadero_sim::testbed::TOPIC;
use embarcadero_sim::{Mutation, Simulated, Turbulence, World};
use embarcadero_wire::{BrokerId, Stream, Term};
use std::sync::Arc;

const SEGMENT_BYTES: u64 = 4096;
const BROKER: BrokerId = BrokerId(0);

/// Returns true if an order index gets a segment from a pool that batches have filled.
fn an_index_gets_a_segment(removed: Option<Guard>) -> bool {
    let geometry = Geometry {
        max_brokers: 1,
        max_leaders: 1,
        max_topics: 1,
        max_sessions: 1,
        segment_count: 8,
        ..Geometry::with_segments_of(SEGMENT_BYTES, AllocatorKind::Partitioned)
    };
    let removed = removed.map(Mutation::Guard);
    let world = World::new(Layout::new(&geometry).region_bytes, 1, Turbulence::CALM, removed);
    let region = Region::format(Simulated::join(&world, || {}), &geometry, uuid::Uuid::nil(), 0).unwrap();
    let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), BROKER));
    let (topic, incarnation) = TOPIC;
    let blog = Blog::new(region.clone(), BlogId { topic, incarnation, broker: BROKER }, 0, pool.clone());
    while blog.reserve(SEGMENT_BYTES).is_ok() {}
    let id = StreamId { topic, stream: Stream::GLOBAL };
    let options = IndexOptions { id, incarnation, writer: LeaderArea(BROKER), term: Term(1) };
    OrderIndexWriter::open(region, options, pool).unwrap().make_room().is_ok()
}

/// Nothing that waits for its order is given back before the index has room.
#[test]
fn batches_leave_a_segment_that_an_order_index_needs() {
    assert!(an_index_gets_a_segment(None));
    assert!(!an_index_gets_a_segment(Some(Guard::IndexReserve)));
}
