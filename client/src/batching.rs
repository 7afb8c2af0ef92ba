//! Control of the sizes of batches, and of the moment at which a batch is sealed.

// [[DEVIATION_001]] The paper's clients send batches of one size.

use std::time::Duration;

/// Number of batches in a row that must agree before the size changes.
const SAMPLES_TO_RESIZE: u32 = 16;
/// Number of waiting batches from which on the transport counts as the bottleneck.
const BACKLOG_LIMIT: usize = 8;
/// Least number of batches that the buffer holds, so that every connection has work. Queueing more only adds latency.
pub(crate) const BUFFERED_BATCHES: usize = 16;
/// Largest number of agreeing samples before the size halves, in multiples of [`SAMPLES_TO_RESIZE`].
const MAX_PATIENCE: u32 = 64;

/// State of a publisher's buffer, which decides whether the open batch is sealed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct BufferState {
    /// Number of batches that are sealed and not acknowledged.
    pub(crate) in_flight: usize,
    /// Bytes of the open batch: the one that is being filled.
    pub(crate) open_bytes: usize,
    /// Number of messages in the open batch.
    pub(crate) open_messages: u32,
    /// True when the batch before the open one was full: the application streams.
    pub(crate) streaming: bool,
    /// True when the application waits for the open batch, or has not called for a while.
    pub(crate) awaited: bool,
}

/// Measurements of one sealed batch, taken after it was offered to the connections.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct SealStats {
    /// True when the batch was sealed because the next message did not fit.
    pub(crate) full: bool,
    /// Time since the batch before was sealed.
    pub(crate) interval: Duration,
    /// Part of `interval` that was spent writing batches to connections.
    pub(crate) sending: Duration,
    /// Number of batches that no connection has taken yet. It stays high when the application fills batches faster than
    /// the transport carries them and brokers acknowledge them.
    pub(crate) waiting: usize,
}

/// Controller of batch sizes. It has no clock: sizes depend only on the measurements that it is given.
///
/// - Sizes lie between two bounds.
/// - The size doubles while the transport is the bottleneck: 8 batches or more wait, or writing takes half of the time.
///   Fewer batches then carry more.
/// - The size halves while no batch waits and writing takes less than a quarter of the time. Messages then wait less for
///   their batch to fill.
/// - A doubling at most halves both measures. It therefore never causes the condition for halving.
/// - Noise, or a fixed cost per batch, can still make the two alternate. Each time, the next halving needs twice as many
///   samples, so that a steady load settles.
/// - With equal bounds the size is fixed, which is the paper's policy at 512 KiB.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BatchSizer {
    min: usize,
    /// Upper bound under load, bytes. Only a large message needs more, up to `max`.
    loaded_max: usize,
    max: usize,
    size: usize,
    /// Number of samples in a row that asked for doubling.
    crowded: u32,
    /// Number of samples in a row that asked for halving.
    calm: u32,
    /// Calm samples before the size halves, in multiples of [`SAMPLES_TO_RESIZE`].
    patience: u32,
    /// True when the last change was to halve.
    halved: bool,
}

impl BatchSizer {
    /// Controller of batches of `min` to `max` bytes, header included, which begins with `min`.
    ///
    /// `buffer_bytes` is the size of the publisher's buffer. Under load batches grow to at most a sixteenth of that.
    pub(crate) fn between(min: usize, max: usize, buffer_bytes: usize) -> Self {
        let max = max.max(min);
        let loaded_max = (buffer_bytes / BUFFERED_BATCHES).clamp(min, max);
        Self { min, loaded_max, max, size: min, crowded: 0, calm: 0, patience: 1, halved: false }
    }

    /// Limits growth under load to `bytes`, but never below the smallest size.
    pub(crate) fn with_loaded_max(self, bytes: usize) -> Self {
        Self { loaded_max: self.loaded_max.min(bytes).max(self.min), ..self }
    }

    /// Size of the next batch to be filled, bytes, header included.
    #[inline]
    pub(crate) fn size(&self) -> usize {
        self.size
    }

