//! Subscribers: connections, brokers and batches that fail, one kind at a time.

use super::host::PROGRESS_MS;
use super::rig::Rig;
use embarcadero_client::polled::Drained;
use embarcadero_client::{ClientError, Start};
use embarcadero_wire::{ErrorCode, Order, Stream};

/// Number of runs of a test in which chance decides when things happen.
const SEEDS: u64 = 50;
/// Longest silence of a broker before a subscriber leaves it, milliseconds.
const SILENCE_MS: u64 = PROGRESS_MS / 4;

/// Returns brokers whose log has the messages 0 to `count`.
fn filled(brokers: u32, count: u64, seed: u64) -> Rig {
    let mut rig = Rig::new(brokers, Order::Strong, seed);
    rig.publisher().publish_all(&mut rig, count).unwrap();
    // The publisher's connections are gone before any of the subscriber's is made.
    rig.tick();
    assert!((0..brokers).all(|broker| rig.brokers.links(broker as usize) == 0));
    rig.brokers.all.iter_mut().for_each(|broker| broker.accepted = 0);
    rig
}

/// Returns the number of brokers that the subscriber has connected to.
fn visited(rig: &Rig) -> usize {
    rig.brokers.all.iter().filter(|broker| broker.accepted > 0).count()
}

#[test]
fn a_subscriber_whose_connection_breaks_misses_nothing() {
    let mut moved = 0;
    for seed in 0..SEEDS {
        let mut rig = filled(3, 300, seed);
        let mut reader = rig.subscriber(Start::Earliest);
        while reader.read.len() < 300 {
            for _ in 0..rig.random(0..4) {
                reader.look(&mut rig).unwrap();
            }
            rig.tick();
            if rig.one_in(8)
                && let Some((broker, link)) = rig.random_link()
            {
                match rig.random(0..3) {
                    0 => rig.brokers.cut(broker, link),
                    1 => rig.brokers.refuse(broker, link, ErrorCode::Unavailable),
                    _ => rig.brokers.refuse(broker, link, ErrorCode::TooSlow),
                }
            }
        }
        reader.assert_read(300);
        moved += usize::from(visited(&rig) > 1);
    }
    assert!(moved > 0);
}

#[test]
fn a_subscriber_leaves_a_broker_that_falls_silent_and_misses_nothing() {
    for seed in 0..SEEDS {
        let mut rig = filled(2, 40, seed);
        let mut reader = rig.subscriber(Start::Earliest);
        reader.read_until(&mut rig, 10).unwrap();
        let first = rig.brokers.all.iter().position(|broker| broker.accepted > 0).unwrap();
        rig.brokers.all[first].mute = true;
        reader.read_until(&mut rig, 40).unwrap();
        reader.assert_read(40);
        // Also one from which nothing was due: the other broker, once everything is read.
        rig.brokers.all[first].mute = false;
        reader.ticks(&mut rig, 2 * SILENCE_MS).unwrap();
        let accepted = [first, 1 - first].map(|broker| rig.brokers.all[broker].accepted);
        assert_eq!(accepted, [1, 1], "a broker that answers is not left");
        rig.brokers.all[1 - first].mute = true;
        reader.ticks(&mut rig, 2 * SILENCE_MS).unwrap();
        assert_eq!(rig.brokers.all[first].accepted, 2);
        reader.assert_read(40);
    }
}

#[test]
fn a_subscriber_reads_on_when_its_broker_stops() {
    let mut rig = filled(2, 100, 1);
    let mut reader = rig.subscriber(Start::Offset(30));
    reader.read_until(&mut rig, 10).unwrap();
    let first = rig.brokers.all.iter().position(|broker| broker.accepted > 0).unwrap();
    rig.brokers.stop(first);
    reader.read_until(&mut rig, 70).unwrap();
    assert_eq!(reader.read, (30..100).collect::<Vec<_>>());
}

#[test]
fn a_batch_that_is_damaged_once_is_read_elsewhere() {
    let mut rig = filled(2, 100, 2);
    let offset = rig.brokers.log()[3].first_offset;
    rig.brokers.damaged.insert(offset, 1);
    let mut reader = rig.subscriber(Start::Earliest);
    reader.read_until(&mut rig, 100).unwrap();
    reader.assert_read(100);
    assert_eq!(visited(&rig), 2);
}

