//! Promise: brokers join and leave under load, and the order goes on.
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

mod support;

use embarcadero_client::{Order, Start, TopicOptions};
use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;
use support::{Cluster, PATIENCE, assert_exactly_once, eventually, message, parse};

/// Two brokers, then four, then the first two leave, the head among them. Publishers use those that came, and a reader who
/// follows all along sees each message once and in order.
#[test]
fn brokers_join_and_leave_under_load() {
    let create = ["--size", "256MiB", "--segment-size", "1MiB"];
    let mut cluster = Cluster::start(2, &create, &[("EMBARCADERO_BROKER_BROKER_LEASE_MS", "500")]);
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
        let mut read_until_all_receive = |brokers: &[u32]| {
            let mut heard = BTreeSet::new();
            while !brokers.iter().all(|broker| heard.contains(broker)) {
                let batch = subscriber.next_batch(PATIENCE).unwrap().expect("a batch in time");
                heard.insert(batch.broker);
                for message in batch.messages() {
                    let (publisher, number) = parse(message.payload);
                    seen[publisher as usize].push((number, message.offset));
                }
            }
        };
        read_until_all_receive(&[0, 1]);
        cluster.add(&[]);
        cluster.add(&[]);
        cluster.await_brokers(4);
        read_until_all_receive(&[0, 1, 2, 3]);
        for _ in 0..2 {
            let mut leaving = cluster.brokers.remove(0);
            leaving.signal("-TERM");
            assert!(leaving.child.wait().unwrap().success());
        }
        read_until_all_receive(&[2, 3]);
        eventually("two are left", || cluster.client_of_all().cluster().unwrap().brokers.len() == 2);
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
