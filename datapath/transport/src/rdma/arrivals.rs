//! RDMA WRITEs of a publisher that were not looked at yet.

use super::WANTS_WINDOW;
use std::collections::VecDeque;

/// Bytes of the smallest batch in a landing window: a header, and one length.
const LEAST_BATCH_BYTES: u64 = 128;

/// RDMA WRITE of a publisher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Arrival {
    pub(super) immediate: u32,
    pub(super) bytes: u32,
}

impl Arrival {
    /// Returns true for a publisher that has a batch and no window for it.
    pub(super) fn wants_window(self) -> bool {
        self.bytes == 0 && self.immediate & WANTS_WINDOW != 0
    }
}

/// RDMA WRITEs of a publisher that were not looked at yet, in order.
pub(super) struct Arrivals {
    queue: VecDeque<Arrival>,
    most: usize,
}

impl Arrivals {
    /// Queue with room for all batches that fit into `bytes` of landing windows, and for a request for the next window.
    pub(super) fn new(bytes: u64) -> Self {
        Self { queue: VecDeque::new(), most: (bytes / LEAST_BATCH_BYTES) as usize + 1 }
    }

    /// Adds a WRITE. Returns false when the publisher has written more often than its windows allow.
    #[must_use]
    pub(super) fn push(&mut self, arrival: Arrival) -> bool {
        if arrival.wants_window() && self.queue.back().is_some_and(|last| last.wants_window()) {
            // The later request says all that the earlier one did.
            self.queue.pop_back();
        }
        let has_room = self.queue.len() < self.most;
        if has_room {
            self.queue.push_back(arrival);
        }
        has_room
    }

    /// First WRITE.
    pub(super) fn front(&self) -> Option<Arrival> {
        self.queue.front().copied()
    }

    /// Removes the first WRITE.
    pub(super) fn pop_front(&mut self) {
        self.queue.pop_front();
    }

    /// Returns true when every WRITE was looked at.
    pub(super) fn is_empty(&self) -> bool {
        self.queue.is_empty()
    }

    /// Forgets all WRITEs.
    pub(super) fn clear(&mut self) {
        self.queue = VecDeque::new();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn writes_that_nobody_looks_at_take_bounded_memory() {
        let mut arrivals = Arrivals::new(4 * LEAST_BATCH_BYTES);
        let batch = Arrival { immediate: 0, bytes: LEAST_BATCH_BYTES as u32 };
        let request = |kept| Arrival { immediate: WANTS_WINDOW | kept, bytes: 0 };
        assert!((0..4).all(|_| arrivals.push(batch)), "the windows hold that many");
        assert!((0..100).all(|kept| arrivals.push(request(kept))), "requests replace each other");
        assert_eq!(arrivals.queue.len(), 5);
        assert!(!arrivals.push(batch) && !arrivals.push(Arrival { immediate: 7, bytes: 0 }));

        (0..4).for_each(|_| arrivals.pop_front());
        assert_eq!(arrivals.front(), Some(request(99)));
        arrivals.pop_front();
        assert!(arrivals.is_empty());
    }
}
