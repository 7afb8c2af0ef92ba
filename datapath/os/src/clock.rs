//! Clocks: one for durations, one for dates. Code that is handed its clock also runs in a simulator.

use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Reading of both clocks of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Monotonic clock: it never goes back, and has no meaning on another host.
    pub instant: Instant,
    /// Wall clock, microseconds since 1970. It may step.
    pub wall_us: u64,
}

/// Source of the time.
pub trait Clock: Send {
    /// Returns the time now.
    fn now(&self) -> Now;
}

/// Clocks of this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[inline]
    fn now(&self) -> Now {
        let wall_us = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
        Now { instant: Instant::now(), wall_us }
    }
}
