//! Promise: over ports of DPDK the log is the same log.
//!
//! Virtual devices only: memif between two processes, AF_PACKET and AF_XDP on a wire between two network namespaces. No huge
//! pages; root. `scripts/test` builds with feature `dpdk`.
#![cfg(feature = "dpdk")]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)] // a test fails by panicking

mod support;

use std::io::Write;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use support::verbs::{REGION, shell, strong};
use support::wire::{Faults, Wire};
use support::{Cluster, PROGRAM, assert_exactly_once, eventually, history, message};

/// Addresses of the ports, which the kernel does not know of.
const BROKER: &str = "10.78.0.1";
const CLIENT: &str = "10.78.0.2";

/// Of the broker's sockets.
const CONTROL: &str = "10.79.0.1";

/// Arguments of DPDK for one virtual device and no other, as the environment says them.
fn eal(device: &str) -> String {
    format!(r#"["--no-huge", "--no-shconf", "--no-pci", "--no-telemetry", "-m", "256", "--vdev={device}"]"#)
}

fn broker_variables<'a>(eal: &'a str, mtu: &'a str) -> [(&'a str, &'a str); 4] {
    [
        ("EMBARCADERO_BROKER_TRANSPORT", "dpdk"),
        ("EMBARCADERO_BROKER_DPDK__EAL", eal),
        ("EMBARCADERO_BROKER_DPDK__ADDRESS", BROKER),
        ("EMBARCADERO_BROKER_DPDK__MTU", mtu),
    ]
}

fn over_dpdk<'a>(command: &'a mut Command, eal: &str, mtu: &str) -> &'a mut Command {
    command
        .env("EMBARCADERO_CLIENT_TRANSPORT", "dpdk")
        .env("EMBARCADERO_CLIENT_DPDK__EAL", eal)
        .env("EMBARCADERO_CLIENT_DPDK__ADDRESS", CLIENT)
        .env("EMBARCADERO_CLIENT_DPDK__MTU", mtu)
        .env("EMBARCADERO_CLIENT_BATCH_SIZE", "32768")
        .env("EMBARCADERO_CLIENT_BUFFER_BYTES", "1048576")
}

/// Publishes messages `0..count` of `publisher` from a process.
fn produce(cluster: &Cluster, eal: &str, mtu: &str, publisher: u32, count: u64) -> Child {
    let mut command = cluster.command(&["produce", "t", "--length-prefixed"]);
    let mut child = over_dpdk(&mut command, eal, mtu).stdin(Stdio::piped()).spawn().unwrap();
    let mut feed = child.stdin.take().unwrap();
    std::thread::spawn(move || {
        for number in 0..count {
            let message = message(publisher, number);
            let record = [&(message.len() as u32).to_le_bytes()[..], &message].concat();
            if feed.write_all(&record).is_err() {
                return;
            }
        }
    });
    child
}

fn order_and_integrity(cluster: &Cluster, eal: &str, mtu: &str, count: u64) {
    let tcp = cluster.client();
    tcp.create_topic("t", strong()).unwrap();
    assert!(produce(cluster, eal, mtu, 0, count).wait().unwrap().success());
    // What came over DPDK is delivered over it too, and is what TCP delivers.
    let mut verify = cluster.command(&["verify", "t"]);
    assert!(over_dpdk(&mut verify, eal, mtu).status().unwrap().success());
    assert_exactly_once(&history(&tcp, "t")[&0], count);
}

/// Both ends of a shared-memory link, by role.
fn memif(directory: &tempfile::TempDir) -> [String; 2] {
    let socket = directory.path().join("memif");
    ["server", "client"]
        .map(|role| eal(&format!("net_memif0,role={role},socket={},socket-abstract=no,bsize=8192", socket.display())))
}

#[test]
fn order_and_integrity_over_memif() {
    let directory = tempfile::tempdir().unwrap();
    let [server, client] = memif(&directory);
    let cluster = Cluster::start(1, REGION, &broker_variables(&server, "4200"));
    order_and_integrity(&cluster, &client, "4200", 20_000);
}

#[test]
fn a_client_that_is_killed_disturbs_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let [server, client] = memif(&directory);
    let cluster = Cluster::start(1, REGION, &broker_variables(&server, "4200"));
    let tcp = cluster.client();
    tcp.create_topic("t", strong()).unwrap();
    let mut victim = produce(&cluster, &client, "4200", 0, 100_000);
    eventually("the victim publishes", || tcp.describe_topic("t").unwrap().1[0].batches > 2);
    victim.kill().unwrap();
    victim.wait().unwrap();
    assert!(produce(&cluster, &client, "4200", 1, 5000).wait().unwrap().success());
    let seen = history(&tcp, "t");
    assert_exactly_once(&seen[&0], seen[&0].len() as u64);
    assert_exactly_once(&seen[&1], 5000);
}

/// Runs are brokers of their own: the client's port, which stays, finds each.
#[test]
fn a_port_outlives_its_peer() {
    let arguments = ["bench", "publish", "--transport", "dpdk", "--runs", "3", "--seconds", "0.2", "--json"];
    let bench = Command::new(PROGRAM).args(arguments).output().unwrap();
    assert!(bench.status.success(), "{}", String::from_utf8_lossy(&bench.stderr));
    let said = String::from_utf8(bench.stdout).unwrap();
    let rows = said.lines().map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let goodput = rows.filter(|row| row["name"] == "publish.goodput").map(|row| row["min"].as_f64().unwrap());
    assert!(goodput.sum::<f64>() > 0.0, "{said}");
}

/// Over a device on the interface `e0` of two namespaces.
fn between_namespaces(device: &str, mtu: &str, faults: Faults) {
    let wire = Wire::with_mtu(faults, mtu);
    let eal = eal(device);
    let mut cluster = Cluster::start(0, REGION, &broker_variables(&eal, mtu));
    // The device takes all that comes on its interface: sockets have another.
    let (near, far) = (wire.namespace("near"), wire.namespace("far"));
    shell(&format!(
        "ip link add c0 netns {near} type veth peer name c0 netns {far}
        ip -n {near} addr add {CONTROL}/24 dev c0
        ip -n {far} addr add 10.79.0.2/24 dev c0
        ip -n {near} link set c0 up
        ip -n {far} link set c0 up"
    ));
    let (command, any) = (wire.command("near"), format!("{CONTROL}:0"));
    let command: Vec<&str> = command.iter().map(String::as_str).collect();
    cluster.add_under(&command, &["--data", &any, "--control", &any]);
    wire.on("far", || order_and_integrity(&cluster, &eal, mtu, 5000));
    assert!(faults.lost == 0 || wire.harmed.load(Ordering::Relaxed) > 10, "the wire did no harm");
}

const AF_PACKET: &str = "net_af_packet0,iface=e0,blocksz=65536,framesz=8192,framecnt=512";

#[test]
fn order_and_integrity_over_af_packet() {
    between_namespaces(AF_PACKET, "8150", Faults::default());
}

#[test]
fn order_and_integrity_over_af_packet_and_a_wire_that_loses_repeats_and_reorders() {
    between_namespaces(AF_PACKET, "8150", Faults { lost: 20, repeated: 10, reordered: 10, damaged: 5 });
}

#[test]
fn order_and_integrity_over_af_xdp() {
    between_namespaces("net_af_xdp0,iface=e0", "1500", Faults::default());
}
