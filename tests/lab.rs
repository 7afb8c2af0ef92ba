//! Promise: over real RDMA the log is the same log, and a session reaches no memory but its own.
//!
//! Needs an RDMA device, and for some tests device-dax or a second host: `scripts/test` runs them in `scripts/lab`.
//! Elsewhere they are ignored.
#![cfg(feature = "rdma")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

mod support;

use embarcadero_client::{Client, ClientConfig, Order, RdmaConfig, TopicOptions, Transport};
use std::process::Command;
use support::{Cluster, assert_exactly_once, history, message};

const REGION: &[&str] = &["--size", "192MiB", "--segment-size", "4MiB"];
const VERBS: (&str, &str) = ("EMBARCADERO_BROKER_TRANSPORT", "verbs");
const WINDOWS: (&str, &str) = ("EMBARCADERO_BROKER_RDMA__ISOLATION", "windows");
/// A dead broker is noticed soon.
const RECOVERY: &[(&str, &str)] = &[VERBS, ("EMBARCADERO_BROKER_BROKER_LEASE_MS", "1000")];

/// Runs shell commands on the guest.
fn shell(commands: &str) -> String {
    let said = Command::new("sh").args(["-ec", commands]).output().unwrap();
    assert!(said.status.success(), "{commands}: {}", String::from_utf8_lossy(&said.stderr));
    String::from_utf8(said.stdout).unwrap()
}

/// A client over verbs, with batches that are small enough for a test to have many.
fn verbs(cluster: &Cluster) -> Client {
    Client::connect(ClientConfig { transport: Transport::Verbs, ..small(cluster) }).unwrap()
}

fn small(cluster: &Cluster) -> ClientConfig {
    ClientConfig { batch_size: Some(32 << 10), buffer_bytes: 1 << 20, ..cluster.config() }
}

fn strong() -> TopicOptions {
    TopicOptions { order: Order::Strong, ..TopicOptions::default() }
}

/// Publishes `count` messages as publisher `number`, from a thread of its own.
fn publish(client: Client, topic: &'static str, number: u32, count: u64) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        let publisher = client.publisher(topic).unwrap();
        for message_number in 0..count {
            publisher.publish_wait(&message(number, message_number)).unwrap();
        }
        publisher.flush().unwrap();
        publisher.close().unwrap();
    })
}

/// Two publishers, a subscriber that follows, and one that comes afterwards, over verbs; a third publisher over TCP.
fn order_and_integrity(cluster: &Cluster, count: u64) {
    let client = verbs(cluster);
    client.create_topic("t", strong()).unwrap();
    let mut subscriber = client.subscriber("t", embarcadero_client::Start::Earliest).unwrap();
    let tcp = Client::connect(small(cluster)).unwrap();
    let publishers =
        [publish(verbs(cluster), "t", 0, count), publish(verbs(cluster), "t", 1, count), publish(tcp, "t", 2, count)];
    let mut followed = Vec::new();
    while (followed.len() as u64) < 3 * count {
        let message = subscriber.next(support::PATIENCE).unwrap().expect("nothing more came");
        assert_eq!(message.offset, followed.len() as u64);
        followed.push(message.payload.to_vec());
    }
    for publisher in publishers {
        publisher.join().unwrap();
    }
    let seen = history(&client, "t");
    let over_tcp = history(&cluster.client(), "t");
    assert_eq!(seen, over_tcp, "verbs and TCP deliver different streams");
    for number in 0..3 {
        assert_exactly_once(&seen[&number], count);
    }
    for (offset, payload) in followed.iter().enumerate() {
        let (publisher, number) = support::parse(payload);
        assert_eq!(payload, &message(publisher, number));
        assert_eq!(seen[&publisher][number as usize], (number, offset as u64));
    }
    let mut verify = cluster.command(&["verify", "t"]);
    assert!(verify.env("EMBARCADERO_CLIENT_TRANSPORT", "verbs").status().unwrap().success());
}

