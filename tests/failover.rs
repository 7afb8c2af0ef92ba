//! Promise: when the head dies another broker takes over, and what was acknowledged is there, once and in order.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

mod support;

use embarcadero_client::{Client, ClientConfig, Order, TopicOptions};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};
use support::{Cluster, PATIENCE, assert_exactly_once, eventually, history, message};

const REGION: &[&str] = &["--size", "256MiB", "--segment-size", "1MiB"];

fn start(brokers: u32, create: &[&str]) -> Cluster {
    Cluster::start(brokers, &[REGION, create].concat(), &[("EMBARCADERO_BROKER_BROKER_LEASE_MS", "500")])
}

/// A client that knows every broker, as the first may die.
fn client(cluster: &Cluster) -> Client {
    let bootstrap = cluster.brokers.iter().map(|broker| broker.control.clone()).collect();
    let config = ClientConfig { bootstrap, batch_size: 16 << 10, buffer_bytes: 1 << 20, ..cluster.config() };
    Client::connect(config).unwrap()
}

/// Index of the head among the brokers, once there is one that lives.
fn head(cluster: &Cluster) -> usize {
    let begun = Instant::now();
    loop {
        let found = client(cluster).cluster().unwrap().brokers.into_iter().find(|broker| broker.head);
        let index = found.and_then(|head| cluster.brokers.iter().position(|broker| broker.id == head.id));
        if let Some(index) = index {
            return index;
        }
        assert!(begun.elapsed() < PATIENCE, "no broker became the head");
        std::thread::sleep(Duration::from_millis(5));
    }
}

/// kill -9; what is needed to start it again: id and control address.
fn kill(cluster: &mut Cluster, index: usize) -> (u32, String) {
    let mut broker = cluster.brokers.remove(index);
    broker.kill();
    (broker.id, broker.control.clone())
}

fn restart(cluster: &mut Cluster, (id, control): &(u32, String)) {
    cluster.add(&["--id", &id.to_string(), "--control", control]);
}

fn signal(broker: &support::Broker, signal: &str) {
    let sent = std::process::Command::new("kill").args([signal, &broker.child.id().to_string()]).status().unwrap();
    assert!(sent.success());
}

/// Rounds of: four publishers at work, the head is killed, another takes over, the dead one comes back.
fn heads_die(create: &[&str], rounds: u64) {
    const EACH: u64 = 4000;
    let mut cluster = start(3, create);
    client(&cluster).create_topic("t", TopicOptions { order: Order::Strong, ..TopicOptions::default() }).unwrap();
    let deaths = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for number in 0..4 {
            let publisher = client(&cluster).publisher("t").unwrap();
            let deaths = &deaths;
            scope.spawn(move || {
                for message_number in 0..rounds * EACH {
                    // Work goes on all along: it must not be done before the last head is dead.
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
            let dead = head(&cluster);
            let dead = kill(&mut cluster, dead);
            deaths.store(round, Ordering::SeqCst);
            let next = head(&cluster);
            assert_ne!(cluster.brokers[next].id, dead.0);
            restart(&mut cluster, &dead);
        }
    });
    let seen = history(&client(&cluster), "t");
    for number in 0..4 {
        assert_exactly_once(&seen[&number], rounds * EACH);
    }
    assert!(epoch(&cluster) > rounds, "each head has an epoch of its own");
    // The control plane is there as well.
    client(&cluster).create_topic("later", TopicOptions::default()).unwrap();
    client(&cluster).delete_topic("later").unwrap();
}

#[test]
fn another_broker_takes_over_from_a_killed_head() {
    heads_die(&[], 6);
}

#[test]
fn another_broker_takes_over_the_leaders_allocator() {
    heads_die(&["--allocator", "leader"], 3);
}

/// Epoch of the head that leads.
fn epoch(cluster: &Cluster) -> u64 {
    cluster.inspect()["control_block"]["epoch"].as_u64().unwrap()
}

#[test]
fn a_head_that_stands_still_is_replaced_and_cannot_order_when_it_goes_on() {
    const EACH: u64 = 2000;
    const ROUNDS: u64 = 6;
    let cluster = start(3, &[]);
    client(&cluster).create_topic("t", TopicOptions { order: Order::Strong, ..TopicOptions::default() }).unwrap();
    let rounds = AtomicU64::new(0);
    std::thread::scope(|scope| {
        for number in 0..4 {
            let publisher = client(&cluster).publisher("t").unwrap();
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
            let (stopped, before) = (head(&cluster), epoch(&cluster));
            signal(&cluster.brokers[stopped], "-STOP");
            eventually("another leads", || epoch(&cluster) > before);
            rounds.store(round, Ordering::SeqCst);
            std::thread::sleep(Duration::from_millis(50));
            // In the middle of whatever it was doing.
            signal(&cluster.brokers[stopped], "-CONT");
        }
    });
    let seen = history(&client(&cluster), "t");
    for number in 0..4 {
        assert_exactly_once(&seen[&number], ROUNDS * EACH);
    }
    // It follows now, and can be the head again.
    client(&cluster).create_topic("later", TopicOptions::default()).unwrap();
}

#[test]
fn a_head_of_the_leaders_allocator_is_replaced_only_when_it_is_gone() {
    let mut cluster = start(2, &["--allocator", "leader"]);
    client(&cluster).create_topic("t", TopicOptions::default()).unwrap();
    let stopped = head(&cluster);
    signal(&cluster.brokers[stopped], "-STOP");
    // Much longer than its lease: it could go on at any moment, and give away what another gave.
    std::thread::sleep(Duration::from_millis(1000));
    assert_eq!(epoch(&cluster), 1);
    kill(&mut cluster, stopped);
    eventually("another leads", || epoch(&cluster) == 2);
}

#[test]
fn what_a_dead_head_held_for_a_gap_needs_no_lease() {
    // A gap lease that would outlast the test's patience.
    let environment = [("EMBARCADERO_BROKER_GAP_LEASE_MS", "600000"), ("EMBARCADERO_BROKER_BROKER_LEASE_MS", "500")];
    let mut cluster = Cluster::start(3, REGION, &environment);
    let publishing = client(&cluster);
    publishing.create_topic("t", TopicOptions { order: Order::Strong, ..TopicOptions::default() }).unwrap();
    let publisher = publishing.publisher("t").unwrap();
    for round in 0..4u64 {
        for number in round * 2000..(round + 1) * 2000 {
            publisher.publish_wait(&message(0, number)).unwrap();
        }
        let dead = head(&cluster);
        let dead = kill(&mut cluster, dead);
        publisher.flush().unwrap();
        restart(&mut cluster, &dead);
    }
    eventually("all brokers are back", || client(&cluster).cluster().unwrap().brokers.len() == 3);
    assert_exactly_once(&history(&client(&cluster), "t")[&0], 8000);
}
