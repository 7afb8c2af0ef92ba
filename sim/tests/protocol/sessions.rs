//! Sessions: whose batches a slot holds, and what a sequencer knows of them after it, or its predecessor, ended an epoch.

use crossbeam_channel::{Sender, bounded, unbounded};
use embarcadero_broker::ack::AckQueue;
use embarcadero_broker::sequencer::{
    Command, Memory, Predecessor, Sequencer, SequencerLimits, SessionError, SessionRequest, Takeover,
};
use embarcadero_cxl::batchlog::{BatchlogWriter, Written};
use embarcadero_cxl::broker_table::Pulse;
use embarcadero_cxl::layout::{
    AllocatorKind, BatchEntry, Geometry, Layout, LeaderArea, SESSION_WINDOW, SessionRow, SessionState,
};
use embarcadero_cxl::order_index::{OrderIndexReader, StreamId};
use embarcadero_cxl::segment::PartitionAllocator;
use embarcadero_cxl::session_connections::{Connected, ConnectionsWriter};
use embarcadero_cxl::session_table::{Session, publish_session, read_session_at};
use embarcadero_cxl::{Fabric, Guard, Region, RegionOffset, Row, Site};
use embarcadero_sim::testbed::{opening, topic};
use embarcadero_sim::{Mutation, Simulated, Turbulence, World};
use embarcadero_wire::{
    BrokerId, ClientId, Epoch, Incarnation, Order, SessionSlot, SessionToken, Stream, Term, TopicId,
};
use std::sync::Arc;

const AREAS: [LeaderArea; 2] = [LeaderArea(BrokerId(0)), LeaderArea(BrokerId(1))];
const TOPIC: TopicId = TopicId(0);
const INCARNATION: Incarnation = Incarnation(1);
const GROUP: u64 = 4;

/// A sequencer, and one broker whose Batchlog it reads.
struct Rig {
    region: Region<Simulated>,
    commands: Sender<Command>,
    sequencer: Sequencer<Simulated>,
    log: BatchlogWriter<Simulated>,
    pulse: Pulse<Simulated>,
    now_us: u64,
}

fn lead(region: &Region<Simulated>, area: LeaderArea, term: Term) -> (Sender<Command>, Sequencer<Simulated>) {
    let (commands, queue) = unbounded();
    let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), area.0));
    let memory = Memory { region: region.clone(), pool, mirror: None };
    let before = Predecessor::Gone(Term(term.0 - 1));
    let limits = SequencerLimits { group_batches: GROUP, idle_us: 1000, ..SequencerLimits::LASTING };
    let takeover = Takeover { memory, area, term, before, limits, commands: queue };
    (commands, Sequencer::recover(takeover, 0).unwrap())
}

impl Rig {
    fn new(order: Order, max_sessions: u32) -> Self {
        Self::without(None, order, max_sessions)
    }

    /// Makes a rig in which one of the checks is left out.
    fn without(removed: Option<Guard>, order: Order, max_sessions: u32) -> Self {
        let geometry = Geometry {
            max_brokers: 2,
            max_leaders: 2,
            max_topics: 1,
            max_sessions,
            segment_count: 16,
            ..Geometry::with_segments_of(1 << 20, AllocatorKind::Partitioned)
        };
        let removed = removed.map(Mutation::Guard);
        let world = World::new(Layout::new(&geometry).region_bytes, 1, Turbulence::CALM, removed);
        let region = Region::format(Simulated::join(&world, || {}), &geometry, uuid::Uuid::nil(), 0).unwrap();
        let (commands, sequencer) = lead(&region, AREAS[0], Term(1));
        let log = BatchlogWriter::new(region.clone(), TOPIC, BrokerId(1));
        let pulse = Pulse::new(region.clone(), BrokerId(1));
        let mut rig = Self { region, commands, sequencer, log, pulse, now_us: 1 };
        let (reply, opened) = bounded(1);
        rig.commands.send(Command::OpenTopic(topic((TOPIC, INCARNATION), order), reply)).unwrap();
        rig.poll();
        opened.recv().unwrap().unwrap();
        rig
    }

    fn poll(&mut self) -> u64 {
        self.sequencer.poll(self.now_us, 1000)
    }

    fn ask(&mut self, client: u64, resume: bool) -> Result<Session, SessionError> {
        self.request(SessionRequest { resume, ..opening(TOPIC, ClientId(client)) })
    }

    fn request(&mut self, request: SessionRequest) -> Result<Session, SessionError> {
        let (reply, answer) = bounded(1);
        self.commands.send(Command::OpenSession { request, reply }).unwrap();
        self.poll();
        answer.recv().unwrap()
    }

