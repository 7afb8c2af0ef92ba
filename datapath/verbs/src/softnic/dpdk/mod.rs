//! Ports of DPDK as the wire of a NIC in software: the kernel is not asked for packets.

mod eal;
mod ethernet;

pub(super) use eal::EthPort;
pub(in super::super) use eal::version;
pub(super) use ethernet::Ethernet;
