//! RDMA verbs, safely: devices, memory, completions and queue pairs as owning types.
//!
//! A child holds its parent ([`MemoryRegion`] its [`ProtectionDomain`], a [`QueuePair`] its [`CompletionQueue`]'s
//! handle, all of them the [`Context`]), so nothing can be destroyed before what depends on it; a [`MemoryRegion`] holds
//! its pages, so a NIC never reaches memory that was given back. The state of a queue pair is in its type. Calls are
//! those of libibverbs; its manual pages (`man ibv_post_send` and neighbours) describe them.

mod completion;
mod device;
mod memory;
mod probe;
mod queue_pair;

pub use completion::{Completion, CompletionQueue, Outcome, WorkError};
pub use device::{Context, Device, DeviceList, DeviceReport, Gid, LocalPort, PortReport, VerbsError, survey};
pub use memory::{LocalRange, MemoryRegion, MemoryWindow, Pinned, ProtectionDomain, RemoteRange};
pub use probe::windows_are_enforced;
pub use queue_pair::{
    DOORBELL, Initial, PeerAddress, QueuePair, QueuePairOptions, Receiving, Request, Sending, SharedReceiveQueue, Work,
};

use std::io;
use std::os::fd::RawFd;

/// Most calls of libibverbs return 0 or an error number.
fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result.abs())) }
}

/// Has reads of a descriptor of the library return at once.
fn set_nonblocking(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: no pointers are passed; on a descriptor that is not open the call fails.
    let result = unsafe { libc::fcntl(descriptor, libc::F_SETFL, libc::O_NONBLOCK) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
