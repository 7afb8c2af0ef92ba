//! Promise: memory is bounded, and running out of it is a wait, then an error, never a loss.

use crate::bad_input::{answer, refusal};
use crate::support::{Cluster, PATIENCE, eventually, message, run};
use embarcadero_client::{Client, ClientConfig, ClientError, Order, Start, TopicOptions};
use embarcadero_wire::batch::{BatchBuilder, BatchOrigin};
use embarcadero_wire::{ErrorCode, FRAME_BYTES, Frame, OpenPublish, StartKind, Stream, Subscribe};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

fn small(cluster: &Cluster) -> Client {
    Client::connect(ClientConfig { batch_size: Some(64 << 10), buffer_bytes: 1 << 20, ..cluster.config() }).unwrap()
}

fn fill(client: &Client, topic: &str, bytes: u64) -> Result<u64, ClientError> {
    let publisher = client.publisher(topic)?;
    let message = [7u8; 1000];
    let count = bytes / 1000;
    for _ in 0..count {
        publisher.publish_wait(&message)?;
    }
    publisher.flush()?;
    Ok(count)
}

#[test]
fn an_exhausted_pool_pushes_back_then_says_so_and_keeps_what_it_has() {
    let environment = [("EMBARCADERO_BROKER_EXHAUSTED_WAIT_MS", "2000"), ("EMBARCADERO_BROKER_GAP_LEASE_MS", "200")];
    let cluster =
        Cluster::start(2, &["--size", "120MiB", "--segment-size", "1MiB", "--max-brokers", "4"], &environment);
    let client = small(&cluster);
    client.create_topic("full", TopicOptions::default()).unwrap();
    let error = fill(&client, "full", 1 << 30).unwrap_err();
    assert!(matches!(error, ClientError::Broker { code: ErrorCode::PoolExhausted, .. }), "{error}");
    assert!(error.to_string().contains("exhausted"), "{error}");
    let mut subscriber = client.subscriber("full", Start::Earliest).unwrap();
    let mut due = 0;
    subscriber
        .drain(|message| {
            assert_eq!(message.offset, due);
            assert_eq!(message.payload, [7; 1000]);
            due += 1;
        })
        .unwrap();
    assert!(due > 10_000);
    // Deleting the topic gives all of it back.
    client.delete_topic("full").unwrap();
    let cluster_now = client.cluster().unwrap();
    assert_eq!(cluster_now.segments_free, cluster_now.segments_total);
    client.create_topic("full", TopicOptions::default()).unwrap();
    fill(&client, "full", 10 << 20).unwrap();
}

/// `publish_wait` runs only a few batches ahead of a connection that takes nothing, however large the buffer is. It fills
/// the buffer while there is no connection.
#[test]
fn publish_wait_stays_close_to_its_connections_while_there_are_any() {
    const COUNT: u64 = 40_000;
    let mut cluster = Cluster::start(1, &["--size", "120MiB", "--segment-size", "1MiB"], &[]);
    let client = Client::connect(ClientConfig {
        batch_size: Some(64 << 10),
        buffer_bytes: 64 << 20,
        progress_timeout_ms: 600_000,
        ..cluster.config()
    })
    .unwrap();
    client.create_topic("ahead", TopicOptions::default()).unwrap();
    let publisher = client.publisher("ahead").unwrap();
    publisher.publish_wait(&message(0, 0)).unwrap();
    publisher.flush().unwrap();
    cluster.brokers[0].signal("-STOP");
    let published = AtomicU64::new(0);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            for _ in 0..COUNT {
                publisher.publish_wait(&[7; 1000]).unwrap();
                published.fetch_add(1, Ordering::Relaxed);
            }
        });
        eventually("publishing starts", || published.load(Ordering::Relaxed) > 0);
        // The bound holds at every moment, however slow the machine is. On a fast one a publisher without it exceeds it soon.
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(2) {
            let count = published.load(Ordering::Relaxed);
            assert!(count < COUNT / 4, "{count} KB ahead of a connection that takes nothing");
            std::thread::sleep(Duration::from_millis(10));
        }
        drop(cluster.kill(0));
        eventually("the buffer takes the rest", || published.load(Ordering::Relaxed) == COUNT);
    });
}

