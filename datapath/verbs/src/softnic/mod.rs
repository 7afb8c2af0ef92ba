//! A NIC in software, which speaks RoCEv2 with those of others: `embarcadero_roce` is the protocol. A raw and
//! a packet socket of the kernel carry its packets, for which it needs no RDMA device, no kernel module and no huge pages,
//! only CAP_NET_RAW; or, with feature `dpdk`, a port of DPDK does.
//!
//! Whoever polls a completion queue drives the queue pairs of that queue: takes packets, places what they carry, answers,
//! and sends. So that peers get answers as from a NIC while nobody polls, each queue has a keeper, a thread that does the
//! same when packets wait and nobody takes them. What these types are for is said where they are wrapped, one folder up.

mod config;
#[cfg(feature = "dpdk")]
mod dpdk;
mod memory;
mod nic;
mod pair;
mod queue;
mod socket;
mod wire;

pub use config::{DpdkConfig, RoceConfig};
#[cfg(feature = "dpdk")]
pub(super) use dpdk::version as dpdk_version;
pub(super) use memory::Domain;
pub use memory::{Registration, Window};
pub use nic::Nic;
pub use pair::{Pair, Receives};
pub use queue::Queue;