    fn open(&mut self, client: u64) -> Session {
        self.ask(client, false).unwrap()
    }

    fn resume(&mut self, client: u64) -> Session {
        self.ask(client, true).unwrap()
    }

    fn close(&mut self, session: &Session) -> Result<(), SessionError> {
        let (reply, closed) = bounded(1);
        let Session { slot, client_id, epoch, token, .. } = *session;
        self.commands.send(Command::CloseSession { slot, client_id, epoch, token, reply }).unwrap();
        self.poll();
        closed.recv().unwrap()
    }

    /// Publishes batches of a session to the sequencer, which has not looked at them yet.
    fn send(&mut self, session: &Session, sequences: impl IntoIterator<Item = u64>) {
        for sequence in sequences {
            self.log.append(BatchEntry {
                location: self.region.layout().segments,
                client_id: session.client_id,
                sequence,
                session_epoch: session.epoch,
                session_slot: session.slot,
                topic_incarnation: INCARNATION,
                bytes: 1,
                message_count: 1,
                ..bytemuck::Zeroable::zeroed()
            });
        }
        self.log.publish(Written::default());
        self.pulse.announce(1);
    }

    /// Lets the sequencer order everything.
    fn order(&mut self) {
        while self.poll() > 0 {}
    }

    /// Another leader takes over from one that is gone.
    fn fail_over(&mut self) {
        (self.commands, self.sequencer) = lead(&self.region, AREAS[1], Term(2));
    }

    /// Client and sequence of each batch in the order.
    fn batches(&self) -> Vec<(u64, u64)> {
        let mut reader = OrderIndexReader::new(self.region.clone(), StreamId { topic: TOPIC, stream: Stream::GLOBAL });
        let through = reader.poll();
        let read = |position| reader.read(position).map(|entry| (entry.client_id.0, entry.sequence)).unwrap();
        (0..through).map(read).collect()
    }

    /// Words of a session's row in the leader's area.
    fn row(&self, slot: SessionSlot) -> Vec<(RegionOffset, u64)> {
        let at = self.region.layout().session(AREAS[0], slot);
        let words = (0..size_of::<SessionRow>() as u64).step_by(8).map(|word| at.add(word));
        words.map(|at| (at, self.region.fabric().load(at))).collect()
    }
}

/// A client hears whether its slot is still its own. It cannot tell by the slot's number.
#[test]
fn a_slot_that_went_to_another_client_is_not_resumed() {
    let mut rig = Rig::new(Order::Strong, 1);
    let first = rig.open(1);
    rig.send(&first, 0..3);
    rig.order();
    let again = rig.resume(1);
    assert_eq!((again.committed, again.first_epoch, again.first_sequence), (3, first.epoch, 0));
    // It falls silent, and another client needs the slot.
    rig.now_us += 2000;
    let other = rig.open(2);
    assert_eq!((other.slot, other.first_epoch, other.first_sequence), (first.slot, other.epoch, 3));
    rig.close(&other).unwrap();
    assert!(matches!(rig.ask(1, true), Err(SessionError::Gone(ClientId(1)))));
    assert_eq!(rig.resume(2).first_epoch, other.epoch);
}

/// A client whose session was fenced has time to come back before another gets its slot.
#[test]
fn a_fenced_session_keeps_its_slot_for_a_while() {
    let mut rig = Rig::new(Order::Strong, 1);
    rig.open(1);
    rig.fail_over();
    let refused = rig.ask(2, false);
    assert!(matches!(refused, Err(SessionError::TableFull(1))), "{refused:?}");
    rig.resume(1);
}

/// Returns the sequences that are ordered when a client sends again, under the next epoch, what was committed ahead of a gap.
fn order_again_ahead_of_a_gap(removed: Option<Guard>) -> Vec<u64> {
    let mut rig = Rig::without(removed, Order::Total, 1);
    let first = rig.open(1);
    rig.send(&first, [1, 2, 5]);
    rig.order();
    let second = rig.resume(1);
    assert_eq!(second.committed, 0);
    rig.send(&second, [1, 2, 5, 0]);
    rig.order();
    rig.batches().into_iter().map(|(_, sequence)| sequence).collect()
}

#[test]
fn what_total_order_commits_ahead_of_a_gap_is_known_under_the_next_epoch() {
    assert_eq!(order_again_ahead_of_a_gap(None), [1, 2, 5, 0]);
    assert_eq!(order_again_ahead_of_a_gap(Some(Guard::AheadOfGap)), [1, 2, 5, 1, 2, 5, 0]);
}

