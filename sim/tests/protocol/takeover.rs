//! Takeovers: what a successor does with the state that its predecessor left.

use crossbeam_channel::{Receiver, bounded, unbounded};
use embarcadero_broker::sequencer::{
    Command, Memory, Predecessor, Sequencer, SequencerLimits, SessionError, SessionRequest, Takeover,
};
use embarcadero_cxl::Native;
use embarcadero_cxl::Region;
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::layout::AllocatorKind;
use embarcadero_cxl::layout::{LeaderArea, SessionState};
use embarcadero_cxl::leadership::claim_term;
use embarcadero_cxl::order_index::{StreamId, read_directory};
use embarcadero_cxl::segment::PartitionAllocator;
use embarcadero_cxl::session_table::{Progress, read_session_at, store_progress};
use embarcadero_sim::testbed::{TOPIC, Testbed, region};
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
        let request = SessionRequest { topic: TOPIC.0, client_id, ack_level: 1, resume: false };
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
