//! Takeovers: what a successor does with the state that its predecessor left.

use crossbeam_channel::{Receiver, bounded, unbounded};
use embarcadero_broker::sequencer::{
    Command, GROUP_BATCHES, Memory, Predecessor, Sequencer, SequencerLimits, SessionError, Takeover,
};
use embarcadero_cxl::Native;
use embarcadero_cxl::Region;
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::AllocatorKind;
use embarcadero_cxl::layout::{LeaderArea, SessionState};
use embarcadero_cxl::leadership::claim_term;
use embarcadero_cxl::order_index::{OrderIndexReader, StreamId, read_directory};
use embarcadero_cxl::segment::{PartitionAllocator, SegmentAllocator};
use embarcadero_cxl::sequencer_half::read_consumed_at;
use embarcadero_cxl::session_table::{Progress, read_session_at, store_progress};
use embarcadero_sim::testbed::{TOPIC, Testbed, opening, region};
use embarcadero_wire::{BrokerId, ClientId, Epoch, SessionSlot, Stream, Term};
use std::sync::Arc;

const AREAS: [LeaderArea; 2] = [LeaderArea(BrokerId(0)), LeaderArea(BrokerId(1))];

fn take_over(region: &Region<Native>, area: LeaderArea, term: Term, before: Predecessor) -> Sequencer<Native> {
    take_over_with(region, area, term, before, unbounded().1)
}

fn take_over_with(
    region: &Region<Native>,
    area: LeaderArea,
    term: Term,
    before: Predecessor,
    commands: Receiver<Command>,
) -> Sequencer<Native> {
    let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), area.0));
    take_over_from_pool(region, pool, area, term, before, commands)
}

fn take_over_from_pool(
    region: &Region<Native>,
    pool: Arc<dyn SegmentAllocator>,
    area: LeaderArea,
    term: Term,
    before: Predecessor,
    commands: Receiver<Command>,
) -> Sequencer<Native> {
    let memory = Memory { region: region.clone(), pool, mirror: None };
    let takeover = Takeover { memory, area, term, before, limits: SequencerLimits::LASTING, commands };
    Sequencer::recover(takeover, 0).unwrap()
}

/// Returns the index segment that a leader is filling.
fn open_segment(region: &Region<Native>, area: LeaderArea) -> u32 {
    read_directory(region, StreamId { topic: TOPIC.0, stream: Stream::GLOBAL }, area, 0).unwrap().unwrap()
}

fn led_by_broker_0() -> (Region<Native>, Testbed<Native>) {
    let region = region(AllocatorKind::Partitioned, FlushMethod::None, |native: Native| native).unwrap();
    let mut testbed = Testbed::new(region.clone(), 2).unwrap();
    let batches = testbed.append();
    testbed.order(batches);
    (region, testbed)
}

/// A candidate saw no leader. By the time that it claims its term another leads, and may go on.
#[test]
fn a_leader_that_was_not_seen_is_not_taken_for_gone() {
    let (region, _still_there) = led_by_broker_0();
    let successor = take_over(&region, AREAS[1], Term(2), Predecessor::Gone(Term::NONE));
    assert!(successor.leads());
    assert_ne!(open_segment(&region, AREAS[1]), open_segment(&region, AREAS[0]));
}

/// The last leader is gone, and a candidate that claimed a later term stands still. It may be about to fill the segment of
/// that leader.
#[test]
fn a_segment_that_another_may_have_taken_over_is_replaced() {
    let (region, gone) = led_by_broker_0();
    drop(gone);
    let shared = open_segment(&region, AREAS[0]);
    claim_term(&region, AREAS[1], Term(2));
    let _back = take_over(&region, AREAS[0], Term(3), Predecessor::Gone(Term(1)));
    assert_ne!(open_segment(&region, AREAS[0]), shared);
}

/// The successor of a leader that is gone fills the segment of that leader. The old leader's broker comes back and takes
/// over again. The segment is its own, but the successor may still write into it.
#[test]
fn an_own_segment_that_another_fills_is_replaced() {
    let (region, gone) = led_by_broker_0();
    drop(gone);
    let shared = open_segment(&region, AREAS[0]);
    let _still_there = take_over(&region, AREAS[1], Term(2), Predecessor::Gone(Term(1)));
    assert_eq!(open_segment(&region, AREAS[1]), shared);
    let _back = take_over(&region, AREAS[0], Term(3), Predecessor::MayGoOn);
    assert_ne!(open_segment(&region, AREAS[0]), shared);
}

/// Number of batches that the leader of an area took, and that are not decided.
fn undecided(region: &Region<Native>, area: LeaderArea) -> u64 {
    let consumed = region.geometry().brokers().map(|broker| read_consumed_at(region, area, TOPIC.0, broker));
    consumed.map(|consumed| consumed.consumed_through - consumed.decided_through).sum()
}

