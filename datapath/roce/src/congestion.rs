//! Congestion control of a requester: a window of packets, and a rate that congestion notifications lower.
//!
//! The rate follows DCQCN with its recommended constants (Zhu et al., SIGCOMM 2015, section 3.2, reaction point).
//! The window shrinks by loss, as TCP's does (RFC 5681), for paths that drop packets without marking others.

use crate::time::Nanos;

/// Weight of a new sample in the estimate of congestion: DCQCN's g.
const GAIN: f64 = 1.0 / 256.0;
/// Nanoseconds after a notification until the estimate falls, and between two steps of recovery: DCQCN's K and timer.
const PERIOD: Nanos = 55_000;
/// Steps of fast recovery, each of which halves the distance to the target rate: DCQCN's F.
const FAST_STEPS: u32 = 5;
/// Bytes per second by which the target rate grows in a step after fast recovery (40 Mbit/s): DCQCN's R_AI.
const INCREASE: f64 = 5e6;
/// Lowest rate, bytes per second.
const LEAST_RATE: f64 = 1.25e6;
/// Fewest packets of the window.
const LEAST_WINDOW: f64 = 4.0;
/// Part of the line rate from which the requester sends without a rate again.
const RECOVERED: f64 = 0.999;

/// Congestion state of one queue pair.
#[derive(Debug)]
pub(crate) struct Congestion {
    /// Packets of the window without loss.
    most_window: f64,
    /// Packets of the window now.
    window: f64,
    /// Bytes per second of the port.
    line_rate: f64,
    /// Rate after a notification; `None` while the rate is the line's, and packets go as they come.
    reduced: Option<Reduced>,
    /// Time from which the next packet may go.
    next_at: Nanos,
}

/// Rate below the line's, and its way back.
#[derive(Debug)]
struct Reduced {
    /// Rate that recovery returns to, bytes per second: DCQCN's R_T.
    target: f64,
    /// Rate in force, bytes per second: DCQCN's R_C.
    rate: f64,
    /// Estimate of congestion, 0 to 1: DCQCN's alpha.
    estimate: f64,
    /// Steps of recovery since the last notification.
    steps: u32,
    /// Time of the next step.
    step_at: Nanos,
}

impl Congestion {
    /// Begins without congestion. `window` is the most packets under way, `line_rate` the port's bytes per second.
    #[must_use]
    pub(crate) fn new(window: u32, line_rate: f64) -> Self {
        let most_window = f64::from(window);
        Self { most_window, window: most_window, line_rate, reduced: None, next_at: 0 }
    }

    /// Number of packets that may be under way.
    #[must_use]
    pub(crate) fn window(&self) -> u32 {
        self.window as u32
    }

    /// Time from which the next packet may go.
    #[must_use]
    pub(crate) fn next_at(&self) -> Nanos {
        self.next_at
    }

    /// Notes that a packet with `bytes` bytes of payload is sent.
    pub(crate) fn sent(&mut self, bytes: usize, now: Nanos) {
        self.recover(now);
        if let Some(reduced) = &self.reduced {
            self.next_at = self.next_at.max(now) + (bytes as f64 / reduced.rate * 1e9) as Nanos;
        }
    }

    /// Notes that `packets` packets were acknowledged.
    pub(crate) fn acknowledged(&mut self, packets: u32) {
        self.window = (self.window + f64::from(packets) / self.window).min(self.most_window);
    }

    /// Notes that packets were lost.
    pub(crate) fn lost(&mut self) {
        self.window = (self.window / 2.0).max(LEAST_WINDOW.min(self.most_window));
    }

    /// Notes that the receiver saw congestion marks.
    pub(crate) fn notified(&mut self, now: Nanos) {
        self.recover(now);
        let line_rate = self.line_rate;
        let start = || Reduced { target: line_rate, rate: line_rate, estimate: 1.0, steps: 0, step_at: now };
        let reduced = self.reduced.get_or_insert_with(start);
        reduced.target = reduced.rate;
        reduced.rate = (reduced.rate * (1.0 - reduced.estimate / 2.0)).max(LEAST_RATE.min(line_rate));
        reduced.estimate = (1.0 - GAIN) * reduced.estimate + GAIN;
        (reduced.steps, reduced.step_at) = (0, now + PERIOD);
    }

    /// Does the steps of recovery that are due.
    fn recover(&mut self, now: Nanos) {
        let Some(reduced) = &mut self.reduced else { return };
        while now >= reduced.step_at {
            reduced.estimate *= 1.0 - GAIN;
            reduced.steps += 1;
            reduced.step_at += PERIOD;
            if reduced.steps > FAST_STEPS {
                reduced.target = (reduced.target + INCREASE).min(self.line_rate);
            }
            reduced.rate = f64::midpoint(reduced.rate, reduced.target);
            if reduced.rate > RECOVERED * self.line_rate {
                self.reduced = None;
                self.next_at = 0;
                return;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const LINE: f64 = 1.25e9;
    const PACKET: usize = 4096;

    /// Bytes per second that a sender with endless work sends within `time` nanoseconds.
    fn rate(congestion: &mut Congestion, from: Nanos, time: Nanos) -> f64 {
        let (mut now, mut bytes) = (from, 0);
        while now < from + time {
            now = congestion.next_at().max(now + (PACKET as f64 / LINE * 1e9) as Nanos);
            congestion.sent(PACKET, now);
            bytes += PACKET;
        }
        bytes as f64 / (now - from) as f64 * 1e9
    }

    #[test]
    fn a_notification_halves_the_rate_and_it_comes_back() {
        let mut congestion = Congestion::new(128, LINE);
        assert!(rate(&mut congestion, 0, 1_000_000) > 0.9 * LINE);
        congestion.notified(1_000_000);
        let halved = rate(&mut congestion, 1_000_000, PERIOD - 1);
        assert!((0.4..0.6).contains(&(halved / LINE)), "{halved}");
        assert!(rate(&mut congestion, 2_000_000, 1_000_000) > 0.9 * LINE);
    }

    #[test]
    fn loss_halves_the_window_and_acknowledgements_open_it() {
        let mut congestion = Congestion::new(128, LINE);
        congestion.lost();
        assert_eq!(congestion.window(), 64);
        for _ in 0..200 {
            congestion.acknowledged(64);
        }
        assert_eq!(congestion.window(), 128);
        for _ in 0..20 {
            congestion.lost();
        }
        assert_eq!(congestion.window(), 4);
    }

    proptest! {
        #[test]
        fn bounds_hold(window in 1u32..1024, events in proptest::collection::vec((0u8..4, 0u64..200_000), 0..200)) {
            let mut congestion = Congestion::new(window, LINE);
            let mut now = 0;
            for (event, later) in events {
                now += later;
                match event {
                    0 => congestion.notified(now),
                    1 => congestion.lost(),
                    2 => congestion.acknowledged(8),
                    _ => congestion.sent(PACKET, now.max(congestion.next_at())),
                }
                prop_assert!((1..=window).contains(&congestion.window()));
                // At the least rate a packet takes 3.3 ms.
                prop_assert!(congestion.next_at() <= now + 200 * 4_000_000);
            }
        }
    }
}
