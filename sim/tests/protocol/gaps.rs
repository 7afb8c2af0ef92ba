//! Gaps of sessions: whose lease is excused and for how long, and which session is fenced before its lease is over.

use bytemuck::Zeroable;
use crossbeam_channel::{Sender, bounded, unbounded};
use embarcadero_broker::delegation::{Delegation, FlushGroup, Landed, Origin};
use embarcadero_broker::sequencer::{
    Command, GROUP_BATCHES, Memory, Predecessor, Sequencer, SequencerLimits, SessionRequest, Takeover,
};
use embarcadero_broker::session_board::SessionHold;
use embarcadero_broker::topics::TopicTable;
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::{AllocatorKind, Geometry, Layout, LeaderArea, SessionState};
use embarcadero_cxl::leadership::{LeaderInfo, publish_leader};
use embarcadero_cxl::segment::{BitmapAllocator, PartitionAllocator, SegmentAllocator, segments_of};
use embarcadero_cxl::session_connections::{Connected, ConnectionsReader, ConnectionsWriter};
use embarcadero_cxl::session_table::{Session, read_session_at};
use embarcadero_cxl::topic_table::TopicConfig;
use embarcadero_cxl::{Fabric, Mapping, Native, Region};
use embarcadero_sim::testbed::{TOPIC, opening, topic};
use embarcadero_sim::{Simulated, Turbulence, World};
use embarcadero_wire::{BatchHeader, BrokerId, ClientId, Incarnation, Order, Term};
use std::sync::{Arc, Mutex};
use uuid::Uuid;

/// Brokers: the first leads, and clients publish to the second.
const BROKERS: [BrokerId; 2] = [BrokerId(0), BrokerId(1)];
/// Places of the brokers in a rig.
const NEAR: usize = 0;
const FAR: usize = 1;
/// Time between two looks of the leader.
const ROUND_US: u64 = 1000;
const ABANDONED_US: u64 = 5 * ROUND_US;
const GAP_US: u64 = 100 * ROUND_US;
const EXCUSE_US: u64 = 50 * ROUND_US;
/// Time in which a broker's line reaches the leader, and what the leader fences gives back its memory.
const SLACK_US: u64 = 5 * ROUND_US;
/// Bytes of a batch of which four fill a segment, and of one that fills nothing.
const LARGE: u32 = 256 << 10;
const SMALL: u32 = 256;

fn geometry(allocator: AllocatorKind) -> Geometry {
    Geometry {
        max_brokers: 2,
        max_leaders: 2,
        max_topics: 1,
        max_sessions: 4,
        batchlog_slots: 16,
        segment_count: 8,
        ..Geometry::with_segments_of(1 << 20, allocator)
    }
}

/// Broker as it receives.
struct Host<F: Fabric> {
    topics: Arc<TopicTable<F>>,
    landed: Sender<Landed<F>>,
    delegation: Delegation<F>,
}

impl<F: Fabric> Host<F> {
    fn start(region: &Region<F>, broker: BrokerId, pool: &Arc<dyn SegmentAllocator>) -> Self {
        let topics = Arc::new(TopicTable::new(region.clone(), broker, Arc::clone(pool)));
        let ((landed, queue), (acks, _)) = (unbounded(), bounded(1));
        let delegation = Delegation::new(Arc::clone(&topics), queue, vec![acks], FlushGroup::default());
        Self { topics, landed, delegation }
    }

    /// Opens a connection of a session.
    fn connect(&self, session: &Session) -> SessionHold {
        self.topics.sessions().hold(session.slot)
    }

    /// Receives a batch of `bytes` bytes. Returns false if there is no memory.
    fn receive(&mut self, session: &Session, sequence: u64, bytes: u32) -> bool {
        let topic = self.topics.get(TOPIC.0, TOPIC.1).unwrap().unwrap();
        let header = BatchHeader {
            client_id: session.client_id,
            sequence,
            session_epoch: session.epoch,
            session_slot: session.slot,
            topic: TOPIC.0,
            topic_incarnation: TOPIC.1,
            payload_bytes: bytes - 68,
            message_count: 1,
            ..BatchHeader::zeroed()
        };
        let Ok(at) = topic.blog.reserve(header.batch_bytes()) else { return false };
        let origin = Origin { worker: 0, token: 0 };
        self.landed.send(Landed { topic, header, at, in_memory: true, origin }).unwrap();
        true
    }
}

