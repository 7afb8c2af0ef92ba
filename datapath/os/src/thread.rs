//! Preparation of a polling thread: exact timers, and a core of its own.

use std::io;

/// Prepares the calling thread for polling: exact timers (prctl(2), PR_SET_TIMERSLACK), and the core that `core` names.
///
/// # Errors
/// Error of `sched_setaffinity` for a core that the thread may not use.
pub fn prepare_polling_thread(core: Option<usize>) -> io::Result<()> {
    // SAFETY: takes numbers only; a failure leaves the default slack of 50 us, which is harmless.
    unsafe { libc::prctl(libc::PR_SET_TIMERSLACK, 1 as libc::c_ulong, 0, 0, 0) };
    let Some(core) = core else { return Ok(()) };
    // SAFETY: cpu_set_t is plain data, for which zero is valid.
    let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
    if core >= libc::CPU_SETSIZE as usize {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, format!("core {core} does not exist")));
    }
    // SAFETY: the core is within the set, as just checked.
    unsafe { libc::CPU_SET(core, &mut set) };
    // SAFETY: the set lives across the call; 0 is the calling thread.
    let result = unsafe { libc::sched_setaffinity(0, size_of::<libc::cpu_set_t>(), &raw const set) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
