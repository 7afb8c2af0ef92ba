//! Promise: over RDMA the log is the same log, and a session reaches no memory but its own.
//!
//! Each test runs on NICs in software (`transport: roce`), which needs root. It also runs on an RDMA device of the host,
//! which `scripts/test` finds in `scripts/lab`; elsewhere those tests are ignored.

use crate::support::verbs::{REGION, order_and_integrity, over, publish, small, strong};
use crate::support::wire::alone;
use crate::support::{Cluster, PATIENCE, assert_exactly_once, eventually, history, message};
use embarcadero_client::{Client, ClientConfig, Publisher, TopicOptions, TopicView, TransportKind};
use embarcadero_os::buffer::Buffer;
use embarcadero_transport::rdma::WANTS_WINDOW;
use embarcadero_verbs::{
    CompletionQueue, Context, LocalRange, MemoryRegion, Outcome, PeerAddress, ProtectionDomain, QueuePair,
    QueuePairOptions, RemoteRange, Request, Sending, Work, WorkError,
};
use embarcadero_wire::batch::{BatchBuilder, BatchOrigin};
use embarcadero_wire::{ErrorCode, FRAME_BYTES, Frame, RdmaAccept, RdmaConnect, SessionToken, WindowGrant};
use std::fs::File;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, TcpStream};
use std::os::unix::fs::FileExt;
use std::process::Stdio;
use std::sync::mpsc::channel;

const WINDOWS: (&str, &str) = ("EMBARCADERO_BROKER_RDMA__ISOLATION", "windows");
/// Longest silence of a publisher that may be set: no window is taken back because a slow machine kept it silent.
const WINDOWS_STAY: (&str, &str) = ("EMBARCADERO_BROKER_RDMA__WINDOW_IDLE_MS", "3600000");
/// Short silence: windows of publishers that are silent on purpose are taken back soon.
const WINDOWS_GO: (&str, &str) = ("EMBARCADERO_BROKER_RDMA__WINDOW_IDLE_MS", "50");
/// Longest wait for a segment that may be set: a publisher waits until idle windows are taken back, however slow that is.
const WAITS_FOR_SEGMENTS: (&str, &str) = ("EMBARCADERO_BROKER_EXHAUSTED_WAIT_MS", "3600000");

fn variable(transport: TransportKind) -> (&'static str, &'static str) {
    ("EMBARCADERO_BROKER_TRANSPORT", transport.name())
}

macro_rules! on_both {
    ($($test:ident),* $(,)?) => {
        mod on_an_rdma_device {
            $(#[test]
            #[ignore = "needs an RDMA device: scripts/lab has one"]
            fn $test() {
                super::$test(embarcadero_client::TransportKind::Verbs);
            })*
        }
        mod on_nics_in_software {
            $(#[test]
            fn $test() {
                super::alone(|| super::$test(embarcadero_client::TransportKind::Roce));
            })*
        }
    };
}
on_both!(
    order_and_integrity_over_verbs_and_tcp_on_one_topic,
    order_and_integrity_with_memory_windows,
    acknowledgement_level_0_hands_everything_over,
    a_full_pool_is_a_clear_error_also_over_verbs,
    windows_of_idle_publishers_do_not_keep_the_pool_from_being_reclaimed,
    a_publisher_killed_in_mid_write_and_a_broker_killed_disturb_nobody,
    what_the_region_no_longer_holds_comes_from_disks_over_verbs,
    writes_outside_a_window_with_a_stale_key_or_after_fencing_are_refused_by_the_device,
);

fn order_and_integrity_over_verbs_and_tcp_on_one_topic(transport: TransportKind) {
    order_and_integrity(transport, &Cluster::start(2, REGION, &[variable(transport)]), 10_000);
}

fn order_and_integrity_with_memory_windows(transport: TransportKind) {
    order_and_integrity(transport, &Cluster::start(2, REGION, &[variable(transport), WINDOWS]), 3000);
}

