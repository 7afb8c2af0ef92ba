//! Publishers: connections, brokers, sessions and calls that fail, one kind at a time.

use super::brokers::Answers;
use super::host::PROGRESS_MS;
use super::rig::Rig;
use embarcadero_client::{ClientError, ControlCode, Status};
use embarcadero_wire::{Ack, Epoch, Fenced, Order};
use std::time::Duration;

/// Number of runs of a test in which chance decides when things happen.
const SEEDS: u64 = 50;

#[test]
fn connections_that_break_lose_and_repeat_nothing() {
    let (mut lost, mut resubmitted) = (0, 0);
    for seed in 0..SEEDS {
        let mut rig = Rig::new(3, Order::Strong, seed);
        let mut application = rig.publisher();
        while application.published() < 300 {
            application.publish(rig.random(0..9)).unwrap();
            application.tick(&mut rig);
            if rig.one_in(20)
                && let Some((broker, link)) = rig.random_link()
            {
                rig.brokers.cut(broker, link);
            }
        }
        application.flush(&mut rig).unwrap();
        rig.assert_ordered(application.published());
        application.assert_acknowledged();
        let stats = application.publisher.stats();
        assert_eq!(stats.sessions_reopened, 0);
        lost += stats.connections_lost;
        resubmitted += stats.batches_resubmitted;
    }
    assert!(lost > 0 && resubmitted > 0, "{lost} lost, {resubmitted} resubmitted");
}

#[test]
fn batches_go_over_the_connections_in_turn() {
    let mut rig = Rig::new(3, Order::Strong, 1);
    let mut application = rig.publisher();
    application.publish_all(&mut rig, 300).unwrap();
    let shares: Vec<usize> =
        (0..3).map(|broker| rig.brokers.log().iter().filter(|entry| entry.broker.0 == broker).count()).collect();
    assert!(shares.iter().all(|share| *share >= 10), "{shares:?}");
}

#[test]
fn a_broker_that_falls_silent_is_left() {
    let mut rig = Rig::new(2, Order::Strong, 2);
    let mut application = rig.publisher();
    application.publish_all(&mut rig, 40).unwrap();
    rig.brokers.all[0].mute = true;
    application.publish_all(&mut rig, 60).unwrap();
    rig.assert_ordered(100);
    application.assert_acknowledged();
    let stats = application.publisher.stats();
    assert!(stats.connections_lost >= 1 && stats.batches_resubmitted >= 1, "{stats:?}");
}

#[test]
fn brokers_that_never_answer_end_a_wait_and_not_the_publisher() {
    let mut rig = Rig::new(2, Order::Strong, 3);
    let mut application = rig.publisher();
    rig.brokers.all.iter_mut().for_each(|broker| broker.mute = true);
    application.publish(20).unwrap();
    let begun_ms = rig.host.clock.passed_ms();
    let flushed = application.flush(&mut rig);
    let waited_ms = rig.host.clock.passed_ms() - begun_ms;
    let limit = Duration::from_millis(PROGRESS_MS);
    assert!(matches!(flushed, Err(ClientError::TimedOut { waited, .. }) if waited == limit), "{flushed:?}");
    assert_eq!(waited_ms, PROGRESS_MS);
    assert_eq!(application.status(0).unwrap(), Status::Pending);
    rig.brokers.all.iter_mut().for_each(|broker| broker.mute = false);
    application.flush(&mut rig).unwrap();
    rig.assert_ordered(20);
}

#[test]
fn no_publisher_is_opened_where_no_broker_listens() {
    let mut rig = Rig::new(2, Order::Strong, 4);
    (0..2).for_each(|broker| rig.brokers.stop(broker));
    assert!(matches!(rig.try_publisher(), Err(ClientError::Unreachable { .. })));
    let mut rig = Rig::new(2, Order::Strong, 4);
    rig.brokers.stop(1);
    rig.publisher().publish_all(&mut rig, 10).unwrap();
    rig.assert_ordered(10);
}

#[test]
fn a_broker_that_starts_elsewhere_is_found() {
    let mut rig = Rig::new(1, Order::Strong, 5);
    let mut application = rig.publisher();
    application.publish_all(&mut rig, 10).unwrap();
    rig.brokers.restart_elsewhere(0);
    application.publish_all(&mut rig, 10).unwrap();
    rig.assert_ordered(20);
}

