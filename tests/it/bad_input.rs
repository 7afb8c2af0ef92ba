//! Promise: bad input gets a clear error, and a broker lives on.

use crate::support::{Cluster, PATIENCE, eventually, refused};
use embarcadero_client::{Client, ClientConfig, ClientError, Order, Start, TopicOptions};
use embarcadero_wire::batch::{BatchBuilder, BatchOrigin};
use embarcadero_wire::{
    BrokerId, ClientId, ErrorCode, FRAME_BYTES, Frame, Incarnation, OpenPublish, SessionSlot, Stream, Subscribe,
    TopicId,
};
use rand::rngs::StdRng;
use rand::{Rng, RngCore, SeedableRng};
use socket2::{Domain, Socket, Type};
use std::fs::{self, OpenOptions};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

const REGION: &[&str] = &["--size", "128MiB", "--segment-size", "1MiB"];

/// Reads everything that the broker sends until it closes.
pub(crate) fn answer(stream: &mut TcpStream) -> Vec<u8> {
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut bytes = Vec::new();
    let _ = stream.read_to_end(&mut bytes);
    bytes
}

/// Finds the error frame in what the broker sent.
pub(crate) fn refusal(bytes: &[u8]) -> (ErrorCode, String) {
    for (index, frame) in bytes.chunks(FRAME_BYTES).enumerate() {
        if let Ok(frame) = frame.try_into()
            && let Ok(Frame::ErrorFrame(error)) = Frame::decode(frame)
        {
            let text = &bytes[(index + 1) * FRAME_BYTES..][..error.text_bytes as usize];
            return (ErrorCode::from_code(error.code).unwrap(), String::from_utf8(text.to_vec()).unwrap());
        }
    }
    panic!("no error frame in {} bytes", bytes.len());
}

/// Reads the next frame that the broker sends.
fn frame(stream: &mut TcpStream) -> Frame {
    let mut bytes = [0; FRAME_BYTES];
    stream.read_exact(&mut bytes).unwrap();
    Frame::decode(&bytes).unwrap()
}

struct Bench {
    cluster: Cluster,
    client: Client,
    open: OpenPublish,
    origin: BatchOrigin,
}

fn bench() -> Bench {
    bench_with(&[("EMBARCADERO_BROKER_VERIFY_BODY", "true")])
}

/// Starts a broker with settings of its own.
fn bench_with(settings: &[(&str, &str)]) -> Bench {
    let cluster = Cluster::start(1, REGION, settings);
    let client = cluster.client();
    let topic = client.create_topic("bad", TopicOptions::default()).unwrap();
    let publisher = client.publisher("bad").unwrap();
    let (open, origin) = cluster.session(&publisher, &topic);
    Bench { cluster, client, open, origin }
}

impl Bench {
    fn connect(&self) -> TcpStream {
        TcpStream::connect(self.cluster.brokers[0].data).unwrap()
    }

    /// Opens a publisher's connection and sends `bytes`. Returns the refusal.
    fn publish_raw(&self, bytes: &[u8]) -> (ErrorCode, String) {
        let mut stream = self.connect();
        stream.write_all(&self.open.encode()).unwrap();
        let _ = stream.write_all(bytes);
        refusal(&answer(&mut stream))
    }

    /// Number of descriptors that the broker has open.
    fn descriptors(&self) -> usize {
        fs::read_dir(format!("/proc/{}/fd", self.cluster.brokers[0].child.id())).unwrap().count()
    }

    /// Opens a publisher's connection, and waits until it may publish.
    fn publisher(&self, stream: &mut TcpStream) {
        stream.write_all(&self.open.encode()).unwrap();
        assert!(matches!(frame(stream), Frame::PublishReady(_)));
    }

    /// Batch with one message.
    fn batch(&self, sequence: u64) -> Vec<u8> {
        let mut builder = BatchBuilder::new(4096);
        builder.push(b"m");
        builder.seal(&self.origin, sequence, false);
        builder.bytes().to_vec()
    }