mod one_guest {
    use super::*;
    use embarcadero_client::{Publisher, TopicView};
    use embarcadero_datapath::buffer::Buffer;
    use embarcadero_datapath::transport::verbs::{WANTS_LEASE, accepted};
    use embarcadero_datapath::verbs::{
        CompletionQueue, Context, LocalRange, MemoryRegion, Outcome, PeerAddress, ProtectionDomain, QueuePair,
        QueuePairOptions, RemoteRange, Request, Sending, Work, WorkError,
    };
    use embarcadero_datapath::wire::batch::{BatchBuilder, BatchOrigin};
    use embarcadero_datapath::wire::{ErrorCode, FRAME_BYTES, Frame, Lease, VerbsConnect};
    use std::io::{Read, Write};
    use std::net::TcpStream;
    use std::process::Stdio;
    use std::time::{Duration, Instant};
    use support::{PATIENCE, eventually};

    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn order_and_integrity_over_verbs_and_tcp_on_one_topic() {
        order_and_integrity(&Cluster::start(2, REGION, &[VERBS]), 10_000);
    }

    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn order_and_integrity_with_memory_windows() {
        order_and_integrity(&Cluster::start(2, REGION, &[VERBS, WINDOWS]), 3000);
    }

    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn acknowledgement_level_0_hands_everything_over() {
        let cluster = Cluster::start(1, REGION, &[VERBS]);
        let config = ClientConfig { transport: Transport::Verbs, ack_level: 0, ..small(&cluster) };
        let client = Client::connect(config).unwrap();
        client.create_topic("t", strong()).unwrap();
        publish(verbs(&cluster), "t", 0, 5).join().unwrap();
        let publisher = client.publisher("t").unwrap();
        for number in 0..5000 {
            publisher.publish_wait(&message(1, number)).unwrap();
        }
        publisher.flush().unwrap();
        eventually("all arrive", || history(&client, "t").get(&1).is_some_and(|seen| seen.len() == 5000));
    }

    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn a_full_pool_is_a_clear_error_also_over_verbs() {
        let cluster = Cluster::start(
            1,
            &["--size", "120MiB", "--segment-size", "4MiB"],
            &[VERBS, ("EMBARCADERO_BROKER_EXHAUSTED_WAIT_MS", "500")],
        );
        let client = verbs(&cluster);
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
    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn windows_of_idle_publishers_do_not_keep_the_pool_from_being_reclaimed() {
        let cluster = Cluster::start(1, &["--size", "120MiB", "--segment-size", "2MiB"], &[VERBS]);
        let client = verbs(&cluster);
        let options = TopicOptions { retention_bytes: 4 << 20, ..strong() };
        client.create_topic("t", options).unwrap();
        let report = support::run(&["region", "inspect", "--json", "--path", cluster.region.to_str().unwrap()]);
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

    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn a_publisher_killed_in_mid_write_and_a_broker_killed_disturb_nobody() {
        let mut cluster = Cluster::start(3, REGION, RECOVERY);
        let client = verbs(&cluster);
        client.create_topic("t", strong()).unwrap();
        let mut victim = cluster
            .command(&["produce", "t"])
            .env("EMBARCADERO_CLIENT_TRANSPORT", "verbs")
            .stdin(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        let mut feed = victim.stdin.take().unwrap();
        let feeder = std::thread::spawn(move || {
            for number in 0.. {
                let mut line = message(9, number);
                line.push(b'\n');
                if feed.write_all(&line).is_err() {
                    return;
                }
                // It must not fill the pool before it is killed.
                if number % 100 == 0 {
                    std::thread::sleep(Duration::from_millis(20));
                }
            }
        });
        eventually("the victim publishes", || client.describe_topic("t").unwrap().1[0].batches > 2);
        let publisher = client.publisher("t").unwrap();
        for number in 0..12_000u64 {
            match number {
                4000 => {
                    victim.kill().unwrap();
                    victim.wait().unwrap();
                }
                8000 => cluster.brokers[2].kill(),
                _ => {}
            }
            publisher.publish_wait(&message(0, number)).unwrap();
        }
        publisher.flush().unwrap();
        feeder.join().unwrap();
        let seen = history(&client, "t");
        assert_exactly_once(&seen[&0], 12_000);
        assert_exactly_once(&seen[&9], seen[&9].len() as u64);
    }

    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn an_independent_implementation_publishes_over_verbs() {
        let cluster = Cluster::start(1, REGION, &[VERBS]);
        let client = verbs(&cluster);
        client.create_topic("t", strong()).unwrap();
        let script = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/interop/pyverbs_publish.py");
        for round in 0..3u64 {
            let messages = ["first".to_owned(), format!("round {round}"), "x".repeat(1000)];
            let said = Command::new("/usr/bin/python3")
                .args([script, cluster.control(), "t"])
                .args(&messages)
                .output()
                .unwrap();
            let errors = String::from_utf8_lossy(&said.stderr);
            assert!(said.status.success(), "{errors}");
            let offset: u64 = String::from_utf8(said.stdout).unwrap().trim().parse().unwrap();
            assert_eq!(offset, round * 3);
            let mut subscriber = client.subscriber("t", embarcadero_client::Start::Offset(offset)).unwrap();
            for expected in &messages {
                let message = subscriber.next(PATIENCE).unwrap().unwrap();
                assert_eq!(message.payload, expected.as_bytes());
            }
        }
    }

    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn what_the_region_no_longer_holds_comes_from_disks_over_verbs() {
        let disk = tempfile::tempdir().unwrap();
        // The guest's file systems have no direct I/O.
        let replica = [
            ("EMBARCADERO_BROKER_REPLICA__PATH", disk.path().to_str().unwrap()),
            ("EMBARCADERO_BROKER_REPLICA__DIRECT", "false"),
        ];
        let cluster = Cluster::start(2, REGION, &[&[VERBS], replica.as_slice()].concat());
        let client = Client::connect(ClientConfig { transport: Transport::Verbs, ack_level: 2, ..small(&cluster) });
        let client = client.unwrap();
        let options = TopicOptions { ack_level: 2, replication_factor: 2, retention_bytes: 512 << 10, ..strong() };
        client.create_topic("t", options).unwrap();
        let publisher = client.publisher("t").unwrap();
        for number in 0..4000 {
            publisher.publish_wait(&message(0, number)).unwrap();
        }
        publisher.flush().unwrap();
        let (_, streams) = client.describe_topic("t").unwrap();
        assert!(streams[0].earliest_offset > 0, "all is in the region still: {streams:?}");
        assert_exactly_once(&history(&client, "t")[&0], 4000);
    }

    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn a_region_on_huge_pages() {
        shell(
            "mkdir -p /run/huge
            mount -t hugetlbfs none /run/huge
            echo 112 > /proc/sys/vm/nr_hugepages",
        );
        order_and_integrity(&Cluster::start_on("/run/huge/region".into(), 1, REGION, &[VERBS]), 300);
        shell("umount /run/huge; echo 0 > /proc/sys/vm/nr_hugepages");
    }

    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn a_client_takes_the_first_of_its_devices_that_can_be_used() {
        shell("ip link add d1 type dummy; rdma link add rxe1 type rxe netdev d1");
        let cluster = Cluster::start(1, REGION, &[VERBS, ("EMBARCADERO_BROKER_RDMA__DEVICE", "rxe0")]);
        let over = |devices: &[&str]| {
            let devices = devices.iter().map(|device| (*device).to_owned()).collect();
            let rdma = RdmaConfig { devices, ..RdmaConfig::default() };
            Client::connect(ClientConfig { transport: Transport::Verbs, rdma, ..small(&cluster) })
        };
        let error = over(&["rxe1"]).map(drop).unwrap_err().to_string();
        assert!(error.contains("rxe1 has no active port"), "{error}");
        let error = over(&["rxe9"]).map(drop).unwrap_err().to_string();
        assert!(error.contains("no RDMA device rxe9; there are: rxe"), "{error}");
        let client = over(&["rxe9", "rxe1", "rxe0"]).unwrap();
        client.create_topic("t", strong()).unwrap();
        publish(client, "t", 0, 100).join().unwrap();
        assert_exactly_once(&history(&cluster.client(), "t")[&0], 100);
        shell("rdma link delete rxe1; ip link delete d1");
    }

    fn link(state: &str) {
        shell(&format!("ip link set d0 {state}"));
    }

    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn a_port_that_goes_down_and_comes_back_loses_nothing() {
        let cluster = Cluster::start(1, REGION, &[VERBS]);
        let client = verbs(&cluster);
        client.create_topic("t", strong()).unwrap();
        let publisher = client.publisher("t").unwrap();
        for number in 0..2000 {
            publisher.publish_wait(&message(0, number)).unwrap();
        }
        publisher.flush().unwrap();
        link("down");
        for number in 2000..2200 {
            publisher.publish_wait(&message(0, number)).unwrap();
        }
        let refused = Client::connect(ClientConfig { transport: Transport::Verbs, ..cluster.config() }).map(drop);
        assert!(refused.unwrap_err().to_string().contains("no active port"));
        link("up");
        Command::new("ip").args(["addr", "add", "10.0.0.1/24", "dev", "d0"]).stderr(Stdio::null()).status().unwrap();
        publisher.flush().unwrap();
        assert_exactly_once(&history(&client, "t")[&0], 2200);
    }

    /// A publisher that keeps to no rule: the protocol by hand.
    struct Offender {
        socket: TcpStream,
        pair: QueuePair<Sending>,
        queue: CompletionQueue,
        frames: Buffer,
        _frames_region: MemoryRegion,
        source: MemoryRegion,
        heard: Vec<Frame>,
        origin: BatchOrigin,
        _publisher: Publisher,
    }

    const FRAMES: usize = 64;

    impl Offender {
        fn new(cluster: &Cluster, client: &Client, topic: &TopicView) -> Self {
            let publisher = client.publisher(&topic.name).unwrap();
            let (open, origin) = cluster.session(&publisher, topic);
            let (context, port) = Context::find(None).unwrap();
            let domain = ProtectionDomain::new(&context).unwrap();
            let queue = CompletionQueue::new(&context, 256).unwrap();
            let options =
                QueuePairOptions { send_depth: 64, receive_depth: FRAMES as u32, inline_bytes: 64, shared: None };
            let mut pair = QueuePair::new(&domain, &queue, &port, &options).unwrap();
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
            let connect = VerbsConnect {
                gid,
                lid: lid.into(),
                queue_pair,
                first_psn,
                mtu,
                batch_bytes: 32 << 10,
                ..VerbsConnect::blank()
            };
            socket.write_all(&connect.encode()).unwrap();
            let Frame::VerbsAccept(accept) = read_frame(&mut socket) else { panic!("no queue pair") };
            let pair = pair.receive_from(&accepted(&accept)).unwrap().send().unwrap();
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
                _publisher: publisher,
            }
        }

        /// Polls once; the failure of a request, if one failed.
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

        fn lease(&mut self) -> Lease {
            let nowhere = RemoteRange { address: 0, key: 0 };
            let wants = Work::Write(None, nowhere, Some(WANTS_LEASE));
            self.pair.post(&[Request { id: 1, signaled: true, work: wants }]).unwrap();
            let begun = Instant::now();
            loop {
                assert!(self.poll().is_none() && begun.elapsed() < PATIENCE, "no landing window came");
                if let Some(Frame::Lease(lease)) = self.heard.iter().find(|frame| matches!(frame, Frame::Lease(_))) {
                    return *lease;
                }
            }
        }

        fn write(&mut self, from: LocalRange, to: RemoteRange, immediate: u32) {
            let work = Work::Write(Some(from), to, Some(immediate));
            self.pair.post(&[Request { id: 1, signaled: true, work }]).unwrap();
        }

        /// Writes where it must not, and expects the device to refuse.
        fn write_refused(&mut self, to: RemoteRange) {
            self.write(self.source.range(0, 4096), to, 0);
            let begun = Instant::now();
            let error = loop {
                if let Some(error) = self.poll() {
                    break error;
                }
                if begun.elapsed() > PATIENCE {
                    let refusal = self.refusal();
                    panic!("the write was not refused; the broker said {:?}, and then {refusal:?}", self.heard);
                }
            };
            assert!(error.is_remote_access(), "{error}");
        }

        /// What the broker says over the socket before it closes.
        fn refusal(&mut self) -> (ErrorCode, String) {
            let Frame::ErrorFrame(error) = read_frame(&mut self.socket) else { panic!("no error frame") };
            let mut text = vec![0; error.text_bytes as usize];
            self.socket.read_exact(&mut text).unwrap();
            (ErrorCode::from_u32(error.code).unwrap(), String::from_utf8(text).unwrap())
        }
    }

    fn read_frame(socket: &mut TcpStream) -> Frame {
        let mut frame = [0; FRAME_BYTES];
        socket.read_exact(&mut frame).unwrap();
        Frame::decode(&frame).unwrap()
    }

    fn remote(lease: &Lease) -> RemoteRange {
        RemoteRange { address: lease.address, key: lease.rkey }
    }

    /// All of the pool: what publishers' bytes could be in.
    fn pool(cluster: &Cluster) -> Vec<u8> {
        let bytes = std::fs::read(&cluster.region).unwrap();
        bytes[bytes.len() / 2..].to_vec()
    }

    /// Each offender has a connection of its own: a device closes a queue pair that wrote where it must not.
    #[test]
    #[ignore = "needs an RDMA device: scripts/lab has one"]
    fn writes_outside_a_window_with_a_stale_key_or_after_fencing_are_refused_by_the_device() {
        let cluster = Cluster::start(1, REGION, &[VERBS]);
        let client = verbs(&cluster);
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
        let mut other = Offender::new(&cluster, &client, &topic);
        let others = other.lease();
        for shift in [-4096, -1, 1 << 30] {
            let mut offender = Offender::new(&cluster, &client, &topic);
            let lease = offender.lease();
            let before = pool(&cluster);
            let address = lease.address.wrapping_add_signed(shift);
            offender.write_refused(RemoteRange { address, ..remote(&lease) });
            assert!(before == pool(&cluster), "bytes changed");
        }
        let mut offender = Offender::new(&cluster, &client, &topic);
        let lease = offender.lease();
        let before = pool(&cluster);
        offender.write_refused(remote(&lease).offset(u64::from(lease.bytes) - 4095));
        let mut offender = Offender::new(&cluster, &client, &topic);
        offender.lease();
        offender.write_refused(remote(&others));
        assert!(before == pool(&cluster), "bytes changed");
        publish_on();

        // Stale: the broker closes the first window when a batch arrives in the second.
        let mut offender = Offender::new(&cluster, &client, &topic);
        let first = offender.lease();
        let begun = Instant::now();
        while offender.heard.iter().filter(|frame| matches!(frame, Frame::Lease(_))).count() < 2 {
            offender.poll();
            assert!(begun.elapsed() < PATIENCE);
        }
        let mut second = offender.heard.iter().filter_map(|frame| match frame {
            Frame::Lease(lease) if lease.number == 1 => Some(*lease),
            _ => None,
        });
        let second = second.next_back().unwrap();
        let mut batch = BatchBuilder::new(4096).unwrap();
        batch.push(&message(5, 0));
        batch.seal(&offender.origin, 0, true);
        let range = batch.local(offender.source.domain()).unwrap();
        offender.write(range, remote(&second), 1);
        while !offender.heard.iter().any(|frame| matches!(frame, Frame::Ack(_))) {
            offender.poll();
            assert!(begun.elapsed() < PATIENCE, "the batch was not acknowledged");
        }
        let before = pool(&cluster);
        offender.write_refused(remote(&first));
        assert!(before == pool(&cluster), "bytes changed");
        publish_on();

        // Fenced: the client opens the next epoch of the session; the connection of the old one is told, and its
        // windows are closed before their memory is another's.
        let mut offender = Offender::new(&cluster, &client, &topic);
        let lease = offender.lease();
        drop_session(&cluster, &offender);
        let (code, text) = offender.refusal();
        assert_eq!(code, ErrorCode::UnknownSession, "{text}");
        let before = pool(&cluster);
        offender.write_refused(remote(&lease));
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
            let client_id = offender.origin.client_id;
            let request = OpenSessionRequest { topic: "t".to_owned(), client_id, ack_level: 1 };
            control.open_session(request).await.unwrap();
        });
    }
}

