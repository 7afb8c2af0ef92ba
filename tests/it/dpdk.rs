//! Promise: over ports of DPDK the log is the same log.
//!
//! The devices are virtual: memif between two processes, AF_PACKET and AF_XDP on a wire between two network namespaces.
//! They need root, but no huge pages. `scripts/test` builds with feature `dpdk`.

use crate::support::verbs::{REGION, shell, strong};
use crate::support::wire::{Faults, Wire, alone};
use crate::support::{Cluster, PROGRAM, assert_exactly_once, eventually, history, message, refused};
use std::io::Write;
use std::ops::Range;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::Ordering;
use std::time::Duration;

/// Address of the broker's port, which the kernel does not know.
const BROKER: &str = "10.78.0.1";
/// Address of the client's port, which the kernel does not know.
const CLIENT: &str = "10.78.0.2";

/// Address of the broker's sockets.
const CONTROL: &str = "10.79.0.1";

/// Settings of a port besides its address.
type Settings<'a> = [(&'a str, &'a str)];

/// Arguments of DPDK for one virtual device and no other, as a value of an environment variable.
fn eal(device: &str) -> String {
    format!(r#"["--no-huge", "--no-shconf", "--no-pci", "--no-telemetry", "-m", "256", "--vdev={device}"]"#)
}

/// Environment of a program (`BROKER`, `CLIENT`) at a port.
fn environment(program: &str, address: &str, port: &Settings) -> Vec<(String, String)> {
    let of_port = [("ADDRESS", address)].into_iter().chain(port.iter().copied());
    let of_port = of_port.map(|(key, value)| (format!("EMBARCADERO_{program}_DPDK__{key}"), value.to_owned()));
    of_port.chain([(format!("EMBARCADERO_{program}_TRANSPORT"), "dpdk".to_owned())]).collect()
}

/// Starts brokers at a port. More than one would need more ports.
fn brokers(count: u32, address: &str, port: &Settings) -> Cluster {
    let environment = environment("BROKER", address, port);
    let environment: Vec<_> = environment.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    Cluster::start(count, REGION, &environment)
}

/// Command of a client at a port.
fn command(cluster: &Cluster, port: &Settings, arguments: &[&str]) -> Command {
    let mut command = cluster.command(arguments);
    command
        .envs(environment("CLIENT", CLIENT, port))
        .env("EMBARCADERO_CLIENT_BATCH_SIZE", "32768")
        .env("EMBARCADERO_CLIENT_BUFFER_BYTES", "1048576");
    command
}

/// Arguments of a client that publishes messages from its standard input.
const PRODUCE: [&str; 3] = ["produce", "t", "--length-prefixed"];

/// Hands messages of `publisher` to a process that publishes them; false if the process is gone.
fn feed(process: &mut impl Write, publisher: u32, mut numbers: Range<u64>) -> bool {
    numbers.all(|number| {
        let message = message(publisher, number);
        process.write_all(&[&(message.len() as u32).to_le_bytes()[..], &message].concat()).is_ok()
    })
}

/// Publishes messages `0..count` of `publisher` by a command.
fn produce(mut command: Command, publisher: u32, count: u64) -> Child {
    let mut child = command.stdin(Stdio::piped()).spawn().unwrap();
    let mut input = child.stdin.take().unwrap();
    std::thread::spawn(move || feed(&mut input, publisher, 0..count));
    child
}

/// Publishes with one client's command, verifies with another, and compares with TCP.
fn order_and_integrity(cluster: &Cluster, command: impl Fn(&[&str]) -> Command, count: u64) {
    let tcp = cluster.client();
    tcp.create_topic("t", strong()).unwrap();
    assert!(produce(command(&PRODUCE), 0, count).wait().unwrap().success());
    assert!(command(&["verify", "t"]).status().unwrap().success());
    assert_exactly_once(&history(&tcp, "t")[&0], count);
}

/// Arguments of DPDK for both ends of a shared-memory link: server, client.
fn memif(directory: &tempfile::TempDir) -> [String; 2] {
    let socket = directory.path().join("memif");
    ["server", "client"]
        .map(|role| eal(&format!("net_memif0,role={role},socket={},socket-abstract=no,bsize=8192", socket.display())))
}

#[test]
fn order_and_integrity_over_memif() {
    let directory = tempfile::tempdir().unwrap();
    let [server, client] = memif(&directory);
    let cluster = brokers(1, BROKER, &[("EAL", &server)]);
    order_and_integrity(&cluster, |arguments| command(&cluster, &[("EAL", &client)], arguments), 20_000);
}

#[test]
fn a_client_that_is_killed_disturbs_nobody() {
    let directory = tempfile::tempdir().unwrap();
    let [server, client] = memif(&directory);
    let cluster = brokers(1, BROKER, &[("EAL", &server)]);
    let command = || command(&cluster, &[("EAL", &client)], &PRODUCE);
    let tcp = cluster.client();
    tcp.create_topic("t", strong()).unwrap();
    let mut victim = produce(command(), 0, 100_000);
    eventually("the victim publishes", || tcp.describe_topic("t").unwrap().1[0].batches > 2);
    victim.kill().unwrap();
    victim.wait().unwrap();
    assert!(produce(command(), 1, 5000).wait().unwrap().success());
    let seen = history(&tcp, "t");
    assert_exactly_once(&seen[&0], seen[&0].len() as u64);
    assert_exactly_once(&seen[&1], 5000);
}

/// Each run has its own broker. The client's port stays, and finds each of them.
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

/// Starts a broker at a port on the near one of two hosts. The device takes all frames of its interface, so sockets have
/// another one.
fn broker_on(wire: &Wire, address: &str, port: &Settings) -> Cluster {
    let mut cluster = brokers(0, address, port);
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
    cluster
}

/// Runs [`order_and_integrity`] over a device on the interface `e0` of two hosts.
fn between_hosts(port: &Settings, mtu: &str, faults: Faults) {
    let wire = Wire::with_mtu(faults, mtu);
    let port = [port, &[("MTU", mtu)]].concat();
    let cluster = broker_on(&wire, BROKER, &port);
    wire.on("far", || order_and_integrity(&cluster, |arguments| command(&cluster, &port, arguments), 5000));
    assert!(faults.lost == 0 || wire.harmed.load(Ordering::Relaxed) > 10, "the wire did no harm");
}

/// Bytes that a frame of AF_PACKET carries.
const MTU: &str = "8150";

const AF_XDP: &str = "net_af_xdp0,iface=e0";

fn af_packet(interface: &str, queues: u16) -> String {
    eal(&format!("net_af_packet0,iface={interface},blocksz=65536,framesz=8192,framecnt=512,qpairs={queues}"))
}

#[test]
fn order_and_integrity_over_af_packet() {
    between_hosts(&[("EAL", &af_packet("e0", 1))], MTU, Faults::default());
}

#[test]
fn order_and_integrity_over_af_packet_with_one_packet_of_a_hundred_lost_or_repeated() {
    let faults = Faults { lost: 10, repeated: 10, reordered: 10, damaged: 5 };
    between_hosts(&[("EAL", &af_packet("e0", 1))], MTU, faults);
}

#[test]
fn order_and_integrity_over_af_packet_with_one_packet_of_twenty_lost() {
    between_hosts(&[("EAL", &af_packet("e0", 1))], MTU, Faults { lost: 50, ..Faults::default() });
}

/// The kernel gives a queue the packets of a flow, which may be for queue pairs of another queue.
#[test]
fn order_and_integrity_over_several_queues() {
    between_hosts(&[("EAL", &af_packet("e0", 4)), ("QUEUES", "4")], MTU, Faults::default());
}

#[test]
fn a_port_has_no_more_queues_than_its_driver_says() {
    let cluster = brokers(0, BROKER, &[]);
    let region = cluster.region.to_str().unwrap();
    let environment = environment("BROKER", BROKER, &[("EAL", &af_packet("lo", 1)), ("MTU", MTU), ("QUEUES", "2")]);
    let environment: Vec<_> = environment.iter().map(|(key, value)| (key.as_str(), value.as_str())).collect();
    let reason = "dpdk.queues is 2, but the port has no more than 1";
    alone(|| refused(&["broker", "--region", region], &environment, reason));
}

#[test]
fn order_and_integrity_over_af_xdp() {
    between_hosts(&[("EAL", &eal(AF_XDP))], "1500", Faults::default());
}

#[test]
fn order_and_integrity_over_af_xdp_with_one_packet_of_a_hundred_lost_or_repeated() {
    let faults = Faults { lost: 10, repeated: 10, reordered: 10, damaged: 5 };
    between_hosts(&[("EAL", &eal(AF_XDP))], "1500", faults);
}

#[test]
fn order_and_integrity_over_af_xdp_with_one_packet_of_twenty_lost() {
    between_hosts(&[("EAL", &eal(AF_XDP))], "1500", Faults { lost: 50, ..Faults::default() });
}

/// Makes two hosts whose interfaces `v0` are connected directly. The wire's relays would see frames without their tags.
fn directly() -> Wire {
    let wire = Wire::new(Faults::default());
    let (near, far) = (wire.namespace("near"), wire.namespace("far"));
    shell(&format!(
        "ip link add v0 netns {near} mtu {MTU} type veth peer name v0 netns {far} mtu {MTU}
        ip -n {near} link set v0 up
        ip -n {far} link set v0 up"
    ));
    wire
}

#[test]
fn order_and_integrity_in_a_vlan() {
    let wire = directly();
    let port = [("EAL", &*af_packet("v0", 1)), ("MTU", MTU), ("VLAN", "7")];
    let cluster = broker_on(&wire, BROKER, &port);
    wire.on("far", || order_and_integrity(&cluster, |arguments| command(&cluster, &port, arguments), 5000));
}

/// Runs [`order_and_integrity`] with a peer over the kernel's sockets, at an interface of the far host. Neighbour discovery
/// and tags are the kernel's there.
fn to_sockets_over_ipv6(wire: &Wire, port: &Settings, interface: &str) {
    let cluster = broker_on(wire, "fd78::1", port);
    shell(&format!("ip -n {} addr add fd78::2/64 dev {interface} nodad", wire.namespace("far")));
    let over_sockets = |arguments: &[&str]| {
        let mut command = cluster.command(arguments);
        command.env("EMBARCADERO_CLIENT_TRANSPORT", "roce").env("EMBARCADERO_CLIENT_ROCE__ADDRESS", "fd78::2");
        command
    };
    wire.on("far", || order_and_integrity(&cluster, over_sockets, 5000));
}

#[test]
fn order_and_integrity_over_ipv6_to_the_kernels_sockets() {
    let wire = Wire::with_mtu(Faults::default(), MTU);
    to_sockets_over_ipv6(&wire, &[("EAL", &af_packet("e0", 1)), ("MTU", MTU)], "e0");
}

#[test]
#[ignore = "needs a kernel with VLANs: scripts/lab has one"]
fn order_and_integrity_over_ipv6_to_the_kernels_sockets_in_a_vlan() {
    shell("modprobe -a 8021q veth");
    let wire = directly();
    let far = wire.namespace("far");
    shell(&format!("ip -n {far} link add link v0 name v0.7 type vlan id 7; ip -n {far} link set v0.7 up"));
    to_sockets_over_ipv6(&wire, &[("EAL", &af_packet("v0", 1)), ("MTU", MTU), ("VLAN", "7")], "v0.7");
}

#[test]
fn a_link_that_goes_down_and_comes_back_loses_nothing() {
    let wire = Wire::with_mtu(Faults::default(), MTU);
    let port = [("EAL", &*af_packet("e0", 1)), ("MTU", MTU)];
    let cluster = broker_on(&wire, BROKER, &port);
    wire.on("far", || {
        let tcp = cluster.client();
        tcp.create_topic("t", strong()).unwrap();
        let mut child = command(&cluster, &port, &PRODUCE).stdin(Stdio::piped()).spawn().unwrap();
        let mut input = child.stdin.take().unwrap();
        assert!(feed(&mut input, 0, 0..2000));
        eventually("it publishes", || tcp.describe_topic("t").unwrap().1[0].batches > 2);
        wire.link("far", "down");
        assert!(feed(&mut input, 0, 2000..2200));
        // Time for the queue pair to give up, after about a second. The test holds as well if it has not yet.
        std::thread::sleep(Duration::from_secs(2));
        wire.link("far", "up");
        drop(input);
        assert!(child.wait().unwrap().success());
        assert_exactly_once(&history(&tcp, "t")[&0], 2200);
    });
}