#[test]
fn what_total_order_commits_ahead_of_a_gap_is_known_to_the_next_leader() {
    let mut rig = Rig::new(Order::Total, 1);
    let session = rig.open(1);
    rig.send(&session, [1, 2, 5]);
    rig.order();
    rig.fail_over();
    // Under the same epoch, and under the next.
    rig.send(&session, [1, 0]);
    rig.order();
    let next = rig.resume(1);
    assert_eq!(next.committed, 3);
    rig.send(&next, [3, 4, 5, 6]);
    rig.order();
    assert_eq!(rig.batches(), [1, 2, 5, 0, 3, 4, 6].map(|sequence| (1, sequence)));
}

/// A client that has forgotten what it sent numbers new batches. They must not be taken for those.
#[test]
fn a_client_that_forgot_everything_begins_behind_what_it_committed() {
    let mut rig = Rig::new(Order::Total, 1);
    let first = rig.open(1);
    rig.send(&first, [0, 2]);
    rig.order();
    // It has no token any more, so that its session must be idle first.
    let forgot =
        SessionRequest { token: SessionToken::NONE, new_token: SessionToken(77), ..opening(TOPIC, ClientId(1)) };
    assert_eq!(rig.request(forgot), Err(SessionError::InUse(ClientId(1))));
    rig.now_us += 2000;
    let again = rig.request(forgot).unwrap();
    assert_eq!((again.slot, again.committed, again.first_epoch), (first.slot, 3, again.epoch));
    assert_eq!(again.token, SessionToken(77));
    assert_eq!(rig.ask(1, true), Err(SessionError::Gone(ClientId(1))), "the client before is another");
}

/// Subscribers learn client, epoch and slot from every batch. That is not enough to fence a session, to go on with it, or to
/// close it.
#[test]
fn whoever_does_not_know_the_token_changes_nothing() {
    for order in [Order::Strong, Order::Total, Order::Broker] {
        let mut rig = Rig::new(order, 2);
        let session = rig.open(1);
        rig.send(&session, [0]);
        rig.order();
        for token in [SessionToken::NONE, SessionToken(77)] {
            let stranger = SessionRequest { token, new_token: SessionToken(78), ..opening(TOPIC, ClientId(1)) };
            assert_eq!(rig.request(stranger), Err(SessionError::InUse(ClientId(1))));
            let resume = SessionRequest { resume: true, ..stranger };
            assert_eq!(rig.request(resume), Err(SessionError::Gone(ClientId(1))));
            assert_eq!(rig.close(&Session { token, ..session }), Err(SessionError::NotHolder(ClientId(1))));
        }
        let row = |rig: &Rig| read_session_at(&rig.region, AREAS[0], session.slot);
        assert_eq!(row(&rig), Row::Used(session), "{order:?}");
        // Who knows it goes on, under the same token, and closes. Then the id is free.
        let next = rig.resume(1);
        assert_eq!((next.epoch, next.token), (session.epoch.next(), session.token));
        rig.close(&next).unwrap();
        let token = SessionToken(78);
        let other = SessionRequest { token: SessionToken::NONE, new_token: token, ..opening(TOPIC, ClientId(1)) };
        assert_eq!(rig.request(other).unwrap().token, token);
    }
}

/// The leader sees which sessions are idle. Without a global order it sees no batches, and looks at connections instead.
#[test]
fn an_id_is_given_away_once_its_session_is_idle() {
    let cases = [
        (Order::Strong, Connected::Open, true),
        (Order::None, Connected::Open, false),
        (Order::None, Connected::No, true),
    ];
    for (order, connected, given) in cases {
        let mut rig = Rig::new(order, 2);
        let session = rig.open(1);
        let mut connections = ConnectionsWriter::new(rig.region.clone(), BrokerId(0));
        connections.publish(|slot| if slot == session.slot { connected } else { Connected::No });
        rig.now_us += 2000;
        let forgot = SessionRequest { token: SessionToken::NONE, ..opening(TOPIC, ClientId(1)) };
        assert_eq!(rig.request(forgot).is_ok(), given, "{order:?}, {connected:?}");
    }
}