/// Two brokers, the first of which leads.
struct Rig<F: Fabric> {
    regions: [Region<F>; 2],
    pools: [Arc<dyn SegmentAllocator>; 2],
    hosts: [Host<F>; 2],
    area: LeaderArea,
    commands: Sender<Command>,
    sequencer: Sequencer<F>,
    now_us: u64,
}

fn lead<F: Fabric>(
    region: &Region<F>,
    pool: &Arc<dyn SegmentAllocator>,
    (area, term): (LeaderArea, Term),
    now_us: u64,
) -> (Sender<Command>, Sequencer<F>) {
    let (commands, queue) = unbounded();
    let memory = Memory { region: region.clone(), pool: Arc::clone(pool), mirror: None };
    let limits = SequencerLimits {
        gap_us: GAP_US,
        excuse_us: EXCUSE_US,
        abandoned_us: ABANDONED_US,
        ..SequencerLimits::LASTING
    };
    let before = Predecessor::Gone(Term(term.0 - 1));
    let takeover = Takeover { memory, area, term, before, limits, commands: queue };
    (commands, Sequencer::recover(takeover, now_us).unwrap())
}

/// Makes a rig on two hosts without coherence. Returns it with the memory that they share.
fn simulated(allocator: AllocatorKind, order: Order) -> (Rig<Simulated>, Arc<Mutex<World>>) {
    let geometry = geometry(allocator);
    let world = World::new(Layout::new(&geometry).region_bytes, 1, Turbulence::CALM, None);
    let near = Region::format(Simulated::join(&world, || {}), &geometry, Uuid::nil(), 0).unwrap();
    let far = Region::open(Simulated::join(&world, || {})).unwrap();
    let pools: [Arc<dyn SegmentAllocator>; 2] = if allocator == AllocatorKind::Partitioned {
        [(&near, BROKERS[0]), (&far, BROKERS[1])].map(|(region, broker)| -> Arc<dyn SegmentAllocator> {
            Arc::new(PartitionAllocator::of_broker(region.clone(), broker))
        })
    } else {
        // Brokers ask the leader.
        let pool: Arc<dyn SegmentAllocator> = Arc::new(PartitionAllocator::of_leader(near.clone()));
        [Arc::clone(&pool), pool]
    };
    (Rig::new([near, far], pools, order), world)
}

/// Makes a rig in strong order, without the memory of its hosts.
fn strong() -> Rig<Simulated> {
    simulated(AllocatorKind::Partitioned, Order::Strong).0
}

/// Makes a rig whose brokers share an atomic bitmap.
fn coherent(order: Order) -> Rig<Native> {
    let geometry = geometry(AllocatorKind::Bitmap);
    let mapping = Mapping::anonymous(Layout::new(&geometry).region_bytes).unwrap();
    let native = Native::new(mapping, FlushMethod::None).unwrap();
    let region = Region::format(native, &geometry, Uuid::nil(), 0).unwrap();
    let pool: Arc<dyn SegmentAllocator> = Arc::new(BitmapAllocator::new(region.clone()));
    Rig::new([region.clone(), region], [Arc::clone(&pool), pool], order)
}

impl<F: Fabric> Rig<F> {
    fn new(regions: [Region<F>; 2], pools: [Arc<dyn SegmentAllocator>; 2], order: Order) -> Self {
        let area = LeaderArea(BROKERS[NEAR]);
        let (commands, sequencer) = lead(&regions[NEAR], &pools[NEAR], (area, Term(1)), 0);
        let hosts = [NEAR, FAR].map(|host| Host::start(&regions[host], BROKERS[host], &pools[host]));
        let mut rig = Self { regions, pools, hosts, area, commands, sequencer, now_us: 1 };
        let config = TopicConfig { retention_bytes: 2 * u64::from(LARGE), ..topic(TOPIC, order) };
        let (reply, created) = bounded(1);
        rig.commands.send(Command::OpenTopic(config, reply)).unwrap();
        rig.round();
        created.recv().unwrap().unwrap();
        rig
    }

    /// Opens a session of a client that wants acknowledgements of a level.
    fn open_at(&mut self, client: u64, ack_level: u8) -> Session {
        let (reply, answer) = bounded(1);
        let request = SessionRequest { ack_level, ..opening(TOPIC.0, ClientId(client)) };
        self.commands.send(Command::OpenSession { request, reply }).unwrap();
        self.order();
        answer.recv().unwrap().unwrap()
    }

