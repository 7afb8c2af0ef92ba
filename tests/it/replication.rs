//! Promise: what was acknowledged at level 2 is on as many disks as the topic asks for, whatever dies afterwards.

use crate::support::{Cluster, PATIENCE, assert_exactly_once, eventually, history, message, parse, rebuild, run};
use embarcadero_client::{BrokerId, Client, ClientConfig, ClientError, Order, Publisher, Start, TopicOptions};
use std::path::{Path, PathBuf};
use std::time::SystemTime;
use tempfile::TempDir;

const REGION: &[&str] = &["--size", "256MiB", "--segment-size", "1MiB"];
const PATH: &str = "EMBARCADERO_BROKER_REPLICA__PATH";

/// Starts brokers that replicate below `disk`.
fn start(brokers: u32, disk: &TempDir) -> Cluster {
    let path = disk.path().to_str().unwrap();
    Cluster::start(brokers, REGION, &[(PATH, path)])
}

fn client(cluster: &Cluster, ack_level: u8) -> Client {
    let config = ClientConfig { ack_level, batch_size: Some(16 << 10), buffer_bytes: 1 << 20, ..cluster.config() };
    Client::connect(config).unwrap()
}

fn replicated(order: Order, replication_factor: u8) -> TopicOptions {
    TopicOptions { order, ack_level: 2, replication_factor, ..TopicOptions::default() }
}

fn publish(publisher: &Publisher, numbers: std::ops::Range<u64>) {
    for number in numbers {
        publisher.publish_wait(&message(0, number)).unwrap();
    }
}

fn now_us() -> u64 {
    SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_micros() as u64
}

/// Returns the directory in which a broker keeps its replicas.
fn replica_of(disk: &TempDir, broker: u32) -> PathBuf {
    let region = std::fs::read_dir(disk.path()).unwrap().next().unwrap().unwrap().path();
    region.join(format!("replica-{broker}"))
}

fn files(below: &Path) -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    for entry in std::fs::read_dir(below).unwrap().map(|entry| entry.unwrap().path()) {
        found.extend(if entry.is_dir() { files(&entry) } else { vec![entry] });
    }
    found.sort();
    found
}

/// Reports what could be rebuilt from these directories.
fn held(from: &[&Path]) -> Result<String, String> {
    let from: Vec<&str> = from.iter().map(|path| path.to_str().unwrap()).collect();
    let said = run(&[&["region", "restore", "--dry-run", "--from"], from.as_slice()].concat());
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    if said.status.success() { Ok(text(&said.stdout)) } else { Err(text(&said.stderr)) }
}

#[test]
fn all_that_was_acknowledged_survives_the_loss_of_everything_but_one_disk() {
    const COUNT: u64 = 3000;
    let disk = tempfile::tempdir().unwrap();
    let mut cluster = start(3, &disk);
    let publishing = client(&cluster, 2);
    let topics = [("s", Order::Strong), ("t", Order::Total), ("b", Order::Broker), ("n", Order::None)];
    let mut publishers = Vec::new();
    for (topic, order) in topics {
        publishing.create_topic(topic, replicated(order, 5)).unwrap_err();
        publishing.create_topic(topic, replicated(order, 3)).unwrap();
        let publisher = publishing.publisher(topic).unwrap();
        publish(&publisher, 0..COUNT);
        publisher.flush().unwrap();
        publishers.push(publisher);
    }
    drop(publishers);
    let before = history(&client(&cluster, 1), "s");
    // With a replication factor of 3, each of three brokers' batches is on the other two: any two hold everything.
    let (one, other) = (replica_of(&disk, 0), replica_of(&disk, 2));
    rebuild(&mut cluster, REGION, &[&one, &other]);
    let reading = client(&cluster, 1);
    assert_eq!(history(&reading, "s"), before, "the order changed");
    assert_exactly_once(&before[&0], COUNT);
    for (topic, _) in &topics[1..] {
        let mut numbers: Vec<u64> = Vec::new();
        let mut subscriber = reading.subscriber(topic, Start::Earliest).unwrap();
        subscriber.drain(|message| numbers.push(parse(message.payload).1)).unwrap();
        numbers.sort_unstable();
        numbers.dedup();
        assert_eq!(numbers, (0..COUNT).collect::<Vec<_>>(), "topic {topic}");
    }
    // It goes on where it was.
    let publisher = client(&cluster, 2).publisher("s").unwrap();
    publish(&publisher, COUNT..2 * COUNT);
    publisher.flush().unwrap();
    assert_exactly_once(&history(&reading, "s")[&0], 2 * COUNT);
    for (topic, _) in topics {
        cluster.assert_command(&["verify", topic]);
    }
}

