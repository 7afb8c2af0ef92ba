//! Segments that return to the pool.

use embarcadero_cxl::Native;
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::{AllocatorKind, LeaderArea};
use embarcadero_cxl::leadership::NoLeader;
use embarcadero_cxl::leadership::claim_term;
use embarcadero_cxl::order_index::{OrderIndexReader, StreamId, read_extent};
use embarcadero_sim::testbed::{TOPIC, Testbed, region};
use embarcadero_wire::{BrokerId, Stream, Term};

/// A broker that has just started looks while the leader changes. It must not take the order for empty, nor its segments
/// for free.
#[test]
fn between_two_leaders_an_order_is_not_taken_for_empty() {
    let region = region(AllocatorKind::Partitioned, FlushMethod::None, |native: Native| native).unwrap();
    let mut testbed = Testbed::new(region.clone(), 1).unwrap();
    let batches = testbed.append();
    testbed.order(batches);
    let stream = StreamId { topic: TOPIC.0, stream: Stream::GLOBAL };
    let extent = read_extent(&region, stream).unwrap();
    assert_eq!(extent.committed, batches);
    claim_term(&region, LeaderArea(BrokerId(0)), Term(2));
    let mut reader = OrderIndexReader::new(region, stream);
    assert_eq!(reader.poll(), 0, "nobody can say");
    assert_eq!(reader.poll_beyond(&extent), Err(NoLeader));
}
