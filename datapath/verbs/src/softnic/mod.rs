//! NIC in software, which speaks RoCEv2 with any other NIC. `embarcadero_roce` is the protocol.
//!
//! Sockets of the kernel carry its packets: a raw socket sends, a packet socket receives. That takes CAP_NET_RAW, but no
//! RDMA device, no kernel module and no huge pages. With feature `dpdk`, a port of DPDK can carry them instead.
//!
//! The thread that polls a completion queue drives the queue pairs of that queue: it takes packets, places their payloads,
//! answers, and sends. Each queue also has a keeper, a thread that does this work while packets wait and nobody polls. So
//! peers always get answers, as from a NIC.
//!
//! The types one folder up wrap these, and say what they are for.

mod config;
#[cfg(feature = "dpdk")]
mod dpdk;
mod filter;
mod identity;
mod memory;
mod nic;
mod numbers;
mod pair;
mod port;
mod ports;
mod queue;
mod receives;
mod side;
mod socket;
mod wire;

pub use config::{DpdkConfig, RoceConfig};
#[cfg(feature = "dpdk")]
pub(crate) use dpdk::version as dpdk_version;
pub(crate) use memory::{Domain, Registration, Window};
pub(crate) use nic::Nic;
pub(crate) use pair::Pair;
pub(crate) use queue::Queue;
pub(crate) use receives::Receives;
