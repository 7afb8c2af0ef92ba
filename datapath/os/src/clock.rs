//! Clocks: one for durations, one for dates. Code that is handed its clock also runs in a simulator.

use std::sync::OnceLock;
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// Reading of both clocks of a host.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// Monotonic clock: it never goes back, and has no meaning on another host.
    pub instant: Instant,
    /// Reading of the monotonic clock in microseconds since some moment of this process.
    pub steady_us: u64,
    /// Wall clock, microseconds since 1970. It may step.
    pub wall_us: u64,
}

impl Now {
    /// Returns the readings as numbers.
    #[must_use]
    pub fn times(self) -> Times {
        Times { steady_us: self.steady_us, wall_us: self.wall_us }
    }
}

/// Reading of both clocks of a host, as numbers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Times {
    /// Monotonic clock, microseconds since some moment of this process. Durations are measured by it.
    pub steady_us: u64,
    /// Wall clock, microseconds since 1970. It may step.
    pub wall_us: u64,
}

/// One clock for both, which never steps.
impl From<u64> for Times {
    #[inline]
    fn from(us: u64) -> Self {
        Self { steady_us: us, wall_us: us }
    }
}

/// Source of the time.
pub trait Clock: Send {
    /// Returns the time now.
    fn now(&self) -> Now;

    /// Returns the time now by the monotonic clock alone.
    #[inline]
    fn instant(&self) -> Instant {
        self.now().instant
    }
}

/// Clocks of this host.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SystemClock;

impl Clock for SystemClock {
    #[inline]
    fn now(&self) -> Now {
        // Any origin will do that no reading lies before.
        static ORIGIN: OnceLock<Instant> = OnceLock::new();
        let instant = Instant::now();
        let steady_us = instant.saturating_duration_since(*ORIGIN.get_or_init(|| instant)).as_micros() as u64;
        let wall_us = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_micros() as u64);
        Now { instant, steady_us, wall_us }
    }

    #[inline]
    fn instant(&self) -> Instant {
        Instant::now()
    }
}
