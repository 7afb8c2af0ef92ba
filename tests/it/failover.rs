//! Promise: when the leader dies another broker takes over, and what was acknowledged is there, once and in order.

use crate::support::{Cluster, assert_exactly_once, eventually, history, message};
use embarcadero_client::{Order, TopicOptions};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const REGION: &[&str] = &["--size", "256MiB", "--segment-size", "1MiB"];

fn start(brokers: u32, create: &[&str], environment: &[(&str, &str)]) -> Cluster {
    Cluster::start(brokers, &[REGION, create].concat(), environment)
}

/// A leader that stands still loses its place soon.
const SHORT_LEASE: (&str, &str) = ("EMBARCADERO_BROKER_LEADER_LEASE_MS", "100");

/// Kills the leader `rounds` times while four publishers are at work. Each time another takes over, and the dead one comes
/// back.
fn leaders_die(create: &[&str], rounds: u64) {
    const EACH: u64 = 4000;
    let mut cluster = start(3, create, &[]);
    cluster
        .client_of_all()
        .create_topic("t", TopicOptions { order: Order::Strong, ..TopicOptions::default() })
        .unwrap();
    let deaths = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for number in 0..4 {
            let publisher = cluster.client_of_all().publisher("t").unwrap();
            let deaths = &deaths;
            scope.spawn(move || {
                for message_number in 0..rounds * EACH {
                    // Work goes on all along: it must not be done before the last leader is dead.
                    while message_number >= (deaths.load(Ordering::SeqCst) + 1) * EACH {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    publisher.publish_wait(&message(number, message_number)).unwrap();
                }
                publisher.flush().unwrap();
            });
        }
        for round in 1..=rounds {
            std::thread::sleep(Duration::from_millis(20));
            let dead = cluster.leader();
            let dead = cluster.kill(dead);
            deaths.store(round, Ordering::SeqCst);
            let next = cluster.leader();
            assert_ne!(cluster.brokers[next].id, dead.id);
            cluster.restart(&dead);
        }
    });
    let seen = history(&cluster.client_of_all(), "t");
    for number in 0..4 {
        assert_exactly_once(&seen[&number], rounds * EACH);
    }
    assert!(cluster.term() > rounds, "each leader has a term of its own");
    // The control plane is there as well.
    cluster.client_of_all().create_topic("later", TopicOptions::default()).unwrap();
    cluster.client_of_all().delete_topic("later").unwrap();
}

#[test]
fn another_broker_takes_over_from_a_killed_leader() {
    leaders_die(&[], 6);
}

#[test]
fn another_broker_takes_over_the_leaders_allocator() {
    leaders_die(&["--allocator", "leader"], 3);
}

#[test]
fn a_leader_that_stands_still_is_replaced_and_cannot_order_when_it_goes_on() {
    const EACH: u64 = 2000;
    const ROUNDS: u64 = 6;
    let cluster = start(3, &[], &[SHORT_LEASE]);
    cluster
        .client_of_all()
        .create_topic("t", TopicOptions { order: Order::Strong, ..TopicOptions::default() })
        .unwrap();
    let rounds = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for number in 0..4 {
            let publisher = cluster.client_of_all().publisher("t").unwrap();
            let rounds = &rounds;
            scope.spawn(move || {
                for message_number in 0..ROUNDS * EACH {
                    while message_number >= (rounds.load(Ordering::SeqCst) + 1) * EACH {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                    publisher.publish_wait(&message(number, message_number)).unwrap();
                }
                publisher.flush().unwrap();
            });
        }
        for round in 1..=ROUNDS {
            std::thread::sleep(Duration::from_millis(20));
            let stopped = cluster.leader();
            cluster.brokers[stopped].signal("-STOP");
            cluster.await_another_leader(cluster.brokers[stopped].id);
            rounds.store(round, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(50));
            // In the middle of whatever it was doing.
            cluster.brokers[stopped].signal("-CONT");
        }
    });
    let seen = history(&cluster.client_of_all(), "t");
    for number in 0..4 {
        assert_exactly_once(&seen[&number], ROUNDS * EACH);
    }
    // It follows now, and can be the leader again.
    cluster.client_of_all().create_topic("later", TopicOptions::default()).unwrap();
}

#[test]
fn a_leader_of_the_leaders_allocator_is_replaced_only_when_it_is_gone() {
    let mut cluster = start(2, &["--allocator", "leader"], &[SHORT_LEASE]);
    cluster.client_of_all().create_topic("t", TopicOptions::default()).unwrap();
    let stopped = cluster.leader();
    cluster.brokers[stopped].signal("-STOP");
    // Much longer than its lease: it could go on at any moment, and give away what another gave.
    std::thread::sleep(Duration::from_millis(500));
    assert_eq!(cluster.term(), 1);
    cluster.kill(stopped);
    eventually("another leads", || cluster.term() == 2);
}

#[test]
fn what_a_dead_leader_held_for_a_gap_needs_no_lease() {
    // A gap lease that would outlast the test's patience.
    let mut cluster = start(3, &[], &[("EMBARCADERO_BROKER_GAP_LEASE_MS", "3600000")]);
    let publishing = cluster.client_of_all();
    publishing.create_topic("t", TopicOptions { order: Order::Strong, ..TopicOptions::default() }).unwrap();
    let publisher = publishing.publisher("t").unwrap();
    for round in 0..4u64 {
        for number in round * 2000..(round + 1) * 2000 {
            publisher.publish_wait(&message(0, number)).unwrap();
        }
        let dead = cluster.leader();
        let dead = cluster.kill(dead);
        publisher.flush().unwrap();
        cluster.restart(&dead);
    }
    eventually("all brokers are back", || cluster.view().brokers.len() == 3);
    assert_exactly_once(&history(&cluster.client_of_all(), "t")[&0], 8000);
}