    fn still_works(&self) {
        let publisher = self.client.publisher("bad").unwrap();
        publisher.publish_wait(b"still here").unwrap();
        publisher.flush().unwrap();
    }
}

#[test]
fn hostile_bytes_are_refused_and_the_broker_lives_on() {
    let bench = bench();
    let seed = 0x00c0_ffee;
    println!("seed {seed:#x}");
    let mut rng = StdRng::seed_from_u64(seed);
    for _ in 0..50 {
        let mut garbage = vec![0; rng.random_range(64..5000)];
        rng.fill_bytes(&mut garbage);
        let mut stream = bench.connect();
        let _ = stream.write_all(&garbage);
        assert_eq!(refusal(&answer(&mut stream)).0, ErrorCode::BadFrame);
    }
    // Cut short anywhere: the connection just ends.
    for bytes in [0, 1, 63, 64, 65, 100] {
        let mut stream = bench.connect();
        let mut data = bench.open.encode().to_vec();
        data.extend_from_slice(&[0; 64]);
        stream.write_all(&data[..bytes]).unwrap();
    }
    bench.still_works();
}

#[test]
fn each_defect_of_a_batch_is_named() {
    let bench = bench();
    let batch = |checksum| {
        let mut builder = BatchBuilder::new(4096);
        builder.push(b"one");
        builder.push(b"two");
        let header = builder.seal(&bench.origin, 0, checksum);
        (header, builder.bytes().to_vec())
    };
    let (header, good) = batch(true);

    let mut damaged = good.clone();
    damaged[10] ^= 1;
    let (code, text) = bench.publish_raw(&damaged);
    assert!(code == ErrorCode::BadFrame && text.contains("checksum"), "{text}");

    let mut damaged = good.clone();
    damaged[FRAME_BYTES] ^= 1;
    let (code, text) = bench.publish_raw(&damaged);
    assert!(code == ErrorCode::BadBatch && text.contains("checksum"), "{text}");

    let (_, mut damaged) = batch(false);
    *damaged.last_mut().unwrap() = 0xff;
    let (code, text) = bench.publish_raw(&damaged);
    assert!(code == ErrorCode::BadBatch && text.contains("lengths"), "{text}");

    let mut oversized = header;
    oversized.payload_bytes = u32::MAX;
    let (code, text) = bench.publish_raw(&oversized.encode());
    assert!(code == ErrorCode::BadBatch && text.contains("batch bytes"), "{text}");

    let mut empty = header;
    empty.message_count = 0;
    let (code, text) = bench.publish_raw(&empty.encode());
    assert!(code == ErrorCode::BadBatch && text.contains("message_count"), "{text}");

    let mut foreign = header;
    foreign.client_id.0 ^= 1;
    let (code, text) = bench.publish_raw(&foreign.encode());
    assert!(code == ErrorCode::BadBatch && text.contains("another session"), "{text}");
    bench.still_works();
}

#[test]
fn wrong_openings_are_named() {
    let bench = bench();
    let refused = |frame: [u8; FRAME_BYTES]| {
        let mut stream = bench.connect();
        stream.write_all(&frame).unwrap();
        refusal(&answer(&mut stream))
    };
    assert_eq!(refused(OpenPublish { topic: TopicId(31), ..bench.open }.encode()).0, ErrorCode::UnknownTopic);
    assert_eq!(refused(OpenPublish { topic: TopicId(u32::MAX), ..bench.open }.encode()).0, ErrorCode::UnknownTopic);
    assert_eq!(
        refused(OpenPublish { topic_incarnation: Incarnation(9), ..bench.open }.encode()).0,
        ErrorCode::UnknownTopic
    );
    assert_eq!(refused(OpenPublish { client_id: ClientId(1), ..bench.open }.encode()).0, ErrorCode::UnknownSession);
    assert_eq!(
        refused(OpenPublish { session_slot: SessionSlot(u32::MAX), ..bench.open }.encode()).0,
        ErrorCode::UnknownSession
    );
    assert_eq!(refused(OpenPublish { ack_level: 2, ..bench.open }.encode()).0, ErrorCode::AckLevel);
    let subscribe = Subscribe {
        topic: bench.open.topic,
        topic_incarnation: bench.open.topic_incarnation,
        stream: Stream::GLOBAL,
        ..Subscribe::blank()
    };
    assert_eq!(refused(Subscribe { stream: Stream::of(BrokerId(0)), ..subscribe }.encode()).0, ErrorCode::UnknownTopic);
    assert_eq!(refused(Subscribe { start_kind: 99, ..subscribe }.encode()).0, ErrorCode::BadFrame);
    assert_eq!(refused(Subscribe { start: 1 << 60, ..subscribe }.encode()).0, ErrorCode::OffsetOutOfRange);
    bench.still_works();
}