/// A leader stands still, holds batches for a gap, and the pool is empty. Another leads all the same. Batches wait until a
/// segment comes free, and then each is ordered once. A reader that knows the segment in which the order stood still finds
/// the one in which it goes on.
#[test]
fn a_takeover_needs_no_memory() {
    let (region, mut stands_still) = led_by_broker_0();
    let waiting = stands_still.append();
    stands_still.sequencer().poll(1, 8);
    assert!(undecided(&region, AREAS[0]) >= 7, "held for a gap");
    let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), AREAS[1].0));
    let taken: Vec<u32> = std::iter::from_fn(|| pool.allocate().ok()).collect();
    let shared = open_segment(&region, AREAS[0]);
    let stream = StreamId { topic: TOPIC.0, stream: Stream::GLOBAL };

    let commands = unbounded().1;
    let of_pool: Arc<dyn SegmentAllocator> = pool.clone();
    let mut successor = take_over_from_pool(&region, of_pool, AREAS[1], Term(2), Predecessor::MayGoOn, commands);
    assert!(successor.leads());
    let mut reader = OrderIndexReader::new(region.clone(), stream);
    let committed = reader.poll();
    assert!((0..committed).all(|position| reader.read(position).is_ok()));
    for _ in 0..10 {
        successor.poll(1, GROUP_BATCHES);
        successor.maintain(1);
    }
    assert_eq!((reader.poll(), open_segment(&region, AREAS[1])), (committed, shared), "there is no room");
    assert!(undecided(&region, AREAS[1]) >= 7, "the memory of held batches was given away");

    pool.release(taken[0]).unwrap();
    for _ in 0..100 {
        successor.poll(1, GROUP_BATCHES);
    }
    assert_eq!(open_segment(&region, AREAS[1]), taken[0]);
    // The leader that stood still may fill what it knows.
    stands_still.sequencer().poll(1, GROUP_BATCHES);
    // The first round had as many batches.
    assert_eq!(reader.poll(), 2 * waiting);
    let entries: Vec<_> = (0..2 * waiting).map(|position| reader.read(position).unwrap()).collect();
    for session in stands_still.sessions() {
        let own = entries.iter().filter(|entry| entry.client_id == session.client_id);
        assert!(own.map(|entry| entry.sequence).eq(0..waiting), "not each batch once and in order");
    }
    successor.maintain(1);
    assert_eq!(undecided(&region, AREAS[1]), 0);
}

/// A leader stands still, and its successor finds no segment to go on in, and dies. The next leader knows that the successor
/// is gone. But the first one may still write into the segment.
#[test]
fn a_segment_that_a_dead_successor_could_not_replace_is_replaced() {
    let (region, _stands_still) = led_by_broker_0();
    let shared = open_segment(&region, AREAS[0]);
    let pool = Arc::new(PartitionAllocator::of_broker(region.clone(), AREAS[1].0));
    while pool.allocate().is_ok() {}
    drop(take_over_from_pool(&region, pool, AREAS[1], Term(2), Predecessor::MayGoOn, unbounded().1));
    assert_eq!(open_segment(&region, AREAS[1]), shared);
    let _next = take_over(&region, AREAS[0], Term(3), Predecessor::Gone(Term(2)));
    assert_ne!(open_segment(&region, AREAS[0]), shared);
}

/// Nobody knows which batches of a client are committed. It is told so, and others go on.
#[test]
fn a_session_whose_progress_is_damaged_does_not_go_on() {
    let (region, led) = led_by_broker_0();
    let [damaged, whole] = led.sessions() else { panic!("the testbed has two sessions") };
    // The slot after both was never used.
    let unused = SessionSlot(2);
    let progress = |expected, epoch| Progress { expected, epoch };
    store_progress(&region, AREAS[0], damaged.slot, progress(1 << 20, damaged.epoch));
    store_progress(&region, AREAS[1], unused, progress(1, Epoch::default()));
    let (commands, queue) = unbounded();
    let mut successor = take_over_with(&region, AREAS[1], Term(2), Predecessor::Gone(Term(1)), queue);
    let mut open = |client_id| {
        let (reply, answer) = bounded(1);
        let request = opening(TOPIC.0, client_id);
        commands.send(Command::OpenSession { request, reply }).unwrap();
        successor.poll(0, 1);
        answer.recv().unwrap()
    };
    let state = read_session_at(&region, AREAS[1], damaged.slot).used().map(|session| session.state);
    assert_eq!(state, Some(SessionState::Fenced), "its client waits for acks until it is told");
    let refused = open(damaged.client_id);
    assert!(matches!(refused, Err(SessionError::DamagedSession(slot, _)) if slot == damaged.slot), "{refused:?}");
    let reopened = open(whole.client_id).unwrap();
    assert!(reopened.slot == whole.slot && reopened.committed > 0, "{reopened:?}");
    let other = open(ClientId(77)).unwrap();
    assert_eq!(other.slot, SessionSlot(3));
    // The leader itself knows the progress of a session that is open.
    store_progress(&region, AREAS[1], whole.slot, progress(1 << 20, reopened.epoch));
    assert_eq!(open(whole.client_id).unwrap().committed, reopened.committed);
}
