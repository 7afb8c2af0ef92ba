//! Calls of libibverbs.

use std::io;
use std::os::fd::RawFd;

/// Turns the result of a call into an error: most calls of libibverbs return 0 or an error number.
pub(super) fn check(result: i32) -> io::Result<()> {
    if result == 0 { Ok(()) } else { Err(io::Error::from_raw_os_error(result.abs())) }
}

/// Makes reads of a descriptor of the library return at once.
pub(super) fn set_nonblocking(descriptor: RawFd) -> io::Result<()> {
    // SAFETY: no pointers are passed; on a descriptor that is not open the call fails.
    let result = unsafe { libc::fcntl(descriptor, libc::F_SETFL, libc::O_NONBLOCK) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
