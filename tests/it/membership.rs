//! Promise: with etcd, one broker at a time is elected. While etcd is away topics go on, and nobody is elected.

use crate::support::etcd::Etcd;
use crate::support::{Cluster, assert_exactly_once, eventually, history, message, refused};
use embarcadero_client::{Order, Publisher, TopicOptions};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const REGION: &[&str] = &["--size", "256MiB", "--segment-size", "1MiB"];
const COUNT: u64 = 3000;

/// Starts a cluster whose leader is elected by `etcd`.
fn cluster(etcd: &Etcd, brokers: u32, create: &[&str], more: &[(&str, &str)]) -> Cluster {
    // A member that is down comes first.
    let endpoints = etcd.endpoints().replacen('[', "[\"http://127.0.0.1:9\", ", 1);
    let environment = [("EMBARCADERO_BROKER_MEMBERSHIP", "etcd"), ("EMBARCADERO_BROKER_ETCD__ENDPOINTS", &endpoints)];
    Cluster::start(brokers, &[REGION, create].concat(), &[&environment, more].concat())
}

fn strong() -> TopicOptions {
    TopicOptions { order: Order::Strong, ..TopicOptions::default() }
}

fn membership(cluster: &Cluster) -> String {
    cluster.view().membership
}

/// Publishes `COUNT` messages in each of `total` rounds. `rounds` says how many rounds have ended.
fn publish_in_rounds(publisher: &Publisher, number: u32, total: u64, rounds: &AtomicU64) {
    for message_number in 0..total * COUNT {
        while message_number >= (rounds.load(Ordering::SeqCst) + 1) * COUNT {
            std::thread::sleep(Duration::from_millis(1));
        }
        publisher.publish_wait(&message(number, message_number)).unwrap();
    }
    publisher.flush().unwrap();
}

/// Leaders are killed and stopped in turn. Memory is taken for not coherent, so that only etcd and the region's tables
/// decide.
#[test]
fn etcd_elects_the_next_leader() {
    const ROUNDS: u64 = 6;
    let etcd = Etcd::start([127, 0, 0, 1].into());
    let lease = ("EMBARCADERO_BROKER_LEADER_LEASE_MS", "100");
    let environment = [("EMBARCADERO_BROKER_CXL__COHERENCE", "none"), lease];
    let mut cluster = cluster(&etcd, 3, &["--allocator", "partitioned", "--max-brokers", "4"], &environment);
    assert_eq!(membership(&cluster), "etcd");
    let listed = cluster.assert_command(&["brokers"]);
    assert!(listed.contains("\tleader\n") && listed.ends_with("membership: etcd\n"), "{listed}");
    cluster.client_of_all().create_topic("t", strong()).unwrap();
    let rounds = AtomicU64::new(0);
    let mut terms = vec![cluster.term()];
    std::thread::scope(|scope| {
        for number in 0..2 {
            let (publisher, rounds) = (cluster.client_of_all().publisher("t").unwrap(), &rounds);
            scope.spawn(move || publish_in_rounds(&publisher, number, ROUNDS, rounds));
        }
        for round in 1..=ROUNDS {
            std::thread::sleep(Duration::from_millis(50));
            let index = cluster.leader();
            if round % 2 == 0 {
                let dead = cluster.kill(index);
                cluster.await_another_leader(dead.id);
                cluster.restart(&dead);
            } else {
                cluster.brokers[index].signal("-STOP");
                cluster.await_another_leader(cluster.brokers[index].id);
                cluster.brokers[index].signal("-CONT");
            }
            terms.push(cluster.term());
            rounds.store(round, Ordering::SeqCst);
        }
    });
    let seen = history(&cluster.client_of_all(), "t");
    for number in 0..2 {
        assert_exactly_once(&seen[&number], ROUNDS * COUNT);
    }
    assert!(terms.is_sorted(), "{terms:?}");
}