/// Disks do not have tokens. A restored session takes the one that its client names, so that an answer may be lost.
#[test]
fn a_restored_session_goes_on_with_the_token_of_its_client() {
    let mut rig = Rig::new(Order::Strong, 1);
    let session = rig.open(1);
    rig.send(&session, 0..3);
    rig.order();
    let restored = Session { token: SessionToken::NONE, state: SessionState::Fenced, committed: 3, ..session };
    publish_session(&rig.region, AREAS[0], &restored);
    rig.fail_over();
    for epoch in [2, 3] {
        let resumed = rig.resume(1);
        assert_eq!((resumed.epoch.0, resumed.token, resumed.committed), (epoch, session.token, 3));
    }
    // A client that never had one gets a new one.
    publish_session(&rig.region, AREAS[1], &Session { epoch: Epoch(3), ..restored });
    (rig.commands, rig.sequencer) = lead(&rig.region, AREAS[0], Term(3));
    let token = SessionToken(78);
    let none = SessionRequest { token: SessionToken::NONE, new_token: token, ..opening(TOPIC, ClientId(1)) };
    assert_eq!(rig.request(SessionRequest { resume: true, ..none }).unwrap().token, token);
}

/// No sequence of a slot names two batches, or an acknowledgement could be taken for another's.
#[test]
fn a_client_begins_behind_what_others_committed_in_its_slot() {
    let mut rig = Rig::new(Order::Total, 1);
    let first = rig.open(1);
    rig.send(&first, [0, 3, 7]);
    rig.order();
    rig.close(&first).unwrap();
    let other = rig.open(2);
    assert_eq!((other.committed, other.first_sequence), (8, 8));
    rig.send(&other, [8]);
    rig.order();
    assert_eq!(rig.resume(2).committed, 9);
}

/// One batch can release a window of others for each session. A group is no larger for that.
#[test]
fn a_group_has_a_bound_that_counts_held_batches() {
    let mut rig = Rig::new(Order::Strong, 3);
    let sessions = [1, 2, 3].map(|client| rig.open(client));
    for session in &sessions {
        rig.send(session, 1..SESSION_WINDOW);
    }
    rig.order();
    assert_eq!(rig.batches(), []);
    for session in &sessions {
        rig.send(session, [0]);
    }
    let mut before = 0;
    loop {
        let taken = rig.poll();
        let ordered = rig.batches().len() as u64;
        assert!(ordered - before <= GROUP, "{} batches in a group", ordered - before);
        if taken == 0 && ordered == before {
            break;
        }
        before = ordered;
    }
    assert_eq!(before, 3 * SESSION_WINDOW);
}

/// The leader dies when the order shows a group, and the sessions do not yet. Clients send again what they hear nothing of.
/// Returns the sequences of each in the order.
fn order_after_a_group_of_which_no_session_knows(removed: Option<Guard>) -> [Vec<u64>; 2] {
    let mut rig = Rig::without(removed, Order::Strong, 2);
    let sessions = [1, 2].map(|client| rig.open(client));
    for session in &sessions {
        rig.send(session, 1..SESSION_WINDOW);
    }
    rig.order();
    for session in &sessions {
        rig.send(session, [0]);
    }
    let rows: Vec<_> = sessions.iter().flat_map(|session| rig.row(session.slot)).collect();
    rig.poll();
    for (at, word) in rows {
        let fabric = rig.region.fabric();
        fabric.store(at, word);
        fabric.flush(at, 8, Site::RecordFlush);
        fabric.fence(Site::RecordFlush);
    }
    rig.fail_over();
    for session in &sessions {
        rig.send(session, 0..SESSION_WINDOW);
    }
    rig.order();
    [1, 2].map(|client| rig.batches().into_iter().filter(|batch| batch.0 == client).map(|batch| batch.1).collect())
}

#[test]
fn a_group_of_which_no_session_knows_is_not_ordered_twice() {
    let once: Vec<u64> = (0..SESSION_WINDOW).collect();
    assert_eq!(order_after_a_group_of_which_no_session_knows(None), [once.clone(), once.clone()]);
    let [first, _] = order_after_a_group_of_which_no_session_knows(Some(Guard::GroupBound));
    assert!(first.len() > once.len(), "without a bound, batches are there twice");
}

/// A broker stands still while the slot of its client's session goes to another client. Returns the number of acks.
fn acks_of_a_broker_that_stood_still(removed: Option<Guard>) -> usize {
    let mut rig = Rig::without(removed, Order::Strong, 1);
    let mut acks = AckQueue::new(rig.open(1), StreamId { topic: TOPIC, stream: Stream::GLOBAL });
    acks.expect(0);
    rig.now_us += 2000;
    let other = rig.open(2);
    rig.send(&other, [0]);
    rig.order();
    assert_eq!(rig.batches(), [(2, 0)]);
    acks.poll(&rig.region, BrokerId(1), |_| {}).unwrap()
}

#[test]
fn nothing_that_another_client_commits_is_acknowledged() {
    assert_eq!(acks_of_a_broker_that_stood_still(None), 0);
    assert_eq!(acks_of_a_broker_that_stood_still(Some(Guard::RecordOwner)), 1);
}
