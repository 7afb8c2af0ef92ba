//! Landing windows: reserved parts of the region that a publisher's NIC fills with batches, one behind the other.
//!
//! A write tells the broker the number of its window and the length of its batch. Both ends compute from that where
//! the batch lies.

use embarcadero_cxl::RegionOffset;
use embarcadero_verbs::RemoteRange;
use embarcadero_wire::batch::ALIGN_BYTES;

/// Used bytes of a window of `window` bytes, once a batch of `bytes` lies behind `used` used ones. The next batch begins
/// at a cache line.
fn used_after(window: u64, used: u64, bytes: u64) -> u64 {
    (used + bytes).next_multiple_of(ALIGN_BYTES).min(window)
}

/// Function that takes a window back. Its argument is the number of bytes, from the front, that hold batches.
type GiveBack = Box<dyn FnOnce(u64) + Send>;

/// Landing window at the broker. Dropping it gives back the part that holds no batch.
pub struct Window {
    at: RegionOffset,
    bytes: u64,
    used: u64,
    give_back: Option<GiveBack>,
}

impl Window {
    /// Window of `bytes` at offset `at` of the region. When it is dropped, `give_back` gets the number of bytes that hold
    /// batches.
    pub fn new(at: RegionOffset, bytes: u64, give_back: impl FnOnce(u64) + Send + 'static) -> Self {
        Self { at, bytes, used: 0, give_back: Some(Box::new(give_back)) }
    }

    /// Offset of the window in the region.
    #[must_use]
    pub fn at(&self) -> RegionOffset {
        self.at
    }

    /// Size, bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Bytes left for batches.
    #[must_use]
    pub fn room(&self) -> u64 {
        self.bytes - self.used
    }

    /// Offset in the region of the next batch.
    #[must_use]
    pub fn next(&self) -> RegionOffset {
        self.at.add(self.used)
    }

    /// Takes the batch of `bytes` that lies at [`Window::next`].
    ///
    /// # Panics
    /// When `bytes` exceeds [`Window::room`].
    pub fn take(&mut self, bytes: u64) {
        assert!(bytes <= self.room(), "a batch of {bytes} bytes in a window that has {}", self.room());
        self.used = used_after(self.bytes, self.used, bytes);
    }
}

impl Drop for Window {
    fn drop(&mut self) {
        if let Some(give_back) = self.give_back.take() {
            give_back(self.used);
        }
    }
}

/// Landing window at the publisher.
pub(crate) struct RemoteWindow {
    pub number: u32,
    to: RemoteRange,
    bytes: u64,
    used: u64,
}

impl RemoteWindow {
    /// Window `number` of a connection, which begins at `to`.
    pub(crate) fn new(number: u32, to: RemoteRange, bytes: u64) -> Self {
        Self { number, to, bytes, used: 0 }
    }

    /// Bytes left for batches.
    pub(crate) fn room(&self) -> u64 {
        self.bytes - self.used
    }

    /// Takes the place of the next batch, which has at most [`RemoteWindow::room`] bytes.
    pub(crate) fn place(&mut self, bytes: u64) -> RemoteRange {
        let to = self.to.offset(self.used);
        self.used = used_after(self.bytes, self.used, bytes);
        to
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::sync::Arc;
    use std::sync::atomic::{AtomicU64, Ordering};

    proptest! {
        #[test]
        fn both_ends_agree_on_where_batches_lie(window in 64u64..10_000, batches in prop::collection::vec(1u64..2000, 0..40)) {
            let given_back = Arc::new(AtomicU64::new(u64::MAX));
            let told = Arc::clone(&given_back);
            let mut broker = Window::new(RegionOffset(4096), window, move |used| told.store(used, Ordering::Relaxed));
            let mut publisher = RemoteWindow::new(0, RemoteRange { address: 4096, key: 0 }, window);
            let mut end = 0;
            for bytes in batches {
                prop_assert_eq!(broker.room(), publisher.room());
                if bytes > broker.room() {
                    break;
                }
                let at = broker.next().0;
                prop_assert_eq!(publisher.place(bytes).address, at);
                prop_assert!(at.is_multiple_of(ALIGN_BYTES) && at >= 4096 + end && at + bytes <= 4096 + window);
                broker.take(bytes);
                end = at + bytes - 4096;
            }
            drop(broker);
            let used = given_back.load(Ordering::Relaxed);
            prop_assert!(used >= end && used <= window);
        }
    }
}