    /// Size of the largest batch, bytes, header included. Only a large message needs it.
    pub(crate) fn largest(&self) -> usize {
        self.max
    }

    /// Returns true when the open batch should be sealed now. A batch that cannot take the next message is sealed in any
    /// case.
    ///
    /// When nothing is in flight, a batch goes with its first message, or once the application waits for it. Light load
    /// therefore pays no delay. An application that streams fills its batches, however fast they are acknowledged.
    #[inline]
    pub(crate) fn should_seal(&self, state: BufferState) -> bool {
        let nothing_under_way = state.in_flight == 0;
        let lone = state.open_messages == 1 && !state.streaming;
        state.open_bytes >= self.size || (nothing_under_way && (lone || state.awaited))
    }

    /// Adjusts the size after a batch was sealed.
    pub(crate) fn record_seal(&mut self, sealed: SealStats) {
        if !sealed.full {
            // The application pauses: a load that was steady is over.
            self.patience = 1;
        }
        let busy = sealed.waiting >= BACKLOG_LIMIT || sealed.sending * 2 >= sealed.interval;
        let idle = sealed.waiting == 0 && sealed.sending * 4 < sealed.interval;
        if sealed.full && busy {
            (self.crowded, self.calm) = (self.crowded + 1, 0);
        } else if idle {
            (self.crowded, self.calm) = (0, self.calm + 1);
        } else {
            (self.crowded, self.calm) = (0, 0);
        }
        if self.crowded == SAMPLES_TO_RESIZE {
            if self.halved {
                self.patience = (self.patience * 2).min(MAX_PATIENCE);
            }
            self.change((self.size * 2).min(self.loaded_max), false);
        } else if self.calm >= SAMPLES_TO_RESIZE * self.patience {
            self.change((self.size / 2).max(self.min), true);
        }
    }