mod cxl {
    use super::*;
    use support::refused;

    #[test]
    #[ignore = "needs a CXL device and an RDMA device: scripts/lab run --cxl has both"]
    fn a_region_on_fsdax_is_refused() {
        shell(
            "ndctl destroy-namespace -f namespace0.0
            ndctl create-namespace -m fsdax --map mem
            mkfs.ext4 -q -b 4096 /dev/pmem0
            mkdir -p /run/fsdax
            mount -o dax /dev/pmem0 /run/fsdax",
        );
        let path = "/run/fsdax/region";
        let made = support::run(&["region", "create", "--path", path, "--size", "120MiB", "--segment-size", "1MiB"]);
        assert!(made.status.success());
        refused(&["broker", "--region", path], &[VERBS], "is a file on fsdax");
        shell(
            "umount /run/fsdax
            ndctl destroy-namespace -f namespace0.0
            ndctl create-namespace -m devdax -a 4k --map mem",
        );
    }

    #[test]
    #[ignore = "needs /dev/dax0.0 and an RDMA device: scripts/lab run --cxl has both"]
    fn order_and_integrity_on_device_dax() {
        let dax = "/dev/dax0.0".into();
        let cluster = Cluster::start_on(dax, 2, REGION, &[VERBS]);
        order_and_integrity(&cluster, 1500);
        drop(cluster);
        let create = ["region", "create", "--path", "/dev/dax0.0", "--size", "192MiB"];
        refused(&create, &[], "exists already");
        assert!(support::run(&[&create[..], &["--force"]].concat()).status.success());
        assert!(support::run(&["region", "destroy", "--path", "/dev/dax0.0"]).status.success());
        assert!(support::run(&create).status.success());
    }