    fn open(&mut self, client: u64) -> Session {
        self.open_at(client, 1)
    }

    /// Puts what was received before the leader, which orders it.
    fn order(&mut self) {
        for host in &mut self.hosts {
            host.delegation.poll(self.now_us, 64);
        }
        while self.sequencer.poll(self.now_us, GROUP_BATCHES) > 0 {}
    }

    /// Lets brokers and leader look around.
    fn maintain(&mut self) {
        self.now_us += ROUND_US;
        self.hosts.iter_mut().for_each(|host| host.delegation.maintain(self.now_us));
        self.sequencer.maintain(self.now_us);
    }

    fn round(&mut self) {
        self.order();
        self.maintain();
    }

    fn run_for(&mut self, time_us: u64) {
        (0..time_us / ROUND_US).for_each(|_| self.round());
    }

    /// Makes a session of which batch 1 is there and batch 0 is not.
    fn gap(&mut self, client: u64) -> Session {
        let session = self.open(client);
        assert!(self.hosts[FAR].receive(&session, 1, LARGE));
        self.order();
        session
    }

    /// Publishes another client's batches to the second broker until it has no memory for more. Returns the client's
    /// session, and the number of its next batch.
    fn fill(&mut self) -> (Session, u64) {
        let other = self.open(99);
        let mut next = 0;
        for _ in 0..10 {
            while self.hosts[FAR].receive(&other, next, LARGE) {
                next += 1;
                self.order();
            }
            self.maintain();
        }
        assert!(segments_of(&self.regions[NEAR], BROKERS[FAR]).is_short());
        (other, next)
    }

    /// Returns the time until the second broker has memory again, up to `most_us`.
    fn time_until_room(&mut self, (session, sequence): (Session, u64), most_us: u64) -> Option<u64> {
        let begun_us = self.now_us;
        while self.now_us - begun_us < most_us {
            self.round();
            if self.hosts[FAR].receive(&session, sequence, LARGE) {
                return Some(self.now_us - begun_us);
            }
        }
        None
    }

    fn is_open(&self, session: &Session) -> bool {
        let row = read_session_at(&self.regions[self.area.0.index()], self.area, session.slot).used().unwrap();
        (row.epoch, row.state) == (session.epoch, SessionState::Open)
    }

    /// Returns the time until a session is fenced, up to `most_us`.
    fn time_until_fenced(&mut self, session: &Session, most_us: u64) -> Option<u64> {
        let begun_us = self.now_us;
        while self.now_us - begun_us < most_us {
            self.round();
            if !self.is_open(session) {
                return Some(self.now_us - begun_us);
            }
        }
        None
    }

    /// The leader says which brokers are alive.
    fn say_alive(&self, broker_mask: u64) {
        let (broker, term, incarnation) = (self.area.0, Term(1), Incarnation(1));
        publish_leader(&self.regions[NEAR], &LeaderInfo { term, broker, incarnation, broker_mask, pinning_mask: 0b11 });
    }
}

/// Runs a publisher that has a gap while the pool gets full, and then `leaves` or stays. Returns the time from then until
/// there is memory again.
fn time_until_a_full_pool_has_room<F: Fabric>(mut rig: Rig<F>, leaves: bool) -> u64 {
    let session = rig.gap(1);
    let connection = rig.hosts[FAR].connect(&session);
    let next = rig.fill();
    assert!(rig.is_open(&session));
    let kept = (!leaves).then_some(connection);
    let time_us = rig.time_until_room(next, 2 * GAP_US);
    drop(kept);
    assert_eq!(rig.sequencer.stats().fenced, 1);
    time_us.unwrap()
}

#[test]
fn a_pool_that_an_abandoned_gap_keeps_full_comes_free() {
    for leaves in [true, false] {
        let times_us = [
            time_until_a_full_pool_has_room(coherent(Order::Strong), leaves),
            time_until_a_full_pool_has_room(simulated(AllocatorKind::Partitioned, Order::Strong).0, leaves),
            time_until_a_full_pool_has_room(simulated(AllocatorKind::Leader, Order::Strong).0, leaves),
        ];
        let soon = |time_us: &u64| *time_us <= ABANDONED_US + SLACK_US;
        assert!(times_us.iter().all(|time_us| soon(time_us) == leaves), "leaves: {leaves}, {times_us:?}");
    }
}