#[test]
fn a_connection_without_an_opening_frame_is_refused_in_time() {
    let bench = bench_with(&[("EMBARCADERO_BROKER_OPENING_MS", "2000")]);
    for bytes in [0, 63] {
        let mut stream = bench.connect();
        stream.write_all(&bench.open.encode()[..bytes]).unwrap();
        let (code, text) = refusal(&answer(&mut stream));
        assert!(code == ErrorCode::Unavailable && text.contains("no opening frame in time"), "{text}");
    }
    bench.still_works();
}

/// A batch that waits does so for longer than the test takes.
const WAITS_ON: (&str, &str) = ("EMBARCADERO_BROKER_EXHAUSTED_WAIT_MS", "3600000");

#[test]
fn a_publisher_that_leaves_while_its_batch_waits_leaves_no_descriptor() {
    const CONNECTIONS: usize = 20;
    let bench = bench_with(&[WAITS_ON]);
    let before = bench.descriptors();
    for _ in 0..CONNECTIONS {
        let mut stream = bench.connect();
        bench.publisher(&mut stream);
        // Beyond the window of the session.
        stream.write_all(&bench.batch(1000)).unwrap();
    }
    // Those of control calls come and go.
    eventually("the descriptors are closed", || bench.descriptors() < before + CONNECTIONS / 2);
    bench.still_works();
}

#[test]
fn a_batch_beyond_the_window_is_no_excuse_for_a_gap() {
    let bench = bench_with(&[WAITS_ON, ("EMBARCADERO_BROKER_GAP_LEASE_MS", "500")]);
    let (mut waiting, mut gap) = (bench.connect(), bench.connect());
    bench.publisher(&mut waiting);
    waiting.write_all(&bench.batch(1000)).unwrap();
    bench.publisher(&mut gap);
    gap.write_all(&bench.batch(1)).unwrap();
    gap.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(matches!(frame(&mut gap), Frame::Fenced(_)), "the gap lease ends");
}

#[test]
fn a_publisher_that_does_not_read_is_not_listened_to_until_it_does() {
    // More than fit into all buffers of the kernel between the two.
    const BATCHES: u64 = 200_000;
    let bench = bench();
    let socket = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    socket.set_recv_buffer_size(64 << 10).unwrap();
    socket.set_send_buffer_size(64 << 10).unwrap();
    socket.connect(&bench.cluster.brokers[0].data.into()).unwrap();
    let mut stream = TcpStream::from(socket);
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    stream.set_write_timeout(Some(PATIENCE)).unwrap();
    bench.publisher(&mut stream);
    let written = AtomicU64::new(0);
    std::thread::scope(|scope| {
        let mut sending = stream.try_clone().unwrap();
        let (bench, written) = (&bench, &written);
        scope.spawn(move || {
            for sequence in 0..BATCHES {
                sending.write_all(&bench.batch(sequence)).unwrap();
                written.store(sequence + 1, Ordering::SeqCst);
            }
        });
        // Its writes come to a stop. A stop for another reason is as good: it ends too.
        let mut before = 0;
        eventually("the writes block", || {
            std::thread::sleep(Duration::from_secs(2));
            let now = written.load(Ordering::SeqCst);
            std::mem::replace(&mut before, now) == now && now > 0
        });
        assert!(before < BATCHES, "the broker took everything from a client that reads nothing");
        for sequence in 0..BATCHES {
            let Frame::Ack(ack) = frame(&mut stream) else { panic!("no ack of batch {sequence}") };
            assert_eq!(ack.sequence, sequence);
        }
    });
}

