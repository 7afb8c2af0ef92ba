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
#[cfg(rdma)]
mod ibverbs;
mod memory;
mod probe;
mod queue_pair;
mod softnic;
mod survey;

pub use completion::{Completion, CompletionQueue, Outcome, WorkError};
pub use device::{Context, LocalPort, VerbsError};
pub use memory::{LocalRange, MemoryRegion, MemoryWindow, Pinned, ProtectionDomain, RemoteRange};
pub use probe::windows_are_enforced;
pub use queue_pair::{
    DOORBELL, Initial, PeerAddress, QueuePair, QueuePairOptions, Receiving, Request, Sending, SharedReceiveQueue, Work,
};
pub use softnic::{DpdkConfig, RoceConfig};
pub use survey::{DeviceReport, Gid, PortReport, SurveyError, has_dpdk, rdma_missing, survey};

/// Evaluates an expression for the device behind a value, of either kind.
macro_rules! either {
    ($value:expr, $inner:ident => $result:expr) => {
        match $value {
            #[cfg(rdma)]
            Self::Hardware($inner) => $result,
            Self::Software($inner) => $result,
        }
    };
}
use either;

/// Version of the DPDK that this build has; `None` in a build without DPDK.
#[must_use]
pub fn dpdk_version() -> Option<String> {
    #[cfg(feature = "dpdk")]
    return Some(softnic::dpdk_version());
    #[cfg(not(feature = "dpdk"))]
    None
}

/// Error of a call that mixes objects of two devices.
#[cfg(rdma)]
fn of_another_device() -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidInput, "it belongs to another device")
}
