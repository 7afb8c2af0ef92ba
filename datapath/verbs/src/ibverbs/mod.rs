//! RDMA devices of the host, through libibverbs over the bindings in `sys/rdma-sys`. The types of the same names one
//! folder up wrap these, and say what they are for.

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

/// Turns the result of a call into an error: most calls of libibverbs return 0 or an error number.
fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result.abs())) }
}

/// Makes reads of a descriptor of the library return at once.
fn set_nonblocking(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: no pointers are passed; on a descriptor that is not open the call fails.
    let result = unsafe { libc::fcntl(descriptor, libc::F_SETFL, libc::O_NONBLOCK) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