#[test]
fn the_control_plane_names_what_is_wrong() {
    let cluster = Cluster::start(1, REGION, &[]);
    let client = cluster.client();
    let create = |name: &str, options| client.create_topic(name, options).unwrap_err().to_string();
    let options = TopicOptions::default();
    assert!(create("", options).contains("1 to 64"));
    assert!(create(&"x".repeat(65), options).contains("65 bytes"));
    assert!(create("a b", options).contains("spaces"));
    assert!(create("t", TopicOptions { ack_level: 2, ..options }).contains("replication_factor >= 2"));
    assert!(create("t", TopicOptions { ack_level: 7, ..options }).contains("ack_level is 7"));
    assert!(create("t", TopicOptions { replication_factor: 2, ack_level: 2, ..options }).contains("there are 0"));
    client.create_topic("t", options).unwrap();
    assert!(create("t", options).contains("exists already"));
    assert!(client.delete_topic("nope").unwrap_err().to_string().contains("does not exist"));
    assert!(client.publisher("nope").map(drop).unwrap_err().to_string().contains("does not exist"));
    let two = Client::connect(ClientConfig { ack_level: 2, ..cluster.config() }).unwrap();
    assert!(two.publisher("t").map(drop).unwrap_err().to_string().contains("offers at most 1"));
    let large =
        Client::connect(ClientConfig { batch_size: Some(16 << 20), buffer_bytes: 64 << 20, ..cluster.config() })
            .unwrap();
    assert!(large.publisher("t").map(drop).unwrap_err().to_string().contains("max_batch_bytes"));
    let publisher = client.publisher("t").unwrap();
    assert!(matches!(publisher.publish(&vec![0; 1 << 20]), Err(ClientError::MessageTooLarge { .. })));
    publisher.publish_wait(b"x").unwrap();
    publisher.flush().unwrap();
    let mut beyond = client.subscriber("t", Start::Offset(5)).unwrap();
    assert!(matches!(beyond.next(PATIENCE), Err(ClientError::OffsetOutOfRange { earliest: 0, .. })));
}