fn retention_recycles(create: &[&str], order: Order) {
    let mut arguments = vec!["--size", "120MiB", "--segment-size", "1MiB", "--max-brokers", "4"];
    arguments.extend(create);
    let mut cluster = if create.contains(&"partitioned") {
        let mut cluster = Cluster::start(0, &arguments, &[("EMBARCADERO_BROKER_CXL__COHERENCE", "none")]);
        cluster.set("EMBARCADERO_BROKER_ROLE", "leader");
        cluster.add(&[]);
        cluster.set("EMBARCADERO_BROKER_ROLE", "follower");
        cluster
    } else {
        Cluster::start(1, &arguments, &[])
    };
    cluster.add(&[]);
    cluster.await_brokers(2);
    let client = small(&cluster);
    let options = TopicOptions { order, retention_bytes: 8 << 20, ..TopicOptions::default() };
    client.create_topic("ring", options).unwrap();
    // Several times what the pool holds.
    let count = fill(&client, "ring", 300 << 20).unwrap();
    let (_, streams) = client.describe_topic("ring").unwrap();
    assert_eq!(streams.iter().map(|stream| stream.next_offset).sum::<u64>(), count);
    assert!(streams.iter().all(|stream| stream.earliest_offset > 0), "{streams:?}");
    if order.is_global() {
        let mut late = client.subscriber("ring", Start::Offset(0)).unwrap();
        let error = late.next(PATIENCE).map(|_| ()).unwrap_err();
        assert!(matches!(error, ClientError::OffsetOutOfRange { earliest, .. } if earliest > 0), "{error}");
        let mut kept = 0;
        eventually("reading what is kept", || {
            // Trimming may still be catching up, and then overtakes the reader.
            late.seek(Start::Earliest);
            kept = 0;
            let read = late.drain(|message| {
                assert_eq!(message.payload, [7; 1000]);
                kept += 1;
            });
            assert!(matches!(read, Ok(_) | Err(ClientError::OffsetOutOfRange { .. })));
            read.is_ok()
        });
        assert!(kept > 1000);
    }
}

#[test]
fn retention_recycles_with_the_atomic_bitmap() {
    retention_recycles(&["--allocator", "bitmap"], Order::Strong);
    retention_recycles(&["--allocator", "bitmap"], Order::Broker);
}

#[test]
fn retention_recycles_with_partitions_on_memory_that_is_not_coherent() {
    retention_recycles(&["--allocator", "partitioned"], Order::Strong);
}

#[test]
fn retention_recycles_with_the_leader_allocator() {
    retention_recycles(&["--allocator", "leader"], Order::Strong);
}

/// A subscriber that retention overtakes again and again is told each time. Its stream never skips in silence.
#[test]
fn a_subscriber_that_is_overtaken_is_told() {
    let cluster = Cluster::start(2, &["--size", "120MiB", "--segment-size", "1MiB"], &[]);
    // Batches of half a segment: retention moves in steps that are shorter than what a broker queues.
    let config = ClientConfig { batch_size: Some(512 << 10), buffer_bytes: 8 << 20, ..cluster.config() };
    let client = Client::connect(config).unwrap();
    client.create_topic("fast", TopicOptions { retention_bytes: 16 << 20, ..TopicOptions::default() }).unwrap();
    let mut subscriber = client.subscriber("fast", Start::Earliest).unwrap();
    let done = AtomicBool::new(false);
    let earliest = || client.describe_topic("fast").unwrap().1[0].earliest_offset;
    let overtaken = std::thread::scope(|scope| {
        let reader = scope.spawn(|| {
            let (mut overtaken, mut read, mut last) = (0, 0u64, 0);
            while !done.load(Ordering::Relaxed) {
                // The client itself checks that offsets follow one another.
                match subscriber.next_batch(Duration::from_millis(10)) {
                    Ok(batch) => {
                        read += 1;
                        if let Some(message) = batch.iter().flat_map(|batch| batch.messages()).last() {
                            last = message.offset;
                        }
                    }
                    Err(ClientError::OffsetOutOfRange { .. }) => {
                        overtaken += 1;
                        subscriber.seek(Start::Earliest);
                    }
                    Err(error) => panic!("after {read} batches: {error}"),
                }
                // Falls behind, with batches queued for it in the broker.
                while read.is_multiple_of(8) && earliest() <= last && !done.load(Ordering::Relaxed) {
                    std::thread::sleep(Duration::from_millis(1));
                }
            }
            overtaken
        });
        fill(&client, "fast", 256 << 20).unwrap();
        done.store(true, Ordering::Relaxed);
        reader.join().unwrap()
    });
    assert!(overtaken > 0);
}

#[test]
fn retention_by_time_trims() {
    let cluster = Cluster::start(1, &["--size", "120MiB", "--segment-size", "1MiB"], &[]);
    let client = small(&cluster);
    client.create_topic("brief", TopicOptions { retention_ms: 50, ..TopicOptions::default() }).unwrap();
    let count = fill(&client, "brief", 5 << 20).unwrap();
    eventually("trimming", || client.describe_topic("brief").unwrap().1[0].earliest_offset == count);
}

