//! Support for tests of RDMA, on devices of the host and on NICs in software.

use super::{Cluster, PATIENCE, assert_exactly_once, history, message, parse};
use embarcadero_client::{Client, ClientConfig, Order, Start, TopicOptions, TransportKind};
use std::process::Command;
use std::thread::JoinHandle;

pub(crate) const REGION: &[&str] = &["--size", "192MiB", "--segment-size", "4MiB"];

/// Runs shell commands.
pub(crate) fn shell(commands: &str) -> String {
    let said = Command::new("sh").args(["-ec", commands]).output().unwrap();
    assert!(said.status.success(), "{commands}: {}", String::from_utf8_lossy(&said.stderr));
    String::from_utf8(said.stdout).unwrap()
}

/// Makes a client over `transport`, whose batches are so small that a test has many.
pub(crate) fn over(transport: TransportKind, cluster: &Cluster) -> Client {
    Client::connect(ClientConfig { transport, ..small(cluster) }).unwrap()
}

pub(crate) fn small(cluster: &Cluster) -> ClientConfig {
    ClientConfig { batch_size: Some(32 << 10), buffer_bytes: 1 << 20, ..cluster.config() }
}

pub(crate) fn strong() -> TopicOptions {
    TopicOptions { order: Order::Strong, ..TopicOptions::default() }
}

/// Publishes `count` messages as publisher `number`, from a thread of its own.
pub(crate) fn publish(client: Client, topic: &'static str, number: u32, count: u64) -> JoinHandle<()> {
    std::thread::spawn(move || {
        let publisher = client.publisher(topic).unwrap();
        for message_number in 0..count {
            publisher.publish_wait(&message(number, message_number)).unwrap();
        }
        publisher.flush().unwrap();
        publisher.close().unwrap();
    })
}

/// Publishes with two publishers over `transport` and one over TCP, and checks order and content.
///
/// One subscriber over `transport` follows, others come afterwards over both.
pub(crate) fn order_and_integrity(transport: TransportKind, cluster: &Cluster, count: u64) {
    let client = over(transport, cluster);
    client.create_topic("t", strong()).unwrap();
    let mut subscriber = client.subscriber("t", Start::Earliest).unwrap();
    let tcp = Client::connect(small(cluster)).unwrap();
    let publishers = [
        publish(over(transport, cluster), "t", 0, count),
        publish(over(transport, cluster), "t", 1, count),
        publish(tcp, "t", 2, count),
    ];
    let mut followed = Vec::new();
    while (followed.len() as u64) < 3 * count {
        let message = subscriber.next(PATIENCE).unwrap().expect("nothing more came");
        assert_eq!(message.offset, followed.len() as u64);
        followed.push(message.payload.to_vec());
    }
    for publisher in publishers {
        publisher.join().unwrap();
    }
    let seen = history(&client, "t");
    let over_tcp = history(&cluster.client(), "t");
    assert_eq!(seen, over_tcp, "{} and TCP deliver different streams", transport.name());
    for number in 0..3 {
        assert_exactly_once(&seen[&number], count);
    }
    for (offset, payload) in followed.iter().enumerate() {
        let (publisher, number) = parse(payload);
        assert_eq!(payload, &message(publisher, number));
        assert_eq!(seen[&publisher][number as usize], (number, offset as u64));
    }
    let mut verify = cluster.command(&["verify", "t"]);
    assert!(verify.env("EMBARCADERO_CLIENT_TRANSPORT", transport.name()).status().unwrap().success());
}