    /// The last of these: what is system-ram is no device any more.
    #[test]
    #[ignore = "needs a CXL device and an RDMA device: scripts/lab run --cxl has both"]
    fn system_ram_is_used_if_it_stays_where_it_is() {
        shell("modprobe kmem; daxctl reconfigure-device -m system-ram dax0.0");
        let devices: serde_json::Value = serde_json::from_str(&shell("daxctl list")).unwrap();
        let node = devices[0]["target_node"].as_u64().unwrap().to_string();
        let path = "/dev/shm/system-ram";
        let create = ["--size", "192MiB", "--segment-size", "4MiB", "--numa-node", &node];
        let environment = [VERBS, ("EMBARCADERO_BROKER_CXL__NUMA_NODE", &node)];
        let made = support::run(&[&["region", "create", "--path", path][..], &create].concat());
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        // In the movable zone the pages cannot be pinned; the kernel moves them to do that.
        refused(&["broker", "--region", path], &environment, &format!("are not on NUMA node {node}"));
        std::fs::remove_file(path).unwrap();

        shell("daxctl offline-memory dax0.0; daxctl online-memory --no-movable dax0.0");
        order_and_integrity(&Cluster::start_on(path.into(), 2, &create, &environment), 300);
    }
}

mod two_guests {
    use super::*;
    use std::path::PathBuf;
    use support::etcd::Etcd;
    use support::eventually;