#[test]
fn a_thousand_sessions_and_thirty_two_topics() {
    let cluster = Cluster::start(2, &["--size", "512MiB", "--segment-size", "1MiB", "--max-sessions", "1024"], &[]);
    let config = ClientConfig { batch_size: Some(1024), buffer_bytes: 2048, max_brokers: 1, ..cluster.config() };
    let client = Client::connect(config).unwrap();
    for number in 0..32 {
        client.create_topic(&format!("t{number}"), TopicOptions::default()).unwrap();
    }
    let error = client.create_topic("one-too-many", TopicOptions::default()).unwrap_err().to_string();
    assert!(error.contains("all 32 topic slots"), "{error}");
    let publishers: Vec<_> = (0..1000).map(|number| client.publisher(&format!("t{}", number % 32)).unwrap()).collect();
    for round in 0..3u32 {
        for publisher in &publishers {
            publisher.publish_wait(&round.to_le_bytes()).unwrap();
        }
    }
    for publisher in &publishers {
        publisher.flush().unwrap();
    }
    let (_, streams) = client.describe_topic("t0").unwrap();
    assert_eq!(streams[0].next_offset, 32 * 3);
    for publisher in publishers {
        publisher.close().unwrap();
    }
}

#[test]
fn a_live_region_is_inspected() {
    let cluster = Cluster::start(2, &["--size", "128MiB", "--segment-size", "1MiB"], &[]);
    let client = small(&cluster);
    client.create_topic("seen", TopicOptions::default()).unwrap();
    // Until both brokers received some: which of them a publisher reaches first is open.
    let mut count = 0;
    let mut report = serde_json::Value::Null;
    eventually("both brokers receive batches", || {
        count += fill(&client, "seen", 3 << 20).unwrap();
        report = cluster.inspect();
        let brokers = report["topics"][0]["offset_entries"].as_array().unwrap();
        brokers.iter().all(|entry| !entry["batchlog"].as_array().unwrap().is_empty())
    });
    assert_eq!(report["brokers"].as_array().unwrap().len(), 2);
    assert_eq!(report["topics"][0]["name"], "seen");
    assert!(report["topics"][0]["global_index"]["committed"].as_u64().unwrap() > 10);
    let entries = report["topics"][0]["global_index_entries"].as_array().unwrap();
    let last = entries.last().unwrap();
    assert_eq!(last["first_offset"].as_u64().unwrap() + last["message_count"].as_u64().unwrap(), count);
    assert!(report["segments"]["free"].as_u64() < report["segments"]["total"].as_u64());
    let text = run(&["region", "inspect", "--path", cluster.region.to_str().unwrap()]);
    assert!(String::from_utf8_lossy(&text.stdout).contains("control_block"));
}

/// The leader stands still while the pool is full. Another leads, without memory of its own, and deletes a topic: that gives
/// memory back. The deletion ends once the broker that stood still has let go, too.
#[test]
fn a_leader_that_stands_still_is_replaced_though_the_pool_is_full() {
    let environment = [
        ("EMBARCADERO_BROKER_EXHAUSTED_WAIT_MS", "2000"),
        ("EMBARCADERO_BROKER_GAP_LEASE_MS", "200"),
        ("EMBARCADERO_BROKER_LEADER_LEASE_MS", "500"),
    ];
    let create = ["--size", "120MiB", "--segment-size", "1MiB", "--max-brokers", "2", "--allocator", "bitmap"];
    let cluster = Cluster::start(2, &create, &environment);
    let client = cluster.client_of_all();
    client.create_topic("full", TopicOptions::default()).unwrap();
    let free = || cluster.inspect()["segments"]["free"].as_u64().unwrap();
    let total = free();
    // Batches leave two segments for order indexes.
    eventually("the pool is full", || fill(&client, "full", 1 << 30).is_err() && free() <= 2);
    let stopped = cluster.leader();
    let stopped = &cluster.brokers[stopped];
    stopped.signal("-STOP");
    cluster.await_another_leader(stopped.id);
    let other = cluster.brokers.iter().find(|broker| broker.id != stopped.id).unwrap();
    let client = Client::connect(ClientConfig { bootstrap: vec![other.control.clone()], ..cluster.config() }).unwrap();
    std::thread::scope(|scope| {
        let deletes = scope.spawn(|| client.delete_topic("full"));
        eventually("memory comes back", || free() > 2);
        stopped.signal("-CONT");
        deletes.join().unwrap().unwrap();
    });
    eventually("all of it comes back", || free() == total);
    client.create_topic("full", TopicOptions::default()).unwrap();
    fill(&cluster.client_of_all(), "full", 10 << 20).unwrap();
}

/// Region for one broker whose pool is soon full.
const SMALL: &[&str] = &["--size", "64MiB", "--segment-size", "1MiB", "--max-brokers", "2"];