/// The region keeps a small part of what was published. The disks together keep all of it.
#[test]
fn what_the_region_no_longer_holds_is_read_from_disks() {
    const COUNT: u64 = 40_000;
    for order in [Order::Strong, Order::Broker] {
        let disk = tempfile::tempdir().unwrap();
        let mut cluster = start(3, &disk);
        let publishing = client(&cluster, 2);
        let options = TopicOptions { retention_bytes: 2 << 20, ..replicated(order, 2) };
        publishing.create_topic("t", options).unwrap();
        // One that reads on slowly, all along: retention overtakes it, and it does not notice.
        let mut slow = client(&cluster, 1).subscriber("t", Start::Earliest).unwrap();
        let mut read = Vec::new();
        let publisher = publishing.publisher("t").unwrap();
        let mut noted = 0;
        for part in 0..40 {
            if part == 10 {
                // Everything so far was ordered before this, and nothing more.
                noted = 1 + now_us();
                eventually("the clock goes on", || now_us() > noted);
            }
            publish(&publisher, part * COUNT / 40..(part + 1) * COUNT / 40);
            publisher.flush().unwrap();
            for _ in 0..100 {
                read.push(parse(slow.next(PATIENCE).unwrap().expect("a message in time").payload).1);
            }
        }
        let (_, streams) = publishing.describe_topic("t").unwrap();
        assert!(streams.iter().all(|stream| stream.earliest_offset > 0), "all is in the region still: {streams:?}");
        slow.drain(|message| read.push(parse(message.payload).1)).unwrap();
        let check = |mut numbers: Vec<u64>, from: u64| {
            if !order.is_global() {
                numbers.sort_unstable();
            }
            assert!(numbers.iter().copied().eq(from..COUNT), "{order:?}: {} of {}", numbers.len(), COUNT - from);
        };
        check(read, 0);
        // Another broker's process knows no more than its disk and the others' do.
        let dead = cluster.kill(1);
        cluster.restart(&dead);
        cluster.await_brokers(3);
        let reading = client(&cluster, 1);
        let mut numbers = Vec::new();
        reading
            .subscriber("t", Start::Earliest)
            .unwrap()
            .drain(|message| numbers.push(parse(message.payload).1))
            .unwrap();
        check(numbers, 0);
        if order.is_global() {
            let mut numbers = Vec::new();
            let mut middle = reading.subscriber("t", Start::Offset(12_345)).unwrap();
            middle.drain(|message| numbers.push(parse(message.payload).1)).unwrap();
            check(numbers, 12_345);
            let mut numbers = Vec::new();
            let mut timed = reading.subscriber("t", Start::Timestamp(noted)).unwrap();
            timed.drain(|message| numbers.push(parse(message.payload).1)).unwrap();
            check(numbers, COUNT / 4);
            // What no disk has any more either is said to be gone.
            for broker in 0..3 {
                for file in files(&replica_of(&disk, broker)) {
                    std::fs::remove_file(file).unwrap();
                }
            }
            let gone = reading.subscriber("t", Start::Offset(12_345)).unwrap().next(PATIENCE).map(|_| ()).unwrap_err();
            assert!(matches!(gone, ClientError::OffsetOutOfRange { earliest, .. } if earliest > 12_345), "{gone}");
        }
    }
}

#[test]
fn a_dead_replica_is_replaced_and_catches_up_when_it_returns() {
    let disk = tempfile::tempdir().unwrap();
    let mut cluster = start(4, &disk);
    // Those that are started from now on write in the other way, into the same files.
    let uring = Path::new("/proc/sys/kernel/io_uring_disabled");
    if std::fs::read_to_string(uring).is_ok_and(|disabled| disabled.trim() == "0") {
        cluster.set("EMBARCADERO_BROKER_REPLICA__IO", "uring");
    } else {
        println!("SKIPPED: replica.io: uring, as this kernel does not allow it");
    }
    let publishing = client(&cluster, 2);
    publishing.create_topic("t", replicated(Order::Strong, 3)).unwrap();
    let publisher = publishing.publisher("t").unwrap();
    publish(&publisher, 0..2000);
    publisher.flush().unwrap();
    let dead = cluster.brokers.iter().position(|broker| broker.id == BrokerId(2)).unwrap();
    cluster.brokers[dead].kill();
    publish(&publisher, 2000..6000);
    publisher.flush().unwrap();
    cluster.brokers.remove(dead);
    cluster.add(&["--id", "2"]);
    cluster.await_brokers(4);
    publish(&publisher, 6000..8000);
    publisher.flush().unwrap();
    // Of the batches of brokers 0 and 1, brokers 0 and 2 have only what broker 2 has: also what came while it was away.
    let (zero, two) = (replica_of(&disk, 0), replica_of(&disk, 2));
    eventually("it has caught up", || held(&[&zero, &two]) == held(&[disk.path()]));
    rebuild(&mut cluster, REGION, &[&zero, &two]);
    assert_exactly_once(&history(&client(&cluster, 1), "t")[&0], 8000);
}

