//! Promise: with NICs in software the log is the same log, whatever the network does.
//!
//! The wire between two hosts loses, repeats, reorders and damages packets, or goes down and comes back. A stranger sends
//! packets of any kind. Hosts are network namespaces, which needs root.

use crate::support::verbs::{REGION, order_and_integrity, over, small, strong};
use crate::support::wire::{FAR, Faults, NEAR, Wire};
use crate::support::{Cluster, assert_exactly_once, eventually, history, message};
use embarcadero_client::{ClientConfig, TransportKind};
use embarcadero_roce::packet::{Aeth, Ecn, Opcode, Packet, Reth, Syndrome};
use embarcadero_roce::psn::Psn;
use rand::Rng;
use socket2::{Domain, Protocol, Socket, Type};
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Duration;

/// Starts brokers on the near host.
fn brokers(wire: &Wire, count: usize) -> Cluster {
    let mut cluster = Cluster::start(0, REGION, &[("EMBARCADERO_BROKER_TRANSPORT", "roce")]);
    let (command, any) = (wire.command("near"), format!("{NEAR}:0"));
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    for _ in 0..count {
        cluster.add_under(&command, &["--data", &any, "--control", &any]);
    }
    cluster
}

fn survives(faults: Faults) {
    let wire = Wire::new(faults);
    let cluster = brokers(&wire, 2);
    wire.on("far", || {
        cluster.await_brokers(2);
        order_and_integrity(TransportKind::Roce, &cluster, 5000);
    });
    drop(cluster);
    assert!(wire.harmed.load(Ordering::Relaxed) > 10, "the wire did no harm");
}

#[test]
fn order_and_integrity_with_one_packet_of_a_hundred_lost() {
    survives(Faults { lost: 10, ..Faults::default() });
}

#[test]
fn order_and_integrity_with_one_packet_of_twenty_lost() {
    survives(Faults { lost: 50, ..Faults::default() });
}

#[test]
fn order_and_integrity_with_packets_repeated_reordered_and_damaged() {
    survives(Faults { lost: 5, repeated: 20, reordered: 20, damaged: 10 });
}

#[test]
fn a_link_that_goes_down_and_comes_back_loses_nothing() {
    let wire = Wire::new(Faults::default());
    let cluster = brokers(&wire, 1);
    wire.on("far", || {
        let client = over(TransportKind::Roce, &cluster);
        client.create_topic("t", strong()).unwrap();
        let publisher = client.publisher("t").unwrap();
        for number in 0..2000 {
            publisher.publish_wait(&message(0, number)).unwrap();
        }
        publisher.flush().unwrap();
        wire.link("far", "down");
        for number in 2000..2200 {
            publisher.publish_wait(&message(0, number)).unwrap();
        }
        let config = ClientConfig { transport: TransportKind::Roce, ..small(&cluster) };
        let mut down = config.clone();
        down.roce.address = Some(FAR.parse().unwrap());
        let refused = embarcadero_client::Client::connect(down).map(drop).unwrap_err().to_string();
        assert!(refused.contains("no interface of this host that is up has the address"), "{refused}");
        wire.link("far", "up");
        publisher.flush().unwrap();
        assert_exactly_once(&history(&client, "t")[&0], 2200);
    });
}

/// Sends packets of every kind, to and from any queue pair, with addresses of others, until `stop`.
///
/// A stranger knows no key. `sent` counts the packets.
fn send_anything(stop: &AtomicBool, sent: &AtomicU64) {
    let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(libc::IPPROTO_RAW))).unwrap();
    let mut rng = rand::rng();
    let to: IpAddr = NEAR.parse().unwrap();
    let mut bytes = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let opcode = Opcode::ALL[rng.random_range(0..Opcode::ALL.len())];
        let payload = vec![0xee; [0, 1, 64, 1024, 4096][rng.random_range(0..5)]];
        let syndromes = [
            Syndrome::Ack(31),
            Syndrome::RnrNak(1),
            Syndrome::PsnSequenceError,
            Syndrome::InvalidRequest,
            Syndrome::RemoteAccessError,
            Syndrome::RemoteOperationalError,
        ];
        let packet = Packet {
            // Address of the host that publishes, or of another.
            from: [FAR, "10.77.0.9"][rng.random_range(0..2)].parse().unwrap(),
            to,
            source_port: rng.random(),
            ecn: [Ecn::Capable0, Ecn::Congested][rng.random_range(0..2)],
            opcode,
            solicited: rng.random(),
            wants_ack: rng.random(),
            queue_pair: rng.random::<u32>() & 0xff_ffff,
            psn: Psn::new(rng.random::<u32>() & 0xff_ffff),
            reth: opcode.has_reth().then(|| Reth { address: rng.random(), rkey: rng.random(), bytes: rng.random() }),
            aeth: opcode.has_aeth().then(|| Aeth {
                syndrome: syndromes[rng.random_range(0..6)],
                messages: rng.random::<u32>() & 0xff_ffff,
            }),
            immediate: opcode.has_immediate().then(|| rng.random()),
            payload: &payload,
        };
        bytes.clear();
        packet.encode(&mut bytes).unwrap();
        if rng.random_range(0..4) == 0 {
            let at = rng.random_range(20..bytes.len());
            bytes[at] ^= 1 << rng.random_range(0..8);
        }
        if socket.send_to(&bytes, &SocketAddr::new(to, 0).into()).is_ok()
            && sent.fetch_add(1, Ordering::Relaxed).is_multiple_of(32)
        {
            // A flood of any packets could fill the wire; this is none.
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}

#[test]
fn a_stranger_who_sends_anything_changes_nothing() {
    let wire = Wire::new(Faults::default());
    let cluster = brokers(&wire, 1);
    let (stop, sent) = (AtomicBool::new(false), AtomicU64::new(0));
    wire.on("far", || {
        std::thread::scope(|scope| {
            let _stop = StopsWhenDropped(&stop);
            scope.spawn(|| send_anything(&stop, &sent));
            eventually("the stranger sends", || sent.load(Ordering::Relaxed) > 1000);
            order_and_integrity(TransportKind::Roce, &cluster, 3000);
        });
    });
    println!("{} packets of a stranger", sent.load(Ordering::Relaxed));
}

/// Stops the stranger, also when the test fails.
struct StopsWhenDropped<'a>(&'a AtomicBool);

impl Drop for StopsWhenDropped<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}
