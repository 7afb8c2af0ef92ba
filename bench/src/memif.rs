//! Ports of DPDK for benches.
//!
//! By default they need no NIC and no other host: each pair of ports shares memory (DPDK's guide, "Memif Poll Mode
//! Driver"). The bench's process has three ports. Two are each other's peer, for measuring the transport alone. The third
//! has the broker's port as its peer.

use embarcadero_verbs::DpdkConfig;
use std::net::Ipv4Addr;

/// MTU that packets of 4096 bytes need, with their headers.
pub(crate) const MTU: u16 = 4200;
/// Ports, each with the last byte of its address.
const NEAR: (&str, u8) = ("net_memif0", 1);
const FAR: (&str, u8) = ("net_memif1", 2);
const CLIENT: (&str, u8) = ("net_memif2", 3);
const BROKER: (&str, u8) = ("net_memif3", 4);

fn address(last: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 77, 0, last)
}

fn socket(name: &str) -> String {
    format!("embarcadero-bench-{}-{name}", std::process::id())
}

/// Option that makes a port at one of the two ends of a socket.
fn device((port, _): (&str, u8), socket: &str, role: &str) -> String {
    // Rings that stay in a core's cache: 256 places, of a frame each.
    format!("--vdev={port},role={role},socket={socket},bsize=4352,rsize=8")
}

/// Arguments of DPDK for `devices`. They use no huge pages, so that no host has to be prepared.
fn arguments(megabytes: u32, devices: impl IntoIterator<Item = String>) -> Vec<String> {
    let fixed = ["--no-huge", "--no-shconf", "--no-pci", "--no-telemetry", "--log-level=error"];
    let memory = ["-m".to_owned(), megabytes.to_string()];
    fixed.map(str::to_owned).into_iter().chain(memory).chain(devices).collect()
}

fn at_port(eal: Vec<String>, port: &str, last: u8, mtu: u16) -> DpdkConfig {
    DpdkConfig { eal, port: Some(port.to_owned()), address: Some(address(last).into()), mtu, ..DpdkConfig::default() }
}

/// Configuration of the bench's process at one of its ports.
fn here((port, last): (&str, u8)) -> DpdkConfig {
    let (pair, broker) = (socket("pair"), socket("broker"));
    // Of a socket, the end that listens comes first.
    let devices = [device(FAR, &pair, "server"), device(NEAR, &pair, "client"), device(CLIENT, &broker, "client")];
    at_port(arguments(512, devices), port, last, MTU)
}

/// Two ports that are each other's peer: the one that sends, and the one that receives.
pub(crate) fn pair() -> [DpdkConfig; 2] {
    [here(NEAR), here(FAR)]
}

/// Port whose peer is the broker's.
pub(crate) fn client() -> DpdkConfig {
    here(CLIENT)
}

/// Environment of the broker, whose port is the client's peer.
pub(crate) fn broker() -> Vec<(String, String)> {
    let eal = arguments(256, [device(BROKER, &socket("broker"), "server")]);
    let settings = [("EAL", format!("{eal:?}")), ("ADDRESS", address(BROKER.1).to_string()), ("MTU", MTU.to_string())];
    settings.map(|(key, value)| (format!("EMBARCADERO_BROKER_DPDK__{key}"), value)).into()
}

/// Two devices that reach each other, as DPDK's --vdev names them.
#[derive(Clone)]
pub(crate) struct Devices {
    pub near: String,
    pub far: String,
    pub mtu: u16,
}

impl Devices {
    /// Ports at the two devices: the one that sends, and the one that receives.
    pub(crate) fn pair(&self) -> [DpdkConfig; 2] {
        let eal = arguments(512, [&self.near, &self.far].map(|device| format!("--vdev={device}")));
        [(&self.near, NEAR.1), (&self.far, FAR.1)].map(|(device, last)| {
            let port = device.split(',').next().unwrap_or(device);
            at_port(eal.clone(), port, last, self.mtu)
        })
    }
}