#[test]
fn without_enough_replicas_level_2_waits_and_level_1_goes_on() {
    let disk = tempfile::tempdir().unwrap();
    let mut cluster = start(2, &disk);
    let (durable, visible) = (client(&cluster, 2), client(&cluster, 1));
    durable.create_topic("t", replicated(Order::Strong, 3)).unwrap();
    let dead = cluster.brokers.iter().position(|broker| broker.id == BrokerId(1)).unwrap();
    cluster.brokers[dead].kill();
    cluster.brokers.remove(dead);
    cluster.await_brokers(1);
    let waiting = durable.publisher("t").unwrap();
    publish(&waiting, 0..100);
    let going_on = visible.publisher("t").unwrap();
    for number in 0..3000 {
        going_on.publish_wait(&message(1, number)).unwrap();
    }
    going_on.flush().unwrap();
    assert_eq!(waiting.stats().batches_acknowledged, 0);
    cluster.add(&["--id", "1"]);
    waiting.flush().unwrap();
    assert!(waiting.stats().batches_acknowledged > 0);
    let seen = history(&visible, "t");
    assert_exactly_once(&seen[&0], 100);
    assert_exactly_once(&seen[&1], 3000);
}

#[test]
fn a_full_disk_fails_its_replica_and_nothing_that_was_acknowledged() {
    let (disk, small) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let mut cluster = start(2, &disk);
    let tmpfs = "mount -t tmpfs -o size=1m none \"$EMBARCADERO_BROKER_REPLICA__PATH\"; exec \"$@\"";
    let path = format!("{PATH}={}", small.path().display());
    cluster
        .add_under(&["env", &path, "unshare", "--mount", "--map-root-user", "sh", "-ec", tmpfs, "sh"], &["--id", "2"]);
    cluster.await_brokers(3);
    let publishing = client(&cluster, 2);
    publishing.create_topic("t", replicated(Order::Strong, 3)).unwrap();
    let publisher = publishing.publisher("t").unwrap();
    publish(&publisher, 0..10_000);
    publisher.flush().unwrap();
    let report = cluster.inspect();
    let states: Vec<_> = report["brokers"].as_array().unwrap().iter().map(|broker| broker["replica"].clone()).collect();
    assert_eq!(states, ["running", "running", "failed"]);
    rebuild(&mut cluster, REGION, &[disk.path()]);
    assert_exactly_once(&history(&client(&cluster, 1), "t")[&0], 10_000);
}

#[test]
fn damage_is_found_and_fetched_again() {
    let disk = tempfile::tempdir().unwrap();
    let mut cluster = start(1, &disk);
    let publishing = client(&cluster, 2);
    publishing.create_topic("t", replicated(Order::Strong, 2)).unwrap();
    let publisher = publishing.publisher("t").unwrap();
    for round in 0..20 {
        publish(&publisher, round * 100..(round + 1) * 100);
        publisher.flush().unwrap();
    }
    drop(publisher);
    cluster.brokers[0].kill();
    let file = files(disk.path()).pop().unwrap();
    let mut bytes = std::fs::read(&file).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 0xff;
    bytes.truncate(bytes.len() - 10_000);
    std::fs::write(&file, bytes).unwrap();
    assert!(held(&[disk.path()]).unwrap_err().contains("topic t: offsets "));
    cluster.brokers.clear();
    cluster.add(&[]);
    eventually("the damaged batches are copied again", || held(&[disk.path()]).is_ok());
    let publishing = client(&cluster, 2);
    let publisher = publishing.publisher("t").unwrap();
    publish(&publisher, 2000..2100);
    publisher.flush().unwrap();
    rebuild(&mut cluster, REGION, &[disk.path()]);
    assert_exactly_once(&history(&client(&cluster, 1), "t")[&0], 2100);
}
