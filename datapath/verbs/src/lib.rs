//! RDMA verbs, safely: devices, memory, completions and queue pairs as owning types.
//!
//! A child holds its parent, so nothing is destroyed before what depends on it. A [`MemoryRegion`] holds its
//! [`ProtectionDomain`], a [`QueuePair`] the handle of its [`CompletionQueue`], and all of them the [`Context`]. A
//! [`MemoryRegion`] also holds its pages, so a NIC never reaches memory that was given back. The state of a queue pair is
//! in its type.
//!
//! Two kinds of device are behind these types:
//!
//! - The host's RDMA devices, through libibverbs (`ibverbs`, with feature `rdma`). Its manual pages describe the calls,
//!   for example `man ibv_post_send`.
//! - A NIC in software, which is part of this process (`softnic`).

mod completion;
mod device;
mod either;
mod error;
#[cfg(rdma)]
mod ibverbs;
mod memory;
mod outcome;
mod peer;
mod port;
mod probe;
mod queue_pair;
mod range;
mod report;
mod softnic;
mod survey;
mod work;

pub use completion::CompletionQueue;
pub use device::Context;
pub use error::VerbsError;
pub use memory::{MemoryRegion, MemoryWindow, ProtectionDomain};
#[cfg(rdma)]
pub use outcome::HardwareFailure;
pub use outcome::{Completion, Outcome, WorkError};
pub use peer::PeerAddress;
pub use port::LocalPort;
pub use probe::windows_are_enforced;
pub use queue_pair::{Initial, QueuePair, QueuePairOptions, Receiving, Request, Sending, SharedReceiveQueue, Work};
pub use range::{LocalRange, Pinned, RemoteRange};
pub use report::{DeviceReport, Gid, PortReport};
pub use softnic::{DpdkConfig, RoceConfig};
pub use survey::{SurveyError, dpdk_version, has_dpdk, rdma_missing, survey};
pub use work::DOORBELL;
