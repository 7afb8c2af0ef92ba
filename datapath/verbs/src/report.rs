//! Reports of devices, their ports and addresses.

use serde::Serialize;
use std::net::Ipv6Addr;

/// RDMA device and its capabilities.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct DeviceReport {
    /// Name, as in /sys/class/infiniband.
    pub name: String,
    /// Version of the firmware.
    pub firmware: String,
    /// NUMA node of the device; `None` where the kernel does not know.
    pub numa_node: Option<u32>,
    /// True when the device has type-2 memory windows, which open memory to one queue pair and can be closed again.
    pub memory_windows: bool,
    /// Ports of the device.
    pub ports: Vec<PortReport>,
}

/// Port of an RDMA device.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct PortReport {
    /// Number, from 1.
    pub number: u8,
    /// State of the port: `down`, `init`, `armed`, `active`, `active defer` or `unknown`.
    pub state: &'static str,
    /// Path MTU in force, bytes.
    pub mtu: u32,
    /// Link layer: `Ethernet` (RoCE), `InfiniBand` or `unknown`.
    pub link_layer: &'static str,
    /// Addresses of the port.
    pub gids: Vec<Gid>,
}

/// Address of a port.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Gid {
    /// Index of the address in the port's table.
    pub index: u32,
    /// IPv6 address, or a mapped IPv4 address (`::ffff:10.0.0.1`).
    pub address: Ipv6Addr,
    /// Kind of the address: `IB`, `RoCE v1`, `RoCE v2` or `unknown`.
    pub kind: &'static str,
}