    /// What guests tell each other, through files, in one test.
    struct Signs {
        guest: u32,
        address: String,
        test: &'static str,
        shared: PathBuf,
    }

    impl Signs {
        fn new(test: &'static str) -> Self {
            let variable = |name| std::env::var(name).unwrap();
            let (guest, address) = (variable("LAB_GUEST").parse().unwrap(), variable("LAB_ADDRESS"));
            Self { guest, address, test, shared: PathBuf::from(variable("LAB_SHARED")) }
        }

        fn said(&self, name: &str) -> Option<String> {
            let text = std::fs::read_to_string(self.shared.join(format!("{}.{name}", self.test))).ok();
            text.filter(|text| !text.is_empty())
        }

        fn say(&self, name: &str, text: &str) {
            let new = self.shared.join(format!("new.{}", self.guest));
            std::fs::write(&new, text).unwrap();
            std::fs::rename(new, self.shared.join(format!("{}.{name}", self.test))).unwrap();
        }

        fn wait(&self, name: &str) -> String {
            eventually(&format!("the other guest's sign {name}"), || self.said(name).is_some());
            self.said(name).unwrap()
        }
    }

    /// Guest 1 has the head, guest 2 another broker, on one region in shared CXL memory that nothing keeps coherent. Both
    /// publish over verbs to both brokers; both read the same order.
    #[test]
    #[ignore = "needs two hosts that share CXL memory: scripts/lab run --guests 2 --cxl has them"]
    fn brokers_on_two_hosts_without_coherence_agree_on_one_order() {
        const COUNT: u64 = 800;
        let signs = Signs::new("order");
        let (guest, address) = (signs.guest, &signs.address);
        let (said, say) = (|name: &str| signs.said(name), |name: &str, text: &str| signs.say(name, text));
        let environment = [
            VERBS,
            ("EMBARCADERO_BROKER_CXL__COHERENCE", "none"),
            ("EMBARCADERO_BROKER_ROLE", if guest == 1 { "head" } else { "follower" }),
            ("EMBARCADERO_BROKER_BROKER_LEASE_MS", "20000"),
        ];
        let (data, control) = (format!("{address}:7001"), format!("{address}:7000"));
        let arguments = ["--id", if guest == 1 { "0" } else { "1" }, "--data", &data, "--control", &control];
        let mut cluster = if guest == 1 {
            let create =
                ["--size", "192MiB", "--segment-size", "2MiB", "--max-brokers", "2", "--allocator", "partitioned"];
            Cluster::start_on("/dev/dax0.0".into(), 0, &create, &environment)
        } else {
            eventually("the head starts", || said("head").is_some());
            Cluster::on("/dev/dax0.0".into(), &environment)
        };
        cluster.add(&arguments);
        if guest == 1 {
            say("head", &control);
        }
        cluster.await_brokers(2);
        let client = verbs(&cluster);
        if guest == 1 {
            client.create_topic("t", strong()).unwrap();
            say("topic", "t");
        }
        eventually("the topic is there", || said("topic").is_some());
        publish(verbs(&cluster), "t", guest, COUNT).join().unwrap();
        say(&format!("published.{guest}"), "all");
        eventually("the other has published", || said("published.1").is_some() && said("published.2").is_some());
        let seen = history(&client, "t");
        assert_exactly_once(&seen[&1], COUNT);
        assert_exactly_once(&seen[&2], COUNT);
        say(&format!("seen.{guest}"), &format!("{seen:?}"));
        let other = signs.wait(&format!("seen.{}", 3 - guest));
        assert!(other == format!("{seen:?}"), "two hosts read different orders");
        say(&format!("done.{guest}"), "done");
        eventually("the other is done", || said("done.1").is_some() && said("done.2").is_some());
    }
    /// Each guest has a broker, nothing keeps their memory coherent, and etcd elects. Guest 1's broker leads and is killed;
    /// guest 2's goes on where it stood. What both had published is there, once and in order, and so is what follows.
    #[test]
    #[ignore = "needs two hosts that share CXL memory: scripts/lab run --guests 2 --cxl has them"]
    fn the_other_host_takes_over_without_coherence() {
        const COUNT: u64 = 300;
        let signs = Signs::new("takeover");
        let (guest, address) = (signs.guest, signs.address.clone());
        let etcd = (guest == 1).then(|| {
            let etcd = Etcd::start(address.parse().unwrap());
            signs.say("etcd", &etcd.endpoints());
            etcd
        });
        let endpoints = signs.wait("etcd");
        let environment = [
            ("EMBARCADERO_BROKER_CXL__COHERENCE", "none"),
            ("EMBARCADERO_BROKER_MEMBERSHIP", "etcd"),
            ("EMBARCADERO_BROKER_ETCD__ENDPOINTS", &endpoints),
            // Emulated hosts stand still for longer than real ones.
            ("EMBARCADERO_BROKER_ETCD__LEASE_S", "10"),
            ("EMBARCADERO_BROKER_HEAD_LEASE_MS", "5000"),
            ("EMBARCADERO_BROKER_BROKER_LEASE_MS", "20000"),
        ];
        let (data, control) = (format!("{address}:7001"), format!("{address}:7000"));
        let arguments = ["--id", if guest == 1 { "0" } else { "1" }, "--data", &data, "--control", &control];
        let mut cluster = if guest == 1 {
            let create = ["--size", "192MiB", "--segment-size", "2MiB", "--max-brokers", "2"];
            let create = [&create[..], &["--allocator", "partitioned", "--force"]].concat();
            Cluster::start_on("/dev/dax0.0".into(), 0, &create, &environment)
        } else {
            signs.wait("head");
            Cluster::on("/dev/dax0.0".into(), &environment)
        };
        cluster.add(&arguments);
        if guest == 1 {
            assert_eq!(cluster.brokers[cluster.head()].id, 0);
            cluster.client_of_all().create_topic("t", strong()).unwrap();
            signs.say("head", &control);
        }
        cluster.await_brokers(2);
        let publisher = cluster.client_of_all().publisher("t").unwrap();
        let publish = |from: u64| {
            for number in from..from + COUNT {
                publisher.publish_wait(&message(guest, number)).unwrap();
            }
            publisher.flush().unwrap();
        };
        publish(0);
        signs.say(&format!("published.{guest}"), "all");
        if guest == 1 {
            signs.wait("published.2");
            cluster.kill(0);
            signs.say("dead", "the head");
            signs.wait("checked");
            // It comes back, follows, and reads the same.
            cluster.add(&arguments);
            let seen = history(&cluster.client_of_all(), "t");
            assert_exactly_once(&seen[&1], COUNT);
            assert_exactly_once(&seen[&2], 2 * COUNT);
            signs.say("done", "all");
        } else {
            signs.wait("dead");
            eventually("guest 2 leads", || {
                cluster.client_of_all().cluster().unwrap().brokers.iter().any(|b| b.head && b.id == 1)
            });
            publish(COUNT);
            let seen = history(&cluster.client_of_all(), "t");
            assert_exactly_once(&seen[&1], COUNT);
            assert_exactly_once(&seen[&2], 2 * COUNT);
            signs.say("checked", "all");
            signs.wait("done");
        }
        drop(etcd);
    }
}
