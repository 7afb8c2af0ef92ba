//! Promise: bad input gets a clear error, and a broker lives on.

use crate::support::{Cluster, PATIENCE, eventually, message, refused};
use embarcadero_client::{Client, ClientConfig, ClientError, Order, Start, TopicOptions};
use embarcadero_control::v1::control_client::ControlClient;
use embarcadero_control::v1::{
    AllocateSegmentRequest, CloseSessionRequest, CreateTopicRequest, DescribeTopicRequest, OpenSessionRequest,
    ReadReplicaRequest, ReleaseSegmentRequest,
};
use embarcadero_cxl::broker_table::read_call_key;
use embarcadero_cxl::cache::FlushMethod;
use embarcadero_cxl::region::RegionFile;
use embarcadero_wire::batch::{BatchBuilder, BatchOrigin};
use embarcadero_wire::{
    BatchHeader, BrokerId, ClientId, ErrorCode, FRAME_BYTES, Frame, Incarnation, OpenPublish, SessionSlot,
    SessionToken, Stream, Subscribe, TopicId,
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
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

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

/// Makes a call to the control service at `address`.
#[allow(clippy::result_large_err)] // tonic's own error type
fn ask<R>(
    address: &str,
    call: impl AsyncFnOnce(&mut ControlClient<Channel>) -> Result<Response<R>, Status>,
) -> Result<R, Status> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut control = ControlClient::connect(format!("http://{address}")).await.unwrap();
        call(&mut control).await.map(Response::into_inner)
    })
}

