//! RoCEv2 in user space: reliable connections, and the Ethernet below them ([`ethernet`]). The crate does no input or
//! output and has no `unsafe`.
//!
//! A [`QueuePair`] is driven from outside. Packets and the time go in ([`QueuePair::receive`]), packets come out
//! ([`QueuePair::transmit`]), and completions are polled ([`QueuePair::poll`]). One half is the requester, which sends
//! posted work. The other half is the responder, which executes the peer's requests.
//!
//! # Sources
//!
//! - InfiniBand Architecture Specification, volume 1, chapter 9, transport layer ("IBTA" in this crate).
//! - Its annexes A16 (RoCE) and A17 (RoCEv2).
//! - Linux, drivers/infiniband/sw/rxe ("rxe"), where the specification leaves a choice.
#![forbid(unsafe_code)]

mod attributes;
mod congestion;
pub mod ethernet;
mod memory;
pub mod packet;
mod path;
pub mod psn;
mod queue_pair;
mod requester;
mod responder;
mod round_trip;
mod time;
mod work;

pub use attributes::Attributes;
pub use memory::{Access, Memory, NoAccess};
pub use path::{MAX_MESSAGE_BYTES, PathMtu};
pub use queue_pair::QueuePair;
pub use time::Nanos;
pub use work::{Completion, Failure, Full, Operation, Receive, Work};
