//! A broker process that another process of its id has superseded.

use bytemuck::Zeroable;
use crossbeam_channel::{bounded, unbounded};
use embarcadero_broker::delegation::{Delegation, FlushGroup, Landed, Origin};
use embarcadero_broker::topics::{Topic, TopicTable};
use embarcadero_cxl::Region;
use embarcadero_cxl::batchlog::BatchlogReader;
use embarcadero_cxl::broker_table::{BrokerInfo, publish_broker, read_pulse};
use embarcadero_cxl::layout::{AllocatorKind, Geometry, Layout, LeaderArea};
use embarcadero_cxl::leadership::{LeaderInfo, activate_term, claim_term, publish_leader};
use embarcadero_cxl::segment::PartitionAllocator;
use embarcadero_cxl::topic_table::publish_topic;
use embarcadero_sim::testbed::topic;
use embarcadero_sim::{Simulated, Turbulence, World};
use embarcadero_wire::{BatchHeader, BrokerId, Incarnation, Order, Term, TopicId};
use std::sync::Arc;

const TOPIC: TopicId = TopicId(0);
const BROKER: BrokerId = BrokerId(0);
const LEADER: LeaderArea = LeaderArea(BROKER);

/// Makes a batch of a topic that lies in a broker's Blog.
fn land(topic: &Arc<Topic<Simulated>>) -> Landed<Simulated> {
    let header =
        BatchHeader { payload_bytes: 60, message_count: 1, topic_incarnation: Incarnation(1), ..BatchHeader::zeroed() };
    let at = topic.blog.reserve(header.batch_bytes()).expect("there is room");
    Landed { topic: Arc::clone(topic), header, at, in_memory: false, origin: Origin { worker: 0, token: 0 } }
}

/// A process stood still while another took its place, on another host. It publishes neither what it received meanwhile nor
/// its heartbeat.
#[test]
fn a_process_that_was_replaced_writes_nothing_any_more() {
    let base = Geometry::with_segments_of(1 << 20, AllocatorKind::Partitioned);
    let geometry = Geometry {
        max_brokers: 1,
        max_leaders: 1,
        max_topics: 1,
        max_sessions: 1,
        batchlog_slots: 16,
        segment_count: 4,
        ..base
    };
    let world = World::new(Layout::new(&geometry).region_bytes, 1, Turbulence::CALM, None);
    let [old, new] = [0, 1].map(|_| Simulated::join(&world, || {}));
    Region::format(old.clone(), &geometry, uuid::Uuid::nil(), 0).expect("it fits");
    let address = std::net::SocketAddr::from(([10, 0, 0, 1], 1));
    let incarnation = Incarnation(1);
    let info = BrokerInfo {
        id: BROKER,
        incarnation,
        data: address,
        control: address,
        process_id: 1,
        running: true,
        lock_node: 1,
    };
    let config = topic((TOPIC, Incarnation(1)), Order::Strong);
    let [old, new] = [old, new].map(|fabric| Region::open(fabric).expect("it is a region"));
    claim_term(&old, LEADER, Term(1));
    publish_leader(&old, &LeaderInfo { term: Term(1), broker: BROKER, incarnation, broker_mask: 1, pinning_mask: 1 });
    publish_topic(&old, LEADER, &config);
    activate_term(&old, LEADER, Term(1));
    publish_broker(&old, &info);
    let start = |region: &Region<Simulated>, incarnation| {
        let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), BROKER));
        let topics = Arc::new(TopicTable::new(region.clone(), BROKER, pool));
        let topic = topics.get(TOPIC, Incarnation(1)).expect("there is a leader").expect("the topic is there");
        let ((landed, queue), (acks, _)) = (unbounded(), bounded(1));
        let delegation = Delegation::new(topics, queue, vec![acks], FlushGroup::default());
        (delegation.of_incarnation(incarnation), landed, topic)
    };
    let (mut delegation, landed, topic) = start(&old, incarnation);
    landed.send(land(&topic)).expect("it is taken");
    assert_eq!(delegation.poll(0, 8), 1);
    let mut reader = BatchlogReader::new(new.clone(), TOPIC, BROKER, 0);
    assert_eq!(reader.available(8).unwrap(), 1);
    reader.take().unwrap();
    let before = read_pulse(&new, BROKER);
    publish_broker(&new, &BrokerInfo { incarnation: incarnation.next(), ..info });
    let (mut successor, landed_there, topic_there) = start(&new, incarnation.next());
    landed.send(land(&topic)).expect("it is taken");
    delegation.poll(1, 8);
    delegation.beat();
    assert!(delegation.is_superseded() && !successor.is_superseded());
    assert_eq!((reader.available(8).unwrap(), read_pulse(&new, BROKER)), (0, before), "it wrote on");
    landed_there.send(land(&topic_there)).expect("it is taken");
    assert_eq!(successor.poll(1, 8), 1);
    assert_eq!(reader.available(8).unwrap(), 1);
}