    fn change(&mut self, size: usize, halved: bool) {
        (self.crowded, self.calm) = (0, 0);
        if size != self.size {
            (self.size, self.halved) = (size, halved);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const MIN: usize = 64 << 10;
    const MAX: usize = 4 << 20;
    const DOUBLINGS: usize = 6;

    const BUFFER: usize = 64 << 20;

    /// Model of an application that publishes at a rate, a buffer, and a transport with costs per batch and per byte.
    /// Times are in nanoseconds, rates in bytes per nanosecond (GB/s).
    struct Plant {
        sizer: BatchSizer,
        offered: f64,
        rate: f64,
        per_batch: f64,
        /// Part of the transport's work that the publishing thread does, 0 to 1.
        own: f64,
        /// Bytes that wait for the transport.
        backlog: f64,
        changes: usize,
    }

    impl Plant {
        fn new(offered: f64, rate: f64, per_batch: f64, own: f64) -> Self {
            let sizer = BatchSizer::between(MIN, MAX, BUFFER);
            Self { sizer, offered, rate, per_batch, own, backlog: 0.0, changes: 0 }
        }

        fn fill(&mut self, batches: usize) {
            for _ in 0..batches {
                let size = self.sizer.size() as f64;
                let service = self.per_batch + size / self.rate;
                let sending = self.own * service;
                let interval = (size / self.offered).max(sending);
                // While a batch fills, the transport takes from the backlog; a full buffer holds the application up.
                self.backlog = (self.backlog + size - interval / service * size).clamp(0.0, BUFFER as f64);
                let before = self.sizer.size();
                self.sizer.record_seal(SealStats {
                    full: true,
                    interval: Duration::from_nanos(interval as u64),
                    sending: Duration::from_nanos(sending as u64),
                    waiting: (self.backlog / size) as usize,
                });
                self.changes += usize::from(self.sizer.size() != before);
            }
        }
    }

    fn any_sealed() -> impl Strategy<Value = SealStats> {
        (any::<bool>(), 0u64..1000, 0u64..1000, 0usize..40).prop_map(|(full, a, b, waiting)| {
            let (sending, interval) = (Duration::from_micros(a.min(b)), Duration::from_micros(a.max(b)));
            SealStats { full, interval, sending, waiting }
        })
    }

    #[test]
    fn a_lone_message_goes_at_once_and_others_gather() {
        let sizer = BatchSizer::between(1000, 1000, 10_000);
        let lone = BufferState { open_bytes: 70, open_messages: 1, ..BufferState::default() };
        assert!(sizer.should_seal(lone));
        assert!(!sizer.should_seal(BufferState { in_flight: 1, ..lone }));
        assert!(!sizer.should_seal(BufferState { streaming: true, ..lone }));
        assert!(!sizer.should_seal(BufferState { open_messages: 2, ..lone }));
        assert!(sizer.should_seal(BufferState { open_messages: 2, awaited: true, ..lone }));
        assert!(sizer.should_seal(BufferState { streaming: true, awaited: true, ..lone }));
        assert!(sizer.should_seal(BufferState { in_flight: 9, open_bytes: 1000, open_messages: 20, ..lone }));
    }

    #[test]
    fn a_burst_is_not_a_load() {
        let mut sizer = BatchSizer::between(MIN, MAX, BUFFER);
        let interval = Duration::from_micros(10);
        for _ in 0..100 {
            let crowded = SealStats { full: true, interval, waiting: 100, ..SealStats::default() };
            (0..SAMPLES_TO_RESIZE - 1).for_each(|_| sizer.record_seal(crowded));
            sizer.record_seal(SealStats { waiting: BACKLOG_LIMIT - 1, ..crowded });
        }
        assert_eq!(sizer.size(), MIN);
    }

    proptest! {
        #[test]
        fn sizes_stay_within_their_bounds(
            min in 1024usize..100_000, times in 1usize..100, cap in 0usize..1_000_000,
            told in prop::collection::vec(any_sealed(), 0..2000),
        ) {
            let mut sizer = BatchSizer::between(min, min * times, BUFFER).with_loaded_max(cap);
            prop_assert_eq!(sizer.largest(), min * times);
            for sealed in told {
                let before = sizer.size();
                sizer.record_seal(sealed);
                prop_assert!((min..=(min * times).min(cap.max(min))).contains(&sizer.size()));
                prop_assert!(sizer.size() <= before * 2 && sizer.size() * 2 >= before);
            }
        }

        #[test]
        fn a_steady_load_settles(
            offered in 0.05f64..20.0, rate in 0.1f64..12.0, per_batch in 0f64..100_000.0, own in 0f64..1.0,
        ) {
            let mut plant = Plant::new(offered, rate, per_batch, own);
            plant.fill(20_000);
            plant.changes = 0;
            plant.fill(100_000);
            // At worst one look at the smaller size in each of the longest waits.
            let looks = 100_000 / (SAMPLES_TO_RESIZE * MAX_PATIENCE) as usize + 1;
            prop_assert!(plant.changes <= 2 * looks, "{} changes", plant.changes);
        }

        #[test]
        fn a_step_of_the_load_is_followed(rate in 0.5f64..12.0, light in 0.01f64..0.12, own in 0f64..1.0) {
            // A saturated transport: up within a few sixteens of batches for each doubling.
            let mut plant = Plant::new(20.0, rate, 5_000.0, own);
            plant.fill(SAMPLES_TO_RESIZE as usize * 4 * DOUBLINGS);
            let loaded_max = plant.sizer.size();
            prop_assert!(loaded_max >= 16 * MIN, "{loaded_max} bytes under a load that the transport cannot take");
            // A load that it takes with ease: down as soon.
            plant.offered = light * rate;
            plant.fill(SAMPLES_TO_RESIZE as usize * 4 * DOUBLINGS);
            prop_assert_eq!(plant.sizer.size(), MIN);
        }

        #[test]
        fn equal_bounds_fix_the_size(told in prop::collection::vec(any_sealed(), 0..500)) {
            let mut sizer = BatchSizer::between(MIN, MIN, BUFFER);
            told.into_iter().for_each(|sealed| sizer.record_seal(sealed));
            prop_assert_eq!(sizer.size(), MIN);
        }
    }
}
