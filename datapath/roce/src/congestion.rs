//! How fast a requester may send: a window of packets, and a rate that congestion notifications lower.
//!
//! The rate follows DCQCN (Zhu et al., SIGCOMM 2015, section 3.2, reaction point) with its recommended constants; the
//! window shrinks by loss, as TCP's does (RFC 5681), for paths that drop without marking.

use super::Nanos;

/// g, by which the estimate of congestion moves.
const GAIN: f64 = 1.0 / 256.0;
/// How long after a notification the estimate falls, and how long a step of recovery takes.
const PERIOD: Nanos = 55_000;
/// F: steps that halve the way back, before the rate grows beyond where it was.
const FAST_STEPS: u32 = 5;
/// How much it grows in a step then, bytes a second (40 Mbit/s).
const INCREASE: f64 = 5e6;
/// It does not fall below this, bytes a second.
const LEAST_RATE: f64 = 1.25e6;
/// Fewest packets of the window.
const LEAST_WINDOW: f64 = 4.0;

/// Of one queue pair.
#[derive(Debug)]
pub struct Congestion {
    most_window: f64,
    window: f64,
    line_rate: f64,
    /// `None` until a notification came, and when the rate is the line's again: packets then go as they can.
    reduced: Option<Reduced>,
    next_at: Nanos,
}

#[derive(Debug)]
struct Reduced {
    target: f64,
    rate: f64,
    estimate: f64,
    steps: u32,
    step_at: Nanos,
}

impl Congestion {
    /// `window`: most packets under way. `line_rate`: bytes a second of the port.
    #[must_use]
    pub fn new(window: u32, line_rate: f64) -> Self {
        let most_window = f64::from(window);
        Self { most_window, window: most_window, line_rate, reduced: None, next_at: 0 }
    }

    /// Packets that may be under way.
    #[must_use]
    pub fn window(&self) -> u32 {
        self.window as u32
    }

    /// When the next packet may go.
    #[must_use]
    pub fn next_at(&self) -> Nanos {
        self.next_at
    }

    /// A packet of so many bytes goes.
    pub fn sent(&mut self, bytes: usize, now: Nanos) {
        self.recover(now);
        if let Some(reduced) = &self.reduced {
            self.next_at = self.next_at.max(now) + (bytes as f64 / reduced.rate * 1e9) as Nanos;
        }
    }

    /// So many packets were acknowledged.
    pub fn acknowledged(&mut self, packets: u32) {
        self.window = (self.window + f64::from(packets) / self.window).min(self.most_window);
    }

    /// Packets were lost.
    pub fn lost(&mut self) {
        self.window = (self.window / 2.0).max(LEAST_WINDOW.min(self.most_window));
    }

    /// The receiver saw congestion marks.
    pub fn notified(&mut self, now: Nanos) {
        self.recover(now);
        let line_rate = self.line_rate;
        let start = || Reduced { target: line_rate, rate: line_rate, estimate: 1.0, steps: 0, step_at: now };
        let reduced = self.reduced.get_or_insert_with(start);
        reduced.target = reduced.rate;
        reduced.rate = (reduced.rate * (1.0 - reduced.estimate / 2.0)).max(LEAST_RATE.min(line_rate));
        reduced.estimate = (1.0 - GAIN) * reduced.estimate + GAIN;
        (reduced.steps, reduced.step_at) = (0, now + PERIOD);
    }

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
            if reduced.rate > 0.999 * self.line_rate {
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

    /// Bytes a second that are sent in a time by one who always has more.
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
