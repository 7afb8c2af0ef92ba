//! The host's RDMA devices, through libibverbs over the bindings in `sys/rdma-sys`. What these types are for is said
//! where they are wrapped, one folder up.

mod completion;
mod device;
mod memory;
mod queue_pair;

pub use completion::CompletionQueue;
pub(super) use completion::{is_flush, is_remote_access, status_text};
pub use device::{Context, survey};
pub use memory::{MemoryRegion, MemoryWindow, ProtectionDomain};
pub use queue_pair::{QueuePair, SharedReceiveQueue};

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
