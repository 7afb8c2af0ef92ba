//! Session slots: who gets one when all are in use.

use bytemuck::Zeroable;
use crossbeam_channel::{Sender, bounded, unbounded};
use embarcadero_broker::sequencer::{
    Command, GROUP_BATCHES, Memory, Predecessor, Sequencer, SequencerLimits, SessionError, Takeover,
};
use embarcadero_cxl::batchlog::{BatchlogWriter, Written};
use embarcadero_cxl::broker_table::Pulse;
use embarcadero_cxl::layout::{AllocatorKind, BatchEntry, Geometry, Layout, LeaderArea, SessionState};
use embarcadero_cxl::segment::PartitionAllocator;
use embarcadero_cxl::session_table::{Session, read_session_at};
use embarcadero_cxl::{Region, Site};
use embarcadero_sim::testbed::{opening, topic};
use embarcadero_sim::{Simulated, Turbulence, World};
use embarcadero_wire::{BrokerId, ClientId, Incarnation, Order, Term, TopicId};
use std::sync::{Arc, Mutex};

const TOPIC: TopicId = TopicId(0);
const BROKER: BrokerId = BrokerId(0);
const AREA: LeaderArea = LeaderArea(BROKER);
const GAP_US: u64 = 1000;
const IDLE_US: u64 = 100_000;

/// Leader of a region with two session slots, and a topic.
struct Bench {
    world: Arc<Mutex<World>>,
    region: Region<Simulated>,
    commands: Sender<Command>,
    sequencer: Sequencer<Simulated>,
}

/// Takes the region over at time `now_us`.
fn lead(region: &Region<Simulated>, term: u64, now_us: u64) -> (Sender<Command>, Sequencer<Simulated>) {
    let (commands, queue) = unbounded();
    let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), BROKER));
    let memory = Memory { region: region.clone(), pool, mirror: None };
    let limits = SequencerLimits { gap_us: GAP_US, idle_us: IDLE_US, ..SequencerLimits::LASTING };
    let before = Predecessor::Gone(Term(term - 1));
    let takeover = Takeover { memory, area: AREA, term: Term(term), before, limits, commands: queue };
    (commands, Sequencer::recover(takeover, now_us).unwrap())
}

impl Bench {
    fn new(order: Order) -> Self {
        let geometry = Geometry {
            max_brokers: 1,
            max_leaders: 1,
            max_topics: 1,
            max_sessions: 2,
            batchlog_slots: 16,
            segment_count: 4,
            ..Geometry::with_segments_of(1 << 20, AllocatorKind::Partitioned)
        };
        let world = World::new(Layout::new(&geometry).region_bytes, 1, Turbulence::CALM, None);
        let region = Region::format(Simulated::join(&world, || {}), &geometry, uuid::Uuid::nil(), 0).unwrap();
        let (commands, mut sequencer) = lead(&region, 1, 0);
        let (reply, created) = bounded(1);
        commands.send(Command::OpenTopic(topic((TOPIC, Incarnation(1)), order), reply)).unwrap();
        sequencer.poll(0, 1);
        created.recv().unwrap().unwrap();
        Self { world, region, commands, sequencer }
    }

    /// Opens a session of a client at time `now_us`.
    fn open(&mut self, client: u64, now_us: u64) -> Result<Session, SessionError> {
        let (reply, answer) = bounded(1);
        let request = opening(TOPIC, ClientId(client));
        self.commands.send(Command::OpenSession { request, reply }).unwrap();
        self.sequencer.poll(now_us, 1);
        answer.recv().unwrap()
    }

    /// Publishes batches of a session in the order of `sequences`, and orders them at time `now_us`.
    fn publish(&mut self, session: &Session, sequences: &[u64], now_us: u64) {
        let mut log = BatchlogWriter::new(self.region.clone(), TOPIC, BROKER);
        for sequence in sequences {
            assert_eq!(log.has_room(), Ok(true));
            log.append(BatchEntry {
                location: self.region.layout().segments,
                client_id: session.client_id,
                sequence: *sequence,
                session_epoch: session.epoch,
                session_slot: session.slot,
                topic_incarnation: Incarnation(1),
                bytes: 1,
                message_count: 1,
                ..BatchEntry::zeroed()
            });
        }
        log.publish(Written::default());
        Pulse::new(self.region.clone(), BROKER).announce(sequences.len() as u64);
        while self.sequencer.poll(now_us, GROUP_BATCHES) > 0 {}
    }

