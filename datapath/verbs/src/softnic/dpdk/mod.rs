//! Ports of DPDK, which carry packets of a NIC in software past the kernel.

mod buffers;
mod eal;
mod ethernet;
mod port;

pub(crate) use eal::version;
pub(super) use ethernet::Ethernet;
pub(super) use port::EthPort;
