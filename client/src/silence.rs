//! Measure of silence: the time for which a thread has looked for news in vain.

use std::time::{Duration, Instant};

/// Divisor of the progress timeout: after that part of it without news, a broker counts as silent.
pub(crate) const SILENCE_PART: u32 = 4;
/// Least number of looks in vain that make a silence exceed its limit.
const LOOKS: u32 = 8;

/// Time for which a thread has looked for news in vain.
///
/// One look adds at most an eighth of the limit. A thread that did not run for long has not looked meanwhile. What came is
/// still unread then, and the time that passed says nothing about the other side.
#[derive(Debug)]
pub(crate) struct Silence {
    limit: Duration,
    lasted: Duration,
    looked_at: Instant,
}

impl Silence {
    /// Silence that begins now, and is too long once it lasts for `limit`.
    pub(crate) fn new(limit: Duration, now: Instant) -> Self {
        Self { limit, lasted: Duration::ZERO, looked_at: now }
    }

    /// Begins again, after news.
    pub(crate) fn restart(&mut self, now: Instant) {
        (self.lasted, self.looked_at) = (Duration::ZERO, now);
    }

    /// Records a look that found nothing.
    pub(crate) fn look(&mut self, now: Instant) {
        let since = now.saturating_duration_since(self.looked_at);
        self.lasted += since.min(self.limit / LOOKS);
        self.looked_at = now;
    }

    /// Returns true once the silence has lasted for half of its limit.
    pub(crate) fn is_half_over(&self) -> bool {
        self.lasted >= self.limit / 2
    }

    /// Returns true once the silence has lasted for its limit.
    pub(crate) fn is_too_long(&self) -> bool {
        self.lasted >= self.limit
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LIMIT: Duration = Duration::from_millis(800);

    #[test]
    fn looks_in_vain_add_up_to_the_limit() {
        let mut now = Instant::now();
        let mut silence = Silence::new(LIMIT, now);
        for look in 1..=800 {
            now += Duration::from_millis(1);
            silence.look(now);
            assert_eq!((silence.is_half_over(), silence.is_too_long()), (look >= 400, look == 800), "look {look}");
        }
        silence.restart(now);
        assert!(!silence.is_too_long());
    }

    #[test]
    fn a_thread_that_did_not_run_has_not_looked() {
        let mut now = Instant::now();
        let mut silence = Silence::new(LIMIT, now);
        for look in 1..=LOOKS {
            now += Duration::from_secs(3600);
            silence.look(now);
            assert_eq!(silence.is_too_long(), look == LOOKS, "look {look}");
        }
    }
}