/// Reads the key by which a broker's calls are known, as only who maps the region can.
fn call_key(cluster: &Cluster, broker: BrokerId) -> u64 {
    let file = RegionFile::open(&cluster.region, FlushMethod::None).unwrap();
    read_call_key(file.region(), broker).unwrap()
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
    let token = SessionToken(bench.open.token.0 ^ 1);
    assert_eq!(refused(OpenPublish { token, ..bench.open }.encode()).0, ErrorCode::UnknownSession);
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

/// Reads the header of the first batch of a topic, as every subscriber gets it.
fn delivered_header(bench: &Bench) -> BatchHeader {
    let mut stream = bench.connect();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let OpenPublish { topic, topic_incarnation, .. } = bench.open;
    let subscribe = Subscribe { topic, topic_incarnation, stream: Stream::GLOBAL, ..Subscribe::blank() };
    stream.write_all(&subscribe.encode()).unwrap();
    loop {
        match frame(&mut stream) {
            Frame::BatchHeader(header) => return header,
            Frame::SubscribeReady(_) | Frame::Deliver(_) => {}
            other => panic!("{other:?}"),
        }
    }
}

/// Every subscriber learns client, epoch and slot of a session. Nobody can act in its name with them.
#[test]
fn a_subscriber_cannot_speak_for_a_publisher() {
    let bench = bench();
    let mut own = bench.connect();
    own.set_read_timeout(Some(PATIENCE)).unwrap();
    bench.publisher(&mut own);
    own.write_all(&bench.batch(0)).unwrap();
    let Frame::Ack(_) = frame(&mut own) else { panic!("batch 0 is not acknowledged") };

    let BatchHeader { client_id, session_epoch, session_slot, topic, topic_incarnation, .. } = delivered_header(&bench);
    let open = OpenPublish {
        client_id,
        session_epoch,
        session_slot,
        topic,
        topic_incarnation,
        ack_level: 1,
        ..OpenPublish::blank()
    };
    assert_eq!(OpenPublish { token: bench.open.token, ..open }, bench.open, "the rest is all that it takes");
    let control = bench.cluster.control();
    for token in [SessionToken::NONE, SessionToken(1)] {
        let mut stream = bench.connect();
        stream.write_all(&OpenPublish { token, ..open }.encode()).unwrap();
        assert_eq!(refusal(&answer(&mut stream)).0, ErrorCode::UnknownSession);
        let close = CloseSessionRequest {
            slot: session_slot.0,
            client_id: client_id.0,
            epoch: session_epoch.0,
            token: token.0,
        };
        let closed = ask(control, async |control| control.close_session(close).await);
        assert_eq!(closed.map_err(|status| status.code()), Err(Code::PermissionDenied));
        let fence = OpenSessionRequest {
            topic: "bad".to_owned(),
            client_id: client_id.0,
            ack_level: 1,
            resume: false,
            token: token.0,
        };
        let resume = OpenSessionRequest { resume: true, ..fence.clone() };
        let fenced = ask(control, async |control| control.open_session(fence).await);
        assert_eq!(fenced.map(|opened| opened.epoch).map_err(|status| status.code()), Err(Code::AlreadyExists));
        let resumed = ask(control, async |control| control.open_session(resume).await).unwrap();
        assert_eq!((resumed.epoch, resumed.slot, resumed.token), (0, 0, 0), "the brokers know no such client");
    }
    let report = bench.cluster.inspect().to_string();
    assert!(!report.contains(&bench.open.token.0.to_string()), "the region's report tells a token");

    // The publisher has noticed nothing, and its own token does all of it.
    own.write_all(&bench.batch(1)).unwrap();
    let Frame::Ack(ack) = frame(&mut own) else { panic!("batch 1 is not acknowledged") };
    assert_eq!((ack.sequence, ack.first_offset), (1, 1));
    let resume = OpenSessionRequest {
        topic: "bad".to_owned(),
        client_id: client_id.0,
        ack_level: 1,
        resume: true,
        token: bench.open.token.0,
    };
    let resumed = ask(control, async |control| control.open_session(resume).await).unwrap();
    assert_eq!((resumed.epoch, resumed.next_sequence), (session_epoch.0 + 1, 2));
    assert!(matches!(frame(&mut own), Frame::Fenced(_)));
    bench.still_works();
}

/// Batches that cannot be read are named and left out. One has a wrong checksum, which its client sent so. Memory has lost
/// the header of the other.
#[test]
fn what_cannot_be_read_is_named_and_the_rest_is_read() {
    let bench = bench_with(&[("EMBARCADERO_BROKER_VERIFY_BODY", "false")]);
    let payload = |sequence| format!("payload of batch {sequence}");
    let mut stream = bench.connect();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    bench.publisher(&mut stream);
    for sequence in 0..4 {
        let mut builder = BatchBuilder::new(4096);
        builder.push(payload(sequence).as_bytes());
        builder.seal(&bench.origin, sequence, true);
        let mut bytes = builder.bytes().to_vec();
        bytes[FRAME_BYTES] ^= u8::from(sequence == 1);
        stream.write_all(&bytes).unwrap();
        let Frame::Ack(ack) = frame(&mut stream) else { panic!("batch {sequence} is not acknowledged") };
        assert_eq!(ack.first_offset, sequence);
    }
    let region = OpenOptions::new().write(true).open(&bench.cluster.region).unwrap();
    let bytes = fs::read(&bench.cluster.region).unwrap();
    let lost = payload(2);
    let body_at = bytes.windows(lost.len()).position(|window| window == lost.as_bytes()).unwrap();
    region.write_all_at(&[0x5a; FRAME_BYTES], (body_at - FRAME_BYTES) as u64).unwrap();

    for (command, out) in [("consume", format!("{}\n{}\n", payload(0), payload(3))), ("verify", String::new())] {
        let output = bench.cluster.command(&[command, "bad"]).output().unwrap();
        let (stdout, stderr) = (String::from_utf8(output.stdout).unwrap(), String::from_utf8(output.stderr).unwrap());
        assert!(!output.status.success(), "{command} succeeds: {stdout}{stderr}");
        if command == "consume" {
            assert_eq!(stdout, out);
            assert!(stderr.contains("the messages from offset 2 to 2 cannot be read"), "{stderr}");
        } else {
            // The third is that the client has no batches 1 and 2.
            assert!(stderr.contains("3 faults"), "{stderr}");
        }
        assert!(stderr.contains("the messages from offset 1 to 1 cannot be read"), "{stderr}");
    }
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
    for name in ["../../x", ".hidden", "a/b", "gr\u{fc}n"] {
        assert!(create(name, options).contains("ASCII letters"), "{name}");
    }
    assert!(create("t", TopicOptions { retention_bytes: 1, ..options }).contains("at least a segment, 1048576"));
    assert!(create("t", TopicOptions { retention_ms: 9, ..options }).contains("retention_ms is 9"));
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

    let request = CreateTopicRequest { name: "u".to_owned(), order: 99, replication_factor: 1, ..Default::default() };
    let status = ask(cluster.control(), async |control| control.create_topic(request).await).unwrap_err();
    assert_eq!((status.code(), status.message()), (Code::InvalidArgument, "order is 99; it must be 1 to 4"));
    // A name that no topic can have is not repeated: the trailers of an answer are bounded.
    let request = DescribeTopicRequest { name: "x".repeat(2 << 20) };
    let status = ask(cluster.control(), async |control| control.describe_topic(request).await).unwrap_err();
    assert!(status.code() == Code::InvalidArgument && status.message().len() < 100, "{status}");
}

#[test]
fn disks_are_read_for_brokers_only() {
    let cluster = Cluster::start(1, REGION, &[]);
    let topic = cluster.client().create_topic("t", TopicOptions::default()).unwrap();
    let whole = ReadReplicaRequest {
        topic: topic.id.0,
        incarnation: topic.incarnation.0,
        stream: Stream::GLOBAL.0,
        call_key: call_key(&cluster, BrokerId(0)),
        ..Default::default()
    };
    let read = |request| {
        let answer = ask(cluster.control(), async |control| control.read_replica(request).await);
        answer.map(|answer| answer.batches.len()).map_err(|status| status.code())
    };
    assert_eq!(read(whole), Ok(0));
    assert_eq!(read(ReadReplicaRequest { call_key: 0, ..whole }), Err(Code::PermissionDenied));
    assert_eq!(read(ReadReplicaRequest { broker: 1, ..whole }), Err(Code::PermissionDenied));
    assert_eq!(read(ReadReplicaRequest { topic: 31, ..whole }), Err(Code::NotFound));
    assert_eq!(read(ReadReplicaRequest { topic: u32::MAX, ..whole }), Err(Code::NotFound));
    assert_eq!(read(ReadReplicaRequest { incarnation: 99, ..whole }), Err(Code::NotFound));
    // The topic has a global order.
    assert_eq!(read(ReadReplicaRequest { stream: 0, ..whole }), Err(Code::InvalidArgument));
    assert_eq!(read(ReadReplicaRequest { stream: 77, ..whole }), Err(Code::InvalidArgument));
}

/// Strangers take no segments and free none. A broker frees none that is in use, or that another has.
#[test]
fn segments_are_for_brokers_and_only_where_the_leader_gives_them_out() {
    for allocator in ["bitmap", "leader"] {
        let cluster = Cluster::start(2, &[REGION, &["--allocator", allocator]].concat(), &[]);
        let client = cluster.client_of_all();
        client.create_topic("t", TopicOptions::default()).unwrap();
        let publisher = client.publisher("t").unwrap();
        for number in 0..2000 {
            publisher.publish_wait(&message(0, number)).unwrap();
        }
        publisher.flush().unwrap();
        publisher.close().unwrap();

        let leader = &cluster.brokers[cluster.leader()];
        let other = cluster.brokers.iter().find(|broker| broker.id != leader.id).unwrap();
        let (leads, follows) = (call_key(&cluster, leader.id), call_key(&cluster, other.id));
        let report = cluster.inspect();
        for key in [leads, follows] {
            assert!(!report.to_string().contains(&key.to_string()), "the region's report tells a key");
        }
        let allocate = |broker: BrokerId, call_key| {
            let request = AllocateSegmentRequest { broker: broker.0, call_key };
            let answer = ask(&leader.control, async |control| control.allocate_segment(request).await);
            answer.map(|answer| answer.segment).map_err(|status| status.code())
        };
        let release = |segment, broker: BrokerId, call_key| {
            let request = ReleaseSegmentRequest { segment, broker: broker.0, call_key };
            let answer = ask(&leader.control, async |control| control.release_segment(request).await);
            answer.map(drop).map_err(|status| status.code())
        };
        assert_eq!(allocate(other.id, 0), Err(Code::PermissionDenied));
        assert_eq!(allocate(other.id, leads), Err(Code::PermissionDenied));
        assert_eq!(allocate(BrokerId(u32::MAX), follows), Err(Code::PermissionDenied));
        let wrong = if allocator == "leader" { Code::InvalidArgument } else { Code::Unimplemented };
        let used = report["segments"]["used"].as_array().unwrap();
        assert!(!used.is_empty());
        for segment in used.iter().map(|used| used["segment"].as_u64().unwrap() as u32) {
            assert_eq!(release(segment, other.id, 0), Err(Code::PermissionDenied));
            for (broker, key) in [(leader.id, leads), (other.id, follows)] {
                assert_eq!(release(segment, broker, key), Err(wrong));
            }
        }
        assert_eq!(release(u32::MAX, other.id, follows), Err(wrong));
        if allocator == "leader" {
            let lent = allocate(other.id, follows).unwrap();
            assert_eq!(release(lent, leader.id, leads), Err(wrong));
            assert_eq!(release(lent, other.id, follows), Ok(()));
            assert_eq!(release(lent, other.id, follows), Err(wrong));
        } else {
            assert_eq!(allocate(other.id, follows), Err(wrong));
        }
        assert_eq!(cluster.inspect()["segments"]["free"], report["segments"]["free"]);
        cluster.assert_command(&["verify", "t"]);
    }
}

/// A broker may learn that the leader ended a session before it learns that the topic is deleted.
#[test]
fn the_publisher_of_a_deleted_topic_hears_that_it_is_deleted() {
    let cluster = Cluster::start(1, REGION, &[]);
    let client = cluster.client();
    for round in 0..10 {
        let name = format!("t{round}");
        let topic = client.create_topic(&name, TopicOptions::default()).unwrap();
        let publisher = client.publisher(&name).unwrap();
        let (open, _) = cluster.session(&publisher, &topic);
        let mut stream = TcpStream::connect(cluster.brokers[0].data).unwrap();
        stream.write_all(&open.encode()).unwrap();
        let mut ready = [0; FRAME_BYTES];
        stream.read_exact(&mut ready).unwrap();
        assert!(matches!(Frame::decode(&ready), Ok(Frame::PublishReady(_))));
        client.delete_topic(&name).unwrap();
        let heard = answer(&mut stream);
        let (code, text) = refusal(&heard);
        assert_eq!(code, ErrorCode::TopicDeleted, "{text}");
        let first = Frame::decode((&heard[..FRAME_BYTES]).try_into().unwrap());
        assert!(matches!(first, Ok(Frame::ErrorFrame(_))), "{first:?}");
    }
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