#[test]
fn regions_and_configurations_that_do_not_fit_are_refused() {
    let cluster = Cluster::start(1, REGION, &[]);
    let region = cluster.region.to_str().unwrap();
    let broker = ["broker", "--region", region];
    refused(&["broker", "--region", region, "--id", "0"], &[], "broker id 0 is taken");
    refused(&["broker", "--region", region, "--id", "77"], &[], "id is 77; it must be 0 to 31");
    refused(&["broker", "--region", "/nonexistent/region"], &[], "cannot open");
    refused(&broker, &[("EMBARCADERO_BROKER_CXL__UUID", "00000000-0000-0000-0000-000000000001")], "UUID");
    refused(&broker, &[("EMBARCADERO_BROKER_CXL__SEGMENT_BYTES", "2097152")], "segment_bytes = 1048576");
    let none = ("EMBARCADERO_BROKER_CXL__COHERENCE", "none");
    refused(&broker, &[none, ("EMBARCADERO_BROKER_ROLE", "follower")], "needs hardware coherence");
    refused(&broker, &[("EMBARCADERO_BROKER_ROLE", "leader")], "another live broker is the leader");
    refused(&broker, &[("EMBARCADERO_BROKER_HEARTBEAT_MS", "0")], "heartbeat_ms is 0");
    refused(&broker, &[("EMBARCADERO_BROKER_HEARTBEET_MS", "5")], "heartbeet_ms");
    refused(&broker, &[("EMBARCADERO_BROKER_FLUSH_GROUP__BATCHES", "many")], "flush_group.batches");
    refused(&broker, &[("EMBARCADERO_BROKER_CXL__NUMA_NODE", "1000")], "cannot bind to a NUMA node");
    let verbs = ("EMBARCADERO_BROKER_TRANSPORT", "verbs");
    let missing = if embarcadero_verbs::rdma_missing().is_none() { "no RDMA device" } else { "this build has no RDMA" };
    let dpdk = ("EMBARCADERO_BROKER_TRANSPORT", "dpdk");
    if cfg!(feature = "dpdk") {
        let address = ("EMBARCADERO_BROKER_DPDK__ADDRESS", "10.78.0.1");
        refused(&broker, &[dpdk], "dpdk.address is not set");
        let set = |key, value, reason| refused(&broker, &[dpdk, address, (key, value)], reason);
        set("EMBARCADERO_BROKER_DPDK__MTU", "9001", "dpdk.mtu is 9001");
        set("EMBARCADERO_BROKER_DPDK__PREFIX_LENGTH", "33", "dpdk.prefix_length is 33");
        set("EMBARCADERO_BROKER_DPDK__VLAN", "4095", "dpdk.vlan is 4095");
        set("EMBARCADERO_BROKER_DPDK__QUEUES", "17", "dpdk.queues is 17");
        set("EMBARCADERO_BROKER_DPDK__GATEWAY", "fd00::1", "dpdk.gateway is fd00::1");
        set("EMBARCADERO_BROKER_DPDK__EAL", r#"["--no-such"]"#, "--no-such");
    } else {
        refused(&broker, &[dpdk], "this build has no DPDK");
    }
    let roce = ("EMBARCADERO_BROKER_TRANSPORT", "roce");
    refused(&broker, &[roce, ("EMBARCADERO_BROKER_ROCE__ADDRESS", "192.0.2.77")], "has the address 192.0.2.77");
    refused(&broker, &[verbs, ("EMBARCADERO_BROKER_RDMA__DEVICE", "nosuch0")], missing);
    refused(&["region", "destroy", "--path", region], &[], "in use by broker 0");
    refused(&["region", "create", "--path", region], &[], "exists already");
    refused(&["region", "create", "--path", "/dev/shm/none", "--segment-size", "3MiB"], &[], "power of two");
    refused(&["region", "create", "--path", "/dev/shm/none", "--size", "1MiB"], &[], "at least");
    assert!(!std::path::Path::new("/dev/shm/none").exists());
    let client = cluster.client();
    client.create_topic("alive", TopicOptions { order: Order::Total, ..TopicOptions::default() }).unwrap();
}

#[test]
fn a_damaged_row_of_a_topic_is_named_and_its_name_is_not_given_again() {
    let cluster = Cluster::start(1, REGION, &[]);
    let client = cluster.client();
    let name = "the-row-of-this-topic-is-damaged";
    client.create_topic(name, TopicOptions::default()).unwrap();
    // A byte behind the name must be 0.
    let region = OpenOptions::new().write(true).open(&cluster.region).unwrap();
    let bytes = fs::read(&cluster.region).unwrap();
    let at = bytes.windows(name.len()).position(|window| window == name.as_bytes()).unwrap();
    region.write_all_at(b"x", (at + name.len()) as u64).unwrap();

    let damaged = client.cluster().unwrap().damaged_topics;
    assert!(damaged.len() == 1 && damaged[0].contains("byte behind the name"), "{damaged:?}");
    let error = client.create_topic(name, TopicOptions::default()).unwrap_err();
    assert!(error.to_string().contains("byte behind the name"), "{error}");
    refused(&["topic", "list"], &[("EMBARCADERO_BROKERS", cluster.control())], "byte behind the name");
}
