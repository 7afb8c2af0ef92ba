//! Promise: when the region is lost, its mirror tells to the last message what was in it. Batches that disks have come back,
//! the others are named as lost, and offsets and sessions go on.

use crate::support::{Cluster, message, parse, refused, region_path, run};
use embarcadero_client::{Client, ClientConfig, ClientError, Order, Publisher, Start, TopicOptions};
use std::collections::BTreeSet;
use std::ops::Range;
use std::path::{Path, PathBuf};

const MIRROR: &str = "EMBARCADERO_BROKER_CXL__MIRROR";
const REPLICA: &str = "EMBARCADERO_BROKER_REPLICA__PATH";

/// Mirror's file, which is removed when the test ends.
struct Mirror(PathBuf);

impl Mirror {
    fn new() -> Self {
        Self(region_path())
    }

    fn path(&self) -> &str {
        self.0.to_str().unwrap()
    }
}

impl Drop for Mirror {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

fn create(mirror: &Mirror) -> Vec<&str> {
    vec!["--size", "128MiB", "--segment-size", "1MiB", "--mirror", mirror.path(), "--mirror-size", "32MiB"]
}

fn client(cluster: &Cluster, ack_level: u8) -> Client {
    let bootstrap = cluster.brokers.iter().map(|broker| broker.control.clone()).collect();
    let config =
        ClientConfig { ack_level, bootstrap, batch_size: Some(16 << 10), buffer_bytes: 1 << 20, ..cluster.config() };
    Client::connect(config).unwrap()
}

fn publish(publisher: &Publisher, numbers: Range<u64>) {
    for number in numbers {
        publisher.publish_wait(&message(0, number)).unwrap();
    }
    publisher.flush().unwrap();
}

/// Loses all brokers and the region, and makes another region with a mirror of its own.
fn lose(cluster: &mut Cluster, another: &Mirror) {
    while !cluster.brokers.is_empty() {
        cluster.kill(0);
    }
    std::fs::remove_file(&cluster.region).unwrap();
    let made = [&["region", "create", "--path", cluster.region.to_str().unwrap()], create(another).as_slice()].concat();
    assert!(run(&made).status.success());
}

/// Starts two brokers on the region that was rebuilt.
fn begin(cluster: &mut Cluster) {
    for _ in 0..2 {
        cluster.add(&[]);
    }
    cluster.await_brokers(2);
}

/// Rebuilds the region. Returns what the command says.
fn restore(cluster: &Cluster, mirror: &Mirror, more: &[&str]) -> Result<String, String> {
    let path = cluster.region.to_str().unwrap();
    let said = run(&[&["region", "restore", "--path", path, "--mirror", mirror.path()], more].concat());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if said.status.success() { Ok(text(&said.stdout)) } else { Err(text(&said.stderr)) }
}

/// Reads the offsets that a report names as lost.
fn lost(report: &str) -> BTreeSet<u64> {
    let range = |line: &str| -> Option<Range<u64>> {
        let (first, last) = line.split_once("offsets ")?.1.split_once(" to ")?;
        Some(first.parse().ok()?..last.trim().parse::<u64>().ok()? + 1)
    };
    report.lines().filter_map(range).flatten().collect()
}

/// Reads everything that is there, and goes on behind what is lost. Returns offsets and numbers.
fn read(client: &Client, topic: &str) -> Vec<(u64, u64)> {
    let mut seen = Vec::new();
    let mut start = Start::Earliest;
    loop {
        let mut subscriber = client.subscriber(topic, start).unwrap();
        match subscriber.drain(|message| seen.push((message.offset, parse(message.payload).1))) {
            Ok(_) => return seen,
            Err(ClientError::OffsetOutOfRange { earliest, .. }) => start = Start::Offset(earliest),
            Err(error) => panic!("{error}"),
        }
    }
}

/// No disk has anything. Everything that two leaders acknowledged is named as lost, and nothing else. Offsets go on behind
/// it.
#[test]
fn without_replicas_the_lost_offsets_are_named_exactly() {
    let (mirror, another) = (Mirror::new(), Mirror::new());
    let mut cluster = Cluster::start(3, &create(&mirror), &[(MIRROR, mirror.path())]);
    let options = TopicOptions { order: Order::Strong, ack_level: 1, ..TopicOptions::default() };
    client(&cluster, 1).create_topic("t", options).unwrap();
    client(&cluster, 1).create_topic("empty", options).unwrap();
    let publisher = client(&cluster, 1).publisher("t").unwrap();
    publish(&publisher, 0..1000);
    // The next leader writes the mirror on.
    let leader = cluster.leader();
    let dead = cluster.kill(leader);
    publish(&publisher, 1000..2500);
    cluster.restart(&dead);
    let leader = cluster.leader();
    cluster.kill(leader);
    publish(&publisher, 2500..3000);
    drop(publisher);
    lose(&mut cluster, &another);
    let refusal = restore(&cluster, &mirror, &[]).unwrap_err();
    assert_eq!(lost(&refusal), (0..3000).collect(), "{refusal}");
    let said = restore(&cluster, &mirror, &["--accept-loss"]).unwrap();
    assert_eq!(lost(&said), (0..3000).collect(), "{said}");
    cluster.set(MIRROR, another.path());
    begin(&mut cluster);
    let publisher = client(&cluster, 1).publisher("t").unwrap();
    publish(&publisher, 3000..3200);
    assert!(read(&client(&cluster, 1), "t").into_iter().eq((3000..3200).map(|number| (number, number))));
    let mut from_lost = client(&cluster, 1).subscriber("t", Start::Offset(7)).unwrap();
    let refusal = from_lost.next(crate::support::PATIENCE).map(drop).unwrap_err();
    assert!(matches!(refusal, ClientError::OffsetOutOfRange { earliest: 3000, .. }), "{refusal}");
    publish(&client(&cluster, 1).publisher("empty").unwrap(), 0..10);
    assert!(read(&client(&cluster, 1), "empty").into_iter().eq((0..10).map(|number| (number, number))));
}

/// Two replicas have a part each, and one of them is lost too. Batches of the other come back at their old offsets, and the
/// rest is named.
#[test]
fn what_a_disk_has_comes_back_and_the_rest_is_named() {
    const COUNT: u64 = 4000;
    let (mirror, another, disk) = (Mirror::new(), Mirror::new(), tempfile::tempdir().unwrap());
    let settings = [(MIRROR, mirror.path()), (REPLICA, disk.path().to_str().unwrap())];
    let mut cluster = Cluster::start(2, &create(&mirror), &settings);
    let options = TopicOptions { order: Order::Strong, ack_level: 2, replication_factor: 2, ..TopicOptions::default() };
    client(&cluster, 2).create_topic("t", options).unwrap();
    let publisher = client(&cluster, 2).publisher("t").unwrap();
    publish(&publisher, 0..COUNT);
    let before = read(&client(&cluster, 1), "t");
    drop(publisher);
    lose(&mut cluster, &another);
    let region = std::fs::read_dir(disk.path()).unwrap().next().unwrap().unwrap().path();
    let replica = |broker: u32| region.join(format!("replica-{broker}"));
    // Both have everything between them.
    let from = |broker| replica(broker).to_str().unwrap().to_owned();
    let both = restore(&cluster, &mirror, &["--dry-run", "--from", &from(0), &from(1)]).unwrap();
    assert_eq!(lost(&both), BTreeSet::new(), "{both}");
    let refusal = restore(&cluster, &mirror, &["--from", &from(0)]).unwrap_err();
    let missing = lost(&refusal);
    assert!((1..COUNT as usize).contains(&missing.len()), "{refusal}");
    restore(&cluster, &mirror, &["--accept-loss", "--from", &from(0)]).unwrap();
    cluster.set(MIRROR, another.path());
    let other_disk = tempfile::tempdir().unwrap();
    cluster.set(REPLICA, other_disk.path().to_str().unwrap());
    begin(&mut cluster);
    let expected: Vec<_> = before.into_iter().filter(|(offset, _)| !missing.contains(offset)).collect();
    assert_eq!(read(&client(&cluster, 1), "t"), expected);
    // It goes on behind them, and what is missing does not stop replicas.
    publish(&client(&cluster, 2).publisher("t").unwrap(), COUNT..COUNT + 100);
    let last = read(&client(&cluster, 1), "t").last().copied();
    assert_eq!(last, Some((COUNT + 99, COUNT + 99)));
}

#[test]
fn a_mirror_that_is_not_the_regions_is_refused() {
    let (mirror, other) = (Mirror::new(), Mirror::new());
    let cluster = Cluster::start(0, &create(&mirror), &[]);
    let foreign = Cluster::start(0, &create(&other), &[]);
    let broker = |region: &Path, mirror: Option<&Mirror>, reason: &str| {
        let arguments = ["broker", "--region", region.to_str().unwrap(), "--control", "127.0.0.1:0"];
        let environment: Vec<_> = mirror.map(|mirror| (MIRROR, mirror.path())).into_iter().collect();
        refused(&arguments, &environment, reason);
    };
    broker(&cluster.region, None, "cxl.mirror");
    broker(&cluster.region, Some(&other), "UUID");
    broker(&mirror.0, None, "role");
    broker(&cluster.region, Some(&Mirror(cluster.region.clone())), "role");
    drop(foreign);
    let path = region_path();
    let small =
        ["region", "create", "--path", path.to_str().unwrap(), "--mirror", "/dev/shm/no", "--mirror-size", "1MiB"];
    refused(&small, &[], "region size");
    assert!(!path.exists());
}