fn acknowledgement_level_0_hands_everything_over(transport: TransportKind) {
    let cluster = Cluster::start(1, REGION, &[variable(transport)]);
    let config = ClientConfig { transport, ack_level: 0, ..small(&cluster) };
    let client = Client::connect(config).unwrap();
    client.create_topic("t", strong()).unwrap();
    publish(over(transport, &cluster), "t", 0, 5).join().unwrap();
    let publisher = client.publisher("t").unwrap();
    for number in 0..5000 {
        publisher.publish_wait(&message(1, number)).unwrap();
    }
    publisher.flush().unwrap();
    eventually("all arrive", || history(&client, "t").get(&1).is_some_and(|seen| seen.len() == 5000));
}

fn a_full_pool_is_a_clear_error_also_over_verbs(transport: TransportKind) {
    let cluster = Cluster::start(
        1,
        &["--size", "120MiB", "--segment-size", "4MiB"],
        &[variable(transport), ("EMBARCADERO_BROKER_EXHAUSTED_WAIT_MS", "500")],
    );
    let client = over(transport, &cluster);
    client.create_topic("t", strong()).unwrap();
    let publisher = client.publisher("t").unwrap();
    let error = loop {
        if let Err(error) = publisher.publish_wait(&[7; 4096]) {
            break error;
        }
    };
    assert!(error.to_string().contains("waited 500 ms"), "{error}");
}

/// Windows of idle publishers lie in every segment of the pool while others publish many times its size.
fn windows_of_idle_publishers_do_not_keep_the_pool_from_being_reclaimed(transport: TransportKind) {
    let settings = [variable(transport), WINDOWS_GO, WAITS_FOR_SEGMENTS];
    let cluster = Cluster::start(1, &["--size", "120MiB", "--segment-size", "2MiB"], &settings);
    let client = over(transport, &cluster);
    let options = TopicOptions { retention_bytes: 4 << 20, ..strong() };
    client.create_topic("t", options).unwrap();
    let report = crate::support::run(&["region", "inspect", "--json", "--path", cluster.region.to_str().unwrap()]);
    let report: serde_json::Value = serde_json::from_slice(&report.stdout).unwrap();
    let segments = report["superblock"]["geometry"]["segment_count"].as_u64().unwrap();
    let tcp = Client::connect(small(&cluster)).unwrap();
    let busy = tcp.publisher("t").unwrap();
    let mut idle = Vec::new();
    for number in 0..segments as u32 + 2 {
        let publisher = client.publisher("t").unwrap();
        publisher.publish_wait(&message(number, 0)).unwrap();
        publisher.flush().unwrap();
        idle.push(publisher);
        for _ in 0..512 {
            busy.publish_wait(&[1; 4096]).unwrap();
        }
    }
    busy.flush().unwrap();
    for publisher in &idle {
        publisher.publish_wait(b"still here").unwrap();
        publisher.flush().unwrap();
    }
}