#[test]
fn a_batch_that_stays_damaged_is_named_and_left_out() {
    let mut rig = filled(2, 100, 3);
    let [damaged, after] = [3, 4].map(|index| rig.brokers.log()[index].first_offset);
    rig.brokers.damaged.insert(damaged, 9);
    let mut reader = rig.subscriber(Start::Earliest);
    let error = reader.read_until(&mut rig, 100).unwrap_err();
    assert!(
        matches!(error, ClientError::Corrupt { offset, end, .. } if (offset, end) == (damaged, after)),
        "{error}, and not {damaged} to {after}"
    );
    reader.assert_read(damaged);
    reader.read_until(&mut rig, (100 - (after - damaged)) as usize).unwrap();
    assert_eq!(reader.read, (0..damaged).chain(after..100).collect::<Vec<_>>());
}

#[test]
fn a_batch_of_another_client_than_the_ordered_one_is_not_read() {
    let mut rig = filled(2, 20, 4);
    let entry = &mut rig.brokers.logs.get_mut(&Stream::GLOBAL).unwrap()[0];
    entry.header.client_id.0 += 1;
    let mut reader = rig.subscriber(Start::Earliest);
    let error = reader.read_until(&mut rig, 20).unwrap_err();
    assert!(matches!(error, ClientError::Corrupt { offset: 0, .. }), "{error}");
}

#[test]
fn a_stream_that_leaves_offsets_out_is_an_error() {
    let mut rig = filled(1, 60, 5);
    let gap = rig.brokers.logs.get_mut(&Stream::GLOBAL).unwrap().remove(2);
    let mut reader = rig.subscriber(Start::Earliest);
    let error = reader.read_until(&mut rig, 60).unwrap_err();
    assert!(matches!(error, ClientError::Gap { expected, .. } if expected == gap.first_offset), "{error}");
}

#[test]
fn a_drain_ends_with_what_there_is_and_not_before() {
    let mut rig = filled(2, 100, 6);
    let mut reader = rig.subscriber(Start::Earliest);
    let mut drain = reader.subscriber.begin_drain();
    let mut count = 0;
    loop {
        match reader.subscriber.drain(&mut drain).unwrap() {
            Drained::Batch(batch) => count += batch.message_count(),
            Drained::Nothing => rig.tick(),
            Drained::Everything => break,
        }
    }
    assert_eq!(count, 100);
}

#[test]
fn a_drain_of_brokers_that_never_answer_ends() {
    let mut rig = filled(2, 10, 7);
    rig.brokers.all.iter_mut().for_each(|broker| broker.mute = true);
    let mut reader = rig.subscriber(Start::Earliest);
    let mut drain = reader.subscriber.begin_drain();
    let begun_ms = rig.host.clock.passed_ms();
    let error = loop {
        match reader.subscriber.drain(&mut drain) {
            Ok(Drained::Nothing) => rig.tick(),
            Ok(_) => panic!("nobody has sent anything"),
            Err(error) => break error,
        }
    };
    assert!(matches!(error, ClientError::TimedOut { .. }), "{error}");
    assert_eq!(rig.host.clock.passed_ms() - begun_ms, PROGRESS_MS);
}

/// Streams of brokers that come later, and of those that move, are read from their beginning to their end.
#[test]
fn every_brokers_own_stream_is_read() {
    for seed in 0..SEEDS {
        let mut rig = Rig::new(2, Order::Broker, seed);
        let mut application = rig.publisher();
        let mut reader = rig.subscriber(Start::Earliest);
        application.publish_all(&mut rig, 60).unwrap();
        reader.read_until(&mut rig, 60).unwrap();
        rig.brokers.start();
        let new = Stream::of(rig.brokers.all[2].id);
        while !rig.brokers.logs.contains_key(&new) {
            application.publish_all(&mut rig, 20).unwrap();
            application.ticks(&mut rig, 100);
        }
        reader.read_until(&mut rig, application.published() as usize).unwrap();
        let moved = rig.random(0..3) as usize;
        rig.brokers.restart_elsewhere(moved);
        application.ticks(&mut rig, PROGRESS_MS);
        application.publish_all(&mut rig, 60).unwrap();
        reader.read_until(&mut rig, application.published() as usize).unwrap();
        reader.read.sort_unstable();
        reader.assert_read(application.published());
        assert!(rig.brokers.logs.values().all(|log| !log.is_empty()) && rig.brokers.logs.len() == 3);
    }
}
