//! How long answers take, and so after what silence a packet is taken for lost: RFC 6298, TCP's retransmission timer. (RoCE
//! leaves devices the choice, above the attribute: IBTA 9.7.6.1.3.)

use super::Nanos;
use super::psn::Psn;

/// Longer than this is not waited for.
const LONGEST: Nanos = 1_000_000_000;
const MOST_DOUBLINGS: u32 = 10;

/// Of one requester.
#[derive(Debug, Default)]
pub(super) struct RoundTrip {
    /// Smoothed time, and how much it varies; `None` before the first sample.
    time: Option<(Nanos, Nanos)>,
    /// A packet that was sent once, and when.
    sample: Option<(Psn, Nanos)>,
    /// Times that the answer stayed away since the last sample, less those that answers took back.
    doublings: u32,
    /// One stayed away since the last answer.
    missed: bool,
}

impl RoundTrip {
    /// A packet that wants an answer goes for the first time.
    pub fn sent(&mut self, psn: Psn, now: Nanos) {
        self.sample.get_or_insert((psn, now));
    }

    /// All before `psn` is answered.
    pub fn answered(&mut self, psn: Psn, now: Nanos) {
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

    /// Packets go again: an answer does not say to which sending (Karn's algorithm).
    pub fn sent_again(&mut self) {
        self.sample = None;
    }

    /// The answer stayed away.
    pub fn missed(&mut self) {
        self.missed = true;
        self.doublings = (self.doublings + 1).min(MOST_DOUBLINGS);
    }

    /// How long an answer may take, at least `least`.
    pub fn patience(&self, least: Nanos) -> Nanos {
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
