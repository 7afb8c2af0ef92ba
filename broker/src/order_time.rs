//! Time in an order: what batches are stamped with, and how old they are, whatever steps a host's clock makes.

use embarcadero_os::Times;
use std::collections::VecDeque;

/// Lead of an order over the clock from which the clock counts as set back, microseconds.
const LEAD_US: u64 = 1_000_000;
/// Number of marks in the time for which a topic keeps its batches. Retention is late by one of them at most.
const MARKS: u64 = 64;

/// Returns the time of the next group of an order whose newest batch has the time `newest_us`. All in microseconds since
/// 1970.
///
/// It is the clock's, and never goes back. After a clock that was far ahead it hardly moves, so that the clock comes up
/// with it.
#[inline]
pub(crate) fn next_time_us(newest_us: u64, wall_us: u64) -> u64 {
    if newest_us.saturating_sub(wall_us) > LEAD_US { newest_us.saturating_add(1) } else { newest_us.max(wall_us) }
}

/// Bounds of the batches that an order has for longer than its topic keeps them.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct TooOld {
    /// Time before which batches are too old, microseconds since 1970.
    pub(crate) since_us: u64,
    /// Position below which batches are too old, whatever their times are.
    pub(crate) below: u64,
}

/// Ages of the batches of an order.
///
/// A batch is too old when this process saw it there for long enough, by a clock that never steps. Batches from before
/// this process have their times only. Such a batch is too old when two clocks say so. One is the wall clock. The other
/// is the order's own, which stood at the newest batch when this process came. So a clock that is ahead takes nothing
/// too early. One that was ahead keeps nothing for longer than a right one would, counted from now.
pub(crate) struct Ages {
    /// Time of the newest batch when this process opened the order, microseconds since 1970; 0 for none.
    opened_us: u64,
    /// Order's own clock at the first look, and the steady clock then, microseconds.
    begun: Option<(u64, u64)>,
    /// Times of looks by the steady clock, microseconds, and the ends of the order that they saw. Oldest first.
    marks: VecDeque<(u64, u64)>,
    /// End that the newest mark had which is old enough.
    below: u64,
}

impl Ages {
    /// Returns the ages of an order whose newest batch has the time `newest_us`; 0 if that is not known. The wall clock
    /// alone counts then.
    pub(crate) fn new(newest_us: u64) -> Self {
        Self { opened_us: newest_us, begun: None, marks: VecDeque::new(), below: 0 }
    }

    /// Looks at the order, which ends at position `end`. Returns what it has for longer than `retention_ms`; 0 keeps
    /// everything. Call it every few milliseconds.
    pub(crate) fn look(&mut self, end: u64, retention_ms: u64, now: Times) -> TooOld {
        if retention_ms == 0 {
            return TooOld::default();
        }
        let keep_us = retention_ms.saturating_mul(1000);
        self.mark(end, keep_us, now.steady_us);
        let opened_us = if self.opened_us == 0 { now.wall_us } else { self.opened_us };
        let (own_us, at_us) = *self.begun.get_or_insert((opened_us, now.steady_us));
        let own_us = own_us.saturating_add(now.steady_us.saturating_sub(at_us));
        TooOld { since_us: own_us.min(now.wall_us).saturating_sub(keep_us), below: self.below }
    }