#[test]
fn a_fenced_session_goes_on_under_the_next_epoch() {
    let mut resubmitted = 0;
    for seed in 0..SEEDS {
        let mut rig = Rig::new(3, Order::Strong, seed);
        let mut application = rig.publisher();
        let client = application.publisher.client_id();
        let mut fences = 0;
        while application.published() < 300 {
            application.publish(rig.random(0..9)).unwrap();
            application.tick(&mut rig);
            if rig.brokers.sessions[&client].open && rig.one_in(25) {
                rig.brokers.fence(client);
                fences += 1;
            }
        }
        application.flush(&mut rig).unwrap();
        application.until(&mut rig, |_, rig| rig.brokers.sessions[&client].open);
        rig.assert_ordered(application.published());
        application.assert_acknowledged();
        let stats = application.publisher.stats();
        assert_eq!(rig.brokers.sessions[&client].epoch, Epoch(1 + fences));
        assert_eq!((application.publisher.client_id(), rig.brokers.sessions.len()), (client, 1));
        let epochs: Vec<_> = rig.brokers.log().iter().map(|entry| entry.header.session_epoch).collect();
        assert!(epochs.is_sorted(), "{epochs:?}");
        resubmitted += stats.batches_resubmitted;
    }
    assert!(resubmitted > 0);
}

#[test]
fn a_session_that_is_lost_with_batches_in_doubt_ends_the_publisher() {
    let mut rig = Rig::new(2, Order::Strong, 6);
    let mut application = rig.publisher();
    let client = application.publisher.client_id();
    application.publish_all(&mut rig, 10).unwrap();
    rig.brokers.withholds_acks = true;
    application.publish(8).unwrap();
    application.seal();
    application.until(&mut rig, |_, rig| rig.ordered().len() == 18);
    let in_flight = rig.brokers.sessions[&client].next - sequence_of(&rig, 10);
    rig.brokers.fence(client);
    rig.brokers.sessions.remove(&client);
    let flushed = application.flush(&mut rig);
    assert!(
        matches!(flushed, Err(ClientError::SessionLost { in_doubt }) if in_doubt == in_flight),
        "{flushed:?} of {in_flight}"
    );
    assert!(matches!(application.publish(1), Err(ClientError::SessionLost { .. })));
    assert!(matches!(application.status(17), Err(ClientError::SessionLost { .. })));
    assert_eq!(application.status(9).unwrap(), Status::Acknowledged(Some(9)));
    application.ticks(&mut rig, PROGRESS_MS);
    rig.assert_ordered(18);
    assert!(rig.brokers.sessions.is_empty(), "no other session was asked for");
}

/// Returns the sequence of the batch that holds a message.
fn sequence_of(rig: &Rig, number: u64) -> u64 {
    rig.brokers.log().iter().find(|entry| entry.numbers().contains(&number)).unwrap().header.sequence
}

#[test]
fn a_session_that_is_lost_with_nothing_in_doubt_is_begun_anew() {
    let mut rig = Rig::new(2, Order::Strong, 7);
    let mut application = rig.publisher();
    let client = application.publisher.client_id();
    application.publish_all(&mut rig, 10).unwrap();
    rig.brokers.fence(client);
    rig.brokers.sessions.remove(&client);
    // What is sent under the old epoch would be in doubt.
    application.ticks(&mut rig, 5);
    application.publish_all(&mut rig, 10).unwrap();
    rig.assert_ordered(20);
    application.assert_acknowledged();
    let other = application.publisher.client_id();
    assert_ne!(client, other);
    assert_eq!(rig.brokers.sessions.keys().copied().collect::<Vec<_>>(), [other]);
}

/// A broker that is behind still sends what it has of an epoch that the publisher has left.
#[test]
fn acks_and_fences_of_another_epoch_say_nothing() {
    let mut rig = Rig::new(2, Order::Strong, 8);
    let mut application = rig.publisher();
    let client = application.publisher.client_id();
    application.publish_all(&mut rig, 4).unwrap();
    rig.brokers.fence(client);
    application.publish_all(&mut rig, 4).unwrap();
    assert_eq!(application.publisher.stats().sessions_reopened, 1);
    rig.brokers.withholds_acks = true;
    let sequence = rig.brokers.sessions[&client].next;
    application.publish(1).unwrap();
    application.until(&mut rig, |_, rig| rig.ordered().len() == 9);
    let ack = Ack { sequence, first_offset: 77, committed: sequence + 1, session_epoch: Epoch(1), ..Ack::blank() };
    rig.brokers.tell(client, ack.encode());
    rig.brokers.tell(client, Fenced { session_epoch: Epoch(1), ..Fenced::blank() }.encode());
    application.ticks(&mut rig, 20);
    assert_eq!(application.status(8).unwrap(), Status::Pending);
    assert_eq!(application.publisher.stats().sessions_reopened, 1);
    rig.brokers.withholds_acks = false;
    application.flush(&mut rig).unwrap();
    application.assert_acknowledged();
}

