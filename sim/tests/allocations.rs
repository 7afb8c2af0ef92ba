//! The hot loops allocate nothing, however many messages pass through them.
#![allow(clippy::unwrap_used, clippy::panic)] // a test fails by panicking

use crossbeam_channel::bounded;
use embarcadero_broker::ack::AckQueue;
use embarcadero_broker::delegation::{Delegation, FlushGroup, Landed, Origin};
use embarcadero_broker::topics::TopicTable;
use embarcadero_cxl::Native;
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::AllocatorKind;
use embarcadero_cxl::order_index::StreamId;
use embarcadero_cxl::segment::PartitionAllocator;
use embarcadero_sim::testbed::{TOPIC, Testbed, region};
use embarcadero_wire::batch::{BatchBuilder, BatchOrigin};
use embarcadero_wire::{BrokerId, FRAME_BYTES, Frame, Stream};
use std::sync::Arc;

#[global_allocator]
static ALLOCATOR: dhat::Alloc = dhat::Alloc;

const BROKER: BrokerId = BrokerId(1);
const MESSAGES: u32 = 512;
const WARM_UP: u64 = 200;
/// Batches of a million messages.
const BATCHES: u64 = 1_000_000 / MESSAGES as u64;

/// Takes batches through one broker, without the network. A batch's frame is decoded and its place reserved; the batch is
/// appended, published, ordered and acknowledged. Work that stages do by the clock, every few milliseconds, is left out.
#[test]
fn a_million_messages_pass_without_an_allocation() {
    let _profiler = dhat::Profiler::builder().testing().build();
    let region = region(AllocatorKind::Partitioned, FlushMethod::None, |native: Native| native).unwrap();
    let mut testbed = Testbed::new(region.clone(), 1).unwrap();
    let session = testbed.sessions()[0];
    let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), BROKER));
    let topics = Arc::new(TopicTable::new(region.clone(), BROKER, pool));
    let topic = topics.get(TOPIC.0, TOPIC.1).unwrap().unwrap();
    let (landed, queue) = bounded(64);
    let (acks, _ordered) = bounded(64);
    let mut delegation = Delegation::new(Arc::clone(&topics), queue, vec![acks], FlushGroup::default());
    let mut waiting = AckQueue::new(session, StreamId { topic: TOPIC.0, stream: Stream::GLOBAL });
    let origin = BatchOrigin {
        client_id: session.client_id,
        session_epoch: session.epoch,
        session_slot: session.slot,
        topic: TOPIC.0,
        topic_incarnation: TOPIC.1,
    };
    let mut builder = BatchBuilder::new(64 << 10);
    let (mut acknowledged, mut allocated) = (0, 0);
    for sequence in 0..WARM_UP + BATCHES {
        if sequence == WARM_UP {
            allocated = dhat::HeapStats::get().total_blocks;
        }
        builder.clear();
        (0..MESSAGES).for_each(|_| builder.push(b"a message"));
        builder.seal(&origin, sequence, true);
        let frame: &[u8; FRAME_BYTES] = builder.bytes().first_chunk().unwrap();
        let Ok(Frame::BatchHeader(header)) = Frame::decode(frame) else { panic!("not a batch") };
        let at = topic.blog.reserve(header.batch_bytes()).unwrap();
        waiting.expect(header.sequence);
        let batch =
            Landed { topic: Arc::clone(&topic), header, at, in_memory: false, origin: Origin { worker: 0, token: 0 } };
        assert!(landed.try_send(batch).is_ok());
        assert_eq!(delegation.poll(1, 8), 1);
        testbed.order(1);
        acknowledged += waiting.poll(&region, BROKER, |ack| assert_eq!(ack.sequence, sequence)).unwrap();
    }
    assert_eq!(acknowledged as u64, WARM_UP + BATCHES);
    let more = dhat::HeapStats::get().total_blocks - allocated;
    assert_eq!(more, 0, "{more} allocations for {} messages", BATCHES * u64::from(MESSAGES));
}
