//! A NIC in software, which speaks RoCEv2 with those of others: `crate::transport::roce` is the protocol, a raw and a
//! packet socket of the kernel carry its packets. It needs no RDMA device, no kernel module and no huge pages, only
//! CAP_NET_RAW.
//!
//! Whoever polls a completion queue drives the queue pairs of that queue: takes packets, places what they carry, answers,
//! and sends. So that peers get answers as from a NIC while nobody polls, each queue has a keeper, a thread that does the
//! same when packets wait and nobody takes them. What these types are for is said where they are wrapped, one folder up.

mod memory;
mod nic;
mod pair;
mod queue;
mod socket;
mod wire;

pub(super) use memory::Domain;
pub use memory::{Registration, Window};
pub use nic::Nic;
pub use pair::{Pair, Receives};
pub use queue::Queue;