    /// Remembers where the order ends, and forgets marks that are older than `keep_us`.
    fn mark(&mut self, end: u64, keep_us: u64, steady_us: u64) {
        let is_due = |(at_us, seen): &(u64, u64)| steady_us.saturating_sub(*at_us) >= keep_us / MARKS && *seen < end;
        if self.marks.back().is_none_or(is_due) && self.below < end {
            self.marks.push_back((steady_us, end));
        }
        while let Some((at_us, seen)) = self.marks.front().copied()
            && steady_us.saturating_sub(at_us) >= keep_us
        {
            self.marks.pop_front();
            self.below = seen;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND_US: u64 = 1_000_000;
    const DAY_US: u64 = 86_400 * SECOND_US;
    /// Time at which the tests begin, by a clock that is right.
    const BEGIN_US: u64 = 20_000 * DAY_US;
    const KEEP_MS: u64 = 60_000;

    /// Clocks `seconds` after the begin; the wall clock is ahead by `ahead_us`.
    fn at(seconds: u64, ahead_us: u64) -> Times {
        let steady_us = seconds * SECOND_US;
        Times { steady_us, wall_us: BEGIN_US + steady_us + ahead_us }
    }

    #[test]
    fn times_follow_the_clock_and_never_go_back() {
        assert_eq!(next_time_us(0, 7), 7);
        assert_eq!(next_time_us(7, 7), 7);
        assert_eq!(next_time_us(SECOND_US + 7, 7), SECOND_US + 7, "it steps back by a little");
        assert_eq!(next_time_us(SECOND_US + 8, 7), SECOND_US + 9, "it was set back");
        assert_eq!(next_time_us(u64::MAX, 7), u64::MAX);
    }

    #[test]
    fn what_was_seen_for_long_enough_is_too_old_whatever_its_time() {
        let mut ages = Ages::new(0);
        assert_eq!(ages.look(10, KEEP_MS, at(0, DAY_US)).below, 0);
        assert_eq!(ages.look(15, KEEP_MS, at(30, 0)).below, 0);
        assert_eq!(ages.look(20, KEEP_MS, at(59, 0)).below, 0);
        assert_eq!(ages.look(20, KEEP_MS, at(60, 0)).below, 10);
        assert_eq!(ages.look(20, KEEP_MS, at(119, 0)).below, 20);
        assert_eq!(ages.look(20, KEEP_MS, at(500, 0)).below, 20);
        assert!(ages.marks.is_empty());
    }

    #[test]
    fn marks_are_few() {
        let mut ages = Ages::new(0);
        for look in 0..10_000 {
            ages.look(look, KEEP_MS, Times { steady_us: look * 10_000, wall_us: 0 });
            assert!(ages.marks.len() as u64 <= MARKS + 1);
        }
        assert!(ages.below > 3000, "100 s have gone by, and the order grew by 100 a second");
    }

    #[test]
    fn a_clock_that_is_ahead_takes_nothing_too_early() {
        // The newest batch came a second before this process.
        let mut ages = Ages::new(BEGIN_US - SECOND_US);
        let since = |ages: &mut Ages, now| ages.look(5, KEEP_MS, now).since_us;
        assert_eq!(since(&mut ages, at(0, DAY_US)), BEGIN_US - 61 * SECOND_US);
        assert_eq!(since(&mut ages, at(10, DAY_US)), BEGIN_US - 51 * SECOND_US);
        // An order that was empty: the clock steps while the process runs.
        let mut ages = Ages::new(0);
        assert_eq!(since(&mut ages, at(0, 0)), BEGIN_US - 60 * SECOND_US);
        assert_eq!(since(&mut ages, at(1, DAY_US)), BEGIN_US - 59 * SECOND_US);
    }

    #[test]
    fn a_time_that_is_ahead_does_not_make_earlier_batches_old() {
        let mut ages = Ages::new(BEGIN_US + DAY_US);
        assert_eq!(ages.look(5, KEEP_MS, at(0, 0)), TooOld { since_us: BEGIN_US - 60 * SECOND_US, below: 0 });
        // They go once this process has seen them for as long as they are kept.
        assert_eq!(ages.look(5, KEEP_MS, at(60, 0)).below, 5);
    }

    #[test]
    fn without_a_retention_time_everything_is_kept() {
        let mut ages = Ages::new(1);
        ages.look(5, 0, at(0, 0));
        assert_eq!(ages.look(5, 0, at(1_000_000, 0)), TooOld::default());
    }
}