/// Another broker's partition is full, in which nothing of the session is.
#[test]
fn memory_that_nothing_of_a_session_lies_in_ends_no_lease() {
    let mut rig = strong();
    let keeper = rig.gap(2);
    let _open = rig.hosts[FAR].connect(&keeper);
    rig.fill();
    let session = rig.open(1);
    assert!(rig.hosts[NEAR].receive(&session, 1, SMALL));
    assert!(rig.time_until_fenced(&session, 2 * GAP_US).unwrap() > GAP_US - SLACK_US);
}

#[test]
fn while_there_is_memory_an_abandoned_gap_keeps_its_lease() {
    let mut rig = strong();
    let session = rig.gap(1);
    assert!(rig.time_until_fenced(&session, 2 * GAP_US).unwrap() > GAP_US - SLACK_US);
}

/// The leader does not keep up with a broker that has something of an abandoned session.
#[test]
fn a_full_batchlog_ends_the_lease_of_an_abandoned_gap() {
    for batches in [15, 16] {
        let mut rig = strong();
        let session = rig.gap(1);
        let other = rig.open(2);
        for sequence in 0..batches {
            assert!(rig.hosts[FAR].receive(&other, sequence, SMALL));
        }
        rig.hosts[FAR].delegation.poll(rig.now_us, 64);
        (0..(ABANDONED_US + SLACK_US) / ROUND_US).for_each(|_| rig.maintain());
        assert_eq!(rig.is_open(&session), batches < 16);
    }
}

#[test]
fn only_the_session_that_waits_for_room_is_excused() {
    let mut rig = strong();
    let [waiting, other] = [1, 2].map(|client| rig.gap(client));
    let [mut held, _open] = [&waiting, &other].map(|session| rig.hosts[FAR].connect(session));
    held.set_waiting(true);
    rig.run_for(GAP_US + SLACK_US);
    assert_eq!((rig.is_open(&waiting), rig.is_open(&other)), (true, false));
    // Its lease runs from when it waits no more.
    held.set_waiting(false);
    rig.run_for(SLACK_US);
    assert!(rig.is_open(&waiting));
    rig.run_for(GAP_US);
    assert!(!rig.is_open(&waiting));
}

#[test]
fn an_excuse_has_an_end() {
    let mut rig = strong();
    let session = rig.gap(1);
    let mut held = rig.hosts[FAR].connect(&session);
    held.set_waiting(true);
    let lasted_us = rig.time_until_fenced(&session, 3 * GAP_US).unwrap();
    let most_us = GAP_US + EXCUSE_US;
    assert!((most_us - SLACK_US..most_us + SLACK_US).contains(&lasted_us), "{lasted_us}");
}

/// The gap closes and another one opens: that has a lease of its own.
#[test]
fn each_gap_has_an_excuse_of_its_own() {
    let mut rig = strong();
    let session = rig.gap(1);
    let mut held = rig.hosts[FAR].connect(&session);
    held.set_waiting(true);
    rig.run_for(GAP_US);
    for sequence in [0, 3] {
        assert!(rig.hosts[FAR].receive(&session, sequence, SMALL));
    }
    rig.run_for(GAP_US);
    assert!(rig.is_open(&session));
}

/// The second broker takes over, and has seen nothing of what its predecessor saw.
#[test]
fn a_new_leader_goes_by_what_brokers_show() {
    let mut rig = strong();
    let [waiting, gone, there] = [1, 2, 3].map(|client| rig.gap(client));
    let [mut held, lost, _open] = [&waiting, &gone, &there].map(|session| rig.hosts[FAR].connect(session));
    held.set_waiting(true);
    rig.fill();
    drop(lost);
    rig.area = LeaderArea(BROKERS[FAR]);
    let leader = (rig.area, Term(2));
    (rig.commands, rig.sequencer) = lead(&rig.regions[FAR], &rig.pools[FAR], leader, rig.now_us);
    rig.round();
    assert!([&waiting, &gone, &there].map(|session| rig.is_open(session)).iter().all(|open| *open));
    rig.run_for(ABANDONED_US + SLACK_US);
    assert_eq!([&waiting, &gone, &there].map(|session| rig.is_open(session)), [true, false, true]);
    rig.run_for(GAP_US);
    assert_eq!([&waiting, &gone, &there].map(|session| rig.is_open(session)), [true, false, false]);
}

