//! Receives without buffers.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

/// Receives without buffers that queue pairs share.
pub(crate) struct Receives {
    /// Number of receives that are posted.
    posted: AtomicUsize,
}

impl Receives {
    pub(crate) fn new(depth: u32) -> Self {
        Self { posted: AtomicUsize::new(depth as usize) }
    }

    #[allow(clippy::unnecessary_wraps, reason = "devices of the host may refuse")]
    pub(crate) fn post(&self, count: usize) -> io::Result<()> {
        self.give_back(count);
        Ok(())
    }

    /// Takes a receive; false if there is none.
    pub(super) fn take(&self) -> bool {
        self.posted.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |posted| posted.checked_sub(1)).is_ok()
    }

    /// Gives receives back that were taken and not used.
    pub(super) fn give_back(&self, count: usize) {
        self.posted.fetch_add(count, Ordering::Relaxed);
    }
}
