//! Round-trip time, and the silence after which a packet counts as lost.
//!
//! Source: RFC 6298, TCP's retransmission timer. IBTA 9.7.6.1.3 lets a device wait longer than the configured time-out.

use crate::psn::Psn;
use crate::time::Nanos;

/// Longest wait for an answer, nanoseconds.
const LONGEST: Nanos = 1_000_000_000;
/// Most doublings of the wait (RFC 6298, 5.5).
const MOST_DOUBLINGS: u32 = 10;

/// Round-trip times of one requester.
#[derive(Debug, Default)]
pub(super) struct RoundTrip {
    /// Smoothed round-trip time and its variation (RFC 6298: SRTT, RTTVAR); `None` before the first sample.
    time: Option<(Nanos, Nanos)>,
    /// Packet that is being timed, and the time it was sent. It was sent only once.
    sample: Option<(Psn, Nanos)>,
    /// Doublings of the wait: one for each missed answer since the last sample, less those that answers took back.
    doublings: u32,
    /// True when an answer was missed since the last one that came.
    missed: bool,
}

impl RoundTrip {
    /// Notes that a packet which asks for an answer is sent for the first time.
    pub(crate) fn sent(&mut self, psn: Psn, now: Nanos) {
        self.sample.get_or_insert((psn, now));
    }

    /// Notes that all packets before `psn` are answered.
    pub(crate) fn answered(&mut self, psn: Psn, now: Nanos) {
        let missed = std::mem::take(&mut self.missed);
        let Some((_, at)) = self.sample.take_if(|(sampled, _)| psn.since(*sampled) > 0) else {
            // On a path that loses much a sample may be long in coming. The first answer after a silence may be to what went
            // before it, and so says nothing of the patience; a second one does.
            self.doublings = self.doublings.saturating_sub((!missed).into());
            return;
        };
        let passed = now.saturating_sub(at);
        self.time = Some(match self.time {
            None => (passed, passed / 2),
            Some((time, variation)) => ((7 * time + passed) / 8, (3 * variation + time.abs_diff(passed)) / 4),
        });
        self.doublings = 0;
    }

    /// Notes that packets are sent again. An answer does not say which sending it answers (Karn's algorithm; RFC 6298, 3).
    pub(crate) fn sent_again(&mut self) {
        self.sample = None;
    }

    /// Notes that an answer did not come in time.
    pub(crate) fn missed(&mut self) {
        self.missed = true;
        self.doublings = (self.doublings + 1).min(MOST_DOUBLINGS);
    }

    /// Nanoseconds that an answer may take, at least `least`.
    pub(crate) fn patience(&self, least: Nanos) -> Nanos {
        let measured = self.time.map_or(0, |(time, variation)| time + 4 * variation);
        (measured.max(least) << self.doublings).min(LONGEST.max(least))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Nanos = 1_000_000;

    #[test]
    fn patience_follows_the_path_and_grows_while_nothing_comes() {
        let mut trip = RoundTrip::default();
        assert_eq!(trip.patience(4 * MS), 4 * MS);
        trip.missed();
        trip.missed();
        assert_eq!(trip.patience(4 * MS), 16 * MS);
        // Of what went twice nothing is learnt.
        trip.sent(Psn::new(1), 0);
        trip.sent_again();
        trip.answered(Psn::new(2), 20 * MS);
        assert_eq!(trip.patience(4 * MS), 16 * MS);
        for number in 0..50 {
            trip.sent(Psn::new(number), 0);
            trip.answered(Psn::new(number + 1), 20 * MS);
        }
        let settled = trip.patience(4 * MS);
        assert!((20 * MS..25 * MS).contains(&settled), "{settled}");
        (0..40).for_each(|_| trip.missed());
        assert_eq!(trip.patience(4 * MS), LONGEST);
    }

    #[test]
    fn patience_comes_back_where_all_is_sent_again() {
        let mut trip = RoundTrip::default();
        (0..4).for_each(|_| trip.missed());
        // Perhaps of what went before the silence.
        trip.answered(Psn::new(1), 0);
        assert_eq!(trip.patience(MS), 16 * MS);
        for (answers, patience) in [(2, 8), (3, 4), (4, 2), (5, 1), (6, 1)] {
            trip.answered(Psn::new(answers), 0);
            assert_eq!(trip.patience(MS), patience * MS);
        }
    }
}