fn a_publisher_killed_in_mid_write_and_a_broker_killed_disturb_nobody(transport: TransportKind) {
    let mut cluster = Cluster::start(3, REGION, &[variable(transport)]);
    let client = over(transport, &cluster);
    client.create_topic("t", strong()).unwrap();
    let mut victim = cluster
        .command(&["produce", "t"])
        .env("EMBARCADERO_CLIENT_TRANSPORT", transport.name())
        .stdin(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .unwrap();
    let mut feed = victim.stdin.take().unwrap();
    // Leave to feed a hundred lines: the victim keeps pace with the other publisher, and does not fill the pool.
    let (leave, left) = channel();
    let feeder = std::thread::spawn(move || {
        let mut numbers = 0u64..;
        while left.recv().is_ok() {
            for number in numbers.by_ref().take(100) {
                let mut line = message(9, number);
                line.push(b'\n');
                if feed.write_all(&line).is_err() {
                    return;
                }
            }
        }
    });
    eventually("the victim publishes", || {
        leave.send(()).unwrap();
        client.describe_topic("t").unwrap().1[0].batches > 2
    });
    let publisher = client.publisher("t").unwrap();
    for number in 0..12_000u64 {
        match number {
            4000 => {
                victim.kill().unwrap();
                victim.wait().unwrap();
            }
            8000 => cluster.brokers[2].kill(),
            // A feeder whose victim is dead is gone.
            _ if number % 100 == 0 => drop(leave.send(())),
            _ => {}
        }
        publisher.publish_wait(&message(0, number)).unwrap();
    }
    publisher.flush().unwrap();
    drop(leave);
    feeder.join().unwrap();
    let seen = history(&client, "t");
    assert_exactly_once(&seen[&0], 12_000);
    assert_exactly_once(&seen[&9], seen[&9].len() as u64);
}

fn what_the_region_no_longer_holds_comes_from_disks_over_verbs(transport: TransportKind) {
    let disk = tempfile::tempdir().unwrap();
    // The guest's file systems have no direct I/O.
    let replica = [
        ("EMBARCADERO_BROKER_REPLICA__PATH", disk.path().to_str().unwrap()),
        ("EMBARCADERO_BROKER_REPLICA__DIRECT", "false"),
    ];
    let cluster = Cluster::start(2, REGION, &[&[variable(transport)], replica.as_slice()].concat());
    let client = Client::connect(ClientConfig { transport, ack_level: 2, ..small(&cluster) });
    let client = client.unwrap();
    let options = TopicOptions { ack_level: 2, replication_factor: 2, retention_bytes: 4 << 20, ..strong() };
    client.create_topic("t", options).unwrap();
    let publisher = client.publisher("t").unwrap();
    for number in 0..12_000 {
        publisher.publish_wait(&message(0, number)).unwrap();
    }
    publisher.flush().unwrap();
    // Brokers apply retention at intervals.
    eventually("the region lets go of the first", || client.describe_topic("t").unwrap().1[0].earliest_offset > 0);
    assert_exactly_once(&history(&client, "t")[&0], 12_000);
}

/// Publisher that breaks rules: it speaks the protocol by hand.
struct Offender {
    socket: TcpStream,
    pair: QueuePair<Sending>,
    queue: CompletionQueue,
    /// Buffers for frames of the broker.
    frames: Buffer,
    _frames_region: MemoryRegion,
    /// Memory that it writes from.
    source: MemoryRegion,
    /// Frames that came from the broker.
    heard: Vec<Frame>,
    origin: BatchOrigin,
    token: SessionToken,
    _publisher: Publisher,
}

const FRAMES: usize = 64;

impl Offender {
    fn new(transport: TransportKind, cluster: &Cluster, client: &Client, topic: &TopicView) -> Self {
        let publisher = client.publisher(&topic.name).unwrap();
        let (open, origin) = cluster.session(&publisher, topic);
        let (context, port) = match transport {
            TransportKind::Roce => Context::software(Some(Ipv4Addr::LOCALHOST.into())).unwrap(),
            _ => Context::find(None).unwrap(),
        };
        let domain = ProtectionDomain::new(&context).unwrap();
        let queue = CompletionQueue::new(&context, 256).unwrap();
        let options = QueuePairOptions { send_depth: 64, receive_depth: FRAMES as u32, inline_bytes: 64, shared: None };
        let mut pair = QueuePair::new(&domain, &queue, &port, &options).unwrap();
        // A slow broker is no reason to give up.
        pair.send_again(u8::MAX);
        let frames = Buffer::zeroed(FRAMES * FRAME_BYTES).unwrap();
        let frames_region = MemoryRegion::local(&domain, &frames).unwrap();
        for index in 0..FRAMES {
            let range = frames_region.range((index * FRAME_BYTES) as u64, FRAME_BYTES as u32);
            pair.post_receive(index as u64, range).unwrap();
        }
        let mut bytes = Buffer::zeroed(64 << 10).unwrap();
        bytes.fill(0xee);
        let source = MemoryRegion::local(&domain, &bytes).unwrap();
        let mut socket = TcpStream::connect(cluster.brokers[0].data).unwrap();
        socket.set_read_timeout(Some(PATIENCE)).unwrap();
        let PeerAddress { gid, lid, queue_pair, first_psn, mtu } = pair.address();
        let connect = RdmaConnect {
            gid,
            lid: lid.into(),
            queue_pair,
            first_psn,
            mtu,
            batch_bytes: 32 << 10,
            ..RdmaConnect::blank()
        };
        socket.write_all(&connect.encode()).unwrap();
        let Frame::RdmaAccept(accept) = read_frame(&mut socket) else { panic!("no queue pair") };
        let RdmaAccept { gid, lid, queue_pair, first_psn, mtu, .. } = accept;
        let peer = PeerAddress { gid, lid: lid as u16, queue_pair, first_psn, mtu };
        let pair = pair.receive_from(&peer).unwrap().send().unwrap();
        socket.write_all(&open.encode()).unwrap();
        let heard = Vec::new();
        Self {
            socket,
            pair,
            queue,
            frames,
            _frames_region: frames_region,
            source,
            heard,
            origin,
            token: open.token,
            _publisher: publisher,
        }
    }

    /// Polls once, and returns the failure of a request, if one failed.
    fn poll(&mut self) -> Option<WorkError> {
        let mut failure = None;
        let Self { queue, frames, heard, .. } = self;
        queue
            .poll(|completion| match completion.outcome {
                Outcome::Failed(error) if !error.is_flush() => failure = Some(error),
                Outcome::Message { .. } => {
                    let at = completion.id as usize * FRAME_BYTES;
                    heard.push(Frame::decode(frames[at..].first_chunk().unwrap()).unwrap());
                }
                _ => {}
            })
            .unwrap();
        failure
    }

    /// Window grants that came.
    fn grants(&self) -> impl Iterator<Item = WindowGrant> {
        self.heard.iter().filter_map(|frame| match frame {
            Frame::WindowGrant(grant) => Some(*grant),
            _ => None,
        })
    }

    /// Asks for a landing window, and waits for it.
    fn window(&mut self) -> WindowGrant {
        let nowhere = RemoteRange { address: 0, key: 0 };
        let wants = Work::Write(None, nowhere, Some(WANTS_WINDOW));
        self.pair.post(&[Request { id: 1, signaled: true, work: wants }]).unwrap();
        eventually("a landing window comes", || {
            assert_eq!(self.poll(), None, "no landing window came");
            self.grants().next().is_some()
        });
        self.grants().next().unwrap()
    }

    fn write(&mut self, from: LocalRange, to: RemoteRange, immediate: u32) {
        let work = Work::Write(Some(from), to, Some(immediate));
        self.pair.post(&[Request { id: 1, signaled: true, work }]).unwrap();
    }

    /// Writes where it must not, and expects the device to refuse. A write that is not refused completes.
    fn write_refused(&mut self, to: RemoteRange) {
        let error = self.write_fails(to);
        assert!(error.is_remote_access(), "{error}");
    }

    /// Writes where it must not, and returns the error. A write that is not refused completes.
    fn write_fails(&mut self, to: RemoteRange) -> WorkError {
        self.write(self.source.range(0, 4096), to, 0);
        let mut error = None;
        eventually("the write is refused", || {
            error = self.poll();
            error.is_some()
        });
        error.unwrap()
    }

    /// Error that the broker sends over the socket before it closes.
    fn refusal(&mut self) -> (ErrorCode, String) {
        let Frame::ErrorFrame(error) = read_frame(&mut self.socket) else { panic!("no error frame") };
        let mut text = vec![0; error.text_bytes as usize];
        self.socket.read_exact(&mut text).unwrap();
        (ErrorCode::from_code(error.code).unwrap(), String::from_utf8(text).unwrap())
    }
}

fn read_frame(socket: &mut TcpStream) -> Frame {
    let mut frame = [0; FRAME_BYTES];
    socket.read_exact(&mut frame).unwrap();
    Frame::decode(&frame).unwrap()
}

fn remote(window: &WindowGrant) -> RemoteRange {
    RemoteRange { address: window.address, key: window.rkey }
}

/// Reads the pool, where publishers' bytes could be. It is half the region: in an emulated guest reading takes long.
fn pool(cluster: &Cluster) -> Vec<u8> {
    let file = File::open(&cluster.region).unwrap();
    let half = file.metadata().unwrap().len() / 2;
    let mut bytes = vec![0; half as usize];
    file.read_exact_at(&mut bytes, half).unwrap();
    bytes
}

/// Each offender has a connection of its own: a device closes a queue pair that wrote where it must not.
fn writes_outside_a_window_with_a_stale_key_or_after_fencing_are_refused_by_the_device(transport: TransportKind) {
    let cluster = Cluster::start(1, REGION, &[variable(transport), WINDOWS_STAY]);
    let client = over(transport, &cluster);
    let topic = client.create_topic("t", strong()).unwrap();
    let bystander = client.publisher("t").unwrap();
    let mut published = 0;
    let mut publish_on = || {
        for _ in 0..50 {
            bystander.publish_wait(&message(0, published)).unwrap();
            published += 1;
        }
        bystander.flush().unwrap();
    };
    publish_on();

    // Outside: before it, past its end, far away, and into another session's window.
    let mut other = Offender::new(transport, &cluster, &client, &topic);
    let others = other.window();
    for shift in [-4096, -1, 1 << 30] {
        let mut offender = Offender::new(transport, &cluster, &client, &topic);
        let grant = offender.window();
        let before = pool(&cluster);
        let address = grant.address.wrapping_add_signed(shift);
        offender.write_refused(RemoteRange { address, ..remote(&grant) });
        assert!(before == pool(&cluster), "bytes changed");
    }
    let mut offender = Offender::new(transport, &cluster, &client, &topic);
    let grant = offender.window();
    let before = pool(&cluster);
    offender.write_refused(remote(&grant).offset(u64::from(grant.bytes) - 4095));
    let mut offender = Offender::new(transport, &cluster, &client, &topic);
    offender.window();
    offender.write_refused(remote(&others));
    assert!(before == pool(&cluster), "bytes changed");
    publish_on();

    // Stale: the broker closes the first window when a batch arrives in the second.
    let mut offender = Offender::new(transport, &cluster, &client, &topic);
    let first = offender.window();
    eventually("a second landing window comes", || {
        assert_eq!(offender.poll(), None);
        offender.grants().count() >= 2
    });
    let second = offender.grants().filter(|grant| grant.number == 1).last().unwrap();
    let mut batch = BatchBuilder::new(4096);
    batch.push(&message(5, 0));
    batch.seal(&offender.origin, 0, true);
    let mut sealed = Buffer::zeroed(batch.bytes().len()).unwrap();
    sealed.copy_from_slice(batch.bytes());
    let sealed = MemoryRegion::local(offender.source.domain(), &sealed).unwrap();
    offender.write(sealed.range(0, batch.bytes().len() as u32), remote(&second), 1);
    eventually("the batch is acknowledged", || {
        assert_eq!(offender.poll(), None);
        offender.heard.iter().any(|frame| matches!(frame, Frame::Ack(_)))
    });
    let before = pool(&cluster);
    offender.write_refused(remote(&first));
    assert!(before == pool(&cluster), "bytes changed");
    publish_on();

    // Fenced: the client opens the next epoch of the session; the connection of the old one is told, and its
    // windows are closed before their memory is another's.
    let mut offender = Offender::new(transport, &cluster, &client, &topic);
    let grant = offender.window();
    let before = pool(&cluster);
    drop_session(&cluster, &offender);
    let (code, text) = offender.refusal();
    assert_eq!(code, ErrorCode::UnknownSession, "{text}");
    // On a slow host the broker may have closed the queue pair, too: any error will do.
    offender.write_fails(remote(&grant));
    assert!(before == pool(&cluster), "bytes changed");
    publish_on();
    drop(other);
    assert_exactly_once(&history(&client, "t")[&0], published);
}

/// Fences an offender's session: its client asks for the next epoch.
fn drop_session(cluster: &Cluster, offender: &Offender) {
    use embarcadero_control::v1::{OpenSessionRequest, control_client::ControlClient};
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut control = ControlClient::connect(format!("http://{}", cluster.control())).await.unwrap();
        let (client_id, token) = (offender.origin.client_id.0, offender.token.0);
        let request = OpenSessionRequest { topic: "t".to_owned(), client_id, ack_level: 1, resume: false, token };
        control.open_session(request).await.unwrap();
    });
}