/// A subscriber reads nothing, and retention passes the batch that is half sent to it. Nobody waits for it.
#[test]
fn a_subscriber_that_never_reads_stalls_nobody() {
    // Longer than publishers wait for memory.
    let environment = [("EMBARCADERO_BROKER_DELIVERY_PATIENCE_MS", "3600000")];
    let cluster = Cluster::start(1, SMALL, &environment);
    let client = small(&cluster);
    let options = TopicOptions { retention_bytes: 4 << 20, ..TopicOptions::default() };
    let topic = client.create_topic("unread", options).unwrap();
    let request = Subscribe {
        topic: topic.id,
        topic_incarnation: topic.incarnation,
        stream: Stream::GLOBAL,
        start_kind: StartKind::Latest.code(),
        ..Subscribe::blank()
    };
    fill(&client, "unread", 1 << 20).unwrap();
    let mut unread = TcpStream::connect(cluster.brokers[0].data).unwrap();
    unread.write_all(&request.encode()).unwrap();
    let mut ready = [0; FRAME_BYTES];
    unread.read_exact(&mut ready).unwrap();
    assert!(matches!(Frame::decode(&ready), Ok(Frame::SubscribeReady(_))));
    let pool = client.cluster().unwrap().segments_total << 20;
    fill(&client, "unread", 10 * pool).unwrap();
}

/// Opens a connection for publishing, and sends the header of a batch that takes more than half a segment, and one byte of
/// its body.
fn announce(cluster: &Cluster, open: &OpenPublish, origin: &BatchOrigin, sequence: u64) -> TcpStream {
    let mut builder = BatchBuilder::new(700 << 10);
    builder.push(&vec![0; 600 << 10]);
    builder.seal(origin, sequence, false);
    let mut stream = TcpStream::connect(cluster.brokers[0].data).unwrap();
    stream.write_all(&open.encode()).unwrap();
    stream.write_all(&builder.bytes()[..=FRAME_BYTES]).unwrap();
    stream
}

/// Connections announce batches that never come, more than the pool has room for. They are sent away, and a publisher whose
/// batches come goes on.
#[test]
fn batches_that_never_come_keep_no_memory() {
    let environment = [("EMBARCADERO_BROKER_RECEIVE_PATIENCE_MS", "500")];
    let cluster = Cluster::start(1, SMALL, &environment);
    let client = small(&cluster);
    let options = TopicOptions { retention_bytes: 4 << 20, ..TopicOptions::default() };
    let topic = client.create_topic("hoarded", options).unwrap();
    let opened = client.publisher("hoarded").unwrap();
    let (open, origin) = cluster.session(&opened, &topic);
    let announced = client.cluster().unwrap().segments_free + 8;
    let hoarding: Vec<_> = (0..announced).map(|sequence| announce(&cluster, &open, &origin, sequence)).collect();
    let (heard, begun) = (AtomicBool::new(false), Instant::now());
    std::thread::scope(|scope| {
        let honest = scope.spawn(|| {
            // The segment of the last one is wanted only once it is full.
            while !heard.load(Ordering::Relaxed) && begun.elapsed() < PATIENCE {
                fill(&client, "hoarded", 4 << 20).unwrap();
            }
        });
        for mut stream in hoarding {
            assert_eq!(refusal(&answer(&mut stream)).0, ErrorCode::Unavailable);
        }
        heard.store(true, Ordering::Relaxed);
        honest.join().unwrap();
    });
}

/// A publisher dies and leaves a gap behind, whose lease lasts for longer than the test. What it sent comes free before
/// others have waited for memory too long.
#[test]
fn a_gap_that_a_dead_publisher_left_keeps_no_memory() {
    let cluster = Cluster::start(1, SMALL, &[("EMBARCADERO_BROKER_GAP_LEASE_MS", "3600000")]);
    let client = small(&cluster);
    let options = TopicOptions { retention_bytes: 4 << 20, ..TopicOptions::default() };
    let topic = client.create_topic("gap", options).unwrap();
    let opened = client.publisher("gap").unwrap();
    let (open, origin) = cluster.session(&opened, &topic);
    drop(opened);
    let mut stream = TcpStream::connect(cluster.brokers[0].data).unwrap();
    stream.write_all(&open.encode()).unwrap();
    let mut ready = [0; FRAME_BYTES];
    stream.read_exact(&mut ready).unwrap();
    let Ok(Frame::PublishReady(ready)) = Frame::decode(&ready) else { panic!("the session is open") };
    let mut builder = BatchBuilder::new(4096);
    builder.push(b"ahead of a gap");
    builder.seal(&origin, ready.committed + 1, false);
    stream.write_all(builder.bytes()).unwrap();
    drop(stream);
    let pool = client.cluster().unwrap().segments_total << 20;
    fill(&client, "gap", 4 * pool).unwrap();
}
