//! Waiting of a polling thread: spin, yield, sleep.
//!
//! With [`PollPolicy::SpinYield`] threads execute `pause` while they spin, and yield once a millisecond. The default,
//! [`PollPolicy::Adaptive`], also sleeps once nothing has come for a while, so an idle broker costs next to nothing.

// [[DEVIATION_006]] The paper's loops busy-wait.

use serde::{Deserialize, Serialize};
use std::time::{Duration, Instant};

/// Behaviour of a polling thread between two polls that found nothing.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum PollPolicy {
    /// Spin with `pause`, then yield, then sleep in the kernel until a socket wakes the thread or a bound passes.
    Adaptive,
    /// Spin with `pause` for `spin_us`, yield once, repeat. Never sleeps.
    SpinYield,
    /// Yield each time.
    Yield,
    /// Poll again at once: the paper's baseline.
    Busy,
}

/// Durations of the policies that spin or sleep.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PollBounds {
    /// Longest spin before the thread yields or sleeps, microseconds.
    pub spin_us: u64,
    /// Shortest sleep, microseconds.
    pub sleep_min_us: u64,
    /// Longest sleep, microseconds.
    pub sleep_max_us: u64,
}

impl PollBounds {
    // [[DEVIATION_009]] In the paper each polling thread has a core.
    /// Bounds for `pollers` polling threads on `cores` cores.
    ///
    /// Threads spin for 1 ms where there are at least two cores for each. Elsewhere they would spin in each other's way,
    /// and do not spin.
    #[must_use]
    pub fn for_host(pollers: usize, cores: usize) -> Self {
        let spin_us = if pollers * 2 <= cores { 1000 } else { 0 };
        Self { spin_us, sleep_min_us: 20, sleep_max_us: 1000 }
    }
}

/// Action that [`Idle::wait`] asks of its thread.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Poll again.
    Again,
    /// Sleep until woken, at most this long.
    Sleep(Duration),
}

/// Waiting state of one polling thread.
#[derive(Debug)]
pub struct Idle {
    policy: PollPolicy,
    bounds: PollBounds,
    since: Option<Instant>,
    yielded_at: Instant,
    rounds: u32,
    sleep_us: u64,
}

/// Yields that a thread makes between its spin and its first sleep, so that a peer on the same core can answer.
const YIELDS_BEFORE_SLEEP: u32 = 8;

impl Idle {
    /// State of a thread that has just worked.
    #[must_use]
    pub fn new(policy: PollPolicy, bounds: PollBounds) -> Self {
        Self { policy, bounds, since: None, yielded_at: Instant::now(), rounds: 0, sleep_us: bounds.sleep_min_us }
    }

    /// Records that the last poll found work.
    #[inline]
    pub fn worked(&mut self) {
        self.since = None;
        self.rounds = 0;
        self.sleep_us = self.bounds.sleep_min_us;
    }

    /// Records that the last poll found nothing. May spin for a moment or yield, as the policy says.
    #[inline]
    pub fn wait(&mut self) -> Step {
        match self.policy {
            PollPolicy::Busy => Step::Again,
            PollPolicy::Yield => {
                std::thread::yield_now();
                Step::Again
            }
            PollPolicy::SpinYield => {
                self.spin();
                Step::Again
            }
            PollPolicy::Adaptive => self.adaptive(),
        }
    }

    /// Spins for a moment; yields once every `spin_us`.
    fn spin(&mut self) {
        for _ in 0..16 {
            std::hint::spin_loop();
        }
        if self.yielded_at.elapsed() >= Duration::from_micros(self.bounds.spin_us) {
            std::thread::yield_now();
            self.yielded_at = Instant::now();
        }
    }

    fn adaptive(&mut self) -> Step {
        let spin = Duration::from_micros(self.bounds.spin_us);
        if !spin.is_zero() {
            let since = *self.since.get_or_insert_with(Instant::now);
            if since.elapsed() < spin {
                for _ in 0..16 {
                    std::hint::spin_loop();
                }
                return Step::Again;
            }
        }
        if self.rounds < YIELDS_BEFORE_SLEEP {
            self.rounds += 1;
            std::thread::yield_now();
            return Step::Again;
        }
        let sleep = Duration::from_micros(self.sleep_us);
        self.sleep_us = (self.sleep_us * 2).min(self.bounds.sleep_max_us);
        Step::Sleep(sleep)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn adaptive_reaches_its_longest_sleep_and_work_resets_it() {
        let bounds = PollBounds { spin_us: 0, sleep_min_us: 20, sleep_max_us: 1000 };
        let mut idle = Idle::new(PollPolicy::Adaptive, bounds);
        let sleeps: Vec<_> = (0..40)
            .filter_map(|_| match idle.wait() {
                Step::Sleep(time) => Some(time.as_micros()),
                Step::Again => None,
            })
            .collect();
        assert_eq!(&sleeps[..7], &[20, 40, 80, 160, 320, 640, 1000]);
        idle.worked();
        assert_eq!(idle.wait(), Step::Again);
    }

    #[test]
    fn the_other_policies_never_sleep() {
        let bounds = PollBounds::for_host(1, 8);
        assert_eq!(bounds.spin_us, 1000);
        for policy in [PollPolicy::Busy, PollPolicy::Yield, PollPolicy::SpinYield] {
            let mut idle = Idle::new(policy, bounds);
            assert!((0..1000).all(|_| idle.wait() == Step::Again));
        }
    }
}
