//! Promise: brokers join and leave under load, and the order goes on.

use crate::support::{Broker, Cluster, PATIENCE, assert_exactly_once, eventually, message, parse};
use embarcadero_client::{BrokerId, Order, Start, TopicOptions};
use std::collections::BTreeSet;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

/// Two brokers become four, and then the first two leave, the leader among them. Publishers use the brokers that joined. A
/// reader that follows all along sees each message once and in order.
#[test]
fn brokers_join_and_leave_under_load() {
    let create = ["--size", "256MiB", "--segment-size", "1MiB"];
    // A broker that is late must not look like a gap.
    let mut cluster = Cluster::start(2, &create, &[("EMBARCADERO_BROKER_GAP_LEASE_MS", "600000")]);
    let client = cluster.client_of_all();
    client.create_topic("t", TopicOptions { order: Order::Strong, ..TopicOptions::default() }).unwrap();
    let mut subscriber = client.subscriber("t", Start::Earliest).unwrap();
    let done = AtomicBool::new(false);
    let counts: Vec<u64> = std::thread::scope(|scope| {
        let publishing: Vec<_> = (0..3)
            .map(|number| {
                let (publisher, done) = (client.publisher("t").unwrap(), &done);
                scope.spawn(move || {
                    let mut count = 0;
                    while !done.load(Ordering::SeqCst) {
                        publisher.publish_wait(&message(number, count)).unwrap();
                        count += 1;
                        if count % 8 == 0 {
                            std::thread::sleep(Duration::from_millis(1));
                        }
                    }
                    publisher.flush().unwrap();
                    assert_eq!(publisher.stats().sessions_reopened, 0, "leaving fenced a session");
                    count
                })
            })
            .collect();
        // Each broker that is there receives batches: those that joined, too.
        let mut seen: Vec<Vec<(u64, u64)>> = vec![Vec::new(); 3];
        let mut read_until_all_receive = |brokers: Range<u32>| {
            let mut heard = BTreeSet::new();
            while !brokers.clone().all(|broker| heard.contains(&BrokerId(broker))) {
                let batch = subscriber.next_batch(PATIENCE).unwrap().expect("a batch in time");
                heard.insert(batch.broker);
                for message in batch.messages() {
                    let (publisher, number) = parse(message.payload);
                    seen[publisher as usize].push((number, message.offset));
                }
            }
        };
        read_until_all_receive(0..2);
        cluster.add(&[]);
        cluster.add(&[]);
        cluster.await_brokers(4);
        read_until_all_receive(0..4);
        for _ in 0..2 {
            let mut leaving = cluster.brokers.remove(0);
            leaving.signal("-TERM");
            assert!(leaving.child.wait().unwrap().success());
        }
        read_until_all_receive(2..4);
        eventually("two are left", || cluster.view().brokers.len() == 2);
        done.store(true, Ordering::SeqCst);
        let counts: Vec<u64> = publishing.into_iter().map(|thread| thread.join().unwrap()).collect();
        subscriber
            .drain(|message| {
                let (publisher, number) = parse(message.payload);
                seen[publisher as usize].push((number, message.offset));
            })
            .unwrap();
        for (seen, count) in seen.iter().zip(&counts) {
            assert_exactly_once(seen, *count);
        }
        counts
    });
    assert!(counts.iter().all(|count| *count > 0), "{counts:?}");
}

/// A subscriber reads the streams of brokers that join later, when each broker has a stream of its own. It reads nothing
/// that was published before it subscribed.
#[test]
fn a_subscriber_reads_the_streams_of_brokers_that_join() {
    let create = ["--size", "64MiB", "--segment-size", "1MiB", "--max-brokers", "2"];
    let mut cluster = Cluster::start(1, &create, &[]);
    let client = cluster.client_of_all();
    for order in [Order::Broker, Order::None] {
        client.create_topic(&order.to_string(), TopicOptions { order, ..TopicOptions::default() }).unwrap();
        let before = client.publisher(&order.to_string()).unwrap();
        before.publish(&message(9, 0)).unwrap();
        before.close().unwrap();
    }
    let subscribe = |order: Order| (order, client.subscriber(&order.to_string(), Start::Latest).unwrap());
    let mut subscribers = [Order::Broker, Order::None].map(subscribe);
    for (_, subscriber) in &mut subscribers {
        assert!(subscriber.next(Duration::ZERO).unwrap().is_none());
        // The position is that of the stream once its broker has answered.
        assert_eq!(subscriber.drain(|_| {}).unwrap(), 0);
    }
    cluster.add(&[]);
    cluster.await_brokers(2);
    let joined = cluster.view().brokers.iter().map(|broker| broker.id).max();
    for (order, subscriber) in &mut subscribers {
        let publisher = cluster.client_of_all().publisher(&order.to_string()).unwrap();
        let (mut heard, mut number) = (BTreeSet::new(), 0);
        while heard.len() < 2 {
            publisher.publish(&message(0, number)).unwrap();
            publisher.flush().unwrap();
            number += 1;
            let message = subscriber.next(PATIENCE).unwrap().expect("a message in time");
            assert_eq!(parse(message.payload).0, 0, "{order:?}: a message from before the subscription");
            heard.extend(message.stream);
        }
        assert_eq!(heard.last().copied(), joined, "{order:?}");
    }
}