#[test]
fn a_control_plane_that_does_not_answer_ends_a_wait_and_not_the_publisher() {
    let mut rig = Rig::new(2, Order::Strong, 9);
    let mut application = rig.publisher();
    let client = application.publisher.client_id();
    application.publish_all(&mut rig, 10).unwrap();
    rig.brokers.answers = Answers::None;
    rig.brokers.fence(client);
    application.ticks(&mut rig, 5);
    application.publish(10).unwrap();
    let flushed = application.flush(&mut rig);
    assert!(matches!(flushed, Err(ClientError::TimedOut { .. })), "{flushed:?}");
    // One for the session, and one for the list of brokers.
    assert_eq!(rig.host.control.waiting(), 2);
    rig.brokers.answers = Answers::True;
    application.flush(&mut rig).unwrap();
    rig.assert_ordered(20);
    application.assert_acknowledged();
}

#[test]
fn a_session_that_is_refused_for_now_is_asked_for_ever_more_rarely() {
    let mut rig = Rig::new(2, Order::Strong, 10);
    let mut application = rig.publisher();
    let client = application.publisher.client_id();
    application.publish_all(&mut rig, 10).unwrap();
    rig.brokers.answers = Answers::Refusal(ControlCode::Unavailable);
    rig.brokers.fence(client);
    let asked = rig.brokers.asked_to_open;
    application.ticks(&mut rig, 5000);
    // After 0, 50, 150, 350, 750 and 1550 ms, and every second from then on.
    assert_eq!(rig.brokers.asked_to_open - asked, 9);
    rig.brokers.answers = Answers::True;
    application.publish_all(&mut rig, 10).unwrap();
    rig.assert_ordered(20);
}

#[test]
fn a_session_that_is_refused_for_good_ends_the_publisher() {
    let mut rig = Rig::new(2, Order::Strong, 11);
    let mut application = rig.publisher();
    let client = application.publisher.client_id();
    rig.brokers.answers = Answers::Refusal(ControlCode::NotFound);
    rig.brokers.fence(client);
    application.ticks(&mut rig, 5);
    let published = application.publish(10);
    assert!(matches!(published, Err(ClientError::Control { code: ControlCode::NotFound, .. })), "{published:?}");
    let asked = rig.brokers.asked_to_open;
    application.ticks(&mut rig, PROGRESS_MS);
    assert_eq!(rig.brokers.asked_to_open, asked);
}

/// Lost batches stay lost at acknowledgement level 0. The session goes on with what was not sent.
#[test]
fn without_acks_a_publisher_goes_on_behind_what_was_lost() {
    let mut lost = 0;
    for seed in 0..SEEDS {
        let mut rig = Rig::at_level(0, 2, Order::Strong, seed);
        let mut application = rig.publisher();
        let client = application.publisher.client_id();
        for _ in 0..30 {
            application.publish(rig.random(0..9)).unwrap();
            application.tick(&mut rig);
            if rig.one_in(5)
                && let Some((broker, link)) = rig.random_link()
            {
                rig.brokers.cut(broker, link);
            }
        }
        application.flush(&mut rig).unwrap();
        application.ticks(&mut rig, 100);
        // A gap, if there is one, ends the epoch.
        rig.brokers.fence(client);
        application.until(&mut rig, |_, rig| rig.brokers.sessions[&client].open);
        let before = application.published();
        application.publish_all(&mut rig, 20).unwrap();
        application.until(&mut rig, |application, rig| rig.ordered().last() == Some(&(application.published() - 1)));
        let ordered = rig.ordered();
        assert!(ordered.is_sorted_by(|one, next| one < next), "{ordered:?}");
        assert!(ordered.ends_with(&(before..before + 20).collect::<Vec<_>>()));
        lost += application.published() - ordered.len() as u64;
    }
    assert!(lost > 0);
}

#[test]
fn a_publisher_closes_its_session() {
    let mut rig = Rig::new(1, Order::Strong, 12);
    let mut application = rig.publisher();
    application.publish_all(&mut rig, 10).unwrap();
    let mut call = application.publisher.close();
    assert!(call.look().is_none());
    rig.tick();
    assert!(matches!(call.look(), Some(Ok(_))));
    assert_eq!(rig.brokers.closed, [application.publisher.client_id()]);
}
