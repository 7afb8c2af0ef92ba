//! Cores of this host, and the pinning of threads to them.

use anyhow::{Context, Result};
use embarcadero_os::thread::prepare_polling_thread;

/// Cores of the two ends of a connection; `None` leaves an end to the scheduler.
#[derive(Clone, Copy)]
pub(crate) struct CorePair {
    /// Core of the end that sends.
    pub near: Option<usize>,
    /// Core of the end that receives.
    pub far: Option<usize>,
}

/// Number of cores that this process may use.
pub(crate) fn host_cores() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}

/// Pins the calling thread to a core, if one is given.
pub(crate) fn pin(core: Option<usize>) -> Result<()> {
    prepare_polling_thread(core).context("cannot put a thread on its core; try --no-pin")
}