/// A broker that is gone for good keeps no memory. The leader gives it back once retention has trimmed what the broker
/// received.
#[test]
fn the_memory_of_a_broker_that_is_gone_comes_back() {
    for allocator in ["bitmap", "partitioned", "leader"] {
        let create = ["--size", "64MiB", "--segment-size", "1MiB", "--max-brokers", "2", "--allocator", allocator];
        let mut cluster = Cluster::start(2, &create, &[]);
        let client = cluster.client_of_all();
        for (topic, order) in [("t", Order::Strong), ("own", Order::Broker)] {
            let options = TopicOptions { order, retention_bytes: 4 << 20, ..TopicOptions::default() };
            client.create_topic(topic, options).unwrap();
            let publisher = client.publisher(topic).unwrap();
            for number in 0..20_000 {
                publisher.publish_wait(&message(0, number)).unwrap();
            }
            publisher.flush().unwrap();
        }
        let held = |cluster: &Cluster| {
            let report = cluster.inspect();
            let used = report["segments"]["used"].as_array().unwrap().clone();
            let blog = |segment: &serde_json::Value| {
                let owner = segment.to_string();
                ["\"broker\":1", "\"topic\":0"].iter().all(|part| owner.contains(part))
            };
            used.iter().filter(|segment| blog(segment)).count()
        };
        let gone = cluster.brokers.iter().position(|broker| broker.id == BrokerId(1)).unwrap();
        // Until broker 1 has received some: which of the two a publisher reaches first is open.
        let publisher = client.publisher("t").unwrap();
        eventually("broker 1 receives batches", || {
            for number in 0..1000 {
                publisher.publish_wait(&message(2, number)).unwrap();
            }
            publisher.flush().unwrap();
            held(&cluster) > 0
        });
        drop(publisher);
        let dead = cluster.kill(gone);
        let publisher = cluster.client_of_all().publisher("t").unwrap();
        for number in 0..20_000 {
            publisher.publish_wait(&message(1, number)).unwrap();
        }
        publisher.flush().unwrap();
        eventually("its segments come back", || held(&cluster) == 0);
        // It can come back, too.
        cluster.restart(&dead);
        cluster.await_brokers(2);
        cluster.assert_command(&["verify", "t"]);
    }
}

/// Topics that are deleted while a broker is dead.
const DELETED: [(&str, Order); 2] = [("t", Order::Strong), ("own", Order::Broker)];

/// Creates the topics, and publishes until broker 1 holds batches of each. Returns the number of segments that were free
/// before.
fn fill_at_both(cluster: &Cluster) -> u64 {
    let client = cluster.client_of_all();
    let free = cluster.view().segments_free;
    for (name, order) in DELETED {
        let topic = client.create_topic(name, TopicOptions { order, ..TopicOptions::default() }).unwrap();
        let parts = ["\"blog\"".to_owned(), "\"broker\":1".to_owned(), format!("\"topic\":{}", topic.id)];
        let publisher = client.publisher(name).unwrap();
        eventually("broker 1 receives batches", || {
            for number in 0..1000 {
                publisher.publish_wait(&message(0, number)).unwrap();
            }
            publisher.flush().unwrap();
            let report = cluster.inspect();
            let mut used = report["segments"]["used"].as_array().unwrap().iter().map(serde_json::Value::to_string);
            used.any(|segment| parts.iter().all(|part| segment.contains(part)))
        });
        publisher.close().unwrap();
    }
    free
}

/// Kills broker 1 and deletes the topics. Returns what [`Cluster::restart`] needs.
fn delete_without_broker_1(cluster: &mut Cluster) -> Broker {
    let gone = cluster.brokers.iter().position(|broker| broker.id == BrokerId(1)).unwrap();
    let dead = cluster.kill(gone);
    cluster.await_brokers(1);
    let client = cluster.client_of_all();
    DELETED.iter().for_each(|(name, _)| client.delete_topic(name).unwrap());
    dead
}

/// A topic is deleted while a broker is dead. The leader gives back what the broker held of it.
#[test]
fn a_topic_that_is_deleted_without_a_broker_leaves_no_memory_behind() {
    for allocator in ["bitmap", "partitioned", "leader"] {
        let create = ["--size", "64MiB", "--segment-size", "1MiB", "--max-brokers", "2", "--allocator", allocator];
        let mut cluster = Cluster::start(2, &create, &[]);
        let free = fill_at_both(&cluster);
        delete_without_broker_1(&mut cluster);
        eventually("its segments come back", || cluster.view().segments_free == free);
    }
}

/// A broker that comes back gives back what it held itself: the leader cannot see there that its process was gone.
#[test]
fn a_broker_that_comes_back_gives_back_what_it_held_of_deleted_topics() {
    let create = ["--size", "64MiB", "--segment-size", "1MiB", "--max-brokers", "2"];
    let environment = [("EMBARCADERO_BROKER_CXL__COHERENCE", "fabric"), ("EMBARCADERO_BROKER_BROKER_LEASE_MS", "5000")];
    let mut cluster = Cluster::start(2, &create, &environment);
    let free = fill_at_both(&cluster);
    let dead = delete_without_broker_1(&mut cluster);
    assert!(cluster.view().segments_free < free, "nobody may touch what the broker holds");
    cluster.restart(&dead);
    eventually("its segments come back", || cluster.view().segments_free == free);
}
