//! Segments that return to the pool.

use bytemuck::Zeroable;
use crossbeam_channel::{Sender, bounded, unbounded};
use embarcadero_broker::blog::{Blog, BlogId};
use embarcadero_broker::delegation::{Delegation, FlushGroup, Landed, Origin};
use embarcadero_broker::topics::TopicTable;
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::{AllocatorKind, Geometry, Layout, LeaderArea, TopicState};
use embarcadero_cxl::leadership::{NoLeader, activate_term, claim_term};
use embarcadero_cxl::order_index::{OrderIndexReader, StreamId, read_extent};
use embarcadero_cxl::segment::{PartitionAllocator, SegmentAllocator, free_segments};
use embarcadero_cxl::topic_table::{TopicConfig, publish_topic, read_released};
use embarcadero_cxl::{Fabric, Native, Region, Site};
use embarcadero_sim::testbed::{TOPIC, Testbed, region, topic};
use embarcadero_sim::{Simulated, Turbulence, World};
use embarcadero_wire::{BatchHeader, BrokerId, Incarnation, Order, Stream, Term};
use std::sync::Arc;
use uuid::Uuid;

const LEADER: LeaderArea = LeaderArea(BrokerId(0));
/// Broker that dies.
const BROKER: BrokerId = BrokerId(1);

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
    claim_term(&region, LEADER, Term(2));
    let mut reader = OrderIndexReader::new(region, stream);
    assert_eq!(reader.poll(), 0, "nobody can say");
    assert_eq!(reader.poll_beyond(&extent), Err(NoLeader));
}

/// Process of the broker that dies.
struct Process {
    topics: Arc<TopicTable<Native>>,
    landed: Sender<Landed<Native>>,
    delegation: Delegation<Native>,
}

impl Process {
    fn start(region: &Region<Native>) -> Self {
        let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), BROKER));
        let topics = Arc::new(TopicTable::new(region.clone(), BROKER, pool));
        let ((landed, queue), (acks, _)) = (unbounded(), bounded(1));
        let mut delegation = Delegation::new(Arc::clone(&topics), queue, vec![acks], FlushGroup::default());
        (0..2).for_each(|_| delegation.maintain(0));
        Self { topics, landed, delegation }
    }

    /// Receives a batch, and puts it into the broker's order.
    fn receive(&mut self) {
        let topic = self.topics.get(TOPIC.0, TOPIC.1).unwrap().unwrap();
        let header =
            BatchHeader { payload_bytes: 60, message_count: 1, topic_incarnation: TOPIC.1, ..BatchHeader::zeroed() };
        let at = topic.blog.reserve(header.batch_bytes()).unwrap();
        let origin = Origin { worker: 0, token: 0 };
        self.landed.send(Landed { topic, header, at, in_memory: false, origin }).unwrap();
        assert_eq!(self.delegation.poll(0, 8), 1);
    }
}

/// A topic is deleted while a broker is dead, which holds segments of it. They come back when the broker starts again,
/// whether or not another topic has the slot by then, and not before the topic is gone.
#[test]
fn what_a_dead_broker_held_of_a_deleted_topic_comes_back() {
    for (order, segments) in [(Order::Strong, 1), (Order::Broker, 2)] {
        for (incarnation, state) in [(TOPIC.1, TopicState::Free), (TOPIC.1.next(), TopicState::Live)] {
            let region = region(AllocatorKind::Partitioned, FlushMethod::None, |native: Native| native).unwrap();
            let show = |incarnation, state| {
                publish_topic(&region, LEADER, &TopicConfig { state, ..topic((TOPIC.0, incarnation), order) });
            };
            claim_term(&region, LEADER, Term(1));
            show(TOPIC.1, TopicState::Live);
            activate_term(&region, LEADER, Term(1));
            let all = free_segments(&region);
            Process::start(&region).receive();
            let left = all - segments;
            assert_eq!(free_segments(&region), left);
            drop(Process::start(&region));
            assert_eq!(free_segments(&region), left, "the topic is there");
            show(TOPIC.1, TopicState::Deleting);
            let mut back = Process::start(&region);
            assert_eq!(free_segments(&region), left, "others may still read");
            show(incarnation, state);
            back.delegation.maintain(0);
            assert_eq!(free_segments(&region), all);
        }
    }
}

/// A topic is deleted right after a connection opened it, before the delegation looked.
#[test]
fn a_topic_that_is_deleted_at_once_is_released() {
    let region = region(AllocatorKind::Partitioned, FlushMethod::None, |native: Native| native).unwrap();
    claim_term(&region, LEADER, Term(1));
    activate_term(&region, LEADER, Term(1));
    let mut process = Process::start(&region);
    let show = |state| publish_topic(&region, LEADER, &TopicConfig { state, ..topic(TOPIC, Order::Strong) });
    show(TopicState::Live);
    let opened = process.topics.get(TOPIC.0, TOPIC.1).unwrap().unwrap();
    show(TopicState::Deleting);
    process.delegation.maintain(0);
    assert_eq!(read_released(&region, TOPIC.0, BROKER), Ok(Incarnation::NONE), "a connection holds it");
    drop(opened);
    process.delegation.maintain(0);
    assert_eq!(read_released(&region, TOPIC.0, BROKER), Ok(TOPIC.1));
}

/// A batch comes in part and is given up. Its segment goes to another host, which receives a batch there. What the first
/// host still has in its cache must not be written over it.
#[test]
fn bytes_that_were_given_up_are_not_written_over_another_hosts() {
    let geometry = Geometry {
        max_brokers: 2,
        max_leaders: 1,
        max_topics: 1,
        max_sessions: 1,
        batchlog_slots: 16,
        segment_count: 2,
        ..Geometry::with_segments_of(1 << 20, AllocatorKind::Leader)
    };
    let world = World::new(Layout::new(&geometry).region_bytes, 1, Turbulence::CALM, None);
    let near = Region::format(Simulated::join(&world, || {}), &geometry, Uuid::nil(), 0).unwrap();
    let far = Region::open(Simulated::join(&world, || {})).unwrap();
    let pool: Arc<dyn SegmentAllocator> = Arc::new(PartitionAllocator::of_leader(near.clone()));
    let blog = |region: &Region<Simulated>, broker| {
        let id = BlogId { topic: TOPIC.0, incarnation: Incarnation(1), broker };
        Blog::new(region.clone(), id, 0, Arc::clone(&pool))
    };
    let (own, other) = (blog(&near, BrokerId(0)), blog(&far, BrokerId(1)));
    let whole = geometry.segment_bytes;
    let given_up = own.reserve(whole).unwrap();
    near.fabric().write_bytes(given_up, &[1; 256]);
    own.give_up(given_up, whole);
    // A segment is retired once the next one is begun.
    own.settle(own.reserve(64).unwrap());
    let [retired] = own.retired()[..] else { panic!("one segment is full") };
    own.release(retired.segment);

    let at = other.reserve(256).unwrap();
    assert_eq!(at, given_up);
    far.fabric().write_bytes(at, &[2; 256]);
    far.fabric().flush(at, 256, Site::PayloadFlush);
    far.fabric().fence(Site::PayloadFlush);
    // To read it there, the first host drops what it has of these lines. Real memory gets what is dirty among that.
    near.fabric().invalidate(at, 256, Site::PayloadRead);
    let mut found = [0; 256];
    near.fabric().read_bytes(at, &mut found);
    assert_eq!(found, [2; 256]);
}
