//! The time, as what measures durations and as what dates events. Code that is told the time runs in a simulator too.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// One look at both clocks of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Never goes back; has no meaning on another host.
    pub instant: Instant,
    /// Wall clock, microseconds since 1970. It may step.
    pub wall_us: u64,
}

/// Where the time comes from.
pub trait Clock: Send {
    /// The time now.
    fn now(&self) -> Now;
}

/// The clocks of this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[inline]
    fn now(&self) -> Now {
        let wall_us = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
        Now { instant: Instant::now(), wall_us }
    }
}