#[test]
fn while_etcd_is_away_topics_go_on_and_nobody_is_elected() {
    let mut etcd = Etcd::start([127, 0, 0, 1].into());
    // A leader that is only slow must keep its lease, as its term is compared.
    let mut cluster = cluster(&etcd, 3, &[], &[("EMBARCADERO_BROKER_ETCD__LEASE_S", "60")]);
    cluster.client_of_all().create_topic("t", strong()).unwrap();
    let publisher = cluster.client_of_all().publisher("t").unwrap();
    let mut next = 0;
    let mut publish = |flush: bool| {
        for number in next..next + COUNT {
            publisher.publish_wait(&message(0, number)).unwrap();
        }
        next += COUNT;
        if flush {
            publisher.flush().unwrap();
        }
    };
    publish(true);
    let first = cluster.term();

    // Restarted with what it knew, while the leader leads: the same goes on.
    etcd.kill();
    eventually("the loss is told", || membership(&cluster).contains("no leader can be elected"));
    publish(true);
    etcd.restart();
    eventually("it is back", || membership(&cluster) == "etcd");
    publish(true);
    assert_eq!(cluster.term(), first);

    // The leader dies while it is away: the others wait.
    etcd.kill();
    eventually("the loss is told", || membership(&cluster).contains("no leader can be elected"));
    let leader = cluster.leader();
    let dead = cluster.kill(leader);
    eventually("another broker tells it", || cluster.assert_command(&["brokers"]).contains("no leader can be elected"));
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(cluster.term(), first, "nobody can have been elected");
    etcd.restart();
    eventually("another is elected", || cluster.term() > first);
    cluster.restart(&dead);
    publish(true);

    // It comes back and knows nothing: the leader stays, and the next has a higher term all the same.
    let second = cluster.term();
    etcd.wipe();
    etcd.restart();
    eventually("it is back", || membership(&cluster) == "etcd");
    publish(true);
    assert_eq!(cluster.term(), second);
    let leader = cluster.leader();
    cluster.kill(leader);
    eventually("another is elected", || cluster.term() > second);
    publish(true);
    assert_exactly_once(&history(&cluster.client_of_all(), "t")[&0], next);
}

#[test]
fn a_broker_without_etcd_or_with_the_wrong_one_says_so() {
    let etcd = Etcd::start([127, 0, 0, 1].into());
    let cluster = cluster(&etcd, 1, &[], &[]);
    let region = cluster.region.to_str().unwrap();
    let broker = ["broker", "--region", region];
    let refuse = |changes: &[(&str, &str)], reason: &str| refused(&broker, changes, reason);
    let etcd = ("EMBARCADERO_BROKER_MEMBERSHIP", "etcd");
    refuse(&[etcd], "etcd.endpoints is []");
    let nobody = ("EMBARCADERO_BROKER_ETCD__ENDPOINTS", "[\"http://127.0.0.1:9\"]");
    refuse(&[etcd, nobody], "membership is etcd, but etcd at");
    let tls = ("EMBARCADERO_BROKER_ETCD__ENDPOINTS", "[\"https://127.0.0.1:9\"]");
    refuse(&[etcd, tls], "https://127.0.0.1:9/ is not http://HOST:PORT");
    refuse(&[("EMBARCADERO_BROKER_CXL__COHERENCE", "none")], "membership: etcd elects");
    refuse(&[("EMBARCADERO_BROKER_ETCD__LEASE_S", "1")], "etcd.lease_s is 1; it must be 2 to 3600");
}

/// Writes the entry of a broker that another host's process has, and came later.
fn take_id(etcd: &Etcd, cluster: &Cluster, id: u32) {
    let report = cluster.inspect();
    let uuid = report["superblock"]["uuid"].as_str().unwrap();
    let member = serde_json::json!({
        "broker": id,
        "incarnation": 77,
        "host": "elsewhere",
        "boot": "another",
        "process": 1,
        "data": "192.0.2.1:1",
        "control": "192.0.2.1:2",
    });
    etcd.put(format!("/embarcadero/{uuid}/brokers/{id}"), member.to_string());
}

#[test]
fn a_broker_whose_id_is_taken_on_another_host_changes_nothing() {
    let etcd = Etcd::start([127, 0, 0, 1].into());
    let mut cluster = cluster(&etcd, 2, &[], &[]);
    let mut left = cluster.brokers.remove(1);
    assert_eq!(left.id.0, 1);
    left.signal("-TERM");
    assert!(left.child.wait().unwrap().success());
    take_id(&etcd, &cluster, 1);
    let row = || {
        let report = cluster.inspect();
        let row = report["brokers"].as_array().unwrap().iter().find(|row| row["id"] == 1).cloned();
        (row.expect("a row of broker 1"), report["segments"].clone())
    };
    let before = row();
    let endpoints = etcd.endpoints();
    let environment = [("EMBARCADERO_BROKER_MEMBERSHIP", "etcd"), ("EMBARCADERO_BROKER_ETCD__ENDPOINTS", &endpoints)];
    let region = cluster.region.to_str().unwrap();
    let broker = ["broker", "--region", region, "--id", "1", "--control", "127.0.0.1:0"];
    refused(&broker, &environment, "broker id 1 is taken by process 1 of host elsewhere");
    assert_eq!(row(), before);
}

#[test]
fn a_broker_whose_id_another_host_took_ends() {
    let etcd = Etcd::start([127, 0, 0, 1].into());
    let mut cluster = cluster(&etcd, 1, &[], &[]);
    take_id(&etcd, &cluster, 0);
    let mut ended = None;
    eventually("the broker ends", || {
        ended = cluster.brokers[0].child.try_wait().unwrap();
        ended.is_some()
    });
    assert_eq!(ended.unwrap().code(), Some(1));
}