    /// Returns the client in each slot, and whether its session is open.
    fn clients(&self) -> Vec<(u64, bool)> {
        let read = |slot| read_session_at(&self.region, AREA, slot).used().unwrap();
        let sessions = self.region.geometry().sessions().map(read);
        sessions.map(|session| (session.client_id.0, session.state == SessionState::Open)).collect()
    }

    fn session_reads(&self) -> u64 {
        self.world.lock().unwrap().visits(Site::SessionRead)
    }
}

/// Somebody opens sessions and does not use them. A newcomer gets one of those soon, and no publisher loses its own.
#[test]
fn a_session_that_was_never_used_is_given_away_before_one_that_was() {
    for (order, sequences) in [(Order::Strong, vec![0]), (Order::Total, vec![0]), (Order::Total, vec![1])] {
        let mut bench = Bench::new(order);
        let used = bench.open(1, 0).unwrap();
        bench.publish(&used, &sequences, 1);
        bench.open(2, 2).unwrap();
        // Both have been silent, the used one for longer.
        assert_eq!(bench.open(3, 2 + GAP_US), Err(SessionError::TableFull(2)));
        let third = bench.open(3, 3 + GAP_US).unwrap();
        assert_ne!(third.slot, used.slot);
        assert_eq!(bench.clients(), [(1, true), (3, true)], "{order:?}");
        // The third may publish as long as any other before it is taken for unused.
        assert_eq!(bench.open(4, 4 + GAP_US), Err(SessionError::TableFull(2)));
        bench.publish(&third, &[third.committed], 5 + GAP_US);
        assert_eq!(bench.open(4, 6 + 3 * GAP_US), Err(SessionError::TableFull(2)));
        // Now both are used, and the first is idle.
        assert_eq!(bench.open(4, 2 + IDLE_US).unwrap().slot, used.slot);
    }
}

/// Batches of topics without a global order do not come to the leader: it does not know who is unused.
#[test]
fn without_a_global_order_nobody_is_taken_for_unused() {
    let mut bench = Bench::new(Order::Broker);
    for client in [1, 2] {
        bench.open(client, 0).unwrap();
    }
    assert_eq!(bench.open(3, IDLE_US), Err(SessionError::TableFull(2)));
    bench.open(3, IDLE_US + 1).unwrap();
}

#[test]
fn a_successor_knows_who_was_unused() {
    let mut bench = Bench::new(Order::Strong);
    let used = bench.open(1, 0).unwrap();
    bench.open(2, 0).unwrap();
    bench.publish(&used, &[0], 1);
    let taken_over_us = 10;
    let (commands, sequencer) = lead(&bench.region, 2, taken_over_us);
    let mut successor = Bench { commands, sequencer, ..bench };
    assert_eq!(successor.open(3, taken_over_us + GAP_US), Err(SessionError::TableFull(2)));
    successor.open(3, taken_over_us + GAP_US + 1).unwrap();
    assert_eq!(successor.clients(), [(1, true), (3, true)]);
}

/// The thread that orders also opens sessions. Two reads of memory for each row, at each call, would hold it up.
#[test]
fn opening_a_session_reads_no_rows() {
    let mut bench = Bench::new(Order::Strong);
    let before = bench.session_reads();
    for client in 1..=2 {
        bench.open(client, 0).unwrap();
    }
    bench.open(1, 0).unwrap();
    assert_eq!(bench.open(3, 0), Err(SessionError::TableFull(2)));
    assert!(bench.open(3, GAP_US + 1).is_ok());
    assert_eq!(bench.session_reads(), before);
}
