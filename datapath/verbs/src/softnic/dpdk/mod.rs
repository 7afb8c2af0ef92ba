//! Ports of DPDK, which carry packets of a NIC in software past the kernel.

mod eal;
mod ethernet;

pub(super) use eal::EthPort;
pub(in super::super) use eal::version;
pub(super) use ethernet::Ethernet;
