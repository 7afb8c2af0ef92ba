//! RDMA verbs, safely: devices, memory, completions and queue pairs as owning types.
//!
//! A child holds its parent ([`MemoryRegion`] its [`ProtectionDomain`], a [`QueuePair`] its [`CompletionQueue`]'s
//! handle, all of them the [`Context`]), so nothing can be destroyed before what depends on it; a [`MemoryRegion`] holds
//! its pages, so a NIC never reaches memory that was given back. The state of a queue pair is in its type.
//!
//! Two kinds of device do what the types here say: the host's RDMA devices, through libibverbs (`ibverbs`, with feature
//! `rdma`; its manual pages, `man ibv_post_send` and neighbours, describe the calls), and a NIC that this process is
//! itself, in software ([`softnic`]).

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

/// Does the same whatever the device is.
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

/// The version of DPDK; `None` in a build without.
#[must_use]
pub fn dpdk_version() -> Option<String> {
    #[cfg(feature = "dpdk")]
    return Some(softnic::dpdk_version());
    #[cfg(not(feature = "dpdk"))]
    None
}

/// What belongs to one device was used with another.
#[cfg(rdma)]
fn of_another_device() -> std::io::Error {
    std::io::Error::new(std::io::ErrorKind::InvalidInput, "it belongs to another device")
}