#[test]
fn a_dead_broker_excuses_nobody_and_holds_nobody() {
    let mut rig = strong();
    let [waiting, there] = [1, 2].map(|client| rig.gap(client));
    let mut held = rig.hosts[FAR].connect(&waiting);
    held.set_waiting(true);
    let _open = rig.hosts[FAR].connect(&there);
    rig.fill();
    rig.run_for(ABANDONED_US + SLACK_US);
    assert_eq!([&waiting, &there].map(|session| rig.is_open(session)), [true, true]);
    rig.say_alive(0b01);
    rig.run_for(ABANDONED_US + SLACK_US);
    assert_eq!([&waiting, &there].map(|session| rig.is_open(session)), [false, false]);
}

#[test]
fn a_client_that_goes_to_another_broker_keeps_its_session() {
    let mut rig = strong();
    let session = rig.gap(1);
    let before = rig.hosts[FAR].connect(&session);
    rig.fill();
    drop(before);
    rig.run_for(ABANDONED_US - 2 * ROUND_US);
    let _after = rig.hosts[NEAR].connect(&session);
    rig.run_for(GAP_US / 2);
    assert!(rig.is_open(&session));
}

/// Nothing else that the broker does has to bring it to memory.
#[test]
fn what_a_broker_shows_of_its_connections_is_in_memory() {
    let rig = strong();
    let slots = rig.regions[NEAR].geometry().sessions();
    let shown = |region: &Region<Simulated>| {
        let mut reader = ConnectionsReader::new(region, 1 << BROKERS[FAR].0);
        slots.clone().map(|slot| reader.of(slot)).collect::<Vec<_>>()
    };
    let mut writer = ConnectionsWriter::new(rig.regions[FAR].clone(), BROKERS[FAR]);
    for connected in [Connected::Open, Connected::Waiting, Connected::No] {
        writer.publish(|slot| if slot.0 == 2 { connected } else { Connected::No });
        assert_eq!(shown(&rig.regions[NEAR]), [Connected::No, Connected::No, connected, Connected::No]);
    }
}

/// A broker dies and starts again on another host, which has read its lines before.
#[test]
fn a_broker_that_starts_again_has_no_connection_of_its_last_process() {
    let (mut rig, world) = simulated(AllocatorKind::Partitioned, Order::Strong);
    let session = rig.open(1);
    let other_host = Region::open(Simulated::join(&world, || {})).unwrap();
    let shown = |region: &Region<Simulated>| ConnectionsReader::new(region, 0b11).of(session.slot);
    assert_eq!(shown(&other_host), Connected::No);
    let mut held = rig.hosts[FAR].connect(&session);
    held.set_waiting(true);
    rig.round();
    assert_eq!(shown(&rig.regions[NEAR]), Connected::Waiting);
    rig.hosts[FAR] = Host::start(&other_host, BROKERS[FAR], &rig.pools[FAR]);
    rig.round();
    assert_eq!(shown(&rig.regions[NEAR]), Connected::No);
}

#[test]
fn without_acknowledgements_a_client_may_leave() {
    let mut rig = strong();
    let session = rig.open_at(1, 0);
    assert!(rig.hosts[FAR].receive(&session, 1, LARGE));
    rig.order();
    rig.fill();
    rig.run_for(ABANDONED_US + SLACK_US);
    assert!(rig.is_open(&session));
    rig.run_for(GAP_US);
    assert!(!rig.is_open(&session), "its lease ends all the same");
}

fn gap_in_total_order<F: Fabric>(mut rig: Rig<F>) {
    let session = rig.gap(1);
    let other = rig.open(2);
    let mut next = 0;
    for _ in 0..2 * GAP_US / ROUND_US {
        if rig.hosts[FAR].receive(&other, next, LARGE) {
            next += 1;
        }
        rig.round();
    }
    let pool_bytes = 8 << 20;
    assert!(next * u64::from(LARGE) > 2 * pool_bytes, "{next} batches found room");
    assert!(rig.is_open(&session));
}

#[test]
fn in_total_order_a_gap_keeps_no_memory_and_ends_no_session() {
    gap_in_total_order(coherent(Order::Total));
    gap_in_total_order(simulated(AllocatorKind::Partitioned, Order::Total).0);
    gap_in_total_order(simulated(AllocatorKind::Leader, Order::Total).0);
}
