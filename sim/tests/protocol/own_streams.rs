//! Topics without a global order: each broker has a stream of its own, with positions of its own.

use bytemuck::Zeroable;
use crossbeam_channel::{Receiver, Sender, bounded, unbounded};
use embarcadero_broker::delegation::{Delegation, FlushGroup, Landed, OrderedLocally, Origin};
use embarcadero_broker::replica::format::Identity;
use embarcadero_broker::replica::medium::Medium;
use embarcadero_broker::replica::replicator::{ReplicaOptions, Replicator};
use embarcadero_broker::replica::store::StoreOptions;
use embarcadero_broker::topics::{Topic, TopicTable};
use embarcadero_cxl::broker_table::{BrokerInfo, publish_broker};
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::{AllocatorKind, LeaderArea};
use embarcadero_cxl::leadership::{LeaderInfo, activate_term, claim_term, publish_leader};
use embarcadero_cxl::order_index::{OrderIndexReader, StreamId, read_extent};
use embarcadero_cxl::replication::{Replication, read_replicated};
use embarcadero_cxl::segment::{PartitionAllocator, free_segments};
use embarcadero_cxl::topic_table::{TopicConfig, publish_topic};
use embarcadero_cxl::{Native, Region};
use embarcadero_sim::SimulatedMedium;
use embarcadero_sim::testbed::{TOPIC, region, topic};
use embarcadero_wire::{BatchHeader, BrokerId, Order, Stream, Term};
use std::sync::Arc;

const BROKERS: [BrokerId; 2] = [BrokerId(0), BrokerId(1)];
/// Payload of a batch. Few fit into a segment of 16 MiB, and a topic keeps two of them.
const PAYLOAD_BYTES: u32 = 5 << 20;

fn stream(broker: BrokerId) -> StreamId {
    StreamId { topic: TOPIC.0, stream: Stream::of(broker) }
}

fn batch() -> BatchHeader {
    BatchHeader { payload_bytes: PAYLOAD_BYTES, message_count: 1, topic_incarnation: TOPIC.1, ..BatchHeader::zeroed() }
}

/// Broker that orders by itself.
struct Host {
    topics: Arc<TopicTable<Native>>,
    topic: Arc<Topic<Native>>,
    delegation: Delegation<Native>,
    landed: Sender<Landed<Native>>,
    _acks: Receiver<OrderedLocally>,
}

impl Host {
    fn start(region: &Region<Native>, broker: BrokerId) -> Self {
        let address = "127.0.0.1:1".parse().unwrap();
        let info = BrokerInfo {
            id: broker,
            incarnation: TOPIC.1,
            data: address,
            control: address,
            process_id: 1,
            lock_node: 1,
            running: true,
        };
        publish_broker(region, &info);
        let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), broker));
        let topics = Arc::new(TopicTable::new(region.clone(), broker, pool));
        let topic = topics.get(TOPIC.0, TOPIC.1).unwrap().unwrap();
        let ((landed, queue), (acks, ordered)) = (unbounded(), bounded(64));
        let delegation = Delegation::new(Arc::clone(&topics), queue, vec![acks], FlushGroup::default());
        Self { topics, topic, delegation, landed, _acks: ordered }
    }

    /// Receives and orders batches when the wall clock is at `now_us`.
    fn receive(&mut self, batches: usize, now_us: u64) {
        for _ in 0..batches {
            let header = batch();
            let at = self.topic.blog.reserve(header.batch_bytes()).unwrap();
            let origin = Origin { worker: 0, token: 0 };
            self.landed.send(Landed { topic: Arc::clone(&self.topic), header, at, in_memory: true, origin }).unwrap();
        }
        assert_eq!(self.delegation.poll(now_us, batches), batches);
    }
}

/// Makes a region with a topic in broker order that keeps two batches of each broker, on two disks.
fn two_brokers() -> (Region<Native>, [Host; 2]) {
    let region = region(AllocatorKind::Partitioned, FlushMethod::None, |native: Native| native).unwrap();
    let (leader, term) = (LeaderArea(BROKERS[0]), Term(1));
    let config = TopicConfig {
        ack_level: 2,
        replication_factor: 2,
        retention_bytes: 2 * batch().batch_bytes(),
        ..topic(TOPIC, Order::Broker)
    };
    claim_term(&region, leader, term);
    let (broker, incarnation, both) = (BROKERS[0], TOPIC.1, 0b11);
    publish_leader(&region, &LeaderInfo { term, broker, incarnation, broker_mask: both, pinning_mask: both });
    publish_topic(&region, leader, &config);
    activate_term(&region, leader, term);
    let hosts = BROKERS.map(|broker| Host::start(&region, broker));
    (region, hosts)
}

fn replicator(host: &Host) -> Replicator<Native> {
    let open = |_: &Identity| -> Box<dyn Medium> { Box::new(SimulatedMedium::default()) };
    let store = StoreOptions { file_bytes: 1 << 30, retention_bytes: 0 };
    let options = ReplicaOptions { group_bytes: batch().batch_bytes(), patience_us: u64::MAX / 2, store };
    Replicator::new(Arc::clone(&host.topics), Box::new(open), options).unwrap()
}

/// A broker's own stream is trimmed further than the stream that it replicates is long.
#[test]
fn another_brokers_stream_is_replicated_by_its_own_positions() {
    let (region, [mut replica, mut source]) = two_brokers();
    replica.receive(12, 1);
    replica.delegation.maintain(1);
    assert_eq!(read_extent(&region, stream(BROKERS[0])).unwrap().trimmed, 10);
    source.receive(3, 1);
    let mut replicator = replicator(&replica);
    replicator.maintain(1);
    // A group has one batch, and both streams have their turn.
    for _ in 0..8 {
        replicator.poll();
    }
    let progress = Replication { topic: TOPIC.0, replica: BROKERS[0], source: BROKERS[1] };
    assert_eq!(read_replicated(&region, progress), 3);
}

/// A reader of another broker's stream stands at its begin.
#[test]
fn a_pin_on_another_brokers_stream_keeps_no_memory() {
    let (region, [mut reclaiming, reading]) = two_brokers();
    let pins = &reading.topic.pins;
    pins.set(pins.register(), 0).unwrap();
    reclaiming.receive(12, 1);
    let taken = free_segments(&region);
    reclaiming.delegation.maintain(1);
    // Three batches fill a segment, and two batches are kept.
    assert_eq!(free_segments(&region), taken + 3);
}

/// The clock of a broker is set back, by a little and by a day.
#[test]
fn times_of_an_own_order_never_go_back() {
    const DAY_US: u64 = 86_400_000_000;
    let (region, [mut host, _]) = two_brokers();
    let clock = [2 * DAY_US, 2 * DAY_US - 10, DAY_US, DAY_US + 10, 2 * DAY_US + 5_000_000];
    for now_us in clock {
        host.receive(2, now_us);
    }
    let mut reader = OrderIndexReader::new(region, stream(BROKERS[0]));
    assert_eq!(reader.poll(), 10);
    let times: Vec<u64> = (0..10).map(|position| reader.read(position).unwrap().ordered_us).collect();
    assert!(times.is_sorted(), "{times:?}");
    assert_eq!((times[0], times[9]), (clock[0], clock[4]), "they follow the clock where it goes on");
}
